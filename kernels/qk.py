"""RMSNorm of the heads of q and k and rotary embedding, and the gradient; one stream of tokens, or two that are joined.

    xn = cast(x * rsqrt(sum(x * x) / D + EPS) * (f32(w) + WEIGHT_OFFSET));   y = cast(rotated(xn))

Parameters come in the order inputs, scalars, outputs, constexprs. A pointer whose ``HAS_`` flag is off is never touched.
"""

import triton
import triton.language as tl

from ._common import add_shares, program_index
from ._heads import (
    angles,
    angles_at,
    head_base,
    head_sum,
    load_pairs,
    load_vector,
    owned,
    store_pairs,
    turned,
)


@triton.jit
def _normed(first, second, rest, D: tl.constexpr, REST: tl.constexpr, EPS: tl.constexpr):
    """(float32 first, second, rest, rstd) of a tile of heads."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    rest = rest.to(tl.float32)
    rstd = tl.rsqrt(head_sum(first * first, second * second, rest * rest, REST) / D + EPS)
    return first, second, rest, rstd


@triton.jit
def _forward(
    x_ptr, w_ptr, y_ptr, cos, sin, base, out, live,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr,
    HAS_W: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
):  # fmt: skip
    """The heads at ``base`` of x, normed, turned and written at ``out`` of y."""
    type_ = x_ptr.dtype.element_ty
    first, second, rest = load_pairs(x_ptr, base, live, D, R, PAIRS, REST, GPTJ)
    if HAS_W:
        w_first, w_second, w_rest = load_vector(w_ptr, D, R, PAIRS, REST, GPTJ)
    first, second, rest, rstd = _normed(first, second, rest, D, REST, EPS)
    first, second, rest = first * rstd, second * rstd, rest * rstd
    if HAS_W:
        first, second, rest = (
            first * (w_first + WEIGHT_OFFSET),
            second * (w_second + WEIGHT_OFFSET),
            rest * (w_rest + WEIGHT_OFFSET),
        )
    first = first.to(type_).to(tl.float32)
    second = second.to(type_).to(tl.float32)
    first, second = turned(first, second, cos, sin, R // 2, PAIRS)
    store_pairs(y_ptr, out, first, second, rest, live, D, R, PAIRS, REST, GPTJ)


@triton.jit
def _one(
    x_ptr, w_ptr, y_ptr, positions_ptr, cos_sin_ptr, pid, tokens, count, rows,
    H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HAS_W: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    PERIOD: tl.constexpr, MROPE: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One tile of q or of k."""
    token, head, live = owned(pid, tokens, H, TOKENS, HEADS)
    cos, sin = angles(
        positions_ptr, cos_sin_ptr, token, tokens, count, rows, R, PAIRS, PERIOD, MROPE, S0, S1, S2, INTERLEAVED
    )
    base = head_base(token, head, H, D)
    _forward(x_ptr, w_ptr, y_ptr, cos, sin, base, base, live, D, R, PAIRS, REST, GPTJ, HAS_W, EPS, WEIGHT_OFFSET)


