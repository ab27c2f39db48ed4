// Words of 16 bytes that blocks of one launch leave for one another in global memory. All blocks must run at the same
// time (a launch that is `meeting`), and each word has one writer and one reader.
//
// Nothing need be zeroed before: a word is there when its other half is kPosted, 64 bits that no other memory holds
// but by a chance of 2^-64, and whoever took it clears it, so that none is left for a launch after this one.
#pragma once
#include "jaxnorm/vec.h"

#if defined(JN_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700)
#define JN_POSTS 1

namespace jaxnorm {

constexpr u64 kPosted = 0x95ecadd8d69d5707ull;  // drawn at random

// A single access each, as two floats and the mark that they are there must not come apart.
#if defined(JN_SIMT)
// (Here of two: the mark is written last and read first.)
JN_DEV void post_word(char* p, u64 low, u64 high) {
  __atomic_store_n((u64*)p, low, __ATOMIC_RELAXED);
  __atomic_store_n((u64*)p + 1, high, __ATOMIC_RELEASE);
}
JN_DEV void read_word(const char* p, u64& low, u64& high) {
  high = __atomic_load_n((const u64*)p + 1, __ATOMIC_ACQUIRE);
  low = __atomic_load_n((const u64*)p, __ATOMIC_RELAXED);
}
JN_DEV void wait_a_little() { simt::pause(); }
#else
JN_DEV void post_word(char* p, u64 low, u64 high) {
  asm volatile("{.reg .b128 w; mov.b128 w, {%1, %2}; st.relaxed.gpu.global.b128 [%0], w;}"
               :
               : "l"(p), "l"(low), "l"(high)
               : "memory");
}
JN_DEV void read_word(const char* p, u64& low, u64& high) {
  asm volatile("{.reg .b128 w; ld.relaxed.gpu.global.b128 w, [%2]; mov.b128 {%0, %1}, w;}"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
}
JN_DEV void wait_a_little() {}
#endif

JN_DEV void post(char* p, float a, float b) { post_word(p, u64(f32_bits(b)) << 32 | f32_bits(a), kPosted); }

// Takes N words, of which `mine` says whether there is one to wait for.
template <int N> JN_DEV void take_posted(char* const (&p)[N], const bool (&mine)[N], float (&a)[N], float (&b)[N]) {
  u64 low[N] = {}, high[N] = {};
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (mine[i]) read_word(p[i], low[i], high[i]);
#pragma unroll
    for (int i = 0; i < N; ++i) all = all && (!mine[i] || high[i] == kPosted);
    if (!all) wait_a_little();
  } while (!all);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (mine[i]) post_word(p[i], 0, 0);
    a[i] = bits_f32(u32(low[i]));
    b[i] = bits_f32(u32(low[i] >> 32));
  }
}

}  // namespace jaxnorm
#endif
