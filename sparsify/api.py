"""The public functions `sparsify.compile` and `sparsify.explain`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from sparsify import backend, pipeline, releases
from sparsify.backends import predict
from sparsify.distributed import agreement, shards
from sparsify.distributed.shards import Shard
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.graph import compat, isolated
from sparsify.ops import block_lists, dtensors
from sparsify.ops.block_maps import BlockMap, block_map
from sparsify.ops.selection import observing, piece
from sparsify.planning import misfits, provenance, registry
from sparsify.planning.choose import named_methods
from sparsify.planning.config import config
from sparsify.planning.decision import labels
from sparsify.planning.plan import Plan
from sparsify.planning.saved_plan import SavedPlan, load_saved_plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    whole: bool = False,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> Model:
    """Compiles a model in place and returns it. Calls and `generate()` both use the compiled code.

    Each kind of decoder layer of a transformers model is compiled once and called for all layers of that kind, with sizes that may
    vary. Models, options and calls that do not allow this are captured whole, as by `model.compile(backend="sparsify")`; the reason is
    logged and stands in `Plan.capture`. `generate()` gets an exact cache without copies and one CUDA graph a token, for greedy and sampled
    decoding (docs/generate.md).

    Args:
        model: changed in place.
        mode: mode of torch.compile, such as "reduce-overhead".
        dynamic: as for torch.compile. Sizes of layers vary from the first call on unless it is False.
        fullgraph: as for torch.compile.
        whole: captures the whole model in any case.
        mesh: processes that share a prompt: along its dimension "cp" every prompt is divided, each process is given all of it and returns
            what one process would. What tensor parallelism divides is found from the weights, and needs no mesh.
        options: as in docs/configuration.md, for example `passes=["dense"]` or `xattention={"stride": 16}`.

    Raises:
        ConfigError: unknown or impossible options, or one for a head or layer that fits none of the model's.
        PlanError: the plan file cannot be read, names a method that does not exist, or was made for another model.
        UnsupportedError: `model` is no torch.nn.Module, or the wrapper that torch.compile returns.
        DistributedError: `mesh` has no dimension "cp"; processes that share the model have other options or releases, or do not come here.
    """
    dtensors.register()
    _check_is_model(model, "sparsify.compile")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UnsupportedError("the model is already wrapped by torch.compile", hint="pass the model itself")
    _check_flags({"fullgraph": fullgraph, "whole": whole} | ({} if dynamic is None else {"dynamic": dynamic}), mesh)
    if "options" in options:
        raise ConfigError("unknown key", where="options", hint="give them one by one: sparsify.compile(model, passes=[...])")
    settings = config.load(options, mode=mode, method_models=registry.discover())
    check_settings(model, settings)
    text = None if mesh is None else _shard_of_text(mesh, whole, settings)
    _check_processes(model, settings, text)
    if mode is not None:
        options["mode"] = mode
    if settings.compile_ahead and settings.lower == "inductor":
        for device in {parameter.device for parameter in model.parameters()}:
            predict.start(device, settings.kernels)
    if "transformers" not in sys.modules:
        whole = True
    else:
        _regions().remove(model)
    # the function and not its name, which torch only knows where the distribution is installed
    model.compile(backend=backend.sparsify, options=options or None, dynamic=dynamic, fullgraph=fullgraph)
    if model._compiled_call_impl is not None:
        model._compiled_call_impl = compat.asking_for_hooks(model._compiled_call_impl, model._call_impl, settings.strict or fullgraph)
    if not whole and "transformers" in sys.modules:
        _regions().install(model, settings, options, dynamic, text)
    elif "transformers" in sys.modules:
        _regions().keep_whole(model)
    if "transformers" in sys.modules:
        from sparsify.generation import generate

        generate.install(model, graphs=not settings.inductor_patches().get("triton.cudagraphs"), shown=settings.progress)
    return model


def _check_is_model(model: object, where: str) -> None:
    """Raises UnsupportedError for what is no model."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UnsupportedError(f"{what} is no torch.nn.Module", where=where, hint="give the model that was loaded")


