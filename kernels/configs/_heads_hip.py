"""What the plans of ``rope.hip`` and ``qk.hip`` share: the macros of parts, and how many heads a group takes at once."""

from __future__ import annotations

from dataclasses import dataclass

from . import ITEMSIZE, Problem, Unsupported, compute_units, wave_size
from ._heads import Part, gptj, lane_elements, lanes, shared_positions, unroll, vector
from ._hip import TYPES, Constants, _ceil, _nvidia, _type

THREADS = 128
MAX_LANE = 64  # elements of a head in a lane's registers


@dataclass(frozen=True)
class Deal:
    """``threads`` a block, at most ``unroll`` heads of a token a group (heads.h)."""

    threads: int = THREADS
    unroll: int = 1
    min_blocks: int = 1


def check(problem: Problem, found: list[Part]) -> None:
    for part in found:
        if lane_elements(problem, part) > MAX_LANE:
            raise Unsupported(
                f"D={problem.features} with rotary_dim={part.rotary}: more than {MAX_LANE} elements of a head a lane."
            )


def forward(problem: Problem, found: list[Part], most: int = 4) -> Deal:
    """Four heads a group where there are plenty: 128 bytes of bf16 on their way a thread, and one row of the table for four.

    Few tokens leave compute units idle then: as many groups as there are heads.
    """
    threads = sum(p.tokens * p.heads * lanes(problem, p) for p in found)
    while most > 1 and threads < most * compute_units(problem.target) * 1024:
        most //= 2
    return Deal(unroll=most)


def forward_candidates(problem: Problem) -> list[Deal]:
    return [Deal(t, u, b) for t in (64, 128, 256) for u in (1, 2, 4, 8) for b in ((1, 1024 // t) if u < 4 else (1,))]


def groups(problem: Problem, part: Part, deal: Deal) -> int:
    return deal.threads // lanes(problem, part)


def unrolled(problem: Problem, part: Part, deal: Deal) -> int:
    """No more than 64 elements on their way, so that they stay in registers."""
    return unroll(part.heads, max(1, min(deal.unroll, 128 // lane_elements(problem, part))))


def units(problem: Problem, part: Part, deal: Deal) -> int:
    """HeadDeal::units"""
    return part.tokens * _ceil(part.heads, unrolled(problem, part, deal))


def blocks(problem: Problem, part: Part, deal: Deal) -> int:
    """HeadDeal::blocks"""
    return _ceil(units(problem, part, deal), groups(problem, part, deal))


def constants(problem: Problem, found: list[Part], deal: Deal) -> Constants:
    """Macros of all parts."""
    if deal.threads % wave_size(problem.target):
        raise Unsupported(f"{deal.threads} threads are no whole waves.")
    out: list[tuple[str, object]] = [
        ("JN_D", problem.features),
        ("JN_GPTJ", gptj(problem)),
        ("JN_THREADS", deal.threads),
        ("JN_MIN_BLOCKS", deal.min_blocks if _nvidia(problem) else 1),
        ("JN_COUNT", len(found)),
    ]
    for i, part in enumerate(found):
        out += [
            (f"JN_X{i}", TYPES[part.dtype]),
            (f"JN_HEADS{i}", part.heads),
            (f"JN_V{i}", vector(problem, part)),
            (f"JN_LANES{i}", lanes(problem, part)),
            (f"JN_UNROLL{i}", unrolled(problem, part, deal)),
        ]
    return tuple(out)


def position_constants(problem: Problem) -> Constants:
    """Macros of the positions and of the sections of mrope."""
    sections = problem.option("sections")
    out: list[tuple[str, object]] = [
        ("JN_POSITION", {4: "I32", 8: "I64"}[ITEMSIZE[problem.dtype("positions")]]),
        ("JN_PERIOD", shared_positions(problem)),
        ("JN_MROPE", sections is not None),
    ]
    if sections is not None:
        out += [(f"JN_S{i}", s) for i, s in enumerate(sections)]
        out += [("JN_INTERLEAVED", bool(problem.option("interleaved")))]
    return tuple(out)


def position_scalars(problem: Problem, tokens: int) -> tuple[tuple[str, str, int], ...]:
    rows = problem.shape("cos_sin")[0]
    return (("tokens", "i32", tokens), ("count", "i32", problem.shape("positions")[-1]), ("rows", "i32", rows))


def table_type(problem: Problem, name: str = "cos_sin") -> str:
    return _type(problem, name)
