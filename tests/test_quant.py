"""quantize, rmsnorm_quant and add_rmsnorm_quant against the oracle: codes, scales, edges of the formats."""

from __future__ import annotations

from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_quant as oq
import pytest
import tolerances
from oracle_quant import FP8, Case

import jaxnorm
from jaxnorm import QuantSpec

FLOAT_FORMATS = (*FP8, "fp4")
MX = {"group_size": 32, "scale_dtype": "e8m0"}


def specs():
    """Every dtype with every granularity that the contract gives it."""
    for dtype in ("int8", *FP8):
        yield QuantSpec(dtype)
        for g in (16, 32, 64, 96, 128, 384):
            if dtype in ("int8", FP8[0]) or g == 96:
                yield QuantSpec(dtype, group_size=g)
        yield QuantSpec(dtype, group_size=48 if dtype in FP8[2:] else None, scale_ub=1.25)
    for dtype in FLOAT_FORMATS:
        for rounding in ("up", "down", "even"):
            yield QuantSpec(dtype, e8m0_rounding=rounding, **MX)
    yield QuantSpec(FP8[0], group_size=96, scale_dtype="e8m0")
    yield QuantSpec(FP8[3], group_size=128, scale_dtype="e8m0", e8m0_rounding="even", scale_ub=0.75)
    yield QuantSpec("fp8", group_size=3)


def ids(found):
    return [pytest.param(c, id=c.id) for c in found]


def special(features: int) -> np.ndarray:
    """float32 rows of the norm's list without the bad ones, and one of both zeros."""
    x = cases.special_rows(features, "float32")
    x = x[[i for i, n in enumerate(cases.SPECIAL_ROWS) if n not in ("nan", "inf")]]
    zeros = np.where(np.arange(features) % 3 == 0, -0.0, 0.0).astype(np.float32)
    return np.concatenate([x, zeros[None], (x[0] * np.float32(2.0**-60))[None], -np.abs(x[:1])])


@pytest.mark.parametrize("case", ids(Case("quantize", s, x_dtype="float32") for s in specs()))
def test_quantize(case):
    """Bit for bit, special rows included: the reference divides, so no code may differ."""
    arrays = {"x": special(case.features)}
    case.check(arrays, case.run(arrays))


@pytest.mark.parametrize("x_dtype", cases.FLOATS)
@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("fp8", group_size=128)], ids=["int8", "fp8"])
def test_quantize_options(spec, x_dtype):
    """Every input dtype with a smooth scale of another one."""
    case = Case("quantize", spec, x_dtype=x_dtype, smooth={"float32": "bfloat16"}.get(x_dtype, "float32"))
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))


def norms():
    for dtype in ("int8", *FP8):
        yield Case("rmsnorm_quant", QuantSpec(dtype))
        if dtype in ("int8", FP8[1], FP8[2]):
            yield Case("rmsnorm_quant", QuantSpec(dtype), static=0.02)
            yield Case("rmsnorm_quant", QuantSpec(dtype, group_size=128, scale_layout="column"), smooth="float32")
    for dtype in FLOAT_FORMATS:
        yield Case("rmsnorm_quant", QuantSpec(dtype, **MX), x_dtype="float16", weight_dtype="float32")
    for g in (16, 96):
        yield Case("rmsnorm_quant", QuantSpec("int8", group_size=g), x_dtype="float32", weight_dtype="float16")
    yield Case("rmsnorm_quant", QuantSpec("fp8", scale_ub=1.0), weight_dtype=None)
    yield Case("rmsnorm_quant", QuantSpec("int8", group_size=13), 83 * 13, (3,), options={"weight_offset": 1.0})
    for x in cases.FLOATS:
        for r in dict.fromkeys((x, "float32", "bfloat16")):
            yield Case("add_rmsnorm_quant", QuantSpec("int8"), x_dtype=x, weight_dtype="float32", residual_dtype=r,
                       options={"weight_offset": 1.0, "eps": 1e-5})  # fmt: skip
    for i, (cast, rounding) in enumerate((c, r) for c in ("output", "before_weight") for r in ("float32", "input")):
        spec = (QuantSpec("int8", group_size=64), QuantSpec("fp8"), QuantSpec("float8_e5m2"), QuantSpec("fp4", **MX))[i]
        options = {"cast": cast, "residual_rounding": rounding, "weight_offset": 0.5}
        yield Case("add_rmsnorm_quant", spec, residual_dtype="bfloat16", x_dtype="bfloat16", keep=True, options=options)
        yield Case("add_rmsnorm_quant", spec, residual_dtype="float16", x_dtype="float32", smooth="bfloat16",
                   options=options)  # fmt: skip
    yield Case("add_rmsnorm_quant", QuantSpec("fp8"), static=0.05, smooth="float16", keep=True,
               options={"out_dtype": "float32", "pad_to_multiple": 512})  # fmt: skip
    yield Case("rmsnorm_quant", QuantSpec("fp8"), smooth="float32", keep=True, options={"out_dtype": "float16"})


