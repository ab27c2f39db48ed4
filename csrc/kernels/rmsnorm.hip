// RMSNorm, with or without a residual, and its gradient. All sizes, types and options are macros
// (kernels/configs/rmsnorm_hip.py sets and explains them); JN_ENTRY_<name> selects the one kernel to compile. Matrices
// are dense, row-major.
#include "jaxnorm/norms.h"
#include "jaxnorm/rows_ahead.h"
#include "jaxnorm/rows_bwd.h"

#if JN_DEPTH > 0
#define JN_FORWARD(Shape) jaxnorm::forward_rows_ahead<Shape, JN_DEPTH, JN_BLOCKS>
#else
#define JN_FORWARD(Shape) jaxnorm::forward_rows<Shape, JN_FOLDED>
#endif

#if defined(JN_ENTRY_rmsnorm_fwd)
// y = cast(n * rsqrt(mean(n^2) + eps) * (weight + offset)), n = x or x + residual
//   x [rows, N]; residual [rows, N] or null; weight [N] or null
//   y [rows, P], columns from N on are zero; residual_out [rows, N] (may be residual's buffer) or null; rstd [rows] or
//   null
// A group of JN_LANES threads owns JN_UNROLL rows, or walks over them, JN_DEPTH rows ahead.
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    rmsnorm_fwd(const char* x, const char* residual, const char* weight, unsigned long long rows, char* y,
                char* residual_out, float* rstd) {
  using namespace jaxnorm;
  using Shape = RowShape<JN_N, JN_V, JN_LANES, JN_GROUPS, JN_UNROLL, JN_REGS, JN_SHARED>;
  using Epilogue = WeightedStore<Shape, JN_X, JN_WEIGHT, JN_Y, JN_P, JN_HAS_OFFSET, JN_BEFORE_WEIGHT, JN_EARLY>;
#if JN_HAS_RESIDUAL || JN_PARTS > 1
  const AddSource<JN_X, JN_RESIDUAL, JN_V, JN_ROUND_RESIDUAL, JN_PARTS> source{
      x, nullptr, residual, residual_out, JN_N, rows * JN_N * JN_X::size};
#else
  const PlainSource<JN_X, JN_V> source{x, JN_N};
#endif
  JN_FORWARD(Shape)(source, RmsNorm<JN_N>{JN_EPS, JN_HAS_RSTD ? rstd : nullptr}, Epilogue{weight, y, JN_OFFSET}, rows);
}
#endif

#if defined(JN_ENTRY_rmsnorm_bwd)
// xh = n * rstd; gw = dy * (weight + offset); ds = rstd * (gw - xh * mean(gw * xh)) + dresidual_out
//   n, dresidual_out [rows, N]; weight [N]; rstd [rows]; dy [rows, P]; dot [rows] if the row is cut into tiles (grid y)
//   dx = cast(ds), dresidual = cast(ds) [rows, N]; partials [programs, N]: each block's sum of dy * xh over its rows
JN_ENTRY JN_BOUNDS(JN_LANES* JN_GROUPS, JN_MIN_BLOCKS)
    rmsnorm_bwd(const char* n, const char* weight, const float* rstd, const char* dy, const char* dresidual_out,
                const float* dot, unsigned long long rows, unsigned programs, char* dx, char* dresidual,
                float* partials) {
  using namespace jaxnorm;
  using Shape = BackwardShape<JN_N, JN_V, JN_LANES, JN_GROUPS, JN_TILE, JN_TILED>;
  using Norm = RmsBackward<JN_N>;
  using Types = BackwardTypes<JN_X, None, JN_WEIGHT, JN_DY, JN_DRES_OUT, JN_DX, JN_DRES>;
  using Pipe = PipeOf<JN_PIPE_SHARED, Shape, Norm, Types, JN_DEPTH>;
  const BackwardPointers<Norm> p{n, nullptr, weight, dy, dresidual_out, {rstd}, dot, dx, dresidual, partials};
  backward_rows<Shape, Norm, Types, Pipe, ColumnSums<JN_HAS_DWEIGHT, false, false>, JN_HAS_OFFSET, JN_HOLD_WEIGHT>(
      p, JN_OFFSET, rows, programs, JN_P);
}
#endif

#if defined(JN_ENTRY_rmsnorm_bwd_dot)
// dot[row] = sum(dy * (weight + offset) * n): what rmsnorm_bwd needs of a row that is too long for one block
JN_ENTRY JN_BOUNDS(JN_LANES, JN_MIN_BLOCKS)
    rmsnorm_bwd_dot(const char* n, const char* weight, const char* dy, unsigned long long rows, float* dot) {
  using namespace jaxnorm;
  using Shape = BackwardShape<JN_N, JN_V, JN_LANES, 1, JN_N / JN_V, false>;
  using Norm = RmsBackward<JN_N>;
  const BackwardPointers<Norm> p{n, nullptr, weight, dy};
  backward_sums<Shape, Norm, BackwardTypes<JN_X, None, JN_WEIGHT, JN_DY>, JN_HAS_OFFSET>(p, JN_OFFSET, rows, JN_P, dot);
}
#endif

#if defined(JN_ENTRY_rmsnorm_bwd_reduce)
// dweight[n] = cast(sum over p of partials[p][n]), p in a fixed order
JN_ENTRY JN_BOUNDS(JN_COLUMNS* JN_SLICES, 1)
    rmsnorm_bwd_reduce(const float* partials, unsigned programs, char* dweight) {
  using namespace jaxnorm;
  const VectorGradients<JN_N, JN_V, JN_FIRST> gradients{dweight};
  add_partials<JN_N, JN_V, JN_COLUMNS, JN_SLICES>(partials, programs, block_x(), gradients);
}
#endif
