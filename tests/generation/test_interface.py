"""`attn_implementation="sparsify"` without compiling, and `CompileConfig(backend="sparsify")` in `generate()`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import api, testing
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.generation.compat import with_cache

ROOT = Path(__file__).parents[2]
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


def models(**options) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """One model twice: with SDPA, and with sparsify's attention under some options."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, attn_implementation="sdpa")).eval()
    ours = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, attn_implementation="sparsify")).eval()
    ours.load_state_dict(dense.state_dict())
    if options:
        ours.config.sparsify = {"strict": True, **options}
    return dense, ours


def prompt(length: int = 200, rows: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(length))}


def padded() -> dict[str, torch.Tensor]:
    inputs = prompt(40, 2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :9] = 0
    return inputs


@torch.no_grad()
def run(model: LlamaForCausalLM, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Logits, and how many sites were rewritten on the way."""
    with api.collect_plans() as plans:
        logits = model(**inputs).logits
    return logits, sum(len(plan.rewritten) for plan in plans)


@pytest.mark.parametrize("inputs", [prompt(), padded()], ids=["plain", "padded"])
def test_dense_attention_stays_what_it_is(inputs) -> None:
    dense, ours = models(passes=["dense"])
    logits, rewritten = run(ours, inputs)
    torch.testing.assert_close(logits, run(dense, inputs)[0], atol=1e-4, rtol=1e-4)
    assert rewritten == 1, "one function for all layers"


def test_a_lossy_method_acts() -> None:
    dense, ours = models(passes=["sink_window"], sink_window={"sinks": 1, "window": 8}, min_length=0)
    logits, rewritten = run(ours, prompt())
    assert rewritten == 1
    assert torch.allclose(logits[:, :8], run(dense, prompt())[0][:, :8], atol=1e-4)
    assert not torch.allclose(logits[:, 50:], run(dense, prompt())[0][:, 50:], atol=1e-2)


def test_blocks_are_chosen_and_all_of_them_are_dense() -> None:
    dense, ours = models(passes=["xattention"], xattention={"threshold": 1.0}, min_length=0)
    with testing.record_blocks() as selections:
        logits, _ = run(ours, prompt(300))
    assert len(selections) == SHAPE["num_hidden_layers"]
    torch.testing.assert_close(logits, run(dense, prompt(300))[0], atol=1e-4, rtol=1e-4)


def test_tokens_are_those_of_the_model() -> None:
    dense, ours = models(passes=["dense"])
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for inputs in (prompt(30), padded()):
        assert torch.equal(dense.generate(**inputs, **how), ours.generate(**inputs, **how))


def test_a_compiled_model_is_rewritten_as_any() -> None:
    dense, ours = models()
    sparsify.compile(ours, passes=["dense"], strict=True, lower="eager")
    logits, rewritten = run(ours, prompt())
    torch.testing.assert_close(logits, run(dense, prompt())[0], atol=1e-4, rtol=1e-4)
    assert rewritten == SHAPE["num_hidden_layers"]


def test_a_sparse_cache_serves_it() -> None:
    dense, ours = models()
    wanted = run(dense, prompt(30))[0]
    cache = sparsify.SparseCache(ours.config, "full")
    logits = run(ours, prompt(30) | with_cache(ours, cache))[0]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 30 and ours.config._attn_implementation == "sparsify"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rules": [{"layers": "0", "method": "dense"}]}, ConfigError, "rules name layers"),
        ({"xattentoin": {}}, ConfigError, "xattention"),
    ],
)
def test_what_it_cannot_do_it_says(options, error, said) -> None:
    _, ours = models(**options)
    with pytest.raises(error, match=said):
        run(ours, prompt())


def test_weights_are_never_written_out() -> None:
    from sparsify.generation import interface

    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnsupportedError, match="weights"):
        interface.attend(torch.nn.Identity(), query, query, query, None, output_attentions=True)


@pytest.mark.parametrize(
    "imports", ["import sparsify, transformers", "import transformers, sparsify", "from sparsify import SparseCache", "import sparsify.api"]
)
@pytest.mark.samples(1)
def test_importing_sparsify_registers(imports) -> None:
    code = f"{imports}; from transformers import AttentionInterface; assert 'sparsify' in AttentionInterface()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generate_compiles_its_steps_with_the_backend() -> None:
    dense, _ = models()
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = dense.generate(**prompt(30), **how)
    given = CompileConfig(backend="sparsify", mode=None, options={"passes": ["dense"], "strict": True, "lower": "eager"})
    given._compile_all_devices = True
    with api.collect_plans() as plans:
        said = dense.generate(**prompt(30), **how, cache_implementation="static", compile_config=given)
    assert torch.equal(said, wanted)
    assert sum(len(plan.rewritten) for plan in plans) == SHAPE["num_hidden_layers"]
