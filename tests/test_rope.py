"""rope, mrope and rope_table on the CPU: numbers against the float64 oracle, tables against Hugging Face's formulas."""

# ruff: noqa: E501 -- a bad call and its message stand on one line

from __future__ import annotations

import math
from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle_rope
import pytest
import tolerances
from oracle_rope import BF16, F32, Case, run

import jaxnorm as jn


@pytest.mark.parametrize("case", oracle_rope.quick(oracle_rope.ROPE_CASES, (1, 2, 3, 5, 7, 9, 10)), ids=str)
def test_against_the_oracle(case):
    a = case.arrays()
    results, gradients = run(case, a)
    case.check(a, results)
    case.check_gradients(a, gradients)


def test_one_array_and_one_of_a_tuple_are_the_same():
    case = Case((3, 2), 32, (4,))
    a = jax.tree.map(jnp.asarray, case.arrays())
    both = case.call(a)
    assert isinstance(both, tuple)
    for i in range(2):
        alone = jn.rope(a[f"x{i}"], a["positions"], a["cos_sin"])
        tolerances.assert_same_bits(alone, both[i])


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_equal_positions_of_mrope_are_rope(style, interleaved):
    case = Case((3, 2), 64, (9,), style=style)
    a = jax.tree.map(jnp.asarray, case.arrays())
    three = jnp.stack([a["positions"]] * 3)
    got = case.call(a), replace(case, sections=(10, 10, 12), interleaved=interleaved).call(a | {"positions": three})
    for one, other in zip(*got, strict=True):
        tolerances.assert_same_bits(one, other)


def test_components_of_interleaved_sections():
    """The rule equals Hugging Face's slices and the written one pair by pair, and (8, 12, 12) gives 11, 11 and 10 pairs."""
    from jaxnorm._ref.rope import components

    for sections in ((24, 20, 20), (8, 12, 12), (12, 10, 10), (48, 40, 40)):
        want = np.zeros(sum(sections), int)
        for d in (1, 2):
            want[slice(d, 3 * sections[d], 3)] = d
        assert components(sections, True) == tuple(want)
        for interleaved in (False, True):
            pairs = [oracle_rope.component(j, sections, interleaved) for j in range(sum(sections))]
            assert components(sections, interleaved) == tuple(pairs)
    assert [components((8, 12, 12), True).count(c) for c in range(3)] == [11, 11, 10]


@pytest.mark.parametrize("outside", [-1, 29, 2**31 - 1, -(2**31)])
def test_positions_beyond_the_table(outside):
    """Traced: that token's rotation is dropped, its neighbours are turned. Host values: an error."""
    case = Case((2,), 32, (3,), dtypes=(BF16,), outside=False)
    a = case.arrays()
    a["positions"][1] = outside
    (y,) = jax.jit(case.call)(a)
    case.check(a, (y,))
    tolerances.assert_same_bits(y[1], a["x0"][1])
    for host in (a["positions"], list(map(int, a["positions"]))):
        with pytest.raises(ValueError, match=rf"rope: positions: got {outside}, expected 0 to 28"):
            case.call(a | {"positions": host})
    case.check(a, case.call(a | {"positions": jnp.asarray(a["positions"])}), "a device array is not read on the host")
    m = Case((2,), 32, (1,), dtypes=(BF16,), sections=(4, 6, 6))
    b = m.arrays() | {"positions": np.array([[5], [outside], [7]], np.int32)}
    m.check(b, jax.jit(m.call)(b))  # the pairs of that component alone


def test_no_tokens_and_wide_integers():
    table = jn.rope_table(8, 16)
    for lead in ((0,), (2, 0)):
        q, k = jn.rope((jnp.zeros((*lead, 4, 16)), jnp.zeros((*lead, 2, 16))), np.zeros(lead, np.int64), table)
        assert q.shape == (*lead, 4, 16) and k.shape == (*lead, 2, 16)
    assert jn.rope(jnp.zeros((0, 1, 16)), [], table).shape == (0, 1, 16)
    x = cases.normal(cases.rng(), (3, 2, 16), F32)
    want = jn.rope(x, np.array([1, 2, 7], np.int32), table)
    with jax.enable_x64(True):
        got = jn.rope(x, jnp.array([1, 2, 7], jnp.int64), table)
    tolerances.assert_same_bits(got, want)


def test_gradients_by_finite_differences():
    """Of the oracle in float64: its rotation is the map that the gradients above were taken of."""
    case = Case((1,), 12, (2,), 8, dtypes=(F32,), style="gptj")
    a = case.arrays()
    cos, sin = case.angles(a)
    x, g = a["x0"].astype(np.float64), a["g0"].astype(np.float64)
    loss = lambda x: (oracle_rope.turn(x, cos, sin, "gptj", F32).value * g).sum()  # noqa: E731
    back = oracle_rope.turn(g, cos, -sin, "gptj", F32).value
    for at in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-6
        np.testing.assert_allclose((loss(x + step) - loss(x - step)) / 2e-6, back[at], rtol=1e-6, atol=1e-8)


