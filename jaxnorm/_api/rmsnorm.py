"""RMSNorm, with and without the residual add that precedes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .. import _compat, _dispatch, _op, _sharding
from .._compile import target
from .._ref import rmsnorm as ref
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from . import _checks as check


def _forward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    y_dtype = call.dtype("y")
    width = call.size("p") if "p" in dict(call.sizes) else a["x"].shape[-1]
    return ref.forward(
        a["x"],
        a.get("residual"),
        a.get("weight"),
        features=call.features,
        width=width,
        out_dtype=y_dtype,
        axes=axes,
        **dict(call.options),
    )


def _backward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    dtypes = {n: d for n, _, d in call.results}
    return ref.backward(
        a["n"],
        a.get("weight"),
        a["rstd"],
        a["dy"],
        a.get("dresidual_out"),
        features=call.features,
        dtypes=dtypes,
        axes=axes,
        **dict(call.options),
    )


_PLANS = {"triton": "rmsnorm_triton", "hip": "rmsnorm_hip"}
FORWARD = register_stage(StageDef("rmsnorm_fwd", "rmsnorm", _forward_reference, _PLANS))
BACKWARD = register_stage(StageDef("rmsnorm_bwd", "rmsnorm", _backward_reference, _PLANS))


@dataclass(frozen=True)
class _Config:
    """Everything static about one call."""

    op: str
    x_dtype: str
    residual_dtype: str | None
    eps: float
    weight_offset: float
    cast: str
    residual_rounding: str
    out_dtype: str
    width: int
    backend: str | None
    backend_source: str
    targets: tuple[tuple[str, str], ...]

    def call(
        self,
        stage: StageDef,
        arrays: Arrays,
        dims: dict[str, str],
        results: list[tuple[str, str, str]],
        n: int,
        **options: Any,
    ) -> StageCall:
        sizes = [("n", n)] + ([("p", self.width)] if self.width != n else [])
        return StageCall(
            stage=stage.name,
            op=self.op,
            operands=tuple((k, dims[k]) for k in arrays),
            results=tuple(results),
            sizes=tuple(sizes),
            options=tuple(options.items()),
            backend=self.backend,
            backend_source=self.backend_source,
            targets=self.targets,
            sums=tuple((name, "...") for name, _, _ in results if name == "dweight"),
            feature_dims=("n",) if len(sizes) == 1 else (),
        )


def _forward(
    config: _Config, x: jax.Array, residual: jax.Array | None, weight: jax.Array | None, save_rstd: bool
) -> Arrays:
    arrays = {k: v for k, v in (("x", x), ("residual", residual), ("weight", weight)) if v is not None}
    n = x.shape[-1]
    results = [("y", "... n" if config.width == n else "... p", config.out_dtype)]
    if residual is not None:
        results.append(("residual_out", "... n", residual.dtype.name))
    if save_rstd:
        results.append(("rstd", "...", "float32"))
    dims = {"x": "... n", "residual": "... n", "weight": "n"}
    call = config.call(
        FORWARD,
        arrays,
        dims,
        results,
        n,
        eps=config.eps,
        weight_offset=config.weight_offset,
        cast=config.cast,
        residual_rounding=config.residual_rounding,
    )
    return _op.run(call, tuple(arrays.values()))


def _backward(config: _Config, saved: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    n, weight, rstd = saved
    dy, dresidual_out = cotangents if config.residual_dtype else (cotangents, None)
    if isinstance(dresidual_out, SymbolicZero):
        dresidual_out = None
    if isinstance(dy, SymbolicZero):
        zero: Any = dy.aval
        dy = jnp.zeros(zero.shape, zero.dtype)
    arrays = {"n": n, "weight": weight, "rstd": rstd, "dy": dy, "dresidual_out": dresidual_out}
    arrays = {k: v for k, v in arrays.items() if v is not None}
    width = n.shape[-1]
    results = [("dx", "... n", config.x_dtype)]
    if config.residual_dtype not in (None, config.x_dtype):  # else one array is both
        results.append(("dresidual", "... n", config.residual_dtype))
    if weight is not None:
        results.append(("dweight", "n", weight.dtype.name))
    dims = {
        "n": "... n",
        "weight": "n",
        "rstd": "...",
        "dy": "... n" if config.width == width else "... p",
        "dresidual_out": "... n",
    }
    call = config.call(BACKWARD, arrays, dims, results, width, weight_offset=config.weight_offset)
    out = _op.run(call, tuple(arrays.values()))
    dresidual = out.get("dresidual", out["dx"]) if config.residual_dtype else None
    return out["dx"], dresidual, out.get("dweight")


@functools.cache
def _differentiable(config: _Config) -> Any:
    """``(x, residual | None, weight | None) -> y`` or ``(y, residual_out)`` with its reverse rule."""

    def results(out: Arrays) -> Any:
        return (out["y"], out["residual_out"]) if "residual_out" in out else out["y"]

    @jax.custom_vjp
    def norm(x: jax.Array, residual: jax.Array | None, weight: jax.Array | None) -> Any:
        return results(_forward(config, x, residual, weight, save_rstd=False))

    def forward(x: Any, residual: Any, weight: Any) -> Any:
        value: list[Any] = [None if a is None else a.value for a in (x, residual, weight)]
        out = _forward(config, *value, save_rstd=True)
        n = value[0] if residual is None else out["residual_out"]
        return results(out), (n, value[2], out["rstd"])

    # symbolic zeros: a residual_out that nobody differentiates costs no read of zeros in the backward kernel
    norm.defvjp(forward, functools.partial(_backward, config), symbolic_zeros=True)
    return norm


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(x: Any, residual: Any, weight: Any, config: _Config) -> Any:
    with jax.named_scope(config.op):
        scalar_rows = x.ndim == 1  # a stage has at least one leading dim
        if scalar_rows:
            x, residual = x[None], None if residual is None else residual[None]
        x, residual, weight = _compat.match_varying((x, residual, weight))
        operands = {"x": (x, "... n"), "residual": (residual, "... n"), "weight": (weight, "n")}
        x, residual, weight = _sharding.conform(operands, gather_features=config.width != x.shape[-1])
        out = _differentiable(config)(x, residual, weight)
        return jax.tree.map(lambda a: a[0], out) if scalar_rows else out


def _call(
    op: str,
    x: Any,
    residual: Any,
    weight: Any,
    *,
    has_residual: bool,
    eps: Any,
    weight_offset: Any,
    cast: Any,
    residual_rounding: Any,
    out_dtype: Any,
    pad_to_multiple: Any,
    backend: Any,
) -> Any:
    x = check.array(op, "x", x)
    check.features_last(op, "x", x)
    check.known(op, "x", x, x.shape[-1:])
    if has_residual:
        residual = check.array(op, "residual", residual)
        check.same_shape(op, "residual", residual, x)
    weight = check.vector(op, "weight", weight, x.shape[-1])
    offset = check.offset(op, weight_offset, weight)
    name, source = _dispatch.requested(op, backend)
    config = _Config(
        op,
        x.dtype.name,
        residual.dtype.name if has_residual else None,
        check.eps(op, eps),
        offset,
        check.choice(op, "cast", cast, check.CASTS),
        check.choice(op, "residual_rounding", residual_rounding, check.ROUNDINGS),
        check.out_dtype(op, out_dtype, x),
        check.padded_width(op, pad_to_multiple, x.shape[-1]),
        name,
        source,
        target.named(),
    )
    return _jitted(x, residual, weight, config)


def rmsnorm(
    x: jax.Array,
    weight: jax.Array | None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """``y = x * rsqrt(mean(x**2) + eps) * (weight + weight_offset)`` over the last axis.

    All arithmetic in float32, rounded once. The bits of a row depend on the row, N, the dtypes and the options only: never on
    how many rows there are, where the row stands, or how the rows are sharded.

    Args:
      x:               [..., N] bfloat16, float16 or float32; any leading dims, N >= 1.
      weight:          [N], any of these dtypes, read in its own precision; None = no multiply.
      eps:             added to the mean square, not to its root.
      weight_offset:   1.0 for weights stored around zero (Gemma in Hugging Face's format).
      cast:            ``"output"`` rounds once at the end; ``"before_weight"`` rounds ``x * rstd`` to x.dtype first, as T5 and
                       Hugging Face's LlamaRMSNorm do.
      out_dtype:       dtype of y; x.dtype when None.
      pad_to_multiple: y is ``[..., ceil(N / p) * p]`` with a tail of exact zeros; the mean is over the N real features.
      backend:         ``"xla"``, ``"triton"`` or ``"hip"``; None = the best for op, N, dtypes, options and target.

    Returns:
      y [..., N] (or padded), ``out_dtype`` or x.dtype.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: x (2 ulp) and weight (float32 sums in a fixed order, cast to the weight's dtype).
    Sharding: rows without any collective; one all-reduce of N floats in the backward; sharded features cost one float a row.
    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    return _call(
        "rmsnorm",
        x,
        None,
        weight,
        has_residual=False,
        eps=eps,
        weight_offset=weight_offset,
        cast=cast,
        residual_rounding="float32",
        out_dtype=out_dtype,
        pad_to_multiple=pad_to_multiple,
        backend=backend,
    )


def add_rmsnorm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None,
    *,
    residual_rounding: str = "float32",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``s = x + residual;  y = s * rsqrt(mean(s**2) + eps) * (weight + weight_offset)`` over the last axis.

    The residual add and the norm in one kernel: reads x and residual once, writes y and residual_out once.

    Args:
      x:                 [..., N] bfloat16, float16 or float32.
      residual:          [..., N], the shape of x, any of these dtypes.
      weight:            [N] or None, as in :func:`rmsnorm`.
      residual_rounding: ``"float32"``: the norm reads the unrounded sum; ``"input"``: it reads residual_out, as models do that
                         add in 16 bits first.
      eps, weight_offset, cast, out_dtype, pad_to_multiple, backend: as in :func:`rmsnorm`; residual_out is never padded.

    Returns:
      y            [..., N] (or padded), ``out_dtype`` or x.dtype, rounded once from float32.
      residual_out [..., N] in residual.dtype, ``cast(f32(x) + f32(residual))`` bit for bit.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: x, residual (with the cotangent of residual_out) and weight. Donate ``residual`` to reuse its buffer.
    Sharding: as :func:`rmsnorm`.
    Source: same results as AITER's ``rmsnorm2d_fwd_with_add``.
    """
    return _call(
        "add_rmsnorm",
        x,
        residual,
        weight,
        has_residual=True,
        eps=eps,
        weight_offset=weight_offset,
        cast=cast,
        residual_rounding=residual_rounding,
        out_dtype=out_dtype,
        pad_to_multiple=pad_to_multiple,
        backend=backend,
    )


register_op(OpDef("rmsnorm", rmsnorm, FORWARD, BACKWARD))
register_op(OpDef("add_rmsnorm", add_rmsnorm, FORWARD, BACKWARD))
