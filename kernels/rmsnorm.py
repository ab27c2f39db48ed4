"""RMSNorm, with or without a residual, forward and backward.

    n = f32(x)                       or  s = f32(x) + f32(residual), residual_out = cast(s), n = s
    rstd = rsqrt(sum(n * n) / N + EPS)
    y = cast(n * rstd * (f32(weight) + WEIGHT_OFFSET))

Parameters come in the order inputs, scalars, outputs, constexprs. Every size but the number of rows is a constexpr: the row
length decides how the start of a row is aligned, hence how wide an access may be. A pointer whose ``HAS_`` flag is off is
never dereferenced. Offsets are a 64-bit row base plus a 32-bit column.
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
    scaled,
    spread,
    store,
    store_row_scalar,
    store_share,
    summed,
    tile_cols,
    tile_rows,
)


@triton.jit
def rmsnorm_fwd(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N], any float dtype; may be residual_out_ptr
    weight_ptr,  # [N], any float dtype
    M,
    y_ptr,  # [M, P], P >= N, columns from N on are zero
    residual_out_ptr,  # [M, N], residual's dtype
    rstd_ptr,  # [M] float32
    N: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
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
    if HAS_RESIDUAL:
        residual = load(residual_ptr + row * N, cols, inside, MASK_X)
    w = 1.0
    if HAS_WEIGHT:  # asked for before the sum, so that its latency hides behind the row's
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
    if HAS_RESIDUAL:
        n, s = summed(x, residual, residual_out_ptr, ROUND_RESIDUAL)
        store(residual_out_ptr + row * N, cols, s, inside, MASK_X)
    else:
        n = x.to(tl.float32)
    rstd = tl.rsqrt(row_sum(n * n, CHUNKS) / N + EPS)
    y = scaled(n, spread(rstd, CHUNKS), w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
    if P > N:  # 0 * rstd is not +0 when rstd is NaN or the weight negative
        y = tl.where(live, y, 0.0)
    store(y_ptr + row * P, cols, y, padded, MASK_Y)
    if HAS_RSTD:
        store_row_scalar(rstd_ptr, first, rstd, M, CHUNKS, ROWS, LANES)


@triton.jit
def rmsnorm_fwd_long(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N]; may be residual_out_ptr
    weight_ptr,  # [N]
    M,
    y_ptr,  # [M, P]
    residual_out_ptr,  # [M, N]
    rstd_ptr,  # [M] float32
    N: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
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
    """A program owns one row and reads it twice, BLOCK columns at a time; the second read comes from the nearest cache.

    EARLY, for a row of one block: the weight is asked for before the sum.

    residual_out is written in the second pass, right after the same elements were read, so that it may share residual's buffer."""
    row = program_index().to(tl.int64)
    if row >= M:
        return
    lane = tile_cols(0, 1, BLOCK, VEC)
    MASK_X: tl.constexpr = N % BLOCK != 0
    if EARLY and HAS_WEIGHT:
        early = load(weight_ptr, lane, lane < N, MASK_X)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        x = load_first(x_ptr + row * N, cols, live, MASK_X)
        if HAS_RESIDUAL:
            residual = load_first(residual_ptr + row * N, cols, live, MASK_X)
            n, _ = summed(x, residual, residual_out_ptr, ROUND_RESIDUAL)
        else:
            n = x.to(tl.float32)
        squares += n * n
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + EPS)
    if HAS_RSTD:
        tl.store(rstd_ptr + row, rstd)
    for start in tl.range(0, P, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        MASK_PAD: tl.constexpr = MASK_X or P > N
        x = load_again(x_ptr + row * N, cols, live, MASK_PAD)
        if HAS_RESIDUAL:
            residual = load_again(residual_ptr + row * N, cols, live, MASK_PAD)
            n, s = summed(x, residual, residual_out_ptr, ROUND_RESIDUAL)
            store(residual_out_ptr + row * N, cols, s, live, MASK_PAD)
        else:
            n = x.to(tl.float32)
        w = 1.0
        if HAS_WEIGHT:
            if EARLY:
                w = early.to(tl.float32) + WEIGHT_OFFSET
            else:
                w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASK_PAD)
        y = scaled(n, rstd, w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
        if P > N:
            y = tl.where(live, y, 0.0)
        store(y_ptr + row * P, cols, y, cols < P, P % BLOCK != 0)


@triton.jit
def _load_tile(
    n_ptr,
    dy_ptr,
    rstd_ptr,
    first,
    cols,
    live,
    M,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """(n, dy, rstd) of the tile that starts at row ``first``, in the dtypes of the buffers; zeros where masked off."""
    row = tile_rows(first, CHUNKS, ROWS)
    inside = live
    if MASK_ROWS:
        inside = live & (row < M)
    n = load_first(n_ptr + row * N, cols, inside, MASKED or MASK_ROWS)
    dy = load_first(dy_ptr + row * P, cols, inside, MASKED or MASK_ROWS)
    return n, dy, load_row_scalar(rstd_ptr, first, M, CHUNKS, ROWS, LANES, MASK_ROWS)


@triton.jit
def rmsnorm_bwd(
    n_ptr,  # [M, N] x, or the saved residual_out
    weight_ptr,  # [N]
    rstd_ptr,  # [M] float32
    dy_ptr,  # [M, P], columns from N on are not read
    dresidual_out_ptr,  # [M, N]
    M,
    PROGRAMS,
    dx_ptr,  # [M, N]
    dresidual_ptr,  # [M, N]
    dweight_ptr,  # [PROGRAMS, N] float32 shares, or the gradient itself if one program has all rows
    N: tl.constexpr,
    P: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    REREAD: tl.constexpr,
):
    """``ds = rstd * (gw - xh * mean(gw * xh)) + dresidual_out`` with ``xh = n * rstd, gw = dy * (weight + offset)``.

    Program p owns the tiles p, p + PROGRAMS, ...; its share of dweight = sum(dy * xh) stays in registers.

    PREFETCH asks for the next tile before the sums of this one (STAGES does so through the compiler's own pipeline).
    REREAD reads n, dy and the weight a second time after the sums, from the nearest cache, where holding them costs too many
    registers. The two reads differ in their eviction policy, which also keeps the compiler from making one of them."""
    pid = tl.program_id(0)
    cols = tile_cols(CHUNKS, ROWS, BLOCK, VEC)
    WIDTH: tl.constexpr = BLOCK * (CHUNKS if CHUNKS > 0 else 1)
    MASKED: tl.constexpr = CHUNKS > 0 or N < WIDTH
    MASK_ROWS: tl.constexpr = CHUNKS > 0
    live = cols < N
    w = 1.0
    if HAS_WEIGHT and not REREAD:
        w = affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
    sums = tl.zeros_like(cols).to(tl.float32)
    mine = ((M + ROWS - 1) // ROWS - pid + PROGRAMS - 1) // PROGRAMS
    step = tl.cast(PROGRAMS, tl.int64) * ROWS
    first = pid.to(tl.int64) * ROWS
    ptrs = (n_ptr, dy_ptr, rstd_ptr)
    if PREFETCH:
        n, dy, scale = _load_tile(*ptrs, first, cols, live, M, N, P, CHUNKS, ROWS, LANES, MASKED, True)
    for _ in tl.range(0, mine, num_stages=STAGES):
        row = tile_rows(first, CHUNKS, ROWS)
        inside = live
        if MASK_ROWS:
            inside = live & (row < M)
        first += step
        if PREFETCH:
            after = _load_tile(*ptrs, first, cols, live, M, N, P, CHUNKS, ROWS, LANES, MASKED, True)
        else:
            n, dy, scale = _load_tile(*ptrs, first - step, cols, live, M, N, P, CHUNKS, ROWS, LANES, MASKED, MASK_ROWS)
        rstd = spread(scale, CHUNKS)
        if HAS_DRESIDUAL_OUT and not REREAD:
            extra = load(dresidual_out_ptr + row * N, cols, inside, MASKED)
        xh = n.to(tl.float32) * rstd
        gw = dy.to(tl.float32)
        if HAS_DWEIGHT:  # before the sum of the row, so that dy need not outlive it
            sums += gw * xh
        if HAS_WEIGHT:
            if REREAD:
                gw = gw * (load_first(weight_ptr, cols, live, N < WIDTH).to(tl.float32) + WEIGHT_OFFSET)
            else:
                gw = gw * w
        mean = spread(row_sum(gw * xh, CHUNKS), CHUNKS) / N
        if REREAD:
            xh = load_again(n_ptr + row * N, cols, inside, MASKED).to(tl.float32) * rstd
            gw = load_again(dy_ptr + row * P, cols, inside, MASKED).to(tl.float32)
            if HAS_WEIGHT:
                gw = gw * affine(weight_ptr, cols, live, WEIGHT_OFFSET, N < WIDTH)
        ds = rstd * (gw - xh * mean)
        if HAS_DRESIDUAL_OUT:
            if REREAD:
                ds += load(dresidual_out_ptr + row * N, cols, inside, MASKED).to(tl.float32)
            else:
                ds += extra.to(tl.float32)
        store(dx_ptr + row * N, cols, ds, inside, MASKED)
        if HAS_DRESIDUAL:
            store(dresidual_ptr + row * N, cols, ds, inside, MASKED)
        if PREFETCH:
            n, dy, scale = after
    if HAS_DWEIGHT:
        store_share(dweight_ptr + pid.to(tl.int64) * N, sums, cols, live, N, CHUNKS, BLOCK)


@triton.jit
def rmsnorm_bwd_long(
    n_ptr,  # [M, N]
    weight_ptr,  # [N]
    rstd_ptr,  # [M] float32
    dy_ptr,  # [M, P]
    dresidual_out_ptr,  # [M, N]
    M,
    dx_ptr,  # [M, N]
    dresidual_ptr,  # [M, N]
    N: tl.constexpr,
    P: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx (and dresidual) of one row a program, in two passes; dweight comes from :func:`rmsnorm_bwd_columns`.

    A share of dweight as long as the row does not fit the registers, and adding to it in memory would move 8 bytes an element."""
    row = program_index().to(tl.int64)
    if row >= M:
        return
    lane = tile_cols(0, 1, BLOCK, VEC)
    MASKED: tl.constexpr = N % BLOCK != 0
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        xh = load_first(n_ptr + row * N, cols, live, MASKED).to(tl.float32) * rstd
        gw = load_first(dy_ptr + row * P, cols, live, MASKED).to(tl.float32)
        if HAS_WEIGHT:
            gw = gw * affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
        products += gw * xh
    mean = tl.sum(products, axis=0) / N
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        cols = start + lane
        live = cols < N
        xh = load_again(n_ptr + row * N, cols, live, MASKED).to(tl.float32) * rstd
        gw = load_again(dy_ptr + row * P, cols, live, MASKED).to(tl.float32)
        if HAS_WEIGHT:
            gw = gw * affine(weight_ptr, cols, live, WEIGHT_OFFSET, MASKED)
        ds = rstd * (gw - xh * mean)
        if HAS_DRESIDUAL_OUT:
            ds += load(dresidual_out_ptr + row * N, cols, live, MASKED).to(tl.float32)
        store(dx_ptr + row * N, cols, ds, live, MASKED)
        if HAS_DRESIDUAL:
            store(dresidual_ptr + row * N, cols, ds, live, MASKED)


@triton.jit
def rmsnorm_bwd_columns(
    n_ptr,  # [M, N]
    rstd_ptr,  # [M] float32
    dy_ptr,  # [M, P]
    M,
    PROGRAMS,
    dweight_ptr,  # [PROGRAMS, N] float32 shares, or the gradient itself if one program has all rows
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dweight over the rows p, p + PROGRAMS, ... for BLOCK columns: p is the second grid index, the column block the first."""
    pid = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tile_cols(0, 1, BLOCK, VEC)
    MASKED: tl.constexpr = N % BLOCK != 0
    live = cols < N
    sums = tl.zeros((BLOCK,), tl.float32)
    row = pid.to(tl.int64)
    for _ in tl.range(0, (M - pid + PROGRAMS - 1) // PROGRAMS, num_stages=STAGES):
        n = load(n_ptr + row * N, cols, live, MASKED).to(tl.float32)
        dy = load(dy_ptr + row * P, cols, live, MASKED).to(tl.float32)
        sums += dy * (n * tl.load(rstd_ptr + row))
        row += PROGRAMS
    store(dweight_ptr + pid.to(tl.int64) * N, cols, sums, live, MASKED)


@triton.jit
def rmsnorm_bwd_reduce(
    share_ptr,  # [PROGRAMS, N] float32
    PROGRAMS,
    dweight_ptr,  # [N]
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    add_shares(share_ptr, PROGRAMS, dweight_ptr, N, N, ROWS, BLOCK)
