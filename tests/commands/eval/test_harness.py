"""A task of lm-evaluation-harness, asked of a random model whose tokens are bytes."""

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "sparsify-compiler[eval]"')
pytest.importorskip("wonderwords", reason='RULER\'s words are not installed: pip install "sparsify-compiler[eval]"')
pytest.importorskip("nltk", reason='nltk is not installed: pip install "sparsify-compiler[eval]"')

from sparsify.commands import main as cli
from sparsify.commands.eval import harness

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
LENGTH = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers and a tokenizer that gives every byte a token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("models") / "llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(found)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 0, "bos_token_id": None}
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(found)
    return found


def test_a_task_is_asked_under_every_setting_and_cache(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("The grass is green. " * 200)
    words = ["eval", str(folder), "--tasks", "niah_single_1", "--lengths", "1K", "--samples", "3", "--batch", "2", "--text", "text.txt"]
    words += ["--setting", "tau=0.1", "--setting", "eager", "--cache", "streaming_llm:64", "-o", "lower=eager", "--windows", "2"]
    assert cli.main([*words, "--json", "out.json", "--plot", "map.png", "--debug"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    cells = {(cell["setting"], cell["task"]): cell for cell in found["cells"]}
    names = ["dense", "eager", "τ 0.1", "streaming_llm 64, question inside", "streaming_llm 64, question outside"]
    assert {setting for setting, task in cells if task == "niah_single_1"} == set(names)
    assert {setting for setting, task in cells if task == "nll of text"} == set(names[:3])
    for cell in cells.values():
        assert cell["length"] == LENGTH and cell["error"] is None
        assert cell["questions"] == cells["dense", cell["task"]]["questions"]
    assert len(set(cells["dense", "niah_single_1"]["questions"])) == 3 == len(cells["dense", "niah_single_1"]["depths"])
    assert cells["dense", "nll of text"]["scores"] == pytest.approx(cells["eager", "nll of text"]["scores"], abs=1e-4)
    assert cells["τ 0.1", "nll of text"]["scores"] != pytest.approx(cells["dense", "nll of text"]["scores"], abs=1e-4)
    assert 0 < cells["τ 0.1", "niah_single_1"]["density"] < 1 and cells["dense", "niah_single_1"]["density"] is None
    assert found["machine"]["lm_eval"] and found["model_sha256"] and (tmp_path / "map.png").stat().st_size
    assert "worst of τ 0.1: niah_single_1 at 1K" in out


def test_an_unknown_task_is_refused(folder, monkeypatch):
    with pytest.raises(harness.UnsupportedError, match="cannot load the task"):
        harness.load(["no_such_task"], LENGTH, None, str(folder), 1, 2048, False)
