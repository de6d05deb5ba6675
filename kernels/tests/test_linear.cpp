// The linear layers against the definition in double, where this CPU has them. Exits with 1 on a failure.
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

#include "../longspan_linear.h"
#include "attention_cases.h"
#include "check.h"

namespace {

double activated(int32_t activation, double x) {
  switch (activation) {
    case LONGSPAN_GELU: return 0.5 * x * erfc(-x / sqrt(2.0));
    case LONGSPAN_GELU_TANH: return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case LONGSPAN_RELU: return x > 0 ? x : 0;
    case LONGSPAN_SILU: return x / (1 + exp(-x));
    default: return x;
  }
}

// Memory for a packed weight, at a multiple of 64 bytes and not a byte longer than it must be.
class Packed {
 public:
  Packed(const longspan_linear& call, Matrix& weight, int64_t stride)
      : bytes_(longspan_linear_packed_bytes(call.in_features, call.out_features, call.terms)) {
    if (posix_memalign(&data_, 64, bytes_) != 0) abort();
    const int status = longspan_linear_pack(call.dtype, weight.data(), stride, call.in_features, call.out_features,
                                            call.terms, data_);
    CHECK(status == LONGSPAN_OK, "packing gives status %d", status);
  }
  ~Packed() { free(data_); }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  const void* data() const { return data_; }

 private:
  int64_t bytes_;
  void* data_ = nullptr;
};

struct Case {
  longspan_linear call = {};
  int64_t weight_stride = 0;
  Matrix x, weight, residual, out;
  std::vector<float> bias;

  Case(int64_t rows, int64_t in_features, int64_t out_features, int32_t dtype, int32_t out_dtype, Random& random) {
    call.dtype = dtype;
    call.out_dtype = out_dtype;
    call.terms = 1;
    call.activation = LONGSPAN_NO_ACTIVATION;
    call.rows = rows;
    call.in_features = in_features;
    call.out_features = out_features;
    call.in_stride = in_features + random.between(0, 3);
    call.out_stride = out_features + random.between(0, 3);
    weight_stride = in_features + random.between(0, 3);
    x = filled(rows, in_features, call.in_stride, dtype, 1, random);
    weight = filled(out_features, in_features, weight_stride, dtype, 1 / sqrt(in_features), random);
    out = Matrix(rows, out_features, call.out_stride, out_dtype);
  }

  void add_bias(Random& random) {
    for (int64_t i = 0; i < call.out_features; ++i) bias.push_back(static_cast<float>(random.gaussian()));
  }

  void add_residual(Random& random) {
    call.residual_stride = call.out_features + random.between(0, 3);
    residual = filled(call.rows, call.out_features, call.residual_stride, call.out_dtype, 1, random);
  }

  int run(bool in_place = false) {
    const Packed packed(call, weight, weight_stride);
    if (in_place) out = residual;
    longspan_linear given = call;
    if (in_place) given.out_stride = call.residual_stride;
    given.in = x.data();
    given.packed = packed.data();
    given.bias = bias.empty() ? nullptr : bias.data();
    given.residual = in_place ? out.data() : residual.data();
    given.out = out.data();
    return longspan_linear_forward(&given);
  }

  double expected(int64_t row, int64_t column) {
    double sum = bias.empty() ? 0 : bias[column];
    for (int64_t k = 0; k < call.in_features; ++k) sum += x(row, k) * weight(column, k);
    return activated(call.activation, sum) + (residual.data() ? residual(row, column) : 0);
  }

  double tolerance() const {
    const double of_terms[] = {1.5e-2, 3e-5, 2e-6};
    const double products = call.dtype == LONGSPAN_BF16 ? 2e-6 : of_terms[call.terms - 1];
    return products + (call.out_dtype == LONGSPAN_BF16 ? 4e-3 : 0);
  }

