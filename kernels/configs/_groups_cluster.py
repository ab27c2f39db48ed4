"""GroupNorm in one launch by clusters of blocks that hold a part of a group each (``groups_cluster.h``): which groups, how cut.

As everywhere, the order of the sums (``part``, ``q``, ``k``) follows from the spatial size, the channels of a group, the dtypes,
the options and the target; the tile, the slots and the blocks to a unit do not matter to the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import Launch, compute_units, shared_memory
from ._groups import Cut, Sizes, block_count, map_macros, part_count, sum_bytes, vector_types
from ._hip import MAX_THREADS, _ceil, _grid, _itemsize, _round_up, _type

SOURCE = "groupnorm.hip"
TARGETS = ("sm_90",)
"""Where it was measured; sm_100 has clusters as well."""
RESERVED = 1 << 10
"""Shared memory that a block takes besides its own."""
LARGEST = 16
"""Blocks of a cluster; the launcher allows more than the usual eight."""


@dataclass(frozen=True)
class Cluster:
    """A cut whose parts are the blocks of a cluster, each of which holds its own."""

    cut: Cut
    slots: int = 0
    """Steps of ``k`` chunks a thread that a block has room for in shared memory; 0: the part is one step, in registers."""


def choose(s: Sizes) -> Cluster | None:
    """How a group is held by a cluster, or None: it fits in a block or not on the chip, or other launches are as fast.

    Where the kernel does not serve what is not to matter to the bits (``fits``), two launches of the same cut give the same."""
    if s.problem.target not in TARGETS or s.wide * _itemsize(s.problem, "x") != 16:
        return None
    return _last(s) if s.last else _first(s)


def _first(s: Sizes) -> Cluster | None:
    """Channels first, groups of 40 KB to 2 MB: in registers up to 80 KB, 10 KB to a block.

    *H200*, this and two launches (or one by a block to a group): 2x640x32x32 4.0 us and 4.3, with SiLU 4.5 and 4.9; 2x320x64x64
    5.3 and 6.1, with SiLU 6.0 and 7.5 (four blocks of 256 threads 6.5); 8x640x64x64 23.2 and 32.4; with SiLU 2x256x256x256 43.3
    and 53.6, 1x128x512x512, of which a block holds seven steps of eight, 50.5 and 53.1."""
    if not 2560 <= s.chunks <= 131072 or s.v != s.wide:
        return None
    part = _ceil(s.chunks, 4 if s.chunks <= 2560 else 8 if s.chunks <= 10240 else 16)
    q, most, blocks = (128, 5, 8) if part <= 1280 else (256, 4, 3) if part <= 4096 else (512, 2, 2)
    steps = _ceil(part, q * most)
    c = Cut(part, _ceil(part, q * steps), q, min_blocks=blocks)
    return Cluster(replace(c, min_blocks=4)) if steps == 1 else _ring(s, c)


def _last(s: Sizes) -> Cluster | None:
    """Channels last, up to 128x128 positions, in tiles of about 80 channels.

    *H200*, this and two launches (or one by a block to a group): 2x16x16x1280 3.2 us and 3.6, with SiLU 3.7 and 4.0; 2x16x16x1920
    4.8 and 6.2; 2x32x32x640 4.5 (5.2 in registers) and 7.7, with SiLU 5.1 (5.8) and 6.2; 2x64x64x320 6.8 and 8.0;
    2x128x128x512 23.2 (in tiles of 64 channels 24.3) and 26.0, with SiLU 25.9 and 27.6; 4x128x128x320, half of it fetched again,
    34.3 and 36.5, where _groups_held takes less than 28. With SiLU 1x512x512x128 109.9 and 73.0, 1x256x256x512 75.0 and 61.2.

    Eight blocks or sixteen, 2x64x64x320: 6.8 us and 7.1, though they are half of the units: some parts of the chip have no sixteen
    units left, so two clusters share others; with SiLU, whose time is that of the arithmetic, 8.7 and 8.0."""
    silu, small = bool(s.problem.option("silu")), s.space <= 256 and 1280 <= s.chunks <= 2560
    if small:
        parts, q, k, chunks, threads = 4, 16, 4, 10, 320
    elif s.space <= 1024:
        parts, q, k, chunks, threads = (8, 32, 2, 10, 640) if silu else (8, 16, 4, 10, 640)
    elif s.space <= 4096:
        parts, q, k, chunks, threads = (16, 32, 2, 10, 1280) if silu else (8, 32, 2, 10, 640)
    else:
        parts, q, k, chunks, threads = (16, 64, 4, 5, 768) if s.columns <= 2 else (16, 32, 4, 10, 640)
    if s.space > 4096 and s.columns > 2:
        return None
    if (not small and (s.chunks <= 2560 or s.space > 16384)) or s.u % 2 or q * s.columns > MAX_THREADS // 2:
        return None
    if silu and _slow_with_silu(s):
        return None
    part = _ceil(s.space, parts)
    c = Cut(part, _ceil(part, q * _ceil(part, q * k)), q, _tile(s, chunks))
    if silu and not small and s.space <= 4096 and block_count(s, c) <= compute_units(s.problem.target):
        # with SiLU 2x64x64x320: 8.1 us in tiles of 40 channels, 8.7 of 80, two launches 8.5; 16x64x64x320: 35.3, 33.8, 42.4
        c, threads = replace(c, tile=_tile(s, 5)), min(threads, 960)
    c = replace(c, min_blocks=max(1, threads // map_macros(s, c)[1]))
    return Cluster(c) if steps(s, c) == 1 else _ring(s, c)


def _slow_with_silu(s: Sizes) -> bool:
    """Channels last: groups whose tiles are wide, where blocks are too large for several to a unit; groups narrower than a chunk
    were not measured.

    *H200*, with SiLU, this and two launches: 2x32x32x960 11.0 us and 8.4, 2x16x16x1920 7.3 and 6.2."""
    return s.group < s.wide or s.columns > 5


def _tile(s: Sizes, chunks: int) -> int:
    """Channels of a block: whole groups that divide the channels, of so many chunks at most if there are any."""
    even = [t for t in range(s.narrowest, s.channels + 1, s.narrowest) if s.channels % t == 0]
    return max((t for t in even if t <= chunks * s.v), default=s.narrowest)


def _ring(s: Sizes, c: Cut) -> Cluster:
    """Slots for all steps, or what there is room for beside another block of the unit."""
    wanted = steps(s, c)
    while True:
        room = (shared_memory(s.problem.target) + RESERVED) // c.min_blocks - RESERVED
        h = Cluster(c, wanted)
        while h.slots > 1 and shared_bytes(s, h) > room:
            h = replace(h, slots=h.slots - 1)
        if h.slots == wanted or c.min_blocks <= 2:
            return h
        c = replace(c, min_blocks=c.min_blocks - 1)


def fits(s: Sizes, h: Cluster) -> bool:
    """Whether the kernel serves it: chunks of 16 bytes, whole tiles, a thread of a column for each block."""
    c, parts = h.cut, part_count(s, h.cut)
    if s.v != s.wide or parts not in (2, 4, 8, LARGEST) or map_macros(s, c)[1] > MAX_THREADS:
        return False
    whole = not s.last or (s.channels % c.tile == 0 and c.q >= parts)
    return whole and shared_bytes(s, h) <= shared_memory(s.problem.target)


def candidates(s: Sizes) -> Iterator[Cluster]:
    """Others near the choice, for a sweep."""
    if (base := choose(s)) is None or not fits(s, base):
        return
    c = base.cut
    cuts = [replace(c, min_blocks=b) for b in (1, 2, 3, 4, 6, 8)]
    if s.last:
        cuts += [replace(c, tile=t) for t in (c.tile // 2, c.tile * 2)]
        cuts += [replace(c, part=p) for p in (c.part // 2, c.part * 2)]
        cuts += [replace(c, k=c.k // 2, q=c.q * 2), replace(c, k=c.k * 2, q=c.q // 2)]
    else:
        cuts += [replace(c, q=c.q * 2, min_blocks=max(1, c.min_blocks // 2)), replace(c, part=c.part // 2)]
    for cut in cuts:
        if cut.k < 1 or cut.tile % s.narrowest * s.last:
            continue
        h = Cluster(cut) if steps(s, cut) == 1 else _ring(s, cut)
        if fits(s, h):
            yield h


def steps(s: Sizes, c: Cut) -> int:
    """Map::STEPS"""
    return _ceil(c.part, (c.q if s.last else map_macros(s, c)[1]) * c.k)


def shared_bytes(s: Sizes, h: Cluster) -> int:
    threads = map_macros(s, h.cut)[1]
    groups = h.cut.tile // s.group if s.last else 1
    ring = h.slots * h.cut.k * threads * s.v * _itemsize(s.problem, "x")
    sums = sum_bytes(s, h.cut, threads, 1) + sum_bytes(s, h.cut, threads, 2)
    return ring + 16 * groups * part_count(s, h.cut) + 16 + _round_up(sums, 16) + 12 * groups


def launches(s: Sizes, h: Cluster) -> tuple[Launch, ...]:
    p, (shape, threads) = s.problem, map_macros(s, h.cut)
    return (
        Launch(
            kernel=f"{SOURCE}:groupnorm_cluster",
            inputs=("x", "weight", "bias"),
            outputs=("y", "stats"),
            grid=_grid(block_count(s, h.cut)),
            constants=(
                *shape,
                *vector_types(s),
                ("JN_Y", _type(p, "y")),
                ("JN_EPS", float(p.option("eps"))),  # type: ignore[arg-type]
                ("JN_HAS_STATS", p.has("stats")),
                ("JN_CLUSTER", part_count(s, h.cut)),
                ("JN_SLOTS", h.slots),
            ),
            scalars=(("batches", "i64", s.batch),),
            threads=threads,
            shared=shared_bytes(s, h),
        ),
    )
