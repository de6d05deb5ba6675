// The C interface of longspan's linear layers: out = activation(in . weight^T + bias) + residual.
//
// AMX tiles multiply bf16 numbers and add up in fp32. For fp32 layers, numbers are taken apart there into terms, bf16
// numbers that add up to them (Henry, Tang, Heinecke 2019, arXiv 1904.06376). Vectors multiply fp32 numbers as they are,
// unless one term is asked for. The error is that of the whole result, relative:
//   terms 3: all 24 bits, 6 products a number: as exact as an fp32 product, 3e-7
//   terms 2: 16 bits, 3 products: 5e-6
//   terms 1: 8 bits, 1 product: bf16, 2e-3
//   LONGSPAN_BYTES: the int8 product of quantized numbers, exact up to the rounding of its sum to fp32
// Numbers below 1e-38, and parts of numbers, count as 0. Infinity may give NaN.
#pragma once
#include "longspan.h"
#include "longspan_rows.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LONGSPAN_NO_ACTIVATION (-1)
#define LONGSPAN_BYTES 0  // in place of terms
#define LONGSPAN_INT8 2   // beside longspan_dtype: int8 in weights, and number + 128 in uint8 in rows

// Strides count numbers from one row to the next; numbers within a row are adjacent.
typedef struct longspan_linear {
  int32_t dtype;       // of in; bf16 has terms 1, int8 LONGSPAN_BYTES
  int32_t out_dtype;   // of residual and out
  int32_t terms;       // as in `packed`
  int32_t activation;  // a longspan_activation or LONGSPAN_NO_ACTIVATION
  int64_t rows, in_features, out_features;
  int64_t in_stride, residual_stride, out_stride;
  const void *in;
  const void *packed;    // of longspan_linear_pack
  const float *row_scale, *weight_scale;  // of int8: an integer product counts row_scale[row] * weight_scale[column]
  const float *bias;     // null: 0
  const void *residual;  // null: 0. May be `out` itself
  void *out;             // shares no memory with in
} longspan_linear;

// 1 where the instruction set in use has these functions; without, they return BAD_ARGUMENT.
LONGSPAN_API int longspan_linear_is_available(void);
// Of what longspan_linear_pack writes. -1: not a size that it takes.
LONGSPAN_API int64_t longspan_linear_packed_bytes(int64_t in_features, int64_t out_features, int32_t terms);
// weight [out_features][in_features], laid out for the instruction set in use. `packed` begins at a multiple of 64 bytes.
LONGSPAN_API int longspan_linear_pack(int32_t dtype, const void *weight, int64_t stride, int64_t in_features,
                                      int64_t out_features, int32_t terms, void *packed);
LONGSPAN_API int longspan_linear_forward(const longspan_linear *call);

// What follows attention in a layer of a transformer encoder, up to the next attention: output projection, norm,
// feed-forward, norm, and the projection to the next layer's queries, keys and values. The linear layers come without
// rows, in, out and their strides, and the norms without matrices; all linear layers have one dtype and no residual.
typedef struct longspan_layer {
  longspan_linear out, ffn_in, ffn_out;
  longspan_linear qkv;  // packed null: this layer is the last
  longspan_norm attention_norm, ffn_norm;
  int32_t pre_norm;     // 0: norms are of the stream itself. 1: of what the linear layers read of it, so that
                        // attention_norm stands before this feed-forward, and ffn_norm before what follows it
  int32_t activation;   // a longspan_activation
  int32_t gated;        // 1: as in longspan_rows_activate. 0: ffn_in computes the activation
} longspan_layer;

// The rows of a call. attended and qkv have the products' dtype, bf16 for int8. The stream has it too or, with pre_norm,
// is fp32.
typedef struct longspan_layer_rows {
  int64_t rows;
  longspan_matrix attended;
  longspan_matrix stream;
  longspan_matrix normed;   // with pre_norm, what qkv reads. data null: not kept
  longspan_matrix qkv;
  longspan_rotary rotary;   // of qkv. heads 0: none
} longspan_layer_rows;

// A block of rows at a time, all the way, so that what lies between two products stays in the caches of one core.
LONGSPAN_API int longspan_layer_forward(const longspan_layer *layer, const longspan_layer_rows *call);

#ifdef __cplusplus
}
#endif
