// GroupNorm backward in one launch, channels first, where the blocks of a cluster hold a group of x and dy, one of
// PARTS parts each: they tell one another what they found of the means of gw and gw * xh, and write dx of what they
// hold. x and dy are read once.
//
// The chunks of a wave lie in one channel. Their sums, entries, go to the block of the cluster that adds up the
// channel, for as many examples as the cluster works on: all of the batch, and the sums are the gradients of bias and
// weight, or one, and they are partials.
#pragma once
#include "jaxnorm/groups_bwd.h"
#include "jaxnorm/groups_cluster.h"

#if defined(JN_CLUSTERS)
namespace jaxnorm {

// A thread's chunks of x and dy: in registers ...
template <class M, class X, class DY> struct HeldPair {
  static constexpr int bytes = 0;
  Step<M, X> xs;
  Step<M, DY> gs;

  JN_DEV HeldPair(const M& map, const char* x, const char* dy, unsigned char*) {
    xs.issue(map, x, 0);
    gs.issue(map, dy, 0);
  }
  JN_DEV void wait() const {}
  JN_DEV const Step<M, X>& x(const M&) const { return xs; }
  JN_DEV const Step<M, DY>& dy(const M&) const { return gs; }
};
// ... or in shared memory, each read by the thread alone that asked for it.
template <class M, class X, class DY> struct SharedPair {
  using SX = Stash<X, M::V, M::THREADS>;
  using SG = Stash<DY, M::V, M::THREADS>;
  static constexpr int each = SX::footprint + SG::footprint, bytes = M::K * each;
  unsigned char* base;

  JN_DEV SharedPair(const M& map, const char* x, const char* dy, unsigned char* memory) : base(memory) {
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (!map.has(0, k)) continue;
      SX::fetch(base + k * each, map.thread, x + map.at(0, k) * X::size);
      SG::fetch(base + k * each + SX::footprint, map.thread, dy + map.at(0, k) * DY::size);
    }
    async_commit();
  }
  JN_DEV void wait() const { async_wait<0>(); }
  JN_DEV Step<M, X> x(const M& map) const { return get<X, SX>(map, 0); }
  JN_DEV Step<M, DY> dy(const M& map) const { return get<DY, SG>(map, SX::footprint); }

 private:
  template <class T, class S> JN_DEV Step<M, T> get(const M& map, int behind) const {
    Step<M, T> found;
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (map.has(0, k))
        found.raw[k] = S::read(base + k * each + behind, map.thread);
      else
        found.raw[k] = Chunk<T, M::V>{};
    }
    return found;
  }
};

// EXAMPLES: of a cluster.
template <class M, int EXAMPLES> struct ClusterShape {
  static constexpr int BLOCKS = M::PARTS * EXAMPLES;
  static constexpr int PER = M::S / M::V, RUN = PER / kWave;  // chunks and entries of a channel
  static constexpr int OWN = ceil_div(M::CG, BLOCKS);         // channels that a block adds up, at most
  static constexpr int shares = 4 * M::PARTS, entries = 4 * OWN * EXAMPLES * RUN;  // floats
  static_assert(PER % kWave == 0 && M::PART % kWave == 0, "waves with one channel at a time");

  static JN_DEV u32 owned(u32 rank) { return (u32(M::CG - 1) + BLOCKS - rank) / BLOCKS; }
};

// silu'(v) from t = -v * log2(e), which saves a multiplication where t is a product itself.
JN_DEV float silu_slope_of(float t) {
  const float s = reciprocal_fast(1.f + exp2_fast(t));
  return s * fused_multiply_add(t, fused_multiply_add(s, 0.693147181f, -0.693147181f), 1.f);
}

// Weight of a thread's chunks, and what makes silu_slope_of's operand of d = x - m.
template <class M, class W, class B, bool SILU> struct ChunkConstants {
  float w[M::K], a[SILU ? M::K : 1], c[SILU ? M::K : 1];
  JN_DEV void load(const M& map, const char* weight, const char* bias) {
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      const u32 channel = map.has(0, k) ? map.channel(0, k) : 0;
      w[k] = load_channel<W>(weight, channel, 1.f);
      if constexpr (SILU) c[k] = load_channel<B>(bias, channel, 0.f);
    }
  }
  JN_DEV void set(const ChannelStats& group) {
    if constexpr (SILU) {
#pragma unroll
      for (int k = 0; k < M::K; ++k) {
        a[k] = w[k] * group.rstd * -1.44269504f;
        c[k] = fused_multiply_add(-group.shift, w[k], c[k]) * -1.44269504f;
      }
    }
  }
  // dy of chunk k -> g
  JN_DEV void back(int k, const float (&d)[M::V], float (&g)[M::V]) const {
    if constexpr (SILU) {
#pragma unroll
      for (int i = 0; i < M::V; ++i) g[i] *= silu_slope_of(fused_multiply_add(d[i], a[SILU ? k : 0], c[SILU ? k : 0]));
    }
  }
};

