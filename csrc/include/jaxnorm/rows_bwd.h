// Row-wise backward kernels: one pass over the rows that writes dx and adds up the weight gradient.
//
// A persistent grid: block b of P takes rows b, b + P, ... (times GROUPS), always the same ones, so the sums are the
// same every time. A thread owns the same columns in all its rows and adds their weight gradient in registers; a block
// leaves one row of partial sums in float32, and a second launch adds the P rows up. While a row is worked on, the
// loads of the next DEPTH rows run.
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

// What a row of the backward pass reads, DEPTH rows ahead.
template <class S, class X, class G, class R> struct RowInputs {
  static constexpr int V = S::V;
  const char* x;
  const char* g;  // row stride `g_stride`
  const char* r;  // cotangent of residual_out, or absent
  const float* rstd;
  const float* dot;  // read for tiles only
  int g_stride;
  u32 lane, thread;
  u32 first_chunk;

  JN_DEV u32 first_column() const { return (first_chunk + lane) * V; }  // the chunk of slot k is k * STEP further
  JN_DEV bool has(int k) const { return S::has(k, lane, first_chunk); }
  JN_DEV const char* x_at(u64 row, int k) const {
    return x + (row * S::N + first_column()) * X::size + k * S::STEP * X::size;
  }
  JN_DEV const char* g_at(u64 row, int k) const {
    return g + (row * g_stride + first_column()) * G::size + k * S::STEP * G::size;
  }
  JN_DEV const char* r_at(u64 row, int k) const {
    return r + (row * S::N + first_column()) * R::size + k * S::STEP * R::size;
  }
};

// Rows ahead wait in shared memory, copied there without passing through registers.
template <class S, class X, class G, class R, int DEPTH_> struct SharedPipe {
  static constexpr int V = S::V, DEPTH = DEPTH_, SLOTS = DEPTH + 1, T = S::THREADS;
  using SX = Stash<X, V, T>;
  using SG = Stash<G, V, T>;
  using SR = Stash<R, V, T>;
  static constexpr int chunk_bytes = SX::footprint + SG::footprint + SR::footprint;
  static constexpr int scalars = S::PER * chunk_bytes;
  static constexpr int slot_bytes = scalars + (S::TILED ? 8 : 4) * T;
  static constexpr int bytes = SLOTS * slot_bytes;
  const RowInputs<S, X, G, R>& in;
  unsigned char* memory;
  unsigned char* current;
  int next_slot, current_slot;

  JN_DEV SharedPipe(const RowInputs<S, X, G, R>& inputs, unsigned char* base)
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
      async_copy<4>(slot + scalars + 4 * in.thread, (const char*)(in.rstd + row));
      if constexpr (S::TILED) async_copy<4>(slot + scalars + 4 * (T + in.thread), (const char*)(in.dot + row));
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
  JN_DEV float rstd() const { return *(const float*)(current + scalars + 4 * in.thread); }
  JN_DEV float dot() const { return *(const float*)(current + scalars + 4 * (T + in.thread)); }
};

// One row ahead in registers, where there is no asynchronous copy (AMD) or a chunk is a single 2-byte element.
template <class S, class X, class G, class R, int DEPTH_> struct RegisterPipe {
  static_assert(DEPTH_ == 1, "one row ahead");
  static constexpr int V = S::V, DEPTH = 1, bytes = 0;
  struct Held {
    Chunk<X, V> x[S::PER];
    Chunk<G, V> g[S::PER];
    Chunk<R, V> r[S::PER];
    float rstd, dot;
  };
  const RowInputs<S, X, G, R>& in;
  Held next, current;

  JN_DEV RegisterPipe(const RowInputs<S, X, G, R>& inputs, unsigned char*) : in(inputs) {}
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
    next.rstd = in.rstd[row];
    if constexpr (S::TILED) next.dot = in.dot[row];
  }
  JN_DEV void advance() {}
  JN_DEV const Chunk<X, V>& x(int k) const { return current.x[k]; }
  JN_DEV const Chunk<G, V>& g(int k) const { return current.g[k]; }
  JN_DEV const Chunk<R, V>& r(int k) const { return current.r[k]; }
  JN_DEV float rstd() const { return current.rstd; }
  JN_DEV float dot() const { return current.dot; }
};

