// Linear layers on AMX tiles. The interface is told in longspan_linear.h.
//
// A stage multiplies a block of rows, whose tiles stay in the second-level cache, with panels of the weight that stream
// by, in squares of 32 x 32 sums. Tile products leave the vector units free: in their shadow the square before is
// finished and stored, and rows of the next stage are packed. Long rows take several stages, whose sums are added up in
// memory.
#pragma once
#include <omp.h>

#include "dispatch.h"
#include "linear_finish.h"
#include "linear_tiles_amx.h"
#include "rows.h"

namespace longspan::LONGSPAN_SET {

constexpr int64_t STAGE_STEPS = 32;          // 1,024 numbers of each row, or 2,048 bytes
constexpr int64_t STAGE_BYTES = 512 * 1024;  // of the packed rows, two of which share the second-level cache
constexpr int64_t LAYER_ROWS = 1024;         // go all the way through a layer: they share what is read of the weights
constexpr int64_t SHARED_PANELS = 8;         // the fewest of a task, where rows alone do not give all threads work

// Rows of x on their way into slices, [32 rows][step], a piece at a time.
template <class Format, class T>
struct Packer {
  static constexpr int64_t STEP = Format::STEP;
  static constexpr int64_t PIECE = 4;   // steps
  static constexpr int64_t AHEAD = 16;  // pieces on their way from memory

  const T* x = nullptr;
  int64_t stride = 0, rows = 0, width = 0;
  uint8_t* to = nullptr;
  int64_t row = 0, step = 0, fetched_row = 0, fetched_step = 0;

  int64_t steps() const { return divide_up(width, STEP); }
  int64_t padded_rows() const { return round_up(rows, TILE_ROWS); }
  int64_t pieces() const { return padded_rows() * divide_up(steps(), PIECE); }

  void start_fetching() {
    for (int64_t i = 0; i < AHEAD; ++i) fetch();
  }

  __attribute__((noinline)) void pack_piece() {
    fetch();
    uint8_t* slice = to + (row / SQUARE * steps() + step) * Format::SLICE_BYTES + row % SQUARE * TILE_ROW_BYTES;
    const int64_t end = smaller(step + PIECE, steps());
    for (; step < end; ++step, slice += Format::SLICE_BYTES) {
      if (row < rows) {
        Format::pack_row(x + row * stride + step * STEP, width - step * STEP, slice);
      } else {
        UNROLL for (int64_t term = 0; term < Format::TERMS; ++term) clear_row(slice + term * 2 * TILE_BYTES);
      }
    }
    if (end == steps()) {
      step = 0;
      ++row;
    }
  }

  void pack(int64_t most_pieces) {
    for (int64_t i = 0; i < most_pieces && row < padded_rows(); ++i) pack_piece();
  }

 private:
  void fetch() {
    if (fetched_row >= rows) return;
    const int64_t begin = fetched_step * STEP, end = smaller(begin + PIECE * STEP, width);
    const T* numbers = x + fetched_row * stride;
    for (int64_t i = begin; i < end; i += CACHE_LINE / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(numbers + i);
    fetched_step += PIECE;
    if (fetched_step >= steps()) {
      fetched_step = 0;
      ++fetched_row;
    }
  }
};

// What the vector units do while tiles are multiplied.
template <class Format, class T>
struct Shadow {
  Finisher<Format> finisher;  // of the square before
  Packer<Format, T> packer;  // of the next stage
  int64_t pieces = 0;       // to pack beside each square
  const uint8_t* weight = nullptr;  // to fetch
  int64_t lines = 0;                // in each step
};

template <class Format>
struct Linear {
  static constexpr int64_t STEP = Format::STEP;
  static constexpr int64_t SLICE = Format::SLICE_BYTES;

  static int64_t packed_bytes(int64_t in_features, int64_t out_features) {
    return divide_up(out_features, SQUARE) * divide_up(in_features, STEP) * SLICE;
  }

  // Layout: [STAGE_STEPS][panel of 32 rows][step], slices, their tiles transposed in pairs of numbers.
  template <class T>
  static void pack(const T* weight, int64_t stride, int64_t in_features, int64_t out_features, uint8_t* packed) {
    const int64_t steps = divide_up(in_features, STEP), panels = divide_up(out_features, SQUARE);
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t first = step / STAGE_STEPS * STAGE_STEPS, in_stage = smaller(STAGE_STEPS, steps - first);
        pack_slice(weight + panel * SQUARE * stride + step * STEP, stride, out_features - panel * SQUARE,
                   in_features - step * STEP, packed + (first * panels + panel * in_stage + step - first) * SLICE);
      }
    }
  }

