"""What the plans of all HIP kernels share: limits, types, grids, registers."""

from __future__ import annotations

import math

from . import ITEMSIZE, Problem, wave_size

# gpu.h:kGridX; AMD wants blocks * threads < 2^32 in each dimension, and a block has at most 1024 threads
GRID_X = 1 << 21
MAX_FEATURES = 1 << 24  # columns are 32-bit and 1/N is a float32
MAX_THREADS = 1024
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

STATS = {"rmsnorm": ("rstd",), "layernorm": ("mean", "shift", "rstd")}
"""Scalars of a row that the forward saves for the backward."""
SUMS = ("dweight", "dbias", "dx_bias")
"""Gradients of vectors: sums over the rows. The layer norm has all three, the other norm the first."""

Constants = tuple[tuple[str, object], ...]

# The last cache before memory, which results pass through: Infinity Cache of MI300 and MI355 (256 MiB) and of the RX 7900 XTX
# (96 MiB), the L2 of a die of MI250 (8 MiB). From the vendor's descriptions.
LAST_CACHE = {"gfx90a": 8 << 20, "gfx942": 256 << 20, "gfx950": 256 << 20, "gfx1100": 96 << 20}


def _nvidia(problem: Problem) -> bool:
    return problem.target.startswith("sm_")


def _type(problem: Problem, name: str) -> str:
    return TYPES[problem.dtype(name)] if problem.has(name) else "None"


def _itemsize(problem: Problem, name: str) -> int:
    return ITEMSIZE[problem.dtype(name)] if problem.has(name) else 0


def _parts(problem: Problem) -> int:
    """Matrices whose sum x is, [parts, M, N]: the partial sums of so many ranks."""
    return dict(problem.options).get("parts", 1)  # type: ignore[return-value]


def _input_bytes(problem: Problem) -> int:
    """Of what is read for an element of a row."""
    return _parts(problem) * _itemsize(problem, "x") + _itemsize(problem, "residual")


def _width(problem: Problem, padded: str) -> int:
    return problem.shape(padded)[-1]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil(a, b) * b


def _grid(blocks: int) -> tuple[int, int, int]:
    return (min(blocks, GRID_X), _ceil(blocks, GRID_X), 1)


def _family(problem: Problem) -> str:
    """``rmsnorm``, ``layernorm``: the norm of a stage."""
    return problem.stage.split("_")[0]


def _pivots(problem: Problem, chunks: int) -> bool:
    """Norm::PIVOT: whether LayerNorm's sums are about a value of the row, and are exchanged once instead of twice."""
    return _family(problem) == "layernorm" and not problem.has("residual") and chunks > wave_size(problem.target)


def _buffers(problem: Problem, chunks: int) -> int:
    """Norm::BUFFERS: row sums of a forward kernel that are in shared memory at a time."""
    if _family(problem) != "layernorm":
        return 1
    return 2 if _pivots(problem, chunks) else 3


def _turns(problem: Problem, chunks: int) -> int:
    """rows_ahead.h: how many sets of these a walking block takes in turn."""
    return 2 if _family(problem) != "layernorm" or _pivots(problem, chunks) else 1


def vector(problem: Problem) -> int:
    """Elements of a chunk: 16 bytes of the narrowest buffer, less if some row would then start off a chunk boundary.

    Partial sums count as the float32 row that they make: a row has the same bits whether it was added up before or is here.
    """
    padded = "y" if problem.stage.endswith("_fwd") else "dy"
    others = (*STATS["layernorm"], *SUMS, *(("x",) if _parts(problem) > 1 else ()))
    v = 16 // min((ITEMSIZE[dtype] for name, dtype in problem.dtypes if name not in others), default=4)
    while problem.features % v or _width(problem, padded) % v:
        v //= 2
    return v


def _sum_bytes(chunks: int, lanes: int, wave: int) -> int:
    """RowSum::bytes"""
    return 0 if lanes <= wave else _ceil(_ceil(chunks, lanes) * (lanes // wave), 4) * 16


def _row_registers(problem: Problem) -> int:
    """Registers that a thread of the largest block may hold of a row. 1024 threads leave each 64 on NVIDIA, 128 on gfx9 and 96 on
    gfx11; about half of them."""
    if _nvidia(problem):
        return 32
    return 64 if problem.target.startswith("gfx9") else 48


def _registers(threads: int, blocks: int) -> int:
    """Registers a thread gets on NVIDIA: each quarter of a unit has 16384, given out to whole warps, eight to a lane at a time."""
    warps = _ceil(blocks * _ceil(threads, 32), 4)
    return min(255, 16384 // (warps * 32) // 8 * 8)


def _stream(problem: Problem, *results: str) -> Constants:
    """Non-temporal stores on AMD where the results are larger than the last cache: whoever reads them next finds nothing there, and
    the weights stay. Compiled and inspected, not run on AMD silicon; NVIDIA's kernels are left as they were measured."""
    size = sum(math.prod(problem.shape(n)) * ITEMSIZE.get(problem.dtype(n), 1) for n in results if problem.has(n))
    return (("JN_STREAM", True),) if size > LAST_CACHE.get(problem.target, size) else ()
