// The flow head's backward pass on the GPU, see flow_head_cuda.h.
#include "flow_head_cuda.h"

namespace normatch {
namespace {

// The gradients of all parameters of a chunk of rows, one after the other: those of the couplings, then of means, rho
// and logits. Each starts at a whole pack; `count` of its values count.
struct GradientLayout {
  int64_t start[2][kCouplingTensors], count[2][kCouplingTensors],
      pair;  // for even and odd couplings; pair: of the two together
  int64_t means, rho, logits, size;
  int64_t means_count, classes;

  NM_HD int64_t of(int j, int tensor) const { return j / 2 * pair + start[j % 2][tensor]; }
};

template <typename Acc>
GradientLayout gradient_layout(const Head<Acc>& head) {
  GradientLayout at{};
  const auto take = [&](int64_t& end, int64_t count) {
    const int64_t start = end;
    end += (count + 3) / 4 * 4;
    return start;
  };
  int64_t end = 0;
  for (int j = 0; j < 2; ++j) {
    const int64_t kept = head.half(j), changed = head.half(1 - j), hidden = head.hidden;
    const int64_t counts[] = {hidden * kept,        hidden,      hidden * hidden, hidden,
                              2 * changed * hidden, 2 * changed, changed};
    for (int i = 0; i < kCouplingTensors; ++i) at.start[j][i] = take(end, at.count[j][i] = counts[i]);
  }
  at.pair = end;
  end = head.couplings % 2 ? at.of(head.couplings - 1, kGain) + (at.count[0][kGain] + 3) / 4 * 4
                           : head.couplings / 2 * at.pair;
  at.means_count = int64_t(head.mixture.classes) * head.features;
  at.classes = head.mixture.classes;
  at.means = take(end, at.means_count);
  at.rho = take(end, at.classes);
  at.logits = take(end, at.classes);
  at.size = end;
  return at;
}

// The gradients of the results; null where there is none, which stands for zeros.
template <typename Acc>
struct Upstream {
  const Acc *z, *logdet, *class_log_prob, *log_prob;
};

template <typename Acc>
struct Saved {
  const double* state;
  const Acc* class_log_prob;
};

// The terms of the tile's rows, a warp a row.
template <int kRows, bool kStaged, typename Acc, typename Gradient>
__device__ __forceinline__ void find_row_terms(const Block<kRows, kStaged, Acc>& block, const Upstream<Acc>& upstream,
                                               const Gradient& gradient, const Acc* scores, int64_t first, int here) {
  const int warp = threadIdx.x / kLanesOfWarp, lane = threadIdx.x % kLanesOfWarp;
  if (warp >= kRows) return;
  const int classes = block.head.mixture.classes;
  const auto* const terms = block.template part<ClassTerms<Acc>>(block.at.terms);
  auto* const rows = block.template part<RowTerms<Acc>>(block.at.row_terms);
  const int64_t row = first + min(warp, here - 1), i = row * classes;
  Acc top = -INFINITY;
  for (int k = lane; k < classes; k += kLanesOfWarp) top = max(top, scores[i + k]);
  top = lanes_max(top);
  top = top - top == 0 ? top : Acc(0);
  double sum = 0, weight = 0;
  for (int k = lane; k < classes; k += kLanesOfWarp) sum += double(Math<Acc>::exp(scores[i + k] - top));
  const Acc of_log_prob = upstream.log_prob ? upstream.log_prob[row] : Acc(0);
  RowTerms<Acc> row_terms{top, Acc(::log(lanes_sum<kLanesOfWarp>(sum))), of_log_prob,
                          of_log_prob + (upstream.logdet ? upstream.logdet[row] : Acc(0)), 0};
  for (int k = lane; k < classes; k += kLanesOfWarp)
    weight += double(terms[k].weight_slope) * gradient(row_terms, i + k);
  row_terms.weight = lanes_sum<kLanesOfWarp>(weight);
  if (warp >= here) row_terms.logdet = 0;
  if (lane == 0) rows[warp] = row_terms;
}

// The mixture's gradients for a tile: those of the state to at.grad, those of its parameters to `sums`.
template <int kRows, bool kStaged, typename Acc>
__device__ __forceinline__ void mixture_backward(const Block<kRows, kStaged, Acc>& block, const Upstream<Acc>& upstream,
                                                 const Acc* scores, int64_t first, int here, bool begin,
                                                 const GradientLayout& to, Acc* sums) {
  const Head<Acc>& head = block.head;
  const Layout& at = block.at;
  const auto* const terms = block.template part<ClassTerms<Acc>>(at.terms);
  const auto* const rows = block.template part<RowTerms<Acc>>(at.row_terms);
  const int classes = head.mixture.classes;
  const auto gradient = [&](const RowTerms<Acc>& row, int64_t i) {
    Acc g = upstream.log_prob ? Math<Acc>::exp(scores[i] - row.top - row.norm) * row.of_log_prob : Acc(0);
    return upstream.class_log_prob ? g + upstream.class_log_prob[i] : g;
  };
  find_row_terms(block, upstream, gradient, scores, first, here);
  __syncthreads();

  Acc* const weights = block.part(at.weights);  // [class of the tile][row]: the gradient of the score / sigma^2
  Acc *const grad = block.part(at.grad), *const rounded = block.part(at.rounded);
  for (int first_class = 0; first_class < classes; first_class += kClassTile) {
    const int in_tile = min(kClassTile, classes - first_class);
    if (int(threadIdx.x) < kClassTile * kRows) {
      const int r = threadIdx.x % kRows, k = first_class + threadIdx.x / kRows;
      Acc g = 0;
      double spread = 0, weight = 0;
      if (k < classes && r < here) {
        const int64_t i = (first + r) * classes + k;
        g = gradient(rows[r], i);
        spread = g * (2.0 * (double(terms[k].offset) - double(scores[i])) - double(head.features));
        weight = double(terms[k].weight_slope) * g - double(terms[k].pi) * rows[r].weight;
      }
      weights[threadIdx.x] = k < classes ? g * terms[k].precision : Acc(0);
      spread = lanes_sum<kRows>(spread);
      weight = lanes_sum<kRows>(weight);
      if (k < classes && r == 0) {
        const Acc grad_rho = Acc(spread * terms[k].rho_slope), grad_logits = Acc(weight);
        sums[to.rho + k] = begin ? grad_rho : sums[to.rho + k] + grad_rho;
        sums[to.logits + k] = begin ? grad_logits : sums[to.logits + k] + grad_logits;
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < at.row; c += kThreads) {
      const int half = c >= at.half1, d = c - block.place(half);
      if (d >= head.half(half)) continue;
      const int64_t column = half_begin(half, head.features) + d;
      Acc points[kRows], pulls[kRows] = {};  // of one tile of classes: a sum of all would round more
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) points[r] = rounded[r * at.row + c];
      for (int k = 0; k < in_tile; ++k) {
        const int64_t i = int64_t(first_class + k) * head.features + column;
        const Acc mu = head.means[i];
        Acc grad_mean = 0;
        NM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Acc pull = weights[k * kRows + r] * (points[r] - mu);
          pulls[r] += pull;
          grad_mean += pull;
        }
        sums[to.means + i] = begin ? grad_mean : sums[to.means + i] + grad_mean;
      }
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) grad[r * at.row + c] -= pulls[r];
    }
    __syncthreads();
  }
}

