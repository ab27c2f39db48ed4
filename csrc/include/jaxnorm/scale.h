// Scales of quantised values: the largest magnitude of a group, its scale, and the division by it.
#pragma once
#include "jaxnorm/formats.h"
#include "jaxnorm/reduce.h"

namespace jaxnorm {

enum class Exponent { kNone, kUp, kDown, kEven };  // kNone: a float32 scale, else the rounding of an e8m0 scale
enum class Layout { kRow, kColumn, kShuffled };

// GROUP: features that share a scale, 0 = all of the row. BOUNDED: the maximum has an upper bound.
template <class Code_, int GROUP_, Exponent EXPONENT_, Layout LAYOUT_, bool STATIC_, bool BOUNDED_> struct QuantSpec {
  using Code = Code_;
  static constexpr int GROUP = GROUP_;
  static constexpr Exponent EXPONENT = EXPONENT_;
  static constexpr Layout LAYOUT = LAYOUT_;
  static constexpr bool STATIC = STATIC_, BOUNDED = BOUNDED_, POWER = EXPONENT != Exponent::kNone;
  // A scale that came from the maximum itself keeps |z / s| within the rounding of one division of the top.
  static constexpr bool overflows = STATIC || BOUNDED || EXPONENT == Exponent::kDown || EXPONENT == Exponent::kEven;
  static constexpr Beyond beyond = Conversion<Code>::beyond;
  static constexpr bool clips = beyond == Beyond::kOverflows || (overflows && beyond != Beyond::kClips);
};

// ---- maxima

// The larger of two values without sign, or NaN.
JN_DEV float max_or_nan(float a, float b) {
#if defined(JN_NVIDIA) && __CUDA_ARCH__ >= 800
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  const u32 x = f32_bits(a), y = f32_bits(b);  // ordered like the values, NaN above infinity
  return bits_f32(x > y ? x : y);
#endif
}
template <int V> JN_DEV float chunk_max(const float (&f)[V]) {
  float a = magnitude(f[0]);
#pragma unroll
  for (int i = 1; i < V; ++i) a = max_or_nan(a, magnitude(f[i]));
  return a;
}
// Over each aligned run of LANES lanes; all of them get it.
#if defined(JN_NVIDIA) && __CUDA_ARCH__ >= 800
constexpr bool kWaveMax = true;  // one instruction for a whole wave
#else
constexpr bool kWaveMax = false;
#endif
template <int LANES> JN_DEV float lanes_max(float v) {
#if defined(JN_NVIDIA) && __CUDA_ARCH__ >= 800
  if constexpr (LANES == kWave) {
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(f32_bits(v)));
    return bits_f32(r);
  }
#endif
#if defined(JN_LANE_SWAPS)
  if constexpr (LANES > 16) {
    const Swapped s = lane_swap<LANES / 2>(f32_bits(v), f32_bits(v));
    return lanes_max<LANES / 2>(max_or_nan(bits_f32(s.a), bits_f32(s.b)));
  }
#endif
  if constexpr (LANES > 1)
    return lanes_max<LANES / 2>(max_or_nan(v, shfl_xor<LANES / 2>(v)));
  else
    return v;
}

// The same of COUNT values, one of which each lane gets: at each distance a lane keeps half of them and gives the other
// half away, as in packed_sum. COUNT is a power of two, LANES at most.
template <int LANES, int COUNT> JN_DEV float packed_max(const float (&v)[COUNT], u32 lane) {
  if constexpr (COUNT == 1) {
    return lanes_max<LANES>(v[0]);
  } else {
    float half[COUNT / 2];
    const bool upper = (lane & (LANES / 2)) != 0;
#pragma unroll
    for (int j = 0; j < COUNT / 2; ++j) {
      const float keep = upper ? v[2 * j + 1] : v[2 * j], give = upper ? v[2 * j] : v[2 * j + 1];
      half[j] = max_or_nan(keep, shfl_xor<LANES / 2>(give));
    }
    return packed_max<LANES / 2>(half, lane);
  }
}
// Which value that is, and the first lane of a run that has value i.
template <int LANES, int COUNT> JN_DEV int max_index(u32 lane) {
  if constexpr (COUNT == 1)
    return 0;
  else
    return ((lane & (LANES / 2)) != 0 ? 1 : 0) + 2 * max_index<LANES / 2, COUNT / 2>(lane);
}
JN_CONST int max_lane(int lanes, int i) { return i == 0 ? 0 : i % 2 * (lanes / 2) + max_lane(lanes / 2, i / 2); }
// Whether lanes divide the scales among them. AMD's exchanges are operands of the maximum, and cost nothing to save.
#if defined(JN_AMD) || (defined(JN_SIMT) && JN_WAVE == 64)
constexpr bool kDividesScales = false;
#else
constexpr bool kDividesScales = true;
#endif

