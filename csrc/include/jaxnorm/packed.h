// Rows of bfloat16 on their way between devices in 12 bits a value, without loss: what the links carry is what a large
// call waits for.
//
// Values of one row rarely differ in more than 14 powers of two. A group of 256 values (32 lanes of a chunk) is sent as
// planes: sign and significand, a byte a value; then 4 bits a value, which say how far its exponent lies below the
// largest of the group (15: the exponent is zero, as that of zeros and subnormals). The largest exponent, the top, is a
// byte of the row's own. A group with a value further down, or with an infinity or a NaN, has the top kWide and a
// third plane: the 4 bits are then the lower ones of the exponent, the third plane has the upper ones. A group's place
// is as large as the values themselves would need; what is not needed is neither sent nor read.
#pragma once
#include "jaxnorm/vec.h"

namespace jaxnorm {

constexpr int kPackGroup = 256;
constexpr u32 kWide = 255;
constexpr int kLowAt = kPackGroup, kHighAt = kPackGroup * 3 / 2;  // of the second and the third plane, in bytes

// ---- four values in the bytes of a word

JN_DEV u32 nibbles(u32 bytes) {  // the lower halves of four bytes, in 16 bits
  bytes = (bytes | bytes >> 4) & 0x00ff00ffu;
  return (bytes | bytes >> 8) & 0xffffu;
}
JN_DEV u32 bytes_of(u32 nibbles) {
  const u32 pairs = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (pairs | pairs << 4) & 0x0f0f0f0fu;
}
// 0xff where a byte's lowest bit is set; no other bit may be
JN_DEV u32 spread(u32 ones) { return (ones << 8) - ones; }

struct Four {
  u32 exponents, rest;  // rest: sign and significand
};
JN_DEV Four split(u32 first, u32 second) {  // two values a word
  const u32 high = pick_bytes<0x7531>(first, second), low = pick_bytes<0x6420>(first, second);
  return Four{((high & 0x7f7f7f7fu) << 1) | ((low >> 7) & 0x01010101u), (high & 0x80808080u) | (low & 0x7f7f7f7fu)};
}
JN_DEV void join(const Four& four, u32& first, u32& second) {
  const u32 high = (four.rest & 0x80808080u) | ((four.exponents >> 1) & 0x7f7f7f7fu);
  const u32 low = (four.rest & 0x7f7f7f7fu) | ((four.exponents << 7) & 0x80808080u);
  first = pick_bytes<0x5140>(low, high), second = pick_bytes<0x7362>(low, high);
}

// Distances from the top, 15 for an exponent of zero; bad: not zero where one does not fit.
JN_DEV u32 distances(u32 exponents, u32 top, u32& bad) {
  const u32 some = (((exponents & 0x7f7f7f7fu) + 0x7f7f7f7fu) | exponents) >> 7 & 0x01010101u;  // not zero
  const u32 there = spread(some);
  const u32 below = (top * 0x01010101u - exponents) & there;
  bad |= (below & 0xf0f0f0f0u) | ((below + 0x01010101u) & 0x10101010u);
  return below | (~there & 0x0f0f0f0fu);
}
JN_DEV u32 exponents_below(u32 distances, u32 top) {
  const u32 there = ~spread((distances + 0x01010101u) >> 4 & 0x01010101u);
  return (top * 0x01010101u - (distances & there)) & there;
}

// ---- rows

// What 32 lanes have to say of their group.
struct PackedChunk {
  u32 rest[2], low, high, top;
};
JN_DEV PackedChunk pack_chunk(const Bits<16>& c) {  // all lanes of the group
  const Four a = split(c.word[0], c.word[1]), b = split(c.word[2], c.word[3]);
  u32 even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 size = c.word[i] & 0x7fff7fffu;
    odd = odd < size ? size : odd;
    even = even < size << 16 ? size << 16 : even;
  }
  const u32 top = max_of_32((odd < even ? even : odd) >> 23);
  u32 bad = top == kWide;
  PackedChunk p{{a.rest, b.rest}, nibbles(distances(a.exponents, top, bad)), 0, top};
  p.low |= nibbles(distances(b.exponents, top, bad)) << 16;
  if (max_of_32(bad) != 0) {
    p.low = nibbles(a.exponents & 0x0f0f0f0fu) | nibbles(b.exponents & 0x0f0f0f0fu) << 16;
    p.high = nibbles((a.exponents >> 4) & 0x0f0f0f0fu) | nibbles((b.exponents >> 4) & 0x0f0f0f0fu) << 16;
    p.top = kWide;
  }
  return p;
}

