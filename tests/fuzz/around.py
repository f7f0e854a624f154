"""What random attention programs are wrapped in: function transforms, grad modes, autocast, a module called twice, threads."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.masks import Build, pick


@dataclass(frozen=True)
class Around:
    """kind: a name for summaries. lines: define `program` in terms of `attend`. context: the expression of the context of all runs.
    leaves: inputs that need a gradient. calls: how often each attention is called. rounds: the dtype that autocast rounds to, if any."""

    kind: str
    lines: tuple[str, ...]
    context: str = "torch.no_grad()"
    leaves: tuple[str, ...] = ()
    calls: int = 1
    rounds: str | None = None


def around(draw, build: Build) -> Around:
    kind = pick(draw, *["plain"] * 22, *_KINDS)
    given = ", ".join(build.inputs)
    first = pick(draw, *[n for n in build.inputs if n in ("query", "key", "x", "old_key", "value", "new_key", "extra", "sinks", "slopes")])
    if kind == "plain":
        return Around(kind, (f"def program({given}):", f"    return attend({given})"))
    return _KINDS[kind](draw, given, first)


def _loss(first: str, given: str) -> list[str]:
    return [
        f"    def loss({first}):",
        f"        return sum(r.float().square().sum() for r in attend({given}) if r.is_floating_point())",
    ]


def _grad(draw, given: str, first: str) -> Around:
    call = pick(draw, f"torch.func.grad(loss)({first}),", f"torch.func.grad_and_value(loss)({first})", f"torch.func.jacrev(loss)({first}),")
    lines = [f"def program({given}):", *_loss(first, given), f"    return {call}"]
    return Around("grad", tuple(lines), pick(draw, "torch.no_grad()", "torch.enable_grad()"))


def _vjp(draw, given: str, first: str) -> Around:
    lines = [f"def program({given}):", *_loss(first, given), f"    out, back = torch.func.vjp(loss, {first})"]
    return Around("vjp", (*lines, "    return out, back(torch.ones_like(out))[0]"))


def _jvp(draw, given: str, first: str) -> Around:
    lines = [f"def program({given}):", *_loss(first, given)]
    return Around("jvp", (*lines, f"    return torch.func.jvp(loss, ({first},), (torch.ones_like({first}),))"))


def _vmap(draw, given: str, first: str) -> Around:
    inner = f"torch.func.vmap(lambda {first}: attend({given})[-1])"
    return Around("vmap", (f"def program({given}):", f"    return {inner}(torch.stack([{first}, {first} * 0.5])),"))


def _beside(draw, given: str, first: str) -> Around:
    """A gradient is taken of one attention, and another is computed as usual."""
    lines = [f"def program({given}):", *_loss(first, given), f"    return torch.func.grad(loss)({first}), *attend({given})"]
    return Around("beside grad", tuple(lines), calls=2)


def _enabled(draw, given: str, first: str) -> Around:
    enable = pick(draw, "with torch.enable_grad():", "with torch.set_grad_enabled(True):", "with torch.inference_mode(False):")
    lines = [f"def program({given}):", f"    {enable}", f"        return attend({given})"]
    return Around("enable_grad in no_grad", tuple(lines), leaves=(first,))


def _switched(draw, given: str, first: str) -> Around:
    lines = (f"def program({given}):", "    torch.set_grad_enabled(True)", f"    out = attend({given})")
    return Around("grad switched on", (*lines, "    torch.set_grad_enabled(False)", "    return out"), leaves=(first,))


def _disabled(draw, given: str, first: str) -> Around:
    lines = [f"def program({given}):", "    with torch.no_grad():", f"        return attend({given})"]
    return Around("no_grad in enable_grad", tuple(lines), "torch.enable_grad()", leaves=(first,))


def _leaf(draw, given: str, first: str) -> Around:
    return Around("needs grad", (f"def program({given}):", f"    return attend({given})"), "torch.enable_grad()", leaves=(first,))


def _inference(draw, given: str, first: str) -> Around:
    return Around("inference_mode", (f"def program({given}):", f"    return attend({given})"), "torch.inference_mode()")


def _autocast(draw, given: str, first: str) -> Around:
    dtype = pick(draw, "bfloat16", "float16")
    lines = [f"def program({given}):", f"    with torch.autocast('cpu', torch.{dtype}):", f"        return attend({given})"]
    return Around("autocast", tuple(lines), rounds=dtype)


def _ambient(draw, given: str, first: str) -> Around:
    lines = (f"def program({given}):", f"    return attend({given})")
    return Around("autocast outside", lines, "both(torch.no_grad(), torch.autocast('cpu', torch.bfloat16))", rounds="bfloat16")


def _tied(draw, given: str, first: str) -> Around:
    """One module that is called twice, as tied layers are."""
    second = pick(draw, f"{first} = {first} * 0.5", f"{first} = {first}.flip(-2)", f"{first} = {first} + first.mean()")
    lines = (
        "class Attention(torch.nn.Module):",
        f"    def forward(self, {given}):",
        f"        return attend({given})",
        "",
        "",
        "class Net(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        "        self.attention = Attention()",
        "",
        f"    def forward(self, {given}):",
        f"        first, *_ = results = self.attention({given})",
        f"        {second}",
        f"        return *results, *self.attention({given})",
        "",
        "",
        "program = Net()",
    )
    return Around("tied", lines, calls=2)


def _threads(draw, given: str, first: str) -> Around:
    return Around("threads", (f"def program({given}):", f"    return attend({given})"))


_KINDS = {
    "grad": _grad,
    "vjp": _vjp,
    "jvp": _jvp,
    "vmap": _vmap,
    "beside": _beside,
    "enabled": _enabled,
    "switched": _switched,
    "disabled": _disabled,
    "leaf": _leaf,
    "inference": _inference,
    "autocast": _autocast,
    "ambient": _ambient,
    "tied": _tied,
    "threads": _threads,
}

PLAIN = Around("plain", ())
