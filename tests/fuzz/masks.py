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
    broadcast: bool = False  # one key head for all query heads, by the product
    odd: bool = False  # q is no longer the row plus an offset, or no valid index
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


def tamper(draw, build: Build, point: str, names: list[str]) -> None:
    """Now and then writes to a tensor in place."""
    if not rarely(draw, 14):
        return
    known = "\n".join(build.body + build.mask)
    names = [n for n in names if n in build.inputs or f"{n} =" in known or f"{n}," in known]
    if not names:
        return
    name = pick(draw, *names)
    whole = name in ("keep", "documents", "mask")
    build.body.append(
        f"{name}[..., :1] = {1 if whole else 0.5}  # {point}" if whole or draw(st.booleans()) else f"{name}.mul_(2.0)  # {point}"
    )


_PLACES = (
    "torch.arange({o}, {o} + Q)[:, None]",
    "torch.arange({o}, end={o} + Q)[:, None]",
    "torch.arange(end={o} + Q, start={o}).unsqueeze(-1)",
    "torch.arange({o}, {o} + 3 * Q, 3).view(Q, 1)",
    "(torch.arange({o}, {o} + 2 * Q, step=2) - torch.arange(Q))[:, None]",
    "torch.arange(Q, dtype=torch.int32)[:, None] + {o}",
    "torch.arange(Q).view(Q, 1).add({o})",
    "torch.arange(0.5, Q + 0.5, dtype=torch.int64)[:, None] + {o}",
    "(torch.arange(0.5, Q + 0.5, dtype=torch.int64) + torch.tensor(1.5, dtype=torch.int64))[:, None] + {o}",
    "torch.arange(0, Q + 0.9, 1.0).long()[:Q, None] + {o}",
    "torch.arange(Q)[:, None] + torch.full((), 1.7, dtype=torch.int64) + {o}",
    "torch.arange(Q)[:, None] + torch.full((1, 1), -1.5, dtype=torch.int32) + {o}",
    "torch.arange(Q)[:, None] + {o} + torch.tensor(True, dtype=torch.int64)",
    "(torch.ones(Q, dtype=torch.int64).cumsum(0) - 1)[:, None] + {o}",
    "(torch.ones(Q, dtype=torch.int32).cumsum(0, dtype=torch.int32) - 1)[:, None] + {o}",
    "(torch.arange(Q, dtype=torch.int32) + 2147483647)[:, None] + {o}",
    "(torch.arange(Q) * 4294967296)[:, None].int() + {o}",
    "torch.rsub(torch.arange(Q), Q - 1).flip(0)[:, None] + {o}",
    "torch.sub(torch.arange(Q)[:, None], -1, alpha=2) + {o}",
    "torch.arange(2 * Q, dtype=torch.int32).view(torch.int64)[:, None] + {o}",
    "torch.arange(Q).view(torch.int32)[::2, None] + {o}",
    "-(-torch.arange(Q))[:, None] + {o}",
    "torch.arange(Q, dtype=torch.int16)[:, None].long() + {o}",
    "torch.arange(Q, dtype=torch.uint8)[:, None] - 3 + {o}",
    "torch.arange(Q, dtype=torch.float32)[:, None] + {o}",
    "torch.arange(Q, dtype=torch.float16)[:, None] + 2048 + {o}",
)


def positions(draw, build: Build) -> None:
    choices = [build.offset] * 4 + ["0", "1"] + (["K - Q"] if build.sizes["K"] >= build.sizes["Q"] else [])
    build.offset = pick(draw, *choices)
    usual = "torch.arange(Q)[:, None] + {o}"
    text = usual if not rarely(draw, 8) else pick(draw, *(_PLACES if build.offset != "start" else _PLACES[5:]))
    build.odd = text != usual
    build.mask += [f"q, k = {text.format(o=build.offset)}, torch.arange(K)[None]"]


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
    if rarely(draw, 12):
        build.arguments["is_causal"] = "True"  # beside a mask
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
        shape = pick(draw, "B, 1, Q, K", "H * G, Q, K", "Q, K", "B, 1, 1, K", "1, K", "B, 1, Q, 1", "H * G, 1, 1", "1, 1")
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
    odd = ("prefix", "chunk", "random", "length", "head", "row", "shifted", "integers", "triangle", "left")
    name = pick(draw, "causal", *readable * 5, *odd)
    return _CLAUSES[name](draw, build)


