// What the instruction sets and the part that chooses among them know of each other.
#pragma once
#include "longspan.h"
#include "longspan_linear.h"
#include "longspan_rows.h"

namespace longspan {

// The arguments are those of longspan.h, already checked.
struct AttentionKernels {
  int (*forward)(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes);
  int (*backward)(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes);
};

// The arguments are those of longspan_rows.h, already checked.
struct RowKernels {
  int (*copy)(int64_t rows, int64_t width, const longspan_product& from, const longspan_result& to);
  int (*activate)(int64_t rows, int64_t width, const longspan_product& from, int32_t activation, bool gated,
                  const longspan_result& to);
  int (*normalize)(int64_t rows, int64_t width, const longspan_product& from, const longspan_norm& norm,
                   const longspan_result& to);
  int (*rotate)(int64_t rows, int64_t width, const longspan_product& from, const longspan_rotary& rotary,
                const longspan_result& to);
};

// The arguments are those of longspan_linear.h, already checked. The sets from `avx2` on have them.
struct LinearKernels {
  int64_t (*packed_bytes)(int64_t in_features, int64_t out_features, int32_t terms);
  void (*pack)(int32_t dtype, const void* weight, int64_t stride, int64_t in_features, int64_t out_features,
               int32_t terms, void* packed);
  int (*forward)(const longspan_linear& call);
  int (*layer_forward)(const longspan_layer& layer, const longspan_layer_rows& call);
};

// Of the chosen instruction set.
const RowKernels& row_kernels();
const LinearKernels* linear_kernels();  // null where it has none

// At least `bytes` of memory that belong to the calling thread until its next call for the same purpose; null where
// there is none. Kept between calls: fresh memory costs more than small attentions do.
enum Purpose { IN_A_KERNEL, BETWEEN_KERNELS };
void* thread_workspace(int64_t bytes, Purpose purpose = IN_A_KERNEL);

}  // namespace longspan
