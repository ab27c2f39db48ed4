"""Launches of the rotary stages through Triton: one for up to four arrays.

Tiles follow from bytes on their way and lanes; those of AMD targets were compiled and inspected, not run on AMD silicon.
"""

from __future__ import annotations

from . import Launch, Problem, Unsupported
from ._heads import Part, gptj, parts
from ._heads_triton import Tile, check, constants, grid, pairs, position_constants, position_scalars, tile, tiles

MOST = 4
STAGES = ("rope_fwd", "rope_bwd")


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``: one for every four arrays.

    Raises:
      Unsupported: another stage, no heads, or longer heads than the kernels take.
    """
    return _launches(problem, None)


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tiles, the plan first; all give the same bits."""
    return list(dict.fromkeys([plan(problem), *(_launches(problem, t) for t in tiles(problem))]))


def _launches(problem: Problem, chosen: Tile | None) -> tuple[Launch, ...]:
    if problem.stage not in STAGES:
        raise Unsupported(f"no Triton kernel for the stage {problem.stage}")
    found = parts(problem)
    check(problem)
    return tuple(_launch(problem, found[i : i + MOST], chosen) for i in range(0, len(found), MOST))


def _launch(problem: Problem, found: list[Part], chosen: Tile | None) -> Launch:
    chosen = chosen or tile(problem, found, 64)
    names = [p.name for p in found] + [f"absent{i}" for i in range(len(found), MOST)]
    programs = [chosen.programs(p) for p in found] + [1] * (MOST - len(found))
    couple, rest = pairs(problem, found[0].rotary)
    return Launch(
        kernel="rope:rope",
        inputs=(*names, "positions", "cos_sin"),
        scalars=(
            *position_scalars(problem, found[0].tokens),
            *((f"blocks{i}", "i32", n) for i, n in enumerate(programs[:3])),
        ),
        outputs=tuple(f"y{n[1:]}" for n in names),
        grid=grid(sum(programs[: len(found)])),
        constants=(
            *constants(problem, found, chosen, MOST),
            ("D", problem.features),
            ("R", found[0].rotary),
            ("PAIRS", couple),
            ("REST", rest),
            ("GPTJ", gptj(problem)),
            ("INVERSE", bool(problem.option("inverse"))),
            *position_constants(problem),
        ),
        num_warps=chosen.warps,
    )
