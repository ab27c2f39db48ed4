// RMSNorm and rotary embedding of the heads of q and k, and the gradient; one stream of tokens, or two that are joined.
// All sizes, types and options are macros (kernels/configs/qk_hip.py sets and explains them).
#include "jaxnorm/heads_bwd.h"
#include "jaxnorm/rope.h"
#include "jaxnorm/rows_bwd.h"

// Part i of a launch: the q or the k of a stream.
#define JN_SHAPE(i) HeadShape<JN_D, JN_R##i, JN_V##i, JN_LANES##i, JN_GPTJ>
#define JN_DEAL(i) HeadDeal<JN_SHAPE(i), JN_HEADS##i, JN_UNROLL##i, JN_THREADS>
#if JN_MROPE
#define JN_SOURCE(S) MropeAngles<S, JN_TABLE0, JN_POSITION, JN_PERIOD, JN_S0, JN_S1, JN_S2, JN_INTERLEAVED>
#else
#define JN_SOURCE(S) RopeAngles<S, JN_TABLE0, JN_POSITION, JN_PERIOD>
#endif
#define JN_STREAM(i) StreamAngles<JN_SHAPE(i), JN_TABLE##i, JoinedTokens>

#define JN_FORWARD(i, x, w, y, tokens, source, joined)                                             \
  if (const u32 blocks = JN_DEAL(i)::blocks(tokens); block < blocks) {                             \
    const HeadNorm<JN_SHAPE(i), JN_X##i, JN_W##i, JN_HAS_OFFSET> norm{w, JN_EPS, {{}, JN_OFFSET}}; \
    return forward_heads<JN_SHAPE(i), JN_DEAL(i), JN_X##i, false>(                                 \
        x, tokens, block, norm, source, StoreHead<JN_HEADS##i, decltype(joined)>{y, joined});      \
  } else {                                                                                         \
    block -= blocks;                                                                               \
  }
#define JN_BACKWARD(i, x, dy, w, dx, partials, tokens, blocks, source, joined)                 \
  if (block < blocks)                                                                          \
    return backward_heads<JN_SHAPE(i), JN_DEAL(i), JN_X##i, JN_W##i, JN_HAS_OFFSET, JN_AHEAD>( \
        {x, dy, w, dx, partials}, tokens, block, blocks, JN_EPS, JN_OFFSET, source, joined);   \
  block -= blocks;

#if defined(JN_ENTRY_qk_norm_rope)
// y_i = turned cast(x_i * rstd * (w_i + offset))
//   x_i, y_i [tokens, JN_HEADS<i>, JN_D]; w_i [JN_D] or null; x1 null where JN_COUNT is 1
//   positions [count], for mrope [3, count]; count is tokens, or those of one sequence; cos_sin [rows, JN_R0]
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    qk_norm_rope(const char* x0, const char* x1, const char* w0, const char* w1, const char* positions,
                 const char* cos_sin, unsigned tokens, unsigned count, unsigned rows, char* y0, char* y1) {
  using namespace jaxnorm;
  const Table<JN_TABLE0> table{cos_sin, rows};
  const JN_POSITION* const where = (const JN_POSITION*)positions;
  u32 block = u32(linear_block());
  const PlainTokens plain{};
  JN_FORWARD(0, x0, w0, y0, tokens, (JN_SOURCE(JN_SHAPE(0)){table, where, count}), plain)
#if JN_COUNT > 1
  JN_FORWARD(1, x1, w1, y1, tokens, (JN_SOURCE(JN_SHAPE(1)){table, where, count}), plain)
#endif
}
#endif

#if defined(JN_ENTRY_qk_norm_rope_bwd)
// dx_i, and partials_i [blocks_i, JN_D]: each block's sum of g * xh over its heads (null without a weight)
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    qk_norm_rope_bwd(const char* x0, const char* x1, const char* w0, const char* w1, const char* positions,
                     const char* cos_sin, const char* dy0, const char* dy1, unsigned tokens, unsigned count,
                     unsigned rows, unsigned blocks0, unsigned blocks1, char* dx0, char* dx1, float* partials0,
                     float* partials1) {
  using namespace jaxnorm;
  const Table<JN_TABLE0> table{cos_sin, rows};
  const JN_POSITION* const where = (const JN_POSITION*)positions;
  u32 block = block_x();
  const PlainTokens plain{};
  JN_BACKWARD(0, x0, dy0, w0, dx0, partials0, tokens, blocks0, (JN_SOURCE(JN_SHAPE(0)){table, where, count}), plain)
#if JN_COUNT > 1
  JN_BACKWARD(1, x1, dy1, w1, dx1, partials1, tokens, blocks1, (JN_SOURCE(JN_SHAPE(1)){table, where, count}), plain)
#endif
}
#endif

