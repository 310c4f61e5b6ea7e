// Attention over pages. A query meets its keys in chunks of 64, counted from position 0, so its result has the
// same bits in a prompt, in any part of one and while decoding, whatever else runs in the step.
//
//   key pages    [kv_heads][blocks][dim / g][16][g]    g = 2 in bfloat16, 1 in float32: what a product reads
//   value pages  [kv_heads][blocks][16 / g][dim][g]    at once lies together
//
// The heads that share a KV head are queries of the same tile. Masked keys weigh nothing; what lies in their
// pages must be finite.
#pragma once

#include <memory>

#include "gemm.h"

namespace pb {

constexpr int BLOCK = 16;
constexpr int CHUNK_BLOCKS = 4;
constexpr int CHUNK_KEYS = BLOCK * CHUNK_BLOCKS;
constexpr int MICRO = 6;   // queries multiplied at once
constexpr int QUERIES = 48;  // queries of a tile
constexpr int MAX_DIM = 576;
constexpr float LOWEST = -1e30f;

// The rows of a step: `count` tokens from flat token `first` on, at positions `start` and on.
struct Rows {
  int32_t num_rows;
  const int32_t *first, *count, *start;
};

struct Attention {
  const void *query;  // [tokens][heads][key_dim]
  void *out;          // [tokens][heads][value_dim]
  long query_stride, out_stride;
  const void *keys, *values;
  const int32_t *tables;  // [rows][width]; -1: no block
  const float *sinks;     // [heads] or none
  long width, num_blocks;  // num_blocks: with the last, which is no row's
  int32_t heads, kv_heads, key_dim, value_dim;
  int32_t window;  // 0: none
  float scale, softcap;
};

template <class T> struct TileState {
  alignas(64) T query[QUERIES * MAX_DIM];        // packed, MICRO queries at a time
  alignas(64) T weights[MICRO * CHUNK_KEYS];     // packed
  alignas(64) float scores[MICRO * CHUNK_KEYS];
  alignas(64) float sums[QUERIES * MAX_DIM];
  float top[QUERIES], total[QUERIES];
  int low[QUERIES], high[QUERIES];  // the keys that a query sees
};

template <int R, class T>
static __attribute__((noinline)) void score(const T *query, long dim, const T *const (&blocks)[CHUNK_BLOCKS], float *scores) {
  vf acc[R][CHUNK_BLOCKS];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < CHUNK_BLOCKS; v++) acc[r][v] = splat(0.0f);
  multiply<R, CHUNK_BLOCKS>(query, blocks, LANES * group_of<T>, dim / group_of<T>, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < CHUNK_BLOCKS; v++) store(scores + r * CHUNK_KEYS + v * LANES, acc[r][v]);
}

