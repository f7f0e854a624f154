"""What `make demo` asks, draws and accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import demo
from benchmarks.lib import code_model, code_prompt, needles, recall


@pytest.fixture(scope="module")
def maker() -> recall.Maker:
    return code_model.maker(needles.stdlib_text(100_000).decode(errors="ignore"))


@pytest.fixture(scope="module")
def item(maker: recall.Maker) -> code_prompt.Prompt:
    return code_prompt.prompt(maker, 4096, 3, 12, 9)


@pytest.mark.parametrize(
    ("dense", "sparse", "density", "ratio", "problems"),
    [
        (20, 20, 0.05, 0.4, 0),
        (18, 17, 0.249, 0.6, 0),
        (17, 17, 0.2, 0.4, 1),
        (20, 18, 0.2, 0.4, 1),
        (20, 20, 0.25, 0.4, 1),
        (20, 20, float("nan"), 0.4, 1),
        (20, 20, 0.2, 0.61, 1),
        (20, 20, 0.2, float("nan"), 1),
        (3, 0, 0.9, 2.0, 4),
    ],
)
def test_demo_fails_when_it_should(dense: int, sparse: int, density: float, ratio: float, problems: int) -> None:
    assert len(demo.verdict(dense, sparse, 20, density, ratio)) == problems


def test_questions_name_facts_that_the_prompt_tells(maker: recall.Maker, item: code_prompt.Prompt) -> None:
    assert item.ids.shape == (1, 4096) and len(item.questions) == 9
    decode = lambda start, end: maker.tokenizer.decode(item.ids[0, start:end].tolist())
    for one in item.questions:
        assert decode(one.start, one.start + one.size).strip() == one.value
        assert one.key in one.text and " ".join(decode(0, one.start).split()).endswith(one.text)
        assert one.fact + one.size < 4096 - item.kept
        told = decode(one.fact - 20, one.fact + one.size)
        assert one.key in told and told.endswith(one.value)


def test_prompts_are_named_by_their_seed(maker: recall.Maker, item: code_prompt.Prompt) -> None:
    again, other = (code_prompt.prompt(maker, 4096, seed, 12, 9) for seed in (3, 4))
    assert torch.equal(again.ids, item.ids) and again.questions == item.questions
    assert not torch.equal(other.ids, item.ids)
    with pytest.raises(ValueError, match="room"):
        code_prompt.prompt(maker, 300, 3, 24, 20)
    with pytest.raises(ValueError, match="3 questions about 2 facts"):
        code_prompt.prompt(maker, 4096, 3, 2, 3)


def test_logits_of_the_last_tokens_are_enough(item: code_prompt.Prompt) -> None:
    logits = torch.nn.functional.one_hot(item.ids.roll(-1, 1), 8192).float()[:, -item.kept :] * 30
    assert item.right(logits) == [True] * 9 and item.nll(logits) < 1e-6
    wrong = item.questions[4]
    logits[0, wrong.start + 2 - (4096 - item.kept)] = 0
    assert item.right(logits) == [number != 4 for number in range(9)] and item.nll(logits) < 1e-6


def test_demo_draws_every_head(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    maps = [torch.rand(1, 3, 9, 9) < 0.4 for _ in range(2)]
    demo.picture(maps, tmp_path / "deep" / "blocks.png", "title")
    assert (tmp_path / "deep" / "blocks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert demo.main(["--seed", "3", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "7 of 7 attention sites rewritten" in said and "seed 3" in said
    assert (tmp_path / "blocks.png").stat().st_size > 10_000
    # a window cannot answer: the demo must notice
    window = tmp_path / "window.toml"
    window.write_text('passes = ["xattention", "dense"]\nmin_length = 0\n[xattention]\nthreshold = 0.0\n')
    assert demo.main(["--seed", "3", "--length", "4096", "--out", str(tmp_path), "--config", str(window)]) == 1
    assert "failed: sparse attention answered" in capsys.readouterr().out
