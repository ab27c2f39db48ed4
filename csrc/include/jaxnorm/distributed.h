// Norm (and quantisation) of the sum over ranks of partial rows, in one launch on each of RANKS devices (peers.h).
//
// One-shot: every rank pushes its partial rows to all others and works out every row itself: one exchange, RANKS - 1
// times the bytes. Two-shot: a row goes to its owner, who works it out and pushes the result to all: two exchanges.
// Data is pushed, never pulled, and into workspaces only. The sum runs over the ranks in ascending order, in float32,
// and a row is never split between blocks, so both ways and every grid give the same bits.
#pragma once
#include "jaxnorm/norms.h"
#include "jaxnorm/packed.h"
#include "jaxnorm/peers.h"
#include "jaxnorm/quant.h"

namespace jaxnorm {

// A rank's partial values: those of the others may have come packed.
template <class X, int V, bool PACKED> struct PartBits {
  using Type = Chunk<X, V>;
};
template <class X, int V> struct PartBits<X, V, true> {
  using Type = Incoming<V>;
};

// A buffer of this rank and the same rows in the workspaces of COPIES - 1 other ranks. One offset for all of them:
// their addresses are arguments of the launch and take no registers.
template <int COPIES> struct Places {
  char* own;
  Peers peers;
  u64 offset;
  // byte: of the buffer
  JN_DEV char* at(int d, u64 byte) const { return d == 0 ? own + byte : peers.base[d] + (offset + byte); }
};

// n = sum over ranks of their partial rows [+ residual], which is written as residual_out to COPIES places.
template <class X, class R, int V, int RANKS, int COPIES, bool PACKED> struct RankSource {
  struct Raw {
    typename PartBits<X, V, PACKED>::Type part[RANKS];
    u64 row;     // PACKED: its first element
    u32 column;  // ... and the chunk's place in it
    Chunk<R, V> r;
  };
  struct Kept {
    float f[V];
  };
  using XType = X;
  static constexpr bool BIASED = false;
  // Partial rows of this rank, and of rank p at others + p * slot. Two pointers instead of RANKS: registers are short.
  const char* own;
  const char* others;
  u64 slot;
  const char* residual;
  Places<COPIES> out;
  u32 rank;
  const char* tops;  // PACKED: of the row that is being worked out, those of rank p at tops + p * tops_slot
  u32 tops_slot;

  JN_DEV const char* part(int p) const { return u32(p) == rank ? own : others + p * slot; }

  JN_DEV Raw fetch(u64 start, u32 column, int offset) const {
    Raw raw;
    if constexpr (PACKED) raw.row = start - column, raw.column = column + offset;
#pragma unroll
    for (int p = 0; p < RANKS; ++p) {
      const char* at = part(p) + start * X::size + offset * X::size;
      if constexpr (!PACKED)
        raw.part[p] = load_chunk<X, V, true>(at);
      else if (u32(p) == rank)
        raw.part[p].load(at);
      else
        raw.part[p].load_packed(others + p * slot + raw.row * X::size, tops + p * tops_slot, raw.column);
    }
    if constexpr (R::size > 0) raw.r = load_chunk<R, V, true>(residual + start * R::size + offset * R::size);
    return raw;
  }
  JN_DEV Chunk<X, V> bits(const Raw& raw, int p) const {
    if constexpr (!PACKED)
      return raw.part[p];
    else if (u32(p) == rank)
      return raw.part[p].values();
    else
      return raw.part[p].unpacked(others + p * slot + raw.row * X::size, raw.column);
  }
  JN_DEV void values(const Raw& raw, float (&f)[V]) const {
    widen<X, V>(bits(raw, 0), f);
#pragma unroll
    for (int p = 1; p < RANKS; ++p) {
      float g[V];
      widen<X, V>(bits(raw, p), g);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] += g[i];
    }
    if constexpr (R::size > 0) {
      float g[V];
      widen<R, V>(raw.r, g);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] += g[i];
    }
  }
  JN_DEV void kept_values(const Kept& kept, float (&f)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] = kept.f[i];
  }
  JN_DEV Kept keep(const Raw&, const float (&f)[V]) const {
    Kept kept;
#pragma unroll
    for (int i = 0; i < V; ++i) kept.f[i] = f[i];
    return kept;
  }
  JN_DEV void settle(const float (&f)[V], u64 start, int offset) const {
    if constexpr (R::size > 0) {
      const Chunk<R, V> bits = narrow<R, V>(f);
#pragma unroll
      for (int d = 0; d < COPIES; ++d) store_bits(out.at(d, start * R::size + offset * R::size), bits);
    }
  }
  // Rows stay in registers; this is what Row names and never calls.
  template <int THREADS> struct Stashed {
    static constexpr int footprint = 0;
    static JN_DEV void fetch(const RankSource&, unsigned char*, u32, u64, int) {}
    static JN_DEV Raw read(const RankSource&, const unsigned char*, u32, u32, int) { return Raw{}; }
  };
};

