"""The block with jaxnorm's norms and with Flax's, on the same parameters: distances from float32, and wall-clock times."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .model import NORMS, ResidualBlock


@dataclasses.dataclass(frozen=True)
class Shape:
    """One block of the UNet."""

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    num_groups: int = 32
    time_features: int = 1280

    def __str__(self) -> str:
        arrow = f" -> {self.out_channels}" if self.out_channels != self.channels else ""
        return f"{self.batch} x {self.height} x {self.width} x {self.channels}{arrow}"


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one norm: root mean square distance from the float32 block, relative, and seconds of a call."""

    norm: str
    output_error: float
    gradient_error: float
    """The largest over x and all parameters."""
    forward_seconds: float
    gradient_seconds: float


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def inputs(shape: Shape, dtype: Any, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, embedded timestep, cotangent of the output); channels have means of their own, as activations do."""
    keys = jax.random.split(jax.random.key(seed), 4)
    image = (shape.batch, shape.height, shape.width)
    x = jax.random.normal(keys[0], (*image, shape.channels)) + jax.random.normal(keys[1], (shape.channels,))
    step = jax.random.normal(keys[2], (shape.batch, shape.time_features))
    dy = jax.random.normal(keys[3], (*image, shape.out_channels))
    return x.astype(dtype), step.astype(dtype), dy.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def parameters(shape: Shape, seed: int = 1) -> Any:
    """Random float32 parameters of the block, scales and biases of the norms too; they fit both norms."""
    block = ResidualBlock(shape.out_channels, shape.num_groups, "flax", jnp.float32)
    small = dataclasses.replace(shape, height=2, width=2)
    params = block.init(jax.random.key(seed), *inputs(small, jnp.dtype("float32"))[:2])["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [p + 0.2 * jax.random.normal(k, p.shape) if p.ndim == 1 else p for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def programs(block: ResidualBlock) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, gradient) of a block, jitted: ``(params, x, time)`` and ``(params, x, time, dy)``."""

    def forward(params: Any, x: jax.Array, step: jax.Array) -> jax.Array:
        return block.apply({"params": params}, x, step)  # type: ignore[return-value]

    def gradient(params: Any, x: jax.Array, step: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(lambda p, a: forward(p, a, step), params, x)[1](dy)

    return jax.jit(forward), jax.jit(gradient)


@jax.jit
def _distances(got: Any, want: Any) -> list[jax.Array]:
    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2))

    return jax.tree.leaves(jax.tree.map(one, got, want))


def distance(got: Any, want: Any) -> float:
    """Root mean square error relative to the size of ``want``; the largest of the leaves."""
    return max(map(float, _distances(got, want)))


def seconds(call: Callable[[], Any], times: int) -> float:
    """Median wall-clock time; the first call, which compiles, is left out."""
    jax.block_until_ready(call())
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def compare(shape: Shape, dtype: Any, *, backend: str | None = None, times: int = 5) -> list[Result]:
    """Both norms in ``dtype`` against Flax's in float32 on the same numbers."""
    params = parameters(shape)
    x, step, dy = inputs(shape, dtype)
    forward, gradient = programs(ResidualBlock(shape.out_channels, shape.num_groups, "flax", jnp.float32))
    wide = [a.astype(jnp.float32) for a in (x, step, dy)]
    y32, g32 = forward(params, *wide[:2]), gradient(params, *wide)
    found = []
    for norm in NORMS:
        run, pull = programs(ResidualBlock(shape.out_channels, shape.num_groups, norm, dtype, backend))
        found.append(
            Result(
                norm,
                distance(run(params, x, step), y32),
                distance(pull(params, x, step, dy), g32),
                seconds(lambda run=run: run(params, x, step), times),
                seconds(lambda pull=pull: pull(params, x, step, dy), times),
            )
        )
    return found
