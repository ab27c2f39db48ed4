// Rotary embedding of up to eight arrays of heads that share their tokens, in one launch. All sizes, types and options
// are macros (kernels/configs/rope_hip.py sets and explains them).
#include "jaxnorm/rope.h"

#if defined(JN_ENTRY_rope)
// y_i = turned x_i
//   x_i, y_i [tokens, JN_HEADS<i>, JN_D], null from JN_COUNT on
//   positions [count], for mrope [3, count]; count is tokens, or those of one sequence; cos_sin [rows, JN_R]
// A block has heads of one array; blocks of array 0 come first.
#if JN_MROPE
#define JN_SOURCE(S) jaxnorm::MropeAngles<S, JN_TABLE, JN_POSITION, JN_PERIOD, JN_S0, JN_S1, JN_S2, JN_INTERLEAVED>
#else
#define JN_SOURCE(S) jaxnorm::RopeAngles<S, JN_TABLE, JN_POSITION, JN_PERIOD>
#endif
#define JN_ARRAY(i)                                                                                          \
  {                                                                                                          \
    using Shape = HeadShape<JN_D, JN_R, JN_V##i, JN_LANES##i, JN_GPTJ>;                                      \
    using Deal = HeadDeal<Shape, JN_HEADS##i, JN_UNROLL##i, JN_THREADS>;                                     \
    const u32 blocks = Deal::blocks(tokens);                                                                 \
    if (block < blocks) {                                                                                    \
      const JN_SOURCE(Shape) source{table, (const JN_POSITION*)positions, count};                            \
      return forward_heads<Shape, Deal, JN_X##i, JN_INVERSE>(x##i, tokens, block, NoNorm{}, source,          \
                                                             StoreHead<JN_HEADS##i, PlainTokens>{y##i, {}}); \
    }                                                                                                        \
    block -= blocks;                                                                                         \
  }
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    rope(const char* x0, const char* x1, const char* x2, const char* x3, const char* x4, const char* x5, const char* x6,
         const char* x7, const char* positions, const char* cos_sin, unsigned tokens, unsigned count, unsigned rows,
         char* y0, char* y1, char* y2, char* y3, char* y4, char* y5, char* y6, char* y7) {
  using namespace jaxnorm;
  const Table<JN_TABLE> table{cos_sin, rows};
  u32 block = u32(linear_block());
  JN_ARRAY(0)
#if JN_COUNT > 1
  JN_ARRAY(1)
#endif
#if JN_COUNT > 2
  JN_ARRAY(2)
#endif
#if JN_COUNT > 3
  JN_ARRAY(3)
#endif
#if JN_COUNT > 4
  JN_ARRAY(4)
#endif
#if JN_COUNT > 5
  JN_ARRAY(5)
#endif
#if JN_COUNT > 6
  JN_ARRAY(6)
#endif
#if JN_COUNT > 7
  JN_ARRAY(7)
#endif
}
#undef JN_ARRAY
#undef JN_SOURCE
#endif
