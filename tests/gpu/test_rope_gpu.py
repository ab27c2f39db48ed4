"""The operators on heads with real kernels: numbers, gradients, guard bytes, invariance, launches."""

from __future__ import annotations

import re
from dataclasses import replace

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle_rope
import pytest
import tolerances
from driver import Driver, run_guarded
from oracle_rope import BF16, F16, F32, Case, TwoStream, run

import jaxnorm as jn
from jaxnorm import _explain, _launch
from jaxnorm._compile import target

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])

LARGE = [
    Case((64, 8), 128, (173,), weights=(BF16, BF16)),
    Case((32, 8), 128, (2, 65), shared=True, weights=(BF16, BF16), index="int64"),
    Case((4, 1), 256, (257,), 64, weights=(F32, F32), offset=1.0),
    Case((16, 8), 128, (64,), sections=(24, 20, 20), interleaved=True, weights=(BF16, BF16)),
    Case((64, 8), 64, (129,), style="gptj", dtypes=(F16, F16), weights=(F16, F32)),
    Case((64, 8), 128, (173,)),
    Case((32, 32, 8, 1, 2), 128, (33,), dtypes=(BF16, F32, F16, BF16, BF16)),
]
CASES = oracle_rope.ROPE_CASES + oracle_rope.QK_CASES + LARGE
TWO = [*oracle_rope.TWO_CASES, TwoStream(2, (128, 300), (24, 24), 128, weights=(BF16,) * 4)]


@backends
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, backend):
    with jax.enable_x64(case.index == "int64"):
        a = case.arrays()
        results, gradients = run(case, a, backend)
        case.check(a, results, backend)
        case.check_gradients(a, gradients, backend)


@backends
@pytest.mark.parametrize("case", TWO, ids=str)
def test_two_streams_against_the_oracle(case, backend):
    a = case.arrays()
    (q, k), gradients = run(case, a, backend)
    case.check(a, q, k, backend)
    case.check_gradients(a, gradients, backend)


@pytest.fixture(scope="module")
def driver():
    return Driver()


@backends
@pytest.mark.parametrize(
    "case", [CASES[1], CASES[5], oracle_rope.QK_CASES[3], oracle_rope.QK_CASES[4], TWO[1]], ids=str
)
def test_guard_bytes(case, backend, driver):
    """No byte outside of the results changes; NaN in the guards reaches no result."""
    a = case.arrays()
    for backward in (False, True):
        problem, operands = case.problem(a, backward, target.of_device(jax.devices()[0]) or "")
        for fill in (0xFF, 0xCC):
            case.check_stage(a, run_guarded(driver, backend, problem, operands, fill), backward, f"{backend} guarded")


BATCHES = [Case((8, 2), 128, (9000,), weights=(BF16, BF16)), Case((5,), 80, (9000,), weights=None, dtypes=(BF16,))]


@backends
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_a_token_has_the_same_bits_in_any_batch(case, backend):
    """Alone, in 7, in 1000 and in 9000 tokens; dx, too."""
    a = jax.tree.map(jnp.asarray, case.arrays())

    def cut(t):
        return {n: v[:t] if n[0] in "xgp" else v for n, v in a.items()}

    whole, gradients = run(case, a, backend)
    for t in (1, 7, 1000):
        few, few_gradients = run(replace(case, lead=(t,)), cut(t), backend)
        for i in range(len(case.heads)):
            tolerances.assert_same_bits(few[i], whole[i][:t], f"y{i} of {t}")
            tolerances.assert_same_bits(few_gradients[f"x{i}"], gradients[f"x{i}"][:t], f"dx{i} of {t}")
    again, again_gradients = run(case, a, backend)
    for one, other in zip(jax.tree.leaves((whole, gradients)), jax.tree.leaves((again, again_gradients)), strict=True):
        tolerances.assert_same_bits(one, other, "two runs")


