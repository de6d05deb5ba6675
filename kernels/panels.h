// What a block of rows meets: the tokens of the other side, packed in panels just in time.
//
// Attention is always rows against columns: queries against keys forward, and for the gradients of keys and values keys
// against queries. A row sees the columns whose position lies in an interval around its own.
#pragma once
#include "longspan.h"
#include "simd.h"

namespace longspan::LONGSPAN_SET {

constexpr int64_t UNLIMITED = int64_t{1} << 30;     // more tokens than a lane may have
constexpr int32_t NOWHERE = -2147483647 - 1;        // the position of a hidden token: before every interval

// Hands out pieces of one piece of memory. Without memory it only counts how much is needed.
struct Arena {
  char* memory = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), ALIGNMENT);
    return piece;
  }
};

// A sequence of tokens: some rows of a lane, in the order in which they are visited.
struct Tokens {
  int64_t count = 0;
  int64_t first = 0, step = 1;           // token n is row first + n * step,
  const int64_t* list = nullptr;         // or row list[n]
  bool on_grid = true;                   // token n stands at position n, else at the number of its row,
  const int64_t* positions = nullptr;    // or at positions[row]
  const uint8_t* mask = nullptr;         // of rows
  int64_t mask_stride = 0;
  const float* lse = nullptr;            // of rows: -infinity marks queries that see nothing and so have no gradient
  const float* delta = nullptr;          // of rows
  int64_t lse_stride = 0;                // of both

  int64_t row(int64_t n) const { return list ? list[n] : first + n * step; }
  bool is_shown(int64_t row) const {
    return (!mask || mask[row * mask_stride]) && !(lse && lse[row * lse_stride] == -INFINITE);
  }
  int64_t position(int64_t n) const { return positions ? positions[row(n)] : on_grid ? n : row(n); }
  bool position_is_number() const { return on_grid && !positions; }
  // Nothing is hidden, and rows and positions rise in equal steps.
  bool is_plain() const { return !list && !positions && !mask && !lse; }
  int64_t position_step() const { return on_grid ? 1 : step; }  // of plain tokens
};

// Rows see the columns at positions from their own - before to their own + after.
struct View {
  Tokens rows, columns;
  int64_t before = 0, after = 0;
};

// The intervals that the rows of a block see.
template <int64_t ROWS>
struct Reach {
  int32_t first[ROWS], last[ROWS];
  int64_t before;
  int64_t lowest_first = UNLIMITED, highest_first = -UNLIMITED, lowest_last = UNLIMITED, highest_last = -UNLIMITED;

  Reach(const View& view, int64_t begin, int64_t count) : before(view.before) {
    if (count == 0) return;
    if (view.rows.is_plain()) {
      fill_plain(view, begin, count);
      return;
    }
    for (int64_t r = 0; r < ROWS; ++r) {
      first[r] = 0;
      last[r] = -1;
      if (r >= count || !view.rows.is_shown(view.rows.row(begin + r))) continue;
      const int64_t position = view.rows.position(begin + r);
      const int64_t from = larger(position - view.before, -UNLIMITED), to = smaller(position + view.after, UNLIMITED);
      first[r] = static_cast<int32_t>(from);
      last[r] = static_cast<int32_t>(to);
      lowest_first = smaller(lowest_first, from);
      highest_first = larger(highest_first, from);
      lowest_last = smaller(lowest_last, to);
      highest_last = larger(highest_last, to);
    }
  }

  int64_t position(int64_t r) const { return first[r] + before; }  // of a shown row

 private:
  void fill_plain(const View& view, int64_t begin, int64_t count) {
    const int32_t start = static_cast<int32_t>(view.rows.position(begin));
    const int32_t step = static_cast<int32_t>(view.rows.position_step());
    const int32_t before = static_cast<int32_t>(view.before), after = static_cast<int32_t>(view.after);
    for (int32_t r = 0; r < ROWS; ++r) {
      const int32_t position = start + r * step;
      first[r] = r < count ? position - before : 0;
      last[r] = r < count ? position + after : -1;
    }
    lowest_first = first[0];
    highest_first = first[count - 1];
    lowest_last = last[0];
    highest_last = last[count - 1];
  }
};

