// What stands on both sides of the quantising epilogue (quant.h): the values that are quantised, and where codes and
// scales go.
#pragma once
#include "jaxnorm/rows.h"
#include "jaxnorm/scale.h"

namespace jaxnorm {

// ---- where scales and codes go

template <class S, class Q, int P_> struct QuantStore {
  static constexpr int V = S::V, P = P_, BITS = Q::Code::bits, ROW_BYTES = P * BITS / 8;
  static constexpr int GROUPS = Q::GROUP ? P / (Q::GROUP ? Q::GROUP : 1) : 1, WIDTH = ceil_div(GROUPS, 8) * 8;
  char* values;
  char* scale;
  u64 rows, scale_rows;

  JN_DEV void store_codes(u64 row, u32 lane, int k, bool has, const float (&q)[V]) const {
    char* to = values + row * ROW_BYTES + k * (S::STEP * BITS / 8);
    if constexpr (BITS == 4 && V == 1) {  // the neighbour's code shares the byte
      const float other = shfl_xor<1>(has ? q[0] : 0.f);
      if (has && lane % 2 == 0) store_bits(to + lane / 2, Bits<1>{u8(two_fp4(q[0], other))});
    } else {
      if (has) store_bits(to + lane * (V * BITS / 8), encode<typename Q::Code, V>(q));
    }
  }

  JN_DEV static u64 shuffled(u64 m, u32 j) {
    return m / 32 * (WIDTH * 32) + j / 8 * 256 + j % 4 * 64 + m % 16 * 4 + j % 8 / 4 * 2 + m % 32 / 16;
  }
  JN_DEV void store_scale(u64 row, u32 j, u32 bits) const {
    const u64 at = Q::LAYOUT == Layout::kRow      ? row * GROUPS + j
                   : Q::LAYOUT == Layout::kColumn ? j * rows + row
                                                  : shuffled(row, j);
    if constexpr (Q::POWER)
      ((u8*)scale)[at] = u8(bits);
    else
      ((u32*)scale)[at] = bits;
  }

  // Columns N .. P - 1 are zeros; a group of nothing else has scale 1.
  JN_DEV void finish_row(u64 row, u32 lane) const {
    if constexpr (P > S::N) {
      char* to = values + row * ROW_BYTES;
      if constexpr (BITS == 4 && V == 1) {
        for (u32 i = (S::N + 1) / 2 + lane; i < u32(P / 2); i += S::LANES) to[i] = 0;
      } else {
#pragma unroll 1
        for (u32 column = S::N + lane * V; column < u32(P); column += S::STEP)
          store_bits(to + column * BITS / 8, zero_bits<V * BITS / 8>());
      }
    }
    if constexpr (!Q::STATIC && Q::GROUP > 0) {
      constexpr int filled = ceil_div(S::N, Q::GROUP ? Q::GROUP : 1);
      if constexpr (filled < GROUPS)
        for (u32 j = filled + lane; j < u32(GROUPS); j += S::LANES) store_scale(row, j, Scale<Q>::one);
      if constexpr (Q::LAYOUT == Layout::kShuffled && GROUPS < WIDTH)
        for (u32 j = GROUPS + lane; j < u32(WIDTH); j += S::LANES) store_scale(row, j, 0x7f);
    }
  }

  // Shuffled scales: rows from `rows` up hold 0x7f. All threads of the launch share the work, 16 bytes at a time:
  // column j or j + 4 of four rows and of those 16 below. MOST: blocks that walk over the rows, 0 = one for each turn.
  template <int MOST = 0> JN_DEV void pad_rows() const {
    if constexpr (Q::LAYOUT == Layout::kShuffled && !Q::STATIC) {
      constexpr u32 units = WIDTH * 2;  // of a block of 32 rows
      const u64 turns = (rows + S::GROUPS * S::UNROLL - 1) / (S::GROUPS * S::UNROLL);
      const u64 blocks = MOST > 0 && turns > u64(MOST) ? u64(MOST) : turns;
      const u64 first = rows / 32 * units, end = scale_rows / 32 * units;
      if (linear_block() >= blocks) return;
      for (u64 i = first + linear_block() * S::THREADS + thread_id(); i < end; i += blocks * S::THREADS) {
        const u64 row = i / units * 32 + i % 4 * 4;
        u8* to = (u8*)scale + i * 16;
        if (row >= rows) {
          const u32 pad = 0x7f7f7f7fu;
          store_bits((char*)to, Bits<16>{{pad, pad, pad, pad}});
        } else {
#pragma unroll 1
          for (u32 byte = 0; byte < 16; ++byte)
            if (row + byte / 4 + byte % 2 * 16 >= rows) to[byte] = 0x7f;
        }
      }
    }
  }
};

// ---- from n to z

// z = y * smooth, y = normalised * (weight + offset) + bias as in WeightedStore; y is kept too if Y is a type.
template <class S, class X, class W, class B, class M, class Y, int P, bool OFFSET, bool BEFORE, bool EARLY>
struct Weighted {
  static constexpr int V = S::V;
  // z is the normalised n times something, and nothing else is made of it
  static constexpr bool multiplies = !BEFORE && B::size == 0 && Y::size == 0;
  const char* weight;
  const char* bias;
  const char* smooth;
  char* y;
  float offset;
  Chunk<W, V> early_weight[EARLY ? S::REGS : 1];
  Chunk<B, V> early_bias[EARLY ? S::REGS : 1];
  Chunk<M, V> early_smooth[EARLY ? S::REGS : 1];

