"""GroupNorm with an optional SiLU, channels last and channels first, forward and backward.

    m0 = sum(a) / N;  d = a - m0;  e = sum(d) / N;  var = sum(d * d) / N - e * e     over the N elements of a group
    v = ((d - e) * rstd) * f32(weight) + f32(bias);  y = cast(v), or cast(v / (1 + exp(-v)))

An example is a matrix [S, C] (LAST) or [C, S]. A tile has POS positions and CH channels, ``[POS, CH]`` or ``[CH, POS]``, so that
its last dim is the contiguous one; vectors of the channels lie along it (LAST) or across. A small group is one tile of one
program. Of larger ones each channel is cut into PARTS parts of PART positions: a first launch leaves (m0, e, sum of squared
deviations) of each channel and part, a second puts those of a group together by Chan's formula, a third normalises.

Parameters come in the order inputs, scalars, outputs, constexprs. A pointer whose ``HAS_`` flag is off is never dereferenced.
Offsets are a 64-bit base of the example and the tile plus 32 bits.
"""

import triton
import triton.language as tl

from ._common import add_shares, program_index


@triton.jit
def _along(v, LAST: tl.constexpr):
    """A vector of the channels, to broadcast over a tile."""
    if LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def _per_channel(tile, LAST: tl.constexpr):
    """Sums over the positions of a tile: ``[CH]``."""
    if LAST:
        return tl.sum(tile, axis=0)
    else:
        return tl.sum(tile, axis=1)


@triton.jit
def _tile(pos, ch, positions, channels, S: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr):
    """(offsets, mask) of a tile relative to its first element."""
    if LAST:
        return pos[:, None] * C + ch[None, :], (pos < positions)[:, None] & (ch < channels)[None, :]
    else:
        return ch[:, None] * S + pos[None, :], (ch < channels)[:, None] & (pos < positions)[None, :]


@triton.jit
def _start(batch, first_pos, first_ch, S: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr):
    """64-bit offset of the element at a position and channel."""
    if LAST:
        return (batch * S + first_pos) * C + first_ch
    else:
        return (batch * C + first_ch) * S + first_pos


