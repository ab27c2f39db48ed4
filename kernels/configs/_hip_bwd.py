"""Launches of the backward row kernels (csrc/include/jaxnorm/rows_bwd.h): how the persistent blocks walk the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, Problem, compute_units, next_power_of_2, shared_memory, wave_size
from ._hip import (
    MAX_THREADS,
    STATS,
    SUMS,
    Constants,
    _ceil,
    _family,
    _grid,
    _itemsize,
    _nvidia,
    _registers,
    _round_up,
    _sum_bytes,
    _type,
    _width,
    vector,
)


@dataclass(frozen=True)
class Backward:
    """``blocks`` of ``groups`` rows of ``lanes`` threads each walk the rows; ``depth`` rows are on their way meanwhile."""

    lanes: int
    groups: int
    blocks: int
    depth: int
    shared_pipe: bool
    hold_weight: bool
    min_blocks: int = 1
    tile: int = 0
    """Chunks of a column tile, for rows too long for one block; 0 = the row is whole."""


PLACES = ("FIRST", "SECOND", "THIRD")
ROW_INPUTS = ("n", "dy", "dresidual_out")


def _row_sums(problem: Problem) -> int:
    """Norm::SUMS of the backward: sums over a row that dx needs."""
    return 2 if _family(problem) == "layernorm" else 1


def _vectors(problem: Problem) -> tuple[str, ...]:
    """The gradients of vectors that are wanted, in the order of their stack."""
    return tuple(n for n in SUMS if problem.has(n))


def _slot_bytes(problem: Problem, v: int, per: int, threads: int, tiled: bool) -> int:
    """SharedPipe::slot_bytes: one row of a block on its way."""
    scalars = len(STATS[_family(problem)]) + (_row_sums(problem) if tiled else 0)
    return (per * v * sum(_itemsize(problem, n) for n in ROW_INPUTS) + 4 * scalars) * threads


def _backward(problem: Problem) -> Backward:
    wave, v = wave_size(problem.target), vector(problem)
    chunks = problem.features // v
    # A thread adds up each gradient of a vector in one register for each of its columns. 32 columns for a wave that owns its row
    # alone (no barrier to pay), 16 for rows shared by waves: with as many registers for the row itself, two or three blocks fit.
    if chunks <= wave:
        lanes = next_power_of_2(chunks)
    elif _ceil(chunks, wave) * v <= 32 and not (_nvidia(problem) and chunks >= 4 * wave):
        lanes = wave
    elif _nvidia(problem):
        # *H200*: 32 columns a thread and one block a unit. 8192x4096 1.108 with 128 threads, 1.15 to 1.28 with two to four blocks
        # of 256 or 512; 8192x8192 1.065 with 256. More rows of partial sums and more streams at once both cost.
        lanes = min(MAX_THREADS, max(128, _round_up(_ceil(chunks, max(1, 32 // v)), wave)))
    else:
        lanes = _round_up(_ceil(chunks, max(1, 16 // v)), wave)
        # Few rows: one block a unit must keep memory busy alone, so give it more threads.
        if problem.rows < 16 * compute_units(problem.target) and lanes < 512:
            lanes = min(512, _round_up(_ceil(chunks, _ceil(chunks, 2 * lanes)), wave))
    if lanes > MAX_THREADS:
        return _tiled(problem, v)
    groups = max(1, 128 // lanes) if lanes <= wave else 1
    start, per = Backward(lanes, groups, 0, 1, False, True), _ceil(chunks, lanes)
    if not _nvidia(problem) or lanes <= wave:
        c = _with_pipe(problem, start, v, per, chunks)
        return c if c.depth else _tiled(problem, v)
    few = 2 if _family(problem) == "layernorm" else 1
    c = _with_pipe(problem, start, v, per, chunks, most=4 if per * v <= 16 else few)
    if not c.depth or (_family(problem) == "layernorm" and _registers(lanes, 1) < _needed(problem, per * v)):
        return _tiled(problem, v)
    # *H200*: about 48 KB on their way to a unit; 8192x8192 1.061 one row ahead, 1.10 two, 1.13 four; 8192x4096 best with four.
    # LayerNorm, whose rows take longer: 8192x4096 55.3 us with 128 KB (two blocks, four rows ahead), 60.1 with 64.
    row = problem.features * sum(_itemsize(problem, n) for n in ROW_INPUTS)
    ahead = (128 << 10) if _family(problem) == "layernorm" else (48 << 10)
    return replace(c, depth=max(1, min(c.depth, ahead // (row * c.blocks))))


def _sum_words(problem: Problem, columns: int) -> int:
    return columns * max(1, len(_vectors(problem)))


def _needed(problem: Problem, columns: int) -> int:
    """Registers on NVIDIA: the sums, the row once, and 32 more (seen to do without spills in the sm_90 code, weights included)."""
    return 32 + _sum_words(problem, columns) + columns * sum(_itemsize(problem, n) for n in ROW_INPUTS) // 4


def _with_pipe(problem: Problem, c: Backward, v: int, per: int, chunks: int, most: int = 16) -> Backward:
    """Fills in blocks (at most ``most``), depth and where the rows ahead wait; depth 0 if they do not fit."""
    threads, wave = c.lanes * c.groups, wave_size(problem.target)
    sums = _sum_words(problem, per * v)
    row_words = per * v * sum(_itemsize(problem, n) for n in ROW_INPUTS) // 4
    weight_words = per * v * (_itemsize(problem, "weight") + _itemsize(problem, "x_bias")) // 4
    narrow = v * min(_itemsize(problem, n) for n in ROW_INPUTS if problem.has(n)) < 4
    if _nvidia(problem) and not narrow:
        need = _needed(problem, per * v)
        if _family(problem) == "layernorm" and _registers(threads, 1) >= need + weight_words:
            need += weight_words  # held: *H200*, 8192x4096 56.7 us, else 86.4
        blocks = max((b for b in range(1, 1024 // threads + 1) if _registers(threads, b) >= need), default=1)
        blocks = min(blocks, most)
        slot = _slot_bytes(problem, v, per, threads, bool(c.tile))
        fixed = (0 if c.tile else 2 * _row_sums(problem) * _sum_bytes(chunks, c.lanes, wave)) + 1024
        while blocks > 1 and (shared_memory(problem.target) // blocks - fixed) // slot < 3:
            blocks -= 1
        slots = min(5, (shared_memory(problem.target) // blocks - fixed) // slot)
        hold = sums + weight_words <= (24 if threads > 512 else 48) or need > _needed(problem, per * v)
        return replace(c, blocks=blocks, depth=max(0, slots - 1), shared_pipe=True, hold_weight=hold, min_blocks=blocks)
    # One row ahead in registers: AMD has 512 of them for each lane of a SIMD, and no copy to LDS that keeps 16-byte accesses.
    need = 40 + sums + weight_words + 2 * row_words
    budget = (
        65536 // threads if _nvidia(problem) else min(512, 4 * 512 * wave // threads * (2 if wave == 32 else 1) // 2)
    )
    blocks = max(1, min(budget // need, 2048 // threads, most))
    fits = need <= budget + 16
    return replace(c, blocks=blocks, depth=1 if fits else 0, shared_pipe=False, hold_weight=sums <= 32)


def _tiled(problem: Problem, v: int) -> Backward:
    """Rows too long for one block: a first launch computes each row's dot product, then blocks take tiles of columns."""
    lanes, per = 256, max(1, 16 // v)
    c = Backward(lanes, 1, 0, 1, False, True, tile=lanes * per)
    return _with_pipe(problem, c, v, per, lanes * per)


def _backward_candidates(problem: Problem) -> Iterator[Backward]:
    wave, v = wave_size(problem.target), vector(problem)
    chunks = problem.features // v
    planned = _backward(problem)
    if planned.tile:
        for per in (1, 2, 4):
            for lanes in (128, 256, 512):
                c = Backward(lanes, 1, 0, 1, False, True, tile=lanes * per)
                yield _with_pipe(problem, c, v, per, lanes * per)
        return
    for each in (8, 16, 32):
        lanes = next_power_of_2(chunks) if chunks <= wave else _round_up(_ceil(chunks, max(1, each // v)), wave)
        if lanes > MAX_THREADS:
            continue
        for threads in (128, 256) if lanes <= wave else (lanes,):
            start = Backward(lanes, max(1, threads // lanes), 0, 1, False, True)
            most = _with_pipe(problem, start, v, _ceil(chunks, lanes), chunks).blocks
            for blocks in {most, most - 1, _ceil(most, 2), 1} - {0}:
                c = _with_pipe(problem, start, v, _ceil(chunks, lanes), chunks, blocks)
                if c.depth and not c.groups & (c.groups - 1):
                    yield from (replace(c, depth=depth) for depth in {c.depth, _ceil(c.depth, 2)})
                    yield replace(c, hold_weight=not c.hold_weight)


def programs(problem: Problem, c: Backward) -> int:
    """Blocks of the persistent grid (per column tile).

    Each leaves a row of float32 partial sums that the second launch reads: eight bytes a column against six for each row of
    bf16. Four rows a group at least keep that below a third.
    """
    tiles = _ceil(problem.features // vector(problem), c.tile) if c.tile else 1
    most = max(1, compute_units(problem.target) * c.blocks // tiles)
    return max(1, min(most, _ceil(problem.rows, 4 * c.groups)))


def _backward_launches(problem: Problem, c: Backward) -> tuple[Launch, ...]:
    wave, v, family = wave_size(problem.target), vector(problem), _family(problem)
    chunks, threads = problem.features // v, c.lanes * c.groups
    blocks, tiles = programs(problem, c), _ceil(chunks, c.tile) if c.tile else 1
    width, offset, vectors = _width(problem, "dy"), float(problem.option("weight_offset")), _vectors(problem)
    per = _ceil(c.tile or chunks, c.lanes)
    sums = 0 if c.tile else 2 * _row_sums(problem) * _sum_bytes(chunks, c.lanes, wave)
    pipe = (c.depth + 1) * _slot_bytes(problem, v, per, threads, bool(c.tile)) if c.shared_pipe else 0
    groups = c.groups // 2 * c.lanes * per * v * 4  # add_groups; takes over the memory of the pipe
    shared: Constants = (
        ("JN_N", problem.features),
        ("JN_P", width),
        ("JN_V", v),
        ("JN_X", _type(problem, "n")),
        ("JN_WEIGHT", _type(problem, "weight")),
        ("JN_DY", _type(problem, "dy")),
        *((("JN_X_BIAS", _type(problem, "x_bias")),) if family == "layernorm" else ()),
        ("JN_OFFSET", offset),
        ("JN_HAS_OFFSET", offset != 0),
    )
    launches = []
    if c.tile:
        launches.append(_dot_launch(problem, v, shared))
    wanted = SUMS if family == "layernorm" else SUMS[:1]
    partials = (blocks, len(vectors), problem.features) if family == "layernorm" else (blocks, problem.features)
    launches.append(
        Launch(
            kernel=f"{family}.hip:{family}_bwd",
            inputs=(*_backward_inputs(family), "dot"),
            outputs=("dx", "dresidual", "partials"),
            grid=(blocks, tiles, 1),
            constants=(
                *shared,
                ("JN_LANES", c.lanes),
                ("JN_GROUPS", c.groups),
                ("JN_TILE", c.tile or chunks),
                ("JN_TILED", bool(c.tile)),
                ("JN_DEPTH", c.depth),
                ("JN_PIPE_SHARED", c.shared_pipe),
                ("JN_HOLD_WEIGHT", c.hold_weight),
                ("JN_MIN_BLOCKS", c.min_blocks),
                ("JN_DRES_OUT", _type(problem, "dresidual_out")),
                ("JN_DX", _type(problem, "dx")),
                ("JN_DRES", _type(problem, "dresidual")),
                *((f"JN_HAS_{n.upper()}", n in vectors) for n in wanted),
            ),
            scalars=(("rows", "i64", problem.rows), ("programs", "i32", blocks)),
            threads=threads,
            shared=max(sums + pipe, groups if vectors else 0),
            temps=(("partials", partials, "float32"),) if vectors else (),
        )
    )
    if vectors:
        launches.append(_reduce_launch(problem, blocks))
    return tuple(launches)


def _backward_inputs(family: str) -> tuple[str, ...]:
    bias = ("x_bias",) if family == "layernorm" else ()
    return ("n", *bias, "weight", *STATS[family], "dy", "dresidual_out")


def _dot_launch(problem: Problem, v: int, constants: Constants) -> Launch:
    wave, chunks, family = wave_size(problem.target), problem.features // v, _family(problem)
    most = MAX_THREADS // (2 if problem.has("x_bias") else 1)  # its registers
    lanes = min(most, max(2 * wave, _round_up(_ceil(chunks, 4), wave)))
    dot = (problem.rows, 2) if family == "layernorm" else (problem.rows,)
    # The kernel takes four chunks at a time and may put sums of empty ones behind the last.
    sums = _round_up(_ceil(chunks, lanes), 4) * (lanes // wave) * 4
    return Launch(
        kernel=f"{family}.hip:{family}_bwd_dot",
        inputs=("n", "x_bias", "weight", "mean", "dy") if family == "layernorm" else ("n", "weight", "dy"),
        outputs=("dot",),
        grid=_grid(problem.rows),
        constants=(*constants, ("JN_LANES", lanes), ("JN_MIN_BLOCKS", 1)),
        scalars=(("rows", "i64", problem.rows),),
        threads=lanes,
        shared=(_row_sums(problem) - 1) * _sum_bytes(chunks, lanes, wave) + sums,
        temps=(("dot", dot, "float32"),),
    )


def _reduce_launch(problem: Problem, blocks: int) -> Launch:
    """One block for 128 bytes of columns: as many blocks as possible with whole cache lines, all rows of a block in flight."""
    family, wanted = _family(problem), _vectors(problem)
    v = next(v for v in (4, 2, 1) if problem.features % v == 0)
    columns, slices = 8, 32
    outputs = (*wanted, *(n for n in SUMS if n not in wanted)) if family == "layernorm" else SUMS[:1]
    return Launch(
        kernel=f"{family}.hip:{family}_bwd_reduce",
        inputs=("partials",),
        outputs=outputs,
        grid=(_ceil(len(wanted) * problem.features, columns * v), 1, 1),
        constants=(
            ("JN_N", problem.features),
            ("JN_V", v),
            ("JN_COLUMNS", columns),
            ("JN_SLICES", slices),
            *((("JN_VECTORS", len(wanted)),) if family == "layernorm" else ()),
            *((f"JN_{place}", _type(problem, n)) for place, n in zip(PLACES, outputs, strict=False)),
        ),
        scalars=(("programs", "i32", blocks),),
        threads=columns * slices,
        shared=slices // 2 * columns * v * 4,
    )