@pytest.mark.parametrize("case", ids(norms()))
def test_norms(case):
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))


@pytest.mark.parametrize("features, group", [(5120, 32), (5120, 128), (6144, 64), (6144, 128)])
def test_widths_that_aiter_refuses(features, group):
    case = Case("add_rmsnorm_quant", QuantSpec("fp8", group_size=group), features, (2,))
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))


@pytest.mark.parametrize("case", ids([
    Case("add_rmsnorm_quant", QuantSpec("fp8", group_size=128, scale_layout="column"), 7168, (3,)),
    Case("rmsnorm_quant", QuantSpec("int8"), 8192, (3,), options={"eps": 1e-5}),
    Case("rmsnorm_quant", QuantSpec("fp4", scale_layout="shuffled", **MX), 2880, (3,),
         options={"pad_to_multiple": 256, "eps": 1e-5}),
    Case("add_rmsnorm_quant", QuantSpec("int8"), 1152, (3,), weight_dtype="float32", options={"weight_offset": 1.0}),
    *(Case("rmsnorm_quant", QuantSpec("int8"), n, (3,), x_dtype="float16", keep=True) for n in (1, 3, 97, 769, 5125)),
]))  # fmt: skip
def test_models_and_odd_widths(case):
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))


@pytest.mark.parametrize("lead", [(), (2, 3, 5), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("fp4", **MX)], ids=["int8", "fp4"])
def test_leading_dims(lead, spec):
    case = Case("add_rmsnorm_quant", spec, 64, lead, keep=True)
    arrays = case.arrays()
    out = case.run(arrays)
    case.check(arrays, out)
    assert out["q"].values.shape == (*lead, 32 if spec.dtype == "fp4" else 64)
    assert out["q"].scale.shape == (*lead, 2 if spec.group_size else 1)
    assert out["y"].shape == out["residual_out"].shape == (*lead, 64)


# Padding