// done(row, column, sum over the layer's outputs o of left[row][o] weight[o][column]); between() when the weights
// have been used.
template <int kRows, bool kStaged, typename Acc, typename Between, typename Done>
__device__ __forceinline__ void transposed_products(const Block<kRows, kStaged, Acc>& block, const Layer<Acc>& layer,
                                                    int outputs, int columns, const Acc* left, int left_stride,
                                                    const Between& between, const Done& done) {
  constexpr int kSize = Pack<Acc>::kSize;
  int across = kGroup;  // threads along the columns; the others take other outputs
  while (across * kSize < columns && across < kThreads) across *= 2;
  const int slices = kThreads / across, slice = threadIdx.x / across, width = across * kSize;
  Acc* const scratch = block.part(block.at.scratch);  // [slice][row][width]
  for (int begin = 0; begin < columns; begin += width) {
    const int c = threadIdx.x % across * kSize;
    Acc sums[kRows][kSize] = {};
    for (int o = slice; o < outputs; o += slices) {
      Acc weights[kSize];
      load_padded(layer.weight + int64_t(o) * layer.stride, begin + c, layer.width, layer.packed, weights);
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Acc value = left[r * left_stride + o];
        NM_UNROLL
        for (int i = 0; i < kSize; ++i) sums[r][i] = multiply_add(value, weights[i], sums[r][i]);
      }
    }
    NM_UNROLL
    for (int r = 0; r < kRows; ++r) store_values(scratch + (slice * kRows + r) * width + c, sums[r]);
    __syncthreads();
    if (begin + width >= columns) between();
    for (int i = threadIdx.x; i < kRows * width; i += kThreads) {
      Acc sum = 0;
      for (int s = 0; s < slices; ++s) sum += scratch[s * kRows * width + i];
      if (begin + i % width < columns) done(i / width, begin + i % width, sum);
    }
    __syncthreads();
  }
}

