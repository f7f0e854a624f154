"""The cost grid as a table and a plot, and whole models' predictions beside what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cache import DecodeModel
from benchmarks.cost_model import CostGrid, whole_model
from benchmarks.cost_model import run as cost_grid
from benchmarks.lib.models import SHAPES
from benchmarks.lib.registry import Benchmark
from benchmarks.model import Prefill
from sparsify.commands.bench.tables import Found, conditions, kind, latest, markdown, size
from sparsify.costs.device import Device
from sparsify.costs.seconds import attention_seconds, decode_seconds, estimate_seconds
from sparsify.ops.estimate import Estimate


def _fit(found: Iterable[Found]) -> tuple[Device, list[tuple[Any, bool]]] | None:
    run = cost_grid.newest_run(found)
    if run is None or not any(part for _, part in run[1]):
        return None
    ceilings, samples = run
    fitted = cost_grid.profile_of(ceilings, [sample for sample, part in samples if part])
    return Device.from_profile("cuda" if fitted.capability else "cpu", fitted), samples


def table(found: Iterable[Found]) -> str:
    """Errors by kernel family on both parts of the grid, the choices, and whole models."""
    found = list(found)
    fit = _fit(found)
    if fit is None:
        return "No run."
    device, samples = fit
    parts = {chosen: cost_grid.errors([s for s, part in samples if part == chosen], device) for chosen in (True, False)}
    groups = {chosen: cost_grid.grouped(errors) for chosen, errors in parts.items()}
    rows = []
    for family in sorted({*groups[True], *groups[False]}):
        rows.append([family, *_cells(groups[True].get(family)), *_cells(groups[False].get(family))])
    rows.append(["**all**", *_cells(parts[True]), *_cells(parts[False])])
    header = ["kernels", "fitted: cells", "median", "95th percentile", "only predicted: cells", "median", "95th percentile"]
    text = [_head(found), markdown(header, rows)]
    taken = cost_grid.choices([sample for sample, _ in samples], device)
    if taken:
        right = sum(one["ratio"] <= cost_grid.CLOSE for one in taken)
        worst = max(taken, key=lambda one: one["ratio"])
        text.append(
            f"The cheapest candidate by the model is within {cost_grid.CLOSE - 1:.0%} of the fastest measured one in {right} of "
            f"{len(taken)} places ({right / len(taken):.1%}); the worst choice, {worst['chosen']} instead of {worst['best']}, takes "
            f"{worst['ratio']:.2f} times as long."
        )
    models = model_rows(found, device)
    if models:
        text += ["### Whole models", _MODELS, markdown(["what", "tokens", "measured, ms", "predicted, ms", "error"], models)]
    return "\n\n".join(text)


_MODELS = (
    "An 8B model's prefill and decode steps from other benchmarks' records, predicted from its shape by the profile that was fitted on "
    "the grid: linear layers, attention and what is elementwise."
)


def _head(found: Sequence[Found]) -> str:
    run = kind(found, CostGrid)
    return (
        "Relative errors of the cost formulas. Coefficients are fitted on 1K, 4K, 16K, 64K and 128K tokens and densities 5, 10, 20 and "
        "50 %; the cells that are only predicted have other lengths (2K, 8K, 32K, 256K) or densities (3, 15, 30, 35 %). The whole sparse "
        f"call is only predicted too: its parts are fitted, never their sum. {conditions(run)}"
    )


def _cells(found: list[tuple[Any, float]] | None) -> list[str]:
    if not found:
        return ["–", "–", "–"]
    numbers = cost_grid.summary(found)
    return [str(numbers["cells"]), f"{numbers['median']:.1%}", f"{numbers['p95']:.1%}"]


def shape_of(name: str, layers: int | None = None) -> whole_model.ModelShape:
    given = SHAPES[name]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return whole_model.ModelShape(layers or given["num_hidden_layers"], *(given[key] for key in names))


def predicted_prefill(record: Found, device: Device) -> float | None:
    """Seconds for a record of the prefill benchmark; None for variants that the model does not speak of."""
    shape, n = shape_of(record["shape"], record["layers"]), record["length"]
    sizes = shape.attention(n, n)
    exact = [attention_seconds(sizes, device, kernel=kernel) for kernel in ("sdpa", "hopper")]
    if record["variant"] == "eager":
        return float(whole_model.prefill_seconds(shape, device, n, attention=exact[0], compiled=False))
    if record["variant"] in ("dense", "default") and not record.get("density"):
        return float(whole_model.prefill_seconds(shape, device, n, attention=min(exact, key=float)))
    if record["variant"] in ("xattention", "default") and record.get("density"):
        sparse = attention_seconds(sizes, device, kernel="hopper", share=record["density"], listed=True)
        # of the records that do not name their estimate, those of `xattention` are from before the 8-bit one was the default
        unnamed = () if record["variant"] == "xattention" else ("int8",)
        estimate = estimate_seconds(sizes, device, 8, estimate=Estimate.from_names(record.get("estimate", unnamed)))
        return float(whole_model.prefill_seconds(shape, device, n, attention=sparse + estimate))
    return None


def model_rows(found: Iterable[Found], device: Device) -> list[list[str]]:
    """Prefill by variant and length, and decode steps."""
    found = [record for record in found if record["machine"]["gpu"] == device.name]
    rows = []
    prefills = latest(found, Prefill)
    for record in sorted(prefills, key=lambda r: (r["variant"], r["length"])):
        seconds = predicted_prefill(record, device) if "ms" in record else None
        if seconds is not None:
            name = {"dense": "sparsify, dense", "eager": "eager"}.get(record["variant"], f"sparsify, {record['variant']}")
            name += f", density {record['density']:.2g}" if record.get("density") else ""
            rows.append(_row(f"prefill, {name}", size(record["length"]), record["ms"], seconds))
    return rows + _decode_rows(kind(found, DecodeModel), device)


def _decode_rows(found: list[Found], device: Device) -> list[list[str]]:
    """Steps over a SparseCache: in a loop that feeds itself, and with each token read back, which older records have alone."""
    rows = []
    keys = [key for key in DecodeModel.KEYS if key != "tuned"]  # which older records do not say
    served = [r for r in found if r["variant"] == "sparsify" and r.get("mode") == "reduce-overhead" and not r.get("tuned")]
    for record in sorted(latest(served, DecodeModel, *keys), key=lambda r: (r["prompt"], r["batch"])):
        shape, budget, batch = shape_of(record["shape"], record["layers"]), record["budget"], record["batch"]
        kept = decode_seconds(shape.attention(1, budget, batch), device)
        loop = "ms_per_token_read_back" in record
        for waited, key in ((False, "ms_per_token"), (True, "ms_per_token_read_back")) if loop else ((True, "ms_per_token"),):
            seconds = whole_model.decode_seconds(shape, device, budget, batch=batch, attention=kept, waited=waited)
            what = f"decode over {budget} kept keys, batch {batch}" + (", each token read back" if waited else "")
            rows.append(_row(what, size(record["prompt"]), record[key], float(seconds)))
    return rows


def _row(what: str, tokens: str, measured: float, seconds: float) -> list[str]:
    return [what, tokens, f"{measured:.4g}", f"{1e3 * seconds:.4g}", f"{1e3 * seconds / measured - 1:+.1%}"]


def plot(found: list[Found]) -> Any:
    """Predicted over measured seconds by kernel family, cells that were only predicted filled."""
    from matplotlib import pyplot

    fit = _fit(found)
    if fit is None:
        return None
    device, samples = fit
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = itertools.cycle(pyplot.get_cmap("tab20").colors)
    errors = cost_grid.errors([sample for sample, _ in samples], device)
    fitted = {id(sample): part for sample, part in samples}
    for (family, members), colour in zip(cost_grid.grouped(errors).items(), colours, strict=False):
        for part, face in ((True, "none"), (False, colour)):
            some = [(s.seconds, error) for s, error in members if fitted[id(s)] == part]
            label = family if not part or all(fitted[id(s)] for s, _ in members) else None
            x = [1e3 * seconds for seconds, _ in some]
            style = {"s": 14, "facecolors": face, "edgecolors": [colour], "linewidths": 0.8, "label": label}
            axes[0].scatter(x, [value * (1 + error) for value, (_, error) in zip(x, some, strict=True)], **style)
            axes[1].scatter(x, [100 * error for _, error in some], **style)
    low, high = min(s.seconds for s, _ in errors) * 1e3, max(s.seconds for s, _ in errors) * 1e3
    axes[0].plot([low, high], [low, high], color="black", linewidth=0.7)
    axes[0].set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    axes[1].axhspan(-10, 10, color="grey", alpha=0.15)
    axes[1].set(xscale="log", xlabel="measured, ms", ylabel="error, %", ylim=(-50, 50))
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center", title="filled: only predicted", title_fontsize=7
    )
    return figure


BENCHMARKS = (
    Benchmark(
        name="cost_model",
        place=9,
        measures="methods × lengths × densities × batches beside what the cost model predicts; fitted on a part, tested on the rest",
        module="benchmarks.cost_model.run",
        records=(CostGrid,),
        beside=(Prefill, DecodeModel),
        title="Predicted and measured times",
        table=table,
        plots={"cost_grid": plot},
    ),
)
