"""A few hundred random programs, the programs that must not be rewritten, and the fuzzer's own promises."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch

from sparsify import pipeline
from sparsify.masks import prove as predicates
from sparsify.masks.predicate import QueryStart
from tests.fuzz import check as fuzz_check
from tests.fuzz import run as fuzz
from tests.fuzz.graphs import Program


@pytest.mark.parametrize("count", [40, pytest.param(240, marks=pytest.mark.slow)])
def test_random_programs_equal_eager_or_are_refused(count, tmp_path):
    tally, failure = fuzz.fuzz(count, seed=0, folder=tmp_path, say=lambda text: None)
    assert failure is None, f"{failure.error}\n{failure.program}\nrepro: {failure.script}"
    # without rewritten sites of every kind the run would say nothing
    assert tally.programs == count and tally.sites >= count * 0.8
    assert all(tally.rewritten[name] > tally.sites / 20 for name in fuzz_check.METHODS), str(tally)


SOURCE = """
import torch
import torch.nn.functional as F

B, H, Q, K, D = 2, 4, 6, 6, 8
q, k = torch.arange(Q)[:, None], torch.arange(K)[None]


def around():
    return torch.no_grad()


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return {{"query": draw(B, H, Q, D), "key": draw(B, H, K, D), "value": draw(B, H, K, D)}}


def mark(tensors):
    return tensors


def visible(x):
    return torch.ones(B, H, Q, dtype=torch.bool)


def program(query, key, value):
    q, k = torch.arange(Q)[:, None], torch.arange(K)[None]
    {body}
