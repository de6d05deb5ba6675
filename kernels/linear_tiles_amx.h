// Matrices in AMX tiles: numbers taken apart into bf16 terms, or bytes, and the products of their tiles.
#pragma once
#include "linear_finish.h"
#include "tiles_amx.h"

namespace longspan::LONGSPAN_SET {

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_ROW_BYTES = 64;
constexpr int64_t TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES;

ALWAYS_INLINE void clear_row(uint8_t* to) { _mm512_store_si512(to, _mm512_setzero_si512()); }

// How numbers stand in tiles. Of 32 rows, a slice holds STEP numbers: for every term, the tile of the first 16 rows and
// that of the others. pack_row writes the terms of the first `count` numbers of a row, at most STEP, and zeros for others.
template <int NUM_TERMS>
struct Terms {
  static constexpr int TERMS = NUM_TERMS;
  static constexpr bool IS_INT8 = false, HAS_OFFSETS = false;
  static constexpr int64_t STEP = 32;
  static constexpr int64_t SLICE_BYTES = TERMS * 2 * TILE_BYTES;

  ALWAYS_INLINE void pack_row(const float* from, int64_t count, uint8_t* to) {
    const uint64_t mask = first_bits(count);
    split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16), to);
  }

  ALWAYS_INLINE void pack_row(const bfloat16* from, int64_t count, uint8_t* to) {
    static_assert(TERMS == 1, "a bf16 number is its own first term");
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first_bits(count)), from));
  }

  ALWAYS_INLINE Vector sums(const float* from, const int32_t*) { return load(from); }

 private:
  // Each term is what the ones before leave, rounded to bf16.
  ALWAYS_INLINE void split(__m512 first, __m512 second, uint8_t* to) {
    UNROLL for (int term = 0; term < TERMS; ++term) {
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      _mm512_store_si512(to + term * 2 * TILE_BYTES, rounded);
      if (term + 1 == TERMS) break;
      first -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
      second -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16);
    }
  }
};

// Signed bytes. Those of x come as byte + 128.
struct Int8 {
  static constexpr int TERMS = 1;
  static constexpr bool IS_INT8 = true, HAS_OFFSETS = false;
  static constexpr int64_t STEP = 64;
  static constexpr int64_t SLICE_BYTES = 2 * TILE_BYTES;

  ALWAYS_INLINE void pack_row(const uint8_t* from, int64_t count, uint8_t* to) {
    const __mmask64 mask = first_bits(count);
    const __m512i bytes = _mm512_maskz_loadu_epi8(mask, from);
    _mm512_store_si512(to, _mm512_maskz_sub_epi8(mask, bytes, _mm512_set1_epi8(-128)));
  }

  ALWAYS_INLINE void pack_row(const int8_t* from, int64_t count, uint8_t* to) {
    _mm512_store_si512(to, _mm512_maskz_loadu_epi8(first_bits(count), from));
  }

  ALWAYS_INLINE Vector sums(const float* from, const int32_t*) {
    return __builtin_convertvector(load_as<Integers>(from), Vector);
  }
};

// Tile registers 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 rows of the weight.
template <class Format, int ROW_TILES>
struct Products {
  ALWAYS_INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (ROW_TILES == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  ALWAYS_INLINE void store_sums(float* sums) {
    _tile_stored(0, sums, SQUARE * 4);
    _tile_stored(1, sums + 16, SQUARE * 4);
    if constexpr (ROW_TILES == 2) {
      _tile_stored(2, sums + TILE_ROWS * SQUARE, SQUARE * 4);
      _tile_stored(3, sums + TILE_ROWS * SQUARE + 16, SQUARE * 4);
    }
  }

  // One slice of each, for all products of terms that matter. Small ones come first; each shares a side with the one
  // before: 8 loads for 12 tile products, 14 for 24.
  ALWAYS_INLINE void add(const uint8_t* x, const uint8_t* weight) {
    constexpr int TERMS = Format::TERMS;
    constexpr int64_t TERM = 2 * TILE_BYTES;
    load_x(x);
    load_weight(weight + (TERMS - 1) * TERM);
    add_term();
    if constexpr (TERMS == 3) {
      load_weight(weight + TERM);
      add_term();
      load_x(x + TERM);
      add_term();
    }
    if constexpr (TERMS > 1) {
      load_weight(weight);
      add_term();
      load_x(x + (TERMS - 1) * TERM);
      add_term();
    }
    if constexpr (TERMS == 3) {
      load_x(x);
      add_term();
    }
  }

 private:
  ALWAYS_INLINE void load_x(const uint8_t* tiles) {
    _tile_loadd(4, tiles, TILE_ROW_BYTES);
    if constexpr (ROW_TILES == 2) _tile_loadd(5, tiles + TILE_BYTES, TILE_ROW_BYTES);
  }

  ALWAYS_INLINE void load_weight(const uint8_t* tiles) {
    _tile_loadd(6, tiles, TILE_ROW_BYTES);
    _tile_loadd(7, tiles + TILE_BYTES, TILE_ROW_BYTES);
  }

  ALWAYS_INLINE void add_term() {
    if constexpr (Format::IS_INT8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if constexpr (ROW_TILES == 2) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      return;
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (ROW_TILES == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

}  // namespace longspan::LONGSPAN_SET