@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("fp8", group_size=64), QuantSpec("fp8", **MX)], ids=str)
def test_groups_of_padding_alone(spec):
    """N = 200 -> 384: the last row or group of real values shares its scale with zeros, groups of zeros have scale 1."""
    case = Case("add_rmsnorm_quant", spec, 200, keep=True, smooth="float32", options={"pad_to_multiple": 384})
    arrays = case.arrays()
    out = case.run(arrays)
    case.check(arrays, out)
    q = out["q"]
    assert q.values.shape == out["y"].shape == (7, 384) and out["residual_out"].shape == (7, 200)
    assert not oq.codes_of(q.values, case.name)[:, 200:].any(), "the tail is +0"
    if spec.group_size:
        alone = -(-200 // spec.group_size)
        assert (np.asarray(q.scale)[:, alone:] == (127 if spec.scale_dtype == "e8m0" else 1.0)).all()


def test_the_padded_width_must_hold_whole_groups():
    x = np.ones((2, 80), np.float32)
    with pytest.raises(ValueError, match="group_size"):
        jaxnorm.rmsnorm_quant(x, None, QuantSpec("int8", group_size=32))
    q = jaxnorm.rmsnorm_quant(x, None, QuantSpec("int8", group_size=32), pad_to_multiple=96)
    assert q.values.shape == (2, 96) and q.scale.shape == (2, 3)
    q = jaxnorm.rmsnorm_quant(x, None, QuantSpec("int8", group_size=40))
    assert q.scale.shape == (2, 2)


# Edges of the formats


@pytest.mark.parametrize("name", FP8)
def test_the_oracle_has_the_formats(name):
    """Two sources for the formats: bit fields here, ml_dtypes there."""
    table = oq.magnitudes(name)
    named = np.arange(len(table), dtype=np.uint8).view(cases.dtype(name)).astype(np.float64)
    np.testing.assert_array_equal(table, named)
    assert table[-1] == oq.MAXIMUM[name]
    x = np.exp2(cases.rng().uniform(-19, 16, 5000)) * cases.rng(1).choice([-1, 1], 5000)
    x = np.clip(x, -table[-1], table[-1]).astype(np.float32)
    np.testing.assert_array_equal(oq.encode(x, name), x.astype(cases.dtype(name)).view(np.uint8))


def halves(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(all magnitudes between two neighbours of a format, the even code of each)."""
    table = np.arange(128.0) if name == "int8" else oq.magnitudes(name)
    i = np.arange(len(table) - 1)
    return (table[:-1] + table[1:]) / 2, i + i % 2


@pytest.mark.parametrize("name", ["int8", *FP8, "fp4"])
def test_ties_go_to_the_even_code(name):
    """Rows whose maximum is maximum * 2**k, so that the scale is a power of two and every half step is a tie."""
    middle, even = halves(name)
    top = oq.MAXIMUM[name]
    width = -(-(2 * len(middle) + 1) // 32) * 32 if name != "fp4" else 32
    row = np.zeros(width)
    row[: len(middle)], row[len(middle) : 2 * len(middle)], row[2 * len(middle)] = middle, -middle, top
    powers = (-20, -3, 0, 5, 40)
    x = (row * 2.0 ** np.array(powers)[:, None]).astype(np.float32)
    spec = QuantSpec(name, **MX) if name == "fp4" else QuantSpec(name)
    q = jaxnorm.quantize(x, spec)
    scale = np.asarray(q.scale)[:, 0]
    np.testing.assert_array_equal(scale, np.array(powers) + 127 if name == "fp4" else 2.0 ** np.array(powers))
    codes = oq.steps(oq.codes_of(q.values, name), name)
    for line in codes:
        np.testing.assert_array_equal(line[: len(middle)], even)
        np.testing.assert_array_equal(line[len(middle) : 2 * len(middle)], -even)


@pytest.mark.parametrize("name", ["int8", *FP8])
def test_a_static_scale_that_is_too_small_saturates(name):
    """Clipped before rounding: 127.6 is 127 and never -128, 1e6 and Inf are the maximum and neither NaN nor Inf."""
    top = oq.MAXIMUM[name]
    values = [top * 1.0047, top * 1.03, 128.4 / 127 * top, 1e6, 3e38, np.inf, top]
    x = np.array([values, [-v for v in values]], np.float32)
    q = jaxnorm.quantize(x, QuantSpec(name), static_scale=np.float32(1.0))
    got = np.asarray(q.values).astype(np.float32)
    np.testing.assert_array_equal(got, np.sign(x) * top)
    case = Case("rmsnorm_quant", QuantSpec(name), static=1e-4)
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))


@pytest.mark.parametrize("name", ["int8", *FP8])
def test_nan_under_a_static_scale(name):
    x = np.array([[np.nan, 1.0, -np.nan, -2.0]], np.float32)
    got = np.asarray(jaxnorm.quantize(x, QuantSpec(name), static_scale=np.float32(1.0)).values).astype(np.float32)
    np.testing.assert_array_equal(got, [[0, 1, 0, -2]] if name == "int8" else [[np.nan, 1, np.nan, -2]])


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("constant", [True, False])
def test_a_static_scale_divides(shape, constant):
    """By 0.3, also where it is a constant of the program, which a compiler likes to turn into a product."""
    spec, s = QuantSpec("int8"), np.full(shape, 0.3, np.float32)
    x = cases.normal(cases.rng(), (50, 4000), "float32", std=12.0)
    x[0, :1000] = (np.arange(1000) % 127 + 0.5) * 0.3
    f = lambda x, s: jaxnorm.quantize(x, spec, static_scale=s)  # noqa: E731
    q = jax.jit(lambda x: f(x, s))(x) if constant else jax.jit(f)(x, s)
    oq.assert_quantized(q, oq.quantize(x, spec, "int8", np.float32(0.3)), spec, exact=True)
    assert q.scale.shape == ()


@pytest.mark.parametrize("name", ["int8", *FP8])
def test_minus_zero(name):
    """-0, and a negative that rounds to zero, keep their sign where the format has -0."""
    x = np.array([[-0.0, 0.0, -1e-12, 1e-12, -1.0, 1.0]], np.float32)
    for out in (jaxnorm.quantize(x, QuantSpec(name)), jaxnorm.quantize(x, QuantSpec(name), static_scale=np.float32(1))):
        zero = oq.codes_of(out.values, name)[0, :4]
        np.testing.assert_array_equal(zero, [128, 0, 128, 0] if oq.has_negative_zero(name) else [0] * 4)


def test_minus_zero_in_fp4():
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [-0.0, -0.1, 0.1, 6.0, -6.0]
    q = jaxnorm.quantize(x, QuantSpec("fp4", **MX))
    np.testing.assert_array_equal(oq.codes_of(q.values, "fp4")[0, :6], [8, 8, 0, 7, 15, 0])


@pytest.mark.parametrize("name", FP8)
def test_subnormal_codes(name):
    """A row with values around the format's subnormals, ties between them included: nothing is flushed, nothing rounded twice."""
    step = oq.magnitudes(name)[1]
    small = np.arange(0, 20, 0.125) * step
    small = np.concatenate([small, np.nextafter(small, 1, dtype=np.float32), np.nextafter(small, -1, dtype=np.float32)])
    x = np.concatenate([small, -small, [oq.MAXIMUM[name]]]).astype(np.float32)[None]
    q = jaxnorm.quantize(x, QuantSpec(name))
    assert q.scale[0, 0] == 1.0
    oq.assert_quantized(q, oq.quantize(x, QuantSpec(name), name), QuantSpec(name), exact=True)


@pytest.mark.parametrize("name", FP8)
def test_neighbours_of_every_tie(name):
    """float32 neighbours of each half step go to the nearer code: a conversion through a narrower type would round twice."""
    middle = halves(name)[0]
    near = [np.nextafter(middle.astype(np.float32), np.float32(d)) for d in (0, np.inf)]
    x = np.concatenate([*near, [oq.MAXIMUM[name]]]).astype(np.float32)[None]
    q = jaxnorm.quantize(x, QuantSpec(name))
    oq.assert_quantized(q, oq.quantize(x, QuantSpec(name), name), QuantSpec(name), exact=True)


@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("fp8", group_size=16), QuantSpec("fp8", **MX)], ids=str)
def test_rows_too_small_to_divide_by(spec):
    """Zeros, 1e-40, and a maximum on either side of maximum * 2**-126: scale 1 and codes of zero below it."""
    name = "int8" if spec.dtype == "int8" else FP8[0]
    top = np.float32(oq.MAXIMUM[name])
    x = np.zeros((5, 32), np.float32)
    x[1], x[2], x[3], x[4] = (
        1e-40,
        -top * np.float32(2.0**-127),
        top * np.float32(2.0**-126),
        top * np.float32(2.0**-125),
    )
    q = jaxnorm.quantize(x, spec)
    scale = np.asarray(q.scale)
    one = 127 if spec.scale_dtype == "e8m0" else 1.0
    assert (scale[:3] == one).all()
    assert (oq.steps(oq.codes_of(q.values, name)[:3], name) == 0).all()
    want = [1, 2] if spec.scale_dtype == "e8m0" else [2.0**-126, 2.0**-125]
    assert (scale[3:] == np.array(want)[:, None]).all()


