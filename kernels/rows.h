// Row kernels for one instruction set. The interface is told in longspan_rows.h.
//
// A row comes into a buffer of floats, changes there and goes out. The buffer stays in the first-level cache, so that
// each step can be a plain loop of its own; behind the row it holds zeros up to a whole number of groups of vectors.
// A long row passes in pieces: while one is worked on, the processor already fetches the next from memory.
#pragma once
#include <math.h>
#include <omp.h>

#include "dispatch.h"
#include "simd.h"

namespace longspan::LONGSPAN_SET {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Pairs __attribute__((vector_size(LANES * 4)));

// Vectors that a loop treats side by side: a sum or a polynomial of one vector leaves the processor waiting for itself.
constexpr int64_t GROUP = 4;

ALWAYS_INLINE int64_t padded_to_groups(int64_t width) { return round_up(width, GROUP * LANES); }

// Calls visit(i, g) for the vectors at i of a padded row; g is the place of the vector in its group.
template <class Visit>
ALWAYS_INLINE void for_each_vector(int64_t width, Visit visit) {
  for (int64_t i = 0; i < width; i += GROUP * LANES) {
    UNROLL for (int64_t g = 0; g < GROUP; ++g) visit(i + g * LANES, g);
  }
}

template <class T>
ALWAYS_INLINE Vector load_up_to(const T* from, int64_t count) {
  return count >= LANES ? load(from) : count > 0 ? load_part(from, count) : Vector{};
}

template <class T>
ALWAYS_INLINE void store_up_to(T* to, Vector value, int64_t count) {
  count >= LANES ? store(to, value) : store_part(to, value, count);
}

// Calls work(elements of the row) with their type.
template <class Work>
ALWAYS_INLINE void with_row(const longspan_matrix& matrix, int64_t row, Work work) {
  if (matrix.dtype == LONGSPAN_F32) work(static_cast<float*>(matrix.data) + row * matrix.stride);
  if (matrix.dtype == LONGSPAN_BF16) work(static_cast<bfloat16*>(matrix.data) + row * matrix.stride);
}

constexpr int64_t PIECE = 256;
// Bytes from what is read or written to what is fetched from memory meanwhile. Beyond the end that does no harm.
constexpr int64_t AHEAD = 2048;

// Calls work(first, count) for all pieces of a row. A piece is a whole number of groups of vectors.
template <class Work>
ALWAYS_INLINE void for_each_piece(int64_t width, Work work) {
  for (int64_t first = 0; first < width; first += PIECE) work(first, smaller(PIECE, width - first));
}

// x = scale * from + bias + residual. bias, residual null: 0.
template <class T, class R>
NO_INLINE void read_elements(const T* from, int64_t count, float scale, const float* bias, const R* residual, float* x) {
  for (int64_t i = 0; i < padded_to_groups(count); i += LANES) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i) + AHEAD);
    Vector value = scale * load_up_to(from + i, count - i);
    if (bias) value += load_up_to(bias + i, count - i);
    if (residual) {
      __builtin_prefetch(reinterpret_cast<const char*>(residual + i) + AHEAD);
      value += load_up_to(residual + i, count - i);
    }
    store(x + i, value);
  }
}

// x = `count` columns of a row of the product and the residual, from column `first` on.
ALWAYS_INLINE void read(const longspan_product& from, const longspan_matrix& residual, int64_t row, int64_t first,
                        int64_t count, float* x) {
  const float scale = from.row_scale ? from.row_scale[row] : 1;
  const float* bias = from.bias ? from.bias + first : nullptr;
  with_row(from.data, row, [&](auto* elements) {
    if (!residual.data) return read_elements(elements + first, count, scale, bias, static_cast<float*>(nullptr), x);
    with_row(residual, row, [&](auto* added) {
      read_elements(elements + first, count, scale, bias, added + first, x);
    });
  });
}
ALWAYS_INLINE void read(const longspan_product& from, int64_t row, int64_t first, int64_t count, float* x) {
  read(from, longspan_matrix{}, row, first, count, x);
}

