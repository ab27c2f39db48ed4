"""Launches of the RMSNorm and LayerNorm stages through ``csrc/kernels``: how many threads share a row and where the row waits.

The kernels add a row up in one order that depends on its chunks and the wave alone (``csrc/include/jaxnorm/reduce.h``), so every
plan here gives the same bits and the plan may look at M. Reasons marked *H200* were measured there; those for AMD targets
follow from registers, LDS and lanes (compiled and inspected, not run on AMD silicon).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, Problem, Unsupported, compute_units, next_power_of_2, shared_memory, wave_size
from ._hip import (
    MAX_FEATURES,
    MAX_THREADS,
    STATS,
    TYPES,
    Constants,
    _buffers,
    _ceil,
    _family,
    _grid,
    _input_bytes,
    _itemsize,
    _nvidia,
    _parts,
    _pivots,
    _registers,
    _round_up,
    _row_registers,
    _stream,
    _sum_bytes,
    _turns,
    _type,
    _width,
    vector,
)
from ._hip_bwd import Backward as Backward
from ._hip_bwd import _backward, _backward_candidates, _backward_launches
from ._hip_bwd import programs as programs

STAGES = ("rmsnorm_fwd", "rmsnorm_bwd", "layernorm_fwd", "layernorm_bwd")


@dataclass(frozen=True)
class Forward:
    """How rows are spread: ``lanes`` threads to a row, ``groups * unroll`` rows to a block."""

    lanes: int
    groups: int = 1
    unroll: int = 1
    regs: int = 1
    """Chunks of a thread that wait in registers, ..."""
    shared: int = 0
    """... in shared memory; the rest of the row is read again."""
    min_blocks: int = 1
    early: bool = False
    """Fetch the weights together with the row."""


@dataclass(frozen=True)
class Ahead(Forward):
    """``blocks`` blocks walk over the rows, the next ``depth`` rows of each on their way to shared memory meanwhile."""

    depth: int = 2
    blocks: int = 1


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``.

    Raises:
      Unsupported: another stage, no rows, another dtype, or more features than the kernels count.
    """
    _check(problem)
    if problem.stage.endswith("_fwd"):
        return (_forward_launch(problem, _forward(problem)),)
    return _backward_launches(problem, _backward(problem))


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings of the same computation, the plan first, for a benchmark to sweep. All of them give the same y and dx."""
    _check(problem)
    if problem.stage.endswith("_fwd"):
        forwards = dict.fromkeys([_forward(problem), *_forward_candidates(problem)])
        return [(_forward_launch(problem, c),) for c in forwards]
    backwards = dict.fromkeys([_backward(problem), *_backward_candidates(problem)])
    return [_backward_launches(problem, c) for c in backwards]


def _check(problem: Problem) -> None:
    if problem.stage not in STAGES:
        raise Unsupported(f"{problem.stage} is no stage of these kernels.")
    if problem.rows < 1:
        raise Unsupported("there are no rows to launch a kernel for.")
    if problem.features > MAX_FEATURES:
        raise Unsupported(f"N={problem.features} is beyond the {MAX_FEATURES} features that the kernels count.")
    for name, dtype in problem.dtypes:
        if dtype not in TYPES:
            raise Unsupported(f"{name} is {dtype}; the kernels read and write {', '.join(TYPES)}.")


def _held_words(problem: Problem, v: int) -> int:
    """Registers of a chunk that waits: the raw bits, or the float32 sum with a residual if that is more."""
    raw = v * (_input_bytes(problem) + _itemsize(problem, "x_bias"))
    exact = 4 * v if problem.has("residual") or problem.has("x_bias") or _parts(problem) > 1 else 0
    return max(raw, exact) // 4 or 1


def _forward(problem: Problem) -> Forward:
    wave, v = wave_size(problem.target), vector(problem)
    chunks, words = problem.features // v, _held_words(problem, v)
    if chunks <= wave:
        # Several short rows to a wave. Four rows in flight per thread give 64 bytes a thread for bf16 (two with a residual, the
        # same bytes); with few rows that would only leave compute units idle.
        lanes = next_power_of_2(chunks)
        unroll = max(1, min(4, 16 // words))
        while unroll > 1 and problem.rows * lanes < unroll * compute_units(problem.target) * 1024:
            unroll //= 2
        groups = max(1, 128 // lanes)
        return Forward(lanes, groups, 1 if unroll == 3 else unroll, regs=1, early=True)
    if walking := _walking(problem):
        return walking
    lanes = _row_lanes(problem, chunks, words, wave)
    if lanes <= wave:
        per, groups = _ceil(chunks, wave), 128 // wave
        early = per <= 2
        words = per * v * (_itemsize(problem, "weight") + _itemsize(problem, "bias")) // 4
        return Forward(wave, groups, regs=per, early=early, min_blocks=_min_blocks(problem, 128, per, words * early))
    return _with_storage(problem, Forward(lanes))


def pivots(problem: Problem) -> bool:
    """layernorm.hip: whether a row's sums are about one of its values, and are exchanged once instead of twice."""
    return _pivots(problem, problem.features // vector(problem))


def _row_lanes(problem: Problem, chunks: int, words: int, wave: int) -> int:
    """Threads of a row longer than a wave's worth of chunks.

    8 registers of row a thread for plenty of rows: with 1536 threads resident on a compute unit that is 48 KB in flight, enough to
    cover the latency of memory. *H200*, ratio to a copy at 8 and 16 registers: 8192x4096 1.045 and 1.063, with a residual 1.028
    and 1.046; 8192x8192 1.032 and 1.048; 131072x1024 1.005 and 1.012. At most 512 threads, so that two rows share a unit and
    one's stores run beside the other's loads. With few rows there are units to spare: then as many threads as there are
    chunks, which is fewer instructions one after the other, up to 512 (*H200*: 1x4096 1.74 us against 2.05 with 128).
    """
    # LayerNorm exchanges more a row, so there fewer threads hold more of it: *H200*, 8192x4096 four chunks a thread 1.08, two 1.17;
    # 131072x1024 two 1.02, one 1.15; 8192x8192 eight 1.049, four 1.051; with a residual 8192x4096 two 1.037, one 1.09.
    more = _family(problem) == "layernorm" and _nvidia(problem) and chunks > 4 * wave
    held = (32 if chunks >= 1024 and words <= 4 else 16) if more else 8
    lanes = max(wave, min(512, _round_up(_ceil(chunks, max(1, held // words)), wave)))
    if lanes == 512 and chunks > 512 * _room(problem, blocks=2):
        lanes = MAX_THREADS  # half a unit's registers and shared memory do not hold the row; a whole one's might
    room = compute_units(problem.target) * 1024
    few = problem.rows * MAX_THREADS <= room
    thirds = _round_up(_ceil(chunks, 3), wave)
    least_chunks = MAX_THREADS if few else MAX_THREADS + 1
    if _nvidia(problem) and chunks >= least_chunks and thirds <= MAX_THREADS and _parts(problem) == 1:
        # *H200*, three chunks a thread: 16x8192 2.06 us, 2.14 with 512 threads of two; 16x16384 2.69, 2.88 with 1024; 8192x16384
        # 1.032 of a copy, 1.069 with 512 threads of four. With a residual 16x16384 3.17 us, 3.23 with 1024; 8192x16384 no gain.
        if more and not few and not problem.has("residual"):
            return lanes  # 8192x16384: 1.05 of a copy with eight, 1.11 with four, 1.78 with three
        if not few and problem.rows <= 16 * compute_units(problem.target) and not problem.has("residual"):
            return 256  # 1024x16384: 1.10 of a copy with eight chunks a thread, 1.15 with three
        if few or not problem.has("residual"):
            return thirds
    # *H200*, LayerNorm about a value of the row, two chunks a thread and one: 128x4096 2.48 and 2.59 us, 16x4096 1.98 and 2.02
    least = 2 if more and pivots(problem) else 1
    most = min(512 if _nvidia(problem) else MAX_THREADS, _round_up(_ceil(chunks, least), wave))
    while lanes < most and problem.rows * lanes * 2 <= room:
        lanes = min(MAX_THREADS, _round_up(min(chunks, lanes * 2), wave))
    return lanes


def _room(problem: Problem, blocks: int) -> int:
    """Chunks a thread of 512 can keep on chip with ``blocks`` of them on a compute unit."""
    words = _held_words(problem, vector(problem))
    buffers = _buffers(problem, problem.features // vector(problem))
    shared = shared_memory(problem.target) // blocks - 2048 * buffers
    return _row_registers(problem) // words + shared // (_chunk_bytes(problem) * 512)


def _chunk_bytes(problem: Problem) -> int:
    return vector(problem) * _input_bytes(problem)


def _with_storage(problem: Problem, c: Forward) -> Forward:
    """Fills in where the chunks of a multi-wave row wait, and how many blocks the compiler must leave registers for."""
    wave, v = wave_size(problem.target), vector(problem)
    chunks, words = problem.features // v, _held_words(problem, v)
    per = _ceil(chunks, c.lanes)
    # A little less where shared memory, which the rest of the row reaches through registers, holds the other part (seen: spills).
    limit = _row_registers(problem) * 3 // (4 if problem.has("x_bias") else 3)
    if _parts(problem) > 1 and c.lanes <= 512:
        limit = max(limit, 64)  # what waits as loaded is three quarters gone once it is added up
    regs = min(per, max(1, (limit if per * words <= limit else limit * 3 // 4) // words))
    blocks = 2 if c.lanes <= 512 else 1
    free = max(
        0,
        shared_memory(problem.target) // blocks - 1024 - _buffers(problem, chunks) * _sum_bytes(chunks, c.lanes, wave),
    )
    shared = min(per - regs, free // (_chunk_bytes(problem) * c.lanes))
    if 0 < shared == per - regs and _nvidia(problem):
        # *H200*, 4096x65536: 3 chunks in registers and 13 in shared memory 1.057, 6 and 10 1.078
        regs = max(min(3, regs), per - free // (_chunk_bytes(problem) * c.lanes))
        shared = per - regs
    if v * min(_itemsize(problem, n) for n in ("x", "residual") if problem.has(n)) < 4 and _nvidia(problem):
        shared = 0  # 2-byte pieces cannot be copied asynchronously
    # The weights wait in registers, too, where few rows leave nothing else to hide their latency: *H200*, 16x16384 2.64 us against
    # 2.83. With rows in plenty it makes no difference (8192x8192 1.047 both), so there only where the registers cost nothing.
    weight_words = regs * v * (_itemsize(problem, "weight") + _itemsize(problem, "bias")) // 4
    few = problem.rows * c.lanes <= 8 * compute_units(problem.target) * 1024 and not shared
    # *H200*, LayerNorm: 8192x4096 with a residual 1.037, late 1.048; 131072x1024 1.024, late 1.046
    sums = _family(problem) == "layernorm" and _nvidia(problem)
    early = weight_words <= (32 if few else 16 if sums else 8)
    blocks = _min_blocks(problem, c.lanes, regs, weight_words * early)
    if pivots(problem) and problem.rows <= compute_units(problem.target):
        blocks = 1  # a row a unit; *H200*, 128x4096 2.48 us, asking for three 2.51
    return replace(c, regs=regs, shared=shared, early=early, min_blocks=blocks)


def _min_blocks(problem: Problem, threads: int, regs: int, early_words: int = 0) -> int:
    """Blocks on a compute unit that the compiler must leave registers for: those that hold the row and 24 more
    where all is bfloat16, 40 otherwise (conversions of float16 take more; seen to do without spills in the sm_90 code).

    *H200*: as many threads as a unit takes are worth it. 8192x2048 1.014 with 16 blocks of 128, 1.035 with 12; 8192x8192 1.047 with
    four of 512, 1.08 with three; with a residual 1.060 with three of 512, 1.074 with two. AMD's register files are four times as
    large: nothing to ask for there.
    """
    if not _nvidia(problem):
        return 1
    need = regs * _held_words(problem, vector(problem)) + (24 if _plain(problem) else 40)
    if _family(problem) == "layernorm":  # two more scalars of the row, and the bias beside the weight
        # *H200*, 8192x4096: seven blocks of 128 1.079, six 1.11; with a residual five blocks of 256 hold them all the same, 1.037,
        # and 24 blocks of 64 do about a value of the row: 131072x1024 1.024, 20 blocks 1.065
        short = pivots(problem) and threads == 2 * wave_size(problem.target)
        held = 16 if short and _plain(problem) else 8
        need += 8 + (early_words - 8 if early_words > held and not problem.has("residual") else 0)
        if threads == 256 and regs > 4 and not problem.has("residual"):
            need += 8  # 8192x16384: three blocks 1.054, four 1.058
    most = 1536 if threads == 256 else 2048  # *H200*, 8192x4096: six blocks of 256 1.03 to 1.045, eight 1.06
    fitting = [b for b in range(1, min(32, most // threads) + 1) if _registers(threads, b) >= need]
    return max(fitting, default=1)


def _plain(problem: Problem) -> bool:
    """All bfloat16: the fewest conversions."""
    return all(d == "bfloat16" for n, d in problem.dtypes if n not in STATS["layernorm"])


def _walking(problem: Problem) -> Ahead | None:
    """Blocks that walk, for long rows that are a few waves of blocks: where every block reads, sums and writes at the same time as
    all others, the memory idles in between. With many rows blocks that come and go overlap by themselves (*H200*, 8192x4096 RMSNorm
    1.033 of a copy, walking 1.056). For the bits it makes no difference where it ends.

    *H200*, ratio to a copy, walking and not: RMSNorm 1024x8192 1.037 and 1.175, 2048x8192 1.074 and 1.096; 1024x16384 1.059
    and 1.093, 1536 rows 1.060 and 1.073, 2048 rows 1.090 and 1.066. With a residual 1024x8192 1.033 and 1.072, 1100 rows
    1.049 and 1.047, 2048 rows 1.055 and 1.034; 1024x16384 1.036 and 1.044, 1100 rows 1.085 and 1.060. LayerNorm 1024x8192,
    whose blocks find room at the same time, 1.142 and 1.084, 2048 rows 1.16 and 1.20; 1024x16384 1.18 and 1.22, 2048 rows
    1.18 and 1.10; with a residual 1024x8192 1.075 and 1.152, 2048 rows 1.086 and 1.087; 1024x16384 1.09 and 1.11.
    """
    chunks, units = problem.features // vector(problem), compute_units(problem.target)
    residual, norm = problem.has("residual"), _family(problem)
    most = 8 if residual and norm == "rmsnorm" else 16 if chunks <= 1024 else 12
    least = 9 if pivots(problem) and chunks <= 1024 else 7
    if not least * units <= problem.rows <= most * units or not 1024 <= chunks <= 2048 or problem.has("x_bias"):
        return None
    if _parts(problem) > 1:
        return None
    light = norm == "rmsnorm" and not residual
    if chunks <= 1024:
        # With a residual 1024x8192 two rows ahead 0.957 of a copy's speed, one 0.949.
        depth = 2 if residual and norm == "rmsnorm" else 1
        return _ahead(problem, _ceil(chunks, 512 if light else 256), depth=depth, blocks=2, early=True)
    if light and _plain(problem):
        # 1024x16384: two blocks of 512 0.951 of a copy's speed, of 256, two rows ahead, 0.941. The weights fit beside the row;
        # float16 spills (seen in the sm_90 code).
        found = _ahead(problem, _ceil(chunks, 512), depth=1, blocks=2, early=False)
        return found and replace(found, early=True)
    if light:
        return _ahead(problem, _ceil(chunks, 256), depth=2, blocks=2, early=True)
    # One block of 512 with its weights in registers; the sum of two that is exchanged once a row has time for a third row.
    return _ahead(problem, _ceil(chunks, 512), depth=3 if norm == "rmsnorm" else 2, blocks=1, early=True)


def _ahead(problem: Problem, each: int, depth: int, blocks: int, early: bool) -> Ahead | None:
    """``blocks`` walking blocks a unit, ``each`` chunks a thread; None where they find no room or less than two rows each."""
    wave, v = wave_size(problem.target), vector(problem)
    chunks = problem.features // v
    narrow = v * min(_itemsize(problem, n) for n in ("x", "residual") if problem.has(n)) < 4
    lanes, grid = _round_up(_ceil(chunks, each), wave), blocks * compute_units(problem.target)
    if not _nvidia(problem) or narrow or not wave < lanes <= MAX_THREADS or problem.rows < 2 * grid:
        return None
    per = _ceil(chunks, lanes)
    factors = per * v * (_itemsize(problem, "weight") + _itemsize(problem, "bias")) // 4
    # raw bits are unpacked for each use, which takes 16 more than the float32 of a sum
    need = per * _held_words(problem, v) + factors * early + (32 if problem.has("residual") else 48)
    need += 8 * (_family(problem) == "layernorm")
    sums = _turns(problem, chunks) * _buffers(problem, chunks) * _sum_bytes(chunks, lanes, wave)
    shared = sums + depth * per * lanes * _chunk_bytes(problem)
    if (
        blocks * lanes > 2048
        or _registers(lanes, blocks) < need
        or blocks * (shared + 1024) > shared_memory(problem.target)
    ):
        return None
    return Ahead(lanes, regs=per, min_blocks=blocks, early=early, depth=depth, blocks=grid)


def _ahead_candidates(problem: Problem) -> Iterator[Forward]:
    few = problem.rows <= 32 * compute_units(problem.target)
    if problem.features // vector(problem) < 512 or not few or _parts(problem) > 1:
        return
    for each in (2, 4, 8):
        for depth, blocks in ((1, 2), (2, 2), (1, 3), (2, 1), (3, 1)):
            found = _ahead(problem, each, depth, blocks, early=True)
            if found and found.regs == each:
                yield found


def _forward_candidates(problem: Problem) -> Iterator[Forward]:
    wave, v = wave_size(problem.target), vector(problem)
    chunks, words = problem.features // v, _held_words(problem, v)
    yield from _ahead_candidates(problem)
    if chunks <= wave:
        lanes = next_power_of_2(chunks)
        while lanes >= 4:
            per = _ceil(chunks, lanes)
            for threads in (64, 128, 256):
                for unroll in (1, 2, 4):
                    if threads >= lanes and per * unroll * words <= 32 and next_power_of_2(per) * lanes >= chunks:
                        yield Forward(lanes, threads // lanes, unroll, regs=per, early=True)
            lanes //= 2
        return
    for lanes in range(wave, MAX_THREADS + 1, wave):
        per = _ceil(chunks, lanes)
        if lanes > wave and _ceil(chunks, lanes - wave) == per:
            continue  # the same chunks a thread with fewer threads
        if lanes == wave:
            if per * words <= 64:
                yield from (Forward(wave, g, regs=per, early=e) for g in (1, 2, 4, 8) for e in (False, True))
            continue
        if (lanes < 512 and per * words > 64) or per in (5, 7) or 8 < per < 16:
            continue
        base = _with_storage(problem, Forward(lanes))
        yield from (replace(base, early=early) for early in (False, True))
        yield from (replace(base, min_blocks=b) for b in {1, base.min_blocks + 1})
        room = (shared_memory(problem.target) - 4096) // (_chunk_bytes(problem) * lanes)
        for regs in {base.regs // 2, base.regs * 2} if per * words > 16 else ():
            if 1 <= regs <= per and regs * words <= 64 and per - regs <= room:
                yield replace(base, regs=regs, shared=per - regs, min_blocks=1)


def _forward_launch(problem: Problem, c: Forward) -> Launch:
    wave, v, family = wave_size(problem.target), vector(problem), _family(problem)
    chunks = problem.features // v
    residual, offset = problem.has("residual"), float(problem.option("weight_offset"))
    depth, walking = (c.depth, c.blocks) if isinstance(c, Ahead) else (0, 0)
    grid = (walking, 1, 1) if depth else _grid(_ceil(problem.rows, c.groups * c.unroll))
    turns = _turns(problem, chunks) if depth else 1
    waiting = (c.shared * c.lanes + depth * c.regs * c.lanes * c.groups) * _chunk_bytes(problem)
    constants: Constants = (
        ("JN_N", problem.features),
        ("JN_P", _width(problem, "y")),
        ("JN_V", v),
        ("JN_LANES", c.lanes),
        ("JN_GROUPS", c.groups),
        ("JN_UNROLL", c.unroll),
        ("JN_REGS", c.regs),
        ("JN_SHARED", c.shared),
        ("JN_MIN_BLOCKS", c.min_blocks),
        ("JN_EARLY", c.early),
        ("JN_FOLDED", grid[1] > 1),
        ("JN_DEPTH", depth),
        ("JN_BLOCKS", walking),
        ("JN_X", _type(problem, "x")),
        ("JN_RESIDUAL", _type(problem, "residual")),
        ("JN_WEIGHT", _type(problem, "weight")),
        ("JN_Y", _type(problem, "y")),
        *_bias_constants(problem),
        ("JN_HAS_RSTD", problem.has("rstd")),
        ("JN_EPS", float(problem.option("eps"))),
        ("JN_OFFSET", offset),
        ("JN_HAS_OFFSET", offset != 0),
        ("JN_BEFORE_WEIGHT", problem.option("cast") == "before_weight"),
        ("JN_ROUND_RESIDUAL", residual and problem.option("residual_rounding") == "input"),
    )
    return Launch(
        kernel=f"{family}.hip:{family}_fwd",
        inputs=("x", "x_bias", "residual", "weight", "bias") if family == "layernorm" else ("x", "residual", "weight"),
        outputs=("y", "residual_out", *STATS[family]),
        grid=grid,
        constants=constants + _stream(problem, "y", "residual_out"),
        scalars=(("rows", "i64", problem.rows),),
        threads=c.lanes * c.groups,
        shared=turns * _buffers(problem, chunks) * _sum_bytes(chunks, c.lanes, wave) + waiting,
    )


def _bias_constants(problem: Problem) -> Constants:
    """Where x comes from, and the bias behind the weight."""
    parts = ("JN_PARTS", _parts(problem))
    if _family(problem) != "layernorm":
        return (parts, ("JN_HAS_RESIDUAL", problem.has("residual")))
    return (
        parts,
        ("JN_IS_SUM", problem.has("residual") or problem.has("x_bias") or _parts(problem) > 1),
        ("JN_X_BIAS", _type(problem, "x_bias")),
        ("JN_BIAS", _type(problem, "bias")),
    )
