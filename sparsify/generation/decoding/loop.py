"""Greedy and sampled decoding for models that sparsify compiled, in place of transformers' loop: same arguments, same tokens, same returns.

transformers' loop prepares a token's inputs anew, calls the model layer by layer from Python and waits for the device after every
token. Here a token is one `Step` over buffers that stay where they are, which a CUDA graph replays, and the host reads whether to stop
while the next token is being computed. What this loop does not know, `call.refusal` names; transformers' own serves that.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from sparsify import progress
from sparsify.generation import compat
from sparsify.generation.caches.drafting import MOST
from sparsify.generation.decoding import processors
from sparsify.generation.decoding.call import Call
from sparsify.generation.decoding.draft_lengths import DraftLength
from sparsify.generation.decoding.drafts import Drafts
from sparsify.generation.decoding.runner import Direct, Separate, drawing
from sparsify.generation.decoding.sessions import MakeRunner, Sessions
from sparsify.generation.decoding.step_caches import StepCache, step_cache
from sparsify.generation.decoding.stopping import LateWatch, Watch
from sparsify.generation.regions.bypass import Bypass, Schedule, bypassed, watching

log = logging.getLogger(__name__)

# a growing cache has room for this many tokens after the prompt, or half the prompt's number, before it is made larger
_ROOM = 4096


def room_for(stored: int, new_tokens: int) -> int:
    """Tokens of each row that a cache has room for before it needs to grow, where it holds `stored` and at most `new_tokens` follow."""
    return stored + min(new_tokens, max(_ROOM, stored // 2))


def decode(
    model: Any,
    call: Call,
    *,
    private: bool = False,
    late: bool = False,
    make_runner: MakeRunner = lambda function, failed: Direct(function),
    sessions: Sessions | None = None,
    shown: bool = False,
    bypass: Bypass | None = None,
) -> Any:
    """As `GenerationMixin._sample`, for calls that neither `call.refusal` nor `step_caches.refusal` refuses.

    Args:
        call: the arguments of `_sample`.
        private: nobody sees the cache after the call, so that it may hold a token too many.
        late: read whether to stop one token late, where that leaves no trace.
        make_runner: makes what runs the steps, from the step and from what to do when recording it failed.
        sessions: those over this very cache from earlier calls; new ones are added.
        shown: show a line on the terminal while a long prompt is read.
        bypass: lets tokens bypass layers; None: they run all of them.

    Returns:
        int64 [rows, tokens], or what `generate(return_dict_in_generate=True)` returns.
    """
    prompts = "a prompt" if call.rows == 1 else f"{call.rows} prompts"
    cache = step_cache(call.cache)
    reading = progress.start(f"reading {prompts} of {call.columns} tokens", shown)
    try:
        bypasses = bypass is not None and bypass.serves(call.cache, call.drafts)
        cache.reserve(_room(call))
        one_token = _lacks_one_token(call, cache)
        with watching() as seen:
            logits = None if one_token else _read_prompt(model, call, cache)
        late = late and not call.drafts and (private or not call.criteria.by_content) and call.criteria.others is None
        if bypass is not None:
            alone = make_runner
            make_runner = lambda function, failed: Separate(lambda: alone(function, failed), bypassed)
        kind = _Drafting if call.drafts else _Generation
        generation = kind(model, call, cache, sessions or Sessions(), make_runner, LateWatch if late else Watch)
        with model._optimize_model_for_decode() if one_token else contextlib.nullcontext(), watching() as step:
            generation.begin(logits)
        if bypass is not None and bypasses:  # the prompt's last token is none that was generated here
            generation.schedule = bypass.schedule(call.cache, step if one_token else seen)
        generation.run(reading)
    finally:
        reading.done()
        cache.finish()
    return generation.finish()


def _room(call: Call) -> int:
    return room_for(call.columns, call.max_length - call.prompt_len)


def _lacks_one_token(call: Call, cache: StepCache) -> bool:
    """Whether the cache holds all columns of the prompt but the last, in which every row has a token: then reading it is a step like
    any other, and whatever recorded such steps serves it."""
    # the parts of a step are processors as they are from the second token of a row on, and after the logits' size is known
    if call.columns < 2 or call.prompt_len < 2 or any(isinstance(part, processors.RepetitionPenalty) for part in call.parts or ()):
        return False
    if call.model_kwargs.get("inputs_embeds") is not None:
        return False
    return cache.stored() == call.columns - 1 and (call.padding_mask is None or bool(call.padding_mask[:, -1].all()))


def _read_prompt(model: Any, call: Call, cache: StepCache) -> Tensor:
    """Stores the prompt in the cache, with room for new tokens. Returns the logits of its last token, fp32 [rows, vocabulary]."""
    outputs = model._prefill(call.input_ids, call.generation_config, call.model_kwargs)
    # a copy: the logits of a whole prompt may be large, and are let go
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=call.input_ids.device)
    del outputs
    cache.reserve(_room(call))  # a cache that only the prompt allocated
    return logits


class _Generation:
    """The tokens after a prompt: `begin` takes the first one, `run` those that follow, `finish` gives what `generate()` returns.

    Attributes:
        length: tokens of each row so far, the prompt included.
        stored: tokens of each row in the cache, padding and earlier turns included.
        limit: tokens of each row that the cache has room for; None where that does not matter.
        schedule: the layers that tokens bypass, set before `run`; None: they run all of them.
        logits, scores: of the last token, before and after the processors, fp32 [rows, vocabulary].
    """

    def __init__(
        self,
        model: Any,
        call: Call,
        cache: StepCache,
        sessions: Sessions,
        make_runner: MakeRunner,
        watch: type[Watch],
    ):
        self.schedule: Schedule | None = None
        self.model, self.call, self.sessions = model, call, sessions
        self.step, self.runner, self.cache, self.drafts = sessions.session(model, cache, call, make_runner)
        self.length, self.stored = call.prompt_len, call.columns
        self.watch = watch(self.step.status, self.step.token, call.streamer)
        self.kept = _Kept(call.generation_config)
        self.draws = _Draws(call.input_ids.device, bool(call.generation_config.do_sample))
        self.limit: int | None = None
        self.logits = self.scores = torch.empty(0)

    def begin(self, logits: Tensor | None) -> None:
        """The first token, from the logits of the prompt's last one, fp32 [rows, vocabulary]. None: that one is not in the cache yet."""
        call, mask = self.call, self.call.padding_mask
        if logits is None:
            self.stored -= 1
            mask = None if mask is None else mask[:, :-1]
        self.cache.begin(call.rows, mask, self.stored)
        self.limit = self.cache.room()
        seen = None
        if logits is not None:
            seen = processors.penalised(call.parts, call.logits_processor, call.input_ids, logits.shape[-1])
        self.step.begin(call.input_ids, call.positions, call.pad, seen)
        if logits is None:
            self.step.token.copy_(call.input_ids[:, -1:])
            self._next_token()
            return
        self._choose(logits, call.input_ids)
        self.length += 1

    def run(self, reading: progress.Task) -> None:
        """Token after token until all rows have ended. reading: what tells that the prompt is being read."""
        try:
            with self.model._optimize_model_for_decode():
                for steps in itertools.count():
                    if self._ended():
                        break
                    self._next_token()
                    if steps:
                        reading.done()  # this step was started only after the first token had been there
        finally:
            if self.schedule is not None:
                self.schedule.finish()
        self._take_back(self.watch.finish())

    def finish(self) -> Any:
        """What `generate()` returns."""
        if self.call.streamer is not None:
            self.call.streamer.end()
        sequences = self.step.sequences[:, : self.length].clone()
        if not self.call.generation_config.return_dict_in_generate:
            return sequences
        kept = {"scores": self.kept.scores, "logits": self.kept.logits}
        return compat.generated(self.call.cache, sequences=sequences, **kept, attentions=None, hidden_states=None)

    def _ended(self) -> bool:
        """After a token was chosen: keeps its scores, asks the criteria and says whether to stop."""
        self.kept.add(self.logits, self.scores)
        self._ask_criteria()
        over = self.call.criteria.ended(self.length)
        return self.watch() or over

    def _ask_criteria(self) -> None:
        """Asks the criteria that are not part of the step."""
        criteria, step = self.call.criteria, self.step
        if criteria.others is not None:
            step.end(criteria.others(step.sequences[:, : self.length].contiguous(), self.kept.scores))
            return
        for text in criteria.texts:
            step.end(text(step.sequences[:, : self.length], None))

    def _next_token(self) -> None:
        """Stores the last token and chooses the one that follows."""
        if self.limit is not None and self.stored >= self.limit:
            self._make_room()
        self.draws.mark()
        if self.schedule is None:
            self.runner()
        else:
            with self.schedule.next():
                self.runner()
            self.schedule.stored()
        self.stored += 1
        step = self.step
        if step.parts is None:
            self._choose(step.logits, step.sequences[:, : self.length].contiguous())
        else:
            self.logits, self.scores = step.logits, step.scores
        self.length += 1

    def _make_room(self, drafts: int = 0) -> None:
        """Makes the cache larger, whose buffers move, or smaller where its policy selects, which stay where they are. drafts: tokens for
        which there has to be room beside the next one."""
        before = self.cache.state()
        self.cache.reserve(room_for(self.stored, max(self.call.max_length - self.length + 1, drafts + 1)))
        self.limit = self.cache.room()
        if self.cache.state() == before:
            return
        self.runner.forget()
        if self.drafts is not None:
            self.drafts.forget()
        self.sessions.move(self.model, self.cache)

    def _choose(self, logits: Tensor, ids: Tensor) -> None:
        """Chooses a token by the processors as they are: the first token, and every one where they cannot be recorded.

        Args:
            logits: fp32 [rows, vocabulary].
            ids: int64 [rows, tokens so far].
        """
        self.logits = logits.clone()
        self.scores = self.call.logits_processor(cast("torch.LongTensor", ids), self.logits)  # may work in place
        with drawing:
            self.step.choose(self.scores)

    def _take_back(self, steps: int) -> None:
        """Undoes the last steps, which ran after all rows had ended."""
        if steps:
            self.length -= steps
            self.draws.undo(steps)
            self.kept.drop(steps)


