// Linear layers: which of the formats a call is computed in.
#pragma once
#include "dispatch.h"
#if defined(__AMX_BF16__)
#include "linear_amx.h"
#else
#include "linear_vectors.h"
#endif

namespace longspan::LONGSPAN_SET {

// Calls use(Linear<format>()).
template <class Use>
ALWAYS_INLINE auto with_terms(int32_t terms, Use use) {
  return terms == 1 ? use(Linear<Terms<1>>()) : terms == 2 ? use(Linear<Terms<2>>()) : use(Linear<Terms<3>>());
}

static int64_t linear_packed_bytes(int64_t in_features, int64_t out_features, int32_t terms) {
  if (terms == LONGSPAN_BYTES) return Linear<Int8>::packed_bytes(in_features, out_features);
  return with_terms(terms, [&](auto linear) { return linear.packed_bytes(in_features, out_features); });
}

static void linear_pack(int32_t dtype, const void* weight, int64_t stride, int64_t in_features, int64_t out_features,
                        int32_t terms, void* packed) {
  uint8_t* to = static_cast<uint8_t*>(packed);
  if (dtype == LONGSPAN_INT8) {
    return Linear<Int8>::pack(static_cast<const int8_t*>(weight), stride, in_features, out_features, to);
  }
  if (dtype == LONGSPAN_BF16) {
    return Linear<Terms<1>>::pack(static_cast<const bfloat16*>(weight), stride, in_features, out_features, to);
  }
  with_terms(terms, [&](auto linear) {
    linear.pack(static_cast<const float*>(weight), stride, in_features, out_features, to);
  });
}

static int linear_forward(const longspan_linear& call) {
  if (call.dtype == LONGSPAN_INT8) return Linear<Int8>::run<uint8_t>(call);
  if (call.dtype == LONGSPAN_BF16) return Linear<Terms<1>>::run<bfloat16>(call);
  return with_terms(call.terms, [&](auto linear) { return linear.template run<float>(call); });
}

}  // namespace longspan::LONGSPAN_SET
