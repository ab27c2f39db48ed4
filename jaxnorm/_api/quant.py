"""Quantised results: ``quantize`` alone, and RMSNorm with a quantising epilogue. One stage, hence one kernel launch, each.

The scales of a stage come in one of three forms. Row layout is ``[..., G]``. Column layout leaves the stage as ``[G, ...]`` and is
folded to ``[G, M]`` outside. The shuffled (MX tile) layout is blocks of 32 rows; with M % 256 == 0 they are the rows of
``[..., Sp]``, so row shards just follow one another; else the stage gives the padded ``[Mp, Sp]`` and its rows must be whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .. import _compat, _dispatch, _op, _sharding
from .._compile import target
from .._ref import quant as ref
from .._ref import rmsnorm as ref_rmsnorm
from .._ref._common import f32, pad_last
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from .._types import Quantized, QuantSpec
from ..errors import type_error, value_error
from . import _checks as check

ORDER = ("x", "x_bias", "residual", "weight", "bias", "smooth_scale", "static_scale")
NO_GRADIENT = (
    "{op}: gradients do not flow through quantisation. Differentiate the op without it, and quantise apart: "
    "quantize(stop_gradient({base}), spec); or take stop_gradient of the whole result."
)


def encode(call: StageCall, y: jax.Array, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    """The quantised results of a stage from its float32 y, and y itself where it is kept."""
    spec: QuantSpec = call.option("spec")
    out = {"y": y} if any(n == "y" for n, _, _ in call.results) else {}
    width = call.size("p") if "p" in dict(call.sizes) else y.shape[-1]
    if out:
        out["y"] = pad_last(y.astype(call.dtype("y")), width)
    z = y * f32(a["smooth_scale"]) if "smooth_scale" in a else y
    values, scale = ref.quantize(pad_last(z, width), spec, a.get("static_scale"), axes)
    out["values"] = values
    if "static_scale" not in a:
        out["scale"] = _stage_layout(call, scale, spec, axes)
    return out


def _stage_layout(call: StageCall, scale: jax.Array, spec: QuantSpec, axes: tuple[str, ...]) -> jax.Array:
    if spec.scale_layout == "column":
        return jnp.moveaxis(scale, -1, 0)
    if spec.scale_layout == "shuffled":
        if axes:  # a tile holds groups of several shards: gather the scales, a 64th of what the rows would be
            scale = jnp.moveaxis(_compat.all_gather_equal(jnp.moveaxis(scale, -1, 0), axes, tiled=True), 0, -1)
        tiles = ref.shuffle(scale.reshape(math.prod(scale.shape[:-1]), scale.shape[-1]))
        lead = scale.shape[:-1]
        # a shard of fewer rows than a tile column of 256: the blocks of 32 rows without the padding behind them
        return tiles[: math.prod(lead)].reshape(*lead, tiles.shape[-1]) if call.dims("scale")[0] == "..." else tiles
    return scale


def _rmsnorm_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    options = {k: v for k, v in call.options if k not in ("spec", "fp8")}
    y, residual_out, _ = ref_rmsnorm.normalise(
        a["x"], a.get("residual"), a.get("weight"), features=call.features, axes=axes, **options
    )
    out = encode(call, y, a, axes)
    return out if residual_out is None else {**out, "residual_out": residual_out}


def _quantize_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    return encode(call, f32(a["x"]), a, axes)


_PLANS = {"triton": "quant_triton", "hip": "quant_hip"}
RMSNORM_QUANT = register_stage(StageDef("rmsnorm_quant_fwd", "rmsnorm_quant", _rmsnorm_reference, _PLANS))
QUANTIZE = register_stage(StageDef("quantize_fwd", "quantize", _quantize_reference, _PLANS))


@dataclass(frozen=True)
class Config:
    """Everything static about one call."""

    op: str
    base: str
    stage: str
    spec: QuantSpec
    native_fp8: bool
    """The spec said "fp8": a lowering for a target with another native flavour is an error."""
    width: int
    keep: str | None
    options: tuple[tuple[str, Any], ...]
    backend: str | None
    backend_source: str
    targets: tuple[tuple[str, str], ...]

    @property
    def parts(self) -> int:
        """More than one: x is [parts, ..., N], partial sums that the stage adds up."""
        return dict(self.options).get("parts", 1)


def resolve(spec: QuantSpec, targets: tuple[tuple[str, str], ...]) -> QuantSpec:
    """``"fp8"`` as the native e4m3 of the target: named by ``use_target``, else the device's."""
    if spec.dtype != "fp8":
        return spec
    flavours = {target.native_fp8(t) for t in target.in_force(targets)}
    if len(flavours) > 1:
        got = " and ".join(f"{t} ({target.native_fp8(t)})" for t in target.in_force(targets))
        raise value_error(
            "QuantSpec", "dtype", f"'fp8' for {got}", "one flavour", "Name float8_e4m3fn or float8_e4m3fnuz."
        )
    import dataclasses

    return dataclasses.replace(spec, dtype=flavours.pop())


def _scale_result(config: Config, lead: tuple[int, ...]) -> tuple[str, dict[str, int]]:
    """(dims of the scale as the stage gives it, sizes of its named dims)."""
    spec, groups = config.spec, config.spec.groups(config.width)
    if spec.scale_layout == "row":
        return "... g", {"g": groups}
    if spec.scale_layout == "column":
        return "g ...", {"g": groups}
    mp, sp = ref.shuffled_shape(math.prod(lead), groups)
    if lead[-1] % 256 == 0:
        return "... s", {"s": sp}
    return "r s", {"s": sp, "r": mp}


def stage_call(config: Config, arrays: Mapping[str, Any]) -> StageCall:
    """The stage on ``arrays``, of which only shapes and dtypes are looked at; they come in ORDER."""
    x, spec = arrays["x"], config.spec
    n, parts = x.shape[-1], config.parts
    packed = spec.dtype == "fp4"
    padded = config.width != n
    sizes = {"n": n}
    if padded:
        sizes["p"] = config.width
    wide = "p" if padded else "n"
    results: list[tuple[str, str, str]] = []
    if packed:
        sizes["v"] = config.width // 2
    results.append(("values", "... v" if packed else f"... {wide}", spec.value_dtype))
    static = "static_scale" in arrays
    if not static:
        dims, more = _scale_result(config, x.shape[1 if parts > 1 else 0 : -1])
        sizes |= more
        results.append(("scale", dims, "uint8" if spec.scale_dtype == "e8m0" else "float32"))
    if "residual" in arrays:
        results.append(("residual_out", "... n", arrays["residual"].dtype.name))
    if config.keep:
        results.append(("y", f"... {wide}", config.keep))
    tiles = not static and spec.scale_layout == "shuffled"
    follows = ("n", *(("g",) if spec.group_size and not tiles else ()), *(("v",) if packed else ()))
    rows = {"x": "w ... n" if parts > 1 else "... n", "residual": "... n", "static_scale": ""}
    if parts > 1:
        sizes["w"] = parts
    return StageCall(
        stage=config.stage,
        op=config.op,
        operands=tuple((k, rows.get(k, "n")) for k in arrays),
        results=tuple(results),
        sizes=tuple(sizes.items()),
        options=(*config.options, ("spec", spec), ("fp8", config.native_fp8)),
        backend=config.backend,
        backend_source=config.backend_source,
        targets=config.targets,
        feature_dims=() if padded else follows,
        group=spec.group_size or 1,
        row_block=(0 if "r" in sizes else 32) if tiles else 1,
    )


def run(config: Config, arrays: Arrays) -> Any:
    """The stage, and its results in the form that the ops return."""
    arrays = {k: arrays[k] for k in ORDER if k in arrays}  # a dict that went through a pytree comes back sorted
    call, spec = stage_call(config, arrays), config.spec
    out = _op.run(call, tuple(arrays.values()))
    static = "static_scale" in arrays
    scale = arrays["static_scale"].reshape(()) if static else out["scale"]
    if not static and spec.scale_layout != "row" and "r" not in dict(call.sizes):
        scale = (
            scale.reshape(scale.shape[0], -1) if spec.scale_layout == "column" else scale.reshape(-1, scale.shape[-1])
        )
    result = Quantized(out["values"], scale, spec)
    extras = [out[k] for k in ("residual_out", "y") if k in out]
    return (result, *extras) if extras else result


@functools.cache
def _without_gradient(config: Config) -> Any:
    @jax.custom_vjp
    def op(arrays: Arrays) -> Any:
        return run(config, arrays)

    def backward(_: Any, __: Any) -> Any:
        raise TypeError(NO_GRADIENT.format(op=config.op, base=config.base))

    op.defvjp(lambda arrays: (run(config, arrays), None), backward)
    return op


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(arrays: Arrays, config: Config) -> Any:
    with jax.named_scope(config.op):
        single = arrays["x"].ndim == 1  # a stage has at least one leading dim
        if single:
            arrays = {k: v[None] if k in ("x", "residual") else v for k, v in arrays.items()}
        names = [k for k in ORDER if k in arrays]
        arrays = dict(zip(names, _compat.match_varying([arrays[k] for k in names]), strict=True))
        dims = {"x": "... n", "residual": "... n", "static_scale": ""}
        gather = config.width != arrays["x"].shape[-1]
        fitted = _sharding.conform({k: (v, dims.get(k, "n")) for k, v in arrays.items()}, gather_features=gather)
        out = _without_gradient(config)(dict(zip(names, fitted, strict=True)))
        return _first_row(out) if single else out


def _first_row(out: Any) -> Any:
    if isinstance(out, tuple):
        return tuple(_first_row(o) for o in out)
    if not isinstance(out, Quantized):
        return out[0]
    row = out.scale.ndim > 0 and out.spec.scale_layout == "row"
    return Quantized(out.values[0], out.scale[0] if row else out.scale, out.spec)


def call_op(
    op: str,
    base: str,
    stage: str,
    operands: dict[str, Any],
    spec: Any,
    *,
    smooth_scale: Any,
    static_scale: Any,
    keep: str | None,
    width: int,
    options: dict[str, Any],
    backend: Any,
) -> Any:
    """Checks what all quantising ops share, and runs the stage. ``operands`` are checked arrays, x first."""
    x = operands["x"]
    n = x.shape[-1]
    if not isinstance(spec, QuantSpec):
        raise type_error(op, "spec", type(spec).__name__, "a QuantSpec", 'For example QuantSpec("int8").')
    operands["smooth_scale"] = check.vector(op, "smooth_scale", smooth_scale, n)
    if static_scale is not None:
        static_scale = check.array(op, "static_scale", static_scale)
        if static_scale.shape not in ((), (1,)):
            raise value_error(op, "static_scale", f"shape {static_scale.shape}", "() or (1,)")
        if spec.group_size is not None or spec.scale_dtype != "float32":
            got = f"group_size={spec.group_size}, scale_dtype={spec.scale_dtype!r}"
            raise value_error(
                op, "static_scale", f"one with {got}", "group_size=None and float32 scales", "It is one scale for all."
            )
        operands["static_scale"] = f32(static_scale).reshape(())
    if spec.group_size is not None and width % spec.group_size:
        divisors = [g for g in (32, 64, 128) if width % g == 0]
        remedy = f"Use {', '.join(map(str, divisors))}." if divisors else "Use group_size=None, or pad_to_multiple."
        raise value_error(op, "spec.group_size", spec.group_size, f"a divisor of N={width}", remedy)
    name, source = _dispatch.requested(op, backend)
    targets = target.named()
    config = Config(
        op,
        base,
        stage,
        resolve(spec, targets),
        spec.dtype == "fp8",
        width,
        keep,
        tuple(options.items()),
        name,
        source,
        targets,
    )
    return _jitted({k: v for k, v in operands.items() if v is not None}, config)


def kept_dtype(op: str, keep_unquantized: Any, out_dtype: Any, x: jax.Array) -> str | None:
    """dtype of the unquantised y among the results; None if it is not wanted."""
    if not isinstance(keep_unquantized, bool):
        raise type_error(op, "keep_unquantized", type(keep_unquantized).__name__, "a bool")
    if out_dtype is not None and not keep_unquantized:
        raise value_error(
            op, "out_dtype", out_dtype, "None without keep_unquantized", "It is the dtype of the unquantised y."
        )
    return check.out_dtype(op, out_dtype, x) if keep_unquantized else None


def quantize(
    x: jax.Array, spec: QuantSpec, *, smooth_scale: Any = None, static_scale: Any = None, backend: str | None = None
) -> Quantized:
    """``code = RNE(clip(z / s))`` with ``z = x * smooth_scale`` and ``s = max|z| / dtype_max`` of each row or group.

    Args:
      x:            [..., N] bfloat16, float16 or float32.
      spec:         what to quantise to.
      smooth_scale: [N], multiplied into x first (SmoothQuant).
      static_scale: a scalar array: one given scale for all instead of one a row.
      backend:      as in :func:`rmsnorm`.

    Returns:
      Quantized: codes [..., N] (fp4: uint8 [..., N // 2]) and their dequantisation scales. A row or group of zeros has scale 1. A
      NaN or Inf shows in the scale of its row or group and touches no other.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; N that the group size does not divide.

    Gradients: none; differentiating raises a TypeError that names the way out.
    Sharding: rows without any collective, each shard holding the scales of its rows; sharded features keep whole groups, and the
    scales of these, without any; they cost one maximum a row per token, and for shuffled scales, whose tiles hold groups of several
    shards, an all-gather of the scales. Groups that shards would cut are gathered.
    """
    x = check.array("quantize", "x", x)
    check.features_last("quantize", "x", x)
    return call_op(
        "quantize", "x", "quantize_fwd", {"x": x}, spec, smooth_scale=smooth_scale, static_scale=static_scale, keep=None,
        width=x.shape[-1], options={}, backend=backend,
    )  # fmt: skip


def _rmsnorm(
    op: str,
    x: Any,
    residual: Any,
    weight: Any,
    spec: Any,
    *,
    has_residual: bool,
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
    operands: dict[str, Any] = {"x": check.array(op, "x", x)}
    x = operands["x"]
    check.features_last(op, "x", x)
    check.known(op, "x", x, x.shape[-1:])
    if has_residual:
        operands["residual"] = check.array(op, "residual", residual)
        check.same_shape(op, "residual", operands["residual"], x)
    operands["weight"] = check.vector(op, "weight", weight, x.shape[-1])
    options = {
        "eps": check.eps(op, eps),
        "weight_offset": check.offset(op, weight_offset, operands["weight"]),
        "cast": check.choice(op, "cast", cast, check.CASTS),
        "residual_rounding": check.choice(op, "residual_rounding", residual_rounding, check.ROUNDINGS),
    }
    kept = kept_dtype(op, keep_unquantized, out_dtype, x)
    base = "add_rmsnorm(...)[0]" if has_residual else "rmsnorm(...)"
    return call_op(
        op,
        base,
        "rmsnorm_quant_fwd",
        operands,
        spec,
        smooth_scale=smooth_scale,
        static_scale=static_scale,
        keep=kept,
        width=check.padded_width(op, pad_to_multiple, x.shape[-1]),
        options=options,
        backend=backend,
    )


def rmsnorm_quant(
    x: jax.Array,
    weight: jax.Array | None,
    spec: QuantSpec,
    *,
    smooth_scale: Any = None,
    static_scale: Any = None,
    keep_unquantized: bool = False,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> Any:
    """``quantize(rmsnorm(x, weight))`` on the unrounded float32 y, in one kernel.

    Args:
      x, weight, eps, weight_offset, cast: as in :func:`rmsnorm`.
      spec, smooth_scale, static_scale:    as in :func:`quantize`; smooth_scale multiplies y, after the weight.
      keep_unquantized: also return y as ``rmsnorm`` gives it, before the smooth scale.
      out_dtype:        dtype of that y; x.dtype when None.
      pad_to_multiple:  codes (and y) are ``[..., ceil(N / p) * p]``; the zeros are quantised with their row or group.

    Returns:
      Quantized, or (Quantized, y) with keep_unquantized.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a group size that does not divide the (padded) N.

    Gradients: none, see :func:`quantize`. Sharding: see :func:`quantize`; sharded features also sum one float a row.
    """
    return _rmsnorm(
        "rmsnorm_quant",
        x,
        None,
        weight,
        spec,
        has_residual=False,
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


def add_rmsnorm_quant(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None,
    spec: QuantSpec,
    *,
    smooth_scale: Any = None,
    static_scale: Any = None,
    keep_unquantized: bool = False,
    residual_rounding: str = "float32",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    out_dtype: Any = None,
    pad_to_multiple: int | None = None,
    backend: str | None = None,
) -> Any:
    """The residual add, the norm and the quantisation in one kernel: reads x and residual once, writes codes and residual_out once.

    Args:
      x, residual, weight, residual_rounding, eps, weight_offset, cast: as in :func:`add_rmsnorm`.
      The others as in :func:`rmsnorm_quant`.

    Returns:
      (Quantized, residual_out), or (Quantized, residual_out, y) with keep_unquantized; residual_out as :func:`add_rmsnorm` gives
      it, never padded.

    Raises, Gradients, Sharding: as :func:`rmsnorm_quant`.
    """
    return _rmsnorm(
        "add_rmsnorm_quant",
        x,
        residual,
        weight,
        spec,
        has_residual=True,
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


register_op(OpDef("quantize", quantize, QUANTIZE))
register_op(OpDef("rmsnorm_quant", rmsnorm_quant, RMSNORM_QUANT))
register_op(OpDef("add_rmsnorm_quant", add_rmsnorm_quant, RMSNORM_QUANT))
