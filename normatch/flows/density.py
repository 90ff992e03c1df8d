"""The interface of every flow with a prior (`log_prob`, `class_probs`, `sample`), and the Gaussian-mixture prior."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops


class FlowOutput(NamedTuple):
    """Samples (N, ...) through a flow and its prior: in nats, float32 (float64 for float64 parameters)."""

    z: torch.Tensor  # (N, D) latent
    logdet: torch.Tensor  # (N,) log |det dz/dx|, summed over all layers
    class_log_prob: torch.Tensor  # (N, K) log pi_k + log p(z | k), which is log N(z; mu_k, sigma_k^2 I) for a mixture
    log_prob: torch.Tensor  # (N,) logsumexp_k of the above + logdet


class FlowDensity(nn.Module):
    """x: (N, ...) -> FlowOutput: a density log p(x, y) of samples and their classes that can be inverted and sampled.

    A subclass defines `forward`, `inverse(z) -> x`, `sample_latent(n, y, generator) -> z`, `log_class_prior() -> (K,)`
    and, for its latent space, `class_means() -> (K, D)` and `width() -> ()`; the methods below follow, in the manner
    of `torch.distributions`. Log-densities are in nats, of x as given: no dequantization constant is added.
    """

    @torch.no_grad()
    def sample(self, n: int, y=None, generator: torch.Generator | None = None) -> torch.Tensor:
        """-> (n, ...) samples of class y, an int or (n,) one per row, or of all classes."""
        return self.inverse(self.sample_latent(n, y, generator))

    def log_prob(self, x: torch.Tensor, y: torch.Tensor | int | None = None) -> torch.Tensor:
        """x: (N, ...), y: (N,) or an int -> (N,): log p(x | y), or log p(x) without y and for rows where y is -1.

        Raises ValueError for NaN in x and for y outside -1..K-1.
        """
        out = self(self._without_nan(x))
        if y is None:
            return out.log_prob
        y = checked_classes(y, len(out.z), len(self.log_class_prior()), out.z.device, least=-1)
        given_y = (out.class_log_prob - self.log_class_prior()).gather(1, y.clamp(min=0)[:, None])[:, 0] + out.logdet
        return torch.where(y < 0, out.log_prob, given_y)

    def class_log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, ...) -> (N, K) log p(x, y = k)."""
        out = self(self._without_nan(x))
        return out.class_log_prob + out.logdet[:, None]

    def class_probs(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, ...) -> (N, K) p(y = k | x), in which the Jacobian cancels."""
        return self(self._without_nan(x)).class_log_prob.softmax(1)

    @staticmethod
    def _without_nan(x):
        if isinstance(x, torch.Tensor) and on_the_cpu(x) and bool(x.isnan().any()):
            raise ValueError("x has values that are NaN")
        return x


class GaussianMixture(nn.Module):
    """z: (N, D) -> (N, K) log pi_k + log N(z; mu_k, sigma_k^2 I): a component per class (Izmailov et al. 2020, eq. 3).

    means: (K, D).   rho: (K,), sigma_k = softplus(rho_k), by default sigma = 1.   mixture_logits: (K,), pi is their
    softmax, by default uniform.   trainable: which of "means", "rho", "mixture_logits" receive gradients; True: all,
    False: none.
    """

    def __init__(self, means, rho=None, mixture_logits=None, trainable: bool | tuple[str, ...] = False):
        super().__init__()
        means = torch.as_tensor(means)
        if means.ndim != 2 or not means.is_floating_point() or 0 in means.shape:
            raise ValueError(f"means must be floats of shape (K, D), not {means.dtype} of shape {tuple(means.shape)}")
        names = ("means", "rho", "mixture_logits")
        if not isinstance(trainable, bool) and not (isinstance(trainable, tuple) and set(trainable) <= set(names)):
            raise ValueError(f"trainable must be True, False or a tuple of names among {names}, not {trainable!r}")
        classes = len(means)
        if rho is None:
            rho = means.new_full((classes,), math.log(math.e - 1))  # softplus(rho) = 1
        if mixture_logits is None:
            mixture_logits = means.new_ones(classes)
        for name, value in (("means", means), ("rho", rho), ("mixture_logits", mixture_logits)):
            value = torch.as_tensor(value).to(means)
            if name != "means" and value.shape != (classes,):
                raise ValueError(f"{name} must have shape ({classes},), one a class, not {tuple(value.shape)}")
            trains = trainable if isinstance(trainable, bool) else name in trainable
            self.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=trains))

    @property
    def classes(self) -> int:
        return len(self.means)

    @property
    def features(self) -> int:
        return self.means.shape[1]

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return ops.gmm_log_prob(z, self.means, self.rho, self.mixture_logits)

    @torch.no_grad()
    def sample(self, n: int, y=None, generator: torch.Generator | None = None) -> torch.Tensor:
        """-> (n, D) points of class y, an int or (n,) one per row, or of the mixture."""
        return sample_mixture(self.means, self.rho, self.mixture_logits, n, y, generator)

    def extra_repr(self):
        return f"classes={self.classes}, features={self.features}"


class MixtureDensity(FlowDensity):
    """A FlowDensity with one Gaussian per class: `prior_parameters()` are means (K, D), rho (K,) and logits (K,)."""

    @torch.no_grad()
    def sample_latent(self, n: int, y=None, generator: torch.Generator | None = None) -> torch.Tensor:
        """-> (n, D) latent points of class y, an int or (n,) one per row, or of the mixture."""
        return sample_mixture(*self.prior_parameters(), n, y, generator)

    def class_means(self) -> torch.Tensor:
        """-> (K, D) the means of the mixture."""
        return self.prior_parameters()[0]

    def width(self) -> torch.Tensor:
        """-> () the mean standard deviation of the components."""
        return F.softplus(self.prior_parameters()[1]).mean()

    def log_class_prior(self) -> torch.Tensor:
        """-> (K,) log pi."""
        return self.prior_parameters()[2].log_softmax(0)


class FlowClassifier(MixtureDensity):
    """x: (N, ...) -> FlowOutput: FlowGMM, any flow with a Gaussian-mixture prior (Izmailov et al. 2020, eq. 3-5).

    flow: a module x -> z (N, D), logdet (N,), with `inverse`.   prior: the mixture over z.
    Raises ValueError if `flow.features`, where it exists, differs from the dimension of the prior.
    """

    def __init__(self, flow: nn.Module, prior: GaussianMixture):
        super().__init__()
        if getattr(flow, "features", prior.features) != prior.features:
            raise ValueError(f"the flow has {flow.features} dimensions, the means of the prior have {prior.features}")
        self.flow, self.prior = flow, prior

    def forward(self, x: torch.Tensor) -> FlowOutput:
        fused = getattr(self.flow, "head_with", None)
        if fused and (result := fused(self.prior, x)):
            return FlowOutput(*result)
        z, logdet = self.flow(x)
        class_log_prob = self.prior(z)
        return FlowOutput(z, logdet, class_log_prob, class_log_prob.logsumexp(1) + logdet)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """z: (N, D) -> x (N, ...)."""
        return self.flow.inverse(z)

    def prior_parameters(self) -> list[nn.Parameter]:
        """-> the mixture's means (K, D), rho (K,) and logits (K,)."""
        return [self.prior.means, self.prior.rho, self.prior.mixture_logits]


