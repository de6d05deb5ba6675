// Vectors of float for the one instruction set that this file is compiled for, in a namespace of its own: two sets that
// shared an inline function would leave the linker to choose which of them the other one runs.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LONGSPAN_SET
#define LONGSPAN_SET baseline
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NO_INLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 32")

namespace longspan::LONGSPAN_SET {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LONGSPAN_AVX512 1
constexpr int64_t LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define LONGSPAN_AVX2 1
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  uint16_t bits;
};

// The alignment of every buffer that is read or written by whole vectors.
constexpr int64_t ALIGNMENT = 64;
constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ALWAYS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
ALWAYS_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Unaligned access. Where the address is aligned it costs nothing more.
template <class V>
ALWAYS_INLINE V load_as(const void* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}
ALWAYS_INLINE Vector load(const float* from) { return load_as<Vector>(from); }
ALWAYS_INLINE void store(float* to, Vector value) { memcpy(to, &value, sizeof value); }
ALWAYS_INLINE Vector splat(float value) { return value - Vector{}; }

ALWAYS_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if LONGSPAN_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif LONGSPAN_AVX2
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The second argument where one is NaN.
ALWAYS_INLINE Vector maximum(Vector a, Vector b) {
#if LONGSPAN_AVX512
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

ALWAYS_INLINE float largest(Vector x) {
#if LONGSPAN_AVX512
  return _mm512_reduce_max_ps(x);
#else
  float result = x[0];
  UNROLL for (int64_t i = 1; i < LANES; ++i) result = result > x[i] ? result : x[i];
  return result;
#endif
}

ALWAYS_INLINE int32_t largest(Integers x) {
#if LONGSPAN_AVX512
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t result = x[0];
  UNROLL for (int64_t i = 1; i < LANES; ++i) result = result > x[i] ? result : x[i];
  return result;
#endif
}

ALWAYS_INLINE float sum(Vector x) {
#if LONGSPAN_AVX512
  return _mm512_reduce_add_ps(x);
#else
  float result = x[0];
  UNROLL for (int64_t i = 1; i < LANES; ++i) result += x[i];
  return result;
#endif
}

// Whether a lane of a is larger than that of b.
ALWAYS_INLINE bool any_larger(Vector a, Vector b) {
#if LONGSPAN_AVX512
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#else
  const Integers larger = a > b;
  int32_t found = 0;
  UNROLL for (int64_t i = 0; i < LANES; ++i) found |= larger[i];
  return found != 0;
#endif
}

// `shown` where first <= position <= last, else -infinity.
ALWAYS_INLINE Vector hide_outside(Vector shown, Integers position, int32_t first, int32_t last) {
#if LONGSPAN_AVX512
  const __mmask16 from_first = _mm512_cmp_epi32_mask((__m512i)position, _mm512_set1_epi32(first), _MM_CMPINT_NLT);
  const __mmask16 inside =
      _mm512_mask_cmp_epi32_mask(from_first, (__m512i)position, _mm512_set1_epi32(last), _MM_CMPINT_LE);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITE), inside, shown);
#else
  return (position >= first) & (position <= last) ? shown : splat(-INFINITE);
#endif
}

// 2^fraction for fractions in [0, 1]: minimax polynomials of the relative error, 2e-9 and 7.5e-5 (far below the rounding
// of the bf16 numbers it is meant for).
template <bool precise>
ALWAYS_INLINE Vector exp2_of_fraction(Vector f) {
  if constexpr (precise) {
    Vector y = splat(0.00021612917f);
    y = multiply_add(y, f, splat(0.00124678459f));
    y = multiply_add(y, f, splat(0.00967545162f));
    y = multiply_add(y, f, splat(0.0554852806f));
    y = multiply_add(y, f, splat(0.240229306f));
    y = multiply_add(y, f, splat(0.693147044f));
    return multiply_add(y, f, splat(1.0f));
  } else {
    Vector y = splat(0.0780245235f);
    y = multiply_add(y, f, splat(0.226067161f));
    y = multiply_add(y, f, splat(0.695833535f));
    return multiply_add(y, f, splat(0.99992522f));
  }
}

// 2^x; 0 for -infinity, NaN for NaN.
template <bool precise>
ALWAYS_INLINE Vector exp2(Vector x) {
#if LONGSPAN_AVX512
  const Vector fraction = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  return _mm512_scalef_ps(exp2_of_fraction<precise>(fraction), x);
#else
  constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  x = -126.5f > x ? splat(-126.5f) : x;    // comes out as 0 below: -127 makes an exponent field of 0
  const Vector shifted = (x - 0.5f) + ROUNDING;
  const Vector floor = shifted - ROUNDING;
  const Integers power = ((Integers)shifted << 23) + (127 << 23);
  return exp2_of_fraction<precise>(x - floor) * (Vector)power;
#endif
}

