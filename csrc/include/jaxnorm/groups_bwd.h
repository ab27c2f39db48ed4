// GroupNorm backward, in two passes over x and dy:
//
//   group_bwd_sums / group_bwd_rows  for each channel and part sum(g) and sum(g * xh), which add_partials makes the
//                                    gradients of bias and weight of, and the same times the weight for each group
//   group_bwd_dx                     dx = rstd * (gw - mean(gw) - xh * mean(gw * xh)) over one part
//
// xh = ((x - m) - low) * rstd; g = dy, or dy * silu'(xh * weight + bias); gw = g * weight.
#pragma once
#include "jaxnorm/groups.h"

namespace jaxnorm {

// stats [batch, 3, C] of one channel: xh = (x - m) * rstd - shift
struct ChannelStats {
  float m, rstd, shift;
  JN_DEV void load(const float* stats, u64 batch, u32 channel, int channels) {
    const float* at = stats + batch * (3 * channels) + channel;
    m = at[0];
    rstd = at[2 * channels];
    shift = at[channels] * rstd;
  }
  JN_DEV float normalised(float x) const { return fused_multiply_add(x - m, rstd, -shift); }
};

// What a thread needs of its channels. Channels last: constant. The bias matters to the slope of the activation only.
template <class M, class W, class B, bool SILU> struct ChannelConstants {
  static constexpr int V = M::V;
  ChannelStats stats[M::UNITS];
  float w[V], b[SILU ? V : 1];
  JN_DEV void load(const M& map, const char* weight, const char* bias, const float* s) {
    load_stats(map, s);
    load_vectors(map, weight, bias);
  }
  JN_DEV void load_stats(const M& map, const float* s) {
    if (!map.live) return;
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) stats[u].load(s, map.batch, map.channel() + u * M::U, M::C);
  }
  JN_DEV void load_vectors(const M& map, const char* weight, const char* bias) {
    if (!map.live) return;
    load_channels<W, V>(weight, map.channel(), 1.f, w);
    if constexpr (SILU) load_channels<B, V>(bias, map.channel(), 0.f, b);
  }
};

template <bool SILU> JN_DEV float through_activation(float g, float xh, float w, float b) {
  return SILU ? g * silu_slope(fused_multiply_add(xh, w, b)) : g;
}

struct SumsOut {
  float* partials;  // [batch * PARTS, 2, C]: sum(g * xh), sum(g); or null
  float* shares;    // [batch * G, 2, shares of a group]: the same times the weight, added up over channels
};

// One step of the sums over a thread's channels.
template <class M, class X, class DY, class W, class B, bool SILU>
JN_DEV void add_products(const M& map, const Step<M, X>& xs, const Step<M, DY>& gs, int step,
                         const ChannelConstants<M, W, B, SILU>& constants, float (&sums)[2][M::V]) {
  constexpr int V = M::V;
#pragma unroll
  for (int k = 0; k < M::K; ++k) {
    if (!map.has(step, k)) continue;
    float f[V], g[V];
    widen<X, V>(xs.raw[k], f);
    widen<DY, V>(gs.raw[k], g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float xh = constants.stats[i / M::U].normalised(f[i]);
      const float g1 = through_activation<SILU>(g[i], xh, constants.w[i], constants.b[SILU ? i : 0]);
      sums[0][i] = fused_multiply_add(g1, xh, sums[0][i]);
      sums[1][i] += g1;
    }
  }
}

// The sums of a block's threads to those of its channels, save(n, column of the tile, sum), and of its groups, times
// the weight: the result, [2, GROUPS]. Memory: ChannelSums::floats, no barrier before, one behind.
template <class M> struct ChannelSums {
  static constexpr int floats = 2 * M::Q * M::TILE + 2 * M::TILE + 2 * M::GROUPS;
};
template <class M, class W, class Save>
JN_DEV const float* group_sums(const M& map, const float (&sums)[2][M::V], float* memory, const char* weight,
                               const Save& save) {
  constexpr int V = M::V, Q = M::Q, TILE = M::TILE;
  float* totals = memory + 2 * Q * TILE;
  if (map.q < u32(Q)) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
      store_bits((char*)(memory + (n * Q + map.q) * TILE + map.j * V), narrow<F32, V>(sums[n]));
  }
  barrier();
  for (u32 i = map.thread; i < u32(2 * TILE); i += M::THREADS) {
    const u32 n = i / TILE, column = i % TILE, channel = map.tile * TILE + column;
    float sum = 0.f;
#pragma unroll 4
    for (int q = 0; q < Q; ++q) sum += memory[(n * Q + q) * TILE + column];
    const bool there = M::C % TILE == 0 || channel < u32(M::C);
    totals[i] = there ? sum * load_channel<W>(weight, channel, 1.f) : 0.f;
    if (there) save(n, column, sum);
  }
  float* groups = totals + 2 * TILE;
  segment_sums<2 * M::GROUPS, M::CG, M::THREADS>(totals, groups, map.thread,
                                                 [](u32 segment, u32 i) { return segment * M::CG + i; });
  barrier();
  return groups;
}