  template <class T>
  static int run(const longspan_linear& call) {
    const Plan plan(call);
    int64_t next_task = 0;
#pragma omp parallel num_threads(static_cast<int>(smaller(threads_to_take(), plan.num_tasks)))
    {
      uint8_t* memory = static_cast<uint8_t*>(thread_workspace(plan.workspace_bytes()));
      if (memory) {  // the tasks of a thread without memory are done by the others
        AmxTiles::begin();
        work<T>(call, plan, memory, next_task);
        AmxTiles::end();
      }
    }
    return next_task >= plan.num_tasks ? LONGSPAN_OK : LONGSPAN_NO_MEMORY;
  }

 private:
  struct Stage {
    int64_t task;
    int64_t first_step = 0;
  };

  struct Plan : Shares {
    int64_t steps;

    explicit Plan(const longspan_linear& call) : Plan(call, divide_up(call.in_features, STEP)) {}
    Plan(const longspan_linear& call, int64_t steps)
        : Shares(call, most_rows(smaller(steps, STAGE_STEPS)), SQUARE, SHARED_PANELS), steps(steps) {}

    static int64_t most_rows(int64_t steps) { return larger(SQUARE, STAGE_BYTES / (steps * SLICE) * SQUARE); }

    int64_t stage_steps() const { return smaller(steps, STAGE_STEPS); }
    int64_t stage_bytes() const { return block_rows / SQUARE * stage_steps() * SLICE; }
    int64_t earlier_bytes() const { return steps > STAGE_STEPS ? block_rows * part_panels * SQUARE * 4 : 0; }
    int64_t workspace_bytes() const { return 2 * stage_bytes() + SQUARE * SQUARE * 4 + earlier_bytes(); }
    int64_t steps_of(const Stage& stage) const { return smaller(STAGE_STEPS, steps - stage.first_step); }
  };

  template <class T>
  ALWAYS_INLINE void pack_slice(const T* weight, int64_t stride, int64_t rows, int64_t width, uint8_t* slice) {
    alignas(ALIGNMENT) uint8_t straight[SLICE];
    for (int64_t row = 0; row < SQUARE; ++row) {
      uint8_t* to = straight + row * TILE_ROW_BYTES;
      if (row < rows) {
        Format::pack_row(weight + row * stride, width, to);
      } else {
        for (int64_t term = 0; term < Format::TERMS; ++term) clear_row(to + term * 2 * TILE_BYTES);
      }
    }
    for (int64_t tile = 0; tile < Format::TERMS * 2; ++tile) {
      Words pairs[LANES];
      UNROLL for (int64_t i = 0; i < LANES; ++i) {
        pairs[i] = load_as<Words>(straight + tile * TILE_BYTES + i * TILE_ROW_BYTES);
      }
      transpose(pairs);
      UNROLL for (int64_t i = 0; i < LANES; ++i) {
        memcpy(slice + tile * TILE_BYTES + i * TILE_ROW_BYTES, &pairs[i], sizeof pairs[i]);
      }
    }
  }

  template <class T>
  ALWAYS_INLINE Packer<Format, T> packer_of(const longspan_linear& call, const Plan& plan, const Stage& stage,
                                           uint8_t* to) {
    Packer<Format, T> packer;
    if (stage.task >= plan.num_tasks) return packer;
    const int64_t row = plan.first_row(stage.task), column = stage.first_step * STEP;
    packer.x = static_cast<const T*>(call.in) + row * call.in_stride + column;
    packer.stride = call.in_stride;
    packer.rows = smaller(plan.block_rows, call.rows - row);
    packer.width = smaller(STAGE_STEPS * STEP, call.in_features - column);
    packer.to = to;
    packer.start_fetching();
    return packer;
  }