// The sums over the waves' chunks, entry[2 * k] of g * xh and entry[2 * k + 1] of g, each to the block that adds up its
// channel.
template <class M, int EXAMPLES>
JN_DEV void hand_out_entries(const M& map, float (&entry)[2 * M::K], u32 example, float* entries, u64* ready) {
  using C = ClusterShape<M, EXAMPLES>;
  constexpr int rest = kWave / next_power_of_2(2 * M::K);
  static_assert(2 * M::K <= kWave, "a lane for each sum");
  const u32 lane = map.thread % kWave;
  const float along = packed_sum<kWave / 2>(entry, lane), plain = shfl_xor<kWave / 2>(along);
  const u32 k = u32(packed_index<2 * M::K>(lane)) / 2;
  if (lane >= kWave / 2 || lane % rest != 0 || k >= u32(M::K) || !map.has(0, int(k))) return;
  const u32 chunk = map.first + k * M::THREADS, channel = chunk / C::PER;
  cluster_put(entries + 4 * ((channel / C::BLOCKS * EXAMPLES + example) * C::RUN + chunk % C::PER / kWave), ready,
              channel % C::BLOCKS, along, plain, 0.f, 0.f);
}

// The sums of the channels that this block adds up: to the gradients, or to the partials [batch, 2, C] of an example.
template <class M, int EXAMPLES, class Gradients>
JN_DEV void add_entries(const M& map, const float* entries, u32 rank, const Gradients& gradients, float* partials) {
  using C = ClusterShape<M, EXAMPLES>;
  constexpr int N = EXAMPLES * C::RUN, SUB = min_of(kWave, next_power_of_2(N)), AT_ONCE = M::THREADS / SUB;
  const u32 lane = map.thread % SUB, owned = C::owned(rank);
#pragma unroll 1
  for (u32 s = 0; s < owned; s += AT_ONCE) {
    const u32 slot = s + map.thread / SUB, channel = map.g * M::CG + slot * C::BLOCKS + rank;
    float sum[2] = {};
    if (slot < owned) {
#pragma unroll 2
      for (u32 i = lane; i < u32(N); i += SUB) {
        const float* at = entries + 4 * (slot * N + i);
        sum[0] += at[0], sum[1] += at[1];
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float one[1] = {lanes_sum<SUB / 2>(sum[n])};
      if (slot >= owned || lane != 0) continue;
      if (partials == nullptr)
        gradients(n * M::C + channel, one);
      else
        partials[map.batch * (2 * M::C) + n * M::C + channel] = one[0];
    }
  }
}

// The sums over each chunk in entry, times the weight added to v. KEEP: g as well.
template <class M, class X, class DY, class Constants, bool KEEP>
JN_DEV void chunk_sums(const M& map, const Step<M, X>& xs, const Step<M, DY>& gs, const ChannelStats& stats,
                       const Constants& constants, float (&entry)[2 * M::K], float (&v)[2][1],
                       float (&kept)[KEEP ? M::K : 1][M::V]) {
  constexpr int V = M::V;
#pragma unroll
  for (int k = 0; k < M::K; ++k) {
    float f[V], g[V], sum[2] = {};
    if (map.has(0, k)) {
      widen<X, V>(xs.raw[k], f);
      widen<DY, V>(gs.raw[k], g);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] -= stats.m;
      constants.back(k, f, g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[0] = fused_multiply_add(g[i], f[i], sum[0]);
        sum[1] += g[i];
        if constexpr (KEEP) kept[k][i] = g[i];
      }
    }
    sum[0] = fused_multiply_add(sum[0], stats.rstd, -stats.shift * sum[1]);  // xh = d * rstd - shift
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      entry[2 * k + n] = sum[n];
      v[n][0] = fused_multiply_add(sum[n], constants.w[k], v[n][0]);
    }
  }
}

// mean(gw * xh) and mean(gw) of the group, times 1 / deviation, from the shares of its parts.
template <class M> JN_DEV GroupMeans add_group_shares(const float* shares, float rstd) {
  constexpr int slots = next_power_of_2(M::PARTS);
  float all[2][slots];
#pragma unroll
  for (int p = 0; p < slots; ++p)
#pragma unroll
    for (int n = 0; n < 2; ++n) all[n][p] = p < M::PARTS ? shares[p < M::PARTS ? 4 * p + n : 0] : 0.f;
  const float scale = rstd / (float(M::CG) * float(M::S));
  return GroupMeans{halving_sum(all[0]) * scale, halving_sum(all[1]) * scale};
}

