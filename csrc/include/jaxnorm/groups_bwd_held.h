// GroupNorm backward, channels last, in one launch by teams of blocks that hold parts of x and dy (groups_team.h), as
// groups_held.h does for the forward.
#pragma once
#include "jaxnorm/groups_bwd.h"
#include "jaxnorm/groups_team.h"

#if defined(JN_POSTS)
namespace jaxnorm {

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

template <class M, class X, class DY, class W, class B, class DX, bool SILU> struct GradientStore {
  const ChannelConstants<M, W, B, SILU>& constants;
  const GroupMeans (&means)[M::UNITS];
  char* dx;
  template <class Flat> JN_DEV void operator()(const Flat& map, const Lying<2>& place, int step) const {
    if (!map.live_chunk()) return;
    store_once(dx + map.at(step, 0) * DX::size, chunk_dx<X, DY, DX>(place.of[0], place.of[1], constants, means));
  }
};

// A block has EACH parts. partials as in SumsOut. Shared memory: what is held, ChannelSums, told 2 * EACH floats a
// group, means 2.
template <class M, class X, class DY, class W, class B, class DX, bool SILU, int EACH, int SLOTS, int REGISTERS>
JN_DEV void group_bwd_held(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                           u64 batches, char* dx, float* partials, char* words) {
  using Held = HeldParts<M, X, EACH, 1, SLOTS, REGISTERS, 2>;
  using Flat = typename Held::Flat;
  using Letters = Mail<M, EACH, TeamMeans<M>>;
  static_assert(M::LAST && M::WHOLE && M::C % M::TILE == 0, "whole parts, steps and tiles");
  static_assert(X::size == 2 && DY::size == 2 && DX::size == 2, "16 bits");
  constexpr int steps = M::STEPS * M::K;
  using One = typename M::template Whole<1>;  // a chunk to a step
  const u64 block = linear_block();
  let_next_launch_begin();
  if (block >= Flat::blocks(batches)) return;
  const u32 thread = thread_id();
  const Waves<Flat, 1> flat(block, 0, thread);
  Held held(flat.maps, {x, dy}, shared_memory());
  float* memory = (float*)(shared_memory() + Held::bytes);
  float *told = memory + ChannelSums<M>::floats, *together = told + 2 * EACH * M::GROUPS;
  ChannelConstants<One, W, B, SILU> constants;
  constants.load_stats(One(block * EACH, thread), stats);
  if constexpr (SILU) constants.load_vectors(One(block * EACH, thread), weight, bias);

#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const One map(block * EACH + n, thread);
    float sums[2][M::V] = {};
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      const Lying<2> place = held.first(n * steps + s);
      Step<One, X> xs;
      Step<One, DY> gs;
      xs.raw[0] = place.of[0], gs.raw[0] = place.of[1];
      add_products(map, xs, gs, s, constants, sums);
    }
    const float* groups = group_sums<One, W>(map, sums, memory, weight, partials);
    for (u32 i = thread; i < u32(2 * M::GROUPS); i += M::THREADS)
      told[2 * (i % M::GROUPS * EACH + n) + i / M::GROUPS] = groups[i];
  }
  barrier();
  const Letters letters(words, block);
  letters.send(told, thread);
  held.turn();
  const One map(block * EACH, thread);
  if constexpr (!SILU) constants.load_vectors(map, weight, bias);
  float found[M::UNITS][2];
  letters.receive(M(block * EACH, thread), TeamMeans<M>{}, together, found);
  GroupMeans means[M::UNITS];
#pragma unroll
  for (int u = 0; u < M::UNITS; ++u) means[u] = GroupMeans{found[u][0], found[u][1]};
  held.store_wave(GradientStore<One, X, DY, W, B, DX, SILU>{constants, means, dx}, 0);
}

}  // namespace jaxnorm
#endif
