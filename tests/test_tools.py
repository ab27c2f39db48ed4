"""The tools of the tests, tested: a comparer that accepts everything proves nothing."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import cases
import hlo
import ml_dtypes
import needs
import numpy as np
import oracle
import pytest
import tolerances

BF16 = ml_dtypes.bfloat16


def one(value, dtype):
    return np.asarray([value], dtype)


@pytest.mark.parametrize(
    "dtype", [np.float16, BF16, np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2]
)
def test_ulp_distance_of_hand_made_pairs(dtype):
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]

    def raw(value):
        return np.asarray([value], unsigned).view(dtype)

    distance = lambda a, b: int(tolerances.ulp_distance(a, b)[0])  # noqa: E731
    sign = 1 << (8 * np.dtype(dtype).itemsize - 1)
    assert distance(one(1.0, dtype), one(1.0, dtype)) == 0
    up = raw(int(one(1.0, dtype).view(unsigned)[0]) + 1)
    assert distance(one(1.0, dtype), up) == 1 == distance(up, one(1.0, dtype))
    assert distance(raw(3), raw(sign | 2)) == 5, "across zero"
    if dtype is not ml_dtypes.float8_e4m3fnuz:  # there the pattern of -0 is the NaN
        assert distance(raw(0), raw(sign)) == 0, "the two zeros"
        assert distance(raw(sign), raw(1)) == 1
    nan = one(np.nan, dtype)
    assert distance(nan, nan) == 0
    assert distance(nan, one(1.0, dtype)) == tolerances.FAR == distance(one(0.0, dtype), nan)
    if dtype in (np.float16, BF16, np.float32, ml_dtypes.float8_e5m2):
        inf = one(np.inf, dtype)
        assert distance(inf, inf) == 0 and distance(inf, -inf) > 2 and distance(inf, one(1.0, dtype)) > 2


def test_ulp_distance_refuses_other_dtypes_and_shapes():
    with pytest.raises(ValueError):
        tolerances.ulp_distance(np.zeros(3, np.float32), np.zeros(3, np.float16))
    with pytest.raises(ValueError):
        tolerances.ulp_distance(np.zeros(3, np.float32), np.zeros((3, 1), np.float32))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_round_to_is_nearest_even(name):
    values = np.concatenate(
        [
            cases.rng().standard_normal(20000) * 10.0 ** cases.rng(1).integers(-45, 38, 20000),
            [0.0, -0.0, np.inf, -np.inf, np.nan],
        ]
    )
    got = oracle.round_to(values, name)
    assert got.dtype == cases.dtype(name)
    if name != "bfloat16":  # numpy's own conversions from float64 round once
        with np.errstate(all="ignore"):
            tolerances.assert_same_values(got, values.astype(got.dtype))
    tie, just_above = (
        1.0 + 2.0**-8,
        1.0 + 2.0**-8 + 2.0**-40,
    )  # through float32 the second would round twice, down to 1.0
    assert float(oracle.round_to(np.float64(tie), "bfloat16")) == 1.0
    assert float(oracle.round_to(np.float64(just_above), "bfloat16")) == 1.0 + 2.0**-7
    assert float(oracle.round_to(np.float64(1.0 + 3 * 2.0**-8), "bfloat16")) == 1.0 + 2.0**-6
    assert float(oracle.round_to(np.float64(2.0**-134 * 3), "bfloat16")) == 2.0**-132, "subnormals, a tie to even"
    assert np.isinf(oracle.round_to(np.float64(3.4e38 * 2), name))


def _forward(dtype="bfloat16", **options):
    x, w = cases.arrays(cases.Workload("t", 64, rows=8, x_dtype=dtype, weight_dtype="float32"))
    return oracle.rmsnorm(x, w, **options), x, w


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_assert_y_refuses(dtype):
    forward, _, _ = _forward(dtype, pad_to_multiple=48)
    good = forward.result
    tolerances.assert_y(good, forward)
    for change in (0.98, 1.02, -1.0, np.nan):
        bad = good.copy()
        bad[3, 5] = bad[3, 5] * np.asarray(change, bad.dtype)
        with pytest.raises(AssertionError):
            tolerances.assert_y(bad, forward)
    for tail in (-0.0, 1.0, np.nan):
        bad = good.copy()
        bad[0, -1] = tail
        with pytest.raises(AssertionError, match="tail"):
            tolerances.assert_y(bad, forward)
    with pytest.raises(AssertionError):
        tolerances.assert_y(good.astype("float64"), forward)
    two = good.copy()
    tolerances.bits(two)[2, 2] += 2 if dtype != "float32" else 200
    with pytest.raises(AssertionError):
        tolerances.assert_y(two, forward)


def test_assert_gradients_refuse():
    forward, _, w = _forward()
    dy = cases.normal(cases.rng(3), (8, 64), "bfloat16")
    backward = oracle.rmsnorm_backward(forward, w, dy)
    dx = oracle.round_to(backward.dx, "bfloat16")
    tolerances.assert_dx(dx, backward)
    tolerances.assert_dweight(backward.dweight.astype(np.float32), backward)
    rms = float(np.sqrt(np.mean(backward.dx[1] ** 2)))
    with pytest.raises(AssertionError):
        tolerances.assert_dx((dx.astype(np.float64) + np.eye(8, 64) * rms / 16).astype(BF16), backward)
    with pytest.raises(AssertionError):
        tolerances.assert_dweight(
            (backward.dweight + np.eye(1, 64)[0] * 2.0**-16 * backward.dweight_terms).astype(np.float32), backward
        )
    with pytest.raises(AssertionError):
        tolerances.assert_dweight((backward.dweight * 2).astype(np.float32), backward)


@pytest.mark.parametrize("add", [False, True])
def test_oracle_gradient_against_finite_differences(add):
    """The float64 formula against central differences of the float64 forward, at inputs whose roundings do not matter."""
    g = cases.rng(5)
    x, r, d = (g.standard_normal((3, 17)).astype(np.float32) for _ in range(3))
    w = g.uniform(0.5, 1.5, 17)
    dy, dr = g.standard_normal((3, 17)), g.standard_normal((3, 17))
    offset = 1.0

    def loss(n, weight):
        rstd = 1 / np.sqrt(np.mean(n * n, -1, keepdims=True) + 1e-3)
        return np.sum(n * rstd * (weight + offset) * dy) + (np.sum(n * dr) if add else 0.0)

    if add:
        forward = oracle.add_rmsnorm(x, r, w, eps=1e-3, weight_offset=offset)
    else:
        forward = oracle.rmsnorm(x, w, eps=1e-3, weight_offset=offset)
    backward = oracle.rmsnorm_backward(forward, w, dy, dr if add else None, weight_offset=offset)
    n, h = forward.n, 1e-5
    for direction in (d.astype(np.float64), np.eye(3, 17)):
        numeric = (loss(n + h * direction, w) - loss(n - h * direction, w)) / (2 * h)
        assert abs(numeric - np.sum(backward.dx * direction)) < 1e-7
    v = g.standard_normal(17)
    numeric = (loss(n, w + h * v) - loss(n, w - h * v)) / (2 * h)
    assert abs(numeric - np.sum(backward.dweight * v)) < 1e-7


SKIPPING = """
import pytest, needs

