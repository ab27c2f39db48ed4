"""What the row kernels share: which rows and columns a program owns, sums along a row.

A tile is one of two kinds, told apart by the constexpr ``CHUNKS``:

* ``CHUNKS == 0``: one row, ``[BLOCK]``. All waves of the program share the row; the row index is a scalar, so that the row base
  stays in scalar registers.
* ``CHUNKS > 0``: ``ROWS`` rows, ``[ROWS, CHUNKS, BLOCK]``, column ``chunk * BLOCK + lane offset``. ``BLOCK`` is what one wave
  reads with one instruction per lane. Triton hands out lanes along the last dim, waves along the first and registers along the
  rest, so the sum of a row never leaves its wave: no shared memory, no barrier. (The order is Triton's choice, and only speed
  and the argument for equal bits of all rows of a tile hang on it: ``tests/test_triton_compile.py`` pins it.)
"""

import triton
import triton.language as tl


@triton.jit
def program_index():
    """Programs are counted over a grid of 2^20 columns, because HIP wants grid.x * threads < 2^32."""
    return tl.program_id(1) * 1048576 + tl.program_id(0)


@triton.jit
def tile_cols(CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """32-bit column of every element of a tile.

    VEC (0: no limit) is what the alignment of the row bases allows. Triton gives a lane as many neighbours as the widest access
    in sight could use, and that of the weight, always aligned, would have the rows of an odd N read with strides between lanes:
    so the columns are said to be multiples of VEC only.

    Spread over ROWS on purpose: a load of the weight through these columns has the layout of the row loads, where one of shape
    [1, CHUNKS, BLOCK] would be shared out among the waves and then exchanged through shared memory."""
    lane = tl.arange(0, BLOCK)
    if VEC > 0:
        lane = tl.multiple_of(lane, [VEC])
    if CHUNKS == 0:
        return lane
    else:
        cols = (tl.arange(0, CHUNKS) * BLOCK)[None, :, None] + lane[None, None, :]
        return tl.broadcast_to(cols, (ROWS, CHUNKS, BLOCK))


@triton.jit
def tile_rows(first, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Index of the rows that start at ``first`` (64 bits): a scalar, or [ROWS, 1, 1]."""
    if CHUNKS == 0:
        return first
    else:
        return first + tl.arange(0, ROWS)[:, None, None]


@triton.jit
def row_sum(v, CHUNKS: tl.constexpr):
    """Sum over the columns of a tile: a scalar, or [ROWS]."""
    if CHUNKS == 0:
        return tl.sum(v, axis=0)
    else:
        return tl.sum(tl.sum(v, axis=1), axis=1)


@triton.jit
def spread(v, CHUNKS: tl.constexpr):
    """A quantity of the rows, in a form that broadcasts over their tile."""
    if CHUNKS == 0:
        return v
    else:
        return v[:, None, None]


@triton.jit
def _lanes_of_rows(ROWS: tl.constexpr, LANES: tl.constexpr):
    """(lane, row) of a [LANES, ROWS] tile whose rows lie in the lanes and waves as those of a tile of rows do, so that nothing
    moves between the two. Of dims without contiguous addresses Triton hands lanes to the first; hence the hint, which says
    less than the truth."""
    row = tl.max_contiguous(tl.arange(0, ROWS), [1])
    return tl.arange(0, LANES)[:, None], tl.broadcast_to(row[None, :], (LANES, ROWS))


@triton.jit
def load_row_scalar(ptr, first, M, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr):
    """``ptr[row]`` for the rows from ``first`` on, in the form of :func:`row_sum`; zero from row M on.

    All LANES lanes of a row read it and the maximum is taken, of equal values: read once per row it would reach the waves
    that own the rows through shared memory and a barrier."""
    if CHUNKS == 0:
        return load(ptr, first, first < M, MASKED)
    else:
        _, row = _lanes_of_rows(ROWS, LANES)
        at = first + row
        return tl.max(tl.load(ptr + at, mask=at < M, other=0.0), axis=0)


@triton.jit
def store_row_scalar(ptr, first, v, M, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """``ptr[row] = v`` for the rows from ``first`` on, by the first lane of each."""
    if CHUNKS == 0:
        tl.store(ptr + first, v)
    else:
        lane, row = _lanes_of_rows(ROWS, LANES)
        at = first + row
        tl.store(ptr + at, tl.broadcast_to(v[None, :], (LANES, ROWS)), mask=(at < M) & (lane == 0))


@triton.jit
def load(base, cols, mask, MASKED: tl.constexpr):
    """``base[cols]``, zero where masked off. A mask known to be all true is left out: on AMD it would cost branches."""
    if MASKED:
        return tl.load(base + cols, mask=mask, other=0.0)
    else:
        return tl.load(base + cols)


@triton.jit
def load_first(base, cols, mask, MASKED: tl.constexpr):
    """:func:`load` of what :func:`load_again` will read once more: keep it in the cache."""
    if MASKED:
        return tl.load(base + cols, mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(base + cols, eviction_policy="evict_last")


@triton.jit
def load_again(base, cols, mask, MASKED: tl.constexpr):
    """:func:`load` of what nobody reads again."""
    if MASKED:
        return tl.load(base + cols, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(base + cols, eviction_policy="evict_first")


@triton.jit
def store(base, cols, v, mask, MASKED: tl.constexpr):
    """The one rounding of a result: float32 to the dtype of the buffer, to nearest even."""
    if MASKED:
        tl.store(base + cols, v.to(base.dtype.element_ty), mask=mask)
    else:
        tl.store(base + cols, v.to(base.dtype.element_ty))


@triton.jit
def store_share(base, sums, cols, live, N: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of a program over its rows, [N]."""
    WIDTH: tl.constexpr = BLOCK * (CHUNKS if CHUNKS > 0 else 1)
    if CHUNKS > 0:
        flat = (tl.arange(0, CHUNKS) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        store(base, flat, tl.sum(sums, axis=0), flat < N, N < WIDTH)
    else:
        store(base, cols, sums, live, N < WIDTH)


@triton.jit
def add_shares(
    share_ptr, PROGRAMS, total_ptr, N: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """``total[n] = cast(sum over p of share[p, n])`` in an order that PROGRAMS alone decides; rows are STRIDE apart. Of a program's
    BLOCK columns, its first grid index says which."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, PROGRAMS, ROWS):
        row = start + rows
        sums += tl.load(share_ptr + row.to(tl.int64) * STRIDE + cols, mask=(row < PROGRAMS) & (cols < N), other=0.0)
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store(total_ptr, out, tl.sum(sums, axis=0), out < N, True)


@triton.jit
def affine(weight_ptr, cols, mask, WEIGHT_OFFSET: tl.constexpr, MASKED: tl.constexpr):
    """``f32(weight) + WEIGHT_OFFSET`` at ``cols``; the offset alone where masked off."""
    return load(weight_ptr, cols, mask, MASKED).to(tl.float32) + WEIGHT_OFFSET


@triton.jit
def round_to(v, ptr):
    """float32 rounded to the dtype ``ptr`` points to, still float32."""
    return v.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def summed(x, residual, residual_out_ptr, ROUND_RESIDUAL: tl.constexpr):
    """(what the norm reads, s) of one tile."""
    s = x.to(tl.float32) + residual.to(tl.float32)
    if ROUND_RESIDUAL:
        return round_to(s, residual_out_ptr), s
    else:
        return s, s


@triton.jit
def scaled(n, rstd, w, x_ptr, HAS_WEIGHT: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr):
    """``n * rstd * w`` with the rounding points of the contract."""
    y = n * rstd
    if CAST_BEFORE_WEIGHT:
        y = round_to(y, x_ptr)
    if HAS_WEIGHT:
        y = y * w
    return y


@triton.jit
def added(
    x, x_bias, residual, residual_out_ptr, HAS_X_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROUND_RESIDUAL: tl.constexpr
):  # fmt: skip
    """(what the norm reads, s) for ``s = x + x_bias + residual`` of what is there, added in this order."""
    s = x.to(tl.float32)
    if HAS_X_BIAS:
        s += x_bias.to(tl.float32)
    if HAS_RESIDUAL:
        s += residual.to(tl.float32)
    if HAS_RESIDUAL and ROUND_RESIDUAL:
        return round_to(s, residual_out_ptr), s
    else:
        return s, s


@triton.jit
def mean_corrected(n, live, N: tl.constexpr, EPS: tl.constexpr, CHUNKS: tl.constexpr, MASKED: tl.constexpr):
    """(m0, e, rstd) of the rows of a tile: the mean in two parts, and the variance of the deviations from their sum.

    IEEE divisions: as products with 1/N they would be fused with the subtraction of m0 in some places and not in others."""
    COUNT: tl.constexpr = N * 1.0
    mean = tl.div_rn(row_sum(n, CHUNKS), COUNT)
    d = n - spread(mean, CHUNKS)
    if MASKED:
        d = tl.where(live, d, 0.0)
    shift = tl.div_rn(row_sum(d, CHUNKS), COUNT)
    var = tl.div_rn(row_sum(d * d, CHUNKS), COUNT) - shift * shift
    # a constant row may come out below zero; a comparison keeps NaN
    return mean, shift, tl.rsqrt(tl.where(var < 0.0, 0.0, var) + EPS)


@triton.jit
def transformed(
    xh, w, b, x_ptr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr
):  # fmt: skip
    """``xh * w + b`` with the rounding points of the contract."""
    y = scaled(xh, 1.0, w, x_ptr, HAS_WEIGHT, CAST_BEFORE_WEIGHT)
    if HAS_BIAS:
        y = y + b
    return y