template <class T>
NO_INLINE void write_elements(const float* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    __builtin_prefetch(reinterpret_cast<char*>(to + i) + AHEAD, 1);
    store_up_to(to + i, load(x + i), count - i);
  }
}

ALWAYS_INLINE void write(const float* x, const longspan_matrix& to, int64_t row, int64_t first, int64_t count) {
  if (to.data) with_row(to, row, [&](auto* elements) { write_elements(x, count, elements + first); });
}

// The bits of a float grow with its magnitude, and those of NaN are above all others: unlike a comparison of floats,
// this one does not lose them.
ALWAYS_INLINE float largest_float(Integers bits) {
  const int32_t result = largest(bits);
  float value;
  memcpy(&value, &result, sizeof value);
  return value;
}

NO_INLINE float largest_magnitude(const float* x, int64_t width) {
  Integers most[GROUP] = {};
  for_each_vector(width, [&](int64_t i, int64_t g) {
    const Integers bits = load_as<Integers>(x + i) & 0x7fffffff;
    most[g] = bits > most[g] ? bits : most[g];
  });
  for (int64_t g = 1; g < GROUP; ++g) most[0] = most[g] > most[0] ? most[g] : most[0];
  return largest_float(most[0]);
}

// The same of bf16 numbers, two of which fill a word.
NO_INLINE float largest_magnitude(const bfloat16* x, int64_t width) {
  Pairs most[GROUP] = {};
  const auto compare = [&](const void* from, int64_t g) {
    const Pairs bits = load_as<Pairs>(from) & 0x7fff;
    most[g] = bits > most[g] ? bits : most[g];
  };
  int64_t i = 0;
  for (; i + GROUP * 2 * LANES <= width; i += GROUP * 2 * LANES) {
    UNROLL for (int64_t g = 0; g < GROUP; ++g) compare(x + i + g * 2 * LANES, g);
  }
  for (; i < width; i += 2 * LANES) {
    bfloat16 part[2 * LANES] = {};
    memcpy(part, x + i, smaller(2 * LANES, width - i) * sizeof(bfloat16));
    compare(part, 0);
  }
  UNROLL for (int64_t g = 1; g < GROUP; ++g) most[0] = most[g] > most[0] ? most[g] : most[0];
  const Words pairs = (Words)most[0];
  const Words lower = pairs << 16, upper = pairs & 0xffff0000;
  return largest_float((Integers)(upper > lower ? upper : lower));
}

// most: the largest magnitude of the row.
template <class T>
NO_INLINE void quantize_row(const T* x, int64_t width, float most, uint8_t* to, float* scale) {
  constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  const Vector inverse = splat(most > 0 ? 127 / most : 0), zero = splat(ROUNDING + 128);
  *scale = most / 127;
  for (int64_t i = 0; i < width; i += LANES) {
    const Words rounded = (Words)multiply_add(load_up_to(x + i, width - i), inverse, zero);
    const Bytes bytes = __builtin_convertvector(rounded & 255, Bytes);
    i + LANES <= width ? memcpy(to + i, &bytes, LANES) : memcpy(to + i, &bytes, width - i);
  }
}

template <class T>
ALWAYS_INLINE void quantize_row(const T* x, int64_t width, float most, const longspan_result& to, int64_t row) {
  if (to.quantized) quantize_row(x, width, most, to.quantized + row * to.quantized_stride, to.scale + row);
}
template <class T>
ALWAYS_INLINE void quantize_row(const T* x, int64_t width, const longspan_result& to, int64_t row) {
  if (to.quantized) quantize_row(x, width, largest_magnitude(x, width), to, row);
}