// ---- scales

// z / s correctly rounded, from r = 1 / s correctly rounded: no underflow on the way for 2^-100 <= s <= 2^126, except
// of quotients that every format rounds to zero. The sign of a zero is z's. tests/test_hip_quant_simt.py proves it.
JN_DEV float quotient(float z, float s, float r) {
  const float q = z * r;
  return fused_multiply_add(fused_multiply_add(q, s, -z), -r, q);
}
// 1 / s correctly rounded, for 2^-100 <= s <= 2^124.
JN_DEV float reciprocal(float s) {
#if defined(JN_NVIDIA)  // what rcp.rn does, without its test for other divisors
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(s));
  return fused_multiply_add(-fused_multiply_add(s, y, -1.f), y, y);
#else
  return 1.f / s;
#endif
}

constexpr float kLargest = 0x1.fffffep127f, kLift = 0x1p64f;
// NAN_PASSES: else a NaN may become any number.
template <bool NAN_PASSES> JN_DEV float clip(float v, float top) {
#if defined(JN_NVIDIA) && __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(top));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(-top));
  return v;
#else
#if defined(JN_AMD)
  if constexpr (!NAN_PASSES) return __builtin_amdgcn_fmed3f(v, -top, top);
#endif
  return v > top ? top : v < -top ? -top : v;
#endif
}

JN_DEV int opaque(int v) {
#if defined(JN_NVIDIA)
  asm volatile("" : "+r"(v));
#elif defined(JN_AMD)
  asm volatile("" : "+v"(v));
#endif
  return v;
}

