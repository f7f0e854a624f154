"""Random attention programs as Python source text, so that a failing one is its own repro script.

A program's text defines `inputs()` (seeded tensors by name), `mark(inputs)` (makes sizes symbolic), `visible(inputs)` (which rows see
a key, from the mask that the program itself uses) and `program(**inputs)`. Choices come simplest first, so that hypothesis shrinks
towards plain attention.
"""

from __future__ import annotations

import hashlib
import re
import sys
import textwrap
import types
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from tests.fuzz.around import PLAIN, Around, around
from tests.fuzz.calls import respell
from tests.fuzz.masks import Build, mask, pick, positions, rarely, tamper
from tests.fuzz.scores import attend

_HEADER = '''\
import contextlib

import torch
import torch.nn.functional as F

B, H, G, Q, K, D, V = {B}, {H}, {G}, {Q}, {K}, {D}, {V}  # batch, KV heads, group, lengths, head dims
DTYPE = torch.{dtype}


def inputs(seed={seed}):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DTYPE)
    whole = lambda high, *shape: torch.randint(0, high, shape, generator=generator)
    made = {{
{inputs}
    }}
    for name in {leaves}:
        made[name].requires_grad_()
    return made


@contextlib.contextmanager
def both(one, other):
    with one, other:
        yield


def around():
    """The context of every run."""
    return {context}


def mark(tensors):
    """Sizes that the graph is to hold as symbols."""
    for name, dimensions in {dynamic}.items():
        for dimension in dimensions:
            torch._dynamo.maybe_mark_dynamic(tensors[name], dimension)
    return tensors
'''


@dataclass(frozen=True)
class Program:
    """source: as the module says. sdpa: calls of scaled_dot_product_attention in it. around: as `fuzz_around.Around`."""

    source: str
    sdpa: int
    around: Around = PLAIN

    @property
    def digest(self) -> int:
        return int(hashlib.sha256(self.source.encode()).hexdigest()[:8], 16)

    def __repr__(self) -> str:
        return f"Program(source:\n{textwrap.indent(self.source, '    ')})"

    def load(self) -> dict:
        """The text's names, of a module that can be imported until the next program is loaded: Dynamo of torch 2.11 imports it."""
        module = sys.modules["fuzzed"] = types.ModuleType("fuzzed")
        exec(compile(self.source, "<fuzzed program>", "exec"), vars(module))
        return vars(module)


@st.composite
def programs(draw) -> Program:
    """One or two attentions with everything around them drawn."""
    build = Build(_sizes(draw), pick(draw, *["float32"] * 6, "bfloat16", "float16", "float64"), draw(st.booleans()))
    _operands(draw, build)
    positions(draw, build)
    kind = mask(draw, build)
    tamper(draw, build, "after the mask", ["keep", "documents", "mask"])
    attend(draw, build, kind, "query", "out")
    if build.sizes["D"] == build.sizes["V"] and rarely(draw, 6):  # a second layer over the same keys, values and mask
        attend(draw, build, kind, "out", "second")
        build.results.append("second")
    _epilogue(draw, build)
    program = _render(build, around(draw, build), seed=draw(st.integers(0, 3)), dynamic=rarely(draw, 5))
    return replace(program, source=respell(draw, program.source))


def _sizes(draw) -> dict[str, int]:
    query_len = draw(st.integers(1, 7))
    key_len = pick(draw, query_len, query_len, query_len + draw(st.integers(1, 6)), draw(st.integers(1, 7)))
    if rarely(draw, 12):  # more than one block
        query_len, key_len = pick(draw, (70, 70), (5, 130), (66, 131))
    dim = pick(draw, 4, 8)
    sizes = {"B": pick(draw, 2, 1, 3), "H": pick(draw, 1, 2), "G": pick(draw, 1, 2, 3), "Q": query_len, "K": key_len}
    return {**sizes, "D": dim, "V": dim if not rarely(draw, 6) else 12}


# -- query, key and value --------------------------------------------------------------------------------------------------------------


