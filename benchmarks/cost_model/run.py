"""Is the cost model right? Measures methods × lengths × densities × batches, predicts them, and says which kernel it would have chosen.

    python -m benchmarks run cost_model measure                       # on one GPU; appends to results/cost_grid.jsonl
    python -m benchmarks run cost_model fit results/cost_grid.jsonl   # anywhere: fits on a part of the cells, tests on the others
    python -m benchmarks run cost_model fit FILE --save sparsify/costs/profiles/sm_90.json
    python -m benchmarks run cost_model measure --only selections --out NEW       # a part of the grid, in place of what was measured of it
    python -m benchmarks run cost_model fit results/cost_grid.jsonl NEW --onto PROFILE --families select select/streamed --save PROFILE

Shapes are Llama-3.1-8B's unless a cell says otherwise, bf16. Calls are timed in CUDA graphs, long ones by events; medians. Kernels are
compiled first, in processes of their own side by side, and are no part of the time. `fit` takes 1K, 4K, 16K, 64K and 128K tokens and
densities .05, .1, .2 and .5 to fit on, and everything else, 256K and the whole sparse call among it, to test on.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost_model import CostGrid
from benchmarks.cost_model import grid as cost_cells
from benchmarks.lib import precompile, records
from sparsify.commands.bench.tables import kind
from sparsify.commands.calibrate import fit
from sparsify.costs import profile, profile_cache
from sparsify.costs.device import Device
from sparsify.costs.profile import Profile
from sparsify.costs.samples import Sample, Workload, predict

CLOSE = 1.05  # a choice within this of the best one counts as right
_HELD_BYTES = 40 << 30  # of the allocator, before it gives back what graphs needed


# -- measuring -----------------------------------------------------------------------------------------------------------------------------


def compile_kernels(options: argparse.Namespace) -> None:
    """Every kernel of the grid into Triton's cache; a job that fails or takes too long is told and left."""
    count = len(_jobs(options))
    base = [sys.executable, "-m", "benchmarks.cost_model.run", "measure", "--only", *options.only, "--warm"]
    precompile.compile_side_by_side({f"job {job}": [*base, str(job)] for job in range(count)}, options.compile_seconds)


def _jobs(options: argparse.Namespace) -> list[list[Workload]]:
    return cost_cells.compile_jobs(cost_cells.grid(options.device, only=options.only))


@torch.no_grad()
def warm(options: argparse.Namespace) -> None:
    from sparsify.commands.calibrate import timing

    torch.set_num_threads(1)
    for cell in _jobs(options)[options.warm]:
        timing.prepare(cell, options.device).run()
    torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> int:
    """Appends the ceilings and a record for each cell; a cell that fails is recorded with its error."""
    began = time.monotonic()
    if options.device == "cuda" and not options.small and not options.compiled:
        compile_kernels(options)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    from sparsify.commands.calibrate import timing

    end = time.monotonic() + options.seconds
    found = timing.ceilings(options.device, small=options.device != "cuda")
    facts = {"device": profile_cache.identity(options.device).device}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"processors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        facts |= {"capability": [properties.major, properties.minor]}
    run = records.append(options.out, CostGrid(part="ceilings", only=options.only or None, **found, **facts))["time"]
    print({name: f"{value:.4g}" for name, value in found.items()}, flush=True)
    cells = cost_cells.grid(options.device, options.small, options.only)
    failed = 0
    gc.freeze()  # each graph's capture collects garbage: what is here by now is none
    for done, cell in enumerate(cells):
        if time.monotonic() > end:
            print(f"out of time: {len(cells) - done} of {len(cells)} cells left out", flush=True)
            break
        failed += _one(cell, run, options)
    print(f"{time.monotonic() - began:.0f} s, {failed} cells failed", flush=True)
    return 0


def _one(cell: Workload, run: str, options: argparse.Namespace) -> int:
    from sparsify.commands.calibrate import timing

    try:
        sample = timing.measure(cell, options.device)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{cell.as_record()}: {message}", flush=True)
        records.append(options.out, CostGrid(part="cell", run=run, cell=cell.as_record(), error=message))
        return 1
    finally:
        if options.device == "cuda" and torch.cuda.memory_reserved() > _HELD_BYTES:
            torch.cuda.empty_cache()
    values = {"seconds": sample.seconds, "asked": cell.density}
    records.append(options.out, CostGrid(part="cell", run=run, cell=sample.workload.as_record(), **values))
    return 0


# -- fitting -------------------------------------------------------------------------------------------------------------------------------


