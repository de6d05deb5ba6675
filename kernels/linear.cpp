// The C interface of the linear layers: checks what it is given, and hands it to the instruction set that has them.
#include "dispatch.h"

namespace longspan {

namespace {

constexpr int64_t MOST = int64_t{1} << 40;  // numbers in a matrix: keeps their bytes in range
constexpr uintptr_t ALIGNMENT = 64;

bool is_dtype(int32_t dtype) { return dtype == LONGSPAN_F32 || dtype == LONGSPAN_BF16; }
bool is_matrix(int64_t rows, int64_t width) { return rows >= 0 && width >= 1 && width <= MOST && rows <= MOST / width; }
bool is_weight(int64_t in_features, int64_t out_features) {
  return out_features >= 1 && is_matrix(out_features, in_features);
}
bool are_terms(int32_t dtype, int32_t terms) {
  if (dtype == LONGSPAN_INT8) return terms == LONGSPAN_BYTES;
  return is_dtype(dtype) && terms >= 1 && terms <= (dtype == LONGSPAN_F32 ? 3 : 1);
}
bool is_packed(const void* packed) { return packed && reinterpret_cast<uintptr_t>(packed) % ALIGNMENT == 0; }

bool are_weights(const longspan_linear& call) {
  if (!are_terms(call.dtype, call.terms) || !is_dtype(call.out_dtype)) return false;
  if (call.activation < LONGSPAN_NO_ACTIVATION || call.activation > LONGSPAN_SILU) return false;
  return is_weight(call.in_features, call.out_features) && is_packed(call.packed) &&
         (call.dtype != LONGSPAN_INT8 || call.weight_scale);
}

bool is_call(const longspan_linear* call) {
  if (!call || !are_weights(*call)) return false;
  if (call->dtype == LONGSPAN_INT8 && call->rows > 0 && !call->row_scale) return false;
  return is_matrix(call->rows, call->in_features) && is_matrix(call->rows, call->out_features) &&
         (call->rows == 0 || (call->in && call->out));
}

int32_t dtype_of_rows(const longspan_linear& linear) { return linear.dtype == LONGSPAN_F32 ? LONGSPAN_F32 : LONGSPAN_BF16; }

bool is_part(const longspan_linear& linear, const longspan_linear& like, int64_t in_features) {
  return are_weights(linear) && linear.dtype == like.dtype && linear.terms == like.terms && !linear.residual &&
         linear.out_dtype == dtype_of_rows(like) && linear.in_features == in_features;
}

bool is_layer(const longspan_layer* layer) {
  if (!layer || !are_weights(layer->out)) return false;
  const longspan_linear& out = layer->out;
  const int64_t width = out.out_features, ffn_width = layer->ffn_out.in_features;
  return is_part(out, out, out.in_features) && is_part(layer->ffn_in, out, width) &&
         is_part(layer->ffn_out, out, ffn_width) && layer->ffn_out.out_features == width &&
         (layer->gated == 0 || layer->gated == 1) && layer->ffn_in.out_features == ffn_width * (1 + layer->gated) &&
         (!layer->qkv.packed || is_part(layer->qkv, out, width)) && layer->attention_norm.weight &&
         layer->ffn_norm.weight && layer->activation >= LONGSPAN_GELU && layer->activation <= LONGSPAN_SILU &&
         (layer->pre_norm == 0 || layer->pre_norm == 1);
}

bool are_rows(const longspan_matrix& matrix, int32_t dtype) { return matrix.data && matrix.dtype == dtype; }

bool are_layer_rows(const longspan_layer& layer, const longspan_layer_rows* call) {
  if (!call || call->rows < 0 || call->rows > MOST) return false;
  if (call->rows == 0) return true;
  const int32_t dtype = dtype_of_rows(layer.out);
  const longspan_rotary& rotary = call->rotary;
  if (!are_rows(call->attended, dtype) || !are_rows(call->stream, layer.pre_norm ? LONGSPAN_F32 : dtype)) return false;
  if (call->normed.data && !are_rows(call->normed, dtype)) return false;
  if (!layer.qkv.packed) return true;
  return are_rows(call->qkv, dtype) &&
         (rotary.heads == 0 || (rotary.heads > 0 && rotary.cos && rotary.sin && rotary.head_width >= 2 &&
                                rotary.head_width % 2 == 0 && !rotary.positions &&
                                rotary.heads <= layer.qkv.out_features / rotary.head_width));
}

}  // namespace
}  // namespace longspan

using namespace longspan;

extern "C" {

int longspan_linear_is_available(void) { return linear_kernels() != nullptr; }

int64_t longspan_linear_packed_bytes(int64_t in_features, int64_t out_features, int32_t terms) {
  if (!linear_kernels() || !is_weight(in_features, out_features) ||
      (terms != LONGSPAN_BYTES && !are_terms(LONGSPAN_F32, terms))) {
    return -1;
  }
  return linear_kernels()->packed_bytes(in_features, out_features, terms);
}

int longspan_linear_pack(int32_t dtype, const void* weight, int64_t stride, int64_t in_features, int64_t out_features,
                         int32_t terms, void* packed) {
  if (!linear_kernels() || !weight || !is_weight(in_features, out_features) || !are_terms(dtype, terms) ||
      !is_packed(packed)) {
    return LONGSPAN_BAD_ARGUMENT;
  }
  longspan_prefer_huge_pages(packed, linear_kernels()->packed_bytes(in_features, out_features, terms));
  linear_kernels()->pack(dtype, weight, stride, in_features, out_features, terms, packed);
  return LONGSPAN_OK;
}

int longspan_linear_forward(const longspan_linear* call) {
  if (!linear_kernels() || !is_call(call)) return LONGSPAN_BAD_ARGUMENT;
  return call->rows == 0 ? LONGSPAN_OK : linear_kernels()->forward(*call);
}

int longspan_layer_forward(const longspan_layer* layer, const longspan_layer_rows* call) {
  if (!linear_kernels() || !is_layer(layer) || !are_layer_rows(*layer, call)) return LONGSPAN_BAD_ARGUMENT;
  return linear_kernels()->layer_forward(*layer, *call);
}
}
