"""The composition of XLA collectives and one local norm kernel: runs everywhere, is differentiable, and defines the values.

    every rank's partials of a rank's own rows        all_to_all of row blocks
    s = sum over ranks, ascending, of f32(x)          one kernel that reads all partials (summed.py), or XLA's sum and
    [s += f32(residual)] -> norm [-> quantise]        the ordinary fused op on the float32 rows: the same bits
    all_gather of the values as bytes, and of the scales in row layout, which are laid out afterwards

Few rows cost latency, not bytes: one all_gather of the partials replaces the exchange, every rank sums and normalises all rows,
and nothing is left to gather. ``reduce="native"`` is XLA's own sum in the dtype of x, of few rows an all-reduce.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm

from .. import _compat
from .._ref import quant as ref
from .._ref._common import f32
from .._stage import Arrays
from .._types import Quantized
from . import _collectives as collectives
from . import schedule, summed
from ._config import Config

Results = tuple[Any, jax.Array | None]


def run(config: Config, arrays: Arrays) -> Results:
    """(y or Quantized, residual_out or None). ``arrays``: x, and of residual, weight, bias those that are there."""
    few = _few(config, arrays.get("residual"))
    rows, spec = (config.rows, config.spec) if few else (config.share, summed.row_layout(config.spec))
    if config.reduce == "native" or not summed.serves(config, arrays, rows, spec):
        return _sum_apart(config, arrays)
    if config.spec is not None:
        return _in_one_kernel(config, arrays)
    return _differentiable(config)(arrays)


@functools.cache
def _differentiable(config: Config) -> Any:
    """One kernel, unless it is differentiated: the backward pass wants the sum."""

    @jax.custom_vjp
    def op(arrays: Arrays) -> Results:
        return _in_one_kernel(config, arrays)

    op.defvjp(lambda arrays: jax.vjp(functools.partial(_sum_apart, config), arrays), lambda vjp, cts: vjp(cts))
    return op


def _in_one_kernel(config: Config, arrays: Arrays) -> Results:
    x, residual = _compat.vary_over(arrays["x"], config.axis), arrays.get("residual")
    if _few(config, residual):
        return summed.norm(config, collectives.all_parts(x, config.axis), residual, arrays, config.spec)
    valid = _valid(config)
    if residual is not None:
        residual = _own_residual(config, residual, valid)
    parts = collectives.own_parts(_pad_rows(x, config.share * config.ranks), config.axis)
    return _gathered(config, *summed.norm(config, parts, residual, arrays, summed.row_layout(config.spec)), valid)


def _sum_apart(config: Config, arrays: Arrays) -> Results:
    x, residual = arrays["x"], arrays.get("residual")
    x = _compat.vary_over(x, config.axis)
    if _few(config, residual):
        s: Any = collectives.whole_sum(x, config.axis) if config.reduce == "exact" else jax.lax.psum(x, config.axis)
        return _normalise(config, s, residual, arrays)
    valid = _valid(config)
    s = _own_sum(config, x)
    if residual is not None:
        residual = _own_residual(config, residual, valid)
    if valid is not None:
        s = jnp.where(
            valid, s, jnp.ones((), s.dtype)
        )  # rows that no rank has are normalised, too: nothing there may be NaN
    return _gathered(config, *_normalise(config, s, residual, arrays, lay_out=False), valid)


def alone(config: Config, arrays: Arrays) -> tuple[Any, jax.Array | None]:
    """One rank, or no rows: the op itself, on rows in their own dtype."""
    x, residual = arrays["x"], arrays.get("residual")
    if _compat.tracks_varying(config.axis):  # the sum over one rank is the value, typed as equal on all
        x, residual = (
            None if a is None else jax.lax.psum(_compat.vary_over(a, config.axis), config.axis) for a in (x, residual)
        )
    assert x is not None
    return _normalise(config, x, residual, arrays)


def _few(config: Config, residual: jax.Array | None) -> bool:
    """Whether all ranks do all rows."""
    if config.scatter and (not config.gather or residual is not None):
        return False
    if residual is not None and _compat.varies_over(residual, config.axis):
        return False  # typed as different on each rank, so its results would be
    return (config.reduce == "native" and not config.scatter) or schedule.few_rows(config)


def _own_sum(config: Config, x: jax.Array) -> jax.Array:
    x = _pad_rows(x, config.share * config.ranks)
    if config.reduce == "exact":
        return collectives.scatter_sum(x, config.axis)
    return jax.lax.psum_scatter(x, config.axis, scatter_dimension=0, tiled=True)


def _valid(config: Config) -> jax.Array | None:
    """[Ms, 1]: which of this rank's rows exist; None when all do."""
    if not config.ragged:
        return None
    first = jax.lax.axis_index(config.axis) * config.share
    return (first + jnp.arange(config.share) < config.rows)[:, None]


