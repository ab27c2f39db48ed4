"""The quantising Triton kernels in Triton's interpreter, against the oracle of the contract. Every buffer lies between guards."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle_quant as oq
import pytest
import tolerances

pytest.importorskip("triton", reason="needs triton: not installed")

import interpreter
from jaxnorm.kernels.configs import Problem, Unsupported, quant_triton

from jaxnorm import QuantSpec

BF16, F16, F32 = "bfloat16", "float16", "float32"
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
MX = {"group_size": 32, "scale_dtype": "e8m0"}


def problem(case: oq.Case, arrays, target="sm_90", scale_rows=None) -> Problem:
    """The stage of a public call, as its lowering makes it."""
    spec, (rows, features) = case.spec, arrays["x"].shape
    norm = case.op != "quantize"
    width = case.options.get("pad_to_multiple") or features
    groups = spec.groups(width)
    shapes = {
        "row": (rows, groups),
        "column": (groups, rows),
        "shuffled": (scale_rows or -(-rows // 256) * 256, -(-groups // 8) * 8),
    }
    values = ((rows, width // 2), "uint8") if spec.dtype == "fp4" else ((rows, width), spec.dtype)
    results = [("values", *values)]
    if not case.static:
        results.append(("scale", shapes[spec.scale_layout], "uint8" if spec.scale_dtype == "e8m0" else F32))
    if "residual" in arrays:
        results.append(("residual_out", (rows, features), arrays["residual"].dtype.name))
    if case.keep:
        results.append(("y", (rows, width), case.options.get("out_dtype") or case.x_dtype))
    buffers = [*((k, a.shape, a.dtype.name) for k, a in arrays.items()), *results]
    options = {"eps": 1e-6, "weight_offset": 0.0, "cast": "output", "residual_rounding": "float32"} | case.options
    return Problem("rmsnorm_quant_fwd" if norm else "quantize_fwd", rows, features, tuple((n, s) for n, s, _ in buffers),
                   tuple((n, d) for n, _, d in buffers), (*options.items(), ("spec", spec), ("fp8", False)), target)  # fmt: skip


def run(case: oq.Case, arrays=None, plan=quant_triton.plan, target="sm_90", **kw):
    arrays = case.arrays() if arrays is None else arrays
    p = problem(case, arrays, target)
    return interpreter.run(tuple(map(without_assembly, plan(p))), p, arrays, **kw)


def without_assembly(launch):
    """AMD's conversions are inline assembly, which nothing here runs: the software ones in their place."""
    constants = tuple((k, "" if k == "HARD" and v in ("fp8", "bf8") else v) for k, v in launch.constants)
    return dataclasses.replace(launch, constants=constants)


def check(case: oq.Case, arrays, got) -> None:
    want = case.expected(arrays)
    exact = want.z.dtype == np.float32
    scale = arrays["static_scale"] if case.static else got["scale"]
    rows = oq.assert_scales(scale, want, case.spec, case.id, exact)
    if rows.dtype == np.uint8 and not exact and (rows != want.scale).any():
        changed = dataclasses.replace(want, scale=rows)
        want = dataclasses.replace(changed, codes=oq.encode(want.z / changed.multiplier, want.name))
    oq.assert_codes(got["values"], want, case.id, exact)
    if "residual" in arrays:
        tolerances.assert_same_bits(got["residual_out"], case.norm(arrays).residual_out, "residual_out")
    if case.keep:
        tolerances.assert_y(got["y"], case.norm(arrays), case.options.get("cast", "output"))


def long_plan(block=256):
    """The loop over a row that one tile would hold. A block has eight groups where scales are shuffled."""

    def plan(p):
        return (quant_triton._launch(p, quant_triton.Loop(block, 8, 4)),)

    return plan


def tile_plan(p):
    """One row shared by all waves, whatever its length."""
    width = quant_triton._width(p)
    return (quant_triton._launch(p, quant_triton.Tile(0, 1, width, 8, 4)),)


def case(op, dtype, features=384, rows=7, spec=None, **more) -> oq.Case:
    return oq.Case(op, QuantSpec(dtype, **(spec or {})), features, (rows,), **more)


