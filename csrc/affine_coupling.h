// Affine coupling, element by element: y = (x + t) exp(s), s = gain tanh(s_raw); the row's log-det is
// the sum of s.
#pragma once

#include <tuple>

#include "tensors.h"

namespace normatch {

template <typename V>
struct AffineScale {
  V tanh_s, s;
};

template <typename V>
NM_HD AffineScale<V> affine_scale(V s_raw, V gain) {
  const V tanh_s = Math<V>::tanh(s_raw);
  return {tanh_s, gain * tanh_s};
}

template <typename V>
NM_HD V affine_forward(V x, V t, V s) {
  return (x + t) * Math<V>::exp(s);
}

template <typename V>
NM_HD V affine_inverse(V y, V t, V s) {
  return y * Math<V>::exp(-s) - t;
}

template <typename V>
struct AffineGradients {
  V input, s_raw, gain;  // `gain` is this element's term of the sum over rows
};

// With ds the gradient of s: ds_raw = ds gain (1 - tanh^2), dgain = ds tanh.
template <typename V>
NM_HD AffineGradients<V> affine_gradients(V grad_input, V grad_s, V tanh_s, V gain) {
  return {grad_input, grad_s * gain * (1.0f - tanh_s * tanh_s), grad_s * tanh_s};
}

// dx = dy exp(s) (and dt = dx); ds = dy y + dlogdet, because dy/ds = y.
template <typename V>
NM_HD AffineGradients<V> affine_backward(V grad_y, V grad_logdet, V y, AffineScale<V> scale, V gain) {
  return affine_gradients(grad_y * Math<V>::exp(scale.s), grad_y * y + grad_logdet, scale.tanh_s, gain);
}

// dy = dx exp(-s) (and dt = -dx); ds = -dx y exp(-s).
template <typename V>
NM_HD AffineGradients<V> affine_inverse_backward(V grad_x, V y, AffineScale<V> scale, V gain) {
  const V grad_y = grad_x * Math<V>::exp(-scale.s);
  return affine_gradients(grad_y, -(grad_y * y), scale.tanh_s, gain);
}

// A backend's ops. kMap and kInvert return y and x; the gradients are those of the input (and, up to sign, of t), s_raw
// and gain.
template <auto kMap, auto kInvert, auto kGradients, auto kInverseGradients>
struct AffineCouplingOps {
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& s_raw, const Tensor& t, const Tensor& gain) {
    const Tensor logdet = new_tensor(x, {x.size(0)}, accumulation_type(x));
    return {kMap(x, s_raw, t, gain, &logdet), logdet};
  }
  static Tensor inverse(const Tensor& y, const Tensor& s_raw, const Tensor& t, const Tensor& gain) {
    return kInvert(y, s_raw, t, gain, nullptr);
  }
  static Gradients backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& y, const Tensor& s_raw,
                            const Tensor& gain) {
    return kGradients(grad_y, &grad_logdet, y, s_raw, gain);
  }
  static Gradients inverse_backward(const Tensor& grad_x, const Tensor& y, const Tensor& s_raw, const Tensor& gain) {
    return kInverseGradients(grad_x, nullptr, y, s_raw, gain);
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("affine_coupling", TORCH_BOX(&AffineCouplingOps::forward));
    m.impl("affine_coupling_backward", TORCH_BOX(&AffineCouplingOps::backward));
    m.impl("affine_coupling_inverse", TORCH_BOX(&AffineCouplingOps::inverse));
    m.impl("affine_coupling_inverse_backward", TORCH_BOX(&AffineCouplingOps::inverse_backward));
  }
};

}  // namespace normatch
