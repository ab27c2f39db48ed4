"""The KV cache: RMSNorm and rotary embedding of q and k with the write of k and v into the cache, and the gather.

    k' = cast(rotated(cast(x * rsqrt(sum(x * x) / D + EPS) * (f32(w) + WEIGHT_OFFSET))));   v as it came
    cache[slot] = cast(k'), or codes of k' / s with s = max|k'| / MAX of the head (1 where it is tiny), or with a given s

Slot s is place ``s % PAGE`` of page ``s // PAGE``; X = elements of 16 bytes. A slot below zero or beyond the cache writes nothing.

    SHUFFLED     k [pages, HK, D/X, PAGE, X], v [pages, HK, PAGE/X, D, X], scales [pages, HK, PAGE]
    otherwise    k, v [pages * PAGE, HK, D], scales [pages * PAGE, HK]

The cache's buffers are written where they lie: the parameters that hold them as operands are read by nobody. STORED is 0 (as
floats), 1 (a scale for each token and head) or 2 (given scales).
"""

import triton
import triton.language as tl

from ._common import program_index
from ._heads import angles, head_sum, load_pairs, load_vector, owned, store_pairs, turned
from .quant import _encode, _magnitude, _quotient, _scale


@triton.jit
def _offset(slot, head, d, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr, SHUFFLED: tl.constexpr,
            VALUE: tl.constexpr):  # fmt: skip
    """Element of k, or of v, at 64-bit slots ``[.., 1, 1]``, heads ``[.., H, 1]`` and columns d."""
    if SHUFFLED:
        place = (slot % PAGE).to(tl.int32)
        base = (slot // PAGE * HK + head) * (D * PAGE)
        if VALUE:
            return base + (place // X * (D * X) + place % X + d * X)
        else:
            return base + (d // X * (PAGE * X) + d % X + place * X)
    else:
        return (slot * HK + head) * D + d


@triton.jit
def _scale_at(slot, head, HK: tl.constexpr, PAGE: tl.constexpr, SHUFFLED: tl.constexpr):
    if SHUFFLED:
        return (slot // PAGE * HK + head) * PAGE + slot % PAGE
    else:
        return slot * HK + head


@triton.jit
def _code(v, s, r, cache_ptr, STORED: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
          FNUZ: tl.constexpr, HARD: tl.constexpr, CLIP: tl.constexpr):  # fmt: skip
    """float32 values as the cache holds them."""
    if STORED == 0:
        return v.to(cache_ptr.dtype.element_ty)
    elif STORED == 1:
        return _encode(_quotient(v, s, r, "", False), MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
    else:
        return _encode(tl.div_rn(v, s), MAX, MANTISSA, BIAS, FNUZ, HARD, True)


@triton.jit
def _keep(first, second, rest, slot, head, written, cache_ptr, scale_ptr, fixed_ptr,
          HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, GPTJ: tl.constexpr,
          PAGE: tl.constexpr, X: tl.constexpr, SHUFFLED: tl.constexpr, VALUE: tl.constexpr, STORED: tl.constexpr,
          MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, FNUZ: tl.constexpr,
          HARD: tl.constexpr, CLIP: tl.constexpr):  # fmt: skip
    """Heads of rounded float32 values, taken apart as in ``_heads``, into the cache where ``written`` ``[TOKENS, HEADS, 1]``."""
    s = 1.0
    r = 1.0
    if STORED == 1:
        most = tl.maximum(tl.max(_magnitude(first), axis=2), tl.max(_magnitude(second), axis=2))
        if REST > 0:
            most = tl.maximum(most, tl.max(_magnitude(rest), axis=2))
        stored, s, r = _scale(most[:, :, None], 0.0, MAX, MANTISSA, TOP, "")
        tl.store(scale_ptr + _scale_at(slot, head, HK, PAGE, SHUFFLED), stored, mask=written)
    elif STORED == 2:
        s = tl.load(fixed_ptr)
    first = _code(first, s, r, cache_ptr, STORED, MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
    second = _code(second, s, r, cache_ptr, STORED, MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
    if GPTJ:
        T: tl.constexpr = first.shape[0]
        H: tl.constexpr = first.shape[1]
        d = tl.arange(0, 2 * PAIRS)[None, None, :]
        whole = tl.reshape(tl.join(first, second), (T, H, 2 * PAIRS))
        tl.store(cache_ptr + _offset(slot, head, d, HK, D, PAGE, X, SHUFFLED, VALUE), whole, mask=written & (d < D))
    else:
        HALF: tl.constexpr = R // 2
        j = tl.arange(0, PAIRS)[None, None, :]
        there = written & (j < HALF)
        tl.store(cache_ptr + _offset(slot, head, j, HK, D, PAGE, X, SHUFFLED, VALUE), first, mask=there)
        tl.store(cache_ptr + _offset(slot, head, j + HALF, HK, D, PAGE, X, SHUFFLED, VALUE), second, mask=there)
        if REST > 0:
            rest = _code(rest, s, r, cache_ptr, STORED, MAX, MANTISSA, BIAS, FNUZ, HARD, CLIP)
            j = tl.arange(0, REST)[None, None, :]
            at = _offset(slot, head, j + R, HK, D, PAGE, X, SHUFFLED, VALUE)
            tl.store(cache_ptr + at, rest, mask=written & (j < D - R))


@triton.jit
def _normed_turned(x_ptr, w_ptr, base, live, cos, sin, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr,
                   REST: tl.constexpr, GPTJ: tl.constexpr, HAS_W: tl.constexpr, EPS: tl.constexpr,
                   WEIGHT_OFFSET: tl.constexpr):  # fmt: skip
    """(first, second, rest) of the result, float32 values of x's dtype."""
    type_ = x_ptr.dtype.element_ty
    first, second, rest = load_pairs(x_ptr, base, live, D, R, PAIRS, REST, GPTJ)
    if HAS_W:
        w_first, w_second, w_rest = load_vector(w_ptr, D, R, PAIRS, REST, GPTJ)
    first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
    rstd = tl.rsqrt(head_sum(first * first, second * second, rest * rest, REST) / D + EPS)
    first, second, rest = first * rstd, second * rstd, rest * rstd
    if HAS_W:
        first = first * (w_first + WEIGHT_OFFSET)
        second = second * (w_second + WEIGHT_OFFSET)
        rest = rest * (w_rest + WEIGHT_OFFSET)
    first, second, rest = first.to(type_).to(tl.float32), second.to(type_).to(tl.float32), rest.to(type_).to(tl.float32)
    first, second = turned(first, second, cos, sin, R // 2, PAIRS)
    return first.to(type_).to(tl.float32), second.to(type_).to(tl.float32), rest


@triton.jit
def _slots(slots_ptr, token, tokens, all_slots):
    """(slot, 64 bits, and whether there is such a slot), ``[TOKENS, 1, 1]``."""
    slot = tl.load(slots_ptr + token, mask=token < tokens, other=-1).to(tl.int64)[:, None, None]
    inside = (slot >= 0) & (slot < all_slots)
    return tl.where(inside, slot, 0), inside


@triton.jit
def _bases(token, head, H: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, FIRST: tl.constexpr):
    """(element in rows of ROW whose heads of this kind start with FIRST, element in [tokens, H, D]), ``[TOKENS, HEADS, 1]``."""
    token = token.to(tl.int64)[:, None, None]
    head = head[None, :, None]
    return token * ROW + (FIRST + head) * D, (token * H + head) * D


@triton.jit
def _query(x_ptr, w_ptr, positions_ptr, cos_sin_ptr, out_ptr, pid, tokens, rows,
           ROW: tl.constexpr, H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, GPTJ: tl.constexpr,
           HAS_W: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, MROPE: tl.constexpr,
           S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr,
           WEIGHT_OFFSET: tl.constexpr):  # fmt: skip
    token, head, live = owned(pid, tokens, H, TOKENS, HEADS)
    cos, sin = angles(
        positions_ptr, cos_sin_ptr, token, tokens, tokens, rows, R, PAIRS, False, MROPE, S0, S1, S2, INTERLEAVED
    )
    base, out = _bases(token, head, H, D, ROW, 0)
    first, second, rest = _normed_turned(
        x_ptr, w_ptr, base, live, cos, sin, D, R, PAIRS, REST, GPTJ, HAS_W, EPS, WEIGHT_OFFSET
    )
    store_pairs(out_ptr, out, first, second, rest, live, D, R, PAIRS, REST, GPTJ)


@triton.jit
def _key(x_ptr, w_ptr, positions_ptr, cos_sin_ptr, slots_ptr, fixed_ptr, out_ptr, cache_ptr, scale_ptr,
         pid, tokens, rows, all_slots,
         ROW: tl.constexpr, FIRST: tl.constexpr, HAS_OUT: tl.constexpr, H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
         D: tl.constexpr, GPTJ: tl.constexpr, HAS_W: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
         MROPE: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr,
         WEIGHT_OFFSET: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr, SHUFFLED: tl.constexpr, STORED: tl.constexpr,
         MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, FNUZ: tl.constexpr,
         HARD: tl.constexpr, CLIP: tl.constexpr):  # fmt: skip
    token, head, live = owned(pid, tokens, H, TOKENS, HEADS)
    slot, inside = _slots(slots_ptr, token, tokens, all_slots)
    cos, sin = angles(
        positions_ptr, cos_sin_ptr, token, tokens, tokens, rows, R, PAIRS, False, MROPE, S0, S1, S2, INTERLEAVED
    )
    base, out = _bases(token, head, H, D, ROW, FIRST)
    first, second, rest = _normed_turned(
        x_ptr, w_ptr, base, live, cos, sin, D, R, PAIRS, REST, GPTJ, HAS_W, EPS, WEIGHT_OFFSET
    )
    if HAS_OUT:
        store_pairs(out_ptr, out, first, second, rest, live, D, R, PAIRS, REST, GPTJ)
    _keep(first, second, rest, slot, head[None, :, None], live & inside, cache_ptr, scale_ptr, fixed_ptr,
          H, D, R, PAIRS, REST, GPTJ, PAGE, X, SHUFFLED, False, STORED, MAX, MANTISSA, BIAS, TOP, FNUZ, HARD, CLIP)  # fmt: skip


@triton.jit
def _value(x_ptr, slots_ptr, fixed_ptr, out_ptr, cache_ptr, scale_ptr, pid, tokens, all_slots,
           ROW: tl.constexpr, FIRST: tl.constexpr, HAS_OUT: tl.constexpr, H: tl.constexpr, TOKENS: tl.constexpr,
           HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr,
           SHUFFLED: tl.constexpr, STORED: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
           TOP: tl.constexpr, FNUZ: tl.constexpr, HARD: tl.constexpr, CLIP: tl.constexpr):  # fmt: skip
    token, head, live = owned(pid, tokens, H, TOKENS, HEADS)
    slot, inside = _slots(slots_ptr, token, tokens, all_slots)
    base, out = _bases(token, head, H, D, ROW, FIRST)
    first, second, rest = load_pairs(x_ptr, base, live, D, D, PAIRS, 0, False)
    if HAS_OUT:
        store_pairs(out_ptr, out, first, second, rest, live, D, D, PAIRS, 0, False)
    first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
    _keep(first, second, rest, slot, head[None, :, None], live & inside, cache_ptr, scale_ptr, fixed_ptr,
          H, D, D, PAIRS, 0, False, PAGE, X, SHUFFLED, True, STORED, MAX, MANTISSA, BIAS, TOP, FNUZ, HARD, CLIP)  # fmt: skip


@triton.jit
def qk_norm_rope_cache(
    qkv_ptr,  # [tokens, ROW] if packed
    q_ptr,  # [tokens, HQ, D]
    k_ptr,  # [tokens, HK, D]
    v_ptr,
    q_weight_ptr,  # [D]
    k_weight_ptr,
    positions_ptr,  # [tokens], for mrope [3, tokens]
    cos_sin_ptr,  # [rows, R]
    slots_ptr,  # [tokens]
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,  # STORED 2: one float32
    v_scale_ptr,
    tokens,
    rows,
    all_slots,
    blocks_q,
    blocks_k,
    q_out_ptr,  # [tokens, HQ, D]
    k_out_ptr,  # [tokens, HK, D]
    v_out_ptr,
    k_cache_out_ptr,
    v_cache_out_ptr,
    k_scale_out_ptr,  # float32
    v_scale_out_ptr,
    PACKED: tl.constexpr, ROW: tl.constexpr, HAS_KV: tl.constexpr,
    HQ: tl.constexpr, TOKENS_Q: tl.constexpr, HEADS_Q: tl.constexpr,
    HK: tl.constexpr, TOKENS_K: tl.constexpr, HEADS_K: tl.constexpr,
    D: tl.constexpr, GPTJ: tl.constexpr, HAS_WQ: tl.constexpr, HAS_WK: tl.constexpr,
    R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, PAIRS_V: tl.constexpr,
    MROPE: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    PAGE: tl.constexpr, X: tl.constexpr, SHUFFLED: tl.constexpr, STORED: tl.constexpr,
    MAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, FNUZ: tl.constexpr, HARD: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of tokens by heads of q, of k or of v, in this order."""
    pid = program_index()
    if pid < blocks_q:
        _query(
            qkv_ptr if PACKED else q_ptr, q_weight_ptr, positions_ptr, cos_sin_ptr, q_out_ptr, pid, tokens, rows,
            ROW if PACKED else HQ * D, HQ, TOKENS_Q, HEADS_Q, D, GPTJ, HAS_WQ, R, PAIRS, REST, MROPE, S0, S1, S2, INTERLEAVED, EPS,
            WEIGHT_OFFSET,
        )  # fmt: skip
    elif pid < blocks_q + blocks_k:
        _key(
            qkv_ptr if PACKED else k_ptr, k_weight_ptr, positions_ptr, cos_sin_ptr, slots_ptr, k_scale_ptr, k_out_ptr,
            k_cache_out_ptr, k_scale_out_ptr, pid - blocks_q, tokens, rows, all_slots,
            ROW if PACKED else HK * D, HQ if PACKED else 0, HAS_KV, HK, TOKENS_K, HEADS_K, D, GPTJ, HAS_WK, R, PAIRS, REST,
            MROPE, S0, S1, S2, INTERLEAVED, EPS, WEIGHT_OFFSET, PAGE, X, SHUFFLED, STORED, MAX, MANTISSA, BIAS, TOP, FNUZ, HARD,
            CLIP,
        )  # fmt: skip
    else:
        _value(
            qkv_ptr if PACKED else v_ptr, slots_ptr, v_scale_ptr, v_out_ptr, v_cache_out_ptr, v_scale_out_ptr,
            pid - blocks_q - blocks_k, tokens, all_slots, ROW if PACKED else HK * D, HQ + HK if PACKED else 0, HAS_KV, HK,
            TOKENS_K, HEADS_K, D, PAIRS_V, PAGE, X, SHUFFLED, STORED, MAX, MANTISSA, BIAS, TOP, FNUZ, HARD, CLIP,
        )  # fmt: skip


@triton.jit
def _decode(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FNUZ: tl.constexpr):
    """The value of a code, exact."""
    if MANTISSA == 0:
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        c = code.to(tl.int32)
        low = c & 0x7F
        sign = (c & 0x80) << 24
        UNIT: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA)
        small = ((low & ((1 << MANTISSA) - 1)).to(tl.float32) * UNIT).to(tl.int32, bitcast=True)
        bits = tl.where(low < (1 << MANTISSA), small, (low << (23 - MANTISSA)) + ((127 - BIAS) << 23))
        if FNUZ:
            bits = tl.where(c == 0x80, 0x7FC00000, bits)
        elif MANTISSA == 3:
            bits = tl.where(low == 0x7F, 0x7FC00000, bits)
        else:
            bits = tl.where(low > 0x7C, 0x7FC00000, tl.where(low == 0x7C, 0x7F800000, bits))
        return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def _gathered(cache_ptr, scale_ptr, out_ptr, row, live, slot, inside, head,
              HK: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
              PAGE: tl.constexpr, X: tl.constexpr, SHUFFLED: tl.constexpr, VALUE: tl.constexpr, STORED: tl.constexpr,
              MANTISSA: tl.constexpr, BIAS: tl.constexpr, FNUZ: tl.constexpr):  # fmt: skip
    d = tl.arange(0, PADDED)[None, :]
    at = _offset(slot, head, d, HK, D, PAGE, X, SHUFFLED, VALUE)
    there = inside & (d < D)
    if STORED == 0:
        v = tl.load(cache_ptr + at, mask=there, other=0.0)
    else:
        v = _decode(tl.load(cache_ptr + at, mask=there, other=0), MANTISSA, BIAS, FNUZ)
        if STORED == 1:
            v = v * tl.load(scale_ptr + _scale_at(slot, head, HK, PAGE, SHUFFLED), mask=inside, other=0.0)
        else:
            v = tl.where(inside, v * tl.load(scale_ptr), 0.0)
    tl.store(out_ptr + row.to(tl.int64) * D + d, v, mask=live & (d < D))


@triton.jit
def kv_cache_gather(
    slots_ptr,  # [count]
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    count,
    all_slots,
    k_out_ptr,  # [count, HK, D]
    v_out_ptr,
    HK: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr,
    SHUFFLED: tl.constexpr, STORED: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """A program reads ROWS heads of k and of v. A slot that is not there gives zeros."""
    row = program_index() * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < count * HK
    slot = tl.load(slots_ptr + row // HK, mask=live, other=-1).to(tl.int64)
    inside = (slot >= 0) & (slot < all_slots)
    slot = tl.where(inside, slot, 0)
    head = row % HK
    _gathered(k_cache_ptr, k_scale_ptr, k_out_ptr, row, live, slot, inside, head, HK, D, PADDED, PAGE, X, SHUFFLED, False, STORED,
              MANTISSA, BIAS, FNUZ)  # fmt: skip
    _gathered(v_cache_ptr, v_scale_ptr, v_out_ptr, row, live, slot, inside, head, HK, D, PADDED, PAGE, X, SHUFFLED, True, STORED,
              MANTISSA, BIAS, FNUZ)  # fmt: skip
