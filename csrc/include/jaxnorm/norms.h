// The norms of rows.h: statistics of a row on chip, and the map that they define.
#pragma once
#include "jaxnorm/gpu.h"

namespace jaxnorm {

// Whether LayerNorm sums again in a loop. gfx9 would keep half of its waves (256x65536: 169 registers instead of 110).
#if defined(JN_AMD) || (defined(JN_SIMT) && JN_WAVE == 64)
constexpr bool kSumsInLoop = false;
#else
constexpr bool kSumsInLoop = true;
#endif

// BUFFERS: row sums that need shared memory of their own. ONCE: one barrier a row, between their writing and their
// reading. statistics() runs `meanwhile` once all of the row came by, before the barrier of its first sum. SCALES: the
// map is a multiplication with state.rstd, and that sum is the only one, so that the barrier can serve both. PIVOT:
// statistics() wants Row::pivot().
// save: what the backward wants, of a row; null = nothing.

// n * rsqrt(mean(n * n) + eps)
template <int N> struct RmsNorm {
  static constexpr int BUFFERS = 1;
  static constexpr bool ONCE = true, SCALES = true, PIVOT = false;
  float eps;
  float* saved_rstd = nullptr;
  struct State {
    float rstd;
  };
  template <class R> JN_DEV State statistics(R& row, float* sums) const {
    return statistics(row, sums, [] {});
  }
  template <class R, class Meanwhile> JN_DEV State statistics(R& row, float* sums, Meanwhile meanwhile) const {
    float sum[1];
    row.template pass<true>([](float n, float (&acc)[1]) { acc[0] = fused_multiply_add(n, n, acc[0]); }, sums, sum,
                            meanwhile);
    return State{reciprocal_sqrt(fused_multiply_add(sum[0], 1.f / float(N), eps), eps)};
  }
  static JN_DEV float apply(const State& s, float n) { return n * s.rstd; }
  JN_DEV void save(const State& s, u64 row) const {
    if (saved_rstd != nullptr) saved_rstd[row] = s.rstd;
  }
};

// e = mean(n - m0), var = mean((n - m0)^2) - e^2; (n - m0 - e) * rsqrt(var + eps).
// m0 = mean(n), and e is what its rounding left: where the mean is far above the deviation, the last bits of m0 are as
// large as the result's. PIVOT: m0 is a value of the row, which needs no exchange before the one that gives e and var.
// Where it lies more than two deviations from the mean, and var would lose bits to e^2, the row is summed again about
// m0 + e. (Found in float32 models: errors up to 5e-7 of the result, 2e-7 without PIVOT.)
template <int N, bool PIVOT_ = false> struct LayerNorm {
  static constexpr int BUFFERS = PIVOT_ ? 2 : 3;
  static constexpr bool ONCE = PIVOT_, SCALES = false, PIVOT = PIVOT_;
  float eps;
  float* saved_mean = nullptr;
  float* saved_shift = nullptr;
  float* saved_rstd = nullptr;
  struct State {
    float mean, shift, rstd, moved;
  };
  template <class R> JN_DEV State statistics(R& row, float* sums) const {
    return statistics(row, sums, [] {});
  }
  template <class R, class Meanwhile> JN_DEV State statistics(R& row, float* sums, Meanwhile meanwhile) const {
    using Sum = typename R::Shape::Sum;
    float two[2], mean;
    if constexpr (PIVOT) {
      static_assert(Sum::virtual_waves > 1, "the rows of a wave would part ways");
      mean = row.pivot();
      sum_about_value(row, sums, two, mean, meanwhile);
    } else {
      float sum[1];
      row.template pass<true>([](float n, float (&acc)[1]) { acc[0] += n; }, sums, sum, meanwhile);
      mean = sum[0] * (1.f / float(N));
      row.template pass<false>(Deviation{mean}, sums + Sum::bytes / 4, two);
    }
    const Moments found = moments(two);
    const float rstd = reciprocal_sqrt((found.var < 0.f ? 0.f : found.var) + eps, eps);  // a comparison keeps NaN
    return State{mean, found.shift, rstd, -(found.shift * rstd)};
  }
  static JN_DEV float apply(const State& s, float n) { return fused_multiply_add(n - s.mean, s.rstd, s.moved); }
  JN_DEV void save(const State& s, u64 row) const {
    if (saved_rstd == nullptr) return;
    saved_mean[row] = s.mean;
    saved_shift[row] = s.shift;
    saved_rstd[row] = s.rstd;
  }

 private:
  // The sums about a value of the row, and once more about m0 + e where that is far away.
  template <class R, class Meanwhile>
  static JN_DEV void sum_about_value(R& row, float* sums, float (&two)[2], float& mean, Meanwhile meanwhile) {
    using Sum = typename R::Shape::Sum;
    if constexpr (kSumsInLoop && R::Shape::REGS == R::Shape::PER) {
      // A loop over what is fetched again: what hardly ever runs is no second copy of the code and holds no registers.
#pragma unroll 1
      for (bool again = false;; again = true) {
        row.template pass<true>(Deviation{mean}, sums, two, [&] {
          if (!again) meanwhile();
        });
        const Moments found = moments(two);
        // The same for all threads of the row, which the vote shows the compiler: it keeps exchanges of lanes plain.
        if (again || !any_lane(found.far())) break;
        mean += found.shift;
        row.fetch_again();
        if constexpr (!Sum::in_wave) barrier();  // all have read the sums
      }
    } else {
      row.template pass<true>(Deviation{mean}, sums, two, meanwhile);
      const Moments found = moments(two);
      if (found.far()) {
        mean += found.shift;
        if constexpr (!Sum::in_wave) barrier();
        row.template pass<false>(Deviation{mean}, sums, two);
      }
    }
  }
  struct Deviation {
    float mean;
    JN_DEV void operator()(float n, float (&acc)[2]) const {
      const float d = n - mean;
      acc[0] += d;
      acc[1] = fused_multiply_add(d, d, acc[1]);
    }
  };
  struct Moments {
    float shift, var;  // of a constant row var may come out below zero
    JN_DEV bool far() const { return shift * shift > 4.f * var; }
  };
  static JN_DEV Moments moments(const float (&two)[2]) {
    constexpr float each = 1.f / float(N);
    const float shift = two[0] * each;
    return Moments{shift, fused_multiply_add(two[1], each, -(shift * shift))};
  }
};

}  // namespace jaxnorm
