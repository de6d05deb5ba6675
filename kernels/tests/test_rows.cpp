// The row kernels of every instruction set that this CPU has, against plain code in double. Exits with 1 on a failure.
#include "../longspan_rows.h"

#include <omp.h>
#include <stdio.h>

#include <functional>

#include "attention_cases.h"
#include "check.h"

namespace {

using Numbers = std::vector<double>;

// A matrix of the interface and its memory.
struct Operand {
  Operand() = default;
  Operand(int64_t rows, int64_t width, int32_t dtype, Random& random)
      : stride(width + random.between(0, 3)), dtype(dtype), matrix(rows, width, stride, dtype) {}

  longspan_matrix given() { return {matrix.data(), stride, dtype}; }

  int64_t stride = 0;
  int32_t dtype = LONGSPAN_F32;
  Matrix matrix;
};

int32_t any_dtype(Random& random) { return random.chance(0.5) ? LONGSPAN_F32 : LONGSPAN_BF16; }

std::vector<float> random_numbers(int64_t count, Random& random) {
  std::vector<float> numbers(count);
  for (float& number : numbers) number = static_cast<float>(random.gaussian());
  return numbers;
}

// A product with all that may come with it, and somewhere to put what becomes of it.
struct Case {
  Case(int64_t rows, int64_t columns, int64_t width, Random& random)
      : rows(rows), columns(columns), width(width), y(rows, columns, any_dtype(random), random) {
    for (int64_t row = 0; row < rows; ++row) y.matrix.fill_row(row, 3, random);
    if (random.chance(0.5)) row_scale = random_numbers(rows, random);
    if (random.chance(0.5)) bias = random_numbers(columns, random);
    const bool in_place = random.chance(0.3);
    out_is_y = in_place;
    if (random.chance(0.7) && !in_place) out = Operand(rows, width, any_dtype(random), random);
    if (in_place || !has_out() || random.chance(0.5)) {
      quantized_stride = width + random.between(0, 3);
      quantized.assign(rows * quantized_stride, 77);
      scale.assign(rows, NAN);
    }
    product = {y.given(), row_scale.empty() ? nullptr : row_scale.data(), bias.empty() ? nullptr : bias.data()};
    result = {in_place ? y.given() : has_out() ? out.given() : longspan_matrix{}, quantized.data(), quantized_stride,
              scale.data()};
    if (quantized.empty()) result.quantized = nullptr;
  }

  bool has_out() const { return out_is_y || out.stride > 0; }
  Operand& written() { return out_is_y ? y : out; }

  // As fp32 holds it: the rounding of the sum is no error of the kernels.
  double input(int64_t row, int64_t column) const {
    const double scaled = y.matrix(row, column) * (row_scale.empty() ? 1 : row_scale[row]);
    return static_cast<float>(scaled + (bias.empty() ? 0 : bias[column]));
  }

