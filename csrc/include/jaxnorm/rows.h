// Row-wise forward kernels, from three parts: a source of rows (x, or x + residual), a norm (statistics and the map
// they define) and an epilogue (what is written per chunk).
//
// A row belongs to LANES threads: less than a wave, a wave, or several waves (then one row per block). It is read once
// and kept where there is room: the first REGS chunks of a thread in registers, the next SHARED in shared memory, the
// rest is read again.
#pragma once
#include "jaxnorm/reduce.h"
#include "jaxnorm/vec.h"

namespace jaxnorm {

template <int N_, int V_, int LANES_, int GROUPS_, int UNROLL_, int REGS_, int SHARED_> struct RowShape {
  static constexpr int N = N_, V = V_, LANES = LANES_, GROUPS = GROUPS_, UNROLL = UNROLL_, REGS = REGS_,
                       SHARED = SHARED_;
  static constexpr int THREADS = LANES * GROUPS, CHUNKS = N / V;
  using Sum = RowSum<CHUNKS, LANES>;
  static constexpr int PER = Sum::per, REST = PER - REGS - SHARED;
  static_assert(N % V == 0 && REST >= 0 && REGS >= 1, "chunks");
  static_assert(Sum::in_wave ? REGS == PER : GROUPS == 1 && UNROLL == 1,
                "rows of one wave stay in registers, longer ones fill a block");

  // Does slot k of this lane hold a chunk? Folds to true for all but the last slot.
  static JN_DEV bool has(int k, u32 lane) { return (k + 1) * LANES <= CHUNKS || k * LANES + lane < u32(CHUNKS); }
  // Columns from a lane's chunk in slot 0 to the one in slot k: a constant once k is unrolled, so it ends up in the
  // instruction.
  static constexpr int STEP = LANES * V;
};

// ---- sources
// ------------------------------------------------------------------------------------------------------------ Raw: a
// chunk as loaded. Kept: what a register slot holds until the second use.

template <class X, int V> struct PlainSource {
  struct Raw {
    Chunk<X, V> x;
  };
  using Kept = Raw;
  using XType = X;
  const char* x;
  int n;

  JN_DEV Raw fetch(u64 start, int offset) const {
    return Raw{load_chunk<X, V, true>(x + start * X::size + offset * X::size)};
  }
  JN_DEV void values(const Raw& raw, float (&f)[V]) const { widen<X, V>(raw.x, f); }
  JN_DEV void kept_values(const Kept& kept, float (&f)[V]) const { widen<X, V, true>(kept.x, f); }
  JN_DEV Kept keep(const Raw& raw, const float (&)[V]) const { return raw; }
  JN_DEV void settle(const float (&)[V], u64, int) const {}

  template <int THREADS> struct Stashed {
    using Slot = Stash<X, V, THREADS>;
    static constexpr int footprint = Slot::footprint;
    static JN_DEV void fetch(const PlainSource& s, unsigned char* base, u32 thread, u64 start, int offset) {
      Slot::fetch(base, thread, s.x + start * X::size + offset * X::size);
    }
    static JN_DEV Raw read(const unsigned char* base, u32 thread) { return Raw{Slot::read(base, thread)}; }
  };
};

// s = x + residual, written as residual_out. ROUND: the norm sees the rounded s. residual_out may be the buffer of
// residual: a thread has read a chunk before it writes it, and chunks that are read twice are written at the second
// reading.
template <class X, class R, int V, bool ROUND> struct AddSource {
  struct Raw {
    Chunk<X, V> x;
    Chunk<R, V> r;
  };
  struct Exact {
    float f[V];
  };
  // float32 s is its own rounding; else keep the rounded bits only where nothing more is needed
  static constexpr bool narrow_kept = ROUND || R::size == 4;
  struct Rounded {
    Chunk<R, V> s;
  };
  template <bool B, class A, class C> struct Select {
    using Type = A;
  };
  template <class A, class C> struct Select<false, A, C> {
    using Type = C;
  };
  using Kept = typename Select<narrow_kept, Rounded, Exact>::Type;
  using XType = X;
  const char* x;
  const char* residual;
  char* out;
  int n;

  JN_DEV Raw fetch(u64 start, int offset) const {
    return Raw{load_chunk<X, V, true>(x + start * X::size + offset * X::size),
               load_chunk<R, V, true>(residual + start * R::size + offset * R::size)};
  }
  JN_DEV void values(const Raw& raw, float (&f)[V]) const {
    float r[V];
    widen<X, V>(raw.x, f);
    widen<R, V>(raw.r, r);
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] += r[i];
    if constexpr (ROUND) widen<R, V>(narrow<R, V>(f), f);
  }
  JN_DEV void kept_values(const Rounded& kept, float (&f)[V]) const { widen<R, V, true>(kept.s, f); }
  JN_DEV void kept_values(const Exact& kept, float (&f)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] = kept.f[i];
  }
  JN_DEV Kept keep(const Raw&, const float (&f)[V]) const {
    Kept kept;
    if constexpr (narrow_kept) {
      kept.s = narrow<R, V>(f);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) kept.f[i] = f[i];
    }
    return kept;
  }
  JN_DEV void settle(const float (&f)[V], u64 start, int offset) const {
    store_bits(out + start * R::size + offset * R::size, narrow<R, V>(f));
  }

  template <int THREADS> struct Stashed {
    using SlotX = Stash<X, V, THREADS>;
    using SlotR = Stash<R, V, THREADS>;
    static constexpr int footprint = SlotX::footprint + SlotR::footprint;
    static JN_DEV void fetch(const AddSource& s, unsigned char* base, u32 thread, u64 start, int offset) {
      SlotX::fetch(base, thread, s.x + start * X::size + offset * X::size);
      SlotR::fetch(base + SlotX::footprint, thread, s.residual + start * R::size + offset * R::size);
    }
    static JN_DEV Raw read(const unsigned char* base, u32 thread) {
      return Raw{SlotX::read(base, thread), SlotR::read(base + SlotX::footprint, thread)};
    }
  };
};