// log2 Phi(n) for n in [-8, 0], which is nearly a parabola. Minimax polynomials of the relative error, 1e-7 and 4e-5.
template <bool precise>
ALWAYS_INLINE Vector log2_of_phi(Vector n) {
  Vector y;
  if constexpr (precise) {
    y = splat(-9.41349681e-10f);
    y = multiply_add(y, n, splat(-4.28359628e-08f));
    y = multiply_add(y, n, splat(-8.47269112e-07f));
    y = multiply_add(y, n, splat(-9.46069257e-06f));
    y = multiply_add(y, n, splat(-6.34323321e-05f));
    y = multiply_add(y, n, splat(-0.000225678404f));
    y = multiply_add(y, n, splat(0.000124463019f));
    y = multiply_add(y, n, splat(0.00710824801f));
    y = multiply_add(y, n, splat(0.0525522629f));
    y = multiply_add(y, n, splat(-0.459185761f));
    y = multiply_add(y, n, splat(1.15110775f));
  } else {
    y = splat(1.87354343e-05f);
    y = multiply_add(y, n, splat(0.000549917311f));
    y = multiply_add(y, n, splat(0.00690957851f));
    y = multiply_add(y, n, splat(0.0507477402f));
    y = multiply_add(y, n, splat(-0.461217756f));
    y = multiply_add(y, n, splat(1.15053492f));
  }
  return multiply_add(y, n, splat(-1.0f));
}

// The activations. Not precise: good enough for what is rounded to 8 bits, as bf16 and int8 are.
// x * Phi(x) is max(x, 0) + n * Phi(n) with n = -|x|, which keeps its accuracy in the tail. Below -8 it is under 5e-15.
template <bool precise = true>
ALWAYS_INLINE Vector gelu(Vector x) {
  const Vector n = maximum(splat(-8.0f), (Vector)((Words)x | 0x80000000));
  return multiply_add(n, exp2<precise>(log2_of_phi<precise>(n)), maximum(x, Vector{}));
}

// x / (1 + 2^-power). Below a power of -126, where the result is 0 for all purposes, 2^-power could become infinite.
template <bool precise>
ALWAYS_INLINE Vector times_sigmoid(Vector x, Vector power) {
  return x / (1.0f + exp2<precise>(-maximum(splat(-126.0f), power)));
}

template <bool precise = true>
ALWAYS_INLINE Vector gelu_tanh(Vector x) {
  constexpr float SLOPE = 1.59576912160573071f * LOG2_E;  // 2 * sqrt(2 / pi)
  return times_sigmoid<precise>(x, SLOPE * x * multiply_add(0.044715f * x, x, splat(1.0f)));
}

template <bool precise = true>
ALWAYS_INLINE Vector silu(Vector x) {
  return times_sigmoid<precise>(x, LOG2_E * x);
}

ALWAYS_INLINE Vector relu(Vector x) { return maximum(Vector{}, x); }

template <class Function>
ALWAYS_INLINE void change(float* x, int64_t count, Function function) {
  for_each_vector(count, [&](int64_t i, int64_t) { store(x + i, function(load(x + i))); });
}

template <bool precise>
NO_INLINE void activate(float* x, int64_t count, int32_t activation) {
  if (activation == LONGSPAN_GELU) change(x, count, [](Vector v) { return gelu<precise>(v); });
  if (activation == LONGSPAN_GELU_TANH) change(x, count, [](Vector v) { return gelu_tanh<precise>(v); });
  if (activation == LONGSPAN_RELU) change(x, count, [](Vector v) { return relu(v); });
  if (activation == LONGSPAN_SILU) change(x, count, [](Vector v) { return silu<precise>(v); });
}

// Rows that are normalized side by side: while the sums of one are on their way, the others are worked on, and weight and
// bias are read once for all.
constexpr int64_t ROWS_AT_ONCE = 4;

