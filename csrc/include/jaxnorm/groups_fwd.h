// GroupNorm forward: one launch where a group fits on a block's registers, else two.
//
//   group_norm      reads the part, which is the whole group, once and keeps it in registers
//   group_partials  (mean, sum of squared deviations) of each part of each group
//   group_apply     puts the parts together (Chan et al.), in one order, and normalises one part
#pragma once
#include "jaxnorm/groups.h"
#include "jaxnorm/l2.h"

namespace jaxnorm {

// y = act((x - m) * a + c), a = rstd * weight, c = bias - low * a. Channels last: a thread's channels are always the
// same, their constants stay in registers. Channels first: a chunk has one channel. ONCE: chunks of 16 bytes that make
// way in the cache for what is read again.
template <class M, class W, class B, class Y, bool SILU, bool ONCE = false> struct AffineStore {
  static constexpr int V = M::V, HELD = M::LAST ? V : 1;
  const char *weight, *bias;
  char* y;
  float m[M::UNITS], low, rstd, a[HELD], c[HELD];
  Chunk<W, HELD> raw_weight;
  Chunk<B, HELD> raw_bias;

  // The channels' vectors, asked for before the statistics are known, and not looked at before they are.
  JN_DEV void issue(const M& map) {
    if constexpr (M::LAST) {
      if (!map.live) return;
      if constexpr (W::size > 0) raw_weight = load_chunk<W, V, false>(weight + u64(map.channel()) * W::size);
      if constexpr (B::size > 0) raw_bias = load_chunk<B, V, false>(bias + u64(map.channel()) * B::size);
    }
  }
  JN_DEV void set(const GroupStats (&stats)[M::UNITS]) {
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) m[u] = stats[u].m;
    low = stats[0].low;
    rstd = stats[0].rstd;
    if constexpr (M::LAST) {
      widen_channels<W>(raw_weight, 1.f, a);
      widen_channels<B>(raw_bias, 0.f, c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] *= stats[i / M::U].rstd;
        c[i] = fused_multiply_add(-stats[i / M::U].low, a[i], c[i]);
      }
    }
  }
  template <class X> JN_DEV void store(const M& map, const Step<M, X>& x, int step) const {
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (!map.has(step, k)) continue;
      float f[V], scale = 1.f, shift = 0.f;
      if constexpr (!M::LAST) {
        const u32 channel = map.channel(step, k);
        scale = rstd * load_channel<W>(weight, channel, 1.f);
        shift = fused_multiply_add(-low, scale, load_channel<B>(bias, channel, 0.f));
      }
      widen<X, V, true>(x.raw[k], f);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = f[i] - m[i / M::U];
        f[i] = M::LAST ? fused_multiply_add(d, a[M::LAST ? i : 0], c[M::LAST ? i : 0])
                       : fused_multiply_add(d, scale, shift);
      }
      if constexpr (SILU) silu_of<M::U>(f);
      if constexpr (ONCE)
        store_once(y + map.at(step, k) * Y::size, narrow<Y, V>(f));
      else
        store_bits(y + map.at(step, k) * Y::size, narrow<Y, V>(f));
    }
  }
};

// Sums of the elements of a step, or of their deviations and squared deviations, added to v.
template <class M, class X> JN_DEV void add_values(const M& map, const Step<M, X>& x, float (&v)[1][M::UNITS]) {
  constexpr int V = M::V;
#pragma unroll
  for (int k = 0; k < M::K; ++k) {  // chunks that are not there are zeros
    float f[V];
    widen<X, V>(x.raw[k], f);
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      float sum = f[u * M::U];
#pragma unroll
      for (int i = 1; i < M::U; ++i) sum += f[u * M::U + i];
      v[0][u] += sum;
    }
  }
}
template <class M, class X>
JN_DEV void add_deviations(const M& map, const Step<M, X>& x, int step, const float (&pivot)[1][M::UNITS],
                           float (&v)[2][M::UNITS]) {
  constexpr int V = M::V;
#pragma unroll
  for (int k = 0; k < M::K; ++k) {
    if (!map.has(step, k)) continue;
    float f[V];
    widen<X, V, true>(x.raw[k], f);
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      const float first = f[u * M::U] - pivot[0][u];
      float sum = first, squares = first * first;
#pragma unroll
      for (int i = 1; i < M::U; ++i) {
        const float d = f[u * M::U + i] - pivot[0][u];
        sum += d;
        squares = fused_multiply_add(d, d, squares);
      }
      v[0][u] += sum;
      v[1][u] += squares;
    }
  }
}

