// The flow head's forward pass on the GPU, see flow_head_cuda.h.
#include "flow_head_cuda.h"

namespace normatch {
namespace {

template <typename Acc>
struct Outputs {
  Acc *z, *logdet, *class_log_prob, *log_prob;
  double* state;
};

// The class log-probabilities of the tile's rows: a class a group, whose lanes add them up for the row that they answer
// for.
template <int kRows, bool kStaged, typename Acc>
__device__ __forceinline__ void score_classes(const Block<kRows, kStaged, Acc>& block, int64_t first, int64_t rows,
                                              Acc* class_log_prob, RowSums<Acc>& sums_of_row) {
  constexpr int kSize = Pack<Acc>::kSize;
  const Head<Acc>& head = block.head;
  const Layout& at = block.at;
  const int64_t mine = first + block.row();
  const auto* const terms = block.template part<ClassTerms<Acc>>(at.terms);
  for (int first_class = 0; first_class < head.mixture.classes; first_class += kGroups) {
    const int k = min(first_class + block.group(), head.mixture.classes - 1);
    Acc totals[kRows] = {};
    for (int half = 0; half < 2; ++half) {
      const Acc* const mu = head.means + int64_t(k) * head.features + half_begin(half, head.features);
      const Acc* const z = block.part(at.rounded) + block.place(half);
      const int width = head.half(half);
      const bool packed = head.features % kSize == 0 && reinterpret_cast<uintptr_t>(mu) % 16 == 0;
      constexpr int kStretch = 8 * kGroup * kSize;  // columns whose squares are added up in one go
      for (int begin = 0; begin < width; begin += kStretch) {
        Acc sums[kRows] = {};
        for (int d = begin + threadIdx.x % kGroup * kSize; d < min(begin + kStretch, width); d += kGroup * kSize) {
          Acc mean[kSize];
          load_padded(mu, d, width, packed, mean);
          NM_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const Pack<Acc> point = Pack<Acc>::load(z + r * at.row + d);
            NM_UNROLL
            for (int i = 0; i < kSize; ++i) {
              const Acc difference = point.values[i] - mean[i];
              sums[r] = multiply_add(difference, difference, sums[r]);
            }
          }
        }
        NM_UNROLL
        for (int r = 0; r < kRows; ++r) totals[r] += sums[r];
      }
    }
    const Acc distance = block.template sum_lanes<kGroup / 2>(totals);
    if (first_class + block.group() >= head.mixture.classes) continue;
    const Acc score = multiply_add(Acc(-0.5) * terms[k].precision, distance, terms[k].offset);
    if (block.writes() && mine < rows) class_log_prob[mine * head.mixture.classes + k] = score;
    const Acc top = score > sums_of_row.top ? score : sums_of_row.top;
    if (score == -INFINITY && top == -INFINITY) continue;  // a NaN is not passed over
    sums_of_row.sum = sums_of_row.sum * Math<Acc>::exp(sums_of_row.top - top) + Math<Acc>::exp(score - top);
    sums_of_row.top = top;
  }
}

// Puts the groups' parts of each row together: a warp a row, a lane for each group's part.
template <int kRows, bool kStaged, typename Acc>
__device__ __forceinline__ void write_sums(const Block<kRows, kStaged, Acc>& block, const RowSums<Acc>& sums,
                                           int64_t first, int64_t rows, const Outputs<Acc>& out) {
  auto* const parts = block.template part<RowSums<Acc>>(block.at.row_sums);
  if (block.writes()) parts[block.group() * kRows + block.row()] = sums;
  __syncthreads();
  const int warp = threadIdx.x / kLanesOfWarp;
  if (warp >= kRows) return;
  static_assert(kGroups == kLanesOfWarp, "a lane a part");
  const RowSums<Acc> part = parts[threadIdx.x % kLanesOfWarp * kRows + warp];
  const Acc top = lanes_max(part.top);
  const double scaled = part.sum == 0 ? 0 : double(part.sum) * double(Math<Acc>::exp(part.top - top));
  const double sum = lanes_sum<kLanesOfWarp>(scaled), total = lanes_sum<kLanesOfWarp>(part.logdet);
  if (threadIdx.x % kLanesOfWarp == 0 && first + warp < rows) {
    out.logdet[first + warp] = Acc(total);
    out.log_prob[first + warp] = Acc(double(top) + ::log(sum) + total);
  }
}

template <int kRows, bool kStaged, typename Acc>
__global__ void __launch_bounds__(kThreads, 1)
    flow_head_kernel(const __grid_constant__ Head<Acc> head, const __grid_constant__ Layout at, AnyRows x, int64_t rows,
                     Outputs<Acc> out) {
  NM_DYNAMIC_SHARED(unsigned char, memory);
  const Block<kRows, kStaged, Acc> block(head, at, memory);
  const int64_t first = int64_t(blockIdx.x) * kRows;
  double* const exact = block.template part<double>(at.exact);
  Acc* const rounded = block.part(at.rounded);

  block.fetch(0, 0);
  block.fetch(0, 1);
  // Rows past the end repeat the last one.
  block.start([&](int r, int d) { return x.get<Acc>(min(first + r, rows - 1), d); });
  block.find_terms();
  double logdet = 0;  // of what this lane has seen of its row
  for (int j = 0; j < head.couplings; ++j) {
    const int changed = 1 - j % 2;
    const Acc* const gain = block.gain(j);
    block.template network<1>(
        j, first, [&](int layer) { block.fetch(layer == 0 ? j : j + 1, (layer + 2) % 3); },
        [&](int r, int d, bool live, Acc s_raw, Acc t) {
          if (!live) return;
          const int i = r * at.row + block.place(changed) + d;
          const auto scale = affine_scale(s_raw, gain[d]);
          const Acc factor = Math<Acc>::exp(scale.s);
          logdet += double(scale.s);
          if (!block.writes()) return;
          const double y = (exact[i] + double(t)) * double(factor);
          exact[i] = y;
          rounded[i] = Acc(y);
        });
  }
  __syncthreads();
  block.for_state([&](int r, int c, int d) {
    if (d < 0 || first + r >= rows) return;
    out.z[(first + r) * head.features + d] = rounded[r * at.row + c];
    out.state[(first + r) * head.features + d] = exact[r * at.row + c];
  });

  RowSums<Acc> sums{-INFINITY, 0, logdet};
  score_classes(block, first, rows, out.class_log_prob, sums);
  write_sums(block, sums, first, rows, out);
}

FlowHeadResults flow_head(const Tensor& x, std::vector<Tensor> couplings, const Tensor& means, const Tensor& rho,
                          const Tensor& logits, std::optional<Tensor> seed, double dropout, double eps) {
  const FlowHeadResults results = flow_head_results(x, means);
  const int64_t rows = x.size(0);
  if (rows == 0) return results;
  const Tensor dense_x = dense_rows(x);
  const AnyRows from{const_cast<void*>(dense_x.const_data_ptr()), dense_x.stride(0), x.scalar_type()};
  with_accumulator(accumulation_type(x), [&](auto accumulator) {
    using Acc = typename decltype(accumulator)::type;
    const auto& [z, logdet, class_log_prob, log_prob, state] = results;
    const Given<Acc> given(x.size(1), couplings, means, rho, logits, seed, dropout, eps);
    const Outputs<Acc> out{z.template mutable_data_ptr<Acc>(), logdet.template mutable_data_ptr<Acc>(),
                           class_log_prob.template mutable_data_ptr<Acc>(), log_prob.template mutable_data_ptr<Acc>(),
                           state.template mutable_data_ptr<double>()};
    cut(given.head, rows <= 4 * kMaxChunks, false, x, [&](auto tile, auto staged, const Layout& at) {
      constexpr int kRows = decltype(tile)::value;
      launch(flow_head_kernel<kRows, decltype(staged)::value, Acc>, grid_of((rows + kRows - 1) / kRows), dim3(kThreads),
             at.size, x, given.head, at, from, rows, out);
    });
  });
  return results;
}

}  // namespace

NM_CUDA_LIBRARY(m) {
  m.impl("flow_head", TORCH_BOX(&flow_head));
}

}  // namespace normatch
