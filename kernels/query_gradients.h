// The gradients of queries: in a pass over the queries, or as the keys that they see pass by.
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

// sum(grad_out * out) - grad_lse of a query.
template <class Element>
ALWAYS_INLINE float find_delta(const longspan_attention& call, const longspan_lane& lane, int64_t row) {
  const Element* grad_out = static_cast<const Element*>(lane.grad_out) + row * call.grad_out_stride;
  const int64_t out = row * call.out_stride, at = row * call.lse_stride;
  float delta = lane.grad_lse ? -lane.grad_lse[at] : 0;
  if (call.out_dtype == LONGSPAN_F32) delta += dot(grad_out, static_cast<const float*>(lane.out) + out, call.width);
  if (call.out_dtype == LONGSPAN_BF16) delta += dot(grad_out, static_cast<const bfloat16*>(lane.out) + out, call.width);
  return lane.delta[at] = delta;
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

// Sums of some queries of a grid, at most `panels` * PANEL of them at a time: a ring.
template <class Tiles>
struct QuerySums {
  float* rows;
  int64_t panels;  // a power of 2
  int64_t padded;

  float* at(int64_t query) const { return rows + (query / Tiles::PANEL & (panels - 1)) * Tiles::PANEL * padded; }
};

// Pass over the queries.
template <class TilesOfType>
class QueryGradient : public OverQueries {
 public:
  using Tiles = TilesOfType;
  using Packed = typename Tiles::Packed;
  static constexpr int64_t SOURCES = 3;
  static constexpr bool SUMS_BIAS = true, TAKES_GRIDS = false;
  static constexpr int64_t TILE_PANELS = Gradients<Tiles>::TILE_PANELS;

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
    const int64_t of_band = BiasSums::count(lane.bias), of_extras = BiasSums::count(lane.extra_bias);
    bias_sums_[0] = of_extras > 0 ? bias_sums + of_band : nullptr;
    bias_sums_[1] = of_band > 0 ? bias_sums : nullptr;
    sweep(lane, residue, begin, end, band_of_queries(call_, lane, residue));
  }

  // What the extra keys give, in `sums`, where delta is known.
  void run_extras(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end, const QuerySums<Tiles>& sums) {
    sums_ = &sums;
    View no_band = band_of_queries(call_, lane, residue);
    no_band.columns = {};
    sweep(lane, residue, begin, end, no_band);
  }

  void reset(int64_t slot) { memset(grad_q_ + slot * Tiles::ROWS * padded_, 0, Tiles::ROWS * padded_ * sizeof(float)); }

  // Finds delta for the passes over keys, too.
  void load(int64_t begin, int64_t count) {
    using Element = typename Tiles::Element;
    constexpr int64_t size = sizeof(Element);
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
      delta_[r] = !shown ? 0 : sums_ ? lane_->delta[row * call_.lse_stride] : find_delta<Element>(call_, *lane_, row);
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
    const float* sums = grad_q_ + slot * Tiles::ROWS * padded_;
    if (sums_) {
      memcpy(sums_->at(begin), sums, Tiles::ROWS * padded_ * sizeof(float));
    } else {
      add_rows(*queries_, begin, count, call_.accumulate, sums, padded_, call_.scale, lane_->grad_q, call_.grad_dtype,
               call_.grad_q_stride, call_.width);
    }
  }

 private:
  void sweep(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end, const View& band) {
    lane_ = &lane;
    biases_ = {lane.extra_bias, lane.bias};
    View views[VIEWS] = {extras_of_queries(call_, lane, residue), band};
    for (View& view : views) view.rows = with_statistics(view.rows, call_, lane);
    const Source sources[SOURCES] = {
        {lane.k, call_.k_stride, true}, {lane.v, call_.v_stride, true}, {lane.k, call_.k_stride, false}};
    queries_ = &views[1].rows;
    sweep_.run(*this, views, sources, begin, end);
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
  const QuerySums<Tiles>* sums_ = nullptr;  // where they are kept; null: they are written
  const longspan_lane* lane_ = nullptr;
  const Tokens* queries_ = nullptr;
};

// The gradients of the queries, too, in the pass over the keys of the band. Queries of a grid begin when the first key
// that they see comes and are done when the last one has passed.
template <class Tiles>
class BandQueries {
 public:
  using Packed = typename Tiles::Packed;
  static constexpr bool GIVEN = true, PAIRED = Tiles::PER_WORD == 2;

  BandQueries(Arena& arena, const Pass& pass, const Gradients<Tiles>& gradients)
      : call_(pass.call),
        rows_at_once_(pass.rows_per_task),
        padded_(round_up(pass.call.width, Tiles::WIDTH_STEP)),
        extras_(arena, pass),
        words_(PAIRED ? arena.take<Packed>(Tiles::ROWS * gradients.STRIDE) : gradients.grad_scores),
        keys_(arena.take<Packed>(Tiles::PANEL * padded_)) {
    const int64_t most = smaller(pass.most_columns[1], pass.most_reach + pass.rows_per_task + 2 * Tiles::PANEL);
    int64_t panels = 1;
    while (panels * Tiles::PANEL < most) panels *= 2;
    sums_ = {arena.take<float>(panels * Tiles::PANEL * padded_), panels, padded_};
  }

  Packed* words() const { return words_; }  // the gradients of scores, as `scatter` reads them

  void open(const longspan_lane& lane, int64_t residue) {
    lane_ = &lane;
    residue_ = residue;
    queries_ = with_statistics(queries_of(call_, lane, residue, lane.dilation, true), call_, lane);
    begun_ = done_ = 0;
  }

  // The keys `first` to `last` come next.
  void pass_to(int64_t first, int64_t last) {
    finish(larger(0, first - limited(lane_->after)) / Tiles::PANEL * Tiles::PANEL);
    begin(last + limited(lane_->before));
  }

  void close() {
    while (finish(begun_), begun_ < queries_.count) begin(begun_ + rows_at_once_);
  }

  void load(const Tokens& keys, int64_t begin, int64_t count) {
    const typename Tiles::Element* rows[Tiles::ROWS];
    find_rows(keys, begin, count, lane_->k, call_.k_stride, rows);
    Tiles::pack_straight(rows, call_.width, padded_, keys_);
  }

  template <class TileOfPanels>
  void meet(const TileOfPanels& tile) {
    float* outs[TileOfPanels::CAPACITY];
    for (int64_t p = 0; p < tile.count; ++p) outs[p] = sums_.at(tile.start[p]);
    Tiles::scatter(words_, TileOfPanels::STRIDE, keys_, padded_, outs, tile.count);
  }

 private:
  void begin(int64_t until) {
    until = smaller(round_up(until, Tiles::PANEL), queries_.count);
    for (int64_t end; begun_ < until; begun_ = end) {
      end = smaller(begun_ + rows_at_once_, until);
      for (int64_t n = begun_; n < end; n += Tiles::PANEL) {
        memset(sums_.at(n), 0, Tiles::PANEL * padded_ * sizeof(float));
        find_deltas(n, smaller(Tiles::PANEL, end - n));
      }
      if (lane_->extras > 0) extras_.run_extras(*lane_, residue_, begun_, end, sums_);
    }
  }

  void find_deltas(int64_t begin, int64_t count) {
    using Element = typename Tiles::Element;
    prefetch_rows(queries_, begin + count, count, lane_->grad_out, call_.grad_out_stride, sizeof(Element), call_.width);
    prefetch_rows(queries_, begin + count, count, lane_->out, call_.out_stride, size_of(call_.out_dtype), call_.width);
    for (int64_t n = begin; n < begin + count; ++n) {
      const int64_t row = queries_.row(n);
      if (queries_.is_shown(row)) find_delta<Element>(call_, *lane_, row);
    }
  }

  void finish(int64_t until) {
    for (until = smaller(until, queries_.count); done_ < until; done_ += Tiles::PANEL) {
      add_rows(queries_, done_, smaller(Tiles::PANEL, queries_.count - done_), call_.accumulate, sums_.at(done_), padded_,
               call_.scale, lane_->grad_q, call_.grad_dtype, call_.grad_q_stride, call_.width);
    }
  }

  const longspan_attention& call_;
  const int64_t rows_at_once_, padded_;
  QueryGradient<Tiles> extras_;
  QuerySums<Tiles> sums_ = {};
  Packed* words_;
  Packed* keys_;
  const longspan_lane* lane_ = nullptr;
  int64_t residue_ = 0;
  Tokens queries_;
  int64_t begun_ = 0, done_ = 0;
};

}  // namespace longspan::LONGSPAN_SET
