// The KV cache: where a slot lies, what a head becomes in it, and the kernels' ways in and out.
//
// PAGE slots a page; slot s is place o = s % PAGE of page b = s / PAGE. X = elements of 16 bytes.
//   shuffled       k [pages, HEADS, D/X, PAGE, X]   v [pages, HEADS, PAGE/X, D, X]   scales [pages, HEADS, PAGE]
//   paged, slots   k, v [pages * PAGE, HEADS, D]                                     scales [pages * PAGE, HEADS]
#pragma once
#include "jaxnorm/rope.h"
#include "jaxnorm/scale.h"

namespace jaxnorm {

enum class Stored { kCast, kToken, kTensor };  // as floats, with a scale a token and head, with a scale of all

template <class C_, int HEADS_, int D_, int PAGE_, bool SHUFFLED_, Stored STORED_> struct CacheShape {
  using C = C_;
  static constexpr int HEADS = HEADS_, D = D_, PAGE = PAGE_;
  static constexpr bool SHUFFLED = SHUFFLED_;
  static constexpr Stored STORED = STORED_;
};
// Bytes of an element, of the float and of the 8-bit types.
template <class C, class = void> struct CacheElement {
  static constexpr int size = C::size;
};
template <class C> struct CacheElement<C, decltype(void(C::bits))> {
  static constexpr int size = 1;
};

// A slot as it came, and whether there is such a slot. I: I32 or I64.
template <class I> struct Slot {
  I s;
  JN_DEV bool inside(u64 slots) const { return s >= 0 && u64(s) < slots; }
};
// Asked for ahead of its use, together with the heads.
template <class I> JN_DEV Slot<I> issue_slot(const char* slots, u32 token, bool active) {
  if (!active) return Slot<I>{I(-1)};
  const Bits<sizeof(I)> b = load_piece<sizeof(I), true>(slots + u64(token) * sizeof(I));
  return Slot<I>{__builtin_bit_cast(I, b)};
}

// Byte offsets into the buffers; slot < 2^32.
template <class G> struct CacheIndex {
  static constexpr int size = CacheElement<typename G::C>::size, X = 16 / size;

  static JN_DEV u64 k(u32 slot, u32 head, u32 d) {
    if constexpr (G::SHUFFLED) {
      const u32 b = slot / G::PAGE, o = slot % G::PAGE;
      return (u64(b) * G::HEADS + head) * (G::D * G::PAGE * size) + ((d / X) * (G::PAGE * X) + o * X + d % X) * size;
    } else {
      return row(slot, head) + d * size;
    }
  }
  static JN_DEV u64 v(u32 slot, u32 head, u32 d) {
    if constexpr (G::SHUFFLED) {
      const u32 b = slot / G::PAGE, o = slot % G::PAGE;
      return (u64(b) * G::HEADS + head) * (G::D * G::PAGE * size) + ((o / X) * (G::D * X) + d * X + o % X) * size;
    } else {
      return row(slot, head) + d * size;
    }
  }
  static JN_DEV u64 scale(u32 slot, u32 head) {  // in elements
    if constexpr (G::SHUFFLED)
      return (u64(slot / G::PAGE) * G::HEADS + head) * G::PAGE + slot % G::PAGE;
    else
      return u64(slot) * G::HEADS + head;
  }

 private:
  static JN_DEV u64 row(u32 slot, u32 head) { return (u64(slot) * G::HEADS + head) * (G::D * size); }
};

// ---- what a head becomes

template <class G>
using CacheSpec = QuantSpec<typename G::C, 0, Exponent::kNone, Layout::kRow, G::STORED == Stored::kTensor, false>;

template <int BYTES> JN_DEV u32 byte_of(const Bits<BYTES>& b, int i) {
  if constexpr (BYTES == 1)
    return b.byte;
  else if constexpr (BYTES == 2)
    return (u32(b.half) >> (8 * i)) & 0xffu;
  else
    return (b.word[i / 4] >> (8 * (i % 4))) & 0xffu;
}
template <int SIZE, int COUNT, int BYTES> JN_DEV Bits<SIZE * COUNT> piece_of(const Bits<BYTES>& b, int i) {
  if constexpr (SIZE * COUNT == BYTES) {
    return b;
  } else {
    static_assert(SIZE * COUNT % 4 == 0, "pieces of whole words");
    Bits<SIZE * COUNT> p;
#pragma unroll
    for (int w = 0; w < SIZE * COUNT / 4; ++w) p.word[w] = b.word[i * (SIZE * COUNT / 4) + w];
    return p;
  }
}

template <class A, class B> struct SameType {
  static constexpr bool value = false;
};
template <class A> struct SameType<A, A> {
  static constexpr bool value = true;
};

// A lane's share of a head as the cache holds it, and its scale.
template <class S, class G> struct StoredHead {
  static constexpr int size = CacheElement<typename G::C>::size;
  Bits<S::V * size> c[S::PER][2];
  u32 scale;  // bits of the float32; per token only
};

template <class S, class G, class X>
JN_DEV StoredHead<S, G> stored_head(const HeadBits<S, X>& bits, const float* fixed) {
  using C = typename G::C;
  StoredHead<S, G> out;
  out.scale = 0;
  if constexpr (SameType<C, X>::value) {
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side) out.c[k][side] = bits.c[k][side];
  } else if constexpr (G::STORED == Stored::kCast) {
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float f[S::V];
        widen<X, S::V>(bits.c[k][side], f);
        out.c[k][side] = narrow<C, S::V>(f);
      }
  } else {
    using Q = CacheSpec<G>;
    HeadValues<S> v = values<S, X>(bits);
    Scale<Q> scale;
    if constexpr (G::STORED == Stored::kTensor) {
      scale = Scale<Q>::fixed(fixed);
    } else {
      float a = 0.f;
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side) a = max_or_nan(a, chunk_max(v.f[k][side]));
      scale = Scale<Q>::of_max(lanes_max<S::LANES>(a), 0.f);
      out.scale = scale.stored;
    }
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        scale.apply(v.f[k][side]);
        out.c[k][side] = encode<C, S::V>(v.f[k][side]);
      }
  }
  return out;
}
// ---- sinks: the result of a head, and the cache

