// All of a layer after attention in one call against the same steps one by one. Exits with 1 on a failure.
#include <stdio.h>
#include <stdlib.h>

#include "../longspan_linear.h"
#include "attention_cases.h"
#include "check.h"

namespace {

constexpr int64_t INNER = 40, WIDTH = 72, FFN = 100;

struct Layer {
  longspan_layer description = {};

  Layer(int32_t dtype, bool pre_norm, bool gated, bool is_last, Random& random) : random_(random), dtype_(dtype) {
    description.out = linear(INNER, WIDTH);
    description.ffn_in = linear(WIDTH, FFN * (1 + gated));
    description.ffn_out = linear(FFN, WIDTH);
    if (!is_last) description.qkv = linear(WIDTH, 3 * INNER);
    if (!gated) description.ffn_in.activation = LONGSPAN_GELU;
    description.attention_norm = norm();
    description.ffn_norm = norm();
    description.pre_norm = pre_norm;
    description.activation = LONGSPAN_GELU;
    description.gated = gated;
  }
  ~Layer() {
    for (void* memory : memory_) free(memory);
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

 private:
  longspan_linear linear(int64_t in_features, int64_t out_features) {
    longspan_linear made = {};
    made.dtype = dtype_;
    made.out_dtype = dtype_ == LONGSPAN_F32 ? LONGSPAN_F32 : LONGSPAN_BF16;
    made.terms = dtype_ == LONGSPAN_F32 ? 2 : dtype_ == LONGSPAN_BF16 ? 1 : LONGSPAN_BYTES;
    made.activation = LONGSPAN_NO_ACTIVATION;
    made.in_features = in_features;
    made.out_features = out_features;
    void* packed = nullptr;
    if (posix_memalign(&packed, 64, longspan_linear_packed_bytes(in_features, out_features, made.terms)) != 0) abort();
    memory_.push_back(packed);
    if (dtype_ == LONGSPAN_INT8) {
      std::vector<int8_t> weight(out_features * in_features);
      for (int8_t& byte : weight) byte = static_cast<int8_t>(random_.between(-127, 127));
      longspan_linear_pack(dtype_, weight.data(), in_features, in_features, out_features, made.terms, packed);
      made.weight_scale = numbers(out_features, 1e-3);
    } else {
      Matrix weight(out_features, in_features, in_features, dtype_);
      for (int64_t row = 0; row < out_features; ++row) weight.fill_row(row, 0.1, random_);
      longspan_linear_pack(dtype_, weight.data(), in_features, in_features, out_features, made.terms, packed);
    }
    made.packed = packed;
    made.bias = numbers(out_features, 1);
    return made;
  }

  longspan_norm norm() {
    longspan_norm made = {};
    made.weight = numbers(WIDTH, 1);
    made.bias = numbers(WIDTH, 1);
    made.epsilon = 1e-5f;
    return made;
  }

  const float* numbers(int64_t count, double size) {
    float* values = static_cast<float*>(malloc(count * sizeof(float)));
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(size * random_.gaussian());
    memory_.push_back(values);
    return values;
  }

  Random& random_;
  int32_t dtype_;
  std::vector<void*> memory_;
};

longspan_matrix as_matrix(Matrix& matrix, int64_t stride, int32_t dtype) { return {matrix.data(), stride, dtype}; }

// The same by the functions for one step each, all rows at a time.
void run_steps(const longspan_layer& layer, const longspan_layer_rows& call) {
  const int64_t rows = call.rows;
  const int32_t dtype = call.attended.dtype;
  const bool in_8_bits = layer.out.dtype == LONGSPAN_INT8, is_last = !layer.qkv.packed;
  Matrix sum(rows, WIDTH, WIDTH, dtype), read(rows, WIDTH, WIDTH, dtype);
  Matrix product(rows, 2 * FFN, 2 * FFN, dtype), inner(rows, FFN, FFN, dtype);
  std::vector<uint8_t> bytes(rows * 2 * FFN);
  std::vector<float> scale(rows);
  const auto result = [&](const longspan_matrix& out, bool quantizes, int64_t width) {
    longspan_result to = {};
    to.out = out;
    if (quantizes) to = {out, bytes.data(), width, scale.data()};
    return to;
  };
  const auto multiply = [&](longspan_linear linear, const longspan_matrix& in, const longspan_matrix& out) {
    linear.rows = rows;
    linear.in = in_8_bits ? bytes.data() : in.data;
    linear.in_stride = in_8_bits ? linear.in_features : in.stride;
    linear.row_scale = scale.data();
    linear.out = out.data;
    linear.out_stride = out.stride;
    CHECK(longspan_linear_forward(&linear) == LONGSPAN_OK, "a product fails");
  };
  const auto add = [&](longspan_norm norm, bool keeps, const longspan_matrix& out, bool quantizes) {
    norm.residual = call.stream;
    if (keeps) norm.sum = call.stream;
    const longspan_product from = {as_matrix(sum, WIDTH, dtype), nullptr, nullptr};
    const longspan_result to = result(out, quantizes, WIDTH);
    CHECK(longspan_rows_normalize(rows, WIDTH, &from, &norm, &to) == LONGSPAN_OK, "a norm fails");
  };
  const auto copy = [&](const longspan_matrix& x, int64_t width) {
    const longspan_product from = {x, nullptr, nullptr};
    const longspan_result to = result({}, true, width);
    CHECK(longspan_rows_copy(rows, width, &from, &to) == LONGSPAN_OK, "quantization fails");
  };
  const longspan_matrix whole = as_matrix(sum, WIDTH, dtype), beside = as_matrix(read, WIDTH, dtype);
  if (in_8_bits) copy(call.attended, INNER);
  multiply(layer.out, call.attended, whole);
  const longspan_matrix first = layer.pre_norm ? beside : call.stream;
  add(layer.attention_norm, layer.pre_norm, first, in_8_bits);
  const longspan_matrix wide = as_matrix(product, 2 * FFN, dtype), narrow = as_matrix(inner, FFN, dtype);
  multiply(layer.ffn_in, first, layer.gated ? wide : narrow);
  if (layer.gated) {
    const longspan_product from = {wide, nullptr, nullptr};
    const longspan_result to = result(in_8_bits ? longspan_matrix{} : narrow, in_8_bits, FFN);
    CHECK(longspan_rows_activate(rows, FFN, &from, layer.activation, 1, &to) == LONGSPAN_OK, "a gate fails");
  } else if (in_8_bits) {
    copy(narrow, FFN);
  }
  multiply(layer.ffn_out, narrow, whole);
  const bool changes_stream = is_last || !layer.pre_norm;
  const longspan_matrix next = changes_stream ? call.stream : call.normed;
  add(layer.ffn_norm, !changes_stream, next, in_8_bits && !is_last);
  if (is_last) return;
  multiply(layer.qkv, next, call.qkv);
  if (call.rotary.heads == 0) return;
  const longspan_product from = {call.qkv, nullptr, nullptr};
  longspan_result to = {};
  to.out = call.qkv;
  CHECK(longspan_rows_rotate(rows, 3 * INNER, &from, &call.rotary, &to) == LONGSPAN_OK, "turning fails");
}

void compare(int64_t rows, int32_t dtype, bool pre_norm, bool gated, bool is_last, bool turns, Random& random) {
  const Layer layer(dtype, pre_norm, gated, is_last, random);
  const int32_t row_dtype = dtype == LONGSPAN_F32 ? LONGSPAN_F32 : LONGSPAN_BF16;
  const int32_t stream_dtype = pre_norm ? LONGSPAN_F32 : row_dtype;
  Matrix attended(rows, INNER, INNER + 3, row_dtype), stream(rows, WIDTH, WIDTH + 1, stream_dtype);
  std::vector<float> turning(2 * rows * 4);
  for (float& value : turning) value = static_cast<float>(random.gaussian());
  for (int64_t row = 0; row < rows; ++row) {
    attended.fill_row(row, 1, random);
    stream.fill_row(row, 1, random);
  }
  Matrix streams[2] = {stream, stream};
  std::vector<Matrix> qkv(2, Matrix(rows, 3 * INNER, 3 * INNER + 2, row_dtype));
  std::vector<Matrix> normed(2, Matrix(rows, WIDTH, WIDTH, row_dtype));
  for (int one_call = 0; one_call < 2; ++one_call) {
    longspan_layer_rows call = {};
    call.rows = rows;
    call.attended = as_matrix(attended, INNER + 3, row_dtype);
    call.stream = as_matrix(streams[one_call], WIDTH + 1, stream_dtype);
    call.normed = as_matrix(normed[one_call], WIDTH, row_dtype);
    call.qkv = as_matrix(qkv[one_call], 3 * INNER + 2, row_dtype);
    if (turns) call.rotary = {10, 8, turning.data(), turning.data() + rows * 4, 4, nullptr};
    if (one_call) {
      CHECK(longspan_layer_forward(&layer.description, &call) == LONGSPAN_OK, "the call fails");
    } else {
      run_steps(layer.description, call);
    }
  }
  CHECK(streams[0].bytes() == streams[1].bytes() && qkv[0].bytes() == qkv[1].bytes(),
        "differs: %d rows, dtype %d, pre-norm %d, gated %d, last %d, turns %d", (int)rows, dtype, pre_norm, gated,
        is_last, turns);
}

void test_one_call_is_all_its_steps() {
  Random random(21);
  for (const int64_t rows : {1, 16, 33, 97, 1100}) {
    for (const int32_t dtype : {int32_t{LONGSPAN_F32}, int32_t{LONGSPAN_BF16}, int32_t{LONGSPAN_INT8}}) {
      for (int kind = 0; kind < 16; ++kind) {
        if (rows > 1000 && kind % 5 != 0) continue;
        compare(rows, dtype, kind & 1, kind & 2, kind & 4, kind & 8, random);
      }
    }
  }
}

void test_calls_that_do_not_fit_are_refused() {
  Random random(22);
  const Layer layer(LONGSPAN_F32, false, false, false, random);
  Matrix attended(4, INNER, INNER, LONGSPAN_F32), stream(4, WIDTH, WIDTH, LONGSPAN_F32);
  Matrix qkv(4, 3 * INNER, 3 * INNER, LONGSPAN_F32);
  longspan_layer_rows good = {};
  good.rows = 4;
  good.attended = as_matrix(attended, INNER, LONGSPAN_F32);
  good.stream = as_matrix(stream, WIDTH, LONGSPAN_F32);
  good.qkv = as_matrix(qkv, 3 * INNER, LONGSPAN_F32);
  const auto refuses = [&](auto change) {
    longspan_layer description = layer.description;
    longspan_layer_rows call = good;
    change(description, call);
    CHECK(longspan_layer_forward(&description, &call) == LONGSPAN_BAD_ARGUMENT, "takes what does not fit");
  };
  refuses([](longspan_layer& one, longspan_layer_rows&) { one.ffn_out.in_features = FFN + 1; });
  refuses([](longspan_layer& one, longspan_layer_rows&) { one.gated = 1; });
  refuses([](longspan_layer& one, longspan_layer_rows&) { one.ffn_norm.weight = nullptr; });
  refuses([](longspan_layer& one, longspan_layer_rows&) { one.qkv.terms = 3; });
  refuses([](longspan_layer&, longspan_layer_rows& call) { call.stream.data = nullptr; });
  refuses([](longspan_layer&, longspan_layer_rows& call) { call.qkv.dtype = LONGSPAN_BF16; });
  refuses([](longspan_layer&, longspan_layer_rows& call) { call.rotary.heads = 1; });
}

}  // namespace

int main() {
  with_each_set([](const char* set) {
    if (!longspan_linear_is_available()) {
      printf("%s has no linear layers\n", set);
      return;
    }
    test_one_call_is_all_its_steps();
    test_calls_that_do_not_fit_are_refused();
    printf("%s: %d failures so far\n", set, failures);
  });
  return failures ? 1 : 0;
}
