// Gradients of attention, from the lse of the forward pass and without its weights.
//
// With P = 2^(score - lse) and D = P * (grad_out . v - delta), grad_q = scale * D . K, grad_k = scale * D^T . Q and
// grad_v = P^T . grad_out (FlashAttention-2, arXiv 2307.08691, section 3.1). Two passes make the scores anew: one whose
// rows are queries and one whose rows are keys, so that every sum belongs to one thread and none is ever merged.
#pragma once
#include "attention.h"

namespace longspan::LONGSPAN_SET {

// The queries that have gradients: those that are shown and see something.
ALWAYS_INLINE Tokens with_statistics(Tokens queries, const longspan_attention& call, const longspan_lane& lane) {
  queries.lse = lane.lse;
  queries.delta = lane.delta;
  queries.lse_stride = call.lse_stride;
  return queries;
}

template <class A, class B>
ALWAYS_INLINE float dot(const A* a, const B* b, int64_t width) {
  Vector products = {};
  for (int64_t x = 0; x < width; x += LANES) {
    const int64_t count = smaller(LANES, width - x);
    products = count == LANES ? multiply_add(load(a + x), load(b + x), products)
                              : multiply_add(load_part(a + x, count), load_part(b + x, count), products);
  }
  return sum(products);
}

// Rows are queries. Turns scores and grad_weights, which are grad_out . v, into D.
template <int64_t ROWS, class Weight>
NO_INLINE void differentiate_rows(const float* scores, const float* grad_weights, int64_t stride, int64_t columns,
                                  float factor, const float* lse, const float* delta, Weight* grad_scores) {
  constexpr bool PRECISE = sizeof(Weight) == sizeof(float);
  for (int64_t r = 0; r < ROWS; ++r) {
    const Vector lse_of_row = splat(-lse[r]), delta_of_row = splat(delta[r]);
    for (int64_t x = r * stride; x < r * stride + columns; x += LANES) {
      const Vector weight = exp2<PRECISE>(multiply_add(load(scores + x), splat(factor), lse_of_row));
      store(grad_scores + x, weight * (load(grad_weights + x) - delta_of_row));
    }
  }
}

// Rows are keys, columns queries. Turns scores into P^T and grad_weights into D^T.
template <int64_t ROWS, int64_t PANEL, class Weight>
NO_INLINE void differentiate_columns(const float* scores, const float* grad_weights, int64_t stride, int64_t panels,
                                     float factor, const float* const* statistics, Weight* weights, Weight* grad_scores) {
  constexpr bool PRECISE = sizeof(Weight) == sizeof(float);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t x = 0; x < PANEL; x += LANES) {
      const Vector lse = load(statistics[p] + x), delta = load(statistics[p] + PANEL + x);
      for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t at = r * stride + p * PANEL + x;
        const Vector weight = exp2<PRECISE>(multiply_add(load(scores + at), splat(factor), -lse));
        store(weights + at, weight);
        store(grad_scores + at, weight * (load(grad_weights + at) - delta));
      }
    }
  }
}

// The scores of a tile and their gradients. For float the weights take their place.
template <class Tiles>
struct Gradients {
  using Packed = typename Tiles::Packed;
  static constexpr int64_t TILE_PANELS = 144 / Tiles::PANEL;
  static constexpr int64_t STRIDE = Tile<Tiles, TILE_PANELS>::STRIDE;

  explicit Gradients(Arena& arena)
      : scores(arena.take<float>(Tiles::ROWS * STRIDE)),
        grad_weights(arena.take<float>(Tiles::ROWS * STRIDE)),
        weights(weights_of<Packed>(scores, arena, Tiles::ROWS * STRIDE)),
        grad_scores(weights_of<Packed>(grad_weights, arena, Tiles::ROWS * STRIDE)) {}

  float* scores;
  float* grad_weights;
  Packed* weights;
  Packed* grad_scores;
};

// Pass over the queries.
template <class TilesOfType>
class QueryGradient {
 public:
  using Tiles = TilesOfType;
  using Packed = typename Tiles::Packed;
  static constexpr int64_t SOURCES = 3;
  static constexpr bool SUMS_BIAS = true;
  static constexpr int64_t TILE_PANELS = Gradients<Tiles>::TILE_PANELS;

