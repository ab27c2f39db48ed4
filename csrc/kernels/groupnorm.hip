// GroupNorm with an optional SiLU, and its gradient. All sizes, types and options are macros
// (kernels/configs/groupnorm_hip.py sets and explains them); JN_ENTRY_<name> selects the one kernel to compile. Arrays
// are dense: [batch, S, C] with channels last, [batch, C, S] with channels first.
#include "jaxnorm/groups_bwd.h"
#include "jaxnorm/groups_bwd_cluster.h"
#include "jaxnorm/groups_bwd_held.h"
#include "jaxnorm/groups_cluster.h"
#include "jaxnorm/groups_fwd.h"
#include "jaxnorm/groups_held.h"
#include "jaxnorm/rows_bwd.h"

#undef JN_MAP
#if JN_LAST
#define JN_MAP jaxnorm::LastMap<JN_S, JN_C, JN_CG, JN_V, JN_TILE, JN_Q, JN_K, JN_PART>
#else
#define JN_MAP jaxnorm::FirstMap<JN_S, JN_C, JN_CG, JN_V, JN_THREADS, JN_K, JN_PART>
#endif

#if defined(JN_ENTRY_groupnorm_fwd)
// y = act((x - mean) * rsqrt(var + eps) * weight + bias), a block reading whole groups once
//   x, y [batch, S, C]; weight, bias [C] or null; stats [batch, 3, C] float32 (m, low, rstd) or null
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS) groupnorm_fwd(const char* x, const char* weight, const char* bias,
                                                            unsigned long long batches, char* y, float* stats) {
  using namespace jaxnorm;
  using Store = AffineStore<JN_MAP, JN_WEIGHT, JN_BIAS, JN_Y, JN_SILU>;
  group_norm<JN_MAP, JN_X>(x, Store{weight, bias, y}, JN_EPS, batches, JN_HAS_STATS ? stats : nullptr);
}
#endif

#if defined(JN_ENTRY_groupnorm_cluster)
// the same by clusters of JN_CLUSTER blocks, each of which holds a part of the group
JN_ENTRY JN_CLUSTER_OF(JN_CLUSTER) JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_cluster(const char* x, const char* weight, const char* bias, unsigned long long batches, char* y,
                      float* stats) {
  using namespace jaxnorm;
  static_assert(JN_MAP::PARTS == JN_CLUSTER, "a part to a block");
  using Store = AffineStore<JN_MAP, JN_WEIGHT, JN_BIAS, JN_Y, JN_SILU>;
  group_norm_cluster<JN_MAP, JN_X, Store, JN_SLOTS>(x, Store{weight, bias, y}, JN_EPS, batches,
                                                    JN_HAS_STATS ? stats : nullptr);
}
#endif

#if defined(JN_ENTRY_groupnorm_held)
// the same by teams of blocks that run at the same time, each with JN_EACH parts of JN_WAVES
// teams; words: group_norm_held's, 16 bytes
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_held(const char* x, const char* weight, const char* bias, unsigned long long batches, char* y,
                   float* stats, char* words) {
  using namespace jaxnorm;
  using Store = AffineStore<JN_MAP::Whole<JN_EACH>, JN_WEIGHT, JN_BIAS, JN_Y, JN_SILU, true>;
  group_norm_held<JN_MAP, JN_X, Store, JN_EACH, JN_WAVES, JN_SLOTS, JN_REGISTERS>(
      x, Store{weight, bias, y}, JN_EPS, batches, words, JN_HAS_STATS ? stats : nullptr);
}
#endif

#if defined(JN_ENTRY_groupnorm_partials)
// partials [batch * G, 2 or 3, PARTS] float32 of x
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_partials(const char* x, unsigned long long batches, float* partials) {
  using namespace jaxnorm;
  group_partials<JN_MAP, JN_X, JN_LOW>(x, batches, partials);
}
#endif

#if defined(JN_ENTRY_groupnorm_apply)
// y (and stats) from x and its partials
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_apply(const char* x, const char* weight, const char* bias, const float* partials,
                    unsigned long long batches, char* y, float* stats) {
  using namespace jaxnorm;
  using Store = AffineStore<JN_MAP, JN_WEIGHT, JN_BIAS, JN_Y, JN_SILU>;
  group_apply<JN_MAP, JN_X, Store, JN_LOW>(x, partials, Store{weight, bias, y}, JN_EPS, batches,
                                           JN_HAS_STATS ? stats : nullptr);
}
#endif

#if defined(JN_ENTRY_groupnorm_bwd_sums)
// partials [batch * PARTS, 2, C] (or null) and shares [batch * G, 2, shares] of x, dy and the saved stats
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_bwd_sums(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                       unsigned long long batches, float* partials, float* shares) {
  using namespace jaxnorm;
  const SumsOut out{JN_HAS_PARTIALS ? partials : nullptr, shares};
#if JN_LAST
  group_bwd_sums<JN_MAP, JN_X, JN_DY, JN_WEIGHT, JN_BIAS, JN_SILU>(x, dy, weight, bias, stats, batches, out);
#else
  using Map = ChannelMap<JN_S, JN_C, JN_CG, JN_V, JN_LANES, JN_LINES, JN_K, JN_PART>;
  group_bwd_rows<Map, JN_X, JN_DY, JN_WEIGHT, JN_BIAS, JN_SILU>(x, dy, weight, bias, stats, batches, out);
#endif
}
#endif

