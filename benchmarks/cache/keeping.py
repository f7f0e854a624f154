"""What does it cost to keep a prompt? Its cache goes to a file and comes back, its keys are put into clusters; and memory is counted.

    python -m benchmarks run keeping                                                    # 128K tokens of the 8B shape
    python -m benchmarks run keeping --shape tiny --length 2048 --budget 256 --device cpu --folder /tmp

save, load: a cache of random tokens in 16 bits, fp8 and 4 bits, and one that has evicted all but `--budget`; `SparseCache.save` and `load`,
the digest of the model included, beside the time that as many bytes take over the bus, and between the host's memory and a file in the same
folder in as many threads. A file that was just written lies in the system's memory: no disk is waited for, neither there nor here. What is
loaded is compared with what was saved. prepare: clusters of the keys, all layers. memory: all buffers after a prompt went through a model
of two such layers, beside the keys and values of the tokens that the cache may keep. Appends to results/keeping.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.cache import CacheKeeping, CacheMemory
from benchmarks.lib import records
from benchmarks.lib.models import SHAPES, build, clean, peak_bytes
from sparsify import SparseCache
from sparsify.commands.bench.clock import reason
from sparsify.generation.compat import with_cache
from sparsify.ops import cache as ops
from sparsify.ops import quantised

_PART, _THREADS = 64 << 20, 8
_LAYERS = 2  # of the model whose caches are weighed
# tokens that are stored until a policy selects, and of a call of one that is told logits
_EVERY, _CALL = 64, 512
Tensors = tuple[Tensor, Tensor, Tensor]


def variants(length: int, budget: int) -> dict[str, dict[str, Any]]:
    """Arguments of the caches that are saved, by name."""
    whole: dict[str, Any] = {"policy": "full", "budget": length}
    return {
        "16 bits": whole,
        "fp8": whole | {"dtype": "fp8"},
        "int4": whole | {"dtype": "int4"},
        "snapkv": {"policy": "snapkv", "budget": budget},
        "clusters": whole | {"read": "clusters"},
    }


def memory_variants(length: int, budget: int, heads: Path, kv_heads: int) -> dict[str, dict[str, Any]]:
    """Arguments of the caches that are weighed, by name."""
    some: dict[str, Any] = {"budget": budget}
    room = some | {"every": _EVERY}
    streaming = tuple(tuple(range(kv_heads // 2)) for _ in range(_LAYERS))
    found: dict[str, dict[str, Any]] = {"full": {"budget": length}, "streaming_llm": some}
    found |= dict.fromkeys(("snapkv", "h2o", "tova", "knorm", "keydiff", "expected_attention", "pyramidkv", "chunkkv"), some)
    found |= {f"{name}, every {_EVERY}": room | {"policy": name} for name in ("snapkv", "h2o", "adakv")}
    found |= {
        f"duo, every {_EVERY}": room | {"policy": "duo", "streaming": streaming},
        f"locret, every {_EVERY}": room | {"policy": "locret", "heads": str(heads)},
        f"sirllm, every {_CALL}": some | {"policy": "sirllm", "every": _CALL},
        f"adakv, every {_EVERY}, fp8": room | {"policy": "adakv", "dtype": "fp8"},
    }
    for codes in ("fp8", "int4"):
        found |= {f"full, {codes}": {"policy": "full", "budget": length, "dtype": codes}}
        found |= {f"snapkv, {codes}": some | {"policy": "snapkv", "dtype": codes}}
    found["full, pages"] = {"policy": "full", "budget": length, "read": "pages"}
    return {name: {"policy": name, **how} for name, how in found.items()}


@torch.no_grad()
def stored(cache: SparseCache, given: Tensors) -> None:
    """Puts one and the same random prompt into all layers, as attention would."""
    query, key, value = given
    for layer in cache.layers:
        layer.allocate(key, value, key.shape[2])
        how = {"policy": layer.policy_text, "scale": query.shape[-1] ** -0.5, "softcap": 0.0, "version": ops.VERSION}
        layout = layer.layout
        assert layout is not None
        how |= {"pinned": layout.pinned, "recent": layout.recent, **layer.reading(), **layer.coded()}
        ops.store(query if layer.observes else None, key, value, *layer.state, empty=True, **how)
        layer.started = True
    cache.recount(key.shape[2])


def random_prompt(options: argparse.Namespace) -> Tensors:
    """Query, key and value of one layer."""
    shape: dict[str, Any] = SHAPES[options.shape]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    heads = (shape["num_attention_heads"], shape["num_key_value_heads"], shape["num_key_value_heads"])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, options.length, shape["head_dim"], dtype=dtype, device=options.device) for n in heads)
    return query, key, value


def timed(run: Callable[[], Any], device: str, times: int = 1) -> tuple[float, int | None, Any]:
    """The least seconds of some runs, the most device memory beside what was held before them, and what the last one returned."""
    seconds, most, result = [], 0, None
    for _ in range(times):
        result = None
        clean(device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        begin = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        most = max(most, (peak_bytes(device) or 0) - before)
    return min(seconds), most if device == "cuda" else None, result


def keeping(options: argparse.Namespace) -> int:
    """Saves, loads and prepares; returns how many failed."""
    model: Any = build(options.shape, options.layers, options.device)
    given, failed = random_prompt(options), 0
    facts: dict[str, Any] = {"shape": options.shape, "layers": model.config.num_hidden_layers, "length": options.length}
    for name, how in variants(options.length, options.budget).items():
        if name not in options.variants:
            continue
        try:
            cache = SparseCache(model.config, **how)
            stored(cache, given)
            measure = prepared if name == "clusters" else saved_and_loaded
            for operation, values in measure(cache, model, options).items():
                print(name, operation, values, flush=True)
                records.append(options.out, CacheKeeping(variant=name, operation=operation, **facts, **values))
        except Exception as error:
            print(f"{name}: {reason(error)}", flush=True)
            failed += 1
        cache = None
    return failed


def prepared(cache: SparseCache, model: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    seconds, peak, _ = timed(cache.prepare, options.device)
    keys = sum(layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
    return {"prepare": {"seconds": seconds, "bytes": keys, "file_seconds": None, "bus_seconds": None, "peak_bytes": peak}}


def saved_and_loaded(cache: SparseCache, model: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="keeping", dir=options.folder))
    path = folder / "prompt.safetensors"
    try:
        save, beside, _ = timed(lambda: cache.save(path, model), options.device, options.times)
        size = path.stat().st_size
        held = cache.kept_bytes()
        load, peak, loaded = timed(lambda: SparseCache.load(path, model), options.device, options.times)
        compare(cache, loaded)
        del loaded
        path.unlink()
        wrote, read = file_seconds(path, size)
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()
    to_host, to_device = bus_seconds(size, options.device)
    ways = {"save": (save, beside, wrote, to_host), "load": (load, None if peak is None else peak - held, read, to_device)}
    return {
        name: {"seconds": seconds, "bytes": size, "file_seconds": file, "bus_seconds": bus, "peak_bytes": most}
        for name, (seconds, most, file, bus) in ways.items()
    }


def compare(saved: SparseCache, loaded: SparseCache) -> None:
    """Raises ValueError where a layer holds something else than the other cache's."""
    for one, other in zip(saved.layers, loaded.layers, strict=True):
        slots = one.keys.shape[2]
        if slots != other.keys.shape[2] or not torch.equal(one.counts, other.counts):
            raise ValueError(f"layer {one.index} holds other tokens")
        for name in ("keys", "values", "positions", "key_scales", "value_scales"):
            mine, theirs = getattr(one, name), getattr(other, name)
            if mine is not None and not torch.equal(mine, theirs):
                raise ValueError(f"layer {one.index} holds other {name}")


