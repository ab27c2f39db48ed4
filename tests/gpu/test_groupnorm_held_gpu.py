"""groupnorm held by teams of blocks all over the device (sm_90): values, bits of its stand-ins, words that are clear again."""

from __future__ import annotations

from dataclasses import replace

import driver
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cases_groupnorm import F16, F32, SD_VAE, Case
from jaxnorm.kernels.configs import groupnorm_hip

import jaxnorm
from jaxnorm._compile import target

pytestmark = pytest.mark.gpu
IMAGE = Case(4, (128, 128), 320, 32)
CASES = (
    IMAGE,  # two teams to a block
    replace(IMAGE, silu=True),
    replace(IMAGE, x=F16, weight=F32, bias=None),
    Case(16, (64, 64), 320, 32, silu=True),
    replace(SD_VAE[1], batch=2, silu=True),  # some of it fetched again
    SD_VAE[0],
    replace(SD_VAE[0].first, silu=True),
    replace(SD_VAE[1].first, batch=2, x=F16),
)


def need_held(case: Case) -> str:
    """The name of the target."""
    name = target.of_device(jax.devices()[0])
    assert name is not None
    if name != "sm_90":
        pytest.skip(f"{name} holds no images")
    assert groupnorm_hip.plan(case.problem("groupnorm_fwd", name, stats=False))[0].kernel.endswith("_held")
    return name


def function(case: Case, backend: str = "hip"):
    return jax.jit(lambda x, w, b: jaxnorm.groupnorm(x, w, b, backend=backend, **case.options))


def raw(y: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(y, jnp.uint16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_xla(case):
    need_held(case)
    args = [None if a is None else jnp.asarray(a) for a in case.arrays()]
    y, want = (np.asarray(function(case, backend)(*args)) for backend in ("hip", "xla"))
    assert (tolerances.ulp_distance(y, want) > 1).mean() < 1e-3
    np.testing.assert_allclose(y.astype(np.float32), want.astype(np.float32), rtol=2.0**-7, atol=1e-4)


@pytest.mark.parametrize("fill", [0xFF, 0x00], ids=hex)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 6)], ids=str)
def test_bits_of_the_stand_ins(case, fill):
    """Whatever lies in the words before; after it they are clear, and nothing else was written."""
    problem, gpu = case.problem("groupnorm_fwd", need_held(case)), driver.Driver()
    operands = {n: a for n, a in zip(("x", "weight", "bias"), case.arrays(), strict=True) if a is not None}
    met, apart = (driver.run_guarded(gpu, "hip", problem, operands, fill, room=room) for room in (True, False))
    assert not met["words"].any()
    for name in ("y", "stats"):
        tolerances.assert_same_bits(met[name], apart[name], name)


@pytest.mark.parametrize("case", [IMAGE, replace(SD_VAE[1], batch=2, silu=True)], ids=str)
def test_in_a_loop(case):
    """Fifty times in one program, the examples in turn at other places: the same words again and again."""
    need_held(case)
    f, (x, w, b) = function(case), map(jnp.asarray, case.arrays())
    first = raw(f(x, w, b))

    def step(i, wrong):
        y = jnp.roll(f(jnp.roll(x, i, 0), w, b), -i, 0)
        return wrong + jnp.sum(raw(y) != first)

    assert int(jax.jit(lambda: jax.lax.fori_loop(0, 50, step, jnp.zeros((), jnp.int32)))()) == 0


def test_calls_of_one_program():
    """A chain of eight, which may be one graph, and two that do not wait for each other; run again and again."""
    need_held(IMAGE)
    f, (x, w, b) = function(IMAGE), map(jnp.asarray, IMAGE.arrays())
    other = jnp.flip(x, 1)

    def eight(x):
        for _ in range(8):
            x = f(x, w, b)
        return x

    want = eight(x)
    chain, two = jax.jit(eight), jax.jit(lambda x, z: (f(x, w, b), f(z, w, b)))
    pair = f(x, w, b), f(other, w, b)
    for _ in range(10):
        tolerances.assert_same_bits(chain(x), want, "chain")
        for got, y in zip(two(x, other), pair, strict=True):
            tolerances.assert_same_bits(got, y, "two")


def test_an_example_in_a_batch_that_clusters_serve():
    """The same bits beside a NaN and alone, where other launches serve."""
    case = Case(16, (64, 64), 320, 32, silu=True)
    need_held(case)
    f, (x, w, b) = function(case), case.arrays()
    y = np.asarray(f(x, w, b))
    spoiled = x.copy()
    spoiled[7].flat[5] = np.nan
    beside = np.asarray(f(spoiled, w, b))
    keep = [i for i in range(16) if i != 7]
    tolerances.assert_same_bits(beside[keep], y[keep], "beside a NaN")
    assert np.isnan(beside[7].astype(np.float32)).any()
    for rows in (slice(0, 1), slice(13, 16)):
        tolerances.assert_same_bits(f(x[rows], w, b), y[rows], str(rows))


def test_gradients_keep_the_statistics():
    """The backward reads what this kernel saves."""
    case = Case(16, (64, 64), 320, 32, silu=True)
    need_held(case)
    args, dy = tuple(map(jnp.asarray, case.arrays())), jnp.asarray(case.cotangent())
    few = lambda rows: jax.vjp(function(case), args[0][rows], *args[1:])[1](dy[rows])[0]  # noqa: E731
    tolerances.assert_same_bits(few(slice(0, 16))[3:5], few(slice(3, 5)), "dx")