  static int64_t rows(const longspan_lane& lane) { return lane.queries; }
  static int64_t dilation(const longspan_lane& lane) { return lane.dilation; }
  static int64_t columns(const longspan_lane& lane, int64_t view) {
    return view == 0 ? lane.extras : divide_up(lane.keys, lane.dilation);
  }

  QueryGradient(Arena& arena, const Pass& pass)
      : call_(pass.call),
        scale_(pass.call.scale),
        padded_(round_up(pass.call.width, Tiles::WIDTH_STEP)),
        sweep_(arena, pass.call.width, pass.most_columns),
        gradients_(arena) {
    q_ = arena.take<Packed>(Tiles::ROWS * padded_);
    grad_out_ = arena.take<Packed>(Tiles::ROWS * padded_);
    grad_q_ = arena.take<float>(pass.slots<Tiles>() * Tiles::ROWS * padded_);
  }

  void run(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end, float* bias_sums) {
    lane_ = &lane;
    biases_ = {lane.extra_bias, lane.bias};
    const int64_t of_band = BiasSums::count(lane.bias), of_extras = BiasSums::count(lane.extra_bias);
    bias_sums_[0] = of_extras > 0 ? bias_sums + of_band : nullptr;
    bias_sums_[1] = of_band > 0 ? bias_sums : nullptr;
    View views[VIEWS] = {extras_of_queries(call_, lane, residue), band_of_queries(call_, lane, residue)};
    for (View& view : views) view.rows = with_statistics(view.rows, call_, lane);
    const Source sources[SOURCES] = {
        {lane.k, call_.k_stride, true}, {lane.v, call_.v_stride, true}, {lane.k, call_.k_stride, false}};
    queries_ = &views[1].rows;
    sweep_.run(*this, views, sources, begin, end);
  }

  void reset(int64_t slot) { memset(grad_q_ + slot * Tiles::ROWS * padded_, 0, Tiles::ROWS * padded_ * sizeof(float)); }

  void load(int64_t begin, int64_t count) {
    constexpr int64_t size = sizeof(typename Tiles::Element);
    prefetch_rows(*queries_, begin + count, count, lane_->q, call_.q_stride, size, call_.width);
    prefetch_rows(*queries_, begin + count, count, lane_->grad_out, call_.grad_out_stride, size, call_.width);
    prefetch_rows(*queries_, begin + count, count, lane_->out, call_.out_stride, size_of(call_.out_dtype), call_.width);
    prefetch_rows(*queries_, begin, count, lane_->grad_q, call_.grad_q_stride, size_of(call_.grad_dtype), call_.width);
    load_block<Tiles>(*queries_, begin, count, lane_->q, call_.q_stride, call_.width, scale_.negative, q_);
    load_block<Tiles>(*queries_, begin, count, lane_->grad_out, call_.grad_out_stride, call_.width, false, grad_out_);
    for (int64_t r = 0; r < Tiles::ROWS; ++r) {
      const int64_t row = r < count ? queries_->row(begin + r) : 0;
      const bool shown = r < count && queries_->is_shown(row);
      lse_[r] = shown ? lane_->lse[row * call_.lse_stride] * LOG2_E : INFINITE;
      delta_[r] = shown ? find_delta(row) : 0;
    }
  }

  void meet(int64_t slot, const Tile<Tiles, TILE_PANELS>& tile) {
    Tiles::scores(q_, padded_, tile.panels[0], tile.count, gradients_.scores, gradients_.STRIDE);
    Tiles::scores(grad_out_, padded_, tile.panels[1], tile.count, gradients_.grad_weights, gradients_.STRIDE);
    if (biases_.is_biased) {
      add_bias<false>(tile, Tiles::ROWS, Tiles::PANEL, biases_.of_view, scale_.inverse, gradients_.scores);
    }
    tile.hide_unseen(gradients_.scores);
    differentiate_rows<Tiles::ROWS>(gradients_.scores, gradients_.grad_weights, gradients_.STRIDE, tile.columns(),
                                    scale_.factor, lse_, delta_, gradients_.grad_scores);
    if (bias_sums_[0] || bias_sums_[1]) {
      sum_bias_gradient(tile, Tiles::ROWS, Tiles::PANEL, biases_.of_view, gradients_.grad_scores, bias_sums_);
    }
    Tiles::accumulate(gradients_.grad_scores, gradients_.STRIDE, tile.panels[2], tile.count, padded_, nullptr,
                      grad_q_ + slot * Tiles::ROWS * padded_);
  }

