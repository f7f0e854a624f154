"""Batches, made by processes of their own, which are forked before CUDA is up."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.answers.code_model.setup import Setup, length_of
from benchmarks.lib import recall

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


BLOCK = 10  # steps between looks at the clock; batches are asked for two blocks ahead


def ask_block(feed: Feed, setup: Setup, step: int, fraction: float) -> None:
    for number in range(step, step + BLOCK):
        feed.ask(length_of(setup, number, fraction))
