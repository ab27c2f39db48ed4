// Row-wise forward kernels, from three parts: a source of rows (x, or x + residual), a norm (norms.h: statistics and
// the map they define) and an epilogue (what is written per chunk).
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
  // Lanes of a wave never part at the end of the rows, so that nothing else need ask whether a row is there.
  static constexpr bool TOGETHER = LANES >= kWave && UNROLL == 1;
  // Columns from a lane's chunk in slot 0 to the one in slot k: a constant once k is unrolled, so it ends up in the
  // instruction.
  static constexpr int STEP = LANES * V;
};

// ---- sources
// ------------------------------------------------------------------------------------------------------------ Raw: a
// chunk as loaded. Kept: what a register slot holds until the second use.

template <class X, int V> struct PlainSource {
  static constexpr bool BIASED = false;
  struct Raw {
    Chunk<X, V> x;
  };
  using Kept = Raw;
  using XType = X;
  const char* x;
  int n;

  JN_DEV Raw fetch(u64 start, u32, int offset) const {
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
    static JN_DEV Raw read(const PlainSource&, const unsigned char* base, u32 thread, u32, int) {
      return Raw{Slot::read(base, thread)};
    }
  };
};

// An operand of the sum, or nothing: an absent one takes no room.
template <class T, int V, int WHICH> struct Operand {
  Chunk<T, V> bits;
  JN_DEV void add_to(float (&f)[V]) const {
    float more[V];
    widen<T, V>(bits, more);
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] += more[i];
  }
};
template <int V, int WHICH> struct Operand<None, V, WHICH> {
  JN_DEV void add_to(float (&)[V]) const {}
};

// s = x + bias + residual of what there is (B, R: None = absent); written as residual_out if there is a residual. bias
// is a vector over the columns. ROUND: the norm sees the rounded s. residual_out may be the buffer of residual: a
// thread has read a chunk before it writes it, and chunks that are read again are written at the last reading.
// PARTS > 1: x is the sum of so many matrices, `apart` bytes from one to the next, in float32 and in their order.
template <class X, class B, class R, int V, bool ROUND, int PARTS = 1> struct SumSource {
  static constexpr bool BIASED = B::size > 0;
  using BiasBits = Operand<B, V, 0>;
  using ResidualBits = Operand<R, V, 1>;
  struct Raw : BiasBits, ResidualBits {
    Chunk<X, V> x[PARTS];
  };
  struct Exact {
    float f[V];
  };
  // float32 s is its own rounding; else keep the rounded bits only where nothing more is needed
  static constexpr bool added = R::size > 0, narrow_kept = added && (ROUND || R::size == 4);
  struct Rounded {
    Chunk<R, V> s;
  };
  using Kept = typename Select<narrow_kept, Rounded, Exact>::Type;
  using XType = X;
  const char* x;
  const char* bias;
  const char* residual;
  char* out;
  int n;
  u64 apart = 0;

  JN_DEV void fetch_bias(Raw& raw, u32 column, int offset) const {
    if constexpr (B::size > 0) raw.BiasBits::bits = load_chunk<B, V, false>(bias + column * B::size + offset * B::size);
  }
  JN_DEV Raw fetch(u64 start, u32 column, int offset) const {
    Raw raw;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      raw.x[p] = load_chunk<X, V, true>(x + p * apart + start * X::size + offset * X::size);
    if constexpr (added) raw.ResidualBits::bits = load_chunk<R, V, true>(residual + start * R::size + offset * R::size);
    fetch_bias(raw, column, offset);
    return raw;
  }
  JN_DEV void values(const Raw& raw, float (&f)[V]) const {
    widen<X, V>(raw.x[0], f);
#pragma unroll
    for (int p = 1; p < PARTS; ++p) Operand<X, V, 0>{raw.x[p]}.add_to(f);
    raw.BiasBits::add_to(f);
    raw.ResidualBits::add_to(f);
    if constexpr (added && ROUND) widen<R, V>(narrow<R, V>(f), f);
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
    if constexpr (added) store_bits(out + start * R::size + offset * R::size, narrow<R, V>(f));
  }

  template <int THREADS> struct Stashed {
    using SlotX = Stash<X, V, THREADS>;
    using SlotR = Stash<R, V, THREADS>;
    static constexpr int ahead = PARTS * SlotX::footprint, footprint = ahead + SlotR::footprint;
    static JN_DEV void fetch(const SumSource& s, unsigned char* base, u32 thread, u64 start, int offset) {
#pragma unroll
      for (int p = 0; p < PARTS; ++p)
        SlotX::fetch(base + p * SlotX::footprint, thread, s.x + p * s.apart + start * X::size + offset * X::size);
      if constexpr (added) SlotR::fetch(base + ahead, thread, s.residual + start * R::size + offset * R::size);
    }
    // the bias, which all rows share, stays in the nearest cache
    static JN_DEV Raw read(const SumSource& s, const unsigned char* base, u32 thread, u32 column, int offset) {
      Raw raw;
#pragma unroll
      for (int p = 0; p < PARTS; ++p) raw.x[p] = SlotX::read(base + p * SlotX::footprint, thread);
      if constexpr (added) raw.ResidualBits::bits = SlotR::read(base + ahead, thread);
      s.fetch_bias(raw, column, offset);
      return raw;
    }
  };
};
template <class X, class R, int V, bool ROUND, int PARTS = 1> using AddSource = SumSource<X, None, R, V, ROUND, PARTS>;

