"""RMSNorm with an optional residual: float32 arithmetic, one rounding at the end, every rounding point written out.

    s = f32(x) [+ f32(residual)];  residual_out = cast(s);  n = s, or f32(residual_out) with residual_rounding="input"
    y = cast((n * rstd) * (f32(weight) + weight_offset)),   rstd = rsqrt(sum(n * n) / N + eps)

All functions take any number of leading dims. ``axes`` names the mesh axes over which the features are sharded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._common import Axes, f32, pad_last, rank_sum, rounded, row_sum


def normalise(
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    *,
    features: int,
    eps: float,
    weight_offset: float,
    cast: str,
    residual_rounding: str,
    parts: int = 1,
    axes: Axes = (),
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """(y float32 [..., N] before its last rounding, residual_out or None, rstd float32 [...]). With ``parts``, x [parts, ..., N]
    stands for its float32 sum."""
    n, residual_out = f32(x) if parts == 1 else rank_sum(x), None
    if residual is not None:
        n = n + f32(residual)
        kept = rounded(n, residual.dtype)
        residual_out = kept.astype(residual.dtype)
        if residual_rounding == "input":
            n = kept
    rstd = jax.lax.rsqrt(row_sum(n * n, axes) / features + eps)
    y = n * rstd
    if cast == "before_weight":
        y = rounded(y, x.dtype)
    if weight is not None:
        y = y * (f32(weight) + weight_offset)
    return y, residual_out, rstd[..., 0]


def forward(
    x: jax.Array,
    residual: jax.Array | None,
    weight: jax.Array | None,
    *,
    width: int,
    out_dtype: str,
    **options: Any,
) -> dict[str, jax.Array]:
    """``{"y": [..., width], "residual_out": [..., N], "rstd": float32 [...]}``; residual_out only with a residual.

    ``options`` are those of :func:`normalise`.
    """
    y, residual_out, rstd = normalise(x, residual, weight, **options)
    out = {"y": pad_last(y.astype(out_dtype), width), "rstd": rstd}
    return out if residual_out is None else {**out, "residual_out": residual_out}


def backward(
    n: jax.Array,
    weight: jax.Array | None,
    rstd: jax.Array,
    dy: jax.Array,
    dresidual_out: jax.Array | None,
    *,
    features: int,
    dtypes: dict[str, str],
    weight_offset: float,
    axes: Axes = (),
) -> dict[str, jax.Array]:
    """``xh = n * rstd; gw = dy * w'; ds = rstd * (gw - xh * mean(gw * xh)) + dresidual_out``; roundings count as identity.

    ``dtypes`` names the results wanted (``dx``, ``dresidual``, ``dweight``) and their dtypes; dweight is the sum over the rows of
    ``dy * xh``, added up in float32.
    """
    g, r = f32(dy[..., : n.shape[-1]]), rstd[..., None]
    xh = f32(n) * r
    gw = g if weight is None else g * (f32(weight) + weight_offset)
    ds = r * (gw - xh * (row_sum(gw * xh, axes) / features))
    if dresidual_out is not None:
        ds = ds + f32(dresidual_out)
    out = {name: ds.astype(dtype) for name, dtype in dtypes.items() if name != "dweight"}
    if "dweight" in dtypes:
        out["dweight"] = jnp.sum(g * xh, axis=tuple(range(g.ndim - 1))).astype(dtypes["dweight"])
    return out