// Codes and row-layout scales to COPIES places.
template <class S, class Q, int COPIES> struct SpreadCodes {
  static constexpr int V = S::V, BITS = Q::Code::bits, ROW_BYTES = S::N * BITS / 8;
  static constexpr int GROUPS = Q::GROUP ? S::N / (Q::GROUP ? Q::GROUP : 1) : 1;
  static constexpr int SCALE_BYTES = Q::POWER ? 1 : 4, SCALE_ROW = GROUPS * SCALE_BYTES;
  static constexpr u32 kBad = Q::POWER ? 0xffu : 0x7fc00000u;
  Places<COPIES> values, scale;

  JN_DEV void store_codes(u64 row, u32 lane, int k, bool has, const float (&q)[V]) const {
    if (!has) return;
    const Bits<V * BITS / 8> bits = encode<typename Q::Code, V>(q);
    const u64 at = row * ROW_BYTES + lane * (V * BITS / 8) + k * (S::STEP * BITS / 8);
#pragma unroll
    for (int d = 0; d < COPIES; ++d) store_bits(values.at(d, at), bits);
  }
  static JN_DEV void put(char* to, u32 bits) {
    if constexpr (Q::POWER)
      *(u8*)to = u8(bits);
    else
      *(u32*)to = bits;
  }
  JN_DEV void store_scale(u64 row, u32 j, u32 bits) const {
#pragma unroll
    for (int d = 0; d < COPIES; ++d) put(scale.at(d, row * SCALE_ROW + j * SCALE_BYTES), bits);
  }
  JN_DEV void finish_row(u64, u32) const {}
};

// y to COPIES places.
template <class S, class X, class W, int COPIES, bool OFFSET, bool BEFORE> struct SpreadRows {
  static constexpr int V = S::V, ROW_BYTES = S::N * X::size;
  const char* weight;
  float offset;
  Places<COPIES> y;

  JN_DEV void store(u64 row, u32 lane, int k, float (&f)[V]) const {
    if constexpr (BEFORE) widen<X, V>(narrow<X, V>(f), f);
    if constexpr (W::size > 0) {
      float w[V];
      widen<W, V>(load_chunk<W, V, false>(weight + lane * (V * W::size) + k * S::STEP * W::size), w);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] *= OFFSET ? w[i] + offset : w[i];
    }
    const Chunk<X, V> bits = narrow<X, V>(f);
    const u64 at = row * ROW_BYTES + (lane * V + k * S::STEP) * X::size;
#pragma unroll
    for (int d = 0; d < COPIES; ++d) store_bits(y.at(d, at), bits);
  }
  JN_DEV void finish(u64, u32) const {}
};

// ---- moving rows

