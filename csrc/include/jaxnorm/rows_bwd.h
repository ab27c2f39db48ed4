// Row-wise backward kernels: one pass over the rows that writes dx and adds up the gradients of the vectors (weight,
// bias, bias of x). A norm says what it wants of a row (STATS scalars that the forward saved, SUMS sums over the row)
// and how they make dx.
//
// A persistent grid: block b of P takes rows b, b + P, ... (times GROUPS), always the same ones, so the sums are the
// same every time. A thread owns the same columns in all its rows and adds their gradients in registers; a block leaves
// one row of partial sums in float32 for each vector, and a second launch adds the P rows up. While a row is worked on,
// the loads of the next DEPTH rows run.
#pragma once
#include "jaxnorm/pipe.h"

namespace jaxnorm {

// Which gradients of vectors are wanted: sums over the rows of g * xh, g, ds.
template <bool DW_, bool DB_, bool DXB_> struct ColumnSums {
  static constexpr bool DW = DW_, DB = DB_, DXB = DXB_;
  static constexpr int COUNT = DW + DB + DXB, FIRST_DB = DW, FIRST_DXB = DW + DB;
};

// ---- norms

// RMSNorm: xh = n * rstd, ds = rstd * (gw - xh * mean(gw * xh))
template <int N> struct RmsBackward {
  static constexpr int STATS = 1, SUMS = 1;
  float rstd, mean;
  JN_DEV explicit RmsBackward(const float (&stats)[STATS]) : rstd(stats[0]), mean(0.f) {}
  JN_DEV void add(float n, float gw, float (&sum)[SUMS]) const { sum[0] = fused_multiply_add(gw, n, sum[0]); }
  JN_DEV void finish(const float (&sum)[SUMS]) { mean = sum[0] * rstd * (1.f / float(N)); }
  JN_DEV float xh(float n) const { return n * rstd; }
  JN_DEV float inner(float xh, float gw) const { return fused_multiply_add(-xh, mean, gw); }  // ds / rstd
};

// LayerNorm: xh = (n - m0 - e) * rstd, ds = rstd * (gw - xh * mean(gw * xh) - mean(gw))
template <int N> struct LayerBackward {
  static constexpr int STATS = 3, SUMS = 2;
  float rstd, m0, e, moved, product, average;
  JN_DEV explicit LayerBackward(const float (&stats)[STATS])
      : rstd(stats[0]), m0(stats[1]), e(stats[2]), moved(-(stats[2] * stats[0])), product(0.f), average(0.f) {}
  JN_DEV void add(float n, float gw, float (&sum)[SUMS]) const {
    sum[0] = fused_multiply_add(gw, n - m0, sum[0]);
    sum[1] += gw;
  }
  JN_DEV void finish(const float (&sum)[SUMS]) {
    product = fused_multiply_add(-e, sum[1], sum[0]) * rstd * (1.f / float(N));
    average = sum[1] * (1.f / float(N));
  }
  JN_DEV float xh(float n) const { return fused_multiply_add(n - m0, rstd, moved); }
  JN_DEV float inner(float xh, float gw) const { return fused_multiply_add(-xh, product, gw - average); }
};

// ---- the kernels

// A vector's elements at a thread's columns: in registers for the whole kernel, or read again for each row.
template <class S, class T, bool HELD> struct Vector {
  static constexpr int V = S::V;
  const char* from;
  Chunk<T, V> held[HELD ? S::PER : 1];

  template <class In> JN_DEV void issue(const In& in) {
    if constexpr (HELD && T::size > 0) {
#pragma unroll
      for (int k = 0; k < S::PER; ++k) {
        if (in.has(k))
          held[k] = load(k, in);
        else
          held[k] = Chunk<T, V>{};
      }
    }
  }
  template <class In> JN_DEV Chunk<T, V> load(int k, const In& in) const {
    return load_chunk<T, V, false>(from + in.first_column() * T::size + k * S::STEP * T::size);
  }
  template <class In> JN_DEV void values(int k, const In& in, float (&f)[V]) const {
    if constexpr (HELD)
      widen<T, V>(held[k], f);
    else
      widen<T, V>(load(k, in), f);
  }
  // f *= element (+ offset)
  template <bool OFFSET, class In> JN_DEV void scale(int k, const In& in, float offset, float (&f)[V]) const {
    if constexpr (T::size > 0) {
      float w[V];
      values(k, in, w);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] *= OFFSET ? w[i] + offset : w[i];
    }
  }
  // f += element
  template <class In> JN_DEV void shift(int k, const In& in, float (&f)[V]) const {
    if constexpr (T::size > 0) {
      float b[V];
      values(k, in, b);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] += b[i];
    }
  }
};

