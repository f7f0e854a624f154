"""Every kind of Hopper kernel compiles for sm_90 without a GPU: warpgroup products, the copy engine, no spills, shared memory that fits."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from sparsify.backends.attention.hopper import choose_tuning, triton_release
from sparsify.backends.attention.hopper_source import DIALECTS, GluonSpec, GluonTuning, arguments, generate
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, _usage


def _spec(head_dim=128, value_dim=None, **clauses):
    value_dim = value_dim or head_dim
    many = any(clauses.get(name) for name in ("key_flags", "segments", "windows"))
    tuning = choose_tuning(head_dim, value_dim, many, False, clauses.get("lists", False), triton_release())
    return GluonSpec(head_dim=head_dim, value_dim=value_dim, tuning=tuning, **clauses)


SPECS = {
    "dense": _spec(),
    "lists": _spec(lists=True),
    "window_sinks": _spec(windows="one", sinks=True),
    "flags_window_lists": _spec(windows="heads", key_flags=True, lists=True),
    "flags_segments": _spec(key_flags=True, segments=True, windows="one", lists=True),
    "logits": _spec(softcap=True, sink_logits=True, start=True, dtype="fp16"),
    "64": _spec(64, lists=True),
    "256": _spec(256),
    "256_128": _spec(256, 128, lists=True),
    "deep": GluonSpec(lists=True, tuning=GluonTuning(output_in_query=True, key_stages=3)),
}
SLOW = ("window_sinks", "flags_segments", "256_128", "deep")


def _signature(spec: GluonSpec, module) -> dict[str, str]:
    """Argument types as Gluon writes them: descriptors with their layout."""
    layout = repr(module.SHARED4.value)
    return {a.name: f"{a.type[:-1]},{layout}>" if a.type.startswith("tensordesc") else a.type for a in arguments(spec)}


@pytest.mark.skipif(triton_release() not in DIALECTS, reason="a Triton that was not tried")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SPECS])
@pytest.mark.samples(2)
def test_compiles_for_hopper(name, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    spec = SPECS[name]
    module = source.load(generate(spec, triton_release()), "gluon_attention")
    signature = _signature(spec, module)
    assert list(signature) == module.attention.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_.startswith("*")}
    built = triton.compile(
        GluonASTSource(module.attention, signature, {}, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168}
    )
    ptx = built.asm["ptx"]
    assert built.metadata.shared <= SHARED_LIMIT[90]
    # with these clauses ptxas keeps a few of a tile's scalars in memory, outside of the loops; Triton 3.9's does so with any
    spilled = 256 if spec.key_flags or spec.segments else 64 if triton_release() >= (3, 9) else 0
    assert _usage(built.asm["cubin"])[1] <= spilled, "registers spill"
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor.4d.shared" in ptx and "cp.async.bulk.tensor.4d.global" in ptx
    moved = set(map(int, re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)))
    assert {spec.tuning.consumer_registers, spec.tuning.producer_registers} <= moved
