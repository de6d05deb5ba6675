// A bias by distance: added to the scores of a tile, and its gradient summed up from theirs.
#pragma once
#include <stdlib.h>

#include "sweep.h"

namespace longspan::LONGSPAN_SET {

static_assert(LONGSPAN_BIAS_MARGIN >= LANES, "a vector at either end reads what stands there");

// Calls visit(p, r, x, at, count) for `count` neighbouring columns x of a tile's panel p and row r: their values stand
// from `at` on, in the order of the columns or, where rows are keys, against it.
template <bool ROWS_ARE_KEYS, class TileOfPanels, class Visit>
ALWAYS_INLINE void visit_biased(const TileOfPanels& tile, int64_t rows, int64_t panel, const longspan_bias* biases,
                                Visit visit) {
  for (int64_t p = 0; p < tile.count; ++p) {
    const longspan_bias& bias = biases[tile.view[p]];
    if (!bias.values) continue;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = tile.reach[p]->position(r);
      for (int64_t x = 0; x < panel; x += LANES) {
        if (tile.start[p] >= 0) {
          const int64_t column = tile.start[p] + x;
          const int64_t steps = ROWS_ARE_KEYS ? row - (column + LANES - 1) : column - row;
          visit(p, r, x, larger(0, smaller(steps - bias.first, bias.count - LANES)), LANES);
          continue;
        }
        for (int64_t j = x; j < x + LANES; ++j) {
          const int64_t column = tile.positions[p][j], steps = ROWS_ARE_KEYS ? row - column : column - row;
          visit(p, r, j, larger(0, smaller(steps - bias.first, bias.count - 1)), 1);
        }
      }
    }
  }
}

// factor: from a bias to a score as tiles compute it, before it is scaled.
template <bool ROWS_ARE_KEYS, class TileOfPanels>
NO_INLINE void add_bias(const TileOfPanels& tile, int64_t rows, int64_t panel, const longspan_bias* biases, float factor,
                        float* scores) {
  visit_biased<ROWS_ARE_KEYS>(tile, rows, panel, biases, [&](int64_t p, int64_t r, int64_t x, int64_t at, int64_t count) {
    const float* values = biases[tile.view[p]].values + at;
    float* to = scores + r * TileOfPanels::STRIDE + p * panel + x;
    if (count == 1) {
      *to += factor * *values;
      return;
    }
    const Vector value = load(values);
    store(to, multiply_add(splat(factor), ROWS_ARE_KEYS ? reversed(value) : value, load(to)));
  });
}

// Rows are queries. sums: for each view, where the gradient of its bias is summed up; null: nobody wants it.
template <class TileOfPanels, class Weight>
NO_INLINE void sum_bias_gradient(const TileOfPanels& tile, int64_t rows, int64_t panel, const longspan_bias* biases,
                                 const Weight* grad_scores, float* const* sums) {
  visit_biased<false>(tile, rows, panel, biases, [&](int64_t p, int64_t r, int64_t x, int64_t at, int64_t count) {
    if (!sums[tile.view[p]]) return;
    const Weight* from = grad_scores + r * TileOfPanels::STRIDE + p * panel + x;
    float* to = sums[tile.view[p]] + at;
    if (count == 1) {
      *to += load_part(from, 1)[0];
    } else {
      store(to, load(to) + load(from));
    }
  });
}

// The sums of every task, added up in the order of the tasks: the same result whichever thread took which.
class BiasSums {
 public:
  ~BiasSums() { free(sums_); }

  bool allocate(const longspan_lane* lanes, int64_t num_lanes, int64_t num_tasks) {
    for (int64_t i = 0; i < num_lanes; ++i) size_ = larger(size_, count(lanes[i].bias) + count(lanes[i].extra_bias));
    if (size_ > 0) sums_ = static_cast<float*>(calloc(num_tasks * size_, sizeof(float)));
    return size_ == 0 || sums_;
  }

  // Null where no lane wants a gradient.
  float* of_task(int64_t task) const { return sums_ ? sums_ + task * size_ : nullptr; }

  void add_to(const longspan_lane* lanes, int64_t num_lanes, int64_t num_tasks) const {
    for (int64_t task = 0; sums_ && task < num_tasks; ++task) {
      const longspan_lane& lane = lanes[task % num_lanes];
      add(of_task(task), lane.bias);
      add(of_task(task) + count(lane.bias), lane.extra_bias);
    }
  }

  static int64_t count(const longspan_bias& bias) { return bias.values && bias.gradient ? bias.count : 0; }

 private:
  static void add(const float* sums, const longspan_bias& bias) {
    for (int64_t i = 0; i < count(bias); ++i) bias.gradient[i] += sums[i];
  }

  float* sums_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace longspan::LONGSPAN_SET
