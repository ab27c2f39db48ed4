"""Quantisation of a row: alone, or as the epilogue of RMSNorm or LayerNorm with or without a residual. One launch.

y = f32(x), or the float32 result of a norm (kernels/rmsnorm.py, layernorm.py);  z = y * f32(smooth_scale)
a = min(max|z|, UB) over the row or a group of columns, NaN wins
float32: s = a / MAX, 1 where s < 2**-126        e8m0: s = 2**(E - 127), E stored as a byte
code = RNE(clip(z / s, -MAX, MAX)): kernels/_codes.py
"""

import triton
import triton.language as tl

from ._codes import (
    _encode,
    _grouped,
    _magnitude,
    _pad_scales,
    _quotient,
    _row_max,
    _scale,
    _store_codes,
    _store_scales,
    _ungrouped,
)
from ._common import (
    added,
    affine,
    load,
    load_again,
    load_first,
    mean_corrected,
    program_index,
    row_sum,
    scaled,
    spread,
    store,
    store_row_scalar,
    tile_cols,
    tile_rows,
    transformed,
)


@triton.jit
def quant_fwd(
    x_ptr,  # [M, N]
    x_bias_ptr,  # [N]
    residual_ptr,  # [M, N]; may be residual_out_ptr
    weight_ptr,  # [N]
    bias_ptr,  # [N]
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
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    residual = x
    if HAS_RESIDUAL:
        residual = load(residual_ptr + row * N, cols, inside, MASK_X)
    x_bias = x
    if HAS_X_BIAS:
        x_bias = load(x_bias_ptr, cols, live, N < WIDTH)
    w = 1.0
    if HAS_WEIGHT:
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
    b = 0.0
    if HAS_BIAS:
        b = load(bias_ptr, cols, live, N < WIDTH).to(tl.float32)
    if HAS_SMOOTH:
        smooth = load(smooth_ptr, cols, live, N < WIDTH).to(tl.float32)
    n, total = added(x, x_bias, residual, residual_out_ptr, HAS_X_BIAS, HAS_RESIDUAL, ROUND_RESIDUAL)
    if HAS_RESIDUAL:
        store(residual_out_ptr + row * N, cols, total, inside, MASK_X)
    if NORM == "rmsnorm":
        rstd = tl.rsqrt(row_sum(n * n, CHUNKS) / N + EPS)
        y = scaled(n, spread(rstd, CHUNKS), w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
    elif NORM == "layernorm":
        mean, shift, rstd = mean_corrected(n, live, N, EPS, CHUNKS, N < WIDTH)
        xh = (n - spread(mean, CHUNKS) - spread(shift, CHUNKS)) * spread(rstd, CHUNKS)
        y = transformed(xh, w, b, x_ptr, HAS_WEIGHT, HAS_BIAS, CAST_BEFORE_WEIGHT)
    else:
        y = n
    # Behind the row 0 * rstd is not 0 when rstd is NaN, nor is the bias; and a LayerNorm has -mean * rstd there, which the maximum
    # of the row must not see.
    if (NORM != "" and P > N) or (NORM == "layernorm" and N < WIDTH):
        y = tl.where(live, y, 0.0)
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
def _sum(
    x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, N: tl.constexpr, HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROUND_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(what the norm reads, the sum with bias and residual) of one block of a long row; LAST: nobody reads it again."""
    live = cols < N
    residual = 0.0
    if LAST:
        x = load_again(x_ptr + row * N, cols, live, MASKED)
        if HAS_RESIDUAL:
            residual = load_again(residual_ptr + row * N, cols, live, MASKED)
    else:
        x = load_first(x_ptr + row * N, cols, live, MASKED)
        if HAS_RESIDUAL:
            residual = load_first(residual_ptr + row * N, cols, live, MASKED)
    x_bias = x
    if HAS_X_BIAS:
        x_bias = load(x_bias_ptr, cols, live, MASKED)
    return added(x, x_bias, residual, residual_out_ptr, HAS_X_BIAS, HAS_RESIDUAL, ROUND_RESIDUAL)


@triton.jit
def _z(
    n, mean, shift, rstd, weight_ptr, bias_ptr, smooth_ptr, cols, x_ptr,
    N: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SMOOTH: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(z, y) of one block of a long row."""
    live = cols < N
    y = n
    if NORM != "":
        w = 1.0
        if HAS_WEIGHT:
            w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
        if NORM == "layernorm":
            b = 0.0
            if HAS_BIAS:
                b = load(bias_ptr, cols, live, MASKED).to(tl.float32)
            y = transformed((n - mean - shift) * rstd, w, b, x_ptr, HAS_WEIGHT, HAS_BIAS, CAST_BEFORE_WEIGHT)
        else:
            y = scaled(n, rstd, w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
        if P > N:
            y = tl.where(live, y, 0.0)
    z = y
    if HAS_SMOOTH:
        z = y * load(smooth_ptr, cols, live, MASKED).to(tl.float32)
    return z, y


@triton.jit
def quant_fwd_long(
    x_ptr,  # [M, N]
    x_bias_ptr,  # [N]
    residual_ptr,  # [M, N]; may be residual_out_ptr
    weight_ptr,  # [N]
    bias_ptr,  # [N]
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
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """A program owns one row and reads it BLOCK columns at a time: for the statistics, once for the maximum of the
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
    COUNT: tl.constexpr = N * 1.0
    mean = 0.0
    shift = 0.0
    rstd = 1.0
    if NORM == "rmsnorm":
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, N, BLOCK, num_stages=1):
            n, _ = _sum(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, start + lane, N, HAS_X_BIAS, HAS_RESIDUAL,
                        ROUND_RESIDUAL, MASK_X, False)  # fmt: skip
            squares += n * n
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + EPS)
    elif NORM == "layernorm":
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, N, BLOCK, num_stages=1):
            n, _ = _sum(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, start + lane, N, HAS_X_BIAS, HAS_RESIDUAL,
                        ROUND_RESIDUAL, MASK_X, False)  # fmt: skip
            sums += n
        mean = tl.div_rn(tl.sum(sums, axis=0), COUNT)
        shifts = tl.zeros((BLOCK,), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, N, BLOCK, num_stages=1):
            n, _ = _sum(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, start + lane, N, HAS_X_BIAS, HAS_RESIDUAL,
                        ROUND_RESIDUAL, MASK_X, False)  # fmt: skip
            d = tl.where(start + lane < N, n - mean, 0.0)
            shifts += d
            squares += d * d
        shift = tl.div_rn(tl.sum(shifts, axis=0), COUNT)
        var = tl.div_rn(tl.sum(squares, axis=0), COUNT) - shift * shift
        rstd = tl.rsqrt(tl.where(var < 0.0, 0.0, var) + EPS)
    s = 1.0
    r = 1.0
    if HAS_STATIC:
        s = tl.load(static_ptr)
    elif GROUP == 0:
        most = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, N, BLOCK, num_stages=1):
            cols = start + lane
            n, _ = _sum(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, N, HAS_X_BIAS, HAS_RESIDUAL,
                        ROUND_RESIDUAL, MASK_X, False)  # fmt: skip
            z, _ = _z(n, mean, shift, rstd, weight_ptr, bias_ptr, smooth_ptr, cols, x_ptr, N, P, NORM, WEIGHT_OFFSET,
                      HAS_WEIGHT, HAS_BIAS, HAS_SMOOTH, CAST_BEFORE_WEIGHT, MASK_X)  # fmt: skip
            if MASK_X:
                z = tl.where(cols < N, z, 0.0)
            most = tl.maximum(most, _magnitude(z))
        scale, s, r = _scale(tl.max(most, axis=0), UB, MAX, MANTISSA, TOP, E8M0)
        tl.store(scale_ptr + row, scale)
    for start in tl.range(0, P, BLOCK, num_stages=1):
        cols = start + lane
        live = cols < N
        n, total = _sum(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, N, HAS_X_BIAS, HAS_RESIDUAL,
                        ROUND_RESIDUAL, MASK_X, True)  # fmt: skip
        z, y = _z(n, mean, shift, rstd, weight_ptr, bias_ptr, smooth_ptr, cols, x_ptr, N, P, NORM, WEIGHT_OFFSET,
                  HAS_WEIGHT, HAS_BIAS, HAS_SMOOTH, CAST_BEFORE_WEIGHT, MASK_X)  # fmt: skip
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