// Adds a layer's gradients to `sums`, or begins them: dweight[o][c] = the sum over the rows of left[row][o]
// right[row][c], dbias[o] = that of left[row][o].
template <int kRows, bool kStaged, typename Acc>
__device__ __forceinline__ void add_gradients(const Block<kRows, kStaged, Acc>& block, int outputs, int columns,
                                              const Acc* left, int left_stride, const Acc* right, int right_stride,
                                              bool begin, Acc* dweight, Acc* dbias) {
  constexpr int kSize = Pack<Acc>::kSize;
  for (int c = threadIdx.x % kGroup * kSize; c < columns; c += kGroup * kSize) {
    Pack<Acc> values[kRows];
    NM_UNROLL
    for (int r = 0; r < kRows; ++r) values[r] = Pack<Acc>::load(right + r * right_stride + c);
    for (int o = block.group(); o < outputs; o += kGroups) {
      Acc sums[kSize] = {}, sum = 0;
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Acc value = left[r * left_stride + o];
        sum += value;
        NM_UNROLL
        for (int i = 0; i < kSize; ++i) sums[i] = multiply_add(value, values[r].values[i], sums[i]);
      }
      Acc* const to = dweight + int64_t(o) * columns + c;
      if (columns % kSize == 0) {
        if (!begin) {
          Acc before[kSize];
          load_values(to, before);
          for (int i = 0; i < kSize; ++i) sums[i] += before[i];
        }
        store_values(to, sums);
      } else {
        for (int i = 0; i < kSize; ++i)
          if (c + i < columns) to[i] = begin ? sums[i] : to[i] + sums[i];
      }
      if (c == 0) dbias[o] = begin ? sum : dbias[o] + sum;
    }
  }
}

// Coupling j, from its output and the gradient of it to its input and the gradient of that, in place; the parameters'
// gradients go to `sums`. `next`: the coupling to fetch the weights of.
template <int kRows, bool kStaged, typename Acc>
__device__ __forceinline__ void coupling_backward(const Block<kRows, kStaged, Acc>& block, int j, int next,
                                                  int64_t first, bool begin, const GradientLayout& to, Acc* sums) {
  const Head<Acc>& head = block.head;
  const Layout& at = block.at;
  double* const exact = block.template part<double>(at.exact);
  Acc *const rounded = block.part(at.rounded), *const grad = block.part(at.grad);
  Acc *const hidden0 = block.part(at.hidden0), *const hidden1 = block.part(at.hidden1);
  Acc *const grad_affine = block.part(at.grad_affine), *const grad_hidden = block.part(at.grad_hidden);
  const auto* const row_terms = block.template part<RowTerms<Acc>>(at.row_terms);
  const Acc dropout_scale = block.dropout.active ? Acc(block.dropout.scale) : Acc(1);
  const int kept = j % 2, half = head.half(1 - kept);
  const Acc* const gain = block.gain(j);
  Acc* const grad_gain = sums + to.of(j, kGain);
  block.template network<0>(
      j, first, [](int) {},
      [&](int r, int d, bool live, Acc s_raw, Acc t) {
        const int i = r * at.row + block.place(1 - kept) + d;
        const auto scale = affine_scale(s_raw, gain[d]);
        const Acc factor = Math<Acc>::exp(scale.s);
        // What does not count may be written by another group meanwhile.
        const Acc grad_y = live ? grad[i] : Acc(0), y = live ? rounded[i] : Acc(0);
        const auto grads = affine_gradients(grad_y * factor, grad_y * y + row_terms[r].logdet, scale.tanh_s, gain[d]);
        // From the lanes that answer for different rows.
        Acc gain_sum = grads.gain;
        for (int offset = kGroup / 2; offset >= kGroup / kRows; offset /= 2)
          gain_sum += __shfl_xor_sync(kFullWarp, gain_sum, offset);
        __syncwarp();  // all lanes of a row have read what one of them writes
        if (!live) return;
        if (threadIdx.x % kGroup == 0) grad_gain[d] = begin ? gain_sum : grad_gain[d] + gain_sum;
        if (!block.writes()) return;
        const double x = exact[i] / double(factor) - double(t);
        exact[i] = x;
        rounded[i] = Acc(x);
        grad[i] = grads.input;
        grad_affine[r * at.affine + d] = grads.s_raw;
        grad_affine[r * at.affine + half + d] = grads.input;
      });
  __syncthreads();
  transposed_products(
      block, block.layer(j, 2), 2 * half, head.hidden, grad_affine, at.affine,
      [&] {
        block.fetch(next, 2);
        add_gradients(block, 2 * half, head.hidden, grad_affine, at.affine, hidden1, at.hidden, begin,
                      sums + to.of(j, kWeight2), sums + to.of(j, kBias2));
      },
      [&](int r, int unit, Acc sum) {
        grad_hidden[r * at.hidden + unit] = hidden1[r * at.hidden + unit] > 0 ? sum : Acc(0);
      });
  Acc* const grad_hidden0 = hidden1;  // no longer needed
  transposed_products(
      block, block.layer(j, 1), head.hidden, head.hidden, grad_hidden, at.hidden,
      [&] {
        block.fetch(next, 1);
        add_gradients(block, head.hidden, head.hidden, grad_hidden, at.hidden, hidden0, at.hidden, begin,
                      sums + to.of(j, kWeight1), sums + to.of(j, kBias1));
      },
      [&](int r, int unit, Acc sum) {
        grad_hidden0[r * at.hidden + unit] = hidden0[r * at.hidden + unit] > 0 ? sum * dropout_scale : Acc(0);
      });
  transposed_products(
      block, block.layer(j, 0), head.hidden, head.half(kept), grad_hidden0, at.hidden,
      [&] {
        block.fetch(next, 0);
        add_gradients(block, head.hidden, head.half(kept), grad_hidden0, at.hidden, rounded + block.place(kept), at.row,
                      begin, sums + to.of(j, kWeight0), sums + to.of(j, kBias0));
      },
      [&](int r, int c, Acc sum) { grad[r * at.row + block.place(kept) + c] += sum; });
}

