// Gaussian-mixture log-likelihood on the CPU, with direct differences z - mu throughout.
// Forward: 3 FLOP for each of N K D; reads N D + K D values, writes N K. Backward: 6 FLOP for each of N K D;
// reads N D + N K + K D, writes N D, and K D for each chunk of rows.
#include "gmm_log_prob.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "cpu.h"

namespace normatch {
namespace {

constexpr int kTileRows = 8, kTileClasses = 2;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kBlockRows = 256;  // rows whose terms are added up in one go in the gradient of the means
constexpr int64_t kStretch = 16;     // vectors added up in one go in a distance

int64_t whole_vectors(int64_t width, int64_t lanes) {
  return (width + lanes - 1) / lanes * lanes;
}

// What the mixture's parameters come to, per class.
template <typename Acc>
struct Classes {
  std::vector<double> log_pi, log_sigma;
  std::vector<Acc> precision;

  Classes(const Tensor& rho, const Tensor& logits) {
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
      precision.push_back(gmm_precision<Acc>(log_sigma[k]));
    }
  }
};

// Rows of z as accumulator values, filled up to `padded` columns with zeros.
template <typename V, typename T, typename Acc>
NM_HD void convert_rows(const Rows<const T>& z, int64_t first, int64_t rows, int64_t width, int64_t padded, Acc* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns<V>(0, width, [&](int64_t d, const auto& load, const auto&) NM_INLINE {
      store(out + r * padded + d, load(z[first + r] + d));
    });
  }
}

// |z_r - mu_c|^2 of R rows and C classes; the means' rows are `padded` values apart.
template <typename V, int R, int C, typename Acc>
NM_HD void distances(Rows<const Acc> z, const Acc* means, int64_t padded, Acc (&out)[R][C]) {
  for (auto& row : out)
    for (auto& value : row) value = 0;
  for (int64_t begin = 0; begin < padded; begin += kStretch * kLanes<V>) {
    V sums[R][C] = {};
    const int64_t end = std::min(begin + kStretch * kLanes<V>, padded);
    for (int64_t d = begin; d < end; d += kLanes<V>) {
      V mu[C];
      for (int c = 0; c < C; ++c) mu[c] = load<V>(means + c * padded + d);
      for (int r = 0; r < R; ++r) {
        const V point = load<V>(z[r] + d);
        for (int c = 0; c < C; ++c) {
          const V difference = point - mu[c];
          sums[r][c] += difference * difference;
        }
      }
    }
    if constexpr (R * C % kLanes<V> == 0) {
      for (int i = 0; i < R * C; i += kLanes<V>)
        store<V>(&out[0][0] + i, load<V>(&out[0][0] + i) + lanes_sums(&sums[0][0] + i));
    } else {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r][c] += horizontal_sum(sums[r][c]);
    }
  }
}

// `offset` and `half_precision` hold what belongs to the classes R times over: the results of R rows lie in a row.
template <typename V, int R, typename Acc>
NM_HD void log_prob_rows(Rows<const Acc> z, const Acc* means, int64_t classes, int64_t padded, const Acc* offset,
                         const Acc* half_precision, Acc* out) {
  int64_t k = 0;
  for (; k + kTileClasses <= classes; k += kTileClasses) {
    Acc distance[R][kTileClasses];
    distances<V>(z, means + k * padded, padded, distance);
    for (int r = 0; r < R; ++r) memcpy(out + r * classes + k, distance[r], sizeof(distance[r]));
  }
  for (; k < classes; ++k) {
    Acc distance[R][1];
    distances<V>(z, means + k * padded, padded, distance);
    for (int r = 0; r < R; ++r) out[r * classes + k] = distance[r][0];
  }
  for_columns<V>(0, R * classes, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
    store(out + j, load(offset + j) - load(half_precision + j) * load(out + j));
  });
}

// Where the posterior goes; log_prob is null where it is not wanted.
template <typename Acc>
struct Outputs {
  Acc* class_log_prob;
  Acc* log_prob;
  int64_t* label;
  Acc* confidence;
};

