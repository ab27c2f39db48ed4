// What NVIDIA's second-level cache is told of single accesses: evicted first what is not read again, last what is.
// Plain accesses elsewhere. No copies to shared memory: of `cp.async` with such a hint ptxas 13.0 made instructions
// that the H200 refused, in two of some thirty kernels.
#pragma once
#include "jaxnorm/vec.h"

namespace jaxnorm {

#if defined(JN_NVIDIA)
JN_DEV u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
JN_DEV u64 evict_last() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
JN_DEV Bits<16> load_with(const char* p, u64 policy) {
  Bits<16> b;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(b.word[0]), "=r"(b.word[1]), "=r"(b.word[2]), "=r"(b.word[3])
               : "l"(p), "l"(policy));
  return b;
}
// Bytes that nobody reads again soon ...
JN_DEV Bits<16> load_once(const char* p) { return load_with(p, evict_first()); }
JN_DEV void store_once(char* p, const Bits<16>& b) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
               :
               : "l"(p), "r"(b.word[0]), "r"(b.word[1]), "r"(b.word[2]), "r"(b.word[3]), "l"(evict_first())
               : "memory");
}
// ... and that this kernel does.
JN_DEV Bits<16> load_kept(const char* p) { return load_with(p, evict_last()); }
#else
JN_DEV Bits<16> load_once(const char* p) { return load_piece<16, true>(p); }
JN_DEV void store_once(char* p, const Bits<16>& b) { store_bits(p, b); }
JN_DEV Bits<16> load_kept(const char* p) { return load_piece<16, true>(p); }
#endif

}  // namespace jaxnorm
