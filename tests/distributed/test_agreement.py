"""Processes that differ, or that are gone, are one clear error on each, in less than a timeout."""

from __future__ import annotations

import pytest
import torch

from sparsify.distributed import agreement
from tests.support import disagreeing, processes


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tp", "cp"])
def test_other_options(way):
    for told in processes.run(2, disagreeing.options, way):
        assert told.startswith("DistributedError: sparsify.compile: processes differ in the options (rank 0: "), told


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, what",
    [
        ("tokens", "generate(): processes differ in "),
        ("random", "generate(): processes differ in the random generator's state"),
        ("length", "context parallelism: processes differ in the size of the prompt (rank 0: (1, 40), rank 1: (1, 39))"),
        ("short", "context parallelism: a prompt of 5 tokens is shorter than 4 for each of the 2 processes that share it"),
    ],
)
def test_other_prompts(kind, what):
    for told in processes.run(2, disagreeing.prompts, kind):
        assert told.startswith(f"DistributedError: {what}"), told


@pytest.mark.slow
def test_a_process_that_ended():
    pool = processes.Pool(3)
    try:
        *others, (error, _) = pool.outcomes(disagreeing.after_a_death, 20.0)
        assert error == "it ended"
        for failure, told in others:
            assert not failure and told.startswith("DistributedError: test: another process stopped or does not answer: "), (failure, told)
    finally:
        pool.end()


def test_digests_tell_contents_apart():
    one = torch.arange(6)
    same = [one, one.clone(), torch.arange(12)[::2] // 2]
    assert len({agreement.digest(tensor) for tensor in same}) == 1
    other = [one + 1, one.int(), one.view(2, 3), {"a": 1}, {"a": 2}]
    assert len({agreement.digest(value) for value in [one, *other]}) == 6


@pytest.mark.parametrize("text, lost", [("Connection closed by peer", True), ("NCCL timeout", True), ("shapes do not fit", False)])
def test_errors_of_lost_processes(text, lost):
    assert agreement.is_loss(RuntimeError(text)) is lost and not agreement.is_loss(ValueError(text))
