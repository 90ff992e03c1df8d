// Log-likelihood of an isotropic Gaussian mixture, class by class:
//   l_k(z) = offset_k - half_precision_k |z - mu_k|^2,   sigma_k = softplus(rho_k), pi = softmax(logits)
//   offset_k = log(pi_k + eps) - D log sigma_k - D/2 log 2 pi,   half_precision_k = 1 / (2 sigma_k^2)
// The per-class constants are few: they are made in double, so that only the distances carry rounding errors.
#pragma once

#include "portable.h"

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

}  // namespace normatch
