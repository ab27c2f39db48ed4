"""Tiles of attention heads: which tokens and heads a program owns, their pairs, the angles of a token, the rotation.

A tile is ``[TOKENS, HEADS, columns]``. A head is taken apart into the first and the second elements of its pairs, ``[.., PAIRS]``
(h of them count), and in the neox style the rest behind rotary_dim, ``[.., REST]``. The gptj style reads whole heads, elements
(2j, 2j + 1) being a pair, and the rest is pairs that are not turned: so PAIRS is D / 2 there, filled up to a power of two.
Lanes are handed out along the last dim first, so the sum over a head stays in a wave and has one order whatever TOKENS and HEADS.
"""

import triton
import triton.language as tl


@triton.jit
def owned(pid, tokens, H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """(token [TOKENS], element offset of each head in units of heads [TOKENS, HEADS, 1], which are there) of a program."""
    SPLITS: tl.constexpr = (H + HEADS - 1) // HEADS
    token = (pid // SPLITS) * TOKENS + tl.arange(0, TOKENS)
    head = (pid % SPLITS) * HEADS + tl.arange(0, HEADS)
    live = (token < tokens)[:, None, None] & (head < H)[None, :, None]
    return token, head, live


@triton.jit
def head_base(token, head, H: tl.constexpr, D: tl.constexpr):
    """First element of each head, 64 bits, ``[TOKENS, HEADS, 1]``."""
    return (token.to(tl.int64)[:, None, None] * H + head[None, :, None]) * D


@triton.jit
def component(j, S1: tl.constexpr, S2: tl.constexpr, S0: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which position turns pair j."""
    if INTERLEAVED:
        return tl.where((j % 3 == 1) & (j < 3 * S1), 1, tl.where((j % 3 == 2) & (j < 3 * S2), 2, 0))
    else:
        return tl.where(j < S0, 0, tl.where(j < S0 + S1, 1, 2))


@triton.jit
def angles_at(cos_sin_ptr, row, rows, live, R: tl.constexpr, PAIRS: tl.constexpr):
    """(cos, sin) float32 ``[TOKENS, 1, PAIRS]`` at the table's ``row`` ``[TOKENS, 1 or PAIRS]``; outside of it no rotation."""
    HALF: tl.constexpr = R // 2
    j = tl.arange(0, PAIRS)[None, :]
    inside = (row >= 0) & (row < rows) & live[:, None] & (j < HALF)
    at = cos_sin_ptr + row.to(tl.int64) * R + j
    cos = tl.load(at, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def angles(
    positions_ptr,
    cos_sin_ptr,
    token,
    tokens,
    count,
    rows,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    PERIOD: tl.constexpr,
    MROPE: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """(cos, sin) of tokens with positions ``[count]``, for mrope ``[3, count]``; PERIOD: those of one sequence serve all."""
    live = token < tokens
    where = token
    if PERIOD:
        where = token % count
    if MROPE:
        at = positions_ptr + where.to(tl.int64)
        step = tl.cast(count, tl.int64)
        first = tl.load(at, mask=live, other=-1)[:, None]
        second = tl.load(at + step, mask=live, other=-1)[:, None]
        third = tl.load(at + 2 * step, mask=live, other=-1)[:, None]
        c = component(tl.arange(0, PAIRS)[None, :], S1, S2, S0, INTERLEAVED)
        row = tl.where(c == 0, first, tl.where(c == 1, second, third))
    else:
        row = tl.load(positions_ptr + where, mask=live, other=-1)[:, None]
    return angles_at(cos_sin_ptr, row, rows, live, R, PAIRS)


@triton.jit
def load_pairs(
    ptr,
    base,
    live,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    GPTJ: tl.constexpr,
):
    """(first, second, rest) in the dtype of the buffer, zeros beyond; without a rest ``first`` stands in for it."""
    if GPTJ:
        c = tl.arange(0, 2 * PAIRS)[None, None, :]
        whole = tl.load(ptr + base + c, mask=live & (c < D), other=0.0)
        T: tl.constexpr = whole.shape[0]
        H: tl.constexpr = whole.shape[1]
        first, second = tl.split(tl.reshape(whole, (T, H, PAIRS, 2)))
        return first, second, first
    else:
        HALF: tl.constexpr = R // 2
        c = tl.arange(0, PAIRS)[None, None, :]
        first = tl.load(ptr + base + c, mask=live & (c < HALF), other=0.0)
        second = tl.load(ptr + base + HALF + c, mask=live & (c < HALF), other=0.0)
        if REST > 0:
            c = tl.arange(0, REST)[None, None, :]
            return first, second, tl.load(ptr + base + R + c, mask=live & (c < D - R), other=0.0)
        else:
            return first, second, first


@triton.jit
def store_pairs(
    ptr,
    base,
    first,
    second,
    rest,
    live,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    GPTJ: tl.constexpr,
):
    """The one rounding: to the dtype of the buffer."""
    type_ = ptr.dtype.element_ty
    if GPTJ:
        whole = tl.join(first.to(type_), second.to(type_))
        T: tl.constexpr = whole.shape[0]
        H: tl.constexpr = whole.shape[1]
        c = tl.arange(0, 2 * PAIRS)[None, None, :]
        tl.store(ptr + base + c, tl.reshape(whole, (T, H, 2 * PAIRS)), mask=live & (c < D))
    else:
        HALF: tl.constexpr = R // 2
        c = tl.arange(0, PAIRS)[None, None, :]
        tl.store(ptr + base + c, first.to(type_), mask=live & (c < HALF))
        tl.store(ptr + base + HALF + c, second.to(type_), mask=live & (c < HALF))
        if REST > 0:
            c = tl.arange(0, REST)[None, None, :]
            tl.store(ptr + base + R + c, rest.to(type_), mask=live & (c < D - R))


@triton.jit
def load_vector(ptr, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr):
    """A vector over the elements of a head, float32, taken apart like a head."""
    zero = tl.arange(0, 1).to(tl.int64)[:, None, None]
    first, second, rest = load_pairs(ptr, zero, zero == 0, D, R, PAIRS, REST, GPTJ)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@triton.jit
def turned(first, second, cos, sin, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """float32 pairs turned by cos and sin; pairs from HALF on keep their bits."""
    a = first * cos - second * sin
    b = second * cos + first * sin
    if HALF < PAIRS:
        on = tl.arange(0, PAIRS)[None, None, :] < HALF
        return tl.where(on, a, first), tl.where(on, b, second)
    else:
        return a, b


@triton.jit
def head_sum(first, second, rest, REST: tl.constexpr):
    """Sum over the elements of each head, ``[TOKENS, HEADS, 1]``."""
    total = tl.sum(first, axis=2) + tl.sum(second, axis=2)
    if REST > 0:
        total += tl.sum(rest, axis=2)
    return total[:, :, None]
