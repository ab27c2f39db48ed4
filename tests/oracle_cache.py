"""q/k norm, rotation and the KV cache by their written definitions (operators, sections 1.4, 5 to 7), in numpy.

Norm and rotation are float64 with the contract's one intermediate rounding. Where an element of the cache lies comes from the
formulas of section 7.1 as they stand there, never from a reshape.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

TOP = {
    "int8": 127.0,
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2": 57344.0,
    "float8_e5m2fnuz": 57344.0,
}


def dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


# ---- norm and rotation


def component(j: int, sections: tuple[int, int, int], interleaved: bool) -> int:
    """Which of the three positions turns pair j."""
    if not interleaved:
        return 0 if j < sections[0] else 1 if j < sections[0] + sections[1] else 2
    r = j % 3
    return r if r in (1, 2) and j < 3 * sections[r] else 0


def angles(table, positions, sections=None, interleaved=False) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin float64 [T, h]; the identity for positions outside of the table."""
    table = np.asarray(table).astype(np.float64)
    half = table.shape[1] // 2
    positions = np.asarray(positions).astype(np.int64)
    tokens = positions.shape[-1]
    cos, sin = np.ones((tokens, half)), np.zeros((tokens, half))
    for t, j in np.ndindex(tokens, half):
        p = positions[t] if sections is None else positions[component(j, sections, interleaved), t]
        if 0 <= p < table.shape[0]:
            cos[t, j], sin[t, j] = table[p, j], table[p, half + j]
    return cos, sin


def norm_rope(x, weight, cos, sin, *, eps, weight_offset=0.0, style="neox") -> tuple[np.ndarray, np.ndarray]:
    """(result float64 before its rounding [T, H, D], the sum of magnitudes behind each element)."""
    wide = np.asarray(x).astype(np.float64)
    n = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    if weight is not None:
        n = n * (np.asarray(weight).astype(np.float64) + weight_offset)
    n = n.astype(np.asarray(x).dtype).astype(np.float64)
    half = cos.shape[-1]
    first = np.arange(half) if style == "neox" else 2 * np.arange(half)
    second = first + (half if style == "neox" else 1)
    c, s = cos[:, None], sin[:, None]
    out, size = n.copy(), np.abs(n)
    out[..., first] = n[..., first] * c - n[..., second] * s
    out[..., second] = n[..., second] * c + n[..., first] * s
    size[..., first] = size[..., second] = np.abs(n[..., first]) + np.abs(n[..., second])
    return out, size


def assert_heads(got, x, weight, cos, sin, what="", **norm) -> None:
    """1 ulp and 2**-22 of the magnitudes; one element in a thousand may have an input that was rounded the other way."""
    want, size = norm_rope(x, weight, cos, sin, **norm)
    kind = np.asarray(x).dtype
    got = np.asarray(got)
    assert got.dtype == kind and got.shape == want.shape, f"{what}: {got.dtype}{got.shape}"
    bits = {"bfloat16": 7, "float16": 10, "float32": 23}[kind.name]
    ulp = np.exp2(np.floor(np.log2(np.maximum(np.abs(want), 2.0**-14))) - bits)
    bound = ulp + 2.0**-22 * size if bits < 23 else 2.0**-20 * (size + 2.0**-10)
    error = np.abs(got.astype(np.float64) - want)
    off = error > bound
    assert off.sum() <= off.size / 1000, f"{what}: {off.sum()} of {off.size} off, by up to {error.max()}"
    assert (error <= bound + size * 2.0 ** (1 - bits)).all(), f"{what}: off by {error.max()}"


# ---- quantisation of the rounded values


def encode(v, kind: str) -> np.ndarray:
    """Codes of float32 quotients, clipped, to nearest even."""
    top = np.float32(TOP[kind])
    v = np.where(v > top, top, np.where(v < -top, -top, v)).astype(np.float32)
    if kind == "int8":
        return np.where(np.isnan(v), 0, np.rint(v)).astype(np.int8)
    return v.astype(dtype(kind))


def stored(values, kind: str, quant: str | None, scale=None) -> tuple[np.ndarray, np.ndarray | None]:
    """``[T, H, D]`` in the dtype they have from a model -> (as the cache holds them, scales [T, H] if per token)."""
    values = np.asarray(values)
    if quant is None:
        return values.astype(np.float32).astype(dtype(kind)), None
    v = values.astype(np.float32)
    with np.errstate(all="ignore"):
        if quant == "per_tensor":
            return encode(v / np.float32(scale), kind), None
        s = (np.abs(v).max(-1) / np.float32(TOP[kind])).astype(np.float32)
        s = np.where(s < np.float32(2.0**-126), np.float32(1), s)
        return encode(v / s[..., None], kind), s


# ---- where things lie


def k_index(layout: str, pages: int, page: int, heads: int, features: int, x: int, slot, head, d):
    b, o = slot // page, slot % page
    if layout == "shuffled":
        return ((b * heads + head) * (features // x) + d // x) * page * x + o * x + d % x
    if layout == "paged":
        return ((b * page + o) * heads + head) * features + d
    return (slot * heads + head) * features + d


def v_index(layout: str, pages: int, page: int, heads: int, features: int, x: int, slot, head, d):
    b, o = slot // page, slot % page
    if layout == "shuffled":
        return (b * heads + head) * page * features + (o // x) * features * x + d * x + o % x
    return k_index(layout, pages, page, heads, features, x, slot, head, d)


def scale_index(layout: str, pages: int, page: int, heads: int, features: int, x: int, slot, head, d):
    b, o = slot // page, slot % page
    if layout == "shuffled":
        return (b * heads + head) * page + o
    return (b * page + o) * heads + head if layout == "paged" else slot * heads + head


INDEX = {"k": k_index, "v": v_index, "scale": scale_index}


def places(which: str, layout: str, pages: int, page: int, heads: int, features: int, x: int, slots) -> np.ndarray:
    """Flat elements ``[len(slots), Hk, D]`` (scales: ``[.., Hk, 1]``)."""
    slot, head, d = np.ix_(
        np.asarray(slots, np.int64), np.arange(heads), np.arange(1 if which == "scale" else features)
    )
    return INDEX[which](layout, pages, page, heads, features, x, slot, head, d)


def steps(codes: np.ndarray) -> np.ndarray:
    """Codes of 8 bits as integers in the order of their values."""
    if codes.dtype == np.int8:
        return codes.astype(int)
    raw = codes.view(np.uint8).astype(int)
    return np.where(raw & 128, -(raw & 127), raw)
