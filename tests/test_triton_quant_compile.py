"""Machine code of the quantising Triton kernels for every target, without a GPU: conversions, access widths, registers.

What is asserted here is compiled and inspected; nothing of it has run on AMD silicon."""

from __future__ import annotations

import re

import isa
import oracle_quant as oq
import pytest

pytest.importorskip("triton", reason="needs triton: not installed")

from jaxnorm.kernels.configs import Problem, quant_triton, shared_memory, wave_size

from jaxnorm import QuantSpec
from jaxnorm._compile import triton as compiler

pytestmark = pytest.mark.compile

BF16, F16, F32 = "bfloat16", "float16", "float32"
E4M3 = "float8_e4m3fn"
MX = {"group_size": 32, "scale_dtype": "e8m0"}
ROWS = 4096
TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "sm_90")
CONVERT = re.compile(r"cvt\.rn\.satfinite\.e[45]m[32]x2\.f32|v_cvt_(?:scalef32_)?pk_(?:fp8|bf8)_f32")
NATIVE = {
    "sm_90": (E4M3, "float8_e5m2"), "gfx942": ("float8_e4m3fnuz", "float8_e5m2fnuz"), "gfx950": (E4M3, "float8_e5m2"),
    "gfx90a": (), "gfx1100": (), "sm_80": (), "sm_89": (),
}  # fmt: skip


