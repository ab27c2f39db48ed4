"""What kernels must give, in numpy float64, written from the contract: neither jax nor the library's reference is used.

Intermediate roundings of the contract are applied, everything between them is float64, and a result is rounded once. The tests
compare this oracle with their own (tests/test_aot_oracle.py): the two were written apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
TOP = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e4m3fnuz": 240.0, "float8_e5m2": 57344.0, "float8_e5m2fnuz": 57344.0,
       "fp4": 6.0}  # fmt: skip
_MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}
_SUBNORMAL = {"bfloat16": -133, "float16": -24, "float32": -149}
_FORMATS = {"float8_e4m3fn": (3, 7), "float8_e4m3fnuz": (3, 8), "float8_e5m2": (2, 15), "float8_e5m2fnuz": (2, 16),
            "fp4": (1, 1)}  # fmt: skip


def dtype(name: str) -> np.dtype:
    """numpy's, with those of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, name))


def f64(a: Any) -> Array:
    return np.asarray(a).astype(np.float64)


def rounded(values: Array, name: str) -> Array:
    """float64 to a float dtype, to nearest even, in one step (numpy goes to bfloat16 through float32, which would be two)."""
    values = np.asarray(values, np.float64)
    with np.errstate(all="ignore"):
        unit = np.exp2(np.maximum(np.frexp(values)[1] - 1 - _MANTISSA[name], _SUBNORMAL[name]).astype(np.float64))
        exact = np.where(np.isfinite(values), np.rint(values / unit) * unit, values)
        return np.copysign(exact, values).astype(dtype(name))


# Norms


def rank_sum(parts: Array) -> Array:
    """The partial sums of the ranks, added up in float32 and in their order."""
    s = parts[0].astype(np.float32)
    with np.errstate(all="ignore"):
        for part in parts[1:]:
            s = s + part.astype(np.float32)
    return s


def residual_sum(x: Array, residual: Array, x_bias: Array | None = None) -> Array:
    """``s`` in float32, which is where the contract rounds it."""
    with np.errstate(all="ignore"):
        s = x.astype(np.float32)
        if x_bias is not None:
            s = s + x_bias.astype(np.float32)
        return s + residual.astype(np.float32)


def statistics(n: Array, eps: float, centred: bool) -> tuple[Array, Array]:
    """(mean, rstd) of the rows, ``[..., 1]``; mean 0 for RMSNorm."""
    with np.errstate(all="ignore"):
        mean = n.mean(-1, keepdims=True) if centred else np.zeros((*n.shape[:-1], 1))
        return mean, 1.0 / np.sqrt(np.mean((n - mean) ** 2, -1, keepdims=True) + eps)


def affine(normalised: Array, weight: Array | None, bias: Array | None, offset: float, inner: str | None) -> Array:
    """``normalised * (weight + offset) + bias``, ``normalised`` rounded to the dtype ``inner`` first where it is given."""
    with np.errstate(all="ignore"):
        y = normalised if inner is None else f64(rounded(normalised, inner))
        if weight is not None:
            y = y * (f64(weight) + offset)
        return y if bias is None else y + f64(bias)


@dataclass(frozen=True)
class Gradients:
    """Of one norm; the sums of absolute terms bound the error of a float32 sum."""

    dx: Array
    dweight: Array
    """Per row: the caller sums the rows that it wants."""
    dbias: Array


def backward(
    n: Array, mean: Array, rstd: Array, weight: Array | None, dy: Array, offset: float, centred: bool
) -> Gradients:
    """Gradient of ``(n - mean) * rstd * (weight + offset) + bias``."""
    xh = (n - mean) * rstd
    g = dy * (1.0 if weight is None else f64(weight) + offset)
    dx = g - xh * np.mean(g * xh, -1, keepdims=True)
    if centred:
        dx = dx - g.mean(-1, keepdims=True)
    return Gradients(rstd * dx, dy * xh, dy)


# Quantisation


def _values(name: str) -> Array:
    """Value of each finite non-negative code of a float format, in order."""
    mantissa, bias = _FORMATS[name]
    codes = np.arange(128 if name != "fp4" else 8)
    fraction, exponent = codes & ((1 << mantissa) - 1), codes >> mantissa
    normal = (1 + fraction / 2.0**mantissa) * np.exp2(exponent - float(bias))
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias - mantissa), normal)
    return values[values <= TOP[name]]


