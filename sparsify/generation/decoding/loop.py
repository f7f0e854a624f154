"""Greedy and sampled decoding for models that sparsify compiled, in place of transformers' loop: same arguments, same tokens, same returns.

transformers' loop prepares a token's inputs anew, calls the model layer by layer from Python and waits for the device after every
token. Here a token is one `Step` over buffers that stay where they are, which a CUDA graph replays, and the host reads whether to stop
while the next token is being computed. What this loop does not know, `refusal` names; transformers' own serves that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import GenerationMixin

from sparsify import progress
from sparsify.generation import compat
from sparsify.generation.decoding import processors
from sparsify.generation.decoding.model_state import model_state
from sparsify.generation.decoding.runner import Direct, Runner, drawing
from sparsify.generation.decoding.step import Step
from sparsify.generation.decoding.step_caches import StepCache, step_cache
from sparsify.generation.decoding.stopping import Criteria, LateWatch, Watch, sort_criteria

# what a model is given beside its cache: each of these has a buffer in a Step, or serves the prompt alone, or is not for the model
_KNOWN = {compat.CACHE_NAME, "attention_mask", "position_ids", "inputs_embeds", "tokenizer", "assistant_tokenizer"}
# a growing cache has room for this many tokens after the prompt, or half the prompt's number, before it is made larger
_ROOM = 4096


def room_for(stored: int, new_tokens: int) -> int:
    """Tokens of each row that a cache has room for before it needs to grow, where it holds `stored` and at most `new_tokens` follow."""
    return stored + min(new_tokens, max(_ROOM, stored // 2))


MakeRunner = Callable[[Callable[[], None], Callable[[], None]], Runner]


def refusal(model: Any, config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why transformers' own loop serves this call of `generate()`, as far as it does not depend on the cache; empty where it does not.

    config: the call's generation configuration. model_kwargs: what `generate()` hands to the decoding method beside its own arguments.
    """
    kind = type(model)
    hooks = ("prepare_inputs_for_generation", "_prefill", "_update_model_kwargs_for_generation")
    own = [name for name in hooks if name in vars(model) or getattr(kind, name) is not getattr(GenerationMixin, name)]
    plain = bool | int | float | str | None
    unknown = [name for name, value in model_kwargs.items() if name not in _KNOWN and not isinstance(value, plain)]
    positions = model_kwargs.get("position_ids")
    reasons = {
        "the model is an encoder-decoder": model.config.is_encoder_decoder,
        f"the model has its own {', '.join(own)}": own,
        "the model lies on several devices": len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1,
        "the model is split by tensor parallelism": (getattr(model, "_tp_size", None) or 1) > 1,
        "use_cache is off": not config.use_cache or model_kwargs.get("use_cache") is False,
        "attention weights or hidden states are asked for": config.output_attentions or config.output_hidden_states,
        "the model drafts for another one": config.is_assistant,
        "a compile_config is given": config.compile_config is not None,
        "the model takes no position_ids": positions is None,
        f"the model is given {', '.join(unknown)}": unknown,
        "the positions lie on another device": positions is not None and positions.device != model.device,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


class Session(NamedTuple):
    """A step with its runner, for generations that agree in all that a recorded step holds; one at a time."""

    step: Step
    runner: Runner
    cache: StepCache


class Sessions:
    """Sessions over one cache, for as long as nothing changes that their graphs cannot see."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Session] = {}
        self._state: Any = None

    def check(self, model: Any, cache: StepCache) -> None:
        """Forgets all sessions when the model or the cache is not what it was."""
        state = model_state(model), cache.state()
        if state != self._state:
            self.by_key.clear()
            self._state = state

    def move(self, model: Any, cache: StepCache) -> None:
        """The cache's buffers have moved, in the middle of a generation."""
        for session in self.by_key.values():
            session.runner.forget()
        self._state = model_state(model), cache.state()


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
    *,
    private: bool = False,
    late: bool = False,
    make_runner: MakeRunner = lambda function, failed: Direct(function),
    sessions: Sessions | None = None,
    shown: bool = False,
) -> Any:
    """As `GenerationMixin._sample`, for calls that neither `refusal` nor `step_caches.refusal` refuses.

    Args:
        private: nobody sees the cache after the call, so that it may hold a token too many.
        late: read whether to stop one token late, where that leaves no trace.
        make_runner: makes what runs the steps, of the step and of what to do when recording it failed.
        sessions: those over this very cache from earlier calls; new ones are added.
        shown: tell of a long prompt on the terminal.
    """
    config, device = generation_config, input_ids.device
    criteria = sort_criteria(stopping_criteria)
    parts = processors.recordable(logits_processor, input_ids.shape[1])
    cache, position_ids = step_cache(model_kwargs[compat.CACHE_NAME]), model_kwargs["position_ids"]
    model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
    rows, width, size = *input_ids.shape, criteria.max_length
    stored = compat.columns(input_ids, config, model_kwargs)  # tokens in the cache once the prompt is read
    room = room_for(stored, size - width)
    cache.reserve(room)

    telling = progress.start(f"reading a prompt of {stored} tokens" if rows == 1 else f"reading {rows} prompts of {stored} tokens", shown)
    try:
        outputs = model._prefill(input_ids, config, model_kwargs)
        # a copy: the logits of a whole prompt may be large, and are let go
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=device)
        del outputs
        cache.reserve(room)  # a cache that only the prompt allocated

        sessions = Sessions() if sessions is None else sessions
        sessions.check(model, cache)
        session = _session(model, cache, rows, size, position_ids, parts, config, criteria, model_kwargs, make_runner, sessions)
        step, runner, cache = session
        cache.begin(rows, model_kwargs.get("attention_mask"), stored)
        limit = cache.room()
        pad = config._pad_token_tensor.to(device) if criteria.pads else None
        step.begin(input_ids, position_ids, pad, processors.penalised(parts, logits_processor, input_ids, logits.shape[-1]))
        watch = (LateWatch if late and (private or not criteria.by_content) and criteria.others is None else Watch)(
            step.status, step.token, streamer
        )
        kept = _Kept(config)
        draws = _Draws(device, config.do_sample)

        logits, scores = _choose(step, logits, logits_processor, input_ids)
        length = width + 1
        with model._optimize_model_for_decode():
            while True:
                kept.add(logits, scores)
                _ask(criteria, stopping_criteria, step, length, kept)
                over = criteria.ended(length)
                if watch() or over:
                    break
                if stored == limit:
                    cache.reserve(room_for(stored, size - length + 1))
                    limit = cache.room()
                    runner.forget()
                    sessions.move(model, cache)
                draws.mark()
                runner()
                if length > width + 1:
                    telling.done()  # this step was started only after the first token had been there
                stored += 1
                logits, scores = step.logits, step.scores
                if step.parts is None:
                    logits, scores = _choose(step, logits, logits_processor, step.sequences[:, :length].contiguous())
                length += 1
        extra = watch.finish()
    finally:
        telling.done()
    if extra:
        length -= extra
        draws.undo(extra)
        kept.drop(extra)
    cache.finish()
    if streamer is not None:
        streamer.end()
    sequences = step.sequences[:, :length].clone()
    if not config.return_dict_in_generate:
        return sequences
    held = model_kwargs[compat.CACHE_NAME]
    return compat.generated(held, sequences=sequences, scores=kept.scores, logits=kept.logits, attentions=None, hidden_states=None)


