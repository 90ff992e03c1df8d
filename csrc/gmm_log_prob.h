// Log-likelihood of an isotropic Gaussian mixture, class by class:
//   l_k(z) = offset_k - half_precision_k |z - mu_k|^2,   sigma_k = softplus(rho_k), pi = softmax(logits)
//   offset_k = log(pi_k + eps) - D log sigma_k - D/2 log 2 pi,   half_precision_k = 1 / (2 sigma_k^2)
// The per-class constants are few: they are made in double, so that only the distances carry rounding errors.
#pragma once

#include <tuple>

#include "tensors.h"

namespace normatch {

constexpr int64_t kClassStretch = 32;  // classes whose terms of dz are added up in one go: a sum of 1,000 rounds more

// log softplus(rho), for any rho: softplus(rho) -> exp(rho) on the left, where the logarithm of it would
// fail.
NM_HD double log_softplus(double rho) {
  if (rho < -20.0) return rho - 0.5 * ::exp(rho);
  return ::log(rho > 0.0 ? rho + ::log1p(::exp(-rho)) : ::log1p(::exp(rho)));
}

// d log softplus(rho) / d rho = sigmoid(rho) / softplus(rho); tends to 1 on the left.
NM_HD double log_softplus_slope(double rho) {
  if (rho < -20.0) return 1.0 - 0.5 * ::exp(rho);
  return 1.0 / (1.0 + ::exp(-rho)) / (rho > 0.0 ? rho + ::log1p(::exp(-rho)) : ::log1p(::exp(rho)));
}

// log(pi + eps) from log pi; exact for eps = 0, however small pi is.
NM_HD double log_weight(double log_pi, double eps) {
  return eps == 0.0 ? log_pi : ::log(::exp(log_pi) + eps);
}

// d log(pi + eps) / d log pi
NM_HD double log_weight_slope(double log_pi, double eps) {
  return eps == 0.0 ? 1.0 : 1.0 / (1.0 + eps * ::exp(-log_pi));
}

NM_HD double gmm_offset(double log_pi, double log_sigma, double eps, double dimensions) {
  constexpr double kHalfLog2Pi = 0.91893853320467274178;
  return log_weight(log_pi, eps) - dimensions * (log_sigma + kHalfLog2Pi);
}

// Kept finite, so that a point on its mean has the distance 0 * precision = 0 however narrow the class is.
template <typename Acc>
NM_HD Acc gmm_precision(double log_sigma) {
  const double precision = ::exp(-2.0 * log_sigma);
  const double largest = sizeof(Acc) == 4 ? 3.4e38 : 1.7e308;
  return Acc(precision < largest ? precision : largest);
}

// Where the results go; log_prob, label and confidence are null where only the classes' log-probabilities are wanted.
template <typename Acc>
struct MixtureOutputs {
  Acc *class_log_prob, *log_prob;
  int64_t* label;
  Acc* confidence;
};

// The forward ops of a backend, from its LogProb::run<T>, which takes dense tensors of at least one row.
template <typename LogProb>
struct MixtureOps {
  using Posterior = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Posterior posterior(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits,
                             double eps) {
    const ScalarType sums = accumulation_type(z);
    const int64_t rows = z.size(0);
    const Posterior out{new_tensor(z, {rows, means.size(0)}, sums), new_tensor(z, {rows}, sums),
                        new_tensor(z, {rows}, ScalarType::Long), new_tensor(z, {rows}, sums)};
    run(z, means, rho, logits, eps, out);
    return out;
  }

  static Tensor log_prob(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps) {
    const Posterior out{new_tensor(z, {z.size(0), means.size(0)}, accumulation_type(z)), {}, {}, {}};
    run(z, means, rho, logits, eps, out);
    return std::get<0>(out);
  }

  static void run(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps,
                  const Posterior& results) {
    if (z.size(0) == 0) return;
    dispatch(z.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using Acc = acc_t<T>;
      const auto& [class_log_prob, log_prob, label, confidence] = results;
      MixtureOutputs<Acc> out{class_log_prob.template mutable_data_ptr<Acc>(), nullptr, nullptr, nullptr};
      if (log_prob.defined())
        out = {out.class_log_prob, log_prob.template mutable_data_ptr<Acc>(),
               label.template mutable_data_ptr<int64_t>(), confidence.template mutable_data_ptr<Acc>()};
      LogProb::template run<T>(dense_rows(z), dense_rows(means), torch::stable::contiguous(rho),
                               torch::stable::contiguous(logits), eps, out);
    });
  }
};

}  // namespace normatch
