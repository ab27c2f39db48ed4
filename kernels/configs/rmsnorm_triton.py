"""Launches of the RMSNorm and LayerNorm stages through Triton: which kernel, which tile, how many programs.

The tile of a row depends on the features, dtypes and target alone, never on the number of rows: one code object serves every M,
so a row has the same bits wherever it stands. Thresholds marked *H200* were measured there; those of AMD targets follow from
registers and lanes (compiled and inspected, not run on AMD silicon).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from dataclasses import dataclass

from . import ITEMSIZE, Launch, Problem, Unsupported, compute_units, next_power_of_2, shared_memory, wave_size

GRID_COLUMNS = 1 << 20  # as in kernels/_common.py:program_index
MAX_ROWS = (1 << 31) - 1  # rows are counted in an i32 parameter
MAX_FEATURES = 1 << 24  # the longest row whose 32-bit columns and float32 counts are exact with room to spare
# Longest row that one wave owns, several of them a program. *H200*, bf16 131072x1024, time over that of a copy, waves that share
# a row against waves that own rows: forward 1.010 and 1.036, with a residual 1.007 and 1.029, backward 1.012 and 1.10; shorter
# rows were not measured, and there a program of one row is mostly its launch. AMD: 32 float32 registers a lane forward; backward
# five times as many (weight, share of dweight, n, dy and the next row), where 32 of a wave64 row leave two waves a SIMD.
WAVE_FWD = {"sm": 512, "gfx": {32: 1024, 64: 2048}}
WAVE_BWD = {"sm": 512, "gfx": {32: 1024, 64: 1024}}
# Longest padded row held in registers, by family of targets; longer ones are read twice. *H200*, bf16, read twice against held:
# 8192x8192 1.005 and 1.070, with a residual 1.012 and 1.045; 8192x16384 1.019 and 1.068, with a residual 1.002 and 1.027; the
# second read hits the 228 KiB of L1, and the registers go to more programs. AMD's L1 is 16 to 32 KiB and its registers are four
# times as many.
TILE_FWD = {"sm": 4096, "gfx": 32768}
# Backward the share of dweight takes registers too: a float32 per element.
TILE_BWD = {"sm": 16384, "gfx": 16384}


@dataclass(frozen=True)
class Tile:
    """How a program covers rows. ``chunks == 0``: one row shared by all waves; else waves own rows (kernels/_common.py)."""

    chunks: int
    rows: int
    block: int
    vec: int
    """Widest access in elements if the row bases allow less than 16 bytes, else 0."""
    warps: int
    lanes: int = 0
    """Lanes that share a row, where a wave or a part of one owns it."""

    def constants(self) -> tuple[tuple[str, object], ...]:
        return (
            ("CHUNKS", self.chunks),
            ("ROWS", self.rows),
            ("BLOCK", self.block),
            ("VEC", self.vec),
            ("LANES", self.lanes),
        )


@dataclass(frozen=True)
class Loop:
    """How a program walks a row too long for a tile."""

    block: int
    vec: int
    warps: int
    stages: int = 1
    early: bool = False
    """Forward, a row of one block: ask for the weight before the sum. Registers against latency."""

    def constants(self) -> tuple[tuple[str, object], ...]:
        return (("BLOCK", self.block), ("VEC", self.vec), ("STAGES", self.stages))


@dataclass(frozen=True)
class Backward:
    """A tile and how the persistent programs walk the rows."""

    tile: Tile
    programs_per_unit: int
    prefetch: bool = False
    reread: bool = False
    stages: int = 1


ROW_BUFFERS = {"fwd": ("x", "residual", "y", "residual_out"), "bwd": ("n", "dy", "dresidual_out", "dx", "dresidual")}
SUMS = ("dweight", "dbias", "dx_bias")
STAGES = tuple(f"{family}_{direction}" for family in ("rmsnorm", "layernorm") for direction in ROW_BUFFERS)


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``.

    Raises:
      Unsupported: another stage, no rows, or more rows or features than the kernels count.
    """
    check(problem, STAGES)
    check_counts(problem.rows, _padded(problem))
    if _forward(problem):
        width = next_power_of_2(_padded(problem))
        if width <= TILE_FWD[_family(problem)]:
            return (_fwd(problem, _tile(problem, width)),)
        return (_fwd_long(problem, _loop_fwd(problem, width)),)
    width = next_power_of_2(problem.features)
    # Two float32 rows spill at the longest tile of NVIDIA.
    if width <= TILE_BWD[_family(problem)] and (width <= 8192 or _family(problem) == "gfx" or _row_bytes(problem) <= 6):
        return _bwd(problem, _backward(problem, width))
    return _bwd_long(problem, _loop(problem))


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Plans worth timing against :func:`plan`, the plan itself first; all compute the same stage, in other orders of the sums."""
    maker = _fwd_candidates if _forward(problem) else _bwd_candidates
    return list(dict.fromkeys((plan(problem), *maker(problem))))


def check(problem: Problem, stages: Container[str]) -> None:
    """Raises Unsupported for what the kernels of rows do not do."""
    if problem.stage not in stages:
        raise Unsupported(f"no Triton kernel for the stage {problem.stage}")
    if problem.rows < 1:
        raise Unsupported("no rows: nothing to launch")
    if dict(problem.options).get("parts", 1) != 1:
        raise Unsupported("no Triton kernel adds up the partial sums of ranks")


def check_counts(rows: int, width: int) -> None:
    """Raises Unsupported for more than they count: rows, and elements of a row with its padding."""
    if rows > MAX_ROWS:
        raise Unsupported(f"{rows} rows; the kernels count up to {MAX_ROWS}")
    if width > MAX_FEATURES:
        raise Unsupported(f"rows of {width} elements; the kernels take up to {MAX_FEATURES}")


def _forward(problem: Problem) -> bool:
    return problem.stage.endswith("_fwd")


def _norm(problem: Problem) -> str:
    """``rmsnorm``, ``layernorm``: the first part of the names of the kernels."""
    return problem.stage.split("_")[0]


def _layer(problem: Problem) -> bool:
    return _norm(problem) == "layernorm"


def _family(problem: Problem) -> str:
    return "gfx" if problem.target.startswith("gfx") else "sm"


def _padded(problem: Problem) -> int:
    """P: the width of y, or of its cotangent."""
    return problem.shape("y" if _forward(problem) else "dy")[-1]


def _lane_width(problem: Problem) -> tuple[int, bool]:
    """(elements of one access, whether row bases limit it): the widest any row buffer can use, for Triton gives all the same."""
    width, full = 1, 16 // min(ITEMSIZE[d] for _, d in problem.dtypes)
    for name in ROW_BUFFERS[problem.stage.split("_")[1]]:
        if problem.has(name):
            stride = problem.shape(name)[-1]
            width = max(width, min(16 // ITEMSIZE[problem.dtype(name)], stride & -stride))
    return width, width < full


def _tile(problem: Problem, width: int) -> Tile:
    wave = wave_size(problem.target)
    vec, limited = _lane_width(problem)
    hint = vec if limited else 0
    longest = (WAVE_FWD if _forward(problem) else WAVE_BWD)[_family(problem)]
    if width <= (longest if isinstance(longest, int) else longest[wave]):
        # A wave (or part of one) per row: the sum needs no barrier. Four waves a program, so that a lane holds one row exactly:
        # the same instructions serve every row of the tile.
        block = min(width, wave * vec)
        return Tile(max(width // block, 1), 4 * wave * vec // block, block, hint, 4, max(block // vec, 1))
    # 16 elements a lane: two 16-byte reads of bf16 in flight for each buffer. *H200* 8192x4096: 8 warps 1.029, 4 1.039, 16 1.18;
    # 16x4096: 1.81, 1.95 and 1.82 us. At most 512 threads on NVIDIA, where 1024 of 40 registers leave no room for a second
    # workgroup, and 1024 on AMD.
    threads = min(width // 16, 512 if _family(problem) == "sm" else 1024)
    if width == 1024 and _family(problem) == "sm" and _read_bytes(problem) > 2:
        threads = 128  # *H200* 131072x1024 with a residual: 4 warps 1.007, 2 1.011; without: 2 warps 1.010, 4 1.046
    return Tile(0, 1, width, hint, threads // wave)


def _loop(problem: Problem, block: int = 8192, threads: int = 512) -> Loop:
    vec, limited = _lane_width(problem)
    return Loop(block, vec if limited else 0, threads // wave_size(problem.target))


def _loop_fwd(problem: Problem, width: int) -> Loop:
    """Blocks and waves of a row read twice. By N and dtypes; *H200* figures of bf16, time over that of a copy."""
    if _family(problem) == "gfx":
        return _loop(problem)
    added = problem.has("residual")
    if width <= 8192:
        # 8192x8192: 16 warps 1.005; with a residual 32 warps 1.012 to 1.018, 16 1.04.
        block, threads = 8192, 1024 if added else 512
    elif width <= 16384:
        # 8192x16384 and 1024x16384: 1.019 and 1.085; 8 warps on one block 1.011 and 1.126. With a residual 1.002 and 1.051.
        block, threads = (16384, 1024) if added else (4096, 512)
    else:
        # 4096x65536: 1.137 against 1.41 to 1.44 of 8192 and 16 warps; with a residual 1.099 against 1.46.
        block, threads = 32768 if added else 16384, 1024
    if max(ITEMSIZE[problem.dtype(b)] for b in ("x", "residual") if problem.has(b)) > 2 and threads == 1024:
        block //= 2  # as many bytes a lane
    return _loop(problem, block, threads)


def _read_bytes(problem: Problem) -> int:
    """Bytes a column of a row costs to read, forward."""
    return sum(ITEMSIZE[problem.dtype(b)] for b in ("x", "residual") if problem.has(b))


def _row_bytes(problem: Problem) -> int:
    """Bytes a column of a row costs to read, backward."""
    return sum(ITEMSIZE[problem.dtype(b)] for b in ("n", "dy", "dresidual_out") if problem.has(b))


def _backward(problem: Problem, width: int) -> Backward:
    """Programs and registers of the persistent backward. A row of n and dy is on its way while the one before is computed."""
    tile = _tile(problem, width)
    row_bytes = _row_bytes(problem)
    if tile.chunks:
        # 226 registers a thread for 4 chunks of bf16 on sm_90: two workgroups fit an SM, and fewer shares of dweight are left.
        per_unit, wide = max(2, 8 // tile.chunks), row_bytes > 8
        return Backward(tile, per_unit, prefetch=not wide, reread=wide)
    sm, wave = _family(problem) == "sm", wave_size(problem.target)
    # 8 elements a lane on NVIDIA: with the next row on its way 59 registers (bf16), which lets 1024 threads share an SM; of 16
    # elements the compiler makes 128 registers. AMD has registers for 16: 118.
    threads = min(max(width // (8 if sm else 16), 64), 1024)
    if threads == 1024 and (width > (8192 if sm else 16384) or row_bytes > 4 or _layer(problem)):
        # Registers are 64 (NVIDIA) or 128 (AMD) a thread of 1024: read twice rather than spill.
        return Backward(dataclasses.replace(tile, warps=(512 if sm else 1024) // wave), 1, reread=True)
    # *H200*: 8192x4096 1.077 through the compiler's pipeline, 1.098 with the prefetch of the kernel (1024x4096: 1.60 and 1.54);
    # 131072x1024 1.050 and 1.012, 8192x8192 1.078 and 1.064. More than 256 programs at 4096 lose: 1.15 and up.
    piped = sm and width == 4096 and row_bytes <= 4
    per_unit = max(1, (1024 if sm else 512) // threads)
    tile = dataclasses.replace(tile, warps=threads // wave)
    return Backward(tile, per_unit, prefetch=not piped, stages=3 if piped else 1)


def _grid(programs: int) -> tuple[int, int, int]:
    return min(programs, GRID_COLUMNS), -(-programs // GRID_COLUMNS), 1


def _fwd_constants(problem: Problem) -> tuple[tuple[str, object], ...]:
    has_residual = problem.has("residual")
    return (
        ("N", problem.features),
        ("P", _padded(problem)),
        ("EPS", float(problem.option("eps"))),
        ("WEIGHT_OFFSET", float(problem.option("weight_offset"))),
        *((("HAS_X_BIAS", problem.has("x_bias")), ("HAS_BIAS", problem.has("bias"))) if _layer(problem) else ()),
        ("HAS_RESIDUAL", has_residual),
        ("HAS_WEIGHT", problem.has("weight")),
        ("HAS_RSTD", problem.has("rstd")),
        ("CAST_BEFORE_WEIGHT", problem.option("cast") == "before_weight"),
        ("ROUND_RESIDUAL", has_residual and problem.option("residual_rounding") == "input"),
    )


def _fwd(problem: Problem, tile: Tile) -> Launch:
    return _fwd_launch(problem, "fwd", -(-problem.rows // tile.rows), tile.constants(), tile.warps)


def _fwd_long(problem: Problem, loop: Loop) -> Launch:
    shape = (*loop.constants(), ("EARLY", loop.early))
    return _fwd_launch(problem, "fwd_long", problem.rows, shape, loop.warps)


def _fwd_launch(
    problem: Problem, kernel: str, programs: int, shape: tuple[tuple[str, object], ...], warps: int
) -> Launch:
    return Launch(
        kernel=_kernel(problem, kernel),
        inputs=("x", "x_bias", "residual", "weight", "bias") if _layer(problem) else ("x", "residual", "weight"),
        scalars=(("M", "i32", problem.rows),),
        outputs=("y", "residual_out", *_stats(problem)),
        grid=_grid(programs),
        constants=(*_fwd_constants(problem), *shape),
        num_warps=warps,
    )


def _kernel(problem: Problem, name: str) -> str:
    module = "layernorm_bwd" if _layer(problem) and name.startswith("bwd") else _norm(problem)
    return f"{module}:{_norm(problem)}_{name}"


def _stats(problem: Problem) -> tuple[str, ...]:
    """Scalars of a row that the forward saves for the backward."""
    return ("mean", "shift", "rstd") if _layer(problem) else ("rstd",)


def _vectors(problem: Problem) -> tuple[str, ...]:
    """The gradients of vectors that are wanted."""
    return tuple(n for n in SUMS if problem.has(n))


def _bwd_inputs(problem: Problem) -> tuple[str, ...]:
    return ("n", *(("x_bias",) if _layer(problem) else ()), "weight", *_stats(problem), "dy", "dresidual_out")


def _sum_constants(problem: Problem) -> tuple[tuple[str, object], ...]:
    wanted = SUMS if _layer(problem) else SUMS[:1]
    return tuple((f"HAS_{n.upper()}", n in _vectors(problem)) for n in wanted)


def _shares(problem: Problem, programs: int) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...], str], ...]]:
    """(where the shares of the programs go, their scratch); one program's share is the whole sum: no second launch."""
    names = SUMS if _layer(problem) else SUMS[:1]
    if programs == 1:
        return names, ()
    shape = (programs, problem.features)
    return tuple(f"{n}_share" for n in names), tuple((f"{n}_share", shape, "float32") for n in _vectors(problem))