// Channels last. Shared memory: ChannelSums::floats.
template <class M, class X, class DY, class W, class B, bool SILU>
JN_DEV void group_bwd_sums(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                           u64 batches, SumsOut out) {
  const u64 block = linear_block();
  let_next_launch_begin();
  if (block >= M::blocks(batches)) return;
  const M map(block, thread_id());
  Step<M, X> xs, xs_ahead;
  Step<M, DY> gs, gs_ahead;
  xs.issue(map, x, 0);
  gs.issue(map, dy, 0);
  ChannelConstants<M, W, B, SILU> constants;
  constants.load(map, weight, bias, stats);

  float sums[2][M::V] = {};
#pragma unroll 1
  for (int s = 0; s < M::STEPS; ++s) {
    if (s + 1 < M::STEPS) xs_ahead.issue(map, x, s + 1), gs_ahead.issue(map, dy, s + 1);
    add_products(map, xs, gs, s, constants, sums);
    xs = xs_ahead, gs = gs_ahead;
  }

  float* partials = out.partials + (map.batch * M::PARTS + map.part) * (2 * M::C) + map.tile * M::TILE;
  const float* groups = group_sums<M, W>(map, sums, (float*)shared_memory(), weight, [&](u32 n, u32 column, float sum) {
    if (out.partials != nullptr) partials[n * M::C + column] = sum;
  });
  for (u32 i = map.thread; i < u32(2 * M::GROUPS); i += M::THREADS) {
    const u32 n = i / M::GROUPS, g = map.tile * M::GROUPS + i % M::GROUPS;
    if (g < u32(M::G)) out.shares[((map.batch * M::G + g) * 2 + n) * M::PARTS + map.part] = groups[i];
  }
}

// Channels first: LANES threads sum PART chunks of one channel; a block has LINES of them (one, if LANES is more than a
// wave).
template <int S_, int C_, int CG_, int V_, int LANES_, int LINES_, int K_, int PART_> struct ChannelMap {
  static constexpr int S = S_, C = C_, CG = CG_, V = V_, LANES = LANES_, LINES = LINES_, K = K_, PART = PART_;
  static constexpr int THREADS = LANES * LINES, WAVES = THREADS / kWave, CHUNKS = S / V;
  static constexpr int PARTS = ceil_div(CHUNKS, PART), STEPS = ceil_div(PART, LANES* K), G = C / CG;
  static_assert(S % V == 0 && THREADS % kWave == 0 && (LINES == 1 || LANES <= kWave), "lines of lanes");

  u64 row;  // batch * C + channel
  u64 start;
  u32 part, lane;
  bool live;

  JN_DEV ChannelMap(u64 block, u32 thread, u64 batches) {
    const u64 item = block * LINES + thread / LANES;
    lane = thread % LANES;
    part = u32(item % PARTS);
    row = item / PARTS;
    live = row < batches * C;
    start = (row * CHUNKS + u64(part) * PART + lane) * V;
  }
  static JN_DEV u64 blocks(u64 batches) { return (batches * (u64(C) * PARTS) + (LINES - 1)) / LINES; }
  JN_DEV bool has(int step, int k) const {
    const u32 c = u32(step * K + k) * LANES + lane;
    return live && c < u32(PART) && (CHUNKS % PART == 0 || part * PART + c < u32(CHUNKS));
  }
  JN_DEV u64 at(int step, int k) const { return start + u64(u32(step * K + k) * LANES) * V; }
};