def _causal(draw, build: Build) -> str:
    forms = ["k <= q", "q >= k", "~(k > q)", "(k - q) <= 0", "k < q + 1", "k <= q + 1", "k < q"]
    if build.offset != "start" and not build.odd:
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
    spread = "runs[:, None, None, :] == runs[:, None, :, None]"
    same = spread if build.odd else pick(draw, "runs[b, q] == runs[b, k]", spread)
    return pick(draw, same, f"({same}) & ({places})", f"({same}) & (k <= q)", places)


def _random(draw, build: Build) -> str:
    shape = pick(draw, "B, 1, Q, K", "B, H * G, Q, K", "Q, K")
    build.inputs["noise"] = f"whole(4, {shape}) > 0"
    return "noise"


def _row(draw, build: Build) -> str:
    return pick(draw, "q > 1", "q % 2 == 0", "(q + k) % 2 == 0", "b > 0", "(b + k) > 0")


_SHIFTED = (
    "k <= q + s",
    "k <= q - s",
    "(k - q - s).abs() < 5",
    "(k - q + s).abs() < {n}",
    "k > q - s",
    "(k - q < s) & (k - q > -s)",
    "k < s",
    "(k <= q) & (k - q > {n} - s)",
    "(k <= q) & ((k - q - s).abs() < 5)",
    "(k - q <= s) & (k - q > s - {n})",
)


def _shifted(draw, build: Build) -> str:
    """A shift that is a symbolic size."""
    build.inputs["spare"] = "torch.zeros(" + pick(draw, "2", "3", "5") + ")"
    return pick(draw, *_SHIFTED).format(n=draw(st.integers(1, 6)))


_INTEGERS = (
    "(k.int() + 2147483647) > 0",
    "(k.int() * 1073741824) <= q",
    "(k * 9223372036854775807) <= q",
    "k <= q.to(torch.int32) + torch.tensor(1.9, dtype=torch.int32)",
    "k < torch.full((Q, 1), 2.9, dtype=torch.int64)",
    "k.float() <= q.float() + 0.5",
    "(k - q).to(torch.int8) <= 0",
    "((k - q) * 64).to(torch.int8) <= 0",
    "(q - k).to(torch.uint8) < 4",
    "(k + 0.5).long() <= q",
    "(k - 0.5).int() <= q - 1",
    "k <= torch.full_like(q, 3.7)",
    "k <= q.new_full((Q, 1), 2.5)",
    "k.add(-1, alpha=2) <= q",
    "torch.sub(q, k, alpha=2) >= 0",
    "(q - k).bool() & (k <= q)",
    "((k <= q).int() * 2).bool()",
    "((k <= q) * 1.5).long() > 0",
    "((k > q).to(torch.float16) * -70000.0) == 0",
    "(k.half() + 2048) <= (q.half() + 2048)",
    "torch.where(k <= q, 1.5, 0.0).to(torch.int64) == 1",
    "torch.where(k <= q, 0.5, 0.0).to(torch.int64) == 1",
    "torch.where(k <= q, k.int(), 2147483647 + k.int()) < K",
    "(k <= q).view(torch.int8) > 0",
    "(k <= q) == torch.ones(Q, K).bool()",
    "torch.zeros(Q, K).bool().masked_fill(k <= q, 0.5)",
    "torch.zeros(Q, K, dtype=torch.int64).masked_fill(k <= q, 3.0) > 2",
    "(torch.arange(K, 0, -1) - 1).flip(0)[None] <= q",
    "torch.arange(K - 1, -1, step=-1)[None] <= q",
    "torch.abs(q - k) <= 2",
    "((q - k).int() * 65536).abs() < 300000",
    "torch.le(k, other=q)",
    "k.le(q).logical_and(other=k > 0)",
    "torch.logical_xor(k <= q, other=k < 1)",
    "torch.ne(k, q) & k.le(q)",
    "torch.cumsum(torch.ones(Q, K), dim=-1) <= q + 1",
    "torch.cumsum(torch.ones(Q, K, dtype=torch.bool), 1) <= q + 1",
    "torch.cumsum(torch.ones(Q, K, dtype=torch.int64), 0) > k",
)


