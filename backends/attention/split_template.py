"""The text of the kernel that joins the parts of attention whose keys are split; `triton_template` has the one that computes the parts."""

COMBINE = '''\
@triton.jit(do_not_specialize=[${combine_unspecialised}])
def combine(
    ${combine_parameters},
):
    """One program joins what parts of the keys gave for one query row of one head."""
    row = tl.program_id(0)
    kv = tl.program_id(1)
    index = row // GROUP
    batch = tl.cast(kv // kv_heads, tl.int64)
    head = kv % kv_heads * GROUP + row % GROUP
    parts = tl.arange(0, SPLITS)
    v_dims = tl.arange(0, V_DIM)
    held = parts < splits
    at = (tl.cast(kv, tl.int64) * query_len * GROUP + row) * splits + parts
    m = tl.load(part_m + at, mask=held, other=float("-inf"))
    l = tl.load(part_l + at, mask=held, other=0.0)
    acc = tl.load(part_acc + at[:, None] * ${v_head_dim} + v_dims[None, :], mask=held[:, None]${v_guard}, other=0.0)
%if alibi
%if has_start
    start = tl.load(query_start).to(tl.int32)
%else
    start = key_len - query_len
%end
    shift = tl.load(alibi_slopes + batch * alibi_b + head) * LOG2E * tl.minimum(query_len - 1 + start, key_len - 1)
%end
    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(m - base)
    total = tl.sum(l * weight, 0)
    result = tl.sum(acc * weight[:, None], 0)
    seen = total != 0.0
%if sink_logits
    sink = tl.load(sink_logits + head).to(tl.float32) * LOG2E${" - shift" if alibi else ""}
    top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    kept = tl.where(seen, tl.exp2(base - top), 0.0)
    total = total * kept + tl.exp2(sink - top)
    result = result * kept
    base = top
%end
    total = tl.where(seen, total, 1.0)
    out_row = batch * out_b + tl.cast(head, tl.int64) * out_h + tl.cast(index, tl.int64) * out_m
    tl.store(out + out_row + v_dims, (result / total).to(out.dtype.element_ty)${v_store})
    # natural logarithm; a row that saw no key has none
    exponent = base + tl.log2(total)${" + shift" if alibi else ""}
    lse_row = tl.cast(kv * GROUP + row % GROUP, tl.int64) * query_len + index
    tl.store(lse + lse_row, tl.where(seen, exponent * LN2, float("-inf")))
'''
