// Rotary embedding of heads in registers: the angles of a token from a table of [cos | sin] rows, and the rotation.
#pragma once
#include "jaxnorm/heads.h"

namespace jaxnorm {

typedef int I32;
typedef long long I64;

// cos and sin of the pairs of a lane's items: V a slot. In the split (gptj) layout the first V/2 belong to the first
// chunk.
template <class S> struct Angles {
  float cos[S::PER][S::V], sin[S::PER][S::V];

  JN_DEV void drop() {
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int i = 0; i < S::V; ++i) cos[k][i] = 1.f, sin[k][i] = 0.f;
  }
};

// The table of a call: rows of R elements of type T. Row numbers outside [0, rows) drop the rotation.
template <class T> struct Table {
  const char* data;
  u32 rows;

  JN_DEV bool inside(long long row) const { return row >= 0 && row < (long long)rows; }

  // cos and sin of COUNT pairs from `pair` on
  template <int R, int COUNT> JN_DEV void read(u64 row, u32 pair, float (&c)[COUNT], float (&s)[COUNT]) const {
    const char* at = data + (row * R + pair) * T::size;
    const auto cos = load_chunk<T, COUNT, false>(at), sin = load_chunk<T, COUNT, false>(at + R / 2 * T::size);
    widen<T, COUNT>(cos, c);
    widen<T, COUNT>(sin, s);
  }
  // A piece (below) of a lane's angles
  template <class S> JN_DEV void fill(u64 row, u32 pair, int k, int first, Angles<S>& a) const {
    constexpr int count = S::SPLIT ? S::V / 2 : S::V;
    float c[count], s[count];
    read<S::R>(row, pair, c, s);
#pragma unroll
    for (int i = 0; i < count; ++i) a.cos[k][first + i] = c[i], a.sin[k][first + i] = s[i];
  }
};

// Visits the pieces of a lane's angles: use(slot, index of the piece's first angle in the slot, its first pair), with
// pieces of S::SPLIT ? V / 2 : V pairs. Items that are not rotated are left out.
template <class S> struct Pieces {
  static constexpr int COUNT = S::SPLIT ? S::V / 2 : S::V;
  template <class Use> static JN_DEV void each(u32 lane, Use use) {
#pragma unroll
    for (int k = 0; k < S::PER; ++k) {
      if (!S::has(k, lane)) continue;
      const u32 item = S::item(k, lane);
      if constexpr (S::SPLIT) {
#pragma unroll
        for (int side = 0; side < 2; ++side)
          if (S::rotated(item, side)) use(k, side * COUNT, S::column(item, side) / 2);
      } else {
        if (S::rotated(item, 0)) use(k, 0, item * S::V);
      }
    }
  }
};

// One position a token. P: I32 or I64. PERIOD: the `count` positions of one sequence serve all, token % count.
template <class S, class T, class P, bool PERIOD> struct RopeAngles {
  Table<T> table;
  const P* positions;
  u32 count;
  struct Where {
    P p;
  };

  JN_DEV Where issue(u32 token, bool active) const {
    return Where{active ? positions[PERIOD ? token % count : token] : P(-1)};
  }
  JN_DEV void fetch(const Where& w, u32 lane, Angles<S>& a) const {
    a.drop();
    if (!table.inside(w.p)) return;
    Pieces<S>::each(lane, [&](int k, int first, u32 pair) { table.template fill<S>(u64(w.p), pair, k, first, a); });
  }
};

// Three positions a token (positions [3, count]), each for its pairs: S0, S1 and the rest one behind the other, or
// interleaved: pair j by component j % 3 while j < 3 * S1 (S2), else by component 0.
template <class S, class T, class P, bool PERIOD, int S0, int S1, int S2, bool INTERLEAVED> struct MropeAngles {
  Table<T> table;
  const P* positions;
  u32 count;
  struct Where {
    P p[3];
    JN_DEV P of(int component) const { return component == 0 ? p[0] : component == 1 ? p[1] : p[2]; }
  };

  static JN_DEV int component(u32 j) {
    if constexpr (INTERLEAVED) {
      const u32 r = j % 3;
      return r == 1 && j < 3 * S1 ? 1 : r == 2 && j < 3 * S2 ? 2 : 0;
    } else {
      return j < u32(S0) ? 0 : j < u32(S0 + S1) ? 1 : 2;
    }
  }
  JN_DEV Where issue(u32 token, bool active) const {
    Where w;
#pragma unroll
    for (int c = 0; c < 3; ++c) w.p[c] = active ? positions[u64(c) * count + (PERIOD ? token % count : token)] : P(-1);
    return w;
  }
  JN_DEV void fetch(const Where& w, u32 lane, Angles<S>& a) const {
    a.drop();
    constexpr int size = Pieces<S>::COUNT;
    Pieces<S>::each(lane, [&](int k, int first, u32 pair) {
      if (!INTERLEAVED && component(pair) == component(pair + size - 1)) {
        const P p = w.of(component(pair));
        if (table.inside(p)) table.template fill<S>(u64(p), pair, k, first, a);
        return;
      }
      // Pair by pair, all loads at once: a position outside of the table reads row 0 and does not use it.
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const P p = w.of(component(pair + i));
        const bool inside = table.inside(p);
        float c[1], s[1];
        table.template read<S::R>(inside ? u64(p) : 0, pair + i, c, s);
        a.cos[k][first + i] = inside ? c[0] : 1.f;
        a.sin[k][first + i] = inside ? s[0] : 0.f;
      }
    });
  }
};