struct CacheBuffers {
  char* data;    // k or v
  char* scales;  // per token, or null
  const float* fixed;
  u64 slots;
};

template <class S, class G>
JN_DEV void store_scale(const CacheBuffers& to, u32 slot, u32 head, u32 lane, const StoredHead<S, G>& h) {
  if (G::STORED == Stored::kToken && lane == 0) ((u32*)to.scales)[CacheIndex<G>::scale(slot, head)] = h.scale;
}
// The elements of k, or of v in the layouts where that is the same.
template <class S, class G>
JN_DEV void store_cached(const CacheBuffers& to, u32 slot, u32 head, u32 lane, const StoredHead<S, G>& h) {
  using Index = CacheIndex<G>;
  constexpr int size = StoredHead<S, G>::size, piece = G::SHUFFLED ? min_of(S::V, Index::X) : S::V;
#pragma unroll
  for (int k = 0; k < S::PER; ++k) {
    if (!S::has(k, lane)) continue;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const u32 d = S::column(S::item(k, lane), side);
#pragma unroll
      for (int i = 0; i < S::V / piece; ++i)
        store_bits(to.data + Index::k(slot, head, d + i * piece), piece_of<size, piece>(h.c[k][side], i));
    }
  }
}

// k: the rounded result into out (may be null: HAS_OUT) and the cache. The slot of the group's token came with its
// heads.
template <class G, class I, bool HAS_OUT> struct KeySink {
  char* out;  // [tokens, HEADS, D]
  CacheBuffers to;
  Slot<I> slot;
  template <class S, class X>
  JN_DEV void put(u32 token, u32 head, u32 lane, bool active, const HeadBits<S, X>& bits) const {
    if constexpr (HAS_OUT)
      store_head<S, X>(out + (u64(token) * G::HEADS + head) * (S::D * X::size), lane, active, bits);
    const StoredHead<S, G> h = stored_head<S, G>(bits, to.fixed);
    if (!active || !slot.inside(to.slots)) return;
    store_scale<S, G>(to, u32(slot.s), head, lane, h);
    store_cached<S, G>(to, u32(slot.s), head, lane, h);
  }
};

