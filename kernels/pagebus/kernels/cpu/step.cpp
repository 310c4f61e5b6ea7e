// A decoder's step as one call: embedding, layers over pages, and the last norm; and products, attention and
// writes one by one. What is computed stands in structures that the caller fills (cpu_library.py). Compiled
// for one type of weights and pages, PB_TYPE: bf16 or float.
#include <memory>
#include <mutex>
#include <new>

#include "attention.h"
#include "gemm.h"
#include "rowwise.h"

namespace pb {

#ifndef PB_TYPE
#define PB_TYPE bf16
#endif
typedef PB_TYPE T;

struct Linear {
  const void *weight;  // packed
  const float *bias;
  int64_t num_in, num_out;
};

struct Layer {
  Linear qkv, out, up, down;
  Norm before_attention, after_attention, before_mlp, after_mlp, query, key;
  Pages pages;
  const float *cos, *sin;  // [positions][factors]
  const float *sinks;
  int64_t factors;
  int32_t heads;
  int32_t num_turned, is_interleaved;  // factors used of each position's
  int32_t is_norm_over_heads;          // q/k norms run over all heads at once
  int32_t window, group;
  int32_t activation, is_gated;
  float scale, softcap;
};

struct Model {
  const Layer *layers;
  const void *embedding;  // [vocabulary][hidden], plain
  Norm last;
  int64_t num_layers, hidden;
  float embedding_scale, residual_scale;
};

struct Step {
  const int64_t *ids;
  const int32_t *positions;
  Rows rows;
  const int32_t *const *tables;  // by group: [rows][width]
  const int64_t *widths;
  int64_t num_tokens;
  void *hidden;       // [tokens][hidden]: the residual stream between calls
  void *normed;       // [tokens, or those wanted][hidden]: after the last norm
  uint8_t *is_finite;  // [tokens]
  char *scratch;
  int64_t first_layer, last_layer, is_from_ids;
  const int64_t *wanted;  // flat tokens, ascending, that go through all of the last layer; none: all of them
  int64_t num_wanted;
};

static long stride_of(long columns) { return round_up(columns, 32) + 32; }  // no two rows in the same cache sets

struct Sizes {
  long hidden = 0, qkv = 0, attended = 0, up = 0, inner = 0, packed = 0;
  explicit Sizes(const Model &model) : hidden(stride_of(model.hidden)) {
    for (long i = 0; i < model.num_layers; i++) {
      const Layer &layer = model.layers[i];
      auto most = [](long &value, long other) { value = stride_of(other) > value ? stride_of(other) : value; };
      most(qkv, layer.qkv.num_out);
      most(attended, layer.out.num_in);
      most(up, layer.up.num_out);
      most(inner, layer.down.num_in);
    }
    packed = hidden > attended ? hidden : attended;
    packed = packed > inner ? packed : inner;
  }
  long a_token() const { return 2 * hidden + qkv + attended + up + inner + packed; }
};

class Run {
 public:
  Run(Team &team, const Model &model, const Step &step)
      : team_(team), model_(model), step_(step), sizes_(model), row_of_(nullptr), num_tokens_(step.num_tokens) {
    long n = step.num_tokens;
    x_ = static_cast<T *>(step.hidden);
    char *at = step.scratch;
    auto take = [&](long columns) {
      T *found = reinterpret_cast<T *>(at);
      at += round_up(n * columns * long(sizeof(T)), 64);
      return found;
    };
    y_ = take(sizes_.hidden), h_ = take(sizes_.hidden), qkv_ = take(sizes_.qkv);
    attended_ = take(sizes_.attended), up_ = take(sizes_.up), inner_ = take(sizes_.inner);
    packed_ = take(sizes_.packed);
    row_of_ = reinterpret_cast<int32_t *>(at);
    split_rows();
  }

  void layers() {
    const Layer *all = model_.layers;
    if (step_.is_from_ids) embed();
    find_rows();
    if (step_.first_layer < step_.last_layer)
      add_and_norm(nullptr, Norm{}, &all[step_.first_layer].before_attention);
    for (long i = step_.first_layer; i < step_.last_layer; i++) {
      const Layer &layer = all[i];
      linear(layer.qkv, y_, sizes_.hidden, qkv_, sizes_.qkv);
      bool is_cut = step_.wanted && i + 1 == model_.num_layers;
      turn_and_write(layer, is_cut);
      attend_to(layer);
      if (is_cut) keep_wanted();
      linear(layer.out, attended_, sizes_.attended, h_, sizes_.hidden);
      add_and_norm(h_, layer.after_attention, &layer.before_mlp);
      linear(layer.up, y_, sizes_.hidden, up_, sizes_.up);
      team_.each(num_tokens_, row_piece_, [&](long first, long last) {
        for (long t = first; t < last; t++)
          activate_row(layer.activation, layer.is_gated, up_ + t * sizes_.up, layer.down.num_in, inner_ + t * sizes_.inner);
      });
      linear(layer.down, inner_, sizes_.inner, h_, sizes_.hidden);
      add_and_norm(h_, layer.after_mlp, i + 1 < step_.last_layer ? &all[i + 1].before_attention : nullptr);
    }
    if (step_.last_layer == model_.num_layers) finish();
  }

