// Gaussian-mixture log-likelihood on the GPU, with direct differences z - mu throughout.
// 3 FLOP for each of N K D; reads N D + K D values, writes N K (and 3 N for the posterior). Up to 16 classes: the means
// in shared memory, 8 threads per row, all classes' sums in registers, so z is read once. More classes: tiles of 32
// rows x 32 classes, both operands through shared memory 64 columns at a time.
#include "gmm_log_prob_cuda.h"

namespace normatch {
namespace {

constexpr int kThreads = 128;
constexpr int kFew = 16;  // classes whose sums a thread holds in registers

// logsumexp and the largest of values that come one by one.
template <typename Acc>
struct Posterior {
  Acc top = -INFINITY, sum = 0;
  int label = 0;

  __device__ void add(Acc value, int k) { add({value, Acc(1), k}); }
  __device__ void add(const Posterior& more) {
    const bool above = !(more.top <= top) && top == top;  // a NaN stays on top
    if (above || (more.top == top && more.label < label)) label = more.label;
    const Acc higher = above ? more.top : top;
    if (higher == -INFINITY) return;
    sum = sum * Math<Acc>::exp(top - higher) + more.sum * Math<Acc>::exp(more.top - higher);
    top = higher;
  }
  __device__ Posterior from_lane_across(int mask) const {
    return {__shfl_xor_sync(kFullWarp, top, mask), __shfl_xor_sync(kFullWarp, sum, mask),
            __shfl_xor_sync(kFullWarp, label, mask)};
  }
  __device__ void write(const MixtureOutputs<Acc>& out, int64_t row) const {
    out.log_prob[row] = top + Math<Acc>::log(sum);
    out.label[row] = label;
    out.confidence[row] = 1 / sum;
  }
};

constexpr int kGroup = 8;  // threads a row
constexpr int kGroups = kThreads / kGroup;

template <typename Acc>
constexpr int kStaged = 2048 / sizeof(Acc);  // columns of the means that shared memory holds at a time

// kRows rows per group of threads; more than one only if all columns of the means are staged at once.
template <bool kPosterior, int kRows, typename T>
__global__ void gmm_few_classes_kernel(Rows<const T> z, Rows<const acc_t<T>> means, Mixture<acc_t<T>> mixture,
                                       int64_t rows, int64_t width, bool packed, MixtureOutputs<acc_t<T>> out) {
  using Acc = acc_t<T>;
  constexpr int kSize = Pack<T>::kSize, kPart = Pack<Acc>::kSize, kParts = kSize / kPart;
  constexpr int kSpan = kGroup * kSize;  // columns that a group of threads takes at a time
  NM_DYNAMIC_SHARED(Pack<Acc>, mu);      // [class][span][part][thread of the group]: no two threads on one bank
  __shared__ Acc offset[kFew], half_precision[kFew];
  const int classes = mixture.classes;
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
  const int spans = int((min(width, int64_t(kStaged<Acc>)) + kSpan - 1) / kSpan);

  const auto all = mixture.normalizer();
  if (int(threadIdx.x) < classes)
    mixture.terms(all, threadIdx.x, width, offset[threadIdx.x], half_precision[threadIdx.x]);

  bool staged = false;
  const int64_t tiles = (rows + kGroups * kRows - 1) / (kGroups * kRows);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kGroups * kRows + group;
    Acc sums[kRows][kFew] = {}, totals[kRows][kFew] = {};
    for (int64_t begin = 0; begin < width; begin += kStaged<Acc>) {
      if (!staged || width > kStaged<Acc>) {
        __syncthreads();
        for (int i = threadIdx.x; i < classes * spans * kParts * kGroup; i += kThreads) {
          const int thread = i % kGroup, part = i / kGroup % kParts, span = i / (kGroup * kParts) % spans;
          const int k = i / (kGroup * kParts * spans);
          const int64_t column = begin + span * kSpan + thread * kSize + part * kPart;
          Acc values[kPart];
          load_padded(means[k], column, width, false, values);
          for (int j = 0; j < kPart; ++j) mu[i].values[j] = values[j];
        }
        __syncthreads();
        staged = true;
      }
      for (int span = 0; span < spans && begin + span * kSpan < width; ++span) {
        Acc point[kRows][kSize];
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = first + r * kGroups;
          load_padded(z[row < rows ? row : 0], begin + span * kSpan + lane * kSize, width, packed, point[r]);
        }
        NM_UNROLL
        for (int k = 0; k < kFew; ++k) {
          if (k >= classes) break;
          NM_UNROLL
          for (int part = 0; part < kParts; ++part) {
            const Pack<Acc> mean = mu[((k * spans + span) * kParts + part) * kGroup + lane];
            for (int r = 0; r < kRows; ++r)
              for (int i = 0; i < kPart; ++i) {
                const Acc difference = point[r][part * kPart + i] - mean.values[i];
                sums[r][k] += difference * difference;
              }
          }
        }
      }
      if constexpr (kRows == 1) {  // otherwise there is one stage only
        for (int k = 0; k < kFew; ++k) {
          totals[0][k] += sums[0][k];
          sums[0][k] = 0;
        }
      }
    }

    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * kGroups;
      Posterior<Acc> posterior;
      NM_UNROLL
      for (int k = 0; k < kFew; ++k) {
        if (k >= classes) break;
        const Acc value = offset[k] - half_precision[k] * lanes_sum<kGroup>(kRows == 1 ? totals[r][k] : sums[r][k]);
        if (k % kGroup == lane && row < rows) out.class_log_prob[row * classes + k] = value;
        if (kPosterior) posterior.add(value, k);
      }
      if (kPosterior && lane == 0 && row < rows) posterior.write(out, row);
    }
  }
}

