// GroupNorm in one launch where the chip holds the image but a cluster of blocks does not hold its part of it: teams of
// blocks anywhere on the device, each with EACH parts of a tile, one after the other. A block reads its parts once,
// keeps of them what shared memory and registers have room for, and tells the others of its team what it found (post.h).
// What there is no room for is fetched again, last first, and the cache is asked to keep that and nothing else.
//
// A phase of reads, a meeting, a phase of writes: parts in flight between the two cost nothing here, where the blocks of
// several images in turn would wait behind one another's loads.
#pragma once
#include "jaxnorm/groups_fwd.h"
#include "jaxnorm/l2.h"
#include "jaxnorm/post.h"

#if defined(JN_POSTS)
namespace jaxnorm {

// Waits until at most `pending` of the committed groups, at most MOST, are still running.
template <int MOST> JN_DEV void held_wait(int pending) {
  if constexpr (MOST == 0) {
    async_wait<0>();
  } else {
    if (pending >= MOST)
      async_wait<MOST>();
    else
      held_wait<MOST - 1>(pending);
  }
}

// A thread's chunks of EACH parts: the first SLOTS in shared memory, REGISTERS more in registers, the others not.
template <class M, class X, int EACH, int SLOTS, int REGISTERS> struct HeldParts {
  using Flat = typename M::template Whole<EACH>;
  using Slot = Stash<X, M::V, M::THREADS>;
  static constexpr int OF_PART = M::STEPS * M::K, CHUNKS = EACH * OF_PART, HELD = SLOTS + REGISTERS;
  static constexpr int AGAIN = CHUNKS - HELD, AHEAD = 4, AT_ONCE = 4, FETCHES = ceil_div(SLOTS, AT_ONCE);
  static constexpr int bytes = SLOTS * Slot::footprint;
  static_assert(X::size * M::V == 16 && HELD <= CHUNKS && (AGAIN == 0 || AGAIN >= AHEAD), "chunks of 16 bytes");
  const Flat& map;
  const char* x;
  unsigned char* base;
  Bits<16> kept[max_of(REGISTERS, 1)], ahead[AHEAD];

  JN_DEV HeldParts(const Flat& m, const char* from, unsigned char* memory) : map(m), x(from), base(memory) {
#pragma unroll
    for (int c = 0; c < SLOTS; ++c) {
      if (map.live_chunk()) Slot::fetch(base + c * Slot::footprint, map.thread, x + map.at(c, 0) * X::size);
      if (c % AT_ONCE == AT_ONCE - 1 || c == SLOTS - 1) async_commit();
    }
#pragma unroll
    for (int c = 0; c < REGISTERS; ++c) kept[c] = map.live_chunk() ? load_once(place(SLOTS + c)) : Bits<16>{};
  }
  // Chunk c of the first pass, in their order.
  JN_DEV Bits<16> first(int c) {
    if (c < SLOTS) {
      if (c % AT_ONCE == 0) held_wait<max_of(FETCHES - 1, 0)>(FETCHES - 1 - c / AT_ONCE);
      if constexpr (AGAIN > 0)  // on their way before the last of what is held has come
        if (c == SLOTS - 1) fetch_ahead();
      return slot(c);
    }
    if (c < HELD) return kept[c - SLOTS];
    const int i = (c - HELD) % AHEAD;
    const Bits<16> found = ahead[i];
    if (c + AHEAD < CHUNKS) ahead[i] = map.live_chunk() ? load_kept(place(c + AHEAD)) : Bits<16>{};
    return found;
  }
  // Asks for what is normalised first.
  JN_DEV void turn() {
    if constexpr (AGAIN > 0) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) again(i, CHUNKS - 1 - i);
    }
  }
  template <class Store> JN_DEV void store_all(const Store& store) {
    if constexpr (AGAIN > 0) {
#pragma unroll 1
      for (int s = 0; s < AGAIN; s += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int c = CHUNKS - 1 - s - i;
          if (c < HELD) continue;
          put(store, ahead[i], c);
          again(i, c - AHEAD);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < REGISTERS; ++c) put(store, kept[c], SLOTS + c);
#pragma unroll 4
    for (int c = 0; c < SLOTS; ++c) put(store, slot(c), c);
  }

 private:
  JN_DEV const char* place(int c) const { return x + map.at(c, 0) * X::size; }
  JN_DEV Bits<16> slot(int c) const { return Slot::read(base + c * Slot::footprint, map.thread); }
  JN_DEV void fetch_ahead() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ahead[i] = map.live_chunk() ? load_kept(place(HELD + i)) : Bits<16>{};
  }
  JN_DEV void again(int i, int c) {
    if (c >= HELD && map.live_chunk()) ahead[i] = load_once(place(c));
  }
  template <class Store> JN_DEV void put(const Store& store, const Bits<16>& raw, int c) const {
    Step<Flat, X> one;
    one.raw[0] = raw;
    store.store(map, one, c);
  }
};