// Shared memory: what is held, ClusterShape's floats, 16 bytes, M::sum_floats(2) floats. VECTORS: somebody wants the
// gradients of weight or bias. SHARED: the part waits in shared memory.
template <class M, class X, class DY, class W, class B, class DX, bool SILU, int EXAMPLES, bool VECTORS, bool SHARED,
          class Gradients>
JN_DEV void group_bwd_cluster(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                              u64 batches, char* dx, Gradients gradients, float* partials) {
  using C = ClusterShape<M, EXAMPLES>;
  using Held = typename Select<SHARED, SharedPair<M, X, DY>, HeldPair<M, X, DY>>::Type;
  using Constants = ChunkConstants<M, W, B, SILU>;
  constexpr int V = M::V;
  constexpr bool KEEP = SILU && !SHARED;  // exponentials once
  static_assert(M::STEPS == 1, "a part is a step");
  const u64 block = linear_block();
  let_next_launch_begin();
  if (block >= M::blocks(batches)) return;
  const u32 rank = u32(block % C::BLOCKS), example = rank / M::PARTS;
  const u64 cluster = block / C::BLOCKS, row = (cluster / M::G * EXAMPLES + example) * M::G + cluster % M::G;
  const M map(row * M::PARTS + rank % M::PARTS, thread_id());
  float* shares = (float*)(shared_memory() + Held::bytes);
  float* entries = shares + C::shares;
  u64* ready = (u64*)(entries + C::entries);
  cluster_begin(ready, 2);
  if (map.thread == 0) {
    cluster_expect(ready, 4 * C::shares);
    cluster_expect(ready + 1, VECTORS ? C::owned(rank) * (16 * EXAMPLES * C::RUN) : 0);
  }
  Held held(map, x, dy, shared_memory());
  ChannelStats group;
  group.load(stats, map.batch, map.g * M::CG, M::C);
  Constants constants;
  constants.load(map, weight, bias);
  constants.set(group);

  float entry[2 * M::K], v[2][1] = {}, kept[KEEP ? M::K : 1][V];
  held.wait();
  chunk_sums<M, X, DY, Constants, KEEP>(map, held.x(map), held.dy(map), group, constants, entry, v, kept);
  map.template totals<2>(v, (float*)(ready + 2));
  cluster_begun();
  if (map.thread < u32(M::PARTS))
    cluster_put(shares + 4 * map.part, ready, example * M::PARTS + map.thread, v[0][0], v[1][0], 0.f, 0.f);
  if constexpr (VECTORS) hand_out_entries<M, EXAMPLES>(map, entry, example, entries, ready + 1);

  cluster_wait(ready, 0);
  // dx = g * (w * rstd) + d * slope + offset. A 16-bit x need not lose its mean first.
  constexpr bool PLAIN = X::size == 2 && DX::size == 2;
  const GroupMeans means = add_group_shares<M>(shares, group.rstd);
  const float slope = -group.rstd * means.along;
  float offset = fused_multiply_add(group.shift, means.along, -means.plain);
  if (PLAIN) offset = fused_multiply_add(-group.m, slope, offset);
  const Step<M, X> xs = held.x(map);
  const Step<M, DY> gs = held.dy(map);
#pragma unroll
  for (int k = 0; k < M::K; ++k) {
    if (!map.has(0, k)) continue;
    const float w = constants.w[k] * group.rstd;
    float f[V], g[V];
    widen<X, V, true>(xs.raw[k], f);
    if constexpr (!KEEP) widen<DY, V, true>(gs.raw[k], g);
    if constexpr (SILU && !KEEP) {
      float d[V];
#pragma unroll
      for (int i = 0; i < V; ++i) d[i] = f[i] - group.m;
      constants.back(k, d, g);
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
      f[i] = fused_multiply_add(KEEP ? kept[KEEP ? k : 0][i] : g[i], w,
                                fused_multiply_add(PLAIN ? f[i] : f[i] - group.m, slope, offset));
    store_bits(dx + map.at(0, k) * DX::size, narrow<DX, V>(f));
  }
  cluster_wait(ready + 1, 0);  // nobody leaves before what others send it
  if constexpr (VECTORS) add_entries<M, EXAMPLES>(map, entries, rank, gradients, partials);
}

}  // namespace jaxnorm
#endif
