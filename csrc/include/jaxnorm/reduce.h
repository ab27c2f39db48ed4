// The sum over a row, in one order whatever the launch looks like.
//
// A row is cut into chunks of V elements; chunk c sits in lane c % wave of virtual wave c / wave. The sum is: inside a
// chunk element by element (the caller), then over the lanes of each virtual wave by halving (lane l takes lane l +
// wave/2, ...), then over the virtual waves by halving, zeros filling up to a power of two. This depends on N, V and
// the wave only: not on how many threads share a row, how many chunks one of them holds, nor where it keeps them. So a
// plan may choose those by M.
#pragma once
#include "jaxnorm/gpu.h"

namespace jaxnorm {

#if defined(JN_LANE_SWAPS)
// a of this lane and of the lane D away where this one is the lower of the two, b of both where it is the upper. The
// order of the two does not matter to a sum.
template <int D> JN_DEV float swapped_sum(float a, float b) {
  const Swapped s = lane_swap<D>(f32_bits(a), f32_bits(b));
  return bits_f32(s.a) + bits_f32(s.b);
}
#endif

// Sums each of B values over the lanes of a wave with about B + log2(wave) shuffles instead of B * log2(wave): at each
// distance a lane keeps one of two values and gives the other away. Afterwards a lane holds the sum of value
// packed_index<B>(lane).
template <int D, int B> JN_DEV float packed_sum(float (&v)[B], u32 lane) {
  if constexpr (D == 0) {
    static_assert(B == 1, "more values than lanes");
    return v[0];
#if defined(JN_LANE_SWAPS)
  } else if constexpr (D >= 16) {  // one exchange serves both: no value to choose, the same sums
    float half[(B + 1) / 2];
#pragma unroll
    for (int j = 0; j < (B + 1) / 2; ++j) half[j] = swapped_sum<D>(v[2 * j], v[min_of(2 * j + 1, B - 1)]);
    return packed_sum<D / 2>(half, lane);
#endif
  } else if constexpr (B == 1) {
    v[0] += shfl_xor<D>(v[0]);
    return packed_sum<D / 2>(v, lane);
  } else {
    float half[(B + 1) / 2];
    const bool upper = (lane & D) != 0;
#pragma unroll
    for (int j = 0; j < B / 2; ++j) {
      const float keep = upper ? v[2 * j + 1] : v[2 * j], give = upper ? v[2 * j] : v[2 * j + 1];
      half[j] = keep + shfl_xor<D>(give);
    }
    if constexpr (B % 2 == 1) half[B / 2] = v[B - 1] + shfl_xor<D>(v[B - 1]);
    return packed_sum<D / 2>(half, lane);
  }
}
template <int B> JN_DEV int packed_index(u32 lane) {
  int index = 0;
#pragma unroll
  for (int bit = 0; bit < log2_of(next_power_of_2(B)); ++bit) index |= (lane & (kWave / 2 >> bit)) ? 1 << bit : 0;
  return index;
}

template <int D> JN_DEV float lanes_sum(float v) {
#if defined(JN_LANE_SWAPS)
  if constexpr (D >= 16) return lanes_sum<D / 2>(swapped_sum<D>(v, v));
#endif
  if constexpr (D > 0)
    return lanes_sum<D / 2>(v + shfl_xor<D>(v));
  else
    return v;
}
// The same from distance LOW up to HIGH, the largest first: sums over the bits that packed_sum used for the index.
template <int D, int STOP> JN_DEV float index_bits_sum(float v) {
#if defined(JN_LANE_SWAPS)
  if constexpr (D < STOP && D >= 16) return index_bits_sum<D * 2, STOP>(swapped_sum<D>(v, v));
#endif
  if constexpr (D < STOP)
    return index_bits_sum<D * 2, STOP>(v + shfl_xor<D>(v));
  else
    return v;
}
// v[i] + v[i + COUNT / 2], then halves of halves; COUNT is a power of two. Recursion, because a loop over halves is not
// unrolled by every compiler, and an array that is indexed at run time goes to memory.
template <int COUNT> JN_DEV float halving_sum(const float (&v)[COUNT]) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    float half[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) half[i] = v[i] + v[i + COUNT / 2];
    return halving_sum(half);
  }
}

