// Gaussian-mixture log-likelihood on the GPU, with direct differences z - mu throughout.
// Forward: 3 FLOP for each of N K D; reads N D + K D values, writes N K (and, for the posterior, 3 N).
//   Up to 16 classes: the means in shared memory, 8 threads a row, the sums of all classes in registers, so that z is
//   read once. More classes: tiles of 32 rows x 32 classes, both operands through shared memory 64 columns at a time.
// Backward: 7 FLOP for each of N K D; reads N D + N K + K D, writes N D, and K D for each chunk of rows. A thread owns
//   a column: of 16 classes for the gradient of the means, of 16 rows for that of z. Up to 16 classes both come from
//   one pass. The sums over chunks, in double, and the gradients of rho and the logits are made in a last launch.
#include "gmm_log_prob.h"

#include <tuple>

#include "cuda.h"

namespace normatch {
namespace {

constexpr int kThreads = 128;
constexpr int kFew = 16;  // classes whose sums a thread holds in registers

template <typename Acc>
struct Mixture {
  const Acc *rho, *logits;
  double eps;
  int classes;

  __device__ double log_pi(const Normaliser& all, int k) const { return double(logits[k]) - all.top - all.log_sum; }
  __device__ double log_sigma(int k) const { return log_softplus(double(rho[k])); }
  __device__ Acc precision(int k) const { return gmm_precision<Acc>(log_sigma(k)); }
};

// Where the posterior goes; log_prob is null where it is not wanted.
template <typename Acc>
struct Outputs {
  Acc* class_log_prob;
  Acc* log_prob;
  int64_t* label;
  Acc* confidence;
};

// logsumexp and the largest of values that come one by one.
template <typename Acc>
struct Posterior {
  Acc top = -INFINITY, sum = 0;
  int label = 0;

