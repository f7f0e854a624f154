"""Do the answers survive sparse attention? Needles in a haystack, method by method, on a small byte-level model."""

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class Asked(Record):
    """What one method answers at one length, whatever the model."""

    model: str
    model_sha256: str
    text_sha256: str
    dtype: str
    method: str  # "eager", "dense", "xattention" or "sink_window"
    parameters: dict[str, Any]  # of the method
    length: int  # tokens of a prompt; of the byte-level models, bytes
    seeds: list[int]  # first seed, and the one after the last
    right: int | None = None  # answers
    asked: int | None = None
    interval: list[float] | None = None  # of right / asked: Wilson, 95 %
    nll: float | None = None  # nats a token of text
    density: float | None = None  # visited share of the causal blocks; of sink_window, of the causal pairs
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answers(Asked):
    """One method at one length."""

    NAME = "answers"
    KEYS = ("model_sha256", "text_sha256", "method", "parameters", "length", "needles", "seeds", "form")
    needles: int  # facts in a prompt
    asks: int  # questions at its end
    form: str | None = None  # how facts are written and asked for (`needles.FORMS`); None: as the model was trained
    density_by_layer: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class CodeAnswers(Asked):
    """One method at one length and task, of the bundled model of word pieces."""

    NAME = "code_answers"
    KEYS = ("model_sha256", "text_sha256", "dtype", "method", "parameters", "task", "length", "seeds")
    task: str  # of benchmarks.lib.recall.asked, or "text"


@dataclass(frozen=True, kw_only=True)
class TokenAnswers(Asked):
    """Tokens of a prompt that later layers, or a prompt of their own, need not see. `right` and `asked` are of each prompt's first
    question, which chooses the tokens."""

    NAME = "token_answers"
    KEYS = ("model_sha256", "text_sha256", "dtype", "method", "parameters", "length", "needles", "seeds")
    needles: int  # facts in a prompt
    # of the questions of later turns, over the same cache; None where there are none
    later_right: int | None = None
    later_asked: int | None = None
