"""What the plans of the Triton kernels on heads share: tiles and their constexprs.

A tile is chosen from heads, D, dtypes and target, never from the number of tokens: one code object serves every number.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import ITEMSIZE, Problem, Unsupported, next_power_of_2, wave_size
from ._heads import Part, gptj, shared_positions

GRID_COLUMNS = 1 << 20  # as in kernels/_common.py:program_index
MAX_FEATURES = 1024


@dataclass(frozen=True)
class Tile:
    """About ``rows`` heads a program of ``warps`` waves."""

    rows: int
    warps: int = 4

    def of(self, part: Part) -> tuple[int, int]:
        """(tokens, heads) of a program: the heads of a token first."""
        heads = min(next_power_of_2(part.heads), self.rows)
        # no more than a sixth of the tile past the last head
        while heads > 1 and -(-part.heads // heads) * heads * 6 >= part.heads * 7:
            heads //= 2
        return self.rows // heads, heads

    def programs(self, part: Part) -> int:
        tokens, heads = self.of(part)
        return -(-part.tokens // tokens) * -(-part.heads // heads)


def check(problem: Problem) -> None:
    if problem.features > MAX_FEATURES:
        raise Unsupported(f"D={problem.features}; the kernels take heads of up to {MAX_FEATURES}.")


def pairs(problem: Problem, rotary: int) -> tuple[int, int]:
    """PAIRS and REST of kernels/_heads.py."""
    if gptj(problem):
        return next_power_of_2(problem.features // 2), 0
    rest = problem.features - rotary
    return next_power_of_2(rotary // 2), next_power_of_2(rest) if rest else 0


def tile(problem: Problem, found: list[Part], per_thread: int) -> Tile:
    """So many heads that a thread holds about ``per_thread`` bytes of an array: at least one for each group of lanes."""
    threads = 128
    size = max(ITEMSIZE[p.dtype] for p in found) * next_power_of_2(problem.features)
    least = threads * 16 // (size // 2) or 1  # one access a lane for each of the two halves of a head
    return Tile(max(1, min(64, max(least // 2, threads * per_thread // size))), threads // wave_size(problem.target))


def tiles(problem: Problem) -> list[Tile]:
    """For a sweep."""
    return [Tile(r, t // wave_size(problem.target)) for t in (64, 128, 256) for r in (4, 8, 16, 32, 64)]


def constants(problem: Problem, found: list[Part], chosen: Tile, count: int) -> tuple[tuple[str, object], ...]:
    """COUNT, and for each of ``count`` parts H, TOKENS and HEADS."""
    out: list[tuple[str, object]] = [("COUNT", len(found))]
    for i in range(count):
        part = found[min(i, len(found) - 1)]
        tokens, heads = chosen.of(part)
        out += [(f"H{i}", part.heads), (f"TOKENS{i}", tokens), (f"HEADS{i}", heads)]
    return tuple(out)


def position_constants(problem: Problem) -> tuple[tuple[str, object], ...]:
    sections = problem.option("sections")
    s0, s1, s2 = sections or (0, 0, 0)
    return (
        ("PERIOD", shared_positions(problem)),
        ("MROPE", sections is not None),
        ("S0", s0),
        ("S1", s1),
        ("S2", s2),
        ("INTERLEAVED", bool(problem.option("interleaved"))),
    )


def position_scalars(problem: Problem, tokens: int) -> tuple[tuple[str, str, int], ...]:
    rows = problem.shape("cos_sin")[0]
    return (("tokens", "i32", tokens), ("count", "i32", problem.shape("positions")[-1]), ("rows", "i32", rows))


def grid(programs: int) -> tuple[int, int, int]:
    return min(programs, GRID_COLUMNS), -(-programs // GRID_COLUMNS), 1
