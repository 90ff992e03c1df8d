// Row sums on the CPU: one read of the input, one addition an element.
#include "logdet.h"

#include "cpu.h"

namespace normatch {
namespace {

Tensor logdet(const Tensor& log_scale) {
  const int64_t rows = log_scale.size(0), width = log_scale.size(1);
  const Tensor dense = dense_rows(log_scale);
  const Tensor sums = new_tensor(log_scale, {rows}, accumulation_type(log_scale));
  const int64_t pieces = logdet_pieces(rows, width);
  std::vector<double> partial(rows * pieces);
  dispatch(log_scale.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto in = read_rows<T>(dense);
    const int64_t length = (width + pieces - 1) / pieces;
    parallel_rows(rows * pieces, length, [&](int64_t begin, int64_t end) {
      vectorized<T>([&](auto lanes) NM_INLINE {
        using V = typename decltype(lanes)::type;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i % pieces * length;
          const T* piece = in[i / pieces] + first;
          partial[i] = blocked_sum<V>(std::min(length, width - first), [&](int64_t j, const auto& load, const auto&)
                                                                           NM_INLINE { return load(piece + j); });
        }
      });
    });
    sum_parts(partial, rows, pieces, pieces, 1, sums.mutable_data_ptr<acc_t<T>>());
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  m.impl("logdet", TORCH_BOX(&logdet));
}

}  // namespace normatch
