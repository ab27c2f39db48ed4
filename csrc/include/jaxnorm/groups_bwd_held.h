// GroupNorm backward, channels last, in one launch by teams of blocks that hold parts of x and dy, as groups_held.h
// does for the forward: a phase of reads and sums, a meeting, a phase of writes.
#pragma once
#include "jaxnorm/groups_bwd.h"
#include "jaxnorm/groups_mail.h"
#include "jaxnorm/l2.h"

#if defined(JN_POSTS)
namespace jaxnorm {

// A chunk of x and the one of dy at the same place.
struct Pair {
  Bits<16> x, dy;
};

// A thread's pairs of EACH parts, AT_ONCE at a time. All that are held come through shared memory, DEPTH on their way;
// the first REGISTERS of them move on to registers when others take their slots. The last are read to registers, and
// read again when all is known: the second-level cache is told to keep those. Loops are not unrolled:
// the compiler would have all loads at once, and no registers for what is held.
template <class M, class X, int EACH, int SLOTS, int REGISTERS> struct HeldPairs {
  using Flat = typename M::template Whole<EACH>;
  using Slot = Stash<X, M::V, M::THREADS>;
  static constexpr int AT_ONCE = 2, DEPTH = 4;
  static constexpr int OF_PART = M::STEPS * M::K, PAIRS = EACH * OF_PART, HELD = SLOTS + REGISTERS;
  static constexpr int bytes = SLOTS * 2 * Slot::footprint;
  // where the first slots are needed again
  static constexpr int TURN = SLOTS / AT_ONCE * AT_ONCE - DEPTH;
  static_assert(X::size * M::V == 16 && OF_PART % AT_ONCE == 0 && HELD % AT_ONCE == 0 && HELD <= PAIRS, "whole turns");
  static_assert(DEPTH % AT_ONCE == 0 && DEPTH <= HELD, "on their way");
  static_assert(REGISTERS == 0 || (TURN >= 0 && REGISTERS <= TURN + AT_ONCE), "what moves has come");
  const Flat map;
  const char *x, *dy;
  unsigned char* base;
  Pair kept[max_of(REGISTERS, 1)], now[AT_ONCE];

  JN_DEV HeldPairs(u64 block, u32 thread, const char* xs, const char* dys, unsigned char* memory)
      : map(block, thread), x(xs), dy(dys), base(memory) {
#pragma unroll
    for (int c = 0; c < DEPTH; c += AT_ONCE) fetch(c);
  }
  // The pairs c to c + AT_ONCE - 1 of the first pass, in order: take(i, pair).
  template <class Take> JN_DEV void first(int c, const Take& take) {
    if (c < HELD) {
      async_wait<DEPTH / AT_ONCE - 1>();
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) now[i] = slot(c + i);
      if constexpr (REGISTERS > 0) {
        if (c == TURN) {
#pragma unroll
          for (int r = 0; r < REGISTERS; ++r) kept[r] = slot(r);
        }
      }
      fetch(c + DEPTH);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      take(i, now[i]);
      if constexpr (HELD < PAIRS) {
        const int next = c + AT_ONCE + i;
        if (next >= HELD && next < PAIRS && map.live_chunk())
          now[i] = Pair{load_kept(x + place(next)), load_kept(dy + place(next))};
      }
    }
  }
  // Asks for what is written first.
  JN_DEV void turn() {
    if constexpr (HELD < PAIRS) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) again(i, PAIRS - 1 - i);
    }
  }
  // store(map, pair, place) of all.
  template <class Store> JN_DEV void store_all(const Store& store) {
    if constexpr (HELD < PAIRS) {
#pragma unroll 1
      for (int c = PAIRS - 1; c >= HELD; c -= AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          store(map, now[i], c - i);
          again(i, c - i - AT_ONCE);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < REGISTERS; ++r) store(map, kept[r], r);
#pragma unroll 2
    for (int c = REGISTERS; c < HELD; ++c) store(map, slot(c), c);
  }

 private:
  JN_DEV u64 place(int c) const { return map.at(c, 0) * X::size; }
  JN_DEV unsigned char* at(int c) const { return base + (c < SLOTS ? c : c - SLOTS) * (2 * Slot::footprint); }
  JN_DEV Pair slot(int c) const {
    return Pair{Slot::read(at(c), map.thread), Slot::read(at(c) + Slot::footprint, map.thread)};
  }
  // A group of copies, if only an empty one: so many are always on their way.
  JN_DEV void fetch(int c) const {
    if (c < HELD && map.live_chunk()) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        Slot::fetch(at(c + i), map.thread, x + place(c + i));
        Slot::fetch(at(c + i) + Slot::footprint, map.thread, dy + place(c + i));
      }
    }
    async_commit();
  }
  JN_DEV void again(int i, int c) {
    if (c >= HELD && map.live_chunk()) now[i] = Pair{load_once(x + place(c)), load_once(dy + place(c))};
  }
};

// The means of a group from the shares of its parts, in the order of add_shares.
template <class M> struct TeamMeans {
  using P = PartLanes<M>;
  static constexpr int RESULTS = 2;
  JN_DEV void combine(const float (&along)[P::EACH], const float (&plain)[P::EACH], u32 lane,
                      float (&results)[RESULTS]) const {
    const float scale = 1.f / (float(M::CG) * float(M::S));
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < P::EACH; ++i) {
      if (M::PARTS % P::LANES == 0 || i * P::LANES + lane < u32(M::PARTS)) sum[0] += along[i], sum[1] += plain[i];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) results[n] = lanes_sum<P::LANES / 2>(sum[n]) * scale;
  }
};

