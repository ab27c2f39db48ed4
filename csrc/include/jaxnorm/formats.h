// Formats of quantised values: int8, four fp8 formats and fp4 (e2m1). Rounding is to nearest even, subnormals included.
// A value must lie within half a step of the format's range (clip first); NaN becomes the format's NaN, and is the
// caller's affair for int8 and fp4, which have none.
#pragma once
#include "jaxnorm/vec.h"

namespace jaxnorm {

template <> struct Bits<1> {
  u8 byte;
};

template <int MANTISSA_, int BIAS_, bool FNUZ_> struct Float8 {
  static constexpr int bits = 8, MANTISSA = MANTISSA_, BIAS = BIAS_, top_exponent = MANTISSA_ == 3 ? 15 - BIAS_ : 15;
  static constexpr bool FNUZ = FNUZ_, integer = false;
  static constexpr float top = MANTISSA_ == 2 ? 57344.f : FNUZ_ ? 240.f : 448.f;
  static constexpr u32 nan = FNUZ_ ? 0x80 : MANTISSA_ == 2 ? 0x7e : 0x7f;
};
using E4M3FN = Float8<3, 7, false>;
using E4M3FNUZ = Float8<3, 8, true>;
using E5M2 = Float8<2, 15, false>;
using E5M2FNUZ = Float8<2, 16, true>;
struct Int8 {
  static constexpr int bits = 8, MANTISSA = 0, top_exponent = 6;
  static constexpr bool integer = true;
  static constexpr float top = 127.f;
};
struct FP4 {
  static constexpr int bits = 4, MANTISSA = 1, BIAS = 1, top_exponent = 2;
  static constexpr bool integer = false;
  static constexpr float top = 6.f;
};

// What a conversion makes of values beyond the largest code: rounds those within half a step down to it (software),
// clips all of them, or may overflow at once (AMD's instructions: nobody here could try them on a value one bit too
// large).
enum class Beyond { kRounds, kClips, kOverflows };
template <class F> struct Conversion {
  static constexpr Beyond beyond = Beyond::kRounds;
  static constexpr float unit = 1.f;  // what encode() takes for a value of 1
};
#define JN_CONVERSION(format, what)                \
  template <> struct Conversion<format> {          \
    static constexpr Beyond beyond = Beyond::what; \
    static constexpr float unit = 1.f;             \
  }
#if defined(JN_HALF_PAIRS)
template <> struct Conversion<FP4> {
  static constexpr Beyond beyond = Beyond::kRounds;
  static constexpr float unit = 0x1.008p-14f;  // see half_fp4
};
#endif
#if defined(JN_NVIDIA) && __CUDA_ARCH__ >= 890
#define JN_HARDWARE_FN 1
JN_CONVERSION(E4M3FN, kClips);
JN_CONVERSION(E5M2, kClips);
#elif defined(__gfx950__)
#define JN_HARDWARE_FN 1
JN_CONVERSION(E4M3FN, kOverflows);
JN_CONVERSION(E5M2, kOverflows);
JN_CONVERSION(FP4, kOverflows);
#elif defined(__gfx942__)
#define JN_HARDWARE_FNUZ 1
JN_CONVERSION(E4M3FNUZ, kOverflows);
JN_CONVERSION(E5M2FNUZ, kOverflows);
#endif
#undef JN_CONVERSION

// Exponent and mantissa bits of |f| in a small float format; f is no NaN.
template <int MANTISSA, int BIAS> JN_DEV u32 small_float(float f) {
  const u32 a = f32_bits(f) & 0x7fffffffu;
  // Below the smallest normal number: an addition whose unit in the last place is the smallest subnormal rounds.
  constexpr u32 magic = u32(127 + 1 - BIAS - MANTISSA + 23) << 23, smallest = u32(127 + 1 - BIAS) << 23;
  const u32 subnormal = f32_bits(bits_f32(a) + bits_f32(magic)) - magic;
  constexpr int drop = 23 - MANTISSA;
  const u32 normal = ((a + ((1u << (drop - 1)) - 1) + ((a >> drop) & 1u)) >> drop) - (u32(127 - BIAS) << MANTISSA);
  return a < smallest ? subnormal : normal;
}
template <class F> JN_DEV u32 float8_bits(float f) {
  const u32 r = small_float<F::MANTISSA, F::BIAS>(f), sign = (f32_bits(f) >> 24) & 0x80u;
  if ((f32_bits(f) & 0x7fffffffu) > 0x7f800000u) return F::nan;
  return F::FNUZ && r == 0 ? 0 : sign | r;
}
JN_DEV float magnitude(float f) {
#if defined(JN_NVIDIA)
  return fabsf(f);
#else
  return __builtin_fabsf(f);
#endif
}
// An fp4 code in the four highest bits, anything below. With 2^e the power of two of max(|f|, 1), codes are half of 2^e
// apart near f, and adding 2^(e + 22) rounds to a multiple of that: k = 0 .. 4, in the last bits of the sum t. The code
// is k + 2 e, and t has e + 149 in its exponent: t * 2^28 + t * 2^6 adds k and 2 e + 298 in the highest bits. Three
// more times 2^e, an even 6 in the last bits, so that ties stay what they are, make the constant a multiple of 16.
JN_DEV u32 fp4_high(float f) {
  const float a = magnitude(f);
#if defined(JN_NVIDIA)
  const float least = fmaxf(a, 1.f);
#else
  const float least = a > 1.f ? a : 1.f;
#endif
  const u32 t = f32_bits(fused_multiply_add(bits_f32(f32_bits(least) & 0x7f800000u), 0x1p22f + 3.f, a));
  return t * 0x10000040u | (f32_bits(f) & 0x80000000u);
}
// The bits of w four higher, with the four highest of v below them.
JN_DEV u32 take_four(u32 w, u32 v) {
#if defined(JN_NVIDIA)
  return __funnelshift_l(v, w, 4);
#else
  return w << 4 | v >> 28;
#endif
}

// The lowest bytes of four words.
JN_DEV u32 pack_bytes(u32 a, u32 b, u32 c, u32 d) {
#if defined(JN_NVIDIA)
  u32 low, high, all;
  asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(low) : "r"(a), "r"(b));
  asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(high) : "r"(c), "r"(d));
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(all) : "r"(low), "r"(high));
  return all;
