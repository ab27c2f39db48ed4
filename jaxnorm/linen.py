"""Flax Linen modules on jaxnorm's kernels: change the import, and a model and its checkpoints stay as they are.

``RMSNorm``, ``LayerNorm`` and ``GroupNorm`` are subclasses of Flax's own: the same attributes, parameters, automatic names, logical
axes and result dtypes. ``AddRMSNorm``, ``AddLayerNorm`` and ``QKNormRope`` fuse what stands around a norm in a transformer block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

try:
    import flax.linen as flax_linen
    from flax.linen import dtypes as flax_dtypes
except ModuleNotFoundError as e:
    raise ModuleNotFoundError("jaxnorm.linen: needs flax. Install it with: pip install 'jaxnorm[flax]'") from e

from . import _modules
from ._api import _checks as check
from ._types import QuantSpec

__all__ = ["AddLayerNorm", "AddRMSNorm", "GroupNorm", "LayerNorm", "QKNormRope", "RMSNorm"]


def _affine(module: Any, shape: tuple[int, ...]) -> tuple[jax.Array | None, jax.Array | None]:
    """The parameters ``scale`` and ``bias`` of this shape, where the module has them."""
    scale = module.param("scale", module.scale_init, shape, module.param_dtype) if module.use_scale else None
    bias = (
        module.param("bias", module.bias_init, shape, module.param_dtype)
        if getattr(module, "use_bias", False)
        else None
    )
    return scale, bias


def _normalise(module: Any, kind: str, x: Any, mask: Any, axes: Any, features: Any, **options: Any) -> Any:
    _modules.check_quant(type(module).__name__, module.quant)
    scale, bias = _affine(module, tuple(x.shape[a] for a in features))
    dtype = flax_dtypes.canonicalize_dtype(*(a for a in (x, scale, bias) if a is not None), dtype=module.dtype)
    norm = _modules.Norm(
        kind,
        module.epsilon,
        axes,
        features,
        dtype,
        mask=None if mask is None else jnp.asarray(mask, bool),
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        quant=module.quant,
        **options,
    )
    return _modules.normalise(x, scale, bias, norm)


class RMSNorm(flax_linen.RMSNorm):
    """``y = x * rsqrt(mean(x**2) + epsilon) * (scale + weight_offset)``: ``flax.linen.RMSNorm`` on jaxnorm's kernels.

    All attributes of ``flax.linen.RMSNorm`` with their meaning, the parameter ``scale``, and Flax's result dtype (bfloat16 in,
    float32 parameters: float32 out). A mask, ``axis_name``, axes that are not the last ones, integer or float64 inputs take plain
    JAX. ``use_fast_variance`` and ``force_float32_reductions`` are accepted; sums are always float32.

    Attributes:
      weight_offset: 1.0 for a ``scale`` stored around zero (Gemma).
      cast:          ``"before_weight"`` rounds ``x * rstd`` to x.dtype before the scale, as T5 and Hugging Face do.
      quant:         a QuantSpec: the call returns a Quantized, made from the unrounded float32 y.
    """

    weight_offset: float = 0.0
    cast: str = "output"
    quant: QuantSpec | None = None

    @flax_linen.compact
    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> Any:
        """y of x's shape, or a Quantized. mask: booleans broadcastable to x, the positions that the mean is taken over."""
        x = jnp.asarray(x)
        check.choice("RMSNorm", "cast", self.cast, check.CASTS)
        if not self.use_scale:
            check.offset("RMSNorm", self.weight_offset, None)
        axes = _modules.canonical_axes(x.ndim, self.reduction_axes)
        features = _modules.canonical_axes(x.ndim, self.feature_axes)
        options = {"weight_offset": self.weight_offset, "cast": self.cast}
        return _normalise(self, "rmsnorm", x, mask, axes, features, **options)


