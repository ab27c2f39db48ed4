"""GroupNorm over channels-last and channels-first arrays, with an optional SiLU behind it."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass
from typing import Any

import jax

from .. import _compat, _dispatch, _op, _sharding
from .._compile import target
from .._ref import groupnorm as ref
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from ..errors import type_error, value_error
from . import _checks as check

ACTIVATIONS = (None, "silu")
VECTORS = ("dweight", "dbias")
STATS = 3
"""Rows of the saved statistics: m0, e and rstd of each channel's group (see the reference)."""


def _layout(call: StageCall) -> ref.Layout:
    spatial = sum(d.startswith("s") for d, _ in call.sizes)
    return ref.Layout(spatial, call.option("last"), call.option("group_channels"), call.option("count"))


def _forward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    return ref.forward(
        a["x"],
        a.get("weight"),
        a.get("bias"),
        layout=_layout(call),
        eps=call.option("eps"),
        silu=call.option("silu"),
        out_dtype=call.dtype("y"),
        axes=axes,
    )


def _backward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    return ref.backward(
        a["x"],
        a.get("weight"),
        a.get("bias"),
        a["stats"],
        a["dy"],
        layout=_layout(call),
        silu=call.option("silu"),
        dtypes={n: d for n, _, d in call.results},
        axes=axes,
    )


_PLANS = {"triton": "groupnorm_triton", "hip": "groupnorm_hip"}
FORWARD = register_stage(StageDef("groupnorm_fwd", "groupnorm", _forward_reference, _PLANS))
BACKWARD = register_stage(StageDef("groupnorm_bwd", "groupnorm", _backward_reference, _PLANS))


@dataclass(frozen=True)
class _Config:
    """Everything static about one call."""

    x_dtype: str
    spatial: tuple[int, ...]
    channels: int
    num_groups: int
    last: bool
    eps: float
    silu: bool
    out_dtype: str
    backend: str | None
    backend_source: str
    targets: tuple[tuple[str, str], ...]

    @property
    def group_channels(self) -> int:
        return self.channels // self.num_groups

    @property
    def space(self) -> tuple[str, ...]:
        """Names of the spatial dims."""
        return tuple(f"s{i}" for i in range(len(self.spatial)))

    @property
    def dims(self) -> dict[str, str]:
        image = ("...", *self.space, "c") if self.last else ("...", "c", *self.space)
        return {"x": " ".join(image), "dy": " ".join(image), "weight": "c", "bias": "c", "stats": "... u c"}

    def call(self, stage: StageDef, arrays: Arrays, results: list[tuple[str, str, str]], **options: Any) -> StageCall:
        names = {d for _, dims, _ in results for d in dims.split()}
        sizes = [("c", self.channels), *zip(self.space, self.spatial, strict=True)]
        sizes += [("u", STATS)] if "stats" in arrays or "u" in names else []
        shared = {
            "group_channels": self.group_channels,
            "count": self.group_channels * math.prod(self.spatial),
            "last": self.last,
            "silu": self.silu,
        }
        return StageCall(
            stage=stage.name,
            op="groupnorm",
            operands=tuple((k, self.dims[k]) for k in arrays),
            results=tuple(results),
            sizes=tuple(sizes),
            options=(*shared.items(), *options.items()),
            backend=self.backend,
            backend_source=self.backend_source,
            targets=self.targets,
            sums=tuple((n, " ".join(("...", *self.space))) for n, _, _ in results if n in VECTORS),
            feature_dims=self.space,
            parallel_dims=(("c", self.group_channels),),
        )


def _forward(
    config: _Config, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, save_stats: bool
) -> Arrays:
    arrays = {k: v for k, v in (("x", x), ("weight", weight), ("bias", bias)) if v is not None}
    results = [("y", config.dims["x"], config.out_dtype)]
    if save_stats:
        results.append(("stats", config.dims["stats"], "float32"))
    return _op.run(config.call(FORWARD, arrays, results, eps=config.eps), tuple(arrays.values()))


def _backward(config: _Config, saved: Any, dy: jax.Array) -> tuple[Any, Any, Any]:
    x, weight, bias, stats = saved
    used = bias if config.silu else None  # without an activation the bias does not enter its own gradient
    arrays = {"x": x, "weight": weight, "bias": used, "stats": stats, "dy": dy}
    arrays = {k: v for k, v in arrays.items() if v is not None}
    results = [("dx", config.dims["x"], config.x_dtype)]
    results += [(n, "c", a.dtype.name) for n, a in zip(VECTORS, (weight, bias), strict=True) if a is not None]
    out = _op.run(config.call(BACKWARD, arrays, results), tuple(arrays.values()))
    return out["dx"], out.get("dweight"), out.get("dbias")


