"""LayerNorm, with or without a bias of x and a residual; its backward is kernels/layernorm_bwd.py.

    a = f32(x) + f32(x_bias) + f32(residual), residual_out = cast(a), n = a
    m0 = sum(n) / N, e = sum(n - m0) / N, rstd = rsqrt(sum((n - m0)^2) / N - e * e + EPS)
    y = cast((n - m0 - e) * rstd * (f32(weight) + WEIGHT_OFFSET) + f32(bias))

The conventions are those of kernels/rmsnorm.py. m0 and e (``shift``) come from divisions that no compiler fuses with the
subtraction of m0: every use must see the same rounded m0, or e does not take its rounding out again.
"""

import triton
import triton.language as tl

from ._common import (
    added,
    affine,
    load,
    load_again,
    load_first,
    mean_corrected,
    program_index,
    spread,
    store,
    store_row_scalar,
    tile_cols,
    tile_rows,
    transformed,
)


@triton.jit
def layernorm_fwd(
    x_ptr,  # [M, N]
    x_bias_ptr,  # [N]
    residual_ptr,  # [M, N], any float dtype; may be residual_out_ptr
    weight_ptr,  # [N], any float dtype
    bias_ptr,  # [N], any float dtype
    M,
    y_ptr,  # [M, P], P >= N, columns from N on are zero
    residual_out_ptr,  # [M, N], residual's dtype
    mean_ptr,  # [M] float32, like the next two
    shift_ptr,
    rstd_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ROUND_RESIDUAL: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns ROWS rows, each held in registers from its one read to its one write."""
    first = program_index().to(tl.int64) * ROWS
    if first >= M:
        return
    row = tile_rows(first, CHUNKS, ROWS)
    cols = tile_cols(CHUNKS, ROWS, BLOCK, VEC)
    WIDTH: tl.constexpr = BLOCK * (CHUNKS if CHUNKS > 0 else 1)
    MASK_X: tl.constexpr = CHUNKS > 0 or N < WIDTH
    MASK_Y: tl.constexpr = CHUNKS > 0 or P < WIDTH
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
    # the vectors are asked for before the sums, so that their latency hides behind the row's
    x_bias = x
    if HAS_X_BIAS:
        x_bias = load(x_bias_ptr, cols, live, N < WIDTH)
    w = 1.0
    if HAS_WEIGHT:
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
    b = 0.0
    if HAS_BIAS:
        b = load(bias_ptr, cols, live, N < WIDTH).to(tl.float32)
    n, s = added(x, x_bias, residual, residual_out_ptr, HAS_X_BIAS, HAS_RESIDUAL, ROUND_RESIDUAL)
    if HAS_RESIDUAL:
        store(residual_out_ptr + row * N, cols, s, inside, MASK_X)
    mean, shift, rstd = mean_corrected(n, live, N, EPS, CHUNKS, N < WIDTH)
    xh = (n - spread(mean, CHUNKS) - spread(shift, CHUNKS)) * spread(rstd, CHUNKS)
    y = transformed(xh, w, b, x_ptr, HAS_WEIGHT, HAS_BIAS, CAST_BEFORE_WEIGHT)
    if P > N:
        y = tl.where(live, y, 0.0)
    store(y_ptr + row * P, cols, y, padded, MASK_Y)
    if HAS_RSTD:
        store_row_scalar(mean_ptr, first, mean, M, CHUNKS, ROWS, LANES)
        store_row_scalar(shift_ptr, first, shift, M, CHUNKS, ROWS, LANES)
        store_row_scalar(rstd_ptr, first, rstd, M, CHUNKS, ROWS, LANES)


@triton.jit
def _block(
    x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, live, N: tl.constexpr, HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROUND_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(n, a) at some columns of a long row; LAST: nobody reads them again."""
    if LAST:
        x = load_again(x_ptr + row * N, cols, live, MASKED)
    else:
        x = load_first(x_ptr + row * N, cols, live, MASKED)
    residual = x
    if HAS_RESIDUAL:
        if LAST:
            residual = load_again(residual_ptr + row * N, cols, live, MASKED)
        else:
            residual = load_first(residual_ptr + row * N, cols, live, MASKED)
    x_bias = x
    if HAS_X_BIAS:
        x_bias = load(x_bias_ptr, cols, live, MASKED)
    return added(x, x_bias, residual, residual_out_ptr, HAS_X_BIAS, HAS_RESIDUAL, ROUND_RESIDUAL)


@triton.jit
def layernorm_fwd_long(
    x_ptr,  # [M, N]
    x_bias_ptr,  # [N]
    residual_ptr,  # [M, N]; may be residual_out_ptr
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    M,
    y_ptr,  # [M, P]
    residual_out_ptr,  # [M, N]
    mean_ptr,  # [M] float32, like the next two
    shift_ptr,
    rstd_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ROUND_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program owns one row and reads it three times, BLOCK columns at a time, all but the first from the nearest cache.

    EARLY, for a row of one block: weight and bias are asked for before the sums. residual_out is written in the last pass, right
    after the same elements were read, so that it may share residual's buffer."""
    row = program_index().to(tl.int64)
    if row >= M:
        return
    lane = tile_cols(0, 1, BLOCK, VEC)
    MASK_X: tl.constexpr = N % BLOCK != 0
    COUNT: tl.constexpr = N * 1.0
    if EARLY and HAS_WEIGHT:
        early = load(weight_ptr, lane, lane < N, MASK_X)
    if EARLY and HAS_BIAS:
        early_bias = load(bias_ptr, lane, lane < N, MASK_X)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        n, _ = _block(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, cols < N, N, HAS_X_BIAS, HAS_RESIDUAL,
                      ROUND_RESIDUAL, MASK_X, False)  # fmt: skip
        total += n
    mean = tl.div_rn(tl.sum(total, axis=0), COUNT)
    shifts = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        n, _ = _block(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, cols < N, N, HAS_X_BIAS, HAS_RESIDUAL,
                      ROUND_RESIDUAL, MASK_X, False)  # fmt: skip
        d = n - mean
        if MASK_X:
            d = tl.where(cols < N, d, 0.0)
        shifts += d
        squares += d * d
    shift = tl.div_rn(tl.sum(shifts, axis=0), COUNT)
    var = tl.div_rn(tl.sum(squares, axis=0), COUNT) - shift * shift
    rstd = tl.rsqrt(tl.where(var < 0.0, 0.0, var) + EPS)
    if HAS_RSTD:
        tl.store(mean_ptr + row, mean)
        tl.store(shift_ptr + row, shift)
        tl.store(rstd_ptr + row, rstd)
    MASK_PAD: tl.constexpr = MASK_X or P > N
    for start in tl.range(0, P, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        n, s = _block(x_ptr, x_bias_ptr, residual_ptr, residual_out_ptr, row, cols, live, N, HAS_X_BIAS, HAS_RESIDUAL,
                      ROUND_RESIDUAL, MASK_PAD, True)  # fmt: skip
        if HAS_RESIDUAL:
            store(residual_out_ptr + row * N, cols, s, live, MASK_PAD)
        w = 1.0
        if HAS_WEIGHT:
            if EARLY:
                w = early.to(tl.float32) + WEIGHT_OFFSET
            else:
                w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASK_PAD)
        b = 0.0
        if HAS_BIAS:
            if EARLY:
                b = early_bias.to(tl.float32)
            else:
                b = load(bias_ptr, cols, live, MASK_PAD).to(tl.float32)
        y = transformed((n - mean - shift) * rstd, w, b, x_ptr, HAS_WEIGHT, HAS_BIAS, CAST_BEFORE_WEIGHT)
        if P > N:
            y = tl.where(live, y, 0.0)
        store(y_ptr + row * P, cols, y, cols < P, P % BLOCK != 0)
