"""A short soak, and that a soak finds what it is for."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.models.soak import Soak


def test_threads_give_every_token_as_alone():
    soak = Soak(["uncompiled"], tokens=4, prompts=1)
    outcome = soak.run(threads=4, calls=5)
    assert outcome.clean, "\n".join([*outcome.wrong, *outcome.errors])
    assert sum(outcome.calls.values()) == 20


@pytest.mark.slow
@pytest.mark.parametrize("lowerings", [["uncompiled", "eager"], ["eager", "inductor"]])
def test_threads_with_compiled_models_give_every_token_as_alone(lowerings):
    outcome = Soak(lowerings).run(threads=4, calls=40)
    assert outcome.clean, "\n".join([*outcome.wrong, *outcome.errors])


def test_a_wrong_answer_and_an_error_are_found(monkeypatch):
    soak = Soak(["uncompiled"], tokens=1, prompts=1)
    real = Soak.answer

    def spoiled(self, request):
        if threading.current_thread() is not threading.main_thread() and request.cache == "plain":
            return real(self, request) + 1
        if request.cache == "whole":
            raise ValueError("lost")
        return torch.as_tensor(self.alone[request])

    monkeypatch.setattr(Soak, "answer", spoiled)
    outcome = soak.run(threads=2, calls=20)
    assert outcome.wrong and "ValueError: lost" in outcome.errors[0] and not outcome.clean