@pytest.mark.parametrize("rounding", ["up", "down", "even"])
@pytest.mark.parametrize("name", [*FP8[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in FP8[2:]), "fp4"])
def test_exponents_by_their_definition(name, rounding):
    """E for maximum * 2**k, its float32 neighbours, powers of two and random maxima; ``up`` by the smallest E that fits."""
    top = oq.MAXIMUM[name]
    k = np.arange(-100, 110)
    base = [(f * 2.0**k).astype(np.float32) for f in (top, 1.0, 1.5, top * 1.5, 2.0 - 2.0**-4, 2.0 - 2.0**-3, 1.75)]
    exact = np.concatenate([b[np.isfinite(b)] for b in base])
    a = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(3e38)),
                        np.exp2(cases.rng().uniform(-80, 100, 500)).astype(np.float32)])  # fmt: skip
    x = np.zeros((a.size, 32), np.float32)
    x[:, 5] = -a
    x[:, 6] = a / 2
    spec = QuantSpec(name, e8m0_rounding=rounding, **MX)
    q = jaxnorm.quantize(x, spec)
    e = np.asarray(q.scale)[:, 0].astype(int)
    if rounding == "up":
        fits = lambda e: a.astype(np.float64) <= top * 2.0 ** (e - 127.0)  # noqa: E731
        assert fits(e).all() and not fits(e - 1).any()
    oq.assert_quantized(q, oq.quantize(x, spec, name), spec, exact=True)


