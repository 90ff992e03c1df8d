// Runs CUDA kernels on the CPU, so that their indexing, barriers, shuffles and tails are tested without a GPU: the .cu
// files are compiled as C++ against this header instead of cuda_runtime.h.
//
// A block's threads are fibers of one CPU thread, run one after the other in index order, or in reverse with
// NORMATCH_EMULATOR_ORDER=reversed. A fiber runs until it waits, at __syncthreads for its block or at a shuffle or
// __syncwarp for its warp. Hence
//  * a missing barrier shows as a result that depends on the order;
//  * a barrier that not all threads of the block (all lanes of the warp) reach, or reach at different places, raises;
//  * shared memory is filled with 0xff (NaN) before each block, so that its use before it is written shows;
//  * what __pipeline_memcpy_async copies is not there before __pipeline_wait_prior;
//  * an access out of bounds is found by AddressSanitizer, dynamic shared memory being an allocation of its own.
// Not modelled: threads of a warp in lockstep, the memory model within a warp, streams, occupancy.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("nm_shared")))

using std::max;
using std::min;

namespace emulator {

enum class Wait { kBlock, kWarp };

// Suspends the running thread until its block or warp has come to the same place. With kWarp, returns what lane
// `source` brought along as `value`.
uint64_t wait(Wait kind, uint64_t value, int source, unsigned mask, const char* file, int line);

// The body of every thread of every block, for as long as it takes; throws std::runtime_error for what a GPU
// would hang on or silently get wrong.
void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body);

constexpr int kSharedLimit = 227 * 1024;  // bytes for a block

void* dynamic_shared();
int lane();
bool reversed();
int64_t launches();  // since the library was loaded

void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int but_the_last);

template <typename T>
T exchange(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 8 bytes at most");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = wait(Wait::kWarp, bits, source, mask, file, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// The lane that a shuffle reads from, within segments of `width` lanes; its own where the other one is outside.
inline int down(int delta, int width) {
  return lane() % width + delta < width ? lane() + delta : lane();
}
inline int up(int delta, int width) {
  return lane() % width - delta >= 0 ? lane() - delta : lane();
}
inline int direct(int source, int width) {
  return lane() / width * width + (source % width + width) % width;
}
inline int across(int mask, int width) {
  return (lane() ^ mask) / width == lane() / width ? lane() ^ mask : lane();
}

inline int shuffle_width() {
  return warpSize;
}
inline int shuffle_width(int width) {
  return width;
}

}  // namespace emulator

#define __syncthreads() emulator::wait(emulator::Wait::kBlock, 0, 0, 0xffffffffu, __FILE__, __LINE__)
#define __syncwarp(...) emulator::exchange(0xffffffffu, 0, emulator::lane(), __FILE__, __LINE__)
#define NM_SHUFFLE(mask, value, source) emulator::exchange(mask, value, source, __FILE__, __LINE__)
#define __shfl_sync(mask, value, from, ...) \
  NM_SHUFFLE(mask, value, emulator::direct(from, emulator::shuffle_width(__VA_ARGS__)))
#define __shfl_down_sync(mask, value, delta, ...) \
  NM_SHUFFLE(mask, value, emulator::down(delta, emulator::shuffle_width(__VA_ARGS__)))
#define __shfl_up_sync(mask, value, delta, ...) \
  NM_SHUFFLE(mask, value, emulator::up(delta, emulator::shuffle_width(__VA_ARGS__)))
#define __shfl_xor_sync(mask, value, lanes, ...) \
  NM_SHUFFLE(mask, value, emulator::across(lanes, emulator::shuffle_width(__VA_ARGS__)))

// Of <cuda_pipeline_primitives.h>.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::copy_async(to, from, bytes);
}
inline void __pipeline_commit() {
  emulator::commit_copies();
}
inline void __pipeline_wait_prior(int but_the_last) {
  emulator::wait_for_copies(but_the_last);
}

// Atomics on integers only: those on floats would make sums depend on the order of the threads.
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "floats are summed in a fixed order");
  const T old = *address;
  *address = T(old + value);
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = max(old, value);
  return old;
}

template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = min(old, value);
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