def newest_run(found: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[Sample, bool]]] | None:
    """The newest run among records: its ceilings, and its samples with whether they are for fitting. None without one.

    That is the newest run of the whole grid, with cells that later runs of parts measured again on the same device; where there is no whole
    one, the newest of all.
    """
    found = kind(found, CostGrid)
    runs = sorted((record for record in found if record["part"] == "ceilings"), key=lambda record: record["time"])
    if not runs:
        return None
    newest = next((record for record in reversed(runs) if not record.get("only")), runs[-1])
    taken = {one["time"] for one in runs if one["time"] >= newest["time"] and one["device"] == newest["device"]}
    samples: dict[Workload, tuple[Sample, bool]] = {}
    for record in sorted((one for one in found if one["part"] == "cell" and one["run"] in taken), key=lambda one: one["run"]):
        cell, asked = Workload.from_record(record["cell"]), record.get("asked")
        if "seconds" in record:
            samples[cost_cells.identity(cell, asked)] = Sample(cell, record["seconds"]), cost_cells.fitted(cell, asked)
    return newest, list(samples.values())


def profile_of(ceilings: dict[str, Any], samples: Sequence[Sample]) -> Profile:
    """The profile of the device that a run was on, fitted to samples."""
    capability = tuple(ceilings["capability"]) if ceilings.get("capability") else None
    prior = profile.for_capability(capability) if capability else profile.shipped("cpu")
    machine = ceilings["machine"]
    numbers = {name: ceilings[name] for name in ("flops", "bandwidth", "launch")}
    numbers |= {name: ceilings[name] for name in ("processors", "l2_bytes") if name in ceilings}
    versions = {name: str(machine[name]) for name in ("driver", "torch", "triton", "sparsify") if machine.get(name)}
    found = prior.model_copy(
        # no earlier coefficients, which other runs' cells were fitted to: what is tested on must not be known
        update={
            "families": {},
            **numbers,
            "device": ceilings["device"],
            "capability": capability,
            "measured": True,
            "source": _source(ceilings),
            "versions": versions,
        }
    )
    return fit.fit(samples, Device.from_profile("cuda" if capability else "cpu", found), found)


def fit_onto(base: Profile, families: Collection[str], newest: dict[str, Any], samples: Sequence[Sample]) -> Profile:
    """`base` with some families fitted to samples in terms of its ceilings, from nothing; everything else stays.

    Args:
        newest: the record that began the run whose samples the families are mostly of.
    """
    of_families = [sample for sample in samples if {one.family for one in sample.workload.works()} <= {*families}]
    kept = {name: found for name, found in base.families.items() if name not in families}
    source = f"{base.source}; {', '.join(families)}: {_source(newest)}"
    found = base.model_copy(update={"families": kept, "source": source})
    return fit.fit(of_families, Device.from_profile("cuda" if base.capability else "cpu", found), found)


def _source(began: dict[str, Any]) -> str:
    return f"benchmarks/cost_model/run.py, {began['time'][:10]}, commit {str(began['machine'].get('commit'))[:10]}"


def errors(samples: Iterable[Sample], device: Device) -> list[tuple[Sample, float]]:
    """Each sample with its relative error, positive where the model says too much."""
    return [(sample, predict(sample.workload, device) / sample.seconds - 1) for sample in samples]


def grouped(found: Iterable[tuple[Sample, float]]) -> dict[str, list[tuple[Sample, float]]]:
    """Samples by family, in order; the whole sparse call is one of its own."""
    groups: dict[str, list[tuple[Sample, float]]] = {}
    for sample, error in found:
        groups.setdefault("whole sparse call" if sample.workload.kind == "whole" else sample.workload.works()[0].family, []).append(
            (sample, error)
        )
    return dict(sorted(groups.items()))


def summary(found: Sequence[tuple[Sample, float]]) -> dict[str, float]:
    sizes = sorted(abs(error) for _, error in found)
    return {
        "cells": len(sizes),
        "median": statistics.median(sizes),
        "p95": sizes[min(len(sizes) - 1, round(0.95 * (len(sizes) - 1)))],
        "most": sizes[-1],
    }


def choices(samples: Sequence[Sample], device: Device) -> list[dict[str, Any]]:
    """For every place where several candidates were measured: which one the model takes, and how much slower it is than the best.

    A place is a prompt or a decode step of one shape; with a sparse method, one density of it. Its candidates are the dense kernels and,
    there, the whole sparse call.
    """
    exact: dict[tuple, list[Sample]] = {}
    places: list[tuple[tuple, list[Sample]]] = []
    for sample in samples:
        cell = sample.workload
        if cell.kind in ("attention", "decode") and cell.density is None and not cell.window and cell.kernel != "masked":
            exact.setdefault(_place(cell), []).append(sample)
    places += [(place, found) for place, found in exact.items() if len(found) > 1]
    for sample in samples:
        if sample.workload.kind == "whole" and _place(sample.workload) in exact:
            places.append(
                ((*_place(sample.workload), sample.workload.stride, sample.workload.density), [*exact[_place(sample.workload)], sample])
            )
    result = []
    for place, candidates in places:
        chosen = min(candidates, key=lambda sample: predict(sample.workload, device))
        best = min(candidates, key=lambda sample: sample.seconds)
        names = [f"{one.workload.kind}/{one.workload.kernel}" for one in (chosen, best)]
        result.append({"place": place, "chosen": names[0], "best": names[1], "ratio": chosen.seconds / best.seconds})
    return result