// What a team has to say of the groups of its tile: words [team, to block, GROUPS, PARTS] of mean and squared deviations.
template <class M, int EACH> struct Mail {
  static constexpr int BLOCKS = M::PARTS / EACH, WORDS = M::GROUPS * EACH;
  static_assert(M::PARTS % EACH == 0, "the same number of parts for each block");
  char* words;  // of the team
  u32 block;    // of the team

  // told [GROUPS, EACH, 2]
  JN_DEV void send(const float* told, u32 thread) const {
    for (u32 n = thread; n < u32(BLOCKS * WORDS); n += M::THREADS) {
      const u32 to = n / WORDS, g = n % WORDS / EACH, i = n % EACH;
      post(at(to, g, block * EACH + i), told[2 * (g * EACH + i)], told[2 * (g * EACH + i) + 1]);
    }
  }
  // The statistics of a thread's units. memory: 3 * GROUPS floats.
  JN_DEV void receive(const M& map, float eps, float* memory, GroupStats (&stats)[M::UNITS]) const {
    using P = Parts<M, false>;
    constexpr int at_once = M::THREADS / P::SUB;
    const u32 lane = map.thread % P::SUB;
#pragma unroll 1
    for (int s = 0; s < M::GROUPS; s += at_once) {
      const u32 g = s + map.thread / P::SUB;
      P parts{};
#pragma unroll
      for (int first = 0; first < P::EACH; first += 4) {
        constexpr int most = min_of(P::EACH, 4);
        char* from[most];
        bool mine[most];
        float mean[most], squares[most];
#pragma unroll
        for (int i = 0; i < most; ++i) {
          const u32 p = (first + i) * P::SUB + lane;
          mine[i] = g < u32(M::GROUPS) && p < u32(M::PARTS) && first + i < P::EACH;
          from[i] = at(block, g, p);
        }
        take_posted(from, mine, mean, squares);
#pragma unroll
        for (int i = 0; i < most; ++i)
          if (first + i < P::EACH) parts.mean[first + i] = mean[i], parts.squares[first + i] = squares[i];
      }
      parts.pivot = shfl_from<P::SUB, 0>(parts.mean[0]);
      const GroupStats one = parts.combine(lane, eps);
      if (g < u32(M::GROUPS) && lane == 0)
        memory[3 * g] = one.m, memory[3 * g + 1] = one.low, memory[3 * g + 2] = one.rstd;
    }
    barrier();
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      const float* found = memory + 3 * (map.live_chunk() ? map.group(u) : 0);
      stats[u] = GroupStats{found[0], found[1], found[2]};
    }
  }

 private:
  JN_DEV char* at(u32 to, u32 g, u32 part) const {
    return words + 16 * u64((to * M::GROUPS + g) * M::PARTS + part);
  }
};

// Shared memory: what is held, sample_floats, sum_floats(2), told and statistics 2 * EACH and 3 floats a group.
template <class M, class X, class Store, int EACH, int SLOTS, int REGISTERS>
JN_DEV void group_norm_held(const char* x, Store store, float eps, u64 batches, char* words, float* stats_out) {
  using Held = HeldParts<M, X, EACH, SLOTS, REGISTERS>;
  using Flat = typename Held::Flat;
  using Letters = Mail<M, EACH>;
  static_assert(M::WHOLE, "whole parts and steps");
  const u64 block = linear_block();
  if (block >= Flat::blocks(batches)) return;  // with its team
  const u32 thread = thread_id();
  const Flat flat(block, thread);
  Held held(flat, x, shared_memory());
  float *sampled = (float*)(shared_memory() + Held::bytes), *sums = sampled + M::sample_floats();
  float *told = sums + M::sum_floats(2), *together = told + 2 * EACH * M::GROUPS;

  // As group_partials does: deviations from the mean of the first step of a part.
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const M map(block * EACH + i, thread);
    float pivot[1][M::UNITS] = {}, v[2][M::UNITS] = {};
    Step<M, X> step;
#pragma unroll
    for (int s = 0; s < M::STEPS; ++s) {
#pragma unroll
      for (int k = 0; k < M::K; ++k) step.raw[k] = held.first((i * M::STEPS + s) * M::K + k);
      if (s == 0) {
        add_values(map, step, pivot);
        map.sample(pivot, sampled);
      }
      add_deviations(map, step, s, pivot, v);
    }
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
  }
  barrier();
  const u64 team = block / Letters::BLOCKS;
  const Letters letters{words + team * (16ull * Letters::BLOCKS * M::GROUPS * M::PARTS), u32(block % Letters::BLOCKS)};
  letters.send(told, thread);
  held.turn();
  store.issue(flat);
  GroupStats stats[M::UNITS];
  letters.receive(M(block * EACH, thread), eps, together, stats);
  store.set(stats);
  held.store_all(store);
  if (stats_out != nullptr) save_stats(M(block * EACH, thread), stats, stats_out);
}

}  // namespace jaxnorm
#endif
