"""The formulations that the ops are compared with.

`published_*` follows the code of NorMatch and FlowGMM: layers of full width with masks, one MultivariateNormal per
class. `closed_head` and `expanded_mixture` are the closed forms in vectorized PyTorch, where `normatch.reference` has
a slower or more exact one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from .. import reference

# ---- couplings


def _full_width(x, s_raw, t, gain):
    mask = torch.zeros(2 * x.shape[1], device=x.device, dtype=x.dtype)
    mask[x.shape[1] :] = 1
    x, s_raw, t = (torch.cat([value, value], 1) for value in (x, s_raw, t))
    return x, torch.cat([gain, gain]) * torch.tanh(s_raw) * mask, t, mask


def published_coupling(x, s_raw, t, gain):
    """x, s_raw, t: (N, H), gain: (H,) -> y (N, H), logdet (N,), by way of the full width D = 2 H."""
    wide, s, t, mask = _full_width(x, s_raw, t, gain)
    y = wide * (1 - mask) + (wide * mask + t * mask) * s.exp() * mask
    return y[:, x.shape[1] :].to(x.dtype), s.sum(1)


def published_inverse(y, s_raw, t, gain):
    """y, s_raw, t: (N, H), gain: (H,) -> x (N, H)."""
    wide, s, t, mask = _full_width(y, s_raw, t, gain)
    x = wide * (1 - mask) + (wide * mask * (-s).exp() - t * mask) * mask
    return x[:, y.shape[1] :].to(y.dtype)


def _checked_exp(s):
    scale = s.exp()
    if scale.isnan().any():  # waits for a GPU, as the published code does
        raise RuntimeError("the scale has NaN entries")
    return scale


def published_coupling2d(x, params, gain, changed="first", shift_first=True, eps=0.0):
    """x: (N, C, H, W) -> y (N, C, H, W), logdet (N,). Masks for a checkerboard, built pixel by pixel on every call."""
    s, t = params.chunk(2, 1)
    s = gain.view(-1, 1, 1) * torch.tanh(s)
    checkerboard = changed in ("even", "odd")
    if checkerboard:
        height, width = x.shape[2:]
        mask = torch.tensor([[(i + j) % 2 for j in range(width)] for i in range(height)], device=x.device).to(x.dtype)
        mask = mask if changed == "even" else 1 - mask
        s, t = s * (1 - mask), t * (1 - mask)
        kept, part = x * mask, x * (1 - mask)
    else:
        part, kept = x.chunk(2, 1) if changed == "first" else reversed(x.chunk(2, 1))
    part = (part + t) * _checked_exp(s)
    if checkerboard:
        y = kept + part * (1 - mask)
    else:
        y = torch.cat([part.to(x.dtype), kept] if changed == "first" else [kept, part.to(x.dtype)], 1)
    return y.to(x.dtype), s.flatten(1).sum(-1, dtype=torch.float32)


def published_logdet(log_scale):
    """(N, M) -> (N,)."""
    return (log_scale * torch.ones_like(log_scale)).view(len(log_scale), -1).sum(-1, dtype=torch.float32)


# ---- mixtures


def published_gaussians(means, sigma) -> list[torch.distributions.MultivariateNormal]:
    """means: (K, D), sigma: (K,) -> one Gaussian with a full covariance per class, factorized anew on every call."""
    eye = torch.eye(means.shape[1], device=means.device, dtype=means.dtype)
    return [torch.distributions.MultivariateNormal(mean, s**2 * eye) for mean, s in zip(means, sigma, strict=True)]


def published_mixture(z, means, rho, logits, eps=0.0):
    """z: (N, D), means: (K, D), rho, logits: (K,) -> (N, K)."""
    gaussians = published_gaussians(means, softplus(rho))
    return torch.stack([gaussian.log_prob(z) for gaussian in gaussians], 1) + (logits.softmax(0) + eps).log()


def expanded_mixture(z, means, rho, logits, eps=0.0):
    """The closed form by a matrix product, |z - mu|^2 = |z|^2 - 2 z.mu + |mu|^2: faster, and less exact."""
    sigma = softplus(rho)
    distance = z.square().sum(1, keepdim=True) - 2 * z @ means.t() + means.square().sum(1)
    offset = logits.log_softmax(0) - z.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi))
    return offset - 0.5 * distance / sigma.square()


# ---- flow heads


def published_layer(x, net, gain, mask):
    """x: (N, D) -> z (N, D), logdet (N,); mask: (D,), 1 where x is kept; net: (N, D) -> (N, 2 D)."""
    s, t = net(x * mask).chunk(2, 1)
    s, t = gain * s.tanh() * (1 - mask), t * (1 - mask)
    return x * mask + (x * (1 - mask) + t) * _checked_exp(s) * (1 - mask), s.sum(1)


def published_mask(features: int, layer: int, device) -> Tensor:
    """(D,): 1 on the half that a layer keeps. Made on the CPU and copied, as the published code does."""
    mask = torch.zeros(features)
    mask[slice(features // 2, None) if layer % 2 else slice(None, features // 2)] = 1
    return mask.to(device)


def split_couplings(values: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [values[i : i + 7] for i in range(0, len(values), 7)]


def full_width(values, layer: int, features: int) -> list[Tensor]:
    """A coupling's seven tensors -> those of the published layer, whose network takes and makes all features."""
    weight0, bias0, weight1, bias1, weight2, bias2, gain = values
    kept = published_mask(features, layer, gain.device).bool()
    shapes = (len(bias0), features), (2, features, len(bias1)), (2, features), (features,)
    first, last, shift, scale = (gain.new_zeros(shape) for shape in shapes)
    first[:, kept], scale[~kept] = weight0, gain
    last[:, ~kept], shift[:, ~kept] = weight2.view(2, len(gain), -1), bias2.view(2, -1)
    return [first, bias0, weight1, bias1, last.flatten(0, 1), shift.flatten(), scale]


def published_flow(x, layers, prior, eps=0.0, dropout=0.0):
    """x: (N, D), layers: of `full_width` -> z (N, D), logdet (N,), class_log_prob (N, K), log_prob (N,)."""
    logdet = 0
    for j, (weight0, bias0, weight1, bias1, weight2, bias2, gain) in enumerate(layers):

        def net(x, first=(weight0, bias0), middle=(weight1, bias1), last=(weight2, bias2)):
            hidden = linear(x, *first).relu()
            hidden = nn.functional.dropout(hidden, dropout) if dropout else hidden
            return linear(linear(hidden, *middle).relu(), *last)

        x, term = published_layer(x, net, gain, published_mask(x.shape[1], j, x.device).to(x.dtype))
        logdet = logdet + term
    # The mixture is evaluated once for the classes and once for the density.
    log_prob = published_mixture(x, *prior, eps=eps).logsumexp(1) + logdet
    return x, logdet, published_mixture(x, *prior, eps=eps), log_prob


def published_head(x, means, rho, logits, *values):
    """x: (N, D) -> z, logdet, class_log_prob, log_prob, in two calls as published: labeled rows, then the rest."""

    def call(rows):
        layers = [full_width(tensors, j, x.shape[1]) for j, tensors in enumerate(split_couplings(values))]
        return published_flow(rows, layers, (means, rho, logits))

    return tuple(map(torch.cat, zip(*map(call, x.tensor_split([len(x) // 8])), strict=True)))


def closed_head(x, means, rho, logits, *values):
    """x: (N, D) -> z, logdet, class_log_prob, log_prob; values: seven tensors per coupling."""
    return reference.flow_head(x, split_couplings(values), means, rho, logits, mixture=expanded_mixture)
