// What both kinds of linear layers share: how a call is cut into tasks, and what becomes of the sums: scales, bias,
// activation, residual, and the way to memory.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace longspan::LONGSPAN_SET {

constexpr int64_t CACHE_LINE = 64;
constexpr int64_t SQUARE = 32;               // rows and columns of the sums that are finished together
constexpr int64_t PARTS = SQUARE / LANES;    // vectors of a row of them
constexpr int64_t STREAMED_BYTES = 1 << 20;  // results that no cache near keeps bypass the caches: half the traffic

ALWAYS_INLINE uint64_t first_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// How a call is shared out. A task is a block of rows with some of the panels, or with all where blocks are enough.
struct Shares {
  int64_t panels, block_rows, row_blocks, parts, part_panels, num_tasks;
  bool streams;  // results are written past the caches

  // Blocks have up to most_rows, in groups of `group`; a task has `fewest` panels or more.
  Shares(const longspan_linear& call, int64_t most_rows, int64_t group, int64_t fewest)
      : panels(divide_up(call.out_features, SQUARE)) {
    block_rows = round_up(divide_up(call.rows, divide_up(call.rows, most_rows)), group);
    row_blocks = divide_up(call.rows, block_rows);
    const int64_t wanted = threads_to_take() == 1 ? 1 : 2 * threads_to_take();
    parts = smaller(divide_up(wanted, row_blocks), divide_up(panels, fewest));
    part_panels = divide_up(panels, parts);
    parts = divide_up(panels, part_panels);
    num_tasks = row_blocks * parts;
    const int64_t number_bytes = call.out_dtype == LONGSPAN_F32 ? 4 : 2;
    streams = call.rows * call.out_features * number_bytes >= STREAMED_BYTES &&
              (reinterpret_cast<uintptr_t>(call.out) | call.out_stride * number_bytes) % CACHE_LINE == 0;
  }

  int64_t first_row(int64_t task) const { return task / parts * block_rows; }
  int64_t first_panel(int64_t task) const { return task % parts * part_panels; }
};

// What becomes of the sums of a square, some rows at a time.
template <class Format>
struct Finisher {
  const longspan_linear& call;
  const float* sums;  // [32][32]
  bool streams;
  const int32_t* offsets = nullptr;  // of the columns, where the format has any: they are added to the sums
  bool has_earlier = false, is_last = false;  // stages
  float* earlier = nullptr;                   // the sums of earlier stages
  int64_t first_row = 0, first_column = 0;
  int64_t rows = 0, done = 0;

  void finish(int64_t most_rows) {
    const int64_t first = done;
    done = smaller(done + most_rows, rows);
    if (first < done) finish_rows(*this, first, done);
  }

 private:
  NO_INLINE void finish_rows(const Finisher& square, int64_t first, int64_t end) {
    if (!square.is_last) return keep_sums(square, first, end);
    if (square.call.out_dtype == LONGSPAN_F32) return finish_as<float>(square, first, end);
    finish_as<bfloat16>(square, first, end);
  }

