"""Steps and what recorded them, kept between the calls of `generate()` that can use the same ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify.generation.decoding.call import Call
from sparsify.generation.decoding.draft_lengths import predicted
from sparsify.generation.decoding.drafts import Drafts
from sparsify.generation.decoding.model_state import model_state
from sparsify.generation.decoding.runner import Runner
from sparsify.generation.decoding.step import Step
from sparsify.generation.decoding.step_caches import StepCache

# makes what runs a step, of the step and of what to do when recording it failed
MakeRunner = Callable[[Callable[[], None], Callable[[], None]], Runner]


class Session(NamedTuple):
    """A step with its runner, for generations that agree in all that a recorded step holds; one at a time."""

    step: Step
    runner: Runner
    cache: StepCache
    drafts: Drafts | None

    def forget(self) -> None:
        """The cache's buffers have moved."""
        self.runner.forget()
        if self.drafts is not None:
            self.drafts.forget()


class Sessions:
    """Sessions over one cache, for as long as nothing changes that their graphs cannot see."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Session] = {}
        self._state: Any = None

    def session(self, model: Any, cache: StepCache, call: Call, make_runner: MakeRunner) -> Session:
        """The session of an earlier call where all that it holds is the same, else a new one. Forgets all of them when the model or the
        cache is not what it was."""
        state = model_state(model), cache.state()
        if state != self._state:
            self.by_key.clear()
            self._state = state
        key = _key(call)
        found = self.by_key.get(key)
        if found is not None and found.step.sequences.shape[1] >= call.max_length:
            return found
        forward = _forward(model, cache, call)
        step = _step(forward, call)
        drafts = None
        if call.drafts:
            seconds = predicted(model, call.cache, call.rows)
            drafts = Drafts(step, forward, cache, lambda function: make_runner(function, cache.forget), seconds)
        made = Session(step, make_runner(step, cache.forget), cache, drafts)
        if made.runner.keeps:
            self.by_key[key] = made
        return made

    def move(self, model: Any, cache: StepCache) -> None:
        """The cache's buffers have moved, in the middle of a generation."""
        for session in self.by_key.values():
            session.forget()
        self._state = model_state(model), cache.state()


def _key(call: Call) -> Any:
    """What calls must have in common to use one session."""
    inference = torch.is_inference_mode_enabled()  # whose tensors cannot change outside of it
    criteria, flags = call.criteria, tuple(sorted(call.flags.items(), key=str))
    return (
        call.rows,
        call.positions.shape[:-1],
        inference,
        call.parts,
        call.generation_config.do_sample,
        criteria.eos,
        criteria.pads,
        flags,
        call.drafts,
    )


def _forward(model: Any, cache: StepCache, call: Call) -> Callable[..., Tensor]:
    """Logits of a call's tokens, in the model's dtype [rows, tokens, vocabulary]."""
    alive, flags = weakref.ref(model), dict(call.flags)  # a step is kept for as long as the model lives, and must not keep it alive

    if "logits_to_keep" in flags:  # generate() wants the last ones alone
        flags["logits_to_keep"] = 0

    def forward(**inputs: Tensor) -> Tensor:
        living = alive()
        if living is None:
            raise ReferenceError("the model that decodes is gone")
        return living(**inputs, **cache.inputs(), **flags, return_dict=True).logits

    return forward


def _step(forward: Callable[..., Tensor], call: Call) -> Step:
    def last(**inputs: Tensor) -> Tensor:
        return forward(**inputs)[:, -1].to(copy=True, dtype=torch.float32)

    longest = 1 << max(call.max_length - 1, 1023).bit_length()  # longer than is asked for, so that later turns find this step
    sample, eos = bool(call.generation_config.do_sample), call.criteria.eos
    return Step(last, call.rows, longest, call.positions, parts=call.parts, sample=sample, eos=eos, pad=call.pad)