def test_named():
    needs.need("hip", False, "there is no compiler")

def test_unnamed():
    pytest.skip("not on this machine")
"""


@pytest.mark.parametrize("require, failed, skipped", [("", 0, 2), ("hip", 1, 1), ("triton,devices=8", 0, 2)])
def test_a_required_skip_is_a_failure(tmp_path, require, failed, skipped):
    here = pathlib.Path(__file__).parent
    for name in ("conftest.py", "needs.py"):
        shutil.copy(here / name, tmp_path)
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env=os.environ | {"JAXNORM_REQUIRE": require}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == (1 if failed else 0), done.stdout
    assert f"{skipped} skipped" in done.stdout and (not failed or f"{failed} failed" in done.stdout), done.stdout


def test_eight_devices():
    import jax

    if jax.default_backend() == "cpu":
        assert len(jax.devices()) == 8


def test_hlo_counter_on_known_collectives():
    """A bare ffi_call gathers its sharded operand: the counter must say so, and must see an all-reduce."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    needs.need_devices(8)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, P("d", None)))

    def bare(x):  # any registered target serves: the program is compiled, not run
        out = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((16,), jnp.float32))
        return jax.ffi.ffi_call("lapack_sgeqrf_ffi", out)(x)[0]

    gather = (
        jax.jit(lambda a: jax.lax.with_sharding_constraint(a * 2, NamedSharding(mesh, P(None, None))))
        .lower(x)
        .compile()
        .as_text()
    )
    assert [(c.kind, c.bytes) for c in hlo.collectives(gather)] == [("all-gather", 16 * 32 * 4)]
    total = jax.jit(lambda a: a.sum(0)).lower(x).compile().as_text()
    assert [(c.kind, c.bytes, c.dtypes) for c in hlo.collectives(total)] == [("all-reduce", 32 * 4, ("f32",))]
    assert hlo.collectives(jax.jit(lambda a: a * 2).lower(x).compile().as_text()) == []
    assert hlo.kinds(jax.jit(bare).lower(x).compile().as_text()) == {"all-gather": 1}
    assert hlo.custom_calls(jax.jit(bare).lower(x).as_text()) == {"lapack_sgeqrf_ffi": 1}
    assert hlo.traffic(gather) == 16 * 32 * 4
