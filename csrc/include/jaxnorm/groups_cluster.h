// GroupNorm in one launch where a group fits on the chip but not in one block: the PARTS blocks of a cluster hold a
// part each, hand what they found of it to one another through their shared memory, put it together as group_apply
// does, and normalise what they hold. An image is read once.
#pragma once
#include "jaxnorm/groups_fwd.h"

#if defined(JN_CLUSTERS)
namespace jaxnorm {

// A thread's chunks of a part: in registers, where the part is one step ...
template <class M, class X> struct HeldStep {
  static constexpr int bytes = 0, AGAIN = 0, ALL = 1;
  static_assert(M::STEPS == 1, "the part in registers");
  Step<M, X> steps;

  JN_DEV HeldStep(const M& map, const char* x, unsigned char*) { steps.issue(map, x, 0); }
  static JN_DEV int step(int) { return 0; }
  JN_DEV void wait(int) const {}
  JN_DEV const Step<M, X>& get(const M&, int, int) const { return steps; }
  JN_DEV void release(const M&, const char*) {}
};
// ... or in a ring of slots in shared memory, each read by the thread alone that asked for it. Of a part longer than
// the ring the last steps are held, and the ones before them fetched again when these are done with: what was read last
// first, as a cache may still have it.
template <class M, class X, int SLOTS> struct Ring {
  using Slot = Stash<X, M::V, M::THREADS>;
  static constexpr int slot_bytes = M::K * Slot::footprint, bytes = SLOTS * slot_bytes;
  static constexpr int AGAIN = max_of(M::STEPS - SLOTS, 0), ALL = M::STEPS + AGAIN;
  static_assert(SLOTS <= M::STEPS, "a slot for each step, or less");
  unsigned char* base;
  u32 current;  // slot of the step to work on next
  // the slot and the number of what to fetch next
  u32 slot;
  int next;

  JN_DEV Ring(const M& map, const char* x, unsigned char* memory) : base(memory), current(0), slot(0), next(0) {
#pragma unroll 1
    for (int i = 0; i < SLOTS; ++i) fetch(map, x);
  }
  // The i-th step of a part that is fetched.
  static JN_DEV int step(int i) { return AGAIN == 0 || i < M::STEPS ? i : ALL - 1 - i; }

  // Until the current step is there; `unreleased`: steps before it that are still held.
  JN_DEV void wait(int unreleased) const { async_wait_for<min_of(SLOTS - 1, 15)>(SLOTS - 1 - unreleased); }
  // The step that is `further` behind the current one.
  JN_DEV Step<M, X> get(const M& map, int s, int further) const {
    const u32 from = after(current, further);
    Step<M, X> found;
#pragma unroll
    for (int k = 0; k < M::K; ++k) {
      if (map.has(s, k))
        found.raw[k] = Slot::read(at(from, k), map.thread);
      else
        found.raw[k] = Chunk<X, M::V>{};
    }
    return found;
  }
  // The current step is done with.
  JN_DEV void release(const M& map, const char* x) {
    current = after(current, 1);
    if constexpr (AGAIN > 0) fetch(map, x);
  }

 private:
  static JN_DEV u32 after(u32 from, u32 steps) {
    return from + steps >= u32(SLOTS) ? from + steps - SLOTS : from + steps;
  }
  JN_DEV void fetch(const M& map, const char* x) {
    if (next < ALL) {
      const int s = step(next);
#pragma unroll
      for (int k = 0; k < M::K; ++k)
        if (map.has(s, k)) Slot::fetch(at(slot, k), map.thread, x + map.at(s, k) * X::size);
      slot = after(slot, 1);
      ++next;
    }
    async_commit();
  }
  JN_DEV unsigned char* at(u32 slot_of, int k) const { return base + slot_of * slot_bytes + k * Slot::footprint; }
};
template <class M, class X, int SLOTS>
using HeldOf = typename Select<(SLOTS > 0), Ring<M, X, SLOTS ? SLOTS : 1>, HeldStep<M, X>>::Type;

// What the blocks of a cluster tell each other, in the shared memory of each: [GROUPS, PARTS, 4], the mean, squared
// deviations and with LOW what the mean lost to rounding of each part.
template <class M, bool LOW> struct Found {
  static constexpr int floats = 4 * M::GROUPS * M::PARTS, bytes = 4 * floats;
  float* at;
  u64* ready;

  // By as many threads of a column (channels last) as there are blocks.
  JN_DEV void hand_out(const M& map, const float (&pivot)[1][M::UNITS], const float (&v)[2][M::UNITS]) const {
    const float share = 1.f / map.count();
    if constexpr (M::LAST) {
      static_assert(M::Q >= M::PARTS && M::C % M::TILE == 0, "a thread of a column for each block, whole tiles");
#pragma unroll
      for (int u = 0; u < M::UNITS; ++u)
        if (map.q < u32(M::PARTS) && (map.j * M::V + u * M::U) % M::CG == 0) put(map, map.q, u, share, pivot, v);
    } else {
      if (map.thread < u32(M::PARTS)) put(map, map.thread, 0, share, pivot, v);
    }
  }

  JN_DEV GroupStats combine(u32 g, u32 lane, float eps) const {
    using P = Parts<M, true>;
    P parts{};
    parts.pivot = at[4 * g * M::PARTS];
#pragma unroll
    for (int i = 0; i < P::EACH; ++i) {
      const u32 p = i * P::SUB + lane;
      if (M::PARTS % P::SUB != 0 && p >= u32(M::PARTS)) continue;
      const Bits<16> one = *(const Bits<16>*)(at + 4 * (g * M::PARTS + p));
      parts.mean[i] = bits_f32(one.word[0]);
      parts.squares[i] = bits_f32(one.word[1]);
      parts.low[i] = bits_f32(one.word[2]);
    }
    return parts.combine(lane, eps);
  }

 private:
  JN_DEV void put(const M& map, u32 rank, int u, float share, const float (&pivot)[1][M::UNITS],
                  const float (&v)[2][M::UNITS]) const {
    const float e = v[0][u] * share;
    cluster_put(at + 4 * (map.group(u) * M::PARTS + map.part), ready, rank, LOW ? pivot[0][u] : pivot[0][u] + e,
                fused_multiply_add(-e, v[0][u], v[1][u]), LOW ? e : 0.f, 0.f);
  }
};

// The statistics of a thread's units. memory: 3 * GROUPS floats.
template <class M, bool LOW>
JN_DEV void combine_found(const M& map, const Found<M, LOW>& found, float eps, float* memory,
                          GroupStats (&stats)[M::UNITS]) {
  constexpr int sub = Parts<M, true>::SUB;
  const u32 lane = map.thread % sub;
  if constexpr (!M::LAST) {  // one group: every wave puts it together for itself
    stats[0] = found.combine(0, lane, eps);
  } else {
    constexpr int at_once = M::THREADS / sub;
#pragma unroll 1
    for (int s = 0; s < M::GROUPS; s += at_once) {
      const u32 g = s + map.thread / sub;
      const GroupStats one = found.combine(g < u32(M::GROUPS) ? g : 0, lane, eps);
      if (g < u32(M::GROUPS) && lane == 0)
        memory[3 * g] = one.m, memory[3 * g + 1] = one.low, memory[3 * g + 2] = one.rstd;
    }
    barrier();
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      const float* at = memory + 3 * (map.q < u32(M::Q) ? map.group(u) : 0);
      stats[u] = GroupStats{at[0], at[1], at[2]};
    }
  }
}

