"""The masks of random attention programs: clauses in many spellings, joined, edited, and turned into what scores take."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st


@dataclass
class Build:
    """A program in the making: sizes, graph inputs by name, lines of the mask and of the body."""

    sizes: dict[str, int]
    dtype: str
    written: bool  # as matmul, softmax, matmul; else one SDPA call
    inputs: dict[str, str] = field(default_factory=dict)
    mask: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)  # of the SDPA call
    sdpa: int = 0
    offset: str = "K - Q"
    symbols: str = "B, Q, K = query.shape[0], query.shape[2], key.shape[2]"  # sizes read off the graph inputs

    @property
    def square(self) -> bool:
        return self.sizes["Q"] == self.sizes["K"]

    @property
    def grouped(self) -> bool:
        return self.sizes["G"] > 1


def pick(draw, *options):
    return draw(st.sampled_from(options))


def rarely(draw, chance: int = 8) -> bool:
    return draw(st.integers(0, chance - 1)) == chance - 1


def positions(draw, build: Build) -> None:
    choices = [build.offset] * 4 + ["0", "1"] + (["K - Q"] if build.sizes["K"] >= build.sizes["Q"] else [])
    build.offset = pick(draw, *choices)
    build.mask += [f"q, k = torch.arange(Q)[:, None] + {build.offset}, torch.arange(K)[None]"]


def mask(draw, build: Build) -> str:
    """Writes `masks(...)` and says how the mask reaches the scores: none, is_causal, bool, float or bias."""
    kind = pick(draw, *["bool"] * 4, *["float"] * 2, "is_causal", "none", "bias")
    if kind == "is_causal" and build.written:
        kind = "bool"
    if kind in ("none", "is_causal"):
        build.mask = []
        if kind == "is_causal":
            build.arguments["is_causal"] = "True"
        return kind
    count = draw(st.integers(1, 3))
    text = _clause(draw, build)
    for _ in range(count - 1):
        text = f"({text}) {pick(draw, *['&'] * 8, '|', '^')} ({_clause(draw, build)})"
    build.mask.append(f"mask = {text}" if not rarely(draw, 12) else f"mask = ~({text})")
    if rarely(draw, 6):
        build.mask.append(pick(draw, *_EDITS))
    if draw(st.booleans()):
        build.mask.append(pick(draw, "mask = mask.expand(B, 1, Q, K)", "mask = mask.expand(B, H * G, Q, K)"))
    low = pick(draw, *["torch.finfo(DTYPE).min", "float('-inf')"] * 4, "-1e9", "-10000.0")
    if kind == "float":
        forms = (
            "mask = torch.where(mask, 0.0, {low}).to(DTYPE)",
            "mask = torch.zeros(Q, K, dtype=DTYPE).masked_fill(~mask, {low})",
            "mask = (1.0 - mask.to(DTYPE)) * {low}",
        )
        form = pick(draw, *(forms[:2] if low == "float('-inf')" else forms))
        build.body.append(form.format(low=low))
    if kind == "bias":
        shape = pick(draw, "B, 1, Q, K", "H * G, Q, K", "Q, K")
        build.inputs["bias"] = f"draw({shape})"
        build.body.append(
            pick(draw, "mask = torch.where(mask, bias, float('-inf'))", "mask = bias.masked_fill(~mask, torch.finfo(DTYPE).min)")
        )
    return kind


_EDITS = (
    "mask = mask.clone(); mask[..., 0] = True",
    "mask = mask.clone(); mask[..., -1:, :] = True",
    "mask = mask.clone(); mask.logical_not_().logical_not_()",
    "mask = mask | (q == k)",
    "mask = mask & mask.any(-1, keepdim=True)",
    "mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)",
)


def _clause(draw, build: Build) -> str:
    readable = ["causal", "window", "padding", "documents", "packed"]
    name = pick(draw, "causal", *readable * 2, "prefix", "chunk", "random", "length", "head", "row")
    return _CLAUSES[name](draw, build)


def _causal(draw, build: Build) -> str:
    forms = ["k <= q", "q >= k", "~(k > q)", "(k - q) <= 0", "k < q + 1", "k <= q + 1", "k < q"]
    if build.offset != "start":
        o = build.offset
        forms += [
            f"torch.ones(Q, K, dtype=torch.bool).tril({o})",
            f"torch.ones(Q, K).triu({o} + 1) == 0",
            f"torch.ones(Q, K).tril({o}) > 0",
        ]
    return pick(draw, *forms)


def _window(draw, build: Build) -> str:
    width = draw(st.integers(1, 9))
    text = pick(draw, "k > q - {w}", "(q - k) < {w}", "~(k <= q - {w})", "(q - k).abs() < {w}", "(k > q - {w}) & (k < q + {w})")
    return text.format(w=width)


def _padding(draw, build: Build) -> str:
    build.inputs["keep"] = pick(draw, "(whole(4, B, K) > 0).long()", "torch.arange(K) + whole(3, B, 1) >= 2", "whole(3, B, K)")
    forms = ["keep[:, None, None, :] != 0", "keep.bool()[:, None, None]", "keep[:, None, None, :].to(torch.bool)", "keep.bool()[b, k]"]
    return pick(draw, *forms, "keep[:, None, None, :] == 1", "keep[:1, None, None, :].bool()", "keep[:, None, None, :] > 0")


def _documents(draw, build: Build) -> str:
    build.inputs["documents"] = pick(draw, "whole(2, B, K).cumsum(-1)", "whole(2, B, K)")
    square = ["documents[:, None, None, :] == documents[:, None, :, None]"] if build.square else []
    offset = ["documents[b, q] == documents[b, k]"] if _inside(build) else []
    return pick(draw, *square, *offset) if square or offset else "documents[:, None, None, :] == 0"


def _packed(draw, build: Build) -> str:
    """Document borders found in position ids, as transformers does for packed sequences."""
    if not build.square:
        return _causal(draw, build)
    build.inputs["positions"] = pick(draw, "torch.arange(K).expand(B, K) % 3", "torch.arange(K).expand(B, K).clone()", "whole(3, B, K)")
    runs = "(torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)"
    if build.mask[-1] != f"runs = {runs}":
        build.mask.append(f"runs = {runs}")
    places = "positions[:, None, None, :] <= positions[:, None, :, None]"
    same = pick(draw, "runs[b, q] == runs[b, k]", "runs[:, None, None, :] == runs[:, None, :, None]")
    return pick(draw, same, f"({same}) & ({places})", f"({same}) & (k <= q)", places)


def _random(draw, build: Build) -> str:
    shape = pick(draw, "B, 1, Q, K", "B, H * G, Q, K", "Q, K")
    build.inputs["noise"] = f"whole(4, {shape}) > 0"
    return "noise"


def _row(draw, build: Build) -> str:
    return pick(draw, "q > 1", "q % 2 == 0", "(q + k) % 2 == 0", "b > 0", "(b + k) > 0")


_CLAUSES = {
    "causal": _causal,
    "window": _window,
    "padding": _padding,
    "documents": _documents,
    "packed": _packed,
    "prefix": lambda draw, build: f"(k <= q) | (k < {draw(st.integers(1, 4))})",
    "chunk": lambda draw, build: f"(k // {draw(st.integers(1, 4))}) == (q // {draw(st.integers(1, 4))})",
    "random": _random,
    "length": lambda draw, build: pick(draw, "k < {n}", "k >= {n}", "k < K", "k < K - 1").format(n=draw(st.integers(0, 5))),
    "head": lambda draw, build: pick(draw, "(h >= 0) & (k <= q)", "(h == 0) | (k <= q)", "k <= q + h"),
    "row": _row,
}


def _inside(build: Build) -> bool:
    """Whether every query position is a key position."""
    first = {"K - Q": build.sizes["K"] - build.sizes["Q"], "0": 0, "1": 1, "start": max(0, build.sizes["K"] - build.sizes["Q"] - 1)}
    return first[build.offset] >= 0 and first[build.offset] + build.sizes["Q"] <= build.sizes["K"]
