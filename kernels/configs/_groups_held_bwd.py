"""GroupNorm backward, channels last, in one launch by teams of blocks all over the device that hold parts of x and dy
(``groups_bwd_held.h``): when, and who holds what. As ``_groups_held`` for the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, compute_units, shared_memory
from ._groups import Cut, Sizes, has_vectors, map_macros, part_count, vector_types
from ._groups_held import BUSY, RESERVED, SOURCE, TARGETS, team_count, whole
from ._hip import _grid, _itemsize, _registers, _type

AGAIN = 0.6
"""Of the places at most that are fetched again."""


@dataclass(frozen=True)
class Held:
    """``each`` parts to a block, of whose places in x and dy a thread has ``slots`` in shared memory and ``registers`` in
    registers."""

    cut: Cut
    each: int
    slots: int
    registers: int
    at_once: int = 2
    depth: int = 4


def choose(s: Sizes, order: Cut) -> Held | None:
    """How the images are held, or None: they are too small or too large for that, or their parts are ragged. ``order``: the cut."""
    p = s.problem
    images = ("x", "dy", "dx")
    if p.target not in TARGETS or not s.last or s.v != s.wide or any(_itemsize(p, n) != 2 for n in images):
        return None
    order = replace(order, k=1)
    if not whole(s, order) or s.space < 4096:
        return None
    return next((h for tile, blocks in tiles(s, order) if (h := held(s, order, tile, blocks))), None)


def tiles(s: Sizes, order: Cut) -> Iterator[tuple[int, int]]:
    """Tiles that divide the channels and blocks of them to a unit, of 512 threads at most (128 registers each)."""
    found = [t for t in range(s.narrowest, s.channels + 1, s.narrowest) if s.channels % t == 0]
    for tile in reversed(found):
        threads = order.q * (tile // s.v)
        if threads % 32 == 0 and threads <= 512:
            yield tile, 512 // threads


def held(s: Sizes, order: Cut, tile: int, blocks: int, registers: int | None = None, at_once: int = 2) -> Held | None:
    cut = replace(order, k=1, tile=tile, min_blocks=blocks)
    threads = map_macros(s, cut)[1]
    parts, teams = part_count(s, cut), team_count(s, cut)
    room = blocks * compute_units(s.problem.target)
    each = next((n for n in range(1, parts + 1) if parts % n == 0 and teams * (parts // n) <= room), 0)
    if not each or each == parts or teams * (parts // each) < BUSY * room:
        return None
    h = Held(cut, each, 0, 0, at_once, 2 * at_once)
    places = place_count(h)
    free = (shared_memory(s.problem.target) + RESERVED) // blocks - RESERVED - shared_bytes(s, h)
    slots = min(places, free // (32 * threads))
    if cut.part // cut.q % at_once or slots < 2 * h.depth:
        return None
    if registers is None:
        registers = (_registers(threads, blocks) - (80 if s.problem.option("silu") else 62)) // 8
    registers = max(0, min(registers, places - slots, slots - h.depth))
    spare = (slots + registers) % at_once
    slots, registers = (slots, registers - spare) if registers >= spare else (slots - spare + registers, 0)
    again = places - slots - registers
    return replace(h, slots=slots, registers=registers) if again <= AGAIN * places else None


def place_count(h: Held) -> int:
    """HeldParts::CHUNKS"""
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
            ("JN_AT_ONCE", h.at_once),
            ("JN_DEPTH", h.depth),
        ),
        scalars=(("batches", "i64", s.batch),),
        threads=threads,
        shared=shared_bytes(s, h),
        temps=(("words", (word_count(s, h), 4), "int32"),),
        meeting=blocks,
    )
    return held, *(replace(each, meeting=-blocks, overlaps=False) for each in apart)