 private:
  void linear(const Linear &linear, const T *from, long stride, T *to, long to_stride) {
    gemm<T>(
        team_, from, stride, num_tokens_, static_cast<const T *>(linear.weight), linear.bias, linear.num_in,
        linear.num_out, Target{to, to_stride, false}, packed_);
  }

  void embed() {
    team_.each(step_.num_tokens, row_piece_, [&](long first, long last) {
      for (long t = first; t < last; t++) {
        const T *from = static_cast<const T *>(model_.embedding) + step_.ids[t] * model_.hidden;
        for (long i = 0; i < model_.hidden; i++)
          narrow(widen(from[i]) * model_.embedding_scale, x_ + t * model_.hidden + i);
      }
    });
  }

  void find_rows() {  // the row of each flat token
    team_.each(step_.rows.num_rows, 1, [&](long row, long) {
      for (int i = 0; i < step_.rows.count[row]; i++) row_of_[step_.rows.first[row] + i] = int32_t(row);
    });
  }

  // x += scale * after(h), then y = before(x); either may be missing.
  void add_and_norm(const T *h, const Norm &after, const Norm *before) {
    long n = model_.hidden;
    team_.each(num_tokens_, row_piece_, [&](long first, long last) {
      float *wide = wide_row(n), *other = wide + round_up(n, LANES);
      for (long t = first; t < last; t++) {
        T *x = x_ + t * n;
        widen_row(x, n, wide);
        if (h) {
          widen_row(h + t * sizes_.hidden, n, other);
          if (after.weight) norm_row(after, other, n, other);
          for (long i = 0; i < n; i++) wide[i] += model_.residual_scale * other[i];
          narrow_row(wide, n, x);
          widen_row(x, n, wide);
        }
        if (!before) continue;
        if (before->weight) norm_row(*before, wide, n, wide);
        narrow_row(wide, n, y_ + t * sizes_.hidden);
      }
    });
  }

  void split_rows() {
    row_piece_ = num_tokens_ / (team_.num_threads() * 4);
    if (row_piece_ < 1) row_piece_ = 1;
  }

  // The rest of the layer is computed for the wanted tokens alone.
  void keep_wanted() {
    team_.each(1, 1, [&](long, long) {
      for (long i = 0; i < step_.num_wanted; i++) {
        long n = model_.hidden, from = step_.wanted[i], width = sizes_.attended;
        if (from == i) continue;
        std::memcpy(x_ + i * n, x_ + from * n, n * sizeof(T));
        std::memcpy(attended_ + i * width, attended_ + from * width, width * sizeof(T));
      }
    });
    num_tokens_ = step_.num_wanted;
    split_rows();
  }

  // `is_last`: whether a token's numbers are finite is told here, as the rest of the layer may not be computed.
  void turn_and_write(const Layer &layer, bool is_last) {
    const int32_t *tables = step_.tables[layer.group];
    long width = step_.widths[layer.group];
    int q_size = layer.heads * layer.pages.key_dim, k_size = layer.pages.kv_heads * layer.pages.key_dim;
    team_.each(step_.num_tokens, row_piece_, [&](long first, long last) {
      float *wide = wide_row(q_size + k_size);
      for (long t = first; t < last; t++) {
        T *qkv = qkv_ + t * sizes_.qkv;
        widen_row(qkv, q_size + k_size, wide);
        int position = step_.positions[t];
        const float *cos = layer.cos + position * layer.factors, *sin = layer.sin + position * layer.factors;
        turn_heads(layer, layer.query, layer.heads, cos, sin, wide);
        turn_heads(layer, layer.key, layer.pages.kv_heads, cos, sin, wide + q_size);
        narrow_row(wide, q_size + k_size, qkv);
        if (is_last) step_.is_finite[t] = is_finite_row(qkv, layer.qkv.num_out);
        long block = tables[row_of_[t] * width + position / BLOCK];
        int place = position % BLOCK;
        for (int head = 0; head < layer.pages.kv_heads; head++)
          write_head(
              layer.pages, head, block, place, qkv + q_size + head * layer.pages.key_dim,
              qkv + q_size + k_size + head * layer.pages.value_dim);
      }
    });
  }

  static void turn_heads(
      const Layer &layer, const Norm &norm, int heads, const float *cos, const float *sin, float *x) {
    if (norm.weight && layer.is_norm_over_heads) norm_row(norm, x, long(heads) * layer.pages.key_dim, x);
    for (int head = 0; head < heads; head++, x += layer.pages.key_dim) {
      if (norm.weight && !layer.is_norm_over_heads) norm_row(norm, x, layer.pages.key_dim, x);
      turn(x, cos, sin, layer.num_turned, layer.is_interleaved);
    }
  }

