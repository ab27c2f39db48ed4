"""The quantising HIP kernels, unmodified, on the CPU in waves of 32 and 64, against codes and scales by the written definition.

``quantize_fwd`` has no sum in it: its codes, scales and layouts must be equal to the last bit. Behind a norm a code may differ by
one where the float32 sum rounds otherwise than float64.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from dataclasses import replace

import cases
import ml_dtypes
import needs
import numpy as np
import oracle
import pytest
import simt_build
import tolerances
from hip_quant_cases import (
    E4,
    E4Z,
    E5,
    E5Z,
    TOP,
    Case,
    exponents,
    laid_out,
    mx,
    packed,
    padded,
    plain,
    q,
    quantised,
    steps,
    unpacked,
)  # fmt: skip
from jaxnorm.kernels.configs import Launch, Problem, Unsupported, quant_hip, rmsnorm_hip

BF16, F16, F32 = cases.FLOATS
TARGETS = ("sm_90", "gfx942")


PLAIN = [
    plain(64, q("int8"), rows=9), plain(769, q(E4), rows=3), plain(4096, q(E4Z), rows=2), plain(5125, q("int8"), rows=2, x=F32),
    plain(1000, q(E5), rows=4, x=F16, smooth=F32), plain(384, q(E5Z), rows=4, pad=256),
    plain(1, q("int8"), rows=70), plain(33, mx("fp4"), rows=3, pad=32), plain(1, mx("fp4"), rows=5, pad=32),
    plain(66, mx("fp4"), rows=3, pad=32, x=F32), plain(1024, mx("fp4", "shuffled"), rows=5),
    plain(2048, mx("fp4", "column"), rows=3, x=F32),
    plain(5120, q(E4, 128, scale_layout="column"), rows=3), plain(6144, mx(E4Z, "row", "down"), rows=2),
    plain(2880, mx(E4, "shuffled", "even"), rows=33, pad=256), plain(2880, q("int8", 64), rows=2, pad=256, x=F32),
    plain(16, q(E4, 16), rows=40), plain(16, q(E4, 128), rows=5, pad=256), plain(97, q(E5, 32), rows=3, pad=128),
    plain(1024, q(E4, 512), rows=3), plain(8192, q("int8", 1024, scale_layout="column"), rows=2),
    plain(5000, q(E4, 2048), rows=2, pad=2048),
    plain(97, q("int8", 128), rows=3, pad=256, x=F16), plain(3001, q(E4Z, 1024), rows=2, pad=1024, x=F32, smooth=BF16),
    plain(1024, mx(E5, "shuffled"), rows=64), plain(256, mx(E5Z, "row", "up", 64), rows=9), plain(65536, q(E4, 128), rows=1),
    plain(131072, q("int8"), rows=1), plain(131072, mx("fp4", "shuffled"), rows=1, x=F32), plain(131072, q(E4, 4096), rows=1),
    plain(512, q(E4, scale_ub=1.5), rows=6), plain(512, q("int8", 128, scale_ub=0.7), rows=6),
    plain(640, q(E4), rows=4, static=0.01),
    plain(640, q("int8"), rows=4, static=0.02), plain(640, q(E5Z), rows=4, static=1e-36), plain(48, q(E4, 48), rows=3),
    plain(130, q(E5), rows=4, static=0.3, smooth=F32), plain(1024, q(E4Z), rows=300, static=0.02),
]  # fmt: skip
NORM = [
    Case(64, q(E4), rows=9), Case(769, q("int8"), rows=3, residual=BF16, options={"weight_offset": 1.0}),
    Case(4096, q(E4, 128), rows=2, residual=BF16), Case(4096, q("int8"), rows=3, smooth=F32, keep=BF16),
    Case(5120, q(E4Z, 128, scale_layout="column"), rows=3, residual=F32, keep=F32),
    Case(2880, mx("fp4", "shuffled"), rows=3, pad=256, residual=BF16, keep=BF16),
    Case(1024, mx(E4), rows=40, x=F16, weight=F32, options={"cast": "before_weight", "weight_offset": 1.0}),
    Case(8192, q(E4), rows=2, residual=BF16, options={"residual_rounding": "input", "cast": "before_weight"}),
    Case(1000, q(E5, scale_ub=2.0), rows=4, x=F32, weight=None, keep=F16),
    Case(640, q("int8"), rows=5, static=0.02, residual=F16, x=F16),
    Case(65536, q(E4), rows=1, residual=BF16), Case(131072, q("int8", 128), rows=1, weight=F32),
    Case(131072, q(E4, 8192), rows=1, residual=BF16, smooth=BF16), Case(31, mx("fp4"), rows=4, pad=32, x=F32, residual=BF16),
]  # fmt: skip


def on_targets(listed: list[Case]) -> list[Case]:
    return [replace(c, target=t) for c in listed for t in TARGETS]


# One row with each way of keeping it: all must give the same bytes.
TIERS = [Case(4096, spec, rows=2, residual=BF16, smooth=BF16) for spec in (q(E4), q("int8", 128), q(E4, 1024))]
SHAPES = {
    32: [
        {"lanes": 32, "groups": 2, "regs": 16},
        {"lanes": 512, "early": True},
        {"lanes": 96, "regs": 2, "shared": 2},
        {"lanes": 64, "regs": 1, "shared": 5},
        {"lanes": 160, "regs": 1},
    ],
    64: [
        {"lanes": 64, "groups": 2, "regs": 8},
        {"lanes": 512},
        {"lanes": 128, "regs": 1, "shared": 2},
        {"lanes": 192, "regs": 3, "early": True},
    ],
}
SHORT = Case(128, mx("fp4"), rows=37, residual=BF16)
SHORT_SHAPES = [
    {"lanes": 16, "groups": 8},
    {"lanes": 4, "groups": 16, "unroll": 2, "regs": 4},
    {"lanes": 2, "groups": 32, "unroll": 4, "regs": 8, "early": True},
]


# Blocks that walk over the rows with rows ahead in shared memory: 11 or 70 rows on a few blocks.
WALKS = [
    (Case(4096, q(E4), rows=11), {"lanes": 128, "regs": 4, "depth": 2, "blocks": 3}),
    (Case(4096, q("int8", 128), rows=11), {"lanes": 128, "regs": 4, "depth": 3, "blocks": 2}),
    (Case(4096, q(E4, 1024), rows=11, residual=BF16), {"lanes": 128, "regs": 4, "depth": 2, "blocks": 2}),
    (Case(4096, q("int8"), rows=11, static=0.02), {"lanes": 256, "regs": 2, "depth": 1, "blocks": 2, "early": True}),
    (Case(2880, mx("fp4", "shuffled"), rows=70, pad=256), {"lanes": 128, "regs": 3, "depth": 2, "blocks": 4}),
    (Case(1024, mx(E4, "shuffled"), rows=70), {"lanes": 64, "regs": 2, "depth": 2, "blocks": 4}),
    (Case(512, q(E4), rows=70), {"lanes": 32, "groups": 4, "regs": 2, "depth": 2, "blocks": 3}),
    (plain(1024, mx("fp4", "column"), rows=70), {"lanes": 32, "groups": 4, "regs": 4, "depth": 2, "blocks": 3}),
    (plain(1024, q("int8"), rows=3), {"lanes": 32, "groups": 4, "regs": 4, "depth": 2, "blocks": 2}),
]


def forced(case: Case, **changes) -> tuple[Launch, ...]:
    kind = quant_hip.Ahead if "depth" in changes else rmsnorm_hip.Forward
    return (quant_hip._launch(case.problem(), kind(**changes)),)


def tier_cases() -> list[tuple[Case, dict]]:
    found = [
        (replace(c, target=t), s) for c in TIERS for t, w in zip(TARGETS, (32, 64), strict=True) for s in SHAPES[w]
    ]
    return found + [(replace(SHORT, target=t), s) for t in TARGETS for s in SHORT_SHAPES]


EDGES = [plain(256, q(k), rows=40, x=F32) for k in TOP if k != "fp4"]
EDGES += [plain(256, mx(k, rounding=r), rows=40, x=F32) for k in TOP if k != "int8" for r in ("up", "down", "even")]
EDGES += [plain(256, q(k), rows=40, x=F32, static=s) for k in ("int8", E4, E5Z) for s in (1.0, 2.0**-120)]
ISOLATED = [
    plain(256, q(E4), rows=8),
    plain(256, q("int8", 32), rows=8),
    plain(4096, q(E4, 1024), rows=8),
    plain(256, mx("fp4"), rows=8),
]

MANY = [Case(4096, spec, rows=48) for spec in (q("int8"), q(E4, 128))]


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    listed = on_targets(PLAIN + NORM + ISOLATED) + EDGES + MANY
    plans = [(c.target, quant_hip.plan(c.problem())) for c in listed]
    plans += [(c.target, forced(c, **s)) for c, s in tier_cases() + WALKS]
    plans += [(c.target, quant_hip.plan(c.problem())) for c, _ in WALKS]
    return simt_build.Kernels(plans)


def run(kernels, case: Case, operands=None, plan=None, order: str = "forward") -> dict[str, np.ndarray]:
    p = case.problem()
    return kernels.run(p, plan or quant_hip.plan(p), operands or case.operands(), order)


def same_or_nan(got: np.ndarray, want: np.ndarray, kind: str) -> np.ndarray:
    """Equal codes; NaN has several in some formats."""
    if kind in ("int8", "fp4"):
        return got == want
    type_ = getattr(ml_dtypes, kind)
    return (got == want) | (
        np.isnan(got.view(type_).astype(np.float32)) & np.isnan(want.view(type_).astype(np.float32))
    )


@pytest.mark.parametrize("case", on_targets(PLAIN), ids=str)
def test_quantize(kernels, case: Case) -> None:
    operands = case.operands()
    out = run(kernels, case, operands, order=("forward", "reverse", "shuffled")[case.features % 3])
    z = operands["x"].astype(np.float32)
    if case.smooth:
        z = z * operands["smooth_scale"].astype(np.float32)
    codes, scale, _ = quantised(padded(z, case), case)
    np.testing.assert_array_equal(out["values"].view(np.uint8), packed(codes, case.spec))
    if scale is not None:
        np.testing.assert_array_equal(out["scale"].view(np.uint8), laid_out(scale, case).view(np.uint8))


@pytest.mark.parametrize("case", on_targets(NORM), ids=str)
def test_rmsnorm_quant(kernels, case: Case) -> None:
    operands, s = case.operands(), case.settings()
    out = run(kernels, case, operands, order="shuffled")
    x, residual, weight = operands["x"], operands.get("residual"), operands.get("weight")
    shared = {k: s[k] for k in ("eps", "weight_offset", "cast")} | {
        "out_dtype": case.keep or F32,
        "pad_to_multiple": case.pad,
    }
    if residual is None:
        want = oracle.rmsnorm(x, weight, **shared)
    else:
        want = oracle.add_rmsnorm(x, residual, weight, residual_rounding=s["residual_rounding"], **shared)
        tolerances.assert_same_bits(out["residual_out"], want.residual_out, "residual_out")
    if case.keep:
        tolerances.assert_y(out["y"], want, s["cast"])
    # the oracle's y may have been padded and rounded; quantisation starts from the exact one
    z = y64(case, operands)
    if case.smooth:
        z = z * operands["smooth_scale"].astype(np.float64)
    compare(case, out, padded(z, case))


def y64(case: Case, operands: dict) -> np.ndarray:
    s = case.settings()
    n = operands["x"].astype(np.float64)
    if "residual" in operands:
        total = operands["x"].astype(np.float32) + operands["residual"].astype(np.float32)
        rounded = total.astype(cases.dtype(case.residual)).astype(np.float32)
        n = (rounded if s["residual_rounding"] == "input" else total).astype(np.float64)
    y = n / np.sqrt((n * n).mean(-1, keepdims=True) + s["eps"])
    if s["cast"] == "before_weight":
        y = y.astype(np.float32).astype(cases.dtype(case.x)).astype(np.float64)
    return y * (operands["weight"].astype(np.float64) + s["weight_offset"]) if "weight" in operands else y


def compare(case: Case, out: dict, z: np.ndarray) -> None:
    """Codes and scales within the tolerances of float32 sums, section 1.7."""
    spec = case.spec
    codes, scale, a = quantised(z.astype(np.float32), case)
    differ = np.abs(steps(unpacked(out["values"], spec), spec.dtype) - steps(codes, spec.dtype))
    if scale is not None and spec.scale_dtype == "e8m0":
        low, high = (exponents((a * (1 + d)).astype(np.float32), spec) for d in (-(2.0**-20), 2.0**-20))
        assert ((out["scale"] == laid_out(low, case)) | (out["scale"] == laid_out(high, case))).all()
        differ = np.where(np.repeat(low != high, z.shape[1] // case.groups, axis=1), 0, differ)  # another power of two
    elif scale is not None:
        np.testing.assert_allclose(out["scale"], laid_out(scale, case), rtol=2.0**-20)
    assert differ.max() <= 1
    assert (differ > 0).sum() <= differ.size / 1000 + 2


@pytest.mark.parametrize("case", MANY, ids=str)
def test_codes_that_differ_are_few(kernels, case: Case) -> None:
    """Rounding the row sum moves one code in some ten thousand; a rounding step too many between norm and code moves more."""
    operands = case.operands()
    out = run(kernels, case, operands)
    codes, _, _ = quantised(y64(case, operands).astype(np.float32), case)
    assert (unpacked(out["values"], case.spec) != codes).sum() <= codes.size / 4000


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_ties_zeros_and_tiny_rows(kernels, case: Case) -> None:
    """Every half step of the format at several scales, zeros of both signs, rows below the smallest scale, saturation, NaN."""
    kind, n = case.spec.dtype, case.features
    count = 16 if kind == "fp4" else 256
    if kind == "int8":
        values = np.arange(-127, 128).astype(np.float32)
    else:
        type_ = ml_dtypes.float4_e2m1fn if kind == "fp4" else getattr(ml_dtypes, kind)
        values = np.arange(count, dtype=np.uint8).view(type_).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    ties = np.concatenate(
        [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf)), values]
    )
    g = cases.rng(3)
    x = np.empty((case.rows, n), np.float32)
    for row in range(case.rows):
        picked = g.choice(ties, n)
        picked[:: case.spec.group_size or n] = TOP[kind]
        x[row] = picked * 2.0 ** (row - 20 if row < 30 else 0)
    x[30], x[31, ::2], x[31, 1::2] = 0, -0.0, 0
    x[32], x[33] = 1e-40, 1e-44
    x[34] = g.choice(ties, n) * np.float32(2.0**-115)
    x[35] = g.uniform(-3e38, 3e38, n)
    x[36] = g.normal(size=n).astype(np.float32) * np.float32(2.0**-124)
    x[37, : n // 2] = -1e-30
    if case.static is not None:
        x[38, 5], x[38, 6], x[38, 7] = np.nan, np.inf, -np.inf
    out = run(kernels, case, case.operands() | {"x": x})
    codes, scale, _ = quantised(x, case)
    got, want = unpacked(out["values"], case.spec), codes
    same = same_or_nan(got, want, kind)
    assert same.all(), [(x[i], got[i], want[i]) for i in zip(*np.nonzero(~same), strict=True)][:5]
    if scale is not None:
        np.testing.assert_array_equal(out["scale"].view(np.uint8), laid_out(scale, case).view(np.uint8))
    if kind == "int8":
        assert (out["values"].view(np.int8) != -128).all()


@pytest.mark.parametrize("case", on_targets(ISOLATED), ids=str)
def test_nan_stays_in_its_row_or_group(kernels, case: Case) -> None:
    operands = case.operands()
    x = operands["x"].copy()
    x[2, 40], x[5, 7] = np.nan, np.inf
    spoiled = run(kernels, case, operands | {"x": x})
    clean = run(kernels, case, operands)
    group = case.spec.group_size or case.features
    bad = {(2, 40 // group), (5, 7 // group)}
    for m, j in np.ndindex(case.rows, case.groups):
        a, b = spoiled["scale"][m, j], clean["scale"][m, j]
        if (m, j) not in bad:
            assert a == b
            span = slice(j * group, (j + 1) * group)
            codes = [unpacked(o["values"], case.spec)[m, span] for o in (spoiled, clean)]
            np.testing.assert_array_equal(*codes)
        elif case.spec.scale_dtype == "e8m0":
            assert a == 255
        else:
            assert np.isnan(a) if m == 2 else np.isinf(a)
    if case.spec.dtype == E4:
        assert np.isnan(spoiled["values"][2, 40].astype(np.float32))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [*TIERS, SHORT], ids=str)
def test_every_plan_has_the_same_bits(kernels, case: Case, target: str) -> None:
    case = replace(case, target=target)
    shapes = [s for c, s in tier_cases() if c == case]
    assert len(shapes) > 2
    results = [run(kernels, case, plan=forced(case, **s), order="reverse") for s in shapes]
    for shape, other in zip(shapes[1:], results[1:], strict=True):
        for name, value in results[0].items():
            tolerances.assert_same_bits(other[name], value, f"{name} of {shape}")


@pytest.mark.parametrize(("case", "shape"), WALKS, ids=str)
def test_walking_blocks_have_the_same_bits(kernels, case: Case, shape: dict) -> None:
    operands = case.operands()
    plain_result = run(kernels, case, operands)
    for order in ("forward", "shuffled"):
        for name, value in run(kernels, case, operands, forced(case, **shape), order).items():
            tolerances.assert_same_bits(value, plain_result[name], name)


def test_sums_are_those_of_rmsnorm() -> None:
    """The constants that the order of a sum depends on (reduce.h) are those of rmsnorm_fwd, for every M."""
    for features, pad in ((128, 1), (5120, 1), (2880, 256), (769, 1), (65536, 1)):
        for x, weight in ((BF16, BF16), (F32, BF16), (F32, F32)):
            for target in TARGETS:
                chunks = set()
                for rows in (1, 16, 8192, 1 << 31):
                    case = Case(features, q(E4), rows=rows, x=x, weight=weight, pad=pad, target=target)
                    (launch,) = quant_hip.plan(case.problem())
                    constants = dict(launch.constants)
                    chunks.add(constants["JN_V"])
                    covered = launch.grid[0] * launch.grid[1] * constants["JN_GROUPS"] * constants["JN_UNROLL"]
                    assert covered >= rows or constants["JN_DEPTH"]
                    assert launch.threads <= 1024
                shapes = (("x", (8, features)), ("weight", (features,)), ("y", (8, case.padded)))
                same = Problem("rmsnorm_fwd", 8, features, shapes, (("x", x), ("weight", weight), ("y", x)), (), target)
                assert chunks == {rmsnorm_hip.vector(same)}


def test_groups_that_no_kernel_takes() -> None:
    for group in (8, 24, 48):
        with pytest.raises(Unsupported, match=f"group_size={group} of 96"):
            quant_hip.plan(plain(96, q(E4, group)).problem())
    with pytest.raises(Unsupported, match="no rows"):
        quant_hip.plan(plain(96, q(E4), rows=0).problem())
    with pytest.raises(Unsupported, match="no stage"):
        quant_hip.plan(replace(plain(96, q(E4)).problem(), stage="rmsnorm_fwd"))


DIVISION = r"""
#define JN_SIMT 1
#define JN_WAVE 32
#include "simt.h"
#include "jaxnorm/scale.h"
// For each divisor Y of 24 bits: the dividends whose quotient lies next to the middle of two floats. There alone can a
// correction step go wrong; a quotient farther than `reach` units from a middle is beyond the error of the step.
extern "C" long check(long from, long to, int reach, int stride) {
  using namespace jaxnorm;
  long tried = 0;
  for (long y = from; y < to; y += stride) {
    const float s = float(y) * 0x1p-23f, r = 1.f / s;
    int twos = 0;
    long odd = y;
    while (odd % 2 == 0) odd /= 2, ++twos;
    unsigned inverse = unsigned(odd);  // modulo 2^32, by Newton's iteration
    for (int i = 0; i < 5; ++i) inverse *= 2 - unsigned(odd) * inverse;
    for (int below = 0; below < 2; ++below) {  // quotients in (1/2, 1) and [1, 2)
      const int bits = below ? 25 : 24;
      for (int k = -reach; k <= reach; ++k) {
        if (k % (1 << (twos > 8 ? 8 : twos))) continue;
        if (twos > 8 && k % (1L << twos)) continue;
        // M * y + k = X * 2^bits, M odd of 25 bits: the middle is M / 2^25 or M / 2^24
        const unsigned modulus = bits > twos ? 1u << (bits - twos) : 1u;
        const unsigned start = (unsigned(-(k / (1L << twos))) * inverse) & (modulus - 1);
        for (unsigned long m = start; m < (1ul << 25); m += modulus) {
          if (m < (1ul << 24) || m % 2 == 0) continue;
          const long x = (long(m) * y + k) >> bits;
          if (x < (1l << 23) || x >= (1l << 24)) continue;
          const float z = float(x) * 0x1p-23f;
          ++tried;
          if (f32_bits(quotient(z, s, r)) != f32_bits(z / s)) return -tried;
        }
      }
    }
  }
  return tried;
}
"""


@functools.cache
def division_library(folder: str) -> ctypes.CDLL:
    source, out = f"{folder}/division.cc", f"{folder}/division.so"
    with open(source, "w") as f:
        f.write(DIVISION)
    include = [f"-I{simt_build.HERE}", f"-I{simt_build.csrc_dir() / 'include'}"]
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
    subprocess.run(["g++", *options, *include, source, "-o", out], check=True)
    library = ctypes.CDLL(out)
    library.check.restype = ctypes.c_long
    library.check.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return library


def test_quotient_is_the_ieee_quotient(tmp_path) -> None:
    """Two fused operations after a multiplication by a rounded reciprocal give the rounded quotient.

    The error before the last rounding is below 8 units of 2^-48 of the quotient (csrc/include/jaxnorm/scale.h), so only quotients
    that near to a middle of two floats matter; there are a few for each divisor, and number theory finds them. A sample of the
    divisors here; all 2^23 have been tried.
    """
    needs.need("gxx", not (why := simt_build.missing()), why)
    library = division_library(str(tmp_path))
    tried = library.check(1 << 23, 1 << 24, 8, 7)
    assert tried > 1e6, tried
