// Tiles: the two matrix products that attention is made of, for one block of rows against a list of packed panels.
//
// The interface (a struct with static members; attention_*.h are templates over it; one struct per element type and instruction set):
//
//   using Element;                    // in the caller's memory: float or bfloat16
//   using Packed;                     // in blocks and panels: float or bfloat16 (float where the CPU has no bf16 dot product)
//   static constexpr int64_t ROWS;        // rows of a block (16 or 32)
//   static constexpr int64_t PANEL;       // rows of a panel (keys, or queries in the backward pass) (16 or 32)
//   static constexpr int64_t WIDTH_STEP;  // widths are padded with zeros to a multiple of this (a multiple of 16)
//
//   static void begin(); static void end();   // once per thread around all work (AMX: load and release the tile configuration)
//
// Packing. `rows` holds the addresses of rows of `width` elements, unaligned; null stands for a row of zeros. `padded` is
// `width` rounded up to WIDTH_STEP; the numbers from `width` on are packed as zeros. Results are 64-byte aligned.
//   static void pack_block(const Element* const* rows, int64_t width, int64_t padded, Packed* block);
//       block[ROWS][padded], plain row-major                                              (the left operand of `scores`)
//   static void pack_transposed(const Element* const* rows, int64_t width, int64_t padded, Packed* panel);
//       PANEL rows so that `scores` can contract over the width; PANEL * padded numbers, layout private to the struct
//   static void pack_straight(const Element* const* rows, int64_t width, int64_t padded, Packed* panel);
//       PANEL rows so that `accumulate` can contract over the rows; PANEL * padded numbers, layout private to the struct
//
// Products. `panels` holds addresses of panels, anywhere in memory, `count` >= 1 of them. Everything is 64-byte aligned;
// strides count numbers and are multiples of 32.
//   static void scores(const Packed* block, int64_t padded, const Packed* const* panels, int64_t count,
//                      float* out, int64_t out_stride);
//       out[row][p * PANEL + j] = sum_x block[row][x] * panels[p] row j [x]               (panels packed by pack_transposed)
//   static void accumulate(const Packed* weights, int64_t weights_stride, const Packed* const* panels, int64_t count,
//                          int64_t padded, const float* alpha, float* out);
//       out[row][x] = alpha[row] * out[row][x] + sum_p sum_j weights[row][p * PANEL + j] * panels[p] row j [x]
//       (panels packed by pack_straight; out[ROWS][padded] is float; alpha null: 1;
//       weights[ROWS][weights_stride] row-major as `scores` writes them, converted to Packed)
//   static constexpr bool SCATTERS;  // whether there is
//   static void scatter(const Packed* weights, int64_t weights_stride, const Packed* panel, int64_t padded,
//                       float* const* outs, int64_t count);
//       outs[p][j][x] += sum_r weights[r][p * PANEL + j] * panel row r [x]               (panel packed by pack_straight,
//       outs[p][PANEL][padded]; weights as words[ROWS / PER_WORD][weights_stride], see below; ROWS is PANEL)
//
// Words. The vector structs below know only 32-bit words: one float, or two adjacent bf16 numbers of a row, so that one
// source serves both. A transposed panel is words[padded / PER_WORD][PANEL], a straight one words[PANEL / PER_WORD][padded],
// where a bf16 word of a straight panel, and of the weights of `scatter`, pairs the same column of two rows.
#pragma once
#include <type_traits>

#include "simd.h"
#if defined(__AMX_BF16__)
#include "tiles_amx.h"
#endif

namespace longspan::LONGSPAN_SET {

struct Float32 {
  using Element = float;
  using Packed = float;
  static constexpr int64_t PER_WORD = 1;

  ALWAYS_INLINE Words words(const float* from) { return load_as<Words>(from); }
  ALWAYS_INLINE Vector multiply_add(Words a, Words b, Vector c) {
    return LONGSPAN_SET::multiply_add((Vector)a, (Vector)b, c);
  }
};

struct Bfloat16Widened : Float32 {
  using Element = bfloat16;

  ALWAYS_INLINE Words words(const bfloat16* from) { return (Words)load(from); }
};

#if defined(__AVX512BF16__)
struct Bfloat16Pairs {
  using Element = bfloat16;
  using Packed = bfloat16;
  static constexpr int64_t PER_WORD = 2;