  __device__ void add(Acc value, int k) { add({value, Acc(1), k}); }
  __device__ void add(const Posterior& other) {
    const bool above = !(other.top <= top) && top == top;  // a NaN stays on top
    if (above || (other.top == top && other.label < label)) label = other.label;
    const Acc higher = above ? other.top : top;
    if (higher == -INFINITY) return;
    sum = sum * Math<Acc>::exp(top - higher) + other.sum * Math<Acc>::exp(other.top - higher);
    top = higher;
  }
  __device__ Posterior from_lane_across(int mask) const {
    Posterior other;
    other.top = __shfl_xor_sync(kFullWarp, top, mask);
    other.sum = __shfl_xor_sync(kFullWarp, sum, mask);
    other.label = __shfl_xor_sync(kFullWarp, label, mask);
    return other;
  }
  __device__ void write(const Outputs<Acc>& out, int64_t row) const {
    out.log_prob[row] = top + Math<Acc>::log(sum);
    out.label[row] = label;
    out.confidence[row] = 1 / sum;
  }
};

// ---- forward ------------------------------------------------------------------------------------------------------

constexpr int kGroup = 8;  // threads a row
constexpr int kGroups = kThreads / kGroup;

template <typename Acc>
constexpr int kStaged = 2048 / sizeof(Acc);  // columns of the means that shared memory holds at a time

// kRows rows for each group of threads at a time; more than one only where the means are staged whole.
template <bool kPosterior, int kRows, typename T>
__global__ void gmm_few_classes_kernel(Rows<const T> z, Rows<const acc_t<T>> means, Mixture<acc_t<T>> mixture,
                                       int64_t rows, int64_t width, bool packed, Outputs<acc_t<T>> out) {
  using Acc = acc_t<T>;
  constexpr int kSize = Pack<T>::kSize, kPart = Pack<Acc>::kSize, kParts = kSize / kPart;
  constexpr int kSpan = kGroup * kSize;  // columns that a group of threads takes at a time
  NM_DYNAMIC_SHARED(Pack<Acc>, mu);      // [class][span][part][thread of the group]: no two threads on one bank
  __shared__ Acc offset[kFew], half_precision[kFew];
  const int classes = mixture.classes;
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
  const int spans = int((min(width, int64_t(kStaged<Acc>)) + kSpan - 1) / kSpan);

  const Normaliser all = normaliser(mixture.logits, classes);
  if (int(threadIdx.x) < classes) {
    const int k = threadIdx.x;
    const double log_sigma = mixture.log_sigma(k);
    offset[k] = Acc(gmm_offset(mixture.log_pi(all, k), log_sigma, mixture.eps, double(width)));
    half_precision[k] = Acc(0.5) * gmm_precision<Acc>(log_sigma);
  }

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

template <bool kPosterior, typename T>
__global__ void gmm_tiled_kernel(Rows<const T> z, Rows<const acc_t<T>> means, Mixture<acc_t<T>> mixture, int64_t rows,
                                 int64_t width, bool packed, bool packed_means, Outputs<acc_t<T>> out) {
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
  const Normaliser all = normaliser(mixture.logits, classes);
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
      if (begin == 0 && threadIdx.x < kTile && k < classes) {
        const double log_sigma = mixture.log_sigma(k);
        offset[threadIdx.x] = Acc(gmm_offset(mixture.log_pi(all, k), log_sigma, mixture.eps, double(width)));
        half_precision[threadIdx.x] = Acc(0.5) * gmm_precision<Acc>(log_sigma);
      }
      __syncthreads();
      if (begin + kTileColumns < width) fetch(begin + kTileColumns);
      Acc sums[kRows][kClasses] = {};
      for (int p = 0; p < kPacks; ++p) {
        Pack<Acc> point[kRows], mean[kClasses];
        for (int r = 0; r < kRows; ++r) point[r] = points[line + r * (kThreads / kTileLanes)][p];
        for (int c = 0; c < kClasses; ++c) mean[c] = mu[lane + c * kTileLanes][p];
        for (int r = 0; r < kRows; ++r)
          for (int c = 0; c < kClasses; ++c)
            for (int i = 0; i < kPart; ++i) {
              const Acc difference = point[r].values[i] - mean[c].values[i];
              sums[r][c] += difference * difference;
            }
      }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kClasses; ++c) totals[r][c] += sums[r][c];
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

template <bool kPosterior, typename T>
void log_prob(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps,
              Outputs<acc_t<T>> out) {
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
           grid_of(std::min<int64_t>(2048, (rows + tile - 1) / tile)), dim3(kThreads), classes * columns * sizeof(Acc),
           z, points, mu, mixture, rows, width, packed, out);
  } else {
    dim3 grid = grid_of((rows + kTile - 1) / kTile);
    if (!kPosterior) grid.y = static_cast<unsigned>(std::min<int64_t>((classes + kTile - 1) / kTile, 65535));
    launch(gmm_tiled_kernel<kPosterior, T>, grid, dim3(kThreads), 0, z, points, mu, mixture, rows, width, packed,
           all_aligned(classes, mu), out);
  }
}

Tensor gmm_log_prob(const Tensor& z, const Tensor& means, const Tensor& rho, const Tensor& logits, double eps) {
  const Tensor result = new_tensor(z, {z.size(0), means.size(0)}, accumulation_type(z));
  if (z.size(0) == 0) return result;
  const Tensor dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Tensor dense_rho = torch::stable::contiguous(rho), dense_logits = torch::stable::contiguous(logits);
  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const Outputs<Acc> out{result.mutable_data_ptr<Acc>(), nullptr, nullptr, nullptr};
    log_prob<false, T>(dense_z, dense_means, dense_rho, dense_logits, eps, out);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_posterior(const Tensor& z, const Tensor& means, const Tensor& rho,
                                                         const Tensor& logits, double eps) {
  const int64_t rows = z.size(0);
  const ScalarType sums = accumulation_type(z);
  const Tensor result = new_tensor(z, {rows, means.size(0)}, sums), total = new_tensor(z, {rows}, sums);
  const Tensor label = new_tensor(z, {rows}, ScalarType::Long), confidence = new_tensor(z, {rows}, sums);
  if (rows == 0) return {result, total, label, confidence};
  const Tensor dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Tensor dense_rho = torch::stable::contiguous(rho), dense_logits = torch::stable::contiguous(logits);
  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const Outputs<Acc> out{result.mutable_data_ptr<Acc>(), total.mutable_data_ptr<Acc>(),
                           label.mutable_data_ptr<int64_t>(), confidence.mutable_data_ptr<Acc>()};
    log_prob<true, T>(dense_z, dense_means, dense_rho, dense_logits, eps, out);
  });
  return {result, total, label, confidence};
}

// ---- backward -----------------------------------------------------------------------------------------------------
// With d = z - mu and g the gradient of the class log-probabilities:
//   dz_n = -sum_k g / sigma_k^2 d,   dmu_k = sum_n g d / sigma_k^2,   scatter_k = sum_n g |d|^2,   total_k = sum_n g

constexpr int kStagedRows = 32;

