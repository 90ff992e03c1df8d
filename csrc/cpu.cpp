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
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t(32) << 20;
  }();
  return bytes;
}

const char* cpu_capability_name() {
  switch (cpu_capability()) {
    case Capability::kAvx512:
      return "AVX-512";
    case Capability::kAvx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

}  // namespace normatch
