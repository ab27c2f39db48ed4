// GroupNorm in one launch where the chip holds the image but a cluster of blocks does not hold its part of it: teams of
// blocks anywhere on the device (groups_team.h), each with EACH parts of a tile, one after the other. A block reads its
// parts once, keeps of them what shared memory and registers have room for, and tells the others of its team what it
// found (post.h). What there is no room for is fetched again, last first, and the cache is asked to keep that and
// nothing else.
//
// A phase of reads, a meeting, a phase of writes: parts in flight between the two cost nothing here, where the blocks
// of several images in turn would wait behind one another's loads.
#pragma once
#include "jaxnorm/groups_fwd.h"
#include "jaxnorm/groups_team.h"

#if defined(JN_POSTS)
namespace jaxnorm {

// Statistics of a group from mean and squared deviations of its parts.
template <class M> struct TeamStats {
  using P = Parts<M, false>;
  static constexpr int RESULTS = 3;
  float eps;
  JN_DEV void combine(const float (&mean)[P::EACH], const float (&squares)[P::EACH], u32 lane,
                      float (&results)[RESULTS]) const {
    P parts{};
#pragma unroll
    for (int i = 0; i < P::EACH; ++i) parts.mean[i] = mean[i], parts.squares[i] = squares[i];
    parts.pivot = shfl_from<P::SUB, 0>(parts.mean[0]);
    const GroupStats one = parts.combine(lane, eps);
    results[0] = one.m, results[1] = one.low, results[2] = one.rstd;
  }
};

// A Store of what is held.
template <class Store, class X> struct PlaceStore {
  const Store& store;
  template <class M> JN_DEV void operator()(const M& map, const Lying<1>& place, int step) const {
    Step<M, X> one;
    one.raw[0] = place.of[0];
    store.store(map, one, step);
  }
};

// A block has EACH parts of WAVES teams: what it waits for from the first comes while it reads the second.
// Shared memory: what is held, sum_floats(2), told 2 * EACH floats a group, statistics 3 * WAVES.
template <class M, class X, class Store, int EACH, int WAVES, int SLOTS, int REGISTERS>
JN_DEV void group_norm_held(const char* x, Store store, float eps, u64 batches, char* words, float* stats_out) {
  using Held = HeldParts<M, X, EACH, WAVES, SLOTS, REGISTERS>;
  using Flat = typename Held::Flat;
  using Letters = Mail<M, EACH, TeamStats<M>>;
  static_assert(M::WHOLE && X::size == 2, "whole parts and steps, 16 bits");
  constexpr bool sampled = pivots_are_sampled<M, X>();
  const u64 apart = Flat::blocks(batches) / WAVES, block = linear_block();  // of waves
  if (block >= apart) return;                                               // with its teams
  const u32 thread = thread_id();
  const Waves<Flat, WAVES> flat(block, apart, thread);
  float pivot[1][M::UNITS];
  if constexpr (!sampled) first_values<M, X>(M(block * EACH, thread), x, pivot);
  Held held(flat.maps, {x}, shared_memory());
  float* sums = (float*)(shared_memory() + Held::bytes);
  float *told = sums + M::sum_floats(2), *together = told + 2 * EACH * M::GROUPS;

  // As group_partials does.
#pragma unroll
  for (int n = 0; n < WAVES * EACH; ++n) {
    const int wave = n / EACH, i = n % EACH;
    const M map((block + wave * apart) * EACH + i, thread);
    if constexpr (!sampled)
      if (n > 0 && i == 0) first_values<M, X>(map, x, pivot);
    float v[2][M::UNITS] = {};
    Step<M, X> step;
#pragma unroll
    for (int s = 0; s < M::STEPS; ++s) {
#pragma unroll
      for (int k = 0; k < M::K; ++k) step.raw[k] = held.first((n * M::STEPS + s) * M::K + k).of[0];
      if constexpr (sampled) {
        if (s == 0) {
          if (n > 0) barrier();
          pivot[0][0] = 0.f;
          add_values(map, step, pivot);
          map.sample(pivot, sums);
        }
      }
      add_deviations(map, step, s, pivot, v);
    }
    if (n > 0 || sampled) barrier();  // others may still read the sums before
    map.template totals<2, 1>(v, sums);
    const float share = 1.f / map.count();
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      if (!map.owns(u)) continue;
      const float e = v[0][u] * share;
      float* at = told + 2 * (map.group(u) * EACH + i);
      at[0] = pivot[0][u] + e;
      at[1] = fused_multiply_add(-e, v[0][u], v[1][u]);
    }
    if (i < EACH - 1) continue;
    barrier();
    Letters(words, block + wave * apart).send(told, thread);
  }
#pragma unroll
  for (int wave = 0; wave < WAVES; ++wave) {
    const M map((block + wave * apart) * EACH, thread);
    if (wave == WAVES - 1) held.turn();
    store.issue(flat.maps[wave]);
    float found[M::UNITS][3];
    Letters(words, block + wave * apart).receive(map, {eps}, together + 3 * M::GROUPS * wave, found);
    GroupStats stats[M::UNITS];
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) stats[u] = GroupStats{found[u][0], found[u][1], found[u][2]};
    store.set(stats);
    held.store_wave(PlaceStore<Store, X>{store}, wave);
    if (stats_out != nullptr) save_stats(map, stats, stats_out);
  }
}

}  // namespace jaxnorm
#endif
