// The flow head on the GPU: one launch forward, two backward.
//
// A block carries a few rows through all couplings. Their state stays in shared memory, in double, so that backward can
// rebuild each coupling's input from its output (see flow_head_cpu.h); the networks see it rounded to Acc. A group of 8
// lanes shares each of their sums, in an order that depends on its length alone, so forward and backward get the same
// bits however they cut the rows. A coupling's weights are prefetched to shared memory, layer by layer as the previous
// coupling's are done with; where they do not fit, they are read from global memory.
//
// Backward: a block sums the gradients of all parameters over a chunk of rows in its part of a workspace; a second
// launch adds up the parts, in order. FLOP per row, with W weights: 2 W + 3 K D forward, 8 W + 6 K D backward. Each
// tile of rows reads all weights from the L2 cache, once forward and twice backward.
#pragma once

#include "affine_coupling.h"
#include "flow_head.h"
#include "gmm_log_prob_cuda.h"
#include "limits.h"

namespace normatch {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanesOfWarp;
constexpr int kGroup = 8;  // lanes that share a sum
constexpr int kGroups = kThreads / kGroup;
constexpr int kClassTile = 32;  // classes whose gradients are in shared memory at a time
constexpr int kMaxChunks = 132;

// a b + c, rounded once on the GPU wherever it stands: forward and backward must agree to the bit.
template <typename Acc>
__device__ __forceinline__ Acc multiply_add(Acc a, Acc b, Acc c) {
#if !defined(__CUDA_ARCH__)
  return a * b + c;
#else
  if constexpr (sizeof(Acc) == 4)
    return __fmaf_rn(a, b, c);
  else
    return __fma_rn(a, b, c);
#endif
}

// The values of x or of its gradient, which alone may be of another type than Acc.
struct AnyRows {
  void* data;
  int64_t stride;
  ScalarType type;

  template <typename T>
  __device__ T& at(int64_t row, int64_t column) const {
    return static_cast<T*>(data)[row * stride + column];
  }
  template <typename Acc>
  __device__ Acc get(int64_t row, int64_t column) const {
    if constexpr (sizeof(Acc) == 8) return at<double>(row, column);
    if (type == ScalarType::BFloat16) return Acc(at<BFloat16>(row, column));
    if (type == ScalarType::Half) return Acc(at<Half>(row, column));
    return Acc(at<float>(row, column));
  }
  template <typename Acc>
  __device__ void set(int64_t row, int64_t column, Acc value) const {
    if constexpr (sizeof(Acc) == 8)
      at<double>(row, column) = value;
    else if (type == ScalarType::BFloat16)
      at<BFloat16>(row, column) = BFloat16(value);
    else if (type == ScalarType::Half)
      at<Half>(row, column) = Half(value);
    else
      at<float>(row, column) = value;
  }
};

// What both directions are given.
template <typename Acc>
struct Head {
  int features, hidden, couplings;
  Mixture<Acc> mixture;
  const Acc* means;
  const int64_t* seed;  // null without dropout
  Dropout dropout;
  const Acc* parameters[kMaxCouplings][kCouplingTensors];