// w' = weight + offset of a thread's columns: in registers for the whole kernel, or read again for each row.
template <class S, class W, bool OFFSET, bool HELD> struct Weights {
  static constexpr int V = S::V;
  const char* weight;
  float offset;
  Chunk<W, V> held[HELD ? S::PER : 1];

  template <class In> JN_DEV void issue(const In& in) {
    if constexpr (HELD && W::size > 0) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k) {
        if (in.has(k))
          held[k] = load(k, in);
        else
          held[k] = Chunk<W, V>{};
      }
    }
  }
  template <class In> JN_DEV Chunk<W, V> load(int k, const In& in) const {
    return load_chunk<W, V, false>(weight + in.first_column() * W::size + k * S::STEP * W::size);
  }
  // f *= w'
  template <class In> JN_DEV void scale(int k, const In& in, float (&f)[V]) const {
    if constexpr (W::size > 0) {
      float w[V];
      if constexpr (HELD)
        widen<W, V>(held[k], w);
      else
        widen<W, V>(load(k, in), w);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] *= OFFSET ? w[i] + offset : w[i];
    }
  }
};

struct BackwardPointers {
  const char *x, *weight, *g, *r;
  const float *rstd, *dot;
  char *dx, *dresidual;
  float* partials;
};

// Adds the groups' weight gradients in a fixed order; the sum ends in group 0.
template <class S> JN_DEV void add_groups(float (&dw)[S::PER][S::V], unsigned char* memory, u32 group, u32 lane) {
#pragma unroll
  for (int half = S::GROUPS / 2; half >= 1; half /= 2) {
    float* at = (float*)memory + (group % half * S::LANES + lane) * (S::PER * S::V);
    barrier();
    if (group >= u32(half) && group < u32(2 * half)) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int i = 0; i < S::V; ++i) at[k * S::V + i] = dw[k][i];
    }
    barrier();
    if (group < u32(half)) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int i = 0; i < S::V; ++i) dw[k][i] += at[k * S::V + i];
    }
  }
}

// RMSNorm: xh = n * rstd, gw = g * w', ds = rstd * (gw - xh * mean(gw * xh)) + r, dw = sum of g * xh over the rows.
template <class S, class Pipe, class X, class W, class G, class R, class DX, class DR, bool OFFSET, bool DW, bool HELD>
JN_DEV void backward_rms_rows(const BackwardPointers& p, float offset, u64 rows, u32 programs, int g_stride) {
  constexpr int V = S::V;
  const u32 thread = thread_id(), lane = S::GROUPS > 1 ? thread % S::LANES : thread,
            group = S::GROUPS > 1 ? thread / S::LANES : 0;
  unsigned char* memory = shared_memory();
  float* sums = (float*)memory;
  const RowInputs<S, X, G, R> in{
      p.x, p.g, p.r, p.rstd, p.dot, g_stride, lane, thread, S::TILED ? block_y() * S::TILE : 0};
  Weights<S, W, OFFSET, HELD> weights{p.weight, offset};
  Pipe pipe(in, memory + (S::TILED ? 0 : 2 * S::Sum::bytes));

  const u64 base = u64(block_x()) * S::GROUPS, stride = u64(programs) * S::GROUPS;
#pragma unroll
  for (int d = 0; d < Pipe::DEPTH; ++d) pipe.issue(base + group + d * stride, base + group + d * stride < rows);
  weights.issue(in);

  float dw[S::PER][V];
#pragma unroll
  for (int k = 0; k < S::PER; ++k)
#pragma unroll
    for (int i = 0; i < V; ++i) dw[k][i] = 0.f;

  int parity = 0;
  for (u64 start = base; start < rows; start += stride, parity ^= 1) {  // the same number of turns for the whole block
    const u64 row = start + group, ahead = row + Pipe::DEPTH * stride;
    const bool active = row < rows;
    pipe.issue(ahead, ahead < rows);
    pipe.advance();
    const float rstd = active ? pipe.rstd() : 0.f;

    float dot;
    if constexpr (S::TILED) {
      dot = active ? pipe.dot() : 0.f;
    } else {
      float part[S::PER];
#pragma unroll
      for (int k = 0; k < S::PER; ++k) {
        part[k] = 0.f;
        if (!active || !in.has(k)) continue;
        float x[V], g[V];
        widen<X, V>(pipe.x(k), x);
        widen<G, V>(pipe.g(k), g);
        weights.scale(k, in, g);
#pragma unroll
        for (int i = 0; i < V; ++i) part[k] = fused_multiply_add(g[i], x[i], part[k]);
      }
      if constexpr (S::Sum::in_wave) {
        dot = S::Sum::within_wave(part, lane);
      } else {
        float* mine = sums + parity * (S::Sum::bytes / 4);
        S::Sum::put(mine, part, 0, thread);
        dot = S::Sum::get(mine, thread);
      }
    }
    const float mean = dot * rstd * (1.f / float(S::N));

#pragma unroll
    for (int k = 0; k < S::PER; ++k) {
      if (!active || !in.has(k)) continue;
      float x[V], g[V], ds[V];
      widen<X, V>(pipe.x(k), x);
      widen<G, V>(pipe.g(k), g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[i] *= rstd;
        if constexpr (DW) dw[k][i] = fused_multiply_add(g[i], x[i], dw[k][i]);
      }
      weights.scale(k, in, g);
      if constexpr (R::size > 0) {
        float r[V];
        widen<R, V>(pipe.r(k), r);
#pragma unroll
        for (int i = 0; i < V; ++i) ds[i] = fused_multiply_add(rstd, fused_multiply_add(-x[i], mean, g[i]), r[i]);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) ds[i] = rstd * fused_multiply_add(-x[i], mean, g[i]);
      }
      const u64 start = row * S::N + in.first_column();
      store_bits(p.dx + start * DX::size + k * S::STEP * DX::size, narrow<DX, V>(ds));
      if constexpr (DR::size > 0)
        store_bits(p.dresidual + start * DR::size + k * S::STEP * DR::size, narrow<DR, V>(ds));
    }
  }

  if constexpr (DW) {
    if constexpr (S::GROUPS > 1) {
      async_wait<0>();  // the rows ahead are gone: their memory is used for the sums now
      add_groups<S>(dw, memory, group, lane);
    }
    if (group == 0) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
        if (in.has(k))
          store_bits((char*)(p.partials + u64(block_x()) * S::N + in.first_column() + k * S::STEP),
                     narrow<F32, V>(dw[k]));
    }
  }
}

