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
    method: str  # "eager", "dense", "xattention", "minference", "sink_window" or "plan"
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
    """Tokens of a prompt that later layers, or a prompt of their own, need not see; layers or feed-forward blocks that answers leave out.
    `right` and `asked` are of each prompt's first question, which chooses the tokens."""

    NAME = "token_answers"
    KEYS = ("model_sha256", "text_sha256", "dtype", "method", "parameters", "length", "needles", "seeds", "listed")
    needles: int  # facts in a prompt
    layers: int | None = None  # of the model
    listed: int | None = None  # questions behind the context before the first is asked, all of which choose; None: the first alone
    # of the questions of later turns, over the same cache; None where there are none
    later_right: int | None = None
    later_asked: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskAnswers(Record):
    """One setting on one task at one length, out of `sparsify eval --json`."""

    NAME = "task_answers"
    KEYS = ("model_digest", "text_sha256", "setting", "options", "task", "metric", "length", "samples", "chat")
    model: str
    model_digest: str
    model_sha256: str | None = None
    text_sha256: str | None = None
    dtype: str
    chat: bool
    samples: int  # questions asked for
    setting: str
    options: dict[str, Any] | None = None  # of `sparsify.compile`; None: not compiled
    cache: dict[str, Any] | None = None  # the SparseCache, where there is one
    task: str
    metric: str
    length: int | None = None  # tokens of a prompt
    asked: int | None = None
    mean: float | None = None  # of scores, 0 to 1, or nats a token
    interval: list[float] | None = None  # 95 %
    # against dense attention on the same questions, positive where the setting is better; questions that it answers worse and better
    difference: float | None = None
    difference_interval: list[float] | None = None
    lost: int | None = None
    gained: int | None = None
    density: float | None = None  # visited share of the causal blocks; None: attention was dense
    seconds: float | None = None
    error: str | None = None
