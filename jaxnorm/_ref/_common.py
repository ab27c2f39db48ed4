"""Pieces shared by the references: sums whose bits do not depend on the number of rows, and roundings that survive XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Axes = tuple[str, ...]


def row_sum(v: jax.Array, axes: Axes = ()) -> jax.Array:
    """Sum over the last axis, kept with size 1: float32 ``[..., N] -> [..., 1]``.

    ``axes`` are the mesh axes over which the features are sharded; each shard adds its part, one float a row crosses the wire.
    """
    total = tree_sum(v, v.ndim - 1)
    return jax.lax.psum(total, axes) if axes else total


def tree_sum(v: jax.Array, axis: int) -> jax.Array:
    """Sum over ``axis``, kept with size 1.

    A written-out halving tree: ``jnp.sum`` over a row changes its bits with the number of rows on CPU, this does not. Of an odd
    number the last waits for the next round; padding to a power of two took three times as long there (1024x768).
    """
    n = v.shape[axis]
    if n == 0:
        return jnp.zeros((*v.shape[:axis], 1, *v.shape[axis + 1 :]), v.dtype)
    while n > 1:
        half = n // 2
        pairs = jax.lax.slice_in_dim(v, 0, half, axis=axis) + jax.lax.slice_in_dim(v, half, 2 * half, axis=axis)
        if n % 2:
            pairs = jnp.concatenate([pairs, jax.lax.slice_in_dim(v, n - 1, n, axis=axis)], axis=axis)
        v, n = pairs, half + n % 2
    return v


def rounded(v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 -> the values of ``dtype``, still as float32, in a form that XLA does not simplify away."""
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(v, 8, 7)
    if dtype == jnp.float16:  # reduce_precision(5, 10) would flush float16 subnormals
        return jax.lax.optimization_barrier(v.astype(dtype)).astype(jnp.float32)
    return v


def f32(v: jax.Array) -> jax.Array:
    return v.astype(jnp.float32)


def rank_sum(parts: jax.Array) -> jax.Array:
    """``parts[0] + parts[1] + ...`` of [W, ...] in float32, ascending: the one order every schedule must give."""
    total = f32(parts[0])
    for p in range(1, parts.shape[0]):
        total = total + f32(parts[p])
    return total


def pad_last(v: jax.Array, width: int) -> jax.Array:
    """Zeros behind the features up to ``width``."""
    n = v.shape[-1]
    return v if width == n else jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - n)])
