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
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.answers.code_model.decoder import Decoder, rotary
from benchmarks.answers.code_model.evaluate import evaluate, write_report
from benchmarks.answers.code_model.feed import BLOCK, Feed, ask_block
from benchmarks.answers.code_model.optimizer import Optimizer
from benchmarks.answers.code_model.prepare import prepare
from benchmarks.answers.code_model.setup import TOY, Setup, rate_of
from benchmarks.lib import corpus, int8_weights, recall


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
