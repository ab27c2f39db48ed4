"""numpy float64 oracle, written from the contract; it shares no code with the library.

Intermediate roundings of the contract are applied; everything between them is float64. Results are rounded once, to
nearest even, by :func:`round_to`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cases import dtype

# dtype name -> significant bits, exponent of the smallest subnormal
_FORMATS = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149)}


def round_to(values: np.ndarray, name: str) -> np.ndarray:
    """float64 to ``name``, one round-to-nearest-even.

    ``astype`` is not used for the rounding itself: ml_dtypes converts float64 to bfloat16 through float32, which rounds twice.
    """
    values = np.asarray(values, np.float64)
    bits, smallest = _FORMATS[name]
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(values)
        step = np.ldexp(1.0, np.maximum(exponent - bits, smallest))
        rounded = np.where(np.isfinite(values), np.rint(values / step) * step, values)
        return np.copysign(rounded, values).astype(dtype(name))


def f64(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


@dataclass(frozen=True)
class Forward:
    """Result of a forward oracle. Arrays of float64 unless said otherwise."""

    y: np.ndarray
    """Before the final rounding, without the padded tail."""
    y_dtype: str
    padded: int
    n: np.ndarray
    """What the norm read."""
    rstd: np.ndarray
    """``[..., 1]``"""
    residual_out: np.ndarray | None = None
    """In the residual's dtype."""

    @property
    def result(self) -> np.ndarray:
        """y as the op must return it: rounded, with the zero tail."""
        y = round_to(self.y, self.y_dtype)
        return np.concatenate([y, np.zeros((*y.shape[:-1], self.padded - y.shape[-1]), y.dtype)], -1)


def _norm(n, x_dtype, weight, *, eps, weight_offset, cast, out_dtype, pad_to_multiple, residual_out=None) -> Forward:
    features = n.shape[-1]
    with np.errstate(all="ignore"):
        rstd = 1.0 / np.sqrt(np.sum(n * n, -1, keepdims=True) / features + eps)
        y = n * rstd
        if cast == "before_weight":
            y = f64(round_to(y, x_dtype))
        if weight is not None:
            y = y * (f64(weight) + weight_offset)
    p = pad_to_multiple or 1
    return Forward(y, out_dtype or x_dtype, -(-features // p) * p, n, rstd, residual_out)


def rmsnorm(x, weight, *, eps=1e-6, weight_offset=0.0, cast="output", out_dtype=None, pad_to_multiple=None) -> Forward:
    """``y = n * rstd * (w + weight_offset)``, ``n = x``."""
    return _norm(f64(x), x.dtype.name, weight, eps=eps, weight_offset=weight_offset, cast=cast, out_dtype=out_dtype,
                 pad_to_multiple=pad_to_multiple)  # fmt: skip


def add_rmsnorm(x, residual, weight, *, residual_rounding="float32", eps=1e-6, weight_offset=0.0, cast="output", out_dtype=None,
                pad_to_multiple=None) -> Forward:  # fmt: skip
    """``s = f32(x) + f32(residual)`` is a float32 sum; ``residual_out`` its rounding; the norm reads s or residual_out."""
    with np.errstate(all="ignore"):
        s = x.astype(np.float32) + residual.astype(np.float32)
    residual_out = round_to(f64(s), residual.dtype.name)
    n = f64(s) if residual_rounding == "float32" else f64(residual_out)
    return _norm(n, x.dtype.name, weight, eps=eps, weight_offset=weight_offset, cast=cast, out_dtype=out_dtype,
                 pad_to_multiple=pad_to_multiple, residual_out=residual_out)  # fmt: skip


@dataclass(frozen=True)
class Backward:
    """Gradients in float64, and what their bounds need."""

    dx: np.ndarray
    """Gradient of the float32 sum: x and residual each get its rounding to their own dtype."""
    dx_terms: np.ndarray
    """Sum of the absolute values of the terms of dx, which cancel for very small N (completely, but for eps, at N = 1)."""
    dweight: np.ndarray
    dweight_terms: np.ndarray
    """Sum over the rows of the absolute values of the terms of dweight."""


def rmsnorm_backward(forward: Forward, weight, dy, dresidual_out=None, *, weight_offset=0.0) -> Backward:
    """The formula of the contract on the saved values; roundings count as identity.

    ``dy`` is ``[..., P]`` (the padded tail is dropped), ``dresidual_out`` the cotangent of ``residual_out``.
    """
    saved = forward.n if forward.residual_out is None else f64(forward.residual_out)
    features = saved.shape[-1]
    g1 = f64(dy)[..., :features]
    w = f64(weight) + weight_offset if weight is not None else 1.0
    with np.errstate(all="ignore"):
        xh = saved * forward.rstd
        gw = g1 * w
        mean = np.sum(gw * xh, -1, keepdims=True) / features
        ds = forward.rstd * (gw - xh * mean)
        magnitude = forward.rstd * (np.abs(gw) + np.abs(xh * mean))
        if dresidual_out is not None:
            ds = ds + f64(dresidual_out)
            magnitude = magnitude + np.abs(f64(dresidual_out))
        terms = (g1 * xh).reshape(-1, features)
        return Backward(ds, magnitude, terms.sum(0), np.abs(terms).sum(0))
