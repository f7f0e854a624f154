"""Numbers of a rewriting are compared where eager's are finite, and what is not finite has to be so in both, but for rows without a key."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparsify import api
from sparsify.errors import VerifyError
from sparsify.passes.dense import Dense
from sparsify.rewriting import verify
from tests.support import attention_functions as attention
from tests.support.harness import strict

NAN, INF = math.nan, math.inf
ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def changed(*at, to):
    found = ROWS.clone()
    for row, column in at:
        found[row, column] = to
    return found


def compare(want, got, **how):
    return verify.numbers(lambda x: (x, want), lambda x: (x, got), [torch.zeros(2)], **how)


@pytest.mark.parametrize("empty_rows", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_finite_in_eager_has_to_be(value, empty_rows):
    with pytest.raises(VerifyError, match="output 1 is not finite in 2 of 3 rows, where the untouched graph is"):
        compare(ROWS, changed((0, 0), (0, 1), (2, 0), to=value), empty_rows=empty_rows)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_same_is_no_difference(value):
    assert compare(changed((1, 0), to=value), changed((1, 0), to=value)) == verify.Agreement(0.0, 0)
    assert compare(torch.full((3, 2), value), torch.full((3, 2), value)).strange == 0


@pytest.mark.parametrize(("want", "got"), [(NAN, 3.0), (INF, 3.0), (NAN, INF), (INF, NAN), (INF, -INF)])
def test_what_is_not_finite_in_eager_is_counted_where_rows_may_see_no_key(want, got, caplog):
    want, got = changed((1, 0), (1, 1), to=want), changed((1, 0), (1, 1), to=got)
    with pytest.raises(VerifyError, match=r"in 1 of 3 rows the untouched graph has NaN or an infinity.*every row sees a key"):
        compare(want, got)
    with caplog.at_level(logging.WARNING, "sparsify"):
        assert compare(want, got, empty_rows=True) == verify.Agreement(0.0, 1)
    (record,) = caplog.records
    assert record.message.startswith("output 1: in 1 of 3 rows")
    got[2, 0] += 1  # the others are compared all the same
    with pytest.raises(VerifyError, match="differs by"):
        compare(want, got, empty_rows=True)


def test_numbers_without_rows():
    assert compare(torch.tensor(NAN), torch.tensor(1.0), empty_rows=True).strange == 1
    assert compare(torch.empty(0, 4), torch.empty(0, 4)) == verify.Agreement(0.0, 0)


KEEP = torch.ones(2, 70, dtype=torch.int64)
KEEP[0, :2] = 0  # padding on the left: two rows of four heads see no key


def padded(query, key, value, keep):
    """Written-out attention, in which −inf hides."""
    at = torch.arange(query.shape[2])
    seen = (at[:, None] >= at[None]) & keep.bool()[:, None, None, :]
    return attention.attend(torch.where(seen, attention.scores(query, key), -torch.inf), value)


def run(function, *more, method="dense", **options):
    torch._dynamo.reset()
    options = strict(passes=[method], verify=True, validation=False, **options)
    with api.collect_plans() as plans, torch.no_grad():
        found = torch.compile(function, backend="sparsify", options=options)(*attention.operands(query_len=70), *more)
    assert [d.method for plan in plans for d in plan.rewritten] == [method]
    return found


@pytest.mark.parametrize("method", ["dense", "xattention"])
def test_rows_that_see_no_key_agree_by_themselves(method, caplog):
    """The op gives NaN where eager does."""
    with caplog.at_level(logging.WARNING, "sparsify"):
        found = run(padded, KEEP, method=method, xattention={"block": 64})
    assert found[0, :, :2].isnan().all() and found[0, :, 2:].isfinite().all() and found[1].isfinite().all()
    assert not caplog.records


def losing_nan(monkeypatch):
    """Rewriting that puts numbers where eager has none."""
    original = Dense.rewrite

    def broken(self, editor, site):
        original(self, editor, site)
        value = editor.replaced[site.output]
        with editor.graph.inserting_after(value):
            whole = editor.graph.call_function(torch.nan_to_num, (value,))
        whole.meta = dict(value.meta)
        value.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
        editor.replaced[site.output] = whole

    monkeypatch.setattr(Dense, "rewrite", broken)


def test_rows_that_see_no_key_are_told_where_they_differ(monkeypatch, caplog):
    losing_nan(monkeypatch)
    with caplog.at_level(logging.WARNING, "sparsify"):
        assert run(padded, KEEP).isfinite().all()
    (record,) = (one for one in caplog.records if "untouched graph" in one.message)
    assert "output 0: in 8 of 560 rows the untouched graph has NaN" in record.message


def test_where_every_row_sees_a_key_it_is_an_error(monkeypatch):
    losing_nan(monkeypatch)

    def broken(query, key, value):
        value = torch.where(torch.arange(value.shape[2])[:, None] == 5, NAN, value)
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    with pytest.raises(VerifyError, match="every row sees a key"):
        run(broken)
