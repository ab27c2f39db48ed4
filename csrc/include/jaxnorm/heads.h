// Attention heads in registers: who owns what of a head, its norm, and where a finished head goes.
//
// A head of D elements is owned by LANES lanes of a wave. It is cut into items of two chunks of V elements each; item
// k * LANES + lane sits in slot k of a lane. The two chunks are chosen so that the partners of a rotation are in one
// lane: elements (j, j + R/2) in the neox style, so that the chunks lie R/2 apart; (2j, 2j + 1) in the gptj style,
// which one chunk holds. All accesses are aligned, and neighbouring lanes have neighbouring chunks.
//
// The life of a head:   load_head -> values -> HeadNorm::apply -> rotate (rope.h) -> round_head -> a sink
//
// A sink has one member function,
//     template <class S, class X> void put(u32 token, u32 head, u32 lane, bool active, const HeadBits<S, X>& bits)
//     const
// which is called by all lanes of a wave together, with active false for lanes whose group has no head: so it may use
// shuffles (an amax over the lanes of a head: lanes_max of scale.h over LANES), and must write nothing where active is
// false. It gets the result as rounded to X; S::column(item, side) is the first element of a chunk in the head, and
// widen<X, V> its float32 values. StoreHead below is the plain one.
#pragma once
#include "jaxnorm/reduce.h"
#include "jaxnorm/vec.h"

namespace jaxnorm {

template <int D_, int R_, int V_, int LANES_, bool GPTJ_> struct HeadShape {
  static constexpr int D = D_, R = R_, HALF = R / 2, V = V_, LANES = LANES_, ITEMS = D / (2 * V);
  static constexpr int PER = ceil_div(ITEMS, LANES);
  static constexpr bool GPTJ = GPTJ_;
  static constexpr bool SPLIT = GPTJ && V > 1;  // each chunk holds whole pairs
  static_assert(D % (2 * V) == 0 && R % 2 == 0 && R <= D, "items");
  static_assert(GPTJ ? V == 1 || R % V == 0 : HALF % V == 0, "chunks of pairs");
  static_assert(LANES <= kWave && next_power_of_2(LANES) == LANES, "lanes of a head");

  static JN_DEV u32 item(int k, u32 lane) { return k * LANES + lane; }
  static JN_DEV bool has(int k, u32 lane) { return (k + 1) * LANES <= ITEMS || item(k, lane) < u32(ITEMS); }
  // First element of a chunk of an item.
  static JN_DEV u32 column(u32 item, int side) {
    if constexpr (GPTJ) return V == 1 ? 2 * item + side : item * V + side * (D / 2);
    constexpr u32 pairs = HALF / V;
    if (R == D || item < pairs) return item * V + side * HALF;
    return R + (2 * (item - pairs) + side) * V;
  }
  static JN_DEV bool rotated(u32 item, int side) { return R == D || column(item, side) < u32(R); }
};

// The raw bits of a lane's share.
template <class S, class X> struct HeadBits {
  Chunk<X, S::V> c[S::PER][2];
};
template <class S> struct HeadValues {
  float f[S::PER][2][S::V];
};

template <class S, class X> JN_DEV HeadBits<S, X> load_head(const char* head, u32 lane, bool active) {
  HeadBits<S, X> bits;
#pragma unroll
  for (int k = 0; k < S::PER; ++k)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (active && S::has(k, lane))
        bits.c[k][side] = load_chunk<X, S::V, true>(head + S::column(S::item(k, lane), side) * X::size);
      else
        bits.c[k][side] = Chunk<X, S::V>{};
    }
  return bits;
}

template <class S, class X> JN_DEV HeadValues<S> values(const HeadBits<S, X>& bits) {
  HeadValues<S> v;
#pragma unroll
  for (int k = 0; k < S::PER; ++k)
#pragma unroll
    for (int side = 0; side < 2; ++side) widen<X, S::V>(bits.c[k][side], v.f[k][side]);
  return v;
}

template <class S, class X> JN_DEV HeadBits<S, X> round_head(const HeadValues<S>& v) {
  HeadBits<S, X> bits;
#pragma unroll
  for (int k = 0; k < S::PER; ++k)
#pragma unroll
    for (int side = 0; side < 2; ++side) bits.c[k][side] = narrow<X, S::V>(v.f[k][side]);
  return bits;
}

template <class S, class X> JN_DEV void store_head(char* head, u32 lane, bool active, const HeadBits<S, X>& bits) {
#pragma unroll
  for (int k = 0; k < S::PER; ++k)
#pragma unroll
    for (int side = 0; side < 2; ++side)
      if (active && S::has(k, lane)) store_bits(head + S::column(S::item(k, lane), side) * X::size, bits.c[k][side]);
}

// Sum of a * b over a head; all its lanes get it. The order depends on the shape alone, and lanes without an item hold
// zeros.
template <class S> JN_DEV float head_dot(const HeadValues<S>& a, const HeadValues<S>& b) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < S::PER; ++k)
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int i = 0; i < S::V; ++i) sum = fused_multiply_add(a.f[k][side][i], b.f[k][side][i], sum);
  return lanes_sum<S::LANES / 2>(sum);
}
template <class S> JN_DEV float head_rstd(const HeadValues<S>& x, float eps) {
  return reciprocal_sqrt(fused_multiply_add(head_dot<S>(x, x), 1.f / float(S::D), eps));
}

