// Row sums on the GPU: one read and one addition per element. A warp per short row, a block of 256 threads per long
// one; few and very long rows are cut into pieces, which the same kernel sums in a second launch. The order of all
// additions depends on the sizes and the alignment alone, so the same input gives the same bits.
#include "logdet.h"

#include "cuda.h"

namespace normatch {
namespace {

constexpr int kThreads = 256;

// A thread's share of values[0, length): single values up to a 16-byte boundary, whole packs, single values again.
template <int kThreadsPerRow, typename T>
__device__ __forceinline__ acc_t<T> thread_sum(const T* values, int64_t length, int thread) {
  using Acc = acc_t<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(values) % 16 / sizeof(T);
  const int64_t head = min(length, misaligned ? kSize - misaligned : int64_t(0));
  const int64_t packs = (length - head) / kSize;
  const int64_t tail = head + packs * kSize;

  Acc sums[kSize] = {};
  if (thread < head) sums[0] += Acc(values[thread]);
  for (int64_t i = thread; i < packs; i += kThreadsPerRow) {
    Acc terms[kSize];
    load_values(values + head + i * kSize, terms);
    for (int j = 0; j < kSize; ++j) sums[j] += terms[j];
  }
  if (tail + thread < length) sums[kSize - 1] += Acc(values[tail + thread]);

  for (int width = kSize / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// A row is `pieces` outputs, each the sum of `length` values of it (the last of what is left).
template <int kThreadsPerRow, typename T>
__global__ void logdet_kernel(const T* in, int64_t row_stride, int64_t width, int64_t length, int64_t pieces,
                              int64_t outputs, acc_t<T>* out) {
  using Acc = acc_t<T>;
  constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  const int thread = threadIdx.x % kThreadsPerRow;
  const int64_t output = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  Acc sum = 0;
  if (output < outputs) {
    const int64_t begin = output % pieces * length;
    sum = thread_sum<kThreadsPerRow>(in + output / pieces * row_stride + begin, min(length, width - begin), thread);
  }
  sum = row_sum<kThreadsPerRow>(sum);
  if (thread == 0 && output < outputs) out[output] = sum;
}

template <typename T>
void sum_rows(Rows<const T> in, int64_t width, int64_t pieces, int64_t outputs, acc_t<T>* out, const Tensor& like) {
  const int64_t length = (width + pieces - 1) / pieces;
  const bool block_per_row = length > 2048;
  const int64_t rows_per_block = block_per_row ? 1 : kThreads / kLanesOfWarp;
  launch(block_per_row ? logdet_kernel<kThreads, T> : logdet_kernel<kLanesOfWarp, T>,
         grid_of((outputs + rows_per_block - 1) / rows_per_block), dim3(kThreads), 0, like, in.data, in.stride, width,
         length, pieces, outputs, out);
}

Tensor logdet(const Tensor& log_scale) {
  const int64_t rows = log_scale.size(0), width = log_scale.size(1);
  const Tensor dense = dense_rows(log_scale);
  const Tensor sums = new_tensor(log_scale, {rows}, accumulation_type(log_scale));
  if (rows == 0) return sums;
  const int64_t pieces = logdet_pieces(rows, width);
  dispatch(log_scale.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const Rows<const T> in = read_rows<T>(dense);
    Acc* out = sums.mutable_data_ptr<Acc>();
    if (pieces == 1) {
      sum_rows(in, width, 1, rows, out, dense);
    } else {
      const Tensor partial = new_tensor(log_scale, {rows, pieces}, accumulation_type(log_scale));
      sum_rows(in, width, pieces, rows * pieces, partial.mutable_data_ptr<Acc>(), dense);
      sum_rows(read_rows<Acc>(partial), pieces, 1, rows, out, dense);
    }
  });
  return sums;
}

}  // namespace

NM_CUDA_LIBRARY(m) {
  m.impl("logdet", TORCH_BOX(&logdet));
}

}  // namespace normatch
