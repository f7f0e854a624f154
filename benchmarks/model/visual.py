"""A prompt of images: prefill of a model that sees, with all image tokens and with some, beside eager PyTorch.

    python -m benchmarks run visual                                    # LLaVA of a 7B shape, 2880 image tokens, a quarter goes on
    python -m benchmarks run visual --shape tiny --images 2 --device cpu

Variants, by turns in one process:

    eager       uncompiled
    dense       under `sparsify.compile`, all tokens
    fastv       image tokens leave behind the second layer (arXiv 2403.06764)
    divprune    they leave before the first one (arXiv 2503.02175)

The model is LLaVA-1.5's with random weights, made on the device: speed does not depend on them. `images` images of 576 tokens each, their
vision tower included, and `text` tokens around them; cache on, logits of the last token. Appends to results/visual.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify
from benchmarks.lib import records
from benchmarks.lib.models import clean, peak_bytes
from benchmarks.model import Visual
from sparsify.commands.bench.clock import Clock, reason
from sparsify.generation.regions import regional

VARIANTS = ("eager", "dense", "fastv", "divprune")
# LLaVA-1.5-7B's published configuration (CLIP ViT-L/14 at 336 pixels, Vicuna 7B), and one that a CPU runs in no time
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "7b": {
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 1 << 16,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
    },
    "tiny": {
        "text_config": {
            "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1 << 16,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "projection_dim": 64,
        },
    },
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--text", type=int, default=64, help="tokens of text, before and behind the images")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the image tokens that go on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--lower", choices=["inductor", "eager"], default="inductor", help="eager: rewritten graphs are not compiled")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "visual.jsonl")
    return parser.parse_args(arguments)


def build(shape: str, device: str) -> Any:
    """bf16 on a GPU, float32 on a CPU."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    fields: dict[str, Any] = SHAPES[shape] | {"image_token_id": SHAPES[shape]["text_config"]["vocab_size"] - 1}
    config = LlavaConfig(**fields)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    return model.to(device).eval()


def prompt(model: Any, images: int, text: int) -> dict[str, Tensor]:
    """Random pixels and tokens."""
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(0)
    each = (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(0, model.config.image_token_id, (1, text + images * each), generator=generator)
    ids[:, text // 2 : text // 2 + images * each] = model.config.image_token_id
    pixels = torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}


def compile_variant(model: Any, variant: str, keep: float, lower: str) -> None:
    torch._dynamo.reset()
    regional.remove(model)
    model._compiled_call_impl = None
    if variant == "eager":
        return
    passes = ["dense"] if variant == "dense" else [variant, "dense"]
    options: dict[str, Any] = {} if variant == "dense" else {variant: {"keep": keep}}
    sparsify.compile(model, passes=passes, strict=True, lower=lower, progress=False, **options)


@torch.no_grad()
def measure(run: Callable[[], Any], repeats: int, device: str) -> dict[str, Any]:
    """Median and times in seconds, of the first call too; peak memory in bytes; tokens that a layer's cache holds, on average."""
    clock = Clock(device)
    clean(device)
    first, cache = clock.once(run)
    clean(device)
    times = [clock.once(run)[0] / 1e3 for _ in range(repeats)]
    held = [layer.keys.shape[2] for layer in cache.layers]
    return {
        "s": statistics.median(times),
        "times_s": times,
        "first_call_s": first / 1e3,
        "peak_bytes": peak_bytes(device),
        "cached": sum(held) / len(held),
    }


def main(arguments: list[str] | None = None) -> int:
    from transformers import DynamicCache

    from sparsify.generation.compat import with_cache

    options = parse(arguments)
    model = build(options.shape, options.device)
    given, failed = prompt(model, options.images, options.text), 0

    def run() -> Any:
        cache = DynamicCache(config=model.config)
        model(**given, logits_to_keep=1, **with_cache(model, cache))
        return cache

    for variant in options.variants:
        compile_variant(model, variant, options.keep, options.lower)
        found: dict[str, Any]
        try:
            found = measure(run, options.repeats, options.device)
        except Exception as error:
            traceback.print_exc()
            failed, found = failed + 1, {"error": reason(error)}
            clean(options.device)
        facts: dict[str, Any] = {
            "shape": options.shape,
            "layers": model.config.text_config.num_hidden_layers,
            "tokens": given["input_ids"].shape[1],
            "image_tokens": given["input_ids"].shape[1] - options.text,
            "keep": options.keep if variant in ("fastv", "divprune") else 1.0,
            "variant": variant,
        }
        record = records.append(options.out, Visual(**({"peak_bytes": None} | found), **facts))
        print({key: record.get(key) for key in ("variant", "s", "first_call_s", "peak_bytes", "cached", "error")}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