  ALWAYS_INLINE Words words(const bfloat16* from) { return load_as<Words>(from); }
  ALWAYS_INLINE Vector multiply_add(Words a, Words b, Vector c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Format>
struct VectorTiles {
  using Element = typename Format::Element;
  using Packed = typename Format::Packed;
  static constexpr int64_t PER_WORD = Format::PER_WORD;
  static constexpr int64_t ROWS = 16;
  static constexpr int64_t PANEL = 16;
  static constexpr int64_t WIDTH_STEP = LANES * PER_WORD;
  static constexpr bool SCATTERS = true;

  static void begin() {}
  static void end() {}

  static void pack_block(const Element* const* rows, int64_t width, int64_t padded, Packed* block) {
    pack_rows(ROWS, rows, width, padded, block);
  }

  NO_INLINE void pack_transposed(const Element* const* rows, int64_t width, int64_t padded, Packed* panel) {
    for (int64_t x = 0; x < padded; x += WIDTH_STEP) {
      for (int64_t first = 0; first < PANEL; first += LANES) {
        Words square[LANES];
        UNROLL for (int64_t i = 0; i < LANES; ++i) square[i] = words_of(rows[first + i], x, width);
        transpose(square);
        UNROLL for (int64_t i = 0; i < LANES; ++i) {
          memcpy(panel + x * PANEL + (i * PANEL + first) * PER_WORD, &square[i], sizeof square[i]);
        }
      }
    }
  }

  NO_INLINE void pack_straight(const Element* const* rows, int64_t width, int64_t padded, Packed* panel) {
    if constexpr (PER_WORD == 1) {
      pack_rows(PANEL, rows, width, padded, panel);
    } else {
      for (int64_t j = 0; j < PANEL; j += 2) {
        for (int64_t x = 0; x < padded; x += WIDTH_STEP) {
          Words pairs[] = {words_of(rows[j], x, width), words_of(rows[j + 1], x, width)};
          interleave_halves(pairs[0], pairs[1]);
          memcpy(panel + j * padded + x * 2, pairs, sizeof pairs);
        }
      }
    }
  }

  static void scores(const Packed* block, int64_t padded, const Packed* const* panels, int64_t count, float* out,
                     int64_t out_stride) {
    constexpr int64_t PER_PANEL = PANEL / LANES;
    const int64_t vectors = count * PER_PANEL;
    for (int64_t v = 0, step; v < vectors; v += step) {
      const Packed* columns[MAX_VECTORS];
      step = next_step(vectors - v);
      for (int64_t i = 0; i < step; ++i) {
        columns[i] = panels[(v + i) / PER_PANEL] + (v + i) % PER_PANEL * LANES * PER_WORD;
      }
      in_strips([&](int64_t row, auto rows) {
        float* to = out + row * out_stride + v * LANES;
        const Packed* from = block + row * padded;
        if (step == 1) score_strip<rows, 1>(from, padded, columns, to, out_stride);
        if (step == 2) score_strip<rows, 2>(from, padded, columns, to, out_stride);
        if (step == 3) score_strip<rows, MAX_VECTORS>(from, padded, columns, to, out_stride);
      });
    }
  }

  static void accumulate(const Packed* weights, int64_t weights_stride, const Packed* const* panels, int64_t count,
                         int64_t padded, const float* alpha, float* out) {
    const int64_t vectors = padded / LANES;
    for (int64_t v = 0, step; v < vectors; v += step) {
      step = next_step(vectors - v);
      in_strips([&](int64_t row, auto rows) {
        const Packed* from = weights + row * weights_stride;
        const float* factor = alpha ? alpha + row : nullptr;
        float* to = out + row * padded;
        const auto run = [&](auto strip) { strip(from, weights_stride, panels, count, padded, v * LANES, factor, to); };
        if (step == 1) run(accumulate_strip<rows, 1>);
        if (step == 2) run(accumulate_strip<rows, 2>);
        if (step == 3) run(accumulate_strip<rows, MAX_VECTORS>);
      });
    }
  }

  static void scatter(const Packed* weights, int64_t weights_stride, const Packed* panel, int64_t padded,
                      float* const* outs, int64_t count) {
    const int64_t vectors = padded / LANES;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t v = 0, step; v < vectors; v += step) {
        step = next_step(vectors - v);
        in_strips([&](int64_t row, auto rows) {
          const Packed* from = weights + (p * PANEL + row) * PER_WORD;
          const Packed* columns = panel + v * LANES * PER_WORD;
          float* to = outs[p] + row * padded + v * LANES;
          if (step == 1) scatter_strip<rows, 1>(from, weights_stride, columns, padded, to);
          if (step == 2) scatter_strip<rows, 2>(from, weights_stride, columns, padded, to);
          if (step == 3) scatter_strip<rows, MAX_VECTORS>(from, weights_stride, columns, padded, to);
        });
      }
    }
  }

 private:
  template <int64_t COUNT>
  using Rows = std::integral_constant<int64_t, COUNT>;

  // A micro-kernel holds a strip of rows times up to MAX_VECTORS vectors of sums in registers, of which AVX-512 has 32,
  // the others 16. Ten sums or more hide the four or five cycles that a product takes.
#if LONGSPAN_AVX512
  static constexpr int64_t MAX_VECTORS = 3;

  // Calls use(first row, number of rows) for the 16 rows of a block or a panel.
  template <class Use>
  ALWAYS_INLINE void in_strips(Use use) {
    use(0, Rows<8>());
    use(8, Rows<8>());
  }
#else
  static constexpr int64_t MAX_VECTORS = 2;

  template <class Use>
  ALWAYS_INLINE void in_strips(Use use) {
    use(0, Rows<6>());
    use(6, Rows<5>());
    use(11, Rows<5>());
  }
#endif

