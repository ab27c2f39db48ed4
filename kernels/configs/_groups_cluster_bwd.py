"""GroupNorm backward, channels first, in one launch by clusters of blocks that hold parts of x and dy (groups_bwd_cluster.h)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import Launch, compute_units, next_power_of_2, shared_memory, wave_size
from ._groups import (
    Cut,
    Sizes,
    block_count,
    has_vectors,
    largest_power_of_2_in,
    map_macros,
    part_count,
    sum_bytes,
    vector_types,
)
from ._groups_cluster import LARGEST, SOURCE, TARGETS
from ._hip import _ceil, _grid, _itemsize, _round_up, _type


@dataclass(frozen=True)
class Held:
    """A cut whose parts are the blocks of a cluster."""

    cut: Cut
    shared: bool = False
    """Parts wait in shared memory; else in registers."""


def choose(s: Sizes) -> Held | None:
    """How a group is held by a cluster, or None: it does not fit on the chip or is too small to cut, or its waves have several
    channels at a time.

    The order of the sums (``part``, threads) follows from the spatial size, the channels of a group, the dtypes, the options and
    the target; what holds a part, and how many blocks a unit has registers for, do not matter to the bits.

    *H200*, this and two launches. Parts of up to 640 chunks, 128 threads: 2x320x64x64 6.8 us and 8.6, with SiLU 7.5 and 10.4;
    2x640x32x32 4.8 and 6.4, 5.3 and 7.4; 2x1280x16x16 3.6 and 4.8, 4.3 and 5.3 (of 320 chunks 4.2 and 4.5). More blocks than are
    on the chip at once wait in shared memory, nine to a unit: 8x320x64x64 18.3 and 26.6, with SiLU 23.5 and 28.1 (in registers 19.8
    and 24.0); 8x640x64x64 33.2 and 50.2, with SiLU 41.3 and 53.5 (in registers 36.2 and 47.5). Parts of 2048 chunks, 256 threads:
    2x512x128x128 30.8 and 42.8, with SiLU 36.0 and 45.6 (512 threads 31.3 and 42.5). Twice as large parts, with SiLU
    1x256x256x256: 57.0 and 46.1."""
    p, wave = s.problem, wave_size(s.problem.target)
    if s.last or p.target not in TARGETS or s.words != 8 or s.v * _itemsize(p, "x") != 16 or s.space // s.v % wave:
        return None
    parts = min(LARGEST, max(2, next_power_of_2(_ceil(s.chunks, 640))))
    part = _round_up(_ceil(s.chunks, parts), wave)
    if not 320 <= part <= 2048 or _ceil(s.chunks, part) != parts:
        return None
    q, blocks = (128, 9) if part <= 640 else (256, 3)
    cut = Cut(part, _ceil(part, q), q, min_blocks=5)
    h = Held(cut)
    if parts == LARGEST or block_count(s, cut) > cut.min_blocks * compute_units(p.target):
        h = Held(replace(cut, min_blocks=blocks), True)
    return h if shared_bytes(s, h, examples(s, h)) <= shared_memory(p.target) else None


def examples(s: Sizes, h: Held) -> int:
    """Of a cluster: all, if there is room for them, so that nothing is left to add up. Clusters are of 2, 4, 8 or 16 blocks."""
    blocks = s.batch * part_count(s, h.cut)
    return s.batch if blocks <= LARGEST and blocks == next_power_of_2(blocks) else 1


def held_bytes(s: Sizes, c: Cut) -> int:
    """SharedPair::bytes"""
    return c.k * c.q * s.v * sum(_itemsize(s.problem, n) for n in ("x", "dy"))


def shared_bytes(s: Sizes, h: Held, examples: int) -> int:
    c = h.cut
    parts, run = part_count(s, c), s.space // s.v // wave_size(s.problem.target)
    own = _ceil(s.group, parts * examples)
    return (held_bytes(s, c) if h.shared else 0) + 16 * (parts + own * examples * run) + 16 + sum_bytes(s, c, c.q, 2)


def launches(s: Sizes, h: Held, examples: int) -> tuple[Launch, ...]:
    """``examples`` of a cluster: all, or one, and a second launch adds up dweight and dbias."""
    p, c, (shape, threads) = s.problem, h.cut, map_macros(s, h.cut)
    whole = examples == s.batch
    partials = has_vectors(s) and not whole
    held = Launch(
        kernel=f"{SOURCE}:groupnorm_bwd_cluster" + ("" if whole else "_part"),
        inputs=("x", "dy", "weight", "bias", "stats"),
        outputs=("dx", "dweight", "dbias") if whole else ("dx", "partials"),
        grid=_grid(block_count(s, c)),
        constants=(
            *shape,
            *vector_types(s),
            ("JN_DY", _type(p, "dy")),
            *_types(s, "dx", "dweight", "dbias"),
            ("JN_CLUSTER", part_count(s, c) * examples),
            ("JN_EXAMPLES", examples),
            ("JN_SHARED", h.shared),
            ("JN_HAS_PARTIALS", has_vectors(s)),
        ),
        scalars=(("batches", "i64", s.batch),),
        threads=threads,
        shared=shared_bytes(s, h, examples),
        temps=(("partials", (s.batch, 2, s.channels), "float32"),) if partials else (),
    )
    return (held, _add(s)) if partials else (held,)


def _types(s: Sizes, *names: str) -> tuple[tuple[str, object], ...]:
    return tuple((f"JN_{n.upper()}", _type(s.problem, n)) for n in names)


def _add(s: Sizes) -> Launch:
    """dweight and dbias from a partial of each example."""
    n, v = 2 * s.channels, largest_power_of_2_in(s.channels, 4)
    slices = min(32, next_power_of_2(s.batch))
    columns = max(8, 128 // slices)
    return Launch(
        kernel=f"{SOURCE}:groupnorm_bwd_add",
        inputs=("partials",),
        outputs=("dweight", "dbias"),
        grid=_grid(_ceil(n, columns * v)),
        constants=(
            ("JN_LAST", False),
            ("JN_C", s.channels),
            ("JN_THREADS", columns * slices),
            *_types(s, "dweight", "dbias"),
            ("JN_ADD_V", v),
            ("JN_COLUMNS", columns),
            ("JN_SLICES", slices),
        ),
        scalars=(("programs", "i32", s.batch),),
        threads=columns * slices,
        shared=max(1, slices // 2) * columns * v * 4,
        overlaps=True,
    )