def _operands(draw, build: Build) -> None:
    origins = ["plain", "heads last", "sliced", "every second", "expanded"]
    origins += ["fused", "fused"] if build.square else []
    origins += ["cached"] if build.sizes["K"] > build.sizes["Q"] else []
    origins += ["static"] if build.sizes["K"] >= build.sizes["Q"] else []
    origins += ["alias"] if build.square and build.sizes["D"] == build.sizes["V"] and not build.grouped else []
    origin = pick(draw, *origins)
    _ORIGINS[origin](build)
    tamper(draw, build, "before the group", ["query", "key", "value"])
    build.body.append("raw_key, raw_value, raw_query = key, value, query")
    if build.grouped:
        _repeat(draw, build)
    if build.written and build.dtype != "float32" and draw(st.booleans()):
        build.body.append("query, key = query.float(), key.float()")
    tamper(draw, build, "after the group", ["raw_key", "raw_value", "raw_query"])


def _plain(build: Build) -> None:
    build.inputs |= {"query": "draw(B, H * G, Q, D)", "key": "draw(B, H, K, D)", "value": "draw(B, H, K, V)"}


def _heads_last(build: Build) -> None:
    build.symbols = "B, Q, K = query.shape[0], query.shape[1], key.shape[1]"
    build.inputs |= {"query": "draw(B, Q, H * G, D)", "key": "draw(B, K, H, D)", "value": "draw(B, K, H, V)"}
    build.body.append("query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)")


def _sliced(build: Build) -> None:
    build.symbols = "B, Q, K = query.shape[0], query.shape[2], key.shape[2] - 2"
    build.inputs |= {"query": "draw(B, H * G, Q, D + 3)", "key": "draw(B, H, K + 2, D)", "value": "draw(B, H + 1, K, V)"}
    build.body.append("query, key, value = query[..., :D], key[:, :, 2:], value[:, 1:]")


def _every_second(build: Build) -> None:
    build.symbols = "B, Q, K = query.shape[0], query.shape[2], key.shape[2] // 2"
    build.inputs |= {"query": "draw(B, H * G, Q, 2 * D)", "key": "draw(B, H, 2 * K, D)", "value": "draw(B, H, K, V)"}
    build.body.append("query, key = query[..., ::2], key[:, :, 1::2]")


def _expanded(build: Build) -> None:
    build.inputs |= {"query": "draw(B, H * G, Q, D)", "key": "draw(1, H, K, D)", "value": "draw(1, H, K, V)"}
    build.body.append("key, value = key.expand(B, H, K, D), value.expand(B, H, K, V)")


def _fused(build: Build) -> None:
    build.symbols = "B, Q, K = x.shape[0], x.shape[1], x.shape[1]"
    build.inputs |= {"x": "draw(B, Q, 16)", "weight": "draw(16, (H * G + H) * D + H * V) * 0.3"}
    build.body += [
        "query, key, value = (x @ weight).split([H * G * D, H * D, H * V], -1)",
        "query, key, value = query.view(B, Q, H * G, D), key.view(B, Q, H, D), value.view(B, Q, H, V)",
        "query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)",
    ]


def _cached(build: Build) -> None:
    build.symbols = "B, Q, K = query.shape[0], query.shape[2], old_key.shape[2] + new_key.shape[2]"
    build.inputs |= {"query": "draw(B, H * G, Q, D)", "old_key": "draw(B, H, K - Q, D)", "new_key": "draw(B, H, Q, D)"}
    build.inputs |= {"old_value": "draw(B, H, K - Q, V)", "new_value": "draw(B, H, Q, V)"}
    build.body.append("key, value = torch.cat([old_key, new_key], 2), torch.cat([old_value, new_value], 2)")


def _static(build: Build) -> None:
    build.inputs |= {"query": "draw(B, H * G, Q, D)", "key": "draw(B, H, K, D)", "value": "draw(B, H, K, V)"}
    build.inputs |= {"new_key": "draw(B, H, Q, D)", "new_value": "draw(B, H, Q, V)", "start": "torch.tensor([max(0, K - Q - 1)])"}
    build.body += [
        "places = torch.arange(Q) + start",
        "key.index_copy_(2, places, new_key)",
        "value.index_copy_(2, places, new_value)",
    ]
    build.offset = "start"


def _alias(build: Build) -> None:
    build.symbols = "B, Q, K = query.shape[0], query.shape[2], query.shape[2]"
    build.inputs |= {"query": "draw(B, H, Q, D)"}
    build.body.append("key = value = query")


