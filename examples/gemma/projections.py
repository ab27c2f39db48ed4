"""Matrix products and the norms that feed them; the weights decide whether a norm quantises.

q, k, v, gate and up read a norm's output. `quantize` turns these five into int8 or fp8 codes with one float32 scale for each output
channel; then the norm in front of them is rmsnorm_quant or add_rmsnorm_quant with one scale a token, and the product is

    y[t, o] = (sum_i code[t, i] * code_w[o, i]) * scale[t] * scale_w[o]

out and down read no norm: they stay as they are, as do the embedding and the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

import jaxnorm
from jaxnorm import Quantized, QuantSpec

if TYPE_CHECKING:
    from .model import Params

QUANTIZED = ("q", "k", "v", "gate", "up")
Input = jax.Array | Quantized


def quantize(params: Params, spec: QuantSpec, dtype: jnp.dtype) -> Params:
    """`params` with the matrices behind a norm quantised per output channel and the other matrices in `dtype`.

    Give it float32 parameters, so that a weight is rounded once.
    """
    layers = params.layers
    codes = {name: jaxnorm.quantize(getattr(layers, name), spec) for name in QUANTIZED}
    if spec.dtype != "int8" and jax.default_backend() == "cpu":
        # XLA widens fp8 for each product, which takes a CPU longer than the product: the codes wait as float32, exactly.
        codes = {name: code.replace(values=code.values.astype(jnp.float32)) for name, code in codes.items()}
    others = {name: getattr(layers, name).astype(dtype) for name in ("out", "down")}
    return params._replace(embedding=params.embedding.astype(dtype), layers=layers._replace(**codes, **others))


def input_spec(params: Params) -> QuantSpec | None:
    """How the norms quantise: as the weights behind them are. None: not at all."""
    weight = params.layers.q
    return weight.spec if isinstance(weight, Quantized) else None


def norm(x: jax.Array, weight: jax.Array, spec: QuantSpec | None, eps: float) -> Input:
    """rmsnorm of x [..., E], quantised per token where there is a spec."""
    if spec is None:
        return jaxnorm.rmsnorm(x, weight, eps=eps)
    return jaxnorm.rmsnorm_quant(x, weight, spec, eps=eps)


def add_norm(
    x: jax.Array, residual: jax.Array, weight: jax.Array, spec: QuantSpec | None, eps: float
) -> tuple[Input, jax.Array]:
    """(norm of x + residual, x + residual), likewise."""
    if spec is None:
        return jaxnorm.add_rmsnorm(x, residual, weight, eps=eps)
    return jaxnorm.add_rmsnorm_quant(x, residual, weight, spec, eps=eps)


def leading(h: Input) -> tuple[int, ...]:
    """The shape of h [..., E] without E."""
    return (h.values if isinstance(h, Quantized) else h).shape[:-1]


def linear(x: Input, weight: Input, dtype: jnp.dtype) -> jax.Array:
    """x [..., in] times weight [out, in], transposed; both quantised or neither. `dtype` is that of a quantised product's result.

    HIGHEST keeps float32 from becoming TF32 on a GPU.
    """
    if isinstance(weight, Quantized):
        assert isinstance(x, Quantized)
        # 127 * 127 * in stays within int32 up to in = 133 000.
        total = jnp.int32 if weight.spec.dtype == "int8" else jnp.float32
        contract = (((x.values.ndim - 1,), (1,)), ((), ()))
        values = x.values.astype(weight.values.dtype)  # The same already, but for fp8 on a CPU: see quantize.
        product = jax.lax.dot_general(values, weight.values, contract, preferred_element_type=total)
        return (product.astype(jnp.float32) * x.scale * weight.scale[:, 0]).astype(dtype)
    return jnp.einsum("...i,oi->...o", x, weight, precision=jax.lax.Precision.HIGHEST)