template <int kRows, bool kStaged, typename Acc>
__global__ void __launch_bounds__(kThreads, 1)
    flow_head_backward_kernel(const __grid_constant__ Head<Acc> head, const __grid_constant__ Layout at,
                              const __grid_constant__ GradientLayout to, Upstream<Acc> upstream, Saved<Acc> saved,
                              int64_t rows, int64_t tiles_per_chunk, Acc* partial, AnyRows grad_x) {
  NM_DYNAMIC_SHARED(unsigned char, memory);
  const Block<kRows, kStaged, Acc> block(head, at, memory);
  Acc* const grad = block.part(at.grad);
  Acc* const sums = partial + blockIdx.x * to.size;
  const int64_t begin_row = blockIdx.x * tiles_per_chunk * kRows;
  const int64_t end_row = min(rows, begin_row + tiles_per_chunk * kRows);

  const int last = head.couplings - 1;
  for (int layer = 0; layer < 3; ++layer) block.fetch(last, layer);
  block.find_terms();
  for (int64_t first = begin_row; first < end_row; first += kRows) {
    const bool begin = first == begin_row;
    const int here = int(min(int64_t(kRows), end_row - first));
    // Rows past the end repeat the last one; their gradients are zero.
    block.start([&](int r, int d) { return saved.state[(first + min(r, here - 1)) * head.features + d]; });
    block.for_state([&](int r, int c, int d) {
      grad[r * at.row + c] = upstream.z && d >= 0 && r < here ? upstream.z[(first + r) * head.features + d] : Acc(0);
    });
    __syncthreads();
    mixture_backward(block, upstream, saved.class_log_prob, first, here, begin, to, sums);

    for (int j = last; j >= 0; --j) {
      const int next = j > 0 ? j - 1 : first + kRows < end_row ? last : -1;
      coupling_backward(block, j, next, first, begin, to, sums);
    }
    block.for_state([&](int r, int c, int d) {
      if (d >= 0 && r < here) grad_x.set(first + r, d, grad[r * at.row + c]);
    });
    __syncthreads();
  }
}

template <typename Acc>
struct Gradients {
  Acc *means, *rho, *logits;
  Acc* parameters[kMaxCouplings][kCouplingTensors];
};

