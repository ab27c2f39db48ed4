"""Launches of the quantising stages through ``csrc/kernels/quant.hip``.

Rows are spread and kept as for ``rmsnorm_fwd`` (``rmsnorm_hip``); the difference is that a thread holds a chunk as float32 while
the maximum is found. The sum of a row has the bits of ``rmsnorm_fwd`` with the same operands, and no plan changes them. The figures
follow from registers and threads, like those of ``rmsnorm_hip``; for AMD targets they are compiled and inspected only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import ITEMSIZE, Launch, Problem, Unsupported, compute_units, next_power_of_2, shared_memory, wave_size
from ._hip import (
    MAX_FEATURES,
    MAX_THREADS,
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
    _type,
)
from .rmsnorm_hip import Ahead, Forward, _bias_constants

SOURCE = "quant.hip"
OPERANDS = {
    "quantize_fwd": ("x", "smooth_scale", "static_scale"),
    "rmsnorm_quant_fwd": ("x", "residual", "weight", "smooth_scale", "static_scale"),
    "layernorm_quant_fwd": ("x", "x_bias", "residual", "weight", "bias", "smooth_scale", "static_scale"),
}
CODES = {
    "int8": "Int8",
    "float8_e4m3fn": "E4M3FN",
    "float8_e4m3fnuz": "E4M3FNUZ",
    "float8_e5m2": "E5M2",
    "float8_e5m2fnuz": "E5M2FNUZ",
    "fp4": "FP4",
}
EXPONENTS = {"up": "kUp", "down": "kDown", "even": "kEven"}
LAYOUTS = {"row": "kRow", "column": "kColumn", "shuffled": "kShuffled"}
SMALLEST_GROUP = 16
FLOATS = ("x", "x_bias", "residual", "weight", "bias", "smooth_scale", "y", "residual_out")


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The one launch that computes ``problem``.

    Raises:
      Unsupported: another stage, no rows, another dtype, more features than the kernels count, or a group that is neither a power
        of two from 16 up nor the whole row.
    """
    _check(problem)
    return (_launch(problem, _forward(problem)),)


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings of the same computation, the plan first, for a benchmark to sweep. All of them give the same results."""
    _check(problem)
    return [(_launch(problem, c),) for c in dict.fromkeys([_forward(problem), *_candidates(problem)])]


def _check(problem: Problem) -> None:
    if problem.stage not in OPERANDS:
        raise Unsupported(f"{problem.stage} is no stage of {SOURCE}.")
    if problem.rows < 1:
        raise Unsupported("there are no rows to launch a kernel for.")
    if problem.features > MAX_FEATURES:
        raise Unsupported(f"N={problem.features} is beyond the {MAX_FEATURES} features that the kernels count.")
    for name in FLOATS:
        if problem.has(name) and problem.dtype(name) not in TYPES:
            raise Unsupported(f"{name} is {problem.dtype(name)}; the kernels read and write {', '.join(TYPES)}.")
    spec = problem.option("spec")
    if spec.dtype not in CODES:
        raise Unsupported(f"{spec.dtype} is none of the formats {', '.join(CODES)}.")
    group, width = spec.group_size, padded(problem)
    if group is not None and _group(problem) and (group < SMALLEST_GROUP or group & (group - 1) or width % group):
        raise Unsupported(
            f"group_size={group} of {width} features: the kernels take powers of two from {SMALLEST_GROUP} up that divide the row."
        )


def padded(problem: Problem) -> int:
    """P"""
    width = problem.shape("values")[-1]
    return 2 * width if problem.option("spec").dtype == "fp4" else width


def _group(problem: Problem) -> int:
    """Features of a group; 0 for the whole row."""
    spec = problem.option("spec")
    group = spec.group_size
    return 0 if group is None or (group == padded(problem) and spec.scale_layout != "shuffled") else group


def vector(problem: Problem) -> int:
    """Elements of a chunk, as ``rmsnorm_hip.vector`` for the same operands and y: the row sum depends on it."""
    floats = ("x_bias", "residual", "weight", "bias", "y", *(("x",) if _parts(problem) == 1 else ()))
    v = 16 // min((ITEMSIZE[problem.dtype(n)] for n in floats if problem.has(n)), default=4)
    while problem.features % v or padded(problem) % v:
        v //= 2
    return v


def _chunk_bytes(problem: Problem) -> int:
    return vector(problem) * _input_bytes(problem)


def _factor_words(problem: Problem) -> int:
    """Registers of a chunk of weight, bias and smooth scale."""
    return vector(problem) * sum(_itemsize(problem, n) for n in ("weight", "bias", "smooth_scale")) // 4


def _words(problem: Problem) -> int:
    """Registers of a chunk that waits: z in float32, or the bits as loaded if those are more."""
    v = vector(problem)
    return max(v, (_chunk_bytes(problem) + v * _itemsize(problem, "x_bias")) // 4, 1)


def _forward(problem: Problem) -> Forward:
    return _in_plenty(problem) or _one_turn(problem)


def _in_plenty(problem: Problem) -> Forward | None:
    """Rows in plenty without a residual, where what a thread does for its row but not for an element is worth saving: four to eight
    chunks a thread instead of two, and walking blocks for fp4 and for groups in rows that 128 threads do not share evenly.

    *H200*, ratio to a copy, 128 threads: rmsnorm_quant fp8 8192x4096 (four chunks) 1.040, walking blocks of two 1.129; int8
    8192x8192 (eight chunks) 1.061, four chunks 1.096; groups of 128 8192x4096 1.057, walking blocks 1.093, and 8192x8192 1.067 and
    1.084; 8192x5120 walking blocks 1.076, one row a block 1.159. A wave to a row, 131072x1024: one row a block fp8 0.980, two
    1.001, int8 0.987 and 1.027, mxfp4 1.083 and 1.143. LayerNorm 8192x4096: eight chunks 1.343, four 1.439. With a residual the
    memory is busy anyway (int8 1.008, two chunks), but for the longer LayerNorm: four chunks 1.034, two 1.061.
    """
    wave, chunks = wave_size(problem.target), problem.features // vector(problem)
    if not _nvidia(problem) or _words(problem) != 8 or chunks <= wave or _parts(problem) > 1:
        return None
    longer, quarter = _family(problem) == "layernorm", _round_up(_ceil(chunks, 4), wave)
    lanes = quarter
    if lanes > 512 or problem.rows * lanes < 2 * compute_units(problem.target) * 1024:
        return None
    if problem.has("residual"):
        if not longer or lanes <= 64:
            return None
    elif longer and 64 < lanes <= 256:
        lanes = _round_up(_ceil(chunks, 8), wave)
    elif lanes <= 256:
        lanes = min(lanes, 128)
    if lanes == wave:
        return _walking_waves(problem) or replace(_one_wave(problem, 1), early=True)
    if not longer and (walking := _walking(problem, quarter)):
        return walking
    per = _ceil(chunks, lanes)
    blocks = _min_blocks(problem, lanes, per)
    if problem.option("spec").scale_dtype == "e8m0" and per <= 4 and not longer:
        blocks = max(1, blocks - 1)  # 72 registers: mxfp8 8192x4096 1.047, 64 registers 1.082
    return Forward(lanes, regs=per, min_blocks=blocks, early=False)


def _walking(problem: Problem, quarter: int) -> Ahead | None:
    """Blocks that walk, one row ahead, where they were measured to win over one row a block.

    *H200*, mxfp4, 512 threads a compute unit with the weight in registers, or 1024 threads with four chunks each. 8192x8192: eight
    chunks and one row ahead 1.045, 1024 threads 1.080, one row a block 1.144. 8192x4096: four chunks and two rows ahead 1.052,
    eight chunks and one row 1.089, 1024 threads 1.141, one row a block 1.156.
    """
    fp4, wave = problem.option("spec").dtype == "fp4", wave_size(problem.target)
    ahead = _ahead(problem, 4) if fp4 or (_group(problem) and quarter > 128 and quarter & (quarter - 1)) else None
    if ahead is None:
        return None
    eighth, rest = divmod(problem.features // vector(problem), 8)
    fits = _factor_words(problem) == 4 and not problem.has("y")  # 128 registers
    if fp4 and fits and not rest and eighth % wave == 0 and 64 <= eighth <= 128:
        blocks = 512 // eighth
        grid = blocks * compute_units(problem.target)
        eight = replace(ahead, lanes=eighth, regs=8, min_blocks=blocks, early=True, depth=1, blocks=grid)
        return replace(eight, lanes=128, regs=4, min_blocks=4, depth=2, blocks=grid // 2) if eighth == 64 else eight
    return replace(ahead, depth=1)


def _walking_waves(problem: Problem) -> Ahead | None:
    """Blocks of one wave that walk, a row of four chunks a lane ahead of each.

    *H200*, 131072x1024, share of a copy's speed, walking and not: rmsnorm_quant mxfp4 0.967 and 0.876, layernorm_quant fp8 0.800
    and 0.728; but rmsnorm_quant fp8 0.926 and 1.008, and with groups of 128 0.944 and 0.991.
    """
    longer, spec = _family(problem) == "layernorm", problem.option("spec")
    fp4 = spec.dtype == "fp4" and spec.scale_dtype == "e8m0"
    ahead = _ahead(problem, 4) if longer or fp4 else None
    if ahead is None or ahead.regs != 4 or (problem.has("smooth_scale") and not longer):
        return None  # with a smooth scale the sm_90 code of RMSNorm spills
    # Registers of a thread: 80, or 96. *H200*, mxfp4: 24 blocks 0.967 with the weights in registers or not, 20 blocks 0.953.
    plain = _plain(problem) and spec.scale_layout != "shuffled" and not spec.dtype.endswith("fnuz")
    blocks = 24 if plain and not longer else 20
    grid = blocks * compute_units(problem.target)
    return replace(ahead, groups=1, min_blocks=blocks, early=plain, depth=1, blocks=grid)


def _plain(problem: Problem) -> bool:
    """All bfloat16, codes and scales the only results: what takes the fewest registers."""
    others = problem.has("y") or problem.has("smooth_scale")
    return not others and all(problem.dtype(n) == "bfloat16" for n in FLOATS if problem.has(n))


def _one_turn(problem: Problem) -> Forward:
    """A block for each row or for a few."""
    wave, v = wave_size(problem.target), vector(problem)
    chunks, words = problem.features // v, _words(problem)
    if chunks <= wave:
        # Several short rows to a wave, two rows at a time per thread where there are enough of them to fill the device.
        lanes = max(next_power_of_2(chunks), _fewest_lanes(problem))
        unroll = max(1, min(2, 16 // words))
        if problem.rows * lanes < unroll * compute_units(problem.target) * 1024:
            unroll = 1
        return Forward(lanes, max(1, 128 // lanes), unroll, regs=1, early=True)
    # 16 registers of row a thread for plenty of rows, at most 512 threads then; with few rows one chunk a thread.
    lanes = max(wave, min(512, _round_up(_ceil(chunks, max(1, 16 // words)), wave)))
    if lanes == 512 and chunks > 512 * _room(problem):
        lanes = MAX_THREADS
    # H200, rmsnorm_quant fp8 16x8192: 512 threads with two chunks 2.13 us, 1024 threads 2.24.
    most = 512 if _nvidia(problem) and chunks <= 2 * 512 else MAX_THREADS
    # H200, add_rmsnorm_quant mxfp4 16x4096: 256 threads with two chunks 1.95 us, 512 threads 1.98.
    if most == 512 and chunks == 512 and problem.has("residual") and problem.option("spec").dtype == "fp4":
        most = 256
    room = compute_units(problem.target) * 1024
    while lanes < min(most, _round_up(chunks, wave)) and problem.rows * lanes * 2 <= room:
        lanes = min(most, _round_up(min(chunks, lanes * 2), wave))
    return _one_wave(problem) if lanes <= wave else _with_storage(problem, Forward(lanes))


def _ahead(problem: Problem, each: int = 4) -> Ahead | None:
    """Rows in plenty without a residual: ``each`` chunks a thread and copies ahead into shared memory.

    What a thread does for its row but not for an element, some hundred instructions, counts against 8 * ``each`` elements, and no
    registers wait for memory: two rows ahead of every row that is worked on.
    """
    wave, chunks = wave_size(problem.target), problem.features // vector(problem)
    if (
        not _nvidia(problem)
        or problem.has("residual")
        or problem.has("x_bias")
        or _parts(problem) > 1
        or _itemsize(problem, "x") != 2
        or vector(problem) != 8
        or chunks <= wave
    ):
        return None
    lanes = _round_up(_ceil(chunks, each), wave)
    if lanes > 512:
        return None
    groups = max(1, 128 // lanes) if lanes == wave else 1
    per, threads = _ceil(chunks, lanes), lanes * groups
    free = shared_memory(problem.target)
    fixed = 1024 + 2 * _fixed_bytes(problem, lanes)  # one row's exchange beside the next one's
    # Seen in the sm_90 code to do without spills.
    spec = problem.option("spec")
    need = 8 * per + 32 + 8 * problem.has("smooth_scale") + 8 * problem.has("y")
    need += 8 * (spec.scale_layout == "shuffled") + 16 * spec.dtype.endswith("fnuz")
    need += 8 * (_family(problem) == "layernorm")
    fitting = [
        b for b in range(1, 1536 // threads + 1)
        if _registers(threads, b) >= need and b * (fixed + 2 * per * threads * 16) <= free
    ]  # fmt: skip
    blocks = max(fitting, default=0)
    if not blocks or problem.rows < 4 * groups * blocks * compute_units(problem.target):
        return None
    grid = blocks * compute_units(problem.target)
    return Ahead(lanes, groups, regs=per, min_blocks=blocks, early=False, depth=2, blocks=grid)


def _fewest_lanes(problem: Problem) -> int:
    """Two lanes for fp4 in chunks of one element: they share a byte."""
    return 2 if problem.option("spec").dtype == "fp4" and vector(problem) == 1 else 1


def _one_wave(problem: Problem, groups: int = 0) -> Forward:
    wave = wave_size(problem.target)
    per, groups = _ceil(problem.features // vector(problem), wave), groups or max(1, 128 // wave)
    return Forward(wave, groups, regs=per, early=per <= 2, min_blocks=_min_blocks(problem, wave * groups, per))


def _room(problem: Problem) -> int:
    """Chunks a thread of 512 can keep on chip with two blocks on a compute unit."""
    shared = shared_memory(problem.target) // 2 - 4096
    return _row_registers(problem) // _words(problem) + shared // (_chunk_bytes(problem) * 512)


def _with_storage(problem: Problem, c: Forward) -> Forward:
    """Fills in where the chunks of a multi-wave row wait, and how many blocks the compiler must leave registers for."""
    wave, v = wave_size(problem.target), vector(problem)
    chunks, words = problem.features // v, _words(problem)
    per = _ceil(chunks, c.lanes)
    limit = max(_row_registers(problem), 64 if _parts(problem) > 1 and c.lanes <= 512 else 0)
    # Less where the rest of the row comes by beside the slots.
    regs = min(per, max(1, (limit if per * words <= limit else limit // 2) // words))
    blocks = 2 if c.lanes <= 512 else 1
    free = shared_memory(problem.target) // blocks - 1024 - _fixed_bytes(problem, c.lanes)
    shared = min(per - regs, max(0, free // (_chunk_bytes(problem) * c.lanes)))
    if v * min(_itemsize(problem, n) for n in ("x", "residual") if problem.has(n)) < 4 and wave == 32:
        shared = 0  # 2-byte pieces cannot be copied asynchronously
    early = regs * _factor_words(problem) <= 8
    # *H200*, a row a unit, registers to spare and asked for three blocks: rmsnorm_quant mxfp4 1x4096 1.63 us and 1.70,
    # add_rmsnorm_quant 16x4096 fp8-g128 1.95 and 2.02, int8 1.97 and 2.02, mxfp8 1.94 and 1.98
    alone = problem.rows <= compute_units(problem.target)
    blocks = 1 if alone else _min_blocks(problem, c.lanes, regs)
    return replace(c, regs=regs, shared=shared, early=early, min_blocks=blocks)


def _min_blocks(problem: Problem, threads: int, regs: int) -> int:
    """Blocks on a compute unit that the compiler must leave registers for; AMD's register files need no asking."""
    if not problem.target.startswith("sm_"):
        return 1
    need = regs * _words(problem) + max(32, 24 + min(2, regs) * _factor_words(problem))
    if _family(problem) == "layernorm":
        added = problem.has("residual") or problem.has("x_bias")
        if added or regs < 4 or threads > 128:
            need += 8
        else:  # H200, 8192x4096: 96 registers 1.343 of a copy's time, 128 registers 1.390. Groups, y and software codes take more,
            # y beside a smooth scale the most (seen in the sm_90 code).
            kept, software = problem.has("y"), problem.option("spec").dtype.endswith("fnuz")
            more = 8 * (bool(_group(problem)) or kept or software) + 32 * (kept and problem.has("smooth_scale"))
            need = regs * _words(problem) + 32 + more + 8 * _pivots(problem, problem.features // vector(problem))
    fitting = [b for b in range(1, 1536 // threads + 1) if _registers(threads, b) >= need]
    return max(fitting, default=1)


def _fixed_bytes(problem: Problem, lanes: int) -> int:
    """Shared memory for the sum and the maxima: RowSum::bytes and QuantRow::bytes."""
    wave, chunks = wave_size(problem.target), problem.features // vector(problem)
    if lanes <= wave:
        return 0
    group = _group(problem) // vector(problem)
    if problem.has("static_scale") or 0 < group <= wave:
        entries = 0
    else:
        entries = _ceil(chunks, wave) if group else lanes // wave
    return _buffers(problem, chunks) * _sum_bytes(chunks, lanes, wave) + _ceil(entries, 4) * 16


def _candidates(problem: Problem) -> Iterator[Forward]:
    wave, v = wave_size(problem.target), vector(problem)
    chunks, words = problem.features // v, _words(problem)
    for each in (2, 3, 4, 6, 8):
        if ahead := _ahead(problem, each):
            yield from (
                replace(ahead, depth=d, early=e) for d in (2, 1) for e in (False, True)[: 2 if each <= 4 else 1]
            )
    if chunks <= wave:
        lanes = next_power_of_2(chunks)
        while lanes >= 4:
            per = _ceil(chunks, lanes)
            for threads in (64, 128, 256):
                for unroll in (1, 2, 4):
                    if threads >= lanes and per * unroll * words <= 32:
                        yield Forward(lanes, threads // lanes, unroll, regs=per, early=True)
            lanes //= 2
        return
    for lanes in range(wave, MAX_THREADS + 1, wave):
        per = _ceil(chunks, lanes)
        if lanes > wave and _ceil(chunks, lanes - wave) == per:
            continue  # the same chunks a thread with fewer threads
        if lanes == wave:
            if per * words <= 128:
                bases = [_one_wave(problem, groups) for groups in (1, 2, 4, 8)]
                yield from (replace(b, early=early) for b in bases for early in (False, True))
            continue
        if 3 <= per <= 8 and per * words <= 64:  # all of the row in registers
            held = Forward(lanes, regs=per, min_blocks=_min_blocks(problem, lanes, per))
            yield from (replace(held, early=early) for early in (False, True))
        if (lanes < 512 and per * words > 64) or per in (5, 7) or 8 < per < 16:
            continue
        base = _with_storage(problem, Forward(lanes))
        yield from (replace(base, early=early) for early in (False, True))
        yield from (replace(base, min_blocks=b) for b in (max(1, base.min_blocks - 1), base.min_blocks + 1, 1))
        room = (shared_memory(problem.target) - 4096) // (_chunk_bytes(problem) * lanes)
        for regs in {base.regs // 2, base.regs * 2} if per * words > 16 else ():
            if 1 <= regs <= per and regs * words <= 64 and per - regs <= room:
                yield replace(base, regs=regs, shared=per - regs, min_blocks=1)


def _spec_constants(problem: Problem) -> Constants:
    spec = problem.option("spec")
    return (
        ("JN_CODE", CODES[spec.dtype]),
        ("JN_GROUP", _group(problem)),
        ("JN_EXPONENT", EXPONENTS[spec.e8m0_rounding] if spec.scale_dtype == "e8m0" else "kNone"),
        ("JN_LAYOUT", LAYOUTS[spec.scale_layout]),
        ("JN_STATIC", problem.has("static_scale")),
        ("JN_BOUNDED", spec.scale_ub is not None),
        ("JN_BOUND", float(spec.scale_ub or 0.0)),
    )


def _norm_constants(problem: Problem) -> Constants:
    residual, offset = problem.has("residual"), float(problem.option("weight_offset"))
    return (
        ("JN_RESIDUAL", _type(problem, "residual")),
        ("JN_WEIGHT", _type(problem, "weight")),
        ("JN_Y", _type(problem, "y")),
        *_bias_constants(problem),
        ("JN_EPS", float(problem.option("eps"))),
        ("JN_OFFSET", offset),
        ("JN_HAS_OFFSET", offset != 0),
        ("JN_BEFORE_WEIGHT", problem.option("cast") == "before_weight"),
        ("JN_ROUND_RESIDUAL", residual and problem.option("residual_rounding") == "input"),
    )


def _launch(problem: Problem, c: Forward) -> Launch:
    norm = problem.stage != "quantize_fwd"
    depth, blocks = (c.depth, c.blocks) if isinstance(c, Ahead) else (0, 0)
    grid = (blocks, 1, 1) if depth else _grid(_ceil(problem.rows, c.groups * c.unroll))
    exchange = _fixed_bytes(problem, c.lanes) * (2 if depth else 1)
    waiting = (c.shared * c.lanes + depth * c.regs * c.lanes * c.groups) * _chunk_bytes(problem)
    constants: Constants = (
        ("JN_N", problem.features),
        ("JN_P", padded(problem)),
        ("JN_V", vector(problem)),
        ("JN_LANES", c.lanes),
        ("JN_GROUPS", c.groups),
        ("JN_UNROLL", c.unroll),
        ("JN_REGS", c.regs),
        ("JN_SHARED", c.shared),
        ("JN_MIN_BLOCKS", c.min_blocks),
        ("JN_EARLY", c.early),
        ("JN_FOLDED", grid[1] > 1),
        ("JN_DEPTH", depth),
        ("JN_BLOCKS", blocks),
        ("JN_X", _type(problem, "x")),
        ("JN_SMOOTH", _type(problem, "smooth_scale")),
    )
    tiles = problem.option("spec").scale_layout == "shuffled" and problem.has("scale")
    return Launch(
        kernel=f"{SOURCE}:{problem.stage}",
        inputs=OPERANDS[problem.stage],
        outputs=("values", "scale", "residual_out", "y") if norm else ("values", "scale"),
        grid=grid,
        constants=constants
        + _spec_constants(problem)
        + (_norm_constants(problem) if norm else ())
        + _stream(problem, "values", "residual_out", "y"),
        scalars=(("rows", "i64", problem.rows), ("scale_rows", "i64", problem.shape("scale")[0] if tiles else 0)),
        threads=c.lanes * c.groups,
        shared=exchange + waiting,
    )
