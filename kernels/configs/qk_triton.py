"""Launches of the q/k norm stages through Triton: all parts (q and k, of one stream or two) in one.

Forward, a program holds about 64 bytes a thread; backward, programs walk over the tiles and leave partial sums of the weight
gradients, which a second launch adds. Tiles follow from bytes on their way, registers and lanes; those of AMD targets were compiled
and inspected, not run on AMD silicon.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import Launch, Problem, compute_units, next_power_of_2, wave_size
from ._heads import ONE, TWO, Part, gptj, qk_parts, shares, two_stream, weights
from ._heads_triton import Tile, check, constants, grid, pairs, position_constants, position_scalars, tile, tiles

Constants = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Walk:
    """Backward: a tile, and how many programs a compute unit walk over them."""

    tile: Tile
    per_unit: int


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``: one forward, two backward where there is a weight.

    Raises:
      Unsupported: another stage, no heads, or longer heads than the kernels take.
    """
    found = _parts(problem)
    if problem.stage.endswith("_fwd"):
        return (_forward(problem, found, tile(problem, found, 64)),)
    return _backward(problem, found, Walk(tile(problem, found, 32), 4))


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tiles, the plan first; all give the same y and dx."""
    found = _parts(problem)
    if problem.stage.endswith("_fwd"):
        more = [(_forward(problem, found, t),) for t in tiles(problem)]
    else:
        more = [_backward(problem, found, Walk(t, n)) for t in tiles(problem) for n in (2, 3, 4, 6, 8)]
    return list(dict.fromkeys([plan(problem), *more]))


def _parts(problem: Problem) -> list[Part]:
    found = qk_parts(problem)
    check(problem)
    return found


def _inputs(problem: Problem, found: list[Part]) -> tuple[str, ...]:
    if two_stream(problem):
        return (*(p.name for p in found), *weights(problem, found), "cos_sin0", "cos_sin1")
    return ("x0", "x1", "w0", "w1", "positions", "cos_sin")


def _constants(problem: Problem, found: list[Part], chosen: Tile) -> Constants:
    two = two_stream(problem)
    count = 4 if two else 2
    names = weights(problem, found)
    out = [*constants(problem, found, chosen, count), ("D", problem.features), ("GPTJ", gptj(problem))]
    out += [(f"HAS_W{i}", i < len(names) and problem.has(names[i])) for i in range(count)]
    for i in (0, 1) if two else (0,):
        rotary = found[2 * i].rotary
        couple, rest = pairs(problem, rotary)
        suffix = str(i) if two else ""
        out += [(f"R{suffix}", rotary), (f"PAIRS{suffix}", couple), (f"REST{suffix}", rest)]
    if not two:
        out += position_constants(problem)
    out += [("EPS", float(problem.option("eps"))), ("WEIGHT_OFFSET", float(problem.option("weight_offset")))]
    return tuple(out)


def _scalars(problem: Problem, found: list[Part], blocks: list[int]) -> tuple[tuple[str, str, int], ...]:
    counts = tuple((f"blocks{i}", "i32", b) for i, b in enumerate(blocks))
    if not two_stream(problem):
        return (*position_scalars(problem, found[0].tokens), *counts)
    tokens = [problem.shape(n)[-3] for n in ("q0", "q1")]
    return (("batch", "i32", problem.rows), ("tokens0", "i32", tokens[0]), ("tokens1", "i32", tokens[1]), *counts)


def _forward(problem: Problem, found: list[Part], chosen: Tile) -> Launch:
    two = two_stream(problem)
    programs = [chosen.programs(p) for p in found]
    return Launch(
        kernel=f"qk:{TWO if two else ONE}",
        inputs=_inputs(problem, found),
        scalars=_scalars(problem, found, programs[: 3 if two else 1]),
        outputs=("q", "k") if two else ("y0", "y1"),
        grid=grid(sum(programs)),
        constants=_constants(problem, found, chosen),
        num_warps=chosen.warps,
    )


def _backward(problem: Problem, found: list[Part], walk: Walk) -> tuple[Launch, ...]:
    two, d = two_stream(problem), problem.features
    count = 4 if two else 2
    most = [walk.tile.programs(p) for p in found]
    each = shares(found, most, compute_units(problem.target) * walk.per_unit)
    padded = each + [1] * (count - len(each))
    present = [i for i, w in enumerate(weights(problem, found)) if problem.has(w)]
    first = Launch(
        kernel=f"qk:{TWO if two else ONE}_bwd",
        inputs=(*_inputs(problem, found), *(("dq", "dk") if two else ("dy0", "dy1"))),
        scalars=_scalars(problem, found, padded),
        outputs=(
            *(("dq0", "dk0", "dq1", "dk1") if two else ("dx0", "dx1")),
            *(f"partial{i}" for i in range(count)),
        ),
        grid=(sum(each), 1, 1),
        constants=_constants(problem, found, walk.tile),
        num_warps=walk.tile.warps,
        temps=tuple((f"partial{i}", (each[i], d), "float32") for i in present),
    )
    return (first, _reduce(problem, found, each)) if present else (first,)


def _reduce(problem: Problem, found: list[Part], each: list[int]) -> Launch:
    """Narrow column blocks give enough programs; all rows in a few reads hide the latency."""
    names = weights(problem, found)
    rows, block = min(max(next_power_of_2(max(each)), 16), 512), 16
    names += [f"absent{i}" for i in range(len(names), 4)]
    return Launch(
        kernel="qk:qk_norm_rope_bwd_reduce",
        inputs=tuple(f"partial{i}" for i in range(4)),
        scalars=tuple((f"blocks{i}", "i32", n) for i, n in enumerate(each + [1] * (4 - len(each)))),
        outputs=tuple(f"d{n}" for n in names),
        grid=(-(-problem.features // block), len(found), 1),
        constants=(
            *((f"HAS_W{i}", problem.has(n)) for i, n in enumerate(names)),
            ("D", problem.features),
            ("ROWS", rows),
            ("BLOCK", block),
        ),
        num_warps=min(256, max(64, rows * block // 16)) // wave_size(problem.target),
    )
