// How a chunk of rows meets all columns that it sees: segment by segment, block by block, tile by tile.
//
// A segment of columns is packed once for all blocks of the chunk. A tile is a list of panels, wherever they are and
// whatever lies between them, that one block meets at once; its scores stay in the first-level cache.
// Segments start at fixed places, so that a row's result depends neither on its batch nor on the number of threads.
#pragma once
#include "panels.h"
#include "tiles.h"

namespace longspan::LONGSPAN_SET {

template <class Tiles, int64_t MOST_PANELS>
struct Tile {
  static constexpr int64_t CAPACITY = MOST_PANELS;
  static constexpr int64_t STRIDE = CAPACITY * Tiles::PANEL;  // of scores and weights, in numbers

  int64_t count = 0;
  const typename Tiles::Packed* panels[MAX_SOURCES][CAPACITY];
  const float* statistics[CAPACITY];
  const int32_t* positions[CAPACITY];
  bool is_seen_whole[CAPACITY];                  // by every row
  int64_t start[CAPACITY];                       // the position of the first column, after which they rise by 1; or -1
  int64_t view[CAPACITY];
  const Reach<Tiles::ROWS>* reach[CAPACITY];

  int64_t columns() const { return count * Tiles::PANEL; }

  void add(Segment<Tiles>& segment, int64_t panel, int64_t num_sources, int64_t of_view, const Reach<Tiles::ROWS>& rows) {
    segment.pack(panel);
    for (int64_t s = 0; s < num_sources; ++s) panels[s][count] = segment.packed(panel, s);
    statistics[count] = segment.statistics(panel);
    positions[count] = segment.positions(panel);
    is_seen_whole[count] = segment.is_seen_whole(panel, rows);
    start[count] = segment.columns().position_is_number() ? panel * Tiles::PANEL : -1;
    view[count] = of_view;
    reach[count] = &rows;
    ++count;
  }

  // Sets the scores of columns that a row does not see to -infinity.
  void hide_unseen(float* scores) const {
    for (int64_t p = 0; p < count; ++p) {
      if (is_seen_whole[p]) continue;
      for (int64_t r = 0; r < Tiles::ROWS; ++r) {
        float* row = scores + r * STRIDE + p * Tiles::PANEL;
        for (int64_t x = 0; x < Tiles::PANEL; x += LANES) {
          const Integers position = load_as<Integers>(positions[p] + x);
          store(row + x, hide_outside(load(row + x), position, reach[p]->first[r], reach[p]->last[r]));
        }
      }
    }
  }
};

// A block meets the columns of two views: the band and the extra keys. Where there is only one, the other has no columns.
constexpr int64_t VIEWS = 2;

// Panels of a segment: as many as fit in a share of the second-level cache, and no more than there are.
template <class Tiles>
int64_t segment_panels(int64_t width, int64_t num_sources, int64_t most_columns) {
  constexpr int64_t BYTES = (Tiles::ROWS == 32 ? 1280 : 480) << 10, FEWEST = 16;  // CPUs with tiles have more of it
  const int64_t panel = num_sources * Tiles::PANEL * round_up(width, Tiles::WIDTH_STEP) *
                        static_cast<int64_t>(sizeof(typename Tiles::Packed));
  return larger(1, smaller(larger(BYTES / panel, FEWEST), divide_up(most_columns, Tiles::PANEL)));
}

// Work is what is done with the tiles. It has SOURCES (matrices of the columns to pack) and TILE_PANELS, and for the
// block of rows from `begin` on, whose sums are kept in `slot`:
//   reset(slot)                  before its first tile
//   load(begin, count)           before its tiles of a segment
//   meet(slot, tile)             its next tile
//   finish(slot, begin, count)   after its last tile
template <class Tiles, class Work>
class Sweep {
 public:
  // most_columns: of any lane, for each view.
  Sweep(Arena& arena, int64_t width, const int64_t (&most_columns)[VIEWS])
      : capacities_{segment_panels<Tiles>(width, Work::SOURCES, most_columns[0]),
                    segment_panels<Tiles>(width, Work::SOURCES, most_columns[1])},
        segments_{{arena, capacities_[0], Work::SOURCES, width}, {arena, capacities_[1], Work::SOURCES, width}} {}