  int64_t rows, columns, width;
  Operand y, out;
  bool out_is_y = false;
  std::vector<float> row_scale, bias, scale;
  std::vector<uint8_t> quantized;
  int64_t quantized_stride = 0;
  longspan_product product;
  longspan_result result;
};

double largest_of(const Numbers& numbers) {
  double largest = 0;
  for (double number : numbers) largest = std::max(largest, fabs(number));
  return largest;
}

void check_matrix(const Operand& operand, const std::vector<Numbers>& expected, double precision, const char* context) {
  const double relative = operand.dtype == LONGSPAN_F32 ? 0 : 4.5e-3;
  for (size_t row = 0; row < expected.size(); ++row) {
    const double absolute = precision * (largest_of(expected[row]) + 0.1);
    for (size_t i = 0; i < expected[row].size(); ++i) {
      const double value = operand.matrix(row, i), wanted = expected[row][i];
      CHECK(fabs(value - wanted) <= relative * fabs(wanted) + absolute, "%g at %d,%d, not %g (%s)", value, (int)row,
            (int)i, wanted, context);
    }
  }
}

void check(Case& test, const std::vector<Numbers>& expected, double precision, const char* context) {
  if (test.has_out()) {
    check_matrix(test.written(), expected, precision, context);
    if (!test.out_is_y) CHECK(test.out.matrix.gaps_are_untouched(), "wrote between its rows (%s)", context);
  }
  if (test.quantized.empty()) return;
  constexpr double ROUNDING = 2e-3;  // of activations, which are computed less precisely for 8 bits
  for (int64_t row = 0; row < test.rows; ++row) {
    const double largest = largest_of(expected[row]), scale = test.scale[row];
    CHECK(fabs(scale - largest / 127) <= ROUNDING * largest / 127, "scale %g, not %g (%s)", scale, largest / 127,
          context);
    for (int64_t i = 0; i < test.quantized_stride; ++i) {
      const int number = test.quantized[row * test.quantized_stride + i];
      if (i >= test.width) {
        CHECK(number == 77, "wrote between quantized rows (%s)", context);
        continue;
      }
      const double error = fabs((number - 128) * scale - expected[row][i]);
      CHECK(error <= scale * 0.5 + ROUNDING * largest, "%d times %g is not %g (%s)", number - 128, scale,
            expected[row][i], context);
    }
  }
}

int64_t random_width(Random& random) {
  return random.chance(0.2) ? random.between(256, 900) : random.between(1, 80);
}

double activated(int32_t activation, double x) {
  if (activation == LONGSPAN_GELU) return x * 0.5 * erfc(-x / sqrt(2));
  if (activation == LONGSPAN_GELU_TANH) return x / (1 + exp(-2 * sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  if (activation == LONGSPAN_RELU) return std::max(x, 0.0);
  return x / (1 + exp(-x));
}

// Expected rows of a case whose every number follows from the inputs of its row.
std::vector<Numbers> expect(const Case& test, const std::function<double(int64_t row, int64_t column)>& number) {
  std::vector<Numbers> rows(test.rows, Numbers(test.width));
  for (int64_t row = 0; row < test.rows; ++row) {
    for (int64_t i = 0; i < test.width; ++i) rows[row][i] = number(row, i);
  }
  return rows;
}

void test_copy(Random& random, const char* set) {
  const int64_t width = random_width(random);
  Case test(random.between(0, 9), width, width, random);
  const auto expected = expect(test, [&](int64_t row, int64_t i) { return test.input(row, i); });
  CHECK(longspan_rows_copy(test.rows, width, &test.product, &test.result) == LONGSPAN_OK, "%s", set);
  check(test, expected, 1e-6, set);
}

void test_activate(Random& random, const char* set) {
  const int64_t width = random_width(random), gated = random.chance(0.5);
  const int32_t activation = static_cast<int32_t>(random.between(LONGSPAN_GELU, LONGSPAN_SILU));
  Case test(random.between(0, 9), width * (gated ? 2 : 1), width, random);
  const auto expected = expect(test, [&](int64_t row, int64_t i) {
    return activated(activation, test.input(row, i)) * (gated ? test.input(row, width + i) : 1);
  });
  CHECK(longspan_rows_activate(test.rows, width, &test.product, activation, gated, &test.result) == LONGSPAN_OK, "%s",
        set);
  check(test, expected, 2e-6, set);
}

void test_normalize(Random& random, const char* set) {
  const int64_t width = random_width(random);
  Case test(random.between(0, 9), width, width, random);
  Operand residual(test.rows, width, any_dtype(random), random), sum(test.rows, width, LONGSPAN_F32, random);
  for (int64_t row = 0; row < test.rows; ++row) residual.matrix.fill_row(row, 2, random);
  const bool has_residual = random.chance(0.6), keeps_sum = random.chance(0.5);
  const std::vector<float> weight = random_numbers(width, random), bias = random_numbers(width, random);
  longspan_norm norm = {};
  if (has_residual) norm.residual = residual.given();
  if (keeps_sum) norm.sum = sum.given();
  norm.weight = weight.data();
  norm.bias = random.chance(0.5) ? bias.data() : nullptr;
  norm.epsilon = 1e-5f;
  const auto sums = expect(test, [&](int64_t row, int64_t i) {
    return test.input(row, i) + (has_residual ? residual.matrix(row, i) : 0);
  });
  std::vector<Numbers> expected = sums;
  for (Numbers& row : expected) {
    double mean = 0, variance = 0;
    for (double number : row) mean += number / width;
    for (double number : row) variance += (number - mean) * (number - mean) / width;
    for (int64_t i = 0; i < width; ++i) {
      row[i] = (row[i] - mean) / sqrt(variance + norm.epsilon) * weight[i] + (norm.bias ? bias[i] : 0);
    }
  }
  CHECK(longspan_rows_normalize(test.rows, width, &test.product, &norm, &test.result) == LONGSPAN_OK, "%s", set);
  check(test, expected, 3e-4 / sqrt(width), set);  // a row of nearly equal numbers has few digits left
  if (keeps_sum) check_matrix(sum, sums, 1e-6, set);
}

void test_rotate(Random& random, const char* set) {
  const int64_t head_width = 2 * random.between(1, 40), half = head_width / 2, heads = random.between(0, 4);
  const int64_t width = heads * head_width + random.between(1, 50);
  const int64_t table_rows = 20, table_stride = half + random.between(0, 9);
  Case test(random.between(0, 9), width, width, random);
  const std::vector<float> cos = random_numbers(table_rows * table_stride, random);
  const std::vector<float> sin = random_numbers(table_rows * table_stride, random);
  std::vector<int64_t> positions(test.rows);
  for (int64_t& position : positions) position = random.between(0, table_rows - 1);
  const bool has_positions = random.chance(0.5);
  const longspan_rotary rotary = {heads, head_width, cos.data(), sin.data(), table_stride,
                                  has_positions ? positions.data() : nullptr};
  const auto expected = expect(test, [&](int64_t row, int64_t i) {
    if (i >= heads * head_width) return test.input(row, i);
    const int64_t at = (has_positions ? positions[row] : row) * table_stride + i % half;
    const bool is_first = i % head_width < half;
    const double other = is_first ? -test.input(row, i + half) : test.input(row, i - half);
    return test.input(row, i) * cos[at] + other * sin[at];
  });
  CHECK(longspan_rows_rotate(test.rows, width, &test.product, &rotary, &test.result) == LONGSPAN_OK, "%s", set);
  check(test, expected, 2e-6, set);
}

// Against erfc in double, relative to the value itself, also where it is tiny.
void test_gelu_is_accurate_in_its_tail(const char* set) {
  std::vector<float> x, out;
  for (double at = -8; at <= 8; at += 1.0 / 1024) x.push_back(static_cast<float>(at + 1e-4));
  out.resize(x.size());
  const int64_t width = static_cast<int64_t>(x.size());
  const longspan_product product = {{x.data(), width, LONGSPAN_F32}, nullptr, nullptr};
  const longspan_result result = {{out.data(), width, LONGSPAN_F32}, nullptr, 0, nullptr};
  longspan_rows_activate(1, width, &product, LONGSPAN_GELU, 0, &result);
  double near = 0, tail = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double expected = activated(LONGSPAN_GELU, x[i]), error = fabs(out[i] - expected) / fabs(expected);
    double& worst = x[i] > -3 ? near : tail;
    worst = std::max(worst, error);
  }
  CHECK(near <= 1.5e-6, "relative error %g above -3 (%s)", near, set);
  CHECK(tail <= 1.5e-5, "relative error %g below -3 (%s)", tail, set);
}

void test_not_numbers_stay_visible_and_zeros_are_zero(const char* set) {
  constexpr int64_t ROWS = 4, WIDTH = 37;
  std::vector<float> y(ROWS * WIDTH, 1.0f), out(ROWS * WIDTH), scale(ROWS), weight(WIDTH, 1.0f);
  std::vector<uint8_t> quantized(ROWS * WIDTH);
  y[5] = NAN;
  y[WIDTH + 36] = INFINITY;
  for (int64_t i = 0; i < WIDTH; ++i) y[2 * WIDTH + i] = 0;
  const longspan_product product = {{y.data(), WIDTH, LONGSPAN_F32}, nullptr, nullptr};
  const longspan_result result = {{out.data(), WIDTH, LONGSPAN_F32}, quantized.data(), WIDTH, scale.data()};
  for (int32_t activation = LONGSPAN_GELU; activation <= LONGSPAN_SILU; ++activation) {
    CHECK(longspan_rows_activate(ROWS, WIDTH, &product, activation, 0, &result) == LONGSPAN_OK, "%s", set);
    CHECK(std::isnan(out[5]) && std::isfinite(out[4]) && std::isnan(scale[0]), "activation %d (%s)", activation, set);
    CHECK(out[WIDTH + 36] == INFINITY && scale[1] == INFINITY, "activation %d (%s)", activation, set);
    CHECK(scale[2] == 0 && quantized[2 * WIDTH] == 128, "activation %d (%s)", activation, set);
    CHECK(quantized[3 * WIDTH] == 255, "activation %d (%s)", activation, set);
  }
  longspan_norm norm = {};
  norm.weight = weight.data();
  norm.epsilon = 1e-5f;
  CHECK(longspan_rows_normalize(ROWS, WIDTH, &product, &norm, &result) == LONGSPAN_OK, "%s", set);
  CHECK(std::isnan(out[0]) && std::isnan(scale[0]) && std::isnan(out[WIDTH]), "%s", set);
  CHECK(out[2 * WIDTH] == 0 && out[3 * WIDTH] == 0, "%s", set);
}

void test_threads_change_nothing(const char* set) {
  Random random(5);
  constexpr int64_t ROWS = 301, WIDTH = 500;
  std::vector<float> y = random_numbers(ROWS * WIDTH, random), weight = random_numbers(WIDTH, random), outs[2];
  for (int threads : {1, 3}) {
    std::vector<float>& out = outs[threads == 3];
    out.assign(y.size(), NAN);
    const longspan_product product = {{y.data(), WIDTH, LONGSPAN_F32}, nullptr, nullptr};
    const longspan_result result = {{out.data(), WIDTH, LONGSPAN_F32}, nullptr, 0, nullptr};
    longspan_norm norm = {};
    norm.weight = weight.data();
    omp_set_num_threads(threads);
    longspan_rows_normalize(ROWS, WIDTH, &product, &norm, &result);
  }
  CHECK(memcmp(outs[0].data(), outs[1].data(), y.size() * sizeof(float)) == 0, "%s", set);
}

void test_bad_arguments_are_refused() {
  float x[8] = {}, scale[8];
  uint8_t bytes[8];
  const longspan_matrix matrix = {x, 2, LONGSPAN_F32}, absent = {}, unknown = {x, 2, 7};
  const longspan_product product = {matrix, nullptr, nullptr};
  const longspan_result result = {matrix, nullptr, 0, nullptr};
  const auto copy = [](int64_t rows, int64_t width, longspan_product from, longspan_result to) {
    return longspan_rows_copy(rows, width, &from, &to);
  };
  CHECK(copy(4, 2, product, result) == LONGSPAN_OK, "good arguments");
  CHECK(copy(0, 2, {absent, nullptr, nullptr}, {absent, nullptr, 0, nullptr}) == LONGSPAN_OK, "no rows");
  CHECK(copy(-1, 2, product, result) == LONGSPAN_BAD_ARGUMENT, "negative rows");
  CHECK(copy(4, 0, product, result) == LONGSPAN_BAD_ARGUMENT, "no columns");
  CHECK(copy(INT64_MAX, 2, product, result) == LONGSPAN_BAD_ARGUMENT, "too many rows");
  CHECK(copy(4, 2, {absent, nullptr, nullptr}, result) == LONGSPAN_BAD_ARGUMENT, "no input");
  CHECK(copy(4, 2, {unknown, nullptr, nullptr}, result) == LONGSPAN_BAD_ARGUMENT, "unknown type");
  CHECK(copy(4, 2, product, {absent, nullptr, 0, scale}) == LONGSPAN_BAD_ARGUMENT, "no result");
  CHECK(copy(4, 2, product, {absent, bytes, 2, nullptr}) == LONGSPAN_BAD_ARGUMENT, "no scale");
  CHECK(longspan_rows_copy(4, 2, nullptr, &result) == LONGSPAN_BAD_ARGUMENT, "null product");
  CHECK(longspan_rows_copy(4, 2, &product, nullptr) == LONGSPAN_BAD_ARGUMENT, "null result");
  CHECK(longspan_rows_activate(4, 2, &product, 9, 0, &result) == LONGSPAN_BAD_ARGUMENT, "unknown activation");
  CHECK(longspan_rows_normalize(4, 2, &product, nullptr, &result) == LONGSPAN_BAD_ARGUMENT, "null norm");
  longspan_rotary rotary = {1, 3, x, x, 2, nullptr};
  CHECK(longspan_rows_rotate(4, 2, &product, &rotary, &result) == LONGSPAN_BAD_ARGUMENT, "odd head width");
  rotary = {2, 2, x, x, 2, nullptr};
  CHECK(longspan_rows_rotate(4, 2, &product, &rotary, &result) == LONGSPAN_BAD_ARGUMENT, "more heads than columns");
}

}  // namespace

int main() {
  with_each_set([](const char* set) {
    Random random(11);
    for (int i = 0; i < 200; ++i) {
      test_copy(random, set);
      test_activate(random, set);
      test_normalize(random, set);
      test_rotate(random, set);
    }
    test_gelu_is_accurate_in_its_tail(set);
    test_not_numbers_stay_visible_and_zeros_are_zero(set);
    test_threads_change_nothing(set);
    printf("%s: %d failures so far\n", set, failures);
  });
  test_bad_arguments_are_refused();
  return failures > 0;
}
