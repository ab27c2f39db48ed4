"""Launches of the fused distributed norms through ``csrc/kernels/distributed.hip``: the same launch on each of W ranks.

Everything about a row is as in ``rmsnorm_hip`` and ``quant_hip``: the chunk is what these would take for the float32 sum, so the
row's bits are theirs and depend neither on the schedule nor on the launch. Threads per row and blocks are reasoned: enough 16-byte
stores in flight to fill the links, and few blocks where every block pays for its own flags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import ITEMSIZE, Launch, Problem, Unsupported, compute_units, wave_size
from ._hip import MAX_THREADS, TYPES, Constants, _ceil, _registers, _round_up, _sum_bytes, _type
from .quant_hip import CODES, EXPONENTS, SMALLEST_GROUP

SOURCE = "distributed.hip"
STAGE = "rank_norm_fwd"
RANKS = (2, 4, 8)
SCHEDULES = ("one-shot", "two-shot")
TARGETS = ("sm_", "gfx90a", "gfx942", "gfx950")
MAX_BLOCKS = 1024  # peers.h:kMaxBlocks
PACK_GROUP = 256  # packed.h:kPackGroup
# Bytes of partial sums that a rank sends, by number of ranks, from which on they travel packed. H200s, two shots, us packed and
# not: four ranks, 8192 columns, 1024 rows (12 MiB) 59.0 and 73.6, 2048 rows 106 and 117, 4096 rows 207 and 228, 8192 rows 376 and
# 450; 8192 x 7168 338 and 396; two ranks, 1024 rows (8 MiB) 42.7 and 47.2, 8192 rows 254 and 291. Data that does not pack, 8192
# rows: 449.5 over four, 302 over two. Neither fewer bytes nor eight ranks were measured.
PACK_BYTES = {2: 8 << 20, 4: 8 << 20}
HEADER_BYTES = 128 + 2 * MAX_BLOCKS * 8 * 8  # peers.h:Header


@dataclass(frozen=True)
class Tuning:
    """``lanes`` threads a row, ``regs`` chunks each; ``blocks`` walk over the rows; ``packed``: as packed.h says."""

    lanes: int
    regs: int
    blocks: int
    min_blocks: int = 1
    packed: bool = False


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The one launch. Options of the problem: ``ranks``, ``schedule``, ``gather``, ``replicated``, ``spec`` or None, the norm's.

    Raises:
      Unsupported: a size, type, number of ranks or target that the kernel does not serve.
    """
    _check(problem)
    return (_launch(problem, _tuning(problem)),)


