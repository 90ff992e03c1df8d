#include "cpu.h"

#include <unistd.h>

#include <cstdlib>

namespace normatch {

Capability cpu_capability() {
  static const Capability capability = [] {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string limit = wish ? wish : "";
    if (avx512 && limit != "avx2" && limit != "default") return Capability::kAvx512;
    if (avx2 && limit != "default") return Capability::kAvx2;
#endif
    return Capability::kBaseline;
  }();
  return capability;
}

int64_t last_level_cache() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t(32) << 20;
  }();
  return bytes;
}

const char* cpu_capability_name() {
  constexpr const char* kNames[] = {"baseline", "AVX2", "AVX-512"};
  return kNames[int(cpu_capability())];
}

}  // namespace normatch
