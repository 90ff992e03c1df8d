"""The ops of `normatch.ops` in plain PyTorch: same names, same arguments, any device and float dtype.

It is three things at once: the oracle the kernels are tested against (run it in float64), what `normatch.ops` falls
back to where no kernel is built, and the rival in the benchmarks. So it is written as one would by hand: vectorised,
differentiated by PyTorch, every log-determinant and log-likelihood accumulated and returned in float32 (float64 for
float64 inputs).
"""

import math

import torch
from torch import Tensor

from normatch.augment import Policy, View, draw_parameters, normalize, strong_views, weak_views


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def affine_coupling(x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """x, s_raw, t: (N, H), gain: (H,) -> y: (N, H), logdet: (N,)."""
    log_scale = gain.to(accumulation_dtype(x.dtype)) * s_raw.tanh()
    return ((x + t) * log_scale.exp()).to(x.dtype), log_scale.sum(1)


def affine_coupling_inverse(y: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    """y, s_raw, t: (N, H), gain: (H,) -> x: (N, H)."""
    log_scale = gain.to(accumulation_dtype(y.dtype)) * s_raw.tanh()
    return (y * (-log_scale).exp() - t).to(y.dtype)


def logdet(log_scale: Tensor) -> Tensor:
    """log_scale: (N, ...) -> (N,)."""
    return (
        log_scale.flatten(1).sum(1, dtype=accumulation_dtype(log_scale.dtype))
        if log_scale.dim() > 1
        else (log_scale.to(accumulation_dtype(log_scale.dtype)))
    )


def log_softplus(rho: Tensor) -> Tensor:
    """log(softplus(rho)) and its gradient for any rho: on the left softplus(rho) -> exp(rho), and its log -> rho."""
    left = rho < -20
    inside = torch.where(left, 0.0, rho)  # keeps the branch not taken, and its gradient, finite
    return torch.where(left, rho - 0.5 * rho.exp(), torch.logaddexp(inside, torch.zeros_like(rho)).log())


def gmm_log_prob(z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float = 0.0) -> Tensor:
    """z: (N, D), means: (K, D), rho, logits: (K,) -> (N, K)."""
    dtype = accumulation_dtype(z.dtype)
    z, means, rho, logits = z.to(dtype), means.to(dtype), rho.to(dtype), logits.to(dtype)
    log_pi = logits.log_softmax(0)
    log_weight = log_pi if eps == 0 else (log_pi.exp() + eps).log()
    log_sigma = log_softplus(rho)
    # Finite, so that 0 * precision stays 0 however narrow a class is.
    precision = (-2 * log_sigma).clamp(max=math.log(torch.finfo(dtype).max) - 0.01).exp()
    distance = (z[:, None, :] - means).square().sum(2)
    offset = log_weight - z.shape[1] * (log_sigma + 0.5 * math.log(2 * math.pi))
    return offset - 0.5 * precision * distance


def augment_views(
    images: Tensor,
    draws: Tensor,
    policy: Policy,
    seed: int,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    flip: bool = True,
) -> Tensor:
    """images: (M, H, W, 3) uint8, draws: (N, 4) int64 -> (N, 3, H, W), channels-last: by Pillow, on the host."""
    rows, samples, visits, kinds = draws.cpu().numpy().T
    picked = images.cpu().numpy()[rows]
    views = picked.copy()
    strong = kinds == View.UNLABELED_STRONG
    for which in (~strong, strong):
        if which.any():
            p = draw_parameters(
                policy, seed, visits[which], samples[which], kinds[which], *images.shape[1:3], which is strong, flip
            )
            views[which] = (
                strong_views(picked[which], p, policy)
                if which is strong
                else weak_views(picked[which], p, policy.padding)
            )
    views = torch.from_numpy(views).to(images.device)
    return views.permute(0, 3, 1, 2) if dtype == torch.uint8 else normalize(views, mean, std, dtype)