// x = x - mean, for rows `stride` apart that are padded with zeros to whole vectors. Gives the factors that make their
// variances 1. Not from the sums of x and x * x: their difference would lose what a large mean leaves.
template <int64_t ROWS>
NO_INLINE void center_rows(float* x, int64_t stride, int64_t width, float epsilon, float* factors) {
  Vector totals[ROWS] = {}, squares[ROWS] = {}, means[ROWS];
  const int64_t whole = width - width % LANES;
  for (int64_t i = 0; i < width; i += LANES) {
    UNROLL for (int64_t row = 0; row < ROWS; ++row) totals[row] += load(x + row * stride + i);
  }
  UNROLL for (int64_t row = 0; row < ROWS; ++row) means[row] = splat(sum(totals[row]) / width);
  for (int64_t i = 0; i < whole; i += LANES) {
    UNROLL for (int64_t row = 0; row < ROWS; ++row) {
      const Vector v = load(x + row * stride + i) - means[row];
      store(x + row * stride + i, v);
      squares[row] = multiply_add(v, v, squares[row]);
    }
  }
  for (int64_t row = 0; row < ROWS && whole < width; ++row) {  // what pads the row counts for nothing
    float* last = x + row * stride + whole;
    const Vector v = load_part((const float*)last, width - whole) - means[row];
    store(last, Vector{});
    store_part(last, v, width - whole);
    squares[row] = multiply_add(load(last), load(last), squares[row]);
  }
  UNROLL for (int64_t row = 0; row < ROWS; ++row) factors[row] = 1 / sqrtf(sum(squares[row]) / width + epsilon);
}

// x = factor * x * weight + bias, and the same in `to`, if there is one. Gives the largest magnitude of each row.
template <int64_t ROWS, class T>
NO_INLINE void scale_rows(float* x, int64_t stride, int64_t width, const float* factors, const longspan_norm& norm,
                          T* to, int64_t to_stride, float* most) {
  Integers found[ROWS] = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const Vector weight = load_up_to(norm.weight + i, width - i);
    const Vector bias = norm.bias ? load_up_to(norm.bias + i, width - i) : Vector{};
    UNROLL for (int64_t row = 0; row < ROWS; ++row) {
      const Vector value = factors[row] * load(x + row * stride + i) * weight + bias;
      store(x + row * stride + i, value);
      const Integers bits = (Integers)value & 0x7fffffff;
      found[row] = bits > found[row] ? bits : found[row];
      if (!to) continue;
      __builtin_prefetch(reinterpret_cast<char*>(to + row * to_stride + i) + AHEAD, 1);
      store_up_to(to + row * to_stride + i, value, width - i);
    }
  }
  UNROLL for (int64_t row = 0; row < ROWS; ++row) most[row] = largest_float(found[row]);
}

NO_INLINE void rotate_group(float* x, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t count = half - i;
    const Vector a = load_up_to(x + i, count), b = load_up_to(x + half + i, count);
    const Vector c = load_up_to(cos + i, count), s = load_up_to(sin + i, count);
    store_up_to(x + i, a * c - b * s, count);
    store_up_to(x + half + i, b * c + a * s, count);
  }
}

// How many threads a kernel may use: one where its caller has shared the rows out already.
ALWAYS_INLINE int64_t threads_to_take() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Calls work(first, end, x) for shares of the rows, where x has room for `floats` numbers.
template <class Work>
int for_each_share(int64_t rows, int64_t width, int64_t floats, Work work) {
  constexpr int64_t NUMBERS_PER_THREAD = 1 << 15;  // fewer are done before another thread has woken up
  if (rows == 0) return LONGSPAN_OK;
  const int64_t threads = smaller(threads_to_take(), divide_up(rows * width, NUMBERS_PER_THREAD));
  bool missing = false;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    float* x = static_cast<float*>(thread_workspace(floats * static_cast<int64_t>(sizeof(float))));
    if (x) {
      work(rows * thread / team, rows * (thread + 1) / team, x);
    } else {
      __atomic_store_n(&missing, true, __ATOMIC_RELAXED);
    }
  }
  return missing ? LONGSPAN_NO_MEMORY : LONGSPAN_OK;
}

// Calls work(row, x) for all rows, where x has room for `width` floats and what pads them.
template <class Work>
int for_each_row(int64_t rows, int64_t width, Work work) {
  return for_each_share(rows, width, padded_to_groups(width), [&](int64_t first, int64_t end, float* x) {
    for (int64_t row = first; row < end; ++row) work(row, x);
  });
}

