"""AITER's GroupNorm: channels first, ``[B, C, *spatial]``.

Where numbers differ from AITER's on purpose: the variance is the mean-corrected one, not E[x^2] - mean^2; each element gets the
affine of its own channel also where the spatial size is no multiple of 4; the weight is read in its own dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._api import groupnorm as ops
from ..errors import value_error


def _groupnorm_run(
    input: jax.Array, num_groups: int, weight: jax.Array | None, bias: jax.Array | None, eps: float
) -> jax.Array:
    """:func:`jaxnorm.groupnorm` of ``[B, C, *spatial]``, which also does channels last and a fused SiLU."""
    return ops.groupnorm(input, weight, bias, num_groups=num_groups, eps=eps, channel_axis=1)


@jax.tree_util.register_pytree_with_keys_class
class GroupNorm:
    """A pytree with ``weight`` and ``bias`` [C] (None without ``affine``): assign a model's, call it like ``torch.nn.GroupNorm``.

    Args:
      num_groups, num_channels, eps: as in torch; ``num_channels % num_groups == 0``.
      affine: whether there are ``weight`` (ones at first) and ``bias`` (zeros).
      device: ignored; JAX places arrays by itself.
      dtype:  of weight and bias, float32 when None.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise value_error("aiter.GroupNorm", "num_groups", num_groups, f"a divisor of the {num_channels} channels")
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.weight = jnp.ones(num_channels, dtype or jnp.float32) if affine else None
        self.bias = jnp.zeros(num_channels, dtype or jnp.float32) if affine else None

    def __call__(self, x: jax.Array, use_torch: bool = False) -> jax.Array:
        """``[B, C, *spatial]`` normalised by groups of channels. ``use_torch`` is ignored."""
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise value_error("aiter.GroupNorm", "x", f"shape {x.shape}", f"[B, {self.num_channels}, ...]")
        return _groupnorm_run(x, self.num_groups, self.weight, self.bias, self.eps)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        key = jax.tree_util.GetAttrKey
        static = (self.num_groups, self.num_channels, self.eps, self.affine)
        return ((key("weight"), self.weight), (key("bias"), self.bias)), static

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> GroupNorm:
        new = object.__new__(cls)
        new.num_groups, new.num_channels, new.eps, new.affine = static
        new.weight, new.bias = children
        return new
