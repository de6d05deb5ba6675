// Linear layers on vectors. The interface is told in longspan_linear.h.
//
// A block of rows, copied to where it stays in a cache, meets the panels of the weight one after the other. Long rows of
// fp32 numbers take several stages, each with sums of its own: one sum over all of a row would be less exact. A stage of a
// panel serves all rows of the block, out of the second-level cache, before the next one comes.
#pragma once
#include <omp.h>

#include <type_traits>

#include "dispatch.h"
#include "linear_finish.h"
#include "tiles.h"

namespace longspan::LONGSPAN_SET {

#if LONGSPAN_AVX512
constexpr int64_t TASK_BYTES = 512 * 1024;  // of rows
#else
constexpr int64_t TASK_BYTES = 2048 * 1024;  // of rows: where the second level is small, they are better in the third
#endif
constexpr int64_t SHARED_PANELS = 4;        // the fewest of a task, where rows alone do not give all threads work
constexpr int64_t LAYER_ROWS = 128;         // go all the way through a layer: what they become stays in the cache

template <class TilesOfType>
struct FloatingPoint {
  using Tiles = TilesOfType;
  static constexpr bool IS_INT8 = false, HAS_OFFSETS = false;

  ALWAYS_INLINE Vector sums(const float* from, const int32_t*) { return load(from); }
};

// fp32 numbers are multiplied as they are where two or three terms are asked for, or where bf16 has no products.
#if defined(__AVX512BF16__)
template <int NUM_TERMS>
using Terms = FloatingPoint<std::conditional_t<NUM_TERMS == 1, Bfloat16Tiles, Float32Tiles>>;
#else
template <int>
using Terms = FloatingPoint<Float32Tiles>;
#endif

#if defined(__AVX512VNNI__)
// Four numbers of 8 bits fill a word: unsigned ones of x by signed ones of the weight. Those of x come as byte + 128,
// which adds 128 times the sum of the weight's row to every sum: the offsets take it away.
struct Int8InWords {
  using Element = uint8_t;
  using Packed = uint8_t;
  static constexpr int64_t PER_WORD = 4;

  ALWAYS_INLINE Words words(const uint8_t* from) { return load_as<Words>(from); }
  ALWAYS_INLINE Vector multiply_add(Words x, Words weight, Vector sums) {
    return (Vector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weight);
  }
};
constexpr bool HAS_INT8_OFFSETS = true;
#else
// Two numbers fill a word, widened to 16 bits: products of bytes that are added in 16 bits would overflow.
struct Int8InWords {
  using Element = int16_t;
  using Packed = int16_t;
  static constexpr int64_t PER_WORD = 2;

  ALWAYS_INLINE Words words(const int16_t* from) { return load_as<Words>(from); }
  ALWAYS_INLINE Vector multiply_add(Words x, Words weight, Vector sums) {
#if LONGSPAN_AVX512
    return (Vector)_mm512_add_epi32((__m512i)sums, _mm512_madd_epi16((__m512i)x, (__m512i)weight));
#else
    // GCC would add into the product and move that to the sums, which costs a tenth of the speed.
    const __m256i product = _mm256_madd_epi16((__m256i)x, (__m256i)weight);
    asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(product));
    return sums;
#endif
  }
};
constexpr bool HAS_INT8_OFFSETS = false;

ALWAYS_INLINE int16_t widened(int8_t weight) { return weight; }
ALWAYS_INLINE int16_t widened(uint8_t x) { return static_cast<int16_t>(x - 128); }
#endif

struct Int8 {
  using Tiles = VectorTiles<Int8InWords>;
  static constexpr bool IS_INT8 = true, HAS_OFFSETS = HAS_INT8_OFFSETS;

  ALWAYS_INLINE Vector sums(const float* from, const int32_t* offsets) {
    Integers sums = load_as<Integers>(from);
    if constexpr (HAS_OFFSETS) sums += load_as<Integers>(offsets);
    return __builtin_convertvector(sums, Vector);
  }
};

template <class Format>
struct Linear {
  using Tiles = typename Format::Tiles;
  using Packed = typename Tiles::Packed;

