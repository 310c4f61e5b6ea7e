// Numbers in pages: as they are, or one byte each with a scale a vector (a token's key or value in one head).
//
//   INT8  number = stored * peak / 127    peak: the vector's largest magnitude, float32, beside the pages
//   E4M3  number = stored * peak / 448    float8 e4m3; below 2^-6 it stores zero: 3.5e-5 of the peak
//
// What is stored depends on the vector alone. Both kinds of bytes are exact in bfloat16, so that products run on
// them as they are; a key's scale goes to its score, a value's to its weight.
#pragma once

#include "gemm.h"

namespace pb {

constexpr int BLOCK = 16;
constexpr int MAX_DIM = 576;

enum PageKind : int32_t { PLAIN = 0, INT8 = 1, E4M3 = 2 };

static inline float most_of(int32_t kind) { return kind == INT8 ? 127.0f : 448.0f; }

// `count` stored numbers, a multiple of 16, without their scales.
template <class T> static inline void widen_page(int32_t kind, const void *page, long count, T *out) {
  const uint8_t *from = static_cast<const uint8_t *>(page);
  if (kind == INT8) {
    for (long i = 0; i < count; i += LANES) store(out + i, to_float(load_signed(from + i)));
    return;
  }
  for (long i = 0; i < count; i += LANES) {
    vi wide = load_unsigned(from + i), size = wide & 0x7f;
    vi bits = size == 0 ? size : (size << 20) + (120 << 23);
    store(out + i, (vf)(bits | ((wide & 0x80) << 24)));
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// The same, 32 numbers at once: a page holds a multiple of that.
static inline void widen_page(int32_t kind, const void *page, long count, bf16 *out) {
  const uint8_t *from = static_cast<const uint8_t *>(page);
  if (kind == INT8) {
    for (long i = 0; i < count; i += 2 * LANES) {
      __m512 low = (__m512)to_float(load_signed(from + i)), high = (__m512)to_float(load_signed(from + i + LANES));
      _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return;
  }
  __m512i size = _mm512_set1_epi16(0x7f), least = _mm512_set1_epi16(120 << 7), sign = _mm512_set1_epi16(0x80);
  for (long i = 0; i < count; i += 2 * LANES) {
    __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i)));
    __m512i bits = _mm512_slli_epi16(_mm512_and_si512(wide, size), 4);
    bits = _mm512_mask_add_epi16(bits, _mm512_test_epi16_mask(wide, size), bits, least);
    _mm512_storeu_si512(out + i, _mm512_or_si512(bits, _mm512_slli_epi16(_mm512_and_si512(wide, sign), 8)));
  }
}
#endif

// The bits of |x|'s largest: those of a NaN lie above those of infinity, and these above all others.
template <class T> static inline int32_t peak_bits(const T *x, int dim) {
  vi most = {};
  for (int i = 0; i < dim; i += LANES) {
    vi bits = (vi)load_some(x + i, dim - i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t out = 0;
  for (int i = 0; i < LANES; i++) out = most[i] > out ? most[i] : out;
  return out;
}

// A vector as it is stored, and its peak. What is not finite shows in the peak.
template <class T> static inline float quantize(int32_t kind, const T *x, int dim, uint8_t *out) {
  int32_t bits = peak_bits(x, dim);
  float peak;
  std::memcpy(&peak, &bits, 4);
  if (bits >= 0x7f800000) {
    std::memset(out, 0, dim);
    return peak;
  }
  vf factor = splat(most_of(kind) / (peak > 1e-30f ? peak : 1e-30f));
  for (int i = 0; i < dim; i += LANES) {
    vf scaled = load_some(x + i, dim - i) * factor;
    vi made;
    if (kind == INT8) {
      vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
      made = (vi)(scaled + magic) - (vi)magic;
    } else {
      vi size = (vi)scaled & 0x7fffffff;
      size = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);  // three bits of mantissa, ties to even
      size = size < 8 ? vi{} : size;
      size = size > 0x7e ? vi{} + 0x7e : size;
      made = size | (((vi)scaled >> 24) & 0x80);
    }
    uint8_t narrow[LANES];
    store_bytes(narrow, made);
    std::memcpy(out + i, narrow, dim - i < LANES ? dim - i : LANES);
  }
  return peak;
}

// One KV head's key goes into slot `place` of a block; groups of g numbers stay together. A value likewise.
template <int g, class E>
static inline void write_key(E *pages, long num_blocks, int head, long block, int place, int dim, const E *key) {
  E *to = pages + (head * num_blocks + block) * BLOCK * dim + place * g;
  for (int d = 0; d < dim; d += g) std::memcpy(to + d * BLOCK, key + d, sizeof(E) * g);
}

template <int g, class E>
static inline void write_value(E *pages, long num_blocks, int head, long block, int place, int dim, const E *value) {
  E *to = pages + (head * num_blocks + block) * BLOCK * dim + place / g * long(dim) * g + place % g;
  for (int d = 0; d < dim; d++) to[d * g] = value[d];
}

// A layer's pages.
struct Pages {
  void *keys, *values;
  float *key_peaks, *value_peaks;  // [kv_heads][blocks][16], where the kind is not PLAIN
  int64_t num_blocks;              // with the last, which is no row's
  int32_t kind, kv_heads, key_dim, value_dim;
};

template <class T>
static inline void write_head(const Pages &pages, int head, long block, int place, const T *key, const T *value) {
  constexpr int g = group_of<T>;
  long num = pages.num_blocks;
  if (pages.kind == PLAIN) {
    write_key<g>(static_cast<T *>(pages.keys), num, head, block, place, pages.key_dim, key);
    write_value<g>(static_cast<T *>(pages.values), num, head, block, place, pages.value_dim, value);
    return;
  }
  uint8_t stored[MAX_DIM];
  long slot = (head * num + block) * BLOCK + place;
  pages.key_peaks[slot] = quantize(pages.kind, key, pages.key_dim, stored);
  write_key<g, uint8_t>(static_cast<uint8_t *>(pages.keys), num, head, block, place, pages.key_dim, stored);
  pages.value_peaks[slot] = quantize(pages.kind, value, pages.value_dim, stored);
  write_value<g, uint8_t>(static_cast<uint8_t *>(pages.values), num, head, block, place, pages.value_dim, stored);
}

}  // namespace pb
