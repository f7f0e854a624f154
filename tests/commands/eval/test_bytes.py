"""Byte-level needles and NLL through the command, on a random model."""

import json

import pytest
import torch

from sparsify.commands import main as cli
from sparsify.commands.eval import needles

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    found = tmp_path_factory.mktemp("models") / "llama"
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(found)
    return found


def test_needles_are_asked_at_once_and_by_turns(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The grass is green. " * 200)
    words = ["eval", folder, "--tasks", "needles_json", "--lengths", "1K", "--samples", "4", "--text", "text.txt", "--windows", "2"]
    words += ["--setting", "tau=0.1", "--cache", "streaming_llm:64", "-o", "lower=eager", "--json", "out.json", "--debug"]
    assert cli.main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    cells = {(cell["setting"], cell["task"]): cell for cell in found["cells"]}
    turns = ["needles_json_turns, first", "needles_json_turns, later"]
    for setting in ("dense", "τ 0.1"):
        assert {task for name, task in cells if name == setting} == {"needles_json", *turns, "nll of text"}
    for side in ("inside", "outside"):
        assert {task for name, task in cells if name == f"streaming_llm 64, question {side}"} == set(turns)
    assert [len(cells["dense", turn]["scores"]) for turn in turns] == [1, 3]
    assert len(cells["dense", "needles_json"]["depths"]) == 4
    assert cells["τ 0.1", "nll of text"]["scores"] != pytest.approx(cells["dense", "nll of text"]["scores"], abs=1e-4)
    assert 0 < cells["τ 0.1", "needles_json"]["density"] < 1 and len(cells["τ 0.1", "needles_json"]["density_by_layer"]) == 2
    assert "needles_json" in capsys.readouterr().out and found["machine"]["torch"] and found["text_sha256"]


@pytest.mark.parametrize("inside", [True, False])
def test_turns_end_where_the_prompt_does(inside):
    """Every byte is fed once and in order, and an answer is right where the bytes before it foretell it."""
    item = needles.prompt(1024, bytes(range(97, 123)) * 100, 0, needles=4, asks=3)
    fed = []

    def feed(ids):
        fed.extend(ids[0].tolist())
        after = torch.tensor([*item.ids[0, 1:].tolist(), 0])[len(fed) - ids.shape[1] : len(fed)]
        return torch.nn.functional.one_hot(after, 256)[None].float()

    assert list(needles.right_by_turn(feed, item, inside)) == [True] * 3 and fed == item.ids[0].tolist()
    fed.clear()
    wrong = torch.zeros(1024, dtype=torch.bool)
    wrong[item.answers[1][0] + 2] = True  # one byte of the second answer is guessed wrongly

    def careless(ids):
        logits = feed(ids)
        places = torch.arange(len(fed) - ids.shape[1], len(fed)) + 1  # of the bytes that are foretold
        return torch.where(wrong[places.clamp(max=1023)][None, :, None], logits.roll(1, -1), logits)

    assert list(needles.right_by_turn(careless, item, inside)) == [True, False, True]
