// Teams of blocks anywhere on the device that hold parts of an image on the chip between two phases: a phase of reads,
// a meeting, a phase of writes. What a block holds, and what the blocks of a team tell one another.
#pragma once
#include "jaxnorm/groups.h"
#include "jaxnorm/l2.h"
#include "jaxnorm/post.h"

#if defined(JN_POSTS)
namespace jaxnorm {

// What lies at one place of ARRAYS images.
template <int ARRAYS> struct Lying {
  Bits<16> of[ARRAYS];
};

// A thread's chunks of EACH parts of ARRAYS images. All that are held come through shared memory: the first REGISTERS
// places move on to registers, and the next ones take their slots. (Loads to registers would wait in the first-level
// cache, which is small beside so much shared memory, and hold up the reads of what has come: 29.6 us and 28.5 at
// 4x128x128x320.) The others, AGAIN of them, are read, and read again when all is known.
template <class M, class X, int EACH, int WAVES, int SLOTS, int REGISTERS, int ARRAYS = 1> struct HeldParts {
  using Flat = typename M::template Whole<EACH>;
  using Slot = Stash<X, M::V, M::THREADS>;
  using Place = Lying<ARRAYS>;
  static constexpr int OF_WAVE = EACH * M::STEPS * M::K, CHUNKS = WAVES * OF_WAVE, HELD = SLOTS + REGISTERS,
                       AGAIN = CHUNKS - HELD, AHEAD = 4 / ARRAYS;
  static constexpr int AT_ONCE = 4 / ARRAYS, GROUPS = ceil_div(HELD, AT_ONCE), footprint = ARRAYS * Slot::footprint,
                       bytes = SLOTS * footprint;
  // On their way at once; more was no faster.
  static constexpr int DEPTH = min_of(8 / ARRAYS, SLOTS);
  static_assert(X::size * M::V == 16 && 0 < SLOTS && REGISTERS <= SLOTS && HELD <= CHUNKS, "chunks of 16 bytes");
  static_assert(DEPTH >= AT_ONCE || DEPTH == HELD, "what is waited for was asked for");
  static_assert(AGAIN == 0 || (AGAIN >= AHEAD && AGAIN <= OF_WAVE), "as many on their way, of the last wave");
  const Flat (&maps)[WAVES];
  const char* images[ARRAYS];
  unsigned char* base;
  Place kept[max_of(REGISTERS, 1)], ahead[AHEAD];

  JN_DEV HeldParts(const Flat (&m)[WAVES], const char* const (&from)[ARRAYS], unsigned char* memory)
      : maps(m), base(memory) {
#pragma unroll
    for (int a = 0; a < ARRAYS; ++a) images[a] = from[a];
#pragma unroll
    for (int c = 0; c < DEPTH; ++c) fetch(c);
  }
  // Place c of the first pass, in their order.
  JN_DEV Place first(int c) {
    if (c < HELD) {
      const int asked = min_of(DEPTH + c, HELD);
      const int committed = asked == HELD ? GROUPS : asked / AT_ONCE;
      if (c % AT_ONCE == 0) async_wait_for<GROUPS>(u32(committed - (c / AT_ONCE + 1)));
      const Place found = slot(c);
      if (c < REGISTERS) kept[c < REGISTERS ? c : 0] = found;
      if (c + DEPTH < HELD) fetch(c + DEPTH);
      if constexpr (AGAIN > 0)  // on their way before the last of what is held has come
        if (c == HELD - AT_ONCE) fetch_ahead();
      return found;
    }
    const int i = (c - HELD) % AHEAD;
    const Place found = ahead[i];
    if (c + AHEAD < CHUNKS) ahead[i] = read_kept(c + AHEAD);
    return found;
  }
  // Asks for what is written first.
  JN_DEV void turn() {
    if constexpr (AGAIN > 0) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) again(i, CHUNKS - 1 - i);
    }
  }
  // store(map, place, number): the places of a wave.
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
            store(maps[WAVES - 1], ahead[i], c - (WAVES - 1) * OF_WAVE);
            again(i, c - AHEAD);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < REGISTERS; ++c)
      if (first <= c && c < end) store(maps[wave], kept[c], c - first);