"""


def fixed(body: str) -> Program:
    return Program(SOURCE.format(body=body), body.count("scaled_dot_product"))


WEIGHTS = "weights = (query @ key.transpose(-1, -2) * 0.3).masked_fill(k > q, float('-inf')).softmax(-1)"
MUST_NOT_MATCH = {
    "weights returned": f"{WEIGHTS}; return weights @ value, weights",
    "weights read by a later product": f"{WEIGHTS}; return weights @ value, weights.transpose(-1, -2) @ value",
    "weights edited": f"{WEIGHTS}; weights[..., 0] = 0.0; return weights @ value,",
    "weights renormalised": f"{WEIGHTS}; weights = weights / weights.sum(-2, keepdim=True); return weights @ value,",
    "softmax over heads": "return torch.softmax(query @ key.transpose(-1, -2), 1) @ value,",
    "a mask of the data": "return F.scaled_dot_product_attention(query, key, value, attn_mask=(query @ key.mT) > -1),",
    "prefix": "return F.scaled_dot_product_attention(query, key, value, attn_mask=(k <= q) | (k < 2)),",
    "overlapping chunks": "return F.scaled_dot_product_attention(query, key, value, attn_mask=(k // 2) == ((q + 1) // 2)),",
    "strided": "return F.scaled_dot_product_attention(query, key, value, attn_mask=((q - k) % 2 == 0) & (k <= q)),",
    "a mask per head": "mask = k <= q + torch.arange(H)[:, None, None]; "
    "return F.scaled_dot_product_attention(query, key, value, attn_mask=mask),",
    "a bias": "return F.scaled_dot_product_attention(query, key, value, attn_mask=torch.where(k <= q, 0.1 * k * q, float('-inf'))),",
    "a mask edited afterwards": "mask = (k <= q).clone(); mask[:, :2] = True; "
    "return F.scaled_dot_product_attention(query, key, value, attn_mask=mask),",
    "keys written between scores and output": f"{WEIGHTS}; key.mul_(2.0); return weights @ value, key",
    "a scale per row": "return torch.softmax(query @ key.transpose(-1, -2) * query[..., :1], -1) @ value,",
    "broadcast batch": "return F.scaled_dot_product_attention(query, key[:1], value[:1], is_causal=True),",
}


@pytest.mark.parametrize("name", MUST_NOT_MATCH)
def test_must_not_match(name):
    tally = fuzz_check.Tally()
    fuzz_check.check(fixed(MUST_NOT_MATCH[name]), tally)
    assert tally.programs == 1 and not sum(tally.rewritten.values())


MUST_MATCH = {
    "sdpa": "return F.scaled_dot_product_attention(query, key, value, is_causal=True),",
    "written out": f"{WEIGHTS}; return weights @ value,",
    "keys read again": f"{WEIGHTS}; return weights @ value, key * 2",
    "keys written afterwards": f"{WEIGHTS}; out = weights @ value; key.mul_(2.0); return out, key",
    "output edited": "out = F.scaled_dot_product_attention(query, key, value, is_causal=True); out.mul_(2.0); return out, out[0]",
    "one tensor for all": "return F.scaled_dot_product_attention(query, query, query, is_causal=True),",
    "transposed outside": "return F.scaled_dot_product_attention(*(x.mT.contiguous().mT for x in (query, key, value)), is_causal=True),",
    "a negative scale": "return F.scaled_dot_product_attention(query, key, value, attn_mask=k <= q, scale=-0.5),",
    "one slope a head": "slopes = query[0, :, 0, 0] * 1; scores = query @ key.transpose(-1, -2) + slopes[:, None, None] * k; "
    "return torch.softmax(scores.masked_fill(k > q, float('-inf')), -1) @ value,",
}


@pytest.mark.parametrize("name", MUST_MATCH)
def test_near_relatives_match(name):
    tally = fuzz_check.Tally()
    fuzz_check.check(fixed(MUST_MATCH[name]), tally)
    assert tally.rewritten["dense"] == tally.sites == 1


# A product reads a copy as it was made; the site may not read the original, which was written in between, nor miss writes to the copy.
TURN = ".transpose(1, 2).contiguous().transpose(1, 2)"  # heads last: merging batch and heads copies
COPIES = {
    "query in float32": "wide = query.float(); query.mul_(2.0); scores = wide @ key.float().transpose(-1, -2); values = value",
    "keys in float32": "wide = key.float(); key.mul_(2.0); scores = query.float() @ wide.transpose(-1, -2); values = value",
    "query's copy": "wide = query.float(); wide.mul_(2.0); scores = wide @ key.float().transpose(-1, -2); values = value",
    "merged query": f"turned = query{TURN}; flat = turned.reshape(B * H, Q, D); turned.mul_(2.0); "
    "scores = torch.bmm(flat, key.reshape(B * H, K, D).transpose(1, 2)).view(B, H, Q, K); values = value",
    "merged keys": f"turned = key{TURN}; flat = turned.reshape(B * H, K, D); turned.mul_(2.0); "
    "scores = torch.bmm(query.reshape(B * H, Q, D), flat.transpose(1, 2)).view(B, H, Q, K); values = value",
    "merged values": f"scores = torch.bmm(query.reshape(B * H, Q, D), key.reshape(B * H, K, D).transpose(1, 2)); turned = value{TURN}; "
    "values = turned.reshape(B * H, K, D); turned.mul_(2.0)",
}


def check_copies(name: str, dtype: str) -> None:
    body = f"{COPIES[name]}; out = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ values; "
    body += "return (out if out.dim() == 4 else out.view(B, H, Q, -1)), query, key, value"
    program = fixed(body)
    fuzz_check.check(Program(program.source.replace("generator=generator)\n", f"generator=generator).to(torch.{dtype})\n"), 0))


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_outlive_writes_to_what_they_copy(name, dtype):
    check_copies(name, dtype)


# -- the fuzzer ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failure_is_shrunk_and_its_script_runs_alone(tmp_path, monkeypatch):
    """A product that sees one key too many is found, and the smallest program is written down."""
    real = predicates.prove

    def broken(masks, extents, *rest):
        found = real(masks, extents, *rest)
        is_plain = found.causal and found.query_start.bottom_right
        return (
            type(found)(**{**vars(found), "query_start": QueryStart(constant=extents.key_len - extents.query_len + 1)})
            if is_plain
            else found
        )

    monkeypatch.setattr(predicates, "prove", broken)
    monkeypatch.setattr(fuzz_check, "STRICT", {**fuzz_check.STRICT, "validation": False})  # it would see the same before the fuzzer does
    checker = functools.partial(fuzz_check.check, every_row=False)
    tally, failure = fuzz.fuzz(60, seed=0, folder=tmp_path, say=lambda text: None, checker=checker)
    monkeypatch.undo()
    assert isinstance(failure.error, fuzz_check.Wrong) and tally.programs > 0
    assert len(failure.program.source.splitlines()) < 70
    text = failure.script.read_text()
    assert failure.script.parent == tmp_path and "import tests" not in text and "from tests" not in text
    done = subprocess.run([sys.executable, failure.script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr  # nothing is wrong with the real thing


def test_the_same_seed_gives_the_same_programs(tmp_path):
    def sources(seed: int) -> list[str]:
        seen: list[str] = []
        fuzz.fuzz(15, seed, tmp_path, checker=lambda program, tally: seen.append(program.source))
        return seen

    assert sources(3) == sources(3) != sources(4)


def test_a_crash_of_the_compiler_is_a_failure_too(monkeypatch):
    def crash(*args, **options):
        raise ZeroDivisionError("in the pipeline")

    monkeypatch.setattr(pipeline, "rewrite_graph", crash)
    with pytest.raises(ZeroDivisionError):
        fuzz_check.check(fixed(MUST_MATCH["sdpa"]))


def test_results_that_differ_in_any_way_are_told_apart():
    one = torch.randn(2, 3, 4, 5)
    rows = torch.ones(2, 3, 4, dtype=torch.bool)
    hidden = rows.clone()
    hidden[0, 0, 0] = False
    fuzz_check.compare(([one], []), ([one.clone()], []), rows, "same")
    other = one.clone()
    other[0, 0, 0] += 1
    fuzz_check.compare(([other], []), ([one], []), hidden, "a row that sees no key")
    for got, args in (([other], []), ([one.double()], []), ([one.mT.contiguous().mT], []), ([one], [other])):
        with pytest.raises(fuzz_check.Wrong):
            fuzz_check.compare((got, args), ([one], [one] if args else []), rows, "different")
    with pytest.raises(fuzz_check.Wrong):
        fuzz_check.compare(([one * torch.nan], []), ([one], []), rows, "not a number")


def test_a_run_in_which_most_programs_were_not_run_says_little():
    tally = fuzz_check.Tally(programs=10)
    tally.invalid.update({"RuntimeError: one": 4, "InternalTorchDynamoError: no module": 9})
    assert not fuzz.too_few(tally)
    tally.invalid["InternalTorchDynamoError: no module"] = 11
    assert "no module" in fuzz.too_few(tally)
