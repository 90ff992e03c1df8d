// Affine coupling of images on the CPU, in one pass over the samples. Per changed value 3 reads and 1 write (forward,
// inverse) or 3 and 3 (backward), per other value 1 and 1. Vectors run over blocks of changed values: a planar sample's
// are contiguous, a channels-last one's are gathered into a row in cache and scattered back.
#include "coupling2d.h"

#include "cpu.h"

namespace normatch {
namespace {

constexpr int64_t kBlock = 1024;

// A tensor's changed channels, from `channel` on.
template <typename T>
struct Field {
  T* data;
  ImageStrides strides;
  int64_t channel;
  NM_HD T* row(int64_t sample, int64_t plane) const { return data + sample * strides.sample + channel * plane; }
  NM_HD T* line(int64_t sample, int64_t pixel) const {
    return data + sample * strides.sample + pixel * strides.pixel + channel;
  }
};

// Cuts a sample's changed values into pieces, so that a few large samples keep all threads busy, and these into blocks.
struct Cut {
  const ImageCoupling& shape;
  int64_t size, length, pieces;  // of what is cut: values of a planar row, or pixels
  int64_t block;                 // likewise
  int64_t values;                // at most, of a block

  explicit Cut(const ImageCoupling& shape) : shape(shape) {
    size = shape.channels_last ? shape.pixels : shape.parts * shape.pixels;
    block = shape.channels_last ? std::max<int64_t>(1, kBlock / std::max<int64_t>(1, shape.parts)) : kBlock;
    values = shape.channels_last ? block * shape.parts : kBlock;
    const int64_t blocks = (size + block - 1) / block;
    const int64_t wanted = std::max<int64_t>(1, 64 / std::max<int64_t>(1, shape.samples));
    length = std::max<int64_t>(1, (blocks + wanted - 1) / wanted) * block;
    pieces = std::max<int64_t>(1, (size + length - 1) / length);
  }

  int64_t units() const { return shape.samples * pieces; }
  int64_t values_per_unit() const { return shape.channels * shape.pixels / pieces; }
};

// What is the same for all samples. gain: of a block's values where they lie channels-last, else of the channels. mask:
// for planar checkerboards 1 where a pixel is changed, over a plane and as far into the next as a block can reach.
template <typename Acc>
struct Tables {
  std::vector<Acc> gain, mask;

  Tables(const Cut& cut, const std::optional<Tensor>& dense_gain) {
    const ImageCoupling& shape = cut.shape;
    if (dense_gain) {
      const Acc* g = dense_gain->const_data_ptr<Acc>();
      for (int64_t i = 0; i < (shape.channels_last ? cut.block : 1); ++i) gain.insert(gain.end(), g, g + shape.parts);
    }
    if (is_checkerboard(shape.changed) && !shape.channels_last) {
      mask.resize(shape.pixels + cut.block);
      for (int64_t begin = 0; begin < shape.pixels; begin += shape.width)
        for (int64_t j = 0; j < shape.width; ++j) mask[begin + j] = is_changed(shape, begin / shape.width + j);
      for (int64_t p = 0; p < cut.block && shape.pixels; ++p) mask[shape.pixels + p] = mask[p % shape.pixels];
    }
  }

