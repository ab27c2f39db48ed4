"""Launches of the rotary stages through ``csrc/kernels/rope.hip``: one for up to eight arrays.

There is no sum, so a plan may look at the number of tokens. The choices follow from bytes on their way and lanes; those for AMD
targets were compiled and inspected, not run on AMD silicon.
"""

from __future__ import annotations

from . import Launch, Problem, Unsupported, wave_size
from ._heads import Part, parts
from ._heads_hip import (
    Deal,
    blocks,
    check,
    constants,
    forward,
    forward_candidates,
    position_constants,
    position_scalars,
    table_type,
)
from ._hip import _grid, _nvidia

SOURCE, MOST = "rope.hip", 8
STAGES = ("rope_fwd", "rope_bwd")


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``: one for every eight arrays.

    Raises:
      Unsupported: another stage, no heads, or more than the kernels count.
    """
    return _launches(problem, None)


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings of the same computation, the plan first; all give the same bits."""
    deals = [d for d in forward_candidates(problem) if d.threads % wave_size(problem.target) == 0]
    return list(dict.fromkeys([plan(problem), *(_launches(problem, d) for d in deals)]))


def _launches(problem: Problem, deal: Deal | None) -> tuple[Launch, ...]:
    if problem.stage not in STAGES:
        raise Unsupported(f"{problem.stage} is no stage of {SOURCE}.")
    found = parts(problem)
    check(problem, found)
    return tuple(_launch(problem, found[i : i + MOST], deal) for i in range(0, len(found), MOST))


def _deal(problem: Problem, found: list[Part]) -> Deal:
    """*H200*, 8192 tokens of 64 + 8 heads of 128: two heads a group, blocks of 64 threads 1.041 of a copy; four, 128 1.049."""
    if not _nvidia(problem):
        return forward(problem, found)
    deal = forward(problem, found, 2)
    return Deal(64, 2) if deal.unroll == 2 else deal


def _launch(problem: Problem, found: list[Part], deal: Deal | None) -> Launch:
    deal = deal or _deal(problem, found)
    names = [p.name for p in found] + [f"absent{i}" for i in range(len(found), MOST)]
    return Launch(
        kernel=f"{SOURCE}:rope",
        inputs=(*names, "positions", "cos_sin"),
        outputs=tuple(f"y{n[1:]}" for n in names),
        grid=_grid(sum(blocks(problem, p, deal) for p in found)),
        constants=(
            *constants(problem, found, deal),
            *position_constants(problem),
            ("JN_R", found[0].rotary),
            ("JN_TABLE", table_type(problem)),
            ("JN_INVERSE", bool(problem.option("inverse"))),
        ),
        scalars=position_scalars(problem, found[0].tokens),
        threads=deal.threads,
    )
