"""Launches of the GroupNorm stages through Triton: one program for a small group, else parts of channels in several launches.

The tiles follow from the spatial size, the channels of a group, the dtypes and the target alone: an example has the same bits in
any batch, and a group the same whichever groups stand beside it. Sizes follow from registers and bytes in flight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from . import ITEMSIZE, Launch, Problem, Unsupported, next_power_of_2, wave_size
from ._images import Images

GRID_COLUMNS = 1 << 20  # as in kernels/_common.py:program_index
MAX_ELEMENTS = 1 << 31  # of an example: offsets inside a tile and counts of positions are 32-bit
# Padded elements of a group that one program holds: 32 float32 registers a thread of 512.
ON_CHIP = 16384
MAX_PARTS = 256
VECTORS = ("dweight", "dbias")
COMBINED = 65536  # padded statistics of parts that one program puts together

Constants = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Tile:
    """Tiles of ``pos`` positions and ``ch`` channels, ``part`` positions to a program."""

    pos: int
    ch: int
    part: int
    warps: int = 4
    stages: int = 1


class _Sizes(Images):
    @property
    def itemsize(self) -> int:
        return max(ITEMSIZE[d] for n, d in self.problem.dtypes if n in ("x", "dy"))

    def parts(self, tile: Tile) -> int:
        return -(-self.space // tile.part)


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``.

    Raises:
      Unsupported: another stage, nothing to do, an example too large, or more channels to a group than a program combines.
    """
    s = _check(problem)
    if problem.stage == "groupnorm_bwd":
        return _backward(s, _tile(s))
    if (chip := _on_chip(s)) is not None:
        return (_forward(s, chip),)
    return _forward_in_parts(s, _tile(s))


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Plans worth timing against :func:`plan`, the plan itself first; the same stage in other orders of the sums."""
    s = _check(problem)
    forward = problem.stage == "groupnorm_fwd"
    found = [plan(problem), *(_forward_in_parts(s, t) if forward else _backward(s, t) for t in _tiles(s))]
    if forward and (chip := _on_chip(s, most=4 * ON_CHIP)) is not None:
        warps = [w for w in (4, 8, 16, 32) if chip.pos * chip.ch <= 2048 * w]
        found += [(_forward(s, dataclasses.replace(chip, warps=w)),) for w in warps]
    return list(dict.fromkeys(found))


def _check(problem: Problem) -> _Sizes:
    if problem.stage not in ("groupnorm_fwd", "groupnorm_bwd"):
        raise Unsupported(f"no Triton kernel for the stage {problem.stage}")
    if problem.rows < 1 or 0 in problem.shape("x"):
        raise Unsupported("nothing to launch a kernel for")
    s = _Sizes.of(problem)
    if s.space * s.channels >= MAX_ELEMENTS:
        raise Unsupported(f"an example of {s.space * s.channels} elements; the kernels count up to {MAX_ELEMENTS}")
    if next_power_of_2(s.group) * next_power_of_2(s.parts(_tile(s))) > COMBINED:
        raise Unsupported(f"groups of {s.group} channels; a program puts {COMBINED} statistics together")
    return s


def _on_chip(s: _Sizes, most: int = ON_CHIP) -> Tile | None:
    pos, ch = next_power_of_2(s.space), next_power_of_2(s.group)
    if pos * ch > most:
        return None
    return Tile(pos, ch, pos, max(1, min(512, pos * ch // 16) // wave_size(s.problem.target)))


def _tile(s: _Sizes) -> Tile:
    """Tiles of 8 KB, 64 bytes a thread of 128: rows of 128 bytes channels last, as long as the positions allow channels first.
    At most 64 parts, so that their statistics stay few, but not more than 512 KB of 64 channels to a program."""
    elements = 16384 // s.itemsize // 2
    if s.last:
        ch = 128 // s.itemsize
        pos = min(elements // ch, next_power_of_2(s.space))
    else:
        pos = min(elements, next_power_of_2(s.space))
        ch = max(1, elements // pos)
    parts = min(64, -(-s.space // pos))
    parts = min(MAX_PARTS, max(parts, s.space * ch * s.itemsize >> 19))
    while parts > 1 and next_power_of_2(s.group) * next_power_of_2(parts) > COMBINED:
        parts //= 2
    part = pos * -(-s.space // (pos * parts))
    return Tile(pos, ch, part, 128 // wave_size(s.problem.target), 3 if part > pos else 1)


def _tiles(s: _Sizes) -> Iterator[Tile]:
    base = _tile(s)
    for factor in (1, 2, 4):
        for times in (0.5, 1, 2):
            for warps in (2, 4, 8):
                pos = base.pos * factor
                part = pos * max(1, round(base.part * times / pos))
                tile = Tile(pos, base.ch, part, warps, 3 if part > pos else 1)
                if pos * base.ch <= 2048 * warps and s.parts(tile) <= MAX_PARTS and pos < 2 * s.space:
                    yield tile


def _grid(programs: int) -> tuple[int, int, int]:
    return min(programs, GRID_COLUMNS), -(-programs // GRID_COLUMNS), 1


def _vectors(s: _Sizes) -> Constants:
    p = s.problem
    return (("SILU", bool(p.option("silu"))), ("HAS_WEIGHT", p.has("weight")), ("HAS_BIAS", p.has("bias")))


def _shape(s: _Sizes) -> Constants:
    return ("S", s.space), ("C", s.channels), ("LAST", s.last)


def _walk(s: _Sizes, t: Tile) -> Constants:
    """How programs walk over their parts."""
    return (("PARTS", s.parts(t)), ("PART", t.part), ("POS", t.pos), ("CH", t.ch), ("STAGES", t.stages))


def _programs(s: _Sizes, t: Tile) -> tuple[int, int, int]:
    return _grid(s.batch * s.parts(t) * -(-s.channels // t.ch))


def _forward(s: _Sizes, t: Tile) -> Launch:
    p = s.problem
    return Launch(
        kernel="groupnorm:groupnorm_fwd",
        inputs=("x", "weight", "bias"),
        outputs=("y", "stats"),
        grid=_grid(s.batch * s.channels // s.group),
        constants=(
            *_shape(s),
            *_vectors(s),
            ("CG", s.group),
            ("EPS", _eps(p)),
            ("HAS_STATS", p.has("stats")),
            ("POS", t.pos),
            ("CH", t.ch),
        ),
        num_warps=t.warps,
    )


def _eps(p: Problem) -> float:
    return float(p.option("eps"))  # type: ignore[arg-type]


def _combine(s: _Sizes, t: Tile) -> tuple[Constants, int]:
    """(shape of the tile of all parts of a group, warps)."""
    rows, ch = next_power_of_2(s.parts(t)), next_power_of_2(s.group)
    threads = min(1024, max(wave_size(s.problem.target), rows * ch // 8))
    constants = (("PARTS", s.parts(t)), ("ROWS", rows), ("CH", ch))
    return (("S", s.space), ("C", s.channels), ("CG", s.group), *constants), threads // wave_size(s.problem.target)


def _forward_in_parts(s: _Sizes, t: Tile) -> tuple[Launch, ...]:
    p, parts = s.problem, s.parts(t)
    combine, warps = _combine(s, t)
    # said by the launch that reads it, too: it is scratch of another dtype than the first input
    stats = () if p.has("stats") else (("stats", (s.batch, 3, s.channels), "float32"),)
    return (
        Launch(
            kernel="groupnorm:groupnorm_partials",
            inputs=("x",),
            outputs=("partials",),
            grid=_programs(s, t),
            constants=(*_shape(s), *_walk(s, t)),
            num_warps=t.warps,
            temps=(("partials", (s.batch, parts, 3, s.channels), "float32"),),
        ),
        Launch(
            kernel="groupnorm:groupnorm_combine",
            inputs=("partials",),
            outputs=("stats",),
            grid=_grid(s.batch * s.channels // s.group),
            constants=(*combine, ("EPS", _eps(p)), ("PART", t.part)),
            num_warps=warps,
            temps=stats,
        ),
        Launch(
            kernel="groupnorm:groupnorm_apply",
            inputs=("x", "weight", "bias", "stats"),
            outputs=("y",),
            grid=_programs(s, t),
            constants=(*_shape(s), *_vectors(s), *_walk(s, t)),
            num_warps=t.warps,
            temps=stats,
        ),
    )


def _backward(s: _Sizes, t: Tile) -> tuple[Launch, ...]:
    p, parts = s.problem, s.parts(t)
    combine, warps = _combine(s, t)
    walk = (*_shape(s), *_vectors(s), *_walk(s, t))
    means = (("means", (s.batch, 2, s.channels), "float32"),)
    launches = (
        Launch(
            kernel="groupnorm:groupnorm_bwd_sums",
            inputs=("x", "dy", "weight", "bias", "stats"),
            outputs=("partials",),
            grid=_programs(s, t),
            constants=walk,
            num_warps=t.warps,
            temps=(("partials", (s.batch, parts, 2, s.channels), "float32"),),
        ),
        Launch(
            kernel="groupnorm:groupnorm_bwd_combine",
            inputs=("partials", "weight"),
            outputs=("means",),
            grid=_grid(s.batch * s.channels // s.group),
            constants=(*combine, ("HAS_WEIGHT", p.has("weight"))),
            num_warps=warps,
            temps=means,
        ),
        Launch(
            kernel="groupnorm:groupnorm_bwd_dx",
            inputs=("x", "dy", "weight", "bias", "stats", "means"),
            outputs=("dx",),
            grid=_programs(s, t),
            constants=walk,
            num_warps=t.warps,
            temps=means,  # said here, too: scratch of another dtype than the first input
        ),
    )
    return (*launches, _reduce(s, s.batch * parts)) if any(map(p.has, VECTORS)) else launches


def _reduce(s: _Sizes, rows: int) -> Launch:
    """dweight and dbias: the column sums of all parts."""
    p, each, block = s.problem, min(max(next_power_of_2(rows), 16), 512), 16
    return Launch(
        kernel="groupnorm:groupnorm_bwd_reduce",
        inputs=("partials",),
        scalars=(("PROGRAMS", "i32", rows),),
        outputs=VECTORS,
        grid=(-(-s.channels // block), 2, 1),
        constants=(
            ("C", s.channels),
            ("HAS_DWEIGHT", p.has("dweight")),
            ("HAS_DBIAS", p.has("dbias")),
            ("ROWS", each),
            ("BLOCK", block),
        ),
        num_warps=min(256, max(64, each * block // 16)) // wave_size(s.problem.target),
    )