// What the deviations of a group are counted from. Of 16 bits: the mean of its first U values, the same for every part
// and known without waiting for other threads, whose loads may be last in a queue as long as a block's part of the
// chip. As those values are in the group, variance loses N / U units of its last place at most. Float32, whose last
// places matter: the mean of the first step of each part. That too in channels first and groups of less than 1 MiB: a
// barrier early on keeps the waves of a cluster's small blocks side by side (8x640x64x64 23.3 us, 25.1 without).
template <class M, class X> JN_CONST bool pivots_are_sampled() {
  if constexpr (M::LAST)
    return X::size > 2;
  else
    return X::size > 2 || M::CHUNKS < 65536;
}
// Asked for, then widened where they are needed: what is asked for behind them must not wait until they are there.
template <class M, class X> struct FirstValues {
  Chunk<X, M::U> raw[M::UNITS];
  JN_DEV void issue(const M& map, const char* x) {
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) raw[u] = load_chunk<X, M::U, false>(x + map.first_of_group(u) * X::size);
  }
  JN_DEV void get(float (&pivot)[1][M::UNITS]) const {
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      float f[M::U], sum = 0.f;
      widen<X, M::U, true>(raw[u], f);
#pragma unroll
      for (int i = 0; i < M::U; ++i) sum += f[i];
      pivot[0][u] = sum * (1.f / M::U);
    }
  }
};
template <class M, class X> JN_DEV void first_values(const M& map, const char* x, float (&pivot)[1][M::UNITS]) {
  FirstValues<M, X> first;
  first.issue(map, x);
  first.get(pivot);
}

// stats [batch, 3, C]: m, low and rstd of every channel's group, written by the blocks of the first part.
template <class M> JN_DEV void save_stats(const M& map, const GroupStats (&stats)[M::UNITS], float* out) {
  if (map.part != 0) return;
  out += map.batch * (3 * M::C);
  if constexpr (M::LAST) {
    if (!map.live || map.q != 0) return;
#pragma unroll
    for (int i = 0; i < M::V; ++i) {
      float* at = out + map.channel() + i;
      const GroupStats& s = stats[i / M::U];
      at[0] = s.m, at[M::C] = s.low, at[2 * M::C] = s.rstd;
    }
  } else {
    for (u32 i = map.thread; i < u32(M::CG); i += M::THREADS) {
      float* at = out + map.g * M::CG + i;
      at[0] = stats[0].m, at[M::C] = stats[0].low, at[2 * M::C] = stats[0].rstd;
    }
  }
}

// One launch: PART is the whole group and STEPS is 1.
template <class M, class X, class Store>
JN_DEV void group_norm(const char* x, Store store, float eps, u64 batches, float* stats_out) {
  static_assert(M::PARTS == 1 && M::STEPS == 1, "the group in registers");
  const u64 block = linear_block();
  if (block >= M::blocks(batches)) return;
  const M map(block, thread_id());
  float* memory = (float*)shared_memory();
  Step<M, X> step;
  step.issue(map, x, 0);
  store.issue(map);

  const float count = float(M::CG) * float(M::S);
  float pivot[1][M::UNITS] = {};
  add_values(map, step, pivot);
  map.template totals<1>(pivot, memory);
#pragma unroll
  for (int u = 0; u < M::UNITS; ++u) pivot[0][u] *= 1.f / count;
  float v[2][M::UNITS] = {};
  add_deviations(map, step, 0, pivot, v);
  map.template totals<2>(v, memory + M::sum_floats(1));
  GroupStats stats[M::UNITS];
#pragma unroll
  for (int u = 0; u < M::UNITS; ++u) {
    const float e = v[0][u] * (1.f / count);
    stats[u].set(pivot[0][u], e, fused_multiply_add(-e, e, v[1][u] * (1.f / count)), eps);
  }
  store.set(stats);
  store.store(map, step, 0);
  if (stats_out != nullptr) save_stats(map, stats, stats_out);
}

// Mean and squares of one part from its pivot and the sums of deviations and squared deviations v.
template <bool LOW, class M>
JN_DEV void save_part(const M& map, const float (&pivot)[1][M::UNITS], const float (&v)[2][M::UNITS], float* partials) {
  const float share = 1.f / map.count();
#pragma unroll
  for (int u = 0; u < M::UNITS; ++u) {
    if (!map.owns(u)) continue;
    const float e = v[0][u] * share;
    float* at = partials + (map.batch * M::G + map.whole_group(u)) * ((LOW ? 3 : 2) * M::PARTS) + map.part;
    at[0] = LOW ? pivot[0][u] : pivot[0][u] + e;
    at[M::PARTS] = fused_multiply_add(-e, v[0][u], v[1][u]);
    if constexpr (LOW) at[2 * M::PARTS] = e;
  }
}