NORM, ADD, ALONE = "rmsnorm_quant", "add_rmsnorm_quant", "quantize"
CASES = [
    *(case(op, d) for op in (NORM, ADD, ALONE) for d in ("int8", *oq.FP8)),
    *(case(ADD, E4M3, 640, spec={"group_size": g, "scale_layout": lay}) for g in (16, 32, 128) for lay in ("row", "column")),
    case(NORM, "int8", 5120, 2, spec={"group_size": 128}),
    case(NORM, "float8_e4m3fnuz", 6144, 2, spec={"group_size": 1024}),
    case(ADD, E5M2, 96, 9, spec={"group_size": 32, "scale_layout": "column"}, x_dtype=F16, residual_dtype=F32),
    *(case(ALONE, d, 256, spec=MX | {"e8m0_rounding": r}) for d in (E4M3, E5M2, "float8_e5m2fnuz", "fp4")
      for r in ("up", "down", "even")),
    *(case(op, "fp4", n, rows, spec=MX | {"scale_layout": lay}) for op, n, rows, lay in (
        (ADD, 320, 7, "row"), (NORM, 2880, 3, "column"), (ALONE, 64, 40, "shuffled"), (ADD, 576, 37, "shuffled"))),
    case(NORM, E4M3, 32, 300, spec=MX | {"scale_layout": "shuffled"}),
    case(NORM, E4M3, 1024, 33, spec=MX | {"scale_layout": "shuffled"}),
    case(NORM, "fp4", 2880, 3, spec=MX | {"scale_layout": "shuffled"}, options={"pad_to_multiple": 3072}, keep=True),
    case(ADD, "int8", 100, options={"pad_to_multiple": 128, "cast": "before_weight", "weight_offset": 0.5}, keep=True),
    case(ADD, E4M3, 769, 3, options={"residual_rounding": "input"}, residual_dtype=F32, weight_dtype=F32, keep=True),
    case(NORM, "int8", 1245, 3, x_dtype=F32, smooth=F32, keep=True, options={"out_dtype": BF16}),
    case(NORM, E4M3, 31, 40, weight_dtype=None, smooth=BF16),
    case(ALONE, "int8", 1, 5), case(ALONE, E4M3, 7, 9, x_dtype=F32, smooth=F32),
    case(NORM, "int8", 2048, 3, static=0.02), case(ADD, E4M3, 130, static=0.001, smooth=F16),
    case(ADD, E4M3, 256, spec={"group_size": 64, "scale_ub": 0.7}), case(NORM, "int8", 256, spec={"scale_ub": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.id)
def test_against_the_oracle(c):
    arrays = c.arrays()
    check(c, arrays, run(c, arrays))


@pytest.mark.parametrize("c", [
    case(ADD, E4M3, 500, 3, keep=True), case(ALONE, "int8", 700, 3), case(NORM, "fp4", 640, 3, spec=MX),
    case(NORM, E5M2, 1024, 3, spec={"group_size": 128, "scale_layout": "column"}, smooth=F32),
    case(ADD, E4M3, 576, 35, spec=MX | {"scale_layout": "shuffled"}, residual_dtype=F32),
    case(NORM, "int8", 300, 3, static=0.03, options={"pad_to_multiple": 512}),
], ids=lambda c: c.id)  # fmt: skip
def test_long_rows(c):
    arrays = c.arrays()
    check(c, arrays, run(c, arrays, long_plan()))


@pytest.mark.parametrize("target", ["gfx942", "gfx950", "gfx1100", "sm_80"])
@pytest.mark.parametrize("dtype", oq.FP8)
def test_other_targets(target, dtype):
    c = case(ADD, dtype, 512, 5, spec={"group_size": 64})
    arrays = c.arrays()
    check(c, arrays, run(c, arrays, target=target))


@pytest.mark.parametrize("name", ["int8", *oq.FP8, "fp4"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_code_every_tie_and_their_neighbours(name, target):
    """Through a static scale of one; fp4 through a group whose maximum makes the scale one."""
    if name == "int8":
        table = np.arange(128.0)
    else:
        table = oq.magnitudes(name)
    middle = (table[:-1] + table[1:]) / 2
    points = np.concatenate([table, middle, [table[-1] * 1.01, table[-1] * 100, 1e-45, 3e38]]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    points = points[np.isfinite(points)]
    points = np.concatenate([points, -points, [np.float32(np.nan)]]).astype(np.float32)
    if name == "fp4":
        points = points[np.abs(points) <= 6]
        rows = np.zeros((-(-points.size // 31), 32), np.float32)
        rows[:, :31].flat[: points.size] = points  # one row a group: its last element fixes the scale
        rows[:, 31] = 6
        c = case(ALONE, name, 32, rows.shape[0], spec=MX, x_dtype=F32)
        arrays = {"x": rows}
    else:
        c = case(ALONE, name, 64, x_dtype=F32, static=1.0)
        x = np.zeros((-(-points.size // 64), 64), np.float32)
        x.flat[: points.size] = points
        arrays = {"x": x, "static_scale": np.array(1.0, np.float32)}
    check(c, arrays, run(c, arrays, target=target))


@pytest.mark.parametrize("spec", [{}, {"group_size": 32}, MX], ids=str)
@pytest.mark.parametrize("plan", [quant_triton.plan, long_plan(64)])
def test_rows_of_zeros_and_of_tiny_and_huge_values(spec, plan):
    c = case(ALONE, E4M3, 64, 6, spec=spec, x_dtype=F32)
    x = np.ones((6, 64), np.float32)
    x[0], x[1], x[2], x[3, 5] = 0.0, 1e-40, 3e38, 1e4
    x[4], x[5] = -0.0, 448 * 2.0**-126
    check(c, {"x": x}, run(c, {"x": x}, plan))


@pytest.mark.parametrize("plan", [quant_triton.plan, tile_plan, long_plan(256)])
@pytest.mark.parametrize("spec", [{}, {"group_size": 16}, MX | {"scale_layout": "shuffled"}], ids=str)
def test_nan_and_inf_stay_where_they_are(plan, spec):
    c = case(ALONE, E4M3, 128, 5, spec=spec)
    arrays = c.arrays()
    clean = run(c, arrays, plan)
    arrays["x"][1, 3], arrays["x"][3, 120] = np.nan, -np.inf
    got = run(c, arrays, plan)
    check(c, arrays, got)
    for row in (0, 2, 4):
        tolerances.assert_same_bits(got["values"][row].view(np.uint8), clean["values"][row].view(np.uint8))


def test_a_nan_row_of_the_norm_shows_in_its_scale():
    for spec in ({}, {"group_size": 32}):
        c = case(ADD, "int8", 128, 4, spec=spec)
        arrays = c.arrays()
        clean = run(c, arrays)
        arrays["residual"][2, 9] = np.nan
        got = run(c, arrays)
        assert np.isnan(got["scale"][2]).all()
        keep = [0, 1, 3]
        tolerances.assert_same_bits(got["values"][keep], clean["values"][keep])
        tolerances.assert_same_bits(got["scale"][keep], clean["scale"][keep])


@pytest.mark.parametrize("c", [
    case(ADD, E4M3, 384, 9, spec={"group_size": 64}), case(NORM, "int8", 96, 9), case(ALONE, "fp4", 128, 9, spec=MX),
    case(ADD, E5M2, 1024, 5),
], ids=lambda c: c.id)  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_in_a_tile(c):
    """Any row alone, and in tiles of other heights: the same codes, scales and sums."""
    arrays = c.arrays()
    whole = run(c, arrays)

    def taller(p):
        tile = quant_triton._tile(p, quant_triton._width(p))
        more = dataclasses.replace(tile, rows=2 * tile.rows) if tile.chunks else tile
        return (quant_triton._launch(p, more),)

    again = run(c, arrays, taller)
    for name in whole:
        tolerances.assert_same_bits(again[name].view(np.uint8), whole[name].view(np.uint8), name)
    for row in (0, c.lead[0] - 1):
        one = {k: a[row : row + 1] if a.ndim == 2 else a for k, a in arrays.items()}
        got = run(c, one)
        for name in whole:
            tolerances.assert_same_bits(got[name].view(np.uint8)[0], whole[name].view(np.uint8)[row], f"{name} {row}")


@pytest.mark.parametrize("plan", [quant_triton.plan, long_plan()])
def test_residual_out_may_share_the_buffer_of_residual(plan):
    c = case(ADD, E4M3, 256, 3)
    arrays = c.arrays()
    check(c, arrays, run(c, arrays, plan, aliases={"residual_out": "residual"}))


def test_shuffled_scales_of_whole_blocks_of_rows():
    """M % 32 == 0 and no padding of rows: the blocks of 32 rows follow one another."""
    c = case(ALONE, "fp4", 96, 64, spec=MX | {"scale_layout": "shuffled"})
    arrays = c.arrays()
    p = problem(c, arrays, scale_rows=64)
    got = interpreter.run(quant_triton.plan(p), p, arrays)["scale"]
    full = run(c, arrays)["scale"]
    tolerances.assert_same_bits(got, full[:64])
    assert (full[64:] == 0x7F).all()


def test_what_the_kernels_leave_to_others():
    for group, features, reason in ((8, 64, "groups of 8"), (48, 96, "groups of 48"), (16384, 32768, "up to 8192")):
        c = case(ALONE, "int8", features, 2, spec={"group_size": group})
        with pytest.raises(Unsupported, match=reason):
            quant_triton.plan(problem(c, c.arrays()))
    c = case(ALONE, "int8", 64, 2)
    with pytest.raises(Unsupported, match="no Triton kernel"):
        quant_triton.plan(dataclasses.replace(problem(c, c.arrays()), stage="rmsnorm_fwd"))


def test_the_plan_looks_at_the_features_alone():
    for features in (64, 1000, 1024, 8192, 40000):
        few, many = (problem(case(ADD, "int8", features, rows), {
            "x": np.broadcast_to(np.zeros((), np.float32), (rows, features)),
            "residual": np.broadcast_to(np.zeros((), np.float32), (rows, features))}) for rows in (1, 70000))  # fmt: skip
        (a,), (b,) = quant_triton.plan(few), quant_triton.plan(many)
        assert (a.constants, a.num_warps) == (b.constants, b.num_warps)


def test_candidates_start_with_the_plan_and_are_different():
    c = case(ADD, E4M3, 512, spec={"group_size": 128})
    p = problem(c, c.arrays())
    found = quant_triton.candidates(p)
    assert found[0] == quant_triton.plan(p)
    assert len(found) == len(set(found)) > 3


@pytest.mark.parametrize("plan", [quant_triton.plan, long_plan(64)])
def test_the_fast_quotient_is_the_ieee_one(plan):
    """Values next to the ties of their codes, for scales with awkward last bits: a product with the reciprocal fails here."""
    rng = np.random.default_rng(0)
    rows, features = 96, 64
    most = rng.uniform(0.5, 2.0, (rows, 1)).astype(np.float32) * 2.0 ** rng.integers(-90, 90, (rows, 1)).astype(
        np.float32
    )
    most = most.astype(np.float32)
    scale = most / np.float32(127)
    ties = (rng.integers(0, 126, (rows, features)) + 0.5) * scale.astype(np.float64)
    x = ties.astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.5, x, np.nextafter(x, np.float32(0)))
    x = np.where(rng.random(x.shape) < 0.5, x, -x).astype(np.float32)
    x[:, :1] = most
    c = case(ALONE, "int8", features, rows, x_dtype=F32)
    product = oq.encode(x * (np.float32(1) / scale), "int8")
    assert (product != c.expected({"x": x}).codes).any(), "the data does not tell a product from a quotient"
    check(c, {"x": x}, run(c, {"x": x}, plan))


def test_negative_zeros_stay():
    c = case(ALONE, E4M3, 64, 2, x_dtype=F32)
    x = np.full((2, 64), -0.0, np.float32)
    x[1, ::2], x[1, 1::4] = 3.0, -1e-30
    check(c, {"x": x}, run(c, {"x": x}))
