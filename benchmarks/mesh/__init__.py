"""What several GPUs give: a prompt that they share (context parallelism), and tokens of a model that they share (tensor parallelism)."""

from dataclasses import dataclass

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class Mesh(Record):
    """One measurement on some GPUs of one host."""

    NAME = "mesh"
    KEYS = ("part", "variant", "shape", "layers", "length", "gpus", "requested_density")
    part: str  # prefill, ring (one layer's dense attention), sums (one sum over the GPUs) or decode
    variant: str
    shape: str  # of benchmarks.lib.models
    layers: int
    length: int  # tokens: of the prompt, before the generated ones, or whose rows are summed
    gpus: int
    requested_density: float | None = None  # share of the causal blocks; None: all
    ms: float | None = None  # of the prompt, the layer, the sum, or a token; of the slowest process, median
    times_ms: list[float] | None = None
    first_call_ms: float | None = None  # compilation included
    density: float | None = None  # visited share of the causal blocks of the first process's rows
    sent_bytes: dict[str, int] | None = None  # of all processes together, by what it was, in one call
    ring_bytes: int | None = None  # that dense attention around a ring sends for such a prompt, all processes together, by arithmetic
    sums: str | None = None  # how sums over the GPUs were made, as plans say it
    peak_bytes: int | None = None  # most device memory of a process
    same_token: bool | None = None  # whether the likeliest token after the prompt is that of one GPU
    error: str | None = None
