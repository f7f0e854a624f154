"""What one call of `generate()` asks of the decoding loop, and which calls that loop does not serve."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sparsify.generation import compat
from sparsify.generation.decoding import drafts, processors
from sparsify.generation.decoding.stopping import sort_criteria

log = logging.getLogger(__name__)

# what a model is given beside its cache: each of these has a buffer in a Step, or serves the prompt alone, or is not for the model
_KNOWN = {compat.CACHE_NAME, "attention_mask", "position_ids", "inputs_embeds", "tokenizer", "assistant_tokenizer"}


def refusal(model: Any, config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why the decoding loop does not serve a call of `generate()`, in a clause; empty where it does. `step_caches.refusal` does the cache.

    Args:
        config: the call's generation configuration.
        model_kwargs: what `generate()` hands to the decoding method beside its own arguments.
    """
    kind = type(model)
    hooks = ("prepare_inputs_for_generation", "_prefill", "_update_model_kwargs_for_generation")
    own = [name for name in hooks if name in vars(model) or getattr(kind, name) is not compat.stock(name)]
    plain = bool | int | float | str | None
    unknown = [name for name, value in model_kwargs.items() if name not in _KNOWN and not isinstance(value, plain)]
    positions = model_kwargs.get("position_ids")
    reasons = {
        "the model is an encoder-decoder": model.config.is_encoder_decoder,
        f"the model has its own {', '.join(own)}": own,
        "the model lies on several devices": len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1,
        "use_cache is off": not config.use_cache or model_kwargs.get("use_cache") is False,
        "attention weights or hidden states are asked for": config.output_attentions or config.output_hidden_states,
        "the model drafts for another one": config.is_assistant,
        "a compile_config is given": config.compile_config is not None,
        "the model takes no position_ids": positions is None,
        f"the model is given {', '.join(unknown)}": unknown,
        "the positions lie on another device": positions is not None and positions.device != model.device,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


class Call:
    """The arguments of one call, by the names that `GenerationMixin._sample` gives them, and what follows from them alone.

    Attributes:
        input_ids: int64 [rows, prompt_len].
        model_kwargs: what the model is given beside the tokens; `_prefill` changes it. Without tokenizers.
        cache: the cache that the model is given.
        positions: position ids of the prompt, int64 [..., prompt_len].
        columns: tokens of each row, padding and earlier turns included, that the cache holds once the prompt is read.
        max_length: tokens that a row may have, the prompt included.
        criteria: the stopping criteria, by where they can be asked.
        parts: the logits processors in the form that a step records; None where they cannot be recorded.
        drafts: whether tokens are drafted over the cache.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ):
        self.input_ids, self.logits_processor, self.stopping_criteria = input_ids, logits_processor, stopping_criteria
        self.generation_config, self.streamer = generation_config, streamer
        self.criteria = sort_criteria(stopping_criteria)
        if self.criteria.max_length is None:
            raise ValueError("the decoding loop needs a length at which a row ends")
        self.max_length = self.criteria.max_length
        self.rows, self.prompt_len = input_ids.shape
        self.parts = processors.recordable(logits_processor, self.prompt_len)
        self.cache, self.positions = model_kwargs[compat.CACHE_NAME], model_kwargs["position_ids"]
        self.model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        self.columns = compat.columns(input_ids, generation_config, self.model_kwargs)
        self.drafts = False
        if getattr(self.cache, "draft", None) is not None:
            reason = drafts.refusal(self.cache, self.parts)
            self.drafts = not reason
            if reason:
                log.info("generate() drafts no tokens because %s", reason)

    @property
    def flags(self) -> dict[str, Any]:
        """What the model is given with every token beside tensors and its cache."""
        return {name: value for name, value in self.model_kwargs.items() if name not in _KNOWN}

    @property
    def pad(self) -> Tensor | None:
        """The token that fills a row once it has ended, int64 []; None where rows go on with generated tokens."""
        return compat.pad_token(self.generation_config, self.input_ids.device) if self.criteria.pads else None

    @property
    def padding_mask(self) -> Tensor | None:
        """Which columns hold a token and not padding, [rows, columns], non-zero for tokens; None where all do."""
        return self.model_kwargs.get("attention_mask")
