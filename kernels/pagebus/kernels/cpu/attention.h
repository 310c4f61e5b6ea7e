// Attention over pages. A query meets its keys in chunks of 64, counted from position 0, so its result has the
// same bits in a prompt, in any part of one and while decoding, whatever else runs in the step.
//
//   key pages    [kv_heads][blocks][dim / g][16][g]    g = 2 in bfloat16, 1 in float32: what a product reads
//   value pages  [kv_heads][blocks][16 / g][dim][g]    at once lies together
//
// The heads that share a KV head are queries of the same tile. Masked keys weigh nothing; what lies in their
// pages must be finite. Pages of bytes (pages.h) are widened a chunk at a time, once for all queries of a tile.
#pragma once

#include <memory>

#include "pages.h"

namespace pb {

constexpr int CHUNK_BLOCKS = 4;
constexpr int CHUNK_KEYS = BLOCK * CHUNK_BLOCKS;
constexpr int MICRO = 6;   // queries multiplied at once
constexpr int QUERIES = 48;  // queries of a tile
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
  Pages pages;
  const int32_t *tables;  // [rows][width]; -1: no block
  const float *sinks;     // [heads] or none
  long width;
  int32_t heads, window;  // window 0: none
  float scale, softcap;
};

template <class T> struct TileState {
  alignas(64) T query[QUERIES * MAX_DIM];  // [queries][MAX_DIM]
  alignas(64) T weights[MICRO * CHUNK_KEYS];
  alignas(64) float scores[MICRO * CHUNK_KEYS];
  alignas(64) float sums[QUERIES * MAX_DIM];
  alignas(64) T wide_keys[CHUNK_KEYS * MAX_DIM], wide_values[CHUNK_KEYS * MAX_DIM];
  float top[QUERIES], total[QUERIES];
  int low[QUERIES], high[QUERIES];  // the keys that a query sees
};

// A chunk's blocks as products read them, and the peaks of pages that have some.
template <class T> struct Chunk {
  const T *keys[CHUNK_BLOCKS], *values[CHUNK_BLOCKS];
  const float *key_peaks[CHUNK_BLOCKS], *value_peaks[CHUNK_BLOCKS];
  int first_key;
};

template <int R, class T>
static __attribute__((noinline)) void score(const T *query, long dim, const T *const (&blocks)[CHUNK_BLOCKS], float *scores) {
  vf acc[R][CHUNK_BLOCKS];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < CHUNK_BLOCKS; v++) acc[r][v] = splat(0.0f);
  multiply<R, CHUNK_BLOCKS, MAX_DIM>(query, blocks, LANES * group_of<T>, dim / group_of<T>, acc);
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
    multiply<R, V, CHUNK_KEYS>(weights + block * BLOCK, b, dim * group_of<T>, BLOCK / group_of<T>, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(sums + r * sums_stride + at + v * LANES, acc[r][v]);
}

// Scores become weights: the new maximum, what the sums so far shrink by, and the chunk's part of the total.
template <class T>
static __attribute__((noinline)) float weigh(TileState<T> &state, int q, int micro, const Chunk<T> &chunk, const Attention &call) {
  float *scores = state.scores + micro * CHUNK_KEYS;
  T *weights = state.weights + micro * CHUNK_KEYS;
  int low = state.low[q] - chunk.first_key, high = state.high[q] - chunk.first_key;
  bool sees_all = low <= 0 && high >= CHUNK_KEYS, has_peaks = call.pages.kind != PLAIN;
  float most = 1.0f / most_of(call.pages.kind);
  vi places;
  for (int i = 0; i < LANES; i++) places[i] = i;
  vf top = splat(LOWEST), s[CHUNK_BLOCKS];
  vi seen[CHUNK_BLOCKS];
#pragma GCC unroll 4
  for (int v = 0; v < CHUNK_BLOCKS; v++) {
    s[v] = load(scores + v * LANES) * splat(call.scale);
    if (has_peaks) s[v] *= load(chunk.key_peaks[v]) * splat(most);
    if (call.softcap > 0) s[v] = tanh_of(s[v] / splat(call.softcap)) * splat(call.softcap);
    if (!sees_all) {
      vi at = places + v * LANES;
      seen[v] = (at >= low) & (at < high);
      s[v] = seen[v] ? s[v] : splat(LOWEST);
    }
    top = largest(top, s[v]);
  }
  float before = state.top[q], now = largest_of(top);
  if (before > now) now = before;
  vf total = splat(0.0f);
#pragma GCC unroll 4
  for (int v = 0; v < CHUNK_BLOCKS; v++) {
    vf weight = exp_of(s[v] - splat(now));
    if (!sees_all) weight = seen[v] ? weight : splat(0.0f);
    total += weight;
    if (has_peaks) weight *= load(chunk.value_peaks[v]) * splat(most);
    store(weights + v * LANES, weight);
  }
  float shrink = before == now ? 1.0f : exp_of(splat(before - now))[0];
  state.total[q] = state.total[q] * shrink + sum_of(total);
  state.top[q] = now;
  return shrink;
}

