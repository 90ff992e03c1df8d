// What CPU and CUDA sources share: inlining, elementary functions, 16-byte packs and kernel launches. The .cu files
// also compile as plain C++ (NM_EMULATE, see tests/emulator), so only this header may use <<<...>>>, extern __shared__
// or PTX.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NM_HD __host__ __device__ __forceinline__
#define NM_UNROLL _Pragma("unroll")
#else
#define NM_HD inline __attribute__((always_inline))
#define NM_UNROLL
#endif

namespace normatch {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Elementary functions by number type. A template so that the element math of <stem>.h is written once for a
// CUDA thread (float, double) and for a CPU vector (specialized in cpu.h).
template <typename V>
struct Math;

template <>
struct Math<float> {
  static NM_HD float exp(float x) { return ::expf(x); }
  static NM_HD float tanh(float x) { return ::tanhf(x); }
  static NM_HD float log(float x) { return ::logf(x); }
};

template <>
struct Math<double> {
  static NM_HD double exp(double x) { return ::exp(x); }
  static NM_HD double tanh(double x) { return ::tanh(x); }
  static NM_HD double log(double x) { return ::log(x); }
};

// The type sums are made in: float, and double for double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulator<T>::type;

// Calls f(Type<T>{}) with the C++ type T of a tensor's values.
template <typename T>
struct Type {
  using type = T;
};
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    case ScalarType::Double:
      return f(Type<double>{});
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

// 16 bytes of T, moved by one load or store.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];

  static NM_HD Pack load(const T* aligned) {
    Pack pack;
    memcpy(&pack, __builtin_assume_aligned(aligned, 16), sizeof(pack));
    return pack;
  }
  NM_HD void store(T* aligned) const {
    memcpy(__builtin_assume_aligned(static_cast<void*>(aligned), 16), this, sizeof(*this));
  }
};

}  // namespace normatch

#if defined(__CUDACC__) || defined(NM_EMULATE)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#ifdef NM_EMULATE

#include "cuda_shim.h"
// The emulated kernels stand in for the CPU's.
#define NM_DEVICE_KEY CPU
#define NM_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::dynamic_shared())

#else

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#define NM_DEVICE_KEY CUDA
#define NM_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char nm_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(nm_dynamic_shared)

#endif

// STABLE_TORCH_LIBRARY_IMPL for a .cu file: under the key its kernels serve.
#define NM_CUDA_LIBRARY(m) NM_CUDA_LIBRARY_OF(NM_DEVICE_KEY, m)
#define NM_CUDA_LIBRARY_OF(key, m) STABLE_TORCH_LIBRARY_IMPL(normatch, key, m)

namespace normatch {

constexpr unsigned kFullWarp = 0xffffffffu;

// Bytes of shared memory that a block may have on the device that `like` lives on.
inline int64_t shared_memory_limit(const torch::stable::Tensor& like) {
#ifdef NM_EMULATE
  (void)like;
  return emulator::kSharedLimit;
#else
  int bytes = 0;
  const cudaError_t status =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index());
  if (status != cudaSuccess) throw std::runtime_error(std::string("normatch: ") + cudaGetErrorString(status));
  return bytes;
#endif
}

#ifndef NM_EMULATE
// PyTorch's current stream. libtorch_cuda is looked up at run time, not linked, so that a CUDA build also loads under a
// CPU-only PyTorch.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "this PyTorch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// Runs kernel(args...) on the current stream of the device that `like` lives on.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, const torch::stable::Tensor& like,
            Args... args) {
#ifdef NM_EMULATE
  (void)like;
  emulator::run(grid, block, dynamic_shared, [&] { kernel(static_cast<Params>(args)...); });
#else
  const int32_t device = like.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  cudaError_t status = cudaSuccess;
  if (dynamic_shared > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_shared));
  if (status == cudaSuccess) {
    // clang-format off: it takes >>> apart
    kernel<<<grid, block, dynamic_shared, stream>>>(static_cast<Params>(args)...);
    // clang-format on
    status = cudaGetLastError();
  }
  if (status != cudaSuccess) throw std::runtime_error(std::string("normatch: ") + cudaGetErrorString(status));
#endif
}

}  // namespace normatch

#endif  // __CUDACC__ || NM_EMULATE
