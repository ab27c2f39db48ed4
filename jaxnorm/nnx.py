"""Flax NNX modules on jaxnorm's kernels: change the import, and a model and its checkpoints stay as they are.

``RMSNorm``, ``LayerNorm`` and ``GroupNorm`` are subclasses of Flax's own: the same constructor arguments, parameters, metadata and
result dtypes. ``AddRMSNorm``, ``AddLayerNorm`` and ``QKNormRope`` fuse what stands around a norm in a transformer block.
:func:`jaxnorm.swap` turns the norms of a model that exists into these. Needs flax 0.12 or newer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

try:
    from flax import nnx as flax_nnx
    from flax.nnx.nn import dtypes as flax_dtypes
    from flax.nnx.nn import initializers
except ModuleNotFoundError as e:
    raise ModuleNotFoundError("jaxnorm.nnx: needs flax. Install it with: pip install 'jaxnorm[flax]'") from e

from . import _modules
from ._api import _checks as check
from ._types import QuantSpec

__all__ = ["AddLayerNorm", "AddRMSNorm", "GroupNorm", "LayerNorm", "QKNormRope", "RMSNorm"]

_Class = TypeVar("_Class", bound=type)


def _shows_flax_arguments(cls: _Class) -> _Class:
    """In ``help`` and ``inspect.signature``, Flax's arguments stand in the place of ``**flax_arguments``."""
    theirs = inspect.signature(cls.__mro__[1].__init__).parameters.values()
    ours = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.Signature([*theirs, *ours])
    setattr(cls.__init__, "__signature__", signature)  # noqa: B010  no type checker knows this attribute of functions
    return cls


def _value(parameter: Any) -> jax.Array | None:
    return None if parameter is None else parameter[...]


def _promoted(module: Any, *arrays: Any) -> tuple[tuple[Any, ...], Any]:
    """(arrays with the values that ``module.promote_dtype`` gives them, the dtype of the result).

    Flax casts all to one dtype first. A cast that only widens is left to the kernel, which reads narrow inputs and computes in
    float32: the same values, without a wide copy of x.
    """
    arrays = tuple(None if a is None else jnp.asarray(a) for a in arrays)
    if module.promote_dtype is not flax_dtypes.promote_dtype:
        arrays = module.promote_dtype(arrays, dtype=module.dtype)
        return arrays, flax_dtypes.canonicalize_dtype(*arrays, dtype=module.dtype)
    target = jnp.dtype(flax_dtypes.canonicalize_dtype(*arrays, dtype=module.dtype))
    return tuple(a if a is None or _widens(a.dtype, target) else a.astype(target) for a in arrays), target


def _widens(dtype: Any, target: Any) -> bool:
    return dtype.name in check.FLOATS and dtype != target and target.name == "float32"


@_shows_flax_arguments
class RMSNorm(flax_nnx.RMSNorm):
    """``y = x * rsqrt(mean(x**2) + epsilon) * (scale + weight_offset)``: ``flax.nnx.RMSNorm`` on jaxnorm's kernels.

    All arguments of ``flax.nnx.RMSNorm`` with their meaning, the parameter ``scale``, and Flax's result dtype (bfloat16 in, float32
    parameters: float32 out). A mask, ``axis_name``, axes that are not the last ones, integer or float64 inputs take plain JAX.
    ``use_fast_variance`` is accepted; the sum is always one of float32 squares.

    Args:
      weight_offset: 1.0 for a ``scale`` stored around zero (Gemma).
      cast:          ``"before_weight"`` rounds ``x * rstd`` to x.dtype before the scale, as T5 and Hugging Face do.
      quant:         a QuantSpec: the call returns a Quantized, made from the unrounded float32 y.
      flax_arguments: those of ``flax.nnx.RMSNorm``.

    Raises:
      ValueError, TypeError: a wrong shape or option; the message names the argument.
    """

    weight_offset: float = 0.0
    cast: str = "output"
    quant: QuantSpec | None = None

    def __init__(
        self,
        *args: Any,
        weight_offset: float = 0.0,
        cast: str = "output",
        quant: QuantSpec | None = None,
        **flax_arguments: Any,
    ) -> None:
        super().__init__(*args, **flax_arguments)
        _modules.check_quant("RMSNorm", quant)
        self.weight_offset = check.offset("RMSNorm", weight_offset, _value(self.scale))
        self.cast = check.choice("RMSNorm", "cast", cast, check.CASTS)
        self.quant = quant

    def __call__(self, x: Any, mask: jax.Array | None = None) -> Any:
        """y of x's shape, or a Quantized. mask: booleans broadcastable to x, the positions that the mean is taken over."""
        (x, scale), dtype = _promoted(self, x, _value(self.scale))
        norm = _modules.Norm(
            "rmsnorm",
            self.epsilon,
            _modules.canonical_axes(x.ndim, self.reduction_axes),
            _modules.canonical_axes(x.ndim, self.feature_axes),
            dtype,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            weight_offset=self.weight_offset,
            cast=self.cast,
            quant=self.quant,
        )
        return _modules.normalise(x, scale, None, norm)