_ORIGINS = {
    "plain": _plain,
    "heads last": _heads_last,
    "sliced": _sliced,
    "every second": _every_second,
    "expanded": _expanded,
    "fused": _fused,
    "cached": _cached,
    "static": _static,
    "alias": _alias,
}

_INTERLEAVE = "{x} = {x}.repeat_interleave(G, dim=1)"
_EXPAND = "{x} = {x}[:, :, None].expand(B, H, G, K, {d}).reshape(B, H * G, K, {d})"
_FLATTEN = "{x} = {x}.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(1, 2)"
_TILE = "{x} = {x}.repeat(1, G, 1, 1)"


def _repeat(draw, build: Build) -> None:
    forms = [_INTERLEAVE, _EXPAND, _FLATTEN, _EXPAND + ".contiguous()", _TILE]
    if not build.written and draw(st.booleans()):
        build.arguments["enable_gqa"] = "True"
        return
    if build.written and build.sizes["H"] == 1 and draw(st.booleans()):
        build.broadcast = True
        return
    key = pick(draw, *forms)
    value = key if not rarely(draw) else pick(draw, *forms)
    build.body += [key.format(x="key", d="D"), value.format(x="value", d="V")]


# -- the whole -------------------------------------------------------------------------------------------------------------------------


def _epilogue(draw, build: Build) -> None:
    build.results.append(pick(draw, "out.transpose(1, 2).reshape(B, Q, H * G * V)", "out", "out.transpose(1, 2)", "out.contiguous()"))
    if rarely(draw, 10):
        build.results.append(pick(draw, "key", "out[:, :, ::2]", "out"))


_MASK_INPUTS = ("keep", "documents", "positions", "noise", "start", "spare")


def _render(build: Build, outer: Around, seed: int, dynamic: bool) -> Program:
    masked = any("mask =" in line for line in build.mask)
    marked = {name: _dynamic_sizes(name, text) for name, text in build.inputs.items()} if dynamic else {}
    marked |= {"spare": (0,)} if "spare" in build.inputs else {}
    made = "\n".join(f'        "{n}": {t},' for n, t in build.inputs.items())
    settings = {"dtype": build.dtype, "seed": seed, "inputs": made, "dynamic": marked, "leaves": outer.leaves, "context": outer.context}
    header = _HEADER.format(**build.sizes, **settings)
    names = [n for n in _MASK_INPUTS if n in build.inputs]
    grids = ["b, h = torch.arange(B)[:, None, None, None], torch.arange(H * G)[:, None, None]"] if build.mask else []
    grids += ["s = spare.shape[0]"] if "spare" in build.inputs else []
    takes = ", ".join(["B, H, G, Q, K", *names])
    lines = [header, "", f"def masks({takes}):", *(f"    {x}" for x in grids + build.mask)]
    lines += [f"    return {'q, k, mask' if masked else 'q, k, None' if build.mask else 'None, None, None'}", "", ""]
    given = ", ".join(["B, H, G, Q, K", *(f'x["{n}"]' for n in names)])
    lines += ["def visible(x):", f"    mask = masks({given})[2]"]
    lines += ["    return torch.ones(B, H * G, Q, dtype=torch.bool) if mask is None else mask.expand(B, H * G, Q, K).any(-1)", "", ""]
    lines += [f"def attend({', '.join(build.inputs)}):"]
    body = list(build.body)
    at = next((i for i, line in enumerate(body) if "mask" in line or "slope *" in line), None)
    if build.mask and at is not None:
        body.insert(at, f"q, k, mask = masks({takes})")
    elif build.mask:
        body.append(f"q, k, mask = masks({takes})")
    lines += [f"    {x}" for x in ([build.symbols] if dynamic else []) + body] + [f"    return {', '.join(build.results)},", "", ""]
    return Program("\n".join([*lines, *outer.lines, ""]), build.sdpa * outer.calls, outer)


def _dynamic_sizes(name: str, text: str) -> tuple[int, ...]:
    """Dimensions of an input that are the batch or a length, read off the text that makes it."""
    if name in ("keep", "documents", "positions"):
        return (0, 1)
    made = re.match(r"(draw|whole)\((.*?)\)", text)
    sizes = made[2].split(", ")[made[1] == "whole" :] if made else []
    return tuple(i for i, size in enumerate(sizes) if re.search(r"\b[BQK]\b", size))
