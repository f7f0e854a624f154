"""Trains the tutorial's model (benchmarks/models/demo): a byte-level Llama of under 2 MB that finds facts in long text.

    python -m benchmarks run train_demo_model --out DIR --minutes 7             # several configurations at once, the best kept
    python -m benchmarks run train_demo_model --out DIR --minutes 1 --smoke     # a micro configuration on a CPU
    python -m benchmarks run train_demo_model --out DIR --minutes 2.5 --setups deep-a,deep-b --keep 1  # 24 layers, for benchmarks.ffn

The data are the source text of the Python standard library with facts ``\\n## key: value\\n`` written over random places and
asked for later (see needles.py). The model is a plain LlamaForCausalLM; only the training forward is written out here, because it needs no
mask, no cache and few kernel launches. Lengths grow once answers come right (256 bytes -> 8192); the loss is that of the text plus that of
the answers, each a mean of its own, and random bytes (keys, values of facts) do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import shutil
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.needles import Score, score, stdlib_text

EVENT_BYTES = 19  # "\n## qwerty: 314159\n"
KEY, VALUE = slice(4, 10), slice(12, 18)
MAX_BYTES = 2_000_000
TEXT_BYTES = 12_000_000
HELD_OUT = 400_000  # bytes at the end of the text that training never sees


@dataclass(frozen=True)
class Setup:
    """One configuration. `batch_bytes`: bytes a step; `facts`: fewest and most facts a sequence at each length; lr: peak, AdamW."""

    name: str
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    inner: int = 256
    theta: float = 500_000.0
    lr: float = 3e-3
    muon: bool = False
    answer_weight: float = 1.0
    batch_bytes: int = 32768
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    facts: tuple[tuple[int, int], ...] = ((2, 4), (4, 8), (6, 16), (8, 24), (8, 40), (16, 48))
    seed: int = 0
    max_bytes: int = MAX_BYTES  # of the saved files


# Muon finds the copying circuit within some hundred steps where AdamW needs thousands, if it finds it at all
SETUPS = (
    Setup("a", muon=True, lr=2e-3),
    Setup("b", muon=True, lr=4e-3, seed=1),
    Setup("c", muon=True, lr=2e-3, hidden=192, layers=3, heads=4, kv_heads=2, inner=256, seed=2),
    Setup("d", lr=1e-3, answer_weight=2.0, seed=3),
)
_LONG = {"lengths": (256, 512, 1024, 2048, 4096), "facts": ((2, 4), (4, 8), (6, 16), (8, 24), (8, 40))}
# deep and narrow, not bundled: six layers are few to leave some out of
DEEP = tuple(
    Setup(name, muon=True, lr=lr, hidden=256, layers=24, inner=512, batch_bytes=65536, seed=seed, max_bytes=1 << 26, **_LONG)
    for name, lr, seed in (("deep-a", 1e-3, 0), ("deep-b", 2e-3, 1))
)
SMOKE = Setup("smoke", hidden=64, layers=2, heads=2, kv_heads=1, inner=64, batch_bytes=2048, lengths=(128, 256), facts=((2, 2), (3, 4)))


def build(setup: Setup) -> LlamaForCausalLM:
    """The untrained model, float32. Head dim 64 always: the smallest that the generated kernels take without padding."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setup.hidden,
        intermediate_size=setup.inner,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        head_dim=64,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": setup.theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=setup.hidden**-0.5 / 2,
    )
    torch.manual_seed(setup.seed)
    return LlamaForCausalLM(config)


def rotary(model: LlamaForCausalLM, length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim] of the rotary embedding."""
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angles = torch.arange(length, device=device).float()[:, None] * config.rope_parameters["rope_theta"] ** -exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def forward(model: LlamaForCausalLM, ids: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """ids [batch, n] -> logits [batch, n, 256] float32; the same function as the model's own forward, matrix products in `dtype`."""
    config, eps = model.config, model.config.rms_norm_eps
    batch, length = ids.shape
    cos, sin = tables

    def heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.to(dtype)).view(batch, length, -1, config.head_dim).transpose(1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    x = F.embedding(ids, model.model.embed_tokens.weight)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, eps).to(dtype)
        query, key = turn(heads(normed, attention.q_proj.weight)), turn(heads(normed, attention.k_proj.weight))
        value = heads(normed, attention.v_proj.weight)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), attention.o_proj.weight.to(dtype))
        normed = F.rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, eps).to(dtype)
        gated = F.silu(F.linear(normed, mlp.gate_proj.weight.to(dtype))) * F.linear(normed, mlp.up_proj.weight.to(dtype))
        x = x + F.linear(gated, mlp.down_proj.weight.to(dtype))
    x = F.rms_norm(x, x.shape[-1:], model.model.norm.weight, eps).to(dtype)
    return F.linear(x, model.model.embed_tokens.weight.to(dtype)).float()


