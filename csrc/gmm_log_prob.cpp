// Gaussian-mixture log-likelihood on the CPU, with direct differences z - mu throughout.
// 3 FLOP for each of N K D; reads N D + K D values, writes N K.
#include "gmm_log_prob_cpu.h"

namespace normatch {
namespace {

constexpr int kClassTile = 2;
constexpr int64_t kCacheLine = 64;

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
  for (; k + kClassTile <= classes; k += kClassTile) {
    Acc distance[R][kClassTile];
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

// logsumexp, first largest and its share of a row's class log-probabilities.
template <typename V, typename Acc>
NM_HD void posterior_row(const Acc* values, int64_t classes, const MixtureOutputs<Acc>& out, int64_t row) {
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

struct LogProb {
  template <typename T>
  static void run(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps,
                  const MixtureOutputs<acc_t<T>>& out) {
    using Acc = acc_t<T>;
    const int64_t rows = z.size(0), width = z.size(1), classes = means.size(0);
    const MixtureClasses<Acc> mixture(rho, logits, eps, width);
    std::vector<Acc> offset(kRowTile * classes), half_precision(kRowTile * classes);
    for (int64_t j = 0; j < kRowTile * classes; ++j) {
      offset[j] = mixture.offset[j % classes];
      half_precision[j] = Acc(0.5) * mixture.precision[j % classes];
    }
    const auto points = read_rows<T>(z);
    const auto mu = read_rows<Acc>(means);
    const int64_t padded = normatch::padded(width);
    std::vector<Acc> padded_means(classes * padded);
    for (int64_t k = 0; k < classes; ++k) std::copy_n(mu[k], width, &padded_means[k * padded]);

    const int64_t tiles = (rows + kRowTile - 1) / kRowTile;
    parallel_rows(tiles, kRowTile * width * classes, [&](int64_t begin, int64_t end) {
      std::vector<Acc> tile(kRowTile * padded);
      vectorized<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t i = begin * kRowTile; i < std::min(end * kRowTile, rows); i += kRowTile) {
          const int64_t here = std::min<int64_t>(kRowTile, rows - i);
          Rows<const Acc> inputs{tile.data(), padded};
          if (padded != width || !std::is_same_v<T, Acc>)
            convert_rows<V>(points, i, here, width, padded, tile.data());
          else if constexpr (std::is_same_v<T, Acc>)
            inputs = {points[i], points.stride};
          for (int64_t r = i + kRowTile; r < std::min(i + 2 * kRowTile, rows); ++r)  // the next tile, meanwhile
            for (int64_t d = 0; d < width; d += kCacheLine / sizeof(T)) __builtin_prefetch(points[r] + d);
          Acc* const values = out.class_log_prob + i * classes;
          if (here == kRowTile)
            log_prob_rows<V, kRowTile>(inputs, padded_means.data(), classes, padded, offset.data(),
                                       half_precision.data(), values);
          else
            for (int64_t r = 0; r < here; ++r)
              log_prob_rows<V, 1>({inputs[r], 0}, padded_means.data(), classes, padded, offset.data(),
                                  half_precision.data(), values + r * classes);
          if (out.log_prob)
            for (int64_t r = 0; r < here; ++r) posterior_row<V>(values + r * classes, classes, out, i + r);
        }
      });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("gmm_log_prob", TORCH_BOX(&MixtureOps<LogProb>::log_prob));
  m.impl("gmm_posterior", TORCH_BOX(&MixtureOps<LogProb>::posterior));
}

}  // namespace normatch
