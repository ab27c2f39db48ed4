// The rows of a backward pass on their way: what is read of a row, and where it waits while rows before it are worked
// on.
#pragma once
#include "jaxnorm/reduce.h"
#include "jaxnorm/vec.h"

namespace jaxnorm {

// TILES > 1: a row is too long for one block; block (b, tile) has columns of its tile only and reads the row's dot
// product, which another launch has computed.
template <int N_, int V_, int LANES_, int GROUPS_, int TILE_CHUNKS, bool TILED_> struct BackwardShape {
  static constexpr int N = N_, V = V_, LANES = LANES_, GROUPS = GROUPS_, THREADS = LANES * GROUPS;
  static constexpr bool TILED = TILED_;
  static constexpr int CHUNKS = N / V, TILE = TILE_CHUNKS;
  using Sum = RowSum<TILED ? TILE : CHUNKS, LANES>;
  static constexpr int PER = Sum::per;
  static_assert(N % V == 0 && (TILED || TILE == CHUNKS), "chunks");
  static_assert(Sum::in_wave || GROUPS == 1, "rows of several waves fill a block");

  static JN_DEV bool has(int k, u32 lane, u32 first_chunk) {
    if constexpr (TILED)
      return k * LANES + lane < u32(TILE) && first_chunk + k * LANES + lane < u32(CHUNKS);
    else
      return (k + 1) * LANES <= CHUNKS || k * LANES + lane < u32(CHUNKS);
  }
  static constexpr int STEP = LANES * V;
};

// Types of the buffers; None = absent. B: bias of x, W: weight, G: dy, R: dresidual_out.
template <class X_, class B_, class W_, class G_, class R_ = None, class DX_ = None, class DR_ = None>
struct BackwardTypes {
  using X = X_;
  using B = B_;
  using W = W_;
  using G = G_;
  using R = R_;
  using DX = DX_;
  using DR = DR_;
};

template <class Norm> struct BackwardPointers {
  const char *x, *bias, *weight, *g, *r;
  const float* stats[Norm::STATS];
  const float* dot;  // [rows, SUMS], read for tiles only
  char *dx, *dresidual;
  float* partials;
};

// What a row of the backward pass reads, DEPTH rows ahead.
template <class S, class Norm, class Types> struct RowInputs {
  static constexpr int V = S::V;
  using X = typename Types::X;
  using G = typename Types::G;
  using R = typename Types::R;
  const BackwardPointers<Norm>& p;
  int g_stride;
  u32 lane, thread;
  u32 first_chunk;

  JN_DEV u32 first_column() const { return (first_chunk + lane) * V; }  // the chunk of slot k is k * STEP further
  JN_DEV bool has(int k) const { return S::has(k, lane, first_chunk); }
  JN_DEV const char* x_at(u64 row, int k) const {
    return p.x + (row * S::N + first_column()) * X::size + k * S::STEP * X::size;
  }
  JN_DEV const char* g_at(u64 row, int k) const {
    return p.g + (row * g_stride + first_column()) * G::size + k * S::STEP * G::size;
  }
  JN_DEV const char* r_at(u64 row, int k) const {
    return p.r + (row * S::N + first_column()) * R::size + k * S::STEP * R::size;
  }
};

// Rows ahead wait in shared memory, copied there without passing through registers.
template <class S, class Norm, class Types, int DEPTH_> struct SharedPipe {
  static constexpr int V = S::V, DEPTH = DEPTH_, SLOTS = DEPTH + 1, T = S::THREADS;
  using In = RowInputs<S, Norm, Types>;
  using X = typename Types::X;
  using G = typename Types::G;
  using R = typename Types::R;
  using SX = Stash<X, V, T>;
  using SG = Stash<G, V, T>;
  using SR = Stash<R, V, T>;
  static constexpr int chunk_bytes = SX::footprint + SG::footprint + SR::footprint;
  static constexpr int scalars = S::PER * chunk_bytes;
  static constexpr int dots = scalars + Norm::STATS * 4 * T, dot_bytes = 4 * Norm::SUMS;
  static constexpr int slot_bytes = dots + (S::TILED ? dot_bytes * T : 0);
  static constexpr int bytes = SLOTS * slot_bytes;
  const In& in;
  unsigned char* memory;
  unsigned char* current;
  int next_slot, current_slot;

  JN_DEV SharedPipe(const In& inputs, unsigned char* base)
      : in(inputs), memory(base), current(base), next_slot(0), current_slot(0) {}
  JN_DEV void issue(u64 row, bool active) {
    unsigned char* slot = memory + next_slot * slot_bytes;
    next_slot = next_slot == SLOTS - 1 ? 0 : next_slot + 1;
    if (active) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k) {
        if (!in.has(k)) continue;
        unsigned char* at = slot + k * chunk_bytes;
        SX::fetch(at, in.thread, in.x_at(row, k));
        SG::fetch(at + SX::footprint, in.thread, in.g_at(row, k));
        if constexpr (R::size > 0) SR::fetch(at + SX::footprint + SG::footprint, in.thread, in.r_at(row, k));
      }
#pragma unroll
      for (int i = 0; i < Norm::STATS; ++i)
        async_copy<4>(slot + scalars + 4 * (i * T + in.thread), (const char*)(in.p.stats[i] + row));
      if constexpr (S::TILED)
        async_copy<dot_bytes>(slot + dots + dot_bytes * in.thread, (const char*)(in.p.dot + row * Norm::SUMS));
    }
    async_commit();
  }
  // Makes the oldest row the current one; the caller has issued DEPTH rows after it.
  JN_DEV void advance() {
    async_wait<DEPTH>();
    current = memory + current_slot * slot_bytes;
    current_slot = current_slot == SLOTS - 1 ? 0 : current_slot + 1;
  }
  JN_DEV Chunk<X, V> x(int k) const { return SX::read(current + k * chunk_bytes, in.thread); }
  JN_DEV Chunk<G, V> g(int k) const { return SG::read(current + k * chunk_bytes + SX::footprint, in.thread); }
  JN_DEV Chunk<R, V> r(int k) const {
    return SR::read(current + k * chunk_bytes + SX::footprint + SG::footprint, in.thread);
  }
  JN_DEV float stat(int i) const { return *(const float*)(current + scalars + 4 * (i * T + in.thread)); }
  JN_DEV float dot(int i) const { return ((const float*)(current + dots + dot_bytes * in.thread))[i]; }
};