  void finish(int64_t slot, int64_t begin, int64_t count) {
    add_rows(*queries_, begin, count, call_.accumulate, grad_q_ + slot * Tiles::ROWS * padded_, padded_, call_.scale,
             lane_->grad_q, call_.grad_dtype, call_.grad_q_stride, call_.width);
  }

 private:
  // Also for the passes over the keys.
  float find_delta(int64_t row) const {
    const auto* grad_out = static_cast<const typename Tiles::Element*>(lane_->grad_out) + row * call_.grad_out_stride;
    const int64_t out = row * call_.out_stride, at = row * call_.lse_stride;
    float delta = lane_->grad_lse ? -lane_->grad_lse[at] : 0;
    if (call_.out_dtype == LONGSPAN_F32) delta += dot(grad_out, static_cast<const float*>(lane_->out) + out, call_.width);
    if (call_.out_dtype == LONGSPAN_BF16) delta += dot(grad_out, static_cast<const bfloat16*>(lane_->out) + out, call_.width);
    return lane_->delta[at] = delta;
  }

  const longspan_attention& call_;
  const Scale scale_;
  const int64_t padded_;
  Sweep<Tiles, QueryGradient> sweep_;
  Gradients<Tiles> gradients_;
  Packed* q_;
  Packed* grad_out_;
  float* grad_q_;
  float lse_[Tiles::ROWS], delta_[Tiles::ROWS];
  Biases biases_{{}, {}};
  float* bias_sums_[VIEWS] = {};
  const longspan_lane* lane_ = nullptr;
  const Tokens* queries_ = nullptr;
};

// The keys of the band of one grid, and the queries that see them.
struct BandKeys {
  static int64_t rows(const longspan_lane& lane) { return lane.keys; }
  static int64_t dilation(const longspan_lane& lane) { return lane.dilation; }
  static int64_t queries(const longspan_lane& lane) { return divide_up(lane.queries, lane.dilation); }
  static const longspan_bias& bias(const longspan_lane& lane) { return lane.bias; }

  static View view(const longspan_attention& call, const longspan_lane& lane, int64_t residue) {
    const View band = band_of_queries(call, lane, residue);
    return {band.columns, with_statistics(band.rows, call, lane), band.after, band.before};
  }
};

// The extra keys, and the queries of all grids. This pass comes after that of the band, which writes 0 in their rows.
struct ExtraKeys {
  static int64_t rows(const longspan_lane& lane) { return lane.extras; }
  static int64_t dilation(const longspan_lane&) { return 1; }
  static int64_t queries(const longspan_lane& lane) { return lane.queries; }
  static const longspan_bias& bias(const longspan_lane& lane) { return lane.extra_bias; }

  static View view(const longspan_attention& call, const longspan_lane& lane, int64_t) {
    return {extras_of(lane), with_statistics(queries_of(call, lane, 0, 1, true), call, lane),
            lane.extra_causal ? 0 : UNLIMITED, UNLIMITED};
  }
};

// Pass over the keys, whose columns are queries.
template <class TilesOfType, class Keys>
class KeyGradient {
 public:
  using Tiles = TilesOfType;
  using Packed = typename Tiles::Packed;
  static constexpr int64_t SOURCES = 4;
  static constexpr bool SUMS_BIAS = false;
  static constexpr int64_t TILE_PANELS = Gradients<Tiles>::TILE_PANELS;

  static int64_t rows(const longspan_lane& lane) { return Keys::rows(lane); }
  static int64_t dilation(const longspan_lane& lane) { return Keys::dilation(lane); }
  static int64_t columns(const longspan_lane& lane, int64_t view) { return view == 0 ? 0 : Keys::queries(lane); }

  KeyGradient(Arena& arena, const Pass& pass)
      : call_(pass.call),
        scale_(pass.call.scale),
        padded_(round_up(pass.call.width, Tiles::WIDTH_STEP)),
        sweep_(arena, pass.call.width, pass.most_columns),
        gradients_(arena) {
    k_ = arena.take<Packed>(Tiles::ROWS * padded_);
    v_ = arena.take<Packed>(Tiles::ROWS * padded_);
    grad_k_ = arena.take<float>(pass.slots<Tiles>() * Tiles::ROWS * padded_);
    grad_v_ = arena.take<float>(pass.slots<Tiles>() * Tiles::ROWS * padded_);
  }

