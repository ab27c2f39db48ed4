"""GroupNorm in one launch by teams of blocks all over the device that hold parts of groups (``groups_held.h``): when, and who holds what.

The order of the sums is that of the launches that stand in where a device has no room for all blocks at once, and of those for fewer
or more examples: whether a team holds the image looks at the batch, the cut does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, compute_units, shared_memory
from ._groups import Cut, Sizes, map_macros, part_count, sum_bytes, vector_types
from ._hip import _grid, _itemsize, _registers, _round_up, _type

SOURCE = "groupnorm.hip"
TARGETS = ("sm_90",)
"""Where it was measured."""
RESERVED = 1 << 10
"""Shared memory that a block takes besides its own."""
THREADS = 640
"""Of a unit at most: 96 registers to each, half of them for what is held."""
AGAIN = 0.4
"""Of the chunks at most that are fetched again."""


@dataclass(frozen=True)
class Held:
    """``each`` parts of ``waves`` teams to a block, of whose chunks a thread has ``slots`` in shared memory and ``registers`` in
    registers."""

    cut: Cut
    each: int
    waves: int
    slots: int
    registers: int


def choose(s: Sizes, order: Cut) -> Held | None:
    """How the image is held, or None: it is too small or too large for that, or its parts are ragged. ``order``: the cut."""
    p = s.problem
    if p.target not in TARGETS or s.v != s.wide or _itemsize(p, "x") != 2 or _itemsize(p, "y") != 2:
        return None
    if not whole(s, order):
        return None
    if s.last:
        tiles = [t for t in range(s.narrowest, s.channels + 1, s.narrowest) if s.channels % t == 0]
        tiles = [t for t in tiles if order.q * (t // s.v) <= THREADS and order.q * (t // s.v) % 32 == 0]
        if not tiles:
            return None
        order = replace(order, tile=max(tiles))
    threads = map_macros(s, order)[1]
    found = (_held(s, order, max(1, n // threads), waves) for waves in (2, 1) for n in (THREADS, 512))
    return next((h for h in found if h), None)


def _held(s: Sizes, order: Cut, blocks: int, waves: int) -> Held | None:
    """By so many blocks to a unit, each with parts of so many teams."""
    threads = map_macros(s, order)[1]
    if (s.batch if s.last else s.batch * s.groups) % waves:
        return None
    parts, teams = part_count(s, order), team_count(s, order) // waves
    room = blocks * compute_units(s.problem.target)
    each = next((n for n in range(1, parts + 1) if parts % n == 0 and teams * (parts // n) <= room), 0)
    if not each or teams * (parts // each) < 0.85 * room:
        return None
    h = Held(replace(order, min_blocks=blocks), each, waves, 0, 0)
    chunks = waves * each * order.part // order.q
    free = (shared_memory(s.problem.target) + RESERVED) // blocks - RESERVED - shared_bytes(s, h)
    slots = min(chunks, free // (16 * threads))
    most = _registers(threads, blocks)
    registers = min(slots, chunks - slots, (most - 48) // 4)
    if slots + registers < chunks:  # what is fetched again needs some as well
        registers = min(registers, (most - 68) // 4)
    again = chunks - slots - registers
    if chunks < 16 or again > AGAIN * chunks or again * waves > chunks:
        return None
    return replace(h, slots=slots, registers=registers)


def whole(s: Sizes, c: Cut) -> bool:
    """Map::WHOLE"""
    positions = s.space if s.last else s.chunks
    return positions % c.part == 0 and c.part % (c.q * c.k) == 0


def team_count(s: Sizes, c: Cut) -> int:
    return s.batch * (s.channels // c.tile if s.last else s.groups)


def candidates(s: Sizes, order: Cut) -> Iterator[Held]:
    """Others near the choice, for a sweep."""
    if (base := choose(s, order)) is None:
        return
    for n in (-4, -2, 2, 4):
        if base.slots > 4 and 0 <= base.registers + n and base.slots - n > 0:
            yield replace(base, slots=base.slots - n, registers=base.registers + n)
    if s.last:
        for tile in (base.cut.tile // 2, base.cut.tile * 2):
            if tile and tile % s.narrowest == 0 and s.channels % tile == 0 and base.cut.q * tile // s.v <= 1024:
                if h := _held(s, replace(base.cut, tile=tile), max(1, base.cut.min_blocks * base.cut.tile // tile), base.waves):
                    yield h
    for waves in (1, 2):
        if waves != base.waves and (h := _held(s, base.cut, base.cut.min_blocks, waves)):
            yield h


def shared_bytes(s: Sizes, h: Held) -> int:
    threads = map_macros(s, h.cut)[1]
    groups = h.cut.tile // s.group if s.last else 1
    return h.slots * threads * 16 + sum_bytes(s, h.cut, threads, 2) + (8 * h.each + 12 * h.waves) * groups


def word_count(s: Sizes, h: Held) -> int:
    """Mail::WORDS of all teams"""
    groups, parts = (h.cut.tile // s.group if s.last else 1), part_count(s, h.cut)
    blocks, every = parts // h.each, groups * parts
    return team_count(s, h.cut) * (blocks * every if every <= 512 else every + 2 * blocks * groups)


def launches(s: Sizes, h: Held, apart: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """``apart``: what stands in."""
    p, (shape, threads) = s.problem, map_macros(s, h.cut)
    team = part_count(s, h.cut) // h.each
    blocks = team_count(s, h.cut) // h.waves * team
    held = Launch(
        kernel=f"{SOURCE}:groupnorm_held",
        inputs=("x", "weight", "bias"),
        outputs=("y", "stats", "words"),
        grid=_grid(blocks),
        constants=(
            *shape,
            *vector_types(s),
            ("JN_Y", _type(p, "y")),
            ("JN_EPS", float(p.option("eps"))),  # type: ignore[arg-type]
            ("JN_HAS_STATS", p.has("stats")),
            ("JN_EACH", h.each),
            ("JN_WAVES", h.waves),
            ("JN_SLOTS", h.slots),
            ("JN_REGISTERS", h.registers),
        ),
        scalars=(("batches", "i64", s.batch),),
        threads=threads,
        shared=shared_bytes(s, h),
        temps=(("words", (word_count(s, h), 4), "int32"),),
        meeting=blocks,
    )
    return held, *(replace(each, meeting=-blocks, overlaps=False) for each in apart)