// ---- one row on chip
// ----------------------------------------------------------------------------------------------------

// PIVOT: every lane has the row's first chunk as well, for a norm that wants a value of the row before any sum.
template <class S, class Source, bool PIVOT = false> struct Row {
  using Shape = S;
  using Raw = typename Source::Raw;
  // Chunks on their way through registers at a time: 64 bytes
  static constexpr int V = S::V, BATCH = min_of(4, max_of(1, 64 / int(sizeof(Raw))));
  // ... and behind the register slots, at their last use; a bias of x beside each costs its own registers, and so do
  // the partial sums of many ranks
  static constexpr int LATE = Source::BIASED || sizeof(Raw) > 64 ? 1 : 4, AGAIN = sizeof(Raw) > 64 ? 1 : 2;
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
  Raw first;  // unset without PIVOT

  JN_DEV bool has(int k) const { return active && S::has(k, lane); }
  JN_DEV u32 column() const { return lane * V; }
  JN_DEV Raw stashed(int k) const {
    return Stashed::read(source, stash + (k - S::REGS) * Stashed::footprint, lane, column(), k * S::STEP);
  }

  JN_DEV void fetch_first() {
    if constexpr (PIVOT) {
      if (active)
        first = source.fetch(row * S::N, 0, 0);
      else
        first = Raw{};
    }
  }
  // The median of three values, of which one may be far off.
  JN_DEV float pivot() const {
    static_assert(PIVOT && V >= 1, "a first chunk");
    float f[V];
    source.values(first, f);
    const float a = f[0], b = f[V > 1 ? 1 : 0], c = f[V > 2 ? 2 : 0];
    const float low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
  }

  // Issues every load of the row that has somewhere to go; nothing waits here.
  JN_DEV void issue() {
    fetch_first();
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      if (has(k))
        raw[k] = source.fetch(start, column(), k * S::STEP);
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

  // The register slots as loaded, once more.
  JN_DEV void fetch_again() {
#pragma unroll
    for (int k = 0; k < S::REGS; ++k)
      if (has(k)) raw[k] = source.fetch(start, column(), k * S::STEP);
  }

  // Adds up over the row what map(n, sums) adds for each n. FIRST: the pass that settles every chunk that will not be
  // fetched again, and leaves the others in `kept`.
  template <bool FIRST, int COUNT, class Map> JN_DEV void pass(Map map, float* sums, float (&total)[COUNT]) {
    pass<FIRST>(map, sums, total, [] {});
  }
  // meanwhile() runs once all chunks came by, before the barrier.
  template <bool FIRST, int COUNT, class Map, class Meanwhile>
  JN_DEV void pass(Map map, float* sums, float (&total)[COUNT], Meanwhile meanwhile) {
    float part[COUNT][S::REGS];
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      float f[V];
      if constexpr (FIRST) {
        source.values(raw[k], f);
        if (has(k)) source.settle(f, start, k * S::STEP);
        kept[k] = source.keep(raw[k], f);
      } else {
        source.kept_values(kept[k], f);
      }
      add_up<FIRST>(has(k), f, map, part, k);
    }
    if constexpr (S::Sum::in_wave) {
      meanwhile();
      S::Sum::within_wave(part, lane, total);
    } else {
      S::Sum::put(sums, part, 0, lane);
      if constexpr (S::REST > 0) pass_rest<FIRST, COUNT>(map, sums);
      if constexpr (S::SHARED > 0) pass_stash<FIRST, COUNT>(map, sums);
      meanwhile();
      S::Sum::get(sums, lane, total);
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
#pragma unroll(LATE)
    for (int k = S::REGS; k < S::REGS + S::SHARED; ++k) {
      if (!has(k)) continue;
      float f[V];
      source.values(stashed(k), f);
      use(k, f);
    }
#pragma unroll(AGAIN)
    for (int k = S::REGS + S::SHARED; k < S::PER; ++k) {
      if (!has(k)) continue;
      float f[V];
      source.values(source.fetch(start, column(), k * S::STEP), f);
      source.settle(f, start, k * S::STEP);
      use(k, f);
    }
  }

 private:
  // A chunk that is not there reads as zeros, which map takes for nothing in the first pass alone, without a pivot.
  template <bool FIRST, int COUNT, int B, class Map>
  static JN_DEV void add_up(bool has, const float (&f)[V], Map map, float (&part)[COUNT][B], int k) {
    float sum[COUNT] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) map(f[i], sum);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) part[c][k] = (FIRST && !PIVOT) || has ? sum[c] : 0.f;
  }

  template <bool FIRST, int COUNT, class Map> JN_DEV void pass_stash(Map map, float* sums) {
    if constexpr (FIRST) async_wait<0>();
    constexpr int full = S::SHARED / BATCH * BATCH;
#pragma unroll 1
    for (int k = 0; k < full; k += BATCH) stash_batch<FIRST, COUNT, BATCH>(k, map, sums);
    if constexpr (S::SHARED > full) stash_batch<FIRST, COUNT, S::SHARED - full>(full, map, sums);
  }
  template <bool FIRST, int COUNT, int B, class Map> JN_DEV void stash_batch(int first, Map map, float* sums) {
    float part[COUNT][B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
#pragma unroll
      for (int c = 0; c < COUNT; ++c) part[c][j] = 0.f;
      const int k = S::REGS + first + j;
      if (!has(k)) continue;
      float f[V];
      source.values(stashed(k), f);
      if constexpr (FIRST) source.settle(f, start, k * S::STEP);
      add_up<FIRST>(true, f, map, part, j);
    }
    S::Sum::put(sums, part, S::REGS + first, lane);
  }

  template <bool FIRST, int COUNT, class Map> JN_DEV void pass_rest(Map map, float* sums) {
    constexpr int first = S::REGS + S::SHARED, full = S::REST / BATCH * BATCH;
#pragma unroll 1
    for (int k = 0; k < full; k += BATCH) rest_batch<FIRST, COUNT, BATCH>(first + k, map, sums);
    if constexpr (S::REST > full) rest_batch<FIRST, COUNT, S::REST - full>(first + full, map, sums);
  }
  template <bool FIRST, int COUNT, int B, class Map> JN_DEV void rest_batch(int first, Map map, float* sums) {
    Raw again[B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
      if (has(first + j))
        again[j] = source.fetch(start, column(), (first + j) * S::STEP);
      else
        again[j] = Raw{};
    }
    float part[COUNT][B];
#pragma unroll
    for (int j = 0; j < B; ++j) {
      float f[V];
      source.values(again[j], f);
      add_up<FIRST>(has(first + j), f, map, part, j);
    }
    S::Sum::put(sums, part, first, lane);
  }
};