// put(i, piece i of 16 bytes) for the PIECES from `from` on, at most MOST of a thread on their way at once. All
// threads.
template <int PIECES, int THREADS, int MOST, class Put> JN_DEV void for_pieces(const char* from, Put put) {
  constexpr int per = ceil_div(PIECES, THREADS), batch = min_of(per, MOST);
  const u32 thread = thread_id();
#pragma unroll 1
  for (int first = 0; first < per; first += batch) {
    Bits<16> bits[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const u32 piece = (first + k) * THREADS + thread;
      if (piece < u32(PIECES)) bits[k] = load_piece<16, true>(from + u64(piece) * 16);
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const u32 piece = (first + k) * THREADS + thread;
      if (piece < u32(PIECES)) put(piece, bits[k]);
    }
  }
}

// A row of N values, from memory to its place on another device; tops: N / 256 bytes in shared memory. All threads.
template <int N, int THREADS> JN_DEV void send_packed(char* to, u8* tops, const char* from) {
  static_assert(N % kPackGroup == 0 && THREADS % 32 == 0, "whole groups");
  for_pieces<N / 8, THREADS, 4>(from, [=](u32 piece, const Bits<16>& bits) {
    const u32 lane = piece % 32;
    const PackedChunk p = pack_chunk(bits);
    char* group = to + u64(piece / 32) * (2 * kPackGroup);
    store_bits(group + lane * 8, Bits<8>{{p.rest[0], p.rest[1]}});
    store_bits(group + kLowAt + lane * 4, Bits<4>{{p.low}});
    if (p.top == kWide) store_bits(group + kHighAt + lane * 4, Bits<4>{{p.high}});
    if (lane == 0) tops[piece / 32] = u8(p.top);
  });
}

// V values on their way through registers: as they are, or packed.
template <int V> struct Incoming {
  static_assert(V == 4 || V == 8, "half a chunk or a whole one");
  u32 word[V == 8 ? 4 : 3];

  JN_DEV void load(const char* values) {
    const Chunk<BF16, V> c = load_chunk<BF16, V, true>(values);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) word[i] = c.word[i];
  }
  // row, tops: of the row; column: of the first value
  JN_DEV void load_packed(const char* row, const char* tops, u32 column) {
    const char* group = row + (column / kPackGroup) * (2 * kPackGroup);
    const u32 at = column % kPackGroup;
    const Bits<V> rest = load_piece<V, true>(group + at);
#pragma unroll
    for (int i = 0; i < V / 4; ++i) word[i] = rest.word[i];
    if constexpr (V == 8)
      word[2] = load_piece<4, true>(group + kLowAt + at / 2).word[0];
    else
      word[1] = load_piece<2, true>(group + kLowAt + at / 2).half;
    word[V / 4 + 1] = *(const volatile u8*)(tops + column / kPackGroup);
  }
  JN_DEV Chunk<BF16, V> values() const {
    Chunk<BF16, V> c;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) c.word[i] = word[i];
    return c;
  }
  JN_DEV Chunk<BF16, V> unpacked(const char* row, u32 column) const {
    const u32 low = word[V / 4], top = word[V / 4 + 1];
    u32 high = 0;
    if (top == kWide) {
      const char* plane = row + (column / kPackGroup) * (2 * kPackGroup) + kHighAt + column % kPackGroup / 2;
      if constexpr (V == 8)
        high = load_piece<4, true>(plane).word[0];
      else
        high = load_piece<2, true>(plane).half;
    }
    Chunk<BF16, V> c;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      const u32 four = bytes_of(low >> (16 * i) & 0xffffu);
      const u32 wide = four | bytes_of(high >> (16 * i) & 0xffffu) << 4;
      join(Four{top == kWide ? wide : exponents_below(four, top), word[i]}, c.word[2 * i], c.word[2 * i + 1]);
    }
    return c;
  }
};

}  // namespace jaxnorm
