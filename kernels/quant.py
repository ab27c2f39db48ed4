"""Quantisation of a row: alone, or as the epilogue of RMSNorm with or without a residual. One launch.

    y = f32(x), or the float32 result of RMSNorm (kernels/rmsnorm.py);  z = y * f32(smooth_scale)
    a = min(max|z|, UB) over the row or a group of columns, NaN wins
    float32: s = a / MAX, 1 where s < 2**-126        e8m0: s = 2**(E - 127), E stored as a byte
    code = RNE(clip(z / s, -MAX, MAX))

Maxima are taken of the bits of |z| as integers, whose order is that of the values with NaN above all. Codes are written as
bytes, so that a format needs no type in the compiler; ``HARD`` names the format where the target converts to it by itself. Without
UB, and with a scale that never saturates, |z / s| exceeds MAX by an ulp at most, which rounds to MAX: no CLIP. EXACT asks for the
compiler's own division.
"""

import triton
import triton.language as tl

from ._common import (
    affine,
    load,
    load_again,
    load_first,
    program_index,
    row_sum,
    scaled,
    spread,
    store,
    store_row_scalar,
    summed,
    tile_cols,
    tile_rows,
)


@triton.jit
def _grouped(v, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """A tile with the columns split into groups, the last dim. Nothing moves between lanes."""
    if CHUNKS == 0:
        return tl.reshape(v, (WIDTH // GROUP, GROUP))
    else:
        return tl.reshape(v, (ROWS, WIDTH // GROUP, GROUP))


@triton.jit
def _ungrouped(v, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    if CHUNKS == 0:
        return tl.reshape(v, (BLOCK,))
    else:
        return tl.reshape(v, (ROWS, CHUNKS, BLOCK))


@triton.jit
def _magnitude(z):
    """Bits of |z|: integers in the order of the values, NaN above infinity."""
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _row_max(bits, CHUNKS: tl.constexpr):
    """Maximum over the columns of a tile of integers: a scalar, or [ROWS]."""
    if CHUNKS == 0:
        return tl.max(bits, axis=0)
    else:
        return tl.max(tl.max(bits, axis=1), axis=1)


@triton.jit
def _exponent(a, MAX: tl.constexpr, MANTISSA: tl.constexpr, TOP: tl.constexpr, E8M0: tl.constexpr):
    """E of 2**(E - 127) for the maximum a of a group, int32: 127 for nothing to scale, 255 for NaN and infinity."""
    t = a * (1.0 / MAX)
    if E8M0 == "up":
        bits = t.to(tl.int32, bitcast=True)
        e = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    else:
        HALF: tl.constexpr = (1 << (22 - MANTISSA)) if E8M0 == "even" else 0
        e = ((a.to(tl.int32, bitcast=True) + HALF) >> 23) - TOP
    e = tl.minimum(tl.maximum(e, 1), 254)
    e = tl.where((a == 0) | (t < 1.1754943508222875e-38), 127, e)
    return tl.where(a.to(tl.int32, bitcast=True) >= 0x7F800000, 255, e)


@triton.jit
def _reciprocal(e):
    """2**(127 - E), exact, the subnormal one included; NaN for E = 255."""
    bits = tl.where(e == 254, 1 << 22, (254 - e) << 23)
    return tl.where(e == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _scale(bits, UB: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr, TOP: tl.constexpr, E8M0: tl.constexpr):
    """(scale as stored, what :func:`_quotient` takes, 1/s) from the bits of the maximum: float32 twice, or E and 1/s."""
    a = bits.to(tl.float32, bitcast=True)
    if UB > 0.0:
        a = tl.where(a > UB, UB, a)  # a comparison keeps NaN
    if E8M0 != "":
        e = _exponent(a, MAX, MANTISSA, TOP, E8M0)
        r = _reciprocal(e)
        return e, r, r
    else:
        s = tl.div_rn(a, MAX)
        s = tl.where(s < 1.1754943508222875e-38, 1.0, s)
        return s, s, tl.div_rn(1.0, s)


@triton.jit
def _divide_by(z, s, r):
    """``z / s`` with ``r = RN(1 / s)`` of the row or group, where ``|z / s|`` is at most some power of two and s >= 2**-126.

    The product is within two ulps; the first correction is faithful, the second, by Markstein's theorem, the IEEE quotient. That
    needs remainders above the smallest subnormal, hence |z| >= 2**-100; below, the last bit of the quotient may differ. Twelve
    instructions of the compiler's division, with a branch, become six. The sign is put back for a z of -0."""
    q = z * r
    q = tl.fma(tl.fma(-q, s, z), r, q)
    q = tl.fma(tl.fma(-q, s, z), r, q)
    return (q.to(tl.int32, bitcast=True) | (z.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _quotient(z, s, r, E8M0: tl.constexpr, EXACT: tl.constexpr):
    """``z / s``, the IEEE quotient. With 1/s a power of two the product is the same number; where values beyond the largest may
    occur a quotient may overflow, which the fast way does not survive."""
    if E8M0 != "":
        return z * s
    elif EXACT:
        return tl.div_rn(z, s)
    else:
        return _divide_by(z, s, r)


@triton.jit
def _convert_amd(v, HARD: tl.constexpr):
    """fp8 by AMD's own instruction, "fp8" (e4m3) or "bf8" (e5m2), of the flavour of the target: the low byte of its result.

    Not Triton's cast: Triton 3.6 keeps the conversions of the first AMD target of a process and takes them for the next target,
    where it aborts or converts in software."""
    ASM: tl.constexpr = "v_cvt_pk_" + HARD + "_f32 $0, $1, $1"
    return tl.inline_asm_elementwise(ASM, "=v,v", [v], dtype=tl.int32, is_pure=True, pack=1).to(tl.uint8)


@triton.jit
def _encode(
    v, MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FNUZ: tl.constexpr, HARD: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Codes of the clipped values, uint8, to nearest even. MANTISSA 0: int8. BIAS 1: fp4, the sign in bit 3."""
    if CLIP:
        v = tl.where(v > MAX, MAX, tl.where(v < -MAX, -MAX, v))  # comparisons let NaN through
    if HARD == "e4m3fn":
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif HARD == "e5m2":
        return v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif HARD != "":
        return _convert_amd(v, HARD)
    elif MANTISSA == 0:
        # Adding 1.5 * 2**23 leaves the integer, to nearest even, in the low bits.
        v = tl.where(v != v, 0.0, v)
        return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    else:
        bits = v.to(tl.int32, bitcast=True)
        mag = bits & 0x7FFFFFFF
        SHIFT: tl.constexpr = 23 - MANTISSA
        normal = (mag + ((1 << (SHIFT - 1)) - 1) + ((mag >> SHIFT) & 1)) >> SHIFT
        normal -= (127 - BIAS) << MANTISSA
        # The same with the spacing of subnormals: code 1 is 2**(1 - BIAS - MANTISSA).
        LIFT: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
        LIFT_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
        small = (mag.to(tl.float32, bitcast=True) + LIFT).to(tl.int32, bitcast=True) - LIFT_BITS
        code = tl.where(mag < ((128 - BIAS) << 23), small, normal)
        if BIAS == 1:
            return (code | ((bits >> 28) & 8)).to(tl.uint8)
        else:
            sign = (bits >> 24) & 0x80
            if FNUZ:
                code = tl.where(code == 0, 0, code | sign)
                code = tl.where(mag > 0x7F800000, 0x80, code)
            else:
                code = tl.where(mag > 0x7F800000, 0x7F, code | sign)
            return code.to(tl.uint8)


@triton.jit
def _store_codes(
    base, start, codes, cols, inside, MASKED: tl.constexpr,
    P: tl.constexpr, PACKED: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    row_mask,
):  # fmt: skip
    """Codes at the columns of a tile; packed: element 2i in the low nibble of byte i. ``row_mask`` broadcasts over a tile."""
    if PACKED:
        half = tile_cols(CHUNKS, ROWS, BLOCK // 2, VEC // 2)
        if CHUNKS == 0:
            pairs = tl.reshape(codes, (BLOCK // 2, 2))
        else:
            pairs = tl.reshape(codes, (ROWS, CHUNKS, BLOCK // 2, 2))
        low, high = tl.split(pairs)
        half += start // 2
        byte = low | (high << 4)
        if MASKED:
            tl.store(base + half, byte, mask=(half < P // 2) & row_mask)
        else:
            tl.store(base + half, byte)
    elif MASKED:
        tl.store(base + cols, codes, mask=inside)
    else:
        tl.store(base + cols, codes)


@triton.jit
def _scale_offset(row, j, M, G: tl.constexpr, SP: tl.constexpr, LAYOUT: tl.constexpr):
    """Element of scale (row, j) in its array; 64 bits."""
    if LAYOUT == "column":
        return j.to(tl.int64) * M + row
    elif LAYOUT == "shuffled":
        inner = (j // 8) * 256 + (j % 4) * 64 + ((j % 8) // 4) * 2
        return row // 32 * (SP * 32) + inner + ((row % 16) * 4 + (row % 32) // 16)
    else:
        return row * G + j


@triton.jit
def _store_scales(
    scale_ptr, first, start, scale, M, R,
    G: tl.constexpr, SP: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scales of the groups from ``start`` on: [GROUPS], or [ROWS, GROUPS]. Shuffled: padding up to SP groups and R rows too."""
    j = start + tl.arange(0, GROUPS)
    if CHUNKS == 0:
        row = first
    else:
        j = j[None, :]
        row = first + tl.arange(0, ROWS)[:, None]
    if LAYOUT == "shuffled":
        scale = tl.where((j < G) & (row < M), scale, 0x7F)
        mask = (j < SP) & (row < R)
    else:
        mask = (j < G) & (row < M)
    at = _scale_offset(row, j, M, G, SP, LAYOUT)
    tl.store(scale_ptr + at, scale.to(scale_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pad_scales(scale_ptr, row, GROUPS: tl.constexpr, SP: tl.constexpr):
    """A row of padding of the shuffled layout."""
    for start in tl.range(0, SP, GROUPS):
        j = start + tl.arange(0, GROUPS)
        pad = tl.full((GROUPS,), 0x7F, tl.uint8)
        tl.store(scale_ptr + _scale_offset(row, j, 0, SP, SP, "shuffled"), pad, mask=j < SP)


@triton.jit
def quant_fwd(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N]; may be residual_out_ptr
    weight_ptr,  # [N]
    smooth_ptr,  # [N]
    static_ptr,  # [] float32
    M,
    R,  # rows of the array of scales if shuffled, else M
    values_ptr,  # [M, P] bytes, or [M, P / 2]
    scale_ptr,  # float32 or uint8, LAYOUT
    residual_out_ptr,  # [M, N]
    y_ptr,  # [M, P]
    N: tl.constexpr,
    P: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_Y: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ROUND_RESIDUAL: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
    FNUZ: tl.constexpr,
    HARD: tl.constexpr,
    CLIP: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    SP: tl.constexpr,
    UB: tl.constexpr,
    E8M0: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns ROWS rows, each held in registers from its one read to its one write. GROUP 0: a scale a row."""
    first = program_index().to(tl.int64) * ROWS
    if first >= R:
        return
    WIDTH: tl.constexpr = BLOCK * (CHUNKS if CHUNKS > 0 else 1)
    if CHUNKS == 0 and LAYOUT == "shuffled":
        if first >= M:
            _pad_scales(scale_ptr, first, WIDTH // GROUP, SP)
            return
    row = tile_rows(first, CHUNKS, ROWS)
    cols = tile_cols(CHUNKS, ROWS, BLOCK, VEC)
    MASK_X: tl.constexpr = CHUNKS > 0 or N < WIDTH
    MASK_P: tl.constexpr = CHUNKS > 0 or P < WIDTH
    live = cols < N
    inside = live
    padded = cols < P
    if CHUNKS > 0:
        inside = live & (row < M)
        padded = padded & (row < M)
    x = load(x_ptr + row * N, cols, inside, MASK_X)
    if HAS_RESIDUAL:
        residual = load(residual_ptr + row * N, cols, inside, MASK_X)
    w = 1.0
    if HAS_WEIGHT:
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
    if HAS_SMOOTH:
        smooth = load(smooth_ptr, cols, live, N < WIDTH).to(tl.float32)
    if HAS_RESIDUAL:
        n, total = summed(x, residual, residual_out_ptr, ROUND_RESIDUAL)
        store(residual_out_ptr + row * N, cols, total, inside, MASK_X)
    else:
        n = x.to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(row_sum(n * n, CHUNKS) / N + EPS)
        y = scaled(n, spread(rstd, CHUNKS), w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
        if P > N:  # 0 * rstd is not 0 when rstd is NaN
            y = tl.where(live, y, 0.0)
    else:
        y = n
    if HAS_Y:
        store(y_ptr + row * P, cols, y, padded, MASK_P)
    z = y
    if HAS_SMOOTH:
        z = y * smooth
    if HAS_STATIC:
        codes = _encode(tl.div_rn(z, tl.load(static_ptr)), MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
    elif GROUP == 0:
        scale, s, r = _scale(_row_max(_magnitude(z), CHUNKS), UB, MAX, MANTISSA, TOP, E8M0)
        codes = _encode(
            _quotient(z, spread(s, CHUNKS), spread(r, CHUNKS), E8M0, EXACT), MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP
        )
        store_row_scalar(scale_ptr, first, scale, M, CHUNKS, ROWS, LANES)
    else:
        zg = _grouped(z, CHUNKS, ROWS, WIDTH, GROUP)
        scale, s, r = _scale(tl.max(_magnitude(zg), axis=2 if CHUNKS > 0 else 1), UB, MAX, MANTISSA, TOP, E8M0)
        v = _quotient(zg, tl.expand_dims(s, -1), tl.expand_dims(r, -1), E8M0, EXACT)
        grouped = _encode(v, MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
        codes = _ungrouped(grouped, CHUNKS, ROWS, BLOCK)
        _store_scales(scale_ptr, first, 0, scale, M, R, G, SP, LAYOUT, CHUNKS, ROWS, WIDTH // GROUP)
    _store_codes(values_ptr + row * (P // 2 if PACKED else P), 0, codes, cols, padded, MASK_P, P, PACKED, CHUNKS, ROWS, BLOCK,
                 VEC, row < M)  # fmt: skip


@triton.jit
def _z(
    x, residual, rstd, weight_ptr, smooth_ptr, cols, live, x_ptr, residual_out_ptr,
    N: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTH: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, ROUND_RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(z, y, the sum with the residual) of one block of a long row."""
    if HAS_RESIDUAL:
        n, total = summed(x, residual, residual_out_ptr, ROUND_RESIDUAL)
    else:
        n = x.to(tl.float32)
        total = n
    y = n
    if NORM:
        w = 1.0
        if HAS_WEIGHT:
            w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
        y = scaled(n, rstd, w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
        if P > N:
            y = tl.where(live, y, 0.0)
    z = y
    if HAS_SMOOTH:
        z = y * load(smooth_ptr, cols, live, MASKED).to(tl.float32)
    return z, y, total


@triton.jit
def quant_fwd_long(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N]; may be residual_out_ptr
    weight_ptr,  # [N]
    smooth_ptr,  # [N]
    static_ptr,  # [] float32
    M,
    R,
    values_ptr,  # [M, P] bytes, or [M, P / 2]
    scale_ptr,
    residual_out_ptr,  # [M, N]
    y_ptr,  # [M, P]
    N: tl.constexpr,
    P: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_Y: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ROUND_RESIDUAL: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
    FNUZ: tl.constexpr,
    HARD: tl.constexpr,
    CLIP: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    SP: tl.constexpr,
    UB: tl.constexpr,
    E8M0: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """A program owns one row and reads it BLOCK columns at a time: once for the sum of squares, once for the maximum of the
    row where there is one scale a row, once for the codes. BLOCK is a multiple of GROUP."""
    row = program_index().to(tl.int64)
    if row >= R:
        return
    if LAYOUT == "shuffled":
        if row >= M:
            _pad_scales(scale_ptr, row, BLOCK // GROUP, SP)
            return
    lane = tile_cols(0, 1, BLOCK, VEC)
    MASK_X: tl.constexpr = N % BLOCK != 0 or P > N
    xs = x_ptr + row * N
    rs = residual_ptr + row * N
    rstd = 1.0
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, N, BLOCK, num_stages=1):
            cols = start + lane
            x = load_first(xs, cols, cols < N, MASK_X)
            if HAS_RESIDUAL:
                added = load_first(rs, cols, cols < N, MASK_X)
                n, _ = summed(x, added, residual_out_ptr, ROUND_RESIDUAL)
            else:
                n = x.to(tl.float32)
            squares += n * n
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + EPS)
    s = 1.0
    r = 1.0
    if HAS_STATIC:
        s = tl.load(static_ptr)
    elif GROUP == 0:
        most = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, N, BLOCK, num_stages=1):
            cols = start + lane
            live = cols < N
            x = load_first(xs, cols, live, MASK_X)
            added = x
            if HAS_RESIDUAL:
                added = load_first(rs, cols, live, MASK_X)
            z, _, _ = _z(x, added, rstd, weight_ptr, smooth_ptr, cols, live, x_ptr, residual_out_ptr, N, P, NORM,
                         WEIGHT_OFFSET, HAS_RESIDUAL, HAS_WEIGHT, HAS_SMOOTH, CAST_BEFORE_WEIGHT, ROUND_RESIDUAL,
                         MASK_X)  # fmt: skip
            most = tl.maximum(most, _magnitude(z))
        scale, s, r = _scale(tl.max(most, axis=0), UB, MAX, MANTISSA, TOP, E8M0)
        tl.store(scale_ptr + row, scale)
    for start in tl.range(0, P, BLOCK, num_stages=1):
        cols = start + lane
        live = cols < N
        x = load_again(xs, cols, live, MASK_X)
        added = x
        if HAS_RESIDUAL:
            added = load_again(rs, cols, live, MASK_X)
        z, y, total = _z(x, added, rstd, weight_ptr, smooth_ptr, cols, live, x_ptr, residual_out_ptr, N, P, NORM,
                         WEIGHT_OFFSET, HAS_RESIDUAL, HAS_WEIGHT, HAS_SMOOTH, CAST_BEFORE_WEIGHT, ROUND_RESIDUAL,
                         MASK_X)  # fmt: skip
        if HAS_RESIDUAL:
            store(residual_out_ptr + row * N, cols, total, live, MASK_X)
        if HAS_Y:
            store(y_ptr + row * P, cols, y, cols < P, P % BLOCK != 0)
        if GROUP == 0:
            codes = _encode(_quotient(z, s, r, E8M0, EXACT), MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
        else:
            zg = _grouped(z, 0, 1, BLOCK, GROUP)
            scale, each, inverse = _scale(tl.max(_magnitude(zg), axis=1), UB, MAX, MANTISSA, TOP, E8M0)
            v = _quotient(zg, tl.expand_dims(each, -1), tl.expand_dims(inverse, -1), E8M0, EXACT)
            grouped = _encode(v, MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
            codes = _ungrouped(grouped, 0, 1, BLOCK)
            _store_scales(scale_ptr, row, start // GROUP, scale, M, R, G, SP, LAYOUT, 0, 1, BLOCK // GROUP)
        _store_codes(values_ptr + row * (P // 2 if PACKED else P), start, codes, cols, cols < P, P % BLOCK != 0, P, PACKED, 0, 1,
                     BLOCK, VEC, row < M)  # fmt: skip
