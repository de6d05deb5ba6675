// Random lanes of attention with every feature of longspan.h, and what they should give: the definition, in double.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../longspan.h"

class Random {
 public:
  explicit Random(unsigned seed) : bits_(seed) {}
  int64_t between(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(bits_); }
  bool chance(double share) { return std::uniform_real_distribution<>(0, 1)(bits_) < share; }
  double gaussian() { return std::normal_distribution<>()(bits_); }

 private:
  std::mt19937 bits_;
};

// Rows of floats or bf16 numbers, allocated to the byte. All is NaN at first, also the gap after each row.
class Matrix {
 public:
  Matrix() = default;
  Matrix(int64_t rows, int64_t width, int64_t stride, int32_t dtype)
      : rows_(rows), width_(width), stride_(stride), dtype_(dtype), bytes_(rows * stride * size()) {
    for (int64_t i = 0; i < rows * stride; ++i) put(i, NAN);
  }

  void* data() { return rows_ == 0 ? nullptr : bytes_.data(); }
  double operator()(int64_t row, int64_t x) const { return get(row * stride_ + x); }
  const std::vector<char>& bytes() const { return bytes_; }

  void fill_row(int64_t row, double size, Random& random) {
    for (int64_t x = 0; x < width_; ++x) put(row * stride_ + x, size * random.gaussian());
  }

  bool gaps_are_untouched() const {
    for (int64_t i = 0; i < rows_ * stride_; ++i) {
      if (i % stride_ >= width_ && !std::isnan(get(i))) return false;
    }
    return true;
  }

 private:
  int64_t size() const { return dtype_ == LONGSPAN_F32 ? 4 : 2; }

  void put(int64_t at, double value) {
    const float number = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (dtype_ == LONGSPAN_BF16) bits = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    memcpy(&bytes_[at * size()], &bits, size());
  }

  double get(int64_t at) const {
    uint32_t bits = 0;
    memcpy(&bits, &bytes_[at * size()], size());
    if (dtype_ == LONGSPAN_BF16) bits <<= 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
  }

  int64_t rows_ = 0, width_ = 0, stride_ = 1;
  int32_t dtype_ = LONGSPAN_F32;
  std::vector<char> bytes_;
};

// A bias by distance and its gradient. Empty: none.
struct Bias {
  int64_t first = 0;
  std::vector<float> values, gradient;
  std::vector<double> expected;  // of the gradient, where a distance is looked up: not at the other margin

  int64_t at(int64_t steps) const {
    return std::clamp<int64_t>(steps - first, 0, static_cast<int64_t>(values.size()) - 1);
  }
  double operator()(int64_t steps) const { return values.empty() ? 0 : values[at(steps)]; }
  longspan_bias given() {
    if (values.empty()) return {};
    return {values.data(), gradient.data(), first, static_cast<int64_t>(values.size())};
  }

  void choose(Random& random) {
    const int64_t inner = random.between(1, random.chance(0.5) ? 5 : 80);
    first = random.between(-60, 20) - LONGSPAN_BIAS_MARGIN;
    for (int64_t i = 0; i < inner; ++i) values.push_back(static_cast<float>(2 * random.gaussian()));
    values.insert(values.begin(), LONGSPAN_BIAS_MARGIN, values.front());
    values.insert(values.end(), LONGSPAN_BIAS_MARGIN, values.back());
    gradient.assign(values.size(), 0);
  }

  // What stands at each margin is one value, whichever of its places a sum went to.
  template <class Number>
  std::vector<double> folded(const std::vector<Number>& sums) const {
    const size_t margin = LONGSPAN_BIAS_MARGIN, count = sums.size() - 2 * margin;
    std::vector<double> result(sums.begin() + margin, sums.begin() + margin + count);
    for (size_t i = 0; i < margin; ++i) result.front() += sums[i], result.back() += sums[margin + count + i];
    return result;
  }
};

// One lane and all that it points to.
struct Lane {
  Bias bias, extra_bias;
  longspan_lane given = {};
  Matrix q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  std::vector<float> lse, delta, grad_lse;
  std::vector<int64_t> positions, extra;
  std::vector<uint8_t> query_mask, key_mask;
  std::vector<double> expected_lse, expected_out, expected_grad_q;  // of queries
  std::vector<double> expected_grad_k, expected_grad_v;             // of keys

  bool is_extra(int64_t j) const { return std::binary_search(extra.begin(), extra.end(), j); }

  bool sees(int64_t i, int64_t j) const {
    if (!query_mask.empty() && !query_mask[i]) return false;
    const int64_t distance = j - (positions.empty() ? i : positions[i]);
    if (is_extra(j)) return !given.extra_causal || distance <= 0;
    return (key_mask.empty() || key_mask[j]) && distance % given.dilation == 0 &&
           -distance / given.dilation <= given.before && distance / given.dilation <= given.after;
  }