// Shared memory: what is held, Found and 8 bytes, sums in whole 16 bytes, 3 * GROUPS floats.
template <class M, class X, class Store, int SLOTS>
JN_DEV void group_norm_cluster(const char* x, Store store, float eps, u64 batches, float* stats_out) {
  using Held = HeldOf<M, X, SLOTS>;
  if (linear_block() >= M::blocks(batches)) return;  // with its cluster
  using Told = Found<M, (X::size > 2)>;              // as group_partials has it
  float* told = (float*)(shared_memory() + Held::bytes);
  const Told found{told, (u64*)(told + Told::floats)};
  float *first_sums = told + Told::floats + 4, *sums = first_sums + M::sum_floats(1);
  float* together = first_sums + ceil_div(M::sum_floats(1) + M::sum_floats(2), 4) * 4;
  cluster_begin(found.ready, 1);
  if (thread_id() == 0) cluster_expect(found.ready, Told::bytes);
  const M map(linear_block(), thread_id());
  float pivot[1][M::UNITS] = {}, v[2][M::UNITS] = {};
  [[maybe_unused]] FirstValues<M, X> first;
  if constexpr (!pivots_are_sampled<M, X>()) first.issue(map, x);
  Held held(map, x, shared_memory());
  store.issue(map);

  held.wait(0);
  if constexpr (pivots_are_sampled<M, X>()) {
    add_values(map, held.get(map, 0, 0), pivot);
    map.sample(pivot, first_sums);
  } else {
    first.get(pivot);
  }
#pragma unroll 1
  for (int s = 0; s < M::STEPS; ++s) {
    const int further = s < Held::AGAIN ? 0 : s - Held::AGAIN;
    held.wait(further);
    add_deviations(map, held.get(map, s, further), s, pivot, v);
    if (s < Held::AGAIN) held.release(map, x);
  }
  map.template totals<2, M::PARTS>(v, sums);
  cluster_begun();
  found.hand_out(map, pivot, v);
  cluster_wait(found.ready, 0);
  GroupStats stats[M::UNITS];
  combine_found(map, found, eps, together, stats);
  store.set(stats);
#pragma unroll 1
  for (int i = Held::AGAIN; i < Held::ALL; ++i) {
    const int s = Held::step(i);
    if (i >= M::STEPS) held.wait(0);
    store.store(map, held.get(map, s, 0), s);
    held.release(map, x);
  }
  if (stats_out != nullptr) save_stats(map, stats, stats_out);
}

}  // namespace jaxnorm
#endif
