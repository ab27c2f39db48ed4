"""Rotary embedding of up to four arrays of heads that share their tokens, in one launch.

    o_first = x_first * cos_j - x_second * sin_j;   o_second = x_second * cos_j + x_first * sin_j

Parameters come in the order inputs, scalars, outputs, constexprs. Arrays from COUNT on are never touched.
"""

import triton
import triton.language as tl

from ._common import program_index
from ._heads import angles, head_base, load_pairs, owned, store_pairs, turned


@triton.jit
def _array(
    x_ptr, y_ptr, positions_ptr, cos_sin_ptr, pid, tokens, count, rows,
    H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr, GPTJ: tl.constexpr, INVERSE: tl.constexpr, PERIOD: tl.constexpr, MROPE: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One tile of one array."""
    token, head, live = owned(pid, tokens, H, TOKENS, HEADS)
    base = head_base(token, head, H, D)
    first, second, rest = load_pairs(x_ptr, base, live, D, R, PAIRS, REST, GPTJ)
    cos, sin = angles(
        positions_ptr, cos_sin_ptr, token, tokens, count, rows, R, PAIRS, PERIOD, MROPE, S0, S1, S2, INTERLEAVED
    )
    if INVERSE:
        sin = -sin
    first, second = turned(first.to(tl.float32), second.to(tl.float32), cos, sin, R // 2, PAIRS)
    store_pairs(y_ptr, base, first, second, rest, live, D, R, PAIRS, REST, GPTJ)


@triton.jit
def rope(
    x0_ptr,  # [tokens, H0, D]
    x1_ptr,  # [tokens, H1, D]
    x2_ptr,
    x3_ptr,
    positions_ptr,  # [count], for mrope [3, count]; count is tokens, or those of one sequence
    cos_sin_ptr,  # [rows, R], any float dtype
    tokens,
    count,
    rows,
    blocks0,
    blocks1,
    blocks2,
    y0_ptr,  # as x0
    y1_ptr,
    y2_ptr,
    y3_ptr,
    COUNT: tl.constexpr,
    H0: tl.constexpr, TOKENS0: tl.constexpr, HEADS0: tl.constexpr,
    H1: tl.constexpr, TOKENS1: tl.constexpr, HEADS1: tl.constexpr,
    H2: tl.constexpr, TOKENS2: tl.constexpr, HEADS2: tl.constexpr,
    H3: tl.constexpr, TOKENS3: tl.constexpr, HEADS3: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr,
    INVERSE: tl.constexpr, PERIOD: tl.constexpr, MROPE: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS<i> tokens by HEADS<i> heads of one array; programs of array 0 come first."""
    pid = program_index()
    if pid < blocks0:
        _array(x0_ptr, y0_ptr, positions_ptr, cos_sin_ptr, pid, tokens, count, rows, H0, TOKENS0, HEADS0,
               D, R, PAIRS, REST, GPTJ, INVERSE, PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip
    elif COUNT > 1:
        pid -= blocks0
        if pid < blocks1:
            _array(x1_ptr, y1_ptr, positions_ptr, cos_sin_ptr, pid, tokens, count, rows, H1, TOKENS1, HEADS1,
                   D, R, PAIRS, REST, GPTJ, INVERSE, PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip
        elif COUNT > 2:
            pid -= blocks1
            if pid < blocks2:
                _array(x2_ptr, y2_ptr, positions_ptr, cos_sin_ptr, pid, tokens, count, rows, H2, TOKENS2, HEADS2,
                       D, R, PAIRS, REST, GPTJ, INVERSE, PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip
            elif COUNT > 3:
                _array(x3_ptr, y3_ptr, positions_ptr, cos_sin_ptr, pid - blocks2, tokens, count, rows, H3, TOKENS3, HEADS3,
                       D, R, PAIRS, REST, GPTJ, INVERSE, PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip
