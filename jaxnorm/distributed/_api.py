"""The public functions: arguments checked, the configuration made, the way chosen."""

from __future__ import annotations

import functools
from typing import Any

import jax

from .. import _compat
from .._api import _checks as check
from .._api.quant import resolve
from .._compile import target
from .._stage import Arrays
from .._types import QuantSpec
from ..errors import type_error, value_error
from . import composite, fused
from ._config import Axis, Config

IMPLS = ("auto", "composite", "fused")
REDUCTIONS = ("exact", "native")
NORMS = ("rmsnorm", "layernorm")
NO_GRADIENT = (
    "{op}: gradients do not flow through quantisation. Differentiate it with spec=None, and quantise apart: "
    "quantize(stop_gradient(y), spec); or take stop_gradient of the whole result."
)


def reduce_scatter_rmsnorm_quant_all_gather(
    x: jax.Array,
    weight: jax.Array | None,
    spec: QuantSpec | None = None,
    *,
    axis_name: Axis,
    bias: jax.Array | None = None,
    norm: str = "rmsnorm",
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    gather: bool = True,
    reduce: str = "exact",
    impl: str = "auto",
    timeout_s: float = 30,
) -> Any:
    """``y = norm(sum_p x_p [+ residual])``, each rank on its own rows, quantised with a spec, gathered to every rank.

    The end of a sequence-parallel block in one call: what a matrix product left as partial sums comes back normalised (and
    quantised) for the next one, and the residual stream stays sharded over the rows.

    Args:
      x:             [M, N] bfloat16, float16 or float32: this rank's partial sum.
      weight, bias:  [N] or None; bias with ``norm="layernorm"``.
      spec:          how to quantise; None = not.
      axis_name:     the manual mesh axis (or axes) of W ranks; rank r owns the rows ``r * Ms .. (r + 1) * Ms - 1`` with
                     ``Ms = ceil(M / W)``.
      norm:          ``"rmsnorm"`` or ``"layernorm"``.
      residual:      [Ms, N], this rank's rows, added in float32 before the norm.
      eps, weight_offset, cast: as in :func:`jaxnorm.rmsnorm`.
      gather:        False keeps y or the codes at this rank's rows.
      reduce:        ``"exact"``: the sum of float32 values in rank order, not rounded. ``"native"``: XLA's reduce-scatter in x's
                     dtype, whose 16-bit sums change 2 to 5 % of the codes.
      impl:          ``"composite"``: XLA's collectives around one kernel. ``"fused"``: one kernel over peer-mapped memory, within
                     one host. ``"auto"``: the faster one that serves the call; both give results within the same contract.
      timeout_s:     seconds that the fused kernel waits for another rank before the call fails with an error that names it.

    Returns:
      y, ``(y, residual_out)``, Quantized, or ``(Quantized, residual_out)``: y or the codes [M, N] in x's dtype, the same bits on
      every rank and typed so, or [Ms, N] with gather=False; residual_out [Ms, N] in residual's dtype. Rows that the last ranks
      lack when W does not divide M are zeros with scale 1 in shards.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.

    Gradients: x, weight, bias and residual, with spec=None, through the composite.
    Source: AITER's ``reduce_scatter_rmsnorm_quant_all_gather``, with the scales, which AITER's result lacks.
    """
    op = "reduce_scatter_rmsnorm_quant_all_gather"
    if not isinstance(gather, bool):
        raise type_error(op, "gather", type(gather).__name__, "a bool")
    check.choice(op, "norm", norm, NORMS)
    if bias is not None and norm != "layernorm":
        raise value_error(
            op, "bias", "an array with norm='rmsnorm'", "None", "RMSNorm has no bias; use norm='layernorm'."
        )
    return _call(op, x, residual, weight, bias, spec, axis_name, eps, weight_offset, cast, reduce, impl, timeout_s,
                 norm=norm, scatter=True, gather=gather)  # fmt: skip


def allreduce_add_rmsnorm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None,
    spec: QuantSpec | None = None,
    *,
    axis_name: Axis,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    reduce: str = "exact",
    impl: str = "auto",
    timeout_s: float = 30,
) -> tuple[Any, jax.Array]:
    """``s = sum_p x_p + residual;  y = s * rsqrt(mean(s**2) + eps) * (weight + weight_offset)``: a tensor-parallel block's end.

    Args:
      x:        [M, N] bfloat16, float16 or float32: this rank's partial sum.
      residual: [M, N], the same on every rank.
      weight, spec, axis_name, eps, weight_offset, cast, reduce, impl, timeout_s: as in
                :func:`reduce_scatter_rmsnorm_quant_all_gather`.

    Returns:
      y            [M, N] in x's dtype, or Quantized.
      residual_out [M, N] in residual's dtype, ``cast(s)``. Both have the same bits on every rank and are typed so.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; the message names the argument.

    Gradients: x, residual and weight, with spec=None.
    """
    if residual is None:
        raise type_error("allreduce_add_rmsnorm", "residual", None, "an array")
    return _call("allreduce_add_rmsnorm", x, residual, weight, None, spec, axis_name, eps, weight_offset, cast, reduce, impl,
                 timeout_s, norm="rmsnorm", scatter=False, gather=True)  # fmt: skip


