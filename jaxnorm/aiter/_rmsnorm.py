"""AITER's RMSNorm names. ``gemma_norm=True`` on any of them multiplies with ``weight + 1``.

Where numbers differ from AITER's on purpose, everywhere in this file: bfloat16 results are rounded to nearest even (AITER truncates
on gfx942); int8 codes are rounded and clipped to +-127 (AITER truncates, or wraps 127.6 to -128); a row of zeros has scale 1.0; the
quotient ``y / scale`` is a division; any N, any weight dtype, any leading dims.
"""

from __future__ import annotations

from typing import Any

import jax

from .._api import quant as ops_quant
from .._api import rmsnorm as ops
from . import _common


def rmsnorm2d_fwd(
    input: jax.Array, weight: jax.Array, epsilon: float, use_model_sensitive_rmsnorm: int = 0, *, gemma_norm: bool = False
) -> jax.Array:  # fmt: skip
    """``out = input * rsqrt(mean(input**2) + epsilon) * weight``: :func:`jaxnorm.rmsnorm`.

    ``use_model_sensitive_rmsnorm=1`` is ``cast="before_weight"``: rounded to input's dtype before the weight.
    """
    op = "aiter.rmsnorm2d_fwd"
    rounding = _common.order(op, use_model_sensitive_rmsnorm)
    return ops.rmsnorm(input, weight, eps=epsilon, weight_offset=_common.offset(op, gemma_norm), **rounding)


def rms_norm(
    input: jax.Array, weight: jax.Array, epsilon: float, use_model_sensitive_rmsnorm: int = 0, *, gemma_norm: bool = False
) -> jax.Array:  # fmt: skip
    """As :func:`rmsnorm2d_fwd`; also AITER's Triton function. Gradients flow to input and weight."""
    return rmsnorm2d_fwd(input, weight, epsilon, use_model_sensitive_rmsnorm, gemma_norm=gemma_norm)


def rmsnorm(input: jax.Array, weight: jax.Array, epsilon: float, *, gemma_norm: bool = False) -> jax.Array:
    """As :func:`rmsnorm2d_fwd`. AITER's stops at N = 8192."""
    return rmsnorm2d_fwd(input, weight, epsilon, gemma_norm=gemma_norm)


