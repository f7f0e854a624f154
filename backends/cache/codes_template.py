"""The text that turns codes of 8 or 4 bits into numbers, for all kernels that read a cache of them.

A word of 16 bits has two codes of 8 bits or four of 4; kernels take the codes at one place of all words as a tile of their own, a piece.
"""

from __future__ import annotations

from sparsify.ops.quantised import packed

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