def tuned(problem: Problem, **changes: int | None) -> Launch:
    """The plan with other ``lanes``, ``blocks``, ``min_blocks`` or ``packed``; None leaves one as it is."""
    _check(problem)
    given = {k: v for k, v in changes.items() if v is not None}
    base = _tuning(problem)
    if given.get("packed") and not _packable(problem):
        raise Unsupported("only rows of bfloat16 travel packed: two shots, N a multiple of 256, on NVIDIA.")
    if "lanes" in given:
        base = replace(base, regs=_ceil(problem.features // vector(problem), given["lanes"]))
    return _launch(problem, replace(base, **given))


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings of the same computation, the plan first."""
    _check(problem)
    base = _tuning(problem)
    units, work = compute_units(problem.target), _work(problem)
    grids = {min(work, MAX_BLOCKS, g) for g in (units, 2 * units, 3 * units, 4 * units, 6 * units)}
    found = [base, *(replace(t, blocks=g) for t in _threads(problem) for g in sorted(grids))]
    if _packable(problem):
        found.append(replace(base, packed=not base.packed))
    return [(_launch(problem, t),) for t in dict.fromkeys(found)]


def packed(launch: Launch) -> bool:
    """Whether partial sums travel packed (packed.h)."""
    return bool(dict(launch.constants)["JN_PACKED"])


def half_bytes(problem: Problem) -> int:
    """Of one half of a rank's workspace: the partials pushed here and, with two shots, the results (distributed.h)."""
    ranks, n, x = problem.option("ranks"), problem.features, ITEMSIZE[problem.dtype("x")]
    if problem.option("schedule") == "one-shot":
        return _round_up(ranks * problem.rows * n * x, 16)
    rows = ranks * _ceil(problem.rows, ranks)
    total = rows * n * x
    if _packable(problem):
        total += rows * tops_bytes(problem)
    if problem.option("gather"):
        total += rows * _value_bytes(problem) + _round_up(rows * _scale_bytes(problem), 16)
    if problem.option("replicated") and problem.has("residual"):
        total += rows * n * ITEMSIZE[problem.dtype("residual")]
    return _round_up(total, 16)


def _packable(problem: Problem) -> bool:
    """Whether partial sums can travel packed (packed.h)."""
    two = problem.option("schedule") == "two-shot" and problem.target.startswith("sm_")
    return two and problem.dtype("x") == "bfloat16" and problem.features % PACK_GROUP == 0


def _packs(problem: Problem) -> bool:
    """Whether they do by default."""
    least = PACK_BYTES.get(problem.option("ranks"))
    if least is None or not _packable(problem):
        return False
    sent = (problem.rows - _work(problem)) * problem.features * ITEMSIZE[problem.dtype("x")]
    return sent >= least


def tops_bytes(problem: Problem) -> int:
    return _round_up(problem.features // PACK_GROUP, 16)


def _value_bytes(problem: Problem) -> int:
    spec = problem.option("spec")
    if spec is None:
        return problem.features * ITEMSIZE[problem.dtype("x")]
    return problem.features // (2 if spec.dtype == "fp4" else 1)


def _scale_bytes(problem: Problem) -> int:
    spec = problem.option("spec")
    return 0 if spec is None else spec.groups(problem.features) * (1 if spec.scale_dtype == "e8m0" else 4)


def _check(problem: Problem) -> None:
    if problem.stage != STAGE:
        raise Unsupported(f"{problem.stage} is no stage of {SOURCE}.")
    if not problem.target.startswith(TARGETS):
        raise Unsupported(f"{problem.target} is none of the targets it is compiled for.")
    if problem.option("ranks") not in RANKS:
        raise Unsupported(f"{problem.option('ranks')} ranks; the kernel serves 2, 4 and 8.")
    if problem.rows < 1:
        raise Unsupported("there are no rows.")
    if problem.features % 16:
        raise Unsupported(f"N={problem.features} is no multiple of 16.")
    if problem.option("schedule") == "one-shot" and not (problem.option("gather") and _whole_residual(problem)):
        raise Unsupported("one shot needs every row's residual on every rank and gives every rank every row.")
    for name in ("x", "residual", "weight"):
        if problem.has(name) and problem.dtype(name) not in TYPES:
            raise Unsupported(f"{name} is {problem.dtype(name)}; the kernels read {', '.join(TYPES)}.")
    spec = problem.option("spec")
    if spec is not None:
        group = spec.group_size
        if spec.dtype not in CODES:
            raise Unsupported(f"{spec.dtype} is none of the formats {', '.join(CODES)}.")
        if group and group != problem.features and (group < SMALLEST_GROUP or group & (group - 1)):
            raise Unsupported(f"group_size={group} is no power of two from {SMALLEST_GROUP} up.")
    if not _threads(problem):
        raise Unsupported(f"N={problem.features} does not fit into the registers of one block.")


def _whole_residual(problem: Problem) -> bool:
    return problem.option("replicated") or not problem.has("residual")


def vector(problem: Problem) -> int:
    """Elements of a chunk: as ``rmsnorm_hip`` and ``quant_hip`` choose it for a float32 x with the same operands and results."""
    before = problem.option("cast") == "before_weight"  # then the weight is multiplied by an op of its own
    narrow = [n for n in ("residual", *(() if before else ("weight",))) if problem.has(n)]
    if before or problem.option("spec") is None:
        narrow.append("x")
    sizes = [4, *(ITEMSIZE[problem.dtype(n)] for n in narrow)]
    return 16 // min(sizes)


def _chunk_words(problem: Problem) -> int:
    """Registers of a chunk while its row is worked out: the partials and the residual as loaded, or the float32 sum and z."""
    v = vector(problem)
    loaded = problem.option("ranks") * ITEMSIZE[problem.dtype("x")]
    loaded += ITEMSIZE[problem.dtype("residual")] if problem.has("residual") else 0
    return max(v * loaded // 4, 2 * v)


def _work(problem: Problem) -> int:
    """Rows that blocks can share."""
    ranks = problem.option("ranks")
    return problem.rows if problem.option("schedule") == "one-shot" else _ceil(problem.rows, ranks)


def _threads(problem: Problem) -> list[Tuning]:
    """Threads a row that keep it in registers, most threads first."""
    wave, chunks = wave_size(problem.target), problem.features // vector(problem)
    found = {}
    for per in (1, 2, 3, 4, 6, 8):
        lanes = _round_up(_ceil(chunks, per), wave)
        need = 48 + per * _chunk_words(problem)
        room = _registers(lanes, 1) if problem.target.startswith("sm_") else min(256, 512 // _ceil(lanes, 256))
        if lanes <= MAX_THREADS and need <= room:
            found[lanes] = Tuning(lanes, _ceil(chunks, lanes), 1)
    return [found[lanes] for lanes in sorted(found, reverse=True)]


def _tuning(problem: Problem) -> Tuning:
    """Few rows: all the threads a row can use, a block for each. Many: 512 threads or fewer, two blocks a unit.

    A block waits only for those of its number on the other ranks, so that the blocks of one launch need not be resident together:
    from two rows a block on, all numbers are used on NVIDIA, and late blocks send while early ones work. Four H200s, 8192 x 8192:
    451 to 455 us with 1024 blocks (439 in an earlier run), 456 with 528, 463 with 264; over two, 293, 295 and 308.
    """
    threads, work, units = _threads(problem), _work(problem), compute_units(problem.target)
    if work <= units:
        return replace(threads[0], blocks=work, packed=_packs(problem))
    smaller = replace(next((t for t in threads if t.lanes <= 512), threads[-1]), packed=_packs(problem))
    all_numbers = problem.target.startswith("sm_") and work >= 2 * MAX_BLOCKS
    blocks = MAX_BLOCKS if all_numbers else min(work, MAX_BLOCKS, 2 * units)
    return replace(smaller, blocks=blocks, min_blocks=_resident(problem, smaller))


def _resident(problem: Problem, t: Tuning) -> int:
    """2 where the registers allow two blocks on a unit. 512 threads then have 64 registers, where the compiler took 72 or more for
    four ranks: it loads some partials later, and spills nothing. Four H200s, 1024 x 8192: 68 to 69 us, and 75 with one block a
    unit; 8192 x 8192 with 264 blocks: 463 and 458, no difference. Eight ranks spilled; packed, so did results of 16 bits and the
    residual of everyone."""
    if not problem.target.startswith("sm_"):
        return 1
    wide = problem.option("spec") is None or (problem.option("replicated") and problem.has("residual"))
    others = 40 if t.packed and wide else 24
    return 2 if _registers(t.lanes, 2) >= others + t.regs * _chunk_words(problem) else 1


def _spec_constants(problem: Problem) -> Constants:
    spec = problem.option("spec")
    if spec is None:
        return (("JN_QUANT", False), ("JN_CODE", "Int8"), ("JN_GROUP", 0), ("JN_EXPONENT", "kNone"), ("JN_BOUNDED", False),
                ("JN_BOUND", 0.0))  # fmt: skip
    group = 0 if spec.group_size in (None, problem.features) else spec.group_size
    return (
        ("JN_QUANT", True),
        ("JN_CODE", CODES[spec.dtype]),
        ("JN_GROUP", group),
        ("JN_EXPONENT", EXPONENTS[spec.e8m0_rounding] if spec.scale_dtype == "e8m0" else "kNone"),
        ("JN_BOUNDED", spec.scale_ub is not None),
        ("JN_BOUND", float(spec.scale_ub or 0.0)),
    )


def _shared(problem: Problem, lanes: int, packed: bool) -> int:
    """Two sums and maxima (RankNorm::shared_bytes), and the verdicts of a wait."""
    wave, chunks, spec = wave_size(problem.target), problem.features // vector(problem), problem.option("spec")
    entries = 0
    if spec is not None and lanes > wave:
        group = 0 if spec.group_size in (None, problem.features) else spec.group_size // vector(problem)
        if group == 0:
            entries = lanes // wave
        elif group > wave:
            entries = _ceil(chunks, wave)
    tops = 2 * (problem.option("ranks") - 1) * tops_bytes(problem) if packed else 0
    return 2 * (_sum_bytes(chunks, lanes, wave) + _ceil(entries, 4) * 16) + 32 + tops


def _launch(problem: Problem, t: Tuning) -> Launch:
    offset = float(problem.option("weight_offset"))
    constants: Constants = (
        ("JN_N", problem.features),
        ("JN_V", vector(problem)),
        ("JN_LANES", t.lanes),
        ("JN_REGS", t.regs),
        ("JN_MIN_BLOCKS", t.min_blocks),
        ("JN_RANKS", problem.option("ranks")),
        ("JN_ONE_SHOT", problem.option("schedule") == "one-shot"),
        ("JN_GATHER", problem.option("gather")),
        ("JN_REPLICATED", problem.option("replicated")),
        ("JN_PACKED", bool(t.packed)),
        ("JN_X", _type(problem, "x")),
        ("JN_RESIDUAL", _type(problem, "residual")),
        ("JN_WEIGHT", _type(problem, "weight")),
        ("JN_EPS", float(problem.option("eps"))),
        ("JN_OFFSET", offset),
        ("JN_HAS_OFFSET", offset != 0),
        ("JN_BEFORE_WEIGHT", problem.option("cast") == "before_weight"),
    )
    return Launch(
        kernel=f"{SOURCE}:{STAGE}",
        inputs=("x", "residual", "weight"),
        outputs=("values", "scale", "residual_out"),
        grid=(t.blocks, 1, 1),
        constants=constants + _spec_constants(problem),
        scalars=(("rows", "i32", problem.rows), ("share", "i32", _ceil(problem.rows, problem.option("ranks")))),
        threads=t.lanes,
        shared=_shared(problem, t.lanes, t.packed),
    )
