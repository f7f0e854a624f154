"""A SparseCache in a file: safetensors, which run no code when they are read, with a header that says what the tensors belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from sparsify import folders
from sparsify.errors import CacheError
from sparsify.generation.caches import tensor_files
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.caches.tensor_files import TensorFile
from sparsify.ops import quantised
from sparsify.ops.pages import Pages
from sparsify.planning.provenance import model_digest, model_kind, other_model, unwrapped
from sparsify.policies import Layout

# raised with every change that an older sparsify would misread
FORMAT = 3
# before, 4-bit codes lay in another order; all else is read
_OLDER = 2
_HEADER = "sparsify_cache"
# in this order along dimension 2, of which layers that grow save what is used
_BY_SLOT = ("keys", "values", "positions")
_BY_ROW = ("counts", "seen", "length")


class LayerHeader(BaseModel):
    """layout: how the slots are used; None where a budget given as a share waits for the first call.

    started: whether a call has been stored. slots: of the file's tensors; None where nothing was allocated.

    left_out, fixed, final, told: as the layer has them, written where they are not what they begin with.

    logits: scale and softcap of its attention, by which a policy that selects anew weighs keys before the next call says them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    layout: dict[str, Any] | None
    started: bool
    slots: int | None
    left_out: int = 0
    fixed: int = 0
    final: bool = False
    told: bool = True
    logits: tuple[float, float] | None = None


class Header(BaseModel):
    """format: of the file. model: digest of configuration and weights. model_type: for messages.

    policy: as `Policy.describe` writes it. budget: tokens, or a share of the first call's. every: tokens beside it, 0 for none. read: as
    `Pages` writes itself, empty for everything. codes: "fp8", "int4", or "" for keys and values as they came. draft: as `read`, of drafted
    tokens; draft_tokens: how many of them, None for as many as pay.

    offloading: keys and values lie in the host's memory. versions: of what wrote the file.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    format: int
    model: str
    model_type: str
    policy: str
    budget: int | float | None
    every: int
    read: str = ""
    codes: str = ""
    draft: str = ""
    draft_tokens: int | None = None
    offloading: bool = False
    layers: list[LayerHeader]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class How:
    """What a SparseCache was made with. policy: as `Policy.describe` writes it. codes: the dtype, where that is a text."""

    policy: str
    budget: int | float | None
    every: int
    read: Pages | None
    codes: str
    draft: Pages | None
    draft_tokens: int | None
    offloading: bool

    @classmethod
    def of(cls, header: Header) -> How:
        pages = [Pages.parse(text) if text else None for text in (header.read, header.draft)]
        return cls(header.policy, header.budget, header.every, pages[0], header.codes, pages[1], header.draft_tokens, header.offloading)


def write(path: Path, layers: list[SparseLayer], how: How, model: Any) -> None:
    """Writes layers of one cache, all of them between two calls.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    described = []
    for layer in layers:
        slots = None
        if layer.is_initialized:
            slots = min(layer.fullest(), layer.keys.shape[2]) if layer.grows else layer.keys.shape[2]
            for name in _BY_SLOT:
                tensors[f"{layer.index}.{name}"] = layer.at_rest(name)[:, :, :slots]
            for name in (*_BY_ROW, *_prepared(layer)):
                tensors[f"{layer.index}.{name}"] = getattr(layer, name)
            tensors |= {f"{layer.index}.{name}": held for name, held in (*layer.known(), *_coded(layer, slots).items())}
        layout = None if layer.layout is None else dataclasses.asdict(layer.layout)
        described.append(
            LayerHeader(
                layout=layout,
                started=layer.started,
                slots=slots,
                left_out=layer.left_out,
                fixed=layer.fixed,
                final=layer.final,
                told=layer.told,
                logits=layer.logits if layer.every else None,
            )
        )
    model = unwrapped(model)
    header = Header(
        format=FORMAT,
        model=model_digest(model),
        model_type=model_kind(model),
        policy=how.policy,
        budget=how.budget,
        read="" if how.read is None else str(how.read),
        codes=how.codes,
        draft="" if how.draft is None else str(how.draft),
        draft_tokens=how.draft_tokens,
        offloading=how.offloading,
        every=how.every,
        layers=described,
        versions={"torch": torch.__version__},
    )
    with folders.replacing(path) as temporary:
        tensor_files.write(temporary, tensors, {_HEADER: header.model_dump_json(exclude_defaults=True)})


def read_header(path: Path, model: Any) -> tuple[Header, TensorFile]:
    """The header of a file that `write` wrote for this very model, and the file.

    Raises:
        CacheError: it is no such file, is damaged, was written by a newer sparsify or for another model.
        OSError: the file cannot be read.
    """
    try:
        file = TensorFile.open(path)
    except SafetensorError as error:
        raise CacheError(f"not a file that a SparseCache was saved to, or damaged: {error}", where=str(path)) from error
    text = file.metadata.get(_HEADER)
    if text is None:
        raise CacheError("no SparseCache was saved to this file", where=str(path))
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        hint = "it may come from a newer sparsify: save the cache anew"
        raise CacheError(f"its header is not read: {error.errors()[0]['msg']}", where=str(path), hint=hint) from error
    if header.format != FORMAT and (header.format != _OLDER or header.codes == "int4"):
        what = f"format {header.format} is not read{' where it has 4-bit codes' if header.format == _OLDER else ''}, but {FORMAT}"
        raise CacheError(what, where=str(path), hint="save the cache anew")
    if what := other_model(header.model, header.model_type, unwrapped(model)):
        hint = "its keys mean nothing to another model: compute the prompt again"
        raise CacheError(f"the cache was saved for another model: for a {header.model_type}, and {what}", where=str(path), hint=hint)
    return header, file


