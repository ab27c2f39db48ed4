"""Machine code of the KV cache's kernels for four AMD targets and sm_90: access widths, conversions, registers.

What is asserted here is compiled and inspected; nothing of it has run on AMD silicon."""

from __future__ import annotations

import isa
import pytest
from cases_cache import FN, FNUZ, Case
from jaxnorm.kernels.configs import qk_cache_hip, qk_cache_triton, wave_size
from test_hip_compile import TARGETS, assert_no_spills, machine_code, need_compiler

pytestmark = pytest.mark.compile

LARGE = {"tokens": 4200, "q_heads": 8, "kv_heads": 8, "features": 128, "pages": 66, "page": 64, "weight_dtype": "bfloat16",
         "return_kv": False, "packed": True}  # fmt: skip
CONVERT = {
    "gfx942": (FNUZ, "v_cvt_pk_fp8_f32"),
    "gfx950": (FN, "v_cvt_pk_fp8_f32"),
    "sm_90": (FN, "F2FP.SATFINITE.E4M3"),
}


def built(case, target):
    need_compiler(target)
    p = case.problem(case.arrays(), target)
    (launch,) = qk_cache_hip.plan(p)
    text = machine_code(launch, p)
    assert_no_spills(text, launch, target)
    return text, isa.counts(text, target), launch


@pytest.mark.parametrize("target", TARGETS)
def test_prompts(target):
    """Shuffled: k in pieces, v turned over in shared memory, both in 16-byte accesses of the cache; what is narrow is v where its
    tokens have no group of slots of their own, and scales, slots and positions."""
    dtype, instruction = CONVERT.get(target, (FN, None))
    text, counts, launch = built(Case("shuffled", dtype, "per_token", **LARGE), target)
    assert dict(launch.constants)["JN_TILE"] == 32 and launch.shared > 0
    assert counts["load16"] >= 8 and counts["store16"] >= 5 and counts["store8"] >= 2
    assert counts["load1"] + counts["load2"] == 0, counts
    assert counts["store1"] <= 16 and counts["store2"] == 0, counts
    assert counts["barriers"] == 1 and counts["atomics"] == 0
    assert instruction is None or instruction in text
    text, counts, _ = built(Case("paged", "bfloat16", **LARGE), target)
    assert counts["store16"] >= 6 and sum(counts[f"store{n}"] for n in (1, 2, 4, 8)) == 0, counts
    assert counts["barriers"] == 0


def test_where_v_is_turned_over():
    """Threads of a block and tokens of a tile, by tokens: as measured for 64 + 8 heads on an H200."""
    found = {}
    for tokens in (16, 128, 256):
        case = Case("shuffled", FN, "per_token", **(LARGE | {"tokens": tokens, "q_heads": 64}))
        (launch,) = qk_cache_hip.plan(case.problem(case.arrays(), "sm_90"))
        found[tokens] = launch.threads, dict(launch.constants)["JN_TILE"]
    assert found == {16: (128, 0), 128: (64, 0), 256: (128, 16)}


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "gfx1100"])
def test_a_decode(target):
    _, counts, launch = built(Case("shuffled", "int8", "per_token", **(LARGE | {"tokens": 16})), target)
    several = launch.threads > wave_size(target)  # a wave waits for itself without a barrier
    assert counts["barriers"] == int(several), "v goes through shared memory once"
    _, counts, launch = built(Case("paged", "int8", "per_token", **(LARGE | {"tokens": 16})), target)
    assert launch.shared == 0 and counts["barriers"] == 0 and counts["store1"] + counts["store2"] == 0
    assert counts["load1"] + counts["load2"] == 0, counts


@pytest.mark.parametrize(
    "target", ["sm_90", "gfx942", "gfx1100", *(pytest.param(t, marks=pytest.mark.slow) for t in ("gfx90a", "gfx950"))]
)
def test_triton(target, tmp_path):
    pytest.importorskip("triton", reason="needs triton: not installed")
    from jaxnorm._compile import triton as compiler

    for case in (Case("shuffled", FN, "per_token", **LARGE), Case("paged", "bfloat16", **LARGE)):
        p = case.problem(case.arrays(), target)
        (launch,) = qk_cache_triton.plan(p)
        code = compiler.compile(launch, p)
        counts = isa.counts(code.asm, target)
        assert counts["scratch"] == counts["atomics"] == 0
        assert counts["load16"] >= 6 and counts["store16"] >= 4, counts
        assert counts["load1"] + counts["load2"] == 0, counts
        if target.startswith("gfx"):
            (stats,) = isa.stats_amd(code.asm).values()
            assert stats["scratch"] == stats["spills"] == 0
        else:
            cubin = tmp_path / "k.cubin"
            cubin.write_bytes(code.image)
            (stats,) = isa.resources(cubin).values()
            assert stats["stack"] == stats["local"] == 0