// Row sums for LANES threads that hold chunks lane, lane + LANES, ... (PER of them), for rows of CHUNKS chunks.
template <int CHUNKS, int LANES> struct RowSum {
  static constexpr int per = ceil_div(CHUNKS, LANES), waves = LANES / kWave, virtual_waves = ceil_div(CHUNKS, kWave);
  static constexpr bool in_wave = LANES <= kWave;
  static_assert(LANES >= kWave || (next_power_of_2(CHUNKS) <= kWave && next_power_of_2(LANES) == LANES),
                "lanes of a short row");
  // Bytes of shared memory for one sum; a caller that sums repeatedly alternates between two, one barrier each.
  static constexpr int bytes = in_wave ? 0 : ceil_div(per * waves, 4) * 16;

  // All lanes get the sum. part[k] belongs to chunk k * LANES + lane, 0 beyond the row.
  static JN_DEV float within_wave(float (&part)[per], u32 lane) {
    if constexpr (LANES < kWave) {
      constexpr int slots = next_power_of_2(per);
      float v[slots];
#pragma unroll
      for (int k = 0; k < slots; ++k) v[k] = k < per ? part[k < per ? k : 0] : 0.f;
      return lanes_sum<LANES / 2>(halving_sum(v));
    } else {
      float v = packed_sum<kWave / 2>(part, lane);
      constexpr int slots = next_power_of_2(per);
      if constexpr (slots != per) v = packed_index<per>(lane) < per ? v : 0.f;
      return index_bits_sum<kWave / slots, kWave>(v);
    }
  }

  // Several waves: each puts its sums of chunks first .. first + B - 1 into shared memory ...
  template <int B> static JN_DEV void put(float* sums, float (&part)[B], int first, u32 thread) {
    constexpr int rest = kWave / next_power_of_2(B);
    const u32 lane = thread % kWave;
    const int k = packed_index<B>(lane);
    const float v = packed_sum<kWave / 2>(part, lane);
    if (lane % rest == 0 && k < B) sums[u32(first + k) * waves + thread / kWave] = v;
  }
  // ... and after a barrier all threads add them up.
  static JN_DEV float get(const float* sums, u32 thread) {
    barrier();
    return collect(sums, thread);
  }
  static JN_DEV float collect(const float* sums, u32 thread) {
    constexpr int slots = next_power_of_2(virtual_waves);
    if constexpr (slots <=
                  16) {  // 4 reads of 16 bytes and 15 additions take less time than a read and log2(16) shuffles
      float v[slots];
#pragma unroll
      for (int i = 0; i < slots; ++i) v[i] = i < virtual_waves ? sums[i] : 0.f;
      return halving_sum(v);
    } else {
      constexpr int each = max_of(1, slots / kWave), width = min_of(slots, kWave);
      float v[each];
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const u32 index = i * kWave + thread % width;
        v[i] = index < virtual_waves ? sums[index] : 0.f;
      }
      return lanes_sum<width / 2>(halving_sum(v));
    }
  }

  // COUNT sums at once, one or two: the bits of COUNT sums one after the other, with the shuffles of the two packed and
  // one barrier. The second lies `bytes` behind the first.
  template <int COUNT> static JN_DEV void within_wave(float (&part)[COUNT][per], u32 lane, float (&total)[COUNT]) {
    if constexpr (COUNT == 1) {
      total[0] = within_wave(part[0], lane);
    } else if constexpr (LANES < kWave || 2 * per > kWave) {
      total[0] = within_wave(part[0], lane);
      total[1] = within_wave(part[1], lane);
    } else {
      constexpr int slots = next_power_of_2(per);
      float both[2 * per];
#pragma unroll
      for (int k = 0; k < per; ++k) both[2 * k] = part[0][k], both[2 * k + 1] = part[1][k];
      float v = packed_sum<kWave / 2>(both, lane);  // the upper half of the lanes has the second sum
      if constexpr (slots != per) v = packed_index<2 * per>(lane) / 2 < per ? v : 0.f;
      v = index_bits_sum<kWave / 2 / slots, kWave / 2>(v);
      const float other = shfl_xor<kWave / 2>(v);
      const bool upper = (lane & (kWave / 2)) != 0;
      total[0] = upper ? other : v;
      total[1] = upper ? v : other;
    }
  }
  template <int COUNT, int B> static JN_DEV void put(float* sums, float (&part)[COUNT][B], int first, u32 thread) {
    if constexpr (COUNT == 1) {
      put(sums, part[0], first, thread);
    } else if constexpr (2 * B > kWave) {
      put(sums, part[0], first, thread);
      put(sums + bytes / 4, part[1], first, thread);
    } else {
      constexpr int rest = kWave / next_power_of_2(2 * B);
      float both[2 * B];
#pragma unroll
      for (int k = 0; k < B; ++k) both[2 * k] = part[0][k], both[2 * k + 1] = part[1][k];
      const u32 lane = thread % kWave;
      const int index = packed_index<2 * B>(lane), k = index / 2;
      const float v = packed_sum<kWave / 2>(both, lane);
      if (lane % rest == 0 && k < B && first + k < per)  // behind the last lies the other sum
        sums[u32(first + k) * waves + thread / kWave + (index % 2) * (bytes / 4)] = v;
    }
  }
  template <int COUNT> static JN_DEV void get(const float* sums, u32 thread, float (&total)[COUNT]) {
    barrier();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) total[i] = collect(sums + i * (bytes / 4), thread);
  }
};

}  // namespace jaxnorm