// w' = weight + offset of a lane's columns, in registers for all the heads it works on. W = None: 1.
template <class S, class W, bool OFFSET> struct HeadWeight {
  HeadBits<S, W> bits;
  float offset;

  JN_DEV void issue(const char* weight, u32 lane) {
    if constexpr (W::size > 0) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          if (S::has(k, lane))
            bits.c[k][side] = load_chunk<W, S::V, false>(weight + S::column(S::item(k, lane), side) * W::size);
          else
            bits.c[k][side] = Chunk<W, S::V>{};
        }
    }
  }
  JN_DEV void scale(HeadValues<S>& v) const {
    if constexpr (W::size > 0) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          float w[S::V];
          widen<W, S::V, true>(bits.c[k][side], w);
#pragma unroll
          for (int i = 0; i < S::V; ++i) v.f[k][side][i] *= OFFSET ? w[i] + offset : w[i];
        }
    }
  }
};

// v = round to X of (v * rstd) * w', as float32
template <class S, class X, class W, bool OFFSET> struct HeadNorm {
  static constexpr bool norms = true;
  const char* weight;
  float eps;
  HeadWeight<S, W, OFFSET> held;

  JN_DEV void issue(u32 lane) { held.issue(weight, lane); }
  JN_DEV void apply(HeadValues<S>& v) const {
    const float rstd = head_rstd<S>(v, eps);
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int i = 0; i < S::V; ++i) v.f[k][side][i] *= rstd;
    held.scale(v);
    v = values<S, X>(round_head<S, X>(v));
  }
};
struct NoNorm {
  static constexpr bool norms = false;
  JN_DEV void issue(u32) {}
};

// Tokens in and out: the same, or those of one of several streams that are joined, batch by batch.
struct PlainTokens {
  JN_DEV u32 out(u32 token) const { return token; }
  JN_DEV u32 row(u32 token) const { return token; }
};
struct JoinedTokens {
  u32 mine, all, first;  // tokens of the stream and of the joined one, where the stream starts in it
  JN_DEV u32 out(u32 token) const { return token / mine * all + first + token % mine; }
  JN_DEV u32 row(u32 token) const { return token % mine; }
};

// out [tokens, HEADS, D]
template <int HEADS, class Tokens> struct StoreHead {
  char* out;
  Tokens tokens;
  template <class S, class X>
  JN_DEV void put(u32 token, u32 head, u32 lane, bool active, const HeadBits<S, X>& bits) const {
    store_head<S, X>(out + (u64(tokens.out(token)) * HEADS + head) * (S::D * X::size), lane, active, bits);
  }
};

// How the heads of [tokens, HEADS, D] are dealt out: a group of LANES lanes takes UNROLL heads of one token, SHARE
// groups a token, so that a row of cos and sin is fetched once for several heads.
template <class S, int HEADS_, int UNROLL_, int THREADS_> struct HeadDeal {
  static constexpr int HEADS = HEADS_, UNROLL = UNROLL_, THREADS = THREADS_, GROUPS = THREADS / S::LANES;
  static constexpr int SHARE = ceil_div(HEADS, UNROLL);
  static JN_DEV u32 units(u32 tokens) { return tokens * SHARE; }
  static JN_DEV u32 blocks(u32 tokens) { return (units(tokens) + GROUPS - 1) / GROUPS; }
  static JN_DEV u32 token(u32 unit) { return unit / SHARE; }
  static JN_DEV u32 head(u32 unit, int u) { return unit % SHARE + u * SHARE; }
  static JN_DEV bool has(u32 unit, int u) { return (u + 1) * SHARE <= HEADS || head(unit, u) < u32(HEADS); }
  static JN_DEV bool live(u32 unit, u32 tokens) { return unit < units(tokens); }
};

// The same with neighbouring tokens in neighbouring groups, GROUPS of them a block, for sinks where the same head of
// neighbouring tokens lies side by side.
template <class S, int HEADS_, int UNROLL_, int THREADS_> struct TokenDeal : HeadDeal<S, HEADS_, UNROLL_, THREADS_> {
  using Base = HeadDeal<S, HEADS_, UNROLL_, THREADS_>;
  using Base::GROUPS, Base::HEADS, Base::SHARE;
  static JN_DEV u32 blocks(u32 tokens) { return (tokens + GROUPS - 1) / GROUPS * SHARE; }
  static JN_DEV u32 token(u32 unit) { return unit / (GROUPS * SHARE) * GROUPS + unit % GROUPS; }
  static JN_DEV u32 head(u32 unit, int u) { return unit / GROUPS % SHARE + u * SHARE; }
  static JN_DEV bool has(u32 unit, int u) { return (u + 1) * SHARE <= HEADS || head(unit, u) < u32(HEADS); }
  static JN_DEV bool live(u32 unit, u32 tokens) { return token(unit) < tokens; }
};

}  // namespace jaxnorm
