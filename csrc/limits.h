// Sizes up to which the kernels work, which Python reads from build_info()["limits"].
#pragma once

#include <cstdint>

namespace normatch {

// Fusing the flow head pays off where a tile of rows keeps its state in the cache and the matrix products are too small
// for a library's to be faster.
constexpr int kFusedHidden = 128, kFusedFeatures = 4096;

constexpr int64_t kWorkspace = 1 << 24;  // values, 64 MB in float32, for the copies of a gradient that chunks sum into

// On a GPU shared memory holds the terms of all classes, a kernel's arguments the addresses of all couplings, and the
// workspace at least 32 copies of all parameters.
constexpr int kMaxClasses = 2048, kMaxCouplings = 64;
constexpr int64_t kMaxParameters = kWorkspace / 32;

constexpr int kMaxViewOps = 8, kMaxLevels = 32;
constexpr int kMaxImageSide = 2048;  // sums of 8-bit values and 16.16 coordinates stay within 32 bits

}  // namespace normatch