struct Range {
  int64_t begin = 0, end = 0;
};

// The panels that may hold columns at positions `first` to `last`.
ALWAYS_INLINE Range panels_within(const Tokens& columns, int64_t panel, int64_t first, int64_t last) {
  if (first > last || columns.count == 0) return {0, 0};
  if (!columns.position_is_number()) return {0, divide_up(columns.count, panel)};
  const int64_t begin = larger(first, 0), end = smaller(last + 1, columns.count);
  return begin < end ? Range{begin / panel, divide_up(end, panel)} : Range{0, 0};
}

// A matrix whose rows are packed, and how.
struct Source {
  const void* rows;
  int64_t stride;
  bool transposed;
};
constexpr int64_t MAX_SOURCES = 4;

// A stretch of columns: up to `capacity` panels of each source. What no block looks at is never packed.
template <class Tiles>
class Segment {
 public:
  using Element = typename Tiles::Element;
  using Packed = typename Tiles::Packed;

  Segment(Arena& arena, int64_t capacity, int64_t num_sources, int64_t width)
      : width_(width), padded_(round_up(width, Tiles::WIDTH_STEP)), num_sources_(num_sources) {
    storage_ = arena.take<Packed>(capacity * num_sources * Tiles::PANEL * padded_);
    positions_ = arena.take<int32_t>(capacity * Tiles::PANEL);
    statistics_ = arena.take<float>(capacity * Tiles::PANEL * 2);
    panels_ = arena.take<Panel>(capacity);
  }

  void open(const Tokens& columns, const Source* sources, Range range) {
    columns_ = &columns;
    sources_ = sources;
    range_ = range;
    for (int64_t p = range.begin; p < range.end; ++p) describe(p);
  }

  Range range() const { return range_; }
  const Tokens& columns() const { return *columns_; }

  template <int64_t ROWS>
  bool is_seen(int64_t panel, const Reach<ROWS>& reach) const {
    const Panel& p = at(panel);
    return p.any && p.last >= reach.lowest_first && p.first <= reach.highest_last;
  }

  // Whether all rows of a block see all of the panel.
  template <int64_t ROWS>
  bool is_seen_whole(int64_t panel, const Reach<ROWS>& reach) const {
    const Panel& p = at(panel);
    return p.all && p.first >= reach.highest_first && p.last <= reach.lowest_last;
  }

  const int32_t* positions(int64_t panel) const { return positions_ + (panel - range_.begin) * Tiles::PANEL; }

  void pack(int64_t panel) {
    Panel& p = at(panel);
    if (p.packed) return;
    p.packed = true;
    for (int64_t s = 0; s < num_sources_; ++s) {
      const Element* rows[Tiles::PANEL];
      addresses(panel, sources_[s], rows);
      Packed* to = storage_ + ((panel - range_.begin) * num_sources_ + s) * Tiles::PANEL * padded_;
      if (sources_[s].transposed) Tiles::pack_transposed(rows, width_, padded_, to);
      if (!sources_[s].transposed) Tiles::pack_straight(rows, width_, padded_, to);
    }
    if (columns_->lse) gather_statistics(panel);
    if (panel + 1 < range_.end) prefetch(panel + 1);
  }

  const Packed* packed(int64_t panel, int64_t source) const {
    return storage_ + ((panel - range_.begin) * num_sources_ + source) * Tiles::PANEL * padded_;
  }

  // Of columns that are queries: PANEL times lse in powers of two, then PANEL times delta. Hidden: infinity and 0.
  const float* statistics(int64_t panel) const { return statistics_ + (panel - range_.begin) * Tiles::PANEL * 2; }

 private:
  struct Panel {
    int32_t first, last;  // positions of the shown columns
    bool any, all;        // of its columns are shown
    bool packed;
  };

