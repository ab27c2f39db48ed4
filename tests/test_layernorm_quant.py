"""layernorm_quant and add_layernorm_quant against the oracle: codes, scales, what is kept beside them, errors."""

from __future__ import annotations

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cases_layernorm import quant_case, quant_cases, thinned

import jaxnorm
from jaxnorm import QuantSpec


@pytest.mark.parametrize("case", thinned(quant_cases(), 2, lambda c: c.id))
def test_against_the_oracle(case):
    arrays = case.arrays()
    case.check(arrays, case.run(arrays))


@pytest.mark.parametrize("lead", [(), (0,)], ids=str)
def test_leading_dims(lead):
    case = quant_case(QuantSpec("int8"), features=64, lead=lead, residual_dtype="float32", keep=True)
    arrays = case.arrays()
    out = case.run(arrays)
    case.check(arrays, out)
    assert out["q"].values.shape == out["y"].shape == (*lead, 64) and out["q"].scale.shape == (*lead, 1)


def test_the_smooth_scale_comes_after_the_bias():
    """z = (xh * w + b) * s: a smooth scale of the norm's output, the bias included; the kept y is before it."""
    x = cases.normal(cases.rng(), (4, 64), "float32")
    b, s = np.full(64, 3.0, np.float32), np.linspace(0.5, 2, 64, dtype=np.float32)
    q, y = jaxnorm.layernorm_quant(x, None, b, QuantSpec("int8"), smooth_scale=s, keep_unquantized=True)
    np.testing.assert_allclose(q.dequantize(), np.asarray(y) * s, atol=float(np.asarray(q.scale).max()) * 0.51)
    tolerances.assert_same_bits(y, jaxnorm.layernorm(x, None, b))


def test_padding_is_zeros_not_the_bias():
    x, b = np.ones((3, 40), np.float32), np.full(40, 2.0, np.float32)
    q = jaxnorm.layernorm_quant(x, None, b, QuantSpec("int8", group_size=32), pad_to_multiple=96)
    assert (np.asarray(q.values)[:, 40:] == 0).all() and (np.asarray(q.scale)[:, 2] == 1.0).all()


def test_no_gradient():
    x, w = jnp.ones((2, 32), jnp.bfloat16), jnp.ones(32, jnp.float32)
    with pytest.raises(TypeError, match=r"add_layernorm_quant: gradients do not flow.*add_layernorm\(\.\.\.\)\[0\]"):
        jax.grad(lambda x: jaxnorm.add_layernorm_quant(x, x, w, w, QuantSpec("int8"))[1].astype(jnp.float32).sum())(x)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [({"spec": "int8"}, TypeError, "layernorm_quant: spec: got str"),
     ({"bias": np.ones(3, np.float32)}, ValueError, r"layernorm_quant: bias: got shape \(3,\)"),
     ({"spec": QuantSpec("int8", group_size=24)}, ValueError, "layernorm_quant: spec.group_size: got 24"),
     ({"out_dtype": "float32"}, ValueError, "layernorm_quant: out_dtype"),
     ({"keep_unquantized": 1}, TypeError, "layernorm_quant: keep_unquantized")],
)  # fmt: skip
def test_errors(change, error, text):
    w = np.ones(64, np.float32)
    given = {"x": np.ones((2, 64), np.float32), "weight": w, "bias": w, "spec": QuantSpec("int8"), **change}
    positional = [given.pop(k) for k in ("x", "weight", "bias", "spec")]
    with pytest.raises(error, match=text):
        jaxnorm.layernorm_quant(*positional, **given)
