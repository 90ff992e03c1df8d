// Affine coupling on the GPU, in one pass over the rows. Per element 3 values read and 1 written (forward, inverse) or
// 2 (backward, where dt is dx). Forward and inverse: 8 threads, a warp or a block per row, by its width; few and very
// long rows are cut into pieces. Backward: no sum runs along a row, so a thread owns a pack of columns and walks down a
// chunk of rows with the gain's gradient in registers; a second launch adds up the chunks.
#include "affine_coupling.h"

#include "cuda.h"
#include "logdet.h"

namespace normatch {
namespace {

constexpr int kThreads = 256;

template <bool kInverse, int kThreadsPerRow, typename T>
__global__ void affine_coupling_kernel(Rows<const T> in, Rows<const T> s_raw, Rows<const T> t, const acc_t<T>* gain,
                                       Rows<T> out, acc_t<T>* logdet, int64_t width, int64_t length, int64_t pieces,
                                       int64_t outputs, bool packed, bool packed_gain) {
  using Acc = acc_t<T>;
  constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  const int thread = threadIdx.x % kThreadsPerRow;
  const int64_t output = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  Acc sum = 0;
  if (output < outputs) {
    const int64_t row = output / pieces, begin = output % pieces * length;
    const T* const x = in[row] + begin;
    for_values<kThreadsPerRow>(x, min(length, width - begin), packed, thread, [&](auto count, int64_t column) {
      constexpr int kCount = decltype(count)::value;
      const int64_t j = begin + column;
      Acc value[kCount], scale[kCount], shift[kCount], g[kCount];
      load_values(x + column, value);
      load_values(s_raw[row] + j, scale);
      load_values(t[row] + j, shift);
      if (kCount > 1 && packed_gain && j % Pack<Acc>::kSize == 0) {
        load_values(gain + j, g);
      } else {
        for (int i = 0; i < kCount; ++i) g[i] = gain[j + i];
      }
      for (int i = 0; i < kCount; ++i) {
        const Acc log_scale = affine_scale(scale[i], g[i]).s;
        value[i] =
            kInverse ? affine_inverse(value[i], shift[i], log_scale) : affine_forward(value[i], shift[i], log_scale);
        sum += log_scale;
      }
      store_values(out[row] + j, value);
    });
  }
  if constexpr (!kInverse) {
    sum = row_sum<kThreadsPerRow>(sum);
    if (thread == 0 && output < outputs) logdet[output] = sum;
  }
}

// One launch for either direction; `logdet` is null for the inverse, which has none.
template <bool kInverse, typename T>
void map_rows(const Tensor& in, const Tensor& s_raw, const Tensor& t, const Tensor& gain, const Tensor& out,
              acc_t<T>* logdet) {
  using Acc = acc_t<T>;
  const int64_t rows = in.size(0), width = in.size(1);
  const auto x = read_rows<T>(in), s = read_rows<T>(s_raw), shift = read_rows<T>(t);
  const auto y = write_rows<T>(out);
  const Acc* const g = gain.const_data_ptr<Acc>();
  const int64_t pieces = logdet_pieces(rows, width);
  const int64_t length = (width + pieces - 1) / pieces, outputs = rows * pieces;
  const int64_t packs = length / Pack<T>::kSize;
  const int threads_per_row = packs <= 16 ? 8 : packs <= 512 ? kLanesOfWarp : kThreads;
  const auto kernel = threads_per_row == 8              ? affine_coupling_kernel<kInverse, 8, T>
                      : threads_per_row == kLanesOfWarp ? affine_coupling_kernel<kInverse, kLanesOfWarp, T>
                                                        : affine_coupling_kernel<kInverse, kThreads, T>;
  const int64_t rows_per_block = kThreads / threads_per_row;
  launch(kernel, grid_of((outputs + rows_per_block - 1) / rows_per_block), dim3(kThreads), 0, out, x, s, shift, g, y,
         logdet, width, length, pieces, outputs, lie_alike(rows, x, s, shift, y),
         reinterpret_cast<uintptr_t>(g) % 16 == 0);
}

// y of x and the log-determinants, or x of y (and no log-determinants: null).
template <bool kInverse>
Tensor map(const Tensor& x, const Tensor& s_raw, const Tensor& t, const Tensor& gain, const Tensor* logdet) {
  const Tensor y = new_like(x), dense_gain = torch::stable::contiguous(gain);
  const int64_t rows = x.size(0), pieces = logdet_pieces(rows, x.size(1));
  if (kInverse ? x.numel() == 0 : rows == 0) return y;
  const Tensor dense_x = dense_rows(x), dense_s = dense_rows(s_raw), dense_t = dense_rows(t);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const bool cut = !kInverse && pieces > 1;
    const Tensor partial = cut ? new_tensor(x, {rows, pieces}, accumulation_type(x)) : y;
    Acc* const sums = kInverse ? nullptr : logdet->mutable_data_ptr<Acc>();
    map_rows<kInverse, T>(dense_x, dense_s, dense_t, dense_gain, y, cut ? partial.mutable_data_ptr<Acc>() : sums);
    if (cut) sum_pieces(partial.const_data_ptr<Acc>(), rows, pieces, sums, x);
  });
  return y;
}