// logsumexp, first largest and its share of a row's class log-probabilities.
template <typename V, typename Acc>
NM_HD void posterior_row(const Acc* values, int64_t classes, const Outputs<Acc>& out, int64_t row) {
  int64_t label = 0;
  for (int64_t k = 1; k < classes; ++k)
    if (values[k] > values[label]) label = k;
  const Acc top = values[label];
  double sum = 0;
  for (int64_t k = 0; k < classes; k += kLanes<V>) {
    const int64_t n = std::min<int64_t>(kLanes<V>, classes - k);
    const V terms = Math<V>::exp(load_first<V>(values + k, n) - top);
    if constexpr (std::is_same_v<V, double>)
      sum += terms;
    else
      for (int64_t i = 0; i < n; ++i) sum += terms[i];
  }
  out.log_prob[row] = top == -INFINITY ? top : Acc(top + std::log(sum));
  out.label[row] = label;
  out.confidence[row] = Acc(1 / sum);
}

template <typename T>
void log_prob(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps,
              const Outputs<acc_t<T>>& out) {
  using Acc = acc_t<T>;
  const int64_t rows = z.size(0), width = z.size(1), classes = means.size(0);
  const Tensor dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Classes<Acc> mixture(rho, logits);
  std::vector<Acc> offset(kTileRows * classes), half_precision(kTileRows * classes);
  for (int64_t j = 0; j < kTileRows * classes; ++j) {
    const int64_t k = j % classes;
    offset[j] = Acc(gmm_offset(mixture.log_pi[k], mixture.log_sigma[k], eps, double(width)));
    half_precision[j] = Acc(0.5) * mixture.precision[k];
  }
  const auto points = read_rows<T>(dense_z);
  const auto mu = read_rows<Acc>(dense_means);
  const int64_t padded = whole_vectors(width, 16);
  std::vector<Acc> padded_means(classes * padded);
  for (int64_t k = 0; k < classes; ++k) std::copy_n(mu[k], width, &padded_means[k * padded]);

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  parallel_rows(tiles, kTileRows * width * classes, [&](int64_t begin, int64_t end) {
    std::vector<Acc> tile(kTileRows * padded);
    vectorised<T>([&](auto lanes) NM_INLINE {
      using V = typename decltype(lanes)::type;
      for (int64_t i = begin * kTileRows; i < std::min(end * kTileRows, rows); i += kTileRows) {
        const int64_t here = std::min<int64_t>(kTileRows, rows - i);
        Rows<const Acc> z{tile.data(), padded};
        if (padded != width || !std::is_same_v<T, Acc>)
          convert_rows<V>(points, i, here, width, padded, tile.data());
        else if constexpr (std::is_same_v<T, Acc>)
          z = {points[i], points.stride};
        for (int64_t r = i + kTileRows; r < std::min(i + 2 * kTileRows, rows);
             ++r)  // comes in while this one is in work
          for (int64_t d = 0; d < width; d += kCacheLine / sizeof(T)) __builtin_prefetch(points[r] + d);
        Acc* const values = out.class_log_prob + i * classes;
        if (here == kTileRows)
          log_prob_rows<V, kTileRows>(z, padded_means.data(), classes, padded, offset.data(), half_precision.data(),
                                      values);
        else
          for (int64_t r = 0; r < here; ++r)
            log_prob_rows<V, 1>({z[r], 0}, padded_means.data(), classes, padded, offset.data(), half_precision.data(),
                                values + r * classes);
        if (out.log_prob)
          for (int64_t r = 0; r < here; ++r) posterior_row<V>(values + r * classes, classes, out, i + r);
      }
    });
  });
}

