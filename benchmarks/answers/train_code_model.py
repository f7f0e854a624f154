"""Trains a Llama of 28M parameters on the code and documentation of the installed packages, in minutes of one GPU or several of one host.

    python -m benchmarks run train_code_model --out DIR --minutes 8.5          # every GPU; minutes of the whole, evaluation included
    python -m benchmarks run train_code_model --out DIR --minutes 1 --toy      # a tiny model on a CPU

Word pieces of the corpus, GQA 4:1, head dim 128. The data are the corpus (lib/corpus.py) and questions about facts in it (lib/recall.py);
lengths grow with the clock, 512 -> 32768 tokens, as does the distance of facts. Only attention knows how a batch is divided into
sequences; everything else sees a fixed number of tokens, so that one compilation serves every length. Whatever happens, DIR ends with
weights as int8 (lib/int8_weights.py), a tokenizer, log.txt and report.json: provenance, versions, and what the model answers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.lib import corpus, int8_weights, recall


@dataclass(frozen=True)
class Setup:
    """batch_tokens: of a step and GPU. lr: peak. stages: from which share of the training time on, which lengths with which weights."""

    vocabulary: int = 8192
    hidden: int = 512
    layers: int = 7
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    inner: int = 1408
    theta: float = 500_000.0
    positions: int = 32768
    batch_tokens: int = 65536
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 150  # steps
    decay: float = 0.4  # share of the time, at the end, over which the rate falls to 2 %
    answer_weight: float = 1.0
    tokenizer_characters: int = 24_000_000
    stages: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = (
        (0.0, ((512, 1.0),)),
        (0.07, ((512, 0.3), (1024, 0.7))),
        (0.15, ((512, 0.1), (1024, 0.2), (2048, 0.65), (8192, 0.05))),
        (0.35, ((1024, 0.1), (2048, 0.6), (4096, 0.15), (8192, 0.1), (16384, 0.05))),
        (0.50, ((2048, 0.3), (4096, 0.15), (8192, 0.4), (16384, 0.15))),
        (0.68, ((2048, 0.15), (8192, 0.2), (16384, 0.55), (32768, 0.1))),
    )
    look: tuple[int, ...] = (2048, 8192, 16384, 32768)  # lengths of the evaluation
    seed: int = 0


TOY = Setup(
    vocabulary=1024, hidden=64, layers=2, heads=4, kv_heads=1, head_dim=32, inner=128, positions=2048, batch_tokens=2048, warmup=20,
    tokenizer_characters=300_000, stages=((0.0, ((256, 1.0),)), (0.5, ((256, 0.5), (1024, 0.5)))), look=(256, 1024),
)  # fmt: skip


class Decoder(torch.nn.Module):
    """A Llama whose layers' matrices are stacked: one tensor a kind, which optimisers and all-reduce treat at once. Float32."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        d, layers = setup.hidden, setup.layers
        shapes = {
            "q_proj": (setup.heads * setup.head_dim, d),
            "k_proj": (setup.kv_heads * setup.head_dim, d),
            "v_proj": (setup.kv_heads * setup.head_dim, d),
            "o_proj": (d, setup.heads * setup.head_dim),
            "gate_proj": (setup.inner, d),
            "up_proj": (setup.inner, d),
            "down_proj": (d, setup.inner),
        }
        generator = torch.Generator().manual_seed(setup.seed)
        deep = (2 * layers) ** -0.5
        self.matrices = torch.nn.ParameterDict({
            name: torch.nn.Parameter(torch.randn(layers, *shape, generator=generator) * (0.02 * deep if shape[0] == d else 0.02))
            for name, shape in shapes.items()
        })  # fmt: skip
        self.embedding = torch.nn.Parameter(torch.randn(setup.vocabulary, d, generator=generator) * 0.02)
        self.norms = torch.nn.Parameter(torch.ones(2 * layers + 1, d))
        self.parts: tuple[Callable[..., Any], ...] = PARTS

    def compile_parts(self) -> None:
        self.parts = tuple(torch.compile(part, dynamic=False) for part in PARTS)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> Any:
        """ids, targets [batch, n] int64 -> loss [batch * n] float32 and whether the argmax is right [batch * n] bool."""
        setup = self.setup
        batch, length = ids.shape
        block_in, block_out, head = self.parts
        cast = {name: weight.to(dtype) for name, weight in self.matrices.items()}
        into = torch.cat([cast[name] for name in ("q_proj", "k_proj", "v_proj")], 1).unbind(0)
        gates = torch.cat([cast["gate_proj"], cast["up_proj"]], 1).unbind(0)
        outs, downs, norms = cast["o_proj"].unbind(0), cast["down_proj"].unbind(0), self.norms.unbind(0)
        embedding = self.embedding.to(dtype)
        x = F.embedding(ids.flatten(), embedding).float()
        for layer in range(setup.layers):
            q, k, v = block_in(x, norms[2 * layer], into[layer], *tables, setup.heads, setup.kv_heads, setup.head_dim)
            q, k, v = (part.view(batch, length, -1, setup.head_dim).transpose(1, 2) for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(batch * length, -1)
            x = block_out(x, mixed, outs[layer], norms[2 * layer + 1], gates[layer], downs[layer])
        return head(x, norms[-1], embedding, targets.flatten())

    def state(self) -> dict[str, torch.Tensor]:
        """The weights under the names of transformers' LlamaForCausalLM, without the tied lm_head."""
        found = {"model.embed_tokens.weight": self.embedding.detach(), "model.norm.weight": self.norms[-1].detach()}
        for layer in range(self.setup.layers):
            for name, weight in self.matrices.items():
                block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                found[f"model.layers.{layer}.{block}.{name}.weight"] = weight[layer].detach()
            found[f"model.layers.{layer}.input_layernorm.weight"] = self.norms[2 * layer].detach()
            found[f"model.layers.{layer}.post_attention_layernorm.weight"] = self.norms[2 * layer + 1].detach()
        return found

    def config(self) -> LlamaConfig:
        setup = self.setup
        return LlamaConfig(
            vocab_size=setup.vocabulary, hidden_size=setup.hidden, intermediate_size=setup.inner, num_hidden_layers=setup.layers,
            num_attention_heads=setup.heads, num_key_value_heads=setup.kv_heads, head_dim=setup.head_dim,
            max_position_embeddings=setup.positions, rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": setup.theta},
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
            architectures=["LlamaForCausalLM"], dtype="bfloat16",
        )  # fmt: skip


EPS = 1e-5


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def block_in(
    x: torch.Tensor, norm: torch.Tensor, into: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, hidden] float32 -> rotated queries, rotated keys, values [tokens, heads, head_dim]. cos, sin: [tokens, head_dim]."""
    projected = F.linear(_norm(x, norm).to(into.dtype), into).view(x.shape[0], -1, head_dim)
    q, k, v = projected.split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos[:, None], sin[:, None]

    def turn(part: torch.Tensor) -> torch.Tensor:
        low, high = part.float().chunk(2, -1)
        return (part.float() * cos + torch.cat((-high, low), -1) * sin).to(part.dtype)

    return turn(q), turn(k), v.contiguous()


def block_out(
    x: torch.Tensor, mixed: torch.Tensor, out: torch.Tensor, norm: torch.Tensor, gates: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """What follows attention in a layer; x [tokens, hidden] float32, mixed [tokens, heads * head_dim]."""
    x = x + F.linear(mixed, out)
    gate, up = F.linear(_norm(x, norm).to(gates.dtype), gates).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def head(x: torch.Tensor, norm: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.linear(_norm(x, norm).to(embedding.dtype), embedding).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


PARTS = (block_in, block_out, head)


def rotary(setup: Setup, length: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, head_dim] float32 of sequences of `length` one after the other."""
    exponents = torch.arange(0, setup.head_dim, 2, device=device).float() / setup.head_dim
    angles = (torch.arange(tokens, device=device) % length).float()[:, None] * setup.theta**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def newton_schulz(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About the nearest orthogonal matrix of each of [count, rows, columns] (K. Jordan et al., Muon, 2024)."""
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7).to(dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon with AdamW's step size for the stacked matrices, AdamW for embedding and norms."""

    def __init__(self, model: Decoder, fused: bool) -> None:
        self.setup, self.dtype = model.setup, torch.bfloat16 if fused else torch.float32
        self.matrices = list(model.matrices.values())
        self.momentum = [torch.zeros_like(weight) for weight in self.matrices]
        small = [model.embedding, model.norms]
        self.adam = torch.optim.AdamW(small, lr=self.setup.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for weight, momentum in zip(self.matrices, self.momentum, strict=True):
            gradient = weight.grad
            assert gradient is not None
            momentum.lerp_(gradient, 0.05)
            update = newton_schulz(gradient.lerp(momentum, 0.95), self.dtype)
            weight.mul_(1 - rate * self.setup.weight_decay)
            weight.add_(update, alpha=-rate * 0.2 * max(weight.shape[1:]) ** 0.5)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()


def rate_of(setup: Setup, step: int, fraction: float) -> float:
    """Warm-up by step; a plateau; then a linear decay by time to 2 % of the peak."""
    return setup.lr * min(1.0, (step + 1) / setup.warmup) * min(1.0, 0.02 + 0.98 * max(0.0, 1 - fraction) / setup.decay)


def length_of(setup: Setup, step: int, fraction: float) -> int:
    """The length of a step's sequences: the same on every GPU, so that none waits for the others."""
    lengths = [mix for start, mix in setup.stages if fraction >= start][-1]
    return random.Random(f"{setup.seed} {step}").choices([n for n, _ in lengths], [weight for _, weight in lengths])[0]


# the batches' makers: processes of their own, forked before CUDA is up

_maker: recall.Maker | None = None


def load_maker(work: Path, part: str) -> recall.Maker:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    return recall.Maker(tokenizer, np.load(work / f"{part}.npy", mmap_mode="r"), json.loads((work / "words.json").read_text()))


def _start(work: Path) -> None:
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _maker = load_maker(work, "train")


def _make(task: tuple[int, int, int]) -> recall.Tokens:
    seed, count, length = task
    assert _maker is not None
    return _maker.batch(seed, count, length + 1)


class Feed:
    """Batches in the order in which they were asked for; seeds differ by GPU."""

    def __init__(self, work: Path, setup: Setup, rank: int, world: int, processes: int) -> None:
        self.setup, self.rank, self.world, self.asked = setup, rank, world, 0
        self.pool = multiprocessing.get_context("fork").Pool(processes, _start, (work,))
        self.waiting: deque[tuple[int, Any]] = deque()

    def ask(self, length: int) -> None:
        seed = 1_000_003 * (self.setup.seed + 1) + self.asked * self.world + self.rank
        self.asked += 1
        self.waiting.append((length, self.pool.apply_async(_make, ((seed, self.setup.batch_tokens // length, length),))))

    def take(self) -> tuple[int, recall.Tokens]:
        length, batch = self.waiting.popleft()
        return length, batch.get(timeout=120)

    def close(self) -> None:
        self.pool.terminate()


def choose_attention(setup: Setup, device: torch.device, say: Callable[[str], None]) -> list[SDPBackend]:
    """The faster of cuDNN's and FlashAttention-2's kernels that runs at every length and agrees with the other."""
    if device.type == "cpu":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    seconds = {SDPBackend.FLASH_ATTENTION: 0.0, SDPBackend.CUDNN_ATTENTION: 0.0}
    for length in sorted({length for _, mix in setup.stages for length, _ in mix}):
        torch.manual_seed(0)
        shape = (max(1, setup.batch_tokens // length), length)
        parts = [
            torch.randn(*shape, heads, setup.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            for heads in (setup.heads, setup.kv_heads, setup.kv_heads)
        ]
        found = {}
        for backend in list(seconds):
            try:
                found[backend] = []
                for _ in range(3):
                    begun = time.monotonic()
                    with sdpa_kernel([backend]):
                        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), is_causal=True, enable_gqa=True)
                    found[backend] = [out.detach(), *torch.autograd.grad(out.float().square().sum(), parts)]
                    torch.cuda.synchronize()
                    taken = time.monotonic() - begun
                seconds[backend] += taken
                say(f"attention by {backend.name}: {1000 * taken:.2f} ms at {shape}, forward and backward")
            except Exception as error:
                say(f"attention by {backend.name} does not run at {shape}: {error}")
                del seconds[backend]
        if len(seconds) == 2:
            one, other = found.values()
            apart = max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(one, other, strict=True))
            if not apart < 0.03:
                say(f"attention: the two differ by {apart:.1e} at {shape}")
                del seconds[SDPBackend.CUDNN_ATTENTION]
    return [*sorted(seconds, key=lambda backend: seconds[backend])[:1], SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


BLOCK = 10  # steps between looks at the clock; batches are asked for two blocks ahead


def train(rank: int, world: int, options: argparse.Namespace, setup: Setup, began: float) -> None:
    """One GPU's part. Rank 0 logs, saves and evaluates."""
    log = (options.out / "log.txt").open("a", buffering=1) if rank == 0 else None

    def say(line: str) -> None:
        if log:
            print(f"{time.time() - began:6.1f} s  {line}", file=log)
            print(f"{time.time() - began:6.1f} s  {line}", flush=True)

    cores = len(os.sched_getaffinity(0))
    feed = Feed(options.work, setup, rank, world, max(2, (cores - 2 * world) // world) if cores > 4 else 1)
    model = Decoder(setup)
    ask_block(feed, setup, 0, 0.0)
    ask_block(feed, setup, BLOCK, 0.0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world, device_id=device if cuda else None)
    try:
        backends = choose_attention(setup, device, say)
        model.to(device)
        if cuda and not options.eager:
            model.compile_parts()
        with sdpa_kernel(backends, set_priority=True):
            steps, tokens = loop(model, feed, setup, device, rank, world, options, began, say)
    finally:
        feed.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        # the weights first: what follows may fail
        say(f"{steps} steps, {tokens / 1e6:.1f} M tokens")
        if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
            say("some weights are not finite")
        int8_weights.save(model.state(), model.config(), options.out)
        say("saved")
        report = json.loads((options.work / "provenance.json").read_text())
        report |= {"setup": asdict(setup), "gpus": world, "device": torch.cuda.get_device_name() if cuda else platform.processor()}
        report |= {"steps": steps, "tokens": tokens, "parameters": sum(p.numel() for p in model.parameters())}
        write_report(options.out, report)
        try:
            evaluate(options, setup, device, began, say, report, model)
        except Exception:
            say(traceback.format_exc())
        write_report(options.out, report)
        size = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file())
        say(f"done: {size / 1e6:.2f} MB in {len(list(options.out.iterdir()))} files")


def write_report(out: Path, report: dict[str, Any]) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def ask_block(feed: Feed, setup: Setup, step: int, fraction: float) -> None:
    for number in range(step, step + BLOCK):
        feed.ask(length_of(setup, number, fraction))


def loop(
    model: Decoder, feed: Feed, setup: Setup, device: torch.device, rank: int, world: int, options: argparse.Namespace, began: float,
    say: Callable[[str], None],
) -> tuple[int, int]:  # fmt: skip
    """Trains until the time is over; -> steps and tokens of all GPUs. An error ends it with what was learnt so far."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    optimizer = Optimizer(model, fused=device.type == "cuda")
    parameters = list(model.parameters())
    last = began + 60 * options.minutes - options.reserve
    clock: dict[str, float] = {"start": time.time()}
    tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    seen: dict[int, torch.Tensor] = {}
    step, fraction, skipped = 0, 0.0, torch.zeros((), device=device)
    logged = saved = time.time()
    logged_step = 0
    try:
        while fraction < 1:
            for _ in range(BLOCK):
                length, (ids, codes) = feed.take()
                if length not in tables:
                    tables[length] = rotary(setup, length, setup.batch_tokens, device)
                # int32 on the way: uint16 has few operations on a GPU
                rows = torch.from_numpy(ids.astype(np.int32)).to(device, non_blocking=True).long()
                kinds = torch.from_numpy(codes).to(device, non_blocking=True)[:, 1:].flatten()
                each, right = model(rows[:, :-1], rows[:, 1:], tables[length], dtype)
                text, answers = kinds == recall.TEXT, kinds == recall.ANSWER
                text_loss = (each * text).sum() / text.sum().clamp_min(1)
                answer_loss = (each * answers).sum() / answers.sum().clamp_min(1)
                (text_loss + setup.answer_weight * answer_loss).backward()
                if world > 1:
                    for parameter in parameters:
                        dist.all_reduce(parameter.grad.div_(world))
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                # a step that is not finite is left out, without asking the GPU
                fine = norm.isfinite()
                for parameter in parameters:
                    parameter.grad = torch.where(fine, parameter.grad, 0.0)
                skipped += ~fine
                optimizer.step(rate_of(setup, step, fraction))
                for parameter in parameters:
                    parameter.grad = None
                with torch.no_grad():
                    share = (right & answers).sum() / answers.sum().clamp_min(1)
                    now = torch.stack((text_loss, answer_loss, share, norm)).detach()
                    seen[length] = seen[length].lerp(now, 0.1) if length in seen else now
                step += 1
            if step == BLOCK:  # compiling does not count as training: the schedule starts after it
                if device.type == "cuda":
                    torch.cuda.synchronize()
                clock["start"] = time.time()
            fraction = agree((time.time() - clock["start"]) / max(1.0, last - clock["start"]), device, world)
            ask_block(feed, setup, step + BLOCK, fraction)
            if rank == 0 and time.time() - saved > options.save_seconds:
                saved = time.time()
                int8_weights.save(model.state(), model.config(), options.out)
            if time.time() - logged > options.log_seconds or step == BLOCK or fraction >= 1:
                now_step, logged_before, logged = step - logged_step, logged, time.time()
                speed, logged_step = now_step * setup.batch_tokens * world / (logged - logged_before), step
                means = {n: [round(float(x), 3) for x in values] for n, values in sorted(seen.items())}
                rate = rate_of(setup, step, fraction)
                say(f"step {step} fraction {fraction:.3f} rate {rate:.1e} left out {int(skipped)}, {speed:,.0f} tokens a second")
                say(f"    length: [text, answers, tokens of answers right, gradient] {means}")
    except Exception:
        if world > 1:
            raise
        say(traceback.format_exc())
    return step, step * setup.batch_tokens * world


def agree(fraction: float, device: torch.device, world: int) -> float:
    """Rank 0's fraction, on every rank."""
    if world == 1:
        return fraction
    shared = torch.tensor(fraction, device=device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


@torch.no_grad()
def evaluate(
    options: argparse.Namespace, setup: Setup, device: torch.device, began: float, say: Callable[[str], None], report: dict[str, Any],
    trained: Decoder,
) -> None:  # fmt: skip
    """What the saved files answer and foresee on packages that were held out, through transformers alone; fills `report`."""
    model = int8_weights.load(options.out, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    maker = load_maker(options.work, "held_out")
    ids = torch.from_numpy(maker.text[: setup.look[0] + 1].astype(np.int64)).to(device)[None]
    tables = rotary(setup, setup.look[0], setup.look[0], device)
    trained.parts = PARTS  # compiled for other sizes
    each, _ = trained(ids[:, :-1], ids[:, 1:], tables, model.dtype)
    loaded = F.cross_entropy(model(ids[:, :-1], use_cache=False).logits[0].float(), ids[0, 1:])
    say(f"loss of one text: {float(each.mean()):.4f} as trained, {float(loaded):.4f} as int8 through transformers")
    report["loss_of_one_text"] = {"trained": float(each.mean()), "int8": float(loaded)}
    prompts = options.prompts
    report["nll"], report["answers"] = {}, {}
    for length in setup.look:
        if not time_left(options, began):
            break
        losses = []
        for start in np.linspace(0, len(maker.text) - length - 2, prompts).astype(int):
            ids = torch.from_numpy(maker.text[start : start + length + 1].astype(np.int64)).to(device)[None]
            losses.append(F.cross_entropy(model(ids[:, :-1], use_cache=False).logits[0, -1024:].float(), ids[0, -1024:]).item())
        report["nll"][length] = sum(losses) / len(losses)
        say(f"held-out text, last 1024 of {length} tokens: {report['nll'][length]:.4f} nats a token")
    for length in setup.look:
        report["answers"][length] = {}
        for name, task in recall.asked(maker, length).items():
            if not time_left(options, began):
                break
            right = asked = 0
            for seed in range(prompts):
                tokens, codes = task(random.Random(f"{name} {length} {seed}"))
                ids = torch.from_numpy(tokens.astype(np.int64)).to(device)[None]
                guesses = model(ids, use_cache=False).logits[0].argmax(-1)
                for start, count in recall.answers(codes):
                    right += bool((guesses[start - 1 : start - 1 + count] == ids[0, start : start + count]).all())
                    asked += 1
            report["answers"][length][name] = [right, asked]
        say(f"answers at {length}: " + ", ".join(f"{name} {a}/{b}" for name, (a, b) in report["answers"][length].items()))
        write_report(options.out, report)
    prompt = torch.tensor([maker.tokenizer.encode("import numpy as np\n\n\ndef main(").ids], device=device)
    made = model.generate(prompt, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(prompt))
    say("a continuation: " + repr(maker.tokenizer.decode(made[0].tolist())))


def time_left(options: argparse.Namespace, began: float) -> bool:
    return time.time() < began + 60 * options.minutes


def prepare(options: argparse.Namespace, setup: Setup, began: float) -> None:
    """Corpus, tokenizer, words and provenance into the work folder; the tokenizer into `out` as transformers reads it."""
    cores = len(os.sched_getaffinity(0))

    def say(line: str) -> None:
        text = f"{time.time() - began:6.1f} s  {line}"
        print(text, flush=True)
        with (options.out / "log.txt").open("a") as stream:
            print(text, file=stream)

    found, digest = corpus.documents(options.packages, options.corpus_characters, cores)
    kept = [one for one in found if one.package not in corpus.HELD_OUT]
    held = [one for one in found if one.package in corpus.HELD_OUT]
    characters = sum(len(one.text) for one in found)
    say(f"{len(found)} files, {characters / 1e6:.1f} M characters, {len({one.package for one in found})} packages, digest {digest[:16]}")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = corpus.train_tokenizer(iter(corpus.sample(kept, setup.tokenizer_characters, setup.seed)), setup.vocabulary)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.save(str(options.work / "tokenizer.json"))
    say(f"tokenizer of {tokenizer.get_vocab_size()} tokens")
    for part, documents in (("train", kept), ("held_out", held)):
        tokens = corpus.encode(documents, options.work / "tokenizer.json", cores)
        np.save(options.work / f"{part}.npy", tokens)
        say(f"{part}: {len(tokens) / 1e6:.2f} M tokens, {sum(len(one.text) for one in documents) / len(tokens):.2f} characters each")
    (options.work / "words.json").write_text(json.dumps(corpus.words(corpus.sample(kept, 6_000_000, setup.seed + 1))))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=corpus.END,
        pad_token=corpus.END,
        model_max_length=setup.positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(options.out)
    shares: dict[str, int] = {}
    for one in found:
        shares[one.package] = shares.get(one.package, 0) + len(one.text)
    provenance = {
        "corpus": {"sha256": digest, "files": len(found), "characters": characters, "packages": dict(sorted(shares.items()))},
        "held_out_packages": sorted({one.package for one in held}),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
    }
    (options.work / "provenance.json").write_text(json.dumps(provenance))
    say("prepared")


def version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> int:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer, log.txt and report.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole: corpus, training, evaluation")
    parser.add_argument("--reserve", type=float, default=45.0, help="seconds of them that are kept for saving and evaluating")
    parser.add_argument("--gpus", type=int, default=None, help="how many; default: all. Without any: processes")
    parser.add_argument("--packages", type=Path, default=corpus.installed(), help="folder of installed packages: the corpus")
    parser.add_argument("--corpus-characters", type=int, default=240_000_000, help="use about so many characters of it")
    parser.add_argument("--prompts", type=int, default=16, help="of each task and length in the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-seconds", type=float, default=10.0)
    parser.add_argument("--save-seconds", type=float, default=120.0, help="how often the weights are saved on the way")
    parser.add_argument("--work", type=Path, default=Path("/tmp/code-model-work"), help="scratch folder")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    options = parser.parse_args(arguments)
    setup = replace(TOY if options.toy else Setup(), seed=options.seed)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    prepare(options, setup, began)
    world = min(torch.cuda.device_count(), options.gpus or 64) if torch.cuda.is_available() else options.gpus or 1
    # a process of its own for each GPU, and for one: this one has used threads, and forking after that is not safe
    spawn(train, (world, options, setup, began), nprocs=world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
