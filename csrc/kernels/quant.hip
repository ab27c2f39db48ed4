// Quantisation, alone and behind RMSNorm or LayerNorm, one launch each. All sizes, types and options are macros
// (kernels/configs/quant_hip.py sets and explains them); JN_ENTRY_<name> selects the one kernel to compile. Matrices
// are dense, row-major.
//   x [rows, N]; residual [rows, N] or null; x_bias, weight, bias, smooth [N] or null; static_scale [] or null
//   values: codes [rows, P], fp4 two a byte; columns from N on are zeros, quantised with their group
//   scale (null if static): float32 or exponents, [rows, G], [G, rows], or tiles of 32 rows, scale_rows in all
//   y [rows, P] or null: what was quantised, before the smooth scale
#include "jaxnorm/quant.h"

#if defined(JN_ENTRY_rmsnorm_quant_fwd) || defined(JN_ENTRY_layernorm_quant_fwd) || defined(JN_ENTRY_quantize_fwd)
#define JN_SHAPE jaxnorm::RowShape<JN_N, JN_V, JN_LANES, JN_GROUPS, JN_UNROLL, JN_REGS, JN_SHARED>
#define JN_SPEC                                                                                              \
  jaxnorm::QuantSpec<jaxnorm::JN_CODE, JN_GROUP, jaxnorm::Exponent::JN_EXPONENT, jaxnorm::Layout::JN_LAYOUT, \
                     JN_STATIC, JN_BOUNDED>
#if JN_DEPTH > 0
#define JN_QUANTISE jaxnorm::quantise_rows_ahead<JN_SHAPE, JN_SPEC, JN_DEPTH, JN_BLOCKS>
#else
#define JN_QUANTISE jaxnorm::quantise_rows<JN_SHAPE, JN_SPEC, JN_FOLDED>
#endif
#endif

#if defined(JN_ENTRY_rmsnorm_quant_fwd)
// y = n * rsqrt(mean(n^2) + eps) * (weight + offset), n = x or x + residual; residual_out [rows, N] as in rmsnorm_fwd
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    rmsnorm_quant_fwd(const char* x, const char* residual, const char* weight, const char* smooth,
                      const float* static_scale, unsigned long long rows, unsigned long long scale_rows, char* values,
                      char* scale, char* residual_out, char* y) {
  using namespace jaxnorm;
  using Shape = JN_SHAPE;
  using Spec = JN_SPEC;
  using Weights =
      Weighted<Shape, JN_X, JN_WEIGHT, None, JN_SMOOTH, JN_Y, JN_P, JN_HAS_OFFSET, JN_BEFORE_WEIGHT, JN_EARLY>;
#if JN_HAS_RESIDUAL || JN_PARTS > 1
  const AddSource<JN_X, JN_RESIDUAL, JN_V, JN_ROUND_RESIDUAL, JN_PARTS> source{
      x, nullptr, residual, residual_out, JN_N, rows * JN_N * JN_X::size};
#else
  const PlainSource<JN_X, JN_V> source{x, JN_N};
#endif
  JN_QUANTISE(source, RmsNorm<JN_N>{JN_EPS}, Weights{weight, nullptr, smooth, y, JN_OFFSET},
              QuantStore<Shape, Spec, JN_P>{values, scale, rows, scale_rows}, static_scale, JN_BOUND);
}
#endif

#if defined(JN_ENTRY_layernorm_quant_fwd)
// y = (a - mean) * rstd * (weight + offset) + bias, a = x + x_bias + residual; residual_out [rows, N] as in
// layernorm_fwd
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    layernorm_quant_fwd(const char* x, const char* x_bias, const char* residual, const char* weight, const char* bias,
                        const char* smooth, const float* static_scale, unsigned long long rows,
                        unsigned long long scale_rows, char* values, char* scale, char* residual_out, char* y) {
  using namespace jaxnorm;
  using Shape = JN_SHAPE;
  using Spec = JN_SPEC;
  using Weights =
      Weighted<Shape, JN_X, JN_WEIGHT, JN_BIAS, JN_SMOOTH, JN_Y, JN_P, JN_HAS_OFFSET, JN_BEFORE_WEIGHT, JN_EARLY>;
#if JN_IS_SUM
  const SumSource<JN_X, JN_X_BIAS, JN_RESIDUAL, JN_V, JN_ROUND_RESIDUAL, JN_PARTS> source{
      x, x_bias, residual, residual_out, JN_N, rows * JN_N * JN_X::size};
#else
  const SumSource<JN_X, None, None, JN_V, false> source{x, nullptr, nullptr, nullptr, JN_N};
#endif
  // Not with a residual, whose buffer other lanes may have written over by the time the pivot is read.
  using Norm = LayerNorm<JN_N, (JN_N / JN_V > kWave) && JN_RESIDUAL::size == 0>;
  JN_QUANTISE(source, Norm{JN_EPS}, Weights{weight, bias, smooth, y, JN_OFFSET},
              QuantStore<Shape, Spec, JN_P>{values, scale, rows, scale_rows}, static_scale, JN_BOUND);
}
#endif

#if defined(JN_ENTRY_quantize_fwd)
// The quantisation of y = x.
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    quantize_fwd(const char* x, const char* smooth, const float* static_scale, unsigned long long rows,
                 unsigned long long scale_rows, char* values, char* scale) {
  using namespace jaxnorm;
  using Shape = JN_SHAPE;
  using Spec = JN_SPEC;
  using Weights = Weighted<Shape, JN_X, None, None, JN_SMOOTH, None, JN_P, false, false, JN_EARLY>;
  JN_QUANTISE(PlainSource<JN_X, JN_V>{x, JN_N}, NoNorm<Shape>{}, Weights{nullptr, nullptr, smooth, nullptr, 0.f},
              QuantStore<Shape, Spec, JN_P>{values, scale, rows, scale_rows}, static_scale, JN_BOUND);
}
#endif
#undef JN_QUANTISE
#undef JN_SHAPE
#undef JN_SPEC
