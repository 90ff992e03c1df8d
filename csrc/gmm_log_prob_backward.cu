// Gradients of the Gaussian-mixture log-likelihood on the GPU.
// With d = z - mu and g the gradient of the class log-probabilities:
//   dz_n = -sum_k g / sigma_k^2 d,   dmu_k = sum_n g d / sigma_k^2,   scatter_k = sum_n g |d|^2,   total_k = sum_n g
// 7 FLOP for each of N K D; reads N D + N K + K D, writes N D, and K D for each chunk of rows. A thread owns a column:
// of 16 classes for the gradient of the means, of 16 rows for that of z. Up to 16 classes both come from one pass. The
// sums over chunks, in double, and the gradients of rho and the logits are made in a last launch.
#include <tuple>

#include "gmm_log_prob_cuda.h"
#include "limits.h"

namespace normatch {
namespace {

constexpr int kThreads = 128;
constexpr int kFew = 16;  // classes whose sums a thread holds in registers
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
  const int slot = threadIdx.x % kFew;
  const Acc precision = kPoints && slot < classes ? mixture.precision(slot) : Acc(0);
  Acc total = 0;

  for (int64_t first = chunk * rows_per_chunk; first < end; first += kStagedRows) {
    const int here = int(min(int64_t(kStagedRows), end - first));
    __syncthreads();
    for (int r = threadIdx.x / kFew; r < kStagedRows; r += kThreads / kFew) {
      const Acc value = r < here && slot < classes ? grad[first + r][first_class + slot] : Acc(0);
      g[r][slot / kPart].values[slot % kPart] = value;
      if (kPoints) w[r][slot / kPart].values[slot % kPart] = value * precision;
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
    const double sum = column_sum(partial.means, chunks, elements, element, element < elements, sums);
    if (threadIdx.y == 0 && element < elements)
      grad_means[element] = Acc(sum * gmm_precision<double>(mixture.log_sigma(int(element / width))));
    return;
  }
  const auto all = mixture.normalizer();
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
  const Tensor grad_z = new_like(z), grad_means = new_like(means), grad_rho = new_like(rho);
  const Tensor grad_logits = new_like(logits);
  const Tensor dense_grad = dense_rows(grad), dense_z = dense_rows(z), dense_means = dense_rows(means);
  const Tensor dense_rho = torch::stable::contiguous(rho), dense_logits = torch::stable::contiguous(logits);
  const int64_t column_tiles = (width + kThreads - 1) / kThreads, class_tiles = (classes + kFew - 1) / kFew;
  STD_TORCH_CHECK(class_tiles <= 65535 && column_tiles <= 65535, "gmm_log_prob: too many classes or features");
  // Each chunk has its slot copy of the means' gradient: as many as fill the machine and the workspace allows.
  const int64_t most =
      std::max<int64_t>(8, std::min(2048 / (column_tiles * class_tiles), kWorkspace / (classes * width)));
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
  m.impl("gmm_log_prob_backward", TORCH_BOX(&gmm_log_prob_backward));
}

}  // namespace normatch
