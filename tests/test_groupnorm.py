"""groupnorm on the CPU: numbers against the float64 oracle and against flax.linen, edges, and errors."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import needs
import numpy as np
import oracle_groupnorm as oracle
import pytest
import tolerances
from cases import DTYPE_PAIRS
from cases_groupnorm import BF16, EVERY_SMALL, F32, LARGE_MEAN, SD_UNET, VIDEO, Case
from test_errors import check_text

import jaxnorm


def both(case: Case, backend: str | None = None):
    """``(args, cotangent) -> (y, gradients)`` in one program; absent vectors stay absent."""

    def run(args, dy):
        there = [i for i, a in enumerate(args) if a is not None]

        def f(*present):
            full = dict(zip(there, present, strict=True))
            return jaxnorm.groupnorm(*(full.get(i) for i in range(3)), backend=backend, **case.options)

        y, pull = jax.vjp(f, *(args[i] for i in there))
        gradients = dict(zip(there, pull(dy), strict=True))
        return y, tuple(gradients.get(i) for i in range(3))

    return jax.jit(run)


def check(case: Case, backend: str | None = None) -> None:
    args, dy = case.arrays(), case.cotangent()
    y, gradients = both(case, backend)(args, dy)
    want = case.forward(args)
    oracle.assert_y(y, want, case.out_dtype)
    if (
        case.mean >= 1e4
    ):  # the contract allows 2^-22 * mean / deviation; what the mean lost to rounding is not forgotten
        np.testing.assert_allclose(np.asarray(y), want.y(), rtol=0, atol=2e-5)
    oracle.assert_gradients(gradients, args, oracle.backward(want, dy))


@pytest.mark.parametrize("case", [*EVERY_SMALL, *LARGE_MEAN], ids=str)
def test_against_the_oracle(case):
    check(case)


def test_the_cases_hold_every_pair_of_dtypes():
    assert {(c.x, c.weight) for c in EVERY_SMALL if c.weight} == set(DTYPE_PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SD_UNET, *(c.first for c in SD_UNET), *VIDEO[:2]], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_models(case, silu):
    check(replace(case, silu=silu))


@pytest.mark.parametrize("spatial", [(6, 5), (4,)])
@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_flax_linen_agrees(spatial, channel_axis):
    """Also with reduction axes that linen is told: those of channels first are not its default."""
    try:
        import flax.linen as nn
    except ImportError as e:
        needs.need("flax", False, str(e))
    case = Case(3, spatial, 12, 4, x=F32, weight=F32, bias=F32, last=channel_axis == -1)
    x, w, b = case.arrays()
    y = jaxnorm.groupnorm(x, w, b, num_groups=4, channel_axis=channel_axis)
    moved = jnp.moveaxis(x, channel_axis, -1)
    axes = tuple(range(1, moved.ndim))
    module = nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False, reduction_axes=axes)
    want = jnp.moveaxis(module.apply({"params": {"scale": w, "bias": b}}, moved), -1, channel_axis)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-6)
    # statistics of each position alone: linen's reduction axes without the spatial ones, ours with the positions in the batch
    apart = nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False, reduction_axes=(moved.ndim - 1,))
    each = jaxnorm.groupnorm(moved.reshape(-1, 12), w, b, num_groups=4).reshape(moved.shape)
    np.testing.assert_allclose(each, apart.apply({"params": {"scale": w, "bias": b}}, moved), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("last", [True, False])
def test_gradients_by_finite_differences(last):
    """A second opinion on the oracle's own gradient formulas."""
    case = Case(2, (3, 3), 8, 2, x=F32, weight=F32, bias=F32, silu=True, last=last)
    args, dy = case.arrays(), case.cotangent()
    g = oracle.backward(case.forward(args), dy)
    rng = np.random.default_rng(0)
    directions = [rng.standard_normal(a.shape) for a in args]

    def value(t):
        moved = [a.astype(np.float64) + t * d for a, d in zip(args, directions, strict=True)]
        return float(np.sum(oracle.forward(*moved, **case.options).y() * dy.astype(np.float64)))

    t = 2.0**-10
    want = (8 * (value(t) - value(-t)) - (value(2 * t) - value(-2 * t))) / (12 * t)
    got = sum(float(np.sum(a * d)) for a, d in zip((g.dx, g.dweight, g.dbias), directions, strict=True))
    assert abs(got - want) < 1e-8 * sum(float(np.linalg.norm(d)) for d in directions)


