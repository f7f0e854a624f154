"""Weights as int8 with a scale a row: close to what they were, in small files, and all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib import int8_weights

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
)  # fmt: skip


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def state(source: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}


def test_rows_are_rounded_to_their_own_scale() -> None:
    weight = torch.randn(5, 40) * torch.tensor([1e-3, 1, 50, 0, 1])[:, None]
    whole, scale = int8_weights.quantise(weight)
    assert whole.dtype == torch.int8 and whole.abs().max() == 127
    assert ((whole.float() * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-9).all()


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1 << 20, 1), (30_000, 4)])
def test_what_is_loaded_computes_nearly_the_same(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    source = model()
    files = int8_weights.save(state(source), CONFIG, tmp_path, shard_bytes)
    assert len(files) == 1 + shards
    assert all(file.stat().st_size < shard_bytes + 8192 for file in files)
    loaded = int8_weights.load(tmp_path, torch.float32)
    ids = torch.randint(0, 300, (1, 50))
    with torch.no_grad():
        was, now = source(ids).logits, loaded(ids).logits
    assert (was - now).norm() / was.norm() < 0.02
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.head_dim == 32
    assert int8_weights.load(tmp_path).dtype == torch.bfloat16


def test_a_missing_file_or_matrix_is_an_error(tmp_path: Path) -> None:
    files = int8_weights.save(state(model()), CONFIG, tmp_path / "a", 30_000)
    files[-1].unlink()
    with pytest.raises(FileNotFoundError, match="3 shards"):
        int8_weights.load(tmp_path / "a")
    part = state(model())
    del part["model.layers.1.mlp.up_proj.weight"]
    int8_weights.save(part, CONFIG, tmp_path / "b")
    with pytest.raises(RuntimeError, match="up_proj"):
        int8_weights.load(tmp_path / "b")