// What chunks of rows add to the sums over rows, for each chunk.
template <typename Acc>
struct Partial {
  Acc* means;    // (chunks, K, D)
  Acc* scatter;  // (chunks, column tiles, K)
  Acc* total;    // (chunks, K)
};

// A block: kThreads columns of kFew classes over the rows of a chunk. kPoints: these are all the classes there are, and
// dz is made as well.
template <bool kPoints, typename T>
__global__ void gmm_means_kernel(Rows<const acc_t<T>> grad, Rows<const T> z, Rows<const acc_t<T>> means,
                                 Mixture<acc_t<T>> mixture, int64_t rows, int64_t width, int64_t rows_per_chunk,
                                 Rows<T> grad_z, Partial<acc_t<T>> partial) {
  using Acc = acc_t<T>;
  constexpr int kPart = Pack<Acc>::kSize, kPacks = kFew / kPart;
  __shared__ Pack<Acc> g[kStagedRows][kPacks], w[kPoints ? kStagedRows : 1][kPacks];
  __shared__ Acc shared[kThreads];
  const int first_class = blockIdx.y * kFew;
  const int classes = min(kFew, mixture.classes - first_class);
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x, chunk = blockIdx.z;
  const int64_t end = min(rows, (chunk + 1) * rows_per_chunk);

  Acc mu[kFew], grad_mu[kFew] = {}, scatter[kFew] = {};
  for (int k = 0; k < kFew; ++k) mu[k] = k < classes && column < width ? means[first_class + k][column] : Acc(0);
  // The gradients are staged so that a thread meets one class only, and adds them up on the way.
  const int own = threadIdx.x % kFew;
  const Acc precision = kPoints && own < classes ? mixture.precision(own) : Acc(0);
  Acc total = 0;

  for (int64_t first = chunk * rows_per_chunk; first < end; first += kStagedRows) {
    const int here = int(min(int64_t(kStagedRows), end - first));
    __syncthreads();
    for (int r = threadIdx.x / kFew; r < kStagedRows; r += kThreads / kFew) {
      const Acc value = r < here && own < classes ? grad[first + r][first_class + own] : Acc(0);
      g[r][own / kPart].values[own % kPart] = value;
      if (kPoints) w[r][own / kPart].values[own % kPart] = value * precision;
      total += value;
    }
    __syncthreads();
    if (column >= width) continue;
    for (int r = 0; r < here; ++r) {
      const Acc point = Acc(z[first + r][column]);
      Acc grad_point = 0;
      NM_UNROLL
      for (int p = 0; p < kPacks; ++p) {
        if (p * kPart >= classes) break;
        const Pack<Acc> upstream = g[r][p];
        const Pack<Acc> weight = w[kPoints ? r : 0][p];
        NM_UNROLL
        for (int i = 0; i < kPart; ++i) {
          const int k = p * kPart + i;
          const Acc difference = point - mu[k];
          const Acc pull = upstream.values[i] * difference;
          grad_mu[k] += pull;
          scatter[k] += pull * difference;
          if (kPoints) grad_point -= weight.values[i] * difference;
        }
      }
      if (kPoints) grad_z[first + r][column] = T(grad_point);
    }
  }

  if (column < width)
    for (int k = 0; k < kFew; ++k)
      if (k < classes) partial.means[(chunk * mixture.classes + first_class + k) * width + column] = grad_mu[k];
  // The sums over the block's threads: of scatter in the warps first, then of both over what `shared` holds.
  shared[threadIdx.x] = total;
  __syncthreads();
  if (int(threadIdx.x) < classes && blockIdx.x == 0) {
    Acc sum = 0;
    for (int i = 0; i < kThreads / kFew; ++i) sum += shared[i * kFew + threadIdx.x];
    partial.total[chunk * mixture.classes + first_class + threadIdx.x] = sum;
  }
  __syncthreads();
  NM_UNROLL
  for (int k = 0; k < kFew; ++k) {
    const Acc sum = lanes_sum<kLanesOfWarp>(scatter[k]);
    if (threadIdx.x % kLanesOfWarp == 0) shared[threadIdx.x / kLanesOfWarp * kFew + k] = sum;
  }
  __syncthreads();
  if (int(threadIdx.x) < classes) {
    Acc sum = 0;
    for (int warp = 0; warp < kThreads / kLanesOfWarp; ++warp) sum += shared[warp * kFew + threadIdx.x];
    partial.scatter[(chunk * gridDim.x + blockIdx.x) * mixture.classes + first_class + threadIdx.x] = sum;
  }
}

