"""The choice of a setting for every head under a budget: a multiple-choice knapsack over layers, in which a layer first chooses a
configuration (with a fixed cost, such as the estimate that its heads share) and then each of its heads a setting that it allows.

    minimise    Σ layers (fixed cost + Σ heads cost)
    subject to  Σ layers (fixed use + Σ heads use) ≤ limit

It is solved as an integer program by HiGHS (scipy.optimize.milp), to a relative gap of 0.01 %. Without scipy a Lagrangian relaxation with
an improvement step gives a choice within the budget and a bound, so that the gap is known in either case.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GAP = 1e-4
_SECONDS = 120.0
_ROUNDS = 80
# HiGHS lets a constraint be missed by a millionth of its scale: then it is asked again with so much less
_SLACK = 2e-6


@dataclass(frozen=True)
class Config:
    """One way to serve a layer. cost, use: float64 [heads, settings], infinite where a head may not take a setting."""

    cost: Tensor
    use: Tensor
    fixed_cost: float = 0.0
    fixed_use: float = 0.0


@dataclass(frozen=True)
class Solution:
    """A choice within the budget.

    chosen: of every layer its configuration and the setting of each of its heads.
    cost, use: their sums. bound: no choice within the budget costs less.
    """

    chosen: tuple[tuple[int, tuple[int, ...]], ...]
    cost: float
    use: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the cost may lie above the least possible one, relative to it."""
        return max(0.0, self.cost - self.bound) / abs(self.cost) if self.cost else 0.0


def solve(layers: Sequence[Sequence[Config]], limit: float) -> Solution | None:
    """The cheapest choice within the limit; None where there is none."""
    layers = [[_allowed(config, limit) for config in layer] for layer in layers]
    found = relaxed(layers, limit)
    if found is None or found.gap <= GAP or importlib.util.find_spec("scipy") is None:
        return found
    exact = integer(layers, limit)
    if exact is None or exact.cost > found.cost:  # out of time
        return found
    return Solution(exact.chosen, exact.cost, exact.use, max(exact.bound, found.bound))


def _allowed(config: Config, limit: float) -> Config:
    """Without settings that exceed the limit alone."""
    cost = config.cost.masked_fill(~(config.use <= limit) | ~config.cost.isfinite(), torch.inf)
    return Config(cost, config.use.masked_fill(cost.isinf(), torch.inf), config.fixed_cost, config.fixed_use)


def total(layers: Sequence[Sequence[Config]], chosen: Sequence[tuple[int, Sequence[int]]]) -> tuple[float, float]:
    """Cost and use of a choice."""
    cost = use = 0.0
    for layer, (index, settings) in zip(layers, chosen, strict=True):
        config, heads = layer[index], range(len(settings))
        cost += config.fixed_cost + float(config.cost[heads, settings].sum())
        use += config.fixed_use + float(config.use[heads, settings].sum())
    return cost, use


def relaxed(layers: Sequence[Sequence[Config]], limit: float) -> Solution | None:
    """By Lagrangian relaxation: the price of a unit of use is bisected, and what the budget leaves over is spent greedily."""

    tables = [_Table(layer) for layer in layers]

    def at(price: float) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], float]:
        found = [table.best(price) for table in tables]
        value = -price * limit if price < torch.inf else 0.0
        return tuple((index, settings) for _, index, settings in found), value + sum(score for score, _, _ in found)

    chosen, bound = at(0.0)
    if total(layers, chosen)[1] <= limit:
        cost, use = total(layers, chosen)
        return Solution(chosen, cost, use, cost)
    sparest, _ = at(torch.inf)
    if total(layers, sparest)[1] > limit:
        return None
    candidates, low, high = [sparest], 0.0, 1.0
    for _ in range(_ROUNDS):
        chosen, value = at(high)
        bound = max(bound, value)
        if total(layers, chosen)[1] <= limit:
            candidates.append(chosen)
            break
        low, high = high, high * 4
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        chosen, value = at(middle)
        bound = max(bound, value)
        fits = total(layers, chosen)[1] <= limit
        if fits:
            candidates.append(chosen)
        low, high = (low, middle) if fits else (middle, high)
        if high - low <= 1e-9 * high:
            break
    best = min((_improved(layers, one, limit) for one in {*candidates[-2:], sparest}), key=lambda one: total(layers, one)[0])
    cost, use = total(layers, best)
    return Solution(best, cost, use, min(bound, cost))


class _Table:
    """All ways to serve one layer, as tensors [configurations, heads, settings]."""

    def __init__(self, layer: Sequence[Config]):
        stack = lambda found: torch.nn.utils.rnn.pad_sequence([one.T for one in found], batch_first=True, padding_value=torch.inf).mT
        self.cost = stack([config.cost for config in layer])
        self.use = stack([config.use for config in layer]).masked_fill(self.cost.isinf(), torch.inf)
        self.counted = self.use.masked_fill(self.cost.isinf(), 0)
        self.fixed_cost, self.fixed_use = (
            torch.tensor([getattr(config, name) for config in layer], dtype=torch.float64) for name in ("fixed_cost", "fixed_use")
        )

    def best(self, price: float) -> tuple[float, int, tuple[int, ...]]:
        """Least cost where use has a price, the configuration and the settings; least use where it is infinite."""
        scores, fixed = (self.use, self.fixed_use) if price == torch.inf else (self.cost + price * self.counted, self.fixed_cost)
        least, settings = scores.min(-1)
        value, index = (least.sum(-1) + fixed + (price * self.fixed_use if price < torch.inf else 0)).min(0)
        return float(value), int(index), tuple(settings[index].tolist())


