"""Self-speculation through `generate()`: milliseconds a token and a round by the number of drafted tokens, beside an exact cache without
drafts.

    python -m benchmarks run speculation --lengths 131072 524288
    python -m benchmarks run speculation --model benchmarks/models/code --text FILE --lengths 16384
    python -m benchmarks run speculation --shape tiny --lengths 96 --tokens 12 --drafts 0 2 auto

Without `--model` the weights and the caches are random: a round's seconds are those of any model of the shape, and what is kept of drafts
means nothing; tokens a second at a share that is kept follow from the rounds' seconds. With a trained model and a text, whose beginning is
the prompt, that share is measured, and whether the tokens are those without drafts: several rows at once are rounded otherwise than one, so
that two tokens that are equally likely but for rounding may change places. Appends to results/speculation.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sparsify
from benchmarks.lib import full_caches, records
from benchmarks.lib.models import SHAPES, build, clean
from benchmarks.model import Speculation
from sparsify import Pages, SparseCache
from sparsify.commands.bench.clock import reason
from sparsify.generation.compat import with_cache


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model = _model(options)
    sparsify.compile(model, progress=False)
    failed = 0
    for length in options.lengths:
        ids = _prompt(model, length, options)
        exact: torch.Tensor | None = None
        for drafts in options.drafts:
            clean(options.device)
            facts: dict[str, Any] = {
                "shape": Path(options.model).name if options.model else options.shape,
                "layers": model.config.num_hidden_layers,
                "length": length,
                "tokens": options.tokens,
                "drafts": drafts,
                "share": options.share,
                "trained": bool(options.model),
            }
            try:
                found, tokens = measure(model, ids, drafts, options)
            except Exception as error:
                failed += 1
                records.append(options.out, Speculation(**facts, error=reason(error)))
                print(facts | {"error": reason(error)}, flush=True)
                continue
            if drafts == "0":
                exact = tokens
            elif exact is not None and options.model:
                found["same_tokens"] = int((tokens == exact).long().cumprod(1).sum())
            records.append(options.out, Speculation(**facts, **found))
            print(facts | found, flush=True)
    return 1 if failed else 0


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, drafts: str, options: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """Numbers of one way to decode, and the new tokens of the last call, [1, tokens]."""
    length = ids.shape[1] - 1
    room = length + 1 + options.tokens
    how: dict[str, Any] = {}
    if drafts != "0":
        how = {"draft": Pages(share=options.share), "draft_tokens": None if drafts == "auto" else int(drafts)}
    cache = SparseCache(model.config, "full", room, batch_size=1, device=options.device, dtype=model.dtype, **how)
    if options.model:
        model(ids[:, :length], **with_cache(model, cache), logits_to_keep=1)
    else:
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
    given = {"max_new_tokens": options.tokens, "min_new_tokens": None, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def call() -> tuple[float, int, torch.Tensor]:
        full_caches.put_back(cache, length, [length], options.device)
        for layer in cache.layers:
            layer.renew_bounds()
        before = cache.draft_rounds
        _wait(options)
        begin = time.perf_counter()
        result = model.generate(ids, **given, **with_cache(model, cache))
        _wait(options)
        return time.perf_counter() - begin, cache.draft_rounds - before, result[:, length + 1 :]

    first = call()[0]
    cache.drafted = cache.drafts_kept = 0
    calls = [call() for _ in range(options.repeats)]
    seconds = statistics.median(found[0] for found in calls)
    values: dict[str, Any] = {"ms": 1e3 * seconds / options.tokens, "first_call_s": first}
    if cache.drafted:
        values |= {"ms_a_round": 1e3 * seconds / calls[-1][1], "kept": cache.drafts_kept / cache.drafted}
    return values, calls[-1][2]


def _wait(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def _model(options: argparse.Namespace) -> Any:
    if not options.model:
        return build(options.shape, options.layers, options.device)
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return model.to(options.device).eval()


def _prompt(model: Any, length: int, options: argparse.Namespace) -> torch.Tensor:
    """Tokens of a prompt and one more, int64 [1, length + 1]."""
    if not options.model:
        ids = torch.randint(3, model.config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
        return ids.to(options.device)
    text = Path(options.text).read_bytes()
    if (Path(options.model) / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(options.model)(text.decode(), return_tensors="pt").input_ids
    else:
        found = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    if found.shape[1] <= length:
        raise ValueError(f"the text has {found.shape[1]} tokens, not {length + 1}")
    return found[:, : length + 1].to(options.device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each call")
    parser.add_argument("--drafts", nargs="+", default=["0", "1", "2", "4", "8", "15", "auto"], help="drafted tokens; 0: none")
    parser.add_argument("--share", type=float, default=0.05, help="of the pages that a drafted token reads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="folder of a trained model; None: random weights of the shape")
    parser.add_argument("--text", help="file whose beginning is a trained model's prompt")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "speculation.jsonl")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.text):
        parser.error("--model and --text go together")
    return options


if __name__ == "__main__":
    sys.exit(main())
