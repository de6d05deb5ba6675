// All kernels for one instruction set. Compiled once per set, with -DLONGSPAN_SET=<name> and the compiler flags of the set.
#include "attention_backward.h"
#include "attention_forward.h"
#include "rows.h"
#if LONGSPAN_AVX512 || LONGSPAN_AVX2
#define LONGSPAN_HAS_LINEAR 1
#include "layer.h"
#endif

namespace longspan::LONGSPAN_SET {

static int forward(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes) {
  return call.dtype == LONGSPAN_F32 ? run_pass<Forward<Float32Tiles>>(call, lanes, num_lanes)
                                    : run_pass<Forward<Bfloat16Tiles>>(call, lanes, num_lanes);
}

static int backward(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes) {
  return call.dtype == LONGSPAN_F32 ? run_backward<Float32Tiles>(call, lanes, num_lanes)
                                    : run_backward<Bfloat16Tiles>(call, lanes, num_lanes);
}

extern const AttentionKernels attention = {forward, backward};
extern const RowKernels rows = {copy_rows, activate_rows, normalize_rows, rotate_rows};
#if LONGSPAN_HAS_LINEAR
extern const LinearKernels linear = {linear_packed_bytes, linear_pack, linear_forward, layer_forward};
#endif

}  // namespace longspan::LONGSPAN_SET