def _call(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, spec: Any, axis_name: Any, eps: Any, weight_offset: Any, cast: Any,
    reduce: Any, impl: Any, timeout_s: Any, *, norm: str, scatter: bool, gather: bool,
) -> Any:  # fmt: skip
    x = check.array(op, "x", x)
    if x.ndim != 2 or x.shape[1] < 1:
        raise value_error(op, "x", f"shape {x.shape}", "[M, N] with N >= 1", "Fold the leading dims into rows.")
    axis, ranks = _axis(op, axis_name)
    if spec is not None and not isinstance(spec, QuantSpec):
        raise type_error(op, "spec", type(spec).__name__, "a QuantSpec or None", 'For example QuantSpec("fp8").')
    rows, n = x.shape
    if spec is not None and spec.group_size is not None and n % spec.group_size:
        raise value_error(op, "spec.group_size", spec.group_size, f"a divisor of N={n}")
    arrays = {
        "x": x,
        "residual": None if residual is None else check.array(op, "residual", residual),
        "weight": check.vector(op, "weight", weight, n),
        "bias": check.vector(op, "bias", bias, n),
    }
    seconds = check.number(op, "timeout_s", timeout_s)
    if seconds <= 0:
        raise value_error(op, "timeout_s", timeout_s, "a positive number of seconds")
    check.choice(op, "impl", impl, IMPLS)
    config = Config(
        op,
        axis,
        ranks,
        rows,
        n,
        x.dtype.name,
        None if spec is None else resolve(spec, target.named()),
        norm,
        check.eps(op, eps),
        check.offset(op, weight_offset, arrays["weight"]),
        check.choice(op, "cast", cast, check.CASTS),
        scatter,
        gather,
        check.choice(op, "reduce", reduce, REDUCTIONS),
        seconds,
        spec is not None and spec.dtype == "fp8",
    )
    _check_residual(config, arrays["residual"])
    with jax.named_scope(op):
        result, residual_out = _differentiable(config, impl)({k: v for k, v in arrays.items() if v is not None})
    return result if residual_out is None else (result, residual_out)


def _axis(op: str, axis_name: Any) -> tuple[Axis, int]:
    """(axis, number of ranks)"""
    axis = tuple(axis_name) if isinstance(axis_name, tuple | list) else axis_name
    if isinstance(axis, tuple) and len(axis) == 1:
        axis = axis[0]
    try:
        return axis, int(jax.lax.axis_size(axis))
    except (NameError, KeyError, TypeError, ValueError):
        bound = ", ".join(sorted(map(repr, _compat.manual_axes()))) or "none"
        raise value_error(
            op,
            "axis_name",
            repr(axis_name),
            f"a manual mesh axis (here: {bound})",
            "Call it under jax.shard_map or jax.pmap.",
        ) from None


def _check_residual(config: Config, residual: jax.Array | None) -> None:
    if residual is None:
        return
    rows = config.share if config.scatter else config.rows
    if residual.shape != (rows, config.features):
        what = f"this rank's ceil({config.rows} / {config.ranks}) rows" if config.scatter else "as x"
        raise value_error(config.op, "residual", f"shape {residual.shape}", f"{(rows, config.features)}, {what}")


@functools.cache
def _differentiable(config: Config, impl: str) -> Any:
    """``arrays -> (y or Quantized, residual_out or None)``; a quantised result refuses to be differentiated."""
    run = functools.partial(_run, config, impl)
    if config.spec is None:
        return run

    @jax.custom_vjp
    def quantised(arrays: Arrays) -> Any:
        return run(arrays)

    def backward(_: Any, __: Any) -> Any:
        raise TypeError(NO_GRADIENT.format(op=config.op))

    quantised.defvjp(lambda arrays: (run(arrays), None), backward)
    return quantised


def _run(config: Config, impl: str, arrays: Arrays) -> tuple[Any, jax.Array | None]:
    if config.ranks == 1 or config.rows == 0:
        return composite.alone(config, arrays)
    return fused.run(config, arrays, impl)
