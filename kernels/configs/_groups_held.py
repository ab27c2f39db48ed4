"""GroupNorm in one launch by teams of blocks all over the device that hold parts of groups (``groups_held.h``): when, and who holds
what.

The order of the sums is that of the launches that stand in where a device has no room for all blocks at once, and of those for
fewer or more examples: whether teams hold the image looks at the batch, the cut does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, compute_units, shared_memory
from ._groups import Cut, Sizes, map_macros, part_count, sum_bytes, vector_types
from ._hip import _grid, _itemsize, _registers, _type

SOURCE = "groupnorm.hip"
TARGETS = ("sm_90",)
"""Where it was measured."""
RESERVED = 1 << 10
"""Shared memory that a block takes besides its own."""
THREADS = 640
"""Of a unit at most: 96 registers to each, half of them for what is held."""
AGAIN = 0.4
"""Of the chunks at most that are fetched again."""
FEWEST = 16
"""Chunks of a thread: with less the way over the device is longer than what it saves."""
BUSY = 0.85
"""Of the blocks that there is room for at least."""


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
    """How the image is held, or None: it is too small or too large for that, or its parts are ragged. ``order``: the cut.

    *H200*, this and clusters or two launches. Channels last: 16x64x64x320 25.9 us and 28.2, with SiLU 29.6 and 33.9; 2x128x128x320
    14.4 and 19.6 (15.4 and 21.7); 2x128x128x512 20.3 and 23.3 (23.0 and 26.1); 2x256x256x256 40.8 and 53.0 (45.0 and 55.2);
    1x512x512x128 41.4 and 56.5 (46.9 and 57.6). Channels first, whose small groups clusters take in turns without a wait for the
    whole device: 1x512x512x128 39.6 and 45.8 (44.5 and 50.6), 2x256x256x256 39.7 and 40.0 (44.5 and 43.7), 4x128x128x320 25.6 and
    24.2. Two teams to a block: 16x64x64x320 25.9 us, 27.9 with one; with SiLU 30.6 and 29.5; 2x256x256x256 44.6 and 40.8;
    4x128x128x320, where answers come by way of another block, 28.3 and 27.6."""
    p = s.problem
    if p.target not in TARGETS or s.v != s.wide or _itemsize(p, "x") != 2 or _itemsize(p, "y") != 2:
        return None
    if not whole(s, order) or s.space < 4096:  # smaller ones fit in clusters or blocks
        return None
    if s.last:
        tiles = [t for t in range(s.narrowest, s.channels + 1, s.narrowest) if s.channels % t == 0]
        tiles = [t for t in tiles if order.q * (t // s.v) <= THREADS and order.q * (t // s.v) % 32 == 0]
        if not tiles:
            return None
        order = replace(order, tile=max(tiles))
    elif s.chunks < (131072 if p.option("silu") else 65536):
        return None
    threads = map_macros(s, order)[1]
    found = [h for n in (THREADS, 512) if (h := held(s, order, max(1, n // threads)))]
    if found and s.last and not p.option("silu"):
        two = held(s, order, found[0].cut.min_blocks, 2)
        if two and two.each == 1 and chunk_count(two) == two.slots + two.registers and direct(s, two):
            return two
    return found[0] if found else None


def lanes(s: Sizes) -> int:
    """Channels last, beyond 64x64 and up to 128x128 positions, groups that straddle chunks: threads to a column, few, so that a
    block has whole rows; 0: as ever.

    *H200*, 4x128x128x320: 28.2 us with 16, two teams to a block, 28.6 with 32, with SiLU 29.2 and 30.4."""
    p = s.problem
    narrow = p.target in TARGETS and s.v == s.wide and _itemsize(p, "x") == 2 and _itemsize(p, "y") == 2
    return 16 if narrow and s.last and 4096 < s.space <= 16384 and 2 < s.columns <= 5 else 0


def held(s: Sizes, order: Cut, blocks: int, waves: int = 1) -> Held | None:
    """By so many blocks to a unit, each with parts of so many teams."""
    threads, most = map_macros(s, order)[1], _registers(map_macros(s, order)[1], blocks)
    if (s.batch if s.last else s.batch * s.groups) % waves:
        return None
    parts, teams = part_count(s, order), team_count(s, order) // waves
    room = blocks * compute_units(s.problem.target)
    each = next((n for n in range(1, parts + 1) if parts % n == 0 and teams * (parts // n) <= room), 0)
    if not each or each == parts or teams * (parts // each) < BUSY * room:
        return None
    h = Held(replace(order, min_blocks=blocks), each, waves, 0, 0)
    chunks = chunk_count(h)
    free = (shared_memory(s.problem.target) + RESERVED) // blocks - RESERVED - shared_bytes(s, h)
    slots = min(chunks, free // (16 * threads))
    registers = min(slots, chunks - slots, (most - 48) // 4)
    if slots + registers < chunks:  # what is fetched again needs some as well
        registers = min(registers, (most - (72 if s.problem.option("silu") else 68)) // 4)
    again = chunks - slots - registers
    if chunks < FEWEST or again > AGAIN * chunks or again * waves > chunks or 0 < again < 4:
        return None
    return replace(h, slots=slots, registers=registers)


def chunk_count(h: Held) -> int:
    """HeldParts::CHUNKS"""
    return h.waves * h.each * h.cut.part // h.cut.q


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
                if h := held(
                    s, replace(base.cut, tile=tile), max(1, base.cut.min_blocks * base.cut.tile // tile), base.waves
                ):
                    yield h
    for waves in (1, 2):
        if waves != base.waves and (h := held(s, base.cut, base.cut.min_blocks, waves)):
            yield h


def shared_bytes(s: Sizes, h: Held) -> int:
    threads = map_macros(s, h.cut)[1]
    each = (8 * h.each + 12 * h.waves) * groups_of(s, h)
    return h.slots * threads * 16 + sum_bytes(s, h.cut, threads, 2) + each


def groups_of(s: Sizes, h: Held) -> int:
    """Map::GROUPS"""
    return h.cut.tile // s.group if s.last else 1


def direct(s: Sizes, h: Held) -> bool:
    """Mail::DIRECT: the parts' words go to every block of a team, which needs no other's answer."""
    return groups_of(s, h) * part_count(s, h.cut) <= 512


def word_count(s: Sizes, h: Held) -> int:
    """Mail::WORDS of all teams"""
    groups, parts = groups_of(s, h), part_count(s, h.cut)
    blocks, every = parts // h.each, groups * parts
    return team_count(s, h.cut) * (blocks * every if direct(s, h) else every + 2 * blocks * groups)


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