// BYTES of a row, a multiple of 16, from memory to COPIES places; all threads of the block.
template <int BYTES, int THREADS, int COPIES> JN_DEV void copy_row(char* const (&to)[COPIES], const char* from) {
  static_assert(BYTES % 16 == 0, "whole pieces");
  for_pieces<BYTES / 16, THREADS, 8>(from, [&](u32 piece, const Bits<16>& bits) {
#pragma unroll
    for (int d = 0; d < COPIES; ++d) store_bits(to[d] + u64(piece) * 16, bits);
  });
}
template <int BYTES, int THREADS> JN_DEV void copy_row(char* to, const char* from) {
  char* const one[1] = {to};
  copy_row<BYTES, THREADS>(one, from);
}
template <int BYTES, int UNIT, int THREADS> JN_DEV void copy_scales(char* to, const char* from) {
  for (u32 at = thread_id() * UNIT; at < u32(BYTES); at += THREADS * UNIT) {
    if constexpr (UNIT == 4)
      *(u32*)(to + at) = *(const u32*)(from + at);
    else
      *(u8*)(to + at) = *(const u8*)(from + at);
  }
}

// ---- the call

// What a row of a result is, and how a row is worked out. QUANT: codes and scales, else y in the partials' dtype.
struct Buffers {
  const char* x;
  const char* residual;
  const char* weight;
  char* values;
  char* scale;
  char* residual_out;
};

template <class S, class Q, class X, class R, class W, bool QUANT, bool OFFSET, bool BEFORE, bool PACKED>
struct RankNorm {
  static constexpr int N = S::N, V = S::V, THREADS = S::THREADS;
  using Codes = SpreadCodes<S, Q, 1>;
  static constexpr int X_ROW = N * X::size, R_ROW = N * R::size, VALUE_ROW = QUANT ? Codes::ROW_BYTES : X_ROW;
  static constexpr int SCALE_ROW = QUANT ? Codes::SCALE_ROW : 0, SCALE_UNIT = Codes::SCALE_BYTES;
  // bytes of a packed row's tops, in whole pieces of 16
  static constexpr int TOPS_ROW = PACKED ? ceil_div(N, 16 * kPackGroup) * 16 : 0;
  template <int RANKS, int COPIES> using Source = RankSource<X, R, V, RANKS, COPIES, PACKED>;
  using Weights = Weighted<S, X, W, None, None, None, N, OFFSET, BEFORE, false>;
  template <class Src, int COPIES> using Work = QuantRow<S, Q, Src, RmsNorm<N>, Weights, SpreadCodes<S, Q, COPIES>>;
  static constexpr int sum_bytes = S::Sum::bytes;
  static constexpr int maxima_bytes = QUANT ? Work<Source<2, 1>, 1>::bytes : 0;
  static constexpr int exchange_bytes = sum_bytes + maxima_bytes, shared_bytes = 2 * exchange_bytes;

  RmsNorm<N> norm;
  const char* weight;
  float offset, bound;
  u32 turn = 0;  // which of two buffers the next row uses: one barrier a row is then enough

  // Row `row` of the source to the same row of COPIES results.
  template <int RANKS, int RESIDUALS, int COPIES>
  JN_DEV void row(const Source<RANKS, RESIDUALS>& source, const Places<COPIES>& values, const Places<COPIES>& scale,
                  u64 row) {
    using Src = Source<RANKS, RESIDUALS>;
    const u32 lane = thread_id();
    float* sums = (float*)(shared_memory() + turn * exchange_bytes);
    turn ^= 1u;
    Row<S, Src> one{source, nullptr, row, row * N + lane * V, lane, true};
    one.issue();
    if constexpr (QUANT) {
      const SpreadCodes<S, Q, COPIES> store{values, scale};
      const Weights weights{weight, nullptr, nullptr, nullptr, offset};
      Work<Src, COPIES>{one, norm, weights, store, sums + sum_bytes / 4}.run(sums, nullptr, bound, [] {});
    } else {
      const SpreadRows<S, X, W, COPIES, OFFSET, BEFORE> store{weight, offset, values};
      finish_row<S>(one, norm, store, sums);
    }
  }

  // What a reader cannot mistake for a result.
  JN_DEV void poison(const Buffers& b, u64 row, u64 residual_row, bool with_residual) const {
    if constexpr (QUANT) {
      for (u32 j = thread_id(); j < u32(Codes::GROUPS); j += THREADS)
        Codes::put(b.scale + row * SCALE_ROW + j * SCALE_UNIT, Codes::kBad);
    } else {
      fill(b.values + row * VALUE_ROW, VALUE_ROW);
    }
    if (R::size > 0 && with_residual) fill(b.residual_out + residual_row * R_ROW, R_ROW);
  }