class LayerNorm(flax_linen.LayerNorm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``: ``flax.linen.LayerNorm`` on jaxnorm's kernels.

    All attributes of ``flax.linen.LayerNorm`` with their meaning, the parameters ``scale`` and ``bias``, and Flax's result dtype.
    Plain JAX serves what :class:`RMSNorm` says. ``use_fast_variance`` is accepted; the variance is always the accurate one, so that
    inputs far from zero come out right.

    Attributes:
      quant: a QuantSpec: the call returns a Quantized, made from the unrounded float32 y.
    """

    quant: QuantSpec | None = None

    @flax_linen.compact
    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> Any:
        """y of x's shape, or a Quantized. mask: booleans broadcastable to x, the positions that the statistics are taken over."""
        x = jnp.asarray(x)
        axes = _modules.canonical_axes(x.ndim, self.reduction_axes)
        return _normalise(self, "layernorm", x, mask, axes, _modules.canonical_axes(x.ndim, self.feature_axes))


class GroupNorm(flax_linen.GroupNorm):
    """LayerNorm over groups of channels and the spatial axes: ``flax.linen.GroupNorm`` on jaxnorm's kernels.

    All attributes of ``flax.linen.GroupNorm`` with their meaning, the parameters ``scale`` and ``bias``, and Flax's result dtype.
    Plain JAX serves what :class:`RMSNorm` says.

    Attributes:
      quant: a QuantSpec: the call returns a Quantized, made from the unrounded float32 y.
    """

    quant: QuantSpec | None = None

    @flax_linen.compact
    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> Any:
        """y of x's shape [..., channels], or a Quantized. mask: as in :class:`LayerNorm`."""
        x = jnp.asarray(x)
        axes = _modules.group_axes(x.ndim, self.reduction_axes)
        groups = _modules.group_count(self.num_groups, self.group_size, x.shape[-1])
        return _normalise(self, "groupnorm", x, mask, axes, (x.ndim - 1,), num_groups=groups)


class AddRMSNorm(flax_linen.Module):
    """``s = x + residual;  y = s * rsqrt(mean(s**2) + epsilon) * (scale + weight_offset)``, one kernel.

    Attributes:
      epsilon, param_dtype, use_scale, scale_init: as in ``flax.linen.RMSNorm``; the parameter is ``scale``.
      dtype:         dtype of y; None: what ``flax.linen.RMSNorm`` gives for ``x + residual``.
      weight_offset, cast, residual_rounding: as in :func:`jaxnorm.add_rmsnorm`.
      quant:         a QuantSpec: y is a Quantized.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Any = flax_linen.initializers.ones
    weight_offset: float = 0.0
    cast: str = "output"
    residual_rounding: str = "float32"
    quant: QuantSpec | None = None

    @flax_linen.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[Any, jax.Array]:
        """(y, residual_out) of x [..., N] and residual [..., N]; residual_out in residual.dtype."""
        _modules.check_quant("AddRMSNorm", self.quant)
        scale, _ = _affine(self, x.shape[-1:])
        return _modules.add_norm(
            "rmsnorm",
            x,
            residual,
            scale,
            None,
            epsilon=self.epsilon,
            dtype=self.dtype,
            residual_rounding=self.residual_rounding,
            quant=self.quant,
            weight_offset=self.weight_offset,
            cast=self.cast,
        )


class AddLayerNorm(flax_linen.Module):
    """``s = x [+ x_bias] + residual;  y = (s - mean) * rsqrt(var + epsilon) * scale + bias``, one kernel.

    Attributes:
      epsilon, param_dtype, use_bias, use_scale, bias_init, scale_init: as in ``flax.linen.LayerNorm``; the parameters are ``scale``
                    and ``bias``.
      dtype:        dtype of y; None: what ``flax.linen.LayerNorm`` gives for ``x + residual``.
      residual_rounding: as in :func:`jaxnorm.add_layernorm`.
      quant:        a QuantSpec: y is a Quantized.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Any = flax_linen.initializers.zeros
    scale_init: Any = flax_linen.initializers.ones
    residual_rounding: str = "float32"
    quant: QuantSpec | None = None

    @flax_linen.compact
    def __call__(self, x: jax.Array, residual: jax.Array, *, x_bias: jax.Array | None = None) -> tuple[Any, jax.Array]:
        """(y, residual_out) of x [..., N] and residual [..., N]; x_bias [N], say that of the projection before; residual_out =
        ``x + x_bias + residual`` in residual.dtype."""
        _modules.check_quant("AddLayerNorm", self.quant)
        scale, bias = _affine(self, x.shape[-1:])
        return _modules.add_norm(
            "layernorm",
            x,
            residual,
            scale,
            bias,
            epsilon=self.epsilon,
            dtype=self.dtype,
            residual_rounding=self.residual_rounding,
            quant=self.quant,
            x_bias=x_bias,
        )


class QKNormRope(flax_linen.Module):
    """RMSNorm of every query and key head, then rotary embedding, one kernel.

    Attributes:
      epsilon, param_dtype, scale_init: as in ``flax.linen.RMSNorm``; the parameters are ``q_scale`` and ``k_scale``.
      dtype:         q and k are cast to it first; None: each keeps its dtype.
      style, weight_offset, mrope_sections, mrope_interleaved: as in :func:`jaxnorm.qk_norm_rope`.
      quant:         a QuantSpec: q and k are Quantized, a scale for each head vector (or group), as an int8 or fp8 attention reads.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = flax_linen.initializers.ones
    style: str = "neox"
    weight_offset: float = 0.0
    mrope_sections: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    quant: QuantSpec | None = None

    @flax_linen.compact
    def __call__(self, q: jax.Array, k: jax.Array, positions: Any, cos_sin: jax.Array) -> tuple[Any, Any]:
        """(q, k) of q [..., T, Hq, D], k [..., T, Hk, D]; positions [T] or [..., T], [3, T] with sections; cos_sin a rope table."""
        _modules.check_quant("QKNormRope", self.quant)
        shape = q.shape[-1:]
        return _modules.qk_norm_rope(
            q,
            k,
            self.param("q_scale", self.scale_init, shape, self.param_dtype),
            self.param("k_scale", self.scale_init, shape, self.param_dtype),
            positions,
            cos_sin,
            dtype=self.dtype,
            quant=self.quant,
            eps=self.epsilon,
            style=self.style,
            weight_offset=self.weight_offset,
            mrope_sections=self.mrope_sections,
            mrope_interleaved=self.mrope_interleaved,
        )