constexpr int kPointRows = 16, kStagedClasses = 32;

// dz for any number of classes. A block: kThreads columns of kPointRows rows.
template <typename T>
__global__ void gmm_points_kernel(Rows<const acc_t<T>> grad, Rows<const T> z, Rows<const acc_t<T>> means,
                                  Mixture<acc_t<T>> mixture, int64_t rows, int64_t width, Rows<T> grad_z) {
  using Acc = acc_t<T>;
  constexpr int kPart = Pack<Acc>::kSize, kPacks = kPointRows / kPart;
  __shared__ Pack<Acc> w[kStagedClasses][kPacks + 1];
  NM_DYNAMIC_SHARED(Acc, precision);  // [class]
  const int64_t first = int64_t(blockIdx.x) * kPointRows;
  const int64_t column = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  for (int k = threadIdx.x; k < mixture.classes; k += kThreads) precision[k] = mixture.precision(k);
  Acc point[kPointRows], totals[kPointRows] = {};
  for (int r = 0; r < kPointRows; ++r)
    point[r] = first + r < rows && column < width ? Acc(z[first + r][column]) : Acc(0);

  for (int first_class = 0; first_class < mixture.classes; first_class += kStagedClasses) {
    const int here = min(kStagedClasses, mixture.classes - first_class);
    __syncthreads();
    for (int i = threadIdx.x; i < kStagedClasses * kPointRows; i += kThreads) {
      const int k = i % kStagedClasses, r = i / kStagedClasses;
      w[k][r / kPart].values[r % kPart] =
          k < here && first + r < rows ? grad[first + r][first_class + k] * precision[first_class + k] : Acc(0);
    }
    __syncthreads();
    if (column >= width) continue;
    Acc sums[kPointRows] = {};
    for (int k = 0; k < here; ++k) {
      const Acc mu = means[first_class + k][column];
      NM_UNROLL
      for (int p = 0; p < kPacks; ++p) {
        const Pack<Acc> weight = w[k][p];
        for (int i = 0; i < kPart; ++i) sums[p * kPart + i] -= weight.values[i] * (point[p * kPart + i] - mu);
      }
    }
    for (int r = 0; r < kPointRows; ++r) totals[r] += sums[r];
  }
  if (column < width)
    for (int r = 0; r < kPointRows; ++r)
      if (first + r < rows) grad_z[first + r][column] = T(totals[r]);
}

