// What blocks tell one another that work on the same groups, anywhere on the device (a launch that is `meeting`).
#pragma once
#include "jaxnorm/groups.h"
#include "jaxnorm/post.h"

#if defined(JN_POSTS)
namespace jaxnorm {

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
