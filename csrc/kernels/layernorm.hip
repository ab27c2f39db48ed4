// LayerNorm, with or without a bias of x and a residual, and its gradient. All sizes, types and options are macros
// (kernels/configs/layernorm_hip.py sets and explains them); JN_ENTRY_<name> selects the one kernel to compile.
// Matrices are dense, row-major. mean and shift are the two parts of a row's mean (norms.h).
#include "jaxnorm/norms.h"
#include "jaxnorm/rows_ahead.h"
#include "jaxnorm/rows_bwd.h"

#if JN_DEPTH > 0
#define JN_FORWARD(Shape) jaxnorm::forward_rows_ahead<Shape, JN_DEPTH, JN_BLOCKS>
#else
#define JN_FORWARD(Shape) jaxnorm::forward_rows<Shape, JN_FOLDED>
#endif

#if defined(JN_ENTRY_layernorm_fwd)
// a = x + x_bias + residual; y = cast((a - mean) * rstd * (weight + offset) + bias)
//   x [rows, N]; residual [rows, N] or null; x_bias, weight, bias [N] or null
//   y [rows, P], columns from N on are zero; residual_out [rows, N] (may be residual's buffer) or null; mean, shift,
//   rstd [rows] or null
// A group of JN_LANES threads owns JN_UNROLL rows, or walks over them, JN_DEPTH rows ahead.
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    layernorm_fwd(const char* x, const char* x_bias, const char* residual, const char* weight, const char* bias,
                  unsigned long long rows, char* y, char* residual_out, float* mean, float* shift, float* rstd) {
  using namespace jaxnorm;
  using Shape = RowShape<JN_N, JN_V, JN_LANES, JN_GROUPS, JN_UNROLL, JN_REGS, JN_SHARED>;
  using Epilogue =
      WeightedStore<Shape, JN_X, JN_WEIGHT, JN_Y, JN_P, JN_HAS_OFFSET, JN_BEFORE_WEIGHT, JN_EARLY, JN_BIAS>;
#if JN_IS_SUM
  const SumSource<JN_X, JN_X_BIAS, JN_RESIDUAL, JN_V, JN_ROUND_RESIDUAL, JN_PARTS> source{
      x, x_bias, residual, residual_out, JN_N, rows * JN_N * JN_X::size};
#else
  const PlainSource<JN_X, JN_V> source{x, JN_N};
#endif
  // Not with a residual, whose buffer other lanes may have written over by the time the pivot is read.
  using Norm = LayerNorm<JN_N, (JN_N / JN_V > kWave) && JN_RESIDUAL::size == 0>;
#if JN_HAS_RSTD
  const Norm norm{JN_EPS, mean, shift, rstd};
#else
  const Norm norm{JN_EPS};
#endif
  JN_FORWARD(Shape)(source, norm, Epilogue{weight, y, JN_OFFSET, bias}, rows);
}
#endif

#if defined(JN_ENTRY_layernorm_bwd)
// xh = (n + x_bias - mean) * rstd; gw = dy * (weight + offset)
// ds = rstd * (gw - xh * mean(gw * xh) - mean(gw)) + dresidual_out
//   n, dresidual_out [rows, N]; x_bias, weight [N]; mean, shift, rstd [rows]; dy [rows, P]; dot [rows, 2] if the row is
//   cut into tiles (grid y)
//   dx = cast(ds), dresidual = cast(ds) [rows, N]; partials [programs, k, N]: each block's sums over its rows of those
//   wanted of dy * xh, dy, ds
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    layernorm_bwd(const char* n, const char* x_bias, const char* weight, const float* mean, const float* shift,
                  const float* rstd, const char* dy, const char* dresidual_out, const float* dot,
                  unsigned long long rows, unsigned programs, char* dx, char* dresidual, float* partials) {
  using namespace jaxnorm;
  using Shape = BackwardShape<JN_N, JN_V, JN_LANES, JN_GROUPS, JN_TILE, JN_TILED>;
  using Norm = LayerBackward<JN_N>;
  using Types = BackwardTypes<JN_X, JN_X_BIAS, JN_WEIGHT, JN_DY, JN_DRES_OUT, JN_DX, JN_DRES>;
  using Pipe = PipeOf<JN_PIPE_SHARED, Shape, Norm, Types, JN_DEPTH>;
  const BackwardPointers<Norm> p{n,   x_bias, weight,    dy,      dresidual_out, {rstd, mean, shift},
                                 dot, dx,     dresidual, partials};
  backward_rows<Shape, Norm, Types, Pipe, ColumnSums<JN_HAS_DWEIGHT, JN_HAS_DBIAS, JN_HAS_DX_BIAS>, JN_HAS_OFFSET,
                JN_HOLD_WEIGHT>(p, JN_OFFSET, rows, programs, JN_P);
}
#endif

#if defined(JN_ENTRY_layernorm_bwd_dot)
// dot[row] = (sum(gw * (n + x_bias - mean)), sum(gw)): what layernorm_bwd needs of a row that is too long for one block
JN_ENTRY JN_BOUNDS(JN_LANES, JN_MIN_BLOCKS)
    layernorm_bwd_dot(const char* n, const char* x_bias, const char* weight, const float* mean, const char* dy,
                      unsigned long long rows, float* dot) {
  using namespace jaxnorm;
  using Shape = BackwardShape<JN_N, JN_V, JN_LANES, 1, JN_N / JN_V, false>;
  using Norm = LayerBackward<JN_N>;
  const BackwardPointers<Norm> p{n, x_bias, weight, dy, nullptr, {nullptr, mean, nullptr}};
  backward_sums<Shape, Norm, BackwardTypes<JN_X, JN_X_BIAS, JN_WEIGHT, JN_DY>, JN_HAS_OFFSET>(p, JN_OFFSET, rows, JN_P,
                                                                                              dot);
}
#endif

#if defined(JN_ENTRY_layernorm_bwd_reduce)
// The JN_VECTORS gradients that are wanted, [N] each: cast(sum over p of partials[p][i]), p in a fixed order
JN_ENTRY JN_BOUNDS(JN_COLUMNS* JN_SLICES, 1)
    layernorm_bwd_reduce(const float* partials, unsigned programs, char* first, char* second, char* third) {
  using namespace jaxnorm;
  const VectorGradients<JN_N, JN_V, JN_FIRST, JN_SECOND, JN_THIRD> gradients{first, second, third};
  add_partials<JN_VECTORS * JN_N, JN_V, JN_COLUMNS, JN_SLICES>(partials, programs, block_x(), gradients);
}
#endif