  static bool is_changed(const ImageCoupling& shape, int64_t line_and_column) {
    return line_and_column % 2 == (shape.changed == Changed::kOdd);
  }
};

// Calls f(std::integral_constant<int, n>) with n = parts for the usual numbers, so that moving n values takes a few
// instructions, else with 0.
template <int... kUsual, typename F>
void dispatch_parts(int64_t parts, const F& f) {
  const bool usual = ((parts == kUsual && (f(std::integral_constant<int, kUsual>{}), true)) || ...);
  if (!usual) f(std::integral_constant<int, 0>{});
}

// Between the lines of some pixels and a dense row of their values.
template <bool kScatter, typename T>
void move_lines(T* first, int64_t stride, const std::vector<int64_t>& pixels, int64_t parts,
                std::conditional_t<kScatter, const T, std::remove_const_t<T>>* value) {
  dispatch_parts<1, 2, 3, 4, 6, 8, 12, 24>(parts, [&](auto fixed) {
    const int64_t n = decltype(fixed)::value ? decltype(fixed)::value : parts;
    for (const int64_t p : pixels) {
      if constexpr (kScatter)
        memcpy(first + p * stride, value, n * sizeof(T));
      else
        memcpy(value, first + p * stride, n * sizeof(T));
      value += n;
    }
  });
}

template <typename T>
struct Scratch {
  std::vector<T> values;
  std::vector<int64_t> pixels;
  std::vector<acc_t<T>> gain;
};

// Calls f(place in the tables, count, in, out) for every block of the unit's changed values, and copies the rest from
// in[0] to out[0]. What a gradient's further outputs have there is 0.
template <typename T, int kIn, int kOut, typename F>
void for_blocks(const Cut& cut, int64_t unit, const Field<const T> (&in)[kIn], const Field<T> (&out)[kOut],
                Scratch<T>& scratch, const F& f) {
  const ImageCoupling& shape = cut.shape;
  const int64_t sample = unit / cut.pieces, piece = unit % cut.pieces;
  const int64_t begin = piece * cut.length, end = std::min(cut.size, begin + cut.length);
  const T* from[kIn];
  T* to[kOut];
  if (!shape.channels_last) {
    const int64_t rest = (shape.channels - shape.parts) * shape.pixels;  // before or after the changed channels
    const int64_t copied = rest * piece / cut.pieces, upto = rest * (piece + 1) / cut.pieces;
    const int64_t start = (shape.first ? -shape.first : shape.parts) * shape.pixels;
    std::copy_n(in[0].row(sample, shape.pixels) + start + copied, upto - copied,
                out[0].row(sample, shape.pixels) + start + copied);
    for (int64_t at = begin; at < end; at += cut.block) {
      for (int i = 0; i < kIn; ++i) from[i] = in[i].row(sample, shape.pixels) + at;
      for (int i = 0; i < kOut; ++i) to[i] = out[i].row(sample, shape.pixels) + at;
      f(at, std::min(cut.block, end - at), from, to);
    }
    return;
  }
  scratch.values.resize((kIn + kOut) * cut.values);
  for (int i = 0; i < kIn; ++i) from[i] = scratch.values.data() + i * cut.values;
  for (int i = 0; i < kOut; ++i) to[i] = scratch.values.data() + (kIn + i) * cut.values;
  const bool checkerboard = is_checkerboard(shape.changed);
  for (int64_t at = begin; at < end; at += cut.block) {
    const int64_t upto = std::min(at + cut.block, end);
    scratch.pixels.clear();
    if (in[0].strides.pixel == shape.channels) {
      std::copy_n(in[0].line(sample, at) - shape.first, (upto - at) * shape.channels,
                  out[0].line(sample, at) - shape.first);
    } else {
      for (int64_t p = at; p < upto; ++p)
        std::copy_n(in[0].line(sample, p) - shape.first, shape.channels, out[0].line(sample, p) - shape.first);
    }
    for (int64_t p = at; p < upto; ++p)
      if (!checkerboard || Tables<acc_t<T>>::is_changed(shape, p / shape.width + p % shape.width))
        scratch.pixels.push_back(p);
    if (checkerboard && kOut > 1) std::fill_n(out[1].line(sample, at), (upto - at) * 2 * shape.parts, T(0));
    for (int i = 0; i < kIn; ++i)
      move_lines<false>(in[i].line(sample, 0), in[i].strides.pixel, scratch.pixels, shape.parts,
                        scratch.values.data() + i * cut.values);
    f(0, int64_t(scratch.pixels.size()) * shape.parts, from, to);
    for (int i = 0; i < kOut; ++i)
      move_lines<true>(out[i].line(sample, 0), out[i].strides.pixel, scratch.pixels, shape.parts,
                       scratch.values.data() + (kIn + i) * cut.values);
  }
}

template <typename T>
Field<const T> read_images(const Tensor& tensor, int64_t channel) {
  return {tensor.const_data_ptr<T>(), strides_of(tensor), channel};
}

template <typename T>
Field<T> write_images(const Tensor& tensor, int64_t channel) {
  return {tensor.mutable_data_ptr<T>(), strides_of(tensor), channel};
}

// Calls f(std::bool_constant) with whether there is a gain.
template <typename F>
void dispatch_gain(bool has_gain, const F& f) {
  if (has_gain)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Calls f(channel, begin, end) for the planes that a planar block of `count` values at `place` reaches into.
template <typename F>
void for_planes(const ImageCoupling& shape, int64_t place, int64_t count, const F& f) {
  for (int64_t j = 0, end; j < count; j = end) {
    const int64_t channel = (place + j) / shape.pixels;
    end = std::min(count, (channel + 1) * shape.pixels - place);
    f(channel, j, end);
  }
}

// A block of changed values: how many, and what the tables say of them (null where they say nothing).
template <typename Acc>
struct Block {
  int64_t count;
  const Acc *gain, *mask;
  bool streaming = false;

  template <typename T, int kOut>
  Block(const Cut& cut, const Tables<Acc>& tables, int64_t place, int64_t count, T* const (&to)[kOut],
        std::vector<Acc>& own_gain)
      : count(count),
        gain(tables.gain.data()),
        mask(tables.mask.empty() ? nullptr : &tables.mask[place % cut.shape.pixels]) {
    if (cut.shape.channels_last) return;  // `to` is scratch
    if (!tables.gain.empty()) {
      own_gain.resize(cut.block);
      gain = own_gain.data();
      for_planes(cut.shape, place, count, [&](int64_t channel, int64_t begin, int64_t end) {
        std::fill(own_gain.begin() + begin, own_gain.begin() + end, tables.gain[channel]);
      });
    }
    streaming = true;
    for (T* const row : to) streaming &= should_stream(cut.shape.samples, cut.size, Rows<T>{row, 0});
  }
};

// The sum over a block of element(column, scale, load, store); in each stretch the expensive part of the scale first,
// as in affine_coupling.cpp.
template <typename V, bool kInverse, bool kGain, typename T, typename Acc, typename F>
NM_HD double for_scales(const Block<Acc>& block, const T* s_raw, Acc eps, const F& element) {
  constexpr int64_t kStretch = 16 * kLanes<V>;
  alignas(64) Acc ahead[kStretch];
  double total = 0;
  for (int64_t begin = 0; begin < block.count; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, block.count);
    for_columns<V>(begin, end, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
      store(ahead + (j - begin), coupling_scale_ahead<kGain>(load(s_raw + j)));
    });
    V sum{};
    for_columns<V>(begin, end, [&](int64_t j, const auto& load, const auto& store) NM_INLINE {
      V gain{};
      if constexpr (kGain) gain = load(block.gain + j);
      const V first = load(ahead + (j - begin));
      sum += element(j, coupling_scale<kInverse, kGain>(load(s_raw + j), first, gain, eps), load, store);
    });
    total += exact_sum(sum);
  }
  return total;
}

template <typename Acc>
constexpr Acc kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Maps from = {x, s_raw, t} to y, or the other way round; the sum of the log-scales.
template <typename V, bool kInverse, bool kGain, typename T, typename Acc>
NM_HD double map_block(const Block<Acc>& block, const T* const (&from)[3], T* const (&to)[1], bool shift_first,
                       Acc eps) {
  return for_scales<V, kInverse, kGain>(
      block, from[1], eps,
      [&](int64_t j, const CouplingScale<V>& scale, const auto& load, const auto& store) NM_INLINE {
        const V value = load(from[0] + j);
        const V mapped = couple<kInverse>(value, load(from[2] + j), scale.factor, shift_first);
        if (kGain && !block.mask) {
          store(to[0] + j, mapped, block.streaming);
          return scale.log_scale;
        }
        const auto changed = load(block.mask ? block.mask + j : kOnes<Acc>) != V{};  // false past the end, too
        store(to[0] + j, changed ? mapped : value, block.streaming);
        return changed ? scale.log_scale : V{};
      });
}

// Gradients of from = {upstream, saved, s_raw} into to = {input, s_raw, t}, and their terms of the gain's.
template <typename V, bool kInverse, bool kGain, typename T, typename Acc>
NM_HD void gradient_block(const Block<Acc>& block, Acc grad_logdet, const T* const (&from)[3], T* const (&to)[3],
                          Acc* terms, bool shift_first, Acc eps) {
  for_scales<V, kInverse, kGain>(
      block, from[2], eps,
      [&](int64_t j, const CouplingScale<V>& scale, const auto& load, const auto& store) NM_INLINE {
        const V upstream = load(from[0] + j);
        auto grad = coupling_gradients<kInverse>(upstream, V{} + grad_logdet, load(from[1] + j), scale, shift_first);
        if (block.mask) {
          const auto changed = load(block.mask + j) != V{};
          grad = {changed ? grad.input : upstream, changed ? grad.s_raw : V{}, changed ? grad.t : V{},
                  changed ? grad.gain : V{}};
        }
        store(to[0] + j, grad.input, block.streaming);
        store(to[1] + j, grad.s_raw, block.streaming);
        store(to[2] + j, grad.t, block.streaming);
        if constexpr (kGain) store(terms + j, grad.gain);
        return V{};
      });
}

// Adds a block's terms to the sums of their channels.
template <typename V, typename Acc>
NM_HD void add_terms(const ImageCoupling& shape, int64_t place, int64_t count, const Acc* terms, double* sums) {
  if (shape.channels_last) {
    for (int64_t j = 0; j < count; j += shape.parts)
      for (int64_t c = 0; c < shape.parts; ++c) sums[c] += terms[j + c];
    return;
  }
  for_planes(shape, place, count, [&](int64_t channel, int64_t begin, int64_t end) NM_INLINE {
    sums[channel] += blocked_sum<V>(
        end - begin, [&](int64_t i, const auto& load, const auto&) NM_INLINE { return load(terms + begin + i); });
  });
}

// y and the log-determinants, or x (and unused sums).
template <bool kInverse>
std::tuple<Tensor, Tensor> map_images(const Tensor& given, const Tensor& given_params,
                                      const std::optional<Tensor>& given_gain, const ImageCoupling& shape) {
  const Tensor x = in_format(given, shape.channels_last), params = in_format(given_params, shape.channels_last);
  std::optional<Tensor> gain;
  if (given_gain) gain = torch::stable::contiguous(*given_gain);
  const Tensor y = new_images(x, shape.channels, shape.channels_last);
  const Tensor logdet = new_tensor(x, {shape.samples}, accumulation_type(x));
  const Cut cut(shape);
  std::vector<double> sums(cut.units());
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const Field<const T> in[] = {read_images<T>(x, shape.first), read_images<T>(params, 0),
                                 read_images<T>(params, shape.parts)};
    const Field<T> out[] = {write_images<T>(y, shape.first)};
    const Tables<Acc> tables(cut, gain);
    dispatch_gain(gain.has_value(), [&](auto has_gain) {
      parallel_rows(cut.units(), cut.values_per_unit(), [&](int64_t begin, int64_t end) {
        Scratch<T> scratch;
        for (int64_t unit = begin; unit < end; ++unit)
          for_blocks(cut, unit, in, out, scratch, [&](int64_t place, int64_t count, const auto& from, const auto& to) {
            const Block<Acc> block(cut, tables, place, count, to, scratch.gain);
            vectorized<T>([&](auto lanes) NM_INLINE {
              using V = typename decltype(lanes)::type;
              sums[unit] +=
                  map_block<V, kInverse, decltype(has_gain)::value>(block, from, to, shape.shift_first, Acc(shape.eps));
            });
          });
        stream_fence();
      });
    });
    sum_parts(sums, shape.samples, cut.pieces, cut.pieces, 1, logdet.mutable_data_ptr<Acc>());
  });
  return {y, logdet};
}

