"""The ops as people write them in ``jax.numpy``: what XLA's own code is measured with. No jaxnorm in it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

EPS = 1e-6


def rmsnorm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """What most models contain: float32 inside, the dtype of x outside."""
    return _rmsnorm32(x, weight).astype(x.dtype)


def add_rmsnorm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    s = x.astype(jnp.float32) + residual.astype(jnp.float32)
    return _rmsnorm32(s, weight).astype(x.dtype), s.astype(residual.dtype)


def _rmsnorm32(x: jax.Array, weight: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPS)
    return y * weight.astype(jnp.float32)


def layernorm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return _layernorm32(x, weight, bias).astype(x.dtype)


def add_layernorm(x: jax.Array, residual: jax.Array, weight: jax.Array, bias: jax.Array) -> tuple[Any, Any]:
    s = x.astype(jnp.float32) + residual.astype(jnp.float32)
    return _layernorm32(s, weight, bias).astype(x.dtype), s.astype(residual.dtype)


def _layernorm32(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    y = (x32 - mean) * lax.rsqrt(jnp.var(x32, axis=-1, keepdims=True) + EPS)
    return y * weight.astype(jnp.float32) + bias.astype(jnp.float32)


def groupnorm_silu(x: jax.Array, weight: jax.Array, bias: jax.Array, *, num_groups: int) -> jax.Array:
    """GroupNorm with SiLU over ``x [B, ..., C]``."""
    g = x.astype(jnp.float32).reshape(x.shape[0], -1, num_groups, x.shape[-1] // num_groups)
    mean = jnp.mean(g, axis=(1, 3), keepdims=True)
    y = (g - mean) * lax.rsqrt(jnp.var(g, axis=(1, 3), keepdims=True) + EPS)
    y = y.reshape(x.shape) * weight.astype(jnp.float32) + bias.astype(jnp.float32)
    return jax.nn.silu(y).astype(x.dtype)


def quantize(y: jax.Array, spec: Any) -> tuple[jax.Array, jax.Array] | None:
    """float32 y -> codes and scales; None where that is not the usual thing to write."""
    if spec.scale_dtype != "float32":
        return None
    top = 127.0 if spec.dtype == "int8" else float(jnp.finfo(spec.dtype).max)
    grouped = y.reshape(*y.shape[:-1], -1, spec.group_size or y.shape[-1])
    scale = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True) / top
    v = jnp.clip(grouped / scale, -top, top)
    codes = (jnp.round(v) if spec.dtype == "int8" else v).astype(spec.dtype)
    return codes.reshape(y.shape), scale[..., 0]


def rmsnorm_quant(x: jax.Array, weight: jax.Array, spec: Any) -> Any:
    return quantize(_rmsnorm32(x, weight), spec)


def add_rmsnorm_quant(x: jax.Array, residual: jax.Array, weight: jax.Array, spec: Any) -> Any:
    s = x.astype(jnp.float32) + residual.astype(jnp.float32)
    return quantize(_rmsnorm32(s, weight), spec), s.astype(residual.dtype)


def layernorm_quant(x: jax.Array, weight: jax.Array, bias: jax.Array, spec: Any) -> Any:
    return quantize(_layernorm32(x, weight, bias), spec)


def add_layernorm_quant(x: jax.Array, residual: jax.Array, weight: jax.Array, bias: jax.Array, spec: Any) -> Any:
    s = x.astype(jnp.float32) + residual.astype(jnp.float32)
    return quantize(_layernorm32(s, weight, bias), spec), s.astype(residual.dtype)


def rope(x: jax.Array, positions: jax.Array, cos_sin: jax.Array) -> jax.Array:
    """The rotation of halves (NeoX) over ``x [T, H, D]``."""
    cos, sin = (p[:, None] for p in jnp.split(cos_sin[positions].astype(jnp.float32), 2, axis=-1))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def qk_norm_rope(q: Any, k: Any, q_weight: Any, k_weight: Any, positions: Any, cos_sin: Any) -> tuple[Any, Any]:
    q, k = rmsnorm(q, q_weight), rmsnorm(k, k_weight)
    return rope(q, positions, cos_sin), rope(k, positions, cos_sin)
