// The Python face of the extension: importing it registers the ops; build_info() says what was built.
// Compiled without PyTorch's headers, whose own copy of pybind11 refuses a stable-ABI target.
#include <pybind11/pybind11.h>

#include "limits.h"

namespace py = pybind11;

namespace normatch {
const char* cpu_capability_name();
}

#ifdef NM_EMULATE
#include <cstdint>
namespace emulator {
bool reversed();
int64_t launches();
}  // namespace emulator
#endif

// A limit that is missing does not apply.
static py::dict limits() {
  using namespace normatch;
  using namespace py::literals;
  return py::dict(
      "flow_head_cpu"_a = py::dict("hidden"_a = kFusedHidden, "features"_a = kFusedFeatures),
      "flow_head_cuda"_a = py::dict("hidden"_a = kFusedHidden, "features"_a = kFusedFeatures, "classes"_a = kMaxClasses,
                                    "couplings"_a = kMaxCouplings, "parameters"_a = kMaxParameters),
      "augment_views"_a =
          py::dict("max_side"_a = kMaxImageSide, "max_ops"_a = kMaxViewOps, "max_levels"_a = kMaxLevels));
}

static py::dict build_info() {
  py::dict info;
  info["compiler"] = NORMATCH_COMPILER;
  info["torch_target"] = NORMATCH_TORCH_TARGET;
  info["built_with_torch"] = NORMATCH_BUILT_WITH_TORCH;
  info["cuda"] = NORMATCH_CUDA_VERSION;  // "" for a build without nvcc
  info["cuda_architectures"] = NORMATCH_CUDA_ARCHITECTURES;
  info["cpu_capability"] = normatch::cpu_capability_name();
  info["limits"] = limits();
#ifdef NM_EMULATE
  info["emulated"] = true;
  info["thread_order"] = emulator::reversed() ? "reversed" : "forward";
#else
  info["emulated"] = false;
#endif
  return info;
}

PYBIND11_MODULE(NORMATCH_MODULE, m) {
  m.doc() = "normatch's compiled ops";
  m.def("build_info", &build_info, "What this extension was built with, as a dictionary of plain values.");
#ifdef NM_EMULATE
  m.def("launches", &emulator::launches, "How many kernels have been launched so far.");
#endif
}