@backends
def test_one_launch(backend):
    """One custom call forward, without a copy, also for slices of a packed projection; one backward."""
    case = Case((8, 2), 128, (64,), weights=(BF16, BF16), outside=False)
    a = jax.tree.map(jnp.asarray, case.arrays())
    text = jax.jit(lambda a: case.call(a, backend)).lower(a).compile().as_text()
    assert hlo.launches(text) == 1, hlo.custom_calls(text)
    assert not re.search(r"= \S+ (copy|fusion)\(", text), text
    three = {"sections": (24, 20, 20)}
    for options in ({}, {"shared": True}, three, three | {"shared": True}):
        batch = Case((8, 2), 128, (2, 64), **options)
        b = jax.tree.map(jnp.asarray, batch.arrays())
        text = jax.jit(lambda b, batch=batch: batch.call(b, backend)).lower(b).compile().as_text()
        assert hlo.launches(text) == 1 and not re.search(r"= \S+ (copy|fusion)\(", text), text
    text = jax.jit(lambda a: run(case, a, backend)).lower(a).compile().as_text()
    assert hlo.launches(text) == 2, hlo.custom_calls(text)


@backends
def test_slices_of_a_packed_projection(backend):
    case = Case((8, 2), 128, (33,), weights=(BF16, BF16), outside=False)
    a = jax.tree.map(jnp.asarray, case.arrays())
    qkv = jnp.concatenate([a["x0"].reshape(33, -1), a["x1"].reshape(33, -1), jnp.ones((33, 256), jnp.bfloat16)], -1)

    def packed(qkv, a):
        q, k = qkv[:, : 8 * 128].reshape(33, 8, 128), qkv[:, 8 * 128 : 10 * 128].reshape(33, 2, 128)
        return case.call(a | {"x0": q, "x1": k}, backend)

    want = case.call(a, backend)
    for one, other in zip(jax.jit(packed)(qkv, a), want, strict=True):
        tolerances.assert_same_bits(one, other)


@backends
def test_transformations(backend):
    """vmap, scan, checkpoint and donation give the bits of plain calls."""
    case = Case((4, 2), 64, (3, 5), weights=(BF16, F32), outside=False)
    a = jax.tree.map(jnp.asarray, case.arrays())
    want = case.call(a, backend)
    rows = {n: a[n] for n in ("x0", "x1", "positions")}
    shared = {n: v for n, v in a.items() if n not in rows}
    f = lambda r: replace(case, lead=(5,)).call(shared | r, backend)  # noqa: E731
    for got in (
        jax.jit(jax.vmap(f))(rows),
        jax.jit(lambda r: jax.lax.map(f, r))(rows),
        jax.jit(jax.checkpoint(lambda r: case.call(shared | r, backend)))(rows),
    ):
        for one, other in zip(got, want, strict=True):
            tolerances.assert_same_bits(one, other)


@backends
def test_positions_beyond_the_table_read_nothing(backend, driver):
    """Far outside: no fault, no rotation."""
    case = Case((2, 1), 64, (4,), outside=False)
    a = case.arrays()
    a["positions"] = np.array([-(2**31), 2**31 - 1, 28, -1], np.int32)
    case.check(a, case.call(jax.tree.map(jnp.asarray, a), backend))


def test_the_default_uses_a_kernel_and_explain_says_so():
    for case in (LARGE[0], LARGE[5]):
        a = jax.tree.map(jnp.asarray, case.arrays())
        (choice,) = jn.explain(case.call, a)
        assert choice.backend in ("triton", "hip"), choice
    ((call, avals),) = _explain._stages(jax.make_jaxpr(case.call)(a).jaxpr)
    assert _launch.problem(call, avals, "sm_90").shape("x0") == (173, 64, 128)


@pytest.mark.slow
@backends
def test_more_than_two_to_the_31_elements(backend):
    """Tokens on both sides of element 2^31 have the bits of the same tokens in a small batch."""
    tokens, heads, d = 262145, 64, 128
    base = jax.random.normal(jax.random.key(0), (997, heads, d), jnp.bfloat16)
    table = jn.rope_table(1024, d)
    where = jnp.arange(tokens, dtype=jnp.int32) % 1024
    w = jnp.ones(d, jnp.bfloat16)
    x = jax.jit(lambda a: a[jnp.arange(tokens) % 997])(base)
    k = x[:, :1] + 0
    picked = jnp.asarray([0, 1, 131071, 131072, 262143, 262144])  # head 0 of token 262144 is element 2^31
    for f in (
        lambda q, k, p: jn.rope((q, k), p, table, backend=backend),
        lambda q, k, p: jn.qk_norm_rope(q, k, w, w, p, table, backend=backend),
    ):
        whole, few = jax.jit(f)(x, k, where), jax.jit(f)(x[picked], k[picked], where[picked])
        for one, other in zip(whole, few, strict=True):
            tolerances.assert_same_bits(one[picked], other)