// The gradients of x (or y), params and gain, the last empty without one.
template <bool kInverse>
std::tuple<Tensor, Tensor, Tensor> image_gradients(const Tensor& given_upstream, const Tensor* grad_logdet,
                                                   const Tensor& given_saved, const Tensor& given_params,
                                                   const std::optional<Tensor>& given_gain,
                                                   const ImageCoupling& shape) {
  const Tensor upstream = in_format(given_upstream, shape.channels_last);
  const Tensor saved = in_format(given_saved, shape.channels_last);
  const Tensor params = in_format(given_params, shape.channels_last);
  std::optional<Tensor> gain;
  if (given_gain) gain = torch::stable::contiguous(*given_gain);
  const int64_t gains = gain ? shape.parts : 0;
  const Tensor grad_in = new_images(saved, shape.channels, shape.channels_last);
  const Tensor grad_params = new_images(saved, 2 * shape.parts, shape.channels_last);
  const Tensor grad_gain = new_tensor(saved, {gains}, accumulation_type(saved));
  const Cut cut(shape);
  const Chunks chunks(cut.units(), 1 + 16384 / std::max<int64_t>(1, cut.values_per_unit()), 256);
  std::vector<double> partial(chunks.count * gains);
  dispatch(saved.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = acc_t<T>;
    const Field<const T> in[] = {read_images<T>(upstream, shape.first), read_images<T>(saved, shape.first),
                                 read_images<T>(params, 0)};
    const Field<T> out[] = {write_images<T>(grad_in, shape.first), write_images<T>(grad_params, 0),
                            write_images<T>(grad_params, shape.parts)};
    const Tables<Acc> tables(cut, gain);
    dispatch_gain(gain.has_value(), [&](auto has_gain) {
      constexpr bool kGain = decltype(has_gain)::value;
      torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first_chunk, int64_t last_chunk) {
        Scratch<T> scratch;
        std::vector<Acc> terms(kGain ? cut.values : 0);
        for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk)
          for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
            Acc above = 0;
            if (grad_logdet) above = grad_logdet->const_data_ptr<Acc>()[unit / cut.pieces * grad_logdet->stride(0)];
            for_blocks(cut, unit, in, out, scratch,
                       [&](int64_t place, int64_t count, const auto& from, const auto& to) {
                         const Block<Acc> block(cut, tables, place, count, to, scratch.gain);
                         vectorized<T>([&](auto lanes) NM_INLINE {
                           using V = typename decltype(lanes)::type;
                           gradient_block<V, kInverse, kGain>(block, above, from, to, terms.data(), shape.shift_first,
                                                              Acc(shape.eps));
                           if constexpr (kGain)
                             add_terms<V>(shape, place, count, terms.data(), partial.data() + chunk * gains);
                         });
                       });
          }
        stream_fence();
      });
    });
    sum_parts(partial, gains, 1, chunks.count, gains, grad_gain.mutable_data_ptr<Acc>());
  });
  return {grad_in, grad_params, grad_gain};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normatch, CPU, m) {
  Coupling2dOps<map_images<false>, map_images<true>, image_gradients<false>, image_gradients<true>>::implement(m);
}

}  // namespace normatch