#if defined(JN_ENTRY_groupnorm_bwd_dx)
// dx from x, dy, stats and shares; and by the first JN_ADDERS blocks dweight and dbias [C] from partials, in a fixed
// order
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_bwd_dx(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                     const float* shares, const float* partials, unsigned long long batches, unsigned programs,
                     char* dx, char* dweight, char* dbias) {
  using namespace jaxnorm;
  using Gradients = VectorGradients<JN_C, JN_ADD_V, JN_DWEIGHT, JN_DBIAS>;
  if (linear_block() < JN_ADDERS) {
    wait_for_launch_before();
    for (u32 columns = block_x(); columns * (JN_COLUMNS * JN_ADD_V) < 2 * JN_C; columns += JN_ADDERS)
      add_partials<2 * JN_C, JN_ADD_V, JN_COLUMNS, JN_SLICES>(partials, programs, columns, Gradients{dweight, dbias});
    return;
  }
  group_bwd_dx<JN_MAP, JN_X, JN_DY, JN_WEIGHT, JN_BIAS, JN_DX, JN_SILU, JN_SHARES>(x, dy, weight, bias, stats, shares,
                                                                                   batches, dx, JN_ADDERS);
}
#endif

#if defined(JN_ENTRY_groupnorm_bwd_cluster)
// dx, dweight and dbias [C] from x, dy and the saved stats, by clusters that have all examples of a group
JN_ENTRY JN_CLUSTER_OF(JN_CLUSTER) JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_bwd_cluster(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                          unsigned long long batches, char* dx, char* dweight, char* dbias) {
  using namespace jaxnorm;
  using Gradients = VectorGradients<JN_C, 1, JN_DWEIGHT, JN_DBIAS>;
  static_assert(ClusterShape<JN_MAP, JN_EXAMPLES>::BLOCKS == JN_CLUSTER, "a part to a block");
  group_bwd_cluster<JN_MAP, JN_X, JN_DY, JN_WEIGHT, JN_BIAS, JN_DX, JN_SILU, JN_EXAMPLES, JN_HAS_PARTIALS, JN_SHARED>(
      x, dy, weight, bias, stats, batches, dx, Gradients{dweight, dbias}, nullptr);
}
#endif
#if defined(JN_ENTRY_groupnorm_bwd_cluster_part)
// dx and partials [batch, 2, C] (or null), by clusters that have one example of a group
JN_ENTRY JN_CLUSTER_OF(JN_CLUSTER) JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_bwd_cluster_part(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                               unsigned long long batches, char* dx, float* partials) {
  using namespace jaxnorm;
  using Gradients = VectorGradients<JN_C, 1, JN_DWEIGHT, JN_DBIAS>;
  static_assert(ClusterShape<JN_MAP, JN_EXAMPLES>::BLOCKS == JN_CLUSTER, "a part to a block");
  group_bwd_cluster<JN_MAP, JN_X, JN_DY, JN_WEIGHT, JN_BIAS, JN_DX, JN_SILU, JN_EXAMPLES, JN_HAS_PARTIALS, JN_SHARED>(
      x, dy, weight, bias, stats, batches, dx, Gradients{nullptr, nullptr}, partials);
}
#endif

#if defined(JN_ENTRY_groupnorm_bwd_held)
// dx, dweight and dbias [C] from x, dy and the saved stats, by teams of blocks that run at the same time, each with
// JN_EACH parts; words: group_bwd_held's, 16 bytes
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    groupnorm_bwd_held(const char* x, const char* dy, const char* weight, const char* bias, const float* stats,
                       unsigned long long batches, char* dx, char* dweight, char* dbias, char* words) {
  using namespace jaxnorm;
  using Gradients = VectorGradients<JN_C, 1, JN_DWEIGHT, JN_DBIAS>;
  group_bwd_held<JN_MAP, JN_X, JN_DY, JN_WEIGHT, JN_BIAS, JN_DX, JN_SILU, JN_HAS_PARTIALS, JN_EACH, JN_SLOTS,
                 JN_REGISTERS>(x, dy, weight, bias, stats, batches, dx, Gradients{dweight, dbias}, words);
}
#endif

#if defined(JN_ENTRY_groupnorm_bwd_add)
// dweight and dbias [C] from partials [programs, 2, C], in a fixed order
JN_ENTRY JN_BOUNDS(JN_THREADS, 1)
    groupnorm_bwd_add(const float* partials, unsigned programs, char* dweight, char* dbias) {
  using namespace jaxnorm;
  using Gradients = VectorGradients<JN_C, JN_ADD_V, JN_DWEIGHT, JN_DBIAS>;
  wait_for_launch_before();
  add_partials<2 * JN_C, JN_ADD_V, JN_COLUMNS, JN_SLICES>(partials, programs, block_x(), Gradients{dweight, dbias});
}
#endif