// ---- one row on chip
// ----------------------------------------------------------------------------------------------------

template <class S, class Source> struct Row {
  using Raw = typename Source::Raw;
  // Chunks on their way through registers at a time: 64 bytes
  static constexpr int V = S::V, BATCH = min_of(4, max_of(1, 64 / int(sizeof(Raw))));
  using Kept = typename Source::Kept;
  using Stashed = typename Source::template Stashed<S::THREADS>;
  const Source& source;
  unsigned char* stash;  // behind the sums in shared memory
  u64 row;
  u64 start;  // element index of the lane's chunk in slot 0
  u32 lane;
  bool active;
  Raw raw[S::REGS];
  Kept kept[S::REGS];

  JN_DEV bool has(int k) const { return active && S::has(k, lane); }

  // Issues every load of the row that has somewhere to go; nothing waits here.
  JN_DEV void issue() {
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      if (has(k))
        raw[k] = source.fetch(start, k * S::STEP);
      else
        raw[k] = Raw{};
    }
    if constexpr (S::SHARED > 0) {
#pragma unroll
      for (int k = 0; k < S::SHARED; ++k)
        if (has(S::REGS + k))
          Stashed::fetch(source, stash + k * Stashed::footprint, lane, start, (S::REGS + k) * S::STEP);
      async_commit();
    }
  }

  // sum of map(n) over the row; settles every chunk that will not be fetched again
  template <class Map> JN_DEV float first_sum(Map map, float* sums) {
    float part[S::REGS];
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      float f[V];
      source.values(raw[k], f);
      if (has(k)) source.settle(f, start, k * S::STEP);
      kept[k] = source.keep(raw[k], f);
      part[k] = add_up(f, map);
    }
    if constexpr (S::Sum::in_wave) {
      return S::Sum::within_wave(part, lane);
    } else {
      S::Sum::put(sums, part, 0, lane);
      if constexpr (S::REST > 0) sum_rest(map, sums);
      if constexpr (S::SHARED > 0) sum_stash(map, sums);
      return S::Sum::get(sums, lane);
    }
  }

  // use(k, n[V]) for each chunk, in registers or not
  template <class Use> JN_DEV void each(Use use) {
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      float f[V];
      source.kept_values(kept[k], f);
      if (has(k)) use(k, f);
    }
