// Blocks of several GPUs that wait for one another through memory that all of them have mapped.
//
// Every rank has a workspace: a header and two halves. Block b of a rank waits for block b of the other ranks only, so
// no launch needs all of its blocks on the device at once. A flag holds the number of the call (the epoch) and what the
// call is (its signature): block b of rank p writes flag[phase][b][p] of every other rank once its data is there.
//
// Why a half may be written again: a call writes to the half of its epoch's parity. Whoever is in epoch e + 1 has ended
// epoch e, hence had a flag of e from every block of every rank; so all ranks had started e and, launches of a rank
// being in order, ended e - 1, the last call that read this half.
//
// The epoch lives in device memory and is advanced by the launch itself: a recorded graph that is replayed goes on.
#pragma once
#include "jaxnorm/gpu.h"

namespace jaxnorm {

constexpr int kMaxRanks = 8;
constexpr int kMaxBlocks = 1024;
constexpr int kPhases = 2;

// Where the workspaces are mapped here, by distance: base[d] is that of rank (this rank + d) % ranks.
struct Peers {
  char* base[kMaxRanks];
};
struct Header {
  u32 epoch;  // of the last call that ended
  u32 done;   // blocks that left the running call
  u32 dead;   // a wait failed here or on another rank: every block leaves at once
  u32 unused[29];
  u64 flag[kPhases][kMaxBlocks][kMaxRanks];
};
constexpr u64 kHeaderBytes = (sizeof(Header) + 1023) / 1024 * 1024;

// What the host reads when a wait failed: kind + 16 * phase + 256 * rank waited for.
enum Failure : u32 { kTimedOut = 1, kOtherCall = 2, kPeerGaveUp = 3 };

// ---- memory order at the scope of all devices

#if defined(JN_SIMT)
JN_DEV void store_release(u64* p, u64 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
JN_DEV u64 load_acquire(const u64* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
JN_DEV u64 load_relaxed(const u64* p) {
  simt::pause();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
JN_DEV void store_relaxed(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
JN_DEV u32 load_relaxed(const u32* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
JN_DEV u32 count_up(u32* p) { return __atomic_fetch_add(p, 1u, __ATOMIC_ACQ_REL); }
JN_DEV u64 ticks() { return simt::nanoseconds(); }
JN_DEV void publish() { barrier(); }

#elif defined(JN_NVIDIA)
JN_DEV void store_release(u64* p, u64 v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(p), "l"(v) : "memory");
}
JN_DEV u64 load_acquire(const u64* p) {
  u64 v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
JN_DEV u64 load_relaxed(const u64* p) {
  u64 v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
JN_DEV void store_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(p), "r"(v) : "memory");
}
JN_DEV u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
JN_DEV u32 count_up(u32* p) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}
JN_DEV u64 ticks() {  // nanoseconds
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
// All of the block's writes come before a release by any of its threads: release is cumulative over a barrier.
JN_DEV void publish() { barrier(); }

#else
#define JN_GLOBAL __attribute__((address_space(1)))
JN_DEV void store_release(u64* p, u64 v) {
  __hip_atomic_store((JN_GLOBAL u64*)p, v, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
}
JN_DEV u64 load_acquire(const u64* p) {
  return __hip_atomic_load((JN_GLOBAL u64*)p, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_SYSTEM);
}
JN_DEV u64 load_relaxed(const u64* p) {
  return __hip_atomic_load((JN_GLOBAL u64*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
JN_DEV void store_relaxed(u32* p, u32 v) {
  __hip_atomic_store((JN_GLOBAL u32*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
JN_DEV u32 load_relaxed(const u32* p) {
  return __hip_atomic_load((JN_GLOBAL u32*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}
JN_DEV u32 count_up(u32* p) {
  return __hip_atomic_fetch_add((JN_GLOBAL u32*)p, 1u, __ATOMIC_ACQ_REL, __HIP_MEMORY_SCOPE_AGENT);
}
#undef JN_GLOBAL
JN_DEV u64 ticks() { return __builtin_amdgcn_s_memrealtime(); }  // of the constant clock; the host knows its rate
// barrier() orders shared memory alone: here every wave's writes to global memory must have arrived before it, and what
// another wave of the block acquired must be seen behind it.
JN_DEV void publish() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
#endif

// ---- one block of one rank in one call

template <int RANKS> struct Meeting {
  static constexpr int verdict_bytes = kMaxRanks * 4;
  Peers peers;
  u32* error;  // in the host's memory
  u64 patience;
  u32 rank, signature;
  u32* verdicts;  // in shared memory
  u32 epoch;

  // `distance` is known to the compiler: an array that is indexed at run time goes to memory.
  JN_DEV Header* header(int distance) const { return (Header*)peers.base[distance]; }
  JN_DEV u64 half_at(u64 half_bytes) const { return kHeaderBytes + (epoch & 1u) * half_bytes; }
  JN_DEV char* half(int distance, u64 half_bytes) const { return peers.base[distance] + half_at(half_bytes); }
  JN_DEV u32 at(int distance) const { return (rank + u32(distance)) % u32(RANKS); }

  // False when the group is broken.
  JN_DEV bool enter() {
    epoch = load_relaxed(&header(0)->epoch) + 1u;
    if (thread_id() == 0) verdicts[0] = load_relaxed(&header(0)->dead);
    barrier();
    const bool alive = verdicts[0] == 0;
    barrier();
    return alive;
  }

  // Tells the other ranks that this block's writes of `phase` are there.
  JN_DEV void signal(int phase) const {
    publish();
    Header* to = nullptr;
#pragma unroll
    for (int d = 1; d < RANKS; ++d)
      if (thread_id() == u32(d)) to = header(d);
    if (to != nullptr) store_release(&to->flag[phase][block_x()][rank], u64(signature) << 32 | epoch);
  }

  // Waits for the other ranks' signal; false, in all threads, when one did not come.
  JN_DEV bool wait(int phase) const {
    barrier();  // all have signalled before one of them spins
    const u32 t = thread_id();
    if (t < u32(RANKS)) verdicts[t] = t == rank ? 0u : poll(phase, t);
    publish();
    u32 bad = 0;
#pragma unroll
    for (int r = 0; r < RANKS; ++r) bad |= verdicts[r];
    return bad == 0;
  }

  // The last block out ends the call.
  JN_DEV void leave(u32 blocks) const {
    barrier();
    if (thread_id() != 0) return;
    Header* me = header(0);
    if (count_up(&me->done) == blocks - 1) {
      store_relaxed(&me->done, 0u);
      store_relaxed(&me->epoch, epoch);
    }
  }

 private:
  JN_DEV u32 poll(int phase, u32 from) const {
    const u64* flag = &header(0)->flag[phase][block_x()][from];
    u64 start = 0;
    for (u32 n = 1;; ++n) {
      // Relaxed while it waits: an acquire empties the cache that other blocks of the unit use.
      const u64 seen = load_relaxed(flag);
      const int ahead = int(u32(seen) - epoch);
      if (ahead == 0 && u32(seen >> 32) != signature) return fail(kOtherCall, phase, from);
      if (ahead >= 0) {
        load_acquire(flag);
        return 0;
      }
      if (n % 64 != 0) continue;
      const u64 now = ticks();
      if (start == 0) start = now;
      if (load_relaxed(&header(0)->dead) != 0) return fail(kPeerGaveUp, phase, from);
      if (now - start > patience) return fail(kTimedOut, phase, from);
    }
  }
  // The host keeps the first reason it sees; the other ranks need not wait for their own time to run out.
  JN_DEV u32 fail(u32 kind, int phase, u32 from) const {
    if (load_relaxed(error) == 0) store_relaxed(error, kind + 16u * u32(phase) + 256u * from);
#pragma unroll
    for (int d = 0; d < RANKS; ++d) store_relaxed(&header(d)->dead, 1u);
    return 1;
  }
};

}  // namespace jaxnorm
