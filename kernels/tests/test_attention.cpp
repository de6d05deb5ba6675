// The attention kernels of every instruction set that this CPU has, against the definition. Exits with 1 on a failure.
#include <omp.h>
#include <stdio.h>

#include "attention_cases.h"
#include "check.h"

namespace {

// The largest error that rounding may make, relative to the largest number of a matrix.
double tolerance(const longspan_attention& call, int32_t result_dtype, double for_bf16) {
  if (call.dtype == LONGSPAN_BF16) return for_bf16;
  return result_dtype == LONGSPAN_BF16 ? 4e-3 : 3e-5;
}

void check_matrix(const char* name, const Matrix& result, const std::vector<double>& expected, int64_t width,
                  double relative, const char* context) {
  double largest = 1, error = 0;
  for (double value : expected) largest = std::max(largest, fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = fabs(result(i / width, i % width) - expected[i]);
    error = difference <= error ? error : difference;  // NaN counts as an error
  }
  CHECK(error <= relative * largest, "%s is off by %g of %g (%s)", name, error, largest, context);
  CHECK(result.gaps_are_untouched(), "%s wrote between its rows (%s)", name, context);
}

void check_forward(const Case& test, const char* context) {
  const double precision = tolerance(test.call, test.call.out_dtype, 1.5e-2);
  for (const Lane& lane : test.lanes) {
    check_matrix("out", lane.out, lane.expected_out, test.call.width, precision, context);
    for (int64_t i = 0; i < lane.given.queries; ++i) {
      const double expected = lane.expected_lse[i], lse = lane.lse[i * test.call.lse_stride];
      const double allowed = (test.call.dtype == LONGSPAN_F32 ? 1e-5 : 2e-4) * (1 + fabs(expected));
      CHECK(expected == lse || fabs(expected - lse) <= allowed, "lse of row %d is %g, not %g (%s)", (int)i, lse, expected, context);
    }
  }
}

// Up to six times the error of other results: those of all rows, whose out is rounded, add up in it.
void check_bias(const char* name, const Bias& bias, double relative, const char* context) {
  if (bias.values.empty()) return;
  const std::vector<double> expected = bias.folded(bias.expected), gradient = bias.folded(bias.gradient);
  double largest = 1;
  for (double value : expected) largest = std::max(largest, fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = fabs(gradient[i] - expected[i]);
    CHECK(error <= 6 * relative * largest, "gradient %d of the %s is off by %g of %g (%s)", (int)i, name, error, largest,
          context);
  }
}

void check_backward(const Case& test, const char* context) {
  const double precision = tolerance(test.call, test.call.grad_dtype, 3e-2);
  const int64_t width = test.call.width;
  for (const Lane& lane : test.lanes) {
    check_matrix("grad_q", lane.grad_q, lane.expected_grad_q, width, precision, context);
    check_matrix("grad_k", lane.grad_k, lane.expected_grad_k, width, precision, context);
    check_matrix("grad_v", lane.grad_v, lane.expected_grad_v, width, precision, context);
    check_bias("bias", lane.bias, precision, context);
    check_bias("extra bias", lane.extra_bias, precision, context);
  }
}

int forward(const Case& test) {
  const std::vector<longspan_lane> lanes = test.given();
  return longspan_attention_forward(&test.call, lanes.data(), static_cast<int64_t>(lanes.size()));
}

int backward(const Case& test) {
  const std::vector<longspan_lane> lanes = test.given();
  return longspan_attention_backward(&test.call, lanes.data(), static_cast<int64_t>(lanes.size()));
}

void test_random_cases_match_the_definition(int count, const Limits& limits) {
  Random random(11);
  for (int i = 0; i < count; ++i) {
    const Case fresh = random_case(limits, random);
    with_each_set([&](const char* set) {
      Case test = fresh;
      for (Lane& lane : test.lanes) lane.point_to_data();
      char context[200];
      const longspan_lane& first = test.lanes[0].given;
      snprintf(context, sizeof context, "%s, case %d: bf16 %d width %d scale %g, lane 0: queries %d keys %d dilation %d",
               set, i, test.call.dtype, (int)test.call.width, test.call.scale, (int)first.queries, (int)first.keys,
               (int)first.dilation);
      CHECK(forward(test) == LONGSPAN_OK, "forward refused (%s)", context);
      check_forward(test, context);
      CHECK(backward(test) == LONGSPAN_OK, "backward refused (%s)", context);
      check_backward(test, context);
    });
  }
}

// Keys shared out at random among two calls that accumulate give what one call gives.
void test_calls_accumulate(const char* set) {
  Random random(12);
  for (int i = 0; i < 40; ++i) {
    Case test = random_case({70, 70}, random);
    test.call.out_dtype = test.call.grad_dtype = LONGSPAN_F32;
    Case halves[2] = {test, test};
    for (int half = 0; half < 2; ++half) halves[half].call.accumulate = half;
    for (size_t n = 0; n < test.lanes.size(); ++n) {
      Lane* lanes[2] = {&halves[0].lanes[n], &halves[1].lanes[n]};
      Lane& whole = test.lanes[n];
      const longspan_lane& given = whole.given;
      const auto is_first = [&](int64_t j) { return j * 7 % 3 == 0; };
      for (int half = 0; half < 2; ++half) {
        Lane& lane = *lanes[half];
        if (lane.key_mask.empty()) lane.key_mask.assign(given.keys, 1);
        lane.extra.clear();
        for (int64_t j = 0; j < given.keys; ++j) {
          if (is_first(j) == (half == 1)) lane.key_mask[j] = 0;
          if (is_first(j) == (half == 0) && whole.is_extra(j)) lane.extra.push_back(j);
        }
        lane.point_to_data();
      }
      Lane &first = *lanes[0], &second = *lanes[1];
      for (Matrix Lane::*matrix : {&Lane::out, &Lane::grad_q, &Lane::grad_k, &Lane::grad_v}) {
        const int64_t rows = matrix == &Lane::out || matrix == &Lane::grad_q ? given.queries : given.keys;
        first.*matrix = second.*matrix = whole.*matrix = Matrix(rows, test.call.width, test.call.width, LONGSPAN_F32);
      }
      first.point_to_data();
      second.given.out = first.out.data(), second.given.lse = first.lse.data();
      second.given.grad_q = first.grad_q.data(), second.given.grad_k = first.grad_k.data();
      second.given.grad_v = first.grad_v.data();
      second.given.bias = first.bias.given(), second.given.extra_bias = first.extra_bias.given();
    }
    for (Case& half : halves) {
      half.call.out_stride = half.call.grad_q_stride = half.call.grad_k_stride = half.call.grad_v_stride = test.call.width;
      CHECK(forward(half) == LONGSPAN_OK, "forward refused (%s)", set);
    }
    check_forward(halves[0], set);
    for (Case& half : halves) CHECK(backward(half) == LONGSPAN_OK, "backward refused (%s)", set);
    check_backward(halves[0], set);
  }
}

// Bit for bit, whatever the number of threads and whatever else is in the call.
void test_results_do_not_depend_on_threads_or_batch(const char* set) {
  Random random(13);
  for (int i = 0; i < 10; ++i) {
    Case test = random_case({400, 20}, random), alone = test;
    const int threads = omp_get_max_threads();
    forward(test), backward(test);
    alone.lanes.resize(1);
    alone.lanes[0].point_to_data();
    omp_set_num_threads(1);
    forward(alone), backward(alone);
    omp_set_num_threads(threads);
    for (Matrix Lane::*matrix : {&Lane::out, &Lane::grad_q, &Lane::grad_k, &Lane::grad_v}) {
      CHECK((test.lanes[0].*matrix).bytes() == (alone.lanes[0].*matrix).bytes(), "case %d differs (%s)", i, set);
    }
  }
}

// One long lane of few queries, whose keys do not fit in one segment.
void test_global_rows_of_a_long_lane(const char* set) {
  Random random(14);
  Case test = random_case({1, 40}, random);
  test.lanes.resize(1);
  Lane lane;
  lane.given.queries = 3;
  lane.given.keys = 9000;
  lane.given.before = lane.given.after = INT64_MAX;
  lane.given.dilation = 1;
  lane.positions = {0, 17, 4000};
  fill(lane, test.call, 1, random);
  lane.expect(test.call);
  test.lanes[0] = lane;
  test.lanes[0].point_to_data();
  forward(test), backward(test);
  check_forward(test, set);
  check_backward(test, set);
}

// Lanes much longer than their windows, whose queries begin and end while the keys pass by.
void test_long_lanes_of_short_reach(const char* set) {
  Random random(16);
  for (int i = 0; i < 4; ++i) {
    Case test = random_case({1, 40}, random);
    test.lanes.assign(2, Lane());
    for (Lane& lane : test.lanes) {
      longspan_lane& given = lane.given;
      given.queries = random.between(1500, 2500), given.keys = random.between(1500, 2500);
      given.before = random.between(0, 40), given.after = random.between(0, 40);
      given.dilation = random.between(1, 2);
      if (random.chance(0.5)) {
        lane.key_mask.assign(given.keys, 1);
        for (int64_t j : {0, 700, 1400}) lane.key_mask[j] = 0, lane.extra.push_back(j);
      }
      fill(lane, test.call, 1, random);
      lane.expect(test.call);
    }
    for (Lane& lane : test.lanes) lane.point_to_data();
    CHECK(forward(test) == LONGSPAN_OK && backward(test) == LONGSPAN_OK, "refused (%s)", set);
    check_forward(test, set);
    check_backward(test, set);
  }
}

template <class Change>
void check_refused(const char* what, Change change) {
  Random random(15);
  Case test;
  do {
    test = random_case({60, 20}, random);
  } while (test.lanes[0].extra.size() < 2 || test.lanes[0].given.queries < 2 || !test.lanes[0].positions.empty());
  change(test.call, test.lanes[0].given);
  CHECK(forward(test) == LONGSPAN_BAD_ARGUMENT, "forward: %s", what);
  CHECK(backward(test) == LONGSPAN_BAD_ARGUMENT, "backward: %s", what);
}

void test_bad_arguments_are_refused() {
  using Call = longspan_attention;
  using L = longspan_lane;
  check_refused("no queries", [](Call&, L& lane) { lane.q = nullptr; });
  check_refused("no keys", [](Call&, L& lane) { lane.k = nullptr; });
  check_refused("no results", [](Call&, L& lane) { lane.out = lane.grad_q = nullptr; });
  check_refused("unknown type", [](Call& call, L&) { call.dtype = 7; });
  check_refused("narrow results of wide input", [](Call& call, L&) {
    call.dtype = LONGSPAN_F32;
    call.out_dtype = call.grad_dtype = LONGSPAN_BF16;
  });
  check_refused("no width", [](Call& call, L&) { call.width = 0; });
  check_refused("scale NaN", [](Call& call, L&) { call.scale = NAN; });
  check_refused("dilation 0", [](Call&, L& lane) { lane.dilation = 0; });
  check_refused("negative reach", [](Call&, L& lane) { lane.before = -1; });
  check_refused("negative count", [](Call&, L& lane) { lane.queries = -1; });
  check_refused("too many tokens", [](Call&, L& lane) { lane.keys = INT64_MAX; });
  check_refused("extra keys without a mask", [](Call&, L& lane) { lane.key_mask = nullptr; });
  static const int64_t outside[] = {0, 1000000}, descending[] = {1, 0};
  check_refused("extra key outside", [](Call&, L& lane) { lane.extra = outside, lane.extras = 2; });
  check_refused("extra keys descend", [](Call&, L& lane) { lane.extra = descending, lane.extras = 2; });
  static const float few[LONGSPAN_BIAS_MARGIN] = {};
  check_refused("bias without margins", [](Call&, L& lane) { lane.bias = {few, nullptr, 0, 15}; });
  check_refused("bias at no distance", [](Call&, L& lane) { lane.extra_bias = {few, nullptr, INT64_MIN, 16}; });
  check_refused("position outside", [](Call&, L& lane) {
    lane.positions = outside, lane.queries = 2, lane.dilation = 1;
  });
  CHECK(longspan_attention_forward(nullptr, nullptr, 0) == LONGSPAN_BAD_ARGUMENT, "null call");
  CHECK(longspan_use_instruction_set("pentium") == LONGSPAN_BAD_ARGUMENT, "unknown set");
  CHECK(longspan_use_instruction_set(nullptr) == LONGSPAN_BAD_ARGUMENT, "null set");
}

}  // namespace

int main() {
  test_random_cases_match_the_definition(250, {90, 130});
  test_random_cases_match_the_definition(4, {400, 600});  // several tasks and segments
  with_each_set([](const char* set) {
    test_calls_accumulate(set);
    test_results_do_not_depend_on_threads_or_batch(set);
    test_global_rows_of_a_long_lane(set);
    test_long_lanes_of_short_reach(set);
    printf("%s: %d failures so far\n", set, failures);
  });
  test_bad_arguments_are_refused();
  return failures > 0;
}
