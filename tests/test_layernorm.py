"""layernorm and add_layernorm against the float64 oracle, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle_layernorm as oracle
import pytest
import tolerances
from cases_layernorm import MODELS, NONE, Case, dtype_cases, mean_cases, option_cases, thinned
from registry import with_gradients

import jaxnorm

BF16, F16, F32 = cases.FLOATS


def ids(found):
    return [pytest.param(c, id=str(c)) for c in found]


@pytest.mark.parametrize("case", thinned([*dtype_cases()][::-1], 2))
def test_dtypes(case):
    case.check()


@pytest.mark.parametrize("case", thinned(option_cases(), 4))
def test_options(case):
    case.check()


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in MODELS.items()])
def test_models(case):
    case.check()


@pytest.mark.parametrize("case", ids(mean_cases()))
def test_a_mean_far_above_the_deviation(case):
    """float32 1e4 + N(0, 1) and 16-bit rows with |mean| >> std: y, and gradients with no more error than without the mean."""
    case.check()


@pytest.mark.parametrize("case", ids([
    *(Case(n, (3,), cases.FLOATS[n % 3], F32 if n % 2 else NONE, F32, F32, BF16 if n % 3 else NONE)
      for n in (1, 2, 7, 31, 769, 5125)),
    *(Case(33, lead, residual=F32, x_bias=F32) for lead in ((), (2, 3, 5), (0, 4))),
    Case(33, (2, 3), options={"pad_to_multiple": 32}),
]))  # fmt: skip
def test_shapes(case):
    case.check()


@pytest.mark.parametrize("features", [31744, pytest.param(65536, marks=pytest.mark.slow), 131072])
def test_long_rows(features):
    Case(features, (2,), residual=F32, x_bias=F32, mean=40.0).check(gradients=features < 65536)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_constant_rows_give_the_bias(eps):
    """The deviations of a constant row are the rounding of its own mean, which e takes out again; its variance is not negative."""
    values = np.array([0.0, 0.1, -3.3, 1e4 + 0.3, 1e30, 1e-30], np.float32)
    for features in (1, 3, 384):
        x = np.repeat(values[:, None], features, 1)
        b = cases.normal(cases.rng(), (features,), F32)
        y = np.asarray(jaxnorm.layernorm(x, np.full(features, 1.5, np.float32), b, eps=eps))
        limit = 2.0**-20 * (1 + np.abs(b)) + 2.0**-22 * np.abs(values[:, None]) / np.sqrt(eps)
        assert (np.abs(y - b) <= limit).all()
        tolerances.assert_same_bits(y[0], b, "a row of zeros")


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_special_rows(dtype):
    """Zeros, subnormals, outliers are right; NaN and Inf stay in their row, forward and backward."""
    x = cases.special_rows(257, dtype)
    bad = [cases.SPECIAL_ROWS.index(n) for n in ("nan", "inf")]
    good = [i for i in range(len(x)) if i not in bad]
    case = Case(257, (len(x),), dtype, NONE, F32, F32)
    a, cts = {**case.arrays(), "x": x}, case.cotangents()
    run = jax.jit(with_gradients(case.function()))
    (y,), (dx, *_) = run(tuple(a.values()), cts)
    assert not np.isfinite(np.asarray(y)[bad].astype(np.float32)).all(axis=-1).any(), "a bad row must show it"
    clean = {**a, "x": x.copy()}
    clean["x"][bad] = np.ones((), x.dtype)
    (clean_y,), (clean_dx, *_) = run(tuple(clean.values()), cts)
    tolerances.assert_same_bits(np.asarray(y)[good], np.asarray(clean_y)[good], "y beside a bad row")
    tolerances.assert_same_bits(np.asarray(dx)[good], np.asarray(clean_dx)[good], "dx beside a bad row")
    oracle.assert_y(clean_y, case.expected(clean))


def test_a_mean_above_what_e_of_x_squared_stands():
    """E[x^2] - mean^2 and a mean without its correction both fail the bound on this row: it is a test that bites."""
    case = next(mean_cases(4096))
    a = case.arrays()
    want, x = case.expected(a), a["x"].astype(np.float32)
    mean = x.mean(-1, keepdims=True)
    plain = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + np.float32(1e-5))
    one_pass = (x - mean) / np.sqrt(np.abs((x * x).mean(-1, keepdims=True) - mean**2) + np.float32(1e-5))
    case.check_results(a, jax.jit(case.function())(*a.values()))
    exact = (want.n - want.mean) * want.rstd
    got = np.asarray(jaxnorm.layernorm(a["x"], None, None), np.float64)
    for other in (plain, one_pass):
        assert np.abs(other - exact).max() > 20 * np.abs(got - exact).max()


def test_many_rows_in_the_sums():
    Case(64, (4096,), F32, NONE, F32, F32, F32).check()


def test_gradients_of_none_and_of_nobody():
    """Vectors that are not given have no gradient; of no rows the sums are zeros; x alone can be differentiated."""
    x = jnp.zeros((0, 16), BF16)
    w, b = jnp.ones(16, F32), jnp.ones(16, BF16)
    dw, db = jax.grad(lambda w, b: jaxnorm.layernorm(x, w, b).astype(F32).sum(), (0, 1))(w, b)
    tolerances.assert_same_bits(dw, np.zeros(16, np.float32))
    assert db.dtype == BF16 and not np.asarray(db).any()
    case = Case(48, (6,), F32, weight=NONE, bias=NONE)
    a, cts = case.arrays(), case.cotangents()
    dx = jax.grad(lambda x: jnp.sum(jaxnorm.layernorm(x, None, None) * cts[0]))(a["x"])
    tolerances.assert_dx(dx, case.backward(case.expected(a), a, cts))


def test_gradients_by_finite_differences():
    """A second opinion beside the formula: central differences in float64 of the oracle's forward."""
    case = Case(7, (3,), F32, F32, F32, F32, F32)
    a, cts = case.arrays(), case.cotangents()
    _, got = jax.jit(with_gradients(case.function()))(tuple(a.values()), cts)
    wide = {k: v.astype(np.float64) for k, v in a.items()}

    def loss(at):
        s = at["x"] + at["x_bias"] + at["residual"]
        mean = s.mean(-1, keepdims=True)
        y = (s - mean) / np.sqrt(((s - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * at["weight"] + at["bias"]
        return (y * cts[0]).sum() + (s * cts[1]).sum()

    for (name, value), gradient in zip(wide.items(), got, strict=True):
        for index in [(0,) * value.ndim, tuple(s - 1 for s in value.shape)]:
            step = np.zeros_like(value)
            step[index] = 1e-5
            slope = (loss({**wide, name: value + step}) - loss({**wide, name: value - step})) / 2e-5
            np.testing.assert_allclose(np.asarray(gradient)[index], slope, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", thinned([
    Case(130, (9,), residual=F32, x_bias=F32, weight=F32), Case(130, (9,), F32, mean=1e3),
], 2))  # fmt: skip
def test_jit_and_eager_and_company_give_the_same_bits(case):
    """Also a row alone, and rows in another number."""
    a, cts = case.arrays(), case.cotangents()
    both = with_gradients(case.function())
    args, cts = tuple(map(jnp.asarray, a.values())), tuple(map(jnp.asarray, cts))
    whole = both(args, cts)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(jax.jit(both)(args, cts)), strict=True):
        tolerances.assert_same_bits(one, other)
    names = list(a)
    for part in (slice(3, 4), slice(1, 8)):
        few = [v[part] if n in ("x", "residual") else v for n, v in zip(names, args, strict=True)]
        results, gradients = jax.jit(both)(tuple(few), tuple(c[part] for c in cts))
        for some, all_ in zip(results, whole[0], strict=True):
            tolerances.assert_same_bits(some, np.asarray(all_)[part])
        tolerances.assert_same_bits(gradients[0], np.asarray(whole[1][0])[part], "dx")


