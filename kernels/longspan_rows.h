// The C interface of longspan's row kernels: what lies between the matrix products of a transformer layer, one pass
// over memory each. Conversion, scales, bias, activation, residual sum, layer norm, rotary positions, quantization.
//
// Every function reads a product, computes in fp32 and writes a result. `out` may be the product itself or begin where
// it begins, in the same type and with the same stride. Rows are shared among OpenMP's threads. NaN and infinity stay
// what they are in `out`; in a quantized row they make its scale NaN or infinite.
#pragma once
#include "longspan.h"

#ifdef __cplusplus
extern "C" {
#endif

// Strides count numbers from one row to the next; numbers within a row are adjacent. data null: absent, where that is
// allowed.
typedef struct longspan_matrix {
  void *data;
  int64_t stride;
  int32_t dtype;  // LONGSPAN_F32 or LONGSPAN_BF16
} longspan_matrix;

// Stands for data[row][column] * row_scale[row] + bias[column]: what a linear layer gives, once its matrix product is
// done.
typedef struct longspan_product {
  longspan_matrix data;
  const float *row_scale;  // null: 1
  const float *bias;       // null: 0
} longspan_product;

// Where the numbers go: as they are, quantized, or both.
typedef struct longspan_result {
  longspan_matrix out;       // data null: only quantized
  uint8_t *quantized;        // round(x / scale[row]) + 128; null: not quantized
  int64_t quantized_stride;
  float *scale;              // max |x| / 127 of each row
} longspan_result;

enum longspan_activation {
  LONGSPAN_GELU = 0,       // x * Phi(x). float out: to 1e-6 of its value down to x = -3, to 1e-5 down to -8
  LONGSPAN_GELU_TANH = 1,  // its approximation by tanh
  LONGSPAN_RELU = 2,
  LONGSPAN_SILU = 3
};

// sum = residual + product, normalized to weight * (sum - mean) / sqrt(variance + epsilon) + bias.
typedef struct longspan_norm {
  longspan_matrix residual;  // data null: 0
  longspan_matrix sum;       // data null: not kept. May be the residual
  const float *weight;       // [width]
  const float *bias;         // [width]; null: 0
  float epsilon;
} longspan_norm;

// Turns the first `heads` groups of `head_width` columns by the position of their row:
// (a, b) -> (a cos - b sin, b cos + a sin) for a in the first half of the group and b at the same place in the second.
typedef struct longspan_rotary {
  int64_t heads;             // of q and k together, in a projection to q, k, v
  int64_t head_width;        // even
  const float *cos, *sin;    // [position][head_width / 2 or more]: the first half is read
  int64_t table_stride;
  const int64_t *positions;  // of the rows; null: row r stands at position r
} longspan_rotary;

// out = product. With quantized: quantization. With row_scale: its undoing.
LONGSPAN_API int longspan_rows_copy(int64_t rows, int64_t width, const longspan_product *from,
                                    const longspan_result *to);

// out = activation(product). gated: the product has 2 * width columns, and out = activation(first half) * second half.
LONGSPAN_API int longspan_rows_activate(int64_t rows, int64_t width, const longspan_product *from, int32_t activation,
                                        int32_t gated, const longspan_result *to);

LONGSPAN_API int longspan_rows_normalize(int64_t rows, int64_t width, const longspan_product *from,
                                         const longspan_norm *norm, const longspan_result *to);

LONGSPAN_API int longspan_rows_rotate(int64_t rows, int64_t width, const longspan_product *from,
                                      const longspan_rotary *rotary, const longspan_result *to);

#ifdef __cplusplus
}
#endif