  void attend_to(const Layer &layer) {
    Attention call{};
    call.query = qkv_, call.query_stride = sizes_.qkv;
    call.out = attended_, call.out_stride = sizes_.attended;
    call.pages = layer.pages;
    call.tables = step_.tables[layer.group], call.width = step_.widths[layer.group];
    call.sinks = layer.sinks, call.heads = layer.heads;
    call.window = layer.window, call.scale = layer.scale, call.softcap = layer.softcap;
    attend<T>(team_, call, step_.rows);
  }

  void finish() {
    long n = model_.hidden;
    team_.each(num_tokens_, row_piece_, [&](long first, long last) {
      float *wide = wide_row(n);
      for (long t = first; t < last; t++) {
        widen_row(x_ + t * n, n, wide);
        bool is_finite = std::isfinite(norm_row(model_.last, wide, n, wide));
        if (step_.wanted)
          step_.is_finite[step_.wanted[t]] &= is_finite;
        else
          step_.is_finite[t] = is_finite;
        narrow_row(wide, n, static_cast<T *>(step_.normed) + t * n);
      }
    });
  }

  static float *wide_row(long n) {  // two rows of n numbers, this thread's
    thread_local std::unique_ptr<float[]> row;
    thread_local long size = 0;
    long needed = 2 * round_up(n, LANES);
    if (size < needed) row.reset(new float[needed]), size = needed;
    return row.get();
  }

  Team &team_;
  const Model &model_;
  const Step &step_;
  Sizes sizes_;
  T *x_, *y_, *h_, *qkv_, *attended_, *up_, *inner_, *packed_;
  int32_t *row_of_;
  long row_piece_, num_tokens_;
};

// Runs `work` in every thread of the pool.
template <class Work> static void together(Pool &pool, Work work) {
  pool.run(
      [](void *argument, Pool &own, int thread) {
        Team team(own, thread);
        (*static_cast<Work *>(argument))(team);
      },
      &work);
}

}  // namespace pb

using namespace pb;

extern "C" {

int pb_version() { return 1; }

void *pb_pool(int num_threads) { return new (std::nothrow) Pool(num_threads < 1 ? 1 : num_threads); }
void pb_pool_free(void *pool) { delete static_cast<Pool *>(pool); }

int64_t pb_packed_bytes(int64_t num_in, int64_t num_out) {
  return round_up(num_out, PANEL) / PANEL * panel_size<T>(num_in) * int64_t(sizeof(T));
}

void pb_pack(void *pool, const void *weight, int64_t num_in, int64_t num_out, void *packed) {
  together(*static_cast<Pool *>(pool), [&](Team &team) {
    pack(team, static_cast<const T *>(weight), num_in, num_out, static_cast<T *>(packed));
  });
}

// out[rows, num_out]; in float32 where `is_wide`, else in the inputs' type.
void pb_linear(
    void *pool, const void *inputs, int64_t stride, int64_t num_rows, const Linear *linear, int is_wide, void *out,
    int64_t out_stride) {
  std::unique_ptr<T[]> packed(num_rows > 1 ? new T[packed_rows_size<T>(num_rows, linear->num_in)] : nullptr);
  together(*static_cast<Pool *>(pool), [&](Team &team) {
    gemm(
        team, static_cast<const T *>(inputs), stride, num_rows, static_cast<const T *>(linear->weight), linear->bias,
        linear->num_in, linear->num_out, Target{out, out_stride, is_wide != 0}, packed.get());
  });
}

// Keys and values [kv_heads][tokens][dim] of the rows' tokens go into the pages.
void pb_write(
    void *pool, const Attention *call, const Rows *rows, const void *keys, const void *values, int64_t num_tokens) {
  const Pages &pages = call->pages;
  together(*static_cast<Pool *>(pool), [&](Team &team) {
    team.each(rows->num_rows, 1, [&](long row, long) {
      for (int i = 0; i < rows->count[row]; i++) {
        int position = rows->start[row] + i, place = position % BLOCK;
        long block = call->tables[row * call->width + position / BLOCK], token = rows->first[row] + i;
        for (int head = 0; head < pages.kv_heads; head++) {
          long at = head * num_tokens + token;
          write_head(
              pages, head, block, place, static_cast<const T *>(keys) + at * pages.key_dim,
              static_cast<const T *>(values) + at * pages.value_dim);
        }
      }
    });
  });
}

void pb_attend(void *pool, const Attention *call, const Rows *rows) {
  together(*static_cast<Pool *>(pool), [&](Team &team) { attend<T>(team, *call, *rows); });
}

int64_t pb_scratch_bytes(const Model *model, int64_t num_tokens) {
  return num_tokens * (Sizes(*model).a_token() * int64_t(sizeof(T)) + 4) + 9 * 64;
}

void pb_layers(void *pool, const Model *model, const Step *step) {
  together(*static_cast<Pool *>(pool), [&](Team &team) { Run(team, *model, *step).layers(); });
}
}