  NM_HD int half(int which) const { return int(half_width(which, features)); }
  NM_HD int inputs(int j, int layer) const { return layer == 0 ? half(j % 2) : hidden; }
  NM_HD int outputs(int j, int layer) const { return layer == 2 ? 2 * half(1 - j % 2) : hidden; }
};

template <typename Acc>
NM_HD int padded(int width) {
  return (width + Pack<Acc>::kSize - 1) / Pack<Acc>::kSize * Pack<Acc>::kSize;
}

// What the mixture's parameters come to for a class.
template <typename Acc>
struct ClassTerms {
  Acc offset, precision, pi, weight_slope, rho_slope;
};

// Online logsumexp and log-determinant of a row, in parts.
template <typename Acc>
struct RowSums {
  Acc top, sum;
  double logdet;
};

// A row's posterior: exp(score - top - norm); what its gradients are multiplied by, and the sum over classes of the
// gradients of log pi_k.
template <typename Acc>
struct RowTerms {
  Acc top, norm, of_log_prob, logdet;
  double weight;
};

// Where a block keeps what in its shared memory: sizes of rows in values, places in bytes.
struct Layout {
  int row, half1, hidden, affine;  // strides; half1: where the second half of the features begins in the state
  int exact, rounded, hidden0, hidden1, terms, weight[3], bias[3], gain;
  int row_sums;                                                               // forward
  int grad, grad_affine, grad_hidden, scratch, row_terms, upstream, weights;  // backward
  int64_t size;
};

template <typename Acc>
Layout layout_of(const Head<Acc>& head, int rows, bool staged, bool backward) {
  Layout at{};
  const auto take = [&](int64_t bytes) {
    const int64_t start = at.size;
    at.size += (bytes + 15) / 16 * 16;
    return int(start);
  };
  constexpr int64_t kBytes = sizeof(Acc);
  const int64_t widest = head.half(1);
  at.half1 = padded<Acc>(head.half(0));
  at.row = at.half1 + padded<Acc>(head.half(1));
  at.hidden = padded<Acc>(head.hidden);
  at.affine = 2 * int(widest);
  at.exact = take(rows * at.row * int64_t(sizeof(double)));
  at.rounded = take(rows * at.row * kBytes);
  at.hidden0 = take(rows * at.hidden * kBytes);
  at.hidden1 = take(rows * at.hidden * kBytes);
  at.terms = take(head.mixture.classes * int64_t(sizeof(ClassTerms<Acc>)));
  if (staged) {
    at.weight[0] = take(head.hidden * padded<Acc>(int(widest)) * kBytes);
    at.weight[1] = take(head.hidden * at.hidden * kBytes);
    at.weight[2] = take(2 * widest * at.hidden * kBytes);
    at.bias[0] = take(at.hidden * kBytes);
    at.bias[1] = take(at.hidden * kBytes);
    at.bias[2] = take(padded<Acc>(int(2 * widest)) * kBytes);
    at.gain = take(padded<Acc>(int(widest)) * kBytes);
  }
  if (backward) {
    at.grad = take(rows * at.row * kBytes);
    at.grad_affine = take(rows * at.affine * kBytes);
    at.grad_hidden = take(rows * at.hidden * kBytes);
    at.scratch = take(int64_t(kThreads) * rows * int64_t(sizeof(Pack<Acc>)));
    at.row_terms = take(rows * int64_t(sizeof(RowTerms<Acc>)));
    at.weights = take(rows * kClassTile * kBytes);
  } else {
    at.row_sums = take(kGroups * rows * int64_t(sizeof(RowSums<Acc>)));
  }
  return at;
}

// A layer of a coupling's network: rows of weights, `stride` apart, of which `width` values count.
template <typename Acc>
struct Layer {
  const Acc *weight, *bias;
  int width, stride;
  bool packed;
};

// A block at work on kRows rows. Lane g of a group answers for row g * kRows / kGroup of the tile; where several lanes
// answer for the same row, the first of them writes.
template <int kRows, bool kStaged, typename Acc>
struct Block {
  static constexpr int kSize = Pack<Acc>::kSize;
  static_assert(kGroup % kRows == 0 && kRows <= kWarps, "a row a lane of a group, and a warp a row");

  const Head<Acc>& head;
  const Layout& at;
  unsigned char* memory;
  Dropout dropout;

  __device__ Block(const Head<Acc>& head, const Layout& at, unsigned char* memory)
      : head(head), at(at), memory(memory), dropout(head.dropout) {
    if (dropout.active) dropout.seed = uint64_t(*head.seed);
  }