@functools.cache
def _differentiable(config: _Config) -> Any:
    """``(x, weight | None, bias | None) -> y`` with its reverse rule."""

    @jax.custom_vjp
    def norm(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return _forward(config, x, weight, bias, save_stats=False)["y"]

    def forward(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> Any:
        out = _forward(config, x, weight, bias, save_stats=True)
        return out["y"], (x, weight, bias, out["stats"])

    norm.defvjp(forward, functools.partial(_backward, config))
    return norm


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(x: Any, weight: Any, bias: Any, config: _Config) -> Any:
    with jax.named_scope("groupnorm"):
        x, weight, bias = _compat.match_varying((x, weight, bias))
        operands = {"x": (x, config.dims["x"]), "weight": (weight, "c"), "bias": (bias, "c")}
        keep = {"c": config.group_channels} | dict.fromkeys(config.space, 1)
        x, weight, bias = _sharding.conform(operands, keep=keep)
        return _differentiable(config)(x, weight, bias)


def _integer(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error("groupnorm", argument, type(value).__name__, "an integer")
    return int(value)


def _channels_last(x: jax.Array, channel_axis: Any) -> bool:
    axis = _integer("channel_axis", channel_axis)
    if axis in (-1, x.ndim - 1):
        return True
    if axis in (1, 1 - x.ndim):
        return False
    raise value_error(
        "groupnorm",
        "channel_axis",
        axis,
        f"-1 (channels last) or 1 (channels first) for x of shape {x.shape}",
        "Move the channels with jnp.moveaxis first.",
    )


def _channel_vector(argument: str, value: Any, channels: int) -> jax.Array | None:
    if value is None:
        return None
    a = check.array("groupnorm", argument, value)
    if a.shape != (channels,):
        raise value_error("groupnorm", argument, f"shape {a.shape}", f"({channels},), the channels of x")
    return a


def groupnorm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    *,
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
    channel_axis: int = -1,
    out_dtype: Any = None,
    backend: str | None = None,
) -> jax.Array:
    """``y = act((x - mean) * rsqrt(var + eps) * weight + bias)``, statistics of each group of channels over the spatial dims.

    Channel c belongs to group ``c // (C / num_groups)``; mean and (biased) variance are taken over all spatial dims and the
    channels of the group, in float32, by the mean-corrected two-pass: groups with a mean far above their deviation come out
    right. Rounded once, after the activation. The bits of an example do not depend on the batch it stands in.

    Args:
      x:            [B, *spatial, C], or [B, C, *spatial] with ``channel_axis=1``; bfloat16, float16 or float32; any number of
                    spatial dims, none too.
      weight:       [C], any of these dtypes, read in its own precision; None = no multiply.
      bias:         [C], any of these dtypes; None = nothing added.
      num_groups:   divides C. C = instance norm, 1 = layer norm over all but the batch.
      eps:          added to the variance, inside the root.
      activation:   ``"silu"``: ``v / (1 + exp(-v))`` of the float32 value, in the same kernel; None = none.
      channel_axis: -1 (channels last, the convention of JAX) or 1 (channels first, that of PyTorch).
      out_dtype:    dtype of y; x.dtype when None.
      backend:      ``"xla"``, ``"triton"`` or ``"hip"``; None = the best for op, sizes, dtypes, options and target.

    Returns:
      y, of the shape of x, in ``out_dtype`` or x.dtype.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: x, weight and bias (float32 sums in a fixed order, cast to the dtype of weight and bias).
    Sharding: a sharded batch and channels that are sharded in whole groups cost nothing forward and one all-reduce of 2 C floats
    backward; sharded spatial dims cost the statistics, a few floats a group.
    Source: Wu & He 2018, "Group Normalization"; the results of ``flax.linen.GroupNorm`` and of AITER's ``GroupNorm``.
    """
    x = check.array("groupnorm", "x", x)
    if x.ndim < 2:
        raise value_error("groupnorm", "x", f"shape {x.shape}", "[B, *spatial, C] or [B, C, *spatial]")
    check.known("groupnorm", "x", x, x.shape[1:])
    last = _channels_last(x, channel_axis)
    channels, spatial = (x.shape[-1], x.shape[1:-1]) if last else (x.shape[1], x.shape[2:])
    groups = _integer("num_groups", num_groups)
    if groups < 1 or channels < 1 or channels % groups:
        raise value_error(
            "groupnorm", "num_groups", groups, f"a divisor of the {channels} channels of x with shape {x.shape}"
        )
    weight, bias = _channel_vector("weight", weight, channels), _channel_vector("bias", bias, channels)
    if activation not in ACTIVATIONS:
        raise value_error("groupnorm", "activation", repr(activation), "None or 'silu'")
    name, source = _dispatch.requested("groupnorm", backend)
    config = _Config(
        x.dtype.name,
        tuple(spatial),
        channels,
        groups,
        last or not spatial,
        check.eps("groupnorm", eps),
        activation == "silu",
        check.out_dtype("groupnorm", out_dtype, x),
        name,
        source,
        target.named(),
    )
    return _jitted(x, weight, bias, config)


register_op(OpDef("groupnorm", groupnorm, FORWARD, BACKWARD))