  void check_result(const char* context) {
    double largest = 1, error = 0;
    for (int64_t row = 0; row < call.rows; ++row) {
      for (int64_t column = 0; column < call.out_features; ++column) {
        const double truth = expected(row, column), difference = fabs(truth - out(row, column));
        largest = std::max(largest, fabs(truth));
        error = difference <= error ? error : difference;  // NaN counts as an error
      }
    }
    CHECK(error <= tolerance() * largest,
          "off by %g of %g (%s; %d x %d x %d, bf16 %d -> %d, terms %d, activation %d, bias %d, residual %d)", error,
          largest, context, (int)call.rows, (int)call.in_features, (int)call.out_features, call.dtype,
          call.out_dtype, call.terms, call.activation, !bias.empty(), residual.data() != nullptr);
    CHECK(out.gaps_are_untouched(), "wrote between its rows (%s)", context);
  }

 private:
  static Matrix filled(int64_t rows, int64_t width, int64_t stride, int32_t dtype, double size, Random& random) {
    Matrix matrix(rows, width, stride, dtype);
    for (int64_t row = 0; row < rows; ++row) matrix.fill_row(row, size, random);
    return matrix;
  }
};

// Around the sizes where tiles, squares and stages end.
int64_t some_size(int64_t most, Random& random) {
  const int64_t corners[] = {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128};
  return std::min(most, random.chance(0.5) ? corners[random.between(0, 10)] : random.between(1, most));
}

Case random_case(int64_t most_rows, int64_t most_in, int64_t most_out, Random& random) {
  const int32_t dtype = random.chance(0.3) ? LONGSPAN_BF16 : LONGSPAN_F32;
  const int32_t out_dtype = random.chance(0.3) ? LONGSPAN_BF16 : LONGSPAN_F32;
  Case test(some_size(most_rows, random), some_size(most_in, random), some_size(most_out, random), dtype, out_dtype,
            random);
  if (dtype == LONGSPAN_F32) test.call.terms = static_cast<int32_t>(random.between(1, 3));
  test.call.activation = static_cast<int32_t>(random.between(LONGSPAN_NO_ACTIVATION, LONGSPAN_SILU));
  if (random.chance(0.6)) test.add_bias(random);
  if (random.chance(0.5)) test.add_residual(random);
  return test;
}

void test_random_layers_match_the_definition() {
  Random random(5);
  for (int i = 0; i < 150; ++i) {
    Case test = random_case(130, 150, 150, random);
    const bool in_place = test.residual.data() && random.chance(0.5);
    CHECK(test.run(in_place) == LONGSPAN_OK, "case %d fails", i);
    test.check_result(in_place ? "in place" : "random");
  }
}

void test_long_rows_take_several_stages() {
  Random random(6);
  for (const int64_t in_features : {1025, 2048, 2200}) {
    for (const int32_t terms : {1, 2, 3}) {
      Case test(70, in_features, 75, LONGSPAN_F32, LONGSPAN_F32, random);
      test.call.terms = terms;
      test.call.activation = LONGSPAN_GELU;
      test.add_bias(random);
      test.add_residual(random);
      CHECK(test.run() == LONGSPAN_OK, "%d numbers in a row fail", (int)in_features);
      test.check_result("stages");
    }
  }
}

void test_many_rows_take_several_blocks() {
  Random random(7);
  Case test(300, 1000, 40, LONGSPAN_F32, LONGSPAN_F32, random);
  test.call.terms = 2;
  CHECK(test.run() == LONGSPAN_OK, "300 rows fail");
  test.check_result("blocks");
}

// Those of 1 MiB and more.
void test_large_results_are_streamed() {
  Random random(7);
  for (const int32_t out_dtype : {LONGSPAN_F32, LONGSPAN_BF16}) {
    Case test(1100, 12, 500, LONGSPAN_F32, out_dtype, random);
    test.call.out_stride = 512;
    test.out = Matrix(1100, 500, 512, out_dtype);
    CHECK(test.run() == LONGSPAN_OK, "1100 rows fail");
    test.check_result("large");
  }
}

void test_int8_layers_match_the_definition() {
  Random random(12);
  for (const int64_t in_features : {1, 63, 64, 200, 2049}) {
    const int64_t rows = some_size(70, random), out_features = some_size(70, random);
    std::vector<uint8_t> x(rows * in_features);
    std::vector<int8_t> weight(out_features * in_features);
    std::vector<float> row_scale(rows), weight_scale(out_features), out(rows * out_features);
    for (uint8_t& byte : x) byte = static_cast<uint8_t>(random.between(0, 255));
    for (int8_t& byte : weight) byte = static_cast<int8_t>(random.between(-128, 127));
    for (float& scale : row_scale) scale = static_cast<float>(random.gaussian());
    for (float& scale : weight_scale) scale = static_cast<float>(random.gaussian());
    void* packed = nullptr;
    const int64_t bytes = longspan_linear_packed_bytes(in_features, out_features, LONGSPAN_BYTES);
    if (posix_memalign(&packed, 64, bytes) != 0) abort();
    CHECK(longspan_linear_pack(LONGSPAN_INT8, weight.data(), in_features, in_features, out_features, LONGSPAN_BYTES,
                               packed) == LONGSPAN_OK, "packing bytes fails");
    longspan_linear call = {};
    call.dtype = LONGSPAN_INT8;
    call.terms = LONGSPAN_BYTES;
    call.activation = LONGSPAN_NO_ACTIVATION;
    call.rows = rows;
    call.in_features = call.in_stride = in_features;
    call.out_features = call.out_stride = out_features;
    call.in = x.data();
    call.packed = packed;
    call.row_scale = row_scale.data();
    call.weight_scale = weight_scale.data();
    call.out = out.data();
    CHECK(longspan_linear_forward(&call) == LONGSPAN_OK, "%d bytes in a row fail", (int)in_features);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < out_features; ++column) {
        int64_t sum = 0;
        for (int64_t k = 0; k < in_features; ++k) {
          sum += (x[row * in_features + k] - 128) * weight[column * in_features + k];
        }
        const double truth = static_cast<double>(sum) * row_scale[row] * weight_scale[column];
        CHECK(fabs(out[row * out_features + column] - truth) <= 1e-6 * fabs(truth), "%d bytes in a row: %g, not %g",
              (int)in_features, out[row * out_features + column], truth);
      }
    }
    call.row_scale = nullptr;
    CHECK(longspan_linear_forward(&call) == LONGSPAN_BAD_ARGUMENT, "bytes without a scale");
    free(packed);
  }
}

