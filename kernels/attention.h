// What the forward and the backward pass share: who sees whom, and rows on their way in and out.
#pragma once
#include <math.h>

#include "plan.h"

namespace longspan::LONGSPAN_SET {

// Scores are compared and hidden before they are scaled. So the scale must be positive: a negative one is taken into
// the sign of the rows, and 0, which would make NaN of -infinity, becomes as good as 0.
struct Scale {
  bool negative;
  float factor;   // of scores, in powers of two
  float inverse;  // of a bias, which is added before

  explicit Scale(float scale)
      : negative(scale < 0),
        factor(larger_of(fabsf(scale), 1e-30f) * LOG2_E),
        inverse(1 / larger_of(fabsf(scale), 1e-30f)) {}

 private:
  static float larger_of(float a, float b) { return a > b ? a : b; }
};

// The rows of a block; null: hidden, or beyond the last of them.
template <class Element, int64_t ROWS>
ALWAYS_INLINE void find_rows(const Tokens& tokens, int64_t begin, int64_t count, const void* base, int64_t stride,
                             const Element* (&rows)[ROWS]) {
  if (tokens.is_plain() && count == ROWS) {
    const Element* from = static_cast<const Element*>(base) + tokens.row(begin) * stride;
    for (int64_t r = 0; r < ROWS; ++r) rows[r] = from + r * (tokens.step * stride);
    return;
  }
  for (int64_t r = 0; r < ROWS; ++r) {
    const int64_t row = r < count ? tokens.row(begin + r) : 0;
    rows[r] = r < count && tokens.is_shown(row) ? static_cast<const Element*>(base) + row * stride : nullptr;
  }
}

template <class Tiles>
ALWAYS_INLINE void load_block(const Tokens& tokens, int64_t begin, int64_t count, const void* base, int64_t stride,
                              int64_t width, bool negative, typename Tiles::Packed* block) {
  const int64_t padded = round_up(width, Tiles::WIDTH_STEP);
  const typename Tiles::Element* rows[Tiles::ROWS];
  find_rows(tokens, begin, count, base, stride, rows);
  Tiles::pack_block(rows, width, padded, block);
  if (negative) {
    for (int64_t i = 0; i < Tiles::ROWS * padded; ++i) flip_sign(block[i]);
  }
}

ALWAYS_INLINE int64_t size_of(int32_t dtype) { return dtype == LONGSPAN_F32 ? sizeof(float) : sizeof(bfloat16); }

// Rows that are read or written soon. They lie far apart, where the hardware does not foresee them.
ALWAYS_INLINE void prefetch_rows(const Tokens& tokens, int64_t begin, int64_t count, const void* base, int64_t stride,
                                 int64_t size, int64_t width) {
  const int64_t end = smaller(begin + count, tokens.count);
  for (int64_t n = begin; n < end; ++n) {
    const char* row = static_cast<const char*>(base) + tokens.row(n) * stride * size;
    for (int64_t x = 0; x < width * size; x += 64) __builtin_prefetch(row + x, 0, 2);
  }
}

// to = own_share * to + share * values. What has a share of 0 may be NaN and leaves no trace.
template <class T>
ALWAYS_INLINE void blend_row(T* to, float own_share, const float* values, float share, int64_t width) {
  for (int64_t x = 0; x < width; x += LANES) {
    const int64_t count = smaller(LANES, width - x);
    Vector value = share == 0 ? Vector{} : share * load(values + x);
    if (own_share != 0) value += own_share * (count == LANES ? load(to + x) : load_part(to + x, count));
    if (count == LANES) store(to + x, value);
    if (count < LANES) store_part(to + x, value, count);
  }
}

ALWAYS_INLINE void blend_row(void* base, int32_t dtype, int64_t offset, float own_share, const float* values, float share,
                             int64_t width) {
  if (dtype == LONGSPAN_F32) blend_row(static_cast<float*>(base) + offset, own_share, values, share, width);
  if (dtype == LONGSPAN_BF16) blend_row(static_cast<bfloat16*>(base) + offset, own_share, values, share, width);
}

// Where the weights of scores go: in their place if they are of the same type.
template <class Packed>
ALWAYS_INLINE Packed* weights_of(float* scores, Arena& arena, int64_t count) {
  return sizeof(Packed) == sizeof(float) ? reinterpret_cast<Packed*>(scores) : arena.take<Packed>(count);
}

// Writes the sums of a block, times `factor`, to the rows of its tokens, or adds them. Hidden tokens get 0.
NO_INLINE void add_rows(const Tokens& tokens, int64_t begin, int64_t count, bool accumulate, const float* sums,
                        int64_t padded, float factor, void* base, int32_t dtype, int64_t stride, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = tokens.row(begin + r);
    const bool shown = tokens.is_shown(row);
    if (!shown && accumulate) continue;
    blend_row(base, dtype, row * stride, accumulate ? 1 : 0, sums + r * padded, shown ? factor : 0, width);
  }
}

// One grid of the queries of a lane; `on_grid` false: their positions are those of their rows.
ALWAYS_INLINE Tokens queries_of(const longspan_attention& call, const longspan_lane& lane, int64_t residue,
                                int64_t dilation, bool on_grid) {
  Tokens queries;
  queries.count = tokens_of_residue(lane.queries, residue, dilation);
  queries.first = residue;
  queries.step = dilation;
  queries.on_grid = on_grid;
  queries.positions = lane.positions;
  queries.mask = lane.query_mask;
  queries.mask_stride = call.query_mask_stride;
  return queries;
}

ALWAYS_INLINE Tokens keys_of(const longspan_attention& call, const longspan_lane& lane, int64_t residue) {
  Tokens keys;
  keys.count = tokens_of_residue(lane.keys, residue, lane.dilation);
  keys.first = residue;
  keys.step = lane.dilation;
  keys.mask = lane.key_mask;
  keys.mask_stride = call.key_mask_stride;
  return keys;
}

ALWAYS_INLINE Tokens extras_of(const longspan_lane& lane) {
  Tokens extras;
  extras.count = lane.extras;
  extras.list = lane.extra;
  extras.on_grid = false;
  return extras;
}

ALWAYS_INLINE View band_of_queries(const longspan_attention& call, const longspan_lane& lane, int64_t residue) {
  return {queries_of(call, lane, residue, lane.dilation, true), keys_of(call, lane, residue), limited(lane.before),
          limited(lane.after)};
}

ALWAYS_INLINE View extras_of_queries(const longspan_attention& call, const longspan_lane& lane, int64_t residue) {
  return {queries_of(call, lane, residue, lane.dilation, false), extras_of(lane), UNLIMITED,
          lane.extra_causal ? 0 : UNLIMITED};
}

// What `run_pass` asks of a pass whose rows are queries and whose columns are extra keys and the band.
struct OverQueries {
  static int64_t rows(const longspan_lane& lane) { return lane.queries; }
  static int64_t dilation(const longspan_lane& lane) { return lane.dilation; }
  static int64_t columns(const longspan_lane& lane, int64_t view) {
    return view == 0 ? lane.extras : divide_up(lane.keys, lane.dilation);
  }
};

// For each view of queries. None of them: `is_biased` false, so that a pass without bias has one test per tile more.
struct Biases {
  longspan_bias of_view[VIEWS];
  bool is_biased;

  Biases(const longspan_bias& extras, const longspan_bias& band)
      : of_view{extras, band}, is_biased(extras.values || band.values) {}
};

}  // namespace longspan::LONGSPAN_SET
