// Tiles on AMX: bf16 in, fp32 sums, 32 x 32 results in four tile registers. The interface is told in tiles.h.
//
// A tile product takes 16 cycles, a tile load 8 from the first-level cache and 20 from the second. With 32 rows in a
// block each tile of a panel serves two products, which hides its load even where panels stream from the second level;
// with 16 rows a third of the time would go. Tile registers 0 to 3 hold results, 4 and 5 rows of the block, 6 and 7 the
// panel.
#pragma once
#include "simd.h"

namespace longspan::LONGSPAN_SET {

struct AmxTiles {
  using Element = bfloat16;
  using Packed = bfloat16;
  static constexpr int64_t ROWS = 32;
  static constexpr int64_t PANEL = 32;
  static constexpr int64_t WIDTH_STEP = 32;
  static constexpr bool SCATTERS = false;  // sums in memory would cost more than the products that it saves

  static void begin() {
    alignas(ALIGNMENT) static const Configuration configuration;
    _tile_loadconfig(&configuration);
  }
  static void end() { _tile_release(); }

  NO_INLINE void pack_block(const Element* const* rows, int64_t width, int64_t padded, Packed* block) {
    for (int64_t row = 0; row < ROWS; ++row) {
      if (rows[row] && width == padded) {
        for (int64_t x = 0; x < padded; x += STEP) memcpy(block + row * padded + x, rows[row] + x, sizeof(Words));
        continue;
      }
      for (int64_t x = 0; x < padded; x += STEP) {
        const Words numbers = words_of(rows[row], x, width);
        memcpy(block + row * padded + x, &numbers, sizeof numbers);
      }
    }
  }

  // Layout: [padded / 32][2 groups of 16 rows][16 pairs of columns][16 rows][2], one tile after another.
  NO_INLINE void pack_transposed(const Element* const* rows, int64_t width, int64_t padded, Packed* panel) {
    for (int64_t x = 0; x < padded; x += STEP) {
      for (int64_t group = 0; group < PANEL; group += LANES, panel += TILE) {
        Words square[LANES];
        UNROLL for (int64_t i = 0; i < LANES; ++i) square[i] = words_of(rows[group + i], x, width);
        transpose(square);
        UNROLL for (int64_t i = 0; i < LANES; ++i) memcpy(panel + i * STEP, &square[i], sizeof square[i]);
      }
    }
  }

  // Layout: [padded / 16][16 pairs of rows][16 columns][2], one tile after another.
  NO_INLINE void pack_straight(const Element* const* rows, int64_t width, int64_t padded, Packed* panel) {
    for (int64_t pair = 0; pair < PANEL / 2; ++pair) {
      for (int64_t x = 0; x < padded; x += STEP) {
        const Numbers even = (Numbers)words_of(rows[2 * pair], x, width);
        const Numbers odd = (Numbers)words_of(rows[2 * pair + 1], x, width);
        const Numbers left = __builtin_shufflevector(even, odd, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
        const Numbers right =
            __builtin_shufflevector(even, odd, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56,
                                    25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
        Packed* tiles = panel + x / 16 * TILE + pair * STEP;
        memcpy(tiles, &left, sizeof left);
        memcpy(tiles + TILE, &right, sizeof right);
      }
    }
  }

  NO_INLINE void scores(const Packed* block, int64_t padded, const Packed* const* panels, int64_t count, float* out,
                        int64_t out_stride) {
    finish_writes();
    for (int64_t p = 0; p < count; ++p, out += PANEL) {
      const Packed* tiles = panels[p];
      clear_results();
      for (int64_t x = 0; x < padded; x += STEP, tiles += 2 * TILE) multiply_add(block + x, padded, tiles);
      store_results(out, out_stride);
    }
  }

  NO_INLINE void accumulate(const Packed* weights, int64_t weights_stride, const Packed* const* panels, int64_t count,
                            int64_t padded, const float* alpha, float* out) {
    if (alpha) scale_rows(alpha, padded, out);
    finish_writes();
    for (int64_t x = 0; x < padded; x += STEP) {
      load_results(out + x, padded);
      for (int64_t p = 0; p < count; ++p) multiply_add(weights + p * PANEL, weights_stride, panels[p] + x / 16 * TILE);
      store_results(out + x, padded);
    }
  }

 private:
  static constexpr int64_t STEP = 32;   // numbers in 64 bytes, which is a vector and a row of a tile register
  static constexpr int64_t TILE = 512;  // numbers in a tile register

  typedef uint16_t Numbers __attribute__((vector_size(64)));

  struct Configuration {  // of the eight tile registers: 16 rows of 64 bytes (Intel SDM, volume 1, section 18.3.2)
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  // GCC does not know that a tile load reads memory: without this it may put earlier writes behind the load.
  ALWAYS_INLINE void finish_writes() { asm volatile("" ::: "memory"); }

  ALWAYS_INLINE void clear_results() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  ALWAYS_INLINE void load_results(const float* from, int64_t stride) {
    _tile_loadd(0, from, stride * 4);
    _tile_loadd(1, from + 16, stride * 4);
    _tile_loadd(2, from + 16 * stride, stride * 4);
    _tile_loadd(3, from + 16 * stride + 16, stride * 4);
  }

  ALWAYS_INLINE void store_results(float* to, int64_t stride) {
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + 16, stride * 4);
    _tile_stored(2, to + 16 * stride, stride * 4);
    _tile_stored(3, to + 16 * stride + 16, stride * 4);
  }

  // results[32][32] += rows[32][32 numbers] . two adjacent tiles of a panel
  ALWAYS_INLINE void multiply_add(const Packed* rows, int64_t stride, const Packed* tiles) {
    _tile_loadd(6, tiles, 64);
    _tile_loadd(4, rows, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, tiles + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + 16 * stride, stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  ALWAYS_INLINE void scale_rows(const float* alpha, int64_t padded, float* out) {
    for (int64_t row = 0; row < ROWS; ++row) {
      for (int64_t x = 0; x < padded; x += LANES, out += LANES) store(out, alpha[row] * load(out));
    }
  }

  // Columns x to x + 31 of a row, 0 from `width` on. A null row is all 0.
  ALWAYS_INLINE Words words_of(const Element* row, int64_t x, int64_t width) {
    if (!row || x >= width) return Words{};
    if (x + STEP <= width) return load_as<Words>(row + x);
    return (Words)_mm512_maskz_loadu_epi16((1u << (width - x)) - 1, row + x);
  }
};

}  // namespace longspan::LONGSPAN_SET
