"""Launches of the KV cache through ``csrc/kernels/qk_cache.hip``: the write with its norm and rotation, and the gather.

Blocks of v, of k and of q stand beside each other in one launch. The sum of a head has one order, by D, dtype and target, and where
a token is written changes no bit of it, so a plan may look at the number of tokens. The choices follow from registers, bytes on
their way and lanes; those for AMD targets were compiled and inspected, not run on AMD silicon.
"""

from __future__ import annotations

from . import ITEMSIZE, Launch, Problem, Unsupported, compute_units, wave_size
from ._cache import READ, WRITE, Cache, aliases, cache, packed, parts
from ._heads import Part, gptj, lane_elements, lanes, vector
from ._heads_hip import Deal, blocks, check, forward, forward_candidates, groups, position_constants, unrolled
from ._hip import TYPES, Constants, _ceil, _grid, _nvidia, _type
from .quant_hip import CODES

SOURCE = "qk_cache.hip"
STORED = {None: "kCast", "per_token": "kToken", "per_tensor": "kTensor"}
SLOTS = {"int32": "I32", "int64": "I64"}
GATHER_THREADS = 128


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launch that computes ``problem``.

    Raises:
      Unsupported: another stage, no tokens, or more than the kernels count.
    """
    if problem.stage == READ:
        return (_gather(problem),)
    found = _parts(problem)
    deal = _deal(problem, found)
    return (_write(problem, found, deal, _tile(problem, found, deal)),)


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings of the same computation, the plan first; all give the same bits."""
    if problem.stage == READ:
        return [plan(problem)]
    found = _parts(problem)
    more = []
    for deal in forward_candidates(problem):
        if deal.threads % wave_size(problem.target) == 0:
            tiles = {0, _tile(problem, found, deal), *(t for t in (16, 32, 64) if _fits(problem, found, deal, t))}
            more += [(_write(problem, found, deal, tile),) for tile in sorted(tiles)]
    return list(dict.fromkeys([plan(problem), *more]))


def _parts(problem: Problem) -> list[Part]:
    if problem.stage != WRITE:
        raise Unsupported(f"{problem.stage} is no stage of {SOURCE}.")
    found = parts(problem)
    check(problem, found)
    return found


def _few(problem: Problem, found: list[Part], a_unit: int) -> bool:
    return found[2].tokens * cache(problem).heads < a_unit * compute_units(problem.target)


def _turned(problem: Problem, found: list[Part]) -> bool:
    """Whether blocks turn v over in tiles: not for few tokens, where tiles leave compute units idle, and where slots do not follow
    one another as those of a prompt do. 256 tokens on an H200: 4.7 us instead of 6.0 (bfloat16), 5.1 instead of 6.0 (fp8)."""
    return cache(problem).shuffled and not _few(problem, found, 12)


def _deal(problem: Problem, found: list[Part]) -> Deal:
    """Two heads a group at most: on an H200 that, with registers for 1024 threads a unit, was 4 % ahead of four heads for q/k norm
    alone (qk.hip, 8192 tokens of 64 + 8 heads, D 128). The codes of a head take a few registers more, which would spill. Blocks of
    64 threads spread the pieces of a short prompt over more units: 3.71 us instead of 3.90 for 128 tokens of fp8, but 2.14 instead
    of 1.97 for one, and 1 to 3 % slower in pages."""
    deal = forward(problem, [p for p in found if p.heads])
    if deal.unroll < 2 and not _turned(problem, found):
        return Deal(64) if cache(problem).shuffled and not _few(problem, found, 1) else deal
    small = max(lane_elements(problem, p) for p in found) <= 16 and problem.option("sections") is None
    blocks_a_unit = 1 if not small else 7 if cache(problem).quant else 8
    return Deal(deal.threads, 2, blocks_a_unit)


def _fits(problem: Problem, found: list[Part], deal: Deal, tile: int) -> bool:
    """ValueTile: whole rounds of the block, whole groups of X tokens, at most 64 elements of v on their way a thread."""
    c, value = cache(problem), found[2]
    if not c.shuffled or tile % c.x or tile % groups(problem, value, deal):
        return False
    held = tile * problem.features // deal.threads
    return held <= 64 and _rows_bytes(problem, c, tile) <= 48 << 10


def _tile(problem: Problem, found: list[Part], deal: Deal) -> int:
    """Tokens of v that a block turns over, 0: none. 32, and 16 where that makes less than two blocks a unit: 11.17 us instead of
    11.65 for 1024 tokens of bfloat16 on an H200, where 8192 take 84.6 with 16 and 84.1 with 32."""
    if not _turned(problem, found):
        return 0
    sizes = (16, 32, 64) if _few(problem, found, 64) else (32, 16, 64)
    return next((t for t in sizes if _fits(problem, found, deal, t)), 0)


