"""Launches of the GroupNorm stages through ``csrc/kernels/groupnorm.hip``: what a block owns, and how a group is cut into parts.

A group that a block can hold in its registers takes one launch, and so does one that a cluster of blocks can hold (sm_90,
``_groups_cluster``); a larger one is cut into parts, of which one launch finds the statistics and a second puts them together and
normalises. The cut (``part``), the lanes that share a column (``q``), the chunks a thread adds up in a row (``k``) fix the order of
the sums: they follow from the spatial size, the channels of a group, the dtypes, the options and the target alone. How many groups
a block serves at once (``tile``) does not matter to the bits and may look at the batch.

The sizes follow from registers, bytes in flight and cache sizes of an H200; AMD's register files are four times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from . import (
    Launch,
    Problem,
    Unsupported,
    _groups_cluster,
    _groups_cluster_bwd,
    _groups_held,
    _groups_held_bwd,
    compute_units,
    next_power_of_2,
    shared_memory,
    wave_size,
)
from ._groups import (
    Cut,
    Lines,
    Sizes,
    add_partials,
    block_count,
    has_vectors,
    largest_factor,
    map_macros,
    part_count,
    power_of_2_below,
    sum_bytes,
    vector_types,
)
from ._hip import MAX_THREADS, TYPES, _ceil, _grid, _itemsize, _nvidia, _round_up, _type

SOURCE = "groupnorm.hip"
MAX_PARTS = 256
LARGE = 8 << 20  # bytes of 32 groups
MAX_GROUP = 1 << 31  # elements of a group, whose positions and chunks are counted in 32 bits


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``.

    Raises:
      Unsupported: another stage, nothing to do, another dtype, or a group too wide or too large for the kernels.
    """
    s = _check(problem)
    if problem.stage == "groupnorm_fwd":
        apart = _apart(s)
        if held := _groups_held.choose(s, apart[0]):
            return _groups_held.launches(s, held, _forward_launches(s, *apart))
        if (h := _groups_cluster.choose(s)) and _groups_cluster.fits(s, h):
            return _groups_cluster.launches(s, h)
        return _forward_launches(s, *apart)
    if h := _groups_cluster_bwd.choose(s):
        return _groups_cluster_bwd.launches(s, h, _groups_cluster_bwd.examples(s, h))
    cuts = _backward(s)
    apart = _backward_launches(s, *cuts)
    if held := _groups_held_bwd.choose(s, cuts[0]):
        return _groups_held_bwd.launches(s, held, apart)
    return apart


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings, the plan first, for a benchmark to sweep. They compute the same stage in other orders of the sums."""
    s = _check(problem)
    found = [plan(problem)]
    others = (
        chain(
            (
                _groups_held.launches(s, h, _forward_launches(s, *_apart(s)))
                for h in _groups_held.candidates(s, _apart(s)[0])
            ),
            (_groups_cluster.launches(s, h) for h in _groups_cluster.candidates(s)),
            (_forward_launches(s, c) for c in _forward_candidates(s)),
        )
        if problem.stage == "groupnorm_fwd"
        else chain(
            (
                _groups_held_bwd.launches(s, h, _backward_launches(s, *_backward(s)))
                for h in _groups_held_bwd.candidates(s, _backward(s)[0])
            ),
            (_backward_launches(s, *c) for c in _backward_candidates(s)),
        )
    )
    for launches in others:
        if launches not in found and _fits(problem, launches):
            found.append(launches)
    return found


def _fits(problem: Problem, launches: tuple[Launch, ...]) -> bool:
    return all(
        launch.shared <= shared_memory(problem.target) and 0 < launch.threads <= MAX_THREADS for launch in launches
    )


def _check(problem: Problem) -> Sizes:
    if problem.stage not in ("groupnorm_fwd", "groupnorm_bwd"):
        raise Unsupported(f"{problem.stage} is no stage of {SOURCE}.")
    if problem.rows < 1 or 0 in problem.shape("x"):
        raise Unsupported("there is nothing to launch a kernel for.")
    for name, dtype in problem.dtypes:
        if dtype not in TYPES:
            raise Unsupported(f"{name} is {dtype}; the kernels read and write {', '.join(TYPES)}.")
    s = Sizes.of(problem)
    if s.last and s.columns > MAX_THREADS:
        raise Unsupported(
            f"groups of {s.group} channels take {s.columns} chunks of a position; a workgroup has {MAX_THREADS} threads."
        )
    if s.group * s.space >= MAX_GROUP:
        raise Unsupported(f"a group of {s.group * s.space} elements; positions and chunks are counted in 32 bits.")
    return s


# --- forward


def _apart(s: Sizes) -> tuple[Cut, Cut]:
    """The cuts of the launches where no blocks wait for one another."""
    if h := _groups_cluster.choose(s):
        return (replace(h.cut, min_blocks=1),) * 2
    c = _forward(s)
    if q := _groups_held.lanes(s):
        c = replace(c, q=q, tile=_tile(s, q, 384, part_count(s, c), 3.0))
    return _dense(s, c), _dense(s, _resident_apply(s, c))


def _forward(s: Sizes) -> Cut:
    return _on_chip(s) or _in_parts(s)


def _on_chip(s: Sizes) -> Cut | None:
    """A block for whole groups: up to 768 threads, which leave each 80 registers (NVIDIA), 40 of them for the group.

    *H200*, 2x320x64x64 (channels first): 6.5 us with 512 threads, 6.7 with 640, 7.4 with 1024; in parts 7.5. With SiLU 8.2: two
    slow instructions an element on the 64 units that have a group, so there in parts."""
    if s.problem.option("silu") and s.chunks > (2560 if s.last else 4096):
        return None
    most = 40 // s.words
    k = max(1 if s.chunks < 512 else 2, _ceil(s.chunks, 640 if s.last else 512))
    if not s.last:
        threads = max(64, _round_up(_ceil(s.chunks, k), 64))
        return Cut(threads * k, k, threads) if k <= most and threads <= 768 else None
    q = _ceil(s.space, min(k, s.space))
    k = _ceil(s.space, q)
    if k > most or q * s.columns > 768:
        return None
    c = Cut(q * k, k, q, _tile(s, q, 256))
    threads = map_macros(s, c)[1]
    fits = sum_bytes(s, c, threads, 1) + sum_bytes(s, c, threads, 2) <= shared_memory(s.problem.target)
    return c if fits else None


def _tile(s: Sizes, q: int, threads: int, parts: int = 1, blocks: float = 0.9) -> int:
    """Channels of a block of about ``threads`` threads: whole groups, whole chunks, no wider than the array; with few examples
    less, so that there are ``blocks`` for each compute unit. Tiles that leave none half empty, if there are any of that size.

    *H200*, 2x128x128x512: 41.4 us in tiles of 96 channels of 512; 64 divide them and take two blocks to a unit's registers."""
    tiles = _ceil(s.channels, s.narrowest)
    enough = max(1, int(s.batch * parts * tiles / (blocks * compute_units(s.problem.target))))
    times = min(tiles, enough, max(1, threads // (q * s.columns)))
    even = largest_factor(tiles, times) if _nvidia(s.problem) else 1
    return s.narrowest * (even if 2 * even >= times else _ceil(tiles, _ceil(tiles, times)))


def _in_parts(s: Sizes) -> Cut:
    """Parts of 80 KB of 32 groups, the usual number (2.5 KB of one), channels last: with two examples of 64x64x320 two blocks for
    each of an H200's 132 compute units, all of whose bytes are on their way at once. Not more than 64 parts, or blocks would
    read more of the statistics of parts than of the image; more again where a part would have more than 256 KB.

    *H200*, 2x64x64x320: 8.8 us in 256 blocks of 80 channels with 32 threads to a column, 9.9 in 128 of 320 with 16."""
    size = max(_itemsize(s.problem, "x"), _itemsize(s.problem, "y"))
    whole = s.space * s.group * 32 * size
    if s.last:
        parts = min(MAX_PARTS, max(min(64, _ceil(whole, 80 << 10)), whole >> 18))
        q = max(1, min(32, power_of_2_below(512 / s.columns), next_power_of_2(s.space)))
        part = _round_up(_ceil(s.space, parts), q)
        if part > 4 * q:
            part = _round_up(part, 4 * q)
        k = max(1, min(4, part // q, 16 // s.words))
        return Cut(part, k, q, _tile(s, q, 384, _ceil(s.space, part), 3.0 if _large(s) else 1.9))
    # a block has one group: 16 parts of 8 KB and more, or more of 32 KB and more
    # *H200*, 2x320x64x64 with SiLU: 7.4 us in ten parts of 8 KB, 8.1 in five of 16, 9.2 in three of 32
    whole, threads = s.group * s.space * size, 256
    parts = max(1, min(16, _ceil(whole, 8 << 10)), min(64, _ceil(whole, 32 << 10)))
    k = max(1, min(4, 16 // s.words, _ceil(s.chunks, parts) // threads))
    return Cut(_round_up(_ceil(s.chunks, parts), threads * k), k, threads)


def _large(s: Sizes) -> bool:
    """Channels last: a block walks over its part, with several others on its compute unit."""
    return s.last and 32 * s.group * s.space * max(_itemsize(s.problem, n) for n in ("x", "y")) >= LARGE


def _dense(s: Sizes, c: Cut) -> Cut:
    """Channels last, large: registers for 1024 threads to a unit, in every launch. They do not matter to the bits.

    *H200*, both launches, 768 threads to a unit and 1024: with SiLU 2x128x128x512 29.3 and 27.9 us, 1x512x512x128 65.1 and 58.3,
    1x1024x1024x128 272 and 227; backward 51.5 and 49.0, 125.8 and 99.3, without SiLU 103.8 and 89.5. 4x128x128x320 without SiLU
    38.0 and 37.0. A block that walks over several parts gained 8 % at one size and lost 1 to 30 at the others."""
    if not (_nvidia(s.problem) and _large(s)) or s.words > 8 or s.u == 1:
        return c
    return replace(c, min_blocks=max(1, 1024 // map_macros(s, c)[1]))


def _resident_apply(s: Sizes, c: Cut) -> Cut:
    """Channels last, with SiLU: fewer chunks ahead for more blocks to a unit. They do not matter to the bits.

    *H200*, 2x64x64x320: 3.8 us with two chunks and three blocks of 320 threads, 4.5 with four and one; without SiLU 3.6 and 3.4."""
    if not (s.last and s.problem.option("silu") and _nvidia(s.problem)) or s.u == 1:
        return c
    return replace(c, k=min(c.k, 2), min_blocks=max(1, 960 // map_macros(s, c)[1]))


def _forward_candidates(s: Sizes) -> Iterator[Cut]:
    base = _in_parts(s)
    if chip := _on_chip(s):
        yield chip
        for threads in (256, 384, 512, 768, 1024):
            if s.last:
                yield replace(chip, tile=_tile(s, chip.q, threads))
            elif (k := _ceil(s.chunks, threads)) <= 10:
                yield Cut(threads * k, k, threads)
    yield base
    yield from (replace(base, min_blocks=b) for b in (2, 3))
    for factor in (0.5, 1, 2, 4):
        if s.last:
            yield from _wider(s, base, (base.q, base.q // 2), (2, 4), factor)
        else:
            for threads in (256, 512, 1024):
                for k in (2, 4):
                    part = _round_up(int(base.part * factor), threads * k)
                    if _ceil(s.chunks, part) <= MAX_PARTS:
                        yield Cut(part, k, threads)


def _wider(s: Sizes, base: Cut, lanes: tuple[int, ...], ks: tuple[int, ...], factor: float) -> Iterator[Cut]:
    """Channels last: parts of other sizes, other lanes to a column, wider and narrower tiles."""
    for q in lanes:
        part = _round_up(max(1, int(base.part * factor)), max(q, 1))
        if q < 1 or _ceil(s.space, part) > MAX_PARTS:
            continue
        for k in (k for k in ks if k * q <= part):
            for blocks in (0.9, 1.9, 3.5):
                yield Cut(part, k, q, _tile(s, q, 640, _ceil(s.space, part), blocks))


def _forward_launches(s: Sizes, c: Cut, normalise: Cut | None = None) -> tuple[Launch, ...]:
    """``normalise``: the cut of the second launch, if there is one; of the same parts. Of float32, what the means lost to rounding
    is kept."""
    p, (shape, threads) = s.problem, map_macros(s, c)
    batches = ("batches", "i64", s.batch)
    low = p.dtype("x") == "float32"
    vectors = (
        *vector_types(s),
        ("JN_Y", _type(p, "y")),
        ("JN_EPS", float(p.option("eps"))),  # type: ignore[arg-type]
        ("JN_HAS_STATS", p.has("stats")),
    )
    sums = sum_bytes(s, c, threads, 1) + sum_bytes(s, c, threads, 2)
    if part_count(s, c) == 1 and c.part == c.q * c.k:
        return (
            Launch(
                kernel=f"{SOURCE}:groupnorm_fwd",
                inputs=("x", "weight", "bias"),
                outputs=("y", "stats"),
                grid=_grid(block_count(s, c)),
                constants=(*shape, *vectors),
                scalars=(batches,),
                threads=threads,
                shared=sums,
            ),
        )
    planes = 3 if low else 2
    partials = Launch(
        kernel=f"{SOURCE}:groupnorm_partials",
        inputs=("x",),
        outputs=("partials",),
        grid=_grid(block_count(s, c)),
        constants=(*shape, ("JN_X", _type(p, "x")), ("JN_LOW", low)),
        scalars=(batches,),
        threads=threads,
        shared=sums,
        temps=(("partials", (s.batch * s.groups, planes, part_count(s, c)), "float32"),),
    )
    c = normalise or c
    shape, threads = map_macros(s, c)
    apply = Launch(
        kernel=f"{SOURCE}:groupnorm_apply",
        inputs=("x", "weight", "bias", "partials"),
        outputs=("y", "stats"),
        grid=_grid(block_count(s, c)),
        constants=(*shape, *vectors, ("JN_LOW", low)),
        scalars=(batches,),
        threads=threads,
        shared=12 * (c.tile // s.group) if s.last else 0,
        overlaps=True,
    )
    return partials, apply


# --- backward


def _backward(s: Sizes) -> tuple[Cut | Lines, Cut]:
    """(how the sums are cut, how dx is)."""
    c = _in_parts(s)
    k = max(1, min(c.k, 16 // s.words))
    if s.last:
        # eight groups to a chunk cost a thread 40 registers of constants
        cut = replace(c, k=k)
        if s.u == 1:
            cut = replace(cut, tile=min(c.tile, _tile(s, c.q, 320, part_count(s, c))))
        while _backward_shared(s, cut) > shared_memory(s.problem.target) and cut.tile > s.narrowest:
            cut = replace(cut, tile=cut.tile - s.narrowest)
        if _backward_shared(s, cut) > shared_memory(s.problem.target):
            cut = replace(cut, q=max(1, cut.q // 2))
        sums, dx = _resident_sums(s, cut), _resident_dx(s, cut)
        if 2 * s.u < s.v and not s.problem.option("silu"):  # two chunks ahead and constants of four groups do not fit
            return sums, dx
        return _dense(s, sums), _dense(s, dx)
    lines = _lines(s, k)
    if _nvidia(s.problem) and s.space // s.v >= 2048:
        lines = replace(lines, k=1)  # *H200*, 2x512x128x128: 24.3 us, 25.7 with two chunks on their way
    return lines, _first_dx(s, c)


def _first_dx(s: Sizes, c: Cut) -> Cut:
    """Channels first. dx has no sums: any cut gives the same bits, and more blocks where there are few groups.

    *H200*, both launches, 2x320x64x64: 8.6 us in 1280 blocks of 128 threads with two chunks on their way at once, 9.3 one after
    the other, 9.4 in 640 with four."""
    units = compute_units(s.problem.target)
    if _nvidia(s.problem):
        dx, blocks = Cut(0, 1, 128), max(_ceil(s.chunks, 1024), _ceil(5 * units, s.batch * s.groups))
        if (
            _ceil(s.chunks, blocks) > 512
        ):  # 8x320x64x64 26.2 us, 27.5 one after the other; with SiLU 2x512x128x128 45.9 and 48.0
            return replace(dx, part=512, k=4)
        if _ceil(s.chunks, blocks) > 128:
            return replace(dx, part=256, k=2)
    else:
        dx = Cut(0, 1, min(512, max(64, _round_up(s.chunks, 64))))
        blocks = max(_ceil(s.chunks, c.part), _ceil(2 * units, s.batch * s.groups))
    return replace(dx, part=_round_up(_ceil(s.chunks, blocks), dx.q))


def _resident_sums(s: Sizes, c: Cut) -> Cut:
    """Channels last, with SiLU, whose constants fill a thread's registers: fewer chunks ahead for more blocks to a unit.

    *H200*, 2x64x64x320: 6.9 us with one chunk and two blocks, 7.7 with two and two, 9.3 with two and one."""
    if not (s.problem.option("silu") and _nvidia(s.problem)) or s.words > 8 or s.u == 1 or c.part <= 2 * c.q:
        return c
    threads = map_macros(s, c)[1]
    if s.u == s.v:
        return replace(c, min_blocks=max(1, 768 // threads))
    return replace(c, k=1, min_blocks=max(1, 640 // threads))


def _resident_dx(s: Sizes, c: Cut) -> Cut:
    """The same for dx, whose tile and chunks do not matter to the bits.

    *H200*, 2x64x64x320: with SiLU 5.0 us with one chunk and four blocks of 160 threads, 6.7 with two and one of 320; without 4.0
    with two and two of 320, 4.3 with two and one. 1x256x256x256 with SiLU: 24.0 with one and four of 256, 26.7 with two and one."""
    if not _nvidia(s.problem) or s.words > 8 or s.u == 1 or c.part <= c.q:
        return c
    if not s.problem.option("silu"):
        return replace(c, min_blocks=max(1, 640 // map_macros(s, c)[1]))
    small = replace(c, k=1, tile=min(c.tile, _tile(s, c.q, 256, part_count(s, c))))
    blocks = min(4, (1024 if s.u == s.v else 640) // map_macros(s, small)[1])
    return replace(small, min_blocks=blocks) if blocks > 1 else c


def _lines(s: Sizes, k: int, most: int = 256) -> Lines:
    """Short channels share a block; long ones are cut into parts of 64 KB and more, at most 64."""
    wave, chunks = wave_size(s.problem.target), s.space // s.v
    if chunks <= wave * k:
        lanes = min(wave, next_power_of_2(_ceil(chunks, k)))
        return Lines(lanes * _ceil(chunks, lanes), k, lanes, 128 // lanes)
    lanes = min(most, _round_up(_ceil(chunks, k), wave))
    parts = min(64, max(1, chunks >> 12))
    return Lines(_round_up(_ceil(chunks, parts), lanes * k), k, lanes, 1)


def _backward_candidates(s: Sizes) -> Iterator[tuple[Cut | Lines, Cut]]:
    sums, dx = _backward(s)
    for factor in (0.5, 1, 2):
        if isinstance(sums, Cut):
            yield from ((c, c) for c in _wider(s, sums, (sums.q, sums.q // 2), (1, 2, 4), factor))
            continue
        for k in (1, 2, 4):
            for lanes in (128, 256, 512):
                part = _round_up(max(1, int(dx.part * factor)), dx.q * k)
                yield _lines(s, k, lanes), replace(dx, part=part, k=k)


def _backward_shared(s: Sizes, c: Cut) -> int:
    """Shared memory of group_bwd_sums."""
    return 4 * (2 * c.q * c.tile + 2 * c.tile + 2 * (c.tile // s.group))


def _backward_launches(s: Sizes, sums: Cut | Lines, dx: Cut) -> tuple[Launch, ...]:
    p = s.problem
    (shape, threads), batches = map_macros(s, dx), ("batches", "i64", s.batch)
    vectors = (*vector_types(s), ("JN_DY", _type(p, "dy")))
    if isinstance(sums, Lines):
        parts = _ceil(s.space // s.v, sums.part)
        lanes = {"JN_K": sums.k, "JN_PART": sums.part, "JN_THREADS": sums.lanes * sums.lines, "JN_MIN_BLOCKS": 1}
        constants = tuple((n, lanes.get(n, v)) for n, v in shape)
        constants = (*constants, ("JN_LANES", sums.lanes), ("JN_LINES", sums.lines))
        blocks = _ceil(s.batch * s.channels * parts, sums.lines)
        sum_threads, shared = sums.lanes * sums.lines, 8 * (sums.lanes // wave_size(p.target))
        shares = s.group * parts
    else:
        parts = shares = part_count(s, sums)
        constants, sum_threads = map_macros(s, sums)
        blocks, shared = block_count(s, sums), _backward_shared(s, sums)
    room = dx.min_blocks * compute_units(p.target) - block_count(s, dx)
    adding, adders, adding_shared = add_partials(s, threads, room)
    return (
        Launch(
            kernel=f"{SOURCE}:groupnorm_bwd_sums",
            inputs=("x", "dy", "weight", "bias", "stats"),
            outputs=("partials", "shares"),
            grid=_grid(blocks),
            constants=(*constants, *vectors, ("JN_HAS_PARTIALS", has_vectors(s))),
            scalars=(batches,),
            threads=sum_threads,
            shared=shared,
            temps=(
                *((("partials", (s.batch * parts, 2, s.channels), "float32"),) if has_vectors(s) else ()),
                ("shares", (s.batch * s.groups, 2, shares), "float32"),
            ),
        ),
        Launch(
            kernel=f"{SOURCE}:groupnorm_bwd_dx",
            inputs=("x", "dy", "weight", "bias", "stats", "shares", "partials"),
            outputs=("dx", "dweight", "dbias"),
            grid=_grid(block_count(s, dx) + adders),
            constants=(
                *shape,
                *vectors,
                *((f"JN_{n.upper()}", _type(p, n)) for n in ("dx", "dweight", "dbias")),
                ("JN_SHARES", shares),
                *adding,
            ),
            scalars=(batches, ("programs", "i32", s.batch * parts)),
            threads=threads,
            shared=max(8 * (dx.tile // s.group) if s.last else 0, adding_shared),
            overlaps=True,
        ),
    )
