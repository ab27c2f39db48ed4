"""RMSNorm of each head, then rotary embedding: what happens to q and k between their projection and attention.

    xn = cast(x * rsqrt(sum(x * x) / D + eps) * (weight + weight_offset));   out = cast(rotate(xn))

The norm is over all D elements of a head, also where fewer are rotated; its result is rounded to the dtype of x before it is
rotated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from . import rope as ref
from ._common import f32, rounded, row_sum


def norm_rope(
    x: jax.Array,
    weight: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    weight_offset: float,
    style: str,
) -> jax.Array:
    """``[..., H, D]`` in the dtype of x, from x ``[..., H, D]``, weight ``[D]`` and float32 cos, sin ``[..., h]``."""
    n = f32(x)
    n = n * jax.lax.rsqrt(row_sum(n * n) / x.shape[-1] + eps)
    if weight is not None:
        n = n * (f32(weight) + weight_offset)
    return ref.rotate(rounded(n, x.dtype), cos, sin, style).astype(x.dtype)


def norm_rope_backward(
    x: jax.Array,
    weight: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    dy: jax.Array,
    *,
    eps: float,
    weight_offset: float,
    style: str,
) -> tuple[jax.Array, jax.Array]:
    """(dx in the dtype of x, the float32 terms of dweight ``[..., H, D]``); roundings count as identity.

    ``g = rotate back(dy); xh = x * rstd; gw = g * w'; dx = rstd * (gw - xh * mean(gw * xh)); dweight = sum of g * xh``
    """
    g, features = ref.rotate(f32(dy), cos, sin, style, inverse=True), x.shape[-1]
    n = f32(x)
    rstd = jax.lax.rsqrt(row_sum(n * n) / features + eps)
    xh = n * rstd
    gw = g if weight is None else g * (f32(weight) + weight_offset)
    dx = rstd * (gw - xh * (row_sum(gw * xh) / features))
    return dx.astype(x.dtype), g * xh


def weight_sum(terms: jax.Array) -> jax.Array:
    """The sum over tokens and heads, ``[..., H, D] -> [D]``."""
    return jnp.sum(terms, axis=tuple(range(terms.ndim - 1)))