// One row ahead in registers, where there is no asynchronous copy (AMD) or a chunk is a single 2-byte element.
template <class S, class Norm, class Types, int DEPTH_> struct RegisterPipe {
  static_assert(DEPTH_ == 1, "one row ahead");
  static constexpr int V = S::V, DEPTH = 1, bytes = 0;
  using In = RowInputs<S, Norm, Types>;
  using X = typename Types::X;
  using G = typename Types::G;
  using R = typename Types::R;
  struct Held {
    Chunk<X, V> x[S::PER];
    Chunk<G, V> g[S::PER];
    Chunk<R, V> r[S::PER];
    float stats[Norm::STATS], dots[Norm::SUMS];
  };
  const In& in;
  Held next, current;

  JN_DEV RegisterPipe(const In& inputs, unsigned char*) : in(inputs) {}
  // With DEPTH 1 the order is issue(0), then issue(1), advance -> 0: so the row issued before moves over here.
  JN_DEV void issue(u64 row, bool active) {
    current = next;
    if (!active) return;
#pragma unroll
    for (int k = 0; k < S::PER; ++k) {
      if (!in.has(k)) continue;
      next.x[k] = load_chunk<X, V, true>(in.x_at(row, k));
      next.g[k] = load_chunk<G, V, true>(in.g_at(row, k));
      if constexpr (R::size > 0) next.r[k] = load_chunk<R, V, true>(in.r_at(row, k));
    }
#pragma unroll
    for (int i = 0; i < Norm::STATS; ++i) next.stats[i] = in.p.stats[i][row];
    if constexpr (S::TILED) {
#pragma unroll
      for (int i = 0; i < Norm::SUMS; ++i) next.dots[i] = in.p.dot[row * Norm::SUMS + i];
    }
  }
  JN_DEV void advance() {}
  JN_DEV const Chunk<X, V>& x(int k) const { return current.x[k]; }
  JN_DEV const Chunk<G, V>& g(int k) const { return current.g[k]; }
  JN_DEV const Chunk<R, V>& r(int k) const { return current.r[k]; }
  JN_DEV float stat(int i) const { return current.stats[i]; }
  JN_DEV float dot(int i) const { return current.dots[i]; }
};

template <bool SHARED, class S, class Norm, class Types, int DEPTH>
using PipeOf = typename Select<SHARED, SharedPipe<S, Norm, Types, DEPTH>, RegisterPipe<S, Norm, Types, DEPTH>>::Type;

}  // namespace jaxnorm