// dot[row] = sum(g * w' * x), for rows that backward_rms_rows cannot hold; one block per row.
template <class S, class X, class W, class G, bool OFFSET>
JN_DEV void backward_rms_dot(const BackwardPointers& p, float offset, u64 rows, int g_stride, float* dot) {
  constexpr int V = S::V, BATCH = 4;
  static_assert(!S::TILED && !S::Sum::in_wave, "several waves to a row");
  const u32 thread = thread_id();
  float* sums = (float*)shared_memory();
  const u64 row = linear_block();
  if (row >= rows) return;
  const RowInputs<S, X, G, None> in{p.x, p.g, nullptr, nullptr, nullptr, g_stride, thread, thread, 0};
  Weights<S, W, OFFSET, false> weights{p.weight, offset};
#pragma unroll 1
  for (int first = 0; first < S::PER; first += BATCH) {
    Chunk<X, V> x_raw[BATCH];
    Chunk<G, V> g_raw[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (!in.has(first + j)) continue;
      x_raw[j] = load_chunk<X, V, true>(in.x_at(row, first + j));
      g_raw[j] = load_chunk<G, V, true>(in.g_at(row, first + j));
    }
    float part[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      part[j] = 0.f;
      if (!in.has(first + j)) continue;
      float x[V], g[V];
      widen<X, V>(x_raw[j], x);
      widen<G, V>(g_raw[j], g);
      weights.scale(first + j, in, g);
#pragma unroll
      for (int i = 0; i < V; ++i) part[j] = fused_multiply_add(g[i], x[i], part[j]);
    }
    S::Sum::put(sums, part, first, thread);
  }
  const float sum = S::Sum::get(sums, thread);
  if (thread == 0) dot[row] = sum;
}

// result[n] = sum over p of partials[p][n], in a fixed order: SLICES threads add every SLICES-th row each, then by
// halving.
template <int N, int V, int COLUMNS, int SLICES>
JN_DEV void add_partials(const float* partials, u32 programs, float* result) {
  static_assert(N % V == 0 && next_power_of_2(SLICES) == SLICES, "slices");
  const u32 thread = thread_id(), lane = thread % COLUMNS, slice = thread / COLUMNS;
  const u32 column = (block_x() * COLUMNS + lane) * V;
  const bool has = column < u32(N);
  float sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = 0.f;
  if (has) {
#pragma unroll 4
    for (u32 p = slice; p < programs; p += SLICES) {
      float f[V];
      widen<F32, V>(load_chunk<F32, V, true>((const char*)(partials + u64(p) * N + column)), f);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += f[i];
    }
  }
  float* memory = (float*)shared_memory();
#pragma unroll
  for (int half = SLICES / 2; half >= 1; half /= 2) {
    float* at = memory + (slice % half * COLUMNS + lane) * V;
    barrier();
    if (slice >= u32(half) && slice < u32(2 * half)) {
#pragma unroll
      for (int i = 0; i < V; ++i) at[i] = sum[i];
    }
    barrier();
    if (slice < u32(half)) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += at[i];
    }
  }
  if (slice == 0 && has) store_bits((char*)(result + column), narrow<F32, V>(sum));
}

}  // namespace jaxnorm