@triton.jit
def qk_norm_rope(
    x0_ptr,  # [tokens, H0, D]
    x1_ptr,  # [tokens, H1, D]
    w0_ptr,  # [D]
    w1_ptr,
    positions_ptr,  # [count], for mrope [3, count]; count is tokens, or those of one sequence
    cos_sin_ptr,  # [rows, R]
    tokens,
    count,
    rows,
    blocks0,
    y0_ptr,  # as x0
    y1_ptr,
    COUNT: tl.constexpr,
    H0: tl.constexpr, TOKENS0: tl.constexpr, HEADS0: tl.constexpr,
    H1: tl.constexpr, TOKENS1: tl.constexpr, HEADS1: tl.constexpr,
    D: tl.constexpr, GPTJ: tl.constexpr, HAS_W0: tl.constexpr, HAS_W1: tl.constexpr,
    R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    PERIOD: tl.constexpr, MROPE: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS<i> tokens by HEADS<i> heads of q or of k; those of q come first."""
    pid = program_index()
    if pid < blocks0:
        _one(x0_ptr, w0_ptr, y0_ptr, positions_ptr, cos_sin_ptr, pid, tokens, count, rows, H0, TOKENS0, HEADS0, HAS_W0,
             D, R, PAIRS, REST, GPTJ, EPS, WEIGHT_OFFSET, PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip
    elif COUNT > 1:
        _one(x1_ptr, w1_ptr, y1_ptr, positions_ptr, cos_sin_ptr, pid - blocks0, tokens, count, rows, H1, TOKENS1, HEADS1,
             HAS_W1, D, R, PAIRS, REST, GPTJ, EPS, WEIGHT_OFFSET, PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip


@triton.jit
def _joined(token, mine, all_tokens, start):
    """(the token in the joined stream, its number in its own)."""
    return token // mine * all_tokens + start + token % mine, token % mine


@triton.jit
def _stream(
    x_ptr, w_ptr, y_ptr, cos_sin_ptr, pid, batch, mine, all_tokens, start,
    H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HAS_W: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
):  # fmt: skip
    """One tile of the q or k of a stream, written into the joined one."""
    token, head, live = owned(pid, batch * mine, H, TOKENS, HEADS)
    out, row = _joined(token, mine, all_tokens, start)
    cos, sin = angles_at(cos_sin_ptr, row[:, None], mine, token < batch * mine, R, PAIRS)
    _forward(x_ptr, w_ptr, y_ptr, cos, sin, head_base(token, head, H, D), head_base(out, head, H, D), live,
             D, R, PAIRS, REST, GPTJ, HAS_W, EPS, WEIGHT_OFFSET)  # fmt: skip


@triton.jit
def qk_norm_rope_two_stream(
    q0_ptr,  # [batch, tokens0, H0, D]
    k0_ptr,  # [batch, tokens0, H1, D]
    q1_ptr,  # [batch, tokens1, H2, D]
    k1_ptr,
    wq0_ptr,  # [D]
    wk0_ptr,
    wq1_ptr,
    wk1_ptr,
    cos_sin0_ptr,  # [tokens0, R0]
    cos_sin1_ptr,  # [tokens1, R1]
    batch,
    tokens0,
    tokens1,
    blocks0,
    blocks1,
    blocks2,
    q_ptr,  # [batch, tokens0 + tokens1, H0, D]
    k_ptr,
    COUNT: tl.constexpr,
    H0: tl.constexpr, TOKENS0: tl.constexpr, HEADS0: tl.constexpr,
    H1: tl.constexpr, TOKENS1: tl.constexpr, HEADS1: tl.constexpr,
    H2: tl.constexpr, TOKENS2: tl.constexpr, HEADS2: tl.constexpr,
    H3: tl.constexpr, TOKENS3: tl.constexpr, HEADS3: tl.constexpr,
    D: tl.constexpr, GPTJ: tl.constexpr,
    HAS_W0: tl.constexpr, HAS_W1: tl.constexpr, HAS_W2: tl.constexpr, HAS_W3: tl.constexpr,
    R0: tl.constexpr, PAIRS0: tl.constexpr, REST0: tl.constexpr, R1: tl.constexpr, PAIRS1: tl.constexpr, REST1: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of q0, k0, q1 or k1, in this order."""
    pid = program_index()
    both = tokens0 + tokens1
    if pid < blocks0:
        _stream(q0_ptr, wq0_ptr, q_ptr, cos_sin0_ptr, pid, batch, tokens0, both, 0, H0, TOKENS0, HEADS0, HAS_W0,
                D, R0, PAIRS0, REST0, GPTJ, EPS, WEIGHT_OFFSET)  # fmt: skip
    else:
        pid -= blocks0
        if pid < blocks1:
            _stream(k0_ptr, wk0_ptr, k_ptr, cos_sin0_ptr, pid, batch, tokens0, both, 0, H1, TOKENS1, HEADS1, HAS_W1,
                    D, R0, PAIRS0, REST0, GPTJ, EPS, WEIGHT_OFFSET)  # fmt: skip
        else:
            pid -= blocks1
            if pid < blocks2:
                _stream(q1_ptr, wq1_ptr, q_ptr, cos_sin1_ptr, pid, batch, tokens1, both, tokens0, H2, TOKENS2, HEADS2, HAS_W2,
                        D, R1, PAIRS1, REST1, GPTJ, EPS, WEIGHT_OFFSET)  # fmt: skip
            else:
                _stream(k1_ptr, wk1_ptr, k_ptr, cos_sin1_ptr, pid - blocks2, batch, tokens1, both, tokens0, H3, TOKENS3, HEADS3,
                        HAS_W3, D, R1, PAIRS1, REST1, GPTJ, EPS, WEIGHT_OFFSET)  # fmt: skip


@triton.jit
def _store_share(
    ptr, first, second, rest, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr
):  # fmt: skip
    """The sum of a tile over its tokens and heads, one row of D float32."""
    first = tl.sum(tl.sum(first, axis=0), axis=0)
    second = tl.sum(tl.sum(second, axis=0), axis=0)
    j = tl.arange(0, PAIRS)
    if GPTJ:
        tl.store(ptr + 2 * j, first, mask=j < D // 2)
        tl.store(ptr + 2 * j + 1, second, mask=j < D // 2)
    else:
        tl.store(ptr + j, first, mask=j < R // 2)
        tl.store(ptr + R // 2 + j, second, mask=j < R // 2)
        if REST > 0:
            c = tl.arange(0, REST)
            tl.store(ptr + R + c, tl.sum(tl.sum(rest, axis=0), axis=0), mask=c < D - R)


@triton.jit
def _backward(
    x_ptr, dy_ptr, w_ptr, dx_ptr, positions_ptr, cos_sin_ptr, partial_ptr, pid, blocks, tokens, count, rows, all_tokens, start,
    H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HAS_W: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    STREAM: tl.constexpr, PERIOD: tl.constexpr, MROPE: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """``g = turned back dy; xh = x * rstd; gw = g * w'; dx = rstd * (gw - xh * mean(gw * xh))``, dw = sum of g * xh.

    Takes the tiles pid, pid + blocks, ... of q or of k; its share of dw stays in registers. STREAM: the tokens are those of a
    stream of ``count`` tokens a batch entry, joined to ``all_tokens`` in dy."""
    HALF: tl.constexpr = R // 2
    if HAS_W:
        w_first, w_second, w_rest = load_vector(w_ptr, D, R, PAIRS, REST, GPTJ)
        w_first += WEIGHT_OFFSET
        w_second += WEIGHT_OFFSET
        w_rest += WEIGHT_OFFSET
    s_first = tl.zeros((TOKENS, HEADS, PAIRS), tl.float32)
    s_second = tl.zeros((TOKENS, HEADS, PAIRS), tl.float32)
    s_rest = tl.zeros((TOKENS, HEADS, REST if REST > 0 else 1), tl.float32)
    tiles = ((tokens + TOKENS - 1) // TOKENS) * ((H + HEADS - 1) // HEADS)
    for tile in tl.range(pid, tiles, blocks):
        token, head, live = owned(tile, tokens, H, TOKENS, HEADS)
        base = head_base(token, head, H, D)
        if STREAM:
            out, row = _joined(token, count, all_tokens, start)
            dy_base = head_base(out, head, H, D)
            cos, sin = angles_at(cos_sin_ptr, row[:, None], rows, token < tokens, R, PAIRS)
        else:
            dy_base = base
            cos, sin = angles(
                positions_ptr,
                cos_sin_ptr,
                token,
                tokens,
                count,
                rows,
                R,
                PAIRS,
                PERIOD,
                MROPE,
                S0,
                S1,
                S2,
                INTERLEAVED,
            )
        first, second, rest = load_pairs(x_ptr, base, live, D, R, PAIRS, REST, GPTJ)
        g_first, g_second, g_rest = load_pairs(dy_ptr, dy_base, live, D, R, PAIRS, REST, GPTJ)
        first, second, rest, rstd = _normed(first, second, rest, D, REST, EPS)
        g_first, g_second = turned(g_first.to(tl.float32), g_second.to(tl.float32), cos, -sin, HALF, PAIRS)
        g_rest = g_rest.to(tl.float32)
        first, second, rest = first * rstd, second * rstd, rest * rstd
        if HAS_W:
            s_first += tl.where(live, g_first * first, 0.0)
            s_second += tl.where(live, g_second * second, 0.0)
            if REST > 0:
                s_rest += tl.where(live, g_rest * rest, 0.0)
            g_first, g_second, g_rest = g_first * w_first, g_second * w_second, g_rest * w_rest
        mean = head_sum(g_first * first, g_second * second, g_rest * rest, REST) / D
        store_pairs(dx_ptr, base, rstd * (g_first - first * mean), rstd * (g_second - second * mean),
                    rstd * (g_rest - rest * mean), live, D, R, PAIRS, REST, GPTJ)  # fmt: skip
    if HAS_W:
        _store_share(partial_ptr + pid.to(tl.int64) * D, s_first, s_second, s_rest, D, R, PAIRS, REST, GPTJ)


@triton.jit
def qk_norm_rope_bwd(
    x0_ptr,  # [tokens, H0, D]
    x1_ptr,
    w0_ptr,  # [D]
    w1_ptr,
    positions_ptr,  # as forward
    cos_sin_ptr,
    dy0_ptr,  # as x0
    dy1_ptr,
    tokens,
    count,
    rows,
    blocks0,
    blocks1,
    dx0_ptr,
    dx1_ptr,
    partial0_ptr,  # [blocks0, D] float32
    partial1_ptr,
    COUNT: tl.constexpr,
    H0: tl.constexpr, TOKENS0: tl.constexpr, HEADS0: tl.constexpr,
    H1: tl.constexpr, TOKENS1: tl.constexpr, HEADS1: tl.constexpr,
    D: tl.constexpr, GPTJ: tl.constexpr, HAS_W0: tl.constexpr, HAS_W1: tl.constexpr,
    R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    PERIOD: tl.constexpr, MROPE: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
):  # fmt: skip
    """The first blocks0 programs walk over q, the others over k."""
    pid = tl.program_id(0)
    if pid < blocks0:
        _backward(x0_ptr, dy0_ptr, w0_ptr, dx0_ptr, positions_ptr, cos_sin_ptr, partial0_ptr, pid, blocks0, tokens, count, rows,
                  0, 0, H0, TOKENS0, HEADS0, HAS_W0, D, R, PAIRS, REST, GPTJ, EPS, WEIGHT_OFFSET, False,
                  PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip
    elif COUNT > 1:
        _backward(x1_ptr, dy1_ptr, w1_ptr, dx1_ptr, positions_ptr, cos_sin_ptr, partial1_ptr, pid - blocks0, blocks1, tokens,
                  count, rows, 0, 0, H1, TOKENS1, HEADS1, HAS_W1, D, R, PAIRS, REST, GPTJ, EPS, WEIGHT_OFFSET, False,
                  PERIOD, MROPE, S0, S1, S2, INTERLEAVED)  # fmt: skip


@triton.jit
def qk_norm_rope_two_stream_bwd(
    q0_ptr,  # as forward
    k0_ptr,
    q1_ptr,
    k1_ptr,
    wq0_ptr,
    wk0_ptr,
    wq1_ptr,
    wk1_ptr,
    cos_sin0_ptr,
    cos_sin1_ptr,
    dq_ptr,  # [batch, tokens0 + tokens1, H0, D]
    dk_ptr,
    batch,
    tokens0,
    tokens1,
    blocks0,
    blocks1,
    blocks2,
    blocks3,
    dq0_ptr,
    dk0_ptr,
    dq1_ptr,
    dk1_ptr,
    partial0_ptr,  # [blocks0, D] float32
    partial1_ptr,
    partial2_ptr,
    partial3_ptr,
    COUNT: tl.constexpr,
    H0: tl.constexpr, TOKENS0: tl.constexpr, HEADS0: tl.constexpr,
    H1: tl.constexpr, TOKENS1: tl.constexpr, HEADS1: tl.constexpr,
    H2: tl.constexpr, TOKENS2: tl.constexpr, HEADS2: tl.constexpr,
    H3: tl.constexpr, TOKENS3: tl.constexpr, HEADS3: tl.constexpr,
    D: tl.constexpr, GPTJ: tl.constexpr,
    HAS_W0: tl.constexpr, HAS_W1: tl.constexpr, HAS_W2: tl.constexpr, HAS_W3: tl.constexpr,
    R0: tl.constexpr, PAIRS0: tl.constexpr, REST0: tl.constexpr, R1: tl.constexpr, PAIRS1: tl.constexpr, REST1: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Programs for q0, k0, q1 and k1, in this order."""
    pid = tl.program_id(0)
    both = tokens0 + tokens1
    if pid < blocks0:
        _backward(q0_ptr, dq_ptr, wq0_ptr, dq0_ptr, cos_sin0_ptr, cos_sin0_ptr, partial0_ptr, pid, blocks0, batch * tokens0,
                  tokens0, tokens0, both, 0, H0, TOKENS0, HEADS0, HAS_W0, D, R0, PAIRS0, REST0, GPTJ, EPS, WEIGHT_OFFSET, True,
                  False, False, 0, 0, 0, False)  # fmt: skip
    else:
        pid -= blocks0
        if pid < blocks1:
            _backward(k0_ptr, dk_ptr, wk0_ptr, dk0_ptr, cos_sin0_ptr, cos_sin0_ptr, partial1_ptr, pid, blocks1, batch * tokens0,
                      tokens0, tokens0, both, 0, H1, TOKENS1, HEADS1, HAS_W1, D, R0, PAIRS0, REST0, GPTJ, EPS, WEIGHT_OFFSET, True,
                      False, False, 0, 0, 0, False)  # fmt: skip
        else:
            pid -= blocks1
            if pid < blocks2:
                _backward(q1_ptr, dq_ptr, wq1_ptr, dq1_ptr, cos_sin1_ptr, cos_sin1_ptr, partial2_ptr, pid, blocks2,
                          batch * tokens1, tokens1, tokens1, both, tokens0, H2, TOKENS2, HEADS2, HAS_W2, D, R1, PAIRS1, REST1,
                          GPTJ, EPS, WEIGHT_OFFSET, True, False, False, 0, 0, 0, False)  # fmt: skip
            else:
                _backward(k1_ptr, dk_ptr, wk1_ptr, dk1_ptr, cos_sin1_ptr, cos_sin1_ptr, partial3_ptr, pid - blocks2, blocks3,
                          batch * tokens1, tokens1, tokens1, both, tokens0, H3, TOKENS3, HEADS3, HAS_W3, D, R1, PAIRS1, REST1,
                          GPTJ, EPS, WEIGHT_OFFSET, True, False, False, 0, 0, 0, False)  # fmt: skip


@triton.jit
def qk_norm_rope_bwd_reduce(
    partial0_ptr,  # [blocks0, D] float32
    partial1_ptr,
    partial2_ptr,
    partial3_ptr,
    blocks0,
    blocks1,
    blocks2,
    blocks3,
    dw0_ptr,  # [D]
    dw1_ptr,
    dw2_ptr,
    dw3_ptr,
    HAS_W0: tl.constexpr, HAS_W1: tl.constexpr, HAS_W2: tl.constexpr, HAS_W3: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second grid index is the part."""
    part = tl.program_id(1)
    if part == 0:
        if HAS_W0:
            add_shares(partial0_ptr, blocks0, dw0_ptr, D, D, ROWS, BLOCK)
    elif part == 1:
        if HAS_W1:
            add_shares(partial1_ptr, blocks1, dw1_ptr, D, D, ROWS, BLOCK)
    elif part == 2:
        if HAS_W2:
            add_shares(partial2_ptr, blocks2, dw2_ptr, D, D, ROWS, BLOCK)
    else:
        if HAS_W3:
            add_shares(partial3_ptr, blocks3, dw3_ptr, D, D, ROWS, BLOCK)