  // 4 vectors are better done as 2 + 2 than as 3 + 1.
  ALWAYS_INLINE int64_t next_step(int64_t left) { return left == 4 ? 2 : smaller(left, MAX_VECTORS); }

  ALWAYS_INLINE Words words_of(const Element* row, int64_t x, int64_t width) {
    if (!row || x >= width) return Words{};
    if (x + WIDTH_STEP <= width) return Format::words(row + x);
    Element part[WIDTH_STEP] = {};
    memcpy(part, row + x, (width - x) * sizeof(Element));
    return Format::words(part);
  }

  static void pack_rows(int64_t count, const Element* const* rows, int64_t width, int64_t padded, Packed* to) {
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t x = 0; x < padded; x += WIDTH_STEP) {
        const Words words = words_of(rows[row], x, width);
        memcpy(to + row * padded + x, &words, sizeof words);
      }
    }
  }

  ALWAYS_INLINE Words broadcast(const Packed* word) {
    uint32_t bits;
    memcpy(&bits, word, sizeof bits);
    return bits - Words{};
  }

  // Not inlined: within a larger function the compiler has been seen to keep the sums in memory.
  template <int64_t STRIP, int64_t VECTORS>
  NO_INLINE void score_strip(const Packed* block, int64_t padded, const Packed* const* columns, float* out,
                             int64_t out_stride) {
    Vector sums[STRIP][VECTORS] = {};
    const Packed* column[VECTORS];
    UNROLL for (int64_t v = 0; v < VECTORS; ++v) column[v] = columns[v];
    for (int64_t x = 0; x < padded; x += PER_WORD) {
      Words words[VECTORS];
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) words[v] = load_as<Words>(column[v] + x * PANEL);
      UNROLL for (int64_t r = 0; r < STRIP; ++r) {
        const Words factor = broadcast(block + r * padded + x);
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = Format::multiply_add(factor, words[v], sums[r][v]);
      }
    }
    UNROLL for (int64_t r = 0; r < STRIP; ++r) {
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) store(out + r * out_stride + v * LANES, sums[r][v]);
    }
  }

  template <int64_t STRIP, int64_t VECTORS>
  NO_INLINE void accumulate_strip(const Packed* weights, int64_t weights_stride, const Packed* const* panels,
                                  int64_t count, int64_t padded, int64_t x, const float* alpha, float* out) {
    Vector sums[STRIP][VECTORS];
    UNROLL for (int64_t r = 0; r < STRIP; ++r) {
      const float factor = alpha ? alpha[r] : 1;
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = factor * load(out + r * padded + x + v * LANES);
    }
    for (int64_t p = 0; p < count; ++p) {
      const Packed* panel = panels[p] + x * PER_WORD;
      const Packed* factors = weights + p * PANEL;
      for (int64_t j = 0; j < PANEL; j += PER_WORD) {
        Words words[VECTORS];
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) {
          words[v] = load_as<Words>(panel + j * padded + v * LANES * PER_WORD);
        }
        UNROLL for (int64_t r = 0; r < STRIP; ++r) {
          const Words factor = broadcast(factors + r * weights_stride + j);
          UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = Format::multiply_add(factor, words[v], sums[r][v]);
        }
      }
    }
    UNROLL for (int64_t r = 0; r < STRIP; ++r) {
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) store(out + r * padded + x + v * LANES, sums[r][v]);
    }
  }

  template <int64_t STRIP, int64_t VECTORS>
  NO_INLINE void scatter_strip(const Packed* weights, int64_t weights_stride, const Packed* panel, int64_t padded,
                               float* out) {
    static_assert(ROWS == PANEL, "a block is packed as a panel");
    Vector sums[STRIP][VECTORS];
    UNROLL for (int64_t r = 0; r < STRIP; ++r) {
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = load(out + r * padded + v * LANES);
    }
    for (int64_t j = 0; j < ROWS; j += PER_WORD) {
      Words words[VECTORS];
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) words[v] = load_as<Words>(panel + j * padded + v * LANES * PER_WORD);
      UNROLL for (int64_t r = 0; r < STRIP; ++r) {
        const Words factor = broadcast(weights + j * weights_stride + r * PER_WORD);
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = Format::multiply_add(factor, words[v], sums[r][v]);
      }
    }
    UNROLL for (int64_t r = 0; r < STRIP; ++r) {
      UNROLL for (int64_t v = 0; v < VECTORS; ++v) store(out + r * padded + v * LANES, sums[r][v]);
    }
  }
};

using Float32Tiles = VectorTiles<Float32>;
#if defined(__AMX_BF16__)
using Bfloat16Tiles = AmxTiles;
#elif defined(__AVX512BF16__)
using Bfloat16Tiles = VectorTiles<Bfloat16Pairs>;
#else
using Bfloat16Tiles = VectorTiles<Bfloat16Widened>;
#endif

}  // namespace longspan::LONGSPAN_SET
