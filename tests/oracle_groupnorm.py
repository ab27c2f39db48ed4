"""GroupNorm in float64 numpy, written from the contract (operators, section 4), and the bounds of its results.

Everything is computed on ``[B, S, G, K]``: batch, all positions, group, channel of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
import tolerances
from oracle import f64


@dataclass(frozen=True)
class GroupNorm:
    """One call with its intermediate values, and the bounds that follow from them. Arrays of float64, ``[B, S, G, K]``."""

    shape: tuple[int, ...]
    channel_axis: int
    xh: np.ndarray
    mean: np.ndarray
    rstd: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    silu: bool

    @property
    def v(self) -> np.ndarray:
        """Before the activation."""
        return self.xh * self.weight + self.bias

    @property
    def sigmoid(self) -> np.ndarray:
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(-self.v))

    def y(self) -> np.ndarray:
        return self.image(self.v * self.sigmoid if self.silu else self.v)

    def image(self, a: np.ndarray) -> np.ndarray:
        """``[B, S, G, K]`` back in the layout of x."""
        return from_groups(np.broadcast_to(a, self.xh.shape), self.shape, self.channel_axis)

    def bound(self) -> np.ndarray:
        """E of the contract. The slope of silu is below 1.1, and it adds a quotient of its own."""
        with np.errstate(invalid="ignore"):
            e = 2.0**-20 * (1 + np.abs(self.xh * self.weight) + np.abs(self.bias))
            e = e + 2.0**-22 * np.abs(self.mean) * self.rstd
            return self.image(1.1 * e + 2.0**-21 * np.abs(self.v) if self.silu else e)


@dataclass(frozen=True)
class Gradients:
    """Gradients in float64 and what their bounds need; ``scale`` is max(abs(dx), rms of dx over the group)."""

    dx: np.ndarray
    scale: np.ndarray
    terms: np.ndarray
    dweight: np.ndarray
    dweight_terms: np.ndarray
    dbias: np.ndarray
    dbias_terms: np.ndarray


def to_groups(a: np.ndarray, num_groups: int, channel_axis: int) -> np.ndarray:
    a = np.moveaxis(f64(a), channel_axis, -1)
    return a.reshape(a.shape[0], -1, num_groups, a.shape[-1] // num_groups)


def from_groups(a: np.ndarray, shape: tuple[int, ...], channel_axis: int) -> np.ndarray:
    last = list(shape)
    channels = last.pop(channel_axis)
    return np.moveaxis(a.reshape(*last, channels), -1, channel_axis)


def forward(
    x, weight, bias, *, num_groups, eps=1e-5, activation=None, channel_axis=-1, out_dtype=None
) -> GroupNorm:  # fmt: skip
    """``(x - mean) / sqrt(var + eps) * weight + bias``; ``out_dtype`` is the business of :func:`assert_y`."""
    a = to_groups(x, num_groups, channel_axis)
    channels = a.shape[-2:]
    with np.errstate(all="ignore"):
        mean = a.mean((1, 3), keepdims=True)
        d = a - mean
        rstd = 1.0 / np.sqrt((d * d).mean((1, 3), keepdims=True) + eps)
        xh = d * rstd
    w = np.ones(channels) if weight is None else f64(weight).reshape(channels)
    b = np.zeros(channels) if bias is None else f64(bias).reshape(channels)
    return GroupNorm(x.shape, channel_axis % x.ndim, xh, mean, rstd, w, b, activation == "silu")


def backward(f: GroupNorm, dy) -> Gradients:
    """The formulas of the contract; roundings count as identity."""
    g = to_groups(dy, f.xh.shape[2], f.channel_axis)
    with np.errstate(all="ignore"):
        if f.silu:
            g = g * f.sigmoid * (1 + f.v * (1 - f.sigmoid))
        gw = g * f.weight
        means = [t.mean((1, 3), keepdims=True) for t in (gw * f.xh, gw)]
        ds = f.rstd * (gw - f.xh * means[0] - means[1])
        terms = f.rstd * (np.abs(gw) + np.abs(f.xh * means[0]) + np.abs(means[1]))
        scale = np.maximum(np.abs(ds), np.sqrt((ds * ds).mean((1, 3), keepdims=True)))
        sums = [t.sum((0, 1)).reshape(-1) for t in (g * f.xh, np.abs(g * f.xh), g, np.abs(g))]
    return Gradients(f.image(ds), f.image(scale), f.image(terms), *sums)


def _assert_within(got, want: np.ndarray, bound: np.ndarray, what: str) -> None:
    got = np.asarray(got)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    with np.errstate(all="ignore"):
        error = np.abs(f64(got) - want)
        bad = ~((error <= bound) | (np.isnan(want) & np.isnan(f64(got))) | (f64(got) == want))
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise AssertionError(
                f"{what}: {int(bad.sum())} of {bad.size} wrong, worst {float(np.nanmax(error / bound)):.2f} of the bound; "
                f"first at {at}: got {got[at]!r}, want {want[at]!r}"
            )


def assert_y(got, f: GroupNorm, dtype: str, what: str = "y") -> None:
    """1 ulp + E for 16-bit results, E for float32."""
    got = np.asarray(got)
    assert got.dtype.name == dtype, f"{what} is {got.dtype}, expected {dtype}"
    want = f.y()
    one = 0.0 if dtype == "float32" else tolerances.ulp(want, dtype)
    _assert_within(got, f64(oracle.round_to(want, dtype)) if dtype != "float32" else want, f.bound() + one, what)


def assert_alike(found: list[dict[str, np.ndarray]], f: GroupNorm, case) -> None:
    """y and the statistics of the first against the oracle, those of the others bit for bit against the first."""
    assert_y(found[0]["y"], f, case.out_dtype)
    stats, expected = f64(found[0]["stats"]), f64(case.stats(f))
    np.testing.assert_allclose(stats[:, 0] + stats[:, 1], expected[:, 0] + expected[:, 1], rtol=0, atol=2e-6 * case.std)
    np.testing.assert_allclose(stats[:, 2], expected[:, 2], rtol=2.0**-20)
    for other in found[1:]:
        for name in ("y", "stats"):
            tolerances.assert_same_bits(other[name], found[0][name], name)


def assert_gradients(got, args, g: Gradients) -> None:
    """``(dx, dweight | None, dbias | None)`` for the arguments ``(x, weight | None, bias | None)``: dtypes, shapes, bounds.

    dx: 2 ulp of max(abs(dx), rms of dx over the group), in float32 2^-20 of it; beside that 2^-22 of its terms, which remain where
    they cancel (a group of one to three elements). dweight, dbias: 1 ulp + 2^-20 of the sum of the absolute terms."""
    dx, dweight, dbias = got
    for name, a, v in zip(("dx", "dweight", "dbias"), args, got, strict=True):
        assert (a is None) == (v is None), name
        assert a is None or (v.dtype, v.shape) == (a.dtype, a.shape), f"{name}: {v.dtype}{v.shape}"
    dtype = np.asarray(dx).dtype.name
    bound = 2.0**-20 * g.scale if dtype == "float32" else 2 * tolerances.ulp(g.scale, dtype)
    _assert_within(dx, g.dx, bound + 2.0**-22 * g.terms + tolerances.SMALLEST_NORMAL, "dx")
    for name, v, want, terms in (
        ("dweight", dweight, g.dweight, g.dweight_terms),
        ("dbias", dbias, g.dbias, g.dbias_terms),
    ):
        if v is not None:
            _assert_within(v, want, tolerances.ulp(want, np.asarray(v).dtype.name) + 2.0**-20 * terms, name)