// Adds the groups' sums in a fixed order; the total ends in group 0.
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

// ds = rstd * inner + r of the norm, and the sums over the rows that Sums wants.
template <class S, class Norm, class Types, class Pipe, class Sums, bool OFFSET, bool HELD>
JN_DEV void backward_rows(const BackwardPointers<Norm>& p, float offset, u64 rows, u32 programs, int g_stride) {
  using X = typename Types::X;
  using G = typename Types::G;
  using R = typename Types::R;
  using DX = typename Types::DX;
  using DR = typename Types::DR;
  constexpr int V = S::V;
  const u32 thread = thread_id(), lane = S::GROUPS > 1 ? thread % S::LANES : thread,
            group = S::GROUPS > 1 ? thread / S::LANES : 0;
  unsigned char* memory = shared_memory();
  float* sums = (float*)memory;
  const RowInputs<S, Norm, Types> in{p, g_stride, lane, thread, S::TILED ? block_y() * S::TILE : 0};
  Vector<S, typename Types::W, HELD> weights{p.weight};
  Vector<S, typename Types::B, HELD> biases{p.bias};
  Pipe pipe(in, memory + (S::TILED ? 0 : 2 * Norm::SUMS * S::Sum::bytes));

  const u64 base = u64(block_x()) * S::GROUPS, stride = u64(programs) * S::GROUPS;
#pragma unroll
  for (int d = 0; d < Pipe::DEPTH; ++d) pipe.issue(base + group + d * stride, base + group + d * stride < rows);
  weights.issue(in);
  biases.issue(in);

  float columns[max_of(1, Sums::COUNT)][S::PER][V];
#pragma unroll
  for (int c = 0; c < Sums::COUNT; ++c)
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) columns[c][k][i] = 0.f;

  int parity = 0;
  for (u64 start = base; start < rows; start += stride, parity ^= 1) {  // the same number of turns for the whole block
    const u64 row = start + group, ahead = row + Pipe::DEPTH * stride;
    const bool active = row < rows;
    pipe.issue(ahead, ahead < rows);
    pipe.advance();
    float stats[Norm::STATS];
#pragma unroll
    for (int i = 0; i < Norm::STATS; ++i) stats[i] = active ? pipe.stat(i) : 0.f;
    Norm norm(stats);

    float total[Norm::SUMS];
    if constexpr (S::TILED) {
#pragma unroll
      for (int i = 0; i < Norm::SUMS; ++i) total[i] = active ? pipe.dot(i) : 0.f;
    } else {
      float part[Norm::SUMS][S::PER];
#pragma unroll
      for (int k = 0; k < S::PER; ++k) {
        float sum[Norm::SUMS] = {};
        if (active && in.has(k)) {
          float x[V], g[V];
          widen<X, V>(pipe.x(k), x);
          biases.shift(k, in, x);
          widen<G, V>(pipe.g(k), g);
          weights.template scale<OFFSET>(k, in, offset, g);
#pragma unroll
          for (int i = 0; i < V; ++i) norm.add(x[i], g[i], sum);
        }
#pragma unroll
        for (int i = 0; i < Norm::SUMS; ++i) part[i][k] = sum[i];
      }
      if constexpr (S::Sum::in_wave) {
        S::Sum::within_wave(part, lane, total);
      } else {
        float* mine = sums + parity * (Norm::SUMS * S::Sum::bytes / 4);
        S::Sum::put(mine, part, 0, thread);
        S::Sum::get(mine, thread, total);
      }
    }
    norm.finish(total);

#pragma unroll
    for (int k = 0; k < S::PER; ++k) {
      if (!active || !in.has(k)) continue;
      float x[V], g[V], ds[V];
      widen<X, V>(pipe.x(k), x);
      biases.shift(k, in, x);
      widen<G, V>(pipe.g(k), g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[i] = norm.xh(x[i]);
        if constexpr (Sums::DW) columns[0][k][i] = fused_multiply_add(g[i], x[i], columns[0][k][i]);
        if constexpr (Sums::DB) columns[Sums::FIRST_DB][k][i] += g[i];
      }
      weights.template scale<OFFSET>(k, in, offset, g);
      if constexpr (R::size > 0) {
        float r[V];
        widen<R, V>(pipe.r(k), r);
#pragma unroll
        for (int i = 0; i < V; ++i) ds[i] = fused_multiply_add(norm.rstd, norm.inner(x[i], g[i]), r[i]);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) ds[i] = norm.rstd * norm.inner(x[i], g[i]);
      }
      if constexpr (Sums::DXB) {
#pragma unroll
        for (int i = 0; i < V; ++i) columns[Sums::FIRST_DXB][k][i] += ds[i];
      }
      const u64 at = row * S::N + in.first_column();
      store_bits(p.dx + at * DX::size + k * S::STEP * DX::size, narrow<DX, V>(ds));
      if constexpr (DR::size > 0) store_bits(p.dresidual + at * DR::size + k * S::STEP * DR::size, narrow<DR, V>(ds));
    }
  }

  if constexpr (Sums::COUNT > 0) {
    if constexpr (S::GROUPS > 1) {
      async_wait<0>();  // the rows ahead are gone: their memory is used for the sums now
#pragma unroll
      for (int c = 0; c < Sums::COUNT; ++c) add_groups<S>(columns[c], memory, group, lane);
    }
    if (group == 0) {
#pragma unroll
      for (int c = 0; c < Sums::COUNT; ++c)
#pragma unroll
        for (int k = 0; k < S::PER; ++k)
          if (in.has(k))
            store_bits(
                (char*)(p.partials + (u64(block_x()) * Sums::COUNT + c) * S::N + in.first_column() + k * S::STEP),
                narrow<F32, V>(columns[c][k]));
    }
  }
}