def problem(target, features, dtype, spec=None, x=BF16, residual=BF16, weight=BF16, smooth=None, static=False, y=None, padded=None,
            alone=False, cast="output", rounding="float32") -> Problem:  # fmt: skip
    s, width, shape = QuantSpec(dtype, **(spec or {})), padded or features, (ROWS, features)
    groups = s.groups(width)
    scales = {"row": (ROWS, groups), "column": (groups, ROWS), "shuffled": (ROWS, -(-groups // 8) * 8)}[s.scale_layout]
    residual, weight = (None, None) if alone else (residual, weight)
    buffers = [
        ("x", shape, x), ("residual", shape, residual), ("weight", (features,), weight), ("smooth_scale", (features,), smooth),
        ("static_scale", (), F32 if static else None),
        ("values", (ROWS, width // 2) if dtype == "fp4" else (ROWS, width), "uint8" if dtype == "fp4" else dtype),
        ("scale", scales, None if static else "uint8" if s.scale_dtype == "e8m0" else F32),
        ("residual_out", shape, residual), ("y", (ROWS, width), y),
    ]  # fmt: skip
    there = [b for b in buffers if b[2]]
    options = (("eps", 1e-6), ("weight_offset", 0.0), ("cast", cast), ("residual_rounding", rounding), ("spec", s))
    return Problem("quantize_fwd" if alone else "rmsnorm_quant_fwd", ROWS, features, tuple((n, s) for n, s, _ in there),
                   tuple((n, d) for n, _, d in there), options, target)  # fmt: skip


def check(p: Problem, tmp_path):
    """One launch; no scratch, no spills, wide accesses of rows of whole 16 bytes; returns the code object."""
    (launch,) = quant_triton.plan(p)
    code = compiler.compile(launch, p)
    counts = isa.counts(code.asm, p.target)
    assert counts["scratch"] == counts["atomics"] == 0
    assert code.shared <= min(64 << 10, shared_memory(p.target))
    assert code.threads == launch.num_warps * wave_size(p.target) <= 1024
    if p.target.startswith("gfx"):
        (stats,) = isa.stats_amd(code.asm).values()
        assert stats["scratch"] == stats["spills"] == 0
    else:
        cubin = tmp_path / "k.cubin"
        cubin.write_bytes(code.image)
        (stats,) = isa.resources(cubin).values()
        assert stats["stack"] == stats["local"] == 0
    spec = p.option("spec")
    if p.features % 8 == 0:
        assert counts["load16"] > 0
        # fp4: eight elements of a lane are four bytes
        assert counts["store8"] > 0 or spec.dtype == "fp4"
        # a scale a row or a group is narrow, so is a static scale; nothing of a row is
        assert counts["store1"] + counts["store2"] <= 4
        assert counts["load1"] + counts["load2"] == 0
    return code


FORMATS = ("int8", *oq.FP8)


@pytest.mark.parametrize("target", [*TARGETS, "sm_80", "sm_89"])
def test_conversions_are_the_target_s_own_where_it_has_them(target, tmp_path):
    for dtype in FORMATS if target in ("sm_90", "gfx942", "gfx950") else (E4M3,):
        code = check(problem(target, 4096, dtype), tmp_path)
        found = len(CONVERT.findall(code.asm))
        # never by way of float16, which rounds twice
        assert not re.search(r"cvt\.\w+\.f16\.f32|satfinite\.e[45]m[32]x2\.f16x2|v_cvt_(?:f16|pkrtz)", code.asm)
        # two elements an instruction, on AMD one
        lane = 4096 // code.threads // (1 if target.startswith("gfx") else 2)
        assert found == (lane if dtype in NATIVE[target] else 0), f"{dtype} on {target}: {found}"


@pytest.mark.parametrize("target", TARGETS)
def test_templates(target, tmp_path):
    """Each template with one of the specs that stress it."""
    check(problem(target, 512, E4M3, {"group_size": 128}), tmp_path)
    check(problem(target, 8192, "fp4", MX | {"scale_layout": "shuffled"}), tmp_path)
    check(problem(target, 65536, "int8"), tmp_path)


# What combines, each option with several others; "spec" of a static scale is empty.
PAIRS = [
    {"dtype": "int8", "x": F32, "residual": BF16, "weight": F32, "smooth": F32, "y": F32},
    {
        "dtype": E4M3,
        "spec": {"group_size": 64, "scale_layout": "column"},
        "residual": F32,
        "y": BF16,
        "rounding": "input",
    },
    {"dtype": "fp4", "spec": MX, "x": F16, "residual": None, "smooth": BF16, "padded": True, "cast": "before_weight"},
    {"dtype": "float8_e4m3fnuz", "static": True, "x": BF16, "residual": F16, "weight": None, "y": F16},
    {"dtype": E4M3, "spec": MX | {"scale_layout": "shuffled", "e8m0_rounding": "even"}, "x": F32, "alone": True},
    {"dtype": "int8", "spec": {"group_size": 16, "scale_ub": 2.0}, "x": F16, "alone": True, "smooth": F16},
]


@pytest.mark.parametrize(("target", "features"), [("gfx942", 512), ("sm_90", 4096)])
def test_pairs(target, features, tmp_path):
    for options in PAIRS:
        p = problem(target, features, **{**options, "padded": features + 256 if options.get("padded") else None})
        check(p, tmp_path)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_the_longest_tile_does_not_spill(target, tmp_path):
    for x, spec in ((F32, {}), (BF16, {}), (BF16, {"group_size": 128})):
        check(problem(target, quant_triton.TILE, E4M3, spec, x=x, residual=x, weight=F32, smooth=F32), tmp_path)


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "gfx1100"])
def test_rows_that_waves_own_need_no_barrier(target, tmp_path):
    code = check(problem(target, 512, E4M3), tmp_path)
    assert code.shared == 0
    assert isa.counts(code.asm, target)["barriers"] == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_quotient_is_the_ieee_one(target):
    """The compiler's correctly rounded division where values may saturate; else fused corrections, four an element, and one
    division a row for the reciprocal. Never an approximate division."""
    for static in (True, False):
        p = problem(target, 4096, "int8", alone=True, static=static)
        code = compiler.compile(quant_triton.plan(p)[0], p)
        lane = 4096 // code.threads
        if target == "sm_90":
            assert not re.search(r"div\.full|div\.approx|rcp\.approx", code.asm)
            assert len(re.findall(r"div\.rn\.f32", code.asm)) == (lane if static else 2)
            assert static or len(re.findall(r"fma\.rn\.f32", code.asm)) >= 4 * lane
        else:
            assert len(re.findall("v_div_fixup_f32", code.asm)) == (lane if static else 2)
