"""The family matrix as data: which cells there are, what is refused in them and why, and how one cell is checked.

    python -m tests.models.matrix [PART]     checks the cells whose id contains PART, one line each
    python -m tests.models.matrix --write-docs   renews docs/support.md from the same data

A cell is a family, an attention implementation, a way of running the model (mode) and a claim: `keep_all` (settings under which nothing
is dropped equal eager execution of the same implementation) or `sparse` (dropping a lot equals a masked softmax that knows nothing of
graphs). Both run in strict mode as one full graph. Every site that `REFUSED` does not list must be rewritten, and every site that it
lists must be refused for the reason given, so the documentation that is made of it cannot say more or less than is true.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsify.ops.estimate import DEFAULT
from tests.models.matrix_modes import MODES, Mode
from tests.models.matrix_reference import sink_window_run
from tests.support.harness import KEEP_ALL, Run, reference_run, run, strict
from tests.support.tiny_models import EAGER_ONLY, FAMILIES, build

FP32 = 2e-5
DOCS = Path(__file__).parents[2] / "docs" / "support.md"
ALTERNATING = ("gemma2", "gemma3", "gpt_oss")  # windowed and full layers take turns


@dataclass(frozen=True)
class Cell:
    """lower: "eager" runs the rewritten graph as it is, "inductor" compiles it."""

    family: str
    attention: str
    mode: str
    claim: str
    lower: str = "eager"

    @property
    def id(self) -> str:
        return "/".join([self.family, self.attention, self.mode, self.claim, *(["inductor"] if self.lower == "inductor" else [])])

    @property
    def layers(self) -> int:
        return 2 if self.family in ALTERNATING else 1


@dataclass(frozen=True)
class Refused:
    """Sites that stay as they are. families, attention, modes: where, as regular expressions. sites: "all", or of one phase, or the
    sites of the graph of that number. reason: a part of the refusal's text. because: the sentence for the documentation. release: the only
    release of transformers where it is so, any if empty. always: whether every such site is; else some layers or prompt lengths may do."""

    families: str
    attention: str
    modes: str
    reason: str
    because: str
    sites: str = "all"
    release: str = ""
    always: bool = True

    def covers(self, cell: Cell) -> bool:
        return self.is_of(transformers.__version__) and self.is_about(cell)

    def is_of(self, release: str) -> bool:
        return not self.release or release.startswith(f"{self.release}.")

    def is_about(self, cell: Cell) -> bool:
        place = ((self.families, cell.family), (self.attention, cell.attention), (self.modes, cell.mode))
        return all(re.fullmatch(pattern, name) for pattern, name in place)


@dataclass(frozen=True)
class Broken:
    """What transformers or torch itself cannot run: the message that the attempt ends with, and the sentence for the documentation."""

    families: str
    attention: str
    modes: str
    message: str
    because: str
    release: str = ""

    covers, is_of, is_about = Refused.covers, Refused.is_of, Refused.is_about


REFUSED: tuple[Refused, ...] = ()
BROKEN: tuple[Broken, ...] = (
    Broken(
        "bloom",
        "eager",
        "static",
        "expanded size",
        "Bloom's alibi does not fit a preallocated cache.",
        release="5.17",
    ),
    Broken(
        "falcon_alibi",
        ".*",
        "static|generate_static",
        "size of tensor|too many values",
        "transformers builds Falcon's alibi for the tokens so far, which does not fit a preallocated cache.",
    ),
    Broken(
        "opt",
        "sdpa",
        "static",
        "data-dependent",
        "OPT's positions depend on the cache's length as data, over which torch.compile cannot make one full graph.",
    ),
)

# what `sparse` cells force. Attention written inside the model's own code is out of the masked reference's reach, and the estimate
# models neither softcap nor sinks nor slopes: sinks and a window there
BY_TOKEN = ("gemma2", "gpt_oss", "bloom", "gptj", "falcon", "falcon_mqa", "falcon_alibi")
XATTENTION = {"stride": 8, "block": 64, "threshold": 0.5, "pool": "max"}
SINK_WINDOW = {"sinks": 3, "window": 5}
DOCUMENTS = {"sinks": 0, "window": 5}  # sinks by document are tested in tests/passes/test_sink_window.py


def cells() -> Iterator[Cell]:
    """Every cell, quick ones first."""
    yield from quick_cells()
    for family in FAMILIES:
        for attention in attentions(family):
            for mode in MODES:
                for claim in ("keep_all", "sparse"):
                    cell = Cell(family, attention, mode, claim)
                    if cell not in QUICK:
                        yield cell


def attentions(family: str) -> tuple[str, ...]:
    return ("eager",) if family in EAGER_ONLY else ("sdpa", "eager")


def quick_cells() -> Iterator[Cell]:
    for family in FAMILIES:
        yield Cell(family, attentions(family)[0], "whole", "keep_all")
    for family in ("llama", "gemma3"):
        yield Cell(family, "eager", "whole", "keep_all")
    for family in ("llama", "gpt2", "falcon"):
        yield Cell(family, attentions(family)[0], "left", "keep_all", lower="inductor")


QUICK = frozenset(quick_cells())


def refused_by(cell: Cell) -> list[Refused]:
    return [r for r in REFUSED if r.covers(cell)]


def broken_by(cell: Cell) -> Broken | None:
    return next((b for b in BROKEN if b.covers(cell)), None)


def model_of(cell: Cell) -> torch.nn.Module:
    # block selection at 200 tokens needs windows that leave something to select
    wide = {"sliding_window": 4096} if cell.claim == "sparse" and cell.family in ("gemma3", "mistral_window") else {}
    return build(cell.family, cell.attention, cell.layers, **wide)


def options_of(cell: Cell) -> dict[str, Any]:
    if cell.claim == "keep_all":
        method = "sink_window" if cell.family in BY_TOKEN else "xattention"
        settings = KEEP_ALL[method] if cell.mode != "packed" or method == "xattention" else {**KEEP_ALL[method], "sinks": 0}
    else:
        window = DOCUMENTS if cell.mode == "packed" else SINK_WINDOW
        method, settings = ("sink_window", window) if cell.family in BY_TOKEN else ("xattention", XATTENTION)
    return {**strict(passes=[method, "dense"], **{method: settings}), "lower": cell.lower}


def check(cell: Cell) -> Run:
    """Raises AssertionError where the cell does not do what the tables say."""
    mode, model, broken = MODES[cell.mode], model_of(cell), broken_by(cell)
    length = 50 if cell.claim == "keep_all" or cell.family in BY_TOKEN else 200
    call = lambda m: mode.call(m, length)
    if broken is not None:
        _fails(broken, model, call)
        return Run(None)
    with torch.no_grad():
        eager = call(model)
    got = run(model, call, options_of(cell))
    _check_sites(cell, mode, got)
    if not got.rewritten("sink_window") + got.rewritten("xattention"):
        assert refused_by(cell), "no site took the method"
        _check_equal(mode, got.value, eager, length)
    elif cell.claim == "keep_all":
        _check_equal(mode, got.value, eager, length)
    else:
        want = _masked(cell, model, call)
        _check_equal(mode, got.value, want, length)
        assert mode.error(eager, want, length) > 50 * FP32, "the sparse run must differ from the dense one"
    return got


def _masked(cell: Cell, model: torch.nn.Module, call: Callable) -> Any:
    """What the sparse method must give, computed outside of any graph."""
    if cell.family in BY_TOKEN:
        # a row of a static cache's mask gives keys no order
        prompts_only = cell.mode == "generate_static" and cell.family != "bloom"
        return sink_window_run(model, call, prompts_only=prompts_only, **options_of(cell)["sink_window"])
    selection = {"estimate": DEFAULT, "stride": 8, "block_size": 64, "threshold": (0.5,)}
    return reference_run(model, call, documents=cell.mode == "packed", **selection)


def _fails(broken: Broken, model: torch.nn.Module, call: Callable) -> None:
    try:
        with torch.no_grad():
            call(model)
        run(model, call, strict(passes=[]))
    except Exception as error:
        assert re.search(broken.message, str(error)), error
        return
    raise AssertionError(f"works now: take it off the list ({broken.because})")


def _check_equal(mode: Mode, got: Any, want: Any, length: int) -> None:
    assert mode.error(got, want, length) < FP32
    if mode.generates:
        assert torch.equal(got.sequences, want.sequences)


def _check_sites(cell: Cell, mode: Mode, got: Run) -> None:
    assert got.graphs <= mode.graphs, f"{got.graphs} graphs instead of {mode.graphs}"
    assert got.sites == cell.layers * got.graphs, "one site per layer and graph"
    expected = refused_by(cell)
    for graph, plan in enumerate(got.plans):
        for decision in plan.decisions:
            listed = [r for r in expected if r.sites in ("all", decision.phase, f"graph {graph}")]
            where = f"{decision.site} in graph {graph} ({decision.phase}, {decision.mask})"
            if decision.method is None:
                assert any(r.reason in text for r in listed for text in decision.refusals), f"{where} refused: {decision.refusals}"
            else:
                stale = [r for r in listed if r.always]
                assert not stale, f"{where} is rewritten now: take {stale} off the list"
    assert got.rewritten() or any(r.sites == "all" for r in expected)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--write-docs"]:
        from tests.models.matrix_docs import page

        DOCS.write_text(page())
        return 0
    failed = 0
    for cell in cells():
        if not arguments or all(a in cell.id for a in arguments):
            try:
                got = check(cell)
                print("ok  ", cell.id, f"{got.rewritten()}/{got.sites} sites, {got.graphs} graphs", flush=True)
            except Exception as error:
                failed += 1
                print("FAIL", cell.id, type(error).__name__, " ".join(str(error).split())[:400], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
