// GroupNorm in one launch where the chip holds the image but a cluster of blocks does not hold its part of it: teams of
// blocks anywhere on the device, each with EACH parts of a tile, one after the other. A block reads its parts once,
// keeps of them what shared memory and registers have room for, and tells the others of its team what it found
// (groups_mail.h). What there is no room for is fetched again, last first, and the cache is asked to keep that and
// nothing else.
//
// A phase of reads, a meeting, a phase of writes: parts in flight between the two cost nothing here, where the blocks
// of several images in turn would wait behind one another's loads.
#pragma once
#include "jaxnorm/groups_fwd.h"
#include "jaxnorm/groups_mail.h"
#include "jaxnorm/l2.h"

#if defined(JN_POSTS)
namespace jaxnorm {

// A thread's chunks of EACH parts. All that are held come through shared memory: the first REGISTERS of them move on to
// registers, and the next ones take their slots. (Loads to registers would wait in the first-level cache, which is
// small beside so much shared memory, and hold up the reads of what has come: 29.6 us and 28.5 at 4x128x128x320.) The
// others, AGAIN of them, are read, and read again when all is known.
template <class M, class X, int EACH, int WAVES, int SLOTS, int REGISTERS> struct HeldParts {
  using Flat = typename M::template Whole<EACH>;
  using Slot = Stash<X, M::V, M::THREADS>;
  static constexpr int OF_WAVE = EACH * M::STEPS * M::K, CHUNKS = WAVES * OF_WAVE, HELD = SLOTS + REGISTERS,
                       AGAIN = CHUNKS - HELD, AHEAD = 4;
  static constexpr int AT_ONCE = 4, GROUPS = ceil_div(HELD, AT_ONCE), bytes = SLOTS * Slot::footprint;
  // On their way at once; more was no faster.
  static constexpr int DEPTH = min_of(8, SLOTS);
  static_assert(X::size * M::V == 16 && 0 < SLOTS && REGISTERS <= SLOTS && HELD <= CHUNKS, "chunks of 16 bytes");
  static_assert(DEPTH >= AT_ONCE || DEPTH == HELD, "what is waited for was asked for");
  static_assert(AGAIN == 0 || (AGAIN >= AHEAD && AGAIN <= OF_WAVE), "as many on their way, of the last wave");
  const Flat (&maps)[WAVES];
  const char* x;
  unsigned char* base;
  Bits<16> kept[max_of(REGISTERS, 1)], ahead[AHEAD];

  JN_DEV HeldParts(const Flat (&m)[WAVES], const char* from, unsigned char* memory) : maps(m), x(from), base(memory) {
#pragma unroll
    for (int c = 0; c < DEPTH; ++c) fetch(c);
  }
  // Chunk c of the first pass, in their order.
  JN_DEV Bits<16> first(int c) {
    if (c < HELD) {
      const int asked = min_of(DEPTH + c, HELD);
      const int committed = asked == HELD ? GROUPS : asked / AT_ONCE;
      if (c % AT_ONCE == 0) async_wait_for<GROUPS>(u32(committed - (c / AT_ONCE + 1)));
      const Bits<16> found = slot(c);
      if (c < REGISTERS) kept[c < REGISTERS ? c : 0] = found;
      if (c + DEPTH < HELD) fetch(c + DEPTH);
      if constexpr (AGAIN > 0)  // on their way before the last of what is held has come
        if (c == HELD - AT_ONCE) fetch_ahead();
      return found;
    }
    const int i = (c - HELD) % AHEAD;
    const Bits<16> found = ahead[i];
    if (c + AHEAD < CHUNKS) ahead[i] = live() ? load_kept(place_again(c + AHEAD)) : Bits<16>{};
    return found;
  }
  // Asks for what is normalised first.
  JN_DEV void turn() {
    if constexpr (AGAIN > 0) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) again(i, CHUNKS - 1 - i);
    }
  }
  // The chunks of a wave.
  template <class Store> JN_DEV void store_wave(const Store& store, int wave) {
    const int first = wave * OF_WAVE, end = first + OF_WAVE;
    if constexpr (AGAIN > 0) {
      if (wave == WAVES - 1) {
#pragma unroll 1
        for (int s = 0; s < AGAIN; s += AHEAD) {
#pragma unroll
          for (int i = 0; i < AHEAD; ++i) {
            const int c = CHUNKS - 1 - s - i;
            if (c < HELD) continue;
            put(store, ahead[i], c, WAVES - 1);
            again(i, c - AHEAD);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < REGISTERS; ++c)
      if (first <= c && c < end) put(store, kept[c], c, wave);
#pragma unroll(M::LAST ? SLOTS : 4)
    for (int c = max_of(REGISTERS, first); c < min_of(HELD, end); ++c) put(store, slot(c), c, wave);
  }

 private:
  JN_DEV bool live() const { return maps[0].live_chunk(); }
  JN_DEV const char* place(int c) const { return x + maps[c / OF_WAVE].at(c % OF_WAVE, 0) * X::size; }
  JN_DEV const char* place_again(int c) const { return x + maps[WAVES - 1].at(c - (WAVES - 1) * OF_WAVE, 0) * X::size; }
  JN_DEV unsigned char* at(int c) const { return base + (c < SLOTS ? c : c - SLOTS) * Slot::footprint; }
  JN_DEV Bits<16> slot(int c) const { return Slot::read(at(c), maps[0].thread); }
  JN_DEV void fetch(int c) const {
    if (live()) Slot::fetch(at(c), maps[0].thread, place(c));
    if (c % AT_ONCE == AT_ONCE - 1 || c == HELD - 1) async_commit();
  }
  JN_DEV void fetch_ahead() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ahead[i] = live() ? load_kept(place_again(HELD + i)) : Bits<16>{};
  }
  JN_DEV void again(int i, int c) {
    if (c >= HELD && live()) ahead[i] = load_once(place_again(c));
  }
  template <class Store> JN_DEV void put(const Store& store, const Bits<16>& raw, int c, int wave) const {
    Step<Flat, X> one;
    one.raw[0] = raw;
    store.store(maps[wave], one, c - wave * OF_WAVE);
  }
};

template <class Flat, int WAVES> struct Waves;
template <class Flat> struct Waves<Flat, 1> {
  Flat maps[1];
  JN_DEV Waves(u64 block, u64, u32 thread) : maps{Flat(block, thread)} {}
};
template <class Flat> struct Waves<Flat, 2> {
  Flat maps[2];
  JN_DEV Waves(u64 block, u64 apart, u32 thread) : maps{Flat(block, thread), Flat(block + apart, thread)} {}
};

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
  Held held(flat.maps, x, shared_memory());
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
      for (int k = 0; k < M::K; ++k) step.raw[k] = held.first((n * M::STEPS + s) * M::K + k);
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
    held.store_wave(store, wave);
    if (stats_out != nullptr) save_stats(map, stats, stats_out);
  }
}

}  // namespace jaxnorm
#endif
