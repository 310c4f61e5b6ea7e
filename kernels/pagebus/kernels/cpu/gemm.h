// Products of rows with a packed weight. Every output is one sum over the inputs in their order, whatever
// the number of rows: a row's result has the same bits in every batch.
//
//   packed weight: [outputs / 32][inputs / 2][32][2] in bfloat16, [outputs / 32][inputs][32] in float32
//   packed rows:   [tiles][inputs / 2][up to 14][2] in bfloat16, [tiles][inputs][up to 14] in float32
//
// Both are read from the front to the back, so that a product needs two addresses and all registers are sums.
// A panel of 32 outputs is read once for up to 14 rows; for more it stays in the second cache, and the next
// panel is fetched meanwhile.
#pragma once

#include "pool.h"
#include "simd.h"

namespace pb {

constexpr int PANEL = 32;
constexpr int MAX_TILE = 14;

template <class T> constexpr int group_of = 1;  // inputs that lie together
template <> constexpr int group_of<bf16> = 2;

static inline long round_up(long value, long step) { return (value + step - 1) / step * step; }

template <class T> static inline long panel_size(long num_in) { return round_up(num_in, group_of<T>) * PANEL; }

// acc[r][v] += rows' inputs times V vectors of outputs, over `num_groups` groups of inputs. The rows are packed,
// or lie STRIDE numbers apart.
template <int R, int V, int STRIDE = 0>
static inline __attribute__((always_inline)) void multiply(
    const bf16 *a, const bf16 *const (&b)[V], long b_step, long num_groups, vf (&acc)[R][V]) {
  constexpr long row = STRIDE ? STRIDE : 2, group = STRIDE ? 2 : 2 * R;
  for (long k = 0; k < num_groups; k++) {
#if defined(__AVX512BF16__)
    __m512bh w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) w[v] = (__m512bh)_mm512_loadu_si512(b[v] + k * b_step);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      int32_t pair;
      std::memcpy(&pair, a + k * group + r * row, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], x, w[v]);
    }
#else
    vf even[V], odd[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      vi pairs = *reinterpret_cast<const vi_u *>(b[v] + k * b_step);
      even[v] = (vf)(pairs << 16);
      odd[v] = (vf)(pairs & ~0xffff);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      vf x0 = splat(widen(a[k * group + r * row])), x1 = splat(widen(a[k * group + r * row + 1]));
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        acc[r][v] += x0 * even[v];
        acc[r][v] += x1 * odd[v];
      }
    }
#endif
  }
}

template <int R, int V, int STRIDE = 0>
static inline __attribute__((always_inline)) void multiply(
    const float *a, const float *const (&b)[V], long b_step, long num_groups, vf (&acc)[R][V]) {
  constexpr long row = STRIDE ? STRIDE : 1, group = STRIDE ? 1 : R;
  for (long k = 0; k < num_groups; k++) {
    vf w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) w[v] = load(b[v] + k * b_step);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      vf x = splat(a[k * group + r * row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] += x * w[v];
    }
  }
}

// Where the next panel lies, fetched a little in each pass over this one.
struct Ahead {
  const char *at;
  const char *end;
  long lines_a_chunk;
};

constexpr long CHUNK = 16;  // groups of inputs between two fetches

// Where a product goes: numbers of the inputs' type, or float32.
struct Target {
  void *out;
  long stride;
  bool is_wide;
};

// The sums of R rows and a panel, [R][32]: nothing else, so that the sums stay in registers.
template <int R, class T>
static __attribute__((noinline)) void tile(const T *a, const T *panel, long num_groups, float *sums, Ahead &ahead) {
  vf acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = splat(0.0f);
  constexpr long step = group_of<T> * PANEL;
  const char *fetch = ahead.at, *end = ahead.end;
  long bytes = ahead.lines_a_chunk * 64;
  for (long k = 0; k < num_groups; k += CHUNK) {
    const char *stop = fetch + bytes < end ? fetch + bytes : end;
    for (; fetch < stop; fetch += 64) __builtin_prefetch(fetch, 0, 2);
    const T *const b[2] = {panel, panel + group_of<T> * LANES};
    multiply<R, 2>(a, b, step, num_groups - k < CHUNK ? num_groups - k : CHUNK, acc);
    a += CHUNK * R * group_of<T>;
    panel += CHUNK * step;
  }
  ahead.at = fetch;
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    store(sums + r * PANEL, acc[r][0]);
    store(sums + r * PANEL + LANES, acc[r][1]);
  }
}

template <class T>
static void tile_of(
    int num_rows, const T *a, const T *panel, long num_in, const float *bias, const Target &to, long at, int num_out,
    Ahead &ahead) {
  alignas(64) float sums[MAX_TILE * PANEL];
  long num_groups = round_up(num_in, group_of<T>) / group_of<T>;
  switch (num_rows) {
#define PB_TILE(R) \
  case R: \
    tile<R>(a, panel, num_groups, sums, ahead); \
    break;
    PB_TILE(1) PB_TILE(2) PB_TILE(3) PB_TILE(4) PB_TILE(5) PB_TILE(6) PB_TILE(7)
    PB_TILE(8) PB_TILE(9) PB_TILE(10) PB_TILE(11) PB_TILE(12) PB_TILE(13) PB_TILE(14)
#undef PB_TILE
  }
  for (int r = 0; r < num_rows; r++) {
    for (int v = 0; v < PANEL && v < num_out; v += LANES) {
      vf x = load(sums + r * PANEL + v);
      if (bias) x += load_some(bias + v, num_out - v);
      long place = at + r * to.stride + v;
      if (to.is_wide)
        store_some(static_cast<float *>(to.out) + place, x, num_out - v);
      else
        store_some(static_cast<T *>(to.out) + place, x, num_out - v);
    }
  }
}

