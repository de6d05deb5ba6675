// Gradients of attention, from the lse of the forward pass and without its weights.
//
// With P = 2^(score - lse) and D = P * (grad_out . v - delta), grad_q = scale * D . K, grad_k = scale * D^T . Q and
// grad_v = P^T . grad_out (FlashAttention-2, arXiv 2307.08691, section 3.1). A pass over the keys makes the scores anew
// and gives all three, five products for each score. It takes a grid of a lane from its first key to its last, so that
// every sum belongs to one thread and none is ever merged. Where there are too few grids for the threads, and where
// somebody wants the gradient of a bias, a pass over the queries comes before it, at seven products. Every sum is added
// up in the same order in both ways, to the same bits.
#pragma once
#include "query_gradients.h"

namespace longspan::LONGSPAN_SET {

// Rows are keys, columns queries. Turns scores into P^T and grad_weights into D^T; where PAIRED, words become the pairs
// of D^T that `scatter` reads.
template <int64_t ROWS, int64_t PANEL, bool PAIRED, class Weight>
NO_INLINE void differentiate_columns(const float* scores, const float* grad_weights, int64_t stride, int64_t panels,
                                     float factor, const float* const* statistics, Weight* weights, Weight* grad_scores,
                                     Weight* words) {
  constexpr bool PRECISE = sizeof(Weight) == sizeof(float);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t x = 0; x < PANEL; x += LANES) {
      const Vector lse = load(statistics[p] + x), delta = load(statistics[p] + PANEL + x);
      for (int64_t r = 0; r < ROWS; r += 2) {
        Vector pair[2];
        UNROLL for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = (r + i) * stride + p * PANEL + x;
          const Vector weight = exp2<PRECISE>(multiply_add(load(scores + at), splat(factor), -lse));
          pair[i] = weight * (load(grad_weights + at) - delta);
          store(weights + at, weight);
          store(grad_scores + at, pair[i]);
        }
        if constexpr (PAIRED) store_interleaved(words + r * stride + (p * PANEL + x) * 2, pair[0], pair[1]);
      }
    }
  }
}

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

// They have a pass of their own.
struct NoQueries {
  static constexpr bool GIVEN = false, PAIRED = false;

  template <class OfTiles>
  NoQueries(Arena&, const Pass&, const OfTiles&) {}
};

// Pass over the keys, whose columns are queries.
template <class TilesOfType, class Keys, class Queries>
class KeyGradient {
 public:
  using Tiles = TilesOfType;
  using Packed = typename Tiles::Packed;
  static constexpr int64_t SOURCES = 4;
  static constexpr bool SUMS_BIAS = false, TAKES_GRIDS = Queries::GIVEN;
  static constexpr int64_t TILE_PANELS = Gradients<Tiles>::TILE_PANELS;

  static int64_t rows(const longspan_lane& lane) {
    return Queries::GIVEN ? larger(Keys::rows(lane), lane.queries) : Keys::rows(lane);
  }
  static int64_t dilation(const longspan_lane& lane) { return Keys::dilation(lane); }
  static int64_t columns(const longspan_lane& lane, int64_t view) {
    return view == 1 ? Keys::queries(lane) : Queries::GIVEN ? lane.extras : 0;
  }

  KeyGradient(Arena& arena, const Pass& pass)
      : call_(pass.call),
        scale_(pass.call.scale),
        rows_at_once_(pass.rows_per_task),
        padded_(round_up(pass.call.width, Tiles::WIDTH_STEP)),
        sweep_(arena, pass.call.width, {0, pass.most_columns[1]}),
        gradients_(arena),
        queries_(arena, pass, gradients_) {
    k_ = arena.take<Packed>(Tiles::ROWS * padded_);
    v_ = arena.take<Packed>(Tiles::ROWS * padded_);
    grad_k_ = arena.take<float>(pass.slots<Tiles>() * Tiles::ROWS * padded_);
    grad_v_ = arena.take<float>(pass.slots<Tiles>() * Tiles::ROWS * padded_);
  }

  void run(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end) {
    if constexpr (Queries::GIVEN) {
      queries_.open(lane, residue);
      end = tokens_of_residue(lane.keys, residue, lane.dilation);
      for (int64_t last; begin < end; begin = last) {
        last = smaller(end, begin + rows_at_once_);
        queries_.pass_to(begin, last);
        sweep(lane, residue, begin, last);
      }
      queries_.close();
    } else {
      sweep(lane, residue, begin, end);
    }
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
    if constexpr (Queries::GIVEN) queries_.load(*keys_, begin, count);
  }