#if defined(JN_ENTRY_qk_norm_rope_two_stream)
// Streams 0 (parts 0, 1: q, k) and 1 (parts 2, 3), [batch, tokens<i>, heads, JN_D], into
// q and k [batch, tokens0 + tokens1, heads, JN_D]; cos_sin<i> [tokens<i>, JN_R]
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    qk_norm_rope_two_stream(const char* q0, const char* k0, const char* q1, const char* k1, const char* wq0,
                            const char* wk0, const char* wq1, const char* wk1, const char* cos_sin0,
                            const char* cos_sin1, unsigned batch, unsigned tokens0, unsigned tokens1, char* q,
                            char* k) {
  using namespace jaxnorm;
  const u32 all = tokens0 + tokens1;
  const JoinedTokens first{tokens0, all, 0}, second{tokens1, all, tokens0};
  const Table<JN_TABLE0> table0{cos_sin0, tokens0};
  const Table<JN_TABLE2> table1{cos_sin1, tokens1};
  u32 block = u32(linear_block());
  JN_FORWARD(0, q0, wq0, q, batch * tokens0, (JN_STREAM(0){table0, first}), first)
  JN_FORWARD(1, k0, wk0, k, batch * tokens0, (JN_STREAM(1){table0, first}), first)
  JN_FORWARD(2, q1, wq1, q, batch * tokens1, (JN_STREAM(2){table1, second}), second)
  JN_FORWARD(3, k1, wk1, k, batch * tokens1, (JN_STREAM(3){table1, second}), second)
}
#endif

#if defined(JN_ENTRY_qk_norm_rope_two_stream_bwd)
// The gradients of both streams from dq and dk of the joined one
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    qk_norm_rope_two_stream_bwd(const char* q0, const char* k0, const char* q1, const char* k1, const char* wq0,
                                const char* wk0, const char* wq1, const char* wk1, const char* cos_sin0,
                                const char* cos_sin1, const char* dq, const char* dk, unsigned batch, unsigned tokens0,
                                unsigned tokens1, unsigned blocks0, unsigned blocks1, unsigned blocks2,
                                unsigned blocks3, char* dq0, char* dk0, char* dq1, char* dk1, float* partials0,
                                float* partials1, float* partials2, float* partials3) {
  using namespace jaxnorm;
  const u32 all = tokens0 + tokens1;
  const JoinedTokens first{tokens0, all, 0}, second{tokens1, all, tokens0};
  const Table<JN_TABLE0> table0{cos_sin0, tokens0};
  const Table<JN_TABLE2> table1{cos_sin1, tokens1};
  u32 block = block_x();
  JN_BACKWARD(0, q0, dq, wq0, dq0, partials0, batch * tokens0, blocks0, (JN_STREAM(0){table0, first}), first)
  JN_BACKWARD(1, k0, dk, wk0, dk0, partials1, batch * tokens0, blocks1, (JN_STREAM(1){table0, first}), first)
  JN_BACKWARD(2, q1, dq, wq1, dq1, partials2, batch * tokens1, blocks2, (JN_STREAM(2){table1, second}), second)
  JN_BACKWARD(3, k1, dk, wk1, dk1, partials3, batch * tokens1, blocks3, (JN_STREAM(3){table1, second}), second)
}
#endif

#if defined(JN_ENTRY_qk_norm_rope_bwd_reduce)
// dw_i[n] = cast(sum over p of partials_i[p][n]), p in a fixed order; grid y is i. Null parts are left out.
JN_ENTRY JN_BOUNDS(JN_COLUMNS* JN_SLICES, 1)
    qk_norm_rope_bwd_reduce(const float* partials0, const float* partials1, const float* partials2,
                            const float* partials3, unsigned blocks0, unsigned blocks1, unsigned blocks2,
                            unsigned blocks3, char* dw0, char* dw1, char* dw2, char* dw3) {
  using namespace jaxnorm;
  const unsigned part = block_y();
  const float* partials = part == 0 ? partials0 : part == 1 ? partials1 : part == 2 ? partials2 : partials3;
  const unsigned blocks = part == 0 ? blocks0 : part == 1 ? blocks1 : part == 2 ? blocks2 : blocks3;
  if (partials == nullptr) return;
  const VectorGradients<JN_N, JN_V, JN_DW0, JN_DW1, JN_DW2, JN_DW3> gradients{dw0, dw1, dw2, dw3};
  add_partials<JN_N, JN_V, JN_COLUMNS, JN_SLICES>(
      partials, blocks, block_x(), [=](u32 column, const float (&sum)[JN_V]) { gradients(part * JN_N + column, sum); });
}
#endif

#undef JN_SHAPE
#undef JN_DEAL
#undef JN_SOURCE
#undef JN_STREAM
#undef JN_FORWARD
#undef JN_BACKWARD
