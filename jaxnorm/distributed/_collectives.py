"""The collectives of the composite: the float32 sum in rank order, and gathers whose results are typed as equal on all ranks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .. import _compat
from .._ref._common import rank_sum
from ._config import Axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scatter_sum(x: jax.Array, axis: Axis) -> jax.Array:
    """x [W * R, N] on every rank -> this rank's rows of the sum over ranks, float32 [R, N].

    An all_to_all of the row blocks in x's own dtype carries what a reduce-scatter would, and leaves the sum to us.
    """
    return rank_sum(own_parts(x, axis))


def own_parts(x: jax.Array, axis: Axis) -> jax.Array:
    """x [W * R, N] on every rank -> every rank's partials of this rank's rows, [W, R, N]."""
    ranks = jax.lax.axis_size(axis)
    blocks = x.reshape(ranks, x.shape[0] // ranks, *x.shape[1:])
    return jax.lax.all_to_all(blocks, axis, 0, 0)


def _scatter_sum_backward(axis: Axis, like: jax.Array, ds: jax.Array) -> tuple[jax.Array]:
    """Every rank's partial has the gradient of the sum: rounded once, then gathered."""
    return (jax.lax.all_gather(ds.astype(like.dtype), axis, tiled=True),)


scatter_sum.defvjp(lambda x, axis: (scatter_sum(x, axis), jnp.zeros((), x.dtype)), _scatter_sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole_sum(x: jax.Array, axis: Axis) -> jax.Array:
    """x [M, N] on every rank -> the sum over ranks, float32 [M, N], on every rank, from one gather of the partials."""
    return rank_sum(all_parts(x, axis))


def all_parts(x: jax.Array, axis: Axis) -> jax.Array:
    """x [M, N] on every rank -> every rank's partials, [W, M, N], on every rank."""
    return _compat.all_gather_equal(x, axis, tiled=False)


def _whole_sum_backward(axis: Axis, like: jax.Array, ds: jax.Array) -> tuple[jax.Array]:
    """With ``check_vma`` the gradient of an equal value comes equal; without, each rank holds a share of it."""
    if _compat.tracks_varying(axis):
        return (_compat.vary_over(ds.astype(like.dtype), axis),)
    return (jax.lax.psum(ds, axis).astype(like.dtype),)


whole_sum.defvjp(lambda x, axis: (whole_sum(x, axis), jnp.zeros((), x.dtype)), _whole_sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def own_rows(a: jax.Array, axis: Axis, share: int) -> jax.Array:
    """This rank's ``share`` rows of a replicated [W * share, N]."""
    start = jax.lax.axis_index(axis) * share
    return jax.lax.dynamic_slice_in_dim(_compat.vary_over(a, axis), start, share)


def _own_rows_backward(axis: Axis, share: int, _: None, da: jax.Array) -> tuple[jax.Array]:
    if _compat.tracks_varying(axis):
        return (_compat.all_gather_equal(da, axis, tiled=True),)
    whole = jnp.zeros((jax.lax.axis_size(axis) * share, *da.shape[1:]), da.dtype)
    return (jax.lax.dynamic_update_slice_in_dim(whole, da, jax.lax.axis_index(axis) * share, 0),)


own_rows.defvjp(lambda a, axis, share: (own_rows(a, axis, share), None), _own_rows_backward)


def gather_rows(a: jax.Array, axis: Axis, rows: int) -> jax.Array:
    """Everyone's rows, in rank order, the first ``rows`` of them; 8-bit values travel as bytes."""
    bits = jax.lax.bitcast_convert_type(a, jnp.uint8) if a.dtype.itemsize == 1 else a
    whole = _compat.all_gather_equal(bits, axis, tiled=True)[:rows]
    return jax.lax.bitcast_convert_type(whole, a.dtype) if a.dtype.itemsize == 1 else whole
