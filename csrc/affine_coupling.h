// Affine coupling, element by element: y = (x + t) exp(s), s = gain tanh(s_raw); log-det = sum of s over the
// row.
#pragma once

#include "portable.h"

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

}  // namespace normatch
