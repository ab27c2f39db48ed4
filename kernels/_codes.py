"""Scales and codes of float32 values: maxima, quotients, conversions, stores, for the kernels of quant.py.

Maxima are taken of the bits of |z| as integers, whose order is that of the values with NaN above all. Codes are written as
bytes, so that a format needs no type in the compiler; ``HARD`` names the format where the target converts to it by itself. Without
UB, and with a scale that never saturates, |z / s| exceeds MAX by an ulp at most, which rounds to MAX: no CLIP. EXACT asks for the
compiler's own division.
"""

import triton
import triton.language as tl

from ._common import tile_cols


@triton.jit
def _grouped(v, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """A tile with the columns split into groups, the last dim. Nothing moves between lanes."""
    if CHUNKS == 0:
        return tl.reshape(v, (WIDTH // GROUP, GROUP))
    else:
        return tl.reshape(v, (ROWS, WIDTH // GROUP, GROUP))


@triton.jit
def _ungrouped(v, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    if CHUNKS == 0:
        return tl.reshape(v, (BLOCK,))
    else:
        return tl.reshape(v, (ROWS, CHUNKS, BLOCK))


@triton.jit
def _magnitude(z):
    """Bits of |z|: integers in the order of the values, NaN above infinity."""
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _row_max(bits, CHUNKS: tl.constexpr):
    """Maximum over the columns of a tile of integers: a scalar, or [ROWS]."""
    if CHUNKS == 0:
        return tl.max(bits, axis=0)
    else:
        return tl.max(tl.max(bits, axis=1), axis=1)


@triton.jit
def _exponent(a, MAX: tl.constexpr, MANTISSA: tl.constexpr, TOP: tl.constexpr, E8M0: tl.constexpr):
    """E of 2**(E - 127) for the maximum a of a group, int32: 127 for nothing to scale, 255 for NaN and infinity."""
    t = a * (1.0 / MAX)
    if E8M0 == "up":
        bits = t.to(tl.int32, bitcast=True)
        e = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    else:
        HALF: tl.constexpr = (1 << (22 - MANTISSA)) if E8M0 == "even" else 0
        e = ((a.to(tl.int32, bitcast=True) + HALF) >> 23) - TOP
    e = tl.minimum(tl.maximum(e, 1), 254)
    e = tl.where((a == 0) | (t < 1.1754943508222875e-38), 127, e)
    return tl.where(a.to(tl.int32, bitcast=True) >= 0x7F800000, 255, e)


@triton.jit
def _reciprocal(e):
    """2**(127 - E), exact, the subnormal one included; NaN for E = 255."""
    bits = tl.where(e == 254, 1 << 22, (254 - e) << 23)
    return tl.where(e == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _scale(bits, UB: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr, TOP: tl.constexpr, E8M0: tl.constexpr):
    """(scale as stored, what :func:`_quotient` takes, 1/s) from the bits of the maximum: float32 twice, or E and 1/s."""
    a = bits.to(tl.float32, bitcast=True)
    if UB > 0.0:
        a = tl.where(a > UB, UB, a)  # a comparison keeps NaN
    if E8M0 != "":
        e = _exponent(a, MAX, MANTISSA, TOP, E8M0)
        r = _reciprocal(e)
        return e, r, r
    else:
        s = tl.div_rn(a, MAX)
        s = tl.where(s < 1.1754943508222875e-38, 1.0, s)
        return s, s, tl.div_rn(1.0, s)


@triton.jit
def _divide_by(z, s, r):
    """``z / s`` with ``r = RN(1 / s)`` of the row or group, where ``|z / s|`` is at most some power of two and s >= 2**-126.

    The product is within two ulps; the first correction is faithful, the second, by Markstein's theorem, the IEEE quotient. That
    needs remainders above the smallest subnormal, hence |z| >= 2**-100; below, the last bit of the quotient may differ. Twelve
    instructions of the compiler's division, with a branch, become six. The sign is put back for a z of -0."""
    q = z * r
    q = tl.fma(tl.fma(-q, s, z), r, q)
    q = tl.fma(tl.fma(-q, s, z), r, q)
    return (q.to(tl.int32, bitcast=True) | (z.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _quotient(z, s, r, E8M0: tl.constexpr, EXACT: tl.constexpr):
    """``z / s``, the IEEE quotient. With 1/s a power of two the product is the same number; where values beyond the largest may
    occur a quotient may overflow, which the fast way does not survive."""
    if E8M0 != "":
        return z * s
    elif EXACT:
        return tl.div_rn(z, s)
    else:
        return _divide_by(z, s, r)


@triton.jit
def _convert_amd(v, HARD: tl.constexpr):
    """fp8 by AMD's own instruction, "fp8" (e4m3) or "bf8" (e5m2), of the flavour of the target: the low byte of its result.

    Not Triton's cast: Triton 3.6 keeps the conversions of the first AMD target of a process and takes them for the next target,
    where it aborts or converts in software."""
    ASM: tl.constexpr = "v_cvt_pk_" + HARD + "_f32 $0, $1, $1"
    return tl.inline_asm_elementwise(ASM, "=v,v", [v], dtype=tl.int32, is_pure=True, pack=1).to(tl.uint8)


@triton.jit
def _encode(
    v, MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FNUZ: tl.constexpr, HARD: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Codes of the clipped values, uint8, to nearest even. MANTISSA 0: int8. BIAS 1: fp4, the sign in bit 3."""
    if CLIP:
        v = tl.where(v > MAX, MAX, tl.where(v < -MAX, -MAX, v))  # comparisons let NaN through
    if HARD == "e4m3fn":
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif HARD == "e5m2":
        return v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif HARD != "":
        return _convert_amd(v, HARD)
    elif MANTISSA == 0:
        # Adding 1.5 * 2**23 leaves the integer, to nearest even, in the low bits.
        v = tl.where(v != v, 0.0, v)
        return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    else:
        bits = v.to(tl.int32, bitcast=True)
        mag = bits & 0x7FFFFFFF
        SHIFT: tl.constexpr = 23 - MANTISSA
        normal = (mag + ((1 << (SHIFT - 1)) - 1) + ((mag >> SHIFT) & 1)) >> SHIFT
        normal -= (127 - BIAS) << MANTISSA
        # The same with the spacing of subnormals: code 1 is 2**(1 - BIAS - MANTISSA).
        LIFT: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
        LIFT_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
        small = (mag.to(tl.float32, bitcast=True) + LIFT).to(tl.int32, bitcast=True) - LIFT_BITS
        code = tl.where(mag < ((128 - BIAS) << 23), small, normal)
        if BIAS == 1:
            return (code | ((bits >> 28) & 8)).to(tl.uint8)
        else:
            sign = (bits >> 24) & 0x80
            if FNUZ:
                code = tl.where(code == 0, 0, code | sign)
                code = tl.where(mag > 0x7F800000, 0x80, code)
            else:
                code = tl.where(mag > 0x7F800000, 0x7F, code | sign)
            return code.to(tl.uint8)


@triton.jit
def _store_codes(
    base, start, codes, cols, inside, MASKED: tl.constexpr,
    P: tl.constexpr, PACKED: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    row_mask,
):  # fmt: skip
    """Codes at the columns of a tile; packed: element 2i in the low nibble of byte i. ``row_mask`` broadcasts over a tile."""
    if PACKED:
        half = tile_cols(CHUNKS, ROWS, BLOCK // 2, VEC // 2)
        if CHUNKS == 0:
            pairs = tl.reshape(codes, (BLOCK // 2, 2))
        else:
            pairs = tl.reshape(codes, (ROWS, CHUNKS, BLOCK // 2, 2))
        low, high = tl.split(pairs)
        half += start // 2
        byte = low | (high << 4)
        if MASKED:
            tl.store(base + half, byte, mask=(half < P // 2) & row_mask)
        else:
            tl.store(base + half, byte)
    elif MASKED:
        tl.store(base + cols, codes, mask=inside)
    else:
        tl.store(base + cols, codes)


@triton.jit
def _scale_offset(row, j, M, G: tl.constexpr, SP: tl.constexpr, LAYOUT: tl.constexpr):
    """Element of scale (row, j) in its array; 64 bits."""
    if LAYOUT == "column":
        return j.to(tl.int64) * M + row
    elif LAYOUT == "shuffled":
        inner = (j // 8) * 256 + (j % 4) * 64 + ((j % 8) // 4) * 2
        return row // 32 * (SP * 32) + inner + ((row % 16) * 4 + (row % 32) // 16)
    else:
        return row * G + j


@triton.jit
def _store_scales(
    scale_ptr, first, start, scale, M, R,
    G: tl.constexpr, SP: tl.constexpr, LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scales of the groups from ``start`` on: [GROUPS], or [ROWS, GROUPS]. Shuffled: padding up to SP groups and R rows too."""
    j = start + tl.arange(0, GROUPS)
    if CHUNKS == 0:
        row = first
    else:
        j = j[None, :]
        row = first + tl.arange(0, ROWS)[:, None]
    if LAYOUT == "shuffled":
        scale = tl.where((j < G) & (row < M), scale, 0x7F)
        mask = (j < SP) & (row < R)
    else:
        mask = (j < G) & (row < M)
    at = _scale_offset(row, j, M, G, SP, LAYOUT)
    tl.store(scale_ptr + at, scale.to(scale_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pad_scales(scale_ptr, row, GROUPS: tl.constexpr, SP: tl.constexpr):
    """A row of padding of the shuffled layout."""
    for start in tl.range(0, SP, GROUPS):
        j = start + tl.arange(0, GROUPS)
        pad = tl.full((GROUPS,), 0x7F, tl.uint8)
        tl.store(scale_ptr + _scale_offset(row, j, 0, SP, SP, "shuffled"), pad, mask=j < SP)
