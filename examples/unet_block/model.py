"""The residual block of Stable Diffusion: (GroupNorm, SiLU, convolution) twice, the timestep added in between, a skip around."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm

NORMS = ("jaxnorm", "flax")


class GroupNormSiLU(nn.Module):
    """``silu(group_norm(x))`` in one kernel. Parameters as those of ``flax.linen.GroupNorm``: a checkpoint fits either."""

    num_groups: int
    epsilon: float = 1e-5
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return jaxnorm.groupnorm(
            x, scale, bias, num_groups=self.num_groups, eps=self.epsilon, activation="silu", backend=self.backend
        )


class ResidualBlock(nn.Module):
    """``x [B, H, W, C]``, ``time [B, T]`` (the embedded timestep) -> ``[B, H, W, channels]``.

    ``norm="flax"`` takes ``flax.linen.GroupNorm`` and ``jax.nn.silu`` instead, as the block is usually written.
    """

    channels: int
    num_groups: int = 32
    norm: str = "jaxnorm"
    dtype: Any = jnp.bfloat16
    backend: str | None = None

    def normed(self, name: str, x: jax.Array) -> jax.Array:
        if self.norm == "jaxnorm":
            return GroupNormSiLU(self.num_groups, backend=self.backend, name=name)(x)
        return jax.nn.silu(nn.GroupNorm(self.num_groups, epsilon=1e-5, dtype=self.dtype, name=name)(x))

    def conv(self, name: str, x: jax.Array, size: int = 3) -> jax.Array:
        return nn.Conv(self.channels, (size, size), dtype=self.dtype, name=name)(x)

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        h = self.conv("conv1", self.normed("norm1", x))
        shift = nn.Dense(self.channels, dtype=self.dtype, name="time")(jax.nn.silu(time))
        h = self.conv("conv2", self.normed("norm2", h + shift[:, None, None, :]))
        return h + (x if x.shape[-1] == self.channels else self.conv("skip", x, 1))
