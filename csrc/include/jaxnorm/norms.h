// The norms of rows.h: statistics of a row on chip, and the map that they define.
#pragma once
#include "jaxnorm/gpu.h"

namespace jaxnorm {

// BUFFERS: row sums that need shared memory of their own. statistics() runs `meanwhile` once all of the row came by,
// before the barrier of its first sum. SCALES: the map is a multiplication with state.rstd, and that sum is the only
// one, so that the barrier can serve both.
// save: what the backward wants, of a row; null = nothing.

// n * rsqrt(mean(n * n) + eps)
template <int N> struct RmsNorm {
  static constexpr int BUFFERS = 1;
  static constexpr bool SCALES = true;
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
    return State{reciprocal_sqrt(fused_multiply_add(sum[0], 1.f / float(N), eps))};
  }
  static JN_DEV float apply(const State& s, float n) { return n * s.rstd; }
  JN_DEV void save(const State& s, u64 row) const {
    if (saved_rstd != nullptr) saved_rstd[row] = s.rstd;
  }
};

// m0 = mean(n), e = mean(n - m0), var = mean((n - m0)^2) - e^2; (n - m0 - e) * rsqrt(var + eps). e is what the rounding
// of m0 left: where the mean is far above the deviation, the last bits of m0 are as large as the result's.
template <int N> struct LayerNorm {
  static constexpr int BUFFERS = 3;
  static constexpr bool SCALES = false;
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
    constexpr float each = 1.f / float(N);
    float sum[1], two[2];
    row.template pass<true>([](float n, float (&acc)[1]) { acc[0] += n; }, sums, sum, meanwhile);
    const float mean = sum[0] * each;
    row.template pass<false>(
        [mean](float n, float (&acc)[2]) {
          const float d = n - mean;
          acc[0] += d;
          acc[1] = fused_multiply_add(d, d, acc[1]);
        },
        sums + R::Shape::Sum::bytes / 4, two);
    const float shift = two[0] * each;
    float var = fused_multiply_add(two[1], each, -(shift * shift));
    var = var < 0.f ? 0.f : var;  // a constant row may come out below zero; a comparison keeps NaN
    const float rstd = reciprocal_sqrt(var + eps);
    return State{mean, shift, rstd, -(shift * rstd)};
  }
  static JN_DEV float apply(const State& s, float n) { return fused_multiply_add(n - s.mean, s.rstd, s.moved); }
  JN_DEV void save(const State& s, u64 row) const {
    if (saved_rstd == nullptr) return;
    saved_mean[row] = s.mean;
    saved_shift[row] = s.shift;
    saved_rstd[row] = s.rstd;
  }
};

}  // namespace jaxnorm