#pragma unroll 4
    for (int k = S::REGS; k < S::REGS + S::SHARED; ++k) {
      if (!has(k)) continue;
      float f[V];
      source.values(Stashed::read(stash + (k - S::REGS) * Stashed::footprint, lane), f);
      use(k, f);
    }
#pragma unroll 2
    for (int k = S::REGS + S::SHARED; k < S::PER; ++k) {
      if (!has(k)) continue;
      float f[V];
      source.values(source.fetch(start, k * S::STEP), f);
      source.settle(f, start, k * S::STEP);
      use(k, f);
    }
  }

 private:
  template <class Map> static JN_DEV float add_up(const float (&f)[V], Map map) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < V; ++i) sum = map(f[i], sum);
    return sum;
  }

  template <class Map> JN_DEV void sum_stash(Map map, float* sums) {
    async_wait<0>();
    constexpr int full = S::SHARED / BATCH * BATCH;
#pragma unroll 1
    for (int k = 0; k < full; k += BATCH) sum_stash_batch<BATCH>(k, map, sums);
    if constexpr (S::SHARED > full) sum_stash_batch<S::SHARED - full>(full, map, sums);
  }
  template <int B, class Map> JN_DEV void sum_stash_batch(int first, Map map, float* sums) {
    float part[B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
      part[j] = 0.f;
      const int k = S::REGS + first + j;
      if (!has(k)) continue;
      float f[V];
      source.values(Stashed::read(stash + (first + j) * Stashed::footprint, lane), f);
      source.settle(f, start, k * S::STEP);
      part[j] = add_up(f, map);
    }
    S::Sum::put(sums, part, S::REGS + first, lane);
  }

  template <class Map> JN_DEV void sum_rest(Map map, float* sums) {
    constexpr int first = S::REGS + S::SHARED, full = S::REST / BATCH * BATCH;
#pragma unroll 1
    for (int k = 0; k < full; k += BATCH) sum_rest_batch<BATCH>(first + k, map, sums);
    if constexpr (S::REST > full) sum_rest_batch<S::REST - full>(first + full, map, sums);
  }
  template <int B, class Map> JN_DEV void sum_rest_batch(int first, Map map, float* sums) {
    Raw again[B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
      if (has(first + j))
        again[j] = source.fetch(start, (first + j) * S::STEP);
      else
        again[j] = Raw{};
    }
    float part[B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
      float f[V];
      source.values(again[j], f);
      part[j] = add_up(f, map);
    }
    S::Sum::put(sums, part, first, lane);
  }
};

// ---- norms
// --------------------------------------------------------------------------------------------------------------

// n * rsqrt(mean(n * n) + eps)
template <int N> struct RmsNorm {
  float eps;
  struct State {
    float rstd;
  };
  template <class R> JN_DEV State statistics(R& row, float* sums) const {
    const float sum = row.first_sum([](float n, float acc) { return fused_multiply_add(n, n, acc); }, sums);
    return State{reciprocal_sqrt(fused_multiply_add(sum, 1.f / float(N), eps))};
  }
  static JN_DEV float apply(const State& s, float n) { return n * s.rstd; }
};

// ---- epilogues
// ----------------------------------------------------------------------------------------------------------