def _session(
    model: Any,
    cache: StepCache,
    rows: int,
    size: int,
    positions: Tensor,
    parts: Any,
    config: Any,
    criteria: Criteria,
    model_kwargs: dict[str, Any],
    make_runner: MakeRunner,
    sessions: Sessions,
) -> Session:
    """A step for this call: one of `sessions` where all that it holds is the same, else a new one."""
    flags = {name: value for name, value in model_kwargs.items() if name not in _KNOWN}
    inference = torch.is_inference_mode_enabled()  # whose tensors cannot change outside of it
    asked = (parts, config.do_sample, criteria.eos, criteria.pads, tuple(sorted(flags.items(), key=str)))
    key = (rows, positions.shape[:-1], inference, *asked)
    if (found := sessions.by_key.get(key)) is not None and found.step.sequences.shape[1] >= size:
        return found

    alive = weakref.ref(model)  # a step is kept for as long as the model lives, and must not keep it alive

    def forward(**inputs: Tensor) -> Tensor:
        logits = alive()(**inputs, **cache.inputs(), **flags, return_dict=True).logits
        return logits[:, -1].to(copy=True, dtype=torch.float32)

    pad = config._pad_token_tensor.to(positions.device) if criteria.pads else None
    longest = 1 << max(size - 1, 1023).bit_length()  # longer than is asked for, so that later turns find this step
    step = Step(forward, rows, longest, positions, parts=parts, sample=config.do_sample, eos=criteria.eos, pad=pad)
    session = Session(step, make_runner(step, cache.forget), cache)
    if session.runner.keeps:
        sessions.by_key[key] = session
    return session


def _choose(step: Step, logits: Tensor, logits_processor: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The next token by the processors as they are: for the first token, and where they cannot be recorded.

    Args:
        logits: fp32 [rows, vocabulary].
        ids: int64 [rows, tokens so far].

    Returns:
        logits and scores, before and after the processors, which may have worked in place.
    """
    logits = logits.clone()
    scores = logits_processor(ids, logits)
    with drawing:
        step.choose(scores)
    return logits, scores


def _ask(criteria: Criteria, all_criteria: Any, step: Step, length: int, kept: _Kept) -> None:
    """Asks the criteria that are not part of the step."""
    if criteria.others is not None:
        step.end(all_criteria(step.sequences[:, :length].contiguous(), kept.scores))
        return
    for text in criteria.texts:
        step.end(text(step.sequences[:, :length], None))


class _Kept:
    """Scores and logits of all tokens, where they are asked for."""

    def __init__(self, config: Any):
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
    """Where the default generator stood before the last steps, so that a step too many leaves no trace in it."""

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
