"""Launches of the KV cache through Triton: the write with its norm and rotation, and the gather, one launch each.

A tile is chosen from heads, D, dtypes, options and target, never from the number of tokens. Programs of q, of k and of v stand
beside each other. Tiles follow from bytes on their way, registers and lanes; those of AMD targets were compiled and inspected, not
run on AMD silicon.
"""

from __future__ import annotations

from . import Launch, Problem, Unsupported, next_power_of_2, wave_size
from ._cache import READ, WRITE, Cache, aliases, cache, packed, parts
from ._heads import Part, gptj
from ._heads_triton import Tile, check, grid, pairs, position_constants, tile, tiles
from .quant_triton import FORMATS, Format, _hardware

STORED = {None: 0, "per_token": 1, "per_tensor": 2}
Constants = tuple[tuple[str, object], ...]


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launch that computes ``problem``.

    Raises:
      Unsupported: another stage, no tokens, or longer heads than the kernels take.
    """
    check(problem)
    if problem.stage == READ:
        return (_gather(problem),)
    found = _parts(problem)
    return (_write(problem, found, tile(problem, found, 64)),)


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tiles, the plan first; all give the same bits."""
    if problem.stage == READ:
        return [plan(problem)]
    found = _parts(problem)
    return list(dict.fromkeys([plan(problem), *((_write(problem, found, t),) for t in tiles(problem))]))


def _parts(problem: Problem) -> list[Part]:
    if problem.stage != WRITE:
        raise Unsupported(f"no Triton kernel for the stage {problem.stage}.")
    return parts(problem)


def _cache_constants(c: Cache) -> Constants:
    return (("PAGE", c.page), ("X", c.x), ("SHUFFLED", c.shuffled), ("STORED", STORED[c.quant]))


def _write(problem: Problem, found: list[Part], chosen: Tile) -> Launch:
    c, d = cache(problem), problem.features
    q, k, _ = found
    form = FORMATS[c.dtype] if c.quant else Format(0, 0, 1.0, 0)
    hard = _hardware(c.dtype, problem.target) if c.quant else ""
    couple, rest = pairs(problem, k.rotary)
    constants: list[tuple[str, object]] = [
        ("PACKED", packed(problem)),
        ("ROW", (q.heads + 2 * k.heads) * d),
        ("HAS_KV", problem.has("k_out")),
    ]
    for part, name in ((q, "Q"), (k, "K")):
        tokens, heads = chosen.of(part) if part.heads else (1, 1)
        constants += [(f"H{name}", part.heads), (f"TOKENS_{name}", tokens), (f"HEADS_{name}", heads)]
    constants += [
        ("D", d),
        ("GPTJ", gptj(problem)),
        ("HAS_WQ", problem.has("q_weight")),
        ("HAS_WK", problem.has("k_weight")),
        ("R", k.rotary),
        ("PAIRS", couple),
        ("REST", rest),
        ("PAIRS_V", next_power_of_2(d // 2)),
        *(entry for entry in position_constants(problem) if entry[0] != "PERIOD"),
        ("EPS", float(problem.option("eps"))),  # type: ignore[arg-type]
        ("WEIGHT_OFFSET", float(problem.option("weight_offset"))),  # type: ignore[arg-type]
        *_cache_constants(c),
        ("MAX", form.max),
        ("MANTISSA", form.mantissa),
        ("BIAS", form.bias),
        ("TOP", form.top),
        ("FNUZ", form.fnuz),
        ("HARD", hard),
        # What AMD's conversions make of a value an ulp above the largest nobody here could see.
        ("CLIP", bool(hard) and problem.target.startswith("gfx")),
    ]
    blocks_q, blocks_k = chosen.programs(q) if q.heads else 0, chosen.programs(k)
    return Launch(
        kernel="qk_cache:qk_norm_rope_cache",
        inputs=("qkv", "q", "k", "v", "q_weight", "k_weight", "positions", "cos_sin", "slots",
                "k_cache", "v_cache", "k_scale", "v_scale"),
        scalars=(("tokens", "i32", k.tokens), ("rows", "i32", problem.shape("cos_sin")[0]), ("all_slots", "i64", c.slots),
                 ("blocks_q", "i32", blocks_q), ("blocks_k", "i32", blocks_k)),
        outputs=("q_out", "k_out", "v_out", "k_cache_out", "v_cache_out", "k_scale_out", "v_scale_out"),
        grid=grid(blocks_q + 2 * blocks_k),
        constants=tuple(constants),
        num_warps=chosen.warps,
        aliases=aliases(problem),
    )  # fmt: skip


def _gather(problem: Problem) -> Launch:
    """A program of 128 threads holds 16 elements a thread of k and of v."""
    c, d = cache(problem), problem.features
    if problem.rows < 1:
        raise Unsupported("there are no slots to launch a kernel for.")
    if problem.rows * c.heads >= 1 << 31:
        raise Unsupported(f"{problem.rows} slots of {c.heads} heads; the kernels count up to {(1 << 31) - 1} heads.")
    form, width = FORMATS[c.dtype] if c.quant else Format(0, 0, 1.0, 0), next_power_of_2(d)
    rows = max(1, 2048 // width)
    return Launch(
        kernel="qk_cache:kv_cache_gather",
        inputs=("slots", "k_cache", "v_cache", "k_scale", "v_scale"),
        scalars=(("count", "i32", problem.rows), ("all_slots", "i64", c.slots)),
        outputs=("k_out", "v_out"),
        grid=grid(-(-problem.rows * c.heads // rows)),
        constants=(("HK", c.heads), ("D", d), ("PADDED", width), ("ROWS", rows), *_cache_constants(c),
                   ("MANTISSA", form.mantissa), ("BIAS", form.bias), ("FNUZ", form.fnuz)),
        num_warps=128 // wave_size(problem.target),
    )  # fmt: skip
