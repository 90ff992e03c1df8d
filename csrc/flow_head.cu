// The whole flow head on the GPU: one launch forward, two backward.
//
// A block carries a few rows through all couplings: their state stays in shared memory, in double as on the CPU, so
// that backward can rebuild each coupling's input from its output (see flow_head.cpp). The networks see it rounded to
// Acc. Each of their sums is shared by a group of 8 lanes in an order that follows from its length alone, so that
// forward and backward find the same bits however they cut the rows. The weights of a coupling lie in shared memory;
// as soon as a layer's are no longer needed, the next coupling's are on their way to the same place. Where a coupling
// does not fit, weights are read from where they are.
//
// Backward: a block takes the tiles of a chunk of rows and adds up the gradients of all parameters in its own part of
// a workspace; a second launch adds up the parts, in order.
//
// With W the number of weights, FLOP for a row: 2 W + 3 K D forward, 8 W + 6 K D backward. Each tile of rows reads all
// weights once forward, twice backward, from the second-level cache.
#include "flow_head.h"

#include <tuple>

#include "affine_coupling.h"
#include "cuda.h"
#include "gmm_log_prob.h"

namespace normatch {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanesOfWarp;
constexpr int kGroup = 8;  // lanes that share a sum
constexpr int kGroups = kThreads / kGroup;
constexpr int kClassTile = 32;     // classes whose gradients are in shared memory at a time
constexpr int kMaxCouplings = 64;  // whose addresses make up most of a kernel's arguments
constexpr int kMaxClasses = 2048;  // whose terms fit shared memory
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

  template <typename Acc>
  __device__ Acc get(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    if constexpr (sizeof(Acc) == 8) return static_cast<const double*>(data)[i];
    if (type == ScalarType::BFloat16) return Acc(static_cast<const BFloat16*>(data)[i]);
    if (type == ScalarType::Half) return Acc(static_cast<const Half*>(data)[i]);
    return Acc(static_cast<const float*>(data)[i]);
  }
  template <typename Acc>
  __device__ void set(int64_t row, int64_t column, Acc value) const {
    const int64_t i = row * stride + column;
    if constexpr (sizeof(Acc) == 8) {
      static_cast<double*>(data)[i] = value;
    } else {
      if (type == ScalarType::BFloat16)
        static_cast<BFloat16*>(data)[i] = BFloat16(value);
      else if (type == ScalarType::Half)
        static_cast<Half*>(data)[i] = Half(value);
      else
        static_cast<float*>(data)[i] = value;
    }
  }
};