def test_scale_ub_bounds_the_maximum():
    x = np.array([[0.5, -1.0, 2.0, 8.0], [0.25, 0.5, 0.5, -1.0], [np.nan, 9, 1, 1], [np.inf, 1, 1, 1]], np.float32)
    q = jaxnorm.quantize(x, QuantSpec("int8", scale_ub=2.0))
    scale = np.asarray(q.scale)[:, 0]
    np.testing.assert_array_equal(scale[:2], np.array([2, 1], np.float32) / np.float32(127))
    assert np.isnan(scale[2]) and scale[3] == np.float32(2) / np.float32(127)
    np.testing.assert_array_equal(np.asarray(q.values)[0], [32, -64, 127, 127])


def test_a_row_of_one_huge_value():
    x = cases.normal(cases.rng(), (4, 256), "float32")
    x[1, 7], x[2, 9] = 3.4e38, -1e30
    for spec in (QuantSpec("int8"), QuantSpec("fp8", group_size=32), QuantSpec("fp8", **MX)):
        oq.assert_quantized(jaxnorm.quantize(x, spec), oq.quantize(x, spec, "int8" if spec.dtype == "int8" else FP8[0]),
                            spec, exact=True)  # fmt: skip


# NaN and Inf

BAD_SPECS = [
    QuantSpec("int8"), QuantSpec("fp8"), QuantSpec("float8_e5m2", scale_ub=1.0), QuantSpec("int8", group_size=32),
    QuantSpec("float8_e4m3fnuz", group_size=64, scale_layout="column"),
    QuantSpec("fp8", e8m0_rounding="down", scale_layout="shuffled", **MX),
    QuantSpec("fp4", **MX),
]  # fmt: skip