constexpr int kTile = 32, kTileColumns = 64;
constexpr int kTileLanes = 8;  // threads along the classes of a tile; 16 along its rows

// Adds the squares over the tile's columns to the totals of a thread's rows and classes.
template <int kRows, int kClasses, int kPitch, typename Acc>
__device__ __forceinline__ void add_distances(const Pack<Acc> (&points)[kTile][kPitch],
                                              const Pack<Acc> (&mu)[kTile][kPitch], Acc (&totals)[kRows][kClasses]) {
  const int lane = threadIdx.x % kTileLanes, line = threadIdx.x / kTileLanes;
  Acc sums[kRows][kClasses] = {};
  for (int p = 0; p < kTileColumns / Pack<Acc>::kSize; ++p) {
    Pack<Acc> point[kRows], mean[kClasses];
    for (int r = 0; r < kRows; ++r) point[r] = points[line + r * (kThreads / kTileLanes)][p];
    for (int c = 0; c < kClasses; ++c) mean[c] = mu[lane + c * kTileLanes][p];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kClasses; ++c)
        for (int i = 0; i < Pack<Acc>::kSize; ++i) {
          const Acc difference = point[r].values[i] - mean[c].values[i];
          sums[r][c] += difference * difference;
        }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kClasses; ++c) totals[r][c] += sums[r][c];
}