// What both directions are given.
template <typename Acc>
struct Head {
  int features, hidden, classes, couplings;
  const Acc *means, *rho, *logits;
  const int64_t* seed;  // null without dropout
  Dropout dropout;
  double eps;
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
  at.terms = take(head.classes * int64_t(sizeof(ClassTerms<Acc>)));
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
    const Normaliser all = normaliser(head.logits, head.classes);
    for (int k = threadIdx.x; k < head.classes; k += kThreads) {
      const double rho = double(head.rho[k]), log_sigma = log_softplus(rho);
      const double log_pi = double(head.logits[k]) - all.top - all.log_sum;
      part<ClassTerms<Acc>>(at.terms)[k] = {Acc(gmm_offset(log_pi, log_sigma, head.eps, double(head.features))),
                                            gmm_precision<Acc>(log_sigma), Acc(::exp(log_pi)),
                                            Acc(log_weight_slope(log_pi, head.eps)), Acc(log_softplus_slope(rho))};
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

  // done(row, column, sum over the layer's outputs o of left[row][o] weight[o][column]); between() when the weights
  // have been used.
  template <typename Between, typename Done>
  __device__ void transposed_products(const Layer<Acc>& layer, int outputs, int columns, const Acc* left,
                                      int left_stride, const Between& between, const Done& done) const {
    int across = kGroup;  // threads along the columns; the others take other outputs
    while (across * kSize < columns && across < kThreads) across *= 2;
    const int slices = kThreads / across, slice = threadIdx.x / across, width = across * kSize;
    Acc* const scratch = part(at.scratch);  // [slice][row][width]
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
  __device__ void add_gradients(int outputs, int columns, const Acc* left, int left_stride, const Acc* right,
                                int right_stride, bool begin, Acc* dweight, Acc* dbias) const {
    for (int c = threadIdx.x % kGroup * kSize; c < columns; c += kGroup * kSize) {
      Pack<Acc> values[kRows];
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) values[r] = Pack<Acc>::load(right + r * right_stride + c);
      for (int o = group(); o < outputs; o += kGroups) {
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
};

// ---- forward ------------------------------------------------------------------------------------------------------

template <typename Acc>
struct Outputs {
  Acc *z, *logdet, *class_log_prob, *log_prob;
  double* state;
};

template <int kRows, bool kStaged, typename Acc>
__global__ void __launch_bounds__(kThreads, 1)
    flow_head_kernel(const __grid_constant__ Head<Acc> head, const __grid_constant__ Layout at, AnyRows x, int64_t rows,
                     Outputs<Acc> out) {
  NM_DYNAMIC_SHARED(unsigned char, memory);
  const Block<kRows, kStaged, Acc> block(head, at, memory);
  constexpr int kSize = Pack<Acc>::kSize;
  const int64_t first = int64_t(blockIdx.x) * kRows;
  const int64_t mine = first + block.row();
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

  // The classes: a group each, and the row that its lanes answer for.
  RowSums<Acc> found{-INFINITY, 0, logdet};
  const auto* const terms = block.template part<ClassTerms<Acc>>(at.terms);
  for (int first_class = 0; first_class < head.classes; first_class += kGroups) {
    const int k = min(first_class + block.group(), head.classes - 1);
    Acc totals[kRows] = {};
    for (int half = 0; half < 2; ++half) {
      const Acc* const mu = head.means + int64_t(k) * head.features + half_begin(half, head.features);
      const Acc* const z = rounded + block.place(half);
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
    if (first_class + block.group() >= head.classes) continue;
    const Acc score = multiply_add(Acc(-0.5) * terms[k].precision, distance, terms[k].offset);
    if (block.writes() && mine < rows) out.class_log_prob[mine * head.classes + k] = score;
    const Acc top = score > found.top ? score : found.top;
    if (score == -INFINITY && top == -INFINITY) continue;  // a NaN is not passed over
    found.sum = found.sum * Math<Acc>::exp(found.top - top) + Math<Acc>::exp(score - top);
    found.top = top;
  }

  // A warp a row, a lane for each group's part.
  auto* const parts = block.template part<RowSums<Acc>>(at.row_sums);
  if (block.writes()) parts[block.group() * kRows + block.row()] = found;
  __syncthreads();
  const int warp = threadIdx.x / kLanesOfWarp;
  if (warp >= kRows) return;
  static_assert(kGroups == kLanesOfWarp, "a lane a part");
  const RowSums<Acc> part = parts[threadIdx.x % kLanesOfWarp * kRows + warp];
  Acc top = part.top;
  for (int offset = kLanesOfWarp / 2; offset > 0; offset /= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, offset));
  const double scaled = part.sum == 0 ? 0 : double(part.sum) * double(Math<Acc>::exp(part.top - top));
  const double sum = lanes_sum<kLanesOfWarp>(scaled), total = lanes_sum<kLanesOfWarp>(part.logdet);
  if (threadIdx.x % kLanesOfWarp == 0 && first + warp < rows) {
    out.logdet[first + warp] = Acc(total);
    out.log_prob[first + warp] = Acc(double(top) + ::log(sum) + total);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------

// The gradients of all parameters of a chunk of rows, one after the other: those of the couplings, then of means, rho
// and logits. Each starts at a whole pack; `count` of its values count.
struct GradientLayout {
  static constexpr int kTensors = kCouplingTensors;
  int64_t start[2][kTensors], count[2][kTensors], pair;  // for even and odd couplings; pair: of the two together
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
    for (int i = 0; i < kCouplingTensors; ++i) {
      at.start[j][i] = take(end, at.count[j][i] = counts[i]);
    }
  }
  at.pair = end;
  end = head.couplings % 2 ? at.of(head.couplings - 1, kGain) + (at.count[0][kGain] + 3) / 4 * 4
                           : head.couplings / 2 * at.pair;
  at.means_count = int64_t(head.classes) * head.features;
  at.classes = head.classes;
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

// The mixture's gradients for a tile: those of the state to at.grad, those of its parameters to `sums`.
template <int kRows, bool kStaged, typename Acc>
__device__ __forceinline__ void mixture_backward(const Block<kRows, kStaged, Acc>& block, const Upstream<Acc>& upstream,
                                                 const Acc* scores, int64_t first, int here, bool begin,
                                                 const GradientLayout& to, Acc* sums) {
  const Head<Acc>& head = block.head;
  const Layout& at = block.at;
  const auto* const terms = block.template part<ClassTerms<Acc>>(at.terms);
  auto* const rows = block.template part<RowTerms<Acc>>(at.row_terms);
  const int classes = head.classes, warp = threadIdx.x / kLanesOfWarp, lane = threadIdx.x % kLanesOfWarp;
  const auto gradient = [&](const RowTerms<Acc>& row, int64_t i) {
    Acc g = upstream.log_prob ? Math<Acc>::exp(scores[i] - row.top - row.norm) * row.of_log_prob : Acc(0);
    return upstream.class_log_prob ? g + upstream.class_log_prob[i] : g;
  };
  if (warp < kRows) {  // a warp a row
    const int64_t row = first + min(warp, here - 1), i = row * classes;
    Acc top = -INFINITY;
    for (int k = lane; k < classes; k += kLanesOfWarp) top = max(top, scores[i + k]);
    for (int offset = kLanesOfWarp / 2; offset > 0; offset /= 2)
      top = max(top, __shfl_xor_sync(kFullWarp, top, offset));
    top = top - top == 0 ? top : Acc(0);
    double sum = 0, weight = 0;
    for (int k = lane; k < classes; k += kLanesOfWarp) sum += double(Math<Acc>::exp(scores[i + k] - top));
    const Acc of_log_prob = upstream.log_prob ? upstream.log_prob[row] : Acc(0);
    RowTerms<Acc> found{top, Acc(::log(lanes_sum<kLanesOfWarp>(sum))), of_log_prob,
                        of_log_prob + (upstream.logdet ? upstream.logdet[row] : Acc(0)), 0};
    for (int k = lane; k < classes; k += kLanesOfWarp) weight += double(terms[k].weight_slope) * gradient(found, i + k);
    found.weight = lanes_sum<kLanesOfWarp>(weight);
    if (warp >= here) found.logdet = 0;
    if (lane == 0) rows[warp] = found;
  }
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
      for (int offset = kRows / 2; offset > 0; offset /= 2) {
        spread += __shfl_xor_sync(kFullWarp, spread, offset);
        weight += __shfl_xor_sync(kFullWarp, weight, offset);
      }
      if (k < classes && r == 0) {
        const Acc of_rho = Acc(spread * terms[k].rho_slope), of_logits = Acc(weight);
        sums[to.rho + k] = begin ? of_rho : sums[to.rho + k] + of_rho;
        sums[to.logits + k] = begin ? of_logits : sums[to.logits + k] + of_logits;
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
        Acc of_mean = 0;
        NM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Acc pull = weights[k * kRows + r] * (points[r] - mu);
          pulls[r] += pull;
          of_mean += pull;
        }
        sums[to.means + i] = begin ? of_mean : sums[to.means + i] + of_mean;
      }
      NM_UNROLL
      for (int r = 0; r < kRows; ++r) grad[r * at.row + c] -= pulls[r];
    }
    __syncthreads();
  }
}

template <int kRows, bool kStaged, typename Acc>
__global__ void __launch_bounds__(kThreads, 1)
    flow_head_backward_kernel(const __grid_constant__ Head<Acc> head, const __grid_constant__ Layout at,
                              const __grid_constant__ GradientLayout to, Upstream<Acc> upstream, Saved<Acc> saved,
                              int64_t rows, int64_t tiles_per_chunk, Acc* partial, AnyRows grad_x) {
  NM_DYNAMIC_SHARED(unsigned char, memory);
  const Block<kRows, kStaged, Acc> block(head, at, memory);
  double* const exact = block.template part<double>(at.exact);
  Acc *const rounded = block.part(at.rounded), *const grad = block.part(at.grad);
  Acc *const hidden0 = block.part(at.hidden0), *const hidden1 = block.part(at.hidden1);
  Acc *const grad_affine = block.part(at.grad_affine), *const grad_hidden = block.part(at.grad_hidden);
  const auto* const row_terms = block.template part<RowTerms<Acc>>(at.row_terms);
  const Acc dropout_scale = block.dropout.active ? Acc(block.dropout.scale) : Acc(1);
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
      const int kept = j % 2, half = head.half(1 - kept);
      const int next = j > 0 ? j - 1 : first + kRows < end_row ? last : -1;
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
            const auto found =
                affine_gradients(grad_y * factor, grad_y * y + row_terms[r].logdet, scale.tanh_s, gain[d]);
            // From the lanes that answer for different rows.
            Acc of_gain = found.gain;
            for (int offset = kGroup / 2; offset >= kGroup / kRows; offset /= 2)
              of_gain += __shfl_xor_sync(kFullWarp, of_gain, offset);
            __syncwarp();  // all lanes of a row have read what one of them writes
            if (!live) return;
            if (threadIdx.x % kGroup == 0) grad_gain[d] = begin ? of_gain : grad_gain[d] + of_gain;
            if (!block.writes()) return;
            const double x = exact[i] / double(factor) - double(t);
            exact[i] = x;
            rounded[i] = Acc(x);
            grad[i] = found.input;
            grad_affine[r * at.affine + d] = found.s_raw;
            grad_affine[r * at.affine + half + d] = found.input;
          });
      __syncthreads();
      block.transposed_products(
          block.layer(j, 2), 2 * half, head.hidden, grad_affine, at.affine,
          [&] {
            block.fetch(next, 2);
            block.add_gradients(2 * half, head.hidden, grad_affine, at.affine, hidden1, at.hidden, begin,
                                sums + to.of(j, kWeight2), sums + to.of(j, kBias2));
          },
          [&](int r, int unit, Acc sum) {
            grad_hidden[r * at.hidden + unit] = hidden1[r * at.hidden + unit] > 0 ? sum : Acc(0);
          });
      Acc* const grad_hidden0 = hidden1;  // no longer needed
      block.transposed_products(
          block.layer(j, 1), head.hidden, head.hidden, grad_hidden, at.hidden,
          [&] {
            block.fetch(next, 1);
            block.add_gradients(head.hidden, head.hidden, grad_hidden, at.hidden, hidden0, at.hidden, begin,
                                sums + to.of(j, kWeight1), sums + to.of(j, kBias1));
          },
          [&](int r, int unit, Acc sum) {
            grad_hidden0[r * at.hidden + unit] = hidden0[r * at.hidden + unit] > 0 ? sum * dropout_scale : Acc(0);
          });
      block.transposed_products(
          block.layer(j, 0), head.hidden, head.half(kept), grad_hidden0, at.hidden,
          [&] {
            block.fetch(next, 0);
            block.add_gradients(head.hidden, head.half(kept), grad_hidden0, at.hidden, rounded + block.place(kept),
                                at.row, begin, sums + to.of(j, kWeight0), sums + to.of(j, kBias0));
          },
          [&](int r, int c, Acc sum) { grad[r * at.row + block.place(kept) + c] += sum; });
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
  NM_DYNAMIC_SHARED(double, sums);  // [threadIdx.y][threadIdx.x]
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
  double sum = 0;
  if (to != nullptr)
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += blockDim.y) sum += double(partial[chunk * at.size + i]);
  sums[threadIdx.y * kLanesOfWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || to == nullptr) return;
  for (unsigned y = 1; y < blockDim.y; ++y) sum += sums[y * kLanesOfWarp + threadIdx.x];
  *to = Acc(sum);
}