def codes(values: Array, name: str) -> Array:
    """clip, then to the nearest code, ties to the even one: int8, or bits in uint8 (fp4: one code an element)."""
    v = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=TOP[name], neginf=-TOP[name])
    v = np.clip(v, -TOP[name], TOP[name])
    if name == "int8":
        return np.rint(v).astype(np.int8)
    table = _values(name)
    low = np.clip(np.searchsorted(table, np.abs(v), side="right") - 1, 0, len(table) - 2)
    below, above = np.abs(v) - table[low], table[low + 1] - np.abs(v)
    code = np.where((above < below) | ((above == below) & (low % 2 == 1)), low + 1, low).astype(np.uint8)
    negative = np.signbit(v) & ((code > 0) | (not name.endswith("fnuz")))
    return np.where(negative, code | (8 if name == "fp4" else 128), code).astype(np.uint8)


def decoded(found: Array, name: str) -> Array:
    """float64 values of codes that are no NaN and no infinity."""
    if name == "int8":
        return found.astype(np.float64)
    sign = 8 if name == "fp4" else 128
    table = _values(name)
    value = table[np.minimum(found & (sign - 1), len(table) - 1)]
    return np.where(found & sign, -value, value)


def exponents(maximum: Array, name: str, rounding: str) -> Array:
    """The e8m0 scale of each maximum, as its uint8 exponent."""
    top, mantissa = TOP[name], 1 if name == "fp4" else _FORMATS[name][0]
    finite = np.where(np.isfinite(maximum), maximum, 1.0)
    with np.errstate(all="ignore"):
        if rounding == "up":
            e = np.ceil(np.log2(finite / top))
            e = np.where(top * np.exp2(e - 1) >= finite, e - 1, np.where(top * np.exp2(e) < finite, e + 1, e))
        else:
            power = np.frexp(finite)[1] - 1.0
            if rounding == "even":  # half a step of the format below the next power of two
                power = power + (finite >= np.exp2(power + 1) * (1 - 2.0 ** -(mantissa + 2)))
            e = power - np.floor(np.log2(top))
    e = np.clip(np.nan_to_num(e, neginf=-126) + 127, 1, 254)
    e = np.where(finite / top < 2.0**-126, 127, e)
    return np.where(np.isfinite(maximum), e, 255).astype(np.uint8)


@dataclass(frozen=True)
class Quantised:
    """Codes and scales of rows."""

    codes: Array
    """One an element, fp4 not packed."""
    scale: Array | None
    """``[M, G]``, float32 or exponents; None with a given scale."""
    undefined: Array
    """Elements whose codes nothing is said about: of a group whose maximum is not finite."""
    boundary: bool
    """An exponent could go either way within the error of a maximum: take other data."""


def quantise(z: Array, spec: Any, static_scale: float | None = None) -> Quantised:
    """Rows ``[M, P]`` of float64; ``spec`` has the fields of QuantSpec."""
    name = spec.dtype
    with np.errstate(all="ignore"):
        if static_scale is not None:
            return Quantised(codes(z / static_scale, name), None, np.zeros(z.shape, bool), False)
        groups = z.reshape(z.shape[0], -1, spec.group_size or z.shape[1])
        maximum = np.abs(groups).max(-1)
        if spec.scale_ub is not None:
            maximum = np.minimum(maximum, np.float64(np.float32(spec.scale_ub)))
        finite, boundary = np.isfinite(maximum), False
        if spec.scale_dtype == "e8m0":
            scale: Array = exponents(maximum, name, spec.e8m0_rounding)
            near = [exponents(maximum * (1 + s * 2.0**-18), name, spec.e8m0_rounding) for s in (-1, 1)]
            boundary = bool((near[0] != near[1])[finite & (maximum > 0)].any())
            factor = np.exp2(scale.astype(np.float64) - 127)
        else:
            factor = maximum / TOP[name]
            factor = np.where(factor < 2.0**-126, 1.0, factor)
            scale = factor.astype(np.float32)
        found = codes((groups / factor[..., None]).reshape(z.shape), name)
        return Quantised(found, scale, np.repeat(~finite, groups.shape[-1], -1), boundary)


def packed(found: Array, name: str) -> Array:
    """Codes as they are stored: fp4 two a byte, element 2i in the low nibble."""
    return (found[:, ::2] | found[:, 1::2] << 4).astype(np.uint8) if name == "fp4" else found


def laid_out(scale: Array, layout: str, shape: tuple[int, ...]) -> Array:
    """Scales ``[M, G]`` as the buffer of ``shape`` holds them; the padding of the shuffled layout is 0x7F."""
    if layout == "row":
        return scale.reshape(shape)
    if layout == "column":
        return np.ascontiguousarray(scale.T).reshape(shape)
    m, j = np.indices(scale.shape)
    width = shape[-1]
    at = (m // 32) * width * 32 + (j // 8) * 256 + (j % 4) * 64 + (m % 16) * 4 + (j % 8) // 4 * 2 + (m % 32) // 16
    out = np.full(int(np.prod(shape)), 0x7F, np.uint8)
    out[at] = scale
    return out.reshape(shape)