  template <class T> static JN_DEV Chunk<T, V> fetch(const char* from, int k, u32 lane) {
    return load_chunk<T, V, false>(from + lane * (V * T::size) + k * S::STEP * T::size);
  }
  JN_DEV void issue(u32 lane) {
    if constexpr (EARLY) {
#pragma unroll
      for (int k = 0; k < S::REGS; ++k) {
        early_weight[k] = Chunk<W, V>{};
        early_bias[k] = Chunk<B, V>{};
        early_smooth[k] = Chunk<M, V>{};
        if (!S::has(k, lane)) continue;
        if constexpr (W::size > 0) early_weight[k] = fetch<W>(weight, k, lane);
        if constexpr (B::size > 0) early_bias[k] = fetch<B>(bias, k, lane);
        if constexpr (M::size > 0) early_smooth[k] = fetch<M>(smooth, k, lane);
      }
    }
  }
  template <class T, bool HELD>
  static JN_DEV void values(const Chunk<T, V> (&held)[EARLY ? S::REGS : 1], const char* from, int k, u32 lane, bool has,
                            float (&f)[V]) {
    if constexpr (T::size > 0) {
      Chunk<T, V> bits{};
      if constexpr (HELD)
        bits = held[k];
      else if (has)
        bits = fetch<T>(from, k, lane);
      widen<T, V>(bits, f);
    }
  }
  // REGISTER: k is a register slot, known to the compiler. FINAL: the last time that this chunk comes by.
  template <bool REGISTER, bool FINAL> JN_DEV void z(u64 row, u32 lane, int k, bool has, float (&f)[V]) const {
    constexpr bool early = EARLY && REGISTER;
    if constexpr (BEFORE) widen<X, V>(narrow<X, V>(f), f);
    float w[V], b[V];
    values<W, early>(early_weight, weight, k, lane, has, w);
    values<B, early>(early_bias, bias, k, lane, has, b);
    affine<W::size != 0, B::size != 0, OFFSET>(f, w, offset, b);
    if constexpr (FINAL && Y::size > 0) {
      if (has) store_bits(y + (row * P + lane * V) * Y::size + k * S::STEP * Y::size, narrow<Y, V>(f));
    }
    if constexpr (M::size > 0) {
      float m[V];
      values<M, early>(early_smooth, smooth, k, lane, has, m);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] *= m[i];
    }
  }
  JN_DEV void finish_row(u64 row, u32 lane) const {
    if constexpr (Y::size > 0 && P > S::N) {
#pragma unroll 1
      for (u32 column = S::N + lane * V; column < u32(P); column += S::STEP)
        store_bits(y + (row * P + column) * Y::size, zero_bits<Y::size * V>());
    }
  }
};

// Quantisation alone: y = x.
template <class S> struct NoNorm {
  static constexpr int BUFFERS = 1;
  static constexpr bool SCALES = false, PIVOT = false;
  struct State {};
  template <class R> JN_DEV State statistics(R& row, float*) const {
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      float f[S::V];
      row.source.values(row.raw[k], f);
      row.kept[k] = row.source.keep(row.raw[k], f);
    }
    if constexpr (S::SHARED > 0) async_wait<0>();
    return State{};
  }
  static JN_DEV float apply(const State&, float n) { return n; }
};

}  // namespace jaxnorm
