// Vectors of 16 floats, bfloat16 and float32 numbers, and the functions that steps need of them.
// Written with the compiler's own vector types, so that any processor runs it; AVX-512-BF16 has a path of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pb {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef float vf_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi_u __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t vh_u __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int LANES = 16;

struct bf16 {
  uint16_t bits;
};

static inline vf splat(float x) {
  return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
static inline float widen(float x) { return x; }

static inline void narrow(float x, bf16 *out) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000)
    out->bits = uint16_t(bits >> 16) | 0x40;
  else
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void narrow(float x, float *out) { *out = x; }

static inline vf load(const float *p) { return *reinterpret_cast<const vf_u *>(p); }
static inline vf load(const bf16 *p) {
#if defined(__AVX512F__)
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  vh half = *reinterpret_cast<const vh_u *>(p);
  vi wide = __builtin_convertvector(half, vi) << 16;
  return (vf)wide;
#endif
}

static inline void store(float *p, vf x) { *reinterpret_cast<vf_u *>(p) = x; }
static inline void store(bf16 *p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  for (int i = 0; i < LANES; i++) narrow(x[i], p + i);
#endif
}

// 16 bytes as integers, and back; written out because compilers take such conversions apart.
static inline vi load_signed(const void *p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
#else
  vi out;
  for (int i = 0; i < LANES; i++) out[i] = static_cast<const int8_t *>(p)[i];
  return out;
#endif
}
static inline vi load_unsigned(const void *p) { return load_signed(p) & 0xff; }
static inline void store_bytes(void *p, vi x) {  // the lowest byte of each
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i *>(p), _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < LANES; i++) static_cast<uint8_t *>(p)[i] = uint8_t(x[i]);
#endif
}
static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

static inline vf largest(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

static inline vf smallest(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

static inline float sum_of(vf x) {  // one order, whatever the processor
#if defined(__AVX512DQ__)
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = x[i] + x[i + 8];
  for (int n = 4; n > 0; n /= 2)
    for (int i = 0; i < n; i++) half[i] += half[i + n];
  return half[0];
#endif
}

static inline float largest_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float out = x[0];
  for (int i = 1; i < LANES; i++) out = x[i] > out ? x[i] : out;
  return out;
#endif
}

// e^x by 2^n * e^r, |r| <= ln2 / 2, the remainder by a polynomial: about one unit in the last place.
static inline vf exp_of(vf x) {
  x = smallest(splat(88.0f), largest(splat(-87.0f), x));  // a NaN stays one
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf t = x * splat(1.44269504088896341f) + magic;
  vf n = t - magic;
  vf r = x - n * splat(0.693145751953125f);
  r = r - n * splat(1.42860682030941723e-6f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  vi scaled = (vi)p + ((vi)t << 23);
  return (vf)scaled;
}

static inline vf tanh_of(vf x) {
  x = smallest(splat(10.0f), largest(splat(-10.0f), x));
  vf e = exp_of(x + x);
  return (e - splat(1.0f)) / (e + splat(1.0f));
}

// The first `n` (0 to 16) numbers, zeros behind them.
template <class T> static inline vf load_some(const T *p, int n) {
  if (n >= LANES) return load(p);
  alignas(64) T some[LANES] = {};
  for (int i = 0; i < n; i++) some[i] = p[i];
  return load(some);
}

template <class T> static inline void store_some(T *p, vf x, int n) {
  if (n >= LANES) return store(p, x);
  alignas(64) T some[LANES];
  store(some, x);
  for (int i = 0; i < n; i++) p[i] = some[i];
}

}  // namespace pb