@pytest.mark.parametrize("channel_axis", [-1, 1])
@pytest.mark.parametrize("value", [0.0, 3.25, 10000.333])
def test_a_constant_group_gives_the_bias(channel_axis, value):
    case = Case(2, (5, 3), 12, 3, x=F32, weight=F32, bias=F32, last=channel_axis == -1)
    x, w, b = case.arrays()
    x[:1] = value
    y = np.moveaxis(np.asarray(both(case)((x, w, b), case.cotangent())[0]), channel_axis, -1)
    np.testing.assert_allclose(y[0], np.broadcast_to(b, y[0].shape), atol=1e-5)
    assert np.isfinite(
        np.asarray(jaxnorm.groupnorm(x, w, b, num_groups=3, eps=0.0, channel_axis=channel_axis))[1]
    ).all()


@pytest.mark.parametrize(
    "case", [Case(6, (5, 3), 20, 4, x=BF16, silu=True), Case(6, (15,), 20, 4, x=F32, last=False)], ids=str
)
def test_an_example_does_not_depend_on_its_batch(case):
    """Alone, in another position, beside a NaN and an infinity: the same bits, forward and dx."""
    args, dy = case.arrays(), case.cotangent()
    run = both(case)
    y, (dx, *_) = run(args, dy)
    spoiled = args[0].copy()
    spoiled[4].flat[3], spoiled[5].flat[7] = np.nan, np.inf
    y2, (dx2, *_) = run((spoiled, *args[1:]), dy)
    for a, b in ((y, y2), (dx, dx2)):
        tolerances.assert_same_bits(np.asarray(b)[:4], np.asarray(a)[:4], "beside bad examples")
    group = np.asarray(oracle.to_groups(np.asarray(y2), 4, -1 if case.last else 1))[4]
    assert np.isnan(group).all((0, 2)).sum() == 1, "a NaN stays in its group"
    for rows in (slice(2, 3), slice(1, 4)):
        part = run((args[0][rows], *args[1:]), dy[rows])
        tolerances.assert_same_bits(part[0], np.asarray(y)[rows], "y")
        tolerances.assert_same_bits(part[1][0], np.asarray(dx)[rows], "dx")


def test_channel_axis_counts_from_either_end():
    case = Case(2, (5, 3), 12, 3, x=F32, weight=F32, bias=F32)
    x, w, b = case.arrays()
    last = jaxnorm.groupnorm(x, w, b, num_groups=3)
    first = np.moveaxis(x, -1, 1)
    for axis in (3, -1):
        tolerances.assert_same_bits(jaxnorm.groupnorm(x, w, b, num_groups=3, channel_axis=axis), last)
    for axis in (1, -3):
        y = jaxnorm.groupnorm(first, w, b, num_groups=3, channel_axis=axis)
        np.testing.assert_allclose(np.moveaxis(np.asarray(y), 1, -1), last, rtol=1e-5, atol=1e-6)


def test_empty_arrays():
    w = np.ones(8, np.float32)
    for shape in ((0, 3, 8), (2, 0, 8)):
        y, pull = jax.vjp(lambda x, w: jaxnorm.groupnorm(x, w, None, num_groups=2), jnp.zeros(shape, BF16), w)
        dx, dw = pull(y)
        assert y.shape == dx.shape == shape
        tolerances.assert_same_bits(dw, np.zeros(8, np.float32))