// ---- v: no norm, no rotation

// A block's heads as the cache holds them, for the shuffled layout, where the elements of a head of v lie 16 bytes
// apart: written from shared memory with neighbouring elements in neighbouring lanes, two to a sector of 32 bytes.
template <class S, class Deal, class G> struct ValueSpread {
  static constexpr int size = StoredHead<S, G>::size, ROWS = Deal::GROUPS * Deal::UNROLL, PITCH = S::D * size + 16;
  static constexpr int bytes = ROWS * PITCH + ROWS * 4;  // rows start in different banks
  static constexpr u32 nowhere = 0xffffffffu;

  static JN_DEV void put(u32 row, u32 lane, u32 place, const StoredHead<S, G>& h) {
    unsigned char* shared = shared_memory();
#pragma unroll
    for (int k = 0; k < S::PER; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (S::has(k, lane))
          store_bits((char*)shared + row * PITCH + S::column(S::item(k, lane), side) * size, h.c[k][side]);
    if (lane == 0) ((u32*)(shared + ROWS * PITCH))[row] = place;
  }
  static JN_DEV void write(u32 block, const CacheBuffers& to) {
    const unsigned char* shared = shared_memory();
    const u32* places = (const u32*)(shared + ROWS * PITCH);
    barrier();
    constexpr int all = ROWS * S::D, steps = ceil_div(all, Deal::THREADS);
#pragma unroll 16
    for (int step = 0; step < steps; ++step) {
      const u32 e = step * Deal::THREADS + thread_id(), row = e / S::D, d = e % S::D;
      if (all % Deal::THREADS != 0 && e >= u32(all)) break;
      const u32 place = places[row], unit = block * Deal::GROUPS + row / Deal::UNROLL;
      if (place != nowhere)
        store_bits(to.data + CacheIndex<G>::v(place, Deal::head(unit, row % Deal::UNROLL), d),
                   *(const Bits<size>*)(shared + row * PITCH + d * size));
    }
  }
};

// Heads one by one, wherever their slots are.
template <class S, class Deal, class G, class X, class I, bool HAS_OUT>
JN_DEV void value_heads(const char* v, u64 stride, const char* slots, u32 tokens, u32 block, char* out,
                        const CacheBuffers& to) {
  using Spread = ValueSpread<S, Deal, G>;
  const u32 thread = thread_id(), lane = thread % S::LANES, group = thread / S::LANES;
  const u32 unit = block * Deal::GROUPS + group, token = Deal::token(unit);
  const bool active = Deal::live(unit, tokens);
  const Slot<I> slot = issue_slot<I>(slots, token, active);
  HeadBits<S, X> bits[Deal::UNROLL];
#pragma unroll
  for (int u = 0; u < Deal::UNROLL; ++u)
    bits[u] = load_head<S, X>(v + token * stride + Deal::head(unit, u) * (S::D * X::size), lane,
                              active && Deal::has(unit, u));
#pragma unroll
  for (int u = 0; u < Deal::UNROLL; ++u) {
    const u32 head = Deal::head(unit, u);
    const bool mine = active && Deal::has(unit, u), written = mine && slot.inside(to.slots);
    if constexpr (HAS_OUT)
      store_head<S, X>(out + (u64(token) * G::HEADS + head) * (S::D * X::size), lane, mine, bits[u]);
    const StoredHead<S, G> h = stored_head<S, G>(bits[u], to.fixed);
    if (written) store_scale<S, G>(to, u32(slot.s), head, lane, h);
    if constexpr (G::SHUFFLED)
      Spread::put(group * Deal::UNROLL + u, lane, written ? u32(slot.s) : Spread::nowhere, h);
    else if (written)
      store_cached<S, G>(to, u32(slot.s), head, lane, h);
  }
  if constexpr (G::SHUFFLED) Spread::write(block, to);
}

// TILE neighbouring tokens of one head, for the shuffled layout, where the same element of X neighbouring slots is 16
// bytes: turned over in shared memory. X tokens that fill such a group of slots are written in whole pieces; others,
// wherever they go, element by element, with the same bits.
template <class S, class G, class X, class I, int THREADS, int TILE> struct ValueTile {
  static constexpr int size = StoredHead<S, G>::size, GROUP = CacheIndex<G>::X, GROUPS = THREADS / S::LANES;
  static constexpr int ROUNDS = TILE / GROUPS, PITCH = S::D * size + 16;  // rows start in different banks
  static constexpr int bytes = TILE * PITCH + TILE * 4;
  static_assert(TILE % GROUPS == 0 && TILE % GROUP == 0 && G::SHUFFLED, "tokens of a tile");
  static constexpr u32 nowhere = 0xffffffffu;

  template <bool HAS_OUT>
  static JN_DEV void run(const char* v, u64 stride, const char* slots, u32 tokens, u32 block, char* out,
                         const CacheBuffers& to) {
    unsigned char* shared = shared_memory();
    u32* places = (u32*)(shared + TILE * PITCH);
    const u32 thread = thread_id(), lane = thread % S::LANES, group = thread / S::LANES;
    const u32 head = block % G::HEADS, first = block / G::HEADS * TILE;
    Slot<I> slot[ROUNDS];
    HeadBits<S, X> bits[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const u32 token = first + r * GROUPS + group;
      slot[r] = issue_slot<I>(slots, token, token < tokens);
      bits[r] = load_head<S, X>(v + token * stride + head * (S::D * X::size), lane, token < tokens);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const u32 row = r * GROUPS + group, token = first + row;
      if constexpr (HAS_OUT)
        store_head<S, X>(out + (u64(token) * G::HEADS + head) * (S::D * X::size), lane, token < tokens, bits[r]);
      const StoredHead<S, G> h = stored_head<S, G>(bits[r], to.fixed);
      const bool inside = slot[r].inside(to.slots);
#pragma unroll
      for (int k = 0; k < S::PER; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          if (S::has(k, lane))
            store_bits((char*)shared + row * PITCH + S::column(S::item(k, lane), side) * size, h.c[k][side]);
      if (lane == 0) {
        places[row] = inside ? u32(slot[r].s) : nowhere;
      }
      if (inside) store_scale<S, G>(to, u32(slot[r].s), head, lane, h);
    }
    barrier();
    for (u32 i = thread; i < TILE / GROUP * S::D; i += THREADS) {
      const u32 d = i % S::D, rows = i / S::D * GROUP;
      const char* column = (const char*)shared + rows * PITCH + d * size;
      const u32 slot0 = places[rows];
      bool whole = slot0 % GROUP == 0;
#pragma unroll
      for (int t = 1; t < GROUP; ++t) whole = whole && places[rows + t] == slot0 + t;
      if (whole && slot0 != nowhere) {
        store_bits(to.data + CacheIndex<G>::v(slot0, head, d), gather_column(column));
      } else {
        for (int t = 0; t < GROUP; ++t)
          if (places[rows + t] != nowhere)
            store_bits(to.data + CacheIndex<G>::v(places[rows + t], head, d), *(const Bits<size>*)(column + t * PITCH));
      }
    }
  }

 private:
  static JN_DEV Bits<16> gather_column(const char* column) {
    Bits<16> b;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const char* at = column + w * (4 / size) * PITCH;
      if constexpr (size == 1)
        b.word[w] = pack_bytes(*(const u8*)at, *(const u8*)(at + PITCH), *(const u8*)(at + 2 * PITCH),
                               *(const u8*)(at + 3 * PITCH));
      else if constexpr (size == 2)
        b.word[w] = *(const u16*)at | u32(*(const u16*)(at + PITCH)) << 16;
      else
        b.word[w] = *(const u32*)at;
    }
    return b;
  }
};

// ---- reading

// The value of a code, exact.
template <int M, int B, bool FNUZ> JN_DEV float decode(Float8<M, B, FNUZ>, u32 code) {
  const u32 low = code & 0x7fu, sign = (code & 0x80u) << 24;
  if (FNUZ ? code == 0x80u : M == 3 ? low == 0x7fu : low > 0x7cu) return bits_f32(0x7fc00000u | sign);
  if (!FNUZ && M == 2 && low == 0x7cu) return bits_f32(0x7f800000u | sign);
  const float smallest = bits_f32(u32(127 + 1 - B - M) << 23);
  const float small = float(low & ((1u << M) - 1u)) * smallest;
  const u32 normal = (low << (23 - M)) + (u32(127 - B) << 23);
  return bits_f32((low < (1u << M) ? f32_bits(small) : normal) | sign);
}
JN_DEV float decode(Int8, u32 code) { return float(int(code << 24) >> 24); }

// Elements i of [count, HEADS, D], V at a time, from the slots: as they are, or codes times scales as float32. Slots
// that are not there give zeros.
template <class G, class I, int V>
JN_DEV void gather_cached(const char* slots, u64 count, u64 thread, const CacheBuffers& k, const CacheBuffers& v,
                          char* k_out, char* v_out) {
  using Index = CacheIndex<G>;
  constexpr int size = Index::size, per = G::D / V;
  constexpr bool floats = G::STORED == Stored::kCast;
  if (thread >= count * (2 * G::HEADS * per)) return;
  const bool value = thread >= count * (G::HEADS * per);
  const u64 at = value ? thread - count * (G::HEADS * per) : thread;
  const u32 d = u32(at % per) * V, head = u32(at / per % G::HEADS);
  const I s = ((const I*)slots)[at / (per * G::HEADS)];
  const CacheBuffers& from = value ? v : k;
  const bool inside = Slot<I>{s}.inside(from.slots);
  const u32 slot = inside ? u32(s) : 0;
  char* out = (value ? v_out : k_out) + at * (V * (floats ? size : 4));
  Bits<V * size> raw{};
  if (inside) {
    if (G::SHUFFLED && value) {
      const char* p = from.data + Index::v(slot, head, d);
      if constexpr (size == 4) {
#pragma unroll
        for (int i = 0; i < V; ++i) raw.word[i] = *(const u32*)(p + 16 * i);
      } else if constexpr (V * size >= 4) {
#pragma unroll
        for (int w = 0; w < V * size / 4; ++w) {
          u32 word = 0;
#pragma unroll
          for (int i = 0; i < 4 / size; ++i) {
            const char* e = p + 16 * (w * (4 / size) + i);
            word |= (size == 1 ? u32(*(const u8*)e) : u32(*(const u16*)e)) << (8 * size * i);
          }
          raw.word[w] = word;
        }
      } else if constexpr (V * size == 2) {
        raw.half = size == 2 ? *(const u16*)p : u16(*(const u8*)p | *(const u8*)(p + 16) << 8);
      } else {
        raw.byte = *(const u8*)p;
      }
    } else {
      raw = *(const Bits<V * size>*)(from.data + Index::k(slot, head, d));
    }
  }
  if constexpr (floats) {
    store_bits(out, raw);
  } else {
    float scale = 0.f;
    if (inside)
      scale = G::STORED == Stored::kTensor ? *from.fixed : ((const float*)from.scales)[Index::scale(slot, head)];
    Bits<V * 4> f;
#pragma unroll
    for (int i = 0; i < V; ++i) f.word[i] = inside ? f32_bits(decode(typename G::C{}, byte_of(raw, i)) * scale) : 0u;
    store_bits(out, f);
  }
}

}  // namespace jaxnorm
