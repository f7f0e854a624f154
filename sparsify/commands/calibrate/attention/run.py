"""The dense run over a text: which pieces, what they measured, and how an interrupted run goes on."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsify import backends
from sparsify.commands.calibrate.attention.capture import Capture, Captured
from sparsify.commands.calibrate.attention.gradients import Predictions
from sparsify.commands.calibrate.attention.measure import Record, measure
from sparsify.commands.calibrate.attention.settings import Grid
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import UnsupportedError
from sparsify.ops import attention as attention_op
from sparsify.planning import registry
from sparsify.planning.config import config
from sparsify.planning.decision import Place
from sparsify.planning.provenance import model_digest

Weigh = Literal["error", "loss"]
_FORMAT = 1
_NEARLY_ALL = 0.95  # of the blocks of the longest prompts: settings that visit more cost what dense attention does
# what decides a choice has no say in what is measured
_NEUTRAL = {"min_length": 0, "objective": None, "max_error": None, "plan": None, "lower": "eager"}


@dataclass(frozen=True)
class Asked:
    """What is run: by these alone a run is known when it goes on.

    lengths: tokens of the prompts, rising. pieces: of each length, at most. seed: chooses them.
    ends: tokens of the text up to which each of its prompts goes, so that pieces end where prompts do; empty: pieces lie anywhere.
    last: rows at the end of a piece that weigh as much as all others: of outputs, see `measure`, and of predictions, see `gradients`.
    weigh: what settings are compared by: the "error" of attention's outputs, or the "loss" of the text that gradients predict of it.
    """

    grid: Grid
    lengths: tuple[int, ...]
    pieces: int
    seed: int
    ends: tuple[int, ...] = ()
    last: int = 0
    weigh: Weigh = "error"

    def offsets(self, tokens: int, length: int) -> list[int]:
        """Where pieces of a length begin in the text.

        Raises:
            UnsupportedError: the text, or each of its prompts, is shorter.
        """
        if not self.ends:
            if tokens < length:
                what = f"the text has {tokens} tokens, fewer than {length}"
                raise UnsupportedError(what, where="--text", hint="a longer text, or shorter --lengths")
            return offsets(tokens, length, self.pieces, self.seed)
        whole = [end - length for begin, end in itertools.pairwise((0, *self.ends)) if end - begin >= length]
        if not whole:
            raise UnsupportedError(f"no prompt has {length} tokens", where="--between", hint="longer prompts, or shorter --lengths")
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self.seed))[: self.pieces].sort().values
        return [whole[index] for index in chosen.tolist()]


@dataclass
class Measured:
    """What a run found so far.

    identity: digests and numbers of what was run; another run's are not added to.
    done: [length, offset] of the pieces that were run.
    sites: of one length, by place. records: by place and length. refused: reasons by place.
    """

    identity: dict[str, Any]
    done: list[list[int]] = field(default_factory=list)
    sites: dict[Place, Captured] = field(default_factory=dict)
    records: dict[Place, dict[int, Record]] = field(default_factory=dict)
    refused: dict[Place, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Atomically: an interrupted run leaves the file of the piece before."""
        data = {
            "format": _FORMAT,
            "identity": self.identity,
            "done": self.done,
            "sites": [_site_data(site) for site in self.sites.values()],
            "records": [[list(place), length, vars(one)] for place, by in self.records.items() for length, one in by.items()],
            "refused": [[list(place), reason] for place, reason in self.refused.items()],
        }
        handle, temporary = tempfile.mkstemp(prefix=path.stem + ".", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(data, file)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> Measured:
        """What an earlier run left, or nothing where there is no file.

        Raises:
            UnsupportedError: the file is of another run, with what differs, or no such file.
        """
        if not path.exists():
            return cls(identity)
        try:
            data = torch.load(path, weights_only=True)
            known, version = data["identity"], data["format"]
        except Exception as error:
            what = str(error).strip().splitlines()
            raise UnsupportedError(f"holds no measurements: {what[0] if what else type(error).__name__}", where=str(path)) from None
        differ = [name for name in {**identity, **known} if known.get(name) != identity.get(name)]
        if version != _FORMAT or differ:
            what = f"holds measurements with another {', '.join(differ) or 'format'}"
            raise UnsupportedError(what, where=str(path), hint="remove the file, or name another one with --measurements")
        found = cls(identity, data["done"])
        for place, layer, sizes, dtype, scale in data["sites"]:
            site = Captured(Place(*place), layer, AttentionSizes(**sizes, dtype=getattr(torch, dtype)), scale)
            found.sites[site.place] = site
        for place, length, fields in data["records"]:
            found.records.setdefault(Place(*place), {})[length] = Record(**fields)
        found.refused = {Place(*place): reason for place, reason in data["refused"]}
        return found


def _site_data(site: Captured) -> list[Any]:
    sizes = {name: int(getattr(site.sizes, name)) for name in AttentionSizes.NAMES}
    return [list(site.place), site.layer, sizes, str(site.sizes.dtype).removeprefix("torch."), site.scale]


def offsets(tokens: int, length: int, pieces: int, seed: int) -> list[int]:
    """Where pieces of a text begin: `pieces` of those that lie one after the other, chosen by the seed; fewer where the text is shorter."""
    slots = tokens // length
    draw = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(tokens - slots * length + 1, (1,), generator=draw))
    chosen = torch.randperm(slots, generator=draw)[:pieces].sort().values.tolist()
    return [shift + slot * length for slot in chosen]


