// Kernels with one planted fault each, and their correct twins: what the emulator must find. `faults NAME` prints the
// result and exits with 0, or with 1 and a message where the emulator raised.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "cuda_shim.h"

namespace {

constexpr int kThreads = 64;

// out = sum of in, in reversed halves through shared memory.
template <bool kBarrier>
__global__ void block_sum(const float* in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < unsigned(width)) values[threadIdx.x] += values[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = values[0];
}

__global__ void warp_sum(const float* in, float* out) {
  float sum = in[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  __shared__ float warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = warps[0] + warps[1];
}

__global__ void dynamic_sum(const float* in, float* out, int written) {
  float* values = static_cast<float*>(emulator::dynamic_shared());
  if (int(threadIdx.x) < written) values[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += values[i];
  out[blockIdx.x] = sum;
}

template <bool kWait>
__global__ void copied_sum(const float* in, float* out) {
  float* values = static_cast<float*>(emulator::dynamic_shared());
  __pipeline_memcpy_async(values + threadIdx.x, in + blockIdx.x * kThreads + threadIdx.x, sizeof(float));
  __pipeline_commit();
  if (kWait) __pipeline_wait_prior(0);
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += values[i];
  out[blockIdx.x] = sum;
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[0] = 1;
}

__global__ void barriers_at_two_places(float* out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  out[0] = 1;
}

__global__ void divergent_shuffle(float* out) {
  if (threadIdx.x % 32 < 16) out[0] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
}

__global__ void half_warp_shuffle(float* out) {
  out[0] = __shfl_down_sync(0xffffu, 1.0f, 1);
}

__global__ void write_past_the_end(float* out) {
  out[threadIdx.x + 1] = 1;
}

__global__ void write_past_shared(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x + (out[0] > 0)] = 1;  // out[0] is 1
  __syncthreads();
  out[0] = values[0];
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  constexpr int kBlocks = 3;
  std::vector<float> in(kBlocks * kThreads), out(kBlocks, 1.0f);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i % 7);
  std::vector<float> exact(kThreads, 0.0f);  // as long as a block, for write_past_the_end
  const auto run = [&](size_t shared, const std::function<void()>& kernel, int threads = kThreads) {
    emulator::run(dim3(kBlocks), dim3(threads), shared, kernel);
  };
  try {
    if (name == "block_sum") run(0, [&] { block_sum<true>(in.data(), out.data()); });
    if (name == "missing_barrier") run(0, [&] { block_sum<false>(in.data(), out.data()); });
    if (name == "warp_sum") run(0, [&] { warp_sum(in.data(), out.data()); });
    if (name == "dynamic_sum") run(kThreads * 4, [&] { dynamic_sum(in.data(), out.data(), kThreads); });
    if (name == "copied_sum") run(kThreads * 4, [&] { copied_sum<true>(in.data(), out.data()); });
    if (name == "unwaited_copy") run(kThreads * 4, [&] { copied_sum<false>(in.data(), out.data()); });
    if (name == "unwritten_shared") run(kThreads * 4, [&] { dynamic_sum(in.data(), out.data(), kThreads - 1); });
    if (name == "past_dynamic_shared") run(kThreads * 4 - 4, [&] { dynamic_sum(in.data(), out.data(), kThreads); });
    if (name == "divergent_barrier") run(0, [&] { divergent_barrier(out.data()); });
    if (name == "barriers_at_two_places") run(0, [&] { barriers_at_two_places(out.data()); });
    if (name == "divergent_shuffle") run(0, [&] { divergent_shuffle(out.data()); });
    if (name == "half_warp_shuffle") run(0, [&] { half_warp_shuffle(out.data()); });
    if (name == "odd_block") run(0, [&] { warp_sum(in.data(), out.data()); }, 48);
    if (name == "past_the_end") run(0, [&] { write_past_the_end(exact.data()); });
    if (name == "past_shared") run(0, [&] { write_past_shared(out.data()); });
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (const float value : out) std::printf("%g ", value);
  std::printf("\n");
  return 0;
}