  static int64_t packed_bytes(int64_t in_features, int64_t out_features) {
    return divide_up(out_features, SQUARE) * panel_bytes(in_features);
  }

  // Layout: [panel of 32 rows], each as the tiles have it, with its offsets behind.
  template <class T>
  static void pack(const T* weight, int64_t stride, int64_t in_features, int64_t out_features, uint8_t* packed) {
    const int64_t panels = divide_up(out_features, SQUARE);
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * SQUARE;
      pack_panel(weight + first * stride, stride, smaller(SQUARE, out_features - first), in_features,
                 packed + panel * panel_bytes(in_features));
    }
  }

  template <class T>
  static int run(const longspan_linear& call) {
    const Plan plan(call);
    int64_t next_task = 0;
#pragma omp parallel num_threads(static_cast<int>(smaller(threads_to_take(), plan.num_tasks)))
    {
      uint8_t* memory = static_cast<uint8_t*>(thread_workspace(plan.workspace_bytes()));
      int64_t task;
      while (memory && (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < plan.num_tasks) {
        run_task<T>(call, plan, task, memory);
      }
      _mm_sfence();  // streamed results are seen by the threads that wait for this one
    }
    return next_task >= plan.num_tasks ? LONGSPAN_OK : LONGSPAN_NO_MEMORY;
  }

 private:
  static constexpr int64_t STEP = Tiles::WIDTH_STEP;
  static constexpr int64_t NUMBER = sizeof(Packed);
  static constexpr int64_t STAGE = NUMBER == sizeof(float) ? 528 : UNLIMITED;  // numbers
  static constexpr int64_t HALVES = SQUARE / Tiles::PANEL;  // panels of the tiles in one of ours

  static int64_t panel_bytes(int64_t in_features) {
    return SQUARE * (round_up(in_features, STEP) * NUMBER + (Format::HAS_OFFSETS ? sizeof(int32_t) : 0));
  }

  struct Plan : Shares {
    int64_t width;

    explicit Plan(const longspan_linear& call) : Plan(call, round_up(call.in_features, STEP)) {}
    Plan(const longspan_linear& call, int64_t width)
        : Shares(call, round_up(TASK_BYTES / (width * NUMBER), Tiles::ROWS) + Tiles::ROWS, Tiles::ROWS, SHARED_PANELS),
          width(width) {}

    int64_t workspace_bytes() const { return block_rows * (width * NUMBER + SQUARE * 4) + Tiles::ROWS * SQUARE * 4; }
  };

  template <class T>
  static void pack_panel(const T* weight, int64_t stride, int64_t rows, int64_t in_features, uint8_t* to) {
    const int64_t width = round_up(in_features, STEP);
    Packed* words = reinterpret_cast<Packed*>(to);
    int32_t* offsets = reinterpret_cast<int32_t*>(to + SQUARE * width * NUMBER);
    if constexpr (Format::HAS_OFFSETS) memset(offsets, 0, SQUARE * sizeof(int32_t));
    for (int64_t row = 0; row < SQUARE; row += Tiles::PANEL) {
      for (int64_t x = 0; x < width; x += STEP, words += Tiles::PANEL * STEP) {
        alignas(ALIGNMENT) Packed straight[Tiles::PANEL][STEP];
        const Packed* addresses[Tiles::PANEL];
        for (int64_t i = 0; i < Tiles::PANEL; ++i) {
          addresses[i] = straight[i];
          const int64_t count = row + i < rows ? smaller(STEP, in_features - x) : 0;
          copy_numbers(weight + (row + i) * stride + x, count, STEP, straight[i]);
          if constexpr (Format::HAS_OFFSETS) {
            for (const uint8_t byte : straight[i]) offsets[row + i] -= 128 * static_cast<int8_t>(byte);
          }
        }
        Tiles::pack_transposed(addresses, STEP, STEP, words);
      }
    }
  }

  // The first `count` numbers, as they are packed, and zeros up to `padded`.
  template <class T>
  ALWAYS_INLINE void copy_numbers(const T* from, int64_t count, int64_t padded, Packed* to) {
    if constexpr (sizeof(T) == sizeof(Packed)) {
      memcpy(to, from, count * NUMBER);
      memset(to + count, 0, (padded - count) * NUMBER);
    } else if constexpr (Format::IS_INT8) {
      for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
      memset(to + count, 0, (padded - count) * NUMBER);
    } else {
      for (int64_t i = 0; i < padded; i += LANES) store(to + i, load_up_to(from + i, count - i));
    }
  }

  // Layout: [group of 16 rows][stage][16 rows][numbers of the stage]
  template <class T>
  static void pack_rows(const longspan_linear& call, const Plan& plan, int64_t first_row, int64_t rows, Packed* to) {
    const T* x = static_cast<const T*>(call.in) + first_row * call.in_stride;
    for (int64_t group = 0; group < rows; group += Tiles::ROWS) {
      for (int64_t first = 0; first < plan.width; first += STAGE) {
        const int64_t numbers = smaller(STAGE, plan.width - first), count = smaller(numbers, call.in_features - first);
        for (int64_t row = group; row < group + Tiles::ROWS; ++row, to += numbers) {
          copy_numbers(x + row * call.in_stride + first, row < rows ? count : 0, numbers, to);
        }
      }
    }
  }

  template <class T>
  static void run_task(const longspan_linear& call, const Plan& plan, int64_t task, uint8_t* memory) {
    const int64_t first_row = plan.first_row(task), first_panel = plan.first_panel(task);
    const int64_t rows = smaller(plan.block_rows, call.rows - first_row);
    const int64_t last_panel = smaller(first_panel + plan.part_panels, plan.panels);
    Packed* block = reinterpret_cast<Packed*>(memory);
    float* sums = reinterpret_cast<float*>(memory + plan.block_rows * plan.width * NUMBER);
    float* of_stage = sums + plan.block_rows * SQUARE;
    pack_rows<T>(call, plan, first_row, rows, block);
    Finisher<Format> finisher{call, sums, plan.streams};
    finisher.is_last = true;
    const int64_t turns = divide_up(rows, Tiles::ROWS) * divide_up(plan.width, STAGE);
    const int64_t share = rows > Tiles::ROWS ? panel_bytes(call.in_features) / turns : 0;  // of the next panel, to fetch
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const uint8_t* weight = static_cast<const uint8_t*>(call.packed) + panel * panel_bytes(call.in_features);
      finisher.offsets = reinterpret_cast<const int32_t*>(weight + SQUARE * plan.width * NUMBER);
      finisher.first_column = panel * SQUARE;
      const uint8_t* next = weight + panel_bytes(call.in_features);
      for (int64_t first = 0; first < plan.width; first += STAGE) {
        for (int64_t row = 0; row < rows; row += Tiles::ROWS) {
          for (int64_t i = 0; i < share; i += CACHE_LINE, next += CACHE_LINE) _mm_prefetch(next, _MM_HINT_T1);
          multiply(block + row * plan.width, reinterpret_cast<const Packed*>(weight), plan.width, first,
                   sums + row * SQUARE, of_stage);
          if (first + STAGE < plan.width) continue;
          finisher.sums = sums + row * SQUARE;
          finisher.first_row = first_row + row;
          finisher.rows = smaller(Tiles::ROWS, rows - row);
          finisher.done = 0;
          finisher.finish(Tiles::ROWS);
        }
      }
    }
  }

  // Adds what a stage, whose numbers begin at `first`, gives to the sums of a group of rows and a panel.
  static void multiply(const Packed* group, const Packed* panel, int64_t width, int64_t first, float* sums,
                       float* of_stage) {
    const Packed* halves[HALVES];
    for (int64_t i = 0; i < HALVES; ++i) halves[i] = panel + (i * width + first) * Tiles::PANEL;
    Tiles::scores(group + first * Tiles::ROWS, smaller(STAGE, width - first), halves, HALVES, first ? of_stage : sums,
                  SQUARE);
    for (int64_t i = 0; i < Tiles::ROWS * SQUARE && first; i += LANES) {
      store(sums + i, load(sums + i) + load(of_stage + i));
    }
  }
};

}  // namespace longspan::LONGSPAN_SET