def _check_flags(flags: Mapping[str, object], mesh: object) -> None:
    """Raises ConfigError for what is no boolean, and for a mesh that is none."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"must be a boolean, not {value!r}", where=name)
    if mesh is not None and not hasattr(mesh, "mesh_dim_names"):
        raise ConfigError(f"must be a torch.distributed.device_mesh.DeviceMesh, not {mesh!r}", where="mesh")


def _check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ConfigError for options among the arguments of a model that takes whatever it is given."""
    named = inspect.signature(model.forward).parameters
    for name in inputs:
        if name not in named and name in (*config.SETTINGS, *registry.discover()):
            hint = f"explain(model, ..., options={{{name!r}: ...}})"
            raise ConfigError("is an option, not an argument of the model", where=name, hint=hint)


def _table(options: object) -> Mapping[str, Any]:
    """Options as a table. Raises ConfigError where they are none."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"must be a table, not {options!r}", where="options", hint="options={'passes': [...]}")
    return cast("Mapping[str, Any]", options)


def check_settings(model: nn.Module, settings: config.Config) -> SavedPlan | None:
    """Checks settings and their plan file against the model that they are for.

    Returns:
        the plan of the file; None without one.

    Raises:
        ConfigError: an option for one head or layer fits none of the model's.
        PlanError: the plan file cannot be read, was made for another model, or has such an option.
    """
    saved = load_saved_plan(settings.plan)
    if saved is not None:
        provenance.check_model(saved.plan.provenance, model, saved.where)
    misfits.check_model(settings, saved, getattr(provenance.unwrapped(model), "config", None))
    return saved


def name_model(plan: Plan, model: nn.Module, followed: SavedPlan | None) -> None:
    """Says in a plan which model it was made for, and how what it followed was calibrated."""
    plan.provenance = provenance.provenance_of(model)
    if followed is not None:
        plan.calibration = followed.plan.calibration
        if followed.plan.provenance is not None:  # the weights that were measured with, not those that the model has now
            plan.provenance.weights = followed.plan.provenance.weights


def _shard_of_text(mesh: DeviceMesh, whole: bool, settings: config.Config) -> Shard:
    """This process's share of a text. Raises UnsupportedError where texts cannot be divided."""
    if whole or "transformers" not in sys.modules:
        raise UnsupportedError("prompts are divided among processes where layers are compiled by themselves", where="mesh")
    if across := sorted(name for name, method in named_methods(settings).items() if "stream" in method.kinds):
        raise UnsupportedError(f"{', '.join(across)} chooses among all tokens of a prompt, of which a process has some", where="mesh")
    if settings.objective is not None:
        raise UnsupportedError("an objective compares costs at lengths of which each process has another", where="objective")
    from sparsify.generation.regions import context_parallel

    return context_parallel.shard_of(mesh)


def _check_processes(model: nn.Module, settings: config.Config, text: Shard | None) -> None:
    """Raises DistributedError where processes that share a model's layers or its prompts would compile it differently."""
    for shard in filter(None, (shards.find(model.parameters()), text)):
        facts = {
            "the options": agreement.digest(settings.as_options()),
            "the plan file": agreement.digest(settings.plan and settings.digest()),
        }
        versions = {name: version for name in (releases.DISTRIBUTION, *releases.TESTED) if (version := releases.installed(name))}
        agreement.agree(shard.group, facts | versions, where="sparsify.compile")


def _regions() -> Any:
    from sparsify.generation.regions import regional

    return regional


@contextmanager
def collect_plans() -> Generator[list[Plan]]:
    """Collects the plans of all graphs that are compiled inside the block, in order of compilation."""
    plans: list[Plan] = []
    token = pipeline.collector.set(plans)
    try:
        yield plans
    finally:
        pipeline.collector.reset(token)