void test_results_do_not_depend_on_threads() {
  Random random(8);
  for (const int64_t rows : {3, 40, 700}) {
    Case test(rows, 100, 600, LONGSPAN_F32, LONGSPAN_F32, random);
    test.call.terms = 3;
    omp_set_num_threads(1);
    CHECK(test.run() == LONGSPAN_OK, "one thread fails");
    const std::vector<char> alone = test.out.bytes();
    test.check_result("one thread");
    omp_set_num_threads(4);
    CHECK(test.run() == LONGSPAN_OK, "four threads fail");
    CHECK(memcmp(alone.data(), test.out.bytes().data(), alone.size()) == 0, "four threads give other bits");
  }
}

void test_rows_that_are_not_finite_leave_others_alone() {
  Random random(9);
  for (const double bad : {NAN, INFINITY}) {
    Case test(40, 64, 40, LONGSPAN_F32, LONGSPAN_F32, random), healthy = test;
    test.call.terms = healthy.call.terms = 3;
    test.x.fill_row(7, bad, random);
    CHECK(test.run() == LONGSPAN_OK && healthy.run() == LONGSPAN_OK, "a bad row fails");
    for (int64_t row = 0; row < 40; ++row) {
      for (int64_t column = 0; column < 40; ++column) {
        const bool good = row == 7 ? !std::isfinite(test.out(row, column))
                                   : test.out(row, column) == healthy.out(row, column);
        CHECK(good, "row %d gives %g", (int)row, test.out(row, column));
      }
    }
  }
}

