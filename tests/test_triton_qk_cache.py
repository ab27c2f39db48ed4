"""The Triton kernels of the KV cache in Triton's interpreter, against the written definition and every byte."""

from __future__ import annotations

import numpy as np
import pytest
from cases_cache import FN, FNUZ, Case, bytes_of

pytest.importorskip("triton", reason="needs triton: not installed")

import interpreter
from jaxnorm.kernels.configs import qk_cache_triton
from jaxnorm.kernels.configs._heads_triton import Tile

CASES = (
    Case("shuffled", "bfloat16", features=64),
    Case("shuffled", FN, "per_token", features=64, q_heads=6, kv_heads=3, packed=True, options={"weight_offset": 1.0}),
    Case("shuffled", "int8", "per_tensor", features=64, x_dtype="float16", page=48, index="int64", options={"style": "gptj"}),
    Case("shuffled", "float32", features=40, page=12, x_dtype="bfloat16", kv_heads=3, q_heads=5, weight_dtype=None, tokens=5),
    Case("shuffled", FNUZ, "per_token", features=96, rotary=32, x_dtype="float32", table_dtype="bfloat16", return_kv=False),
    Case("paged", "bfloat16", x_dtype="float32", features=64, q_heads=1, kv_heads=1, tokens=1, skip=0),
    Case("paged", "int8", "per_token", features=32, sections=(6, 5, 5), interleaved=True, packed=True),
    Case("paged", "float8_e5m2", "per_token", features=64, sections=(8, 12, 12), x_dtype="float16", weight_dtype="bfloat16"),
    Case("slots", FN, "per_tensor", features=64, rotary=16, kv_heads=1, packed=True),
    Case("slots", "float16", x_dtype="float16", features=6, rotary=2, options={"style": "gptj"}),
    Case("shuffled", "int8", "per_token", features=32, q_heads=0),
)  # fmt: skip


def run(case, arrays, plan=qk_cache_triton.plan):
    p = case.problem(arrays, "sm_90")
    launches = plan(p)
    aliases = {b: a for launch in launches for a, b in launch.aliases}
    return case.renamed(interpreter.run(launches, p, case.operands(arrays), aliases), arrays)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case):
    arrays = case.arrays()
    got = run(case, arrays)
    case.check(arrays, got, exact=False)
    slots = np.array([-1, 0, case.slots - 1, case.slots, *range(7, 12), -(2**31)]).astype(case.index)
    p = case.gather_problem(arrays, slots)
    found = interpreter.run(qk_cache_triton.plan(p), p, {"slots": slots} | case.buffers(arrays))
    for n, want in zip("kv", case.gathered(arrays, slots.astype(np.int64)), strict=True):
        same = bytes_of(found[f"{n}_out"]) == bytes_of(want)
        nan = np.isnan(want.astype(np.float32)).repeat(want.itemsize).reshape(-1)
        assert (same | nan).all(), f"{case} gather {n}: {(~same).sum()} bytes differ"


def test_tiles_give_the_same_bits():
    case = CASES[1]
    arrays = case.arrays()
    want = run(case, arrays)
    for tile in (Tile(1), Tile(16)):
        got = run(case, arrays, lambda p, t=tile: (qk_cache_triton._write(p, qk_cache_triton._parts(p), t),))
        for n, a in want.items():
            np.testing.assert_array_equal(bytes_of(got[n]), bytes_of(a), n)