template <int R, class T>
static void meet(TileState<T> &state, int q, const Chunk<T> &chunk, const Attention &call) {
  score<R>(state.query + q * MAX_DIM, call.pages.key_dim, chunk.keys, state.scores);
  float shrink[MICRO];
  for (int r = 0; r < R; r++) shrink[r] = weigh(state, q + r, r, chunk, call);
  long dim = call.pages.value_dim;
  float *sums = state.sums + q * dim;
  int at = 0;
  for (; at + 4 * LANES <= dim; at += 4 * LANES)
    add_values<R, 4>(state.weights, chunk.values, dim, at, shrink, sums, dim);
  for (; at < dim; at += LANES) add_values<R, 1>(state.weights, chunk.values, dim, at, shrink, sums, dim);
}

template <class T>
static void meet_some(int num, TileState<T> &state, int q, const Chunk<T> &chunk, const Attention &call) {
  switch (num) {
    case 1: return meet<1>(state, q, chunk, call);
    case 2: return meet<2>(state, q, chunk, call);
    case 3: return meet<3>(state, q, chunk, call);
    case 4: return meet<4>(state, q, chunk, call);
    case 5: return meet<5>(state, q, chunk, call);
    default: return meet<6>(state, q, chunk, call);
  }
}

// The blocks of keys [first_key, first_key + CHUNK_KEYS) of a row of `end` keys.
template <class T>
static Chunk<T> chunk_at(
    TileState<T> &state, const Pages &pages, const int32_t *table, int kv_head, int first_key, int end) {
  Chunk<T> chunk;
  chunk.first_key = first_key;
  long key_block = long(BLOCK) * pages.key_dim, value_block = long(BLOCK) * pages.value_dim;
  for (int i = 0; i < CHUNK_BLOCKS; i++) {
    int at = first_key / BLOCK + i;
    long block = at * BLOCK < end ? table[at] : -1;
    if (block < 0) block = pages.num_blocks - 1;
    block += kv_head * pages.num_blocks;
    if (pages.kind == PLAIN) {
      chunk.keys[i] = static_cast<const T *>(pages.keys) + block * key_block;
      chunk.values[i] = static_cast<const T *>(pages.values) + block * value_block;
      continue;
    }
    T *keys = state.wide_keys + i * key_block, *values = state.wide_values + i * value_block;
    widen_page(pages.kind, static_cast<const uint8_t *>(pages.keys) + block * key_block, key_block, keys);
    widen_page(pages.kind, static_cast<const uint8_t *>(pages.values) + block * value_block, value_block, values);
    chunk.keys[i] = keys, chunk.values[i] = values;
    chunk.key_peaks[i] = pages.key_peaks + block * BLOCK;
    chunk.value_peaks[i] = pages.value_peaks + block * BLOCK;
  }
  return chunk;
}

// Queries [first, last) of a row and KV head; query number n is head n % share of token n / share.
template <class T>
static void attend_tile(
    TileState<T> &state, const Attention &call, const Rows &rows, int row, int kv_head, int first, int last) {
  const Pages &pages = call.pages;
  int share = call.heads / pages.kv_heads, num = last - first;
  const T *query = static_cast<const T *>(call.query);
  for (int n = 0; n < num; n++) {
    int token = (first + n) / share, head = kv_head * share + (first + n) % share;
    const T *from = query + (rows.first[row] + token) * call.query_stride + long(head) * pages.key_dim;
    std::memcpy(state.query + n * MAX_DIM, from, sizeof(T) * pages.key_dim);
    int position = rows.start[row] + token;
    state.high[n] = position + 1;
    state.low[n] = call.window > 0 && position + 1 > call.window ? position + 1 - call.window : 0;
    state.top[n] = LOWEST;
    state.total[n] = 0;
  }
  std::memset(state.sums, 0, sizeof(float) * num * pages.value_dim);
  const int32_t *table = call.tables + row * call.width;
  int end = state.high[num - 1];
  for (int key = state.low[0] / CHUNK_KEYS * CHUNK_KEYS; key < end; key += CHUNK_KEYS) {
    Chunk<T> chunk = chunk_at(state, pages, table, kv_head, key, end);
    for (int q = 0; q < num; q += MICRO) {
      int some = num - q < MICRO ? num - q : MICRO;
      if (state.low[q] >= key + CHUNK_KEYS || state.high[q + some - 1] <= key) continue;
      meet_some(some, state, q, chunk, call);
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
    T *to = out + (rows.first[row] + token) * call.out_stride + long(head) * pages.value_dim;
    for (int at = 0; at < pages.value_dim; at += LANES)
      store(to + at, load(state.sums + n * pages.value_dim + at) * splat(factor));
  }
}

template <class T> static void attend(Team &team, const Attention &call, const Rows &rows) {
  int share = call.heads / call.pages.kv_heads;
  long num_items = 0;
  for (int row = 0; row < rows.num_rows; row++)
    num_items += (long(rows.count[row]) * share + QUERIES - 1) / QUERIES * call.pages.kv_heads;
  thread_local std::unique_ptr<TileState<T>> kept(new TileState<T>);
  TileState<T> &state = *kept;
  team.each(num_items, 1, [&](long item, long) {
    int row = 0;
    for (;; row++) {
      long items = (long(rows.count[row]) * share + QUERIES - 1) / QUERIES * call.pages.kv_heads;
      if (item < items) break;
      item -= items;
    }
    int tiles = (rows.count[row] * share + QUERIES - 1) / QUERIES;
    int tile = int(item) % tiles, first = tile * QUERIES, last = first + QUERIES;
    if (last > rows.count[row] * share) last = rows.count[row] * share;
    attend_tile<T>(state, call, rows, row, int(item) / tiles, first, last);
  });
}

}  // namespace pb