// What a thread needs of its one channel.
template <class X, class DY, class W, class B, bool SILU> struct OneChannel {
  ChannelStats stats;
  float w, b;
  template <class M> JN_DEV void load(const M& map, const char* weight, const char* bias, const float* s) {
    *this = OneChannel{};
    w = 1.f;
    if (!map.live) return;
    const u32 channel = u32(map.row % M::C);
    stats.load(s, map.row / M::C, channel, M::C);
    w = load_channel<W>(weight, channel, 1.f);
    if constexpr (SILU) b = load_channel<B>(bias, channel, 0.f);
  }
  template <class M>
  JN_DEV void add_products(const M& map, const Step<M, X>& xs, const Step<M, DY>& gs, int step,
                           float (&sums)[2]) const {
    constexpr int V = M::V;
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (!map.has(step, k)) continue;
      float f[V], g[V], part[2] = {};
      widen<X, V>(xs.raw[k], f);
      widen<DY, V>(gs.raw[k], g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float xh = stats.normalised(f[i]);
        const float g1 = through_activation<SILU>(g[i], xh, w, b);
        part[0] = fused_multiply_add(g1, xh, part[0]);
        part[1] += g1;
      }
      sums[0] += part[0];
      sums[1] += part[1];
    }
  }
};

// The sums of a line's threads. Memory: 2 * WAVES floats, if LANES is more than a wave; no barrier before nor behind.
template <class M> JN_DEV void save_row_sums(const M& map, float (&sums)[2], float* memory, float w, SumsOut out) {
  sums[0] = lanes_sum<min_of(M::LANES, kWave) / 2>(sums[0]);
  sums[1] = lanes_sum<min_of(M::LANES, kWave) / 2>(sums[1]);
  const u32 thread = thread_id();
  if constexpr (M::LANES > kWave) {
    if (thread % kWave == 0) memory[thread / kWave] = sums[0], memory[M::WAVES + thread / kWave] = sums[1];
    barrier();
    constexpr int slots = next_power_of_2(M::WAVES);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float all[slots];
#pragma unroll
      for (int i = 0; i < slots; ++i) all[i] = i < M::WAVES ? memory[n * M::WAVES + (i < M::WAVES ? i : 0)] : 0.f;
      sums[n] = halving_sum(all);
    }
  }
  if (!map.live || map.lane != 0) return;
  const u64 batch = map.row / M::C;
  const u32 channel = u32(map.row % M::C);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (out.partials != nullptr)
      out.partials[(batch * M::PARTS + map.part) * (2 * M::C) + n * M::C + channel] = sums[n];
    const u64 group = batch * M::G + channel / M::CG;
    out.shares[(group * 2 + n) * (M::CG * M::PARTS) + channel % M::CG * M::PARTS + map.part] = sums[n] * w;
  }
}

template <class M, class X, class DY, class W, class B, bool SILU>
JN_DEV void group_bwd_rows(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                           u64 batches, SumsOut out) {
  const u64 block = linear_block();
  let_next_launch_begin();
  if (block >= M::blocks(batches)) return;
  const M map(block, thread_id(), batches);
  Step<M, X> xs, xs_ahead;
  Step<M, DY> gs, gs_ahead;
  xs.issue(map, x, 0);
  gs.issue(map, dy, 0);
  OneChannel<X, DY, W, B, SILU> channel;
  channel.load(map, weight, bias, stats);

  float sums[2] = {};
#pragma unroll 1
  for (int s = 0; s < M::STEPS; ++s) {
    if (s + 1 < M::STEPS) xs_ahead.issue(map, x, s + 1), gs_ahead.issue(map, dy, s + 1);
    channel.add_products(map, xs, gs, s, sums);
    xs = xs_ahead, gs = gs_ahead;
  }
  save_row_sums(map, sums, (float*)shared_memory(), channel.w, out);
}

// mean(gw * xh) and mean(gw) of a group from its SHARES shares, by SUB lanes.
struct GroupMeans {
  float along, plain;
};
template <int SHARES, int SUB> JN_DEV GroupMeans add_shares(const float* shares, u32 lane, float scale, bool there) {
  float sum[2] = {};
  if (there) {
#pragma unroll 2
    for (u32 p = lane; p < u32(SHARES); p += SUB) sum[0] += shares[p], sum[1] += shares[SHARES + p];
  }
  return GroupMeans{lanes_sum<SUB / 2>(sum[0]) * scale, lanes_sum<SUB / 2>(sum[1]) * scale};
}

