// All schemas. An op's kernels are in <op>.cpp and <op>.cu, gradients of some in <op>_backward.*; fake kernels and
// autograd in normatch/ops. All ops are functional.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(normatch, m) {
  m.def("affine_coupling(Tensor x, Tensor s_raw, Tensor t, Tensor gain) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor y, Tensor s_raw, Tensor gain)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("affine_coupling_inverse(Tensor y, Tensor s_raw, Tensor t, Tensor gain) -> Tensor");
  m.def(
      "affine_coupling_inverse_backward(Tensor grad_x, Tensor y, Tensor s_raw, Tensor gain)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "coupling2d(Tensor x, Tensor params, Tensor? gain, int changed, bool shift_first, float eps, bool channels_last)"
      " -> (Tensor, Tensor)");
  m.def(
      "coupling2d_backward(Tensor grad_y, Tensor grad_logdet, Tensor saved, Tensor params, Tensor? gain, int changed,"
      " bool shift_first, float eps, bool channels_last) -> (Tensor, Tensor, Tensor)");
  m.def(
      "coupling2d_inverse(Tensor y, Tensor params, Tensor? gain, int changed, bool shift_first, float eps,"
      " bool channels_last) -> Tensor");
  m.def(
      "coupling2d_inverse_backward(Tensor grad_x, Tensor saved, Tensor params, Tensor? gain, int changed,"
      " bool shift_first, float eps, bool channels_last) -> (Tensor, Tensor, Tensor)");
  m.def("logdet(Tensor log_scale) -> Tensor");
  m.def("gmm_log_prob(Tensor z, Tensor means, Tensor rho, Tensor logits, float eps) -> Tensor");
  m.def(
      "gmm_log_prob_backward(Tensor grad, Tensor z, Tensor means, Tensor rho, Tensor logits, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gmm_posterior(Tensor z, Tensor means, Tensor rho, Tensor logits, float eps) -> (Tensor, Tensor, Tensor,"
      " Tensor)");
  m.def(
      "flow_head(Tensor x, Tensor[] couplings, Tensor means, Tensor rho, Tensor logits, Tensor? seed, float dropout,"
      " float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "flow_head_backward(Tensor? grad_z, Tensor? grad_logdet, Tensor? grad_class_log_prob, Tensor? grad_log_prob,"
      " Tensor state, Tensor class_log_prob, Tensor[] couplings, Tensor means, Tensor rho, Tensor logits, Tensor? seed,"
      " float dropout, float eps, ScalarType dtype) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)");
  m.def(
      "augment_views(Tensor images, Tensor draws, int seed, int[] rules, float[] values, float[] scale, float[] shift,"
      " ScalarType dtype) -> Tensor");
}