 private:
  static JN_DEV void fill(char* to, int bytes) {  // NaN in every float format
    for (u32 at = thread_id() * 4; at < u32(bytes); at += THREADS * 4) *(u32*)(to + at) = 0xffffffffu;
  }
};

// Every rank works out all rows. residual is replicated, as is residual_out.
template <int RANKS, class Work>
JN_DEV bool one_shot(Meeting<RANKS>& meeting, Work& work, const Buffers& b, u64 half_bytes, u32 rows, u32 blocks) {
  constexpr int row_bytes = Work::X_ROW;
  const u32 rank = meeting.rank;
  const u64 slot = u64(rows) * row_bytes;
  for (u32 row = block_x(); row < rows; row += blocks) {
    char* to[RANKS - 1];
#pragma unroll
    for (int d = 1; d < RANKS; ++d) to[d - 1] = meeting.half(d, half_bytes) + rank * slot + u64(row) * row_bytes;
    copy_row<row_bytes, Work::THREADS>(to, b.x + u64(row) * row_bytes);
  }
  meeting.signal(0);
  if (!meeting.wait(0)) return false;
  typename Work::template Source<RANKS, 1> source;
  char* mine = meeting.half(0, half_bytes);
  source.own = b.x, source.others = mine, source.slot = slot, source.rank = rank;
  source.residual = b.residual, source.out.own = b.residual_out;
  const Places<1> values{b.values, meeting.peers, 0}, scale{b.scale, meeting.peers, 0};
  for (u32 row = block_x(); row < rows; row += blocks) work.row(source, values, scale, row);
  return true;
}

// Row i of every other rank's share goes to its owner. tops: (RANKS - 1) * TOPS_ROW bytes of shared memory, not those
// of the row before, so that one barrier a row is enough.
template <int RANKS, class Work>
JN_DEV void send_row(const Meeting<RANKS>& meeting, const char* x, u64 half_bytes, u32 rows, u32 share, u32 i,
                     u8* tops) {
  constexpr u32 x_row = Work::X_ROW, tops_row = Work::TOPS_ROW, pieces = max_of(1, tops_row / 16);
  static_assert((RANKS - 1) * pieces <= u32(Work::THREADS), "a thread for each piece of the tops");
  const u64 slot = u64(share) * x_row;
#pragma unroll
  for (int d = 1; d < RANKS; ++d) {
    const u32 row = meeting.at(d) * share + i;
    if (row >= rows) continue;
    char* to = meeting.half(d, half_bytes) + meeting.rank * slot + u64(i) * x_row;
    if constexpr (tops_row > 0)
      send_packed<Work::N, Work::THREADS>(to, tops + (d - 1) * tops_row, x + u64(row) * x_row);
    else
      copy_row<x_row, Work::THREADS>(to, x + u64(row) * x_row);
  }
  if constexpr (tops_row > 0) {
    barrier();
    const u32 t = thread_id();
#pragma unroll
    for (int d = 1; d < RANKS; ++d) {  // a few pieces: those of each rank by threads of their own
      const u32 piece = t - (d - 1) * pieces;
      if (t < (d - 1) * pieces || piece >= pieces || meeting.at(d) * share + i >= rows) continue;
      char* to = meeting.half(d, half_bytes) + RANKS * slot + (u64(meeting.rank) * share + i) * tops_row;
      store_bits(to + piece * 16, *(const Bits<16>*)(tops + t * 16));
    }
  }
}

