// Gradients of the Gaussian-mixture log-likelihood on the CPU: 6 FLOP for each of N K D; reads N D + N K + K D, writes
// N D, and K D for each chunk of rows.
#include <tuple>

#include "gmm_log_prob_cpu.h"
#include "limits.h"

namespace normatch {
namespace {

constexpr int64_t kBlockRows = 256;  // rows whose terms are added up in one go in the gradient of the means

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

// A thread's scratch: a tile of rows and what goes with it, and the means' gradient of a block.
template <typename Acc>
struct Scratch {
  std::vector<Acc> tile, weights, block, spread;
  Scratch(int64_t classes, int64_t padded, int64_t lanes)
      : tile(kRowTile * padded), weights(kRowTile * classes), block(classes * padded), spread(classes * lanes) {}
};

// Rows [first, last): dz, and what they add to scratch.block, scatter and total.
template <typename V, typename T, typename Acc>
NM_HD void backward_block(Rows<const T> points, Rows<const Acc> upstream, int64_t first, int64_t last, int64_t width,
                          int64_t padded, const std::vector<Acc>& precision, const Acc* means, Rows<T> grad_z,
                          Scratch<Acc>& scratch, double* scatter, double* total) {
  const int64_t classes = precision.size();
  std::vector<Acc>&tile = scratch.tile, &weights = scratch.weights;
  std::fill(scratch.block.begin(), scratch.block.end(), Acc(0));
  for (int64_t i = first; i < last; i += kRowTile) {
    const int64_t here = std::min<int64_t>(kRowTile, last - i);
    convert_rows<V>(points, i, here, width, padded, tile.data());
    std::fill(weights.begin(), weights.end(), Acc(0));  // rows past the end weigh nothing
    for (int64_t r = 0; r < here; ++r)
      for (int64_t k = 0; k < classes; ++k) {
        weights[k * kRowTile + r] = upstream[i + r][k] * precision[k];
        total[k] += upstream[i + r][k];
      }
    backward_tile<V, kRowTile>(tile.data(), padded, classes, weights.data(), means, scratch.block.data(),
                               scratch.spread.data(), scatter);
    for (int64_t r = 0; r < here; ++r)
      for_columns<V>(0, width, [&](int64_t d, const auto& load, const auto& store) NM_INLINE {
        store(grad_z[i + r] + d, load(&tile[r * padded + d]));
      });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_log_prob_backward(const Tensor& grad, const Tensor& z,
                                                                 const Tensor& means, const Tensor& rho,
                                                                 const Tensor& logits, double eps) {
  const int64_t rows = z.size(0), width = z.size(1), classes = means.size(0);
  const Tensor dense_grad = dense_rows(grad), dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Tensor grad_z = new_like(z), grad_means = new_like(means), grad_rho = new_like(rho);
  const Tensor grad_logits = new_like(logits);
  const int64_t padded = normatch::padded(width);
  // Each chunk has its own copy of the means' gradient: as many as the workspace allows, at least 8.
  const Chunks chunks(rows, 64, std::clamp<int64_t>(kWorkspace / (classes * padded), 8, 64));

  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const MixtureClasses<Acc> mixture(rho, logits, eps, width);
    const auto points = read_rows<T>(dense_z);
    const auto upstream = read_rows<Acc>(dense_grad), mu = read_rows<Acc>(dense_means);
    const auto out_z = write_rows<T>(grad_z);
    const auto out_means = write_rows<Acc>(grad_means);
    std::vector<double> correction(classes);  // of the rounding of the precision, the same in all terms of a class
    for (int64_t k = 0; k < classes; ++k)
      correction[k] = std::exp(-2.0 * mixture.log_sigma[k]) / double(mixture.precision[k]);
    std::vector<Acc> partial(chunks.count * classes * padded);
    std::vector<double> scatter(chunks.count * classes), total(chunks.count * classes);

    vectorized<T>([&](auto widest) {  // only to learn the number of lanes, for the layout
      constexpr int64_t L = kLanes<typename decltype(widest)::type>;
      std::vector<Acc> packed(classes * padded);
      for (int64_t k = 0; k < classes; ++k)
        for (int64_t d = 0; d < width; ++d) packed[(d / L * classes + k) * L + d % L] = mu[k][d];

      torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
        Scratch<Acc> scratch(classes, padded, L);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          Acc* const sums = &partial[chunk * classes * padded];
          vectorized<T>([&](auto lanes) NM_INLINE {
            using V = typename decltype(lanes)::type;
            for (int64_t first = chunks.begin(chunk); first < chunks.end(chunk); first += kBlockRows) {
              const int64_t last = std::min(first + kBlockRows, chunks.end(chunk));
              backward_block<V>(points, upstream, first, last, width, padded, mixture.precision, packed.data(), out_z,
                                scratch, &scatter[chunk * classes], &total[chunk * classes]);
              for (int64_t j = 0; j < classes * padded; j += L)
                store<V>(sums + j, load<V>(sums + j) + load<V>(&scratch.block[j]));
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

    mixture.parameter_gradients(scatter, total, correction, grad_rho.mutable_data_ptr<Acc>(),
                                grad_logits.mutable_data_ptr<Acc>());
  });
  return {grad_z, grad_means, grad_rho, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("gmm_log_prob_backward", TORCH_BOX(&gmm_log_prob_backward));
}

}  // namespace normatch
