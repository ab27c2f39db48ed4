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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define JN_OVERLAP 1
#endif
// Blocks of a cluster: they run at the same time and reach each other's shared memory.
#if defined(JN_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define JN_CLUSTERS 1
#endif
#if defined(JN_CLUSTERS) && defined(JN_NVIDIA)
#define JN_CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define JN_CLUSTER_OF(blocks)
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

template <bool B, class A, class C> struct Select {
  using Type = A;
};
template <class A, class C> struct Select<false, A, C> {
  using Type = C;
};

// Exponentials and reciprocals take a unit with an eighth of the lanes: other instructions that spare one are worth it.
// AMD's have a quarter, and what spares one costs as much.
#if defined(JN_AMD)
constexpr bool kSlowReciprocal = false;
#else
constexpr bool kSlowReciprocal = true;
#endif

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

// The lesser of two values, b where a is a NaN, and the greater, where a NaN stays one.
JN_DEV float lesser(float a, float b) {
#if defined(JN_NVIDIA)
  return fminf(a, b);
#else
  return __builtin_fminf(a, b);
#endif
}
JN_DEV float at_least(float a, float b) {
#if defined(JN_NVIDIA)
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a < b ? b : a;
#endif
}

#if defined(JN_SIMT)
JN_DEV u32 thread_id() { return u32(simt::thread()); }
JN_DEV u32 block_x() { return simt::block().x; }
JN_DEV u32 block_y() { return simt::block().y; }
JN_DEV void barrier() { simt::barrier(); }
template <int D> JN_DEV float shfl_xor(float v) { return simt::shuffle_xor(v, D); }
template <int LANES, int FROM> JN_DEV float shfl_from(float v) { return simt::shuffle_from(v, LANES, FROM); }
JN_DEV bool any_lane(bool b) { return simt::any(b); }
template <u32 FROM> JN_DEV u32 pick_bytes(u32 a, u32 b) {
  const u64 both = u64(b) << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= u32(both >> (8 * (FROM >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}
JN_DEV unsigned char* shared_memory() { return simt::shared(); }
JN_DEV float reciprocal_sqrt(float v, float = 0.f) { return 1.f / __builtin_sqrtf(v); }
JN_DEV float exp2_fast(float v) { return __builtin_exp2f(v); }
JN_DEV float reciprocal_fast(float v) { return 1.f / v; }
JN_DEV void cluster_begin(u64*, int) {}
JN_DEV void cluster_begun() { simt::cluster_barrier(); }
JN_DEV void cluster_expect(u64*, u32) {}
JN_DEV void cluster_put(float* p, u64*, u32 rank, float a, float b, float c, float d) {
  float* to = (float*)simt::in_block(p, rank);
  to[0] = a, to[1] = b, to[2] = c, to[3] = d;
}
JN_DEV void cluster_wait(u64*, u32) { simt::cluster_barrier(); }

#elif defined(JN_NVIDIA)
JN_DEV u32 thread_id() { return threadIdx.x; }
JN_DEV u32 block_x() { return blockIdx.x; }
JN_DEV u32 block_y() { return blockIdx.y; }
JN_DEV void barrier() { __syncthreads(); }
template <int D> JN_DEV float shfl_xor(float v) { return __shfl_xor_sync(0xffffffffu, v, D); }
// v of lane FROM of each aligned run of LANES lanes
template <int LANES, int FROM> JN_DEV float shfl_from(float v) { return __shfl_sync(0xffffffffu, v, FROM, LANES); }
JN_DEV bool any_lane(bool b) { return __any_sync(0xffffffffu, b); }
// Byte i of the result is byte FROM >> 4 * i & 7 of a (0 to 3) and b (4 to 7).
template <u32 FROM> JN_DEV u32 pick_bytes(u32 a, u32 b) { return __byte_perm(a, b, FROM); }
JN_DEV unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#if defined(JN_CLUSTERS)
// Four floats at a time from each block of a cluster to the shared memory of others, which wait until all have come. A
// barrier of the cluster with release and acquire in place of this fences all of global memory.
//   cluster_begin   in all threads, before anything else
//   cluster_begun   all blocks have begun, in all threads, before the first cluster_put
//   cluster_expect  by one thread, for each round: so many bytes will come. `ready` is 8 bytes of shared memory
//   cluster_put     v to the place p of block `rank`
//   cluster_wait    all that others put here in a round is there; rounds counted from 0
JN_DEV u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
JN_DEV void cluster_begin(u64* ready, int count) {
  if (thread_id() == 0) {
    for (int i = 0; i < count; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_address(ready + i)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed;" : : : "memory");
}
JN_DEV void cluster_expect(u64* ready, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(ready)), "r"(bytes)
               : "memory");
}
JN_DEV void cluster_begun() { asm volatile("barrier.cluster.wait.acquire;" : : : "memory"); }
JN_DEV void cluster_put(float* p, u64* ready, u32 rank, float a, float b, float c, float d) {
  u32 to, done;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(p)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(done) : "r"(shared_address(ready)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :
               : "r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(done)
               : "memory");
}
JN_DEV void cluster_wait(u64* ready, u32 round) {
  u32 there = 0;
  while (there == 0)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(there)
                 : "r"(shared_address(ready)), "r"(round & 1)
                 : "memory");
}
#endif
// v is NaN or at least `least`. Where that constant is a normal number, what takes subnormal ones for zero gives the
// same bits and spares the scaling around it.
JN_DEV float reciprocal_sqrt(float v, float least = 0.f) {
  float r;
  if (least >= 0x1p-126f)
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  else
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// 2^v and 1/v with an error of about one unit in the last place, subnormal results zero
JN_DEV float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
JN_DEV float reciprocal_fast(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
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
// Values of other lanes through the vector ALU wherever it reaches them: an exchange through the crossbar of the LDS
// (ds_swizzle, ds_bpermute) has the latency of an LDS read and a wait, one by DPP that of an ALU instruction, and
// mostly it becomes an operand of the addition that follows. DPP stays within rows of 16 lanes. Between rows gfx950 has
// swaps and gfx10 on v_permlanex16; gfx90a and gfx942 have only the crossbar for the distances 16 and 32.
// tests/test_hip_lanes.py reads the controls back from the assembly and proves which lane each of them reads.
#if defined(__gfx950__)
#define JN_LANE_SWAPS 1
#endif
#if !defined(__GFX9__)
#define JN_ROW_XMASK 1
#endif
template <int CONTROL> JN_DEV int dpp(int i) { return __builtin_amdgcn_mov_dpp(i, CONTROL, 0xf, 0xf, true); }
JN_DEV int lane_id() { return int(__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u))); }
#if defined(JN_LANE_SWAPS)
struct Swapped {
  u32 a, b;
};
// Exchanges the odd rows (D = 16) or the upper half (D = 32) of a with the even rows or the lower half of b.
template <int D> JN_DEV Swapped lane_swap(u32 a, u32 b) {
  static_assert(D == 16 || D == 32, "lanes");
  if constexpr (D == 16) {
    const auto r = __builtin_amdgcn_permlane16_swap(a, b, false, false);
    return Swapped{r[0], r[1]};
  } else {
    const auto r = __builtin_amdgcn_permlane32_swap(a, b, false, false);
    return Swapped{r[0], r[1]};
  }
}
#endif
template <int D> JN_DEV int lane_xor(int i) {
  static_assert(D >= 1 && D < kWave && (D & (D - 1)) == 0, "distance");
  constexpr int xor1 = 0xb1, xor2 = 0x4e, xor3 = 0x1b;  // quad_perm:[1,0,3,2], [2,3,0,1], [3,2,1,0]
  constexpr int ror8 = 0x128, half_mirror = 0x141, xmask = 0x160 | (D & 15);  // of 16; xor 7; row_xmask
  if constexpr (D == 1) {
    return dpp<xor1>(i);
  } else if constexpr (D == 2) {
    return dpp<xor2>(i);
#if defined(JN_ROW_XMASK)
  } else if constexpr (D < 16) {
    return dpp<xmask>(i);
  } else {
    return __builtin_amdgcn_permlanex16(i, i, 0x76543210, 0xfedcba98, false, false);
#else
  } else if constexpr (D == 4) {
    return dpp<xor3>(dpp<half_mirror>(i));
  } else if constexpr (D == 8) {
    return dpp<ror8>(i);
#if defined(JN_LANE_SWAPS)
  } else {
    const Swapped s = lane_swap<D>(u32(i), u32(i));
    return int((lane_id() & D) ? s.a : s.b);
#else
  } else if constexpr (D == 16) {  // bit mode of ds_swizzle: and 31, or 0, xor D within each half of 32 lanes
    return __builtin_amdgcn_ds_swizzle(i, (D << 10) | 31);
  } else {
    return __builtin_amdgcn_ds_bpermute((lane_id() ^ D) << 2, i);
#endif
#endif
  }
}
template <int D> JN_DEV float shfl_xor(float v) {
  return __builtin_bit_cast(float, lane_xor<D>(__builtin_bit_cast(int, v)));
}
JN_DEV unsigned char* shared_memory() {
  extern __attribute__((shared)) __attribute__((aligned(16))) unsigned char memory[];
  return (unsigned char*)memory;
}
JN_DEV float reciprocal_sqrt(float v,
                             float = 0.f) {  // v_rsq_f32 flushes denormals: scale them up by an even power of two
  const bool tiny = v < 0x1p-120f;
  return __builtin_amdgcn_rsqf(tiny ? v * 0x1p60f : v) * (tiny ? 0x1p30f : 1.f);
}
template <u32 FROM> JN_DEV u32 pick_bytes(u32 a, u32 b) {
  constexpr u32 low = (FROM & 0xfu) | (FROM & 0xf0u) << 4, high = (FROM >> 8 & 0xfu) | (FROM >> 8 & 0xf0u) << 4;
  return __builtin_amdgcn_perm(b, a, low | high << 16);
}
JN_DEV float exp2_fast(float v) { return __builtin_amdgcn_exp2f(v); }
JN_DEV float reciprocal_fast(float v) { return __builtin_amdgcn_rcpf(v); }
#endif

// The largest of the 32 lanes of a run that starts at a multiple of 32.
JN_DEV u32 max_of_32(u32 v) {
#if defined(JN_NVIDIA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, v);
#else
  const auto take = [&](float other) {
    const u32 u = f32_bits(other);
    v = v < u ? u : v;
  };
  take(shfl_xor<1>(bits_f32(v)));
  take(shfl_xor<2>(bits_f32(v)));
  take(shfl_xor<4>(bits_f32(v)));
  take(shfl_xor<8>(bits_f32(v)));
  take(shfl_xor<16>(bits_f32(v)));
  return v;
#endif
}

// Two launches of one call that overlap (Launch.overlaps in kernels/configs). The first lets the second begin as soon
// as all of its blocks have; a block of the second fetches what no launch of the call writes, and waits before it reads
// anything else and before it writes. Without an overlap, and on other targets, neither does anything.
JN_DEV void let_next_launch_begin() {
#if defined(JN_OVERLAP)
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
JN_DEV void wait_for_launch_before() {
#if defined(JN_OVERLAP)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The launcher folds more blocks than one grid dimension takes into y (AMD: blocks * threads < 2^32 in each dimension).
constexpr u32 kGridX = 1u << 21;
template <bool FOLDED = true> JN_DEV u64 linear_block() {
  return FOLDED ? u64(block_y()) * kGridX + block_x() : u64(block_x());
}

}  // namespace jaxnorm