// The rows of rank r are r * share .. ; it works them out. GATHER: everyone gets the results. REPLICATED: of the
// residual, too, which is then whole on every rank; else it is the rank's own rows.
template <int RANKS, bool GATHER, bool REPLICATED, class Work>
JN_DEV bool two_shot(Meeting<RANKS>& meeting, Work& work, const Buffers& b, u64 half_bytes, u32 rows, u32 share,
                     u32 blocks, u8* memory) {
  constexpr int x_row = Work::X_ROW, value_row = Work::VALUE_ROW, scale_row = Work::SCALE_ROW, r_row = Work::R_ROW;
  constexpr int copies = GATHER ? RANKS : 1, residual_copies = REPLICATED ? RANKS : 1;
  const u32 rank = meeting.rank, first = rank * share;
  const u64 slot = u64(share) * x_row, tops_at = RANKS * slot,
            values_at = tops_at + u64(RANKS) * share * Work::TOPS_ROW;
  const u64 scale_at = values_at + u64(RANKS) * share * value_row;
  const u64 residual_at = scale_at + (u64(RANKS) * share * scale_row + 15) / 16 * 16;
  for (u32 i = block_x(), n = 0; i < share; i += blocks, ++n)
    send_row<RANKS, Work>(meeting, b.x, half_bytes, rows, share, i, memory + n % 2 * (RANKS - 1) * Work::TOPS_ROW);
  meeting.signal(0);
  if (!meeting.wait(0)) return false;

  typename Work::template Source<RANKS, residual_copies> source;
  char* mine = meeting.half(0, half_bytes);
  source.own = b.x + u64(first) * x_row, source.others = mine, source.slot = slot, source.rank = rank;
  source.tops_slot = share * Work::TOPS_ROW;
  source.residual = b.residual + (REPLICATED ? u64(first) * r_row : 0);
  // Row 0 is this rank's first: of what everyone gets, row `first`.
  const u64 half = meeting.half_at(half_bytes), from = GATHER ? first : 0, residual_from = REPLICATED ? first : 0;
  const u64 value = from * value_row, scales = from * scale_row, residual = residual_from * r_row;
  const Places<copies> values{b.values + value, meeting.peers, half + values_at + value};
  const Places<copies> scale{b.scale + scales, meeting.peers, half + scale_at + scales};
  source.out = Places<residual_copies>{b.residual_out + residual, meeting.peers, half + residual_at + residual};
  const u32 own = first >= rows ? 0 : min_of(int(share), int(rows - first));
  for (u32 i = block_x(); i < own; i += blocks) {
    source.tops = mine + tops_at + u64(i) * Work::TOPS_ROW;
    work.row(source, values, scale, i);
  }
  if constexpr (!GATHER) return true;

  meeting.signal(1);
  if (!meeting.wait(1)) return false;
  for (u32 i = block_x(); i < share; i += blocks) {
#pragma unroll
    for (int d = 1; d < RANKS; ++d) {
      const u32 row = meeting.at(d) * share + i;
      if (row >= rows) continue;
      copy_row<value_row, Work::THREADS>(b.values + u64(row) * value_row, mine + values_at + u64(row) * value_row);
      if constexpr (scale_row > 0)
        copy_scales<scale_row, Work::SCALE_UNIT, Work::THREADS>(b.scale + u64(row) * scale_row,
                                                                mine + scale_at + u64(row) * scale_row);
      if constexpr (REPLICATED && r_row > 0)
        copy_row<r_row, Work::THREADS>(b.residual_out + u64(row) * r_row, mine + residual_at + u64(row) * r_row);
    }
  }
  return true;
}

// The rows whose results this block would have written.
template <int RANKS, bool ONE_SHOT, bool GATHER, bool REPLICATED, class Work>
JN_DEV void poison(const Work& work, const Buffers& b, u32 rank, u32 rows, u32 share, u32 blocks) {
  if constexpr (ONE_SHOT) {
    for (u32 row = block_x(); row < rows; row += blocks) work.poison(b, row, row, true);
  } else {
    const u32 first = rank * share;
    for (u32 i = block_x(); i < share; i += blocks) {
#pragma unroll 1
      for (u32 r = 0; r < u32(RANKS); ++r) {
        const u32 row = r * share + i;
        if (row >= rows || (!GATHER && r != rank)) continue;
        work.poison(b, GATHER ? row : row - first, REPLICATED ? row : i, REPLICATED || r == rank);
      }
    }
  }
}

}  // namespace jaxnorm
