"""The attentions of random programs: one call, or products, what the scores go through in any order, and the softmax."""

from __future__ import annotations

from tests.fuzz.masks import Build, pick, rarely, tamper


def attend(draw, build: Build, kind: str, query: str, out: str) -> None:
    if not build.written:
        _call(draw, build, kind, query, out)
    else:
        _written_out(draw, build, kind, query, out)
    tamper(draw, build, "after the output", ["raw_key", "raw_value", out, out])


def _call(draw, build: Build, kind: str, query: str, out: str) -> None:
    arguments = dict(build.arguments)
    if kind in ("bool", "float", "bias"):
        arguments["attn_mask"] = "mask"
        if kind != "bool" and rarely(draw, 6):
            _bias(draw, build, flat=False)
            build.body.append(f"mask = {pick(draw, 'mask + extra', 'extra + mask')}")
        if rarely(draw, 6):
            arguments["is_causal"] = "True"
    if rarely(draw, 3):
        # with is_causal and a negative scale, torch itself gives NaN on the CPU
        arguments["scale"] = pick(draw, "0.3", "1.0", "1.0 / D", *([] if "is_causal" in arguments else ["-0.5"]))
    if rarely(draw, 8):
        arguments["dropout_p"] = "0.0"
    call = ", ".join([query, "key", "value", *(f"{name}={text}" for name, text in arguments.items())])
    build.body.append(f"{out} = F.scaled_dot_product_attention({call})")
    build.sdpa += 1


_PRODUCTS = (
    "torch.matmul({q}, key.transpose(2, 3))",
    "{q} @ key.transpose(-1, -2)",
    "{q} @ key.permute(0, 1, 3, 2)",
    "({q} * 0.5) @ key.mT",
    "torch.einsum('bhid,bhjd->bhij', {q}, key)",
    "torch.einsum('bhid,bhdj->bhij', {q}, torch.einsum('bhjd->bhdj', key))",
    "torch.einsum('bihd,bjhd->bhij', {q}.transpose(1, 2), key.transpose(1, 2))",
    "torch.einsum('jbhd,bhid->bhij', key.permute(2, 0, 1, 3).contiguous(), {q})",
    "{q} @ (key.mT * 2.0)",
)
# the product of weights and values
_OUTPUTS = (
    "weights @ value",
    "torch.einsum('bhij,bhjd->bhid', weights, value)",
    "torch.einsum('bhij,bjhd->bihd', weights, value.transpose(1, 2)).transpose(1, 2)",
    "torch.einsum('jbhd,bhij->ibhd', value.permute(2, 0, 1, 3), weights).permute(1, 2, 0, 3)",
)
_SCALES = ("scores * {s}", "{s} * scores", "scores / {s}", "scores.mul({s})", "scores.mul_({s})", "scores.div_({s})", "scores")
_CAPS = ("torch.tanh(scores / 3.0) * 3.0", "3.0 * (scores / 3.0).tanh()", "torch.tanh(scores * 0.5) * 2.0", "torch.tanh(scores)")
_SLOPES = ("slope * k", "slope * (k - q)", "slope * (1 - K + k)", "slope * (k - q).abs()", "-slope * (q - k)")
_HIDDEN = (
    "scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)",
    "scores = torch.where(mask, scores, float('-inf'))",
    "scores = torch.where(~mask, torch.finfo(scores.dtype).min, scores)",
    "scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min)",
    "scores += torch.where(mask, 0.0, float('-inf'))",
    "scores = scores.masked_fill(~mask, -50.0)",
    "scores.masked_fill_(~mask, float('-inf'))",
    "scores.masked_fill_((~mask).expand_as(scores), torch.finfo(scores.dtype).min)",
    "scores = scores * mask + torch.finfo(scores.dtype).min * (1 - mask.to(scores.dtype))",
    "scores = scores * mask.to(scores.dtype) - 1e4 * (1 - mask.to(scores.dtype))",
    "scores = scores * mask.to(scores.dtype)",
)
_BOUNDS = (
    "scores = torch.max(scores, torch.full((), torch.finfo(scores.dtype).min))",
    "scores = scores.clamp(min=torch.finfo(scores.dtype).min)",
    "scores = torch.maximum(torch.tensor(float('-inf')), scores)",
    "scores = scores.clamp_min(-1.0)",
    "scores = torch.max(scores, scores * 0.5)",
)
# views between four dimensions and three
_VIEWS = (
    "scores = scores.reshape(B * H * G, Q, K).view(B, H * G, Q, K)",
    "scores = scores.reshape(H * G, B, Q, K).reshape(B, H * G, Q, K)",
    "scores = scores.reshape(-1, Q, K).view(B, H * G, K, Q).mT",
)
# sinks that scale the output, and near relatives
_SCALED = (
    "(torch.logsumexp(scores, -1) - sinks[:, None]).sigmoid()[..., None]",
    "torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks.view(1, -1, 1, 1))",
    "torch.sigmoid(sinks.view(1, -1, 1, 1) - scores.logsumexp(-1, keepdim=True))",
    "(torch.logsumexp(scores * 2, -1) - sinks[:, None]).sigmoid()[..., None]",
)
# what a softmax cannot feel if it comes next, and near relatives that it feels
_SHIFTS = (
    "scores = scores - scores.max(-1, keepdim=True).values",
    "scores = scores - scores.amax(-1, keepdim=True)",
    "scores = scores - scores.amax(-1, keepdim=True).detach()",
    "scores -= torch.max(scores, dim=-1, keepdim=True)[0]",
    "scores = scores - scores.amax((-1,), True)",
    "scores = scores - scores.mean(-1, keepdim=True)",
    "scores = scores - scores.amax(-2, keepdim=True)",
    "scores = scores - scores.amax((-2, -1), keepdim=True)",
    "scores = scores - scores.amax(-1, keepdim=True) * 0.5",
    "scores = scores.amax(-1, keepdim=True) - scores",
    "scores = scores - 1.5",
    "scores = 1.5 + scores",
)
# shapes of what is added: per key, per row, per head, per batch, scalars
_BIASES = (
    "draw(B, 1, 1, K)",
    "draw(H * G, 1, K)",
    "draw(1, K)",
    "draw(K)",
    "draw(B, H * G, 1, K)",
    "draw(Q, K)",
    "draw(B, 1, Q, 1)",
    "draw(Q, 1)",
    "draw(B, H * G, Q, 1)",
    "draw(H * G, 1, 1)",
    "draw(B, 1, 1, 1)",
    "draw(1)",
    "draw(1)[0]",
)
_FLAT_BIASES = (*(f"draw(B * H * G, {size})" for size in ("1, K", "Q, K", "Q, 1", "1, 1")), "draw(1, K)", "draw(1)[0]")
_ADDED = ("scores = scores + extra", "scores = (scores + extra) * 0.5", "scores = extra + scores", "scores += extra")
_SOFTMAXES = (
    "torch.softmax(scores, -1).to(value.dtype)",
    "F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)",
    "scores.softmax(3).to(value.dtype)",
    "F.softmax(scores, -1, 3, torch.float32).to(value.dtype)",
    "torch.special.softmax(scores, -1).to(value.dtype)",
)
_HARMLESS = ("weights", "F.dropout(weights, 0.1, training=False)", "F.dropout(weights, 0.0)", "weights.contiguous()")
_HARMFUL = ("weights = weights * 2", "weights = weights * weights", "weights *= 0.5", "weights[..., 0] = 0.25", "weights = weights + 0.1")