// y = cast(normalised * (weight + offset)), columns N .. P - 1 zero. BEFORE: round to X's type before the weight.
// EARLY: fetch the weights of the register slots together with the row, for a block that has nothing else to hide their
// latency.
template <class S, class X, class W, class Y, int P, bool OFFSET, bool BEFORE, bool EARLY> struct WeightedStore {
  static constexpr int V = S::V;
  const char* weight;
  char* y;
  float offset;
  Chunk<W, V> early[EARLY ? S::REGS : 1];

  JN_DEV void issue(u32 lane) {
    if constexpr (EARLY && W::size > 0) {
#pragma unroll
      for (int k = 0; k < S::REGS; ++k) {
        if (S::has(k, lane))
          early[k] = load_weight(k, lane);
        else
          early[k] = Chunk<W, V>{};
      }
    }
  }
  JN_DEV Chunk<W, V> load_weight(int k, u32 lane) const {
    return load_chunk<W, V, false>(weight + lane * (V * W::size) + k * S::STEP * W::size);
  }
  JN_DEV void store(u64 row, u32 lane, int k, float (&f)[V]) const {
    if constexpr (BEFORE) widen<X, V>(narrow<X, V>(f), f);
    if constexpr (W::size > 0) {
      float w[V];
      if (EARLY && k < S::REGS)
        widen<W, V>(early[k < S::REGS ? k : 0], w);
      else
        widen<W, V>(load_weight(k, lane), w);
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] *= OFFSET ? w[i] + offset : w[i];
    }
    store_bits(y + (row * P + lane * V) * Y::size + k * S::STEP * Y::size, narrow<Y, V>(f));
  }
  JN_DEV void finish(u64 row, u32 lane) const {
    if constexpr (P > S::N) {
#pragma unroll 1
      for (u32 column = S::N + lane * V; column < u32(P); column += S::LANES * V)
        store_bits(y + (row * P + column) * Y::size, zero_bits<Y::size * V>());
    }
  }
};

// ---- the kernel
// ---------------------------------------------------------------------------------------------------------

template <class S, class R, class Norm, class Epilogue>
JN_DEV void finish_row(R& row, const Norm& norm, const Epilogue& epilogue, float* rstd, float* sums) {
  const auto state = norm.statistics(row, sums);
  row.each([&](int k, float (&f)[S::V]) {
#pragma unroll
    for (int i = 0; i < S::V; ++i) f[i] = norm.apply(state, f[i]);
    epilogue.store(row.row, row.lane, k, f);
  });
  if (!row.active) return;
  epilogue.finish(row.row, row.lane);
  if (rstd != nullptr && row.lane == 0) rstd[row.row] = state.rstd;
}

template <class S, class Source, class Norm, class Epilogue>
JN_DEV void forward_rows(const Source& source, const Norm& norm, Epilogue epilogue, float* rstd, u64 rows) {
  const u32 thread = thread_id(), lane = S::GROUPS > 1 ? thread % S::LANES : thread,
            group = S::GROUPS > 1 ? thread / S::LANES : 0;
  float* sums = (float*)shared_memory();
  unsigned char* stash = shared_memory() + S::Sum::bytes;
  const u64 first = linear_block() * (S::GROUPS * S::UNROLL) + group;

  auto make = [&](int u) {
    const u64 row = first + u * S::GROUPS;
    return Row<S, Source>{source, stash, row, row * S::N + lane * S::V, lane, S::Sum::in_wave ? row < rows : true};
  };
  using OneRow = Row<S, Source>;
  if constexpr (S::UNROLL == 1) {
    OneRow row = make(0);
    if (!S::Sum::in_wave && row.row >= rows) return;  // the whole block
    row.issue();
    epilogue.issue(lane);
    finish_row<S>(row, norm, epilogue, rstd, sums);
  } else {
    static_assert(S::UNROLL == 2 || S::UNROLL == 4, "rows at a time");
    OneRow a = make(0), b = make(1);
    if constexpr (S::UNROLL == 4) {
      OneRow c = make(2), d = make(3);
      a.issue(), b.issue(), c.issue(), d.issue();
      epilogue.issue(lane);
      finish_row<S>(a, norm, epilogue, rstd, sums);
      finish_row<S>(b, norm, epilogue, rstd, sums);
      finish_row<S>(c, norm, epilogue, rstd, sums);
      finish_row<S>(d, norm, epilogue, rstd, sums);
    } else {
      a.issue(), b.issue();
      epilogue.issue(lane);
      finish_row<S>(a, norm, epilogue, rstd, sums);
      finish_row<S>(b, norm, epilogue, rstd, sums);
    }
  }
}

}  // namespace jaxnorm