// partials [batch * G, 2 or 3, PARTS]: mean, sum of squared deviations, and with LOW what the mean lost to rounding.
template <class M, class X, bool LOW> JN_DEV void group_partials(const char* x, u64 batches, float* partials) {
  const u64 block = linear_block();
  let_next_launch_begin();
  if (block >= M::blocks(batches)) return;
  const M map(block, thread_id());
  float* memory = (float*)shared_memory();
  float pivot[1][M::UNITS] = {};
  if constexpr (!pivots_are_sampled<M, X>()) first_values<M, X>(map, x, pivot);
  Step<M, X> step;
  step.issue(map, x, 0);
  if constexpr (pivots_are_sampled<M, X>()) add_values(map, step, pivot);
  Step<M, X> ahead;
  if constexpr (M::STEPS > 1) ahead.issue(map, x, 1);
  if constexpr (pivots_are_sampled<M, X>()) map.sample(pivot, memory);
  float v[2][M::UNITS] = {};
  add_deviations(map, step, 0, pivot, v);
#pragma unroll 1
  for (int s = 1; s < M::STEPS; ++s) {
    step = ahead;
    if (s + 1 < M::STEPS) ahead.issue(map, x, s + 1);
    add_deviations(map, step, s, pivot, v);
  }
  map.template totals<2, 1>(v, memory + M::sum_floats(1));
  save_part<LOW>(map, pivot, v, partials);
}

// Statistics of the group from its parts, by SUB lanes; all of them get the result.
template <class M, bool LOW> struct Parts {
  static constexpr int SUB = min_of(kWave, next_power_of_2(M::PARTS)), EACH = ceil_div(M::PARTS, SUB);
  float mean[EACH], low[EACH], squares[EACH], pivot;

  JN_DEV void issue(const float* at, u32 lane) {
    pivot = at[0];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const u32 p = i * SUB + lane;
      const bool there = M::PARTS % SUB == 0 || p < u32(M::PARTS);
      mean[i] = there ? at[p] : 0.f;
      squares[i] = there ? at[M::PARTS + p] : 0.f;
      low[i] = LOW && there ? at[2 * M::PARTS + p] : 0.f;
    }
  }
  JN_DEV GroupStats combine(u32 lane, float eps) const {
    const float count = float(M::CG) * float(M::S);
    float sum = 0.f, spread = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const u32 p = i * SUB + lane;
      if (M::PARTS % SUB == 0 || p < u32(M::PARTS))
        sum = fused_multiply_add(M::part_count(p), (mean[i] - pivot) + low[i], sum);
    }
    const float offset = lanes_sum<SUB / 2>(sum) * (1.f / count);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const u32 p = i * SUB + lane;
      if (!(M::PARTS % SUB == 0 || p < u32(M::PARTS))) continue;
      const float d = ((mean[i] - pivot) - offset) + low[i];
      spread += fused_multiply_add(M::part_count(p) * d, d, squares[i]);
    }
    GroupStats stats;
    stats.set(pivot, offset, lanes_sum<SUB / 2>(spread) * (1.f / count), eps);
    return stats;
  }
};

// The statistics of a thread's units.
template <class M, bool LOW>
JN_DEV void combine_parts(const M& map, const float* partials, float eps, float* memory,
                          GroupStats (&stats)[M::UNITS]) {
  using P = Parts<M, LOW>;
  constexpr int planes = (LOW ? 3 : 2) * M::PARTS;
  const u32 lane = map.thread % P::SUB;
  partials += map.batch * M::G * planes;
  if constexpr (!M::LAST) {  // one group: every wave puts it together for itself
    P parts;
    parts.issue(partials + map.g * planes, lane);
    stats[0] = parts.combine(lane, eps);
  } else {
    constexpr int at_once = M::THREADS / P::SUB;
#pragma unroll 2
    for (int s = 0; s < M::GROUPS; s += at_once) {
      const u32 g = s + map.thread / P::SUB, whole = map.tile * M::GROUPS + g;
      P parts{};
      if (g < u32(M::GROUPS) && whole < u32(M::G)) parts.issue(partials + u64(whole) * planes, lane);
      const GroupStats found = parts.combine(lane, eps);
      if (g < u32(M::GROUPS) && lane == 0)
        memory[3 * g] = found.m, memory[3 * g + 1] = found.low, memory[3 * g + 2] = found.rstd;
    }
    barrier();
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      const float* at = memory + 3 * (map.q < u32(M::Q) ? map.group(u) : 0);
      stats[u] = GroupStats{at[0], at[1], at[2]};
    }
  }
}

// Blocks go backwards: what group_partials read last is what a cache still has.
template <class M, class X, class Store, bool LOW>
JN_DEV void group_apply(const char* x, const float* partials, Store store, float eps, u64 batches, float* stats_out) {
  const u64 block = linear_block();
  if (block >= M::blocks(batches)) return;
  const M map(M::blocks(batches) - 1 - block, thread_id());
  Step<M, X> step, ahead;
  step.issue(map, x, 0);
  store.issue(map);
  wait_for_launch_before();
  GroupStats stats[M::UNITS];
  combine_parts<M, LOW>(map, partials, eps, (float*)shared_memory(), stats);
  store.set(stats);
#pragma unroll 1
  for (int s = 0; s < M::STEPS; ++s) {
    if (s + 1 < M::STEPS) ahead.issue(map, x, s + 1);
    store.store(map, step, s);
    step = ahead;
  }
  if (stats_out != nullptr) save_stats(map, stats, stats_out);
}

}  // namespace jaxnorm