  Bias& bias_of(int64_t j) { return is_extra(j) ? extra_bias : bias; }

  int64_t steps(int64_t i, int64_t j) const {
    return (j - (positions.empty() ? i : positions[i])) / (is_extra(j) ? 1 : given.dilation);
  }

  void expect(const longspan_attention& call) {
    for (Bias* one : {&bias, &extra_bias}) one->expected.assign(one->values.size(), 0);
    expected_lse.assign(given.queries, -INFINITY);
    expected_out.assign(given.queries * call.width, 0);
    expected_grad_q = expected_out;
    expected_grad_k.assign(given.keys * call.width, 0);
    expected_grad_v = expected_grad_k;
    for (int64_t i = 0; i < given.queries; ++i) expect_of_query(call, i);
  }

  void point_to_data() {
    given.q = q.data(), given.k = k.data(), given.v = v.data(), given.out = out.data();
    given.grad_out = grad_out.data();
    given.grad_q = grad_q.data(), given.grad_k = grad_k.data(), given.grad_v = grad_v.data();
    given.lse = lse.data(), given.delta = delta.data();
    given.grad_lse = grad_lse.empty() ? nullptr : grad_lse.data();
    given.positions = positions.empty() ? nullptr : positions.data();
    given.query_mask = query_mask.empty() ? nullptr : query_mask.data();
    given.key_mask = key_mask.empty() ? nullptr : key_mask.data();
    given.extra = extra.empty() ? nullptr : extra.data();
    given.extras = static_cast<int64_t>(extra.size());
    given.bias = bias.given(), given.extra_bias = extra_bias.given();
  }

 private:
  void expect_of_query(const longspan_attention& call, int64_t i) {
    const int64_t width = call.width;
    const auto dot = [width](const Matrix& a, int64_t row, const Matrix& b, int64_t other) {
      double sum = 0;
      for (int64_t x = 0; x < width; ++x) sum += a(row, x) * b(other, x);
      return sum;
    };
    std::vector<int64_t> seen;
    for (int64_t j = 0; j < given.keys; ++j) {
      if (sees(i, j)) seen.push_back(j);
    }
    if (seen.empty()) return;
    std::vector<double> weights;
    for (int64_t j : seen) weights.push_back(call.scale * dot(q, i, k, j) + bias_of(j)(steps(i, j)));
    const double top = *std::max_element(weights.begin(), weights.end());
    double total = 0, grad_dot_out = 0;
    for (double& weight : weights) total += weight = exp(weight - top);
    expected_lse[i] = top + log(total);
    for (size_t s = 0; s < seen.size(); ++s) {
      weights[s] /= total;
      for (int64_t x = 0; x < width; ++x) expected_out[i * width + x] += weights[s] * v(seen[s], x);
    }
    for (int64_t x = 0; x < width; ++x) grad_dot_out += grad_out(i, x) * expected_out[i * width + x];
    const double shift = grad_dot_out - (grad_lse.empty() ? 0 : grad_lse[i * call.lse_stride]);
    for (size_t s = 0; s < seen.size(); ++s) {
      const int64_t j = seen[s];
      const double grad_biased = weights[s] * (dot(grad_out, i, v, j) - shift), grad_score = call.scale * grad_biased;
      Bias& biased = bias_of(j);
      if (!biased.values.empty()) biased.expected[biased.at(steps(i, j))] += grad_biased;
      for (int64_t x = 0; x < width; ++x) {
        expected_grad_q[i * width + x] += grad_score * k(j, x);
        expected_grad_k[j * width + x] += grad_score * q(i, x);
        expected_grad_v[j * width + x] += weights[s] * grad_out(i, x);
      }
    }
  }
};

struct Case {
  longspan_attention call = {};
  std::vector<Lane> lanes;

  std::vector<longspan_lane> given() const {
    std::vector<longspan_lane> all;
    for (const Lane& lane : lanes) all.push_back(lane.given);
    return all;
  }
};

struct Limits {
  int64_t tokens, width;
};