def _integers(draw, build: Build) -> str:
    """Dtypes, fractions, overflow and odd spellings."""
    return pick(draw, *_INTEGERS)


_TRIANGLES = (
    "torch.tril(input=torch.ones(Q, K, dtype=torch.bool))",
    "torch.tril(torch.ones(Q, K, dtype=torch.bool), diagonal=K - Q)",
    "torch.triu(diagonal=-2, input=torch.ones(Q, K)).bool()",
    "torch.ones(K, Q, dtype=torch.bool).triu().transpose(0, 1)",
    "torch.ones(K, Q, dtype=torch.bool).triu().transpose(dim0=-1, dim1=-2)",
    "torch.ones(K, Q, dtype=torch.bool).triu(1).T.logical_not()",
    "torch.ones(K, Q).tril(-1).mT == 0",
    "torch.ones(K + 2, K + 2, dtype=torch.bool).tril()[K - Q + 1:K + 1, :K]",
    "torch.ones(K + 1, K + 1, dtype=torch.bool).tril()[-Q - 1:-1, :-1]",
    "torch.ones(Q + K, Q + K, dtype=torch.bool).tril().narrow(0, K, Q).narrow(dim=-1, start=0, length=K)",
    "torch.ones(Q + K, Q + K, dtype=torch.bool).tril().narrow(-2, -Q, Q)[:, :K]",
    "torch.ones(3, Q, K, dtype=torch.bool).tril().select(0, -1)",
    "torch.ones(Q, 3, K, dtype=torch.bool).tril().select(dim=-2, index=1)",
    "torch.full((Q, K), True).tril(diagonal=-1)",
    "torch.full((Q, K), 2.0).triu(1).to(torch.int32) == 0",
    "torch.zeros(1, 1, Q, K).add(1).tril().squeeze(0).squeeze(dim=0) > 0",
    "torch.ones(Q * K, dtype=torch.bool).view(Q, K).tril()",
    "torch.ones(Q, 1, K, dtype=torch.bool).tril().flatten(0, 1)",
    "torch.arange(Q * K).view(Q, K) % K <= q",
    "torch.ones(Q, K, dtype=torch.bool).tril()[..., torch.arange(K)]",
    "torch.ones(Q, K, dtype=torch.bool).tril()[torch.arange(Q)[:, None], torch.arange(K) - 1]",
    "torch.ones(Q, K, dtype=torch.bool).tril_()",
)


def _left(draw, build: Build) -> str:
    """Left padding: with a causal mask, whole rows see no key."""
    build.inputs["keep"] = pick(draw, "(torch.arange(K) >= whole(K, B, 1)).long()", "(torch.arange(K) >= whole(K, B, 1)).to(torch.int32)")
    return pick(draw, "(keep[:, None, None, :] != 0) & (k <= q)", "keep.bool()[:, None, None] & (k <= q)", "keep[:, None, None].bool()")


_CLAUSES = {
    "shifted": _shifted,
    "integers": _integers,
    "triangle": lambda draw, build: pick(draw, *_TRIANGLES),
    "left": _left,
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
    if build.odd:
        return False
    first = {"K - Q": build.sizes["K"] - build.sizes["Q"], "0": 0, "1": 1, "start": max(0, build.sizes["K"] - build.sizes["Q"] - 1)}
    return first[build.offset] >= 0 and first[build.offset] + build.sizes["Q"] <= build.sizes["K"]
