// RMSNorm of the sum over ranks, with or without a residual, quantised or not, on all ranks in one launch each. All
// sizes, types and options are macros (kernels/configs/distributed_hip.py sets and explains them). Matrices are dense,
// row-major; rank r owns the rows r * share ..
//   x [rows, N]: this rank's partial sum; residual [rows, N] if JN_REPLICATED, else [share, N], or null; weight [N] or
//   null values: y or codes [rows, N], or [share, N] without JN_GATHER; scale: row layout, or null; residual_out as
//   residual peers, half_bytes: the workspaces, and the size of one of their halves; error: a word of the host's memory
#include "jaxnorm/distributed.h"

#if defined(JN_ENTRY_rank_norm_fwd)
JN_ENTRY JN_BOUNDS(JN_LANES, JN_MIN_BLOCKS)
    rank_norm_fwd(const char* x, const char* residual, const char* weight, char* values, char* scale,
                  char* residual_out, jaxnorm::Peers peers, unsigned* error, unsigned long long half_bytes,
                  unsigned long long patience, unsigned rows, unsigned share, unsigned rank, unsigned signature,
                  unsigned blocks) {
  using namespace jaxnorm;
  using Shape = RowShape<JN_N, JN_V, JN_LANES, 1, 1, JN_REGS, 0>;
  using Spec = QuantSpec<JN_CODE, JN_GROUP, Exponent::JN_EXPONENT, Layout::kRow, false, JN_BOUNDED>;
  using Work =
      RankNorm<Shape, Spec, JN_X, JN_RESIDUAL, JN_WEIGHT, JN_QUANT, JN_HAS_OFFSET, JN_BEFORE_WEIGHT, JN_PACKED>;
  Work work{RmsNorm<JN_N>{JN_EPS}, weight, JN_OFFSET, JN_BOUND};
  const Buffers buffers{x, residual, weight, values, scale, residual_out};
  unsigned char* verdicts = shared_memory() + Work::shared_bytes;
  Meeting<JN_RANKS> meeting{peers, error, patience, rank, signature, (u32*)verdicts, 0};
  bool good = meeting.enter();
  if (good) {
#if JN_ONE_SHOT
    good = one_shot<JN_RANKS>(meeting, work, buffers, half_bytes, rows, blocks);
#else
    good = two_shot<JN_RANKS, JN_GATHER, JN_REPLICATED>(meeting, work, buffers, half_bytes, rows, share, blocks,
                                                        verdicts + Meeting<JN_RANKS>::verdict_bytes);
#endif
  }
  if (!good) poison<JN_RANKS, JN_ONE_SHOT, JN_GATHER, JN_REPLICATED>(work, buffers, rank, rows, share, blocks);
  meeting.leave(blocks);
}
#endif
