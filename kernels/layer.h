// What follows attention in a layer, in one call. The interface is told in longspan_linear.h.
#pragma once
#include <omp.h>

#include "dispatch.h"
#include "linear.h"
#include "rows.h"

namespace longspan::LONGSPAN_SET {

ALWAYS_INLINE int64_t bytes_of(int32_t dtype) { return dtype == LONGSPAN_F32 ? 4 : 2; }

ALWAYS_INLINE longspan_matrix rows_from(const longspan_matrix& matrix, int64_t first) {
  longspan_matrix part = matrix;
  if (part.data) part.data = static_cast<uint8_t*>(part.data) + first * part.stride * bytes_of(part.dtype);
  return part;
}

// The way of a few rows through a layer, in memory of their own where nobody else reads them.
class LayerBlock {
 public:
  // Bytes of that memory for `rows`.
  static int64_t memory(const longspan_layer& layer, int64_t rows) {
    LayerBlock block(layer, rows, nullptr);
    return reinterpret_cast<intptr_t>(block.end_);
  }

  LayerBlock(const longspan_layer& layer, int64_t most_rows, uint8_t* memory)
      : layer_(layer), in_8_bits_(layer.out.dtype == LONGSPAN_INT8), end_(memory) {
    const int64_t width = layer.out.out_features, ffn_width = layer.ffn_out.in_features;
    sum_ = matrix(most_rows, width);
    ffn_product_ = matrix(most_rows, layer.ffn_in.out_features);
    if (layer.pre_norm && !in_8_bits_) read_ = matrix(most_rows, width);
    if (!in_8_bits_) return;
    bytes_ = take(most_rows * larger(larger(width, ffn_width), layer.out.in_features));
    scale_ = reinterpret_cast<float*>(take(most_rows * static_cast<int64_t>(sizeof(float))));
  }

  int run(const longspan_layer_rows& call, int64_t first, int64_t rows) {
    const bool is_last = !layer_.qkv.packed;
    const bool changes_stream = is_last || !layer_.pre_norm;  // by the second norm
    const longspan_matrix attended = rows_from(call.attended, first), stream = rows_from(call.stream, first);
    const longspan_matrix normed = rows_from(call.normed, first), qkv = rows_from(call.qkv, first);
    rows_ = rows;

    if (in_8_bits_) keep(copy_rows(rows, layer_.out.in_features, product(attended), quantized(layer_.out.in_features)));
    multiply(layer_.out, attended, sum_);
    const longspan_matrix read = layer_.pre_norm ? read_ : stream;
    add_and_norm(layer_.attention_norm, stream, layer_.pre_norm, read, in_8_bits_);

    multiply(layer_.ffn_in, read, ffn_product_);
    const int64_t ffn_width = layer_.ffn_out.in_features;
    longspan_result inner = in_8_bits_ ? quantized(ffn_width) : longspan_result{ffn_product_, nullptr, 0, nullptr};
    if (layer_.gated) {
      keep(activate_rows(rows, ffn_width, product(ffn_product_), layer_.activation, true, inner));
    } else if (in_8_bits_) {
      keep(copy_rows(rows, ffn_width, product(ffn_product_), inner));
    }
    multiply(layer_.ffn_out, ffn_product_, sum_);
    const longspan_matrix next = changes_stream ? stream : normed.data ? normed : read_;
    add_and_norm(layer_.ffn_norm, stream, !changes_stream, next, in_8_bits_ && !is_last);
    if (is_last) return status_;

    multiply(layer_.qkv, next, qkv);
    if (call.rotary.heads > 0) {
      longspan_rotary rotary = call.rotary;
      rotary.cos += first * rotary.table_stride;
      rotary.sin += first * rotary.table_stride;
      const int64_t turned = rotary.heads * rotary.head_width;
      keep(rotate_rows(rows, turned, product(qkv), rotary, longspan_result{qkv, nullptr, 0, nullptr}));
    }
    return status_;
  }

 private:
  uint8_t* take(int64_t bytes) {
    uint8_t* begin = end_;
    end_ = reinterpret_cast<uint8_t*>(reinterpret_cast<intptr_t>(end_) + round_up(bytes, CACHE_LINE));
    return begin;
  }

  longspan_matrix matrix(int64_t rows, int64_t width) {
    const int32_t dtype = layer_.out.out_dtype;
    return {take(rows * width * bytes_of(dtype)), width, dtype};
  }

  static longspan_product product(const longspan_matrix& data) { return {data, nullptr, nullptr}; }
  longspan_result quantized(int64_t width) const { return {{}, bytes_, width, scale_}; }
  void keep(int status) { status_ = status == LONGSPAN_OK ? status_ : status; }

  // Reads the bytes instead of x where there are bytes.
  void multiply(const longspan_linear& weights, const longspan_matrix& x, const longspan_matrix& out) {
    longspan_linear call = weights;
    call.rows = rows_;
    call.in = in_8_bits_ ? bytes_ : x.data;
    call.in_stride = in_8_bits_ ? weights.in_features : x.stride;
    call.row_scale = scale_;
    call.out = out.data;
    call.out_stride = out.stride;
    keep(linear_forward(call));
  }

  void add_and_norm(const longspan_norm& weights, const longspan_matrix& stream, bool keeps_sum,
                    const longspan_matrix& out, bool quantizes) {
    longspan_norm norm = weights;
    norm.residual = stream;
    norm.sum = keeps_sum ? stream : longspan_matrix{};
    const int64_t width = layer_.out.out_features;
    longspan_result result = quantizes ? quantized(width) : longspan_result{};
    result.out = out;
    keep(normalize_rows(rows_, width, product(sum_), norm, result));
  }

  const longspan_layer& layer_;
  const bool in_8_bits_;
  uint8_t* end_;
  longspan_matrix sum_ = {}, ffn_product_ = {}, read_ = {};
  uint8_t* bytes_ = nullptr;
  float* scale_ = nullptr;
  int64_t rows_ = 0;
  int status_ = LONGSPAN_OK;
};

static int layer_forward(const longspan_layer& layer, const longspan_layer_rows& call) {
  if (call.rows == 0) return LONGSPAN_OK;
  const int64_t most_threads = threads_to_take();
  const int64_t wanted = most_threads * divide_up(call.rows, most_threads * LAYER_ROWS);
  const int64_t rows = round_up(divide_up(call.rows, wanted), SQUARE), blocks = divide_up(call.rows, rows);
  const int64_t bytes = LayerBlock::memory(layer, rows);
  const int threads = static_cast<int>(smaller(most_threads, blocks));
  int64_t next = 0;
  int status = LONGSPAN_OK;
  const auto work = [&] {
    uint8_t* memory = static_cast<uint8_t*>(thread_workspace(bytes, BETWEEN_KERNELS));
    int64_t number;
    while ((number = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < blocks) {
      const int64_t first = number * rows;
      const int found = memory ? LayerBlock(layer, rows, memory).run(call, first, smaller(rows, call.rows - first))
                               : LONGSPAN_NO_MEMORY;
      if (found != LONGSPAN_OK) __atomic_store_n(&status, found, __ATOMIC_RELAXED);
    }
  };
  if (threads == 1) {  // the kernels share out their own work; within a region of one thread they would start new threads
    work();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  return status;
}

}  // namespace longspan::LONGSPAN_SET