@pytest.mark.parametrize("spec", BAD_SPECS, ids=lambda s: Case("", s).id)
@pytest.mark.parametrize("op", ["quantize", "rmsnorm_quant"])
def test_nan_and_inf_stay_in_their_row(op, spec):
    """They show in the scale of their row (rmsnorm_quant) or group (quantize); nothing else changes a bit."""
    case = Case(op, spec, 128, (9,), x_dtype="float32", weight_dtype="float32")
    arrays = case.arrays()
    run = jax.jit(case.call)
    clean = run(arrays)["q"]
    bad = arrays["x"].copy()
    bad[2, 40], bad[5, 100], bad[6, 0] = np.nan, np.inf, -np.inf
    q = run(arrays | {"x": bad})["q"]
    groups = spec.groups(128)
    got, before = (oq.to_rows(s.scale, spec.scale_layout, (9,), groups) for s in (q, clean))
    touched = np.zeros((9, groups), bool)
    for m, n in ((2, 40), (5, 100), (6, 0)):
        touched[(m, slice(None)) if op == "rmsnorm_quant" else (m, n * groups // 128)] = True
    tolerances.assert_same_bits(got[~touched], before[~touched], "scales beside")
    shows = got == 255 if spec.scale_dtype == "e8m0" else ~np.isfinite(got)
    if op == "rmsnorm_quant":
        # Inf makes rstd 0: 0 for the finite elements, NaN for Inf itself
        assert shows[2].all() and shows[5].any() and shows[6].any()
    elif spec.scale_ub is None:
        assert shows[touched].all()
    else:
        assert shows[2].all()
    codes, old = (oq.codes_of(v.values, case.name).reshape(9, groups, -1) for v in (q, clean))
    np.testing.assert_array_equal(codes[~touched], old[~touched])


# Meaning of the options


def test_unquantized_y_is_before_the_smooth_scale():
    """And after the weight: the rmsnorm without quantisation, bit for bit."""
    case = Case("rmsnorm_quant", QuantSpec("int8"), smooth="float32", keep=True, options={"weight_offset": 1.0})
    arrays = case.arrays()
    y = case.run(arrays)["y"]
    tolerances.assert_same_bits(y, jaxnorm.rmsnorm(arrays["x"], arrays["weight"], weight_offset=1.0))


def test_the_float32_y_is_quantised():
    """Not the rounded one: a bf16 rounding before it would change a few percent of the codes."""
    case = Case("rmsnorm_quant", QuantSpec("int8"), 128, (64,))
    arrays = case.arrays()
    want = case.expected(arrays)
    case.check(arrays, case.run(arrays))
    rounded = oq.quantize(case.norm(arrays).result.astype(np.float32), case.spec, "int8")
    assert (rounded.codes != want.codes).mean() > 0.02


def test_the_smooth_scale_comes_after_the_weight():
    """Multiplying x by it first would change the mean square."""
    case = Case("rmsnorm_quant", QuantSpec("fp8"), 256, smooth="float32", weight_dtype=None)
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))
    ones = {"x": arrays["x"], "weight": arrays["smooth_scale"]}
    assert_same(case.run(arrays)["q"], replace(case, smooth=None).run(ones)["q"])


def assert_same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        tolerances.assert_same_bits(left, right)


@pytest.mark.parametrize("rounding", ["float32", "input"])
def test_the_sum_is_read_unrounded_or_rounded(rounding):
    """bf16 residual: the two modes give different codes, and each its own oracle's."""
    case = Case("add_rmsnorm_quant", QuantSpec("int8"), 256, (16,), x_dtype="float32", residual_dtype="bfloat16",
                options={"residual_rounding": rounding})  # fmt: skip
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))
    other = replace(case, options={"residual_rounding": "input" if rounding == "float32" else "float32"})
    assert (other.expected(arrays).codes != case.expected(arrays).codes).mean() > 0.01