@triton.jit
def _vector(ptr, ch, mask, HAS: tl.constexpr, missing: tl.constexpr):
    """A vector of the channels in float32, or what stands for an absent one."""
    if HAS:
        return tl.load(ptr + ch, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full(ch.shape, missing, tl.float32)


@triton.jit
def _activated(v, SILU: tl.constexpr):
    if SILU:
        return v / (1.0 + tl.exp(-v))
    else:
        return v


@triton.jit
def _through_activation(dy, xh, w, b, SILU: tl.constexpr):
    """The cotangent of the value before the activation."""
    if SILU:
        v = xh * w + b
        sg = 1.0 / (1.0 + tl.exp(-v))
        return dy * (sg * (1.0 + v * (1.0 - sg)))
    else:
        return dy


@triton.jit
def _place(PARTS: tl.constexpr, C: tl.constexpr, CH: tl.constexpr):
    """(example, part, first channel) of this program; parts count fastest."""
    index = program_index().to(tl.int64)
    tiles: tl.constexpr = (C + CH - 1) // CH
    return index // (PARTS * tiles), index % PARTS, index // PARTS % tiles * CH


@triton.jit
def groupnorm_fwd(
    x_ptr,  # [B, S, C] or [B, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # as x
    stats_ptr,  # [B, 3, C] float32: m0, e, rstd of each channel's group
    S: tl.constexpr,
    C: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CG: tl.constexpr,
    EPS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    POS: tl.constexpr,
    CH: tl.constexpr,
):
    """A program owns one group of one example, in registers from its one read to its one write."""
    index = program_index().to(tl.int64)
    batch, g = index // (C // CG), index % (C // CG)
    pos, ch = tl.arange(0, POS), tl.arange(0, CH)
    offsets, mask = _tile(pos, ch, S, CG, S, C, LAST)
    start = _start(batch, 0, g * CG, S, C, LAST)
    a = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    w = _vector(weight_ptr + g * CG, ch, ch < CG, HAS_WEIGHT, 1.0)
    b = _vector(bias_ptr + g * CG, ch, ch < CG, HAS_BIAS, 0.0)
    count: tl.constexpr = 1.0 * S * CG
    center = tl.sum(tl.sum(a, axis=1), axis=0) / count
    d = tl.where(mask, a - center, 0.0)
    e = tl.sum(tl.sum(d, axis=1), axis=0) / count
    var = tl.sum(tl.sum(d * d, axis=1), axis=0) / count - e * e
    rstd = tl.rsqrt(tl.where(var < 0.0, 0.0, var) + EPS)  # a comparison keeps NaN
    v = _activated((d - e) * rstd * _along(w, LAST) + _along(b, LAST), SILU)
    tl.store(y_ptr + start + offsets, v.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_STATS:
        at = stats_ptr + batch * (3 * C) + g * CG + ch
        one = tl.full(ch.shape, 1.0, tl.float32)
        tl.store(at, center * one, mask=ch < CG)
        tl.store(at + C, e * one, mask=ch < CG)
        tl.store(at + 2 * C, rstd * one, mask=ch < CG)


@triton.jit
def groupnorm_partials(
    x_ptr,  # [B, S, C] or [B, C, S]
    partial_ptr,  # [B, PARTS, 3, C] float32: m0, e, sum of squared deviations of a channel's part
    S: tl.constexpr,
    C: tl.constexpr,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    POS: tl.constexpr,
    CH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns CH channels of one part. Deviations are counted from the mean of the first tile's channel, ``m0``."""
    batch, part, first = _place(PARTS, C, CH)
    ch = tl.arange(0, CH)
    channels = C - first
    positions = tl.minimum(S - part * PART, PART)
    x_ptr += _start(batch, part * PART, first, S, C, LAST)
    offsets, mask = _tile(tl.arange(0, POS), ch, positions, channels, S, C, LAST)
    a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    center = _per_channel(a, LAST) / tl.minimum(positions, POS).to(tl.float32)
    if PART == POS:  # one tile: it is still in registers
        deviations = tl.where(mask, a - _along(center, LAST), 0.0)
        squares = deviations * deviations
    else:
        deviations = tl.zeros_like(a)
        squares = tl.zeros_like(a)
        for begin in tl.range(0, PART, POS, num_stages=STAGES):
            offsets, mask = _tile(begin + tl.arange(0, POS), ch, positions, channels, S, C, LAST)
            a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            d = tl.where(mask, a - _along(center, LAST), 0.0)
            deviations += d
            squares += d * d
    total = _per_channel(deviations, LAST)
    e = total / positions.to(tl.float32)
    at = partial_ptr + (batch * PARTS + part) * (3 * C) + first + ch
    live = ch < channels
    tl.store(at, center, mask=live)
    tl.store(at + C, e, mask=live)
    tl.store(at + 2 * C, _per_channel(squares, LAST) - total * e, mask=live)


@triton.jit
def groupnorm_combine(
    partial_ptr,  # [B, PARTS, 3, C]
    stats_ptr,  # [B, 3, C]
    S: tl.constexpr,
    C: tl.constexpr,
    CG: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CH: tl.constexpr,
    EPS: tl.constexpr,
    PART: tl.constexpr,
):
    """A program puts the parts of one group together: ``[ROWS, CH]`` of them, each with its count of elements."""
    index = program_index().to(tl.int64)
    batch, g = index // (C // CG), index % (C // CG)
    p, ch = tl.arange(0, ROWS)[:, None], tl.arange(0, CH)[None, :]
    mask = (p < PARTS) & (ch < CG)
    partial_ptr += batch * (PARTS * 3 * C) + g * CG
    at = partial_ptr + p * (3 * C) + ch
    pivot = tl.load(partial_ptr)
    m = tl.load(at, mask=mask, other=0.0)
    e = tl.load(at + C, mask=mask, other=0.0)
    squares = tl.load(at + 2 * C, mask=mask, other=0.0)
    n = tl.where(mask, tl.minimum(S - p * PART, PART), 0).to(tl.float32)
    count: tl.constexpr = 1.0 * S * CG
    shift = tl.where(mask, m - pivot, 0.0)
    offset = tl.sum(tl.sum(n * (shift + e), axis=1), axis=0) / count
    d = tl.where(mask, (shift - offset) + e, 0.0)
    var = tl.sum(tl.sum(squares + n * d * d, axis=1), axis=0) / count
    rstd = tl.rsqrt(tl.where(var < 0.0, 0.0, var) + EPS)
    # the mean, and what its rounding to float32 loses
    center = pivot + offset
    moved = center - pivot
    low = (pivot - (center - moved)) + (offset - moved)
    ch = tl.arange(0, CH)
    one = tl.full(ch.shape, 1.0, tl.float32)
    out = stats_ptr + batch * (3 * C) + g * CG + ch
    tl.store(out, center * one, mask=ch < CG)
    tl.store(out + C, low * one, mask=ch < CG)
    tl.store(out + 2 * C, rstd * one, mask=ch < CG)


@triton.jit
def groupnorm_apply(
    x_ptr,  # [B, S, C] or [B, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    stats_ptr,  # [B, 3, C]
    y_ptr,  # as x
    S: tl.constexpr,
    C: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    POS: tl.constexpr,
    CH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns CH channels of one part."""
    batch, part, first = _place(PARTS, C, CH)
    ch = tl.arange(0, CH)
    channels = C - first
    live = ch < channels
    stats_ptr += batch * (3 * C) + first
    center = _along(tl.load(stats_ptr + ch, mask=live, other=0.0), LAST)
    low = _along(tl.load(stats_ptr + C + ch, mask=live, other=0.0), LAST)
    rstd = tl.load(stats_ptr + 2 * C + ch, mask=live, other=0.0)
    scale = _along(rstd * _vector(weight_ptr + first, ch, live, HAS_WEIGHT, 1.0), LAST)
    b = _along(_vector(bias_ptr + first, ch, live, HAS_BIAS, 0.0), LAST)
    positions = tl.minimum(S - part * PART, PART)
    start = _start(batch, part * PART, first, S, C, LAST)
    for begin in tl.range(0, PART, POS, num_stages=STAGES):
        offsets, mask = _tile(begin + tl.arange(0, POS), ch, positions, channels, S, C, LAST)
        a = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        v = _activated(((a - center) - low) * scale + b, SILU)
        tl.store(y_ptr + start + offsets, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def groupnorm_bwd_sums(
    x_ptr,  # [B, S, C] or [B, C, S]
    dy_ptr,  # as x
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    stats_ptr,  # [B, 3, C]
    partial_ptr,  # [B, PARTS, 2, C] float32: sum(g * xh), sum(g) of a channel's part
    S: tl.constexpr,
    C: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    POS: tl.constexpr,
    CH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns CH channels of one part."""
    batch, part, first = _place(PARTS, C, CH)
    ch = tl.arange(0, CH)
    channels = C - first
    live = ch < channels
    stats_ptr += batch * (3 * C) + first
    center = _along(tl.load(stats_ptr + ch, mask=live, other=0.0), LAST)
    low = _along(tl.load(stats_ptr + C + ch, mask=live, other=0.0), LAST)
    rstd = _along(tl.load(stats_ptr + 2 * C + ch, mask=live, other=0.0), LAST)
    w = _along(_vector(weight_ptr + first, ch, live, HAS_WEIGHT, 1.0), LAST)
    b = _along(_vector(bias_ptr + first, ch, live, HAS_BIAS, 0.0), LAST)
    positions = tl.minimum(S - part * PART, PART)
    start = _start(batch, part * PART, first, S, C, LAST)
    offsets, _ = _tile(tl.arange(0, POS), ch, positions, channels, S, C, LAST)
    along = tl.zeros_like(offsets).to(tl.float32)
    plain = tl.zeros_like(along)
    for begin in tl.range(0, PART, POS, num_stages=STAGES):
        offsets, mask = _tile(begin + tl.arange(0, POS), ch, positions, channels, S, C, LAST)
        a = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        xh = tl.where(mask, ((a - center) - low) * rstd, 0.0)
        g = _through_activation(dy, xh, w, b, SILU)
        along += g * xh
        plain += g
    at = partial_ptr + (batch * PARTS + part) * (2 * C) + first + ch
    tl.store(at, _per_channel(along, LAST), mask=live)
    tl.store(at + C, _per_channel(plain, LAST), mask=live)


@triton.jit
def groupnorm_bwd_combine(
    partial_ptr,  # [B, PARTS, 2, C]
    weight_ptr,  # [C]
    means_ptr,  # [B, 2, C] float32: mean(gw * xh), mean(gw) of each channel's group
    S: tl.constexpr,
    C: tl.constexpr,
    CG: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """A program owns one group of one example."""
    index = program_index().to(tl.int64)
    batch, g = index // (C // CG), index % (C // CG)
    p, ch = tl.arange(0, ROWS)[:, None], tl.arange(0, CH)
    mask = (p < PARTS) & (ch < CG)[None, :]
    at = partial_ptr + batch * (PARTS * 2 * C) + g * CG + p * (2 * C) + ch[None, :]
    w = _vector(weight_ptr + g * CG, ch, ch < CG, HAS_WEIGHT, 1.0)
    count: tl.constexpr = 1.0 * S * CG
    along = tl.sum(tl.sum(tl.load(at, mask=mask, other=0.0), axis=0) * w, axis=0) / count
    plain = tl.sum(tl.sum(tl.load(at + C, mask=mask, other=0.0), axis=0) * w, axis=0) / count
    one = tl.full(ch.shape, 1.0, tl.float32)
    out = means_ptr + batch * (2 * C) + g * CG + ch
    tl.store(out, along * one, mask=ch < CG)
    tl.store(out + C, plain * one, mask=ch < CG)


@triton.jit
def groupnorm_bwd_dx(
    x_ptr,  # [B, S, C] or [B, C, S]
    dy_ptr,  # as x
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    stats_ptr,  # [B, 3, C]
    means_ptr,  # [B, 2, C]
    dx_ptr,  # as x
    S: tl.constexpr,
    C: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    POS: tl.constexpr,
    CH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``dx = rstd * (gw - mean(gw) - xh * mean(gw * xh))``. A program owns CH channels of one part."""
    batch, part, first = _place(PARTS, C, CH)
    ch = tl.arange(0, CH)
    channels = C - first
    live = ch < channels
    stats_ptr += batch * (3 * C) + first
    means_ptr += batch * (2 * C) + first
    center = _along(tl.load(stats_ptr + ch, mask=live, other=0.0), LAST)
    low = _along(tl.load(stats_ptr + C + ch, mask=live, other=0.0), LAST)
    rstd = _along(tl.load(stats_ptr + 2 * C + ch, mask=live, other=0.0), LAST)
    along = _along(tl.load(means_ptr + ch, mask=live, other=0.0), LAST)
    plain = _along(tl.load(means_ptr + C + ch, mask=live, other=0.0), LAST)
    w = _along(_vector(weight_ptr + first, ch, live, HAS_WEIGHT, 1.0), LAST)
    b = _along(_vector(bias_ptr + first, ch, live, HAS_BIAS, 0.0), LAST)
    positions = tl.minimum(S - part * PART, PART)
    start = _start(batch, part * PART, first, S, C, LAST)
    for begin in tl.range(0, PART, POS, num_stages=STAGES):
        offsets, mask = _tile(begin + tl.arange(0, POS), ch, positions, channels, S, C, LAST)
        a = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        xh = ((a - center) - low) * rstd
        gw = _through_activation(dy, xh, w, b, SILU) * w
        dx = rstd * ((gw - plain) - xh * along)
        tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def groupnorm_bwd_reduce(
    partial_ptr,  # [PROGRAMS, 2, C] float32
    PROGRAMS,
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    C: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK channels of one of the two, which its second grid index says."""
    if tl.program_id(1) == 0:
        if HAS_DWEIGHT:
            add_shares(partial_ptr, PROGRAMS, dweight_ptr, C, 2 * C, ROWS, BLOCK)
    else:
        if HAS_DBIAS:
            add_shares(partial_ptr + C, PROGRAMS, dbias_ptr, C, 2 * C, ROWS, BLOCK)