def _place(cell: Workload) -> tuple:
    return cell.batch, cell.query_heads, cell.kv_heads, cell.head_dim, cell.query_len, cell.key_len


def report(options: argparse.Namespace) -> int:
    """Fits on the fitting part of files, prints the errors on the other one and the choices; returns 0 when they are as asked."""
    found, worst = kind(records.read(options.files), CostGrid), options.worst
    run = newest_run(found)
    if run is None:
        raise SystemExit(f"{', '.join(map(str, options.files))}: no run of {CostGrid.NAME}")
    ceilings, samples = run
    fitted_on = [sample for sample, part in samples if part or options.all]
    if options.onto:
        began = max((record for record in found if record["part"] == "ceilings"), key=lambda record: record["time"])
        fitted = fit_onto(Profile.load(options.onto), options.families, began, fitted_on)
    else:
        fitted = profile_of(ceilings, fitted_on)
    device = Device.from_profile("cuda" if fitted.capability else "cpu", fitted)
    for title, chosen in (("fitted on", True), ("tested on", False)):
        found = errors([sample for sample, part in samples if part == chosen], device)
        for family, of_family in grouped(found).items():
            print(f"{title} {family:16s} {_words(summary(of_family))}")
        if found:
            print(f"{title} {'all':16s} {_words(summary(found))}")
    for sample, error in sorted(errors([s for s, part in samples if not part], device), key=lambda pair: -abs(pair[1]))[:worst]:
        print(f"  {error:+.0%} of {1e3 * sample.seconds:.4g} ms: {sample.workload.as_record()}")
    taken = choices([sample for sample, _ in samples], device)
    right = [one["ratio"] <= CLOSE for one in taken]
    if taken:
        print(f"chosen within {CLOSE - 1:.0%} of the best: {sum(right)} of {len(right)} = {sum(right) / len(right):.1%}")
        for one in sorted(taken, key=lambda one: -one["ratio"])[:worst]:
            print(f"  {one['ratio']:.3f} {one}")
    lists = [one.listed / one.density for one in (sample.workload for sample, _ in samples) if one.listed and one.density]
    if lists:
        print(f"a first stage lists {statistics.median(lists):.2f} blocks for one that is kept, {min(lists):.2f} to {max(lists):.2f}")
    for family, numbers in sorted(fitted.families.items()):
        print(f"{family}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    if options.save:
        options.save.write_text(fitted.to_json())
    return 0


def _words(found: dict[str, float]) -> str:
    return f"{found['cells']:4d} cells: median {found['median']:.1%}, 95th percentile {found['p95']:.1%}, most {found['most']:.1%}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    measured = parts.add_parser("measure", help="on one GPU")
    measured.add_argument("--out", type=Path, default=records.RESULTS / "cost_grid.jsonl", help="append records here")
    measured.add_argument("--seconds", type=float, default=110, help="stop starting cells after so long, compilation not counted")
    measured.add_argument("--compile-seconds", type=float, default=90, help="kill what still compiles after so long")
    measured.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    measured.add_argument("--small", action="store_true", help="a few small cells")
    measured.add_argument("--only", nargs="*", choices=[*cost_cells.PARTS], default=[], help="parts of the grid")
    measured.add_argument("--compile-only", action="store_true", help="fill Triton's cache and measure nothing")
    measured.add_argument("--compiled", action="store_true", help="kernels are in Triton's cache already")
    measured.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    fitting = parts.add_parser("fit", help="offline, from the records of a run")
    fitting.add_argument("files", type=Path, nargs="*", default=[records.RESULTS / "cost_grid.jsonl"])
    fitting.add_argument("--save", type=Path, help="write the fitted profile as JSON")
    fitting.add_argument("--onto", type=Path, help="a profile of which --families are fitted anew, and nothing else changes")
    fitting.add_argument("--families", nargs="+", default=[], help="with --onto")
    fitting.add_argument("--all", action="store_true", help="fit on every cell, for a profile to ship; the errors then say nothing")
    fitting.add_argument("--worst", type=int, default=12, help="cells to list")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.part == "fit":
        return report(options)
    if options.warm is not None:
        warm(options)
        return 0
    if options.compile_only:
        compile_kernels(options)
        return 0
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