#else
  return (a & 0xffu) | (b & 0xffu) << 8 | (c & 0xffu) << 16 | d << 24;
#endif
}

#if defined(JN_HALF_PAIRS)
// Bytes 0 and 2 of two words.
JN_DEV u32 even_bytes(u32 a, u32 b) {
#if defined(JN_NVIDIA)
  u32 r;
  asm("prmt.b32 %0, %1, %2, 0x6420;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  return pack_bytes(a, a >> 16, b, b >> 16);
#endif
}
// The highest bits of bytes 1 and 3 of two words, each in all bits of a byte.
JN_DEV u32 odd_signs(u32 a, u32 b) {
#if defined(JN_NVIDIA)
  u32 r;
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  return (pack_bytes(a >> 8, a >> 24, b >> 8, b >> 24) >> 7 & 0x01010101u) * 0xffu;
#endif
}
#endif

// Four codes of a byte each in a word, the first in the lowest byte.
template <class F> JN_DEV u32 four_codes(F, float a, float b, float c, float d) {
  return pack_bytes(float8_bits<F>(a), float8_bits<F>(b), float8_bits<F>(c), float8_bits<F>(d));
}
JN_DEV u32 four_codes(Int8, float a, float b, float c, float d) {
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: the sum's last bit is worth 1, its low byte is the integer
  return pack_bytes(f32_bits(a + magic), f32_bits(b + magic), f32_bits(c + magic), f32_bits(d + magic));
}
#if defined(JN_NVIDIA) && defined(JN_HARDWARE_FN)
JN_DEV u32 four_codes(E4M3FN, float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return u32(low) | u32(high) << 16;
}
JN_DEV u32 four_codes(E5M2, float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return u32(low) | u32(high) << 16;
}
#elif defined(JN_HARDWARE_FN) || defined(JN_HARDWARE_FNUZ)
// One instruction, whose format is the target's own flavour.
#if defined(JN_HARDWARE_FN)
using NativeE4M3 = E4M3FN;
using NativeE5M2 = E5M2;
#else
using NativeE4M3 = E4M3FNUZ;
using NativeE5M2 = E5M2FNUZ;
#endif
JN_DEV u32 four_codes(NativeE4M3, float a, float b, float c, float d) {
  return u32(__builtin_amdgcn_cvt_pk_fp8_f32(c, d, __builtin_amdgcn_cvt_pk_fp8_f32(a, b, 0, false), true));
}
JN_DEV u32 four_codes(NativeE5M2, float a, float b, float c, float d) {
  return u32(__builtin_amdgcn_cvt_pk_bf8_f32(c, d, __builtin_amdgcn_cvt_pk_bf8_f32(a, b, 0, false), true));
}
#endif

#if defined(JN_HALF_PAIRS)
// Two fp4 codes at once, through float16. Rounding twice is safe because of the unit: with 513 * 2^-23 for 1, each of
// the seven values between two codes, 0.25 to 5, lies in the middle between two neighbouring float16 (subnormal ones up
// to 1), and its even neighbour, which a tie takes, is on the side of the even code. So the first rounding has chosen
// the code, and the second may be any that has its steps near the middles: lines of slope 2, 1 and 1/2, each rounded to
// an integer by the addition of a large number; the least of them is the code. tests/test_hip_fp4.py proves it.
struct HalfFP4 {
  u32 codes, signs;  // in the lowest bits of both halves; in the highest, others below
};
JN_DEV HalfFP4 half_fp4(float a, float b) {
  constexpr u32 slopes[3] = {0x77fc77fcu, 0x73fc73fcu, 0x6ffc6ffcu};   // 2^24 / 513 in float16, its half, its quarter
  constexpr u32 offsets[3] = {0x66006600u, 0x66026602u, 0x66046604u};  // 1536 and where the lines begin: 0, 2, 4
  const u32 signs = pack2(F16{}, a, b), m = magnitude_pair(signs);
  const u32 codes =
      least_pair(fused_multiply_add_pair(m, slopes[0], offsets[0]), fused_multiply_add_pair(m, slopes[1], offsets[1]),
                 fused_multiply_add_pair(m, slopes[2], offsets[2]));
  return HalfFP4{codes, signs};
}
// Pairs of the elements (0, 2), (4, 6), (1, 3), (5, 7) as eight halves of bytes.
JN_DEV u32 packed_fp4(const HalfFP4& e, const HalfFP4& more_e, const HalfFP4& o, const HalfFP4& more_o) {
  const u32 codes = even_bytes(e.codes, more_e.codes) + even_bytes(o.codes, more_o.codes) * 16;
  const u32 even = odd_signs(e.signs, more_e.signs), odd = odd_signs(o.signs, more_o.signs);
  return codes | (even & 0x08080808u) | (odd & 0x80808080u);
}
#endif

// Two fp4 codes in a byte, the first in the low half.
JN_DEV u32 two_fp4(float a, float b) {
#if defined(JN_HALF_PAIRS)
  const HalfFP4 h = half_fp4(a, b);
  return (h.codes & 7u) | (h.codes >> 12 & 0x70u) | (h.signs >> 12 & 8u) | (h.signs >> 24 & 0x80u);
#elif defined(__gfx950__)
  return __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(0u, a, b, 1.f, 0) & 0xffu;
#else
  return fp4_high(a) >> 28 | (fp4_high(b) >> 28) << 4;
#endif
}
JN_DEV u32 eight_fp4(const float (&f)[8]) {
#if defined(JN_HALF_PAIRS)
  return packed_fp4(half_fp4(f[0], f[2]), half_fp4(f[4], f[6]), half_fp4(f[1], f[3]), half_fp4(f[5], f[7]));
#elif defined(__gfx950__)
  u32 w = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(0u, f[0], f[1], 1.f, 0);
  w = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(w, f[2], f[3], 1.f, 1);
  w = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(w, f[4], f[5], 1.f, 2);
  return __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(w, f[6], f[7], 1.f, 3);
#else
  u32 w = 0;  // one funnel shift for each code
#pragma unroll
  for (int i = 7; i >= 0; --i) w = take_four(w, fp4_high(f[i]));
  return w;
#endif
}

// The codes of V consecutive values as they lie in memory. A single fp4 value fills half a byte: see store_codes.
template <class F, int V> JN_DEV Bits<F::bits * V / 8> encode(const float (&f)[V]) {
  Bits<F::bits * V / 8> out;
  if constexpr (F::bits == 4) {
    if constexpr (V == 8)
      out.word[0] = eight_fp4(f);
    else if constexpr (V == 4)
      out.half = u16(two_fp4(f[0], f[1]) | two_fp4(f[2], f[3]) << 8);
    else
      out.byte = u8(two_fp4(f[0], f[1]));
  } else if constexpr (V >= 4) {
#pragma unroll
    for (int i = 0; i < V / 4; ++i) out.word[i] = four_codes(F{}, f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3]);
  } else if constexpr (V == 2) {
    out.half = u16(four_codes(F{}, f[0], f[1], 0.f, 0.f));
  } else {
    out.byte = u8(four_codes(F{}, f[0], 0.f, 0.f, 0.f));
  }
  return out;
}

}  // namespace jaxnorm