  template <typename T = Acc>
  __device__ T* part(int place) const {
    return reinterpret_cast<T*>(memory + place);
  }
  __device__ int group() const { return threadIdx.x / kGroup; }
  __device__ int row() const { return threadIdx.x % kGroup * kRows / kGroup; }
  __device__ bool writes() const { return threadIdx.x % (kGroup / kRows) == 0; }
  __device__ int place(int half) const { return half ? at.half1 : 0; }  // of a half in the state's row

  // each(row, place in the state's row, feature) for the values of the tile; the feature is -1 in the gaps.
  template <typename F>
  __device__ void for_state(const F& each) const {
    for (int i = threadIdx.x; i < kRows * at.row; i += kThreads) {
      const int c = i % at.row, half = c >= at.half1, d = c - place(half);
      each(i / at.row, c, d < head.half(half) ? int(half_begin(half, head.features)) + d : -1);
    }
  }

  // Reads the state, value(row, feature), and fills the gaps of what the products read with zeros.
  template <typename F>
  __device__ void start(const F& value) const {
    for_state([&](int r, int c, int d) {
      const auto v = d < 0 ? 0 : value(r, d);
      part<double>(at.exact)[r * at.row + c] = double(v);
      part(at.rounded)[r * at.row + c] = Acc(v);
    });
    for (int i = threadIdx.x; i < kRows * at.hidden; i += kThreads) part(at.hidden0)[i] = part(at.hidden1)[i] = 0;
  }

  __device__ void find_terms() const {
    const Mixture<Acc>& mixture = head.mixture;
    const auto all = mixture.normalizer();
    for (int k = threadIdx.x; k < mixture.classes; k += kThreads) {
      const double log_sigma = mixture.log_sigma(k), log_pi = mixture.log_pi(all, k);
      part<ClassTerms<Acc>>(at.terms)[k] = {Acc(gmm_offset(log_pi, log_sigma, mixture.eps, double(head.features))),
                                            gmm_precision<Acc>(log_sigma), Acc(::exp(log_pi)),
                                            Acc(log_weight_slope(log_pi, mixture.eps)),
                                            Acc(log_softplus_slope(double(mixture.rho[k])))};
    }
  }

  // ---- weights

  // Sends a layer of coupling j on its way to shared memory, as a commit of its own; none for a j past the end.
  __device__ void fetch(int j, int layer) const {
    if constexpr (kStaged) {
      if (j >= 0 && j < head.couplings) {
        const Acc* const* from = head.parameters[j];
        const int inputs = head.inputs(j, layer), outputs = head.outputs(j, layer);
        copy(from[kWeight0 + 2 * layer], outputs, inputs, part(at.weight[layer]));
        copy(from[kBias0 + 2 * layer], 1, outputs, part(at.bias[layer]));
        if (layer == 2) copy(from[kGain], 1, outputs / 2, part(at.gain));
      }
      __pipeline_commit();
    }
  }

  // Rows of `width` values to shared memory, each filled up with zeros to whole packs.
  __device__ void copy(const Acc* from, int rows, int width, Acc* to) const {
    if (width % kSize == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      for (int i = threadIdx.x * kSize; i < rows * width; i += kThreads * kSize)
        __pipeline_memcpy_async(to + i, from + i, 16);
      return;
    }
    const int stride = padded<Acc>(width);
    for (int i = threadIdx.x; i < rows * stride; i += kThreads) {
      const int r = i / stride, c = i % stride;
      if (c < width)
        __pipeline_memcpy_async(to + i, from + r * width + c, sizeof(Acc));
      else
        to[i] = 0;
    }
  }

  // All but the last kPending fetches are there, and what the block's threads wrote can be read.
  template <int kPending>
  __device__ void arrive() const {
    if constexpr (kStaged) __pipeline_wait_prior(kPending);
    __syncthreads();
  }