// ---- the ops ------------------------------------------------------------------------------------------------------

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
    head.classes = int(means.size(0));
    head.couplings = int(couplings.size()) / kCouplingTensors;
    STD_TORCH_CHECK(head.couplings <= kMaxCouplings && head.classes <= kMaxClasses,
                    "flow_head: too many couplings or classes");
    for (size_t i = 0; i < couplings.size(); ++i)
      head.parameters[i / kCouplingTensors][i % kCouplingTensors] = data(couplings[i]);
    head.means = data(means);
    head.rho = data(rho);
    head.logits = data(logits);
    head.seed = seed ? seed->const_data_ptr<int64_t>() : nullptr;
    head.dropout = Dropout::of(seed ? dropout : 0, 0);
    head.eps = eps;
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flow_head(const Tensor& x, std::vector<Tensor> couplings,
                                                             const Tensor& means, const Tensor& rho,
                                                             const Tensor& logits, std::optional<Tensor> seed,
                                                             double dropout, double eps) {
  const int64_t rows = x.size(0), features = x.size(1), classes = means.size(0);
  const ScalarType type = accumulation_type(x);
  const Tensor z = new_tensor(x, {rows, features}, type), logdet = new_tensor(x, {rows}, type);
  const Tensor class_log_prob = new_tensor(x, {rows, classes}, type), log_prob = new_tensor(x, {rows}, type);
  const Tensor state = new_tensor(x, {rows, features}, ScalarType::Double);
  if (rows == 0) return {z, logdet, class_log_prob, log_prob, state};
  const Tensor dense_x = dense_rows(x);
  const AnyRows from{const_cast<void*>(dense_x.const_data_ptr()), dense_x.stride(0), x.scalar_type()};
  with_accumulator(type, [&](auto accumulator) {
    using Acc = typename decltype(accumulator)::type;
    const Given<Acc> given(features, couplings, means, rho, logits, seed, dropout, eps);
    const Outputs<Acc> out{z.mutable_data_ptr<Acc>(), logdet.mutable_data_ptr<Acc>(),
                           class_log_prob.mutable_data_ptr<Acc>(), log_prob.mutable_data_ptr<Acc>(),
                           state.mutable_data_ptr<double>()};
    cut(given.head, rows <= 4 * kMaxChunks, false, x, [&](auto tile, auto staged, const Layout& at) {
      constexpr int kRows = decltype(tile)::value;
      launch(flow_head_kernel<kRows, decltype(staged)::value, Acc>, grid_of((rows + kRows - 1) / kRows), dim3(kThreads),
             at.size, x, given.head, at, from, rows, out);
    });
  });
  return {z, logdet, class_log_prob, log_prob, state};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor> flow_head_backward(
    std::optional<Tensor> grad_z, std::optional<Tensor> grad_logdet, std::optional<Tensor> grad_class_log_prob,
    std::optional<Tensor> grad_log_prob, const Tensor& state, const Tensor& class_log_prob,
    std::vector<Tensor> couplings, const Tensor& means, const Tensor& rho, const Tensor& logits,
    std::optional<Tensor> seed, double dropout, double eps, ScalarType dtype) {
  const int64_t rows = state.size(0), features = state.size(1);
  const Tensor grad_x = new_tensor(state, {rows, features}, dtype);
  const auto like = [](const Tensor& parameter) {
    return parameter.dim() == 2 ? new_tensor(parameter, {parameter.size(0), parameter.size(1)}, parameter.scalar_type())
                                : new_tensor(parameter, {parameter.size(0)}, parameter.scalar_type());
  };
  std::vector<Tensor> grads;
  for (const Tensor& parameter : couplings) grads.push_back(like(parameter));
  const Tensor grad_means = like(means), grad_rho = like(rho), grad_logits = like(logits);
  const Tensor dense_state = torch::stable::contiguous(state);
  with_accumulator(means.scalar_type(), [&](auto accumulator) {
    using Acc = typename decltype(accumulator)::type;
    Given<Acc> given(features, couplings, means, rho, logits, seed, dropout, eps);
    const Upstream<Acc> upstream{given.data(grad_z), given.data(grad_logdet), given.data(grad_class_log_prob),
                                 given.data(grad_log_prob)};
    const Saved<Acc> saved{dense_state.const_data_ptr<double>(), given.data(class_log_prob)};
    const AnyRows out_x{grad_x.mutable_data_ptr(), features, dtype};
    const GradientLayout to = gradient_layout(given.head);
    // Each chunk has its own sums: as many as fill the machine and 64 MB of floats allow.
    const int64_t most = std::clamp<int64_t>((1 << 24) / to.size, 4, kMaxChunks);
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
  m.impl("flow_head", TORCH_BOX(&flow_head));
  m.impl("flow_head_backward", TORCH_BOX(&flow_head_backward));
}

}  // namespace normatch