def batch_of(
    text: torch.Tensor, length: int, batch: int, facts: int, asks: int, tail: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences with `facts` facts, each asked for `asks` times later, made on the text's device without a loop.

    Returns ids [batch, length] int64, answers [batch, questions, 6] (places of the answers' bytes) and noise [batch, length] bool (bytes
    nobody can foresee). `tail`: half of the facts are asked for, all at the end of the sequence, as the evaluator does.
    """
    device = text.device
    offsets = torch.randint(0, len(text) - length, (batch, 1), device=device)
    ids = text[offsets + torch.arange(length, device=device)].long()
    scattered = facts if tail else facts * (1 + asks)
    room = length - EVENT_BYTES * (scattered + (facts // 2 if tail else 0))
    gaps = torch.randint(0, room + 1, (batch, scattered), device=device).sort(1).values
    starts = gaps + EVENT_BYTES * torch.arange(scattered, device=device)
    # which event is a fact and which its questions: random groups of places, the first of each group is the fact
    groups = torch.rand(batch, scattered, device=device).argsort(1)
    if tail:
        fact_places = starts.gather(1, groups)[..., None]
        ends = length - EVENT_BYTES * torch.arange(facts // 2, 0, -1, device=device)
        asked, ask_places = facts // 2, ends.expand(batch, -1)[..., None]
    else:
        groups = groups.view(batch, facts, 1 + asks).sort(2).values
        places = starts.gather(1, groups.flatten(1)).view(batch, facts, 1 + asks)
        asked, fact_places, ask_places = facts, places[..., :1], places[..., 1:]
    events = torch.full((batch, facts, EVENT_BYTES), 10, device=device)
    events[..., 1:3], events[..., 3], events[..., 10], events[..., 11] = ord("#"), 32, ord(":"), 32
    events[..., KEY] = torch.randint(97, 123, (batch, facts, 6), device=device)
    events[..., VALUE] = torch.randint(48, 58, (batch, facts, 6), device=device)
    questions = events[:, :asked].clone()
    questions[..., 1:3] = ord("?")
    byte = torch.arange(EVENT_BYTES, device=device)
    fact_bytes = fact_places[..., None] + byte
    ask_bytes = ask_places[..., None] + byte
    ids.scatter_(1, fact_bytes.flatten(1), events[:, :, None].expand_as(fact_bytes).flatten(1))
    ids.scatter_(1, ask_bytes.flatten(1), questions[:, :, None].expand_as(ask_bytes).flatten(1))
    noise = torch.zeros(batch, length, dtype=torch.bool, device=device)
    noise.scatter_(1, fact_bytes[..., KEY].flatten(1), True)
    noise.scatter_(1, fact_bytes[..., VALUE].flatten(1), True)
    noise.scatter_(1, ask_bytes[..., KEY].flatten(1), True)
    return ids, ask_bytes[..., VALUE].reshape(batch, -1, 6), noise


def losses(
    logits: torch.Tensor, ids: torch.Tensor, answers: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss of the text, mean loss of the answers, share of answers that are right in every byte."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
    plain = (~noise[:, 1:]).scatter(1, (answers - 1).flatten(1), False)
    text_loss = (each * plain).sum() / plain.sum()
    answer_loss = each.gather(1, (answers - 1).flatten(1)).mean()
    with torch.no_grad():
        guesses = logits.argmax(-1).gather(1, (answers - 1).flatten(1))
        right = (guesses == ids.gather(1, answers.flatten(1))).view(answers.shape).all(-1).float().mean()
    return text_loss, answer_loss, right


def optimizers(model: LlamaForCausalLM, setup: Setup, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices and AdamW for embedding and norms."""
    adam = {"betas": (0.9, 0.98), "eps": 1e-8, "fused": fused}
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embedding = [p for name, p in model.named_parameters() if "embed" in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    small = [{"params": embedding, "weight_decay": 0.0}, {"params": norms, "weight_decay": 0.0}]
    if setup.muon:
        muon = torch.optim.Muon(matrices, lr=setup.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(small, lr=setup.lr, **adam)]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, *small], lr=setup.lr, **adam)]


