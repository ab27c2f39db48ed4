// Element types of buffers, as bits: no compiler's own bf16 or half type is needed. Arithmetic is float32; widening is
// exact, narrowing is one rounding to nearest even that keeps NaN.
#pragma once
#include "jaxnorm/gpu.h"

namespace jaxnorm {

struct None {
  static constexpr int size = 0;
};  // an absent buffer
struct F32 {
  static constexpr int size = 4;
};
struct BF16 {
  static constexpr int size = 2;
};
struct F16 {
  static constexpr int size = 2;
};

JN_DEV u32 bf16_bits(float f) {
  const u32 u = f32_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16) | 0x40u;
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

// Two values in a word, the first in the low half.
JN_DEV u32 pack2(BF16, float lo, float hi) {
#if defined(JN_NVIDIA)
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#elif defined(JN_HARDWARE_BF16)
  typedef __bf16 Pair __attribute__((ext_vector_type(2)));
  typedef float Floats __attribute__((ext_vector_type(2)));
  const Floats v = {lo, hi};
  return __builtin_bit_cast(u32, __builtin_convertvector(v, Pair));
#elif defined(__gfx90a__) || defined(__gfx942__) || defined(JN_SIMT)
  // Of both at once: what is worked out for a pair is then packed math, too (v_pk_mul_f32), a tenth fewer instructions.
  typedef float Floats __attribute__((vector_size(8)));
  typedef u32 Words __attribute__((vector_size(8)));
  const Floats v = {lo, hi};
  const Words u = __builtin_bit_cast(Words, v), high = u >> 16;
  const Words r = v != v ? high | 0x40u : (u + 0x7fffu + (high & 1u)) >> 16;
  return r[0] | (r[1] << 16);
#else
  return bf16_bits(lo) | (bf16_bits(hi) << 16);
#endif
}
JN_DEV void unpack2(BF16, u32 w, float& lo, float& hi) {
  lo = bits_f32(w << 16);
  hi = bits_f32(w & 0xffff0000u);
}
#if defined(JN_SIMT)
inline u32 half_bits(float f) {
  const u32 u = f32_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or is larger
  if (a < 0x38800000u)
    return sign | (f32_bits(bits_f32(a) + 0.5f) - 0x3f000000u);  // subnormal: 0.5 has the same quantum
  return sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13);
}
inline float half_value(u32 h) {
  const u32 sign = (h & 0x8000u) << 16, a = h & 0x7fffu;
  if (a >= 0x7c00u) return bits_f32(sign | 0x7f800000u | ((a & 0x3ffu) << 13));
  if (a < 0x400u) return bits_f32(sign | f32_bits(float(a) * 0x1p-24f));
  return bits_f32(sign | ((a << 13) + 0x38000000u));
}
#endif

JN_DEV u32 pack2(F16, float lo, float hi) {
#if defined(JN_SIMT)
  return half_bits(lo) | (half_bits(hi) << 16);
#elif defined(JN_NVIDIA)
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  typedef _Float16 Pair __attribute__((ext_vector_type(2)));
  const Pair v = {_Float16(lo), _Float16(hi)};
  return __builtin_bit_cast(u32, v);
#endif
}
JN_DEV void unpack2(F16, u32 w, float& lo, float& hi) {
#if defined(JN_SIMT)
  lo = half_value(w & 0xffffu);
  hi = half_value(w >> 16);
#elif defined(JN_NVIDIA)
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(lo), "=f"(hi) : "r"(w));
#else
  typedef _Float16 Pair __attribute__((ext_vector_type(2)));
  const Pair v = __builtin_bit_cast(Pair, w);
  lo = float(v.x);
  hi = float(v.y);
#endif
}

// Two float16 in a word, worked on at once: what sm_90 has instructions for.
#if defined(JN_SIMT) && JN_WAVE == 32
#define JN_HALF_PAIRS 1
template <class F> inline u32 each_half(F f) { return f(0) | f(16) << 16; }
inline u32 magnitude_pair(u32 w) { return w & 0x7fff7fffu; }
inline u32 fused_multiply_add_pair(u32 a, u32 b, u32 c) {
  auto at = [](u32 w, int i) { return double(half_value(w >> i & 0xffffu)); };
  return each_half([&](int i) { return half_bits(float(at(a, i) * at(b, i) + at(c, i))); });
}
inline u32 least_pair(u32 a, u32 b, u32 c) {
  auto least = [](u32 x, u32 y) { return x < y ? x : y; };
  return each_half([&](int i) { return least(a >> i & 0xffffu, least(b >> i & 0xffffu, c >> i & 0xffffu)); });
}
#elif defined(JN_NVIDIA) && __CUDA_ARCH__ >= 900
#define JN_HALF_PAIRS 1
JN_DEV u32 magnitude_pair(u32 w) {
  u32 r;
  asm("abs.f16x2 %0, %1;" : "=r"(r) : "r"(w));
  return r;
}
JN_DEV u32 fused_multiply_add_pair(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// of the bits
JN_DEV u32 least_pair(u32 a, u32 b, u32 c) {
  u32 r;
  asm("{.reg .b32 t; min.u16x2 t, %1, %2; min.u16x2 %0, t, %3;}" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
#endif

// The same for bits that were unpacked before. A compiler would keep the earlier results in registers, twice as many as
// the bits take. ptxas does not recognise byte permutations as the same thing; clang must not know where the bits come
// from.
template <class T> JN_DEV void unpack2_again(T, u32 w, float& lo, float& hi) {
#if defined(JN_AMD)
  asm("" : "+v"(w));
#endif
  unpack2(T{}, w, lo, hi);
}
#if defined(JN_NVIDIA)
JN_DEV void unpack2_again(BF16, u32 w, float& lo, float& hi) {
  asm("prmt.b32 %0, %1, 0, 0x1044;" : "=f"(lo) : "r"(w));
  asm("prmt.b32 %0, %1, 0, 0x3244;" : "=f"(hi) : "r"(w));
}
#endif

}  // namespace jaxnorm