def _own_residual(config: Config, residual: jax.Array, valid: jax.Array | None) -> jax.Array:
    if not config.scatter:
        whole = _pad_rows(residual, config.share * config.ranks)
        if _compat.varies_over(whole, config.axis):
            start = jax.lax.axis_index(config.axis) * config.share
            return jax.lax.dynamic_slice_in_dim(whole, start, config.share)
        return collectives.own_rows(whole, config.axis, config.share)
    residual = _compat.vary_over(residual, config.axis)
    return residual if valid is None else jnp.where(valid, residual, jnp.zeros((), residual.dtype))


def _pad_rows(a: jax.Array, rows: int) -> jax.Array:
    return a if a.shape[0] == rows else jnp.pad(a, ((0, rows - a.shape[0]), (0, 0)))


def _gathered(config: Config, y: Any, residual_out: jax.Array | None, valid: jax.Array | None) -> tuple[Any, Any]:
    """The results of this rank's rows in the form that the op returns."""
    mask = lambda a, fill: a if valid is None else jnp.where(valid, a, jnp.full((), fill, a.dtype))  # noqa: E731
    gather = lambda a: collectives.gather_rows(a, config.axis, config.rows)  # noqa: E731
    if residual_out is not None:
        residual_out = mask(residual_out, 0) if config.scatter else gather(residual_out)
    if isinstance(y, Quantized):
        one = 127 if y.spec.scale_dtype == "e8m0" else 1
        parts = (
            (gather(y.values), gather(y.scale)) if config.gather else (mask_values(y.values, valid), mask(y.scale, one))
        )
        assert config.spec is not None
        return Quantized(parts[0], ref.lay_out(parts[1], config.spec), config.spec), residual_out
    return gather(y) if config.gather else mask(y, 0), residual_out


def mask_values(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Zero codes in the rows that are not there, by their bits: fp8 has no ``select`` everywhere."""
    if valid is None:
        return values
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return jax.lax.bitcast_convert_type(jnp.where(valid, bits, jnp.zeros((), jnp.uint8)), values.dtype)


def _normalise(
    config: Config, s: jax.Array, residual: jax.Array | None, arrays: Arrays, lay_out: bool = True
) -> tuple[Any, jax.Array | None]:
    """The local op on float32 rows: (y or Quantized, residual_out or None)."""
    spec = config.spec if lay_out else summed.row_layout(config.spec)
    if config.cast == "before_weight" and s.dtype.name != config.dtype:
        return _weight_last(config, s, residual, arrays, spec)
    weight = arrays.get("weight")
    vectors = (weight, arrays.get("bias")) if config.norm == "layernorm" else (weight,)
    name = ("" if residual is None else "add_") + config.norm + ("" if spec is None else "_quant")
    rows = (s,) if residual is None else (s, residual)
    options: dict[str, Any] = {"eps": config.eps, "weight_offset": config.weight_offset, "cast": config.cast}
    if spec is None:
        options["out_dtype"] = config.dtype
    out = getattr(jaxnorm, name)(*rows, *vectors, *(() if spec is None else (spec,)), **options)
    return out if residual is not None else (out, None)


def _weight_last(
    config: Config, s: jax.Array, residual: jax.Array | None, arrays: Arrays, spec: Any
) -> tuple[Any, jax.Array | None]:
    """``cast="before_weight"``: the normalised rows are rounded to the dtype of the partials, which the float32 sum has not."""
    norm = getattr(jaxnorm, ("" if residual is None else "add_") + config.norm)
    rows = (s,) if residual is None else (s, residual)
    none = (None, None) if config.norm == "layernorm" else (None,)
    out = norm(*rows, *none, eps=config.eps, out_dtype=config.dtype)
    y, residual_out = out if residual is not None else (out, None)
    weight, bias = (None if v is None else f32(v) for v in (arrays.get("weight"), arrays.get("bias")))
    z = f32(y)
    if weight is not None:
        z = z * (weight + config.weight_offset)
    if bias is not None:
        z = z + bias
    return (z.astype(config.dtype) if spec is None else jaxnorm.quantize(z, spec)), residual_out