def _bias(draw, build: Build, flat: bool) -> None:
    build.inputs.setdefault("extra", pick(draw, *(_FLAT_BIASES if flat else _BIASES)))


def _written_out(draw, build: Build, kind: str, query: str, out: str) -> None:
    """matmul, scale, softcap, mask, softmax, dropout, matmul, in one of many spellings, now and then in another order."""
    body, flat = build.body, not build.broadcast and rarely(draw, 6)
    _scores(draw, build, query, pick(draw, "0.3", "D ** -0.5", "-0.5", "2.0"), flat)
    tamper(draw, build, "after the scores", ["raw_key", "raw_query", "raw_value"])
    steps: list[list[str]] = []
    if rarely(draw, 6):
        steps.append([f"scores = {pick(draw, *_CAPS)}"])
    if rarely(draw, 8):
        steps.append(["scores.mul_(0.5)"])
    if rarely(draw, 12):
        steps.append([pick(draw, *_SHIFTS)])
    if rarely(draw, 12):
        steps.append([pick(draw, *_BOUNDS)])
    if rarely(draw, 12):
        steps.append([pick(draw, *_VIEWS)])
    if rarely(draw, 5):
        _bias(draw, build, flat=False)
        steps.append([pick(draw, *_ADDED)])
    if rarely(draw, 5):
        build.inputs["slopes"] = pick(draw, "torch.rand(H * G, generator=generator).to(DTYPE)", "draw(B, H * G)")
        steps.append(["slope = slopes[..., :, None, None]", f"scores = scores + {pick(draw, *_SLOPES)}"])
        if kind == "none":
            build.mask, kind = [f"q, k = torch.arange(Q)[:, None] + {build.offset}, torch.arange(K)[None]"], "positions"
    if kind in ("bool", "float", "bias"):
        steps.append([pick(draw, *_HIDDEN) if kind == "bool" else "scores = scores + mask"])
    if len(steps) > 1 and rarely(draw, 4):
        first = pick(draw, *range(len(steps) - 1))
        steps[first], steps[first + 1] = steps[first + 1], steps[first]
    body += [line for step in steps for line in step]
    scaled = not flat and rarely(draw, 12)
    if scaled:
        build.inputs["sinks"] = "draw(H * G)"
        body.append(f"factor = {pick(draw, *_SCALED)}")
    _weights(draw, build)
    tamper(draw, build, "after the weights", ["raw_key", "raw_value"])
    product = "weights @ value" if build.broadcast else pick(draw, *_OUTPUTS)
    body.append(f"{out} = (weights.view(-1, Q, K) @ flat_value).view(B, H * G, Q, V)" if flat else f"{out} = {product}")
    if scaled:
        body.append(f"{out} = {out} * factor.to({out}.dtype)")