void test_bad_arguments_are_refused() {
  Random random(10);
  Case test(2, 3, 4, LONGSPAN_F32, LONGSPAN_F32, random);
  const Packed packed(test.call, test.weight, test.weight_stride);
  longspan_linear good = test.call;
  good.in = test.x.data();
  good.packed = packed.data();
  good.out = test.out.data();
  CHECK(longspan_linear_forward(&good) == LONGSPAN_OK, "the good call fails");
  const auto refuses = [&](auto change) {
    longspan_linear bad = good;
    change(bad);
    return longspan_linear_forward(&bad) == LONGSPAN_BAD_ARGUMENT;
  };
  CHECK(refuses([](auto& call) { call.dtype = 3; }), "dtype");
  CHECK(refuses([](auto& call) { call.dtype = LONGSPAN_INT8; }), "terms of int8");
  CHECK(refuses([](auto& call) { call.out_dtype = -1; }), "out_dtype");
  CHECK(refuses([](auto& call) { call.terms = 0; }), "terms");
  CHECK(refuses([](auto& call) { call.terms = 4; }), "terms");
  CHECK(refuses([](auto& call) { call.dtype = LONGSPAN_BF16, call.terms = 2; }), "terms of bf16");
  CHECK(refuses([](auto& call) { call.activation = 4; }), "activation");
  CHECK(refuses([](auto& call) { call.rows = -1; }), "rows");
  CHECK(refuses([](auto& call) { call.in_features = 0; }), "in_features");
  CHECK(refuses([](auto& call) { call.out_features = INT64_MAX; }), "out_features");
  CHECK(refuses([](auto& call) { call.in = nullptr; }), "in");
  CHECK(refuses([](auto& call) { call.out = nullptr; }), "out");
  CHECK(refuses([](auto& call) { call.packed = nullptr; }), "packed");
  CHECK(refuses([](auto& call) { call.packed = static_cast<const char*>(call.packed) + 4; }), "packed");
  CHECK(longspan_linear_forward(nullptr) == LONGSPAN_BAD_ARGUMENT, "no call");
  good.rows = 0;
  good.in = good.out = nullptr;
  CHECK(longspan_linear_forward(&good) == LONGSPAN_OK, "no rows");
  CHECK(longspan_linear_packed_bytes(0, 1, 1) == -1 && longspan_linear_packed_bytes(1, 1, 4) == -1, "packed_bytes");
}

void test_other_instruction_sets_decline() {
  CHECK(longspan_use_instruction_set("baseline") == LONGSPAN_OK, "no baseline");
  longspan_linear call = {};
  CHECK(!longspan_linear_is_available() && longspan_linear_packed_bytes(1, 1, 1) == -1, "the baseline has linear layers");
  CHECK(longspan_linear_pack(LONGSPAN_F32, &call, 1, 1, 1, 1, &call) == LONGSPAN_BAD_ARGUMENT, "the baseline packs");
  CHECK(longspan_linear_forward(&call) == LONGSPAN_BAD_ARGUMENT, "the baseline multiplies");
}

}  // namespace

int main() {
  with_each_set([](const char* set) {
    if (!longspan_linear_is_available()) {
      printf("%s has no linear layers\n", set);
      return;
    }
    test_random_layers_match_the_definition();
    test_long_rows_take_several_stages();
    test_many_rows_take_several_blocks();
    test_large_results_are_streamed();
    test_int8_layers_match_the_definition();
    test_results_do_not_depend_on_threads();
    test_rows_that_are_not_finite_leave_others_alone();
    test_bad_arguments_are_refused();
    printf("%s: %d failures so far\n", set, failures);
  });
  test_other_instruction_sets_decline();
  printf("%d failures\n", failures);
  return failures > 0;
}