  ALWAYS_INLINE void keep_sums(const Finisher& square, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      Vector values[PARTS];
      read_sums(square, row, values);
      store_all(square.earlier + row * SQUARE, values);
    }
  }

  // A loop of its own for every activation: what all rows share stays in registers.
  template <class Out>
  ALWAYS_INLINE void finish_as(const Finisher& square, int64_t first, int64_t end) {
    constexpr bool PRECISE = sizeof(Out) == sizeof(float);
    const auto with = [&](auto activate) { finish_with<Out>(square, first, end, activate); };
    switch (square.call.activation) {
      case LONGSPAN_GELU: return with([](Vector x) { return gelu<PRECISE>(x); });
      case LONGSPAN_GELU_TANH: return with([](Vector x) { return gelu_tanh<PRECISE>(x); });
      case LONGSPAN_RELU: return with([](Vector x) { return relu(x); });
      case LONGSPAN_SILU: return with([](Vector x) { return silu<PRECISE>(x); });
      default: return with([](Vector x) { return x; });
    }
  }

  template <class Out, class Activate>
  ALWAYS_INLINE void finish_with(const Finisher& square, int64_t first, int64_t end, Activate activate) {
    constexpr bool IS_INT8 = Format::IS_INT8;
    const longspan_linear& call = square.call;
    const int64_t column = square.first_column, out_stride = call.out_stride, residual_stride = call.residual_stride;
    const int64_t columns = smaller(SQUARE, call.out_features - column);
    const bool streams = square.streams && columns == SQUARE;
    Vector scales[PARTS] = {}, bias[PARTS] = {};
    if (IS_INT8) add(call.weight_scale + column, columns, scales);
    if (call.bias) add(call.bias + column, columns, bias);
    const float* row_scale = IS_INT8 ? call.row_scale + square.first_row : nullptr;
    const Out* residual = static_cast<const Out*>(call.residual);
    if (residual) residual += square.first_row * residual_stride + column;
    Out* out = static_cast<Out*>(call.out) + square.first_row * out_stride + column;
    for (int64_t row = first; row < end; ++row) {
      Vector values[PARTS];
      read_sums(square, row, values);
      UNROLL for (int64_t i = 0; i < PARTS; ++i) {
        const Vector product = IS_INT8 ? values[i] * (row_scale[row] * scales[i]) : values[i];
        values[i] = activate(product + bias[i]);
      }
      if (residual) add(residual + row * residual_stride, columns, values);
      Out* to = out + row * out_stride;
      streams ? stream(to, values) : store_first(to, columns, values);
    }
  }

  ALWAYS_INLINE void read_sums(const Finisher& square, int64_t row, Vector (&values)[PARTS]) {
    UNROLL for (int64_t i = 0; i < PARTS; ++i) {
      const int64_t at = i * LANES;
      values[i] = Format::sums(square.sums + row * SQUARE + at, Format::HAS_OFFSETS ? square.offsets + at : nullptr);
    }
    if (!square.has_earlier) return;
    UNROLL for (int64_t i = 0; i < PARTS; ++i) values[i] += load(square.earlier + row * SQUARE + i * LANES);
  }

  template <class T>
  ALWAYS_INLINE void store_all(T* to, const Vector (&values)[PARTS]) {
    UNROLL for (int64_t i = 0; i < PARTS; i += 2) store_pair(to + i * LANES, values[i], values[i + 1]);
  }

#if LONGSPAN_AVX512
  ALWAYS_INLINE void add(const float* from, int64_t count, Vector (&values)[PARTS]) {
    const uint32_t mask = static_cast<uint32_t>(first_bits(count));
    values[0] += _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
    values[1] += _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + LANES);
  }

  ALWAYS_INLINE void add(const bfloat16* from, int64_t count, Vector (&values)[PARTS]) {
    const __m512i bits = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first_bits(count)), from);
    values[0] += (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
    values[1] += (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
  }

  ALWAYS_INLINE __m512i narrowed(const Vector (&values)[PARTS]) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]);
#else
    const __m256i first = (__m256i)narrow(values[0]), second = (__m256i)narrow(values[1]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#endif
  }

  ALWAYS_INLINE void stream(float* to, const Vector (&values)[PARTS]) {
    UNROLL for (int64_t i = 0; i < PARTS; ++i) _mm512_stream_ps(to + i * LANES, values[i]);
  }
  ALWAYS_INLINE void stream(bfloat16* to, const Vector (&values)[PARTS]) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), narrowed(values));
  }

  ALWAYS_INLINE void store_first(float* to, int64_t count, const Vector (&values)[PARTS]) {
    const uint32_t mask = static_cast<uint32_t>(first_bits(count));
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), values[0]);
    _mm512_mask_storeu_ps(to + LANES, static_cast<__mmask16>(mask >> 16), values[1]);
  }
  ALWAYS_INLINE void store_first(bfloat16* to, int64_t count, const Vector (&values)[PARTS]) {
    _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(first_bits(count)), narrowed(values));
  }
#else
  template <class T>
  ALWAYS_INLINE void add(const T* from, int64_t count, Vector (&values)[PARTS]) {
    UNROLL for (int64_t i = 0; i < PARTS; ++i) values[i] += load_up_to(from + i * LANES, count - i * LANES);
  }

  ALWAYS_INLINE void stream(float* to, const Vector (&values)[PARTS]) {
    UNROLL for (int64_t i = 0; i < PARTS; ++i) _mm256_stream_ps(to + i * LANES, values[i]);
  }
  ALWAYS_INLINE void stream(bfloat16* to, const Vector (&values)[PARTS]) {
    UNROLL for (int64_t i = 0; i < PARTS; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i * LANES), (__m128i)narrow(values[i]));
    }
  }

  template <class T>
  ALWAYS_INLINE void store_first(T* to, int64_t count, const Vector (&values)[PARTS]) {
    if (count == SQUARE) return store_all(to, values);
    for (int64_t i = 0; i * LANES < count; ++i) store_up_to(to + i * LANES, values[i], count - i * LANES);
  }
#endif
};

}  // namespace longspan::LONGSPAN_SET
