"""What the Flax modules of both kinds share: the operator that serves a call, and plain JAX for what no operator takes.

Imports no flax. A call is served by an operator when it normalises trailing axes of a 16- or 32-bit float array and wants neither a
mask nor statistics shared between devices; everything else takes :func:`_plain`, with the same formulas and the same promises on
dtypes. A module calls :func:`normalise` and need not know which it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ._api import _checks as check
from ._ref._common import rounded
from ._types import QuantSpec
from .errors import type_error, value_error


@dataclass(frozen=True)
class Norm:
    """One normalisation as a module is configured for it."""

    kind: str
    """``rmsnorm``, ``layernorm`` or ``groupnorm``"""
    epsilon: float
    reduction_axes: tuple[int, ...]
    """Sorted and not negative; for ``groupnorm`` with the channels, the last axis."""
    feature_axes: tuple[int, ...]
    out_dtype: Any
    """dtype of the result unless ``quant`` says otherwise."""
    num_groups: int = 1
    mask: jax.Array | None = None
    axis_name: Any = None
    axis_index_groups: Any = None
    weight_offset: float = 0.0
    cast: str = "output"
    quant: QuantSpec | None = None


def check_quant(op: str, quant: Any) -> None:
    """A module's ``quant`` argument."""
    if quant is not None and not isinstance(quant, QuantSpec):
        raise type_error(op, "quant", type(quant).__name__, "a QuantSpec or None", 'For example QuantSpec("int8").')


def canonical_axes(ndim: int, axes: int | Iterable[int]) -> tuple[int, ...]:
    """Sorted, not negative, each once."""
    several = axes if isinstance(axes, Iterable) else (axes,)
    return tuple(sorted({a % ndim if -ndim <= a < ndim else _bad_axis(a, ndim) for a in several}))


def _bad_axis(axis: int, ndim: int) -> int:
    raise ValueError(f"axes: got {axis}, expected one of the {ndim} axes of the input.")


def normalise(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, norm: Norm) -> Any:
    """``x`` normalised, scaled and shifted: an array of ``norm.out_dtype``, or a Quantized. scale and bias have any shape of the
    features' sizes, in the order of the axes."""
    sizes = [x.shape[a] for a in norm.feature_axes]
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.size != math.prod(sizes):
            expected = f"{value.size} features, the size of {name}, along {norm.feature_axes}"
            raise value_error(norm.kind, "x", f"shape {x.shape}", expected)
    out_dtype = jnp.dtype(jnp.float32) if norm.quant else jnp.dtype(norm.out_dtype)
    if _has_kernels(x, scale, bias, out_dtype, norm):
        return _operator(x, scale, bias, out_dtype, norm)
    y = _plain(x, scale, bias, norm)
    return y.astype(out_dtype) if norm.quant is None else _quantized(y.astype(out_dtype), norm.quant)


def _quantized(y: jax.Array, spec: QuantSpec) -> Any:
    from ._api.quant import quantize

    return quantize(y, spec)


def _trailing(axes: Sequence[int], ndim: int) -> bool:
    return tuple(axes) == tuple(range(ndim - len(axes), ndim))


def _has_kernels(x: jax.Array, scale: Any, bias: Any, out_dtype: jnp.dtype, norm: Norm) -> bool:
    if norm.mask is not None or norm.axis_name is not None or x.size == 0:
        return False
    dtypes = [out_dtype, *(a.dtype for a in (x, scale, bias) if a is not None)]
    if any(d.name not in check.FLOATS for d in dtypes) or not _trailing(norm.reduction_axes, x.ndim):
        return False
    if norm.feature_axes == norm.reduction_axes or norm.kind == "groupnorm":
        return True
    return norm.kind == "layernorm" and norm.feature_axes == (x.ndim - 1,)  # one group: the affine differs by channel


def _operator(x: jax.Array, scale: Any, bias: Any, out_dtype: jnp.dtype, norm: Norm) -> Any:
    scale, bias = (None if a is None else a.reshape(-1) for a in (scale, bias))
    lead = x.shape[: x.ndim - len(norm.reduction_axes)]
    if norm.kind == "groupnorm" or norm.feature_axes != norm.reduction_axes:
        from ._api.groupnorm import groupnorm

        batch = x if len(lead) == 1 else x.reshape(math.prod(lead), *x.shape[len(lead) :])
        y = groupnorm(batch, scale, bias, num_groups=norm.num_groups, eps=norm.epsilon, out_dtype=out_dtype)
        y = y.reshape(x.shape)
        return y if norm.quant is None else _quantized(y, norm.quant)
    rows = x if len(norm.reduction_axes) == 1 else x.reshape(*lead, -1)
    if norm.kind == "rmsnorm":
        out = _rmsnorm(rows, scale, out_dtype, norm)
    else:
        out = _layernorm(rows, scale, bias, out_dtype, norm)
    return out if norm.quant is not None else out.reshape(x.shape)


def _rmsnorm(x: jax.Array, scale: Any, out_dtype: jnp.dtype, norm: Norm) -> Any:
    options: dict[str, Any] = {"eps": norm.epsilon, "weight_offset": norm.weight_offset, "cast": norm.cast}
    if norm.quant is not None:
        from ._api.quant import rmsnorm_quant

        return rmsnorm_quant(x, scale, norm.quant, **options)
    from ._api.rmsnorm import rmsnorm

    return rmsnorm(x, scale, out_dtype=out_dtype, **options)