def sample_mixture(means, rho, mixture_logits, n, label=None, generator=None):
    """means: (K, D), rho, mixture_logits: (K,) -> (n, D) points of class `label`, an int or (n,), or of the mixture."""
    device = means.device
    if label is None:
        label = draw_classes(mixture_logits.softmax(0), n, generator)
    label = checked_classes(label, n, len(means), device)
    noise = torch.randn(n, means.shape[1], generator=generator, device=device, dtype=means.dtype)
    return means[label] + F.softplus(rho)[label, None] * noise


def draw_classes(shares: torch.Tensor, n: int, generator: torch.Generator | None) -> torch.Tensor:
    """shares: (K,) -> (n,) classes. n may be 0, which `torch.multinomial` refuses."""
    return torch.multinomial(shares, max(n, 1), replacement=True, generator=generator)[:n]


def checked_classes(label, n: int, classes: int, device: torch.device, least: int = 0) -> torch.Tensor:
    """An int or (n,) integers -> (n,) int64 on the device.

    Raises ValueError for anything else and, if they are on the CPU, for labels outside least..K-1.
    """
    label = torch.as_tensor(label)
    if label.is_floating_point() or label.dtype == torch.bool or label.shape not in ((), (n,)):
        raise ValueError(f"label must be an integer or {n} of them, not {label.dtype} of shape {tuple(label.shape)}")
    outside = label[(label < least) | (label >= classes)] if label.device.type == "cpu" else ()
    if len(outside):
        unlabeled = ", or be -1 for none" if least < 0 else ""
        raise ValueError(f"label must lie in 0..{classes - 1}{unlabeled}, but holds {int(outside[0])}")
    return label.to(device).expand(n).long()


def checked_samples(x, name: str, shape: tuple[int, ...], like: torch.Tensor | None = None) -> torch.Tensor:
    """x: (N, *shape) -> x. Raises if its shape does not fit or, with autocast off, its dtype is not that of `like`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.ndim != 1 + len(shape) or tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} must have shape (N, {', '.join(map(str, shape))}), not {tuple(x.shape)}")
    if like is not None and x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} is {x.dtype}, but the weights are {like.dtype}: they must be of one floating type")
    return x


def on_the_cpu(x: torch.Tensor) -> bool:
    """Whether values may be read: on a GPU that would synchronize, and a compiled graph cannot."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