def test_second_derivatives_are_those_of_the_reference():
    case = Case(2, (3,), 8, 2, x=F32, weight=F32, bias=F32, silu=True)
    args = case.arrays()
    f = lambda *a: jnp.sum(jnp.sin(jaxnorm.groupnorm(*a, backend="xla", **case.options)))  # noqa: E731

    def plain(x, w, b):
        g = x.reshape(2, 3, 2, 4)
        d = g - g.mean((1, 3), keepdims=True)
        v = (d * jax.lax.rsqrt((d * d).mean((1, 3), keepdims=True) + 1e-5)).reshape(x.shape) * w + b
        return jnp.sum(jnp.sin(v * jax.nn.sigmoid(v)))

    direction = [np.random.default_rng(1).standard_normal(a.shape).astype(np.float32) for a in args]
    along = lambda g: lambda *a: sum(jnp.vdot(p, q) for p, q in zip(jax.grad(g, (0, 1, 2))(*a), direction, strict=True))  # noqa: E731
    for a, b in zip(
        jax.jit(jax.grad(along(f), (0, 1, 2)))(*args), jax.jit(jax.grad(along(plain), (0, 1, 2)))(*args), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


# --- errors

X, W = np.ones((2, 3, 8), np.float32), np.ones(8, np.float32)
VALUE_ERRORS = [
    ("x", {"x": np.ones(8, np.float32)}, ["(8,)", "[B, *spatial, C]"]),
    ("num_groups", {"num_groups": 3}, ["3", "divisor", "8"]),
    ("num_groups", {"num_groups": 0}, ["0", "divisor"]),
    ("num_groups", {"num_groups": 16}, ["16", "8 channels"]),
    ("weight", {"weight": np.ones(7, np.float32)}, ["(7,)", "(8,)", "channels"]),
    ("weight", {"weight": np.ones(3, np.float32)}, ["(3,)", "(8,)"]),
    ("bias", {"bias": np.ones((1, 8), np.float32)}, ["(1, 8)", "(8,)"]),
    ("channel_axis", {"channel_axis": 0}, ["0", "-1", "1", "(2, 3, 8)"]),
    ("channel_axis", {"channel_axis": 3}, ["3", "moveaxis"]),
    ("channel_axis", {"channel_axis": -3}, ["-3", "-1"]),
    ("weight", {"channel_axis": 1, "num_groups": 1}, ["(8,)", "(3,)"]),
    ("activation", {"activation": "swish"}, ["'swish'", "'silu'", "None"]),
    ("activation", {"activation": jax.nn.silu}, ["'silu'"]),
    ("eps", {"eps": -1.0}, ["-1.0", ">= 0"]),
    ("backend", {"backend": "cuda"}, ["'cuda'", "'hip'"]),
]
TYPE_ERRORS = [
    ("x", {"x": np.ones((2, 3, 8), np.int32)}, ["int32", "bfloat16"]),
    ("bias", {"bias": np.ones(8, np.int8)}, ["int8", "float32"]),
    ("num_groups", {"num_groups": 2.0}, ["float", "integer"]),
    ("num_groups", {"num_groups": True}, ["bool", "integer"]),
    ("channel_axis", {"channel_axis": None}, ["NoneType", "integer"]),
    ("out_dtype", {"out_dtype": "int8"}, ["int8", "float16"]),
    ("eps", {"eps": "1e-5"}, ["str", "number"]),
]


EVERY_ERROR = [(ValueError, *e) for e in VALUE_ERRORS] + [(TypeError, *e) for e in TYPE_ERRORS]


@pytest.mark.parametrize(("error", "argument", "given", "parts"), EVERY_ERROR)
def test_bad_arguments(error, argument, given, parts):
    a = {"x": X, "weight": W, "bias": W, "num_groups": 2} | given
    with pytest.raises(error) as raised:
        jaxnorm.groupnorm(a.pop("x"), a.pop("weight"), a.pop("bias"), **a)
    check_text(raised.value, "groupnorm", argument, *parts)


def test_kernel_backends_need_a_gpu():
    with pytest.raises(jaxnorm.UnsupportedError, match="groupnorm"):
        jaxnorm.groupnorm(X, W, W, num_groups=2, backend="hip")


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(TypeError, match="float64"):
        jaxnorm.groupnorm(jnp.ones((2, 3, 8), jnp.float64), W, W, num_groups=2)
