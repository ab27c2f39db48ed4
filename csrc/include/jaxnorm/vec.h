// Chunks: V consecutive elements of a row that one lane moves at once, as the bits found in memory. V is the largest
// power of two for which every row of every buffer starts on a chunk boundary, so an access is always aligned and never
// crosses the row's end.
#pragma once
#include "jaxnorm/dtype.h"

namespace jaxnorm {

template <int BYTES> struct alignas(BYTES > 16 ? 16 : BYTES) Bits {
  static_assert(BYTES % 4 == 0, "whole words");
  u32 word[BYTES / 4];
};
template <> struct alignas(2) Bits<2> {
  u16 half;
};
template <> struct Bits<0> {};

template <class T, int V> using Chunk = Bits<T::size * V>;

template <int BYTES> JN_DEV Bits<BYTES> zero_bits() {
  Bits<BYTES> b{};
  return b;
}

template <class T, int V, bool AGAIN = false> JN_DEV void widen(const Chunk<T, V>& c, float (&f)[V]) {
  if constexpr (T::size == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) f[i] = bits_f32(c.word[i]);
  } else if constexpr (V == 1) {
    float unused;
    unpack2(T{}, c.half, f[0], unused);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (AGAIN)
        unpack2_again(T{}, c.word[i], f[2 * i], f[2 * i + 1]);
      else
        unpack2(T{}, c.word[i], f[2 * i], f[2 * i + 1]);
    }
  }
}

template <class T, int V> JN_DEV Chunk<T, V> narrow(const float (&f)[V]) {
  Chunk<T, V> c;
  if constexpr (T::size == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) c.word[i] = f32_bits(f[i]);
  } else if constexpr (V == 1) {
    c.half = u16(pack2(T{}, f[0], 0.f));
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) c.word[i] = pack2(T{}, f[2 * i], f[2 * i + 1]);
  }
  return c;
}

// One access of at most 16 bytes. Streamed: read once; on NVIDIA an ordinary load all the same, which was 3 to 5 %
// faster on an H200 than one that bypasses the first-level cache (8192x4096 1.04 of a copy against 1.07).
template <int BYTES, bool STREAMED> JN_DEV Bits<BYTES> load_piece(const char* p) {
#if defined(JN_NVIDIA)
  // volatile keeps the loads where they are written: all of a row before the first use of one
  Bits<BYTES> b;
  if constexpr (BYTES == 16) {
    if constexpr (STREAMED)
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b.word[0]), "=r"(b.word[1]), "=r"(b.word[2]), "=r"(b.word[3])
                   : "l"(p));
    else
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b.word[0]), "=r"(b.word[1]), "=r"(b.word[2]), "=r"(b.word[3])
                   : "l"(p));
  } else if constexpr (BYTES == 8) {
    if constexpr (STREAMED)
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(b.word[0]), "=r"(b.word[1]) : "l"(p));
    else
      asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(b.word[0]), "=r"(b.word[1]) : "l"(p));
  } else if constexpr (BYTES == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(b.word[0]) : "l"(p));
  } else {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(b.half) : "l"(p));
  }
  return b;
#else
  return *(const Bits<BYTES>*)p;
#endif
}

template <class T, int V, bool STREAMED> JN_DEV Chunk<T, V> load_chunk(const char* p) {
  constexpr int bytes = T::size * V;
  if constexpr (bytes <= 16) {
    return load_piece<bytes, STREAMED>(p);
  } else {
    Chunk<T, V> c;
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      const Bits<16> piece = load_piece<16, STREAMED>(p + 16 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) c.word[4 * i + j] = piece.word[j];
    }
    return c;
  }
}

