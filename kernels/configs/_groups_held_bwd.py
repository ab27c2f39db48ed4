"""GroupNorm backward, channels last, in one launch by teams of blocks all over the device that hold parts of x and dy
(``groups_bwd_held.h``): when, and who holds what. As ``_groups_held`` for the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, compute_units, shared_memory
from ._groups import Cut, Lines, Sizes, has_vectors, map_macros, part_count, vector_types
from ._groups_held import BUSY, RESERVED, SOURCE, TARGETS, team_count, whole
from ._hip import MAX_THREADS, _grid, _itemsize, _registers, _type

FEWEST = 8192
"""Pairs of a unit at least, 256 KB: with less the way over the device is longer than what it saves."""
AGAIN = 0.5
"""Of the pairs at most that are fetched again."""
AT_ONCE, DEPTH = 2, 4
"""HeldPairs::AT_ONCE, HeldPairs::DEPTH"""


@dataclass(frozen=True)
class Held:
    """``each`` parts to a block, of whose pairs of chunks of x and dy a thread has ``slots`` in shared memory and ``registers`` in
    registers."""

    cut: Cut
    each: int
    slots: int
    registers: int


def choose(s: Sizes, order: Cut | Lines) -> Held | None:
    """How the images are held, or None: they are too small or too large for that, or their parts are ragged. ``order``: the cut.

    The widest tile for the 640 threads of a unit; half of it, for two blocks that wait at different times, where that is lines of
    128 bytes.

    *H200*, this and two launches: 2x128x128x512 37.4 us and 43.6, 2x128x128x320 26.9 and 33.0 (28.7 in tiles of 80 channels),
    1x256x256x256 36.4 and 45.0. With SiLU 2x128x128x512 44.6 and 48.2. Where more than half is fetched
    again: 4x128x128x320 62.6 and 61.5, 2x256x256x256 81.9 and 86.2, 8x64x64x640 86.9 and 60.3; a small image, 2x64x64x320, 10.8 and
    11.1, with SiLU 12.5 and 12.1."""
    p = s.problem
    images = ("x", "dy", "dx")
    if p.target not in TARGETS or s.v != s.wide or any(_itemsize(p, n) != 2 for n in images):
        return None
    if isinstance(order, Lines):  # channels first
        return None
    order = replace(order, k=1)
    if not whole(s, order) or s.space < 4096:
        return None
    most = 640
    tiles = [t for t in range(s.narrowest, s.channels + 1, s.narrowest) if s.channels % t == 0]
    tiles = [t for t in tiles if (n := _threads(s, order, t)) % 32 == 0 and n <= most]
    if not tiles:
        return None
    tile = max(tiles)
    if tile // 2 in tiles and tile % 128 == 0:  # half of its channels, two bytes each
        tile //= 2
    return held(s, order, tile, most // _threads(s, order, tile))


def _threads(s: Sizes, order: Cut, tile: int) -> int:
    return order.q * (tile // s.v)


def held(s: Sizes, order: Cut, tile: int, blocks: int, registers: int | None = None) -> Held | None:
    """By so many blocks to a unit; ``registers``: other than those that a thread has to spare."""
    cut = replace(order, k=1, tile=tile, min_blocks=blocks)
    threads = map_macros(s, cut)[1]
    parts, teams = part_count(s, cut), team_count(s, cut)
    room = blocks * compute_units(s.problem.target)
    each = next((n for n in range(1, parts + 1) if parts % n == 0 and teams * (parts // n) <= room), 0)
    if not each or each == parts or teams * (parts // each) < BUSY * room:
        return None
    h = Held(cut, each, 0, 0)
    pairs = pair_count(h)
    free = (shared_memory(s.problem.target) + RESERVED) // blocks - RESERVED - shared_bytes(s, h)
    slots = min(pairs, free // (32 * threads))
    if pairs * threads * blocks < FEWEST or cut.part // cut.q % AT_ONCE or slots < 2 * DEPTH:
        return None
    if registers is None:
        registers = (_registers(threads, blocks) - (96 if s.problem.option("silu") else 64)) // 8
    registers = max(0, min(registers, pairs - slots, slots - DEPTH))
    spare = (slots + registers) % AT_ONCE
    slots, registers = (slots, registers - spare) if registers >= spare else (slots - spare, registers)
    again = pairs - slots - registers
    return replace(h, slots=slots, registers=registers) if again <= AGAIN * pairs else None


def candidates(s: Sizes, order: Cut | Lines) -> Iterator[Held]:
    """Others near the choice, for a sweep."""
    if isinstance(order, Lines) or (base := choose(s, order)) is None:
        return
    tile, blocks = base.cut.tile, base.cut.min_blocks
    for registers in (base.registers - 4, base.registers - 2, base.registers + 2):
        if registers >= 0 and (h := held(s, order, tile, blocks, registers)):
            yield h
    for other in (tile // 2, tile * 2):
        if other % s.narrowest == 0 and s.channels % other == 0 and order.q * other // s.v <= MAX_THREADS:
            for n in {1, blocks * tile // other} - {0}:
                if h := held(s, order, other, n):
                    yield h


def pair_count(h: Held) -> int:
    """HeldPairs::PAIRS"""
    return h.each * h.cut.part // h.cut.q


def shared_bytes(s: Sizes, h: Held) -> int:
    c, threads = h.cut, map_macros(s, h.cut)[1]
    groups = c.tile // s.group
    sums = 2 * c.q * c.tile + 2 * c.tile + 2 * groups
    return h.slots * threads * 32 + 4 * (sums + 2 * h.each * groups + 2 * groups)


def word_count(s: Sizes, h: Held) -> int:
    """Mail::WORDS of all teams, and those of ChannelMail."""
    groups, parts = h.cut.tile // s.group, part_count(s, h.cut)
    blocks, every = parts // h.each, groups * parts
    means = team_count(s, h.cut) * (blocks * every if every <= 512 else every + blocks * groups)
    return means + (s.channels * s.batch * parts if has_vectors(s) else 0)


def launches(s: Sizes, h: Held, apart: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """``apart``: what stands in."""
    p, (shape, threads) = s.problem, map_macros(s, h.cut)
    blocks = team_count(s, h.cut) * (part_count(s, h.cut) // h.each)
    held = Launch(
        kernel=f"{SOURCE}:groupnorm_bwd_held",
        inputs=("x", "dy", "weight", "bias", "stats"),
        outputs=("dx", "dweight", "dbias", "words"),
        grid=_grid(blocks),
        constants=(
            *shape,
            *vector_types(s),
            ("JN_DY", _type(p, "dy")),
            *((f"JN_{n.upper()}", _type(p, n)) for n in ("dx", "dweight", "dbias")),
            ("JN_HAS_PARTIALS", has_vectors(s)),
            ("JN_EACH", h.each),
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
