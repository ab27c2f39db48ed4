"""qk_norm_rope and qk_norm_rope_two_stream on the CPU: numbers and gradients against the float64 oracle, errors, edges."""

# ruff: noqa: E501 -- a bad call and its message stand on one line

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_rope
import pytest
import tolerances
from oracle_rope import BF16, F32, Case, TwoStream, run

import jaxnorm as jn


@pytest.mark.parametrize("case", oracle_rope.quick(oracle_rope.QK_CASES, (1, 2, 3, 4, 8, 11)), ids=str)
def test_against_the_oracle(case):
    a = case.arrays()
    results, gradients = run(case, a)
    case.check(a, results)
    case.check_gradients(a, gradients)


@pytest.mark.parametrize("case", oracle_rope.quick(oracle_rope.TWO_CASES, (0, 2)), ids=str)
def test_two_streams_against_the_oracle(case):
    a = case.arrays()
    (q, k), gradients = run(case, a)
    case.check(a, q, k)
    case.check_gradients(a, gradients)


@pytest.mark.parametrize("tokens", [(0, 4), (0, 0)])
def test_a_stream_may_be_empty(tokens):
    case = TwoStream(2, tokens, (2, 1), 16, weights=(F32,) * 4)
    a = case.arrays()
    (q, k), gradients = run(case, a)
    assert q.shape == (2, sum(tokens), 2, 16) and k.shape == (2, sum(tokens), 1, 16)
    case.check(a, q, k)
    for name in ("q_weight0", "k_weight0") if tokens[0] == 0 else ("q_weight1",):
        assert not np.asarray(gradients[name]).any()
    if all(tokens):
        case.check_gradients(a, gradients)


def test_it_is_the_norm_then_the_rotation():
    """The rounding between the two is that of the dtype: bit for bit the two operators apart."""
    case = Case((3, 2), 64, (9,), 32, weights=(F32, BF16), offset=0.5, table=BF16)
    a = jax.tree.map(jnp.asarray, case.arrays())

    def apart(a):
        normed = [jn.rmsnorm(a[f"x{i}"], a[f"w{i}"], weight_offset=0.5) for i in range(2)]
        return jn.rope(tuple(jax.lax.optimization_barrier(normed)), a["positions"], a["cos_sin"])

    for one, other in zip(jax.jit(case.call)(a), jax.jit(apart)(a), strict=True):
        tolerances.assert_same_bits(one, other)


def test_two_streams_are_two_calls():
    case = TwoStream(2, (3, 4), (3, 2), 32)
    a = jax.tree.map(jnp.asarray, case.arrays())
    q, k = case.call(a)
    for i, part in enumerate((slice(0, 3), slice(3, 7))):
        weights = a[f"q_weight{i}"], a[f"k_weight{i}"]
        where = jnp.arange(case.tokens[i])
        want = jn.qk_norm_rope(a[f"q{i}"], a[f"k{i}"], *weights, where, a[f"cos_sin{i}"], weight_offset=1.0)
        for joined, alone in zip((q, k), want, strict=True):
            tolerances.assert_same_bits(joined[:, part], alone)


def test_gradients_by_finite_differences():
    """The float64 oracle's own gradient formulas, which all backends are held to."""
    case = Case((2,), 8, (2,), 6, dtypes=(F32,), weights=(F32,), offset=0.5, outside=False)
    a = case.arrays()
    cos, sin = case.angles(a)
    x, w, g = (a[n].astype(np.float64) for n in ("x0", "w0", "g0"))

    def loss(x, w):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + case.eps) * (w + 0.5)
        return (oracle_rope.turn(y, cos, sin, "neox", F32).value * g).sum()

    back = oracle_rope.turn(g, cos, -sin, "neox", F32).value
    forward = oracle.rmsnorm(a["x0"], a["w0"], eps=case.eps, weight_offset=0.5)
    want = oracle.rmsnorm_backward(forward, a["w0"], back, weight_offset=0.5)
    for argument, gradient in enumerate((want.dx, want.dweight)):
        for at in np.ndindex(*gradient.shape):
            step = [np.zeros_like(x), np.zeros_like(w)]
            step[argument][at] = 1e-6
            slope = (loss(x + step[0], w + step[1]) - loss(x - step[0], w - step[1])) / 2e-6
            np.testing.assert_allclose(slope, gradient[at], rtol=2e-6, atol=1e-7)