template <int R, int V, class T>
static __attribute__((noinline)) void add_values(
    const T *weights, const T *const (&blocks)[CHUNK_BLOCKS], long dim, int at, const float *shrink, float *sums,
    long sums_stride) {
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = load(sums + r * sums_stride + at + v * LANES) * splat(shrink[r]);
  for (int block = 0; block < CHUNK_BLOCKS; block++) {
    const T *b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) b[v] = blocks[block] + (at + v * LANES) * group_of<T>;
    multiply<R, V>(weights + block * BLOCK * R, b, dim * group_of<T>, BLOCK / group_of<T>, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(sums + r * sums_stride + at + v * LANES, acc[r][v]);
}

// Scores become weights: the new maximum, what the sums so far shrink by, and the chunk's part of the total.
template <int R, class T>
static __attribute__((noinline)) void weigh(TileState<T> &state, int q, int micro, int first_key, const Attention &call, float *shrink) {
  float *scores = state.scores + micro * CHUNK_KEYS;
  int low = state.low[q] - first_key, high = state.high[q] - first_key;
  vi places;
  for (int i = 0; i < LANES; i++) places[i] = i;
  vf top = splat(LOWEST), s[CHUNK_BLOCKS];
  vi seen[CHUNK_BLOCKS];
#pragma GCC unroll 4
  for (int v = 0; v < CHUNK_BLOCKS; v++) {
    s[v] = load(scores + v * LANES) * splat(call.scale);
    if (call.softcap > 0) s[v] = tanh_of(s[v] / splat(call.softcap)) * splat(call.softcap);
    vi at = places + v * LANES;
    seen[v] = (at >= low) & (at < high);
    s[v] = seen[v] ? s[v] : splat(LOWEST);
    top = largest(top, s[v]);
  }
  float before = state.top[q], now = largest_of(top);
  if (before > now) now = before;
  vf total = splat(0.0f);
#pragma GCC unroll 4
  for (int v = 0; v < CHUNK_BLOCKS; v++) {
    vf weight = seen[v] ? exp_of(s[v] - splat(now)) : splat(0.0f);
    total += weight;
    alignas(64) T narrowed[LANES];
    store(narrowed, weight);
    constexpr int g = group_of<T>;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += g)
      std::memcpy(state.weights + ((v * LANES + i) / g * R + micro) * g, narrowed + i, sizeof(T) * g);
  }
  shrink[micro] = exp_of(splat(before - now))[0];
  state.total[q] = state.total[q] * shrink[micro] + sum_of(total);
  state.top[q] = now;
}

template <int R, class T>
static void meet(
    TileState<T> &state, int q, int first_key, const Attention &call, const T *const (&keys)[CHUNK_BLOCKS],
    const T *const (&values)[CHUNK_BLOCKS]) {
  score<R>(state.query + q * call.key_dim, call.key_dim, keys, state.scores);
  float shrink[MICRO];
  for (int r = 0; r < R; r++) weigh<R>(state, q + r, r, first_key, call, shrink);
  float *sums = state.sums + q * call.value_dim;
  int at = 0;
  for (; at + 4 * LANES <= call.value_dim; at += 4 * LANES)
    add_values<R, 4>(state.weights, values, call.value_dim, at, shrink, sums, call.value_dim);
  for (; at < call.value_dim; at += LANES)
    add_values<R, 1>(state.weights, values, call.value_dim, at, shrink, sums, call.value_dim);
}

template <class T>
static void meet_some(
    int num, TileState<T> &state, int q, int first_key, const Attention &call, const T *const (&keys)[CHUNK_BLOCKS],
    const T *const (&values)[CHUNK_BLOCKS]) {
  switch (num) {
    case 1: return meet<1>(state, q, first_key, call, keys, values);
    case 2: return meet<2>(state, q, first_key, call, keys, values);
    case 3: return meet<3>(state, q, first_key, call, keys, values);
    case 4: return meet<4>(state, q, first_key, call, keys, values);
    case 5: return meet<5>(state, q, first_key, call, keys, values);
    default: return meet<6>(state, q, first_key, call, keys, values);
  }
}