  void run(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end) {
    lane_ = &lane;
    const View views[VIEWS] = {{}, Keys::view(call_, lane, residue)};
    const Source sources[SOURCES] = {{lane.q, call_.q_stride, true},
                                     {lane.grad_out, call_.grad_out_stride, true},
                                     {lane.q, call_.q_stride, false},
                                     {lane.grad_out, call_.grad_out_stride, false}};
    keys_ = &views[1].rows;
    biases_ = {{}, Keys::bias(lane)};
    sweep_.run(*this, views, sources, begin, end);
  }

  void reset(int64_t slot) {
    memset(grad_k_ + slot * Tiles::ROWS * padded_, 0, Tiles::ROWS * padded_ * sizeof(float));
    memset(grad_v_ + slot * Tiles::ROWS * padded_, 0, Tiles::ROWS * padded_ * sizeof(float));
  }

  void load(int64_t begin, int64_t count) {
    constexpr int64_t size = sizeof(typename Tiles::Element);
    const int64_t grad_size = size_of(call_.grad_dtype);
    prefetch_rows(*keys_, begin + count, count, lane_->k, call_.k_stride, size, call_.width);
    prefetch_rows(*keys_, begin + count, count, lane_->v, call_.v_stride, size, call_.width);
    prefetch_rows(*keys_, begin, count, lane_->grad_k, call_.grad_k_stride, grad_size, call_.width);
    prefetch_rows(*keys_, begin, count, lane_->grad_v, call_.grad_v_stride, grad_size, call_.width);
    load_block<Tiles>(*keys_, begin, count, lane_->k, call_.k_stride, call_.width, scale_.negative, k_);
    load_block<Tiles>(*keys_, begin, count, lane_->v, call_.v_stride, call_.width, false, v_);
  }

  void meet(int64_t slot, const Tile<Tiles, TILE_PANELS>& tile) {
    Tiles::scores(k_, padded_, tile.panels[0], tile.count, gradients_.scores, gradients_.STRIDE);
    Tiles::scores(v_, padded_, tile.panels[1], tile.count, gradients_.grad_weights, gradients_.STRIDE);
    if (biases_.is_biased) {
      add_bias<true>(tile, Tiles::ROWS, Tiles::PANEL, biases_.of_view, scale_.inverse, gradients_.scores);
    }
    tile.hide_unseen(gradients_.scores);
    differentiate_columns<Tiles::ROWS, Tiles::PANEL>(gradients_.scores, gradients_.grad_weights, gradients_.STRIDE,
                                                     tile.count, scale_.factor, tile.statistics, gradients_.weights,
                                                     gradients_.grad_scores);
    Tiles::accumulate(gradients_.grad_scores, gradients_.STRIDE, tile.panels[2], tile.count, padded_, nullptr,
                      grad_k_ + slot * Tiles::ROWS * padded_);
    Tiles::accumulate(gradients_.weights, gradients_.STRIDE, tile.panels[3], tile.count, padded_, nullptr,
                      grad_v_ + slot * Tiles::ROWS * padded_);
  }

  void finish(int64_t slot, int64_t begin, int64_t count) {
    add_rows(*keys_, begin, count, call_.accumulate, grad_k_ + slot * Tiles::ROWS * padded_, padded_, call_.scale,
             lane_->grad_k, call_.grad_dtype, call_.grad_k_stride, call_.width);
    add_rows(*keys_, begin, count, call_.accumulate, grad_v_ + slot * Tiles::ROWS * padded_, padded_, 1.0f,
             lane_->grad_v, call_.grad_dtype, call_.grad_v_stride, call_.width);
  }

 private:
  const longspan_attention& call_;
  const Scale scale_;
  const int64_t padded_;
  Sweep<Tiles, KeyGradient> sweep_;
  Gradients<Tiles> gradients_;
  Packed* k_;
  Packed* v_;
  float* grad_k_;
  float* grad_v_;
  const longspan_lane* lane_ = nullptr;
  const Tokens* keys_ = nullptr;
  Biases biases_{{}, {}};
};

template <class Tiles>
int run_backward(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes) {
  int status = run_pass<QueryGradient<Tiles>>(call, lanes, num_lanes);
  if (status == LONGSPAN_OK) status = run_pass<KeyGradient<Tiles, BandKeys>>(call, lanes, num_lanes);
  if (status == LONGSPAN_OK) status = run_pass<KeyGradient<Tiles, ExtraKeys>>(call, lanes, num_lanes);
  return status;
}

}  // namespace longspan::LONGSPAN_SET
