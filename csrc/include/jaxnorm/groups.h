// Group norms: which elements a block and its threads own, and sums over groups, for both layouts.
//
// A group is cut into PARTS parts, a part into steps of K chunks a thread. What belongs to which part and the order in
// which a thread, a block and the parts are added up follow from the spatial size, the channels of a group, the types
// and the wave alone: not from the batch, nor from how many groups a block serves at once.
#pragma once
#include "jaxnorm/reduce.h"
#include "jaxnorm/vec.h"

namespace jaxnorm {

JN_CONST int largest_power_of_2_in(int n, int most) {
  int p = 1;
  while (p * 2 <= most && n % (p * 2) == 0) p *= 2;
  return p;
}

// to[s] = sum of from[s * PER .. s * PER + PER - 1]; a barrier before, none behind. All waves of the block take part.
template <int COUNT, int PER, int THREADS> JN_DEV void segment_sums(const float* from, float* to, u32 thread) {
  constexpr int SUB = min_of(kWave, next_power_of_2(PER)), EACH = kWave / SUB, AT_ONCE = THREADS / kWave * EACH;
  const u32 lane = thread % SUB, first = thread / SUB;
  barrier();
#pragma unroll 2
  for (int s = 0; s < COUNT; s += AT_ONCE) {
    const u32 segment = s + first;
    float sum = 0.f;
    if (segment < u32(COUNT)) {
#pragma unroll 4
      for (u32 i = lane; i < u32(PER); i += SUB) sum += from[segment * PER + i];
    }
    sum = lanes_sum<SUB / 2>(sum);
    if (segment < u32(COUNT) && lane == 0) to[segment] = sum;
  }
}

// Channels last, [batch, S, C]: a block owns TILE channels (whole groups) of PART positions. Thread (q, j) owns the
// chunk j of the positions q, q + Q, ...: always the same V channels. U channels side by side belong to one group
// whatever the tile, so a thread has V / U sums.
template <int S_, int C_, int CG_, int V_, int TILE_, int Q_, int K_, int PART_> struct LastMap {
  static constexpr int S = S_, C = C_, CG = CG_, V = V_, TILE = TILE_, Q = Q_, K = K_, PART = PART_;
  static constexpr bool LAST = true;
  static constexpr int U = largest_power_of_2_in(CG, V), UNITS = V / U, J = TILE / V;
  static constexpr int THREADS = ceil_div(Q * J, kWave) * kWave, WAVES = THREADS / kWave;
  static constexpr int G = C / CG, GROUPS = TILE / CG, PER = Q * (CG / U);
  static constexpr int PARTS = ceil_div(S, PART), TILES = ceil_div(C, TILE), STEPS = ceil_div(PART, Q* K);
  static constexpr int SLOTS = G;  // units of work of one example that share sums: here its groups
  static JN_CONST int sum_floats(int n) { return n * (GROUPS * PER + GROUPS); }
  static_assert(C % CG == 0 && C % V == 0 && TILE % V == 0 && TILE % CG == 0, "whole groups and chunks");

  u64 batch;
  u32 tile, part, thread, q, j;
  u64 start;  // element of the thread's first chunk
  bool live;

  JN_DEV LastMap(u64 block, u32 t) : thread(t), q(t / J), j(t % J) {
    part = u32(block % PARTS);
    const u64 rest = block / PARTS;
    tile = u32(rest % TILES);
    batch = rest / TILES;
    live = q < u32(Q) && channel() < u32(C);
    start = (batch * S + u64(part) * PART + q) * C + channel();
  }
  static JN_DEV u64 blocks(u64 batches) { return batches * (TILES * PARTS); }
  JN_DEV u32 channel() const { return tile * TILE + j * V; }
  JN_DEV bool has(int step, int k) const {
    const u32 row = u32(step * K + k) * Q + q;
    return live && row < u32(PART) && (S % PART == 0 || part * PART + row < u32(S));
  }
  JN_DEV u64 at(int step, int k) const { return start + u64(u32(step * K + k) * Q) * C; }
  // group of a unit, within the tile and within the example
  JN_DEV u32 group(int u) const { return (j * V + u * U) / CG; }
  JN_DEV u32 whole_group(int u) const { return tile * GROUPS + group(u); }
  // elements of a group in this part, and in the first step of it
  JN_DEV u32 rows() const { return S % PART == 0 || part + 1 < u32(PARTS) ? u32(PART) : u32(S - (PARTS - 1) * PART); }
  JN_DEV float count() const { return float(rows()) * CG; }
  JN_DEV float first_count() const { return float(rows() < u32(Q * K) ? rows() : u32(Q * K)) * CG; }
  static JN_DEV float part_count(u32 p) { return float(p + 1 < u32(PARTS) ? PART : S - (PARTS - 1) * PART) * CG; }
  // one thread for each group and part
  JN_DEV bool owns(int u) const { return live && q == 0 && (j * V + u * U) % CG == 0; }

  // v[n][u]: sums of a unit's chunks -> sums over its group
  template <int N> JN_DEV void totals(float (&v)[N][UNITS], float* memory) const {
    constexpr int each = CG / U;
    if (q < u32(Q)) {
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
          const u32 unit = j * UNITS + u;
          memory[(n * GROUPS + unit / each) * PER + q * each + unit % each] = v[n][u];
        }
    }
    float* sums = memory + N * GROUPS * PER;
    segment_sums<N * GROUPS, PER, THREADS>(memory, sums, thread);
    barrier();
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int u = 0; u < UNITS; ++u) v[n][u] = q < u32(Q) ? sums[n * GROUPS + group(u)] : 0.f;
  }
};

