"""numpy float64 oracle of the LayerNorm family and the bounds of its results, written from the contract.

It shares no code with the library. The sum of x, x_bias and residual is a float32 sum in that order, as the contract says;
everything behind it is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tolerances
from oracle import f64, round_to
from tolerances import SMALLEST_NORMAL, ulp

SUMS = {"weight": "dweight", "bias": "dbias", "x_bias": "dx_bias"}
"""The gradient of a vector is a sum over the rows."""


@dataclass(frozen=True)
class Forward:
    """Arrays of float64 unless said otherwise."""

    y: np.ndarray
    """Before the final rounding, without the padded tail."""
    y_dtype: str
    padded: int
    n: np.ndarray
    """What the norm read."""
    mean: np.ndarray
    rstd: np.ndarray
    """``[..., 1]``, like the mean."""
    slack: np.ndarray
    """E of the contract, but for its mean: what cancellation near y = 0 may cost beside the rounding of y."""
    residual_out: np.ndarray | None = None
    """In the residual's dtype."""
    inner: np.ndarray | float = 0.0
    """``before_weight``: what one flip of the inner rounding moves y by."""

    @property
    def result(self) -> np.ndarray:
        y = round_to(self.y, self.y_dtype)
        return np.concatenate([y, np.zeros((*y.shape[:-1], self.padded - y.shape[-1]), y.dtype)], -1)


def layernorm(
    a: Mapping[str, np.ndarray], *, eps=1e-5, weight_offset=0.0, cast="output", residual_rounding="float32", out_dtype=None,
    pad_to_multiple=None,
) -> Forward:  # fmt: skip
    """``a`` has x and those of x_bias, residual, weight, bias that are given."""
    x, residual, residual_out = a["x"], a.get("residual"), None
    with np.errstate(all="ignore"):
        s = x.astype(np.float32)
        for more in ("x_bias", "residual"):
            s = s + a[more].astype(np.float32) if more in a else s
        n = f64(s)
        if residual is not None:
            residual_out = round_to(n, residual.dtype.name)
            n = f64(residual_out) if residual_rounding == "input" else n
        mean = np.mean(n, -1, keepdims=True)
        rstd = 1.0 / np.sqrt(np.mean((n - mean) ** 2, -1, keepdims=True) + eps)
        xh = (n - mean) * rstd
        w = f64(a["weight"]) + weight_offset if "weight" in a else np.ones(x.shape[-1])
        b = f64(a["bias"]) if "bias" in a else np.zeros(x.shape[-1])
        inner: np.ndarray | float = 0.0
        if cast == "before_weight":
            inner = ulp(xh, x.dtype.name) * np.abs(w)
            xh = f64(round_to(xh, x.dtype.name))
        # The contract allows 2^-22 of the mean, which a mean that lost its last bits just passes; what e repairs is far below.
        slack = 2.0**-20 * (1 + np.abs(xh * w) + np.abs(b)) + 2.0**-32 * np.abs(mean) * rstd
        p = pad_to_multiple or 1
        return Forward(xh * w + b, out_dtype or x.dtype.name, -(-x.shape[-1] // p) * p, n, mean, rstd, slack, residual_out,
                       inner)  # fmt: skip


@dataclass(frozen=True)
class Backward:
    dx: np.ndarray
    """Gradient of the float32 sum: x and residual each get its rounding to their own dtype."""
    dx_terms: np.ndarray
    """Sum of the absolute values of the terms of dx."""
    sums: dict[str, np.ndarray]
    """dweight, dbias, dx_bias"""
    terms: dict[str, np.ndarray]
    """Of each of them the sum over the rows of the absolute values of the terms."""


def backward(forward: Forward, a: Mapping[str, np.ndarray], dy, dresidual_out=None, *, weight_offset=0.0) -> Backward:
    """The formula of the contract on the saved values; roundings count as identity. The padded tail of ``dy`` is dropped."""
    saved = forward.n if forward.residual_out is None else f64(forward.residual_out)
    g1 = f64(dy)[..., : saved.shape[-1]]
    w = f64(a["weight"]) + weight_offset if "weight" in a else 1.0
    with np.errstate(all="ignore"):
        xh = (saved - forward.mean) * forward.rstd
        gw = g1 * w
        product, mean = np.mean(gw * xh, -1, keepdims=True), np.mean(gw, -1, keepdims=True)
        ds = forward.rstd * (gw - xh * product - mean)
        magnitude = forward.rstd * (np.abs(gw) + np.abs(xh * product) + np.abs(mean))
        if dresidual_out is not None:
            ds, magnitude = ds + f64(dresidual_out), magnitude + np.abs(f64(dresidual_out))
        rows = tuple(range(g1.ndim - 1))
        each = {"dweight": g1 * xh, "dbias": g1, "dx_bias": ds}
        size = {**{k: np.abs(v) for k, v in each.items()}, "dx_bias": magnitude}
        return Backward(
            ds, magnitude, {k: v.sum(rows) for k, v in each.items()}, {k: v.sum(rows) for k, v in size.items()}
        )


def assert_y(got, want: Forward, what: str = "y") -> None:
    """1 ulp and the slack of the contract (float32: the slack); the padded tail bitwise +0.

    ``before_weight``: in at most 0.1 % of the elements (and one) the inner rounding may have gone the other way, which is one of
    ITS units, and in a 16-bit result another unit of the last rounding.
    """
    got = np.asarray(got)
    rounded = want.result
    assert got.dtype == rounded.dtype and got.shape == rounded.shape, (
        f"{what}: {got.dtype}{got.shape} is not {rounded.shape}"
    )
    features = want.y.shape[-1]
    assert not tolerances.bits(got[..., features:]).any(), f"{what}: the padded tail is not all +0"
    got, rounded = got[..., :features], rounded[..., :features]
    with np.errstate(all="ignore"):
        # float32: half a unit for the last rounding itself, which no bound relative to the terms before it may forget
        unit = ulp(want.y, want.y_dtype) * (0.5 if want.y_dtype == "float32" else 1.0)
        error = np.abs(f64(got) - f64(rounded if want.y_dtype != "float32" else want.y))
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        bad = ~((error <= unit + want.slack + SMALLEST_NORMAL) | same)
        flipped = bad & (error <= 2 * unit + want.slack + want.inner) if np.ndim(want.inner) else np.zeros_like(bad)
    if (bad & ~flipped).any() or flipped.sum() > got.size // 1000 + 1:
        tolerances._fail(
            what, got, rounded, bad, f"worst {float(np.nanmax(error / (unit + want.slack))):.2f} of the bound"
        )


def assert_sum(got, want: Backward, name: str, what: str = "") -> None:
    """1 ulp of the result's dtype + 2^-20 of the sum of the absolute terms."""
    got, exact = np.asarray(got), want.sums[name]
    assert got.shape == exact.shape, f"{what} {name}: {got.shape} is not {exact.shape}"
    with np.errstate(all="ignore"):
        bound = ulp(exact, got.dtype.name) + 2.0**-20 * want.terms[name]
        error = np.abs(f64(got) - exact)
        bad = ~((error <= bound) | (np.isnan(exact) & np.isnan(got)))
    if bad.any():
        tolerances._fail(f"{what} {name}", got, exact, bad, f"worst {float(np.nanmax(error / bound)):.2f} of the bound")
