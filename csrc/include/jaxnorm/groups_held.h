// GroupNorm in one launch where the chip holds the image but a cluster of blocks does not hold its part of it: teams of
// blocks anywhere on the device, each with EACH parts of a tile, one after the other. A block reads its parts once,
// keeps of them what shared memory and registers have room for, and tells the others of its team what it found
// (post.h). What there is no room for is fetched again, last first, and the cache is asked to keep that and nothing
// else.
//
// A phase of reads, a meeting, a phase of writes: parts in flight between the two cost nothing here, where the blocks
// of several images in turn would wait behind one another's loads.
#pragma once
#include "jaxnorm/groups_fwd.h"
#include "jaxnorm/l2.h"
#include "jaxnorm/post.h"

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

// What the blocks of a team tell one another of the groups of their tile. Few words: each part's mean and squared
// deviations to every block, [to block, GROUPS, PARTS]. Many, where that would be more traffic than the image is worth
// (1x512x512x128: 55.7 us, and 43.2 so): to the one block that puts a group together, [GROUPS, PARTS], which tells the
// others, [to block, GROUPS, 2].
template <class M, int EACH> struct Mail {
  using P = Parts<M, false>;
  static constexpr int BLOCKS = M::PARTS / EACH, OWN = M::GROUPS * EACH, ALL = M::GROUPS * M::PARTS;
  static constexpr bool DIRECT = ALL <= 512;
  static constexpr int WORDS = DIRECT ? BLOCKS * ALL : ALL + BLOCKS * M::GROUPS * 2;  // of a team
  static_assert(M::PARTS % EACH == 0, "the same number of parts for each block");
  char* words;  // of the team
  u32 block;    // of the team

  JN_DEV Mail(char* all, u64 b) : words(all + b / BLOCKS * (16ull * WORDS)), block(u32(b % BLOCKS)) {}
  // told [GROUPS, EACH, 2]
  JN_DEV void send(const float* told, u32 thread) const {
    for (u32 n = thread; n < u32((DIRECT ? BLOCKS : 1) * OWN); n += M::THREADS) {
      const u32 to = n / OWN, own = n % OWN, g = own / EACH, i = own % EACH;
      post(word(to * ALL + g * M::PARTS + block * EACH + i), told[2 * own], told[2 * own + 1]);
    }
  }
  // The statistics of a thread's units. memory: 3 * GROUPS floats.
  JN_DEV void receive(const M& map, float eps, float* memory, GroupStats (&stats)[M::UNITS]) const {
    constexpr int at_once = M::THREADS / P::SUB;
    const u32 lane = map.thread % P::SUB, seat = map.thread / P::SUB;
    if constexpr (DIRECT) {
#pragma unroll 1
      for (int s = 0; s < M::GROUPS; s += at_once) {
        const u32 g = s + seat;
        const GroupStats one = combine(block * ALL, g, lane, eps);
        if (g < u32(M::GROUPS) && lane == 0)
          memory[3 * g] = one.m, memory[3 * g + 1] = one.low, memory[3 * g + 2] = one.rstd;
      }
    } else {
      constexpr int own = ceil_div(M::GROUPS, BLOCKS);
#pragma unroll 1
      for (int s = 0; s < own; s += at_once) {
        const u32 g = (s + seat) * BLOCKS + block;
        const bool mine = s + seat < u32(own) && g < u32(M::GROUPS);
        const GroupStats one = combine(0, mine ? g : u32(M::GROUPS), lane, eps);
        if (!mine) continue;
        for (u32 to = lane; to < u32(BLOCKS); to += P::SUB) {
          post(result(to, g), one.m, one.low);
          post(result(to, g) + 16, one.rstd, 0.f);
        }
      }
      for (u32 g = map.thread; g < u32(M::GROUPS); g += M::THREADS) {
        char* const from[2] = {result(block, g), result(block, g) + 16};
        float a[2], b[2];
        take_posted(from, {true, true}, a, b);
        memory[3 * g] = a[0], memory[3 * g + 1] = b[0], memory[3 * g + 2] = a[1];
      }
    }
    barrier();
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      const float* found = memory + 3 * (map.live_chunk() ? map.group(u) : 0);
      stats[u] = GroupStats{found[0], found[1], found[2]};
    }
  }

 private:
  JN_DEV char* word(u32 n) const { return words + 16 * u64(n); }
  JN_DEV char* result(u32 to, u32 g) const { return word(ALL + (to * M::GROUPS + g) * 2); }
  // Of the words from `first` on; by SUB lanes, all of which get the result. No words of a group that is none.
  JN_DEV GroupStats combine(u32 first, u32 g, u32 lane, float eps) const {
    P parts{};
#pragma unroll
    for (int from = 0; from < P::EACH; from += 4) {
      constexpr int most = min_of(P::EACH, 4);
      char* places[most];
      bool mine[most];
      float mean[most], squares[most];
#pragma unroll
      for (int i = 0; i < most; ++i) {
        const u32 p = (from + i) * P::SUB + lane;
        mine[i] = g < u32(M::GROUPS) && p < u32(M::PARTS) && from + i < P::EACH;
        places[i] = word(first + g * M::PARTS + p);
      }
      take_posted(places, mine, mean, squares);
#pragma unroll
      for (int i = 0; i < most; ++i)
        if (from + i < P::EACH) parts.mean[from + i] = mean[i], parts.squares[from + i] = squares[i];
    }
    parts.pivot = shfl_from<P::SUB, 0>(parts.mean[0]);
    return parts.combine(lane, eps);
  }
};

// A block has EACH parts of WAVES teams: what it waits for from the first comes while it reads the second.
// Shared memory: what is held, sum_floats(2), told 2 * EACH floats a group, statistics 3 * WAVES.
template <class M, class X, class Store, int EACH, int WAVES, int SLOTS, int REGISTERS>
JN_DEV void group_norm_held(const char* x, Store store, float eps, u64 batches, char* words, float* stats_out) {
  using Held = HeldParts<M, X, EACH, WAVES, SLOTS, REGISTERS>;
  using Flat = typename Held::Flat;
  using Letters = Mail<M, EACH>;
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
    GroupStats stats[M::UNITS];
    Letters(words, block + wave * apart).receive(map, eps, together + 3 * M::GROUPS * wave, stats);
    store.set(stats);
    held.store_wave(store, wave);
    if (stats_out != nullptr) save_stats(map, stats, stats_out);
  }
}

}  // namespace jaxnorm
#endif