ALWAYS_INLINE Vector widen(Halves bits) { return (Vector)(__builtin_convertvector(bits, Words) << 16); }
ALWAYS_INLINE Vector load(const bfloat16* from) { return widen(load_as<Halves>(from)); }

// To nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE Halves narrow(Vector x) {
#if defined(__AVX512BF16__)
  const __m256bh narrowed = _mm512_cvtneps_pbh(x);
  Halves result;
  memcpy(&result, &narrowed, sizeof result);
  return result;
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
#endif
}

ALWAYS_INLINE void store(bfloat16* to, Vector value) {
  const Halves narrowed = narrow(value);
  memcpy(to, &narrowed, sizeof narrowed);
}

ALWAYS_INLINE void flip_sign(float& x) { x = -x; }
ALWAYS_INLINE void flip_sign(bfloat16& x) { x.bits ^= 0x8000; }

ALWAYS_INLINE void store_pair(float* to, Vector first, Vector second) {
  store(to, first);
  store(to + LANES, second);
}
ALWAYS_INLINE void store_pair(bfloat16* to, Vector first, Vector second) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  memcpy(to, &both, sizeof both);
#else
  store(to, first);
  store(to + LANES, second);
#endif
}

#if defined(__AVX512BF16__)
// first[0] second[0] first[1] second[1] ..: words of two rows.
ALWAYS_INLINE void store_interleaved(bfloat16* to, Vector first, Vector second) {
  typedef uint16_t Pairs __attribute__((vector_size(LANES * 4)));
  const Pairs both = (Pairs)_mm512_cvtne2ps_pbh(second, first);
  const Pairs words = __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                              9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  memcpy(to, &words, sizeof words);
}
#endif

// The first `count` numbers, less than a vector of them, and zeros.
template <class T>
ALWAYS_INLINE Vector load_part(const T* from, int64_t count) {
  T part[LANES] = {};
  memcpy(part, from, count * sizeof(T));
  return load(part);
}
template <class T>
ALWAYS_INLINE void store_part(T* to, Vector value, int64_t count) {
  T part[LANES];
  store(part, value);
  memcpy(to, part, count * sizeof(T));
}

// a0 b0 a1 b1 ..: the first and the second half of both vectors' lanes in turn.
ALWAYS_INLINE void interleave(Words& a, Words& b) {
  const Words x = a, y = b;
#if LONGSPAN_AVX512
  a = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  b = __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LONGSPAN_AVX2
  a = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  b = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  a = __builtin_shufflevector(x, y, 0, 4, 1, 5);
  b = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}

// The same of words' halves, whose number of lanes is twice as large.
ALWAYS_INLINE void interleave_halves(Words& a, Words& b) {
#if LONGSPAN_AVX512
  typedef uint16_t Pairs __attribute__((vector_size(LANES * 4)));
  const Pairs x = (Pairs)a, y = (Pairs)b;
  a = (Words)__builtin_shufflevector(x, y, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
  b = (Words)__builtin_shufflevector(x, y, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                     57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
#else
  const Words lower = (a & 0xffff) | (b << 16), upper = (a >> 16) | (b & 0xffff0000);
  a = lower;
  b = upper;
  interleave(a, b);
#endif
}

ALWAYS_INLINE Vector reversed(Vector x) {
#if LONGSPAN_AVX512
  return __builtin_shufflevector(x, x, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#elif LONGSPAN_AVX2
  return __builtin_shufflevector(x, x, 7, 6, 5, 4, 3, 2, 1, 0);
#else
  return __builtin_shufflevector(x, x, 3, 2, 1, 0);
#endif
}

// A square of LANES x LANES words. Each round interleaves row i with row i + LANES / 2; log2(LANES) rounds transpose.
ALWAYS_INLINE void transpose(Words (&rows)[LANES]) {
  UNROLL for (int64_t round = 1; round < LANES; round *= 2) {
    Words next[LANES];
    UNROLL for (int64_t i = 0; i < LANES / 2; ++i) {
      next[2 * i] = rows[i];
      next[2 * i + 1] = rows[i + LANES / 2];
      interleave(next[2 * i], next[2 * i + 1]);
    }
    UNROLL for (int64_t i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

// The sum of each of LANES rows of LANES numbers.
ALWAYS_INLINE Vector sums_of_rows(const float (*rows)[LANES]) {
  Words square[LANES];
  UNROLL for (int64_t i = 0; i < LANES; ++i) square[i] = load_as<Words>(rows[i]);
  transpose(square);
  Vector total = (Vector)square[0];
  UNROLL for (int64_t i = 1; i < LANES; ++i) total += (Vector)square[i];
  return total;
}

}  // namespace longspan::LONGSPAN_SET