def file_seconds(path: Path, size: int) -> tuple[float, float]:
    """Seconds in which so many bytes go from the host's memory to a new file, and come back."""
    data = bytearray(os.urandom(1 << 20)) * (_PART >> 20)
    parts = [(begin, min(_PART, size - begin)) for begin in range(0, size, _PART)]
    buffers = [bytearray(_PART) for _ in range(_THREADS)]
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            begin = time.perf_counter()
            list(threads.map(lambda part: os.pwrite(handle, memoryview(data)[: part[1]], part[0]), parts))
            wrote = time.perf_counter() - begin
            # buffers may be filled by two threads at once: nobody looks at them
            into = [memoryview(buffers[at % _THREADS])[:count] for at, (_, count) in enumerate(parts)]
            begin = time.perf_counter()
            list(threads.map(lambda to, part: os.preadv(handle, [to], part[0]), into, parts))
            return wrote, time.perf_counter() - begin
    finally:
        os.close(handle)
        path.unlink()


def bus_seconds(size: int, device: str) -> tuple[float | None, float | None]:
    """Seconds in which so many bytes go from the device to pinned memory, and back."""
    if device != "cuda":
        return None, None
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    found = []
    for to, source in ((host, there), (there, host)):
        best, _, _ = timed(lambda to=to, source=source: to.copy_(source, non_blocking=True), device, 5)
        found.append(best * size / len(host))
    return found[0], found[1]


