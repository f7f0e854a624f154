"""What was measured and chosen, as pictures: densities and errors by layer and head, heads that look far back, error over predicted time,
densities over length. One PNG each, and a page that holds them all."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.commands.calibrate.attention.choose import DENSE, Budget, Choice, Chooser, front
from sparsify.commands.calibrate.attention.make_plan import describe
from sparsify.errors import UnsupportedError
from sparsify.planning.plan import Plan

_FAR = 0.5  # of a row's mass: what a row must have beyond the window so that its head counts as looking back there
_LENGTHS = 8  # of the curves of density


def write(folder: Path, chooser: Chooser, choice: Choice, plan: Plan) -> None:
    """Writes `report.html`, the pictures and `report.json`.

    Raises:
        UnsupportedError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a window system for the whole process
    except ImportError:
        raise UnsupportedError("a report needs matplotlib", hint='pip install "sparsify-compiler[calibrate]"') from None
    best, alike = front(chooser), uniform(chooser)
    pictures = {}
    for name, title, draw in _pictures(chooser, choice, best, alike):
        figure = Figure(figsize=(7, 4), layout="constrained")
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, dpi=120, format="png", metadata={"Software": None})
        pictures[name] = title, data.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, data) in pictures.items():
            (folder / f"{name}.png").write_bytes(data)
        (folder / "report.json").write_text(json.dumps(numbers(chooser, choice, best, alike), indent=1), encoding="utf-8")
        (folder / "report.html").write_text(_page(chooser, choice, plan, pictures), encoding="utf-8")
    except OSError as error:
        raise UnsupportedError(f"cannot write the report: {error.strerror}", where=str(folder)) from None


def numbers(chooser: Chooser, choice: Choice, best: Sequence[Choice], alike: list[dict[str, Any]]) -> dict[str, Any]:
    """What the pictures show, by name. best: from `front`. alike: from `uniform`."""
    window, far = looking_back(chooser)
    return {
        "layers": [str(one.layer.site.place) for one in choice.layers],
        "at": choice.at,
        "density": [one.density.tolist() for one in choice.layers],
        "error": head_errors(chooser, choice).tolist(),
        "looking_back": {"beyond": window, "share_of_rows": far.tolist()},
        "front": [_point(one, chooser.longest) for one in best],
        "uniform": alike,
    }


def _point(one: Choice, length: int) -> dict[str, Any]:
    loss = one.loss(length)
    return {"seconds": one.seconds, "error": one.error(length), "density": one.density} | ({} if loss is None else {"loss": loss})


def head_errors(chooser: Chooser, choice: Choice) -> Tensor:
    """[layers, heads]: ‖o' - o‖ / ‖o‖ of every head at the longest length; NaN where a layer has fewer heads."""
    rows = []
    every = (DENSE, *chooser.grid.settings)
    for one in choice.layers:
        found = one.layer.records[chooser.longest].relative_error
        found = torch.cat([torch.zeros(1, found.shape[1], dtype=torch.float64), found])
        rows.append(found[[every.index(setting) for setting in one.settings], range(found.shape[1])])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def looking_back(chooser: Chooser) -> tuple[int, Tensor]:
    """Which heads retrieve: a window in tokens, the largest measured, and [layers, heads], the share of rows that have more than half of
    their mass beyond it and the sinks. Without any window: 0, and nothing."""
    sites = [layer.records[chooser.longest] for layer in chooser.layers]
    tried = [i for i, s in enumerate(chooser.grid.settings) if s.family is None and not bool(sites[0].error[i].isnan().any())]
    if not tried:
        return 0, torch.zeros(len(sites), 0)
    widest = max(tried, key=lambda i: chooser.grid.settings[i].value)
    rows = [record.lost_beyond(_FAR)[widest] for record in sites]
    return int(chooser.grid.settings[widest].value), torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def uniform(chooser: Chooser) -> list[dict[str, Any]]:
    """Every setting for all heads alike: what choosing by head is compared with."""
    found = []
    for index, setting in enumerate(chooser.grid.settings, 1):
        if any(bool(layer.weight[index].isnan().any()) for layer in chooser.layers):
            continue
        served = [chooser.serve(layer, setting.family, [index] * layer.density.shape[1]) for layer in chooser.layers]
        every = Choice(tuple(served), Budget("density", 1.0), chooser.at, 0.0)
        name = "window" if setting.family is None else chooser.grid.families[setting.family].series(setting.value)
        found.append({"setting": name, "value": setting.value, **_point(every, chooser.longest)})
    return found