// ---- epilogues
// ----------------------------------------------------------------------------------------------------------

// f = f * (w + offset) + b of what there is.
template <bool W, bool B, bool OFFSET, int V>
JN_DEV void affine(float (&f)[V], const float (&w)[V], float offset, const float (&b)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (W && B)
      f[i] = fused_multiply_add(f[i], OFFSET ? w[i] + offset : w[i], b[i]);
    else if constexpr (W)
      f[i] *= OFFSET ? w[i] + offset : w[i];
    else if constexpr (B)
      f[i] += b[i];
  }
}

// y = cast(normalised * (weight + offset) + bias), columns N .. P - 1 zero. BEFORE: round to X's type before the
// weight. EARLY: fetch the weights and biases of the register slots together with the row, for a block that has nothing
// else to hide their latency.
template <class S, class X, class W, class Y, int P, bool OFFSET, bool BEFORE, bool EARLY, class B = None>
struct WeightedStore {
  static constexpr int V = S::V;
  const char* weight;
  char* y;
  float offset;
  const char* bias = nullptr;
  Chunk<W, V> early[EARLY ? S::REGS : 1];
  Chunk<B, V> early_bias[EARLY ? S::REGS : 1];

  template <class T>
  static JN_DEV void fetch_early(Chunk<T, V> (&into)[EARLY ? S::REGS : 1], const char* from, u32 lane) {
    if constexpr (EARLY && T::size > 0) {
#pragma unroll
      for (int k = 0; k < S::REGS; ++k) {
        if (S::has(k, lane))
          into[k] = load<T>(from, k, lane);
        else
          into[k] = Chunk<T, V>{};
      }
    }
  }
  JN_DEV void issue(u32 lane) {
    fetch_early<W>(early, weight, lane);
    fetch_early<B>(early_bias, bias, lane);
  }
  template <class T> static JN_DEV Chunk<T, V> load(const char* from, int k, u32 lane) {
    return load_chunk<T, V, false>(from + lane * (V * T::size) + k * S::STEP * T::size);
  }
  template <class T>
  static JN_DEV void values(const Chunk<T, V> (&held)[EARLY ? S::REGS : 1], const char* from, int k, u32 lane,
                            float (&f)[V]) {
    if (EARLY && k < S::REGS)
      widen<T, V>(held[k < S::REGS ? k : 0], f);
    else
      widen<T, V>(load<T>(from, k, lane), f);
  }
  JN_DEV void store(u64 row, u32 lane, int k, float (&f)[V]) const {
    if constexpr (BEFORE) widen<X, V>(narrow<X, V>(f), f);
    float w[V], b[V];
    if constexpr (W::size > 0) values<W>(early, weight, k, lane, w);
    if constexpr (B::size > 0) values<B>(early_bias, bias, k, lane, b);
    affine<W::size != 0, B::size != 0, OFFSET>(f, w, offset, b);
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

// meanwhile() runs once the row as loaded is no longer wanted.
template <class S, class R, class Norm, class Epilogue, class Meanwhile>
JN_DEV void finish_row(R& row, const Norm& norm, const Epilogue& epilogue, float* sums, Meanwhile meanwhile) {
  const auto state = norm.statistics(row, sums, meanwhile);
  row.each([&](int k, float (&f)[S::V]) {
#pragma unroll
    for (int i = 0; i < S::V; ++i) f[i] = norm.apply(state, f[i]);
    epilogue.store(row.row, row.lane, k, f);
  });
  if (!row.active) return;
  epilogue.finish(row.row, row.lane);
  if (row.lane == 0) norm.save(state, row.row);
}
template <class S, class R, class Norm, class Epilogue>
JN_DEV void finish_row(R& row, const Norm& norm, const Epilogue& epilogue, float* sums) {
  finish_row<S>(row, norm, epilogue, sums, [] {});
}

// FOLDED: the blocks fill a second dimension of the grid, too, and some may find no row.
template <class S, bool FOLDED, class Source, class Norm, class Epilogue>
JN_DEV void forward_rows(const Source& source, const Norm& norm, Epilogue epilogue, u64 rows) {
  const u32 thread = thread_id(), lane = S::GROUPS > 1 ? thread % S::LANES : thread,
            group = S::GROUPS > 1 ? thread / S::LANES : 0;
  float* sums = (float*)shared_memory();
  unsigned char* stash = shared_memory() + Norm::BUFFERS * S::Sum::bytes;
  const u64 first = linear_block<FOLDED>() * (S::GROUPS * S::UNROLL) + group;

  using OneRow = Row<S, Source, Norm::PIVOT>;
  auto make = [&](int u) {
    const u64 row = first + u * S::GROUPS;
    return OneRow{source, stash, row, row * S::N + lane * S::V, lane, S::TOGETHER || row < rows};
  };
  if constexpr (S::UNROLL == 1) {
    OneRow row = make(0);
    if constexpr (FOLDED || S::GROUPS > 1)
      if (S::TOGETHER && row.row >= rows) return;  // the whole block, or a wave of those that meet at no barrier
    row.issue();
    epilogue.issue(lane);
    finish_row<S>(row, norm, epilogue, sums);
  } else {
    static_assert(S::UNROLL == 2 || S::UNROLL == 4, "rows at a time");
    OneRow a = make(0), b = make(1);
    if constexpr (S::UNROLL == 4) {
      OneRow c = make(2), d = make(3);
      a.issue(), b.issue(), c.issue(), d.issue();
      epilogue.issue(lane);
      finish_row<S>(a, norm, epilogue, sums);
      finish_row<S>(b, norm, epilogue, sums);
      finish_row<S>(c, norm, epilogue, sums);
      finish_row<S>(d, norm, epilogue, sums);
    } else {
      a.issue(), b.issue();
      epilogue.issue(lane);
      finish_row<S>(a, norm, epilogue, sums);
      finish_row<S>(b, norm, epilogue, sums);
    }
  }
}

}  // namespace jaxnorm