Tensor gmm_log_prob(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps) {
  const Tensor result = new_tensor(z, {z.size(0), means.size(0)}, accumulation_type(z));
  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    log_prob<T>(z, means, rho, logits, eps, {result.mutable_data_ptr<Acc>(), nullptr, nullptr, nullptr});
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_posterior(const Tensor& z, const Tensor& means, const Tensor& rho,
                                                         const Tensor& logits, double eps) {
  const int64_t rows = z.size(0);
  const ScalarType sums = accumulation_type(z);
  const Tensor result = new_tensor(z, {rows, means.size(0)}, sums), total = new_tensor(z, {rows}, sums);
  const Tensor label = new_tensor(z, {rows}, ScalarType::Long), confidence = new_tensor(z, {rows}, sums);
  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    log_prob<T>(z, means, rho, logits, eps,
                {result.mutable_data_ptr<Acc>(), total.mutable_data_ptr<Acc>(), label.mutable_data_ptr<int64_t>(),
                 confidence.mutable_data_ptr<Acc>()});
  });
  return {result, total, label, confidence};
}

// The gradients of one tile of rows. With w = grad / sigma^2 and d = z - mu:
//   dz_r = -sum_k w d,   dmu_k += sum_r w d,   scatter_k += sum_r w |d|^2
// means, grad_means: [padded / lanes][classes][lanes], so that the inner loop over classes runs through memory in
// order; spread: [classes][lanes], scratch.
template <typename V, int R, typename Acc>
NM_HD void backward_tile(Acc* z, int64_t padded, int64_t classes, const Acc* weights, const Acc* means, Acc* grad_means,
                         Acc* spread, double* scatter) {
  constexpr int64_t L = kLanes<V>;
  for (int64_t begin = 0; begin < padded; begin += kStretch * L) {
    std::fill_n(spread, classes * L, Acc(0));
    for (int64_t d = begin; d < std::min(begin + kStretch * L, padded); d += L) {
      V point[R], grad[R] = {};
      for (int r = 0; r < R; ++r) point[r] = load<V>(z + r * padded + d);
      for (int64_t first = 0; first < classes; first += kClassStretch) {
        V part[R] = {};
        for (int64_t k = first; k < std::min(first + kClassStretch, classes); ++k) {
          const int64_t at = (d / L * classes + k) * L;
          const V mu = load<V>(means + at);
          V grad_mu{}, squares{};
          for (int r = 0; r < R; ++r) {
            const V difference = point[r] - mu;
            const V pull = weights[k * R + r] * difference;
            part[r] += pull;
            grad_mu += pull;
            squares += pull * difference;
          }
          store<V>(grad_means + at, load<V>(grad_means + at) + grad_mu);
          store<V>(spread + k * L, load<V>(spread + k * L) + squares);
        }
        for (int r = 0; r < R; ++r) grad[r] -= part[r];
      }
      for (int r = 0; r < R; ++r) store<V>(z + r * padded + d, grad[r]);  // dz takes the place of z
    }
    for (int64_t k = 0; k < classes; ++k) scatter[k] += horizontal_sum(load<V>(spread + k * L));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_log_prob_backward(const Tensor& grad, const Tensor& z,
                                                                 const Tensor& means, const Tensor& rho,
                                                                 const Tensor& logits, double eps) {
  const int64_t rows = z.size(0), width = z.size(1), classes = means.size(0);
  const Tensor dense_grad = dense_rows(grad), dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Tensor grad_z = new_tensor(z, {rows, width}, z.scalar_type());
  const Tensor grad_means = new_tensor(means, {classes, width}, means.scalar_type());
  const Tensor grad_rho = new_tensor(rho, {classes}, rho.scalar_type());
  const Tensor grad_logits = new_tensor(logits, {classes}, logits.scalar_type());
  const int64_t padded = whole_vectors(width, 16);
  // Each chunk has its own copy of the means' gradient: as many chunks as 64 MB of floats allow, at least 8.
  const Chunks chunks(rows, 64, std::clamp<int64_t>((1 << 24) / (classes * padded), 8, 64));

  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const Classes<Acc> mixture(rho, logits);
    const auto points = read_rows<T>(dense_z);
    const auto upstream = read_rows<Acc>(dense_grad), mu = read_rows<Acc>(dense_means);
    const auto out_z = write_rows<T>(grad_z);
    const auto out_means = write_rows<Acc>(grad_means);
    std::vector<double> correction(classes);  // of the rounding of the precision, the same in all terms of a class
    for (int64_t k = 0; k < classes; ++k)
      correction[k] = std::exp(-2.0 * mixture.log_sigma[k]) / double(mixture.precision[k]);
    std::vector<Acc> partial(chunks.count * classes * padded);
    std::vector<double> scatter(chunks.count * classes), total(chunks.count * classes);

    vectorised<T>([&](auto widest) {  // only to learn the number of lanes, for the layout
      constexpr int64_t L = kLanes<typename decltype(widest)::type>;
      std::vector<Acc> packed(classes * padded);
      for (int64_t k = 0; k < classes; ++k)
        for (int64_t d = 0; d < width; ++d) packed[(d / L * classes + k) * L + d % L] = mu[k][d];

      torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
        std::vector<Acc> tile(kTileRows * padded), weights(kTileRows * classes), block(classes * padded),
            spread(classes * L);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          Acc* const sums = &partial[chunk * classes * padded];
          vectorised<T>([&](auto lanes) NM_INLINE {
            using V = typename decltype(lanes)::type;
            for (int64_t first = chunks.begin(chunk); first < chunks.end(chunk); first += kBlockRows) {
              std::fill(block.begin(), block.end(), Acc(0));
              const int64_t last = std::min(first + kBlockRows, chunks.end(chunk));
              for (int64_t i = first; i < last; i += kTileRows) {
                const int64_t here = std::min<int64_t>(kTileRows, last - i);
                convert_rows<V>(points, i, here, width, padded, tile.data());
                std::fill(weights.begin(), weights.end(), Acc(0));  // rows past the end weigh nothing
                for (int64_t r = 0; r < here; ++r)
                  for (int64_t k = 0; k < classes; ++k) {
                    weights[k * kTileRows + r] = upstream[i + r][k] * mixture.precision[k];
                    total[chunk * classes + k] += upstream[i + r][k];
                  }
                backward_tile<V, kTileRows>(tile.data(), padded, classes, weights.data(), packed.data(), block.data(),
                                            spread.data(), &scatter[chunk * classes]);
                for (int64_t r = 0; r < here; ++r)
                  for_columns<V>(0, width, [&](int64_t d, const auto& load, const auto& store) NM_INLINE {
                    store(out_z[i + r] + d, load(&tile[r * padded + d]));
                  });
              }
              for (int64_t j = 0; j < classes * padded; j += L)
                store<V>(sums + j, load<V>(sums + j) + load<V>(&block[j]));
            }
          });
        }
      });

      parallel_rows(classes, width * chunks.count, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          for (int64_t d = 0; d < width; ++d) {
            double sum = 0;
            for (int64_t c = 0; c < chunks.count; ++c)
              sum += partial[c * classes * padded + (d / L * classes + k) * L + d % L];
            out_means[k][d] = Acc(sum * correction[k]);
          }
      });
    });

    Acc* const out_rho = grad_rho.mutable_data_ptr<Acc>();
    Acc* const out_logits = grad_logits.mutable_data_ptr<Acc>();
    const Tensor dense_rho = torch::stable::contiguous(rho);
    const Acc* const r = dense_rho.const_data_ptr<Acc>();
    std::vector<double> weight(classes);
    double weights = 0;
    for (int64_t k = 0; k < classes; ++k) {
      double spread = 0, count = 0;
      for (int64_t c = 0; c < chunks.count; ++c) {
        spread += scatter[c * classes + k];
        count += total[c * classes + k];
      }
      spread *= correction[k];
      out_rho[k] = Acc((spread - double(width) * count) * log_softplus_slope(double(r[k])));
      weight[k] = count * log_weight_slope(mixture.log_pi[k], eps);
      weights += weight[k];
    }
    for (int64_t k = 0; k < classes; ++k) out_logits[k] = Acc(weight[k] - std::exp(mixture.log_pi[k]) * weights);
  });
  return {grad_z, grad_means, grad_rho, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("gmm_log_prob", TORCH_BOX(&gmm_log_prob));
  m.impl("gmm_log_prob_backward", TORCH_BOX(&gmm_log_prob_backward));
  m.impl("gmm_posterior", TORCH_BOX(&gmm_posterior));
}

}  // namespace normatch
