// What the CUDA kernels share: 16-byte accesses along rows, sums over threads, and the second stage of partial sums.
// The order of every sum depends on the sizes alone.
#pragma once

#include "tensors.h"

namespace normatch {

constexpr int kLanesOfWarp = 32;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// kCount values of T at `from`: one, or 16-byte packs of them at a 16-byte boundary.
template <int kCount, typename T, typename Acc>
__device__ __forceinline__ void load_values(const T* from, Acc (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = Acc(*from);
  } else {
    constexpr int kSize = Pack<T>::kSize;
    static_assert(kCount % kSize == 0, "whole packs");
    for (int i = 0; i < kCount; i += kSize) {
      const Pack<T> pack = Pack<T>::load(from + i);
      for (int j = 0; j < kSize; ++j) values[i + j] = Acc(pack.values[j]);
    }
  }
}

template <int kCount, typename T, typename Acc>
__device__ __forceinline__ void store_values(T* to, const Acc (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *to = T(values[0]);
  } else {
    static_assert(kCount == Pack<T>::kSize, "one pack");
    Pack<T> pack;
    for (int i = 0; i < kCount; ++i) pack.values[i] = T(values[i]);
    pack.store(to);
  }
}

// kCount values of a row from `column` on, zeros past its end; a pack of them where `packed` promises alignment.
template <int kCount, typename T, typename Acc>
__device__ __forceinline__ void load_padded(const T* row, int64_t column, int64_t width, bool packed,
                                            Acc (&values)[kCount]) {
  if (packed && column + kCount <= width) {
    load_values(row + column, values);
  } else {
    for (int i = 0; i < kCount; ++i) values[i] = column + i < width ? Acc(row[column + i]) : Acc(0);
  }
}

// Calls each(Count<n>, column) for [0, length) of a row that starts at `first`, shared among kThreads threads: whole
// packs between 16-byte boundaries, single values elsewhere, or single values only where `packed` is false.
template <int kThreads, typename T, typename F>
__device__ __forceinline__ void for_values(const T* first, int64_t length, bool packed, int thread, const F& each) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(first) % 16 / sizeof(T);
  const int64_t head = packed ? min(length, misaligned ? kSize - misaligned : int64_t(0)) : length;
  const int64_t packs = (length - head) / kSize;
  const int64_t singles = length - packs * kSize;
  for (int64_t i = thread; i < packs; i += kThreads) each(Count<kSize>{}, head + i * kSize);
  for (int64_t i = thread; i < singles; i += kThreads) each(Count<1>{}, i < head ? i : i + packs * kSize);
}

// Whether corresponding rows have the same offset from a 16-byte boundary, as for_values requires.
template <typename T, typename... Others>
bool lie_alike(int64_t rows, Rows<T> first, Others... others) {
  const auto alike = [&](auto other) {
    const auto apart = reinterpret_cast<uintptr_t>(first.data) - reinterpret_cast<uintptr_t>(other.data);
    return apart % 16 == 0 && (rows <= 1 || (first.stride - other.stride) * int64_t(sizeof(T)) % 16 == 0);
  };
  return (alike(others) && ...);
}

// Whether every row of all these starts at a 16-byte boundary.
template <typename... R>
bool all_aligned(int64_t rows, R... matrices) {
  const auto aligned = [&](auto matrix) {
    return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
           (rows <= 1 || matrix.stride * int64_t(sizeof(*matrix.data)) % 16 == 0);
  };
  return (aligned(matrices) && ...);
}

// The sum over groups of kThreads neighboring lanes, in each of them.
template <int kThreads, typename Acc>
__device__ __forceinline__ Acc lanes_sum(Acc sum) {
  for (int offset = kThreads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  return sum;
}

// The largest value of a warp, in every lane.
template <typename Acc>
__device__ __forceinline__ Acc lanes_max(Acc top) {
  for (int offset = kLanesOfWarp / 2; offset > 0; offset /= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, offset));
  return top;
}

// The sum over the kThreads threads that share a row, valid in the first of them: part of a warp, a warp, or a block,
// which then calls this once. Static, so that the emulator can place the array of every kernel.
template <int kThreads, typename Acc>
static __device__ __forceinline__ Acc row_sum(Acc sum) {
  sum = lanes_sum < kThreads<kLanesOfWarp ? kThreads : kLanesOfWarp>(sum);
  if constexpr (kThreads > kLanesOfWarp) {
    __shared__ Acc warps[kThreads / kLanesOfWarp];
    if (threadIdx.x % kLanesOfWarp == 0) warps[threadIdx.x / kLanesOfWarp] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < kThreads / kLanesOfWarp; ++warp) sum += warps[warp];
  }
  return sum;
}

inline dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "too many rows for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

// The sum of partial[chunk][column] over the chunks, shared among threadIdx.y and valid in the first of them; 0 where
// the column does not count. sums: shared, a double a thread
template <typename Acc>
__device__ __forceinline__ double column_sum(const Acc* partial, int64_t chunks, int64_t width, int64_t column,
                                             bool counts, double* sums) {
  double sum = 0;
  if (counts)
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += blockDim.y)
      sum += double(partial[chunk * width + column]);
  sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && counts)
    for (unsigned y = 1; y < blockDim.y; ++y) sum += sums[y * blockDim.x + threadIdx.x];
  return sum;
}

// out[column] = the sum of partial[chunk][column] over the chunks.
template <typename Acc>
__global__ void __launch_bounds__(1024) sum_chunks_kernel(const Acc* partial, int64_t chunks, int64_t width, Acc* out) {
  NM_DYNAMIC_SHARED(double, sums);
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const double sum = column_sum(partial, chunks, width, column, column < width, sums);
  if (threadIdx.y == 0 && column < width) out[column] = Acc(sum);
}

template <typename Acc>
void sum_chunks(const Acc* partial, int64_t chunks, int64_t width, Acc* out, const Tensor& like) {
  if (width == 0) return;
  const dim3 block(32, chunks > 64 ? 32 : 8);
  launch(sum_chunks_kernel<Acc>, grid_of((width + 31) / 32), block, block.x * block.y * sizeof(double), like, partial,
         chunks, width, out);
}

// out[row] = the sum of partial[row][piece] over the pieces: a warp a row.
template <typename Acc>
__global__ void sum_pieces_kernel(const Acc* partial, int64_t rows, int64_t pieces, Acc* out) {
  const int lane = threadIdx.x % kLanesOfWarp;
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanesOfWarp;
  double sum = 0;
  if (row < rows)
    for (int64_t piece = lane; piece < pieces; piece += kLanesOfWarp) sum += partial[row * pieces + piece];
  sum = lanes_sum<kLanesOfWarp>(sum);
  if (lane == 0 && row < rows) out[row] = Acc(sum);
}

template <typename Acc>
void sum_pieces(const Acc* partial, int64_t rows, int64_t pieces, Acc* out, const Tensor& like) {
  launch(sum_pieces_kernel<Acc>, grid_of((rows + 7) / 8), dim3(256), 0, like, partial, rows, pieces, out);
}

}  // namespace normatch