def fill(file: TensorFile, header: Header, layers: list[SparseLayer], device: torch.device | str) -> None:
    """Puts what a file holds into the layers of a new cache, on `device`.

    Raises:
        CacheError: the file's tensors are not what its header says.
        OSError: the file cannot be read.
    """
    wanted: list[tuple[str, Tensor]] = []
    for layer, described in zip(layers, header.layers, strict=True):
        layer.layout = None if described.layout is None else Layout(**described.layout)
        layer.started, layer.told = described.started, described.told
        layer.left_out, layer.fixed = described.left_out, described.fixed
        if described.logits is not None:
            layer.logits = described.logits
        elif described.started and layer.every and layer.observes and not described.final:
            what = "it does not say how the layer's logits are scaled, by which the policy selects"
            raise CacheError(what, where=f"{file.path}, layer {layer.index}", hint="an older sparsify wrote it: save the cache anew")
        if described.slots is not None:
            wanted += _allocated(file, layer, described, described.slots, device)
    try:
        file.read(wanted)
    except SafetensorError as error:
        raise CacheError(f"a tensor is not what the header says: {error}", where=str(file.path)) from error
    for layer, described in zip(layers, header.layers, strict=True):
        if described.slots is None:
            continue
        if described.final:
            layer.finish()
        if layer.offloader is not None:
            layer.offloader.refilled(layer)
        with layer.present():
            layer.renew_bounds()
        layer.used = None  # only the device knows, until the next call asks


def _allocated(
    file: TensorFile, layer: SparseLayer, described: LayerHeader, slots: int, device: torch.device | str
) -> list[tuple[str, Tensor]]:
    """Allocates a layer; the file's tensors by name, and what they are to fill.

    Raises:
        CacheError: a tensor is missing, or of another shape.
    """
    where, of = f"{file.path}, layer {layer.index}", lambda name: file.entry(f"{layer.index}.{name}")
    final = ["prepared"] if described.final else []
    try:
        shapes = {name: of(name).shape for name in (*_BY_SLOT, *_BY_ROW, *final)}
        examples = [of(name) for name in (("recent_keys", "recent_values") if layer.codes else ("keys", "values"))]
        prepared = file.tensor(f"{layer.index}.prepared") if described.final else None
    except SafetensorError as error:
        raise CacheError(f"a tensor is missing: {error}", where=where) from error
    _check_shapes(shapes, slots, where)
    if prepared is not None and not bool(((prepared >= 0) & (prepared <= slots)).all()):
        raise CacheError("more lies in clusters than there are slots", where=where)
    if any(len(example.shape) != 4 for example in examples):
        raise CacheError("tokens that lie as they came have another shape", where=where)
    key, value = (torch.empty(*one.shape[:2], 0, one.shape[3], dtype=one.dtype, device=device) for one in examples)
    layer.allocate(key, value, slots)
    to = [(name, layer.at_rest(name)[:, :, :slots]) for name in _BY_SLOT]
    to += [(name, getattr(layer, name)) for name in (*_BY_ROW, *final)]
    to += [*_coded(layer, slots).items(), *([] if described.final else layer.known())]
    for name, tensor in to:
        entry = file.entries.get(f"{layer.index}.{name}")
        if entry is None or (entry.dtype, entry.shape) != (tensor.dtype, tuple(tensor.shape)):
            found = "missing" if entry is None else f"{entry.dtype} {entry.shape}"
            raise CacheError(f"{name} is {found}, not {tensor.dtype} {tuple(tensor.shape)}", where=where)
    return [(f"{layer.index}.{name}", tensor) for name, tensor in to]


def _prepared(layer: SparseLayer) -> list[str]:
    """What is saved of clusters, whose means are computed anew."""
    return ["prepared"] if layer.final and layer.prepared is not None else []


def _coded(layer: SparseLayer, slots: int) -> dict[str, Tensor]:
    """What goes with codes, of so many slots; nothing where keys and values lie as they came."""
    sizes = {"key_scales": quantised.groups(slots), "value_scales": slots} if layer.grows else {}
    return {name: t[:, :, : sizes.get(name)] for name, t in layer.coded().items() if isinstance(t, Tensor)}


def _check_shapes(saved: dict[str, tuple[int, ...]], slots: int, where: str) -> None:
    """Raises CacheError where shapes, by name, do not go together."""
    if any(len(saved[name]) != 4 for name in ("keys", "values")):
        raise CacheError(f"keys are {saved['keys']} and values {saved['values']}", where=where)
    batch, kv_heads = saved["keys"][:2]
    wanted = {
        "keys": (batch, kv_heads, slots, saved["keys"][-1]),
        "values": (batch, kv_heads, slots, saved["values"][-1]),
        "positions": (batch, kv_heads, slots),
        "counts": (batch, kv_heads),
        "seen": (batch,),
        "length": (),
    }
    if "prepared" in saved:
        wanted["prepared"] = (batch, kv_heads)
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise CacheError(f"{name} is {saved[name]}, not {shape}", where=where)
