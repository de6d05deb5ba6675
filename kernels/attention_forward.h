// Softmax attention of one pass: scores, online softmax, weighted sum of values, tile by tile.
#pragma once
#include "attention.h"

namespace longspan::LONGSPAN_SET {

// Running softmax of the rows of a block. `top` is the largest score met so far, in powers of two; `sums` adds up the
// exponentials above it, by lane.
template <int64_t ROWS>
struct Softmax {
  float top[ROWS];
  float sums[ROWS][LANES];
};

// Turns the scores of a tile into weights 2^(score - top) and adds them up. Where a score is far above the top, the top
// rises, `alpha` becomes the factors that older sums need, and the result is true; rows that have seen nothing have top
// -infinity, weights 0 and sums 0.
template <int64_t ROWS, class Weight>
NO_INLINE bool advance(Softmax<ROWS>& softmax, float* scores, int64_t stride, int64_t columns, float factor, float* alpha,
                       Weight* weights) {
  constexpr bool PRECISE = sizeof(Weight) == sizeof(float);
  constexpr float SLACK = 8;  // weights of up to 2^8 lose nothing, and the top hardly ever rises again
  alignas(ALIGNMENT) float base[ROWS];
  for (int64_t r = 0; r < ROWS; ++r) {
    const float* row = scores + r * stride;
    Vector best = load(row);
    for (int64_t x = LANES; x < columns; x += LANES) best = maximum(load(row + x), best);
    base[r] = largest(best);
  }
  bool rises = false;
  for (int64_t r = 0; r < ROWS; r += LANES) {
    rises |= any_larger(load(base + r) * factor, load(softmax.top + r) + SLACK);
  }
  for (int64_t r = 0; r < ROWS; r += LANES) {
    const Vector old_top = load(softmax.top + r);
    const Vector top = rises ? maximum(old_top, load(base + r) * factor) : old_top;
    const Vector finite = top == -INFINITE ? Vector{} : top;
    store(base + r, finite);
    if (!rises) continue;
    store(softmax.top + r, top);
    store(alpha + r, exp2<true>(old_top - finite));
  }
  for (int64_t r = 0; r < ROWS; ++r) {
    const float* row = scores + r * stride;
    Weight* to = weights + r * stride;
    const Vector factors = splat(factor), top = splat(-base[r]);
    Vector even = load(softmax.sums[r]), odd = {};
    if (rises) even *= alpha[r];
    int64_t x = 0;
    for (; x + 2 * LANES <= columns; x += 2 * LANES) {
      const Vector first = exp2<PRECISE>(multiply_add(load(row + x), factors, top));
      const Vector second = exp2<PRECISE>(multiply_add(load(row + x + LANES), factors, top));
      even += first;
      odd += second;
      store_pair(to + x, first, second);
    }
    if (x < columns) {
      const Vector last = exp2<PRECISE>(multiply_add(load(row + x), factors, top));
      even += last;
      store(to + x, last);
    }
    store(softmax.sums[r], even + odd);
  }
  return rises;
}

template <class TilesOfType>
class Forward : public OverQueries {
 public:
  using Tiles = TilesOfType;
  using Packed = typename Tiles::Packed;
  static constexpr int64_t SOURCES = 2;
  static constexpr bool SUMS_BIAS = false, TAKES_GRIDS = false;
  // Scores and weights of 16 rows x 304 columns fit in the first-level cache, and a window of 256 keys with 32 more is
  // one tile. Blocks of 32 rows fit in no useful number, and do best where all of a window of 512 keys is one tile.
  static constexpr int64_t TILE_PANELS = (Tiles::ROWS == 32 ? 544 : 304) / Tiles::PANEL;

  Forward(Arena& arena, const Pass& pass)
      : call_(pass.call),
        scale_(pass.call.scale),
        padded_(round_up(pass.call.width, Tiles::WIDTH_STEP)),
        sweep_(arena, pass.call.width, pass.most_columns) {
    const int64_t slots = pass.slots<Tiles>();
    block_ = arena.take<Packed>(Tiles::ROWS * padded_);
    scores_ = arena.take<float>(Tiles::ROWS * STRIDE);
    weights_ = weights_of<Packed>(scores_, arena, Tiles::ROWS * STRIDE);
    sums_ = arena.take<float>(slots * Tiles::ROWS * padded_);
    softmaxes_ = arena.take<Softmax<Tiles::ROWS>>(slots);
  }