#pragma unroll(M::LAST ? SLOTS : 4)
    for (int c = max_of(REGISTERS, first); c < min_of(HELD, end); ++c) store(maps[wave], slot(c), c - first);
  }

 private:
  JN_DEV bool live() const { return maps[0].live_chunk(); }
  JN_DEV u64 place(int c) const { return maps[c / OF_WAVE].at(c % OF_WAVE, 0) * X::size; }
  JN_DEV u64 place_again(int c) const { return maps[WAVES - 1].at(c - (WAVES - 1) * OF_WAVE, 0) * X::size; }
  JN_DEV unsigned char* at(int c) const { return base + (c < SLOTS ? c : c - SLOTS) * footprint; }
  JN_DEV Place slot(int c) const {
    Place found;
#pragma unroll
    for (int a = 0; a < ARRAYS; ++a) found.of[a] = Slot::read(at(c) + a * Slot::footprint, maps[0].thread);
    return found;
  }
  JN_DEV void fetch(int c) const {
    if (live()) {
#pragma unroll
      for (int a = 0; a < ARRAYS; ++a) Slot::fetch(at(c) + a * Slot::footprint, maps[0].thread, images[a] + place(c));
    }
    if (c % AT_ONCE == AT_ONCE - 1 || c == HELD - 1) async_commit();
  }
  JN_DEV Place read_kept(int c) const {
    Place found{};
    if (live()) {
#pragma unroll
      for (int a = 0; a < ARRAYS; ++a) found.of[a] = load_kept(images[a] + place_again(c));
    }
    return found;
  }
  JN_DEV void fetch_ahead() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ahead[i] = read_kept(HELD + i);
  }
  JN_DEV void again(int i, int c) {
    if (c < HELD || !live()) return;
#pragma unroll
    for (int a = 0; a < ARRAYS; ++a) ahead[i].of[a] = load_once(images[a] + place_again(c));
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

// What the blocks of a team tell one another of the groups of their tile. Few words: two values of each part to every
// block, [to block, GROUPS, PARTS]. Many, where that would be more traffic than the image is worth (1x512x512x128:
// 55.7 us, and 43.2 so): to the one block that puts a group together, [GROUPS, PARTS], which tells the others,
// [to block, GROUPS, Sum::RESULTS / 2]. Sum puts a group together: of the values of EACH parts, of a lane, to RESULTS
// floats, the same for all LANES.
template <class M> struct PartLanes {
  static constexpr int LANES = min_of(kWave, next_power_of_2(M::PARTS)), EACH = ceil_div(M::PARTS, LANES);
};
template <class M, int EACH, class Sum> struct Mail {
  using P = PartLanes<M>;
  static constexpr int BLOCKS = M::PARTS / EACH, OWN = M::GROUPS * EACH, ALL = M::GROUPS * M::PARTS;
  static constexpr int RESULTS = Sum::RESULTS, PAIRS = ceil_div(RESULTS, 2);
  static constexpr bool DIRECT = ALL <= 512;
  static constexpr int WORDS = DIRECT ? BLOCKS * ALL : ALL + BLOCKS * M::GROUPS * PAIRS;  // of a team
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
  // What was put together of the groups of a thread's units. memory: RESULTS * GROUPS floats.
  JN_DEV void receive(const M& map, const Sum& sum, float* memory, float (&results)[M::UNITS][RESULTS]) const {
    constexpr int at_once = M::THREADS / P::LANES;
    const u32 lane = map.thread % P::LANES, seat = map.thread / P::LANES;
    if constexpr (DIRECT) {
#pragma unroll 1
      for (int s = 0; s < M::GROUPS; s += at_once) {
        const u32 g = s + seat;
        float one[RESULTS];
        combine(block * ALL, g, lane, sum, one);
        if (g < u32(M::GROUPS) && lane == 0) {
#pragma unroll
          for (int r = 0; r < RESULTS; ++r) memory[RESULTS * g + r] = one[r];
        }
      }
    } else {
      constexpr int own = ceil_div(M::GROUPS, BLOCKS);
#pragma unroll 1
      for (int s = 0; s < own; s += at_once) {
        const u32 g = (s + seat) * BLOCKS + block;
        const bool mine = s + seat < u32(own) && g < u32(M::GROUPS);
        float one[RESULTS];
        combine(0, mine ? g : u32(M::GROUPS), lane, sum, one);
        if (!mine) continue;
        for (u32 to = lane; to < u32(BLOCKS); to += P::LANES) {
#pragma unroll
          for (int r = 0; r < RESULTS; r += 2)
            post(result(to, g) + 8 * r, one[r], r + 1 < RESULTS ? one[min_of(r + 1, RESULTS - 1)] : 0.f);
        }
      }
      for (u32 g = map.thread; g < u32(M::GROUPS); g += M::THREADS) take_result(g, memory + RESULTS * g);
    }
    barrier();
#pragma unroll
    for (int u = 0; u < M::UNITS; ++u) {
      const float* found = memory + RESULTS * (map.live_chunk() ? map.group(u) : 0);
#pragma unroll
      for (int r = 0; r < RESULTS; ++r) results[u][r] = found[r];
    }
  }

 private:
  JN_DEV char* word(u32 n) const { return words + 16 * u64(n); }
  JN_DEV char* result(u32 to, u32 g) const { return word(ALL + (to * M::GROUPS + g) * PAIRS); }
  JN_DEV void take_result(u32 g, float* to) const {
    char* from[PAIRS];
    bool mine[PAIRS];
    float a[PAIRS], b[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) from[p] = result(block, g) + 16 * p, mine[p] = true;
    take_posted(from, mine, a, b);
#pragma unroll
    for (int r = 0; r < RESULTS; ++r) to[r] = r % 2 == 0 ? a[r / 2] : b[r / 2];
  }
  // Of the words from `first` on; by LANES lanes, all of which get the results. No words of a group that is none.
  JN_DEV void combine(u32 first, u32 g, u32 lane, const Sum& sum, float (&results)[RESULTS]) const {
    float one[P::EACH], other[P::EACH];
#pragma unroll
    for (int from = 0; from < P::EACH; from += 4) {
      constexpr int most = min_of(P::EACH, 4);
      char* places[most];
      bool mine[most];
      float a[most], b[most];
#pragma unroll
      for (int i = 0; i < most; ++i) {
        const u32 p = (from + i) * P::LANES + lane;
        mine[i] = g < u32(M::GROUPS) && p < u32(M::PARTS) && from + i < P::EACH;
        places[i] = word(first + g * M::PARTS + p);
      }
      take_posted(places, mine, a, b);
#pragma unroll
      for (int i = 0; i < most; ++i)
        if (from + i < P::EACH) one[from + i] = a[i], other[from + i] = b[i];
    }
    sum.combine(one, other, lane, results);
  }
};

}  // namespace jaxnorm
#endif
