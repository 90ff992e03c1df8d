// Affine coupling of images on the GPU, in one pass over them each way. A value of the changed part costs 3 reads and 1
// write forward and inverse, 3 reads and 3 writes backward; of the rest 1 and 1.
// Forward and inverse: 8 threads, a warp or a block a sample, by its size, in the order in which the values lie; few
// and large samples are cut into pieces. Backward: a thread stays with a channel (planar images) or a pack of channels
// (channels-last) and walks over samples and pixels with the gain's gradient in registers; the sums of the chunks are
// added up in a second launch.
#include "coupling2d.h"

#include "cuda.h"

namespace normatch {
namespace {

constexpr int kThreads = 256;

// The shapes as the kernels see them: within a sample 32 bits index.
struct Geometry {
  int channels, pixels, width, first, parts;
  Changed changed;
  bool channels_last, shift_first;

  explicit Geometry(const ImageCoupling& shape)
      : channels(int(shape.channels)),
        pixels(int(shape.pixels)),
        width(int(shape.width)),
        first(int(shape.first)),
        parts(int(shape.parts)),
        changed(shape.changed),
        channels_last(shape.channels_last),
        shift_first(shape.shift_first) {
    STD_TORCH_CHECK(2 * shape.channels * shape.pixels < (int64_t(1) << 31), "coupling2d: a sample is too large");
  }

  NM_HD bool changes_channel(int channel) const { return channel >= first && channel < first + parts; }
  NM_HD bool changes_pixel(int pixel) const {
    if (!is_checkerboard(changed)) return true;
    const int row = pixel / width;
    return ((row + pixel - row * width) & 1) == (changed == Changed::kOdd);
  }
};

template <typename T>
struct Images {
  T* data;
  ImageStrides strides;

  NM_HD T* at(const Geometry& shape, int64_t sample, int channel, int pixel) const {
    T* const image = data + sample * strides.sample;
    return shape.channels_last ? image + pixel * strides.pixel + channel
                               : image + int64_t(channel) * shape.pixels + pixel;
  }
};

template <typename T>
Images<const T> read_images(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), strides_of(tensor)};
}

template <typename T>
Images<T> write_images(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<T>(), strides_of(tensor)};
}

// Whether neighbors in memory, a pack at a time, belong to one channel or one pixel, are changed or not together and
// start at 16-byte boundaries in all of these.
template <typename T, typename... I>
bool in_packs(const Geometry& shape, I... images) {
  constexpr int kSize = Pack<T>::kSize;
  const auto aligned = [&](auto image) {
    return reinterpret_cast<uintptr_t>(image.data) % 16 == 0 && image.strides.sample % kSize == 0 &&
           (!shape.channels_last || image.strides.pixel % kSize == 0);
  };
  const bool whole = shape.channels_last
                         ? shape.channels % kSize == 0 && shape.first % kSize == 0 && shape.parts % kSize == 0
                         : shape.pixels % kSize == 0;
  return whole && (aligned(images) && ...);
}

template <bool kInverse, bool kGain, int kCount, int kThreadsPerPiece, typename T>
__global__ void coupling2d_kernel(Geometry shape, Images<const T> in, Images<const T> params, const acc_t<T>* gain,
                                  acc_t<T> eps, Images<T> out, acc_t<T>* logdet, int length, int pieces,
                                  int64_t outputs) {
  using Acc = acc_t<T>;
  constexpr int kPiecesPerBlock = kThreads / kThreadsPerPiece;
  const int thread = threadIdx.x % kThreadsPerPiece;
  const int64_t output = int64_t(blockIdx.x) * kPiecesPerBlock + threadIdx.x / kThreadsPerPiece;
  Acc sum = 0;
  if (output < outputs) {
    const int64_t sample = output / pieces;
    const int begin = int(output % pieces) * length, end = min(begin + length, shape.channels * shape.pixels);
    for (int i = begin + thread * kCount; i < end; i += kThreadsPerPiece * kCount) {
      const int line = i / (shape.channels_last ? shape.channels : shape.pixels);
      const int rest = i - line * (shape.channels_last ? shape.channels : shape.pixels);
      const int channel = shape.channels_last ? rest : line, pixel = shape.channels_last ? line : rest;
      Acc value[kCount];
      load_values(in.at(shape, sample, channel, pixel), value);
      if (shape.changes_channel(channel) && (!shape.channels_last || shape.changes_pixel(pixel))) {
        const int part = channel - shape.first;
        Acc s_raw[kCount], t[kCount];
        load_values(params.at(shape, sample, part, pixel), s_raw);
        load_values(params.at(shape, sample, part + shape.parts, pixel), t);
        for (int j = 0; j < kCount; ++j) {
          if (!shape.channels_last && !shape.changes_pixel(pixel + j)) continue;
          const Acc g = kGain ? gain[shape.channels_last ? part + j : part] : Acc(0);
          const CouplingScale<Acc> scale =
              coupling_scale<kInverse, kGain>(s_raw[j], coupling_scale_ahead<kGain>(s_raw[j]), g, eps);
          value[j] = couple<kInverse>(value[j], t[j], scale.factor, shape.shift_first);
          sum += scale.log_scale;
        }
      }
      store_values(out.at(shape, sample, channel, pixel), value);
    }
  }
  if constexpr (!kInverse) {
    sum = row_sum<kThreadsPerPiece>(sum);
    if (thread == 0 && output < outputs) logdet[output] = sum;
  }
}

