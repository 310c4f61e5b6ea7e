// What is done to a row at a time: norms, residuals, activations, rotary positions. Sums run over 16 lanes in
// one order. Knows no weights' layout and no pages.
#pragma once

#include "simd.h"

namespace pb {

struct Norm {
  const float *weight;  // none: no norm
  const float *bias;    // or none
  float eps;
  int32_t is_centered;  // the mean is taken off first
};

// out = norm(x), n numbers; x and out may be the same. Returns the sum of squares, which tells what is not finite.
static inline float norm_row(const Norm &norm, const float *x, long n, float *out) {
  float mean = 0;
  if (norm.is_centered) {
    vf sum = splat(0.0f);
    for (long i = 0; i < n; i += LANES) sum += load_some(x + i, int(n - i));
    mean = sum_of(sum) / float(n);
  }
  vf squares = splat(0.0f);
  for (long i = 0; i < n; i += LANES) {
    vf part = load_some(x + i, int(n - i));
    if (norm.is_centered) {
      part = part - splat(mean);
      if (n - i < LANES)
        for (int k = int(n - i); k < LANES; k++) part[k] = 0;
    }
    squares += part * part;
  }
  float total = sum_of(squares);
  float factor = 1.0f / std::sqrt(total / float(n) + norm.eps);
  for (long i = 0; i < n; i += LANES) {
    int some = int(n - i);
    vf part = (load_some(x + i, some) - splat(mean)) * splat(factor) * load_some(norm.weight + i, some);
    if (norm.bias) part += load_some(norm.bias + i, some);
    store_some(out + i, part, some);
  }
  return total;
}

template <class T> static inline bool is_finite_row(const T *x, long n) {
  vi most = {};
  for (long i = 0; i < n; i += LANES) {
    vi bits = (vi)load_some(x + i, int(n - i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  for (int i = 0; i < LANES; i++)
    if (most[i] >= 0x7f800000) return false;
  return true;
}

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, RELU_SQUARED = 2, GELU = 3 };

static inline vf activate(int32_t kind, vf x) {
  switch (kind) {
    case SILU: return x / (splat(1.0f) + exp_of(-x));
    case GELU_TANH: {
      vf inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * (x * x * x));
      return splat(0.5f) * x * (splat(1.0f) + tanh_of(inner));
    }
    case RELU_SQUARED: {
      vf positive = largest(x, splat(0.0f));
      return positive * positive;
    }
    default: {
      vf out;
      for (int i = 0; i < LANES; i++) out[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067811865476f));
      return out;
    }
  }
}

// [gate | up] becomes act(gate) * up; without a gate act(x). n: numbers that come out.
template <class T> static inline void activate_row(int32_t kind, bool is_gated, const T *x, long n, T *out) {
  for (long i = 0; i < n; i += LANES) {
    int some = int(n - i);
    vf made = activate(kind, load_some(x + i, some));
    if (is_gated) made *= load_some(x + n + i, some);
    store_some(out + i, made, some);
  }
}

// One head's rotary positions in place: pairs are halves apart, or neighbours.
static inline void turn(float *x, const float *cos, const float *sin, int num_factors, bool is_interleaved) {
  int i = 0;
  for (; !is_interleaved && i + LANES <= num_factors; i += LANES) {
    vf first = load(x + i), second = load(x + i + num_factors), c = load(cos + i), s = load(sin + i);
    store(x + i, first * c - second * s);
    store(x + i + num_factors, second * c + first * s);
  }
  for (; i < num_factors; i++) {
    float *a = x + (is_interleaved ? 2 * i : i), *b = x + (is_interleaved ? 2 * i + 1 : i + num_factors);
    float first = *a, second = *b;
    *a = first * cos[i] - second * sin[i];
    *b = second * cos[i] + first * sin[i];
  }
}

template <class T> static inline void widen_row(const T *x, long n, float *out) {
  for (long i = 0; i < n; i += LANES) store_some(out + i, load_some(x + i, int(n - i)), int(n - i));
}

template <class T> static inline void narrow_row(const float *x, long n, T *out) {
  for (long i = 0; i < n; i += LANES) store_some(out + i, load_some(x + i, int(n - i)), int(n - i));
}

}  // namespace pb
