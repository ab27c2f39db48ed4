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

// to[s] = sum of from[at(s, i)], i = 0 .. PER - 1, for COUNT segments; a barrier before, none behind. All waves of the
// block take part.
template <int COUNT, int PER, int THREADS, class At>
JN_DEV void segment_sums(const float* from, float* to, u32 thread, At at) {
  constexpr int SUB = min_of(kWave, next_power_of_2(PER)), EACH = kWave / SUB, AT_ONCE = THREADS / kWave * EACH;
  const u32 lane = thread % SUB, first = thread / SUB;
  barrier();
#pragma unroll 2
  for (int s = 0; s < COUNT; s += AT_ONCE) {
    const u32 segment = s + first;
    float sum = 0.f;
    if (segment < u32(COUNT)) {
#pragma unroll 4
      for (u32 i = lane; i < u32(PER); i += SUB) sum += from[at(segment, i)];
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
  static constexpr int EACH = CG / U, ROW = J * UNITS;
  // Few lanes to a column: a thread adds up a column, then a reader the columns of its group. Many: waves take groups.
  static constexpr bool BY_COLUMN = Q <= 32 && EACH <= 16;
  // Sums wait in shared memory as [n][q][unit], rows WIDTH apart: waves that read the units of a group over several q
  // then seldom meet in a bank.
  static constexpr int WIDTH = BY_COLUMN || ROW < 32 ? ROW : ROW + (ceil_div(EACH, UNITS) * UNITS - ROW % 32 + 32) % 32;
  static JN_CONST int sum_floats(int n) { return ceil_div(n * (Q * WIDTH + (BY_COLUMN ? WIDTH : GROUPS)), 4) * 4; }
  // N parts as one, a chunk to a step
  template <int N> using Whole = LastMap<S, C, CG, V, TILE, Q, 1, N * PART>;
  static constexpr bool WHOLE = S % PART == 0 && PART % (Q * K) == 0;
  // groups that a chunk can meet
  static constexpr int MET = CG % V == 0 ? 1 : min_of(UNITS, (V - 2) / CG + 2);
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
    live = (Q * J == THREADS || q < u32(Q)) && (C % TILE == 0 || channel() < u32(C));
    start = (batch * S + u64(part) * PART + q) * C + channel();
  }
  static JN_DEV u64 blocks(u64 batches) { return batches * (TILES * PARTS); }
  JN_DEV u32 channel() const { return tile * TILE + j * V; }
  JN_DEV bool has(int step, int k) const {
    const u32 row = u32(step * K + k) * Q + q;
    return live && (PART % (Q * K) == 0 || row < u32(PART)) && (S % PART == 0 || part * PART + row < u32(S));
  }
  JN_DEV u64 at(int step, int k) const { return start + u64(u32(step * K + k) * Q) * C; }
  // where parts are whole: the thread has all chunks, or none
  JN_DEV bool live_chunk() const { return live; }
  // group of a unit, within the tile and within the example
  JN_DEV u32 group(int u) const { return (j * V + u * U) / CG; }
  JN_DEV u32 whole_group(int u) const { return tile * GROUPS + group(u); }
  // positions, and elements of a group, in this part
  JN_DEV u32 rows() const { return S % PART == 0 || part + 1 < u32(PARTS) ? u32(PART) : u32(S - (PARTS - 1) * PART); }
  JN_DEV float count() const { return float(rows()) * CG; }
  static JN_DEV float part_count(u32 p) { return float(p + 1 < u32(PARTS) ? PART : S - (PARTS - 1) * PART) * CG; }
  // one thread for each group and part
  JN_DEV bool owns(int u) const { return live && q == 0 && (j * V + u * U) % CG == 0; }

  // v[n][u]: sums of a unit's chunks -> sums over its group, for the threads q < OWNERS at least.
  template <int N, int OWNERS = Q> JN_DEV void totals(float (&v)[N][UNITS], float* memory) const {
    const bool mine = Q * J == THREADS || q < u32(Q);
    if (mine) {
#pragma unroll
      for (int n = 0; n < N; ++n)
        store_bits((char*)(memory + (n * Q + q) * WIDTH + j * UNITS), narrow<F32, UNITS>(v[n]));
    }
    float* sums = memory + N * Q * WIDTH;
    if constexpr (BY_COLUMN) {
      barrier();
      for (u32 i = thread; i < u32(N * ROW); i += THREADS) {
        const u32 n = i / ROW, column = i % ROW;
        float sum = 0.f;
#pragma unroll 8
        for (int p = 0; p < Q; ++p) sum += memory[(n * Q + p) * WIDTH + column];
        sums[n * WIDTH + column] = sum;
      }
      barrier();
      if (OWNERS < Q ? q >= u32(OWNERS) : !mine) return;
#pragma unroll
      for (int n = 0; n < N; ++n) group_sums(sums + n * WIDTH, v[n], 1.f);
    } else {
      segment_sums<N * GROUPS, PER, THREADS>(memory, sums, thread, [](u32 segment, u32 i) {
        return (segment / GROUPS * Q + i / EACH) * WIDTH + segment % GROUPS * EACH + i % EACH;
      });
      barrier();
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int u = 0; u < UNITS; ++u) v[n][u] = mine ? sums[n * GROUPS + group(u)] : 0.f;
    }
  }

  // What deviations are counted from where pivots_are_sampled: the mean over the chunks of the threads q = 0 alone, for
  // a barrier and few reads. v[0][u]: sums of a unit's chunks in the first step.
  JN_DEV void sample(float (&v)[1][UNITS], float* memory) const {
    if (q == 0) store_bits((char*)(memory + j * UNITS), narrow<F32, UNITS>(v[0]));
    barrier();
    const u32 positions = rows() < u32(Q * K) ? (rows() + (Q - 1)) / Q : u32(K);
    if (Q * J == THREADS || q < u32(Q)) group_sums(memory, v[0], 1.f / (float(positions) * CG));
  }

  // Elements of the example's first position that are in the group of a unit, U of them.
  JN_DEV u64 first_of_group(int u) const { return batch * (u64(S) * C) + (live ? whole_group(u) * CG : 0u); }

 private:
  // v[u] = scale * the sum of the EACH columns of the unit's group
  JN_DEV void group_sums(const float* columns, float (&v)[UNITS], float scale) const {
    const u32 first = group(0);
    float met[MET];
#pragma unroll
    for (int m = 0; m < MET; ++m) {
      const float* at = columns + min_of(int(first) + m, GROUPS - 1) * EACH;
      float sum = 0.f;
#pragma unroll 8
      for (int i = 0; i < EACH; ++i) sum += at[i];
      met[m] = sum * scale;
    }
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      v[u] = met[0];
#pragma unroll
      for (int m = 1; m < MET; ++m) v[u] = group(u) == first + m ? met[m] : v[u];
    }
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
  template <int N> using Whole = FirstMap<S, C, CG, V, THREADS, 1, N * PART>;
  static constexpr bool WHOLE = CHUNKS % PART == 0 && PART % (THREADS * K) == 0;
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
    return (PART % (THREADS * K) == 0 || c < u32(PART)) && (CHUNKS % PART == 0 || part * PART + c < u32(CHUNKS));
  }
  JN_DEV u64 at(int step, int k) const { return start + u64(u32(step * K + k) * THREADS) * V; }
  JN_DEV bool live_chunk() const { return true; }
  JN_DEV u32 group(int) const { return 0; }
  JN_DEV u32 whole_group(int) const { return g; }
  // channel of a chunk, within the example
  JN_DEV u32 channel(int step, int k) const { return g * CG + (first + u32(step * K + k) * THREADS) / u32(S / V); }
  JN_DEV u32 chunks() const { return part + 1 < u32(PARTS) ? u32(PART) : u32(CHUNKS - (PARTS - 1) * PART); }
  JN_DEV float count() const { return float(chunks()) * V; }
  JN_DEV float first_count() const { return float(chunks() < u32(THREADS * K) ? chunks() : u32(THREADS * K)) * V; }
  static JN_DEV float part_count(u32 p) { return float(p + 1 < u32(PARTS) ? PART : CHUNKS - (PARTS - 1) * PART) * V; }
  JN_DEV bool owns(int) const { return thread == 0; }

  JN_DEV u64 first_of_group(int) const { return (batch * G + g) * (u64(CG) * S); }
  JN_DEV void sample(float (&v)[1][1], float* memory) const {
    totals<1>(v, memory);
    v[0][0] *= 1.f / first_count();
  }

  template <int N, int OWNERS = 1> JN_DEV void totals(float (&v)[N][1], float* memory) const {
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
template <class W, int V> JN_DEV void widen_channels(const Chunk<W, V>& raw, float missing, float (&f)[V]) {
  if constexpr (W::size > 0) {
    widen<W, V>(raw, f);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] = missing;
  }
}
template <class W, int V> JN_DEV void load_channels(const char* w, u32 channel, float missing, float (&f)[V]) {
  Chunk<W, V> raw{};
  if constexpr (W::size > 0) raw = load_chunk<W, V, false>(w + u64(channel) * W::size);
  widen_channels<W, V>(raw, missing, f);
}
template <class W> JN_DEV float load_channel(const char* w, u32 channel, float missing) {
  float f[1];
  load_channels<W, 1>(w, channel, missing, f);
  return f[0];
}

// 1 / (1 + exp(-v))
JN_DEV float sigmoid(float v) { return reciprocal_fast(1.f + exp2_fast(v * -1.44269504f)); }
// silu of the values of a chunk. U values side by side are neighbours whatever the chunk: so are pairs of them, which
// share a reciprocal where the slow instructions are what it waits for. Below -60 ln 2, where silu is 0 to 1e-16, it is
// taken there: the product stays finite. A NaN is kept from its neighbour.
template <int U, int V> JN_DEV void silu_of(float (&f)[V]) {
  if constexpr (kSlowReciprocal && U % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const float v = at_least(f[i], -41.5888f), w = at_least(f[i + 1], -41.5888f);
      const float a = 1.f + exp2_fast(lesser(v * -1.44269504f, 60.f)),
                  b = 1.f + exp2_fast(lesser(w * -1.44269504f, 60.f));
      const float r = reciprocal_fast(a * b);
      f[i] = v * (r * b), f[i + 1] = w * (r * a);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] *= sigmoid(f[i]);
  }
}
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