  void run(const longspan_lane& lane, int64_t residue, int64_t begin, int64_t end) {
    lane_ = &lane;
    const View views[VIEWS] = {extras_of_queries(call_, lane, residue), band_of_queries(call_, lane, residue)};
    const Source sources[SOURCES] = {{lane.k, call_.k_stride, true}, {lane.v, call_.v_stride, false}};
    queries_ = &views[1].rows;
    biases_ = {lane.extra_bias, lane.bias};
    sweep_.run(*this, views, sources, begin, end);
  }

  void reset(int64_t slot) {
    for (int64_t r = 0; r < Tiles::ROWS; ++r) softmaxes_[slot].top[r] = -INFINITE;
    memset(softmaxes_[slot].sums, 0, sizeof softmaxes_[slot].sums);
    memset(sums_of(slot), 0, Tiles::ROWS * padded_ * sizeof(float));
  }

  void load(int64_t begin, int64_t count) {
    prefetch_rows(*queries_, begin + count, count, lane_->q, call_.q_stride, sizeof(typename Tiles::Element), call_.width);
    prefetch_rows(*queries_, begin, count, lane_->out, call_.out_stride, size_of(call_.out_dtype), call_.width);
    load_block<Tiles>(*queries_, begin, count, lane_->q, call_.q_stride, call_.width, scale_.negative, block_);
  }

  template <class TileOfPanels>
  void meet(int64_t slot, const TileOfPanels& tile) {
    alignas(ALIGNMENT) float alpha[Tiles::ROWS];
    Tiles::scores(block_, padded_, tile.panels[0], tile.count, scores_, STRIDE);
    if (biases_.is_biased) {
      add_bias<false>(tile, Tiles::ROWS, Tiles::PANEL, biases_.of_view, scale_.inverse, scores_);
    }
    tile.hide_unseen(scores_);
    const bool rises = advance(softmaxes_[slot], scores_, STRIDE, tile.columns(), scale_.factor, alpha, weights_);
    Tiles::accumulate(weights_, STRIDE, tile.panels[1], tile.count, padded_, rises ? alpha : nullptr, sums_of(slot));
  }

  void finish(int64_t slot, int64_t begin, int64_t count) {
    alignas(ALIGNMENT) float totals[Tiles::ROWS], shares[Tiles::ROWS];
    for (int64_t r = 0; r < Tiles::ROWS; r += LANES) {
      const Vector total = sums_of_rows(softmaxes_[slot].sums + r);
      store(totals + r, total);
      store(shares + r, total == 0 ? Vector{} : 1 / total);
    }
    if (call_.out_dtype == LONGSPAN_F32) finish_rows<float>(slot, begin, count, totals, shares);
    if (call_.out_dtype == LONGSPAN_BF16) finish_rows<bfloat16>(slot, begin, count, totals, shares);
  }

 private:
  static constexpr int64_t STRIDE = Tile<Tiles, TILE_PANELS>::STRIDE;

  template <class Out>
  void finish_rows(int64_t slot, int64_t begin, int64_t count, const float* totals, const float* shares) {
    const float* sums = sums_of(slot);
    for (int64_t r = 0; r < count; ++r, sums += padded_) {
      const int64_t row = queries_->row(begin + r);
      const bool shown = queries_->is_shown(row), blind = !shown || totals[r] == 0;
      if (call_.accumulate && blind) continue;
      float share = blind ? 0 : shares[r], own_share = 0;
      if (lane_->lse) {
        float& to = lane_->lse[row * call_.lse_stride];
        float lse = blind ? -INFINITE : softmaxes_[slot].top[r] * LN_2 + logf(totals[r]);
        if (call_.accumulate) {
          const float total = log_of_sum(to, lse);
          own_share = expf(to - total);
          share *= expf(lse - total);
          lse = total;
        }
        to = lse;
      }
      blend_row(static_cast<Out*>(lane_->out) + row * call_.out_stride, own_share, sums, share, call_.width);
    }
  }

  // log(e^a + e^b), where b is finite.
  static float log_of_sum(float a, float b) {
    const float top = a > b ? a : b;
    return top + logf(expf(a - top) + expf(b - top));
  }

  float* sums_of(int64_t slot) { return sums_ + slot * Tiles::ROWS * padded_; }

  const longspan_attention& call_;
  const Scale scale_;
  const int64_t padded_;
  Sweep<Tiles, Forward> sweep_;
  Packed* block_;
  float* scores_;
  Packed* weights_;
  float* sums_;
  Softmax<Tiles::ROWS>* softmaxes_;
  const longspan_lane* lane_ = nullptr;
  const Tokens* queries_ = nullptr;
  Biases biases_{{}, {}};
};

}  // namespace longspan::LONGSPAN_SET