def _layernorm(x: jax.Array, scale: Any, bias: Any, out_dtype: jnp.dtype, norm: Norm) -> Any:
    from . import layernorm, layernorm_quant

    if norm.quant is not None:
        return layernorm_quant(x, scale, bias, norm.quant, eps=norm.epsilon)
    return layernorm(x, scale, bias, eps=norm.epsilon, out_dtype=out_dtype)


def _plain(x: jax.Array, scale: Any, bias: Any, norm: Norm) -> jax.Array:
    """The same in plain JAX, for any axes, masks, axis names and dtypes (float64 and complex, too); float32 at least.

    As in Flax, a mask chooses what the statistics are made of, not what is normalised, and over a device axis the statistics are
    the mean of the devices' own.
    """
    work = jnp.promote_types(x.dtype, jnp.float32)
    v, axes, mask = x.astype(work), norm.reduction_axes, norm.mask
    if norm.kind == "groupnorm":
        channels = x.shape[-1]
        grouped = (norm.num_groups, channels // norm.num_groups)
        v = v.reshape(*x.shape[:-1], *grouped)
        axes = (*axes[:-1], x.ndim)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:-1], channels)).reshape(*mask.shape[:-1], *grouped)

    def mean(a: jax.Array) -> jax.Array:
        m = jnp.mean(a, axes, keepdims=True, where=mask)
        if norm.axis_name is None:
            return m
        return jax.lax.pmean(m, norm.axis_name, axis_index_groups=norm.axis_index_groups)

    if norm.kind == "rmsnorm":
        y = v * jax.lax.rsqrt(mean(_squared(v)) + norm.epsilon)
    else:  # the rounding error of the first mean is taken out by the second
        d = v - mean(v)
        e = mean(d)
        y = (d - e) * jax.lax.rsqrt(mean(_squared(d)) - _squared(e) + norm.epsilon)
    y = y.reshape(x.shape)
    if norm.cast == "before_weight":
        y = rounded(y, x.dtype)
    shape = [x.shape[a] if a in norm.feature_axes else 1 for a in range(x.ndim)]
    if scale is not None:
        y = y * (scale.astype(jnp.promote_types(scale.dtype, work)).reshape(shape) + norm.weight_offset)
    return y if bias is None else y + bias.astype(y.dtype).reshape(shape)


def _squared(v: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(v):
        return jnp.square(v.real) + jnp.square(v.imag)
    return jnp.square(v)


def group_count(num_groups: int | None, group_size: int | None, channels: int) -> int:
    """Groups of a GroupNorm that is given one of the two."""
    if (num_groups is None) == (group_size is None):
        got = f"num_groups={num_groups}, group_size={group_size}"
        raise value_error(
            "GroupNorm", "num_groups", got, "one of the two", "Pass num_groups=None to give group_size instead of 32."
        )
    if group_size is not None:
        if group_size < 1 or channels % group_size:
            raise value_error("GroupNorm", "group_size", group_size, f"a divisor of the {channels} channels")
        return channels // group_size
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise value_error("GroupNorm", "num_groups", num_groups, f"a divisor of the {channels} channels")
    return num_groups


def group_axes(ndim: int, reduction_axes: Any) -> tuple[int, ...]:
    """All but the first axis unless told; the channels must be among them."""
    axes = canonical_axes(ndim, [*range(1, ndim - 1), -1] if reduction_axes is None else reduction_axes)
    if not axes or axes[-1] != ndim - 1:
        raise value_error("GroupNorm", "reduction_axes", reduction_axes, "axes with the last one, the channels, among")
    return axes


def add_norm(
    kind: str,
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    dtype: Any,
    residual_rounding: str,
    quant: QuantSpec | None,
    **options: Any,
) -> Any:
    """``(y or Quantized, residual_out)`` of the residual add and the norm; y has ``dtype``, or what Flax gives for the sum."""
    options |= {"eps": epsilon, "residual_rounding": residual_rounding}
    x, residual = check.array(f"add_{kind}", "x", x), check.array(f"add_{kind}", "residual", residual)
    if quant is None:
        parts = [a.dtype for a in (x, residual, scale, bias) if a is not None]
        options["out_dtype"] = dtype if dtype is not None else jnp.result_type(*parts)
    else:
        options["spec"] = quant
    import jaxnorm

    op = getattr(jaxnorm, f"add_{kind}" if quant is None else f"add_{kind}_quant")
    vectors = (scale,) if kind == "rmsnorm" else (scale, bias)
    return op(x, residual, *vectors, **options)


def qk_norm_rope(
    q: jax.Array,
    k: jax.Array,
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
    positions: Any,
    cos_sin: jax.Array,
    *,
    dtype: Any,
    quant: QuantSpec | None,
    **options: Any,
) -> Any:
    """``(q, k)`` normed by head and rotated; in ``dtype`` when given, and quantised by head as the cache does it."""
    from . import qk_norm_rope as op

    if dtype is not None:
        q, k = q.astype(dtype), k.astype(dtype)
    out = op(q, k, q_scale, k_scale, positions, cos_sin, **options)
    return out if quant is None else tuple(_quantized(a, quant) for a in out)
