// The mixture's constants for each class on the CPU, and the gradients of what they are made of.
#pragma once

#include "cpu.h"
#include "gmm_log_prob.h"

namespace normatch {

constexpr int kRowTile = 8;
constexpr int64_t kStretch = 16;  // vectors added up in one go in a distance

// Rows of z as accumulator values, filled up to `padded` columns with zeros.
template <typename V, typename T, typename Acc>
NM_HD void convert_rows(const Rows<const T>& z, int64_t first, int64_t rows, int64_t width, int64_t padded, Acc* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<V>(0, width, [&](int64_t d, const auto& load, const auto&) NM_INLINE {
      store(out + r * padded + d, load(z[first + r] + d));
    });
  }
}

// What the mixture's parameters come to, per class.
template <typename Acc>
struct MixtureClasses {
  double eps, dimensions;
  std::vector<double> log_pi, log_sigma, slope;  // slope: of log sigma in rho
  std::vector<Acc> offset, precision;

  MixtureClasses(const Tensor& rho, const Tensor& logits, double eps, int64_t dimensions)
      : eps(eps), dimensions(double(dimensions)) {
    const int64_t classes = rho.size(0);
    const Tensor dense_rho = torch::stable::contiguous(rho), dense_logits = torch::stable::contiguous(logits);
    const Acc* r = dense_rho.template const_data_ptr<Acc>();
    const Acc* a = dense_logits.template const_data_ptr<Acc>();
    const double top = *std::max_element(a, a + classes);
    double sum = 0;
    for (int64_t k = 0; k < classes; ++k) sum += std::exp(double(a[k]) - top);
    for (int64_t k = 0; k < classes; ++k) {
      log_pi.push_back(double(a[k]) - top - std::log(sum));
      log_sigma.push_back(log_softplus(double(r[k])));
      slope.push_back(log_softplus_slope(double(r[k])));
      offset.push_back(Acc(gmm_offset(log_pi[k], log_sigma[k], eps, this->dimensions)));
      precision.push_back(gmm_precision<Acc>(log_sigma[k]));
    }
  }

  // drho and dlogits of what the chunks of rows have summed with the gradients g of the class log-probabilities:
  // scatter[chunk][k] of g |z - mu_k|^2 precision_k, to be multiplied by correction[k], and total[chunk][k] of g.
  void parameter_gradients(const std::vector<double>& scatter, const std::vector<double>& total,
                           const std::vector<double>& correction, Acc* grad_rho, Acc* grad_logits) const {
    const size_t classes = log_pi.size();
    std::vector<double> weight(classes);
    double weight_sum = 0;
    for (size_t k = 0; k < classes; ++k) {
      double spread = 0, count = 0;
      for (size_t i = k; i < scatter.size(); i += classes) {
        spread += scatter[i];
        count += total[i];
      }
      grad_rho[k] = Acc((spread * correction[k] - dimensions * count) * slope[k]);
      weight[k] = count * log_weight_slope(log_pi[k], eps);
      weight_sum += weight[k];
    }
    for (size_t k = 0; k < classes; ++k) grad_logits[k] = Acc(weight[k] - std::exp(log_pi[k]) * weight_sum);
  }
};

}  // namespace normatch
