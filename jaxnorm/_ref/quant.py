"""Quantisation of float32 values: codes, scales and their layouts (operators: ``*_quant`` and ``quantize``).

z = y * smooth_scale;  a = min(max|z|, scale_ub) over the row or group, NaN wins
float32: s = a / dtype_max, 1 if s < 2**-126        e8m0: s = 2**(E - 127)
code = RNE(clip(z / s, -dtype_max, dtype_max))
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp

from .._types import QuantSpec, dtype_max
from ..errors import value_error
from ._common import Axes, f32

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHUFFLED_PAD = 0x7F
_MANTISSA = {
    "float8_e4m3fn": (3, 8),
    "float8_e4m3fnuz": (3, 7),
    "float8_e5m2": (2, 15),
    "float8_e5m2fnuz": (2, 15),
    "fp4": (1, 2),
}


def quantize(
    z: jax.Array, spec: QuantSpec, static_scale: jax.Array | None = None, axes: Axes = ()
) -> tuple[jax.Array, jax.Array]:
    """float32 ``[..., N]`` -> (values, scale in row layout). ``axes`` shard the features: a row's maximum is reduced over them."""
    if static_scale is not None:
        return encode(divide(z, f32(static_scale).reshape(())), spec), static_scale
    *lead, n = z.shape
    g = spec.group_size or n
    grouped = z.reshape(*lead, n // g, g)
    a = _max_abs(grouped, axes if spec.group_size is None else ())
    if spec.scale_ub is not None:
        a = jnp.where(a > spec.scale_ub, jnp.float32(spec.scale_ub), a)  # a comparison keeps NaN
    if spec.scale_dtype == "e8m0":
        scale = exponent(a, spec)
        s = power(scale)
    else:
        s = divide(a, jnp.float32(dtype_max(spec.dtype)))
        scale = s = jnp.where(s < 2.0**-126, 1.0, s)
    return encode(divide(grouped, s[..., None]).reshape(z.shape), spec), scale


def _max_abs(v: jax.Array, axes: Axes) -> jax.Array:
    a = jnp.max(jnp.abs(v), axis=-1)  # jnp.max lets NaN win
    if not axes:
        return a
    # as integers, non-negative floats keep their order and NaN comes last: one value a row crosses the wire
    bits = jax.lax.pmax(jax.lax.bitcast_convert_type(jnp.abs(a), jnp.int32), axes)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """The IEEE quotient: hidden from the compiler's rewriting of a division by a constant or a broadcast into a product.

    The choice between b and b gives b the batch of a under vmap: broadcast behind the barrier, it would be rewritten after all.
    """
    a, b = jnp.broadcast_arrays(a, b)
    return jax.lax.div(a, jax.lax.optimization_barrier(jax.lax.select(a == a, b, b)))


def exponent(a: jax.Array, spec: QuantSpec) -> jax.Array:
    """uint8 E with scale 2**(E - 127); 127 for a group of zeros or too small to scale, 255 for NaN and Inf."""
    t = a * jnp.float32(1.0 / dtype_max(spec.dtype))
    if spec.e8m0_rounding == "up":
        bits = jax.lax.bitcast_convert_type(t, jnp.int32)
        e = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    else:
        m, p = _MANTISSA[spec.dtype]
        bits = jax.lax.bitcast_convert_type(a, jnp.int32)
        half = 1 << (22 - m) if spec.e8m0_rounding == "even" else 0
        e = ((bits + half) >> 23) - p
    e = jnp.clip(e, 1, 254)
    e = jnp.where((a == 0) | (t < 2.0**-126), 127, e)
    return jnp.where(jnp.isfinite(a), e, 255).astype(jnp.uint8)


def power(e: jax.Array) -> jax.Array:
    """2**(E - 127) as float32; NaN for 255; the subnormal 2**-127 for 0."""
    bits = e.astype(jnp.int32) << 23
    bits = jnp.where(e == 0, 1 << 22, jnp.where(e == 255, 0x7FC00000, bits))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def encode(v: jax.Array, spec: QuantSpec) -> jax.Array:
    """RNE of the clipped float32 to codes; fp4 packed."""
    top = dtype_max(spec.dtype)
    v = jnp.where(v > top, top, jnp.where(v < -top, -top, v))  # comparisons let NaN through
    if spec.dtype == "int8":
        return jnp.where(jnp.isnan(v), 0.0, jnp.round(v)).astype(jnp.int8)
    if spec.dtype == "fp4":
        return pack_fp4(v)
    return v.astype(spec.dtype)


def pack_fp4(v: jax.Array) -> jax.Array:
    """float32 in [-6, 6], even N -> uint8 [..., N // 2]; ties go to the even code."""
    m = jnp.abs(v)
    code = jnp.zeros(v.shape, jnp.uint8)
    for i, (low, high) in enumerate(itertools.pairwise(FP4_VALUES)):
        tie = (low + high) / 2
        above = m >= tie if i % 2 else m > tie  # from an odd code up at the tie, from an even one only beyond it
        code = code + above.astype(jnp.uint8)
    code = code | (jnp.signbit(v).astype(jnp.uint8) << 3)
    pair = code.reshape(*v.shape[:-1], v.shape[-1] // 2, 2)
    return pair[..., 0] | (pair[..., 1] << 4)


def unpack_fp4(packed: jax.Array) -> jax.Array:
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)
    return jnp.asarray((*FP4_VALUES, *(-v for v in FP4_VALUES)), jnp.float32)[codes]


def shuffled_shape(rows: int, groups: int) -> tuple[int, int]:
    return -(-rows // 256) * 256, -(-groups // 8) * 8


def shuffle(scale: jax.Array) -> jax.Array:
    """uint8 [M, S] -> the MX tile layout [Mp, Sp], padding 0x7F."""
    m, s = scale.shape
    mp, sp = shuffled_shape(m, s)
    padded = jnp.pad(scale, ((0, mp - m), (0, sp - s)), constant_values=SHUFFLED_PAD)
    return padded.reshape(mp // 32, 2, 16, sp // 8, 2, 4).transpose(0, 3, 5, 2, 4, 1).reshape(mp, sp)


def unshuffle(scale: jax.Array, rows: int, groups: int) -> jax.Array:
    mp, sp = scale.shape
    return scale.reshape(mp // 32, sp // 8, 4, 16, 2, 2).transpose(0, 5, 3, 1, 4, 2).reshape(mp, sp)[:rows, :groups]


def lay_out(scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """Row-layout scales ``[..., G]`` in the layout of the spec."""
    if spec.scale_layout == "row":
        return scale
    rows = scale.reshape(math.prod(scale.shape[:-1]), scale.shape[-1])
    return rows.T if spec.scale_layout == "column" else shuffle(rows)


def _rows_first(scale: jax.Array, spec: QuantSpec, values: jax.Array, groups: int) -> jax.Array:
    """Scales of any layout as ``[..., G]`` with the leading dims of values; batch dims in front come from vmap."""
    lead = values.shape[:-1]
    if spec.scale_layout == "row":
        return scale
    batch = scale.ndim - 2
    rows = math.prod(lead[batch:])
    tile = (groups, rows) if spec.scale_layout == "column" else shuffled_shape(rows, groups)
    if batch < 0 or scale.shape != (*lead[:batch], *tile):
        raise _misplaced(scale, values, (*lead[: max(batch, 0)], *tile))
    back = (lambda s: s.T) if spec.scale_layout == "column" else (lambda s: unshuffle(s, rows, groups))
    for _ in range(batch):
        back = jax.vmap(back)
    return back(scale).reshape(*lead, groups)


def _is_static(values: jax.Array, scale: jax.Array, spec: QuantSpec) -> bool:
    """A static scale has one dim for each vmapped axis and no others; a scale a row has those of its layout."""
    if spec.group_size is not None:
        return False
    lead, batch = values.shape[:-1], scale.ndim - 2
    if spec.scale_layout == "row":
        return scale.ndim < values.ndim
    return batch < 0 or scale.shape != (*lead[:batch], 1, math.prod(lead[batch:]))


def _misplaced(scale: jax.Array, values: jax.Array, expected: tuple[int, ...]) -> ValueError:
    """A vmap with out_axes other than 0 puts the batch into the middle of a tile, where nothing tells it from the tile's dims."""
    got = f"shape {scale.shape} beside values {values.shape}"
    remedy = "vmap with out_axes=0, or use scale_layout='row'."
    return value_error("Quantized.dequantize", "scale", got, f"{expected}, vmapped dims in front", remedy)


def dequantize(values: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """float32 ``f32(code) * scale``."""
    codes = unpack_fp4(values) if spec.dtype == "fp4" else f32(values)
    *lead, n = codes.shape
    if _is_static(values, scale, spec):
        if scale.shape != tuple(lead[: scale.ndim]):
            raise _misplaced(scale, values, tuple(lead[: scale.ndim]))
        return codes * f32(scale).reshape(*scale.shape, *[1] * (codes.ndim - scale.ndim))
    groups = spec.groups(n)
    rows = _rows_first(scale, spec, values, groups)
    s = power(rows) if spec.scale_dtype == "e8m0" else f32(rows)
    return (codes.reshape(*lead, groups, n // groups) * s[..., None]).reshape(codes.shape)
