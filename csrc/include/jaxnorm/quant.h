// Quantising epilogue of the row kernels: z = y * smooth; a = max|z| over the row or a group, NaN wins; s = a / top or
// a power of two; code = round(z / s).
//
// A thread keeps z of its register slots in float32 between the maximum and the codes; slots that wait in shared memory
// or are read again give z twice. A maximum has the same bits in any order, so only the sum of the norm (reduce.h)
// needs a fixed one.
#pragma once
#include "jaxnorm/norms.h"
#include "jaxnorm/quant_io.h"

namespace jaxnorm {

// ---- one row

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <int I> struct Counter {};

template <class S, class Q, class Source, class Norm, class Weights, class Store> struct QuantRow {
  using OneRow = Row<S, Source, Norm::PIVOT>;
  using Stashed = typename OneRow::Stashed;
  static constexpr int V = S::V, REGS = S::REGS, LANES = S::LANES, SLOTS = S::REGS + S::SHARED;
  // Chunks of a group; 0 = the row is the group. A group lies within the lanes of a slot, or it is several slots of a
  // wave, or the waves must meet in shared memory.
  static constexpr int GROUP = Q::GROUP / V, VIRTUAL_WAVES = ceil_div(S::CHUNKS, kWave);
  static constexpr bool whole = Q::GROUP == 0, in_wave = S::Sum::in_wave, in_slot = GROUP <= min_of(LANES, kWave);
  static constexpr int RUN = max_of(1, GROUP / LANES);  // slots of a group, in a wave
  static constexpr int entries = Q::STATIC || in_wave ? 0 : whole ? LANES / kWave : in_slot ? 0 : VIRTUAL_WAVES;
  static constexpr int bytes = ceil_div(entries, 4) * 16;  // of shared memory for maxima
  // z waits for its factor rstd, so that the maxima are exchanged together with the sum, and the codes do not need z
  // times rstd at all: its product with a power of two, or none for a float32 scale.
  static constexpr bool deferred = !Q::STATIC && !Q::BOUNDED && Norm::SCALES && Weights::multiplies;
  // Groups within a slot: BATCH slots at a time, whose scales the lanes of a group divide among them.
  static constexpr bool divided = kDividesScales && in_slot && !whole && !Q::STATIC && GROUP > 1 && REGS > 1;
  static constexpr int BATCH = divided ? min_of(next_power_of_2(REGS), GROUP) : 1, BATCHES = ceil_div(REGS, BATCH);

  OneRow& row;
  const Norm& norm;
  const Weights& weights;
  const Store& store;
  float* maxima;
  typename Norm::State state{};

  template <bool REGISTER, bool FINAL> JN_DEV void to_z(int k, float (&f)[V]) const {
    if constexpr (!deferred) {
#pragma unroll
      for (int i = 0; i < V; ++i) f[i] = norm.apply(state, f[i]);
    }
    weights.template z<REGISTER, FINAL>(row.row, row.lane, k, row.has(k), f);
  }
  JN_DEV void encode_slot(int k, float (&z)[V], const Scale<Q>& scale) const {
    scale.apply(z);
    store.store_codes(row.row, row.lane, k, row.has(k), z);
  }
  JN_DEV float slot_max(int k, const float (&z)[V]) const { return row.has(k) ? chunk_max(z) : 0.f; }

  // use(k, z) for every chunk behind the register slots. All lanes come along, because use may shuffle. FINAL: the
  // chunk is not looked at again.
  template <bool FINAL, class Use> JN_DEV void each_late(Use use) const {
#pragma unroll 2
    for (int k = REGS; k < SLOTS; ++k) {
      float f[V] = {};
      if (row.has(k)) row.source.values(row.stashed(k), f);
      to_z<false, FINAL>(k, f);
      use(k, f);
    }
#pragma unroll 2
    for (int k = SLOTS; k < S::PER; ++k) {
      float f[V] = {};
      if (row.has(k)) {
        row.source.values(row.source.fetch(row.start, row.column(), k * S::STEP), f);
        if (FINAL) row.source.settle(f, row.start, k * S::STEP);
      }
      to_z<false, FINAL>(k, f);
      use(k, f);
    }
  }

  // then() is called when no chunk of the row is wanted any more but those of the registers.
  template <class Then> JN_DEV void run(float* sums, const float* static_scale, float bound, Then then) {
    float z[REGS][V], a[REGS];
    if constexpr (deferred) {
      state = norm.statistics(row, sums, [&] {
        make_z(z);
        find_maxima(z, a);
      });
      then();
    } else {
      state = norm.statistics(row, sums);
      then();
      make_z(z);
      find_maxima(z, a);
      if constexpr (entries > 0) barrier();
    }
    quantise(z, a, static_scale, bound);
    if (!row.active) return;
    store.finish_row(row.row, row.lane);
    weights.finish_row(row.row, row.lane);
  }

 private:
  JN_DEV void make_z(float (&z)[REGS][V]) const {
#pragma unroll
    for (int k = 0; k < REGS; ++k) {
      if constexpr (same<typename Source::Kept, typename Source::Raw>)
        row.source.values(row.kept[k], z[k]);  // the bits stay no longer than z: no need to unpack them again
      else
        row.source.kept_values(row.kept[k], z[k]);
      to_z<true, true>(k, z[k]);
    }
  }
  JN_DEV Scale<Q> scale_of(float a, float bound) const {
    if constexpr (deferred)
      return Scale<Q>::of_scaled_max(a, state.rstd);
    else
      return Scale<Q>::of_max(a, bound);
  }

  // Maxima over what a lane can see of its groups, or the row; those of several waves go to shared memory, which takes
  // a barrier. a: by slot, batch, or a[0] of the row.
  JN_DEV void find_maxima(const float (&z)[REGS][V], float (&a)[REGS]) const {
    if constexpr (Q::STATIC) {
      return;
    } else if constexpr (whole) {
      a[0] = lane_max(z);
      put_max(a[0]);
    } else if constexpr (divided) {
#pragma unroll
      for (int b = 0; b < BATCHES; ++b) {
        float v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int k = b * BATCH + i;
          v[i] = k < REGS ? slot_max(k, z[min_of(k, REGS - 1)]) : 0.f;
        }
        a[b] = packed_max<GROUP>(v, row.lane);
      }
    } else if constexpr (in_slot) {  // all shuffles first: they wait together
#pragma unroll
      for (int k = 0; k < REGS; ++k) a[k] = lanes_max<GROUP>(slot_max(k, z[k]));
    } else if constexpr (in_wave) {
#pragma unroll
      for (int k = 0; k < REGS; ++k) {
        a[k] = slot_max(k, z[k]);
        if (k % RUN > 0) a[k] = max_or_nan(a[k], a[k - 1]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < REGS; ++k) put_slot(k, z[k]);
      each_late<false>([&](int k, float (&f)[V]) { put_slot(k, f); });
    }
  }
  JN_DEV void quantise(float (&z)[REGS][V], const float (&a)[REGS], const float* static_scale, float bound) const {
    if constexpr (Q::STATIC) {
      encode_all(z, Scale<Q>::fixed(static_scale));
    } else if constexpr (whole) {
      const Scale<Q> scale = scale_of(get_max(a[0]), bound);
      if (row.active && row.lane == 0) store.store_scale(row.row, 0, scale.stored);
      encode_all(z, scale);
    } else if constexpr (in_slot) {
      if constexpr (divided) {
#pragma unroll
        for (int b = 0; b < BATCHES; ++b) encode_batch(b * BATCH, z, scale_of(a[b], bound), Counter<0>{});
      } else {
#pragma unroll
        for (int k = 0; k < REGS; ++k) encode_group(k, z[k], a[k], bound);
      }
      each_late<true>([&](int k, float (&f)[V]) { encode_group(k, f, lanes_max<GROUP>(slot_max(k, f)), bound); });
    } else if constexpr (in_wave) {
#pragma unroll
      for (int k = 0; k < REGS; ++k) {
        constexpr int last = REGS - 1;
        const int end = min_of(k / RUN * RUN + RUN - 1, last);
        encode_group(k, z[k], lanes_max<LANES>(a[end]), bound);
      }
    } else {
#pragma unroll
      for (int k = 0; k < REGS; ++k) encode_group(k, z[k], entries_max(k), bound);
      each_late<true>([&](int k, float (&f)[V]) { encode_group(k, f, entries_max(k), bound); });
    }
  }
  JN_DEV void encode_all(float (&z)[REGS][V], const Scale<Q>& scale) const {
#pragma unroll
    for (int k = 0; k < REGS; ++k) encode_slot(k, z[k], scale);
    each_late<true>([&](int k, float (&f)[V]) { encode_slot(k, f, scale); });
  }
  JN_DEV void encode_group(int k, float (&z)[V], float a, float bound) const {
    const Scale<Q> scale = scale_of(a, bound);
    const u32 chunk = k * LANES + row.lane;
    if (row.has(k) && chunk % GROUP == 0) store.store_scale(row.row, chunk / GROUP, scale.stored);
    encode_slot(k, z, scale);
  }
  // Slots first .. first + BATCH - 1, of which this lane has the scale of one.
  JN_DEV void encode_batch(int first, float (&z)[REGS][V], const Scale<Q>& mine, Counter<0>) const {
    const int k = first + max_index<GROUP, BATCH>(row.lane);
    if (k < REGS && row.has(k) && row.lane % (GROUP / BATCH) == 0)
      store.store_scale(row.row, (k * LANES + row.lane) / GROUP, mine.stored);
    if (any_lane(!mine.direct)) lift_slots(first, z, mine, Counter<0>{});
    encode_slots(first, z, mine, Counter<0>{});
  }
  template <int I> JN_DEV void lift_slots(int first, float (&z)[REGS][V], const Scale<Q>& mine, Counter<I>) const {
    if constexpr (I < BATCH) {
      if (first + I < REGS) mine.template lift_from_lane<GROUP, max_lane(GROUP, I)>(z[min_of(first + I, REGS - 1)]);
      lift_slots(first, z, mine, Counter<I + 1>{});
    }
  }
  template <int I> JN_DEV void encode_slots(int first, float (&z)[REGS][V], const Scale<Q>& mine, Counter<I>) const {
    if constexpr (I < BATCH) {
      if (first + I < REGS)
        encode_slot(first + I, z[min_of(first + I, REGS - 1)], mine.template from_lane<GROUP, max_lane(GROUP, I)>());
      encode_slots(first, z, mine, Counter<I + 1>{});
    }
  }
  JN_DEV void put_slot(int k, const float (&z)[V]) const {
    const float a = lanes_max<kWave>(slot_max(k, z));
    const u32 entry = k * (LANES / kWave) + row.lane / kWave;
    if (row.lane % kWave == 0 && entry < u32(VIRTUAL_WAVES)) maxima[entry] = a;
  }
  // Over the lanes of a row in this wave, ...
  JN_DEV float lane_max(const float (&z)[REGS][V]) const {
    float a = slot_max(0, z[0]);
#pragma unroll
    for (int k = 1; k < REGS; ++k) a = max_or_nan(a, slot_max(k, z[k]));
    each_late<false>([&](int k, float (&f)[V]) { a = max_or_nan(a, slot_max(k, f)); });
    return lanes_max<min_of(LANES, kWave)>(a);
  }
  // ... from wave to wave, with a barrier in between.
  JN_DEV void put_max(float a) const {
    if constexpr (!in_wave) {
      if (row.lane % kWave == 0) maxima[row.lane / kWave] = a;
    }
  }
  JN_DEV float get_max(float a) const {
    if constexpr (!in_wave) {
      constexpr int waves = LANES / kWave, slots = next_power_of_2(waves);
      if constexpr (waves <= (kWaveMax ? 4 : 8)) {
        a = maxima[0];
#pragma unroll
        for (int i = 1; i < waves; ++i) a = max_or_nan(a, maxima[i]);
      } else {
        const u32 i = row.lane % slots;
        a = lanes_max<kWaveMax ? kWave : slots>(i < u32(waves) ? maxima[i] : 0.f);
      }
    }
    return a;
  }
  // The group of slot k from the maxima of the virtual waves.
  JN_DEV float entries_max(int k) const {
    constexpr u32 run = max_of(1, GROUP / kWave);
    const u32 first = (k * (LANES / kWave) + row.lane / kWave) / run * run;
    float a = 0.f;
    for (u32 i = first; i < first + run && i < u32(VIRTUAL_WAVES); ++i) a = max_or_nan(a, maxima[i]);
    return a;
  }
};

// ---- the kernel

// FOLDED: as for forward_rows
template <class S, class Q, bool FOLDED, class Source, class Norm, class Weights, class Store>
JN_DEV void quantise_rows(const Source& source, const Norm& norm, Weights weights, const Store& store,
                          const float* static_scale, float bound) {
  const u32 thread = thread_id(), lane = S::GROUPS > 1 ? thread % S::LANES : thread,
            group = S::GROUPS > 1 ? thread / S::LANES : 0;
  using Work = QuantRow<S, Q, Source, Norm, Weights, Store>;
  using OneRow = typename Work::OneRow;
  float* sums = (float*)shared_memory();
  constexpr int sum_bytes = Norm::BUFFERS * S::Sum::bytes;
  float* maxima = (float*)(shared_memory() + sum_bytes);
  unsigned char* stash = shared_memory() + sum_bytes + Work::bytes;
  const u64 rows = store.rows, first = linear_block<FOLDED>() * (S::GROUPS * S::UNROLL) + group;

  auto make = [&](int u) {
    const u64 row = first + u * S::GROUPS;
    return OneRow{source, stash, row, row * S::N + lane * S::V, lane, S::TOGETHER || row < rows};
  };
  auto finish = [&](OneRow& row) { Work{row, norm, weights, store, maxima}.run(sums, static_scale, bound, [] {}); };
  OneRow a = make(0);
  if constexpr (S::UNROLL == 1) {
    if constexpr (FOLDED || S::GROUPS > 1) {
      if (S::TOGETHER && a.row >= rows) {  // the whole block, or a wave of those that meet at no barrier
        if constexpr (S::Sum::in_wave) store.pad_rows();
        return;
      }
    }
    a.issue();
    weights.issue(lane);
    store.pad_rows();
    finish(a);
  } else {
    static_assert(S::UNROLL == 2 || S::UNROLL == 4, "rows at a time");
    OneRow b = make(1);
    if constexpr (S::UNROLL == 4) {
      OneRow c = make(2), d = make(3);
      a.issue(), b.issue(), c.issue(), d.issue();
      weights.issue(lane);
      store.pad_rows();
      finish(a), finish(b), finish(c), finish(d);
    } else {
      a.issue(), b.issue();
      weights.issue(lane);
      store.pad_rows();
      finish(a), finish(b);
    }
  }
}

// BLOCKS blocks walk over the rows; the next DEPTH rows of each are on their way to shared memory meanwhile. A slot
// there is filled again once the sum of its row, which takes all of it, is done. Two buffers for sums and for maxima,
// in turn: a barrier stands between the writing and the reading of one, none between its reading and the next writing.
template <class S, class Q, int DEPTH, int BLOCKS, class Source, class Norm, class Weights, class Store>
JN_DEV void quantise_rows_ahead(const Source& source, const Norm& norm, Weights weights, const Store& store,
                                const float* static_scale, float bound) {
  static_assert(S::REGS == S::PER && S::UNROLL == 1, "whole rows in registers");
  using Work = QuantRow<S, Q, Source, Norm, Weights, Store>;
  using OneRow = typename Work::OneRow;
  using Stashed = typename Work::Stashed;
  constexpr int slot_bytes = S::REGS * Stashed::footprint, sum_bytes = Norm::BUFFERS * S::Sum::bytes;
  const u32 thread = thread_id(), lane = S::GROUPS > 1 ? thread % S::LANES : thread,
            group = S::GROUPS > 1 ? thread / S::LANES : 0;
  constexpr int exchange = sum_bytes + Work::bytes;  // sums, then maxima
  unsigned char* stash = shared_memory() + 2 * exchange;
  const u64 rows = store.rows, stride = u64(BLOCKS) * S::GROUPS;

  auto fetch = [&](u64 row, u32 slot) {
#pragma unroll
    for (int k = 0; k < S::REGS; ++k)
      if (row < rows && S::has(k, lane))
        Stashed::fetch(source, stash + slot * slot_bytes + k * Stashed::footprint, thread, row * S::N + lane * S::V,
                       k * S::STEP);
    async_commit();
  };
  const u64 begin = u64(block_x()) * S::GROUPS;
#pragma unroll
  for (int ahead = 0; ahead < DEPTH; ++ahead) fetch(begin + ahead * stride + group, ahead);
  weights.issue(lane);
  store.template pad_rows<BLOCKS>();
  typename OneRow::Raw next;
  if constexpr (Norm::PIVOT)
    if (begin + group < rows) next = source.fetch((begin + group) * S::N, 0, 0);
  u32 slot = 0, buffer = 0;
#pragma unroll 1
  for (u64 first = begin; first < rows; first += stride) {  // the same for all threads of the block
    const u64 row = first + group;
    OneRow one{source, stash, row, row * S::N + lane * S::V, lane, S::GROUPS == 1 || row < rows};
    if constexpr (Norm::PIVOT) {
      one.first = next;
      if (row + stride < rows) next = source.fetch((row + stride) * S::N, 0, 0);
    }
    async_wait<DEPTH - 1>();
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      if (one.has(k))
        one.raw[k] = Stashed::read(source, stash + slot * slot_bytes + k * Stashed::footprint, thread, one.column(),
                                   k * S::STEP);
      else
        one.raw[k] = typename OneRow::Raw{};
    }
    float* maxima = (float*)(shared_memory() + buffer + sum_bytes);
    Work{one, norm, weights, store, maxima}.run((float*)(shared_memory() + buffer), static_scale, bound,
                                                [&] { fetch(row + DEPTH * stride, slot); });
    slot = slot == DEPTH - 1 ? 0 : slot + 1;
    buffer = exchange - buffer;
  }
}

}  // namespace jaxnorm