  void meet(int64_t slot, const Tile<Tiles, TILE_PANELS>& tile) {
    Tiles::scores(k_, padded_, tile.panels[0], tile.count, gradients_.scores, gradients_.STRIDE);
    Tiles::scores(v_, padded_, tile.panels[1], tile.count, gradients_.grad_weights, gradients_.STRIDE);
    if (biases_.is_biased) {
      add_bias<true>(tile, Tiles::ROWS, Tiles::PANEL, biases_.of_view, scale_.inverse, gradients_.scores);
    }
    tile.hide_unseen(gradients_.scores);
    Packed* words = nullptr;
    if constexpr (Queries::GIVEN) words = queries_.words();
    differentiate_columns<Tiles::ROWS, Tiles::PANEL, Queries::PAIRED>(
        gradients_.scores, gradients_.grad_weights, gradients_.STRIDE, tile.count, scale_.factor, tile.statistics,
        gradients_.weights, gradients_.grad_scores, words);
    Tiles::accumulate(gradients_.grad_scores, gradients_.STRIDE, tile.panels[2], tile.count, padded_, nullptr,
                      grad_k_ + slot * Tiles::ROWS * padded_);
    Tiles::accumulate(gradients_.weights, gradients_.STRIDE, tile.panels[3], tile.count, padded_, nullptr,
                      grad_v_ + slot * Tiles::ROWS * padded_);
    if constexpr (Queries::GIVEN) queries_.meet(tile);
  }

  void finish(int64_t slot, int64_t begin, int64_t count) {
    add_rows(*keys_, begin, count, call_.accumulate, grad_k_ + slot * Tiles::ROWS * padded_, padded_, call_.scale,
             lane_->grad_k, call_.grad_dtype, call_.grad_k_stride, call_.width);
    add_rows(*keys_, begin, count, call_.accumulate, grad_v_ + slot * Tiles::ROWS * padded_, padded_, 1.0f,
             lane_->grad_v, call_.grad_dtype, call_.grad_v_stride, call_.width);
  }

 private:
  void sweep(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end) {
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

  const longspan_attention& call_;
  const Scale scale_;
  const int64_t rows_at_once_, padded_;
  Sweep<Tiles, KeyGradient> sweep_;
  Gradients<Tiles> gradients_;
  Queries queries_;
  Packed* k_;
  Packed* v_;
  float* grad_k_;
  float* grad_v_;
  const longspan_lane* lane_ = nullptr;
  const Tokens* keys_ = nullptr;
  Biases biases_{{}, {}};
};

// Whether the pass over the keys gives the gradients of the queries, too: the busiest thread must not lose what is saved.
ALWAYS_INLINE bool takes_one_pass(const longspan_lane* lanes, int64_t num_lanes) {
  int64_t grids = 0;
  for (int64_t i = 0; i < num_lanes; ++i) {
    const longspan_lane& lane = lanes[i];
    if (lane.positions || BiasSums::count(lane.bias) > 0 || BiasSums::count(lane.extra_bias) > 0) return false;
    grids += smaller(lane.dilation, larger(lane.keys, lane.queries));
  }
  const int64_t threads = omp_get_max_threads();
  return 5 * threads * divide_up(grids, threads) <= 7 * grids;
}

template <class Tiles>
int run_band(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes) {
  if constexpr (Tiles::SCATTERS) {
    if (takes_one_pass(lanes, num_lanes)) {
      return run_pass<KeyGradient<Tiles, BandKeys, BandQueries<Tiles>>>(call, lanes, num_lanes);
    }
  }
  const int status = run_pass<QueryGradient<Tiles>>(call, lanes, num_lanes);
  return status != LONGSPAN_OK ? status : run_pass<KeyGradient<Tiles, BandKeys, NoQueries>>(call, lanes, num_lanes);
}

template <class Tiles>
int run_backward(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes) {
  const int status = run_band<Tiles>(call, lanes, num_lanes);
  return status != LONGSPAN_OK ? status : run_pass<KeyGradient<Tiles, ExtraKeys, NoQueries>>(call, lanes, num_lanes);
}

}  // namespace longspan::LONGSPAN_SET