// The sums of channels over all parts of all examples, as words [tile, column, example * PARTS + part], each column by
// one of the blocks that have its tile, in the order of add_partials with a wave of slices.
template <class M, int EACH> struct ChannelMail {
  static constexpr int BLOCKS = M::PARTS / EACH, SLICES = 32, AT_ONCE = 4;
  static_assert(M::WAVES * SLICES == M::THREADS, "a lane for each slice");
  char* words;  // of the tile
  u32 rows, first, apart;

  // block: EACH parts of an example's tile
  JN_DEV ChannelMail(char* all, u64 block, u64 batches) : rows(u32(batches * M::PARTS)), apart(u32(batches * BLOCKS)) {
    const u64 team = block / BLOCKS;
    words = all + 16 * (team % M::TILES * M::TILE * u64(rows));
    first = u32(team / M::TILES * BLOCKS + block % BLOCKS);
  }
  // sums [2, Q, TILE] of a part, of which the first of Q
  JN_DEV void send(const M& map, const float* sums) const {
    for (u32 c = map.thread; c < u32(M::TILE); c += M::THREADS)
      post(word(c, u32(map.batch * M::PARTS + map.part)), sums[c], sums[M::Q * M::TILE + c]);
  }
  template <class Gradients> JN_DEV void add(const M& map, const Gradients& gradients) const {
    const u32 lane = map.thread % SLICES;
    for (u32 c = map.thread / SLICES * apart + first; c < u32(M::TILE); c += M::THREADS / SLICES * apart) {
      float sum[2] = {};
#pragma unroll 1
      for (u32 row = lane; row < rows; row += AT_ONCE * SLICES) {
        char* from[AT_ONCE];
        bool mine[AT_ONCE];
        float along[AT_ONCE], plain[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) from[i] = word(c, row + i * SLICES), mine[i] = row + i * SLICES < rows;
        take_posted(from, mine, along, plain);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
          if (mine[i]) sum[0] += along[i], sum[1] += plain[i];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float one[1] = {lanes_sum<SLICES / 2>(sum[n])};
        if (lane == 0) gradients(n * M::C + map.tile * M::TILE + c, one);
      }
    }
  }

 private:
  JN_DEV char* word(u32 column, u32 row) const { return words + 16 * (u64(column) * rows + row); }
};

// A block has EACH parts. VECTORS: somebody wants the gradients of weight or bias. words: of Mail, of ChannelMail.
// Shared memory: what is held, ChannelSums, told 2 * EACH floats a group, means 2.
template <class M, class X, class DY, class W, class B, class DX, bool SILU, bool VECTORS, int EACH, int SLOTS,
          int REGISTERS, class Gradients>
JN_DEV void group_bwd_held(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                           u64 batches, char* dx, const Gradients& gradients, char* words) {
  using Held = HeldPairs<M, X, EACH, SLOTS, REGISTERS>;
  using One = typename M::template Whole<1>;  // a chunk to a step
  using Letters = Mail<M, EACH, TeamMeans<M>>;
  static_assert(M::LAST && M::WHOLE && M::C % M::TILE == 0, "whole parts, steps and tiles");
  static_assert(X::size == 2 && DY::size == 2 && DX::size == 2, "16 bits");
  const u64 block = linear_block();
  if (block >= Held::Flat::blocks(batches)) return;
  const u32 thread = thread_id();
  Held held(block, thread, x, dy, shared_memory());
  float* memory = (float*)(shared_memory() + Held::bytes);
  float *told = memory + ChannelSums<M>::floats, *together = told + 2 * EACH * M::GROUPS;
  const Letters letters(words, block);
  const ChannelMail<One, EACH> channels(words + batches * M::TILES * (16ull * Letters::WORDS), block, batches);
  ChannelConstants<One, W, B, SILU> constants;
  const One start(block * EACH, thread);
  constants.load_stats(start, stats);
  if constexpr (SILU) constants.load_vectors(start, weight, bias);

#pragma unroll 1
  for (int n = 0; n < EACH; ++n) {
    const One map(block * EACH + n, thread);
    float sums[2][M::V] = {};
#pragma unroll 1
    for (int s = 0; s < Held::OF_PART; s += Held::AT_ONCE) {
      held.first(n * Held::OF_PART + s, [&](int i, const Pair& pair) {
        Step<One, X> xs;
        Step<One, DY> gs;
        xs.raw[0] = pair.x, gs.raw[0] = pair.dy;
        add_products(map, xs, gs, s + i, constants, sums);
      });
    }
    if (VECTORS && n > 0) barrier();  // others may still read the sums before
    // whoever has read a column leaves its sum in place of the first of it
    const float* groups = group_sums<One, W>(
        map, sums, memory, weight, [&](u32 k, u32 column, float sum) { memory[k * M::Q * M::TILE + column] = sum; });
    if constexpr (VECTORS) channels.send(map, memory);
    for (u32 i = thread; i < u32(2 * M::GROUPS); i += M::THREADS)
      told[2 * (i % M::GROUPS * EACH + n) + i / M::GROUPS] = groups[i];
  }
  barrier();
  letters.send(told, thread);
  held.turn();
  if constexpr (!SILU) constants.load_vectors(start, weight, bias);
  float found[M::UNITS][2];
  letters.receive(M(block * EACH, thread), TeamMeans<M>{}, together, found);
  GroupMeans means[M::UNITS];
#pragma unroll
  for (int u = 0; u < M::UNITS; ++u) means[u] = GroupMeans{found[u][0], found[u][1]};
  held.store_all([&](const typename Held::Flat& map, const Pair& pair, int place) {
    if (map.live_chunk())
      store_once(dx + map.at(place, 0) * DX::size, chunk_dx<X, DY, DX>(pair.x, pair.dy, constants, means));
  });
  if constexpr (VECTORS) channels.add(start, gradients);
}

}  // namespace jaxnorm
#endif
