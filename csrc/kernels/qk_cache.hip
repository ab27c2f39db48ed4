// RMSNorm and rotary embedding of q and k, and the write of k and v into a KV cache; and the way back. All sizes, types
// and options are macros (kernels/configs/qk_cache_hip.py sets and explains them).
#include "jaxnorm/cache.h"

#define JN_CACHE CacheShape<JN_CODE, JN_HEADS1, JN_D, JN_PAGE, JN_SHUFFLED, Stored::JN_STORED>

#if defined(JN_ENTRY_qk_norm_rope_cache)
#define JN_SHAPE(i) HeadShape<JN_D, JN_R, JN_V##i, JN_LANES##i, JN_GPTJ>
#define JN_VALUE HeadShape<JN_D, JN_D, JN_V2, JN_LANES2, false>
#define JN_DEAL(i, shape, heads) HeadDeal<shape, heads, JN_UNROLL##i, JN_THREADS>
#if JN_MROPE
#define JN_SOURCE(S) MropeAngles<S, JN_TABLE, JN_POSITION, false, JN_S0, JN_S1, JN_S2, JN_INTERLEAVED>
#else
#define JN_SOURCE(S) RopeAngles<S, JN_TABLE, JN_POSITION, false>
#endif

// q_out, k_out = turned cast(x * rstd * (w + offset)); the cache gets k_out and v at `slots`
//   qkv [tokens, (HEADS0 + 2 * HEADS1) * D] if packed, else q, k, v [tokens, heads, D]; q is null where HEADS0 is 0
//   q_weight, k_weight [D] or null; positions [tokens], for mrope [3, tokens]; cos_sin [rows, R]; slots [tokens]
//   k_cache, v_cache and their scales: read by nobody, the buffers of k_cache_out ...; one float each per tensor
//   q_out, k_out, v_out [tokens, heads, D], the last two or null
// Blocks of v come first, which take longest, then those of k, then those of q.
JN_ENTRY JN_BOUNDS(JN_THREADS, JN_MIN_BLOCKS)
    qk_norm_rope_cache(const char* qkv, const char* q, const char* k, const char* v, const char* q_weight,
                       const char* k_weight, const char* positions, const char* cos_sin, const char* slots,
                       const char* k_cache, const char* v_cache, const float* k_scale, const float* v_scale,
                       unsigned tokens, unsigned rows, unsigned long long all_slots, char* q_out, char* k_out,
                       char* v_out, char* k_cache_out, char* v_cache_out, char* k_scale_out, char* v_scale_out) {
  using namespace jaxnorm;
  using Cache = JN_CACHE;
  const Table<JN_TABLE> table{cos_sin, rows};
  const JN_POSITION* const where = (const JN_POSITION*)positions;
  u32 block = u32(linear_block());
#if JN_PACKED
  constexpr u64 row = u64(JN_HEADS0 + 2 * JN_HEADS1) * JN_D * JN_X0::size, row_q = row, row_k = row, row_v = row;
  q = qkv, k = q + JN_HEADS0 * JN_D * JN_X0::size, v = k + JN_HEADS1 * JN_D * JN_X0::size;
#else
  constexpr u64 row_q = u64(JN_HEADS0) * JN_D * JN_X0::size, row_k = u64(JN_HEADS1) * JN_D * JN_X1::size,
                row_v = u64(JN_HEADS1) * JN_D * JN_X2::size;
#endif
  {
    const CacheBuffers to{v_cache_out, v_scale_out, v_scale, all_slots};
    using Shape = JN_VALUE;
#if JN_TILE > 0
    const u32 blocks = (tokens + JN_TILE - 1) / JN_TILE * JN_HEADS1;
    if (block < blocks)
      return ValueTile<Shape, Cache, JN_X2, JN_SLOT, JN_THREADS, JN_TILE>::run<JN_HAS_KV>(v, row_v, slots, tokens,
                                                                                          block, v_out, to);
#else
    using Deal = JN_DEAL(2, Shape, JN_HEADS1);
    const u32 blocks = Deal::blocks(tokens);
    if (block < blocks)
      return value_heads<Shape, Deal, Cache, JN_X2, JN_SLOT, JN_HAS_KV>(v, row_v, slots, tokens, block, v_out, to);
#endif
    block -= blocks;
  }
  {
    using Shape = JN_SHAPE(1);
#if JN_TILE > 0
    using Deal = TokenDeal<Shape, JN_HEADS1, JN_UNROLL1, JN_THREADS>;
#else
    using Deal = JN_DEAL(1, Shape, JN_HEADS1);
#endif
    const u32 blocks = Deal::blocks(tokens);
    if (block < blocks) {
      const HeadNorm<Shape, JN_X1, JN_W1, JN_HAS_OFFSET> norm{k_weight, JN_EPS, {{}, JN_OFFSET}};
      const u32 unit = block * Deal::GROUPS + thread_id() / Shape::LANES;
      const KeySink<Cache, JN_SLOT, JN_HAS_KV> sink{
          k_out,
          {k_cache_out, k_scale_out, k_scale, all_slots},
          issue_slot<JN_SLOT>(slots, Deal::token(unit), Deal::live(unit, tokens))};
      return forward_heads<Shape, Deal, JN_X1, false>(k, tokens, block, norm, JN_SOURCE(Shape){table, where, tokens},
                                                      sink, row_k);
    }
    block -= blocks;
  }
#if JN_HEADS0 > 0
  {
    using Shape = JN_SHAPE(0);
    using Deal = JN_DEAL(0, Shape, JN_HEADS0);
    if (block < Deal::blocks(tokens)) {
      const HeadNorm<Shape, JN_X0, JN_W0, JN_HAS_OFFSET> norm{q_weight, JN_EPS, {{}, JN_OFFSET}};
      forward_heads<Shape, Deal, JN_X0, false>(q, tokens, block, norm, JN_SOURCE(Shape){table, where, tokens},
                                               StoreHead<JN_HEADS0, PlainTokens>{q_out, {}}, row_q);
    }
  }
#endif
}
#undef JN_SHAPE
#undef JN_VALUE
#undef JN_DEAL
#undef JN_SOURCE
#endif

#if defined(JN_ENTRY_kv_cache_gather)
// k_out, v_out [count, HEADS1, D] from the cache at slots [count]: as they are there, or float32 code * scale. A thread
// moves JN_V elements.
JN_ENTRY JN_BOUNDS(JN_THREADS, 1) kv_cache_gather(const char* slots, const char* k_cache, const char* v_cache,
                                                  const float* k_scale, const float* v_scale, unsigned long long count,
                                                  unsigned long long all_slots, char* k_out, char* v_out) {
  using namespace jaxnorm;
  const CacheBuffers k{(char*)k_cache, (char*)k_scale, k_scale, all_slots};
  const CacheBuffers v{(char*)v_cache, (char*)v_scale, v_scale, all_slots};
  gather_cached<JN_CACHE, JN_SLOT, JN_V>(slots, count, linear_block() * JN_THREADS + thread_id(), k, v, k_out, v_out);
}
#endif
#undef JN_CACHE