def _scores(draw, build: Build, query: str, scale: str, flat: bool) -> None:
    body = build.body
    if not flat:
        body.append("scores = " + pick(draw, *_PRODUCTS).format(q=query))
        body.append(f"scores = {pick(draw, *_SCALES)}".format(s=scale))
        return
    body.append(f"flat_query, flat_key, flat_value = {query}.reshape(B * H * G, Q, D), key.reshape(-1, K, D), value.reshape(-1, K, V)")
    tamper(draw, build, "after the merge", ["raw_key", "raw_query", "raw_value"])
    if rarely(draw, 3):  # as bloom does it
        build.inputs["slopes"] = pick(draw, "draw(H * G)", "draw(B * H * G)")
        repeat = ".repeat(B, 1, 1)" if build.inputs["slopes"] == "draw(H * G)" else ""
        body.append(f"bias = (slopes[:, None, None] * torch.arange(K)).to(flat_query.dtype){repeat}")
        body.append("scores = " + pick(draw, *_BADDBMMS).format(s=scale))
    else:
        body.append("scores = torch.bmm(flat_query, flat_key.transpose(1, 2)) * " + scale)
        if rarely(draw, 3):
            _bias(draw, build, flat=True)
            body.append(pick(draw, "scores = scores + extra", "scores = extra + scores", "scores = torch.tanh(scores + extra)"))
    body.append("scores = scores.view(B, H * G, Q, K)")


_BADDBMMS = (
    "bias.baddbmm(batch1=flat_query, batch2=flat_key.transpose(1, 2), beta=1.0, alpha={s})",
    "torch.baddbmm(bias, flat_query, flat_key.transpose(1, 2), alpha={s})",
    "torch.baddbmm(input=bias, batch2=flat_key.transpose(1, 2), batch1=flat_query, alpha={s})",
    "bias.baddbmm(flat_query, batch2=flat_key.transpose(1, 2), beta=0.5, alpha={s})",
    "torch.baddbmm(0.5, bias, {s}, flat_query, flat_key.transpose(1, 2))",
    "bias.baddbmm(1.0, {s}, flat_query, flat_key.transpose(1, 2))",
)


def _weights(draw, build: Build) -> None:
    body, sink = build.body, rarely(draw, 6)
    if sink:
        build.inputs["sinks"] = "draw(H * G)"
        if rarely(draw, 4):
            body.append(pick(draw, *_SHIFTS))
        body.append(pick(draw, *_SINKS))
    if rarely(draw, 5):
        body.append(pick(draw, *_SHIFTS))
    if rarely(draw, 12):
        body.append(f"scores = {pick(draw, *_CAPS)}")
    body.append(f"weights = {pick(draw, *_SOFTMAXES)}")
    if sink:
        body.append(pick(draw, "weights = weights[..., :-1]", "weights = weights[..., :K]", "weights = weights.narrow(-1, 0, K)"))
    body.append(f"weights = {pick(draw, *_HARMLESS)}")
    if rarely(draw, 10):
        body.append(pick(draw, *_HARMFUL))
    if rarely(draw, 6):
        build.results.append(pick(draw, "weights", "scores", "weights.sum()"))


_SINKS = (
    "scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, Q, -1)], -1)",
    "scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, Q, -1)], dim=-1)",
    "scores = torch.concat(tensors=[scores, sinks.view(1, -1, 1, 1).expand(B, -1, Q, 1)], axis=-1)",
    "scores = torch.cat([scores, (sinks * 2).reshape(1, -1, 1, 1).expand(B, -1, Q, -1)], -1)",
)
