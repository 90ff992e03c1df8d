// The mixture's constants for a class on the GPU, where every kernel computes its own.
#pragma once

#include "cuda.h"
#include "gmm_log_prob.h"

namespace normatch {

template <typename Acc>
struct Mixture {
  const Acc *rho, *logits;
  double eps;
  int classes;

  // log pi_k = logits_k - top - log_sum
  struct Normalizer {
    double top, log_sum;
  };

  // Every warp computes it for itself.
  __device__ __forceinline__ Normalizer normalizer() const {
    const int lane = threadIdx.x % kLanesOfWarp;
    double top = -INFINITY, sum = 0;
    for (int k = lane; k < classes; k += kLanesOfWarp) top = max(top, double(logits[k]));
    top = lanes_max(top);
    for (int k = lane; k < classes; k += kLanesOfWarp) sum += ::exp(double(logits[k]) - top);
    return {top, ::log(lanes_sum<kLanesOfWarp>(sum))};
  }
  __device__ double log_pi(const Normalizer& all, int k) const { return double(logits[k]) - all.top - all.log_sum; }
  __device__ double log_sigma(int k) const { return log_softplus(double(rho[k])); }
  __device__ Acc precision(int k) const { return gmm_precision<Acc>(log_sigma(k)); }
  // What turns a distance into a log-probability.
  __device__ __forceinline__ void terms(const Normalizer& all, int k, int64_t width, Acc& offset,
                                        Acc& half_precision) const {
    const double log_sigma = this->log_sigma(k);
    offset = Acc(gmm_offset(log_pi(all, k), log_sigma, eps, double(width)));
    half_precision = Acc(0.5) * gmm_precision<Acc>(log_sigma);
  }
};

}  // namespace normatch
