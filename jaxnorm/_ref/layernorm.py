"""LayerNorm with an optional bias of x and residual: float32 arithmetic, one rounding at the end, every rounding point written out.

    a = f32(x) [+ f32(x_bias)] [+ f32(residual)], in this order;  residual_out = cast(a);  n = a, or f32(residual_out) ("input")
    m0 = sum(n) / N;  d = n - m0;  e = sum(d) / N;  var = sum(d * d) / N - e * e
    xh = (d - e) * rsqrt(var + eps);  y = cast(xh * (f32(weight) + weight_offset) + f32(bias))

``e`` is what the rounding of m0 left of the mean. A mean is kept as the pair (``mean`` = m0, ``shift`` = e): their sum in one
float32 would lose what rows with a mean far above their deviation need.

All functions take any number of leading dims. ``axes`` names the mesh axes over which the features are sharded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._common import Axes, f32, pad_last, rank_sum, rounded, row_sum


def summed(x: jax.Array, x_bias: jax.Array | None, residual: jax.Array | None, parts: int = 1) -> jax.Array:
    """``f32(x) + f32(x_bias) + f32(residual)`` of what is there; x [parts, ..., N] is added up first."""
    a = f32(x) if parts == 1 else rank_sum(x)
    if x_bias is not None:
        a = a + f32(x_bias)
    return a if residual is None else a + f32(residual)


def row_mean(v: jax.Array, features: int, axes: Axes) -> jax.Array:
    """``sum(v) / N`` by a division.

    As a product with 1/N a compiler would fuse it with the subtraction of the mean in one place and not in another, and the
    deviations from two different means do not add up to ``e``.
    """
    total = row_sum(v, axes)
    return jax.lax.div(total, jax.lax.optimization_barrier(jnp.full_like(total, features)))


def statistics(n: jax.Array, features: int, eps: float, axes: Axes = ()) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m0, e, rstd), each ``[..., 1]``."""
    mean = row_mean(n, features, axes)
    d = n - mean
    shift = row_mean(d, features, axes)
    var = row_mean(d * d, features, axes) - shift * shift
    var = jnp.where(var < 0, 0.0, var)  # a constant row may come out below zero; a comparison keeps NaN
    return mean, shift, jax.lax.rsqrt(var + eps)


def normalise(
    arrays: dict[str, jax.Array],
    *,
    features: int,
    eps: float,
    weight_offset: float,
    cast: str,
    residual_rounding: str,
    parts: int = 1,
    axes: Axes = (),
) -> dict[str, jax.Array]:
    """float32 ``y`` [..., N] before its last rounding, ``mean``, ``shift``, ``rstd`` [...]; ``residual_out`` with a residual.

    ``arrays`` holds ``x`` and those of ``x_bias``, ``residual``, ``weight``, ``bias`` that are given.
    """
    x, residual = arrays["x"], arrays.get("residual")
    n, out = summed(x, arrays.get("x_bias"), residual, parts), {}
    if residual is not None:
        kept = rounded(n, residual.dtype)
        out["residual_out"] = kept.astype(residual.dtype)
        if residual_rounding == "input":
            n = kept
    mean, shift, rstd = statistics(n, features, eps, axes)
    y = (n - mean - shift) * rstd
    if cast == "before_weight":
        y = rounded(y, x.dtype)
    if "weight" in arrays:
        y = y * (f32(arrays["weight"]) + weight_offset)
    if "bias" in arrays:
        y = y + f32(arrays["bias"])
    return {**out, "y": y, "mean": mean[..., 0], "shift": shift[..., 0], "rstd": rstd[..., 0]}


def forward(arrays: dict[str, jax.Array], *, width: int, out_dtype: str, **options: Any) -> dict[str, jax.Array]:
    """As :func:`normalise`, with y rounded to ``out_dtype`` and padded to ``width``."""
    out = normalise(arrays, **options)
    return {**out, "y": pad_last(out["y"].astype(out_dtype), width)}


def backward(
    arrays: dict[str, jax.Array],
    *,
    features: int,
    dtypes: dict[str, str],
    weight_offset: float,
    axes: Axes = (),
) -> dict[str, jax.Array]:
    """``xh = (a - mean) * rstd; gw = dy * w'; ds = rstd * (gw - xh * mean(gw * xh) - mean(gw)) + dresidual_out``.

    Roundings count as identity. ``arrays``: ``n`` (x, or residual_out, which includes x_bias), ``x_bias`` where n does not include
    it, ``weight``, ``mean``, ``shift``, ``rstd``, ``dy``, ``dresidual_out``. ``dtypes`` names the results wanted and their dtypes:
    ``dx``, ``dresidual``, and the sums over the rows ``dweight`` of ``dy * xh``, ``dbias`` of ``dy`` and ``dx_bias`` of ``ds``,
    added up in float32.
    """
    n = summed(arrays["n"], arrays.get("x_bias"), None)
    g, r = f32(arrays["dy"][..., : n.shape[-1]]), arrays["rstd"][..., None]
    xh = (n - arrays["mean"][..., None] - arrays["shift"][..., None]) * r
    gw = g if "weight" not in arrays else g * (f32(arrays["weight"]) + weight_offset)
    ds = r * (gw - xh * row_mean(gw * xh, features, axes) - row_mean(gw, features, axes))
    if "dresidual_out" in arrays:
        ds = ds + f32(arrays["dresidual_out"])
    terms, rows = {"dweight": g * xh, "dbias": g, "dx_bias": ds}, tuple(range(g.ndim - 1))
    return {
        name: (jnp.sum(terms[name], axis=rows) if name in terms else ds).astype(dtype) for name, dtype in dtypes.items()
    }