// The row of the table is the token's number in its stream.
template <class S, class T, class Tokens> struct StreamAngles {
  Table<T> table;
  Tokens tokens;
  struct Where {
    u32 row;
  };
  JN_DEV Where issue(u32 token, bool active) const { return Where{active ? tokens.row(token) : ~0u}; }
  JN_DEV void fetch(const Where& w, u32 lane, Angles<S>& a) const {
    const RopeAngles<S, T, long long, false> one{table, nullptr, 0};
    one.fetch({(long long)w.row}, lane, a);
  }
};

// Turns a pair by (c, s); INVERSE: back.
template <bool INVERSE> JN_DEV void turn(float& first, float& second, float c, float s) {
  if constexpr (INVERSE) s = -s;
  const float a = first, b = second;
  first = fused_multiply_add(a, c, -(b * s));
  second = fused_multiply_add(b, c, a * s);
}

template <class S, bool INVERSE> JN_DEV void rotate(const Angles<S>& a, HeadValues<S>& v) {
#pragma unroll
  for (int k = 0; k < S::PER; ++k) {
    if constexpr (S::SPLIT) {
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int i = 0; i < S::V / 2; ++i)
          turn<INVERSE>(v.f[k][side][2 * i], v.f[k][side][2 * i + 1], a.cos[k][side * (S::V / 2) + i],
                        a.sin[k][side * (S::V / 2) + i]);
    } else {
#pragma unroll
      for (int i = 0; i < S::V; ++i) turn<INVERSE>(v.f[k][0][i], v.f[k][1][i], a.cos[k][i], a.sin[k][i]);
    }
  }
}

// What is not rotated keeps its bits.
template <class S, class X> JN_DEV void keep_rest(HeadBits<S, X>& out, const HeadBits<S, X>& in, u32 lane) {
  if constexpr (S::R < S::D) {
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (!S::rotated(S::item(k, lane), side)) out.c[k][side] = in.c[k][side];
  }
}

// One block's heads of x [tokens, HEADS, D], or of rows of `stride` bytes that hold more: [norm,] rotation, sink. All
// loads of a group are asked for before the first is used.
template <class S, class Deal, class X, bool INVERSE, class Norm, class Source, class Sink>
JN_DEV void forward_heads(const char* x, u32 tokens, u32 block, Norm norm, const Source& source, const Sink& sink,
                          u64 stride = u64(Deal::HEADS) * (S::D * X::size)) {
  const u32 thread = thread_id(), lane = thread % S::LANES;
  const u32 unit = block * Deal::GROUPS + thread / S::LANES, token = Deal::token(unit);
  const bool active = Deal::live(unit, tokens);
  const auto where = source.issue(token, active);
  HeadBits<S, X> bits[Deal::UNROLL];
#pragma unroll
  for (int u = 0; u < Deal::UNROLL; ++u) {
    const char* head = x + token * stride + Deal::head(unit, u) * (S::D * X::size);
    bits[u] = load_head<S, X>(head, lane, active && Deal::has(unit, u));
  }
  norm.issue(lane);
  Angles<S> angles;
  source.fetch(where, lane, angles);
#pragma unroll
  for (int u = 0; u < Deal::UNROLL; ++u) {
    HeadValues<S> v = values<S, X>(bits[u]);
    if constexpr (Norm::norms) norm.apply(v);
    HeadBits<S, X> rest;
    if constexpr (Norm::norms)
      rest = round_head<S, X>(v);
    else
      rest = bits[u];
    rotate<S, INVERSE>(angles, v);
    HeadBits<S, X> out = round_head<S, X>(v);
    keep_rest<S, X>(out, rest, lane);
    sink.template put<S, X>(token, Deal::head(unit, u), lane, active && Deal::has(unit, u), out);
  }
}

}  // namespace jaxnorm
