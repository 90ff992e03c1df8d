"""normatch::gmm_log_prob and normatch::gmm_posterior: mixtures of isotropic Gaussians."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import reference
from ..reference import accumulation_dtype
from ._library import KERNELS, check_float, check_no_tangent, check_number, check_same, check_shape, register


def check_mixture(op: str, name: str, z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float) -> None:
    for argument, value, axes in (("means", means, ("K", "D")), ("rho", rho, ()), ("logits", logits, ())):
        check_float(op, argument, value, axes)
        check_same(op, argument, value, name, z)
    if means.shape[0] == 0:
        raise ValueError(f"{op}: means must have at least one class, not shape {tuple(means.shape)}")
    check_shape(op, "means", means, (means.shape[0], z.shape[1]), name)
    check_shape(op, "rho", rho, means.shape[:1], "means")
    check_shape(op, "logits", logits, means.shape[:1], "means")
    check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, but is {eps}")
    check_no_tangent(op, z, means, rho, logits)
    _check_no_nan(op, "rho", rho)


def _check_no_nan(op: str, name: str, value: Tensor) -> None:
    """value: (K,). Checked only where that is free: not on a GPU, which the host would wait for, nor while tracing."""
    seen = value.device.type == "cpu" and type(value) in (Tensor, Parameter) and not torch.compiler.is_compiling()
    if seen and any(map(math.isnan, value.tolist())):
        raise ValueError(f"{op}: {name} has values that are NaN")


def _evaluate(op: str, z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float):
    """Checks the arguments and applies op, `gmm_log_prob` or `gmm_posterior`."""
    check_float(op, "z", z, ("N", "D"))
    if z.shape[1] == 0:
        raise ValueError(f"{op}: z must have at least one feature, not shape {tuple(z.shape)}")
    check_mixture(op, "z", z, means, rho, logits, eps)
    if z.device.type not in KERNELS[op]:
        return getattr(reference, op)(z, means, rho, logits, eps)
    dtype = accumulation_dtype(z.dtype)
    parameters = means.to(dtype), rho.to(dtype), logits.to(dtype)
    return getattr(torch.ops.normatch, op).default(z, *parameters, float(eps))


def gmm_log_prob(z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float = 0.0) -> Tensor:
    """z: (N, D), means: (K, D), rho, logits: (K,) -> (N, K).

    The class log-probabilities of a mixture of isotropic Gaussians, the prior of FlowGMM (Izmailov et al., ICML 2020,
    eq. 2) and NorMatch:

        out_nk = log(softmax(logits)_k + eps) + log N(z_n; means_k, sigma_k^2 I),   sigma_k = softplus(rho_k)

    in nats, float32 (float64 for float64 z). Its logsumexp over k is the log-likelihood, its softmax the posterior.
    means, rho and logits may have any float dtype and are cast to that of the result. NorMatch's code uses
    eps = 1e-6. Distances are sums of (z - mu)^2, never the expanded square, and sigma is finite for any rho.

    Raises ValueError also for K = 0, D = 0 and a NaN in rho. (On a GPU and under `torch.compile` the values of rho are
    not checked; a NaN there makes the results NaN.)
    """
    return _evaluate("gmm_log_prob", z, means, rho, logits, eps)


def _fake(z, means, rho, logits, eps):
    return means.new_empty((z.shape[0], means.shape[0]))


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *torch.ops.normatch.gmm_log_prob_backward.default(grad, *ctx.saved_tensors, ctx.eps), None


def _backward_fake(grad, z, means, rho, logits, eps):
    return z.new_empty(z.shape), means.new_empty(means.shape), rho.new_empty(rho.shape), rho.new_empty(rho.shape)


register("gmm_log_prob", _fake, _backward, _save)
register("gmm_log_prob_backward", _backward_fake)


class GmmPosterior(NamedTuple):
    """The posterior of points (N, D) under a mixture; in nats, float32 (float64 for float64 points)."""

    class_log_prob: Tensor  # (N, K) log pi_k + log N(z; mu_k, sigma_k^2 I)
    log_prob: Tensor  # (N,) its logsumexp over k
    label: Tensor  # (N,) int64, the most probable class, the first among equals
    confidence: Tensor  # (N,) its posterior probability


def gmm_posterior(z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float = 0.0) -> GmmPosterior:
    """z: (N, D), means: (K, D), rho, logits: (K,) -> class_log_prob: (N, K), log_prob, label, confidence: (N,).

    `gmm_log_prob` and, in the same pass, what pseudo-labeling needs: the log-likelihood of each point, its most
    probable class and that class's posterior probability (FixMatch: Sohn et al., NeurIPS 2020, section 2). All outputs
    except the label are differentiable.
    """
    return GmmPosterior(*_evaluate("gmm_posterior", z, means, rho, logits, eps))


def _posterior_fake(z, means, rho, logits, eps):
    n = z.shape[0]
    rows = means.new_empty((n,))
    return means.new_empty((n, means.shape[0])), rows, z.new_empty((n,), dtype=torch.int64), rows.clone()


def _posterior_save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # only the gradients of used outputs are computed


def _posterior_backward(ctx, grad_class, grad_log_prob, _, grad_confidence):
    *inputs, class_log_prob, log_prob, label, confidence = ctx.saved_tensors
    # log_prob's gradient is the posterior p, that of confidence c = p_label is c (onehot - p).
    shared = grad_log_prob
    if grad_confidence is not None:
        pull = grad_confidence * confidence
        shared = -pull if shared is None else shared - pull
    grad = grad_class
    if shared is not None:
        through = (class_log_prob - log_prob.unsqueeze(1)).exp() * shared.unsqueeze(1)
        if grad_confidence is not None:
            through = through.scatter_add(1, label.unsqueeze(1), pull.unsqueeze(1))
        grad = through if grad is None else grad + through
    if grad is None:
        return (None,) * 5
    return *torch.ops.normatch.gmm_log_prob_backward.default(grad, *inputs, ctx.eps), None


register("gmm_posterior", _posterior_fake, _posterior_backward, _posterior_save)