def identity(model: nn.Module, ids: Tensor, asked: Asked) -> dict[str, Any]:
    """What tells runs apart."""
    from sparsify import __version__

    # what was not asked for is not named, as in files of runs that could not ask
    more = {name: list(given) if name == "ends" else given for name in ("ends", "last") if (given := getattr(asked, name))}
    more |= {} if asked.weigh == "error" else {"weigh": asked.weigh}
    return {
        **more,
        "model": model_digest(model),
        "dtype": str(next(model.parameters()).dtype),
        "text": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
        "settings": asked.grid.digest(),
        "lengths": list(asked.lengths),
        "pieces": asked.pieces,
        "seed": asked.seed,
        "version": f"{__version__} {attention_op.VERSION}",
    }


def methods_of(grid: Grid) -> list[Any]:
    """By which a site that is calibrated has to be served."""
    return [family.method for family in grid.families]


def settings_for(options: dict[str, Any]) -> config.Config:
    """Those that attention is run with. options: of torch.compile."""
    return config.load({**options, **_NEUTRAL}, method_models=registry.discover())


@torch.no_grad()
def run(
    model: nn.Module,
    ids: Tensor,
    asked: Asked,
    options: dict[str, Any],
    *,
    file: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, all_, what: None,
) -> Measured:
    """Measures the grid at every attention site, or what of it an earlier run left undone.

    Args:
        ids: int64 [1, tokens]. options: of torch.compile. file: is written after every piece, and read first.
        progress: called with (pieces done, pieces, what runs now).

    Raises:
        UnsupportedError: no site can be calibrated, the text is too short, or the file is of another run.
    """
    todo = [[length, at] for length in asked.lengths for at in asked.offsets(ids.shape[1], length)]
    settings = settings_for(options)
    found = Measured({}) if file is None else Measured.load(file, identity(model, ids, asked))
    found.identity = found.identity or identity(model, ids, asked)
    here: dict[Place, Record] = {}
    state: dict[str, Any] = {"done": 0, "what": ""}

    def receive(site: Captured, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        progress(state["done"], len(todo), f"{state['what']}, {site.place.name}")
        most = _NEARLY_ALL if query.shape[2] == max(asked.lengths) else None
        here[site.place] = measure(query, key, value, site.scale, asked.grid, asked.last, gradient, most)

    follow = Predictions(asked.last, asked.seed) if asked.weigh == "loss" else None
    capture = Capture(model, settings, receive, methods_of(asked.grid), follow)
    with capture.running() as forward, backends.serving(settings.kernels):
        for state["done"], (length, at) in enumerate(todo):
            state["what"] = f"{length} tokens"
            progress(state["done"], len(todo), state["what"])
            if [length, at] in found.done:
                continue
            here.clear()
            forward(ids[:, at : at + length])
            _add(found, capture, here, length)
            found.done.append([length, at])
            if file is not None:
                found.save(file)
    progress(len(todo), len(todo), "measured")
    if not found.records:
        reasons = sorted(set(found.refused.values()))
        raise UnsupportedError(f"no attention can be calibrated: {reasons[0] if reasons else 'none was found'}")
    return found


def _add(found: Measured, capture: Capture, here: dict[Place, Record], length: int) -> None:
    found.sites |= capture.sites
    found.refused |= capture.refused
    for place, record in here.items():
        by_length = found.records.setdefault(place, {})
        if length in by_length:
            by_length[length].add(record)
        else:
            by_length[length] = record


def lengths_for(tokens: int, positions: int | None, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The lengths to run: those asked for, or the longest of 32K, the text and the model's positions, and a quarter and a half of it.

    Raises:
        UnsupportedError: one is longer than the model's positions.
    """
    most = positions or max(tokens, *(wanted or (0,)))
    if wanted:
        if max(wanted) > most:
            raise UnsupportedError(f"{max(wanted)} tokens are more than the model's {most} positions", where="--lengths")
        return tuple(sorted(set(wanted)))
    longest = min(32768, most, tokens)
    longest -= longest % 128 if longest > 512 else 0
    return tuple(sorted({max(1, longest // part) for part in (1, 2, 4)}))
