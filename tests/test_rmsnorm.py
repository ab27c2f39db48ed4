"""rmsnorm and add_rmsnorm against the float64 oracle, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from registry import with_gradients
from workloads import check, cotangents, expected, function

import jaxnorm


def ids(works):
    return [pytest.param(w, id=w.id) for w in works]


@pytest.mark.parametrize("work", ids(cases.dtype_workloads()))
def test_dtypes(work):
    check(work)


@pytest.mark.parametrize("work", ids(cases.option_workloads()))
def test_options(work):
    check(work)


@pytest.mark.parametrize("work", ids(cases.shape_workloads()))
def test_shapes(work):
    check(work, backward=work.features <= cases.BACKWARD_FEATURES_MAX)


@pytest.mark.parametrize("work", ids(replace(w, rows=5) for w in cases.MODELS))
def test_models(work):
    check(work.with_residual() if work.features % 1024 == 0 else work)


def test_many_rows_in_dweight():
    """dweight sums 4096 rows: the order must keep the float32 error small."""
    check(cases.Workload("rows", 64, rows=4096, x_dtype="float32", weight_dtype="float32"))
    check(cases.Workload("rows", 48, rows=1000, weight_dtype="bfloat16").with_residual("float32"))


def test_backend_xla_is_what_cpu_runs():
    work = cases.Workload("xla", 200, rows=6, weight_offset=1.0).with_residual("float32")
    check(work, backend="xla")
    args = cases.arrays(work)
    for a, b in zip(jax.jit(function(work, "xla"))(*args), jax.jit(function(work))(*args), strict=True):
        tolerances.assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("add", [False, True], ids=["rmsnorm", "add_rmsnorm"])
def test_special_rows(dtype, add):
    """Zeros, subnormals, outliers and huge values are right; NaN and Inf stay in their row."""
    features = 257
    x = cases.special_rows(features, dtype)
    bad = [cases.SPECIAL_ROWS.index(n) for n in ("nan", "inf")]
    good = [i for i in range(len(x)) if i not in bad]
    work = cases.Workload("special", features, rows=len(x), x_dtype=dtype, weight_dtype="float32", weight_offset=1.0)
    w = cases.weight(cases.rng(2), features, "float32")
    work = work.with_residual("float32") if add else work
    # -0 as residual changes no value of the sum, the sign of zero included
    rest = (np.full(x.shape, -0.0, np.float32), w) if add else (w,)
    cts = cotangents(work)
    run = jax.jit(with_gradients(function(work)))
    results, gradients = run((x, *rest), cts)
    want = expected(work, (x, *rest))
    tolerances.assert_y(results[0], want)
    if add:
        residual_out, good_sum = np.asarray(results[1]), np.asarray(want.residual_out)
        tiny = cases.SPECIAL_ROWS.index("tiny")
        keep = [i for i in range(len(x)) if i != tiny]
        tolerances.assert_same_values(residual_out[keep], good_sum[keep], "residual_out")
    assert not np.isfinite(np.asarray(results[0])[bad].astype(np.float32)).all(axis=-1).any(), "a bad row must show it"
    assert np.isfinite(np.asarray(gradients[0])[good].astype(np.float32)).all()
    # the other rows keep their bits when the bad ones are replaced by harmless values
    clean = x.copy()
    clean[bad] = np.ones((), x.dtype)
    clean_results, clean_gradients = run((clean, *rest), cts)
    tolerances.assert_same_bits(np.asarray(results[0])[good], np.asarray(clean_results[0])[good], "y beside a bad row")
    tolerances.assert_same_bits(
        np.asarray(gradients[0])[good], np.asarray(clean_gradients[0])[good], "dx beside a bad row"
    )
    wanted = oracle.rmsnorm_backward(expected(work, (clean, *rest)), w, *cts, weight_offset=1.0)
    rows = [i for i in good if cases.SPECIAL_ROWS[i] != "tiny"]
    tolerances.assert_dx(
        np.asarray(clean_gradients[0])[rows], replace(wanted, dx=wanted.dx[rows], dx_terms=wanted.dx_terms[rows])
    )


def test_eps_is_inside_the_root():
    """A row whose mean square is far below eps: y = x / sqrt(eps), not x / (|x| + eps)."""
    x = np.full((2, 64), 1e-6, np.float32)
    y = jaxnorm.rmsnorm(x, np.ones(64, np.float32), eps=1e-4)
    np.testing.assert_allclose(y, 1e-4, rtol=1e-5)


def test_the_unrounded_sum_is_normed():
    """float32: the norm must read s, "input": the rounded residual_out; the two differ in this data."""
    work = cases.Workload("rounding", 64, rows=16, x_dtype="float32", weight_dtype="float32").with_residual("bfloat16")
    args = cases.arrays(work)
    f = {r: jax.jit(function(replace(work, residual_rounding=r))) for r in ("float32", "input")}
    wanted = {r: expected(replace(work, residual_rounding=r), args) for r in f}
    assert (wanted["float32"].result != wanted["input"].result).mean() > 0.5
    for r, run in f.items():
        tolerances.assert_y(run(*args)[0], wanted[r], what=r)


@pytest.mark.parametrize("dtype", cases.FLOATS[:2])
def test_the_inner_rounding_survives_compilation(dtype):
    """before_weight must differ from output where the oracle says so; a compiler that drops the rounding is caught here."""
    work = cases.Workload(
        "inner", 512, rows=8, x_dtype=dtype, weight_dtype="float32", out_dtype="float32", cast="before_weight"
    )
    args = cases.arrays(work)
    got = np.asarray(jax.jit(function(work))(*args)[0])
    want, unrounded = expected(work, args), expected(replace(work, cast="output"), args)
    tolerances.assert_y(got, want, "before_weight")
    assert (np.abs(got - unrounded.y) > 2.0**-14 * np.abs(unrounded.y)).mean() > 0.3


def test_before_weight_keeps_float16_subnormals():
    """The inner rounding of float16 must not flush: an outlier makes the other products subnormal."""
    x = np.full((1, 1024), 2e-3, np.float16)
    x[0, 0] = 6e4
    w = np.full(1024, 1024.0, np.float32)
    want = oracle.rmsnorm(x, w, cast="before_weight", out_dtype="float32")
    assert np.count_nonzero(want.y) == 1024 and abs(want.y[0, 1]) / 1024 < 6e-5
    got = jax.jit(lambda x, w: jaxnorm.rmsnorm(x, w, cast="before_weight", out_dtype="float32"))(x, w)
    tolerances.assert_y(got, want, "before_weight")


OPTION_SETS = [
    cases.Workload("bits", 130, rows=9),
    cases.Workload("bits", 130, rows=9, x_dtype="float32", weight_dtype="float32", weight_offset=1.0).with_residual(
        "bfloat16"
    ),
    cases.Workload(
        "bits", 130, rows=9, weight_dtype="float32", cast="before_weight", residual_rounding="input"
    ).with_residual("float16"),
]


@pytest.mark.parametrize("work", ids(OPTION_SETS))
def test_jit_and_eager_give_the_same_bits(work):
    args, cts = cases.arrays(work), cotangents(work)
    both = with_gradients(function(work))
    args, cts = (tuple(map(jnp.asarray, t)) for t in (args, cts))
    for a, b in zip(jax.tree.leaves(both(args, cts)), jax.tree.leaves(jax.jit(both)(args, cts)), strict=True):
        tolerances.assert_same_bits(a, b)


@pytest.mark.parametrize("work", ids(OPTION_SETS[:2]))
def test_two_runs_and_two_compilations_give_the_same_bits(work):
    args, cts = cases.arrays(replace(work, rows=300)), cotangents(replace(work, rows=300))
    runs = [jax.jit(lambda a, c: with_gradients(function(work))(a, c)) for _ in range(2)]
    first = jax.tree.leaves(runs[0](args, cts))
    for run in (runs[0], runs[1]):
        for a, b in zip(first, jax.tree.leaves(run(args, cts)), strict=True):
            tolerances.assert_same_bits(a, b)


def test_dtype_of_results():
    x, w = jnp.ones((2, 8), jnp.bfloat16), jnp.ones(8, jnp.float32)
    assert jaxnorm.rmsnorm(x, w).dtype == jnp.bfloat16
    assert jaxnorm.rmsnorm(x, w, out_dtype=jnp.float32).dtype == jnp.float32
    assert jaxnorm.rmsnorm(x, w, out_dtype="float16").dtype == jnp.float16
    y, r = jaxnorm.add_rmsnorm(x, jnp.ones((2, 8), jnp.float32), w)
    assert (y.dtype, r.dtype) == (jnp.bfloat16, jnp.float32)


def test_dweight_of_no_rows_is_zero():
    x, w = jnp.zeros((0, 16), jnp.bfloat16), jnp.ones(16, jnp.float32)
    dw = jax.grad(lambda w: jaxnorm.rmsnorm(x, w).astype(jnp.float32).sum())(w)
    tolerances.assert_same_bits(dw, np.zeros(16, np.float32))


def test_default_eps_and_weight_none():
    x = cases.normal(cases.rng(), (3, 40), "float32", std=1e-3)
    tolerances.assert_y(jaxnorm.rmsnorm(x, None), oracle.rmsnorm(x, None))
    y, s = jaxnorm.add_rmsnorm(x, x, None)
    tolerances.assert_y(y, oracle.add_rmsnorm(x, x, None))
    tolerances.assert_same_bits(s, x + x)
