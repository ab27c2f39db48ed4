// Backward of the norm and rotation of heads: the cotangent is turned back, then the norm's backward in each head.
//
// A persistent grid, as in rows_bwd.h: a block takes the same units every time and adds the weight gradient of its
// columns in registers; a second launch adds the blocks' partial sums in a fixed order. Nothing but the inputs of the
// forward pass is saved: the sum of squares of a head costs one more sum beside the one that is needed anyway.
#pragma once
#include "jaxnorm/rope.h"

namespace jaxnorm {

struct HeadGradient {
  const char *x, *dy, *weight;
  char* dx;
  float* partials;  // [blocks, D]
};

// What a group works on at a time: UNROLL heads of a token.
template <class S, class Deal, class X, class Source, class Tokens> struct BackwardUnit {
  u32 unit, token;
  bool active;
  typename Source::Where where;
  HeadBits<S, X> x[Deal::UNROLL], dy[Deal::UNROLL];

  JN_DEV bool has(int u) const { return active && Deal::has(unit, u); }
  JN_DEV u64 at(u32 row, int u) const { return (u64(row) * Deal::HEADS + Deal::head(unit, u)) * (S::D * X::size); }
  JN_DEV void issue(const HeadGradient& p, const Source& source, const Tokens& tokens, u32 index, u32 units, u32 lane) {
    unit = index, token = Deal::token(index), active = index < units;
    where = source.issue(token, active);
    const u32 out = active ? tokens.out(token) : 0;
#pragma unroll
    for (int u = 0; u < Deal::UNROLL; ++u) {
      x[u] = load_head<S, X>(p.x + at(token, u), lane, has(u));
      dy[u] = load_head<S, X>(p.dy + at(out, u), lane, has(u));
    }
  }
};

// Adds the groups' sums by halving; the sum ends in group 0. `memory` holds GROUPS / 2 * D floats.
template <class S, class Deal> JN_DEV void add_head_groups(HeadValues<S>& dw, float* memory, u32 group, u32 lane) {
  constexpr int each = S::PER * 2 * S::V;
  static_assert(next_power_of_2(Deal::GROUPS) == Deal::GROUPS, "groups");
#pragma unroll
  for (int half = Deal::GROUPS / 2; half >= 1; half /= 2) {
    float* at = memory + (group % half * S::LANES + lane) * each;
    barrier();
    if (group >= u32(half) && group < u32(2 * half)) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
          for (int i = 0; i < S::V; ++i) at[(k * 2 + side) * S::V + i] = dw.f[k][side][i];
    }
    barrier();
    if (group < u32(half)) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
          for (int i = 0; i < S::V; ++i) dw.f[k][side][i] += at[(k * 2 + side) * S::V + i];
    }
  }
}

// g = turned back dy; xh = x * rstd; gw = g * w'; dx = rstd * (gw - xh * mean(gw * xh)); dw = sum of g * xh.
// AHEAD: the loads of the next unit run while this one is worked on.
template <class S, class Deal, class X, class W, bool OFFSET, bool AHEAD, class Source, class Tokens>
JN_DEV void backward_heads(const HeadGradient& p, u32 tokens, u32 block, u32 blocks, float eps, float offset,
                           const Source& source, const Tokens& joined) {
  const u32 thread = thread_id(), lane = thread % S::LANES, group = thread / S::LANES;
  const u32 units = Deal::units(tokens), stride = blocks * Deal::GROUPS;
  using Unit = BackwardUnit<S, Deal, X, Source, Tokens>;
  HeadWeight<S, W, OFFSET> weight{{}, offset};
  HeadValues<S> dw{};

  Unit now;
  if constexpr (AHEAD) now.issue(p, source, joined, block * Deal::GROUPS + group, units, lane);
  weight.issue(p.weight, lane);
  for (u32 start = block * Deal::GROUPS; start < units; start += stride) {  // as many turns for the whole block
    Unit next;
    if constexpr (AHEAD)
      next.issue(p, source, joined, start + stride + group, units, lane);
    else
      now.issue(p, source, joined, start + group, units, lane);
    Angles<S> angles;
    source.fetch(now.where, lane, angles);
#pragma unroll
    for (int u = 0; u < Deal::UNROLL; ++u) {
      HeadValues<S> x = values<S, X>(now.x[u]), g = values<S, X>(now.dy[u]);
      rotate<S, true>(angles, g);
      HeadValues<S> gw = g;
      weight.scale(gw);
      const float rstd = head_rstd<S>(x, eps), mean = head_dot<S>(gw, x) * rstd * (1.f / float(S::D));
      const bool has = now.has(u);
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
          for (int i = 0; i < S::V; ++i) {
            const float xh = x.f[k][side][i] * rstd, g1 = g.f[k][side][i];
            if constexpr (W::size > 0)
              dw.f[k][side][i] = has ? fused_multiply_add(g1, xh, dw.f[k][side][i]) : dw.f[k][side][i];
            x.f[k][side][i] = rstd * fused_multiply_add(-xh, mean, gw.f[k][side][i]);
          }
      store_head<S, X>(p.dx + now.at(now.token, u), lane, has, round_head<S, X>(x));
    }
    if constexpr (AHEAD) now = next;
  }

  if constexpr (W::size > 0) {
    add_head_groups<S, Deal>(dw, (float*)shared_memory(), group, lane);
    if (group == 0) store_head<S, F32>((char*)(p.partials + u64(block) * S::D), lane, true, round_head<S, F32>(dw));
  }
}

}  // namespace jaxnorm