// Channels first, [batch, C, S]: a group is CG * S elements in a row, a block owns PART chunks of one. V divides S, so
// a chunk belongs to one channel.
template <int S_, int C_, int CG_, int V_, int T_, int K_, int PART_> struct FirstMap {
  static constexpr int S = S_, C = C_, CG = CG_, V = V_, K = K_, PART = PART_;
  static constexpr bool LAST = false;
  static constexpr int U = V, UNITS = 1, THREADS = T_, WAVES = THREADS / kWave, G = C / CG, GROUPS = 1;
  static constexpr int CHUNKS = CG * (S / V), PARTS = ceil_div(CHUNKS, PART), STEPS = ceil_div(PART, THREADS* K);
  static JN_CONST int sum_floats(int n) { return n * WAVES; }
  static_assert(C % CG == 0 && S % V == 0 && THREADS % kWave == 0, "whole chunks");

  u64 batch;
  u32 part, thread, g;
  u64 start;
  u32 first;  // the thread's first chunk within the group

  JN_DEV FirstMap(u64 block, u32 t) : thread(t) {
    part = u32(block % PARTS);
    const u64 rest = block / PARTS;
    g = u32(rest % G);
    batch = rest / G;
    first = part * PART + thread;
    start = (rest * CHUNKS + first) * V;
  }
  static JN_DEV u64 blocks(u64 batches) { return batches * (u64(G) * PARTS); }
  JN_DEV bool has(int step, int k) const {
    const u32 c = u32(step * K + k) * THREADS + thread;
    return c < u32(PART) && (CHUNKS % PART == 0 || part * PART + c < u32(CHUNKS));
  }
  JN_DEV u64 at(int step, int k) const { return start + u64(u32(step * K + k) * THREADS) * V; }
  JN_DEV u32 group(int) const { return 0; }
  JN_DEV u32 whole_group(int) const { return g; }
  // channel of a chunk, within the example
  JN_DEV u32 channel(int step, int k) const { return g * CG + (first + u32(step * K + k) * THREADS) / u32(S / V); }
  JN_DEV u32 chunks() const { return part + 1 < u32(PARTS) ? u32(PART) : u32(CHUNKS - (PARTS - 1) * PART); }
  JN_DEV float count() const { return float(chunks()) * V; }
  JN_DEV float first_count() const { return float(chunks() < u32(THREADS * K) ? chunks() : u32(THREADS * K)) * V; }
  static JN_DEV float part_count(u32 p) { return float(p + 1 < u32(PARTS) ? PART : CHUNKS - (PARTS - 1) * PART) * V; }
  JN_DEV bool owns(int) const { return thread == 0; }

  template <int N> JN_DEV void totals(float (&v)[N][1], float* memory) const {
    constexpr int slots = next_power_of_2(WAVES);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float sum = lanes_sum<kWave / 2>(v[n][0]);
      if (thread % kWave == 0) memory[n * WAVES + thread / kWave] = sum;
    }
    barrier();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float all[slots];
#pragma unroll
      for (int i = 0; i < slots; ++i) all[i] = i < WAVES ? memory[n * WAVES + (i < WAVES ? i : 0)] : 0.f;
      v[n][0] = halving_sum(all);
    }
  }
};

// K chunks of a thread, as loaded.
template <class M, class X> struct Step {
  Chunk<X, M::V> raw[M::K];
  JN_DEV void issue(const M& map, const char* x, int step) {
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (map.has(step, k))
        raw[k] = load_chunk<X, M::V, true>(x + map.at(step, k) * X::size);
      else
        raw[k] = Chunk<X, M::V>{};
    }
  }
};

// Values of the channels of a chunk; absent ones are `missing`.
template <class W, int V> JN_DEV void load_channels(const char* w, u32 channel, float missing, float (&f)[V]) {
  if constexpr (W::size > 0) {
    widen<W, V>(load_chunk<W, V, false>(w + u64(channel) * W::size), f);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] = missing;
  }
}
template <class W> JN_DEV float load_channel(const char* w, u32 channel, float missing) {
  float f[1];
  load_channels<W, 1>(w, channel, missing, f);
  return f[0];
}

// 1 / (1 + exp(-v))
JN_DEV float sigmoid(float v) { return reciprocal_fast(1.f + exp2_fast(v * -1.44269504f)); }
JN_DEV float silu(float v) { return v * sigmoid(v); }
// silu'(v)
JN_DEV float silu_slope(float v) {
  const float s = sigmoid(v);
  return s * fused_multiply_add(v, 1.f - s, 1.f);
}

// Mean (m + low, low being what its rounding to float32 loses) and 1 / deviation of a group.
struct GroupStats {
  float m, low, rstd;
  JN_DEV void set(float pivot, float offset, float variance, float eps) {
    m = pivot + offset;
    const float moved = m - pivot;
    low = (pivot - (m - moved)) + (offset - moved);
    rstd = reciprocal_sqrt((variance < 0.f ? 0.f : variance) + eps);  // a comparison keeps NaN
  }
};

}  // namespace jaxnorm