// Those of a thread's units. Channels last; memory: 2 * GROUPS floats.
template <class M, int SHARES>
JN_DEV void unit_means(const M& map, const float* shares, float scale, float* memory, GroupMeans (&means)[M::UNITS]) {
  constexpr int SUB = min_of(kWave, next_power_of_2(SHARES)), at_once = M::THREADS / SUB;
  const u32 lane = map.thread % SUB;
#pragma unroll 2
  for (int s = 0; s < M::GROUPS; s += at_once) {
    const u32 g = s + map.thread / SUB, whole = map.tile * M::GROUPS + g;
    const bool there = g < u32(M::GROUPS) && whole < u32(M::G);
    const GroupMeans found = add_shares<SHARES, SUB>(shares + u64(whole) * (2 * SHARES), lane, scale, there);
    if (there && lane == 0) memory[2 * g] = found.along, memory[2 * g + 1] = found.plain;
  }
  barrier();
#pragma unroll
  for (int u = 0; u < M::UNITS; ++u) {
    const float* at = memory + 2 * (map.live ? map.group(u) : 0);
    means[u] = GroupMeans{at[0], at[1]};
  }
}

template <bool SILU>
JN_DEV float dx_value(float x, float g, const ChannelStats& stats, const GroupMeans& means, float w, float b) {
  const float xh = stats.normalised(x);
  const float gw = through_activation<SILU>(g, xh, w, b) * w;
  return stats.rstd * fused_multiply_add(-xh, means.along, gw - means.plain);
}

// dx of a chunk, channels last.
template <class X, class DY, class DX, class M, class W, class B, bool SILU>
JN_DEV Chunk<DX, M::V> chunk_dx(const Chunk<X, M::V>& x, const Chunk<DY, M::V>& dy,
                                const ChannelConstants<M, W, B, SILU>& constants, const GroupMeans (&means)[M::UNITS]) {
  constexpr int V = M::V;
  float f[V], g[V];
  widen<X, V>(x, f);
  widen<DY, V>(dy, g);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int u = i / M::U;
    f[i] = dx_value<SILU>(f[i], g[i], constants.stats[u], means[u], constants.w[i], constants.b[SILU ? i : 0]);
  }
  return narrow<DX, V>(f);
}

// Blocks go backwards, as in group_apply; `before` of them do something else. Shared memory (channels last): 2 * GROUPS
// floats.
template <class M, class X, class DY, class W, class B, class DX, bool SILU, int SHARES>
JN_DEV void group_bwd_dx(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                         const float* shares, u64 batches, char* dx, u32 before) {
  constexpr int V = M::V, SUB = min_of(kWave, next_power_of_2(SHARES));
  const u64 block = linear_block() - before;
  if (block >= M::blocks(batches)) return;
  const M map(M::blocks(batches) - 1 - block, thread_id());
  Step<M, X> xs, xs_ahead;
  Step<M, DY> gs, gs_ahead;
  xs.issue(map, x, 0);
  gs.issue(map, dy, 0);
  const float scale = 1.f / (float(M::CG) * float(M::S));
  const u32 lane = map.thread % SUB;
  shares += map.batch * M::G * (2 * SHARES);
  GroupMeans means[M::UNITS];
  ChannelStats first;
  [[maybe_unused]] ChannelConstants<M, W, B, SILU> constants;
  if constexpr (M::LAST) {
    constants.load(map, weight, bias, stats);
    wait_for_launch_before();
    unit_means<M, SHARES>(map, shares, scale, (float*)shared_memory(), means);
  } else {
    first.load(stats, map.batch, map.g * M::CG, M::C);
    wait_for_launch_before();
    means[0] = add_shares<SHARES, SUB>(shares + map.g * (2 * SHARES), lane, scale, true);
  }

#pragma unroll 1
  for (int s = 0; s < M::STEPS; ++s) {
    if (s + 1 < M::STEPS) xs_ahead.issue(map, x, s + 1), gs_ahead.issue(map, dy, s + 1);
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (!map.has(s, k)) continue;
      Chunk<DX, V> result;
      if constexpr (M::LAST) {
        result = chunk_dx<X, DY, DX>(xs.raw[k], gs.raw[k], constants, means);
      } else {
        const float w = load_channel<W>(weight, map.channel(s, k), 1.f);
        const float b = SILU ? load_channel<B>(bias, map.channel(s, k), 0.f) : 0.f;
        float f[V], g[V];
        widen<X, V>(xs.raw[k], f);
        widen<DY, V>(gs.raw[k], g);
#pragma unroll
        for (int i = 0; i < V; ++i) f[i] = dx_value<SILU>(f[i], g[i], first, means[0], w, b);
        result = narrow<DX, V>(f);
      }
      store_bits(dx + map.at(s, k) * DX::size, result);
    }
    xs = xs_ahead, gs = gs_ahead;
  }
}

}  // namespace jaxnorm