// What the values of a group are divided by.
template <class Q> struct Scale {
  using Code = typename Q::Code;
  float s, r;   // e8m0: r alone, the units that encode() takes included
  bool direct;  // z can be divided as it is; if not, and unless static, z is first multiplied with `before`, `lift`
  u32 stored;   // float32 bits, or the exponent
  float before = 1.f, lift = kLift;

  static JN_DEV Scale of_max(float a, float bound) {
    if constexpr (Q::BOUNDED) a = a > bound ? bound : a;
    Scale scale;
    if constexpr (Q::POWER) {
      scale = of_power(exponent(a));
      scale.direct = is_moderate(scale.stored);
      scale.r = unit * (scale.direct ? scale.lift : 1.f);
    } else {
      constexpr float inverse = 1.f / Code::top;
      constexpr u32 low = (127 - 80) << 23, high = 0x7f7fffffu;  // 2^-80 to the largest number
      scale.direct = f32_bits(a) - low <= high - low;
      if (scale.direct) {
        scale.s = quotient(a, Code::top, inverse);
        scale.r = reciprocal(scale.s);
        scale.stored = f32_bits(scale.s);
      } else {
        float s = a / Code::top;
        s = s < 0x1p-126f ? 1.f : s;
        scale.stored = f32_bits(s);
        scale.s = s < 1.f ? s * kLift : s == 1.f ? kLift : Code::integer ? 1.f : s;
        scale.r = 1.f / scale.s;
      }
    }
    return scale;
  }
  // Of values that are still to be multiplied with `factor`, `a` being their largest magnitude before that: what is
  // stored is the scale of the products, what divides is the scale of the values as they are. The same codes but for
  // the rounding of the products, and the maximum need not wait for the factor.
  static JN_DEV Scale of_scaled_max(float a, float factor) {
    static_assert(!Q::BOUNDED && !Q::STATIC, "a scale from the maximum");
    constexpr float inverse = 1.f / Code::top;
    constexpr u32 low = (127 - 80) << 23, high = 0x7f7fffffu;
    const float m = a * factor;
    Scale scale;
    if constexpr (Q::POWER) {
      scale = of_power(exponent(m));
      scale.direct = is_moderate(scale.stored) && is_moderate(f32_bits(factor) >> 23);
      scale.r = unit * (scale.direct ? factor * scale.lift : 1.f);
      scale.before = factor;
      return scale;
    }
    scale.direct = f32_bits(a) - low <= high - low && f32_bits(m) - low <= high - low;
    if (scale.direct) {
      scale.stored = f32_bits(quotient(m, Code::top, inverse));
      scale.s = quotient(a, Code::top, inverse);
      scale.r = reciprocal(scale.s);
    } else {
      float s = m / Code::top;
      s = s < 0x1p-126f ? 1.f : s;
      scale.stored = f32_bits(s);
      scale.before = factor;
      scale.lift = s <= 1.f ? kLift : 1.f;
      scale.s = Code::integer && (scale.stored & 0x7f800000u) == 0x7f800000u ? 1.f : s * scale.lift;
      scale.r = 1.f / scale.s;
    }
    return scale;
  }
  static JN_DEV Scale fixed(const float* s) {
    Scale scale;
    scale.s = *s, scale.r = 1.f / scale.s, scale.stored = 0;
    scale.direct = scale.s >= 0x1p-100f && scale.s <= 0x1p100f;
    return scale;
  }
  static constexpr u32 one = Q::POWER ? 127u : 0x3f800000u;  // of a group of zeros

  // Those of lane FROM of each run of LANES lanes; z is lifted before.
  template <int LANES, int FROM> JN_DEV Scale from_lane() const {
    Scale scale;
    scale.s = Q::POWER ? 1.f : shfl_from<LANES, FROM>(s);
    scale.r = shfl_from<LANES, FROM>(r);
    scale.direct = true;
    return scale;
  }
  // What must happen to z of such a lane if not `direct`.
  template <int LANES, int FROM, int V> JN_DEV void lift_from_lane(float (&z)[V]) const {
    const bool kept = Code::integer && !finite();
    const float b = shfl_from<LANES, FROM>(direct ? 1.f : before), l = shfl_from<LANES, FROM>(direct ? 1.f : lift);
    const bool gone = shfl_from<LANES, FROM>(kept ? 1.f : 0.f) != 0.f;
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = gone ? 0.f : z[i] * b * l;
  }

  JN_DEV void divide(float& z) const {
    if constexpr (Q::POWER) {
      z *= r;
    } else if constexpr (Q::STATIC || Q::BOUNDED) {  // the quotient may overflow
      constexpr float top = 2 * Code::top;
      const float q = clip<Q::STATIC>(z * r, top);
      z = fused_multiply_add(fused_multiply_add(q, s, -z), -r, q);
    } else {
      z = quotient(z, s, r);
    }
  }
  // z / s in units of the conversion, clipped where it can lie outside of the format
  template <int V> JN_DEV void apply(float (&z)[V]) const {
    if (Q::STATIC && !direct) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = z[i] / s;
    } else {
      if constexpr (!Q::STATIC) {
        // A tiny s was lifted, so z must be. A scale that is not finite has codes that nobody looks at: int8, which has
        // no NaN, gets zeros. A loop that runs at most once, which no compiler can know: it would turn a branch into V
        // predicated multiplications that every row pays for.
#pragma unroll 1
        for (int rounds = opaque(direct ? 0 : 1); rounds > 0; --rounds) {
#pragma unroll
          for (int i = 0; i < V; ++i) z[i] = Code::integer && !finite() ? 0.f : z[i] * before * lift;
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) divide(z[i]);
    }
    if constexpr (Q::clips) {  // NaN only where the scale is no number
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = clip<Q::STATIC>(z[i], Code::top * unit);
    }
    if constexpr (Code::integer && Q::STATIC) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = z[i] == z[i] ? z[i] : 0.f;
    }
  }

 private:
  static constexpr float unit = Conversion<Code>::unit;

  JN_DEV bool finite() const { return Q::POWER ? stored != 255 : (stored & 0x7f800000u) != 0x7f800000u; }
  // Within 2^50 of 1: products of two such and a unit are normal numbers, and what they make subnormal has code zero.
  static JN_DEV bool is_moderate(u32 e) { return e - (127 - 50) <= 100u; }
  // An e8m0 scale whose lift is its inverse, for an e below 254.
  static JN_DEV Scale of_power(u32 e) {
    Scale scale;
    scale.stored = e;
    scale.s = 1.f;
    scale.lift = bits_f32(e == 255 ? 0x7fc00000u : (254 - e) << 23);
    return scale;
  }
  // From 1 to 253, or 255: the quotient by the top, which is 6 at least, is a normal number.
  static JN_DEV u32 exponent(float a) {
    constexpr float inverse = 1.f / Code::top;
    const float t = a * inverse;
    u32 e;
    if constexpr (Q::EXPONENT == Exponent::kUp)
      e = (f32_bits(t) + 0x7fffffu) >> 23;
    else if constexpr (Q::EXPONENT == Exponent::kDown)
      e = (f32_bits(a) >> 23) - Code::top_exponent;
    else
      e = ((f32_bits(a) + (1u << (22 - Code::MANTISSA))) >> 23) - Code::top_exponent;
    if (t < 0x1p-126f) e = 127;
    return a <= kLargest ? e : 255u;
  }
};

}  // namespace jaxnorm
