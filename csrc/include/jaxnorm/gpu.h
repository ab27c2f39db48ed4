// The one place where AMD, NVIDIA and the CPU shim of the tests differ. Needs no header of any toolkit: built-ins only,
// so the same text goes through NVRTC, hipRTC, nvcc, hipcc or a bare clang, and g++ with tests/simt. The compiling side
// defines JN_WAVE, the lanes of a wave of the target.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "integer sizes");

#if defined(JN_SIMT)
#define JN_ENTRY extern "C" void
#define JN_BOUNDS(threads, blocks)
#define JN_DEV inline
#define JN_CONST constexpr
#elif defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define JN_NVIDIA 1
#define JN_ENTRY extern "C" __global__ void
#define JN_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define JN_DEV __device__ __forceinline__
#define JN_CONST __host__ __device__ constexpr
#else
#define JN_AMD 1
#define JN_ENTRY extern "C" __attribute__((global)) void
// The second number is the least waves per SIMD that the plan counts on: blocks * waves of a block over 4 SIMDs (2 on
// gfx11).
#define JN_BOUNDS(threads, blocks)                               \
  __attribute__((amdgpu_flat_work_group_size(threads, threads))) \
  __attribute__((amdgpu_waves_per_eu(jaxnorm::waves_per_simd(threads, blocks))))
#define JN_DEV __attribute__((device)) __attribute__((always_inline)) inline
#define JN_CONST constexpr
#endif

#if defined(__gfx950__)
#define JN_HARDWARE_BF16 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define JN_ASYNC_COPY 1
#endif

namespace jaxnorm {

constexpr int kWave = JN_WAVE;
static_assert(kWave == 32 || kWave == 64, "lanes of a wave");

JN_CONST int ceil_div(int a, int b) { return (a + b - 1) / b; }
JN_CONST int min_of(int a, int b) { return a < b ? a : b; }
JN_CONST int max_of(int a, int b) { return a > b ? a : b; }
JN_CONST int next_power_of_2(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
JN_CONST int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }
JN_CONST int waves_per_simd(int threads, int blocks) {
  return max_of(1, blocks * threads / kWave / (kWave == 64 ? 4 : 2));
}

JN_DEV float bits_f32(u32 u) { return __builtin_bit_cast(float, u); }
JN_DEV u32 f32_bits(float f) { return __builtin_bit_cast(u32, f); }

// Contraction is off in every compiler's options; this is where it is meant.
JN_DEV float fused_multiply_add(float a, float b, float c) {
#if defined(JN_NVIDIA)
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

#if defined(JN_SIMT)
JN_DEV u32 thread_id() { return u32(simt::thread()); }
JN_DEV u32 block_x() { return simt::block().x; }
JN_DEV u32 block_y() { return simt::block().y; }
JN_DEV void barrier() { simt::barrier(); }
template <int D> JN_DEV float shfl_xor(float v) { return simt::shuffle_xor(v, D); }
JN_DEV unsigned char* shared_memory() { return simt::shared(); }
JN_DEV float reciprocal_sqrt(float v) { return 1.f / __builtin_sqrtf(v); }

#elif defined(JN_NVIDIA)
JN_DEV u32 thread_id() { return threadIdx.x; }
JN_DEV u32 block_x() { return blockIdx.x; }
JN_DEV u32 block_y() { return blockIdx.y; }
JN_DEV void barrier() { __syncthreads(); }
template <int D> JN_DEV float shfl_xor(float v) { return __shfl_xor_sync(0xffffffffu, v, D); }
JN_DEV unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
JN_DEV float reciprocal_sqrt(float v) {
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

#else
JN_DEV u32 thread_id() { return __builtin_amdgcn_workitem_id_x(); }
JN_DEV u32 block_x() { return __builtin_amdgcn_workgroup_id_x(); }
JN_DEV u32 block_y() { return __builtin_amdgcn_workgroup_id_y(); }
JN_DEV void barrier() {
// Only LDS is exchanged between the threads of a block: without the address space, gfx11 would also wait for global
// accesses in flight.
#if __clang_major__ >= 20
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
#else
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#endif
}
template <int D> JN_DEV float shfl_xor(float v) {
  const int i = __builtin_bit_cast(int, v);
  if constexpr (D < 32) {  // bit mode of ds_swizzle: and 31, or 0, xor D within each half of 32 lanes
    return __builtin_bit_cast(float, __builtin_amdgcn_ds_swizzle(i, (D << 10) | 31));
  } else {
    const int lane = int(__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u)));
    return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute((lane ^ D) << 2, i));
  }
}
JN_DEV unsigned char* shared_memory() {
  extern __attribute__((shared)) __attribute__((aligned(16))) unsigned char memory[];
  return (unsigned char*)memory;
}
JN_DEV float reciprocal_sqrt(float v) {  // v_rsq_f32 flushes denormals: scale them up by an even power of two
  const bool tiny = v < 0x1p-120f;
  return __builtin_amdgcn_rsqf(tiny ? v * 0x1p60f : v) * (tiny ? 0x1p30f : 1.f);
}
#endif

// The launcher folds more blocks than one grid dimension takes into y (AMD: blocks * threads < 2^32 in each dimension).
constexpr u32 kGridX = 1u << 21;
JN_DEV u64 linear_block() { return u64(block_y()) * kGridX + block_x(); }

}  // namespace jaxnorm
