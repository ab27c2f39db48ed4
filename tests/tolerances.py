"""Comparisons in units in the last place, and the bounds of the contract.

A bound is widened only with its derivation beside it.
"""

from __future__ import annotations

import numpy as np
import oracle

_BITS = {1: np.int8, 2: np.int16, 4: np.int32}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
FAR = np.int64(1) << 40
"""Distance between a NaN and a number."""
# The smallest normal float32. XLA's CPU runtime and GPU code built with flushing treat float32 subnormals as zero, so a value
# this small, read or written, may have become zero.
SMALLEST_NORMAL = 2.0**-126


def bits(a: np.ndarray) -> np.ndarray:
    a = np.ascontiguousarray(a)
    return a.view(_UNSIGNED[a.dtype.itemsize])


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Representable values between a and b. -0 equals +0, NaN equals NaN, and NaN is :data:`FAR` from every number."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"cannot compare {a.dtype}{a.shape} with {b.dtype}{b.shape}")

    def ordered(v):
        i = np.ascontiguousarray(v).view(_BITS[v.dtype.itemsize]).astype(np.int64).reshape(v.shape)
        low = np.int64(-(1 << (8 * v.dtype.itemsize - 1)))
        return np.where(i < 0, low - i, i)

    nan_a, nan_b = np.isnan(a), np.isnan(b)
    distance = np.abs(ordered(a) - ordered(b))
    return np.where(nan_a & nan_b, 0, np.where(nan_a | nan_b, FAR, distance))


def ulp(values: np.ndarray, name: str) -> np.ndarray:
    """Size of one unit in the last place of ``name`` at the magnitude of the float64 ``values``."""
    significant, smallest = oracle._FORMATS[name]
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(np.abs(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)))
        return np.ldexp(1.0, np.maximum(exponent - significant, smallest))


def _fail(what: str, got, want, bad: np.ndarray, detail: str) -> None:
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.size} elements wrong ({detail}); "
        f"first at {index}: got {got[index]!r}, want {want[index]!r}"
    )


def assert_same_bits(got, want, what: str = "") -> None:
    """Bitwise equality, the sign of zero and the payload of NaN included."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype}{got.shape} is not {want.dtype}{want.shape}"
    )
    bad = (bits(got) != bits(want)).reshape(got.shape)
    if bad.any():
        _fail(what, got, want, bad, "bits differ")


def assert_same_values(got, want, what: str = "") -> None:
    """Bitwise equality, but any NaN equals any NaN (a payload is not part of the contract)."""
    got, want = np.asarray(got), np.asarray(want)
    nan = np.isnan(got) & np.isnan(want)
    assert_same_bits(np.where(nan, np.zeros((), got.dtype), got), np.where(nan, np.zeros((), want.dtype), want), what)


def assert_y(got, forward: oracle.Forward, cast: str = "output", what: str = "y") -> None:
    """y of the RMSNorm family against its oracle; the padded tail bitwise +0."""
    got = np.asarray(got)
    want = forward.result
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype}{got.shape} is not {want.dtype}{want.shape}"
    )
    features = forward.y.shape[-1]
    assert not bits(got[..., features:]).any(), f"{what}: the padded tail is not all +0"
    got, want = got[..., :features], want[..., :features]
    # A subnormal input or product may count as zero: at most that much times rstd and the weight, which y holds as a ratio.
    with np.errstate(all="ignore"):
        gain = np.abs(np.where(forward.n == 0, 0.0, forward.y / forward.n))
        flushed = SMALLEST_NORMAL * (1.0 + np.nan_to_num(gain, nan=0.0, posinf=0.0))
        excused = np.abs(f64(got) - forward.y) <= flushed
    if want.dtype == np.float32 and cast == "output":
        with np.errstate(all="ignore"):
            error = np.abs(f64(got) - forward.y)
            bad = ~(
                (error <= 2.0**-20 * np.abs(forward.y))
                | (f64(got) == forward.y)
                | (np.isnan(got) & np.isnan(forward.y))
                | excused
            )
            # beyond the largest float32 the rounded oracle is infinite; so must the result be
            bad &= ~(np.isinf(want) & (got == want))
        if bad.any():
            _fail(what, got, want, bad, f"float32, worst relative {float(np.nanmax(error / np.abs(forward.y))):.2e}")
        return
    distance = np.where(excused, 0, ulp_distance(got, want))
    if cast == "output":
        allowed, outliers = 1, 0
    elif want.dtype == np.float32:
        # the inner rounding to x.dtype can flip by one of ITS units: compare those elements at that precision
        return _assert_before_weight_float32(got, forward, excused, what)
    else:
        allowed, outliers = 1, max(got.size // 1000, 0)
    bad = distance > allowed
    if (distance > 2).any() or bad.sum() > outliers:
        _fail(what, got, want, bad, f"worst {int(distance.max())} ulp")


def _assert_before_weight_float32(got, forward, excused, what) -> None:
    """float32 result of ``before_weight``: relative 2^-20, but for at most 0.1 % whose inner rounding went the other way.

    With x in float32 the inner rounding is itself float32 and nothing flips visibly. With a 16-bit x a flip moves the product by
    one 16-bit unit, at most 2^-7 relative.
    """
    with np.errstate(all="ignore"):
        error = np.abs(f64(got) - forward.y)
        same = (f64(got) == forward.y) | (np.isnan(got) & np.isnan(forward.y)) | excused
        bad = ~((error <= 2.0**-20 * np.abs(forward.y)) | same)
        far = ~((error <= 2.0**-7 * np.abs(forward.y)) | same)
    if far.any() or bad.sum() > got.size // 1000:
        _fail(what, got, forward.y, bad, "float32 after the inner rounding")


def assert_dx(got, backward: oracle.Backward, what: str = "dx") -> None:
    """2 ulp of max(abs(dx), row rms of dx); for float32 results 2^-20 of the same, as every float32 result.

    Beside that 2^-22 of the terms: each is a float32 product of three or four roundings (about 2 * 2^-24 in the mean), which is
    what remains where they cancel. It matters for N = 1 to 3 alone, where dx is a difference of nearly equal numbers.
    """
    got = np.asarray(got)
    want = backward.dx
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    if not got.size:
        return
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(want), np.sqrt(np.mean(want * want, -1, keepdims=True)))
        bound = 2.0**-20 * scale if got.dtype == np.float32 else 2 * ulp(scale, got.dtype.name)
        error = np.abs(f64(got) - want)
        bad = ~(
            (error <= bound + 2.0**-22 * backward.dx_terms + SMALLEST_NORMAL)
            | (np.isnan(want) & np.isnan(got))
            | (f64(got) == want)
        )
    if bad.any():
        _fail(what, got, want, bad, f"worst {float(np.nanmax(error / bound)):.2f} of the bound")


def assert_dweight(got, backward: oracle.Backward, what: str = "dweight") -> None:
    """1 ulp of the result's dtype + 2^-20 of the sum of the absolute terms."""
    got = np.asarray(got)
    want = backward.dweight
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    with np.errstate(all="ignore"):
        bound = ulp(want, got.dtype.name) + 2.0**-20 * backward.dweight_terms
        error = np.abs(f64(got) - want)
        bad = ~((error <= bound) | (np.isnan(want) & np.isnan(got)))
    if bad.any():
        _fail(what, got, want, bad, f"worst {float(np.nanmax(error / bound)):.2f} of the bound")


def f64(a) -> np.ndarray:
    return np.asarray(a).astype(np.float64)