template <bool kPosterior, typename T>
__global__ void gmm_tiled_kernel(Rows<const T> z, Rows<const acc_t<T>> means, Mixture<acc_t<T>> mixture, int64_t rows,
                                 int64_t width, bool packed, bool packed_means, MixtureOutputs<acc_t<T>> out) {
  using Acc = acc_t<T>;
  constexpr int kSize = Pack<T>::kSize, kPart = Pack<Acc>::kSize;
  constexpr int kPacks = kTileColumns / kPart;
  constexpr int kPointLoads = kTile * kTileColumns / kSize / kThreads;
  constexpr int kMeanLoads = kTile * kPacks / kThreads;
  constexpr int kRows = kTile / (kThreads / kTileLanes), kClasses = kTile / kTileLanes;
  __shared__ Pack<Acc> points[kTile][kPacks + 1], mu[kTile][kPacks + 1];  // padded against bank conflicts
  __shared__ Acc offset[kTile], half_precision[kTile];
  const int classes = mixture.classes;
  const int lane = threadIdx.x % kTileLanes, line = threadIdx.x / kTileLanes;
  const int64_t first_row = int64_t(blockIdx.x) * kTile;
  const auto all = mixture.normalizer();
  Posterior<Acc> posterior[kRows];

  for (int first_class = blockIdx.y * kTile; first_class < classes; first_class += gridDim.y * kTile) {
    // The next columns are on their way in registers while the present ones are worked on.
    Acc next_points[kPointLoads][kSize], next_means[kMeanLoads][kPart];
    const auto fetch = [&](int64_t begin) {
      for (int i = 0; i < kPointLoads; ++i) {
        const int item = i * kThreads + threadIdx.x;
        const int64_t row = first_row + item / (kTileColumns / kSize);
        load_padded(z[row < rows ? row : 0], begin + item % (kTileColumns / kSize) * kSize, width, packed,
                    next_points[i]);
      }
      for (int i = 0; i < kMeanLoads; ++i) {
        const int item = i * kThreads + threadIdx.x;
        const int k = first_class + item / kPacks;
        load_padded(means[k < classes ? k : 0], begin + item % kPacks * kPart, width, packed_means, next_means[i]);
      }
    };
    Acc totals[kRows][kClasses] = {};
    fetch(0);
    for (int64_t begin = 0; begin < width; begin += kTileColumns) {
      __syncthreads();
      for (int i = 0; i < kPointLoads; ++i) {
        const int item = i * kThreads + threadIdx.x;
        for (int j = 0; j < kSize; ++j)
          points[item / (kTileColumns / kSize)][(item % (kTileColumns / kSize) * kSize + j) / kPart].values[j % kPart] =
              next_points[i][j];
      }
      for (int i = 0; i < kMeanLoads; ++i) {
        const int item = i * kThreads + threadIdx.x;
        for (int j = 0; j < kPart; ++j) mu[item / kPacks][item % kPacks].values[j] = next_means[i][j];
      }
      const int k = first_class + threadIdx.x;
      if (begin == 0 && threadIdx.x < kTile && k < classes)
        mixture.terms(all, k, width, offset[threadIdx.x], half_precision[threadIdx.x]);
      __syncthreads();
      if (begin + kTileColumns < width) fetch(begin + kTileColumns);
      add_distances(points, mu, totals);
    }
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + line + r * (kThreads / kTileLanes);
      for (int c = 0; c < kClasses; ++c) {
        const int at = lane + c * kTileLanes, k = first_class + at;
        if (k >= classes) break;
        const Acc value = offset[at] - half_precision[at] * totals[r][c];
        if (row < rows) out.class_log_prob[row * classes + k] = value;
        if (kPosterior) posterior[r].add(value, k);
      }
    }
  }
  if constexpr (kPosterior) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + line + r * (kThreads / kTileLanes);
      for (int mask = kTileLanes / 2; mask > 0; mask /= 2) posterior[r].add(posterior[r].from_lane_across(mask));
      if (lane == 0 && row < rows) posterior[r].write(out, row);
    }
  }
}

struct LogProb {
  template <typename T>
  static void run(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps,
                  const MixtureOutputs<acc_t<T>>& out) {
    (out.log_prob ? launch_kernel<true, T> : launch_kernel<false, T>)(z, means, rho, logits, eps, out);
  }

  template <bool kPosterior, typename T>
  static void launch_kernel(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps,
                            MixtureOutputs<acc_t<T>> out) {
    using Acc = acc_t<T>;
    const int64_t rows = z.size(0), width = z.size(1), classes = means.size(0);
    const auto points = read_rows<T>(z);
    const auto mu = read_rows<Acc>(means);
    const Mixture<Acc> mixture{rho.const_data_ptr<Acc>(), logits.const_data_ptr<Acc>(), eps, int(classes)};
    const bool packed = all_aligned(rows, points);
    if (classes <= kFew) {
      const bool many_rows = rows >= 16384 && width <= kStaged<Acc>;
      constexpr int kRows = sizeof(Acc) == 4 ? 4 : 2;
      const int64_t tile = kGroups * (many_rows ? kRows : 1);
      constexpr int64_t kSpan = kGroup * Pack<T>::kSize;
      const int64_t columns = (std::min<int64_t>(width, kStaged<Acc>) + kSpan - 1) / kSpan * kSpan;
      launch(many_rows ? gmm_few_classes_kernel<kPosterior, kRows, T> : gmm_few_classes_kernel<kPosterior, 1, T>,
             grid_of(std::min<int64_t>(2048, (rows + tile - 1) / tile)), dim3(kThreads),
             classes * columns * sizeof(Acc), z, points, mu, mixture, rows, width, packed, out);
    } else {
      dim3 grid = grid_of((rows + kTile - 1) / kTile);
      if (!kPosterior) grid.y = static_cast<unsigned>(std::min<int64_t>((classes + kTile - 1) / kTile, 65535));
      launch(gmm_tiled_kernel<kPosterior, T>, grid, dim3(kThreads), 0, z, points, mu, mixture, rows, width, packed,
             all_aligned(classes, mu), out);
    }
  }
};

}  // namespace

NM_CUDA_LIBRARY(m) {
  m.impl("gmm_log_prob", TORCH_BOX(&MixtureOps<LogProb>::log_prob));
  m.impl("gmm_posterior", TORCH_BOX(&MixtureOps<LogProb>::posterior));
}

}  // namespace normatch
