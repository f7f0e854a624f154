"""The lists of model types that the sweep goes through: those of transformers' auto classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

CAUSAL = "causal"


@dataclass(frozen=True)
class ModelList:
    """mapping: transformers' name of the table."""

    mapping: str

    def types(self) -> list[str]:
        return list(self._classes)

    def class_of(self, model_type: str) -> Any:
        """The first class that transformers lists for the type. Raises KeyError for a type that is not in the list."""
        name = self._classes[model_type]
        return getattr(transformers, name if isinstance(name, str) else name[0])

    @property
    def _classes(self) -> Mapping[str, str | tuple[str, ...]]:
        return getattr(modeling_auto, self.mapping)


LISTS: dict[str, ModelList] = {
    CAUSAL: ModelList("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "multimodal": ModelList("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "masked": ModelList("MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ModelList("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech": ModelList("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}


def weight(model_type: str) -> int:
    """About how long a type takes, against others: the letters of its modeling code."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return sum(path.stat().st_size for path in folder.glob("modeling_*.py"))