def _pictures(chooser: Chooser, choice: Choice, best: Sequence[Choice], alike: list[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    densities = torch.nn.utils.rnn.pad_sequence([one.density for one in choice.layers], batch_first=True, padding_value=torch.nan)
    yield (
        "density",
        f"Share of the causal blocks visited at {choice.at} tokens",
        lambda figure: _heat(figure, densities, "density", log=True),
    )
    errors = head_errors(chooser, choice)
    what = f"Relative error of each head's output at {chooser.longest} tokens"
    yield "error", what, lambda figure: _heat(figure, errors, "‖o' − o‖ / ‖o‖")
    window, far = looking_back(chooser)
    if window:
        what = f"Heads that look back: rows with more than half of their mass beyond {chooser.grid.sinks} sinks and the last {window} keys"
        yield "looking_back", what, lambda figure: _heat(figure, far, "share of rows")
    yield "front", f"What is lost over predicted time at {choice.at} tokens", lambda figure: _front(figure, chooser, choice, best, alike)
    yield "density_over_length", "Density over length: measured (dots) and fitted", lambda figure: _over_length(figure, choice)


def _heat(figure: Any, values: Tensor, label: str, log: bool = False) -> None:
    from matplotlib.colors import LogNorm

    axis = figure.subplots()
    low = float(values.nan_to_num(1).min())
    norm = LogNorm(max(low, 1e-4), 1) if log and low < 1 else None
    image = axis.imshow(values.numpy(), aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axis.set_xlabel("query head")
    axis.set_ylabel("layer")
    for name, size in (("x", values.shape[1]), ("y", values.shape[0])):
        getattr(axis, f"set_{name}ticks")(range(0, size, max(1, size // 16)))
    figure.colorbar(image, label=label)


def _front(figure: Any, chooser: Chooser, choice: Choice, best: Sequence[Choice], alike: list[dict[str, Any]]) -> None:
    axis, what = figure.subplots(), "error" if choice.loss(chooser.longest) is None else "loss"
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in alike:
        by_name.setdefault(one["setting"], []).append(one)
    for name, points in by_name.items():
        axis.plot([1e3 * p["seconds"] for p in points], [p[what] for p in points], ".:", linewidth=1, label=f"all heads: {name}")
    lost = [one.bounded(chooser.longest) for one in best]
    axis.plot([1e3 * one.seconds for one in best], lost, "-", color="black", label="chosen by head")
    axis.plot([1e3 * choice.seconds], [choice.bounded(chooser.longest)], "o", color="red", label="this plan")
    axis.axvline(1e3 * choice.dense_seconds, linestyle="--", color="grey", linewidth=1, label="dense")
    axis.set_xscale("log")
    axis.set_xlabel(f"predicted ms of all attention on {choice.layers[0].layer.seconds.device.name}")
    unit = "root mean square over layers" if what == "error" else "predicted, nats a token"
    axis.set_ylabel(f"{what} at {chooser.longest} tokens ({unit})")
    axis.legend(fontsize="x-small")


def _over_length(figure: Any, choice: Choice) -> None:
    axis = figure.subplots()
    lengths = choice.lengths
    longest = max(choice.at, lengths[-1])
    curve = (
        [round(lengths[0] * (longest / lengths[0]) ** (i / (_LENGTHS - 1))) for i in range(_LENGTHS)] if longest > lengths[0] else lengths
    )
    for number, one in enumerate(choice.layers):
        if one.dense:
            continue
        color = f"C{number % 10}"
        label = str(one.layer.site.layer) if one.layer.site.layer is not None else one.layer.site.place.name
        axis.plot(curve, [one.density_at(n) for n in curve], color=color, linewidth=1, label=label)
        axis.plot(lengths, [one.density_at(n, measured=True) for n in lengths], ".", color=color)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("density of a layer")
    if 0 < sum(not one.dense for one in choice.layers) <= 16:
        axis.legend(title="layer", fontsize="x-small", ncols=2)


def _page(chooser: Chooser, choice: Choice, plan: Plan, pictures: dict[str, tuple[str, bytes]]) -> str:
    assert plan.provenance is not None and plan.calibration is not None
    text = html.escape
    rows = []
    for one in choice.layers:
        what = "dense" if one.dense else describe(one, chooser.grid)
        cells = (
            str(one.layer.site.place),
            what,
            f"{float(one.density.mean()):.1%}",
            f"{one.error[chooser.longest]:.4f}",
            f"{1e3 * one.seconds:.3g}",
            f"{1e3 * one.layer.seconds.dense():.3g}",
        )
        rows.append(_row(cells))
    facts = [_row((key.replace("_", " "), json.dumps(value))) for key, value in vars(plan.calibration).items()]
    shown = [
        f'<h2>{text(title)}</h2><img alt="{text(title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for title, data in pictures.values()
    ]
    heads = _row(("site", "heads", "density", "error", "predicted ms", "dense ms"), "th")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Calibrated attention</title>
<style>body {{ font: 15px sans-serif; max-width: 60em; margin: 2em auto }} td, th {{ text-align: left; padding: 0 1em 0 0 }}
img {{ max-width: 100% }}</style>
<h1>Calibrated attention of a {text(plan.provenance.model_type)}</h1>
<p>{choice.dense_seconds / choice.seconds:.2f} times dense attention, predicted for {choice.at} tokens on {text(plan.calibration.target)};
error {choice.error(chooser.longest):.4f} (root mean square over layers), measured at {chooser.longest} tokens;
density {choice.density:.2%}.
Acts from {plan.min_length} tokens on.</p>
{"".join(shown)}
<h2>Layers</h2><table>{heads}{"".join(rows)}</table>
<h2>Where it comes from</h2><table>{"".join(facts)}</table>
</html>
"""


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
