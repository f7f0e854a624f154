"""From what was measured to a setting for every head, under a budget of error, density or time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.commands.calibrate.attention import solve
from sparsify.commands.calibrate.attention.capture import Captured
from sparsify.commands.calibrate.attention.densities import Densities
from sparsify.commands.calibrate.attention.measure import Record
from sparsify.commands.calibrate.attention.run import Measured
from sparsify.commands.calibrate.attention.seconds import LayerSeconds
from sparsify.commands.calibrate.attention.settings import Grid, Setting
from sparsify.commands.calibrate.attention.solve import Config, Solution
from sparsify.costs.crossovers import MAX_COST_RATIO
from sparsify.costs.device import Device
from sparsify.errors import UnsupportedError

Kind = Literal["keep_error", "keep_loss", "density", "speedup"]
DENSE = Setting(None, 0)
# how much predicted time may move a choice that minimises error: it decides between equals
_TIE = 1e-9
_ANY = 1e6  # an error that everything keeps
_ROUNDS = 6  # of a speed-up whose time over lists is no line


@dataclass(frozen=True)
class Budget:
    """What was asked for.

    keep_error: root mean square over layers of ‖o' - o‖ / ‖o‖, at most. keep_loss: nats a token, predicted by gradients, at most.
    density: share of the blocks of all layers and heads, at most. speedup: dense attention's predicted seconds over the plan's, at least.
    """

    kind: Kind
    value: float


@dataclass(frozen=True)
class Layer:
    """One attention and what its heads may do.

    weight: float64 [1 + settings, heads], what each head adds to the sum that is bounded or minimised; the first setting is dense. Its
        share of the squared relative error of the layer, or, where gradients were followed, its nats a token.
    density: the same shape, at the length that is chosen for.
    """

    site: Captured
    records: dict[int, Record]
    densities: Densities
    seconds: LayerSeconds
    weight: Tensor
    density: Tensor


@dataclass(frozen=True)
class Chosen:
    """What one layer does. way: of its block lists, index in the grid's; None: dense, or sinks and windows alone. settings: of its heads.
    picked: the same as numbers, 0 for dense, then the grid's.

    seconds: predicted. error: ‖o' - o‖ / ‖o‖ by length, as measured. loss: nats a token by length, see `Choice.loss`.
    density: of each head. power: by which each falls over the length.
    """

    layer: Layer
    way: int | None
    settings: tuple[Setting, ...]
    picked: tuple[int, ...]
    seconds: float
    error: dict[int, float]
    density: Tensor
    density_8k: float
    power: float
    loss: dict[int, float | None]

    @property
    def dense(self) -> bool:
        return all(setting == DENSE for setting in self.settings)

    def density_at(self, length: int, measured: bool = False) -> float:
        """Mean over heads, as fitted, or as measured at one of the lengths."""
        return mean_density(self.layer, self.picked, length, measured)


def densities(layer: Layer, picked: Sequence[int], length: int, measured: bool = False) -> Tensor:
    """Of a layer whose heads take these settings (0: dense, then the grid's), float64 [heads]."""
    found = layer.records[length].density if measured else layer.densities.at(length)
    every = torch.cat([torch.ones(1, found.shape[1], dtype=torch.float64), found])
    return every[picked, range(len(picked))]


def mean_density(layer: Layer, picked: Sequence[int], length: int, measured: bool = False) -> float:
    """Over heads, as `densities`."""
    return float(densities(layer, picked, length, measured).mean())


@dataclass(frozen=True)
class Choice:
    """All layers. gap: how far time or error may lie above the least possible one, relatively, as far as costs are sums over heads."""

    layers: tuple[Chosen, ...]
    budget: Budget
    at: int
    gap: float

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.layers)

    @property
    def dense_seconds(self) -> float:
        return sum(one.layer.seconds.dense() for one in self.layers)

    @property
    def density(self) -> float:
        return float(torch.cat([one.density for one in self.layers]).mean())

    def error(self, length: int) -> float:
        """Root mean square over layers, as measured at a length."""
        return math.sqrt(sum(one.error[length] ** 2 for one in self.layers) / len(self.layers))

    def loss(self, length: int) -> float | None:
        """Nats a token, by the gradients measured at a length; None where none were followed."""
        found = [one.loss[length] for one in self.layers]
        return None if None in found else sum(loss for loss in found if loss is not None)

    def bounded(self, length: int) -> float:
        """What choices are compared by, as measured at a length: the loss, or the error where no gradients were followed."""
        loss = self.loss(length)
        return self.error(length) if loss is None else loss

    @property
    def lengths(self) -> list[int]:
        return sorted(self.layers[0].error)