// gradient(upstream, dlogdet, out, s_raw, gain) of forward or inverse, kCount columns a thread. A block walks down the
// rows of chunk blockIdx.y, blockDim.y at a time.
template <bool kInverse, int kCount, typename T>
__global__ void affine_coupling_backward_kernel(Rows<const T> upstream, Rows<const acc_t<T>> grad_logdet,
                                                Rows<const T> y, Rows<const T> s_raw, const acc_t<T>* gain,
                                                Rows<T> grad_in, Rows<T> grad_s, acc_t<T>* partial, int64_t rows,
                                                int64_t width, int64_t rows_per_chunk) {
  using Acc = acc_t<T>;
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kCount;
  const int64_t end = min(rows, (int64_t(blockIdx.y) + 1) * rows_per_chunk);
  Acc g[kCount] = {}, sums[kCount] = {};
  if (column < width) {
    for (int i = 0; i < kCount; ++i) g[i] = gain[column + i];
    for (int64_t row = blockIdx.y * rows_per_chunk + threadIdx.y; row < end; row += blockDim.y) {
      Acc grad[kCount], out[kCount], scale[kCount];
      load_values(upstream[row] + column, grad);
      load_values(y[row] + column, out);
      load_values(s_raw[row] + column, scale);
      const Acc dlogdet = kInverse ? Acc(0) : *grad_logdet[row];
      for (int i = 0; i < kCount; ++i) {
        const AffineScale<Acc> log_scale = affine_scale(scale[i], g[i]);
        const AffineGradients<Acc> terms = kInverse ? affine_inverse_backward(grad[i], out[i], log_scale, g[i])
                                                    : affine_backward(grad[i], dlogdet, out[i], log_scale, g[i]);
        grad[i] = terms.input;
        scale[i] = terms.s_raw;
        sums[i] += terms.gain;
      }
      store_values(grad_in[row] + column, grad);
      store_values(grad_s[row] + column, scale);
    }
  }
  __shared__ Acc block[kThreads * kCount];
  Acc* const mine = block + (threadIdx.y * blockDim.x + threadIdx.x) * kCount;
  for (int i = 0; i < kCount; ++i) mine[i] = sums[i];
  __syncthreads();
  if (threadIdx.y == 0 && column < width)
    for (int i = 0; i < kCount; ++i) {
      Acc sum = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) sum += block[(y * blockDim.x + threadIdx.x) * kCount + i];
      partial[blockIdx.y * width + column + i] = sum;
    }
}

template <bool kInverse, int kCount, typename T>
void gradients(Rows<const T> upstream, Rows<const acc_t<T>> grad_logdet, Rows<const T> y, Rows<const T> s_raw,
               const acc_t<T>* gain, Rows<T> grad_in, Rows<T> grad_s, int64_t rows, int64_t width,
               const Tensor& grad_gain) {
  using Acc = acc_t<T>;
  const int64_t columns = width / kCount;  // of packs
  unsigned x = 1;
  while (x < 32 && x < columns) x *= 2;
  const dim3 block(x, kThreads / x);
  const int64_t tiles = (columns + x - 1) / x;
  const int64_t most = std::max<int64_t>(1, 2048 / tiles);
  const int64_t rows_per_chunk = std::max<int64_t>(4 * block.y, (rows + most - 1) / most);
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  const Tensor partial = new_tensor(grad_gain, {chunks, width}, grad_gain.scalar_type());
  Acc* const sums = chunks == 1 ? grad_gain.mutable_data_ptr<Acc>() : partial.mutable_data_ptr<Acc>();
  dim3 grid = grid_of(tiles);
  grid.y = static_cast<unsigned>(chunks);
  launch(affine_coupling_backward_kernel<kInverse, kCount, T>, grid, block, 0, grad_gain, upstream, grad_logdet, y,
         s_raw, gain, grad_in, grad_s, sums, rows, width, rows_per_chunk);
  if (chunks > 1)
    sum_chunks(partial.const_data_ptr<Acc>(), chunks, width, grad_gain.mutable_data_ptr<Acc>(), grad_gain);
}

template <bool kInverse>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& upstream, const Tensor* grad_logdet, const Tensor& y,
                                            const Tensor& s_raw, const Tensor& gain) {
  const int64_t rows = y.size(0), width = y.size(1);
  const Tensor grad_in = new_like(y), grad_s = new_like(y);
  const Tensor grad_gain = rows ? new_like(gain) : torch::stable::new_zeros(gain, {width}, gain.scalar_type());
  if (rows == 0 || width == 0) return {grad_in, grad_s, grad_gain};
  const Tensor dense_upstream = dense_rows(upstream), dense_y = dense_rows(y), dense_s = dense_rows(s_raw);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  dispatch(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto up = read_rows<T>(dense_upstream), out = read_rows<T>(dense_y), s = read_rows<T>(dense_s);
    const auto dx = write_rows<T>(grad_in), ds = write_rows<T>(grad_s);
    Rows<const Acc> dlogdet{nullptr, 0};
    if (grad_logdet) dlogdet = {grad_logdet->const_data_ptr<Acc>(), grad_logdet->stride(0)};
    const bool packed = width % Pack<T>::kSize == 0 && all_aligned(rows, up, out, s, dx, ds);
    (packed ? gradients<kInverse, Pack<T>::kSize, T> : gradients<kInverse, 1, T>)(up, dlogdet, out, s,
                                                                                  dense_gain.const_data_ptr<Acc>(), dx,
                                                                                  ds, rows, width, grad_gain);
  });
  return {grad_in, grad_s, grad_gain};
}

}  // namespace

NM_CUDA_LIBRARY(m) {
  AffineCouplingOps<map<false>, map<true>, backward<false>, backward<true>>::implement(m);
}

}  // namespace normatch
