"""groupnorm's backward held by teams of blocks all over the device (sm_90): values, bits of its stand-ins, words that are clear
again."""

from __future__ import annotations

from dataclasses import replace

import driver
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cases_groupnorm import F16, F32, Case
from jaxnorm.kernels.configs import groupnorm_hip

import jaxnorm
from jaxnorm._compile import target

pytestmark = pytest.mark.gpu
IMAGE = Case(2, (128, 128), 512, 32)  # some of it fetched again
CASES = (
    IMAGE,
    replace(IMAGE, silu=True),
    replace(IMAGE, x=F16, weight=F32, bias=None),
    Case(2, (128, 128), 320, 32, silu=True),  # chunks with several groups
)
GRADIENTS = ("dx", "dweight", "dbias")


def need_held(case: Case) -> str:
    """The name of the target."""
    name = target.of_device(jax.devices()[0])
    assert name is not None
    if name != "sm_90":
        pytest.skip(f"{name} holds no images")
    assert groupnorm_hip.plan(case.problem("groupnorm_bwd", name))[0].kernel.endswith("_held")
    return name


def saved(case: Case, backend: str = "hip"):
    """The function that goes back, for arrays on the device."""
    f = lambda x, w, b: jaxnorm.groupnorm(x, w, b, backend=backend, **case.options)  # noqa: E731
    return jax.jit(lambda x, w, b: jax.vjp(f, x, w, b)[1])


def arrays(case: Case):
    return [None if a is None else jnp.asarray(a) for a in case.arrays()], jnp.asarray(case.cotangent())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_xla(case):
    """dx, rounded once, beside plain JAX in the same dtypes; dweight and dbias are sums of 32768 terms a channel."""
    need_held(case)
    args, dy = arrays(case)
    got, want = (jax.jit(lambda back, g: back(g))(saved(case, b)(*args), dy) for b in ("hip", "xla"))
    dx, expected = (np.asarray(g[0]) for g in (got, want))
    assert (tolerances.ulp_distance(dx, expected) > 1).mean() < 1e-3
    for name, a, b in zip(GRADIENTS[1:], got[1:], want[1:], strict=True):
        if b is not None:
            a, b = (np.asarray(v, np.float64) for v in (a, b))
            np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=2.0**-7 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("fill", [0xFF, 0x00], ids=hex)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_bits_of_the_stand_ins(case, fill):
    """Whatever lies in the words before; after it they are clear, and nothing else was written."""
    problem, gpu = case.problem("groupnorm_bwd", need_held(case)), driver.Driver()
    args, dy = arrays(case)
    leaves = jax.tree.leaves(saved(case)(*args))
    stats = next(a for a in leaves if a.shape == (case.batch, 3, case.channels))
    operands = dict(zip(("x", "weight", "bias"), args, strict=True)) | {"dy": dy, "stats": stats}
    operands = {n: np.asarray(a) for n, a in operands.items() if a is not None and problem.has(n)}
    met, apart = (driver.run_guarded(gpu, "hip", problem, operands, fill, room=room) for room in (True, False))
    assert not met["words"].any()
    for name in GRADIENTS:
        if problem.has(name):
            tolerances.assert_same_bits(met[name], apart[name], name)


@pytest.mark.parametrize("case", [IMAGE, CASES[3]], ids=str)
def test_in_a_loop(case):
    """Fifty times in one program, the examples in turn at other places: the same words again and again."""
    need_held(case)
    (x, w, b), dy = arrays(case)
    raw = lambda x, dy: jax.lax.bitcast_convert_type(saved(case)(x, w, b)(dy)[0], jnp.uint16)  # noqa: E731
    first = jax.jit(raw)(x, dy)

    def step(i, wrong):
        return wrong + jnp.sum(jnp.roll(raw(jnp.roll(x, i, 0), jnp.roll(dy, i, 0)), -i, 0) != first)

    assert int(jax.jit(lambda: jax.lax.fori_loop(0, 50, step, jnp.zeros((), jnp.int32)))()) == 0


def test_an_example_in_a_batch_that_others_serve():
    """The same bits of dx beside a NaN and in a batch of two launches."""
    name = need_held(IMAGE)
    assert not groupnorm_hip.plan(replace(IMAGE, batch=4).problem("groupnorm_bwd", name))[0].meeting
    (x, w, b), dy = arrays(IMAGE)
    go = lambda x, dy: np.asarray(jax.jit(lambda back, g: back(g))(saved(IMAGE)(x, w, b), dy)[0])  # noqa: E731
    dx = go(x, dy)
    spoiled = go(x.at[1, 5, 7, 11].set(jnp.nan), dy)
    tolerances.assert_same_bits(spoiled[0], dx[0], "beside a NaN")
    assert np.isnan(spoiled[1].astype(np.float32)).any()
    four = go(jnp.concatenate([x, x[::-1]]), jnp.concatenate([dy, dy[::-1]]))
    for i, of in ((1, 1), (3, 0)):
        tolerances.assert_same_bits(four[i], dx[of], "in a larger batch")
