// What both backends of the flow head share: which half a coupling changes, the order of its parameters, the dropout.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "philox.h"
#include "tensors.h"

namespace normatch {

// A coupling's parameters in the op's order.
enum CouplingTensor : int { kWeight0, kBias0, kWeight1, kBias1, kWeight2, kBias2, kGain, kCouplingTensors };

// Coupling j keeps half j % 2 of the features, [0, D / 2) or [D / 2, D), and changes the other one.
NM_HD int64_t half_begin(int half, int64_t features) {
  return half ? features / 2 : 0;
}
NM_HD int64_t half_width(int half, int64_t features) {
  return half ? features - features / 2 : features / 2;
}

// Dropout of the first hidden layer: unit u of a row is kept where word u % 4 of
// Philox4x32-10(counter = (u / 4, row, row >> 32, coupling), key = seed) is at least `threshold`.
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;  // dropout * 2^32
  double scale;        // 1 / (1 - dropout)

  static Dropout of(double dropout, uint64_t seed) {
    const double words = dropout * 4294967296.0;
    return {dropout > 0, seed, words < 4294967295.0 ? uint32_t(words + 0.5) : 0xffffffffu,
            dropout < 1 ? 1 / (1 - dropout) : 0};
  }
};

NM_HD Words dropout_words(uint64_t seed, int64_t row, int64_t unit, int coupling) {
  return philox(uint32_t(unit / 4), uint32_t(row), uint32_t(uint64_t(row) >> 32), uint32_t(coupling), seed);
}

// z, logdet, class_log_prob, log_prob, and the state that backward starts from.
using FlowHeadResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// Of x, the couplings' parameters, means, rho and logits.
using FlowHeadGradients = std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor>;

inline FlowHeadResults flow_head_results(const Tensor& x, const Tensor& means) {
  const int64_t rows = x.size(0);
  const ScalarType type = accumulation_type(x);
  return {new_tensor(x, {rows, x.size(1)}, type), new_tensor(x, {rows}, type),
          new_tensor(x, {rows, means.size(0)}, type), new_tensor(x, {rows}, type),
          new_tensor(x, {rows, x.size(1)}, ScalarType::Double)};
}

}  // namespace normatch
