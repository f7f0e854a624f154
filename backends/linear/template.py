"""The text of the kernel of linear layers for few rows; `source` keeps the parts that a spec has, and writes what repeats for each row.

Every weight is read once, in lines of 16 bytes a thread. Programs begin with weights, which depend on nothing that runs before them; where
kernels may overlap (`early`), they ask for their first weights while the kernel before is still at work, and wait for its end then.
"""

LINEAR = '''\
%if tensor
@triton.jit(do_not_specialize=["rows"])
%else
@triton.jit
%end
def linear(
    ${parameters},
):
    """One program: COLUMNS columns of ${"the output" if gated or parts == 1 else "one of the outputs"}, every row."""
    tile = tl.program_id(0)
%if early
    # the next kernel may begin once all programs of this one have; it waits for their end before it reads anything of theirs
    tl.extra.cuda.gdc_launch_dependents()
%end
    weight = weight_1
    out = out_1
%if biased
    bias = bias_1
%end
%if gated or parts == 1
    outputs = OUTPUTS_1
%else
    outputs = tl.where(tile >= FIRST_2, OUTPUTS_2, OUTPUTS_1)
    first_tile = tl.where(tile >= FIRST_2, FIRST_2, 0)
    if tile >= FIRST_2:
        weight = weight_2
        out = out_2
%if biased
        bias = bias_2
%end
%if parts == 3
    outputs = tl.where(tile >= FIRST_3, OUTPUTS_3, outputs)
    first_tile = tl.where(tile >= FIRST_3, FIRST_3, first_tile)
    if tile >= FIRST_3:
        weight = weight_3
        out = out_3
%if biased
        bias = bias_3
%end
%end
    tile -= first_tile
%end
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, STEP)
%if tensor
    # warps share the inputs, so that none loads or multiplies what another one does
    part = (tl.arange(0, GROUPS) * STEP)[:, None] + part[None, :]
    at = column.to(tl.int64)[None, :, None] * INPUTS + part[:, None, :]
    row = tl.arange(0, ROWS)
    real = row < rows
    x_at = input + row[None, None, :] * INPUTS + part[:, :, None]
%else
    at = column.to(tl.int64)[:, None] * INPUTS + part[None, :]
%end
${begin}
%if tensor
%if early
    tl.extra.cuda.gdc_wait()
%end
    for first in tl.range(0, INPUTS, STRIDE, num_stages=${stages}):
        w = ${weights}
%if gated
        u = ${ups}
%end
${inner}
%else
    w = ${first_weights}
%if gated
    u = ${first_ups}
%end
%if early
    tl.extra.cuda.gdc_wait()
%end
%if steps > 1
    for first in tl.range(0, LAST, STRIDE):
        later_w = ${later_weights}
%if gated
        later_u = ${later_ups}
%end
${inner}
        w = later_w
%if gated
        u = later_u
%end
%end
    first = LAST
${last}
%end
${finish}
'''

# what is summed while the inputs are gone through: on CUDA cores, for one row
BEGIN = """\
total = tl.zeros([COLUMNS, STEP], tl.float32)
%if gated
up_total = tl.zeros([COLUMNS, STEP], tl.float32)
%end
%if norm != "none"
squares = tl.zeros([STEP], tl.float32)
%end
"""
TENSOR_BEGIN = """\
total = tl.zeros([GROUPS, COLUMNS, ROWS], tl.float32)
%if gated
up_total = tl.zeros([GROUPS, COLUMNS, ROWS], tl.float32)
%end
"""

STEP = """\
x = tl.load(input + first + part${part_mask}).to(tl.float32)
%if norm != "none"
# the row's own factor commutes with the product and follows after the loop
squares += x * x
x *= ${"1.0 + " if norm == "rms_offset" else ""}tl.load(norm_weight + first + part${part_mask}).to(tl.float32)
%end
total += w.to(tl.float32) * x[None, :]
%if gated
up_total += u.to(tl.float32) * x[None, :]
%end
"""
TENSOR_STEP = """\
x = tl.load(x_at + first, mask=real[None, None, :]${x_mask}, other=0.0)
total = tl.dot(w, x, total${precision})
%if gated
up_total = tl.dot(u, x, up_total${precision})
%end
"""

# after the loop: y [COLUMNS], or [COLUMNS, ROWS]
FINISH = """\
y = ${"tl.sum(total, 0)" if tensor else "tl.sum(total, 1)"}
%if gated
up = ${"tl.sum(up_total, 0)" if tensor else "tl.sum(up_total, 1)"}
%end
%if norm != "none"
unit = 1.0 / tl.sqrt(tl.sum(squares, 0) / INPUTS + EPS)
y *= unit
%if gated
up *= unit
%end
%end
%if biased
y += tl.load(bias + column${column_mask}).to(tl.float32)${"[:, None]" if tensor else ""}
%if gated
up += tl.load(bias_2 + column${column_mask}).to(tl.float32)${"[:, None]" if tensor else ""}
%end
%end
y = y.to(out.dtype.element_ty)
%if gated
y = activate(y.to(tl.float32)).to(y.dtype)
y = (y.to(tl.float32) * up.to(y.dtype).to(tl.float32)).to(y.dtype)
%end
%if residual
y = (tl.load(residual + ${y_at}${y_mask}).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
%end
tl.store(out + ${y_at}, y${y_store})
"""
