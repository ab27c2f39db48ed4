"""The backward of LayerNorm: the formulas and conventions of kernels/layernorm.py.

xh = (n + x_bias - m0 - e) * rstd;  gw = dy * (f32(weight) + WEIGHT_OFFSET)
ds = rstd * (gw - xh * mean(gw * xh) - mean(gw)) + dresidual_out;  dx = cast(ds)
dweight = sum(dy * xh), dbias = sum(dy), dx_bias = sum(ds) over the rows
"""

import triton
import triton.language as tl

from ._common import (
    add_shares,
    affine,
    load,
    load_again,
    load_first,
    load_row_scalar,
    program_index,
    row_sum,
    spread,
    store,
    store_share,
    tile_cols,
    tile_rows,
)


@triton.jit
def _load_tile(
    n_ptr, dy_ptr, mean_ptr, shift_ptr, rstd_ptr, first, cols, live, M, N: tl.constexpr, P: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """(n, dy, mean, shift, rstd) of the tile that starts at row ``first``, in the dtypes of the buffers; zeros where masked off."""
    row = tile_rows(first, CHUNKS, ROWS)
    inside = live
    if MASK_ROWS:
        inside = live & (row < M)
    n = load_first(n_ptr + row * N, cols, inside, MASKED or MASK_ROWS)
    dy = load_first(dy_ptr + row * P, cols, inside, MASKED or MASK_ROWS)
    mean = load_row_scalar(mean_ptr, first, M, CHUNKS, ROWS, LANES, MASK_ROWS)
    shift = load_row_scalar(shift_ptr, first, M, CHUNKS, ROWS, LANES, MASK_ROWS)
    return n, dy, mean, shift, load_row_scalar(rstd_ptr, first, M, CHUNKS, ROWS, LANES, MASK_ROWS)


@triton.jit
def _normalised(n, x_bias, mean, shift, rstd, HAS_X_BIAS: tl.constexpr):
    """xh of a tile; n includes x_bias, or it is added here."""
    n = n.to(tl.float32)
    if HAS_X_BIAS:
        n += x_bias.to(tl.float32)
    return (n - mean - shift) * rstd


@triton.jit
def _bias_at(x_bias_ptr, n, cols, live, HAS_X_BIAS: tl.constexpr, MASKED: tl.constexpr):
    """x_bias at some columns; where there is none n stands in for it, which :func:`_normalised` does not read."""
    if HAS_X_BIAS:
        return load(x_bias_ptr, cols, live, MASKED)
    else:
        return n


@triton.jit
def layernorm_bwd(
    n_ptr,  # [M, N] x, or the saved residual_out
    x_bias_ptr,  # [N], what n does not include
    weight_ptr,  # [N]
    mean_ptr,  # [M] float32, like the next two
    shift_ptr,
    rstd_ptr,
    dy_ptr,  # [M, P], columns from N on are not read
    dresidual_out_ptr,  # [M, N]
    M,
    PROGRAMS,
    dx_ptr,  # [M, N]
    dresidual_ptr,  # [M, N]
    dweight_ptr,  # [PROGRAMS, N], like the next two: float32 shares, or the gradient itself if one program has all rows
    dbias_ptr,
    dx_bias_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_DX_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    REREAD: tl.constexpr,
):
    """``ds = rstd * (gw - xh * mean(gw * xh) - mean(gw)) + dresidual_out``, ``gw = dy * (weight + offset)``.

    Program p owns the tiles p, p + PROGRAMS, ...; its shares of dweight = sum(dy * xh), dbias = sum(dy) and dx_bias = sum(ds) stay
    in registers. PREFETCH and REREAD as in rmsnorm_bwd."""
    pid = tl.program_id(0)
    cols = tile_cols(CHUNKS, ROWS, BLOCK, VEC)
    WIDTH: tl.constexpr = BLOCK * (CHUNKS if CHUNKS > 0 else 1)
    MASKED: tl.constexpr = CHUNKS > 0 or N < WIDTH
    MASK_ROWS: tl.constexpr = CHUNKS > 0
    live = cols < N
    w = 1.0
    if HAS_WEIGHT and not REREAD:
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
    x_bias = 0.0
    if HAS_X_BIAS and not REREAD:
        x_bias = load(x_bias_ptr, cols, live, N < WIDTH)
    dweight = tl.zeros_like(cols).to(tl.float32)
    dbias = tl.zeros_like(cols).to(tl.float32)
    dx_bias = tl.zeros_like(cols).to(tl.float32)
    mine = ((M + ROWS - 1) // ROWS - pid + PROGRAMS - 1) // PROGRAMS
    step = tl.cast(PROGRAMS, tl.int64) * ROWS
    first = pid.to(tl.int64) * ROWS
    ptrs = (n_ptr, dy_ptr, mean_ptr, shift_ptr, rstd_ptr)
    if PREFETCH:
        n, dy, m0, e, scale = _load_tile(*ptrs, first, cols, live, M, N, P, CHUNKS, ROWS, LANES, MASKED, True)
    for _ in tl.range(0, mine, num_stages=STAGES):
        row = tile_rows(first, CHUNKS, ROWS)
        inside = live
        if MASK_ROWS:
            inside = live & (row < M)
        first += step
        if PREFETCH:
            after = _load_tile(*ptrs, first, cols, live, M, N, P, CHUNKS, ROWS, LANES, MASKED, True)
        else:
            n, dy, m0, e, scale = _load_tile(
                *ptrs, first - step, cols, live, M, N, P, CHUNKS, ROWS, LANES, MASKED, MASK_ROWS
            )
        mean, shift, rstd = spread(m0, CHUNKS), spread(e, CHUNKS), spread(scale, CHUNKS)
        if HAS_DRESIDUAL_OUT and not REREAD:
            extra = load(dresidual_out_ptr + row * N, cols, inside, MASKED)
        if REREAD:
            xh = _normalised(
                n, _bias_at(x_bias_ptr, n, cols, live, HAS_X_BIAS, N < WIDTH), mean, shift, rstd, HAS_X_BIAS
            )
        else:
            xh = _normalised(n, x_bias, mean, shift, rstd, HAS_X_BIAS)
        gw = dy.to(tl.float32)
        if HAS_DWEIGHT:  # before the sums of the row, so that dy need not outlive them
            dweight += gw * xh
        if HAS_DBIAS:
            dbias += gw
        if HAS_WEIGHT:
            if REREAD:
                gw = gw * (load_first(weight_ptr, cols, live, N < WIDTH).to(tl.float32) + WEIGHT_OFFSET)
            else:
                gw = gw * w
        product = spread(row_sum(gw * xh, CHUNKS), CHUNKS) / N
        average = spread(row_sum(gw, CHUNKS), CHUNKS) / N
        if REREAD:
            again = load_again(n_ptr + row * N, cols, inside, MASKED)
            xh = _normalised(
                again, _bias_at(x_bias_ptr, again, cols, live, HAS_X_BIAS, N < WIDTH), mean, shift, rstd, HAS_X_BIAS
            )
            gw = load_again(dy_ptr + row * P, cols, inside, MASKED).to(tl.float32)
            if HAS_WEIGHT:
                gw = gw * affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
        ds = rstd * (gw - xh * product - average)
        if HAS_DRESIDUAL_OUT:
            if REREAD:
                ds += load(dresidual_out_ptr + row * N, cols, inside, MASKED).to(tl.float32)
            else:
                ds += extra.to(tl.float32)
        if HAS_DX_BIAS:
            dx_bias += ds
        store(dx_ptr + row * N, cols, ds, inside, MASKED)
        if HAS_DRESIDUAL:
            store(dresidual_ptr + row * N, cols, ds, inside, MASKED)
        if PREFETCH:
            n, dy, m0, e, scale = after
    share = pid.to(tl.int64) * N
    if HAS_DWEIGHT:
        store_share(dweight_ptr + share, dweight, cols, live, N, CHUNKS, BLOCK)
    if HAS_DBIAS:
        store_share(dbias_ptr + share, dbias, cols, live, N, CHUNKS, BLOCK)
    if HAS_DX_BIAS:
        store_share(dx_bias_ptr + share, dx_bias, cols, live, N, CHUNKS, BLOCK)


@triton.jit
def layernorm_bwd_long(
    n_ptr,  # [M, N]
    x_bias_ptr,  # [N]
    weight_ptr,  # [N]
    mean_ptr,  # [M] float32, like the next two
    shift_ptr,
    rstd_ptr,
    dy_ptr,  # [M, P]
    dresidual_out_ptr,  # [M, N]
    M,
    dx_ptr,  # [M, N]
    dresidual_ptr,  # [M, N]
    product_ptr,  # [M] float32: mean(gw * xh)
    average_ptr,  # [M] float32: mean(gw)
    N: tl.constexpr,
    P: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DX_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx (and dresidual) of one row a program, in two passes; the sums over the rows come from :func:`layernorm_bwd_columns`."""
    row = program_index().to(tl.int64)
    if row >= M:
        return
    lane = tile_cols(0, 1, BLOCK, VEC)
    MASKED: tl.constexpr = N % BLOCK != 0
    mean, shift, rstd = tl.load(mean_ptr + row), tl.load(shift_ptr + row), tl.load(rstd_ptr + row)
    products = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        n = load_first(n_ptr + row * N, cols, live, MASKED)
        xh = _normalised(n, _bias_at(x_bias_ptr, n, cols, live, HAS_X_BIAS, MASKED), mean, shift, rstd, HAS_X_BIAS)
        gw = load_first(dy_ptr + row * P, cols, live, MASKED).to(tl.float32)
        if HAS_WEIGHT:
            gw = gw * affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
        products += gw * xh
        total += gw
    product, average = tl.sum(products, axis=0) / N, tl.sum(total, axis=0) / N
    if HAS_DX_BIAS:
        tl.store(product_ptr + row, product)
        tl.store(average_ptr + row, average)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        n = load_again(n_ptr + row * N, cols, live, MASKED)
        xh = _normalised(n, _bias_at(x_bias_ptr, n, cols, live, HAS_X_BIAS, MASKED), mean, shift, rstd, HAS_X_BIAS)
        gw = load_again(dy_ptr + row * P, cols, live, MASKED).to(tl.float32)
        if HAS_WEIGHT:
            gw = gw * affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
        ds = rstd * (gw - xh * product - average)
        if HAS_DRESIDUAL_OUT:
            ds += load(dresidual_out_ptr + row * N, cols, live, MASKED).to(tl.float32)
        store(dx_ptr + row * N, cols, ds, live, MASKED)
        if HAS_DRESIDUAL:
            store(dresidual_ptr + row * N, cols, ds, live, MASKED)


@triton.jit
def layernorm_bwd_columns(
    n_ptr,  # [M, N]
    x_bias_ptr,  # [N]
    weight_ptr,  # [N]
    mean_ptr,  # [M] float32, like the next two
    shift_ptr,
    rstd_ptr,
    dy_ptr,  # [M, P]
    dresidual_out_ptr,  # [M, N]
    product_ptr,  # [M] float32
    average_ptr,  # [M] float32
    M,
    PROGRAMS,
    dweight_ptr,  # [PROGRAMS, N], like the next two: float32 shares, or the gradient itself if one program has all rows
    dbias_ptr,
    dx_bias_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_DX_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums over the rows p, p + PROGRAMS, ... for BLOCK columns: p is the second grid index, the column block the first."""
    pid = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tile_cols(0, 1, BLOCK, VEC)
    MASKED: tl.constexpr = N % BLOCK != 0
    live = cols < N
    x_bias = 0.0
    if HAS_X_BIAS:
        x_bias = load(x_bias_ptr, cols, live, MASKED)
    w = 1.0
    if HAS_WEIGHT and HAS_DX_BIAS:
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dx_bias = tl.zeros((BLOCK,), tl.float32)
    row = pid.to(tl.int64)
    for _ in tl.range(0, (M - pid + PROGRAMS - 1) // PROGRAMS, num_stages=STAGES):
        g = load(dy_ptr + row * P, cols, live, MASKED).to(tl.float32)
        if HAS_DWEIGHT or HAS_DX_BIAS:
            n = load(n_ptr + row * N, cols, live, MASKED)
            rstd = tl.load(rstd_ptr + row)
            xh = _normalised(n, x_bias, tl.load(mean_ptr + row), tl.load(shift_ptr + row), rstd, HAS_X_BIAS)
        if HAS_DWEIGHT:
            dweight += g * xh
        if HAS_DBIAS:
            dbias += g
        if HAS_DX_BIAS:
            ds = rstd * (g * w - xh * tl.load(product_ptr + row) - tl.load(average_ptr + row))
            if HAS_DRESIDUAL_OUT:
                ds += load(dresidual_out_ptr + row * N, cols, live, MASKED).to(tl.float32)
            dx_bias += ds
        row += PROGRAMS
    share = pid.to(tl.int64) * N
    if HAS_DWEIGHT:
        store(dweight_ptr + share, cols, dweight, live, MASKED)
    if HAS_DBIAS:
        store(dbias_ptr + share, cols, dbias, live, MASKED)
    if HAS_DX_BIAS:
        store(dx_bias_ptr + share, cols, dx_bias, live, MASKED)


@triton.jit
def layernorm_bwd_reduce(
    first_share_ptr,  # [PROGRAMS, N] float32, like the next two: shares of the gradients that are wanted
    second_share_ptr,
    third_share_ptr,
    PROGRAMS,
    first_ptr,  # [N], like the next two: these gradients
    second_ptr,
    third_ptr,
    VECTORS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second grid index says which of the VECTORS gradients."""
    which = tl.program_id(1)
    if which == 0:
        add_shares(first_share_ptr, PROGRAMS, first_ptr, N, N, ROWS, BLOCK)
    elif which == 1:
        if VECTORS > 1:
            add_shares(second_share_ptr, PROGRAMS, second_ptr, N, N, ROWS, BLOCK)
    else:
        if VECTORS > 2:
            add_shares(third_share_ptr, PROGRAMS, third_ptr, N, N, ROWS, BLOCK)
