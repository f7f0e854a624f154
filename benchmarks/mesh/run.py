"""Several GPUs of one host beside one of them: a prompt that they share, dense attention around a ring, and decoding a divided model.

    python -m benchmarks run mesh                      # two GPUs; starts torchrun by itself
    python -m benchmarks run mesh --parts ring sums decode                       # a minute and a half
    python -m benchmarks run mesh --parts prefill --prompts dense:131072 0.1:131072
    python -m benchmarks run mesh --gpus 4 --parts prefill --prompts 0.05:524288 --no-alone
    python -m benchmarks run mesh --device cpu --shape tiny --prompts dense:2048 0.5:2048 --decode 512 --tokens 8

ring: dense causal attention of one layer of that shape, ours beside torch's own context parallelism, in turns.
sums: one sum over the GPUs of a few tokens' rows, through NCCL and read from peers, of many in a CUDA graph.
decode: tokens through `generate()` over a cache of so many random keys, every key kept, on one GPU and divided by transformers' `tp_plan`,
its sums read from peers and, for comparison, through NCCL (`peer_sums = false`).
prefill: a model of Llama-3.1-8B's shape with random weights reads each prompt, exactly ("dense") or with a share of the blocks, on one GPU
and then on all, the prompt divided (`sparsify.compile(mesh=...)`); each prompt is read once before it is timed. Random weights attend to
everything: the blocks that a GPU's rows visit together are nearly all, so that what travels is the most that can travel. `ring_bytes` is
what dense attention would send for the same prompt.

Times are the slowest process's. Every measurement is appended to results/mesh.jsonl as soon as it is made, so that a run that is cut off
keeps what it has. What 4 and 8 GPUs would take is no measurement: `python -m benchmarks.mesh.forecast` prints it from the cost model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sparsify
from benchmarks.lib import full_caches, records
from benchmarks.lib.models import HEAD_DIM, HEADS, KV_HEADS, SHAPES, build, clean, peak_bytes
from benchmarks.mesh import Mesh
from sparsify.api import collect_plans, record_density
from sparsify.commands.bench.clock import reason
from sparsify.distributed import collectives, peers
from sparsify.distributed.peers import Peers
from sparsify.errors import UnsupportedError
from sparsify.generation.compat import with_cache
from sparsify.generation.decoding.runner import CudaGraphs
from sparsify.generation.regions import regional

ROOT = Path(__file__).parents[2]
PARTS = ["ring", "sums", "decode", "prefill"]
LONG = 1 << 18  # tokens from which on a prompt is timed once
LONGEST_ALONE = 1 << 19  # tokens up to which one GPU reads a prompt, too
# with which all goals are measured in less than eight minutes on two H200
PROMPTS = ["dense:131072", "0.1:131072", "0.05:524288", "0.03:1048576:half+quad+int8+peak", "0.03:1048576"]
IN_A_ROW = 64  # sums of a CUDA graph that is timed
# tokens whose rows are summed: 8 kB each in bf16 where a row has 4096 numbers
SUMMED = (1, 4, 16, 64)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="dense or a density, tokens, and perhaps the estimate's variants")
    parser.add_argument("--ring", type=int, nargs="+", default=[131072], help="tokens of the layer")
    parser.add_argument("--decode", type=int, default=131072, help="tokens before the generated ones")
    parser.add_argument("--tokens", type=int, default=128, help="generated in a call")
    parser.add_argument("--repeats", type=int, default=1, help="calls after the first; prompts of 256K and more are timed once")
    parser.add_argument("--alone", action=argparse.BooleanOptionalAction, default=True, help="also measure one GPU")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "mesh.jsonl")
    return parser.parse_args(arguments)


def _settings(density: float | None, variants: str = "") -> dict[str, Any]:
    """Options of a prompt: exact, or a share of the blocks, chosen with these variants of the estimate instead of the default ones."""
    if density is None:
        return {"passes": ["dense"]}
    estimate = {"estimate": variants.split("+")} if variants else {}
    return {"passes": ["xattention", "dense"], "xattention": {"density": density, **estimate}}


# options with which a divided model generates
DECODED: dict[str, dict[str, Any]] = {"generate": {}, "generate, sums through NCCL": {"peer_sums": False}}


def _per_sum(value: Any) -> Any:
    return [one / IN_A_ROW for one in value] if isinstance(value, list) else value / IN_A_ROW


class Bench:
    """A run of one process among the others."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.cuda = options.device == "cuda"
        self.failed = 0

    def record(self, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Measures and appends what was found, or why nothing was."""
        options = self.options
        layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            found = {"error": reason(error)}
        clean(options.device)
        if self.rank == 0:
            line = records.append(options.out, Mesh(shape=options.shape, layers=layers, **facts, **found))
            shown = (
                "part",
                "variant",
                "length",
                "gpus",
                "requested_density",
                "ms",
                "first_call_ms",
                "density",
                "sent_bytes",
                "sums",
                "error",
            )
            print({key: line.get(key) for key in shown}, flush=True)

    def ms(self, run: Callable[[], Any], among: bool) -> tuple[float, Any]:
        """Milliseconds of a call, of the slowest of all processes where they run it together; and its result."""
        if among:
            dist.barrier()
        self.wait()
        begin = time.perf_counter()
        result = run()
        self.wait()
        took = torch.tensor(1e3 * (time.perf_counter() - begin), device=self.options.device)
        if among:
            dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item(), result

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def added(self, numbers: dict[str, int]) -> dict[str, int]:
        """Sums over all processes; all have the same names."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, numbers)
        return {name: sum(one.get(name, 0) for one in found) for name in sorted({name for one in found for name in one})}

    def ways(self) -> Iterator[tuple[int, bool]]:
        """How many GPUs, and whether this process takes part; the others wait meanwhile."""
        if self.options.alone:
            yield 1, self.rank == 0
            dist.barrier()
        yield self.size, True

    def prefill(self) -> None:
        """Prompts read by one GPU and by all."""
        options = self.options
        model = build(options.shape, options.layers, options.device)
        generator = torch.Generator().manual_seed(0)
        longest = max(int(one.split(":")[1]) for one in options.prompts)
        ids = torch.randint(0, model.config.vocab_size, (1, longest), generator=generator).to(options.device)
        likeliest: dict[str, Tensor] = {}
        for prompt in options.prompts:
            kind, length, *variants = prompt.split(":")
            density, tokens = None if kind == "dense" else float(kind), int(length)
            facts = {"part": "prefill", "variant": " ".join((kind if density is None else "xattention", *variants)), "length": tokens}
            settings = _settings(density, *variants)
            for gpus, takes_part in self.ways():
                if takes_part and not (gpus == 1 and tokens > LONGEST_ALONE):
                    measure = lambda: self._prompt(model, ids[:, :tokens], settings, gpus, likeliest, prompt)  # noqa: B023  (called at once)
                    self.record(measure, **facts, gpus=gpus, requested_density=density)
        regional.remove(model)

    @torch.no_grad()
    def _prompt(
        self, model: Any, ids: Tensor, settings: dict[str, Any], gpus: int, likeliest: dict[str, Tensor], name: str
    ) -> dict[str, Any]:
        mesh = dist.init_device_mesh(self.options.device, (gpus,), mesh_dim_names=("cp",)) if gpus > 1 else None
        sparsify.compile(model, mesh=mesh, min_length=0, strict=True, progress=False, **settings)
        read = lambda: model(ids, use_cache=False, logits_to_keep=1).logits
        clean(self.options.device)
        # as long as what is timed: longer prompts are another regime, need wider indices and kernels of other widths, all compiled then
        with record_density() as densities:
            first, logits = self.ms(read, gpus > 1)
        times = []
        for _ in range(1 if ids.shape[1] >= LONG else self.options.repeats):
            took, logits = self.ms(read, gpus > 1)
            times.append(took)
        found: dict[str, Any] = {"ms": statistics.median(times), "times_ms": times, "first_call_ms": first}
        if densities:
            found["density"] = sum(densities) / len(densities)
        own = model._compiled_call_impl
        if gpus > 1:
            found["sent_bytes"] = self.added(own.divided.last.sent)
            found["ring_bytes"] = self._ring_bytes(model, ids.shape[1])
        if name in likeliest:
            found["same_token"] = bool((likeliest[name] == logits.argmax(-1)).all())
        elif self.rank == 0:
            likeliest[name] = logits.argmax(-1)
        return found | {"peak_bytes": peak_bytes(self.options.device)}

    def _ring_bytes(self, model: Any, tokens: int) -> int:
        """Keys and values of all layers, which each process sends to each of the others."""
        config = model.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * model.dtype.itemsize * (self.size - 1)

    @torch.no_grad()
    def sums(self) -> None:
        """One sum over the GPUs, of many in a row."""
        group = dist.new_group(list(range(self.size))).group_name
        ways: list[tuple[str, Callable[[Tensor], Tensor]]] = [(dist.get_backend(), lambda part: collectives.all_reduce(part, group))]
        if self.cuda:
            found = peers.prepare(group, torch.device("cuda", torch.cuda.current_device()), max(SUMMED) * 8192)
            ways.append(("peers", functools.partial(self._from_peers, found, group)))
        width = SHAPES[self.options.shape]["hidden_size"]
        for tokens in SUMMED:
            for variant, sum_of in ways:
                measure = lambda: self._sum(sum_of, tokens, width)  # noqa: B023  (called at once)
                self.record(measure, part="sums", variant=variant, length=tokens, gpus=self.size)

    def _from_peers(self, found: Peers, group: str, part: Tensor) -> Tensor:
        if found.buffer is None:
            raise UnsupportedError(found.obstacle, where=peers.WHERE)
        return peers.read(found.buffer, part, group)

    def _sum(self, sum_of: Callable[[Tensor], Tensor], tokens: int, width: int) -> dict[str, Any]:
        part = torch.ones(1, tokens, width, dtype=torch.bfloat16 if self.cuda else torch.float32, device=self.options.device)

        def run() -> Tensor:
            total = part
            for _ in range(IN_A_ROW):
                total = sum_of(total) / self.size  # each waits for the one before it
            return total

        call: Callable[[], Any] = run
        if self.cuda:
            runner = CudaGraphs(part.device)
            runner.warm(run)
            call = runner.record(run)
        return {key: _per_sum(value) for key, value in self._timed(call).items()}

    def ring(self) -> None:
        """Dense attention of one layer, ours and torch's."""
        for length in self.options.ring:
            torchs = (
                [("torch context_parallel", self._torchs)] if self.cuda else []
            )  # its attention on a CPU mixes plain tensors with DTensors
            for variant, run in [("sparsify", self._ours), *torchs]:
                self.record(lambda: run(length), part="ring", variant=variant, length=length, gpus=self.size)  # noqa: B023

    def _operands(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = (HEADS, KV_HEADS) if self.options.shape == "8b" else (4, 2)
        generator = torch.Generator(self.options.device).manual_seed(0)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        make = lambda n: torch.randn(1, n, length, HEAD_DIM, generator=generator, device=self.options.device, dtype=dtype)
        return make(heads), make(kv_heads), make(kv_heads)

    def _timed(self, run: Callable[[], Any]) -> dict[str, Any]:
        first, _ = self.ms(run, True)
        times = [self.ms(run, True)[0] for _ in range(5)]
        return {"ms": statistics.median(times), "times_ms": times, "first_call_ms": first}

    @torch.no_grad()
    def _ours(self, length: int) -> dict[str, Any]:
        from sparsify.distributed import sequence
        from sparsify.distributed.shards import Shard
        from sparsify.ops.attention import AttentionCall

        group = dist.group.WORLD
        division = sequence.Division.of(length, Shard(self.rank, self.size, group.group_name))
        query, key, value = (division.own(tensor, 2) for tensor in self._operands(length))
        call = AttentionCall(query, key, value, scale=HEAD_DIM**-0.5, causal=True, sequence=division.shard.group)
        with sequence.dividing(division):
            found = self._timed(call.run)
            division.sent.clear()
            call.run()
        return found | {"sent_bytes": self.added(division.sent)}

    @torch.no_grad()
    def _torchs(self, length: int) -> dict[str, Any]:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        query, key, value = self._operands(length)
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))  # it takes no groups
        mesh = dist.init_device_mesh(self.options.device, (self.size,))
        buffers = [query, key, value]
        backends = SDPBackend.FLASH_ATTENTION if self.cuda else SDPBackend.MATH
        inside = context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2], no_restore_buffers=set(buffers))
        with inside, sdpa_kernel(backends):
            return self._timed(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))

    def decode(self) -> None:
        """Tokens of a whole model on one GPU, and of a divided one on all."""
        options = self.options
        for gpus, takes_part in self.ways():
            if takes_part:
                for variant, settings in list(DECODED.items())[: 2 if gpus > 1 and self.cuda else 1]:
                    facts = {"part": "decode", "variant": variant, "length": options.decode, "gpus": gpus}
                    self.record(lambda: self._tokens(gpus, settings), **facts)  # noqa: B023

    @torch.no_grad()
    def _tokens(self, gpus: int, settings: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        model: Any = build(options.shape, options.layers, options.device)
        if gpus > 1:
            from transformers.distributed import DistributedConfig

            config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=gpus, tp_plan="auto"))
            model = type(model).maybe_distribute_model(model, config, mesh)
        sparsify.compile(model, progress=False, exact=True, **settings)
        cache = full_caches.filled(model, options.decode + 1 + options.tokens, 1, options.device)
        ids = torch.randint(3, model.config.vocab_size, (1, options.decode + 1), generator=torch.Generator().manual_seed(0))
        ids = ids.to(options.device)
        given = {"max_new_tokens": options.tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

        def call() -> Tensor:
            full_caches.put_back(cache, options.decode, [options.decode], options.device)
            return model.generate(ids, attention_mask=torch.ones_like(ids), **given, **with_cache(model, cache))

        with collect_plans() as plans:
            first, _ = self.ms(call, gpus > 1)
        times = [self.ms(call, gpus > 1)[0] / options.tokens for _ in range(3)]
        sums = "; ".join(sorted({plan.capture.partition("; ")[2] for plan in plans} - {""}))
        found: dict[str, Any] = {"sums": sums} if sums else {}
        found |= {"ms": statistics.median(times), "times_ms": times, "first_call_ms": first}
        found["peak_bytes"] = peak_bytes(options.device)
        regional.remove(model)
        torch._dynamo.reset()  # what it keeps of this model would lack in the next one's memory
        return found


def _join(options: argparse.Namespace) -> None:
    """Joins the processes that torchrun started."""
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=datetime.timedelta(minutes=5), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if "RANK" not in os.environ:
        given = sys.argv[sys.argv.index("mesh") + 1 :] if arguments is None else arguments
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}", "-m", "benchmarks.mesh.run", *given]
        return subprocess.run([sys.executable, *launch], cwd=ROOT).returncode
    _join(options)
    bench = Bench(options)
    for part in options.parts:
        getattr(bench, part)()
        clean(options.device)
        dist.barrier()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