def _token_blocks(problem: Problem, part: Part, deal: Deal) -> int:
    """TokenDeal::blocks. On an H200 8192 tokens took 84.1 us with it and 99.6 with HeadDeal (bfloat16, fp8: 83.3 and 86.9)."""
    return _ceil(part.tokens, groups(problem, part, deal)) * _ceil(part.heads, unrolled(problem, part, deal))


def _rows(problem: Problem, value: Part, deal: Deal) -> int:
    """ValueSpread::ROWS"""
    return groups(problem, value, deal) * unrolled(problem, value, deal)


def _rows_bytes(problem: Problem, c: Cache, rows: int) -> int:
    """ValueTile::bytes, ValueSpread::bytes"""
    return rows * (problem.features * c.itemsize + 16 + 4)


def _cache_constants(problem: Problem, c: Cache) -> Constants:
    return (
        ("JN_D", problem.features),
        ("JN_HEADS1", c.heads),
        ("JN_CODE", CODES[c.dtype] if c.quant else TYPES[c.dtype]),
        ("JN_PAGE", c.page),
        ("JN_SHUFFLED", c.shuffled),
        ("JN_STORED", STORED[c.quant]),
        ("JN_SLOT", SLOTS[problem.dtype("slots")]),
    )


def _write(problem: Problem, found: list[Part], deal: Deal, tile: int) -> Launch:
    c, offset = cache(problem), float(problem.option("weight_offset"))  # type: ignore[arg-type]
    if deal.threads % wave_size(problem.target):
        raise Unsupported(f"{deal.threads} threads are no whole waves.")
    constants: list[tuple[str, object]] = [*_cache_constants(problem, c)]
    constants += [
        ("JN_HEADS0", found[0].heads),
        ("JN_R", found[0].rotary),
        ("JN_GPTJ", gptj(problem)),
        ("JN_THREADS", deal.threads),
        ("JN_MIN_BLOCKS", deal.min_blocks if _nvidia(problem) else 1),
        ("JN_TILE", tile),
        ("JN_PACKED", packed(problem)),
        ("JN_HAS_KV", problem.has("k_out")),
        ("JN_TABLE", _type(problem, "cos_sin")),
        ("JN_W0", _type(problem, "q_weight")),
        ("JN_W1", _type(problem, "k_weight")),
        ("JN_EPS", float(problem.option("eps"))),  # type: ignore[arg-type]
        ("JN_OFFSET", offset),
        ("JN_HAS_OFFSET", offset != 0),
    ]
    for i, part in enumerate(found):
        constants += [
            (f"JN_X{i}", TYPES[part.dtype]),
            (f"JN_V{i}", vector(problem, part)),
            (f"JN_LANES{i}", lanes(problem, part)),
            (f"JN_UNROLL{i}", unrolled(problem, part, deal) if part.heads else 1),
        ]
    constants += [c for c in position_constants(problem) if c[0] != "JN_PERIOD"]
    keys = _token_blocks(problem, found[1], deal) if tile else blocks(problem, found[1], deal)
    queries = blocks(problem, found[0], deal) if found[0].heads else 0
    values = _ceil(found[2].tokens, tile) * c.heads if tile else blocks(problem, found[2], deal)
    return Launch(
        kernel=f"{SOURCE}:qk_norm_rope_cache",
        inputs=("qkv", "q", "k", "v", "q_weight", "k_weight", "positions", "cos_sin", "slots",
                "k_cache", "v_cache", "k_scale", "v_scale"),
        outputs=("q_out", "k_out", "v_out", "k_cache_out", "v_cache_out", "k_scale_out", "v_scale_out"),
        grid=_grid(values + keys + queries),
        constants=tuple(constants),
        scalars=(("tokens", "i32", found[1].tokens), ("rows", "i32", problem.shape("cos_sin")[0]), ("slots", "i64", c.slots)),
        threads=deal.threads,
        shared=_rows_bytes(problem, c, tile or (_rows(problem, found[2], deal) if c.shuffled else 0)),
        aliases=aliases(problem),
    )  # fmt: skip


def _gather(problem: Problem) -> Launch:
    """Sixteen bytes of a result a thread."""
    c, d = cache(problem), problem.features
    size = ITEMSIZE[problem.dtype("k_out")]
    v = next(v for v in (16 // size, 4, 2, 1) if v <= 16 // size and d % v == 0 and c.x % v == 0)
    threads = problem.rows * c.heads * (d // v) * 2
    if problem.rows < 1:
        raise Unsupported("there are no slots to launch a kernel for.")
    return Launch(
        kernel=f"{SOURCE}:kv_cache_gather",
        inputs=("slots", "k_cache", "v_cache", "k_scale", "v_scale"),
        outputs=("k_out", "v_out"),
        grid=_grid(_ceil(threads, GATHER_THREADS)),
        constants=(*_cache_constants(problem, c), ("JN_V", v), ("JN_THREADS", GATHER_THREADS)),
        scalars=(("count", "i64", problem.rows), ("slots", "i64", c.slots)),
        threads=GATHER_THREADS,
    )