template <bool kInverse, bool kGain, int kCount, typename T>
void map_samples(const Geometry& shape, int64_t samples, Images<const T> in, Images<const T> params,
                 const acc_t<T>* gain, acc_t<T> eps, Images<T> out, acc_t<T>* logdet, const Tensor& like) {
  using Acc = acc_t<T>;
  const int size = shape.channels * shape.pixels;
  const int wanted = samples >= 1024 ? 1 : int(1024 / samples);
  const int possible = max(1, size / (kThreads * 2 * kCount));
  int pieces = min(wanted, possible);
  const int length = (size + pieces * kCount - 1) / (pieces * kCount) * kCount;
  pieces = (size + length - 1) / length;
  const int64_t outputs = samples * pieces;
  const int packs = length / kCount;
  const int threads = packs <= 32 ? 8 : packs <= 512 ? kLanesOfWarp : kThreads;
  const auto kernel = threads == 8              ? coupling2d_kernel<kInverse, kGain, kCount, 8, T>
                      : threads == kLanesOfWarp ? coupling2d_kernel<kInverse, kGain, kCount, kLanesOfWarp, T>
                                                : coupling2d_kernel<kInverse, kGain, kCount, kThreads, T>;
  const int64_t per_block = kThreads / threads;
  const bool in_pieces = !kInverse && pieces > 1;
  const Tensor partial = new_tensor(like, {in_pieces ? outputs : 0}, accumulation_type(like));
  launch(kernel, grid_of((outputs + per_block - 1) / per_block), dim3(kThreads), 0, like, shape, in, params, gain, eps,
         out, in_pieces ? partial.mutable_data_ptr<Acc>() : logdet, length, pieces, outputs);
  if (in_pieces) sum_pieces(partial.const_data_ptr<Acc>(), samples, pieces, logdet, like);
}

// y and the log-scale's sums; or x alone.
template <bool kInverse>
std::tuple<Tensor, Tensor> map_images(const Tensor& given, const Tensor& given_params,
                                      const std::optional<Tensor>& given_gain, const ImageCoupling& call) {
  const Tensor x = in_format(given, call.channels_last), params = in_format(given_params, call.channels_last);
  const Tensor gain = given_gain ? torch::stable::contiguous(*given_gain) : x;
  const Tensor y = new_images(x, call.channels, call.channels_last);
  const int64_t size[] = {call.samples};
  if (x.numel() == 0) return {y, torch::stable::new_zeros(x, {size, 1}, accumulation_type(x))};
  const Tensor logdet = new_tensor(x, {kInverse ? 0 : call.samples}, accumulation_type(x));
  const Geometry shape(call);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto in = read_images<T>(x), p = read_images<T>(params);
    const auto out = write_images<T>(y);
    const bool packed = in_packs<T>(shape, in, p, out);
    const Acc* const g = given_gain ? gain.const_data_ptr<Acc>() : nullptr;
    constexpr int kSize = Pack<T>::kSize;
    const auto map = g ? (packed ? map_samples<kInverse, true, kSize, T> : map_samples<kInverse, true, 1, T>)
                       : (packed ? map_samples<kInverse, false, kSize, T> : map_samples<kInverse, false, 1, T>);
    map(shape, call.samples, in, p, g, Acc(call.eps), out, kInverse ? nullptr : logdet.mutable_data_ptr<Acc>(), x);
  });
  return {y, logdet};
}