  __device__ Layer<Acc> layer(int j, int which) const {
    if constexpr (kStaged) {
      const int stride = padded<Acc>(head.inputs(j, which));
      return {part(at.weight[which]), part(at.bias[which]), stride, stride, true};
    } else {
      const Acc* const* from = head.parameters[j];
      const Acc* const weight = from[kWeight0 + 2 * which];
      const int width = head.inputs(j, which);
      return {weight, from[kBias0 + 2 * which], width, width,
              width % kSize == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0};
    }
  }
  __device__ const Acc* gain(int j) const {
    if constexpr (kStaged)
      return part(at.gain);
    else
      return head.parameters[j][kGain];
  }

  // ---- sums

  // The sums of kCount values over the lanes of a group, in each of them: of the rows that it answers for.
  template <int kOffset, int kCount>
  __device__ static Acc sum_lanes(const Acc (&values)[kCount]) {
    if constexpr (kOffset == 0) {
      return values[0];
    } else if constexpr (kCount == 1) {
      const Acc sum[1] = {values[0] + __shfl_xor_sync(kFullWarp, values[0], kOffset)};
      return sum_lanes<kOffset / 2>(sum);
    } else {
      // Of the two halves of the rows a lane keeps one and gives the other away.
      const bool upper = threadIdx.x & kOffset;
      Acc sums[kCount / 2];
      NM_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        const Acc kept = upper ? values[i + kCount / 2] : values[i];
        const Acc given = upper ? values[i] : values[i + kCount / 2];
        sums[i] = kept + __shfl_xor_sync(kFullWarp, given, kOffset);
      }
      return sum_lanes<kOffset / 2>(sums);
    }
  }

  // results[i] = the product of the weights of outputs[i] and the row that this lane answers for.
  template <int kOutputs>
  __device__ void products(const Layer<Acc>& layer, const int (&outputs)[kOutputs], const Acc* in, int in_stride,
                           Acc (&results)[kOutputs]) const {
    Acc sums[kOutputs][kRows] = {};
    for (int i = threadIdx.x % kGroup * kSize; i < layer.width; i += kGroup * kSize) {
      Acc weights[kOutputs][kSize];
      NM_UNROLL
      for (int o = 0; o < kOutputs; ++o)
        load_padded(layer.weight + int64_t(outputs[o]) * layer.stride, i, layer.width, layer.packed, weights[o]);
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Pack<Acc> values = Pack<Acc>::load(in + r * in_stride + i);
        NM_UNROLL
        for (int o = 0; o < kOutputs; ++o) {
          NM_UNROLL
          for (int c = 0; c < kSize; ++c) sums[o][r] = multiply_add(weights[o][c], values.values[c], sums[o][r]);
        }
      }
    }
    NM_UNROLL
    for (int o = 0; o < kOutputs; ++o) results[o] = sum_lanes<kGroup / 2>(sums[o]);
  }

  // each(row, unit, value before the activation)
  template <typename F>
  __device__ void hidden_layer(const Layer<Acc>& layer, const Acc* in, int in_stride, const F& each) const {
    for (int first = 0; first < head.hidden; first += kGroups) {
      const int unit = first + group();
      const int output[1] = {min(unit, head.hidden - 1)};
      Acc sum[1];
      products(layer, output, in, in_stride, sum);
      if (unit < head.hidden && writes()) each(row(), unit, sum[0] + layer.bias[unit]);
    }
  }

  __device__ Acc kept_unit(int64_t first_row, int r, int unit, int j) const {
    const Words words = dropout_words(dropout.seed, first_row + r, unit, j);
    const uint32_t low = unit & 1 ? words.w[1] : words.w[0], high = unit & 1 ? words.w[3] : words.w[2];
    return (unit & 2 ? high : low) >= dropout.threshold ? Acc(dropout.scale) : Acc(0);
  }

  // The network of coupling j. each(row, changed feature, whether it counts, s_raw, t) is called by all lanes.
  // before(layer) comes before a layer, when the layer before that is no longer needed.
  template <int kPending, typename Before, typename F>
  __device__ void network(int j, int64_t first_row, const Before& before, const F& each) const {
    arrive<kPending>();
    before(0);
    Acc *const hidden0 = part(at.hidden0), *const hidden1 = part(at.hidden1);
    hidden_layer(layer(j, 0), part(at.rounded) + place(j % 2), at.row, [&](int r, int unit, Acc value) {
      Acc live = value < 0 ? Acc(0) : value;  // so that NaN passes
      if (dropout.active) live *= kept_unit(first_row, r, unit, j);
      hidden0[r * at.hidden + unit] = live;
    });
    arrive<kPending>();
    before(1);
    hidden_layer(layer(j, 1), hidden0, at.hidden,
                 [&](int r, int unit, Acc value) { hidden1[r * at.hidden + unit] = value < 0 ? Acc(0) : value; });
    arrive<kPending>();
    before(2);
    const Layer<Acc> last = layer(j, 2);
    const int changed = head.half(1 - j % 2);
    for (int first = 0; first < changed; first += kGroups) {
      const int d = min(first + group(), changed - 1);
      const int outputs[2] = {d, changed + d};
      Acc sums[2];
      products(last, outputs, hidden1, at.hidden, sums);
      each(row(), d, first + group() < changed, sums[0] + last.bias[d], sums[1] + last.bias[changed + d]);
    }
  }
};