@torch.no_grad()
def explain(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **inputs: Any) -> Plan:
    """Shows what sparsify would do with the call `model(*args, **inputs)`, by running it once without Inductor.

    The model and everything compiled before stay as they were.

    Args:
        args: positional arguments of the model's forward.
        options: as in docs/configuration.md.
        inputs: further arguments of the model's forward.

    Returns:
        a plan, which prints as a table and saves as JSON or, under a name that ends in `.html`, as a page; densities and maps of blocks are
        those of this call.

    Raises:
        ConfigError: unknown or impossible options, or one for a head or layer that fits none of the model's, or one among `inputs`.
        PlanError: the plan file cannot be read, names a method that does not exist, or was made for another model.
        UnsupportedError: `model` is no torch.nn.Module.
    """
    _check_is_model(model, "sparsify.explain")
    _check_inputs(model, inputs)
    settings = config.load({**_table(options), "lower": "eager"}, method_models=registry.discover())
    followed = check_settings(model, settings)
    backend = lambda gm, example_inputs: pipeline.compile_graph(gm, example_inputs, settings, settings)
    with isolated.compiled(model.forward, backend) as forward, collect_plans() as plans, _record_maps() as maps, _costs_beside():
        call = forward if "transformers" not in sys.modules else _regions().captured_like(model, settings, forward)
        call(*args, **inputs)
    merged, methods = _merged(plans), registry.discover()
    name_model(merged, model, followed)
    selecting = [
        (label, decision)
        for label, decision in zip(labels(merged.decisions), merged.decisions, strict=True)
        if decision.kind == "attention" and decision.method is not None and methods[decision.method].lists_blocks
    ]
    if len(selecting) == len(maps):  # else a graph ran twice or not to its end, and selections cannot be assigned to sites
        for (label, decision), found in zip(selecting, maps, strict=True):
            decision.realised_density = block_lists.mean_density((sum(one.density) / len(one.density), one.weight) for one in found)
            if len(found) == 1:
                merged.block_maps[label] = found[0]
    return merged


def _merged(plans: list[Plan]) -> Plan:
    """One plan for all graphs of a call, in the order in which layers run."""
    merged = Plan(
        [d for plan in plans for d in plan.decisions],
        fallback="; ".join(dict.fromkeys(plan.fallback for plan in plans if plan.fallback)),
        device=next((plan.device for plan in plans if plan.device), ""),
        capture="; ".join(dict.fromkeys(plan.capture for plan in plans if plan.capture)),
    )
    for part, seconds in ((part, seconds) for plan in plans for part, seconds in plan.beside.items()):
        merged.beside[part] = merged.beside.get(part, 0.0) + seconds
    if all(plan.serves for plan in plans):
        merged.decisions.sort(key=lambda decision: decision.layer or 0)
    return merged


@contextmanager
def _record_maps() -> Generator[list[list[BlockMap]]]:
    """Collects a map of every block selection in the block, in order of execution: several where a site's is made in pieces."""
    maps: list[list[BlockMap]] = []

    def observe(call: block_lists.Listing, counts: torch.Tensor, indices: torch.Tensor) -> None:
        if piece()[0] == 0:
            maps.append([])
        maps[-1].append(block_map(call, counts, indices))

    with observing(observe):
        yield maps


@contextmanager
def _costs_beside() -> Generator[None]:
    """In this block plans tell what their graphs cost beside their sites."""
    token = pipeline.costs_beside.set(True)
    try:
        yield
    finally:
        pipeline.costs_beside.reset(token)


@contextmanager
def record_density() -> Generator[list[float]]:
    """Collects the density (selected share of the causal blocks, 0 to 1) of every block selection in the block, in order of execution.

    Where a prompt is divided among processes it is that of this process's rows, whose chunks count by the blocks that they could visit.
    """
    densities: list[float] = []
    pieces: list[tuple[float, float]] = []

    def observe(call: block_lists.Listing, counts: torch.Tensor, indices: torch.Tensor) -> None:
        number, count = piece()
        if number == 0:
            pieces.clear()
        pieces.append((block_lists.call_density(call, counts), block_lists.possible_blocks(call) * counts[..., 0].numel()))
        if number + 1 == count:
            densities.append(block_lists.mean_density(pieces))

    with observing(observe):
        yield densities