// A block has blockDim.x columns, channels or packs of them (planar: one channel), and blockDim.y threads a column,
// which walk over the packs of pixels (channels-last: pixels) of all samples, from one chunk's first to its last.
template <bool kInverse, bool kGain, int kCount, typename T>
__global__ void coupling2d_backward_kernel(Geometry shape, Images<const T> upstream, const acc_t<T>* grad_logdet,
                                           int64_t grad_logdet_stride, Images<const T> saved, Images<const T> params,
                                           const acc_t<T>* gain, acc_t<T> eps, Images<T> grad_in, Images<T> grad_params,
                                           acc_t<T>* partial, int64_t steps, int64_t steps_per_chunk,
                                           int steps_per_sample) {
  using Acc = acc_t<T>;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  const int channel = shape.channels_last ? column * kCount : column;
  const bool inside = channel < shape.channels, changed = inside && shape.changes_channel(channel);
  const int part = channel - shape.first;
  Acc g[kCount] = {}, sums[kCount] = {};
  if (kGain && changed)
    for (int j = 0; j < kCount; ++j) g[j] = gain[shape.channels_last ? part + j : part];
  if (inside) {
    const int64_t begin = blockIdx.y * steps_per_chunk + threadIdx.y,
                  end = min(steps, (blockIdx.y + 1) * steps_per_chunk);
    int64_t sample = begin / steps_per_sample;
    int step = int(begin - sample * steps_per_sample);
    const int samples_on = int(blockDim.y) / steps_per_sample, steps_on = int(blockDim.y) % steps_per_sample;
    for (int64_t i = begin; i < end; i += blockDim.y) {
      const int pixel = shape.channels_last ? step : step * kCount;
      Acc grad[kCount];
      load_values(upstream.at(shape, sample, channel, pixel), grad);
      if (changed) {
        Acc beside[kCount], s_raw[kCount], t[kCount];
        load_values(saved.at(shape, sample, channel, pixel), beside);
        load_values(params.at(shape, sample, part, pixel), s_raw);
        const Acc above = kInverse ? Acc(0) : grad_logdet[sample * grad_logdet_stride];
        for (int j = 0; j < kCount; ++j) {
          if (shape.changes_pixel(shape.channels_last ? pixel : pixel + j)) {
            const CouplingScale<Acc> scale =
                coupling_scale<kInverse, kGain>(s_raw[j], coupling_scale_ahead<kGain>(s_raw[j]), g[j], eps);
            const CouplingGradients<Acc> terms =
                coupling_gradients<kInverse>(grad[j], above, beside[j], scale, shape.shift_first);
            grad[j] = terms.input;
            s_raw[j] = terms.s_raw;
            t[j] = terms.t;
            sums[j] += terms.gain;
          } else {
            s_raw[j] = t[j] = 0;
          }
        }
        store_values(grad_params.at(shape, sample, part, pixel), s_raw);
        store_values(grad_params.at(shape, sample, part + shape.parts, pixel), t);
      }
      store_values(grad_in.at(shape, sample, channel, pixel), grad);
      sample += samples_on;
      step += steps_on;
      if (step >= steps_per_sample) {
        step -= steps_per_sample;
        ++sample;
      }
    }
  }
  if constexpr (kGain) {
    __shared__ Acc block[kThreads * kCount];
    Acc* const mine = block + (threadIdx.y * blockDim.x + threadIdx.x) * kCount;
    for (int j = 0; j < kCount; ++j) mine[j] = sums[j];
    __syncthreads();
    for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
      if (threadIdx.y < half)
        for (int j = 0; j < kCount; ++j) mine[j] += mine[half * blockDim.x * kCount + j];
      __syncthreads();
    }
    if (threadIdx.y == 0 && changed) {
      Acc* const sum = partial + int64_t(blockIdx.y) * shape.parts + part;
      if (shape.channels_last) {
        for (int j = 0; j < kCount; ++j) sum[j] = mine[j];
      } else {
        for (int j = 1; j < kCount; ++j) mine[0] += mine[j];
        *sum = mine[0];
      }
    }
  }
}