@torch.no_grad()
def memory(options: argparse.Namespace) -> int:
    """Weighs caches; returns how many failed."""
    model: Any = build(options.shape, min(_LAYERS, options.layers or _LAYERS), options.device)
    config, failed, length = model.config, 0, options.memory_length
    ids = torch.randint(0, config.vocab_size, (1, length), device=options.device, generator=torch.Generator(options.device).manual_seed(0))
    facts: dict[str, Any] = {"shape": options.shape, "layers": config.num_hidden_layers, "length": length}
    model(ids, use_cache=False, logits_to_keep=1)  # what libraries allocate at their first call is no cache's
    with tempfile.TemporaryDirectory() as folder:
        heads = random_heads(Path(folder) / "heads.safetensors", config)
        for name, how in memory_variants(length, options.budget, heads, config.num_key_value_heads).items():
            try:
                values = weighed(model, ids, how, options.device)
            except Exception as error:
                print(f"{name}: {reason(error)}", flush=True)
                failed += 1
                continue
            print(name, values, f"{values['kept_bytes'] / values['promised_bytes']:.4f}", flush=True)
            records.append(options.out, CacheMemory(variant=name, **facts, **values))
    return failed


def weighed(model: Any, ids: Tensor, how: dict[str, Any], device: str) -> dict[str, Any]:
    """Bytes of one cache after a prompt."""
    clean(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    cache = SparseCache(model.config, **how)
    step = _CALL if cache.policy.awaits else ids.shape[1]
    for first in range(0, ids.shape[1], step):
        part = ids[:, first : first + step]
        logits = model(part, **with_cache(model, cache), logits_to_keep=0 if cache.policy.awaits else 1).logits
        cache.observe(logits, part)
        del logits
    cache.outlook.forget()
    clean(device)
    used = torch.cuda.memory_allocated() - before if device == "cuda" else None
    slots = how["budget"] + how.get("every", 0)
    layer = cache.layers[0]
    dim, rows = model.config.head_dim, model.config.num_key_value_heads
    own = quantised.token_bytes(dim, dim, cache.codes, model.dtype)
    if layer.read is not None:
        own += 2 * dim * model.dtype.itemsize / layer.read.size
    newest = quantised.GROUP * quantised.token_bytes(dim, dim, "", model.dtype) if cache.codes else 0
    promised = len(cache.layers) * rows * (slots * own + newest)
    return {"slots": slots, "promised_bytes": round(promised), "kept_bytes": cache.kept_bytes(), "device_bytes": used}


def random_heads(path: Path, config: Any) -> Path:
    """Heads for locret: what they keep does not change how much it is."""
    width = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    sizes = {"w1": (64, width), "w2": (config.num_key_value_heads, 64)}
    torch.manual_seed(0)
    layers = range(config.num_hidden_layers)
    save_file({f"layers.{n}.{name}": torch.randn(size) / size[1] ** 0.5 for n in layers for name, size in sizes.items()}, path)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["keeping", "memory"], default=["memory", "keeping"])
    parser.add_argument("--length", type=int, default=131072, help="tokens of the prompt that is kept")
    parser.add_argument("--memory-length", type=int, default=16384, help="tokens of the prompt after which memory is counted")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a head that evicting policies keep")
    parser.add_argument("--variants", nargs="+", default=list(variants(0, 0)), choices=list(variants(0, 0)))
    parser.add_argument("--times", type=int, default=2, help="that each file is written and read; the least counts")
    parser.add_argument("--folder", type=Path, help="where files are written; without it the system's for temporary ones")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "keeping.jsonl")
    options = parser.parse_args(arguments)
    parts = {"keeping": keeping, "memory": memory}
    return 1 if sum(parts[part](options) for part in options.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