// Adds up the chunks: kLanesOfWarp values a block, the chunks shared among threadIdx.y.
template <typename Acc>
__global__ void flow_head_sums_kernel(const Acc* partial, int64_t chunks, const __grid_constant__ GradientLayout at,
                                      const __grid_constant__ Gradients<Acc> out) {
  NM_DYNAMIC_SHARED(double, sums);
  const int64_t i = int64_t(blockIdx.x) * kLanesOfWarp + threadIdx.x;
  Acc* to = nullptr;
  if (i < at.means) {
    const int odd = i % at.pair >= at.start[1][0];
    const int64_t inner = i % at.pair;
    int tensor = 0;
    while (tensor + 1 < kCouplingTensors && inner >= at.start[odd][tensor + 1]) ++tensor;
    const int64_t value = inner - at.start[odd][tensor];
    if (value < at.count[odd][tensor]) to = out.parameters[i / at.pair * 2 + odd][tensor] + value;
  } else if (i < at.rho) {
    if (i - at.means < at.means_count) to = out.means + (i - at.means);
  } else if (i < at.size) {
    const bool rho = i < at.logits;
    const int64_t k = i - (rho ? at.rho : at.logits);
    if (k < at.classes) to = (rho ? out.rho : out.logits) + k;
  }
  const double sum = column_sum(partial, chunks, at.size, i, to != nullptr, sums);
  if (threadIdx.y == 0 && to != nullptr) *to = Acc(sum);
}

FlowHeadGradients flow_head_backward(std::optional<Tensor> grad_z, std::optional<Tensor> grad_logdet,
                                     std::optional<Tensor> grad_class_log_prob, std::optional<Tensor> grad_log_prob,
                                     const Tensor& state, const Tensor& class_log_prob, std::vector<Tensor> couplings,
                                     const Tensor& means, const Tensor& rho, const Tensor& logits,
                                     std::optional<Tensor> seed, double dropout, double eps, ScalarType dtype) {
  const int64_t rows = state.size(0), features = state.size(1);
  const Tensor grad_x = new_tensor(state, {rows, features}, dtype);
  std::vector<Tensor> grads;
  for (const Tensor& parameter : couplings) grads.push_back(new_like(parameter));
  const Tensor grad_means = new_like(means), grad_rho = new_like(rho), grad_logits = new_like(logits);
  const Tensor dense_state = torch::stable::contiguous(state);
  with_accumulator(means.scalar_type(), [&](auto accumulator) {
    using Acc = typename decltype(accumulator)::type;
    Given<Acc> given(features, couplings, means, rho, logits, seed, dropout, eps);
    const Upstream<Acc> upstream{given.data(grad_z), given.data(grad_logdet), given.data(grad_class_log_prob),
                                 given.data(grad_log_prob)};
    const Saved<Acc> saved{dense_state.const_data_ptr<double>(), given.data(class_log_prob)};
    const AnyRows out_x{grad_x.mutable_data_ptr(), features, dtype};
    const GradientLayout to = gradient_layout(given.head);
    // Each chunk has its own sums: as many as fill the machine and the workspace allows.
    const int64_t most = std::clamp<int64_t>(kWorkspace / to.size, 4, kMaxChunks);
    Tensor partial;
    int64_t chunks = 0;
    if (rows > 0)
      cut(given.head, rows <= 4 * most, true, state, [&](auto tile, auto staged, const Layout& at) {
        constexpr int kRows = decltype(tile)::value;
        const int64_t tiles = (rows + kRows - 1) / kRows, tiles_per_chunk = (tiles + most - 1) / most;
        chunks = (tiles + tiles_per_chunk - 1) / tiles_per_chunk;
        partial = new_tensor(means, {chunks, to.size}, means.scalar_type());
        launch(flow_head_backward_kernel<kRows, decltype(staged)::value, Acc>, grid_of(chunks), dim3(kThreads), at.size,
               state, given.head, at, to, upstream, saved, rows, tiles_per_chunk, partial.mutable_data_ptr<Acc>(),
               out_x);
      });
    Gradients<Acc> out{
        grad_means.mutable_data_ptr<Acc>(), grad_rho.mutable_data_ptr<Acc>(), grad_logits.mutable_data_ptr<Acc>(), {}};
    for (size_t i = 0; i < grads.size(); ++i)
      out.parameters[i / kCouplingTensors][i % kCouplingTensors] = grads[i].mutable_data_ptr<Acc>();
    const dim3 block(kLanesOfWarp, chunks > 16 ? 8 : 2);
    launch(flow_head_sums_kernel<Acc>, grid_of((to.size + kLanesOfWarp - 1) / kLanesOfWarp), block,
           block.x * block.y * sizeof(double), state, chunks ? partial.const_data_ptr<Acc>() : nullptr, chunks, to,
           out);
  });
  return {grad_x, std::move(grads), grad_means, grad_rho, grad_logits};
}

}  // namespace

NM_CUDA_LIBRARY(m) {
  m.impl("flow_head_backward", TORCH_BOX(&flow_head_backward));
}

}  // namespace normatch