template <bool kInverse, bool kGain, int kCount, typename T>
void gradients(const Geometry& shape, int64_t samples, Images<const T> upstream, const acc_t<T>* grad_logdet,
               int64_t grad_logdet_stride, Images<const T> saved, Images<const T> params, const acc_t<T>* gain,
               acc_t<T> eps, Images<T> grad_in, Images<T> grad_params, const Tensor& grad_gain) {
  using Acc = acc_t<T>;
  const int columns = shape.channels_last ? shape.channels / kCount : shape.channels;
  unsigned x = 1;
  if (shape.channels_last)
    while (x < 32 && int(x) < columns) x *= 2;
  const dim3 block(x, kThreads / x);
  const int tiles = (columns + int(x) - 1) / int(x);
  const int steps_per_sample = shape.channels_last ? shape.pixels : shape.pixels / kCount;
  const int64_t steps = samples * steps_per_sample;
  const int64_t most = max(int64_t(1), int64_t(2048 / tiles));
  const int64_t steps_per_chunk = max(int64_t(4 * block.y), (steps + most - 1) / most);
  const int64_t chunks = (steps + steps_per_chunk - 1) / steps_per_chunk;
  const Tensor partial =
      new_tensor(grad_gain, {kGain && chunks > 1 ? chunks * shape.parts : 0}, grad_gain.scalar_type());
  Acc* const sums = chunks > 1 ? partial.mutable_data_ptr<Acc>() : grad_gain.mutable_data_ptr<Acc>();
  dim3 grid = grid_of(tiles);
  grid.y = static_cast<unsigned>(chunks);
  launch(coupling2d_backward_kernel<kInverse, kGain, kCount, T>, grid, block, 0, grad_gain, shape, upstream,
         grad_logdet, grad_logdet_stride, saved, params, gain, eps, grad_in, grad_params, sums, steps, steps_per_chunk,
         steps_per_sample);
  if (kGain && chunks > 1)
    sum_chunks(partial.const_data_ptr<Acc>(), chunks, shape.parts, grad_gain.mutable_data_ptr<Acc>(), grad_gain);
}

// The gradients of x (or y), params and gain, the last empty without one.
template <bool kInverse>
std::tuple<Tensor, Tensor, Tensor> image_gradients(const Tensor& given_upstream, const Tensor* grad_logdet,
                                                   const Tensor& given_saved, const Tensor& given_params,
                                                   const std::optional<Tensor>& given_gain, const ImageCoupling& call) {
  const Tensor upstream = in_format(given_upstream, call.channels_last);
  const Tensor saved = in_format(given_saved, call.channels_last), params = in_format(given_params, call.channels_last);
  const Tensor gain = given_gain ? torch::stable::contiguous(*given_gain) : saved;
  const Tensor grad_in = new_images(saved, call.channels, call.channels_last);
  const Tensor grad_params = new_images(saved, 2 * call.parts, call.channels_last);
  const int64_t gains[] = {given_gain ? call.parts : 0};
  const ScalarType sums = accumulation_type(saved);
  if (saved.numel() == 0) return {grad_in, grad_params, torch::stable::new_zeros(saved, {gains, 1}, sums)};
  const Tensor grad_gain = new_tensor(saved, {gains[0]}, sums);
  const Geometry shape(call);
  dispatch(saved.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const auto up = read_images<T>(upstream), beside = read_images<T>(saved), p = read_images<T>(params);
    const auto din = write_images<T>(grad_in), dp = write_images<T>(grad_params);
    const bool packed = in_packs<T>(shape, up, beside, p, din, dp);
    const Acc* const g = given_gain ? gain.const_data_ptr<Acc>() : nullptr;
    constexpr int kSize = Pack<T>::kSize;
    const auto run = g ? (packed ? gradients<kInverse, true, kSize, T> : gradients<kInverse, true, 1, T>)
                       : (packed ? gradients<kInverse, false, kSize, T> : gradients<kInverse, false, 1, T>);
    run(shape, call.samples, up, grad_logdet ? grad_logdet->const_data_ptr<Acc>() : nullptr,
        grad_logdet ? grad_logdet->stride(0) : 0, beside, p, g, Acc(call.eps), din, dp, grad_gain);
  });
  return {grad_in, grad_params, grad_gain};
}

}  // namespace

NM_CUDA_LIBRARY(m) {
  Coupling2dOps<map_images<false>, map_images<true>, image_gradients<false>, image_gradients<true>>::implement(m);
}

}  // namespace normatch