// Adds up the chunks. All blocks but the last: dmu, an element for each threadIdx.x. The last one: drho and dlogits, a
// warp a class.
template <typename Acc>
__global__ void __launch_bounds__(512)
    gmm_parameters_kernel(Partial<Acc> partial, int64_t chunks, int64_t column_tiles, Mixture<Acc> mixture,
                          int64_t width, Acc* grad_means, Acc* grad_rho, Acc* grad_logits) {
  NM_DYNAMIC_SHARED(double, sums);
  const int classes = mixture.classes;
  if (blockIdx.x + 1 < gridDim.x) {
    const int64_t elements = classes * width, element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    double sum = 0;
    if (element < elements)
      for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += blockDim.y)
        sum += partial.means[chunk * elements + element];
    sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && element < elements) {
      for (unsigned y = 1; y < blockDim.y; ++y) sum += sums[y * blockDim.x + threadIdx.x];
      grad_means[element] = Acc(sum * gmm_precision<double>(mixture.log_sigma(int(element / width))));
    }
    return;
  }
  const Normaliser all = normaliser(mixture.logits, classes);
  for (int k = threadIdx.y; k < classes; k += blockDim.y) {
    double scatter = 0, total = 0;
    for (int64_t i = threadIdx.x; i < chunks * column_tiles; i += kLanesOfWarp)
      scatter += partial.scatter[i * classes + k];
    for (int64_t i = threadIdx.x; i < chunks; i += kLanesOfWarp) total += partial.total[i * classes + k];
    scatter = lanes_sum<kLanesOfWarp>(scatter);
    total = lanes_sum<kLanesOfWarp>(total);
    if (threadIdx.x == 0) {
      const double spread = scatter * gmm_precision<double>(mixture.log_sigma(k)) - double(width) * total;
      grad_rho[k] = Acc(spread * log_softplus_slope(double(mixture.rho[k])));
      sums[k] = total * log_weight_slope(mixture.log_pi(all, k), mixture.eps);
    }
  }
  __syncthreads();
  double weights = 0;
  for (int k = threadIdx.x; k < classes; k += kLanesOfWarp) weights += sums[k];
  weights = lanes_sum<kLanesOfWarp>(weights);
  for (int k = threadIdx.y * kLanesOfWarp + threadIdx.x; k < classes; k += blockDim.y * kLanesOfWarp)
    grad_logits[k] = Acc(sums[k] - ::exp(mixture.log_pi(all, k)) * weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_log_prob_backward(const Tensor& grad, const Tensor& z,
                                                                 const Tensor& means, const Tensor& rho,
                                                                 const Tensor& logits, double eps) {
  const int64_t rows = z.size(0), width = z.size(1), classes = means.size(0);
  const Tensor grad_z = new_tensor(z, {rows, width}, z.scalar_type());
  const Tensor grad_means = new_tensor(means, {classes, width}, means.scalar_type());
  const Tensor grad_rho = new_tensor(rho, {classes}, rho.scalar_type());
  const Tensor grad_logits = new_tensor(logits, {classes}, logits.scalar_type());
  const Tensor dense_grad = dense_rows(grad), dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Tensor dense_rho = torch::stable::contiguous(rho), dense_logits = torch::stable::contiguous(logits);
  const int64_t column_tiles = (width + kThreads - 1) / kThreads, class_tiles = (classes + kFew - 1) / kFew;
  STD_TORCH_CHECK(class_tiles <= 65535 && column_tiles <= 65535, "gmm_log_prob: too many classes or features");
  // Each chunk has its own copy of the means' gradient: as many as fill the machine and 64 MB of floats allow.
  const int64_t most =
      std::max<int64_t>(8, std::min(2048 / (column_tiles * class_tiles), (1 << 24) / (classes * width)));
  const int64_t rows_per_chunk = std::max<int64_t>(2 * kStagedRows, (rows + most - 1) / most);
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;

  dispatch(z.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto sums = accumulation_type(z);
    const Tensor part_means = new_tensor(z, {chunks, classes, width}, sums);
    const Tensor part_scatter = new_tensor(z, {chunks, column_tiles, classes}, sums);
    const Tensor part_total = new_tensor(z, {chunks, classes}, sums);
    const Partial<Acc> partial{part_means.mutable_data_ptr<Acc>(), part_scatter.mutable_data_ptr<Acc>(),
                               part_total.mutable_data_ptr<Acc>()};
    const Mixture<Acc> mixture{dense_rho.const_data_ptr<Acc>(), dense_logits.const_data_ptr<Acc>(), eps, int(classes)};
    const auto g = read_rows<Acc>(dense_grad), mu = read_rows<Acc>(dense_means);
    const auto points = read_rows<T>(dense_z);
    const auto out = write_rows<T>(grad_z);
    if (rows > 0) {
      dim3 grid(static_cast<unsigned>(column_tiles), static_cast<unsigned>(class_tiles), static_cast<unsigned>(chunks));
      launch(classes <= kFew ? gmm_means_kernel<true, T> : gmm_means_kernel<false, T>, grid, dim3(kThreads), 0, z, g,
             points, mu, mixture, rows, width, rows_per_chunk, out, partial);
      if (classes > kFew) {
        dim3 tiles = grid_of((rows + kPointRows - 1) / kPointRows);
        tiles.y = static_cast<unsigned>(column_tiles);
        launch(gmm_points_kernel<T>, tiles, dim3(kThreads), classes * sizeof(Acc), z, g, points, mu, mixture, rows,
               width, out);
      }
    }
    const dim3 block(kLanesOfWarp, chunks > 64 ? 16 : 8);
    const int64_t slots = std::max<int64_t>(classes, block.x * block.y);
    launch(gmm_parameters_kernel<Acc>, grid_of((classes * width + kLanesOfWarp - 1) / kLanesOfWarp + 1), block,
           slots * sizeof(double), z, partial, chunks, column_tiles, mixture, width, grad_means.mutable_data_ptr<Acc>(),
           grad_rho.mutable_data_ptr<Acc>(), grad_logits.mutable_data_ptr<Acc>());
  });
  return {grad_z, grad_means, grad_rho, grad_logits};
}

}  // namespace

NM_CUDA_LIBRARY(m) {
  m.impl("gmm_log_prob", TORCH_BOX(&gmm_log_prob));
  m.impl("gmm_log_prob_backward", TORCH_BOX(&gmm_log_prob_backward));
  m.impl("gmm_posterior", TORCH_BOX(&gmm_posterior));
}

}  // namespace normatch