def test_an_unused_result_and_both_used():
    """The loss may look at one of q and k alone."""
    case = Case((2, 1), 16, (3,), weights=(F32, F32), dtypes=(F32, F32))
    a = jax.tree.map(jnp.asarray, case.arrays())
    loss = lambda i: lambda x, w: jnp.sum(case.call(a | {f"x{i}": x, f"w{i}": w})[i] * a[f"g{i}"])  # noqa: E731
    _, both = run(case, case.arrays())
    for i in range(2):
        dx, dw = jax.grad(loss(i), (0, 1))(a[f"x{i}"], a[f"w{i}"])
        np.testing.assert_allclose(dx, both[f"x{i}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dw, both[f"w{i}"], rtol=1e-5, atol=1e-6)


def test_no_tokens_and_one_row_alone():
    case = Case((4, 2), 32, (0,), weights=(BF16, BF16))
    table = jn.rope_table(8, 32)
    w = jnp.ones(32)
    q, k = jn.qk_norm_rope(jnp.zeros((0, 4, 32)), jnp.zeros((0, 2, 32)), w, w, jnp.zeros(0, jnp.int32), table)
    assert q.shape == (0, 4, 32) and k.shape == (0, 2, 32)
    dw = jax.grad(lambda w: jn.qk_norm_rope(jnp.zeros((0, 4, 32)), q[:, :2], w, w, np.zeros(0, int), table)[0].sum())(w)
    assert dw.shape == (32,) and not dw.any()
    case = replace(case, lead=(40,))
    a = jax.tree.map(jnp.asarray, case.arrays())
    whole = jax.jit(case.call)(a)
    for t in (0, 39):
        one = {n: v[t : t + 1] if n[0] in "xp" else v for n, v in a.items()}
        for alone, all_ in zip(jax.jit(case.call)(one), whole, strict=True):
            tolerances.assert_same_bits(alone[0], all_[t])


def test_a_nan_stays_in_its_head():
    case = Case((3, 2), 32, (4,), weights=(BF16, BF16), outside=False)
    a = case.arrays()
    clean, _ = run(case, a)
    a["x0"][2, 1, 5] = np.nan
    dirty, _ = run(case, a)
    assert np.isnan(np.asarray(dirty[0][2, 1], np.float32)).all()
    mask = np.ones((4, 3), bool)
    mask[2, 1] = False
    tolerances.assert_same_bits(np.asarray(dirty[0])[mask], np.asarray(clean[0])[mask])
    tolerances.assert_same_bits(dirty[1], clean[1])


Q = np.zeros((4, 4, 16), np.float32)
K, W, TABLE, P = Q[:, :2], np.zeros(16, np.float32), np.zeros((9, 8), np.float32), np.zeros(4, np.int32)
Q4, K4 = Q[None], K[None]


def call(q=Q, k=K, wq=W, wk=W, p=P, t=TABLE, **kw):
    return jn.qk_norm_rope(q, k, wq, wk, p, t, **kw)


def two(q0=Q4, k0=K4, q1=Q4, k1=K4, t0=TABLE[:4], t1=TABLE[:4], **kw):
    return jn.qk_norm_rope_two_stream(q0, k0, q1, k1, W, W, W, W, t0, t1, **kw)


TWO = "qk_norm_rope_two_stream"
BAD = [
    (lambda: call(k=K[:3]), ValueError, "qk_norm_rope: k: got shape (3, 2, 16), expected (4,) tokens and D=16 as q"),
    (lambda: call(k=K[..., :8]), ValueError, "qk_norm_rope: k: got shape (4, 2, 8), expected (4,) tokens and D=16 as q"),
    (lambda: call(wq=W[:8]), ValueError, "qk_norm_rope: q_weight: got shape (8,), expected (16,)"),
    (lambda: call(wk=W.astype(int)), TypeError, "qk_norm_rope: k_weight: got dtype int"),
    (lambda: call(wk=None, weight_offset=1.0), ValueError, "qk_norm_rope: weight_offset: got 1.0, expected 0.0 when weight is None"),
    (lambda: call(eps=-1), ValueError, "qk_norm_rope: eps: got -1"),
    (lambda: call(t=np.zeros((9, 20), np.float32)), ValueError, "qk_norm_rope: cos_sin: got rotary_dim 20"),
    (lambda: call(mrope_sections=(1, 2, 1)), ValueError, "qk_norm_rope: positions: got shape (4,), expected (3, 4)"),
    (lambda: call(mrope_sections=(1, 2, 3), p=np.zeros((3, 4), int)), ValueError, "qk_norm_rope: mrope_sections: got (1, 2, 3), expected three numbers of pairs whose sum is rotary_dim/2 = 4"),
    (lambda: call(p=np.array([0, 1, 2, 9])), ValueError, "qk_norm_rope: positions: got 9, expected 0 to 8"),
    (lambda: call(q=Q.astype(complex)), TypeError, "qk_norm_rope: q: got dtype complex"),
    (lambda: call(style="x"), ValueError, "qk_norm_rope: style: got 'x'"),
    (lambda: two(q1=Q), ValueError, f"{TWO}: q1: got shape (4, 4, 16), expected [B, T, H, D] with B and D of q0, which is (1, 4, 4, 16)"),
    (lambda: two(k0=K4[:, :3]), ValueError, f"{TWO}: k0: got 3 tokens, expected 4 as q0"),
    (lambda: two(k1=Q4), ValueError, f"{TWO}: k1: got 4 heads, expected 2 as k0"),
    (lambda: two(q1=Q4.astype(np.float16)), TypeError, f"{TWO}: q1: got dtype float16, expected float32 as q0"),
    (lambda: two(t1=TABLE[:3]), ValueError, f"{TWO}: cos_sin1: got 3 rows, expected 4, one for each token of its stream"),
    (lambda: two(backend="triton"), jn.UnsupportedError, f"{TWO}: backend='triton' is not usable"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "kind", "text"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_messages(bad, kind, text):
    with pytest.raises(kind) as e:
        bad()
    assert str(e.value).startswith(text), str(e.value)