// JN_STREAM (AMD): the results are larger than the last cache, so none of them will be found there by whoever reads
// them next; a non-temporal store leaves the cache to what is read again (weights, partial sums, other kernels' data).
#if defined(JN_AMD) && defined(JN_STREAM) && JN_STREAM
#define JN_NON_TEMPORAL 1
template <int BYTES> JN_DEV void store_piece(char* p, const Bits<BYTES>& b) {
  if constexpr (BYTES == 16) {
    typedef u32 Four __attribute__((ext_vector_type(4)));
    __builtin_nontemporal_store(Four{b.word[0], b.word[1], b.word[2], b.word[3]}, (Four*)p);
  } else if constexpr (BYTES == 8) {
    typedef u32 Pair __attribute__((ext_vector_type(2)));
    __builtin_nontemporal_store(Pair{b.word[0], b.word[1]}, (Pair*)p);
  } else {
    *(Bits<BYTES>*)p = b;
  }
}
#endif

template <int BYTES> JN_DEV void store_bits(char* p, const Bits<BYTES>& b) {
  if constexpr (BYTES <= 16) {
#if defined(JN_NON_TEMPORAL)
    store_piece(p, b);
#else
    *(Bits<BYTES>*)p = b;
#endif
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {
      Bits<16> piece;
#pragma unroll
      for (int j = 0; j < 4; ++j) piece.word[j] = b.word[4 * i + j];
#if defined(JN_NON_TEMPORAL)
      store_piece(p + 16 * i, piece);
#else
      ((Bits<16>*)p)[i] = piece;
#endif
    }
  }
}

// A lane's private copies from global to shared memory. Where the hardware can, they go past the registers and run on
// their own until async_wait; elsewhere they are plain copies. No barrier is needed, because only the lane that asked
// reads the copy.
template <int BYTES> JN_DEV void async_copy(unsigned char* to, const char* from) {
#if defined(JN_SIMT)
  simt::async_copy(to, from, BYTES);
#elif defined(JN_ASYNC_COPY)
  if constexpr (BYTES >= 4) {
    const u32 address = u32(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(address), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" : : "r"(address), "l"(from), "n"(BYTES) : "memory");
  } else {
    *(Bits<BYTES>*)to = load_piece<BYTES, true>(from);
  }
#else
  *(Bits<BYTES>*)to = load_piece<BYTES, true>(from);
#endif
}
JN_DEV void async_commit() {
#if defined(JN_SIMT)
  simt::async_commit();
#elif defined(JN_ASYNC_COPY)
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
// Waits until at most PENDING of the committed groups are still running.
template <int PENDING> JN_DEV void async_wait() {
#if defined(JN_SIMT)
  simt::async_wait(PENDING);
#elif defined(JN_ASYNC_COPY)
  asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
#endif
}
// Waits until at most `pending` of them, at most MOST, are still running.
template <int MOST> JN_DEV void async_wait_for(u32 pending) {
  if constexpr (MOST == 0) {
    async_wait<0>();
  } else {
    if (pending >= u32(MOST))
      async_wait<MOST>();
    else
      async_wait_for<MOST - 1>(pending);
  }
}

// A chunk in shared memory, in pieces of at most 16 bytes that lie THREADS apart: neighbouring lanes never meet in a
// bank.
template <class T, int V, int THREADS> struct Stash {
  static constexpr int bytes = T::size * V, piece = min_of(bytes, 16), pieces = bytes ? bytes / piece : 0;
  static constexpr int footprint = bytes * THREADS;
  static JN_DEV void fetch(unsigned char* base, u32 thread, const char* from) {
#pragma unroll
    for (int i = 0; i < pieces; ++i) async_copy<piece>(base + (i * THREADS + thread) * piece, from + i * piece);
  }
  static JN_DEV Chunk<T, V> read(const unsigned char* base, u32 thread) {
    if constexpr (pieces <= 1) {
      return *(const Bits<bytes>*)(base + thread * piece);
    } else {
      Chunk<T, V> c;
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        const Bits<16> b = *(const Bits<16>*)(base + (i * THREADS + thread) * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) c.word[4 * i + j] = b.word[j];
      }
      return c;
    }
  }
};

}  // namespace jaxnorm
