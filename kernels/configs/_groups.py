"""What the HIP kernels of GroupNorm work on: sizes of a problem, and how a group is cut among threads and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from . import ITEMSIZE, wave_size
from ._hip import Constants, _ceil, _itemsize, _round_up, _type
from ._images import Images

IMAGES = ("x", "dy", "y", "dx")


@dataclass(frozen=True)
class Cut:
    """Part of a group, and how threads share it. ``part``: positions (channels last) or chunks (channels first)."""

    part: int
    k: int
    """Chunks of a thread on their way at once."""
    q: int = 1
    """Channels last: threads that share a column of channels. Channels first: threads of a block."""
    tile: int = 0
    """Channels last: channels of a block."""
    min_blocks: int = 1


@dataclass(frozen=True)
class Lines:
    """Channels first, sums of channels: ``lanes`` threads to a part of ``part`` chunks, ``lines`` of them in a block."""

    part: int
    k: int
    lanes: int
    lines: int


class Sizes(Images):
    """A problem in the terms of the kernels."""

    @cached_property
    def wide(self) -> int:
        """Most elements of a chunk: 16 bytes of the narrowest image."""
        return 16 // min(ITEMSIZE[dtype] for name, dtype in self.problem.dtypes if name in IMAGES)

    @property
    def v(self) -> int:
        """Elements of a chunk: as ``wide`` as a row of channels, or the positions of a channel, allow."""
        return largest_power_of_2_in(self.channels if self.last else self.space, self.wide)

    @property
    def u(self) -> int:
        """Neighbouring channels that are in one group whatever the chunk."""
        return largest_power_of_2_in(self.group, self.wide)

    @property
    def columns(self) -> int:
        """Channels last: chunks of the narrowest tile of whole groups, the same for every v."""
        return self.group // self.u

    @property
    def narrowest(self) -> int:
        """Channels of that tile."""
        return self.columns * self.v

    @property
    def words(self) -> int:
        """Registers that a chunk takes while it waits."""
        return max(1, self.wide * sum(_itemsize(self.problem, n) for n in ("x", "dy")) // 4)

    @property
    def chunks(self) -> int:
        """Chunks of a group: of the narrowest tile, channels last."""
        return self.space * self.columns if self.last else self.group * self.space // self.v


def largest_power_of_2_in(n: int, most: int) -> int:
    p = 1
    while p * 2 <= most and n % (p * 2) == 0:
        p *= 2
    return p


def largest_factor(n: int, most: int) -> int:
    return max(f for f in range(1, most + 1) if n % f == 0)


def power_of_2_below(n: float) -> int:
    return 1 << (max(int(n), 1).bit_length() - 1)


def map_macros(s: Sizes, c: Cut) -> tuple[Constants, int]:
    """The macros of JN_MAP, and the threads of a block."""
    wave = wave_size(s.problem.target)
    threads = _round_up(c.q * (c.tile // s.v), wave) if s.last else c.q
    shape = (("JN_TILE", c.tile), ("JN_Q", c.q)) if s.last else ()
    common = (
        ("JN_LAST", s.last),
        ("JN_S", s.space),
        ("JN_C", s.channels),
        ("JN_CG", s.group),
        ("JN_V", s.v),
        ("JN_K", c.k),
        ("JN_PART", c.part),
        ("JN_THREADS", threads),
        ("JN_MIN_BLOCKS", c.min_blocks),
    )
    return (*common, *shape), threads


def part_count(s: Sizes, c: Cut) -> int:
    return _ceil(s.space if s.last else s.chunks, c.part)


def block_count(s: Sizes, c: Cut) -> int:
    """Map::blocks"""
    return s.batch * part_count(s, c) * (_ceil(s.channels, c.tile) if s.last else s.groups)


def sum_bytes(s: Sizes, c: Cut, threads: int, n: int) -> int:
    """Map::sum_floats"""
    if not s.last:
        return 4 * n * (threads // wave_size(s.problem.target))
    each, units, row = s.columns, s.v // s.u, c.tile // s.u
    by_column = c.q <= 32 and each <= 16
    width = row if by_column or row < 32 else row + (_round_up(each, units) - row % 32) % 32
    kept = width if by_column else c.tile // s.group
    return _round_up(n * (c.q * width + kept), 4) * 4


def vector_types(s: Sizes) -> Constants:
    p = s.problem
    return (
        ("JN_X", _type(p, "x")),
        ("JN_WEIGHT", _type(p, "weight")),
        ("JN_BIAS", _type(p, "bias")),
        ("JN_SILU", bool(p.option("silu"))),
    )


def has_vectors(s: Sizes) -> bool:
    return s.problem.has("dweight") or s.problem.has("dbias")


def add_partials(s: Sizes, threads: int, room: int) -> tuple[Constants, int, int]:
    """The blocks of dx's launch that add up dweight and dbias: their macros, number and shared memory. They are first, and few of
    them where there is ``room`` for some beside the others; the order of the sum depends neither on them nor on their threads.

    *H200*, channels last: 2x32x32x640 7.5 us with 40 of them, 9.0 with 8 that each add up five times; 2x16x16x1280 6.0 and 11.0."""
    n, slices = 2 * s.channels, 32
    v, columns = largest_power_of_2_in(s.channels, 4), min(8, power_of_2_below(threads / slices))
    adders = _ceil(n, columns * v) if has_vectors(s) else 0
    adders = min(adders, room) if adders <= 3 * room else adders
    macros = (("JN_ADDERS", adders), ("JN_ADD_V", v), ("JN_COLUMNS", columns), ("JN_SLICES", slices))
    return macros, adders, slices // 2 * columns * v * 4 if adders else 0