class Chooser:
    """Choices over one measurement.

    Args:
        device: whose times count. kernel: the attention op's family there. at: length in tokens that time and density are for; None: the
            longest measured.
    """

    def __init__(self, grid: Grid, measured: Measured, device: Device, kernel: str, at: int | None = None):
        self.grid = grid
        lengths = {length for by in measured.records.values() for length in by}
        self.longest = max(lengths)
        self.at = self.longest if at is None else at
        self.layers = [
            self._layer(site, measured.records[place], device, kernel)
            for place, site in measured.sites.items()
            if place in measured.records
        ]
        self._options: list[list[tuple[int | None, float, Tensor]]] = [list(self._configs(layer)) for layer in self.layers]

    def _layer(self, site: Captured, records: dict[int, Record], device: Device, kernel: str) -> Layer:
        longest, densities = records[self.longest], Densities.fit(self.grid, records)
        heads = longest.norm.numel()
        lost = longest.error / longest.norm.sum().clamp(min=1e-300)
        if longest.divergence is not None:
            lost = longest.divergence / longest.rows
        weight = torch.cat([torch.zeros(1, heads, dtype=torch.float64), lost])
        density = torch.cat([torch.ones(1, heads, dtype=torch.float64), densities.at(self.at)])
        return Layer(site, records, densities, LayerSeconds(site.sizes, kernel, device).at(self.at), weight, density)

    def _configs(self, layer: Layer) -> Any:
        """(way, fixed seconds, seconds [settings, heads]) of everything that may serve a layer; infinite where a head may not."""
        settings, heads, costs = (DENSE, *self.grid.settings), layer.density.shape[1], layer.seconds
        never = torch.full((len(settings), heads), torch.inf, dtype=torch.float64)
        untried = layer.weight.isnan()
        dense = never.clone()
        dense[0] = 0
        yield None, costs.dense(), dense
        windows = never.clone()
        windows[0] = costs.every_key()
        shared, slope = costs.lists()
        for index, setting in enumerate(settings):
            if setting.family is None and setting != DENSE and not bool(untried[index].any()):
                windows[index] = costs.window(int(setting.value) + self.grid.sinks)
        if bool(windows[1:].isfinite().any()):
            yield None, 0.0, windows
        for number, way in enumerate(self.grid.ways):
            lists = slope * layer.density
            own = torch.tensor([self.grid.takes(number, setting) for setting in settings])
            mine = own | torch.tensor([setting.family is None for setting in settings])
            lists = lists.masked_fill(~mine[:, None] | untried, torch.inf)
            if not way.takes_windows:
                lists[1 : 1 + len(self.grid.windows)] = torch.inf
            if not way.takes_dense:
                lists[0] = torch.inf
            yield number, shared + costs.estimate(way, float(layer.density[own].mean())), lists

    def _without_windows(self) -> list[list[tuple[int | None, float, Tensor]]]:
        every = []
        for options in self._options:
            kept = [(way, fixed, seconds.clone()) for way, fixed, seconds in options if way is not None or fixed > 0]
            for _, _, seconds in kept:
                seconds[1 : 1 + len(self.grid.windows)] = torch.inf
            every.append(kept)
        return every

    def choose(self, budget: Budget, exact: bool = True, windows: bool = True) -> Choice:
        """The best choice within a budget.

        Args:
            exact: False: by the relaxation alone, whose gap is what it says. windows: whether heads may have sinks and a window.

        Raises:
            UnsupportedError: no choice keeps the budget, with the best that can be had.
        """
        every = self._options if windows else self._without_windows()
        limit, dense = self._limit(budget), sum(layer.seconds.dense() for layer in self.layers)
        for _ in range(_ROUNDS):
            problem = [
                [self._config(layer, option, budget.kind) for option in options] for layer, options in zip(self.layers, every, strict=True)
            ]
            found = (solve.solve if exact else solve.relaxed)(problem, limit)
            if found is None:
                raise UnsupportedError(self._impossible(budget, every), where=f"--{budget.kind.replace('_', '-')}")
            choice = self._choice(found, budget, every)
            if budget.kind != "speedup" or choice.seconds <= dense / budget.value * (1 + 1e-9):
                return choice
            limit *= min(0.999, dense / budget.value / choice.seconds)  # lists take longer than the line through two densities
        raise UnsupportedError(self._impossible(budget, every), where=f"--{budget.kind.replace('_', '-')}")

    def _limit(self, budget: Budget) -> float:
        if budget.kind == "keep_error":
            return budget.value**2 * len(self.layers)
        if budget.kind == "keep_loss":
            return budget.value
        if budget.kind == "density":
            return budget.value * sum(layer.density.shape[1] for layer in self.layers)
        return sum(layer.seconds.dense() for layer in self.layers) / budget.value

    def _config(self, layer: Layer, option: tuple[int | None, float, Tensor], kind: Kind) -> Config:
        """Cost and use by what the budget is of."""
        _, fixed, seconds = option
        allowed, error = seconds.isfinite(), layer.weight.nan_to_num(torch.inf)
        never = lambda values: values.masked_fill(~allowed, torch.inf).T
        if kind in ("keep_error", "keep_loss"):
            return Config(never(seconds), never(error), fixed, 0.0)
        small = _TIE / max(layer.seconds.dense(), 1e-30)
        cost, fixed_cost = never(error + small * seconds.nan_to_num(posinf=0)), small * fixed
        if kind == "density":
            return Config(cost, never(layer.density), fixed_cost, 0.0)
        return Config(cost, never(seconds), fixed_cost, fixed)

    def _impossible(self, budget: Budget, every: list[list[tuple[int | None, float, Tensor]]]) -> str:
        """every: the ways to serve each layer that were allowed."""
        without = "" if every is self._options else " without windows"
        if budget.kind == "density":
            least = 0.0
            for layer, options in zip(self.layers, every, strict=True):
                allowed = [layer.density.masked_fill(~seconds.isfinite() | layer.weight.isnan(), torch.inf) for _, _, seconds in options]
                least += min(float(density.min(0).values.sum()) for density in allowed)
            best = least / sum(layer.density.shape[1] for layer in self.layers)
            return f"no setting that was tried visits so few blocks{without}: at least {best:.2%} at {self.at} tokens"
        dense = sum(layer.seconds.dense() for layer in self.layers)
        best = sum(min(fixed + float(s.min(0).values.sum()) for _, fixed, s in options) for options in every)
        return f"nothing that was tried is so fast{without}: at most {dense / best:.2f} times dense attention at {self.at} tokens"

    def _choice(self, found: Solution, budget: Budget, every: list[list[tuple[int | None, float, Tensor]]]) -> Choice:
        layers = [
            self.serve(layer, options[index][0], picked)
            for layer, options, (index, picked) in zip(self.layers, every, found.chosen, strict=True)
        ]
        return Choice(tuple(layers), budget, self.at, found.gap)

    def serve(self, layer: Layer, way: int | None, picked: Sequence[int]) -> Chosen:
        """What a layer does, costs and loses where its heads take these settings (0: dense, then the grid's)."""
        every, heads = (DENSE, *self.grid.settings), range(len(picked))
        settings = tuple(every[index] for index in picked)
        if not any(setting.family is not None for setting in settings):
            way = None
        density = layer.density[picked, heads]
        if all(setting == DENSE for setting in settings):
            seconds = layer.seconds.dense()
        elif way is None:
            widths = [layer.seconds.window(int(s.value) + self.grid.sinks) if s != DENSE else layer.seconds.every_key() for s in settings]
            seconds = sum(widths)
        else:
            seconds = layer.seconds.along_lists(self.grid.ways[way], density.tolist(), _choose(settings))
        error, loss = {}, {}
        summed = lambda table: float(torch.cat([torch.zeros_like(table[:1]), table.nan_to_num(0)])[picked, heads].sum())
        for length, record in layer.records.items():
            error[length] = math.sqrt(summed(record.error) / max(float(record.norm.sum()), 1e-300))
            loss[length] = None if record.divergence is None else summed(record.divergence) / record.rows
        near, far = (mean_density(layer, picked, length) for length in (8192, 4 * max(8192, self.at)))
        power = math.log(near / far) / math.log(4 * max(8192, self.at) / 8192)
        return Chosen(layer, way, settings, tuple(picked), seconds, error, density, near, max(0.0, power), loss)

    def shortest(self, choice: Choice, max_cost_ratio: float = MAX_COST_RATIO, step: int = 1024) -> int:
        """The key length from which on the choice should act: the smallest, a multiple of 1024, where it is predicted to take at most
        `max_cost_ratio` of dense attention's time, or no larger a share than at the length that it was chosen for. Neither shorter than
        what was measured, nor longer than what was chosen for. Halves of that length are looked up, and the last interval is bisected."""
        ratio = max(max_cost_ratio, self._ratio(choice, self.at) * (1 + 1e-9))
        low, high = 0, max(1, self.at // step)
        while high > 1 and self._ratio(choice, high // 2 * step) <= ratio:
            high //= 2
        low = high // 2
        while high > low + 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._ratio(choice, middle * step) <= ratio else (middle, high)
        return min(self.at, max(high * step, min(choice.lengths)))

    def _ratio(self, choice: Choice, length: int) -> float:
        dense = chosen = 0.0
        for one in choice.layers:
            costs = one.layer.seconds.at(length)
            dense += costs.dense()
            chosen += self._seconds_at(one, costs, length)
        return chosen / dense

    def _seconds_at(self, one: Chosen, costs: LayerSeconds, length: int) -> float:
        if one.dense:
            return costs.dense()
        if one.way is None:
            tokens = (int(s.value) + self.grid.sinks for s in one.settings if s != DENSE)
            return sum(costs.window(t) for t in tokens) + costs.every_key() * one.settings.count(DENSE)
        return costs.along_lists(self.grid.ways[one.way], densities(one.layer, one.picked, length).tolist(), _choose(one.settings))


def _choose(settings: Sequence[Setting]) -> list[bool]:
    """Which heads have block lists of their own, neither dense nor with a window."""
    return [setting.family is not None for setting in settings]


def front(chooser: Chooser, points: int = 16) -> list[Choice]:
    """Choices along the way from dense to the fastest that was tried, by the relaxation: error, or loss, over predicted time."""
    kind: Kind = "keep_error" if chooser.layers[0].records[chooser.longest].divergence is None else "keep_loss"
    fastest = chooser.choose(Budget(kind, _ANY), exact=False)
    most = fastest.bounded(chooser.longest)
    if most <= 0:
        return [fastest]
    bounds = [0.0, *(most * 10 ** (-3 * i / (points - 1)) for i in reversed(range(points)))]
    return [chooser.choose(Budget(kind, bound * (1 + 1e-9)), exact=False) for bound in bounds]
