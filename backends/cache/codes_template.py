"""The text that turns codes of 8 or 4 bits into numbers, for all kernels that read a cache of them.

A word of 16 bits has two codes of 8 bits or four of 4; kernels take the codes at one place of all words as a tile of their own, a piece.
"""

from __future__ import annotations

from sparsify.ops.quantised import packed, parts

# of a code: E4M3 becomes fp16 by an instruction for two. 4 bits are left where they are: fp16 counts from 0 in steps of 2^-24, bit by bit
# (its subnormal numbers and the first binade), so that masking them out is all
PIECE = '''\
@triton.jit
def piece(words, PIECE: tl.constexpr):
    """Of each word, two of them to a register, the code at one place as ${operand}, in units of `piece_unit`."""
%if codes == "fp8"
    if PIECE == 0:
        found = tl.inline_asm_elementwise("{ .reg .b32 u; .reg .b16 a, b; prmt.b32 u, $1, 0, 0x3120; mov.b32 {a, b}, u; cvt.rn.f16x2.e4m3x2 $0, a; }", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        found = tl.inline_asm_elementwise("{ .reg .b32 u; .reg .b16 a, b; prmt.b32 u, $1, 0, 0x3120; mov.b32 {a, b}, u; cvt.rn.f16x2.e4m3x2 $0, b; }", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
%else
    if PIECE == 0:
        found = tl.inline_asm_elementwise("and.b32 $0, $1, 0x000F000F;", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    elif PIECE == 1:
        found = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00F000F0;", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    elif PIECE == 2:
        found = tl.inline_asm_elementwise("{ .reg .b32 u; shr.b32 u, $1, 8; and.b32 $0, u, 0x000F000F; }", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        found = tl.inline_asm_elementwise("{ .reg .b32 u; shr.b32 u, $1, 8; and.b32 $0, u, 0x00F000F0; }", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
%end
    return found.to(tl.${operand})
'''

KEYS_AT = '''\
@triton.jit
def numbers(codes, step, least):
%if codes == "fp8"
    return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * step
%else
    return codes.to(tl.float32) * step + least
%end


@triton.jit
def keys_at(keys, key_scales, recent_keys, staged, row, slot_row, group_row, at, here, dims):
    """Of slots `at` [n] of one KV head the key numbers at channels `dims` [m] as they are read, fp32 [n, m]; where not `here` [n], anything."""
    recent = here & (at >= tl.load(staged + row * 2)) & (at < tl.load(staged + row * 2 + 1))
%if codes == "fp8"
    code = tl.load(keys + (slot_row + at[:, None]) * ${qk_bytes} + dims[None, :], mask=here[:, None], other=0)
%else
    quarter = dims // ${qk_head_dim // 4}
    byte = 2 * (dims % ${qk_head_dim // 4}) + quarter // 2
    code = tl.load(keys + (slot_row + at[:, None]) * ${qk_bytes} + byte[None, :], mask=here[:, None], other=0)
    code = (code >> (quarter % 2 * 4)[None, :].to(tl.uint8)) & 15
%end
    scales = key_scales + (group_row + at[:, None] // 64) * ${parts * qk_head_dim} + dims[None, :]
    step = tl.load(scales, mask=here[:, None], other=0.0).to(tl.float32)
%if codes == "int4"
    least = tl.load(scales + ${qk_head_dim}, mask=here[:, None], other=0.0).to(tl.float32)
%else
    least = step
%end
    came = recent_keys + (tl.cast(row, tl.int64) * 64 + at[:, None] % 64) * ${qk_head_dim} + dims[None, :]
    came = tl.load(came, mask=recent[:, None], other=0.0).to(tl.float32)
    return tl.where(recent[:, None], came, numbers(code, step, least))
'''


def piece_unit(codes: str, piece: int) -> float:
    """What 1 is in the numbers of a piece."""
    return 1.0 if codes == "fp8" else 2.0**-24 * 16 ** (piece % 2)


def piece_list(stem: str, pieces: range) -> str:
    """Names of what there is for each piece."""
    return ", ".join(f"{stem}{i}" for i in pieces)


def code_values(codes: str, dtype: str, qk_head_dim: int, v_head_dim: int) -> dict[str, object]:
    """What templates say of codes, by name.

    dtype: of queries, as `codegen.launch.DTYPES` names it.
    """
    pieces = 2 if codes == "fp8" else 4
    # whole bytes of keys need no pieces: their channels lie side by side in a register, as products take them
    whole_keys = codes == "fp8"
    return {
        "codes": codes,
        "parts": parts(codes),
        # products of codes: fp16 holds each of them, and more of a query than bf16 does
        "operand": "float32" if dtype == "fp32" else "float16",
        "key_pieces": range(1 if whole_keys else pieces),
        "value_pieces": range(pieces),
        "qk_width": qk_head_dim if whole_keys else qk_head_dim // pieces,
        "v_width": v_head_dim // pieces,
        "key_dims": lambda i: "qk_dims" if whole_keys else f"({i * qk_head_dim // pieces} + qk_dims)",
        # bytes of 8-bit codes lie in the channels' order, 4-bit codes by quarters of the channels
        "value_dims": lambda i: f"(2 * v_dims + {i})" if codes == "fp8" else f"({i * v_head_dim // pieces} + v_dims)",
        "key_numbers": lambda i, words: (
            f"{words}.to(tl.float8e4nv, bitcast=True).to(tl.{'float32' if dtype == 'fp32' else 'float16'})"
            if whole_keys
            else f"piece({words}, {i})"
        ),
        "unit": lambda i: piece_unit(codes, i),
        "qk_bytes": packed(qk_head_dim, codes),
        "v_bytes": packed(v_head_dim, codes),
    }
