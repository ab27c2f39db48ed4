"""The HIP kernels of the KV cache, unmodified, on the CPU in waves of 32 and 64, against the written definition and every byte."""

from __future__ import annotations

import functools

import needs
import numpy as np
import pytest
import simt_build
from cases_cache import FN, FNUZ, Case, bytes_of
from jaxnorm.kernels.configs import qk_cache_hip
from jaxnorm.kernels.configs._heads_hip import Deal

TARGETS = ("sm_90", "gfx942")
CASES = (
    Case("shuffled", "bfloat16", features=128, page=16),
    Case("shuffled", FN, "per_token", features=128, rotary=64, q_heads=8, kv_heads=1, packed=True, options={"weight_offset": 1.0}),
    Case("shuffled", "int8", "per_tensor", features=64, x_dtype="float16", page=48, index="int64", options={"style": "gptj"}),
    Case("shuffled", "float32", features=80, page=12, x_dtype="bfloat16", kv_heads=3, q_heads=5, weight_dtype=None),
    Case("shuffled", FNUZ, "per_token", features=96, rotary=32, x_dtype="float32", table_dtype="bfloat16", return_kv=False),
    Case("paged", "bfloat16", x_dtype="float32", features=192, q_heads=1, kv_heads=1, tokens=1, skip=0),
    Case("paged", "int8", "per_token", features=64, sections=(12, 10, 10), interleaved=True, packed=True),
    Case("paged", "float8_e5m2", "per_token", features=128, sections=(16, 24, 24), x_dtype="float16", weight_dtype="bfloat16"),
    Case("slots", FN, "per_tensor", features=256, rotary=64, kv_heads=1, packed=True),
    Case("slots", "float16", x_dtype="float16", features=6, rotary=2, options={"style": "gptj"}),
    Case("shuffled", "int8", "per_token", features=128, q_heads=0, x_dtype="bfloat16"),
)  # fmt: skip
# What the tiles of v meet: whole groups of slots, groups that start in the middle of one, and gaps; a last tile that is not full.
RUNS = tuple(
    Case("shuffled", dtype, quant, 41, 1, heads, features, pages=5, run=run, skip=skip, return_kv=kv)
    for dtype, quant, heads, features, run, skip, kv in (
        ("bfloat16", None, 2, 128, 16, 0, False), ("bfloat16", None, 3, 64, 3, 0, True), (FN, "per_token", 3, 128, 32, 2, True),
        ("int8", "per_token", 2, 64, 0, 0, False), ("int8", "per_tensor", 2, 128, 7, 5, False),
        ("float32", None, 3, 32, 4, 3, False),
    )
)  # fmt: skip


def on_targets(listed):
    """Each case in one size of wave by default, in both with the slow tests; the runs of tiles are enough in one."""
    return [
        pytest.param(c, t, marks=() if (i + j) % 2 == 0 else pytest.mark.slow, id=f"{c}-{t}")
        for i, c in enumerate(listed)
        for j, t in enumerate(TARGETS)
    ]


EACH, TILES = on_targets(CASES), on_targets(RUNS)


def plans(case: Case, target: str):
    """The plan, and for runs the tile that many tokens would get; of three heads a group takes two or one."""
    p = case.problem(case.arrays(), target)
    if case.run is None:
        return [qk_cache_hip.plan(p)]
    found, deal = qk_cache_hip._parts(p), Deal(unroll=2 if case.kv_heads == 3 else 1)
    tiles = [t for t in (16, 32, 64) if qk_cache_hip._fits(p, found, deal, t)]
    assert tiles
    return [(qk_cache_hip._write(p, found, deal, t),) for t in (tiles[0], 0)]


@functools.cache
def kernels(slow: bool) -> simt_build.Kernels:
    needs.need("gxx", not simt_build.missing(), simt_build.missing())
    wanted = [p.values for p in (*EACH, *TILES) if bool(p.marks) is slow]
    listed = [(t, plan) for c, t in wanted for plan in plans(c, t)]
    listed += [(t, qk_cache_hip.plan(gathers(c, t)[0])) for c, t in wanted if c.run is None]
    return simt_build.Kernels(listed)


def gathers(case: Case, target: str):
    slots = np.array([-1, 0, case.slots - 1, case.slots, 5, 5, *range(7, 20), -(2**31)]).astype(case.index)
    arrays = case.arrays()
    return case.gather_problem(arrays, slots, target), arrays, slots


@pytest.mark.parametrize(("case", "target"), EACH)
def test_against_the_oracle(case, target, request):
    run = kernels(request.node.get_closest_marker("slow") is not None).run
    arrays = case.arrays()
    p = case.problem(arrays, target)
    (plan,) = plans(case, target)
    got = case.renamed(run(p, plan, case.operands(arrays), "shuffled"), arrays)
    case.check(arrays, got, target)
    p, arrays, slots = gathers(case, target)
    found = run(p, qk_cache_hip.plan(p), {"slots": slots} | case.buffers(arrays))
    for n, want in zip("kv", case.gathered(arrays, slots.astype(np.int64)), strict=True):
        same = bytes_of(found[f"{n}_out"]) == bytes_of(want)
        nan = np.isnan(want.astype(np.float32)).repeat(want.itemsize).reshape(-1)
        assert (same | nan).all(), f"{target} {case} gather {n}: {(~same).sum()} bytes differ"


@pytest.mark.parametrize(("case", "target"), TILES)
def test_tiles_of_v_write_what_single_heads_write(case, target, request):
    run = kernels(request.node.get_closest_marker("slow") is not None).run
    arrays = case.arrays()
    p = case.problem(arrays, target)
    tiled, single = (
        case.renamed(run(p, plan, case.operands(arrays), order), arrays)
        for plan, order in zip(plans(case, target), ("shuffled", "reverse"), strict=True)
    )
    for name, a in single.items():
        np.testing.assert_array_equal(bytes_of(tiled[name]), bytes_of(a), name)
    if "k" in single:
        case.check(arrays, single, target)


def test_far_slots():
    """A slot that is in the cache in its lower 32 bits alone is not in the cache."""
    case = CASES[2]
    arrays = case.arrays()
    arrays["slots"][:3] = (2**32 + 1, -(2**32) + 2, 2**40)
    p = case.problem(arrays, "sm_90")
    got = case.renamed(kernels(False).run(p, qk_cache_hip.plan(p), case.operands(arrays)), arrays)
    case.check(arrays, got)
