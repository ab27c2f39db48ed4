"""LayerNorm with a quantising epilogue, one kernel launch each; the machinery is that of ``quant``."""

from __future__ import annotations

from typing import Any

import jax

from .._ref import layernorm as ref
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from .._types import QuantSpec
from . import _checks as check
from . import layernorm, quant


def _reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    options = {k: v for k, v in call.options if k not in ("spec", "fp8")}
    out = ref.normalise(a, features=call.features, axes=axes, **options)
    return {**out, **quant.encode(call, out["y"], a, axes)}


_PLANS = {"triton": "quant_triton", "hip": "quant_hip"}
LAYERNORM_QUANT = register_stage(StageDef("layernorm_quant_fwd", "layernorm_quant", _reference, _PLANS))


def _layernorm(
    op: str,
    arrays: dict[str, Any],
    spec: Any,
    *,
    smooth_scale: Any,
    static_scale: Any,
    keep_unquantized: Any,
    residual_rounding: Any,
    eps: Any,
    weight_offset: Any,
    cast: Any,
    out_dtype: Any,
    pad_to_multiple: Any,
    backend: Any,
) -> Any:
    x = arrays["x"]
    options = {
        "eps": check.eps(op, eps),
        "weight_offset": check.offset(op, weight_offset, arrays["weight"]),
        "cast": check.choice(op, "cast", cast, check.CASTS),
        "residual_rounding": check.choice(op, "residual_rounding", residual_rounding, check.ROUNDINGS),
    }
    return quant.call_op(
        op,
        "layernorm(...)" if arrays["residual"] is None else "add_layernorm(...)[0]",
        LAYERNORM_QUANT.name,
        arrays,
        spec,
        smooth_scale=smooth_scale,
        static_scale=static_scale,
        keep=quant.kept_dtype(op, keep_unquantized, out_dtype, x),
        width=check.padded_width(op, pad_to_multiple, x.shape[-1]),
        options=options,
        backend=backend,
    )


def layernorm_quant(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    spec: QuantSpec,
    *,
    x_bias: jax.Array | None = None,
    smooth_scale: Any = None,
    static_scale: Any = None,
    keep_unquantized: bool = False,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> Any:
    """``quantize(layernorm(x, weight, bias))`` on the unrounded float32 y, in one kernel.

    Args:
      x, weight, bias, x_bias, eps, weight_offset, cast: as in :func:`layernorm`.
      spec, smooth_scale, static_scale: as in :func:`quantize`; smooth_scale multiplies y, after the bias.
      keep_unquantized, out_dtype, pad_to_multiple, backend: as in :func:`rmsnorm_quant`.

    Returns:
      Quantized, or (Quantized, y) with keep_unquantized; y is before the smooth scale.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a group size that does not divide the (padded) N.

    Gradients: none, see :func:`quantize`. Sharding: see :func:`quantize`; sharded features also sum three floats a row.
    """
    return _layernorm(
        "layernorm_quant",
        layernorm.operands("layernorm_quant", x, x_bias, None, weight, bias, has_residual=False),
        spec,
        smooth_scale=smooth_scale,
        static_scale=static_scale,
        keep_unquantized=keep_unquantized,
        residual_rounding="float32",
        eps=eps,
        weight_offset=weight_offset,
        cast=cast,
        out_dtype=out_dtype,
        pad_to_multiple=pad_to_multiple,
        backend=backend,
    )


def add_layernorm_quant(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    spec: QuantSpec,
    *,
    x_bias: jax.Array | None = None,
    smooth_scale: Any = None,
    static_scale: Any = None,
    keep_unquantized: bool = False,
    residual_rounding: str = "float32",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> Any:
    """The adds, the norm and the quantisation in one kernel: reads x and residual once, writes codes and residual_out once.

    Args:
      x, residual, weight, bias, x_bias, residual_rounding, eps, weight_offset, cast: as in :func:`add_layernorm`.
      The others as in :func:`layernorm_quant`.

    Returns:
      (Quantized, residual_out), or (Quantized, residual_out, y) with keep_unquantized; residual_out as :func:`add_layernorm` gives
      it, never padded.

    Raises, Gradients, Sharding: as :func:`layernorm_quant`.
    """
    return _layernorm(
        "add_layernorm_quant",
        layernorm.operands("add_layernorm_quant", x, x_bias, residual, weight, bias, has_residual=True),
        spec,
        smooth_scale=smooth_scale,
        static_scale=static_scale,
        keep_unquantized=keep_unquantized,
        residual_rounding=residual_rounding,
        eps=eps,
        weight_offset=weight_offset,
        cast=cast,
        out_dtype=out_dtype,
        pad_to_multiple=pad_to_multiple,
        backend=backend,
    )


register_op(OpDef("layernorm_quant", layernorm_quant, LAYERNORM_QUANT))
register_op(OpDef("add_layernorm_quant", add_layernorm_quant, LAYERNORM_QUANT))