static int copy_rows(int64_t rows, int64_t width, const longspan_product& from, const longspan_result& to) {
  const bool as_they_are = from.data.dtype == LONGSPAN_BF16 && !from.row_scale && !from.bias && !to.out.data;
  return for_each_row(rows, width, [&](int64_t row, float* x) {
    if (as_they_are) {
      const bfloat16* numbers = static_cast<const bfloat16*>(from.data.data) + row * from.data.stride;
      return quantize_row(numbers, width, to, row);
    }
    for_each_piece(width, [&](int64_t first, int64_t count) {
      read(from, row, first, count, x + first);
      write(x + first, to.out, row, first, count);
    });
    quantize_row(x, width, to, row);
  });
}

static int activate_rows(int64_t rows, int64_t width, const longspan_product& from, int32_t activation, bool gated,
                         const longspan_result& to) {
  const bool precise = to.out.data && to.out.dtype == LONGSPAN_F32;
  return for_each_row(rows, padded_to_groups(width) + PIECE, [&](int64_t row, float* x) {
    float* gate = x + padded_to_groups(width);
    for_each_piece(width, [&](int64_t first, int64_t count) {
      float* value = x + first;
      read(from, row, first, count, value);
      precise ? activate<true>(value, count, activation) : activate<false>(value, count, activation);
      if (gated) {
        read(from, row, width + first, count, gate);
        for_each_vector(count, [&](int64_t i, int64_t) { store(value + i, load(value + i) * load(gate + i)); });
      }
      write(value, to.out, row, first, count);
    });
    quantize_row(x, width, to, row);
  });
}

template <int64_t ROWS>
ALWAYS_INLINE void normalize_some(int64_t first_row, int64_t width, const longspan_product& from,
                                  const longspan_norm& norm, const longspan_result& to, float* x) {
  const int64_t stride = padded_to_groups(width);
  float factors[ROWS], most[ROWS];
  for (int64_t i = 0; i < ROWS; ++i) {
    float* row = x + i * stride;
    for_each_piece(width, [&](int64_t first, int64_t count) {
      read(from, norm.residual, first_row + i, first, count, row + first);
      write(row + first, norm.sum, first_row + i, first, count);
    });
  }
  center_rows<ROWS>(x, stride, width, norm.epsilon, factors);
  const auto scale = [&](auto* out) {
    scale_rows<ROWS>(x, stride, width, factors, norm, out, to.out.stride, most);
  };
  to.out.data ? with_row(to.out, first_row, scale) : scale(static_cast<float*>(nullptr));
  for (int64_t i = 0; i < ROWS; ++i) quantize_row(x + i * stride, width, most[i], to, first_row + i);
}

static int normalize_rows(int64_t rows, int64_t width, const longspan_product& from, const longspan_norm& norm,
                          const longspan_result& to) {
  const int64_t floats = ROWS_AT_ONCE * padded_to_groups(width);
  return for_each_share(rows, width, floats, [&](int64_t row, int64_t end, float* x) {
    for (; row + ROWS_AT_ONCE <= end; row += ROWS_AT_ONCE) normalize_some<ROWS_AT_ONCE>(row, width, from, norm, to, x);
    for (; row < end; ++row) normalize_some<1>(row, width, from, norm, to, x);
  });
}

static int rotate_rows(int64_t rows, int64_t width, const longspan_product& from, const longspan_rotary& rotary,
                       const longspan_result& to) {
  return for_each_row(rows, width, [&](int64_t row, float* x) {
    const int64_t at = (rotary.positions ? rotary.positions[row] : row) * rotary.table_stride;
    read(from, row, 0, width, x);
    for (int64_t head = 0; head < rotary.heads; ++head) {
      rotate_group(x + head * rotary.head_width, rotary.head_width / 2, rotary.cos + at, rotary.sin + at);
    }
    write(x, to.out, row, 0, width);
    quantize_row(x, width, to, row);
  });
}

}  // namespace longspan::LONGSPAN_SET
