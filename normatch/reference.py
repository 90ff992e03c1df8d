"""The ops of `normatch.ops` in plain PyTorch: same names, same arguments, any device and float dtype.

It serves three purposes: the oracle that the kernels are tested against (in float64), the fallback of `normatch.ops`
where no kernel is built, and the baseline of the benchmarks. So it is what one would write by hand: vectorized,
differentiated by autograd, with every log-determinant and log-likelihood accumulated and returned in float32 (float64
for float64 inputs).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from normatch.data.base import standardize
from normatch.data.philox import WORD, philox, split_key


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


def coupling2d(x, params, gain=None, changed="first", shift_first=True, eps=0.0) -> tuple[Tensor, Tensor]:
    """x: (N, C, H, W), params: (N, 2P, H, W), gain: (P,) -> y: (N, C, H, W), logdet: (N,)."""

    def forward(x, log_scale, t):
        return (x + t) * log_scale.exp() if shift_first else x * log_scale.exp() + t

    return _couple2d(forward, x, params, gain, changed, eps)


def coupling2d_inverse(y, params, gain=None, changed="first", shift_first=True, eps=0.0) -> Tensor:
    """y: (N, C, H, W), params: (N, 2P, H, W), gain: (P,) -> x: (N, C, H, W)."""

    def inverse(y, log_scale, t):
        return y * (-log_scale).exp() - t if shift_first else (y - t) * (-log_scale).exp()

    return _couple2d(inverse, y, params, gain, changed, eps)[0]


def _couple2d(function: Callable, x, params, gain, changed, eps) -> tuple[Tensor, Tensor]:
    """Applies `function` to the changed part of x, its log-scale and its shift; the rest is copied."""
    dtype = accumulation_dtype(x.dtype)
    s_raw, t = params.chunk(2, 1)
    if gain is not None:
        log_scale = gain.to(dtype)[:, None, None] * s_raw.to(dtype).tanh()
    elif eps == 0:
        log_scale = logsigmoid(s_raw.to(dtype) + 2)
    else:
        log_scale = ((s_raw.to(dtype) + 2).sigmoid() + eps).log()
    if changed in ("even", "odd"):
        row, column = (torch.arange(size, device=x.device) for size in x.shape[2:])
        mask = (row[:, None] + column) % 2 == (changed == "odd")
        return torch.where(mask, function(x, log_scale, t).to(x.dtype), x), (log_scale * mask).flatten(1).sum(1)
    width = params.shape[1] // 2
    start = 0 if changed == "first" else x.shape[1] - width
    before, part, after = x.split([start, width, x.shape[1] - width - start], 1)
    return torch.cat([before, function(part, log_scale, t).to(x.dtype), after], 1), log_scale.flatten(1).sum(1)


def logdet(log_scale: Tensor) -> Tensor:
    """log_scale: (N, ...) -> (N,)."""
    dtype = accumulation_dtype(log_scale.dtype)
    return log_scale.flatten(1).sum(1, dtype=dtype) if log_scale.dim() > 1 else log_scale.to(dtype)


def log_softplus(rho: Tensor) -> Tensor:
    """rho: any shape -> log(softplus(rho)), with its gradient: for small rho softplus(rho) -> exp(rho)."""
    left = rho < -20
    inside = torch.where(left, 0.0, rho)  # keeps the unselected branch and its gradient finite
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


def gmm_posterior(z, means, rho, logits, eps=0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z: (N, D), means: (K, D), rho, logits: (K,) -> class_log_prob: (N, K), log_prob, label, confidence: (N,)."""
    class_log_prob = gmm_log_prob(z, means, rho, logits, eps)
    log_prob = class_log_prob.logsumexp(1)
    top, label = class_log_prob.max(1)
    return class_log_prob, log_prob, label, (top - log_prob).exp()


def flow_head(
    x, couplings, means, rho, logits, eps=0.0, dropout=0.0, seed=None, coupling=affine_coupling, mixture=gmm_log_prob
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: (N, D) -> z: (N, D), logdet: (N,), class_log_prob: (N, K), log_prob: (N,).

    Library matrix products between `coupling` and `mixture`, other implementations of the two ops.
    """
    dtype = accumulation_dtype(x.dtype)
    z = x.to(dtype)
    half = z.shape[1] // 2
    logdet = z.new_zeros(len(z))
    for j, parameters in enumerate(couplings):
        weight0, bias0, weight1, bias1, weight2, bias2, gain = (value.to(dtype) for value in parameters)
        kept, changed = (z[:, half:], z[:, :half]) if j % 2 else (z[:, :half], z[:, half:])
        hidden = linear(kept, weight0, bias0).relu()
        if dropout > 0 and seed is not None:
            hidden = hidden * dropout_mask(seed, len(z), hidden.shape[1], j, dropout, dtype)
        s_raw, t = linear(linear(hidden, weight1, bias1).relu(), weight2, bias2).chunk(2, 1)
        changed, term = coupling(changed, s_raw, t, gain)
        z = torch.cat((changed, kept) if j % 2 else (kept, changed), 1)
        logdet = logdet + term
    class_log_prob = mixture(z, means.to(dtype), rho.to(dtype), logits.to(dtype), eps)
    return z, logdet, class_log_prob, class_log_prob.logsumexp(1) + logdet


def dropout_mask(seed: Tensor, rows: int, hidden: int, coupling: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """seed: () int64 -> (rows, hidden): 1 / (1 - dropout) for kept units, 0 for dropped ones.

    Unit u of a row is kept where word u % 4 of Philox4x32-10 (Salmon et al., SC 2011) with the counter
    (u // 4, row, row >> 32, coupling) and the key `seed` is at least dropout * 2^32.
    """
    units = torch.arange((hidden + 3) // 4, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    words = philox((units, row & WORD, row >> 32, torch.full_like(units, coupling)), split_key(seed))
    words = torch.stack(torch.broadcast_tensors(*words), 2).flatten(1)[:, :hidden]
    threshold = min(round(dropout * 2**32), 2**32 - 1)
    return (words >= threshold).to(dtype) * (1 / (1 - dropout) if dropout < 1 else 0.0)


def augment_views(
    images, draws, policy, seed, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), dtype=torch.float32, flip=True
) -> Tensor:
    """images: (M, H, W, 3) uint8, draws: (N, 4) int64 -> (N, 3, H, W), channels-last: by Pillow, on the host."""
    from normatch.augment.pillow import make_views  # the ops do without Pillow

    views = make_views(images.cpu().numpy(), draws.cpu().numpy(), policy, seed, flip)
    views = torch.from_numpy(views).to(images.device)
    return views.permute(0, 3, 1, 2) if dtype == torch.uint8 else standardize(views, mean, std, dtype)