  // Rows `begin` to `end` of the views, which share them. The last segment of the first view and the first one of the
  // second are met together.
  void run(Work& work, const View (&views)[VIEWS], const Source* sources, int64_t begin, int64_t end) {
    int64_t num_segments[VIEWS], starts[VIEWS], rounds = 1;
    Range seen[VIEWS];
    for (int64_t v = 0; v < VIEWS; ++v) {
      seen[v] = panels_seen(views[v], begin, end);
      num_segments[v] = divide_up(seen[v].end, capacities_[v]) - seen[v].begin / capacities_[v];
      starts[v] = v == 0 ? 0 : starts[v - 1] + larger(num_segments[v - 1] - 1, 0);
      rounds = larger(rounds, starts[v] + num_segments[v]);
    }
    for (int64_t round = 0; round < rounds; ++round) {
      bool open[VIEWS];
      for (int64_t v = 0; v < VIEWS; ++v) {
        open[v] = round >= starts[v] && round < starts[v] + num_segments[v];
        if (!open[v]) continue;
        const int64_t segment = seen[v].begin / capacities_[v] + round - starts[v];
        segments_[v].open(views[v].columns, sources, {larger(seen[v].begin, segment * capacities_[v]),
                                                      smaller(seen[v].end, (segment + 1) * capacities_[v])});
      }
      for (int64_t row = begin; row < end; row += Tiles::ROWS) {
        const int64_t slot = rounds == 1 ? 0 : (row - begin) / Tiles::ROWS;
        const int64_t count = smaller(Tiles::ROWS, end - row);
        if (round == 0) work.reset(slot);
        meet_segments(work, slot, views, open, row, count);
        if (round == rounds - 1) work.finish(slot, row, count);
      }
    }
  }

 private:
  using Block = Reach<Tiles::ROWS>;

  static Range panels_seen(const View& view, int64_t begin, int64_t end) {
    int64_t first = UNLIMITED, last = -UNLIMITED;
    if (view.columns.count == 0) return {0, 0};
    if (view.rows.is_plain()) {
      first = view.rows.position(begin) - view.before;
      last = view.rows.position(end - 1) + view.after;
      return panels_within(view.columns, Tiles::PANEL, first, last);
    }
    for (int64_t row = begin; row < end; row += Tiles::ROWS) {
      const Block reach(view, row, smaller(Tiles::ROWS, end - row));
      first = smaller(first, reach.lowest_first);
      last = larger(last, reach.highest_last);
    }
    return panels_within(view.columns, Tiles::PANEL, first, last);
  }

  void meet_segments(Work& work, int64_t slot, const View (&views)[VIEWS], const bool (&open)[VIEWS], int64_t begin,
                     int64_t count) {
    const Block reaches[VIEWS] = {{views[0], begin, open[0] ? count : 0}, {views[1], begin, open[1] ? count : 0}};
    Tile<Tiles, Work::TILE_PANELS> tile;
    bool loaded = false;
    const auto meet = [&] {
      if (!loaded) work.load(begin, count);
      loaded = true;
      work.meet(slot, tile);
      tile.count = 0;
    };
    for (int64_t v = 0; v < VIEWS; ++v) {
      if (!open[v]) continue;
      Segment<Tiles>& segment = segments_[v];
      const Range near = panels_within(segment.columns(), Tiles::PANEL, reaches[v].lowest_first, reaches[v].highest_last);
      const int64_t last = smaller(near.end, segment.range().end);
      for (int64_t panel = larger(near.begin, segment.range().begin); panel < last; ++panel) {
        if (!segment.is_seen(panel, reaches[v])) continue;
        tile.add(segment, panel, Work::SOURCES, v, reaches[v]);
        if (tile.count == Work::TILE_PANELS) meet();
      }
    }
    if (tile.count > 0) meet();
  }

  int64_t capacities_[VIEWS];
  Segment<Tiles> segments_[VIEWS];
};

}  // namespace longspan::LONGSPAN_SET