def learning_rate(peak: float, step: int, fraction: float) -> float:
    """Warm-up over 200 steps, a plateau, and a linear decay to 2 % over the last 40 % of the time."""
    return peak * min(1.0, (step + 1) / 200) * min(1.0, 0.02 + 0.98 * (1 - fraction) / 0.4)


class Curriculum:
    """Which length comes next: longer ones once answers at the longest so far come right, and by the clock whatever happens."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.stage, self.right = setup, 0, 0.0
        self.random = random.Random(setup.seed)

    def pick(self, fraction: float) -> tuple[int, int, int, bool]:
        """-> length, facts, asks a fact, whether the questions stand at the end."""
        last = len(self.setup.lengths) - 1
        due = min(last, math.floor((fraction - 0.3) / 0.4 * (last + 1))) if fraction > 0.3 else 0
        if due > self.stage or (self.right > 0.8 and self.stage < last):
            self.stage, self.right = max(due, self.stage + 1), 0.0
        level = self.stage if self.random.random() < 0.65 else self.random.randint(0, self.stage)
        fewest, most = self.setup.facts[level]
        facts = self.random.randint(fewest, most)
        length = self.setup.lengths[level]
        tail = facts >= 2 and self.random.random() < 0.35 and level > 0
        most_asks = max(1, min(4, (length - 8) // EVENT_BYTES // facts - 1))
        return length, facts, self.random.randint(min(2, most_asks), most_asks), tail

    def saw(self, length: int, right: float) -> None:
        if length == self.setup.lengths[self.stage]:
            self.right = 0.9 * self.right + 0.1 * right


def save(model: LlamaForCausalLM, folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Writes config.json and model.safetensors (bf16), and nothing else."""
    scratch = folder.with_suffix(".new")
    shutil.rmtree(scratch, ignore_errors=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(scratch)
    (scratch / "generation_config.json").unlink(missing_ok=True)
    for path in scratch.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in scratch.iterdir())
    if size > max_bytes:
        raise ValueError(f"{folder.name}: {size} bytes, more than {max_bytes}")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def examine(
    model: LlamaForCausalLM, text: bytes, lengths: tuple[int, ...], prompts: int, dtype: torch.dtype, needles: int
) -> dict[int, Score]:
    """The evaluator's scores on held-out text, by length in bytes."""
    device = next(model.parameters()).device

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return forward(model, ids, rotary(model, ids.shape[1], dtype, device), dtype)

    return {n: score(logits, n, text, range(prompts), needles=needles, asks=needles // 2, device=device) for n in lengths}


def train(setup: Setup, out: Path, minutes: float, device: str) -> None:
    """Trains one configuration for `minutes`, keeping the best checkpoint in out/NAME and a line a look in out/NAME.log."""
    start = time.monotonic()
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    data = stdlib_text(TEXT_BYTES)
    held_out = data[-HELD_OUT:]
    text = torch.frombuffer(bytearray(data[:-HELD_OUT]), dtype=torch.uint8).to(device)
    model = build(setup).to(device)
    tables = {n: rotary(model, n, dtype, torch.device(device)) for n in setup.lengths}
    steppers = optimizers(model, setup, fused=device.startswith("cuda"))
    curriculum = Curriculum(setup)
    log = (out / f"{setup.name}.log").open("a", buffering=1)
    print(json.dumps({**asdict(setup), "parameters": sum(p.numel() for p in model.parameters())}), file=log)
    checked = setup.lengths[-2:]
    best, looked, step = -1.0, start, 0
    seen: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(3, device=device))
    while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
        length, facts, asks, tail = curriculum.pick(fraction)
        bytes_a_step = setup.batch_bytes * (2 if length >= 4096 else 1)
        ids, answers, noise = batch_of(text, length, max(1, bytes_a_step // length), facts, asks, tail)
        text_loss, answer_loss, right = losses(forward(model, ids, tables[length], dtype), ids, answers, noise)
        (text_loss + setup.answer_weight * answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(setup.lr, step, fraction)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        seen[length].mul_(0.9).add_(0.1 * torch.stack((text_loss.detach(), answer_loss.detach(), right)))
        step += 1
        if step % 10 == 0:  # reading the GPU's numbers stalls it
            longest = setup.lengths[curriculum.stage]
            for _ in range(10):
                curriculum.saw(longest, float(seen[longest][2]))
        if time.monotonic() - looked > (20 if fraction < 0.6 else 12) or step == 50:
            looked = time.monotonic()
            scores = examine(model, held_out, checked, 8 if dtype == torch.bfloat16 else 1, dtype, 32 if checked[-1] > 2048 else 4)
            mean = sum(s.share for s in scores.values()) / len(scores) - 0.01 * sum(s.nll for s in scores.values())
            recent = {n: [round(float(x), 3) for x in value] for n, value in sorted(seen.items())}
            shares = {n: (round(s.share, 3), round(s.nll, 3)) for n, s in scores.items()}
            line = f"{looked - start:.0f}s step {step} stage {curriculum.stage} [text, answers, right] {recent} held out {shares}"
            print(line, file=log)
            print(f"{setup.name}: {line}", flush=True)
            if mean > best:
                best = mean
                save(model, out / setup.name, setup.max_bytes)
                (out / f"{setup.name}.best").write_text(f"{best}\n")


def worker(setup: Setup, out: Path, minutes: float, device: str) -> None:
    """A process of its own: a failure is printed and costs only its own configuration."""
    try:
        torch.set_num_threads(1 if device == "cpu" else 2)
        train(setup, out, minutes, device)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def final(folder: Path, device: str, lengths: tuple[int, ...], needles: tuple[int, ...], prompts: int) -> dict[str, str]:
    """What the saved files answer, through transformers alone."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device != "cpu" else torch.float32).to(device).eval()
    text = stdlib_text(TEXT_BYTES)[-HELD_OUT:]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    found = {}
    for length in lengths:
        for count in needles:
            result = score(logits, length, text, range(1000, 1000 + prompts), needles=count, asks=min(16, count), device=device)
            found[f"{length} bytes, {count} needles"] = f"{result.right}/{result.asked} right, nll {result.nll:.3f}"
    return found


def collect(work: Path, out: Path, keep: int) -> list[Path]:
    """Copies the best `keep` checkpoints and one joined log to `out` (few files: a transfer may allow no more)."""
    names = sorted((path.stem for path in work.glob("*.best")), key=lambda name: -float((work / f"{name}.best").read_text()))
    for old in out.iterdir():
        if old.is_dir() and old != work:
            shutil.rmtree(old)
    for name in names[:keep]:
        shutil.copytree(work / name, out / name)
    (out / "log.txt").write_text("\n".join(path.read_text() for path in sorted(work.glob("*.log"))))
    return [out / name for name in names[:keep]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0, help="training time of each configuration; all run at once")
    parser.add_argument("--setups", default=",".join(setup.name for setup in SETUPS))
    parser.add_argument("--keep", type=int, default=3, help="how many checkpoints to keep, best first")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo-model-work"), help="scratch folder")
    parser.add_argument("--smoke", action="store_true", help="one micro configuration")
    options = parser.parse_args(arguments)
    work, out = options.work, options.out
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    setups = [SMOKE] if options.smoke else [setup for setup in (*SETUPS, *DEEP) if setup.name in options.setups.split(",")]
    if devices == ["cpu"] and not options.smoke:
        setups = [replace(setup, batch_bytes=4096) for setup in setups]
    spawn = multiprocessing.get_context("spawn")
    runs = [spawn.Process(target=worker, args=(s, work, options.minutes, devices[i % len(devices)])) for i, s in enumerate(setups)]
    for run in runs:
        run.start()
    collected = time.monotonic()
    while any(run.is_alive() for run in runs):
        time.sleep(1)
        if time.monotonic() - collected > 60:  # what is there survives if this process does not
            collect(work, out, options.keep)
            collected = time.monotonic()
    lengths, needles, prompts = ((256,), (4,), 2) if options.smoke else ((4096, 6000, 8192), (16, 32), 12)
    lengths = tuple(n for n in lengths if n <= max(setup.lengths[-1] for setup in setups))
    for folder in collect(work, out, options.keep):
        print(json.dumps({"model": folder.name, **final(folder, devices[0], lengths, needles, prompts)}), flush=True)
    if any(run.exitcode for run in runs) and not list(work.glob("*.best")):
        print("every configuration failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