// ---- on the host --------------------------------------------------------------------------------------------------

// Calls launch_with(Rows, Staged, layout) for the first of these cuts that fits shared memory: many rows a block or
// few, weights staged or not.
template <typename Acc, typename F>
void cut(const Head<Acc>& head, bool few_rows, bool backward, const Tensor& like, const F& launch_with) {
  const int64_t limit = shared_memory_limit(like);
  bool done = false;
  const auto attempt = [&](auto rows, auto staged) {
    if (done) return;
    const Layout at = layout_of(head, rows.value, staged.value, backward);
    if (at.size > limit) return;
    launch_with(rows, staged, at);
    done = true;
  };
  if constexpr (sizeof(Acc) == 4) {
    if (!few_rows) attempt(Count<8>{}, std::true_type{});
    attempt(Count<4>{}, std::true_type{});
    if (!few_rows) attempt(Count<8>{}, std::false_type{});
    attempt(Count<4>{}, std::false_type{});
  }
  attempt(Count<1>{}, std::false_type{});
  STD_TORCH_CHECK(done, "flow_head: a row does not fit shared memory");
}

// The arguments of both kernels, and what keeps copies of them alive.
template <typename Acc>
struct Given {
  Head<Acc> head{};
  std::vector<Tensor> dense;

  Given(int64_t features, const std::vector<Tensor>& couplings, const Tensor& means, const Tensor& rho,
        const Tensor& logits, const std::optional<Tensor>& seed, double dropout, double eps) {
    head.features = int(features);
    head.hidden = int(couplings[kBias0].size(0));
    head.couplings = int(couplings.size()) / kCouplingTensors;
    head.mixture = {data(rho), data(logits), eps, int(means.size(0))};
    STD_TORCH_CHECK(head.couplings <= kMaxCouplings && head.mixture.classes <= kMaxClasses,
                    "flow_head: too many couplings or classes");
    for (size_t i = 0; i < couplings.size(); ++i)
      head.parameters[i / kCouplingTensors][i % kCouplingTensors] = data(couplings[i]);
    head.means = data(means);
    head.seed = seed ? seed->const_data_ptr<int64_t>() : nullptr;
    head.dropout = Dropout::of(seed ? dropout : 0, 0);
  }

  const Acc* data(const Tensor& tensor) {
    dense.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return dense.back().template const_data_ptr<Acc>();
  }
  const Acc* data(const std::optional<Tensor>& tensor) { return tensor ? data(*tensor) : nullptr; }
};

template <typename F>
void with_accumulator(ScalarType type, const F& f) {
  if (type == ScalarType::Double)
    f(Type<double>{});
  else
    f(Type<float>{});
}

}  // namespace normatch
