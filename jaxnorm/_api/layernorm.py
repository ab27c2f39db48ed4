"""LayerNorm, with and without the residual add that precedes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .. import _compat, _dispatch, _op, _sharding
from .._compile import target
from .._ref import layernorm as ref
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from . import _checks as check

ORDER = ("x", "x_bias", "residual", "weight", "bias")
SUM_OF = {"weight": "dweight", "bias": "dbias", "x_bias": "dx_bias"}
"""The sum over the rows that is the gradient of a vector."""
_ROWS = ("x", "residual", "n", "dresidual_out")


def _dims(name: str) -> str:
    return "... n" if name in _ROWS else "..." if name in ("mean", "shift", "rstd") else "n"


def _forward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    y_dtype = call.dtype("y")
    width = call.size("p") if "p" in dict(call.sizes) else a["x"].shape[-1]
    return ref.forward(a, features=call.features, width=width, out_dtype=y_dtype, axes=axes, **dict(call.options))


def _backward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    dtypes = {n: d for n, _, d in call.results}
    return ref.backward(a, features=call.features, dtypes=dtypes, axes=axes, **dict(call.options))


_PLANS = {"triton": "rmsnorm_triton", "hip": "rmsnorm_hip"}
FORWARD = register_stage(StageDef("layernorm_fwd", "layernorm", _forward_reference, _PLANS))
BACKWARD = register_stage(StageDef("layernorm_bwd", "layernorm", _backward_reference, _PLANS))


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

    def run(self, stage: StageDef, arrays: Arrays, results: list[tuple[str, str, str]], **options: Any) -> Arrays:
        n = next(iter(arrays.values())).shape[-1]
        sizes = [("n", n)] + ([("p", self.width)] if self.width != n else [])
        wide = "... n" if self.width == n else "... p"
        call = StageCall(
            stage=stage.name,
            op=self.op,
            operands=tuple((k, wide if k == "dy" else _dims(k)) for k in arrays),
            results=tuple((name, wide if name == "y" else dims, dtype) for name, dims, dtype in results),
            sizes=tuple(sizes),
            options=tuple(options.items()),
            backend=self.backend,
            backend_source=self.backend_source,
            targets=self.targets,
            sums=tuple((name, "...") for name, _, _ in results if name in SUM_OF.values()),
            feature_dims=("n",) if self.width == n else (),
        )
        return _op.run(call, tuple(arrays.values()))


def _forward(config: _Config, arrays: Arrays, save: bool) -> Arrays:
    results = [("y", "", config.out_dtype)]
    if "residual" in arrays:
        results.append(("residual_out", "... n", arrays["residual"].dtype.name))
    if save:
        results += [(name, "...", "float32") for name in ("mean", "shift", "rstd")]
    return config.run(
        FORWARD,
        {k: arrays[k] for k in ORDER if k in arrays},
        results,
        eps=config.eps,
        weight_offset=config.weight_offset,
        cast=config.cast,
        residual_rounding=config.residual_rounding,
    )


def _backward(config: _Config, saved: tuple[Arrays, Arrays], cotangents: Any) -> tuple[Arrays]:
    given, out = saved
    dy, dresidual_out = cotangents if config.residual_dtype else (cotangents, None)
    if isinstance(dresidual_out, SymbolicZero):
        dresidual_out = None
    if isinstance(dy, SymbolicZero):
        zero: Any = dy.aval
        dy = jnp.zeros(zero.shape, zero.dtype)
    includes_x_bias = config.residual_dtype is not None
    operands = {
        "n": out["residual_out"] if includes_x_bias else given["x"],
        "x_bias": None if includes_x_bias else given.get("x_bias"),
        "weight": given.get("weight"),
        **{name: out[name] for name in ("mean", "shift", "rstd")},
        "dy": dy,
        "dresidual_out": dresidual_out,
    }
    results = [("dx", "... n", config.x_dtype)]
    if config.residual_dtype not in (None, config.x_dtype):  # else one array is both
        results.append(("dresidual", "... n", config.residual_dtype))
    results += [(total, "n", given[name].dtype.name) for name, total in SUM_OF.items() if name in given]
    operands = {k: v for k, v in operands.items() if v is not None}
    got = config.run(BACKWARD, operands, results, weight_offset=config.weight_offset)
    gradients = {"x": got["dx"]}
    if config.residual_dtype:
        gradients["residual"] = got.get("dresidual", got["dx"])
    gradients |= {name: got[total] for name, total in SUM_OF.items() if total in got}
    return (gradients,)


@functools.cache
def _differentiable(config: _Config) -> Any:
    """``{x, x_bias, residual, weight, bias: those given} -> y`` or ``(y, residual_out)`` with its reverse rule."""

    def results(out: Arrays) -> Any:
        return (out["y"], out["residual_out"]) if "residual_out" in out else out["y"]

    @jax.custom_vjp
    def norm(arrays: Arrays) -> Any:
        return results(_forward(config, arrays, save=False))

    def forward(arrays: Any) -> Any:
        given = {k: a.value for k, a in arrays.items()}
        out = _forward(config, given, save=True)
        kept = {k: v for k, v in out.items() if k != "y"}
        if "residual" in given:  # residual_out includes x; of x_bias and the weights the dtypes are needed, too
            given = {k: v for k, v in given.items() if k not in ("x", "residual")}
        return results(out), (given, kept)

    # symbolic zeros: a residual_out that nobody differentiates costs no read of zeros in the backward kernel
    norm.defvjp(forward, functools.partial(_backward, config), symbolic_zeros=True)
    return norm


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(arrays: Arrays, config: _Config) -> Any:
    with jax.named_scope(config.op):
        single = arrays["x"].ndim == 1  # a stage has at least one leading dim
        names = [k for k in ORDER if k in arrays]  # a dict that went through a pytree comes back sorted
        rows = {k: arrays[k][None] if single and k in _ROWS else arrays[k] for k in names}
        matched = dict(zip(names, _compat.match_varying(list(rows.values())), strict=True))
        gather = config.width != matched["x"].shape[-1]
        fitted = _sharding.conform({k: (v, _dims(k)) for k, v in matched.items()}, gather_features=gather)
        out = _differentiable(config)(dict(zip(names, fitted, strict=True)))
        return jax.tree.map(lambda a: a[0], out) if single else out


def operands(op: str, x: Any, x_bias: Any, residual: Any, weight: Any, bias: Any, has_residual: bool) -> dict[str, Any]:
    """The array arguments of a LayerNorm, checked, in :data:`ORDER`; None for what is not given."""
    x = check.array(op, "x", x)
    check.features_last(op, "x", x)
    check.known(op, "x", x, x.shape[-1:])
    if has_residual:
        residual = check.array(op, "residual", residual)
        check.same_shape(op, "residual", residual, x)
    vectors = {"x_bias": x_bias, "weight": weight, "bias": bias}
    checked = {name: check.vector(op, name, value, x.shape[-1]) for name, value in vectors.items()}
    found = {"x": x, "residual": residual, **checked}
    return {name: found[name] for name in ORDER}


def _call(
    op: str,
    arrays: dict[str, Any],
    *,
    eps: Any,
    weight_offset: Any,
    cast: Any,
    residual_rounding: Any,
    out_dtype: Any,
    pad_to_multiple: Any,
    backend: Any,
) -> Any:
    x, residual = arrays["x"], arrays["residual"]
    name, source = _dispatch.requested(op, backend)
    config = _Config(
        op,
        x.dtype.name,
        None if residual is None else residual.dtype.name,
        check.eps(op, eps),
        check.offset(op, weight_offset, arrays["weight"]),
        check.choice(op, "cast", cast, check.CASTS),
        check.choice(op, "residual_rounding", residual_rounding, check.ROUNDINGS),
        check.out_dtype(op, out_dtype, x),
        check.padded_width(op, pad_to_multiple, x.shape[-1]),
        name,
        source,
        target.named(),
    )
    return _jitted({k: v for k, v in arrays.items() if v is not None}, config)


def layernorm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    *,
    x_bias: jax.Array | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """``y = (a - mean(a)) * rsqrt(var(a) + eps) * (weight + weight_offset) + bias``, ``a = x + x_bias``, over the last axis.

    All arithmetic in float32, rounded once. The variance is that of the deviations from the mean, corrected for the rounding of the
    mean itself: rows whose mean is thousands of times their deviation come out right. The bits of a row depend on the row, N, the
    dtypes and the options only.

    Args:
      x:             [..., N] bfloat16, float16 or float32; any leading dims, N >= 1.
      weight, bias:  [N], any of these dtypes each, read in their own precision; None = no multiply, no add.
      x_bias:        [N] or None: added to x first, the bias of the projection before the norm.
      eps:           added to the (biased) variance, inside the root.
      weight_offset: 1.0 for weights stored around zero.
      cast:          ``"output"`` rounds once at the end; ``"before_weight"`` rounds the normalised value to x.dtype first.
      out_dtype, pad_to_multiple, backend: as in :func:`rmsnorm`.

    Returns:
      y [..., N] (or padded), ``out_dtype`` or x.dtype. A constant row gives the bias.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: x, weight, bias and x_bias (float32 sums in a fixed order, cast to the dtype of their argument).
    Sharding: rows without any collective; one all-reduce in the backward, of the three sums together; sharded features cost three
    floats a row.
    Source: Ba, Kiros & Hinton 2016, "Layer Normalization".
    """
    return _call(
        "layernorm",
        operands("layernorm", x, x_bias, None, weight, bias, has_residual=False),
        eps=eps,
        weight_offset=weight_offset,
        cast=cast,
        residual_rounding="float32",
        out_dtype=out_dtype,
        pad_to_multiple=pad_to_multiple,
        backend=backend,
    )


def add_layernorm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    *,
    x_bias: jax.Array | None = None,
    residual_rounding: str = "float32",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``a = x + x_bias + residual``;  ``y = (a - mean(a)) * rsqrt(var(a) + eps) * (weight + weight_offset) + bias``.

    The adds and the norm in one kernel: reads x and residual once, writes y and residual_out once.

    Args:
      x:                 [..., N] bfloat16, float16 or float32.
      residual:          [..., N], the shape of x, any of these dtypes.
      weight, bias:      [N] or None, as in :func:`layernorm`.
      x_bias:            [N] or None: added to x before the residual.
      residual_rounding: ``"float32"``: the norm reads the unrounded sum; ``"input"``: it reads residual_out.
      eps, weight_offset, cast, out_dtype, pad_to_multiple, backend: as in :func:`layernorm`; residual_out is never padded.

    Returns:
      y            [..., N] (or padded), ``out_dtype`` or x.dtype, rounded once from float32.
      residual_out [..., N] in residual.dtype, ``cast(f32(x) + f32(x_bias) + f32(residual))`` bit for bit.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: x, residual (with the cotangent of residual_out), weight, bias, x_bias. Donate ``residual`` to reuse its buffer.
    Sharding: as :func:`layernorm`.
    Source: same results as AITER's ``layernorm2d_fwd_with_add``.
    """
    return _call(
        "add_layernorm",
        operands("add_layernorm", x, x_bias, residual, weight, bias, has_residual=True),
        eps=eps,
        weight_offset=weight_offset,
        cast=cast,
        residual_rounding=residual_rounding,
        out_dtype=out_dtype,
        pad_to_multiple=pad_to_multiple,
        backend=backend,
    )


register_op(OpDef("layernorm", layernorm, FORWARD, BACKWARD))
register_op(OpDef("add_layernorm", add_layernorm, FORWARD, BACKWARD))
