"""Many requests at once: threads that call `generate()` of two models, plain, with a SparseCache and compiled, mixed; every token as alone.

python -m tests.models.soak --threads 4 --calls 500 --record
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import test_runs
from benchmarks.lib import records
from sparsify import SparseCache
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

FAMILIES = ("llama", "mistral_window")
# how the prompt's keys are kept: an ordinary cache, everything in a SparseCache, and caches that forget
CACHES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "whole": {"policy": "snapkv", "budget": 128},
    "snapkv": {"policy": "snapkv", "budget": 16, "window": 4},
    "streaming": {"policy": "streaming_llm", "sinks": 2, "window": 12},
}
LOWERINGS: dict[str, dict[str, Any] | None] = {
    "uncompiled": None,
    "eager": {"passes": ["dense"], "lower": "eager", "min_length": 0, "strict": True},
    "inductor": {"passes": ["dense"], "min_length": 0, "strict": True},
}
SWITCH_S = 1e-5  # between thread switches


@dataclass(frozen=True)
class Request:
    """family, lowering, cache: names in the tables above. prompt: a seed. rows: of the batch; of several, the first is padded."""

    family: str
    lowering: str
    cache: str
    prompt: int
    rows: int
    tokens: int


@dataclass
class Outcome:
    """What the threads saw. wrong: requests whose tokens differ from those alone. errors: request and traceback."""

    calls: collections.Counter = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.wrong and not self.errors


class Soak:
    """The models, one per family and lowering, and what each request gives when nothing else runs."""

    def __init__(self, lowerings: Sequence[str], tokens: int = 6, prompts: int = 2):
        self.models = {}
        for family, lowering in itertools.product(FAMILIES, lowerings):
            model = build(family, seed=FAMILIES.index(family))
            if LOWERINGS[lowering] is not None:
                model.compile(backend="sparsify", options=LOWERINGS[lowering])
            self.models[family, lowering] = model
        kinds = itertools.product(FAMILIES, lowerings, CACHES, range(prompts))
        self.requests = [Request(*kind, rows=1 + n % 2, tokens=tokens) for n, kind in enumerate(kinds)]
        self.alone = {request: self.answer(request) for request in self.requests}

    def answer(self, request: Request) -> torch.Tensor:
        """The tokens that a request gets."""
        torch._dynamo.config.recompile_limit = 64  # threads do not share it
        model = self.models[request.family, request.lowering]
        generator = torch.Generator().manual_seed(request.prompt)
        length = 20 + 7 * request.prompt
        ids = torch.randint(3, VOCAB, (request.rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[: request.rows - 1, :3] = 0
        options = CACHES[request.cache]
        given = {} if options is None else holding(SparseCache(model.config, **options))
        return model.generate(ids, attention_mask=mask, max_new_tokens=request.tokens, do_sample=False, **given)

    def run(self, threads: int, calls: int, seed: int = 0) -> Outcome:
        """Each thread answers so many requests, in an order of its own; they start together and are switched often."""
        outcome, start = Outcome(), threading.Barrier(threads)

        def work(number: int) -> None:
            order = random.Random(seed * 1000 + number)
            start.wait()
            for _ in range(calls):
                request = order.choice(self.requests)
                try:
                    if not torch.equal(self.answer(request), self.alone[request]):
                        outcome.wrong.append(str(request))
                except Exception:
                    outcome.errors.append(f"{request}\n{traceback.format_exc()}")
                outcome.calls[request.lowering, request.cache] += 1

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(before)
        return outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--calls", type=int, default=500, help="of each thread (default: %(default)s)")
    parser.add_argument("--lower", nargs="+", choices=LOWERINGS, default=["uncompiled", "eager"], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of requests (default: %(default)s)")
    parser.add_argument("--record", type=Path, nargs="?", const=records.RESULTS / "soak.jsonl", help="append a record (default: %(const)s)")
    given = parser.parse_args(arguments)
    soak = Soak(given.lower)
    begin = time.perf_counter()
    outcome = soak.run(given.threads, given.calls, given.seed)
    seconds = round(time.perf_counter() - begin)
    calls = {" ".join(kind): count for kind, count in sorted(outcome.calls.items())}
    print(f"{sum(calls.values())} calls in {seconds} s: {calls}; {len(outcome.wrong)} wrong, {len(outcome.errors)} errors")
    for text in (*dict.fromkeys(outcome.wrong), *outcome.errors[:5]):
        print(text)
    if given.record is not None:
        asked = {"threads": given.threads, "calls": given.calls, "lower": given.lower, "seed": given.seed, "switch_s": SWITCH_S}
        failed = {"wrong": outcome.wrong, "errors": [text.strip().splitlines()[-1] for text in outcome.errors]}
        records.append(given.record, test_runs.Soak(seconds=seconds, by_kind=calls, more=asked | failed))
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())
