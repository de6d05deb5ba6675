// The C interface of longspan's CPU kernels. No torch, no Python: addresses, strides and numbers.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LONGSPAN_API __attribute__((visibility("default")))

enum longspan_dtype { LONGSPAN_F32 = 0, LONGSPAN_BF16 = 1 };
enum longspan_status { LONGSPAN_OK = 0, LONGSPAN_BAD_ARGUMENT = 1, LONGSPAN_NO_MEMORY = 2 };

// What all lanes of one call share. Strides count elements from one row to the next; numbers within a row are adjacent.
typedef struct longspan_attention {
  int32_t dtype;       // of q, k, v, grad_out
  int32_t out_dtype;   // of out: dtype, or F32
  int32_t grad_dtype;  // of grad_q, grad_k, grad_v: dtype, or F32
  int32_t accumulate;  // 1: forward merges with what out and lse hold, backward adds to the gradients
  int64_t width;       // numbers in a row, any
  float scale;         // of q . k
  int64_t q_stride, k_stride, v_stride, out_stride, lse_stride;
  int64_t query_mask_stride, key_mask_stride;
  int64_t grad_out_stride, grad_q_stride, grad_k_stride, grad_v_stride;
} longspan_attention;

// What is added to the scaled scores by distance: values[m - first] where the key stands m steps after its query; beyond
// either end, what stands there. The first and the last LONGSPAN_BIAS_MARGIN of the values must be alike. Null: nothing.
// gradient: of the values, added to by the backward pass; null: not wanted. Lanes may share both.
enum { LONGSPAN_BIAS_MARGIN = 16 };
typedef struct longspan_bias {
  const float *values;
  float *gradient;
  int64_t first, count;
} longspan_bias;

// One sequence of one head. Query i stands at key positions[i]. It sees the keys j with
// position - before * dilation <= j <= position + after * dilation, (j - position) % dilation == 0 and key_mask[j] != 0,
// and the extra keys, each once.
typedef struct longspan_lane {
  const void *q, *k, *v;
  void *out;
  float *lse;  // natural log of the softmax sum of each row; -inf where a row sees nothing (its out is 0)
  int64_t queries, keys;
  int64_t before, after;       // in keys of the dilation grid; `keys` or more: no limit
  int64_t dilation;            // at least 1; 1 where positions are given
  const int64_t *positions;    // of the queries among the keys, contiguous; null: query i stands at key i
  const uint8_t *query_mask;   // 0: padding, its row gives 0 and -inf and is never read; null: all tokens
  const uint8_t *key_mask;     // 0: never seen, never read; null: all seen. Must be 0 at the extra keys
  const int64_t *extra;        // keys seen from any distance; contiguous, ascending
  int64_t extras;
  int64_t extra_causal;        // 1: an extra key is seen only from its own position on
  longspan_bias bias;          // of the band, in steps of `dilation` keys
  longspan_bias extra_bias;    // of the extra keys, in steps of one key
  // Backward only. lse is that of the forward pass over all lanes of a row (of all calls, where calls accumulate).
  // So is out, which is only read then.
  const void *grad_out;
  const float *grad_lse;       // lse_stride apart; null: 0
  float *delta;                // becomes sum(grad_out * out) - grad_lse of each row, lse_stride apart; finite before
  void *grad_q, *grad_k, *grad_v;
} longspan_lane;

// Lanes of one call never share rows of out, grad_q, grad_k or grad_v. Rows that a mask hides get gradient 0.
LONGSPAN_API int longspan_attention_forward(const longspan_attention *call, const longspan_lane *lanes, int64_t num_lanes);
LONGSPAN_API int longspan_attention_backward(const longspan_attention *call, const longspan_lane *lanes, int64_t num_lanes);

// "baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16" or "amx": what this process uses. Chosen once, the best that the CPU has.
LONGSPAN_API const char *longspan_instruction_set(void);
// For tests and benchmarks: restrict the choice. BAD_ARGUMENT where the CPU or the build lacks it.
LONGSPAN_API int longspan_use_instruction_set(const char *name);
LONGSPAN_API int longspan_num_threads(void);  // of the next parallel region of the calling thread
// Asks the system to lay memory out in huge pages, of 2 MiB: before anything is written to it.
LONGSPAN_API void longspan_prefer_huge_pages(void *memory, int64_t bytes);
LONGSPAN_API int64_t longspan_interface_version(void);  // the Python side refuses another

#ifdef __cplusplus
}
#endif