def test_dtype_of_results():
    x, w = jnp.ones((2, 8), BF16), jnp.ones(8, F32)
    assert jaxnorm.layernorm(x, w, w).dtype == BF16
    assert jaxnorm.layernorm(x, w, None, out_dtype=jnp.float32).dtype == F32
    y, r = jaxnorm.add_layernorm(x, jnp.ones((2, 8), F32), w, w, x_bias=w)
    assert (y.dtype, r.dtype) == (BF16, F32)


def test_the_x_bias_is_added_before_the_residual():
    """float32 addition is not associative: the order is part of the contract."""
    x, x_bias, residual = np.full((1, 2), 1e8, F32), np.full(2, 3.0, F32), np.full((1, 2), -1e8, F32)
    _, out = jaxnorm.add_layernorm(x, residual, None, None, x_bias=x_bias)
    want = (x + x_bias) + residual
    assert (want != (x + residual) + x_bias).all()
    tolerances.assert_same_bits(out, want)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [({"bias": np.ones(9, F32)}, ValueError, r"layernorm: bias: got shape \(9,\), expected \(8,\)"),
     ({"x_bias": np.ones((2, 8), F32)}, ValueError, r"layernorm: x_bias: got shape \(2, 8\)"),
     ({"x_bias": np.ones(8, np.int32)}, TypeError, "layernorm: x_bias: got dtype int32"),
     ({"weight": None, "weight_offset": 1.0}, ValueError, "layernorm: weight_offset: got 1.0, expected 0.0 when weight is None"),
     ({"eps": -1.0}, ValueError, "layernorm: eps: got -1.0"), ({"cast": "late"}, ValueError, "layernorm: cast: got 'late'"),
     ({"x": np.ones((2, 8))}, TypeError, "layernorm: x: got dtype float64|layernorm: x")],
)  # fmt: skip
def test_errors(change, error, text):
    given = {"x": np.ones((2, 8), F32), "weight": np.ones(8, F32), "bias": np.ones(8, F32), **change}
    if given["x"].dtype == np.float64:
        given["x"] = given["x"].astype(np.int32)
        text = "layernorm: x: got dtype int32"
    with pytest.raises(error, match=text):
        jaxnorm.layernorm(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)


def test_errors_of_the_residual():
    x, w = np.ones((4, 8), F32), np.ones(8, F32)
    with pytest.raises(ValueError, match=r"add_layernorm: residual: got shape \(2, 8\), expected \(4, 8\) as x"):
        jaxnorm.add_layernorm(x, x[:2], w, w)
    with pytest.raises(ValueError, match="add_layernorm: residual_rounding: got 'up'"):
        jaxnorm.add_layernorm(x, x, w, w, residual_rounding="up")


def test_the_oracle_tells_a_wrong_answer():
    case = Case(64, (3,))
    a = case.arrays()
    (y,) = case.call(a)
    for wrong in (replace(case, options={"eps": 0.1}), replace(case, options={"weight_offset": 0.1})):
        with pytest.raises(AssertionError, match="y"):
            wrong.check_results(a, (y,))