  template <class T>
  static void work(const longspan_linear& call, const Plan& plan, uint8_t* memory, int64_t& next_task) {
    const auto take_task = [&] { return Stage{__atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)}; };
    uint8_t* packed = memory;
    uint8_t* packed_next = memory + plan.stage_bytes();
    float* sums = reinterpret_cast<float*>(packed_next + plan.stage_bytes());
    Shadow<Format, T> shadow{Finisher<Format>{call, sums, plan.streams}, {}};
    Stage stage = take_task();
    packer_of<T>(call, plan, stage, packed).pack(INT64_MAX);
    while (stage.task < plan.num_tasks) {
      const int64_t next_step = stage.first_step + STAGE_STEPS;
      const Stage next = next_step < plan.steps ? Stage{stage.task, next_step} : take_task();
      shadow.packer = packer_of<T>(call, plan, next, packed_next);
      run_stage(call, plan, stage, next, packed, sums + SQUARE * SQUARE, shadow);
      shadow.packer.pack(INT64_MAX);
      stage = next;
      uint8_t* free_again = packed;
      packed = packed_next;
      packed_next = free_again;
    }
    shadow.finisher.finish(SQUARE);
    _mm_sfence();  // streamed results are seen by the threads that wait for this one
  }

  template <class T>
  static void run_stage(const longspan_linear& call, const Plan& plan, const Stage& stage, const Stage& next,
                        const uint8_t* packed, float* earlier, Shadow<Format, T>& shadow) {
    const int64_t first_row = plan.first_row(stage.task), first_panel = plan.first_panel(stage.task);
    const int64_t rows = smaller(plan.block_rows, call.rows - first_row);
    const int64_t panels = smaller(plan.part_panels, plan.panels - first_panel);
    const int64_t steps = plan.steps_of(stage), groups = divide_up(rows, SQUARE);
    const uint8_t* weight = weight_of(call, plan, stage);
    shadow.pieces = divide_up(shadow.packer.pieces(), panels * groups);
    shadow.lines = divide_up(SLICE / CACHE_LINE, groups);
    for (int64_t panel = 0; panel < panels; ++panel, weight += steps * SLICE) {
      shadow.weight = panel + 1 < panels ? weight + steps * SLICE : weight_of(call, plan, next);
      for (int64_t group = 0; group < groups; ++group, earlier += SQUARE * SQUARE) {
        const uint8_t* x = packed + group * steps * SLICE;
        const int64_t in_group = smaller(SQUARE, rows - group * SQUARE);
        if (in_group > TILE_ROWS) {
          multiply<2>(x, weight, steps, shadow);
        } else {
          multiply<1>(x, weight, steps, shadow);
        }
        Finisher<Format>& finisher = shadow.finisher;
        finisher.has_earlier = stage.first_step > 0;
        finisher.is_last = stage.first_step + STAGE_STEPS >= plan.steps;
        finisher.earlier = earlier;
        finisher.first_row = first_row + group * SQUARE;
        finisher.first_column = (first_panel + panel) * SQUARE;
        finisher.rows = in_group;
        finisher.done = 0;
      }
    }
  }

  ALWAYS_INLINE const uint8_t* weight_of(const longspan_linear& call, const Plan& plan, const Stage& stage) {
    return static_cast<const uint8_t*>(call.packed) +
           (stage.first_step * plan.panels + plan.first_panel(stage.task) * plan.steps_of(stage)) * SLICE;
  }

  template <int ROW_TILES, class T>
  NO_INLINE void multiply(const uint8_t* x, const uint8_t* weight, int64_t steps, Shadow<Format, T>& shadow) {
    using Sums = Products<Format, ROW_TILES>;
    const int64_t rows_per_step = divide_up(shadow.finisher.rows, steps);
    const int64_t pieces_per_step = divide_up(shadow.pieces, steps);
    int64_t pieces = shadow.pieces;
    asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
    Sums::clear();
    for (int64_t step = 0; step < steps; ++step, x += SLICE, weight += SLICE) {
      Sums::add(x, weight);
      for (int64_t i = 0; i < shadow.lines; ++i, shadow.weight += CACHE_LINE) _mm_prefetch(shadow.weight, _MM_HINT_T1);
      shadow.finisher.finish(rows_per_step);
      if (pieces > 0) shadow.packer.pack(pieces_per_step);
      pieces -= pieces_per_step;
    }
    asm volatile("" ::: "memory");
    Sums::store_sums(const_cast<float*>(shadow.finisher.sums));
    asm volatile("" ::: "memory");
  }
};

}  // namespace longspan::LONGSPAN_SET