// Queries [first, last) of a row and KV head; query number n is head n % share of token n / share.
template <class T>
static void attend_tile(
    TileState<T> &state, const Attention &call, const Rows &rows, int row, int kv_head, int first, int last) {
  int share = call.heads / call.kv_heads, num = last - first;
  const T *query = static_cast<const T *>(call.query);
  for (int n = 0; n < num; n++) {
    int token = (first + n) / share, head = kv_head * share + (first + n) % share;
    const T *from = query + (rows.first[row] + token) * call.query_stride + long(head) * call.key_dim;
    constexpr int g = group_of<T>;
    int micro = n / MICRO * MICRO, some = num - micro < MICRO ? num - micro : MICRO;
    T *to = state.query + micro * call.key_dim;
    for (int d = 0; d < call.key_dim; d += g)
      std::memcpy(to + (d / g * some + n - micro) * g, from + d, sizeof(T) * g);
    int position = rows.start[row] + token;
    state.high[n] = position + 1;
    state.low[n] = call.window > 0 && position + 1 > call.window ? position + 1 - call.window : 0;
    state.top[n] = LOWEST;
    state.total[n] = 0;
  }
  for (long i = 0; i < long(num) * call.value_dim; i++) state.sums[i] = 0;
  const int32_t *table = call.tables + row * call.width;
  long key_block = long(BLOCK) * call.key_dim, value_block = long(BLOCK) * call.value_dim;
  const T *key_pages = static_cast<const T *>(call.keys) + kv_head * call.num_blocks * key_block;
  const T *value_pages = static_cast<const T *>(call.values) + kv_head * call.num_blocks * value_block;
  int end = state.high[num - 1];
  for (int key = state.low[0] / CHUNK_KEYS * CHUNK_KEYS; key < end; key += CHUNK_KEYS) {
    const T *keys[CHUNK_BLOCKS], *values[CHUNK_BLOCKS];
    for (int i = 0; i < CHUNK_BLOCKS; i++) {
      int at = key / BLOCK + i;
      long block = at * BLOCK < end ? table[at] : -1;
      if (block < 0) block = call.num_blocks - 1;
      keys[i] = key_pages + block * key_block;
      values[i] = value_pages + block * value_block;
    }
    for (int q = 0; q < num; q += MICRO) {
      int some = num - q < MICRO ? num - q : MICRO;
      if (state.low[q] >= key + CHUNK_KEYS || state.high[q + some - 1] <= key) continue;
      meet_some(some, state, q, key, call, keys, values);
    }
  }
  T *out = static_cast<T *>(call.out);
  for (int n = 0; n < num; n++) {
    int token = (first + n) / share, head = kv_head * share + (first + n) % share;
    float factor = 1.0f, total = state.total[n];
    if (call.sinks) {
      float sink = call.sinks[head], top = sink > state.top[n] ? sink : state.top[n];
      factor = exp_of(splat(state.top[n] - top))[0];
      total = total * factor + exp_of(splat(sink - top))[0];
    }
    factor /= total;
    T *to = out + (rows.first[row] + token) * call.out_stride + long(head) * call.value_dim;
    for (int at = 0; at < call.value_dim; at += LANES)
      store(to + at, load(state.sums + n * call.value_dim + at) * splat(factor));
  }
}

template <class T> static void attend(Team &team, const Attention &call, const Rows &rows) {
  int share = call.heads / call.kv_heads;
  long num_items = 0;
  for (int row = 0; row < rows.num_rows; row++)
    num_items += (long(rows.count[row]) * share + QUERIES - 1) / QUERIES * call.kv_heads;
  thread_local std::unique_ptr<TileState<T>> kept(new TileState<T>);
  TileState<T> &state = *kept;
  team.each(num_items, 1, [&](long item, long) {
    int row = 0;
    for (;; row++) {
      long items = (long(rows.count[row]) * share + QUERIES - 1) / QUERIES * call.kv_heads;
      if (item < items) break;
      item -= items;
    }
    int tiles = (rows.count[row] * share + QUERIES - 1) / QUERIES;
    int tile = int(item) % tiles, first = tile * QUERIES, last = first + QUERIES;
    if (last > rows.count[row] * share) last = rows.count[row] * share;
    attend_tile<T>(state, call, rows, row, int(item) / tiles, first, last);
  });
}

// Puts one KV head's key into slot `place` of a block; a value likewise.
template <class T>
static inline void write_key(T *pages, long num_blocks, int head, long block, int place, int dim, const T *key) {
  constexpr int g = group_of<T>;
  T *to = pages + (head * num_blocks + block) * BLOCK * dim + place * g;
  for (int d = 0; d < dim; d += g) std::memcpy(to + d * BLOCK, key + d, sizeof(T) * g);
}

template <class T>
static inline void write_value(T *pages, long num_blocks, int head, long block, int place, int dim, const T *value) {
  constexpr int g = group_of<T>;
  T *to = pages + (head * num_blocks + block) * BLOCK * dim + place / g * long(dim) * g + place % g;
  for (int d = 0; d < dim; d++) to[d * g] = value[d];
}

}  // namespace pb
