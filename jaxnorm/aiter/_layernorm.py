"""AITER's LayerNorm names.

Where numbers differ from AITER's on purpose, everywhere in this file: the variance is the mean-corrected one (AITER's kernels run
Welford or E[x^2] - mean^2), x_bias counts in every function (AITER's Triton kernels ignore it), the norm reads the unrounded
float32 sum, bfloat16 is rounded to nearest even, int8 codes are rounded and clipped to +-127, a row of zeros has scale 1.0. xscale
multiplies the norm's result, after weight and bias; AITER's guide says before the norm.
"""

from __future__ import annotations

from typing import Any

import jax

from .._api import layernorm as ops
from .._api import layernorm_quant as ops_quant
from . import _common


def layernorm2d_fwd(
    input: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-5,
    x_bias: jax.Array | None = None,
) -> jax.Array:
    """``out = (a - mean(a)) * rsqrt(var(a) + epsilon) * weight + bias``, a = input + x_bias: :func:`jaxnorm.layernorm`."""
    return ops.layernorm(input, weight, bias, eps=epsilon, x_bias=x_bias)


def layer_norm(
    input: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-5,
    x_bias: jax.Array | None = None,
) -> jax.Array:
    """As :func:`layernorm2d_fwd`. Gradients flow to all arrays."""
    return layernorm2d_fwd(input, weight, bias, epsilon, x_bias)


def layernorm2d_fwd_with_add(
    input: jax.Array,
    residual_in: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    x_bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``(out, residual_out)`` with ``residual_out = input + x_bias + residual_in``: :func:`jaxnorm.add_layernorm`."""
    return ops.add_layernorm(input, residual_in, weight, bias, eps=epsilon, x_bias=x_bias)


def layernorm2d_with_add_asm(
    input: jax.Array,
    residual_in: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    x_bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As :func:`layernorm2d_fwd_with_add`. AITER's is for bfloat16 with N = 8192 and an even number of rows."""
    return layernorm2d_fwd_with_add(input, residual_in, weight, bias, epsilon, x_bias)


def layernorm2d_fwd_with_smoothquant(
    input: jax.Array,
    xscale: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    x_bias: jax.Array | None = None,
    *,
    out_dtype: Any = "int8",
) -> tuple[jax.Array, jax.Array]:
    """``(codes, yscale)`` of ``norm(input) * xscale``, one scale a row: :func:`jaxnorm.layernorm_quant` with ``smooth_scale``."""
    spec = _common.spec("aiter.layernorm2d_fwd_with_smoothquant", out_dtype)
    q = ops_quant.layernorm_quant(input, weight, bias, spec, smooth_scale=xscale, eps=epsilon, x_bias=x_bias)
    return q.values, q.scale


def layernorm2d_fwd_with_dynamicquant(
    input: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float = 1e-5,
    x_bias: jax.Array | None = None,
    *,
    out_dtype: Any = "fp8",
) -> tuple[jax.Array, jax.Array]:
    """``(codes, yscale)``, one scale a row: :func:`jaxnorm.layernorm_quant`, which also takes groups and other scales."""
    spec = _common.spec("aiter.layernorm2d_fwd_with_dynamicquant", out_dtype)
    q = ops_quant.layernorm_quant(input, weight, bias, spec, eps=epsilon, x_bias=x_bias)
    return q.values, q.scale


def layernorm2d_fwd_with_add_smoothquant(
    input: jax.Array,
    residual_in: jax.Array,
    xscale: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    x_bias: jax.Array | None = None,
    *,
    out_dtype: Any = "int8",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(codes, residual_out, yscale)``: :func:`jaxnorm.add_layernorm_quant` with ``smooth_scale``."""
    spec = _common.spec("aiter.layernorm2d_fwd_with_add_smoothquant", out_dtype)
    q, residual_out = ops_quant.add_layernorm_quant(
        input, residual_in, weight, bias, spec, smooth_scale=xscale, eps=epsilon, x_bias=x_bias
    )
    return q.values, residual_out, q.scale


def layernorm2d_with_add_smoothquant_asm(
    input: jax.Array,
    residual_in: jax.Array,
    xscale: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    x_bias: jax.Array | None = None,
    *,
    out_dtype: Any = "int8",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As :func:`layernorm2d_fwd_with_add_smoothquant`. AITER's is for bfloat16 with N = 8192 and an even number of rows."""
    return layernorm2d_fwd_with_add_smoothquant(
        input, residual_in, xscale, weight, bias, epsilon, x_bias, out_dtype=out_dtype
    )


def layernorm2d_fwd_with_add_dynamicquant(
    input: jax.Array,
    residual_in: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float = 1e-5,
    x_bias: jax.Array | None = None,
    *,
    out_dtype: Any = "fp8",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(codes, residual_out, yscale)``, one scale a row: :func:`jaxnorm.add_layernorm_quant`."""
    spec = _common.spec("aiter.layernorm2d_fwd_with_add_dynamicquant", out_dtype)
    q, residual_out = ops_quant.add_layernorm_quant(input, residual_in, weight, bias, spec, eps=epsilon, x_bias=x_bias)
    return q.values, residual_out, q.scale