// dot[row] = the row sums of the norm, for rows that backward_rows cannot hold; one block per row.
template <class S, class Norm, class Types, bool OFFSET>
JN_DEV void backward_sums(const BackwardPointers<Norm>& p, float offset, u64 rows, int g_stride, float* dot) {
  using X = typename Types::X;
  using G = typename Types::G;
  constexpr int V = S::V, BATCH = 4;
  static_assert(!S::TILED && !S::Sum::in_wave, "several waves to a row");
  const u32 thread = thread_id();
  float* sums = (float*)shared_memory();
  const u64 row = linear_block();
  if (row >= rows) return;
  const RowInputs<S, Norm, Types> in{p, g_stride, thread, thread, 0};
  Vector<S, typename Types::W, false> weights{p.weight};
  Vector<S, typename Types::B, false> biases{p.bias};
  float stats[Norm::STATS];
#pragma unroll
  for (int i = 0; i < Norm::STATS; ++i) stats[i] = p.stats[i] != nullptr ? p.stats[i][row] : 0.f;
  const Norm norm(stats);
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
    float part[Norm::SUMS][BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      float sum[Norm::SUMS] = {};
      if (in.has(first + j)) {
        float x[V], g[V];
        widen<X, V>(x_raw[j], x);
        biases.shift(first + j, in, x);
        widen<G, V>(g_raw[j], g);
        weights.template scale<OFFSET>(first + j, in, offset, g);
#pragma unroll
        for (int i = 0; i < V; ++i) norm.add(x[i], g[i], sum);
      }
#pragma unroll
      for (int i = 0; i < Norm::SUMS; ++i) part[i][j] = sum[i];
    }
    S::Sum::put(sums, part, first, thread);
  }
  float total[Norm::SUMS];
  S::Sum::get(sums, thread, total);
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < Norm::SUMS; ++i) dot[row * Norm::SUMS + i] = total[i];
  }
}

// store(n, the V sums over p of partials[p][n ...]), in a fixed order: SLICES threads add every SLICES-th row each,
// then by halving. A block may have more threads than it needs.
template <int N, int V, int COLUMNS, int SLICES, class Store>
JN_DEV void add_partials(const float* partials, u32 programs, u32 block, Store store) {
  static_assert(N % V == 0 && next_power_of_2(SLICES) == SLICES, "slices");
  const u32 thread = thread_id(), lane = thread % COLUMNS, slice = thread / COLUMNS;
  const u32 column = (block * COLUMNS + lane) * V;
  const bool has = column < u32(N) && slice < u32(SLICES);
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
  if (slice == 0 && has) store(column, sum);
}

// Puts V sums of a column of a stack of vectors [N] where they belong, each vector in a dtype of its own. One that
// nobody wants has no elements.
template <int N, int V, class A, class B = None, class C = None, class D = None> struct VectorGradients {
  static_assert(N % V == 0, "a chunk in one vector");
  char *a, *b = nullptr, *c = nullptr, *d = nullptr;
  JN_DEV void operator()(u32 column, const float (&sum)[V]) const {
    const u32 vector = column / u32(N), at = column % u32(N);
    if (vector == 0) put<A>(a, at, sum);
    if (vector == 1) put<B>(b, at, sum);
    if (vector == 2) put<C>(c, at, sum);
    if (vector == 3) put<D>(d, at, sum);
  }

 private:
  template <class T> static JN_DEV void put(char* to, u32 at, const float (&sum)[V]) {
    if constexpr (T::size > 0) store_bits(to + at * T::size, narrow<T, V>(sum));
  }
};

}  // namespace jaxnorm
