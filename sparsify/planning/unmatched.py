"""Says which rules match no site of a compiled model, since a typing error in a rule changes nothing that anybody would see.

A model may be captured in several graphs: nothing is said before a graph that ends a call, and each compilation is told once.
"""

from __future__ import annotations

import difflib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.graph import compat
from sparsify.matching.attention import find_attention
from sparsify.matching.base import CACHE_SUFFIX
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.planning.config.config import Config, Rule
from sparsify.planning.decision import Place, places
from sparsify.planning.method import Pass
from sparsify.planning.plan import Plan
from sparsify.planning.registry import discover

_NEAREST = 3
_MOST = 256  # compilations that are remembered


@dataclass
class _Compilation:
    """What was seen of one call of torch.compile. owner: what identifies it, None where that is gone."""

    owner: Callable[[], Any]
    rules: tuple[Rule, ...]
    sites: dict[tuple[str, int | None], None] = field(default_factory=dict)
    matched: set[int] = field(default_factory=set)
    told: bool = False


# only who was told what: nothing that is computed depends on it
_compilations: OrderedDict[int, _Compilation] = OrderedDict()
_lock = threading.Lock()


def warn(gm: fx.GraphModule, plan: Plan, config: Config, asked: Any = None, ends: bool = True) -> None:
    """Notes which rules match a site of the graph; at the end of a call, names in one warning those that matched none so far.

    Args:
        asked: an object that all graphs of one compilation share, such as its options; None: the module that is compiled.
        ends: whether the call may end with this graph; without, `conclude` says when it has.
    """
    if not config.rules:
        return
    methods = discover()
    with _lock:
        seen = _compilation(config.rules, asked)
        found = [(Place(d.kind, d.site, d.ordinal), d.layer) for d in plan.decisions]
        seen.sites.update(dict.fromkeys((place.name, layer) for place, layer in found))
        open_ = [i for i in range(len(config.rules)) if i not in seen.matched]
        if any(not config.rules[i].method for i in open_) and not any(place.kind == "ffn" for place, _ in found):
            found += _feed_forward(gm)  # nobody looked for these where no method acts on them
        seen.matched.update(i for i in open_ if any(_acts(config.rules[i], *site, methods) for site in found))
    if ends and not compat.graph_breaks_after(gm):
        conclude(config, asked)


def conclude(config: Config, asked: Any = None) -> None:
    """A call has ended: names the rules that matched none of its sites, unless that was said. asked: as in `warn`."""
    methods = discover()
    with _lock:
        seen = _compilation(config.rules, asked)
        rest = [i for i, rule in enumerate(config.rules) if i not in seen.matched and not _waits(rule, methods, seen.sites)]
        if seen.told or not rest or not seen.sites:
            return
        seen.told = True
        words = "; ".join(_words(i, config.rules[i], seen.sites) for i in rest)
    warnings.warn(f"sparsify: {words}", stacklevel=4)


def _compilation(rules: tuple[Rule, ...], asked: Any) -> _Compilation:
    owner = asked if asked is not None else compat.frame_scopes().get("L", {}).get("self")
    found = _compilations.get(id(owner))
    if owner is None or found is None or found.owner() is not owner or found.rules != rules:
        held = _weakly(owner) if asked is None and owner is not None else lambda: owner
        found = _compilations[id(owner)] = _Compilation(held, rules)
    _compilations.move_to_end(id(owner))
    while len(_compilations) > _MOST:
        _compilations.popitem(last=False)
    return found


def _weakly(owner: Any) -> Callable[[], Any]:
    """A weak reference, or one that keeps the object where it takes none."""
    try:
        return weakref.ref(owner)
    except TypeError:
        return lambda: owner


def _feed_forward(gm: fx.GraphModule) -> list[tuple[Place, int | None]]:
    sites = find_feed_forward(gm, find_attention(gm))
    return [(place, site.layer) for place, site in zip(places(sites), sites, strict=True)]


def _acts(rule: Rule, place: Place, layer: int | None, methods: Mapping[str, type[Pass]]) -> bool:
    """Whether the rule decides about a site of this place, unless a later one does."""
    serves = not rule.method or any(place.site_kind in methods[m].kinds for m in rule.method)
    return serves and rule.matches(place.name, layer, place.ordinal)


def _waits(rule: Rule, methods: Mapping[str, type[Pass]], sites: Iterable[tuple[str, int | None]]) -> bool:
    """Whether the rule is for a SparseCache, of which nothing was seen: another call may bring one."""
    only = bool(rule.method) and all("cache" in methods[m].kinds for m in rule.method)
    return only and not any(name.endswith(CACHE_SUFFIX) for name, _ in sites)


def _words(index: int, rule: Rule, sites: Iterable[tuple[str, int | None]]) -> str:
    names = list(dict.fromkeys(name for name, _ in sites))
    numbers = sorted({layer for _, layer in sites if layer is not None})
    what = f"rules[{index}] (layers = {', '.join(rule.layers)}; method = {', '.join(rule.method) or 'none'}) matches no site"
    globs = [pattern for pattern in rule.layers if not pattern[0].isdigit()]
    if not globs and not numbers:
        return f"{what}: the sites here carry no number ({_some(names)}), as where layers are compiled one by one"
    if not globs:
        return f"{what}: the layers here are {numbers[0]} to {numbers[-1]}"
    near = difflib.get_close_matches(globs[0], names, n=_NEAREST, cutoff=0.3)
    return f"{what} of its methods' kind: the nearest are {_some(near or names)}"


def _some(names: list[str]) -> str:
    shown = [name or "'' (a function)" for name in names[:_NEAREST]]
    return ", ".join(shown) + (", ..." if len(names) > _NEAREST else "")