def rmsnorm2d_fwd_with_add(
    input: jax.Array,
    residual_in: jax.Array,
    weight: jax.Array,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    *,
    gemma_norm: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """``(out, residual_out)``: :func:`jaxnorm.add_rmsnorm`.

    The norm reads the unrounded float32 sum, as AITER's HIP and CK kernels do and its Triton kernel does not;
    ``use_model_sensitive_rmsnorm=1`` reads the rounded one and rounds again before the weight. The gradient of ``residual_out``
    counts; AITER's backward drops it.
    """
    op = "aiter.rmsnorm2d_fwd_with_add"
    rounding = _common.order(op, use_model_sensitive_rmsnorm, residual=True)
    offset = _common.offset(op, gemma_norm)
    return ops.add_rmsnorm(input, residual_in, weight, eps=epsilon, weight_offset=offset, **rounding)


def add_rmsnorm(
    input: jax.Array, residual_in: jax.Array, weight: jax.Array, epsilon: float, *, gemma_norm: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As :func:`rmsnorm2d_fwd_with_add`."""
    return rmsnorm2d_fwd_with_add(input, residual_in, weight, epsilon, gemma_norm=gemma_norm)


def rmsnorm2d_fwd_with_smoothquant(
    input: jax.Array,
    xscale: jax.Array,
    weight: jax.Array,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    *,
    gemma_norm: bool = False,
    out_dtype: Any = "int8",
) -> tuple[jax.Array, jax.Array]:
    """``(codes, yscale)`` of ``norm(input) * xscale``, one scale a row: :func:`jaxnorm.rmsnorm_quant` with ``smooth_scale``.

    xscale multiplies the norm's result, after the weight, as in AITER's code; its guide says before the norm.
    """
    op = "aiter.rmsnorm2d_fwd_with_smoothquant"
    q = ops_quant.rmsnorm_quant(
        input,
        weight,
        _common.spec(op, out_dtype),
        smooth_scale=xscale,
        eps=epsilon,
        weight_offset=_common.offset(op, gemma_norm),
        **_common.order(op, use_model_sensitive_rmsnorm),
    )
    return q.values, q.scale


def rmsnorm2d_fwd_with_dynamicquant(
    input: jax.Array,
    weight: jax.Array,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    group_size: int = 0,
    shuffle_scale: bool = False,
    *,
    scale_ub: Any = None,
    clamp_out: bool = False,
    dump_rms_norm: bool = False,
    gemma_norm: bool = False,
    out_dtype: Any = "fp8",
    scale_dtype: str = "float32",
) -> Any:
    """``(codes, yscale)``, or ``(codes, yscale, y)`` with ``dump_rms_norm``: :func:`jaxnorm.rmsnorm_quant`.

    group_size 0 is one scale a row. shuffle_scale gives an honest ``[G, M]`` array (MX tiles for e8m0 scales of groups of 32),
    where AITER hands out a view. Any group size that divides N; ``use_model_sensitive_rmsnorm`` counts with groups, too.
    ``clamp_out`` is accepted and changes nothing: codes are always clipped. The y of ``dump_rms_norm`` has input's dtype.
    """
    op = "aiter.rmsnorm2d_fwd_with_dynamicquant"
    out = ops_quant.rmsnorm_quant(
        input,
        weight,
        _common.spec(op, out_dtype, group_size, scale_dtype, shuffle_scale, scale_ub),
        keep_unquantized=bool(dump_rms_norm),
        eps=epsilon,
        weight_offset=_common.offset(op, gemma_norm),
        **_common.order(op, use_model_sensitive_rmsnorm),
    )
    q, *y = out if dump_rms_norm else (out,)
    return (q.values, q.scale, *y)


def rmsnorm2d_fwd_with_add_smoothquant(
    input: jax.Array,
    residual_in: jax.Array,
    xscale: jax.Array,
    weight: jax.Array,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    *,
    out_before_quant: bool = False,
    gemma_norm: bool = False,
    out_dtype: Any = "int8",
) -> Any:
    """``(codes, residual_out, yscale)``, with ``out_before_quant`` also y: :func:`jaxnorm.add_rmsnorm_quant` with ``smooth_scale``.

    ``out_before_quant=True`` stands for AITER's buffer of that name. Its y is the norm's result before xscale, as AITER's CK kernel
    gave it; AITER's later kernels store it after xscale.
    """
    op = "aiter.rmsnorm2d_fwd_with_add_smoothquant"
    q, residual_out, *y = ops_quant.add_rmsnorm_quant(
        input,
        residual_in,
        weight,
        _common.spec(op, out_dtype),
        smooth_scale=xscale,
        keep_unquantized=bool(out_before_quant),
        eps=epsilon,
        weight_offset=_common.offset(op, gemma_norm),
        **_common.order(op, use_model_sensitive_rmsnorm, residual=True),
    )
    return (q.values, residual_out, q.scale, *y)


def rmsnorm2d_fwd_with_add_dynamicquant(
    input: jax.Array,
    residual_in: jax.Array,
    weight: jax.Array,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
    group_size: int = 0,
    shuffle_scale: bool = False,
    *,
    gemma_norm: bool = False,
    out_dtype: Any = "fp8",
    scale_dtype: str = "float32",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(codes, residual_out, yscale)``: :func:`jaxnorm.add_rmsnorm_quant`; groups as :func:`rmsnorm2d_fwd_with_dynamicquant`."""
    op = "aiter.rmsnorm2d_fwd_with_add_dynamicquant"
    q, residual_out = ops_quant.add_rmsnorm_quant(
        input,
        residual_in,
        weight,
        _common.spec(op, out_dtype, group_size, scale_dtype, shuffle_scale),
        eps=epsilon,
        weight_offset=_common.offset(op, gemma_norm),
        **_common.order(op, use_model_sensitive_rmsnorm, residual=True),
    )
    return q.values, residual_out, q.scale


def rmsnorm_quant(
    input: jax.Array,
    weight: jax.Array,
    epsilon: float,
    group_size: int = 0,
    shuffle_scale: bool = False,
    *,
    gemma_norm: bool = False,
    out_dtype: Any = "fp8",
    scale_dtype: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """``(codes, scale)``: as :func:`rmsnorm2d_fwd_with_dynamicquant`. AITER's stops at N = 8192."""
    q, scale = rmsnorm2d_fwd_with_dynamicquant(
        input, weight, epsilon, 0, group_size, shuffle_scale,
        gemma_norm=gemma_norm, out_dtype=out_dtype, scale_dtype=scale_dtype,
    )  # fmt: skip
    return q, scale


def add_rmsnorm_quant(
    input: jax.Array,
    residual_in: jax.Array,
    weight: jax.Array,
    epsilon: float,
    group_size: int = 0,
    shuffle_scale: bool = False,
    *,
    gemma_norm: bool = False,
    out_dtype: Any = "fp8",
    scale_dtype: str = "float32",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(codes, residual_out, scale)``: as :func:`rmsnorm2d_fwd_with_add_dynamicquant`."""
    return rmsnorm2d_fwd_with_add_dynamicquant(
        input, residual_in, weight, epsilon, 0, group_size, shuffle_scale,
        gemma_norm=gemma_norm, out_dtype=out_dtype, scale_dtype=scale_dtype,
    )  # fmt: skip


def fused_add_rmsnorm_pad(
    x: jax.Array,
    weight: jax.Array,
    epsilon: float,
    res: jax.Array | None = None,
    x_pad_to_multiple: int = 0,
    *,
    gemma_norm: bool = False,
) -> Any:
    """``out``, or ``(out, res_out)`` with ``res``: :func:`jaxnorm.rmsnorm` or :func:`jaxnorm.add_rmsnorm` with ``pad_to_multiple``.

    The mean is over the real N, the tail of ``out`` is zero, ``res_out`` is not padded. The norm reads the unrounded sum, AITER's
    the rounded one.
    """
    options: dict[str, Any] = {"eps": epsilon, "pad_to_multiple": x_pad_to_multiple}
    options["weight_offset"] = _common.offset("aiter.fused_add_rmsnorm_pad", gemma_norm)
    if res is None:
        return ops.rmsnorm(x, weight, **options)
    return ops.add_rmsnorm(x, res, weight, **options)