def test_no_gradient_into_the_table_and_second_derivatives():
    case = Case((2,), 16, (3,), dtypes=(F32,))
    a = jax.tree.map(jnp.asarray, case.arrays())
    loss = lambda x, t: jnp.sum(jn.rope(x, a["positions"], t) ** 3)  # noqa: E731
    assert not jax.grad(loss, 1)(a["x0"], a["cos_sin"]).any()
    x = a["x0"]
    hessian = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, a["cos_sin"]) ** 2))(x)
    turned = jn.rope(x, a["positions"], a["cos_sin"])  # the rotation keeps lengths: |grad|^2 = sum (3 y^2)^2
    want = jax.vjp(lambda x: jn.rope(x, a["positions"], a["cos_sin"]), x)[1](36 * turned**3)[0]
    np.testing.assert_allclose(hessian, want, rtol=2e-5, atol=1e-4)


# ---- tables: Hugging Face's formulas, written as they stand there


def hf_inverse(scaling: dict, dim: int, base: float, length: int) -> tuple[np.ndarray, float]:
    kind, factor = scaling["rope_type"], scaling.get("factor")
    positions = base ** (np.arange(0, dim, 2, dtype=np.int64).astype(np.float64) / dim)
    if kind == "linear":
        return 1.0 / positions / factor, 1.0
    original = scaling.get("original_max_position_embeddings", length)
    if kind == "dynamic":
        seq_len = max(length, original)
        base = base * ((factor * seq_len / original) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / (base ** (np.arange(0, dim, 2) / dim)), 1.0
    if kind == "llama3":
        inv_freq = 1.0 / positions
        low_wavelen, high_wavelen = original / scaling["low_freq_factor"], original / scaling["high_freq_factor"]
        out = []
        for f in inv_freq:
            wavelen = 2 * math.pi / f
            if wavelen < high_wavelen:
                out.append(f)
            elif wavelen > low_wavelen:
                out.append(f / factor)
            else:
                smooth = (original / wavelen - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                out.append((1 - smooth) * f / factor + smooth * f)
        return np.array(out), 1.0

    def correction(rotations):
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = correction(scaling.get("beta_fast", 32)), correction(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    extrapolation = 1 - ramp
    inverse = 1.0 / (factor * positions) * (1 - extrapolation) + 1.0 / positions * extrapolation
    mscale = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0  # noqa: E731
    attention = scaling.get("attention_factor")
    if attention is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return inverse, mscale(1) if attention is None else attention


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = [
    ({"rope_type": "linear", "factor": 4.0}, 128, 1e4, 500),
    ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 300}, 64, 1e4, 900),
    ({"rope_type": "dynamic", "factor": 2.0}, 64, 1e4, 900),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 128, 1e6, 3000),
    (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
         "mscale_all_dim": 0.8}, 64, 1e4, 700),
    ({"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.75, "truncate": False}, 96, 5e5, 400),
    ({"rope_type": "llama3", **LLAMA3}, 128, 5e5, 2000),
]  # fmt: skip


@pytest.mark.parametrize(
    ("scaling", "dim", "base", "length"), SCALINGS, ids=lambda v: v["rope_type"] if isinstance(v, dict) else None
)
def test_tables_of_hugging_face(scaling, dim, base, length):
    inverse, factor = hf_inverse(scaling, dim, base, length)
    table = np.asarray(jn.rope_table(length, dim, base=base, scaling=scaling))
    assert_table(table, np.arange(length)[:, None] * inverse, factor)


def assert_table(table, angle, factor=1.0):
    want = np.concatenate([np.cos(angle), np.sin(angle)], -1) * factor
    bound = 2.0**-22 * (1 + np.concatenate([angle, angle], -1)) * factor
    assert table.dtype == np.float32 and table.shape == want.shape
    worst = np.abs(table - want) / bound
    assert worst.max() <= 1, worst.max()


def test_plain_tables():
    for length, dim, base in ((1, 2, 1e4), (5000, 64, 1e4), (300, 80, 1e6)):
        angle = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
        assert_table(np.asarray(jn.rope_table(length, dim, base=base)), angle)
    full = jn.rope_table(50, 32)
    half = jn.rope_table(50, 32, dtype=jnp.bfloat16)
    tolerances.assert_same_bits(half, full.astype(jnp.bfloat16))
    same = jn.rope_table(50, 32, scaling={"type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 10000.0})
    tolerances.assert_same_bits(same, full)
    traced = jax.jit(lambda: jn.rope_table(50, 32))()
    assert np.abs(np.asarray(traced) - full).max() < 1e-5


X = np.zeros((4, 2, 16), np.float32)
T = np.zeros((9, 16), np.float32)
POSITIONS = np.zeros(4, np.int32)
BAD = [
    (lambda: jn.rope(X, np.zeros(5, int), T), ValueError, "rope: positions: got shape (5,), expected (4,)"),
    (lambda: jn.rope(X, np.zeros((3, 4), int), T), ValueError, "rope: positions: got shape (3, 4), expected (4,)"),
    (lambda: jn.rope(X[None], np.zeros((2, 4), int), T), ValueError, "rope: positions: got shape (2, 4), expected (1, 4) or (4,)"),
    (lambda: jn.rope(X, np.zeros(4), T), TypeError, "rope: positions: got dtype float64, expected int32 or int64"),
    (lambda: jn.rope(X, jnp.zeros(4, jnp.uint32), T), TypeError, "rope: positions: got dtype uint32, expected int32 or int64"),
    (lambda: jn.rope(X[0], POSITIONS, T), ValueError, "rope: x: got shape (2, 16), expected [..., T, H, D] with D even"),
    (lambda: jn.rope(X[..., :15], POSITIONS, T), ValueError, "rope: x: got shape (4, 2, 15), expected [..., T, H, D] with D even"),
    (lambda: jn.rope((X, X[:3]), POSITIONS, T), ValueError, "rope: x[1]: got shape (3, 2, 16), expected (4,) tokens and D=16 as x[0]"),
    (lambda: jn.rope((), POSITIONS, T), ValueError, "rope: x: got an empty tuple, expected an array or a tuple of arrays"),
    (lambda: jn.rope(X.astype(int), POSITIONS, T), TypeError, "rope: x: got dtype int"),
    (lambda: jn.rope(X, POSITIONS, np.zeros((9, 18), np.float32)), ValueError, "rope: cos_sin: got rotary_dim 18 (its last dim), expected an even number from 2 to D=16"),
    (lambda: jn.rope(X, POSITIONS, T[:, :7]), ValueError, "rope: cos_sin: got rotary_dim 7"),
    (lambda: jn.rope(X, POSITIONS, T[0]), ValueError, "rope: cos_sin: got shape (16,), expected [max_positions, rotary_dim]"),
    (lambda: jn.rope(X, POSITIONS, T, style="llama"), ValueError, "rope: style: got 'llama', expected 'neox' or 'gptj'"),
    (lambda: jn.mrope(X, POSITIONS, T, sections=(2, 3, 3)), ValueError, "mrope: positions: got shape (4,), expected (3, 4)"),
    (lambda: jn.mrope(X, np.zeros((3, 4), int), T, sections=(2, 3, 4)), ValueError, "mrope: sections: got (2, 3, 4), expected three numbers of pairs whose sum is rotary_dim/2 = 8"),
    (lambda: jn.mrope(X, np.zeros((3, 4), int), T, sections=(4, 4)), ValueError, "mrope: sections: got (4, 4), expected three"),
    (lambda: jn.mrope(X, np.zeros((3, 4), int), T, sections=8), TypeError, "mrope: sections: got int, expected three"),
    (lambda: jn.rope(X, POSITIONS, T, backend="hip"), jn.UnsupportedError, "rope: backend='hip' is not usable"),
    (lambda: jn.rope_table(8, 7), ValueError, "rope_table: rotary_dim: got 7, expected an even number"),
    (lambda: jn.rope_table(0, 8), ValueError, "rope_table: max_positions: got 0, expected a positive integer"),
    (lambda: jn.rope_table(8.0, 8), TypeError, "rope_table: max_positions: got float, expected a positive integer"),
    (lambda: jn.rope_table(8, 8, base=1.0), ValueError, "rope_table: base: got 1.0, expected a number above 1"),
    (lambda: jn.rope_table(8, 8, dtype=int), TypeError, "rope_table: "),
    (lambda: jn.rope_table(8, 8, scaling={"rope_type": "longrope"}), ValueError, "rope_table: scaling['rope_type']: got 'longrope', expected 'default' or 'linear' or 'dynamic' or 'yarn' or 'llama3'"),
    (lambda: jn.rope_table(8, 8, scaling={"rope_type": "llama3", "factor": 8.0}), ValueError, "rope_table: scaling (rope_type 'llama3'): got keys rope_type, factor, expected factor, low_freq_factor"),
    (lambda: jn.rope_table(8, 8, scaling={"rope_type": "linear", "factor": 2.0, "factr": 1}), ValueError, "expected factor."),
    (lambda: jn.rope_table(8, 8, scaling={"rope_type": "linear", "factor": 0}), ValueError, "rope_table: scaling['factor']: got 0.0, expected a positive number"),
    (lambda: jn.rope_table(8, 8, scaling={"rope_type": "default", "rope_theta": 5e5}), ValueError, "rope_table: scaling['rope_theta']: got 500000.0, expected base=10000"),
    (lambda: jn.rope_table(8, 8, scaling=2.0), TypeError, "rope_table: scaling: got float, expected a mapping or None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_messages(call, kind, text):
    with pytest.raises(kind) as e:
        call()
    assert str(e.value).startswith(text) or (text in str(e.value) and text.startswith("expected")), str(e.value)