  Panel& at(int64_t panel) { return panels_[panel - range_.begin]; }
  const Panel& at(int64_t panel) const { return panels_[panel - range_.begin]; }

  void describe(int64_t panel) {
    const int64_t begin = panel * Tiles::PANEL;
    int32_t* to = positions_ + (panel - range_.begin) * Tiles::PANEL;
    if (columns_->is_plain() && begin + Tiles::PANEL <= columns_->count) {
      const int32_t start = static_cast<int32_t>(columns_->position(begin));
      const int32_t step = static_cast<int32_t>(columns_->position_step());
      for (int32_t j = 0; j < Tiles::PANEL; ++j) to[j] = start + j * step;
      at(panel) = {to[0], to[Tiles::PANEL - 1], true, true, false};
      return;
    }
    int64_t first = UNLIMITED, last = NOWHERE, shown = 0;
    for (int64_t j = 0; j < Tiles::PANEL; ++j) {
      const int64_t n = begin + j;
      to[j] = NOWHERE;
      if (n >= columns_->count || !columns_->is_shown(columns_->row(n))) continue;
      const int64_t position = columns_->position(n);
      to[j] = static_cast<int32_t>(position);
      first = smaller(first, position);
      last = larger(last, position);
      ++shown;
    }
    at(panel) = {static_cast<int32_t>(first), static_cast<int32_t>(last), shown > 0, shown == Tiles::PANEL, false};
  }

  void addresses(int64_t panel, const Source& source, const Element** rows) const {
    const int32_t* position = positions(panel);
    const Element* base = static_cast<const Element*>(source.rows);
    if (columns_->is_plain() && at(panel).all) {
      base += columns_->row(panel * Tiles::PANEL) * source.stride;
      for (int64_t j = 0; j < Tiles::PANEL; ++j) rows[j] = base + j * (columns_->step * source.stride);
      return;
    }
    for (int64_t j = 0; j < Tiles::PANEL; ++j) {
      const int64_t n = panel * Tiles::PANEL + j;
      rows[j] = position[j] == NOWHERE ? nullptr : base + columns_->row(n) * source.stride;
    }
  }

  // Rows lie far apart, where the hardware does not foresee them; panels are mostly packed in order. Inlined, or the
  // compiler takes it for a function without effect.
  __attribute__((always_inline)) void prefetch(int64_t panel) const {
    const int64_t end = smaller((panel + 1) * Tiles::PANEL, columns_->count), bytes = width_ * sizeof(Element);
    for (int64_t s = 0; s < num_sources_; ++s) {
      bool again = false;
      for (int64_t earlier = 0; earlier < s; ++earlier) again |= sources_[earlier].rows == sources_[s].rows;
      if (again) continue;
      const Element* base = static_cast<const Element*>(sources_[s].rows);
      for (int64_t n = panel * Tiles::PANEL; n < end; ++n) {
        const char* row = reinterpret_cast<const char*>(base + columns_->row(n) * sources_[s].stride);
        for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(row + x, 0, 2);
      }
    }
  }

  void gather_statistics(int64_t panel) {
    const int32_t* position = positions(panel);
    float* lse = statistics_ + (panel - range_.begin) * Tiles::PANEL * 2;
    float* delta = lse + Tiles::PANEL;
    for (int64_t j = 0; j < Tiles::PANEL; ++j) {
      const bool shown = position[j] != NOWHERE;
      const int64_t at = shown ? columns_->row(panel * Tiles::PANEL + j) * columns_->lse_stride : 0;
      lse[j] = shown ? columns_->lse[at] * LOG2_E : INFINITE;
      delta[j] = shown ? columns_->delta[at] : 0.0f;
    }
  }

  int64_t width_, padded_, num_sources_;
  const Tokens* columns_ = nullptr;
  const Source* sources_ = nullptr;
  Range range_;
  Packed* storage_;
  int32_t* positions_;
  float* statistics_;
  Panel* panels_;
};

}  // namespace longspan::LONGSPAN_SET