def test_residual_out_is_that_of_add_rmsnorm():
    case = Case("add_rmsnorm_quant", QuantSpec("fp8", group_size=32), 96, (5, 3), residual_dtype="float16")
    arrays = case.arrays()
    want = jaxnorm.add_rmsnorm(arrays["x"], arrays["residual"], arrays["weight"])[1]
    tolerances.assert_same_bits(case.run(arrays)["residual_out"], want)


@pytest.mark.parametrize("case", ids([
    Case("quantize", QuantSpec("int8", group_size=64), 128, (5,)),
    Case("add_rmsnorm_quant", QuantSpec("fp4", scale_layout="shuffled", **MX), 128, (5,), keep=True),
]))  # fmt: skip
def test_jit_and_eager_give_the_same_bits(case):
    arrays = jax.tree.map(jnp.asarray, case.arrays())
    assert_same(case.call(arrays), case.run(arrays))


@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("fp8", group_size=32)], ids=["int8", "fp8"])
def test_a_row_in_any_batch(spec):
    """The same rows alone and among others: same bits, codes and scales."""
    case = Case("rmsnorm_quant", spec, 96, (173,))
    arrays = case.arrays()
    whole = case.run(arrays)["q"]
    for m, start in ((1, 172), (7, 60), (33, 100)):
        part = case.run(arrays | {"x": arrays["x"][start : start + m]})["q"]
        tolerances.assert_same_bits(part.values, whole.values[start : start + m])
        tolerances.assert_same_bits(part.scale, whole.scale[start : start + m])


def test_dequantised_error_is_half_a_step():
    """|f32(code) * s - z| is at most half the distance to the next code, for every format that never saturates."""
    x = cases.normal(cases.rng(), (16, 256), "float32", std=3.0)
    specs = (QuantSpec("int8"), *(QuantSpec(n) for n in FP8), *(QuantSpec(n, **MX) for n in FLOAT_FORMATS))
    every = jax.jit(lambda x: [jaxnorm.quantize(x, s).dequantize() for s in specs])(x)
    for spec, back in zip(specs, every, strict=True):
        name = spec.dtype
        s = oq.quantize(x, spec, name).multiplier.astype(np.float64)
        table = np.arange(128.0) if name == "int8" else oq.magnitudes(name)
        at = np.clip(np.searchsorted(table, np.abs(x) / s, side="right"), 1, len(table) - 1)
        half = (table[at] - table[at - 1]) / 2 * s
        error = np.abs(np.asarray(back).astype(np.float64) - x)
        assert (error <= half * (1 + 2.0**-20) + np.abs(x) * 2.0**-22).all(), name


# "fp8" and the two flavours


def test_the_flavours_differ_by_no_factor_of_two():
    """fn and fnuz each give back x; the byte of one read as the other is exactly twice or half of it."""
    x = cases.normal(cases.rng(), (8, 256), "float32", std=2.0)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz"):
        q = jaxnorm.quantize(x, QuantSpec(name))
        back = np.asarray(q.dequantize())
        ratio = back[np.abs(x) > 0.5] / x[np.abs(x) > 0.5]
        assert ratio.min() > 0.9 and ratio.max() < 1.1, name
        np.testing.assert_allclose(np.asarray(q.scale)[:, 0], np.abs(x).max(-1) / oq.MAXIMUM[name], rtol=1e-6)
        y = jaxnorm.rmsnorm_quant(x, None, QuantSpec(name)).dequantize()
        want = oracle.rmsnorm(x, None).y
        assert abs(np.median(np.asarray(y) / want) - 1) < 0.01
    byte = np.arange(1, 0x7F, dtype=np.uint8)
    fn, fnuz = (byte.view(cases.dtype(f"float8_e4m3{f}")).astype(np.float32) for f in ("fn", "fnuz"))
    np.testing.assert_array_equal(fn, 2 * fnuz)
