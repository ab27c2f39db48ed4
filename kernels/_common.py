"""What the row kernels share: which rows and columns a program owns, sums along a row.

A tile is one of two kinds, told apart by the constexpr ``CHUNKS``:

* ``CHUNKS == 0``: one row, ``[BLOCK]``. All waves of the program share the row; the row index is a scalar, so that the row base
  stays in scalar registers.
* ``CHUNKS > 0``: ``ROWS`` rows, ``[CHUNKS, ROWS, BLOCK]``, column ``chunk * BLOCK + lane offset``. ``BLOCK`` is what one wave
  reads with one instruction per lane. Triton hands out lanes and waves from the last dim to the first, so the waves land on
  ROWS, the chunks in registers, and the sum of a row never leaves its wave: no shared memory, no barrier.
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
    in sight could use, and that of the weight, always aligned, would have the rows of an odd N read with strides between lanes.

    Spread over ROWS on purpose: a load of the weight through these columns has the layout of the row loads, where one of shape
    [CHUNKS, 1, BLOCK] would be shared out among the waves and then exchanged through shared memory."""
    lane = tl.arange(0, BLOCK)
    if CHUNKS == 0:
        if VEC > 0:
            lane = tl.max_contiguous(lane, [VEC])
        return lane
    else:
        cols = (tl.arange(0, CHUNKS) * BLOCK)[:, None, None] + lane[None, None, :]
        cols = tl.broadcast_to(cols, (CHUNKS, ROWS, BLOCK))
        if VEC > 0:
            cols = tl.max_contiguous(cols, [1, 1, VEC])
        return cols


@triton.jit
def tile_rows(first, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """64-bit index of the rows that start at ``first``: a scalar, or [1, ROWS, 1]."""
    if CHUNKS == 0:
        return first.to(tl.int64)
    else:
        return first.to(tl.int64) + tl.arange(0, ROWS)[None, :, None]


@triton.jit
def row_sum(v, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Sum over the columns of a tile, in the form of :func:`tile_rows`."""
    if CHUNKS == 0:
        return tl.sum(v, axis=0)
    else:
        return tl.sum(tl.sum(v, axis=0), axis=1)[None, :, None]


@triton.jit
def affine(weight_ptr, cols, mask, WEIGHT_OFFSET: tl.constexpr):
    """``f32(weight) + WEIGHT_OFFSET`` at ``cols``; the offset alone where masked off."""
    return tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + WEIGHT_OFFSET


@triton.jit
def round_to(v, ptr):
    """float32 rounded to the dtype ``ptr`` points to, still float32."""
    return v.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def store(ptr, offsets, v, mask):
    """The one rounding of a result: float32 to the dtype of the buffer, to nearest even."""
    tl.store(ptr + offsets, v.to(ptr.dtype.element_ty), mask=mask)