class _Drafting(_Generation):
    """The same where tokens are drafted over some of the cache and verified over all of it."""

    def run(self, reading: progress.Task) -> None:
        if self.drafts is None:
            raise RuntimeError("a session without drafts")
        lengths = self.drafts.lengths()
        with self.model._optimize_model_for_decode():
            while not self._ended():
                # the last token that is wanted is drafted by nobody
                drafts = lengths.choose(self.stored, min(MOST, self.call.max_length - self.length - 1))
                if not drafts:
                    self._next_token()
                elif self._round(self.drafts, lengths, drafts):
                    break
                reading.done()
        self.watch.finish()
        log.info("%.0f %% of drafted tokens were kept", 100 * lengths.acceptance)

    def _round(self, made: Drafts, lengths: DraftLength, drafts: int) -> bool:
        """Takes the tokens that a draft brings. Returns whether one of them but the last ended all rows, so that the rest goes."""
        if self.limit is not None and self.stored + drafts + 1 > self.limit:
            self._make_room(drafts)
        found = made.round(drafts, self.stored, self.scores.shape[-1])
        lengths.learn(drafts, found - 1)
        rest = found
        try:
            for place in range(found):
                self.logits, self.scores = made.logits[:, place], made.scores[:, place]
                self.step.take(made.found[:, place])
                self.length += 1
                self.stored += 1
                rest -= 1
                if rest and self._ended():
                    break
        finally:  # of tokens that nobody has seen, also where a streamer or a criterion raises
            if rest:
                made.take_back(rest)
        return rest > 0


class _Kept:
    """Scores and logits of all tokens, where they are asked for."""

    def __init__(self, config: GenerationConfig):
        wanted = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wanted and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wanted and config.output_logits else None

    def add(self, logits: Tensor, scores: Tensor) -> None:
        """Those of the last step, copied: the next one writes to the same place."""
        if self.scores is not None:
            self.scores += (scores.clone(),)
        if self.logits is not None:
            self.logits += (logits.clone(),)

    def drop(self, steps: int) -> None:
        self.scores = self.scores[:-steps] if self.scores else self.scores
        self.logits = self.logits[:-steps] if self.logits else self.logits


class _Draws:
    """The default random generator's state before each of the last two steps, so that a step too many can be undone."""

    def __init__(self, device: torch.device, sample: bool):
        self.generator = None
        if sample:
            self.generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        self.on_device = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self.generator is not None:
            self._marks = [*self._marks[-1:], self.generator.get_offset() if self.on_device else self.generator.get_state()]

    def undo(self, steps: int) -> None:
        if self.generator is not None:
            (self.generator.set_offset if self.on_device else self.generator.set_state)(self._marks[-steps])