@_shows_flax_arguments
class LayerNorm(flax_nnx.LayerNorm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``: ``flax.nnx.LayerNorm`` on jaxnorm's kernels.

    All arguments of ``flax.nnx.LayerNorm`` with their meaning, the parameters ``scale`` and ``bias``, and Flax's result dtype
    (bfloat16 in, float32 parameters: float32 out). Plain JAX serves what :class:`RMSNorm` says. ``use_fast_variance`` is accepted;
    the variance is always the accurate one, so that inputs far from zero come out right.

    Args:
      quant: a QuantSpec: the call returns a Quantized, made from the unrounded float32 y.
      flax_arguments: those of ``flax.nnx.LayerNorm``.
    """

    quant: QuantSpec | None = None

    def __init__(self, *args: Any, quant: QuantSpec | None = None, **flax_arguments: Any) -> None:
        super().__init__(*args, **flax_arguments)
        _modules.check_quant("LayerNorm", quant)
        self.quant = quant

    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> Any:
        """y of x's shape, or a Quantized. mask: booleans broadcastable to x, the positions that the statistics are taken over."""
        (x, scale, bias), dtype = _promoted(self, x, _value(self.scale), _value(self.bias))
        norm = _modules.Norm(
            "layernorm",
            self.epsilon,
            _modules.canonical_axes(x.ndim, self.reduction_axes),
            _modules.canonical_axes(x.ndim, self.feature_axes),
            dtype,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            quant=self.quant,
        )
        return _modules.normalise(x, scale, bias, norm)


@_shows_flax_arguments
class GroupNorm(flax_nnx.GroupNorm):
    """LayerNorm over groups of channels and the spatial axes: ``flax.nnx.GroupNorm`` on jaxnorm's kernels.

    All arguments of ``flax.nnx.GroupNorm`` with their meaning, the parameters ``scale`` and ``bias``, and Flax's result dtype. With
    ``reduction_axes`` of one's own the result is ``flax.linen.GroupNorm``'s; flax 0.12.8's NNX module repeats the statistics along
    a wrong axis there. Plain JAX serves what :class:`RMSNorm` says.

    Args:
      quant: a QuantSpec: the call returns a Quantized, made from the unrounded float32 y.
      flax_arguments: those of ``flax.nnx.GroupNorm``.
    """

    quant: QuantSpec | None = None

    def __init__(self, *args: Any, quant: QuantSpec | None = None, **flax_arguments: Any) -> None:
        super().__init__(*args, **flax_arguments)
        _modules.check_quant("GroupNorm", quant)
        self.quant = quant

    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> Any:
        """y of x's shape [..., channels], or a Quantized. mask: as in :class:`LayerNorm`."""
        (x, scale, bias), dtype = _promoted(self, x, _value(self.scale), _value(self.bias))
        _modules.group_count(self.num_groups, None, x.shape[-1])
        norm = _modules.Norm(
            "groupnorm",
            self.epsilon,
            _modules.group_axes(x.ndim, self.reduction_axes),
            (x.ndim - 1,),
            dtype,
            num_groups=self.num_groups,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            quant=self.quant,
        )
        return _modules.normalise(x, scale, bias, norm)


class AddRMSNorm(flax_nnx.Module):
    """``s = x + residual;  y = s * rsqrt(mean(s**2) + epsilon) * (scale + weight_offset)``, one kernel.

    Args:
      num_features:  N, the size of the last axis.
      epsilon, param_dtype, use_scale, scale_init, scale_metadata: as in ``flax.nnx.RMSNorm``; the parameter is ``scale``.
      dtype:         dtype of y; None: what ``flax.nnx.RMSNorm`` gives for ``x + residual``.
      weight_offset, cast, residual_rounding: as in :func:`jaxnorm.add_rmsnorm`.
      quant:         a QuantSpec: y is a Quantized.
      rngs:          rng key.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        scale_init: Any = initializers.ones,
        weight_offset: float = 0.0,
        cast: str = "output",
        residual_rounding: str = "float32",
        quant: QuantSpec | None = None,
        rngs: flax_nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _modules.check_quant("AddRMSNorm", quant)
        shape = (num_features,)
        self.scale: Any = flax_nnx.data(None)
        if use_scale:
            self.scale = flax_nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
        self.num_features, self.epsilon, self.dtype, self.quant = num_features, epsilon, dtype, quant
        self.weight_offset = check.offset("AddRMSNorm", weight_offset, _value(self.scale))
        self.cast = check.choice("AddRMSNorm", "cast", cast, check.CASTS)
        self.residual_rounding = check.choice("AddRMSNorm", "residual_rounding", residual_rounding, check.ROUNDINGS)

    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[Any, jax.Array]:
        """(y, residual_out) of x [..., N] and residual [..., N]; residual_out in residual.dtype."""
        return _modules.add_norm(
            "rmsnorm",
            x,
            residual,
            _value(self.scale),
            None,
            epsilon=self.epsilon,
            dtype=self.dtype,
            residual_rounding=self.residual_rounding,
            quant=self.quant,
            weight_offset=self.weight_offset,
            cast=self.cast,
        )


class AddLayerNorm(flax_nnx.Module):
    """``s = x [+ x_bias] + residual;  y = (s - mean) * rsqrt(var + epsilon) * scale + bias``, one kernel.

    Args:
      num_features: N, the size of the last axis.
      epsilon, param_dtype, use_bias, use_scale, bias_init, scale_init, bias_metadata, scale_metadata: as in ``flax.nnx.LayerNorm``;
                    the parameters are ``scale`` and ``bias``.
      dtype:        dtype of y; None: what ``flax.nnx.LayerNorm`` gives for ``x + residual``.
      residual_rounding: as in :func:`jaxnorm.add_layernorm`.
      quant:        a QuantSpec: y is a Quantized.
      rngs:         rng key.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = initializers.zeros,
        scale_init: Any = initializers.ones,
        residual_rounding: str = "float32",
        quant: QuantSpec | None = None,
        rngs: flax_nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _modules.check_quant("AddLayerNorm", quant)
        shape = (num_features,)
        self.scale: Any = flax_nnx.data(None)
        if use_scale:
            self.scale = flax_nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
        self.bias: Any = flax_nnx.data(None)
        if use_bias:
            self.bias = flax_nnx.Param(bias_init(rngs.params(), shape, param_dtype), **bias_metadata)
        self.num_features, self.epsilon, self.dtype, self.quant = num_features, epsilon, dtype, quant
        self.residual_rounding = check.choice("AddLayerNorm", "residual_rounding", residual_rounding, check.ROUNDINGS)

    def __call__(self, x: jax.Array, residual: jax.Array, *, x_bias: jax.Array | None = None) -> tuple[Any, jax.Array]:
        """(y, residual_out) of x [..., N] and residual [..., N]; x_bias [N], say that of the projection before; residual_out =
        ``x + x_bias + residual`` in residual.dtype."""
        return _modules.add_norm(
            "layernorm",
            x,
            residual,
            _value(self.scale),
            _value(self.bias),
            epsilon=self.epsilon,
            dtype=self.dtype,
            residual_rounding=self.residual_rounding,
            quant=self.quant,
            x_bias=x_bias,
        )


class QKNormRope(flax_nnx.Module):
    """RMSNorm of every query and key head, then rotary embedding, one kernel.

    Args:
      head_dim:      D, the size of the last axis of q and k.
      epsilon, param_dtype, scale_init, scale_metadata: as in ``flax.nnx.RMSNorm``; the parameters are ``q_scale`` and ``k_scale``.
      dtype:         q and k are cast to it first; None: each keeps its dtype.
      style, weight_offset, mrope_sections, mrope_interleaved: as in :func:`jaxnorm.qk_norm_rope`.
      quant:         a QuantSpec: q and k are Quantized, a scale for each head vector (or group), as an int8 or fp8 attention reads.
      rngs:          rng key.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale_init: Any = initializers.ones,
        style: str = "neox",
        weight_offset: float = 0.0,
        mrope_sections: tuple[int, int, int] | None = None,
        mrope_interleaved: bool = False,
        quant: QuantSpec | None = None,
        rngs: flax_nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _modules.check_quant("QKNormRope", quant)
        shape = (head_dim,)
        self.q_scale = flax_nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
        self.k_scale = flax_nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
        self.head_dim, self.epsilon, self.dtype, self.quant = head_dim, epsilon, dtype, quant
        self.style, self.weight_offset = style, weight_offset
        self.mrope_sections = None if mrope_sections is None else tuple(mrope_sections)
        self.mrope_interleaved = mrope_interleaved

    def __call__(self, q: jax.Array, k: jax.Array, positions: Any, cos_sin: jax.Array) -> tuple[Any, Any]:
        """(q, k) of q [..., T, Hq, D], k [..., T, Hk, D]; positions [T] or [..., T], [3, T] with sections; cos_sin a rope table."""
        return _modules.qk_norm_rope(
            q,
            k,
            _value(self.q_scale),
            _value(self.k_scale),
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