// `num_rows` rows in tiles of nearly the same size: the tiles' number, and where each begins.
struct Tiles {
  long num_rows, num;
  explicit Tiles(long num_rows) : num_rows(num_rows), num((num_rows + MAX_TILE - 1) / MAX_TILE) {}
  long first(long tile) const { return tile * num_rows / num; }
};

// How many numbers `pack_rows` writes.
template <class T> static inline long packed_rows_size(long num_rows, long num_in) {
  return num_rows * round_up(num_in, group_of<T>);
}

// A group is 4 bytes in either type: rows become columns.
template <class T>
static inline void pack_tile(const T *a, long stride, long num_rows, long num_in, T *packed) {
  constexpr int group = group_of<T>;
  static_assert(sizeof(T) * group == 4);
  long num_groups = num_in / group, done = 0;
#if defined(__SSE2__)
  for (; num_rows >= 4 && done + 4 <= num_groups; done += 4) {
    for (long r = 0; r < num_rows; r += 4) {
      if (r + 4 > num_rows) r = num_rows - 4;  // the last four once more
      const T *from = a + r * stride + done * group;
      auto load_4 = [&](long row) { return _mm_loadu_ps(reinterpret_cast<const float *>(from + row * stride)); };
      __m128 w = load_4(0), x = load_4(1), y = load_4(2), z = load_4(3);
      _MM_TRANSPOSE4_PS(w, x, y, z);
      auto store_4 = [&](long at, __m128 some) {
        _mm_storeu_ps(reinterpret_cast<float *>(packed + ((done + at) * num_rows + r) * group), some);
      };
      store_4(0, w), store_4(1, x), store_4(2, y), store_4(3, z);
    }
  }
#endif
  for (long r = 0; r < num_rows; r++)
    for (long k = done; k < num_groups; k++)
      std::memcpy(packed + (k * num_rows + r) * group, a + r * stride + k * group, 4);
}

// out[rows, num_out] = a[rows, num_in] * weight + bias. `packed` takes the packed rows. In bfloat16 the number
// of inputs is even.
template <class T>
static void gemm(
    Team &team, const T *a, long stride, long num_rows, const T *weight, const float *bias, long num_in, long num_out,
    const Target &to, T *packed) {
  if (num_rows == 0) return;
  long num_panels = round_up(num_out, PANEL) / PANEL;
  long size = panel_size<T>(num_in);
  const char *end = reinterpret_cast<const char *>(weight + num_panels * size);
  Tiles tiles(num_rows);
  if (num_rows == 1) {
    packed = const_cast<T *>(a);  // a lone row is packed as it stands
  } else {
    team.each(tiles.num, 1, [&](long t, long) {
      long row = tiles.first(t);
      pack_tile(a + row * stride, stride, tiles.first(t + 1) - row, num_in, packed + row * num_in);
    });
  }
  long piece = num_panels / (team.num_threads() * 8);
  team.each(num_panels, piece < 1 ? 1 : piece, [&](long first, long last) {
    for (long panel = first; panel < last; panel++) {
      const T *at = weight + panel * size;
      long features = num_out - panel * PANEL;
      Ahead ahead{reinterpret_cast<const char *>(at + size), end, (2 * CHUNK + tiles.num - 1) / tiles.num};
      const char *next_end = reinterpret_cast<const char *>(at + 2 * size);
      if (next_end < ahead.end) ahead.end = next_end;
      if (tiles.num == 1) ahead.at = reinterpret_cast<const char *>(at) + 4096, ahead.end = end;
      for (long t = 0; t < tiles.num; t++) {
        long row = tiles.first(t);
        tile_of(
            int(tiles.first(t + 1) - row), packed + row * num_in, at, num_in, bias ? bias + panel * PANEL : nullptr, to,
            row * to.stride + panel * PANEL, int(features < PANEL ? features : PANEL), ahead);
      }
    }
  });
}

template <class T> static void pack(Team &team, const T *weight, long num_in, long num_out, T *packed) {
  constexpr int group = group_of<T>;
  long num_panels = round_up(num_out, PANEL) / PANEL, size = panel_size<T>(num_in);
  team.each(num_panels, 1, [&](long first, long last) {
    for (long panel = first; panel < last; panel++) {
      T *to = packed + panel * size;
      for (long n = 0; n < PANEL; n++) {
        const T *from = weight + (panel * PANEL + n) * num_in;
        bool is_real = panel * PANEL + n < num_out;
        for (long k = 0; k < size / PANEL; k++)
          to[(k / group * PANEL + n) * group + k % group] = is_real && k < num_in ? from[k] : T{};
      }
    }
  });
}

}  // namespace pb
