"""Tasks of lm-evaluation-harness, asked of a model that is here already. Imported only where the extra `eval` is installed."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils_hf import stop_sequences_criteria  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from sparsify.commands.eval.cells import Cell
from sparsify.commands.eval.run import Run
from sparsify.errors import UnsupportedError
from sparsify.generation import compat

_SEED = 1234


@dataclass
class HarnessTask:
    """One task of the harness with its questions.

    name: as the harness knows it, or of a group.
    length: of prompts, in tokens; None for tasks whose data have none.
    loaded: what TaskManager.load gave. limit: questions a task. chat: whether prompts go through the tokenizer's chat template.
    """

    name: str
    length: int | None
    loaded: Any
    limit: int
    tokenizer: Any
    max_length: int
    chat: bool = False
    _count: int = field(default=0)

    def __len__(self) -> int:
        return self._count

    def ask(self, run: Run) -> list[Cell]:
        lm = Asked(run, self.tokenizer, self.max_length, self.length)
        _seed()
        with run.measuring() as measured, _quiet():
            found = evaluator.evaluate(
                lm, self.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True, apply_chat_template=self.chat
            )
        better = {
            (name, metric): higher for name, task in self.loaded["tasks"].items() for metric, higher in task.higher_is_better().items()
        }
        cells = []
        for name, samples in found["samples"].items():
            for metric, rows in by_metric(samples).items():
                higher = better.get((name, metric.split(",")[0]), True) is not False
                cells.append(
                    Cell(
                        setting=run.setting.name,
                        task=name,
                        length=self.length,
                        metric=metric,
                        higher_is_better=higher,
                        scores=tuple(score for _, score in rows),
                        questions=tuple(sample["prompt_hash"][:16] for sample, _ in rows),
                        depths=depths_of([sample["doc"] for sample, _ in rows]),
                        **measured.data(),
                    )
                )
        return cells


def by_metric(samples: Sequence[dict[str, Any]]) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """The samples with the score that each metric gives them. Metrics named like the length of the prompt are called "score"; what is no
    number, and RULER's place-holders for other lengths, are left out."""
    several = len({sample.get("filter") for sample in samples}) > 1
    found: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for sample in samples:
        length = str(sample["doc"].get("max_length")) if isinstance(sample["doc"], dict) else ""
        for metric in sample["metrics"]:
            value = sample[metric]
            if not isinstance(value, int | float | np.number) or (metric.isdigit() and metric != length):
                continue
            name = "score" if metric == length else metric + (f",{sample['filter']}" if several else "")
            found.setdefault(name, []).append((sample, float(value)))
    return found


def depths_of(docs: Sequence[Any]) -> tuple[float, ...]:
    """Where in its prompt each answer stands, 0 to 1; empty unless every question has one answer that stands in one place."""
    found = []
    for doc in docs:
        text, answers = (doc.get("input"), doc.get("outputs")) if isinstance(doc, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(answers, list) or len(answers) != 1 or text.count(str(answers[0])) != 1:
            return ()
        found.append(text.index(str(answers[0])) / len(text))
    return tuple(found)


def load(names: Sequence[str], length: int, tokenizer: Any, where: str, limit: int, max_length: int, chat: bool) -> list[HarnessTask]:
    """The tasks with prompts of `length` tokens, where they can be of a length.

    Args:
        where: folder or hub name of the tokenizer, from which tasks that make their own prompts load it again.
        limit: questions of each task.
        max_length: tokens that the model takes at once.

    Raises:
        UnsupportedError: the harness has no such task, or it needs a network and there is none.
    """
    found = []
    for name in names:
        _seed()
        try:
            with _quiet():
                manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": where})
                loaded = manager.load([name])
        except (KeyError, OSError, ValueError, ImportError) as error:
            lines = str(error).strip().splitlines()
            raise UnsupportedError(f"cannot load the task: {lines[0] if lines else type(error).__name__}", where=name) from error
        tasks = loaded["tasks"]
        if not tasks:
            raise UnsupportedError("the harness has no such task", where=name, hint="lm-eval ls tasks")
        for task in tasks.values():  # as `simple_evaluate` does
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        count = sum(min(limit, len(task.eval_docs)) for task in tasks.values())
        sized = all("max_length" in task.eval_docs[0] for task in tasks.values())
        found.append(HarnessTask(name, length if sized else None, loaded, limit, tokenizer, max_length, chat, count))
    return found


class Asked(HFLM):  # pyright: ignore[reportUntypedBaseClass]
    """The harness's view of a run's model: it generates over the run's cache and tells of every question that is answered."""

    def __init__(self, run: Run, tokenizer: Any, max_length: int, length: int | None):
        outside = run.setting.cache is not None and run.setting.cache.question == "outside"
        with _quiet():
            super().__init__(pretrained=run.model, tokenizer=tokenizer, max_length=max_length, batch_size=1 if outside else run.batch)
        self.run, self.prompt_length = run, length
        self._question = ""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        wanted = self.run.setting.cache
        if wanted is None or wanted.question == "inside":
            return super().generate_until(requests, disable_tqdm=True)
        answers = []
        for request in requests:
            self._question = question_of(request.doc)
            answers += super().generate_until([request], disable_tqdm=True)
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        found = super().loglikelihood(requests, disable_tqdm=True)
        self.run.answered(len({request.doc_id for request in requests}))
        return found

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **given: Any) -> torch.Tensor:
        if not given.get("do_sample") and not given.get("temperature"):
            given["do_sample"] = False
            given.pop("temperature", None)
        end = self.tokenizer.eos_token
        own = [text for text in stop if text != end]  # the end of a text stops by itself, without a look at every token on the host
        if own:
            given["stopping_criteria"] = stop_sequences_criteria(self.tokenizer, own, context.shape[1], context.shape[0])
        cache = self.run.cache(self.prompt_length or context.shape[1], context.shape[0])
        if cache is not None:
            given[compat.CACHE_NAME] = cache
            if self._question:
                self._fill(context[:, : self._split(context[0])], cache)
        known = self.model.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id} - {None}
        found = self.model.generate(
            input_ids=context,
            max_length=max_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
            use_cache=True,
            **given,
        )
        self.run.answered(context.shape[0])
        return found

    def _fill(self, ids: torch.Tensor, cache: Any) -> None:
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        self.model(ids, **compat.with_cache(self.model, cache), use_cache=True, **few)

    def _split(self, ids: torch.Tensor) -> int:
        """Tokens before the question. Raises UnsupportedError where it is not there."""
        for count in range(1, len(ids)):
            if self._question in self.tokenizer.decode(ids[-count:]):
                return len(ids) - count
        raise UnsupportedError("the question is not a part of the prompt", where="--cache, question outside")


def question_of(doc: Any) -> str:
    """The last line of a prompt, where there are lines before it. Raises UnsupportedError for data without such a prompt."""
    text = doc.get("input") if isinstance(doc, dict) else None
    if not isinstance(text, str) or "\n" not in text.strip():
        raise UnsupportedError(
            "which part of the prompt is the question is known for RULER's tasks only", where="--cache, question outside"
        )
    return text.strip().rsplit("\n", 1)[1]


def _seed() -> None:
    """As the harness's own `simple_evaluate` does."""
    random.seed(0)
    np.random.seed(_SEED)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the harness's bars, prints and hints, which run through each other; what it raises says enough."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