def _improved(
    layers: Sequence[Sequence[Config]], chosen: Sequence[tuple[int, tuple[int, ...]]], limit: float
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Single heads change their setting, those first that save most for what they use, for as long as the budget lasts."""
    heads = [(at, head) for at, (_, settings) in enumerate(chosen) for head in range(len(settings))]
    rows = [(layers[at][chosen[at][0]], head) for at, head in heads]
    stack = lambda tables: torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=torch.inf)
    cost, use = stack([config.cost[head] for config, head in rows]), stack([config.use[head] for config, head in rows])
    picked = torch.tensor([setting for _, settings in chosen for setting in settings])
    every, left = torch.arange(len(heads)), limit - total(layers, chosen)[1]
    saved = cost[every, picked][:, None] - cost
    more = use - use[every, picked][:, None]
    rate = torch.where(saved > 0, saved / more.clamp(min=1e-300), 0).nan_to_num(0, posinf=1e308)
    while True:
        value, place = torch.where(more <= left, rate, 0).flatten().max(0)
        if float(value) <= 0:
            break
        row, setting = divmod(int(place), rate.shape[1])
        picked[row] = setting
        left -= float(more[row, setting])
        saved[row], more[row] = cost[row, setting] - cost[row], use[row] - use[row, setting]
        rate[row] = torch.where(saved[row] > 0, saved[row] / more[row].clamp(min=1e-300), 0).nan_to_num(0, posinf=1e308)
    numbers = iter(picked.tolist())
    return tuple((index, tuple(next(numbers) for _ in settings)) for index, settings in chosen)


def integer(layers: Sequence[Sequence[Config]], limit: float, seconds: float = _SECONDS) -> Solution | None:
    """By scipy's integer programming; None where it found no choice in time."""
    # an optional dependency, which type checkers need not find
    np, optimize, sparse = (importlib.import_module(name) for name in ("numpy", "scipy.optimize", "scipy.sparse"))
    variables: list[tuple[int, int, int, int]] = []  # layer, configuration, head, setting; a configuration's own has head -1
    rows, columns, entries, low, high = [], [], [], [], []
    costs, uses = [], []

    def enter(row: int, column: int, value: float) -> None:
        rows.append(row)
        columns.append(column)
        entries.append(value)

    for at, layer in enumerate(layers):
        one_config = len(low)
        low.append(1.0)
        high.append(1.0)
        for index, config in enumerate(layer):
            own = len(variables)
            variables.append((at, index, -1, -1))
            costs.append(config.fixed_cost)
            uses.append(config.fixed_use)
            enter(one_config, own, 1.0)
            for head in range(config.cost.shape[0]):
                row = len(low)
                low.append(0.0)
                high.append(0.0)
                enter(row, own, -1.0)
                for setting in _undominated(config.cost[head], config.use[head]):
                    enter(row, len(variables), 1.0)
                    variables.append((at, index, head, setting))
                    costs.append(float(config.cost[head, setting]))
                    uses.append(float(config.use[head, setting]))
    scale = max(map(abs, uses), default=0.0) if limit <= 0 else limit
    for column, use in enumerate(uses):
        if use:
            enter(len(low), column, use / (scale or 1.0))
    low.append(-np.inf)
    table = sparse.csc_array((entries, (rows, columns)), shape=(len(low), len(variables)))
    size = sum(map(abs, costs)) / max(1, len(layers)) or 1.0
    bound = None
    for slack in (0.0, _SLACK):
        most = np.array([*high, limit / (scale or 1.0) - slack])
        result = optimize.milp(
            np.array(costs) / size,
            integrality=np.ones(len(costs)),
            bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(table, np.array(low), most),
            options={"mip_rel_gap": GAP, "time_limit": seconds},
        )
        if result.x is None:
            return None
        bound = float(result.mip_dual_bound) * size if bound is None else bound
        picked = [variables[i] for i in np.flatnonzero(result.x > 0.5)]
        configs = {at: index for at, index, head, _ in picked if head < 0}
        settings = {(at, head): setting for at, index, head, setting in picked if head >= 0 and configs[at] == index}
        heads = [range(layer[configs[at]].cost.shape[0]) for at, layer in enumerate(layers)]
        chosen = tuple((configs[at], tuple(settings[at, head] for head in heads[at])) for at in range(len(layers)))
        cost, use = total(layers, chosen)
        if use <= limit:
            return Solution(chosen, cost, use, min(cost, bound))
    return None


def _undominated(cost: Tensor, use: Tensor) -> list[int]:
    """Settings that no other one beats in both."""
    kept, least = [], torch.inf
    for setting in sorted(range(len(cost)), key=lambda i: (float(use[i]), float(cost[i]))):
        if float(cost[setting]) < least:
            kept.append(setting)
            least = float(cost[setting])
    return kept