def _bwd_constants(problem: Problem) -> tuple[tuple[str, object], ...]:
    return (
        ("N", problem.features),
        ("P", _padded(problem)),
        ("WEIGHT_OFFSET", float(problem.option("weight_offset"))),
        *((("HAS_X_BIAS", problem.has("x_bias")),) if _layer(problem) else ()),
        ("HAS_WEIGHT", problem.has("weight")),
        ("HAS_DRESIDUAL_OUT", problem.has("dresidual_out")),
        ("HAS_DRESIDUAL", problem.has("dresidual")),
    )


def _programs(problem: Problem, units: int, most: int) -> int:
    """At most ``most`` programs over ``units`` of work, so many that the last round of the persistent loop is full."""
    rounds = -(-units // most)
    return -(-units // rounds)


def _bwd(problem: Problem, config: Backward) -> tuple[Launch, ...]:
    tile = config.tile
    programs = _programs(
        problem, -(-problem.rows // tile.rows), compute_units(problem.target) * config.programs_per_unit
    )
    shares, temps = _shares(problem, programs)
    first = Launch(
        kernel=_kernel(problem, "bwd"),
        inputs=_bwd_inputs(problem),
        scalars=(("M", "i32", problem.rows), ("PROGRAMS", "i32", programs)),
        outputs=("dx", "dresidual", *shares),
        grid=(programs, 1, 1),
        constants=(
            *_bwd_constants(problem),
            *_sum_constants(problem),
            *tile.constants(),
            ("STAGES", config.stages),
            ("PREFETCH", config.prefetch),
            ("REREAD", config.reread),
        ),
        num_warps=tile.warps,
        temps=temps,
    )
    return (first, *_reduce(problem, programs)) if temps else (first,)


def _bwd_long(problem: Problem, loop: Loop) -> tuple[Launch, ...]:
    layer, means = _layer(problem), ("product", "average") if "dx_bias" in _vectors(problem) else ()
    scratch = tuple((name, (problem.rows,), "float32") for name in means)
    wants = (("HAS_DX_BIAS", bool(means)),) if layer else ()
    dx = Launch(
        kernel=_kernel(problem, "bwd_long"),
        inputs=_bwd_inputs(problem),
        scalars=(("M", "i32", problem.rows),),
        outputs=("dx", "dresidual", *(("product", "average") if layer else ())),
        grid=_grid(problem.rows),
        constants=(*_bwd_constants(problem), *wants, *loop.constants()),
        num_warps=loop.warps,
        temps=scratch,
    )
    if not _vectors(problem):
        return (dx,)
    wave, block = wave_size(problem.target), 1024
    columns = -(-problem.features // block)
    # About eight workgroups of 128 threads a compute unit, each with STAGES rows on the way.
    programs = _programs(problem, problem.rows, max(1, 8 * compute_units(problem.target) // columns))
    shares, temps = _shares(problem, programs)
    shape = (("BLOCK", block), ("VEC", loop.vec), ("STAGES", 4))
    known = tuple(c for c in _bwd_constants(problem) if c[0] != "HAS_DRESIDUAL")
    sums = Launch(
        kernel=_kernel(problem, "bwd_columns"),
        inputs=(*_bwd_inputs(problem), "product", "average") if layer else ("n", "rstd", "dy"),
        scalars=(("M", "i32", problem.rows), ("PROGRAMS", "i32", programs)),
        outputs=shares,
        grid=(columns, programs, 1),
        constants=(*known, *_sum_constants(problem), *shape) if layer else (*known[:2], *shape),
        num_warps=128 // wave,
        temps=(*temps, *scratch),  # read here; named so that their type is known
    )
    return (dx, sums, *_reduce(problem, programs)) if temps else (dx, sums)


def _reduce(problem: Problem, programs: int) -> tuple[Launch, ...]:
    """Sum of the shares. Narrow column blocks give enough programs; all rows in one or two reads hide the latency."""
    rows, block = min(max(next_power_of_2(programs), 16), 512), 16
    wanted, layer = _vectors(problem), _layer(problem)
    outputs = (*wanted, *(n for n in SUMS if n not in wanted)) if layer else SUMS[:1]
    return (
        Launch(
            kernel=_kernel(problem, "bwd_reduce"),
            inputs=tuple(f"{n}_share" for n in outputs),
            scalars=(("PROGRAMS", "i32", programs),),
            outputs=outputs,
            grid=(-(-problem.features // block), len(wanted), 1),
            constants=(
                *((("VECTORS", len(wanted)),) if layer else ()),
                ("N", problem.features),
                ("ROWS", rows),
                ("BLOCK", block),
            ),
            num_warps=min(256, max(64, rows * block // 16)) // wave_size(problem.target),
        ),
    )


def _tiles(problem: Problem, width: int) -> Iterator[Tile]:
    """Tiles of other sizes: more waves, more rows, one row shared by all waves."""
    wave, base = wave_size(problem.target), _tile(problem, width)
    if base.chunks:
        for warps in (2, 4, 8):
            for times in (1, 2) if _forward(problem) else (1,):
                rows = max(base.rows * warps // base.warps, 1) * times
                yield dataclasses.replace(base, rows=rows, warps=warps)
    if width >= 4 * wave:
        for threads in (64, 128, 256, 512, 1024):
            if threads >= wave and 4 <= width // threads <= (64 if _forward(problem) else 32):
                yield Tile(0, 1, width, base.vec, threads // wave)


def _loops(problem: Problem) -> Iterator[Loop]:
    base = _loop(problem)
    for block in (4096, 8192, 16384, 32768):
        for threads in (256, 512, 1024):
            if not 8 <= block // threads <= 64 or block >= 2 * _padded(problem):
                continue
            shape = dataclasses.replace(base, block=block, warps=threads // wave_size(problem.target))
            if _padded(problem) <= block:  # nothing to pipeline
                yield from (dataclasses.replace(shape, early=early) for early in (False, True)[: 1 + _forward(problem)])
                continue
            for stages in (1, 2, 3):
                if _fits(problem, block, stages):
                    yield dataclasses.replace(shape, stages=stages)


def _fits(problem: Problem, block: int, stages: int, per_unit: int = 1) -> bool:
    """Whether the pipelines of a unit's programs fit shared memory: a buffer of every input a stage, and room for the sums."""
    if stages == 1:
        return True
    inputs = ("x", "residual", "weight", "bias") if _forward(problem) else ("n", "dy", "dresidual_out", "weight")
    column = sum(ITEMSIZE[problem.dtype(b)] for b in inputs if problem.has(b))
    return per_unit * (stages * block * column + 4096) <= shared_memory(problem.target)


def _fwd_candidates(problem: Problem) -> Iterator[tuple[Launch, ...]]:
    width = next_power_of_2(_padded(problem))
    if width <= 131072:
        for tile in _tiles(problem, width):
            yield (_fwd(problem, tile),)
    if width >= 8192:
        for loop in _loops(problem):
            yield (_fwd_long(problem, loop),)


def _bwd_candidates(problem: Problem) -> Iterator[tuple[Launch, ...]]:
    width = next_power_of_2(problem.features)
    modes = ((True, False, 1), (False, True, 1), (False, False, 3))  # prefetch, reread, stages
    if width <= 32768:
        for tile in _tiles(problem, width):
            for per_unit in (1, 2, 3, 4, 8):
                for prefetch, reread, stages in modes:
                    # An SM holds 2048 threads; with less than a quarter of them too little is on its way.
                    threads = tile.warps * wave_size(problem.target) * per_unit
                    if 512 <= threads <= 2048 and _fits(problem, tile.rows * width, stages, per_unit):
                        yield _bwd(problem, Backward(tile, per_unit, prefetch, reread, stages))
    if width >= 16384:
        for loop in _loops(problem):
            yield _bwd_long(problem, loop)