inline void choose_who_sees_whom(Lane& lane, const Limits& limits, Random& random) {
  longspan_lane& given = lane.given;
  given.keys = random.between(0, limits.tokens);
  given.queries = random.chance(0.7) ? given.keys : random.between(0, limits.tokens);
  const auto side = [&] { return random.chance(0.2) ? INT64_MAX : random.between(0, random.chance(0.5) ? 5 : 60); };
  given.before = side();
  given.after = random.chance(0.2) ? 0 : side();
  given.dilation = random.chance(0.5) ? 1 : random.between(1, random.chance(0.9) ? 5 : 200);
  if (given.keys == 0) return;
  if (random.chance(0.3)) {
    given.dilation = 1;
    for (int64_t i = 0; i < given.queries; ++i) lane.positions.push_back(random.between(0, given.keys - 1));
    if (random.chance(0.5)) std::sort(lane.positions.begin(), lane.positions.end());
  }
  if (random.chance(0.5)) {
    const double share = random.chance(0.2) ? 0.0 : 0.8;  // sometimes nothing is left to see
    for (int64_t j = 0; j < given.keys; ++j) lane.key_mask.push_back(random.chance(share));
  }
  if (random.chance(0.5)) {
    for (int64_t i = 0; i < given.queries; ++i) lane.query_mask.push_back(random.chance(0.8));
  }
  if (random.chance(0.5)) {
    if (lane.key_mask.empty()) lane.key_mask.assign(given.keys, 1);
    const double share = random.chance(0.5) ? 0.1 : 0.6;
    for (int64_t j = 0; j < given.keys; ++j) {
      if (!random.chance(share)) continue;
      lane.extra.push_back(j);
      lane.key_mask[j] = 0;
    }
    given.extra_causal = random.chance(0.5);
  }
  for (Bias* bias : {&lane.bias, &lane.extra_bias}) {
    if (random.chance(0.4)) bias->choose(random);
  }
}

// Rows that must not be read stay NaN.
inline void fill(Lane& lane, const longspan_attention& call, double size, Random& random) {
  const int64_t queries = lane.given.queries, keys = lane.given.keys;
  lane.q = Matrix(queries, call.width, call.q_stride, call.dtype);
  lane.k = Matrix(keys, call.width, call.k_stride, call.dtype);
  lane.v = Matrix(keys, call.width, call.v_stride, call.dtype);
  lane.out = Matrix(queries, call.width, call.out_stride, call.out_dtype);
  lane.grad_out = Matrix(queries, call.width, call.grad_out_stride, call.dtype);
  lane.grad_q = Matrix(queries, call.width, call.grad_q_stride, call.grad_dtype);
  lane.grad_k = Matrix(keys, call.width, call.grad_k_stride, call.grad_dtype);
  lane.grad_v = Matrix(keys, call.width, call.grad_v_stride, call.grad_dtype);
  lane.lse.assign(queries * call.lse_stride, NAN);
  if (random.chance(0.5)) lane.grad_lse = lane.lse;
  lane.delta.assign(lane.lse.size(), 0);
  for (int64_t i = 0; i < queries; ++i) {
    if (!lane.grad_lse.empty()) lane.grad_lse[i * call.lse_stride] = static_cast<float>(random.gaussian());
    if (!lane.query_mask.empty() && !lane.query_mask[i]) continue;
    lane.q.fill_row(i, size, random);
    lane.grad_out.fill_row(i, 1, random);
  }
  for (int64_t j = 0; j < keys; ++j) {
    if (!lane.key_mask.empty() && !lane.key_mask[j] && !lane.is_extra(j)) continue;
    lane.k.fill_row(j, size, random);
    lane.v.fill_row(j, 1, random);
  }
}

inline Case random_case(const Limits& limits, Random& random) {
  Case test;
  longspan_attention& call = test.call;
  call.dtype = random.chance(0.5) ? LONGSPAN_F32 : LONGSPAN_BF16;
  call.out_dtype = random.chance(0.5) ? LONGSPAN_F32 : call.dtype;
  call.grad_dtype = random.chance(0.5) ? LONGSPAN_F32 : call.dtype;
  call.width = random.chance(0.3) ? limits.width / 32 * 32 : random.between(1, limits.width);
  call.scale = static_cast<float>(random.chance(0.1) ? 0.0 : (random.chance(0.2) ? -1 : 1) / sqrt(call.width));
  for (int64_t* stride : {&call.q_stride, &call.k_stride, &call.v_stride, &call.out_stride, &call.grad_out_stride,
                          &call.grad_q_stride, &call.grad_k_stride, &call.grad_v_stride}) {
    *stride = call.width + random.between(0, 3);
  }
  call.lse_stride = random.between(1, 3);
  call.query_mask_stride = call.key_mask_stride = 1;
  const double size = random.chance(0.2) ? 3 : 1;
  test.lanes.resize(random.between(1, 3));
  for (Lane& lane : test.lanes) {
    choose_who_sees_whom(lane, limits, random);
    fill(lane, call, size, random);
    lane.expect(call);
    lane.point_to_data();
  }
  return test;
}
