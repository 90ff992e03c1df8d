// Affine coupling of images, element by element. The scale is exp(gain tanh(s_raw)) or sigmoid(s_raw + 2) + eps, and
//   y = (x + t) scale   or, with the scale first,   y = x scale + t;   log-det = sum of log(scale).
#pragma once

#include <optional>
#include <tuple>

#include "portable.h"
#include "tensors.h"

namespace normatch {

// What of an image is changed: channels at either end, or the pixels (i, j) with i + j even or odd.
enum class Changed : int64_t { kFirst, kSecond, kEven, kOdd };

NM_HD bool is_checkerboard(Changed changed) {
  return changed == Changed::kEven || changed == Changed::kOdd;
}

template <typename V>
struct CouplingScale {
  V factor;     // the scale, or its reciprocal for the inverse
  V log_scale;  // its logarithm is that of the scale all the same
  V slope;      // d log_scale / d s_raw
  V tanh_s;     // d log_scale / d gain; without a gain unused
};

// The expensive part of the scale: tanh(s_raw) or exp(-|s_raw + 2|).
template <bool kGain, typename V>
NM_HD V coupling_scale_ahead(V s_raw) {
  if constexpr (kGain) return Math<V>::tanh(s_raw);
  const V u = s_raw + 2.0f;
  return Math<V>::exp(u < 0.0f ? u : -u);
}

template <bool kInverse, bool kGain, typename V, typename Acc>
NM_HD CouplingScale<V> coupling_scale(V s_raw, V ahead, V gain, Acc eps) {
  if constexpr (kGain) {
    const V log_scale = gain * ahead;
    return {Math<V>::exp(kInverse ? -log_scale : log_scale), log_scale, gain * (1.0f - ahead * ahead), ahead};
  } else {
    const V u = s_raw + 2.0f, e = ahead;
    const V w = 1.0f + e, r = 1.0f / w;
    const V sigmoid = u < 0.0f ? e * r : r, rest = u < 0.0f ? r : e * r;
    const V scale = sigmoid + eps;
    const V one_over = 1.0f / scale;
    // log sigmoid(u) = min(u, 0) - log(1 + e), with what 1 + e lost in rounding put back
    const V log_scale =
        eps == 0 ? (u < 0.0f ? u : V{}) - (Math<V>::log(w) + (e - (w - 1.0f)) * r) : Math<V>::log(scale);
    return {kInverse ? one_over : scale, log_scale, eps == 0 ? rest : sigmoid * rest * one_over, V{}};
  }
}

template <bool kInverse, typename V>
NM_HD V couple(V value, V t, V factor, bool shift_first) {
  if constexpr (kInverse) return shift_first ? value * factor - t : (value - t) * factor;
  return shift_first ? (value + t) * factor : value * factor + t;
}

template <typename V>
struct CouplingGradients {
  V input, s_raw, t, gain;  // `gain` is this element's term of a sum
};

// `saved` is the side next to the scale: y if the shift comes first, else x. With the gradients gx and gy of the sides,
// d log_scale = gy y + dlogdet or gx x + dlogdet; for the inverse negated and without dlogdet.
template <bool kInverse, typename V>
NM_HD CouplingGradients<V> coupling_gradients(V upstream, V grad_logdet, V saved, CouplingScale<V> scale,
                                              bool shift_first) {
  const V input = upstream * scale.factor;
  const V beside = shift_first == kInverse ? input : upstream;  // the gradient on the side of `saved`
  const V across = shift_first == kInverse ? upstream : input;
  const V grad_s = kInverse ? -(beside * saved) : beside * saved + grad_logdet;
  return {input, grad_s * scale.slope, kInverse ? -across : across, grad_s * scale.tanh_s};
}

// A sample is one dense row, channel by channel (planar), or pixels `pixel` values apart (channels-last).
struct ImageStrides {
  int64_t sample, pixel;
};

// The same tensor, or a copy of it, in that memory format.
inline Tensor in_format(const Tensor& tensor, bool channels_last) {
  const int64_t c = tensor.size(1), h = tensor.size(2), w = tensor.size(3);
  const auto lies = [&](int64_t dim, int64_t stride) { return tensor.size(dim) == 1 || tensor.stride(dim) == stride; };
  const int64_t pixel = w > 1 ? tensor.stride(3) : h > 1 ? tensor.stride(2) : c;
  const bool fits = channels_last ? lies(1, 1) && lies(2, w * pixel) : lies(3, 1) && lies(2, w) && lies(1, h * w);
  return fits ? tensor
              : torch::stable::contiguous(tensor, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                                : torch::headeronly::MemoryFormat::Contiguous);
}

inline ImageStrides strides_of(const Tensor& tensor) {
  const int64_t h = tensor.size(2), w = tensor.size(3);
  return {tensor.stride(0), w > 1 ? tensor.stride(3) : h > 1 ? tensor.stride(2) : tensor.size(1)};
}

inline Tensor new_images(const Tensor& like, int64_t channels, bool channels_last) {
  const int64_t size[] = {like.size(0), channels, like.size(2), like.size(3)};
  return torch::stable::empty(
      {size, 4}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// The shapes of a call, and which channels are changed.
struct ImageCoupling {
  int64_t samples, channels, pixels, width;  // width: pixels of a line
  int64_t first, parts;                      // the changed channels: [first, first + parts)
  Changed changed;
  bool channels_last, shift_first;
  double eps;

  ImageCoupling(const Tensor& x, const Tensor& params, int64_t changed_as_int, bool shift_first, double eps,
                bool channels_last)
      : samples(x.size(0)),
        channels(x.size(1)),
        pixels(x.size(2) * x.size(3)),
        width(x.size(3)),
        first(0),
        parts(params.size(1) / 2),
        changed(static_cast<Changed>(changed_as_int)),
        channels_last(channels_last),
        shift_first(shift_first),
        eps(eps) {
    STD_TORCH_CHECK(changed_as_int >= 0 && changed_as_int <= 3 && params.size(1) == 2 * parts && parts <= channels &&
                        (!is_checkerboard(changed) || parts == channels) && params.size(0) == samples &&
                        params.size(2) * params.size(3) == pixels && params.scalar_type() == x.scalar_type(),
                    "coupling2d: arguments do not go together");
    if (changed == Changed::kSecond) first = channels - parts;
  }
};

// A backend's ops. kMap and kInvert return images and log-determinants (unused for the inverse); the gradients are
// those of images, params and gain.
template <auto kMap, auto kInvert, auto kGradients, auto kInverseGradients>
struct Coupling2dOps {
  using Gain = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& params, Gain gain, int64_t changed,
                                            bool shift_first, double eps, bool channels_last) {
    return kMap(x, params, gain, {x, params, changed, shift_first, eps, channels_last});
  }

  static Tensor inverse(const Tensor& y, const Tensor& params, Gain gain, int64_t changed, bool shift_first, double eps,
                        bool channels_last) {
    return std::get<0>(kInvert(y, params, gain, {y, params, changed, shift_first, eps, channels_last}));
  }

  static Gradients backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& saved, const Tensor& params,
                            Gain gain, int64_t changed, bool shift_first, double eps, bool channels_last) {
    return kGradients(grad_y, &grad_logdet, saved, params, gain,
                      {saved, params, changed, shift_first, eps, channels_last});
  }

  static Gradients inverse_backward(const Tensor& grad_x, const Tensor& saved, const Tensor& params, Gain gain,
                                    int64_t changed, bool shift_first, double eps, bool channels_last) {
    return kInverseGradients(grad_x, nullptr, saved, params, gain,
                             {saved, params, changed, shift_first, eps, channels_last});
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("coupling2d", TORCH_BOX(&Coupling2dOps::forward));
    m.impl("coupling2d_backward", TORCH_BOX(&Coupling2dOps::backward));
    m.impl("coupling2d_inverse", TORCH_BOX(&Coupling2dOps::inverse));
    m.impl("coupling2d_inverse_backward", TORCH_BOX(&Coupling2dOps::inverse_backward));
  }
};

}  // namespace normatch
