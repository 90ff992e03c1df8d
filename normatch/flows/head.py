"""The flow classifier: features (N, D) -> latent z (N, D), log-determinant (N,), class log-densities (N, K)."""

import math

import torch
from torch import nn

from .. import ops
from .density import FlowOutput, MixtureDensity, checked_samples
from .flow import invert_layers


class Coupling(nn.Module):
    """x: (N, D) -> z (N, D), logdet (N,): one affine coupling with its scale-and-translate network.

    Keeps the first half [0, D // 2) and changes the rest, or the reverse with `swap`: z = (x + t) * exp(gain *
    tanh(s)) on the changed half, with s and t from the kept half (Dinh, Sohl-Dickstein & Bengio 2017, eq. 7-8, with the
    translation first, as in FlowGMM and NorMatch). The network's first and last layers have only the halves that
    matter: the published full-width matrices multiply zeros.
    """

    def __init__(self, features: int, hidden: int, dropout: float, swap: bool, layers: int = 1):
        super().__init__()
        if features < 2:
            raise ValueError(f"features must be at least 2, one for each half, not {features}")
        kept = (features + swap) // 2  # half of an odd number is rounded down, and up with `swap`
        changed = features - kept
        self.kept, self.changed, self.swap = kept, changed, swap
        inner = [layer for _ in range(layers) for layer in (nn.Linear(hidden, hidden), nn.ReLU())]
        first = nn.Linear(kept, hidden), nn.ReLU(), nn.Dropout(dropout)
        self.net = nn.Sequential(*first, *inner, nn.Linear(hidden, 2 * changed))
        self.gain = nn.Parameter(torch.ones(changed))
        bound = 1 / math.sqrt(features)  # as in the published layer, whose input is all D features
        nn.init.uniform_(self.net[0].weight, -bound, bound)
        nn.init.uniform_(self.net[0].bias, -bound, bound)

    def forward(self, x):
        kept, changed = self.split(x)
        s, t = self.net(kept).to(x.dtype).chunk(2, dim=1)
        changed, logdet = ops.affine_coupling(changed, s, t, self.gain)
        return self.join(kept, changed), logdet

    def inverse(self, z):
        kept, changed = self.split(z)
        s, t = self.net(kept).to(z.dtype).chunk(2, dim=1)
        return self.join(kept, ops.affine_coupling_inverse(changed, s, t, self.gain))

    def tensors(self) -> list[torch.Tensor]:
        """The parameters of a coupling with one inner layer, in the order of `ops.flow_head`."""
        first, _, _, middle, _, last = self.net
        return [first.weight, first.bias, middle.weight, middle.bias, last.weight, last.bias, self.gain]

    def split(self, x):
        if self.swap:
            changed, kept = x.split((self.changed, self.kept), dim=1)
        else:
            kept, changed = x.split((self.kept, self.changed), dim=1)
        return kept, changed

    def join(self, kept, changed):
        return torch.cat((changed, kept) if self.swap else (kept, changed), dim=1)

    @torch.no_grad()
    def load_published(self, state: dict, prefix: str):
        """Load the halves that matter of the published full-width layer, `st_net.*` and `rescale.*` behind `prefix`."""
        features = self.kept + self.changed
        kept, changed = (half.flatten() for half in self.split(torch.arange(features)[None]))
        rows = torch.cat((changed, features + changed))  # of s, then of t
        linears = [index for index, layer in enumerate(self.net) if isinstance(layer, nn.Linear)]
        for index in linears:
            weight, bias = (state[f"{prefix}st_net.{index}.{name}"] for name in ("weight", "bias"))
            if index == linears[0]:
                weight = weight[:, kept]
            if index == linears[-1]:
                weight, bias = weight[rows], bias[rows]
            self.net[index].weight.copy_(weight)
            self.net[index].bias.copy_(bias)
        # The weight-normalised gain g v / |v| of one entry is g sign(v).
        self.gain.copy_((state[f"{prefix}rescale.weight_g"] * state[f"{prefix}rescale.weight_v"].sign())[changed])


def fused_head(flow: nn.Module, x: torch.Tensor, prior: list, eps: float = 0.0) -> tuple[torch.Tensor, ...]:
    """x: (N, D) -> z, logdet, class_log_prob, log_prob by one op: the `couplings` of `flow`, then a mixture."""
    seed = None
    if flow.training and flow.dropout > 0:  # from torch's generator, drawn on the device without synchronizing
        seed = torch.randint(2**63 - 1, (), device=x.device)
    couplings = [coupling.tensors() for coupling in flow.couplings]
    return ops.flow_head(x, couplings, *prior, eps, dropout=flow.dropout, seed=seed)


class FlowHead(MixtureDensity):
    """x: (N, D) fp32/bf16/fp16 -> FlowOutput(z (N, D), logdet (N,), class_log_prob (N, K), log_prob (N,)).

    NorMatch's flow classifier (Deng et al. 2024): `couplings` affine couplings on alternating halves, then a mixture
    of K isotropic Gaussians with means (K, D), sigma_k = softplus(rho_k) and pi = softmax(mixture_logits), one
    component per class. The class posterior is `class_log_prob.softmax(1)`; `log_prob` is the log-density of x itself,
    without a dequantization constant.

    One op computes everything (`ops.flow_head`), in float32 (float64 for float64 parameters) even under autocast:
    log-likelihoods of several hundred nats differ by a few, which bf16 cannot resolve.

    features: D, at least 2.   classes: K.   couplings: number of couplings.   hidden: width of their networks.
    dropout: after the first layer of each network, in training mode.
    trainable_prior: whether means, rho and mixture_logits receive gradients.
    compat: "reference" adds 1e-6 to pi inside the logarithm, as the published code does.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        couplings: int = 6,
        hidden: int = 32,
        dropout: float = 0.5,
        trainable_prior: bool = True,
        compat: str = "none",
    ):
        super().__init__()
        if classes < 1 or couplings < 1 or hidden < 1:
            raise ValueError("classes, couplings and hidden must be at least 1")
        if compat not in ("none", "reference"):
            raise ValueError(f"compat must be 'none' or 'reference', not {compat!r}")
        self.features, self.classes, self.dropout = features, classes, dropout
        self.eps = 1e-6 if compat == "reference" else 0.0
        self.couplings = nn.ModuleList(Coupling(features, hidden, dropout, swap=j % 2 == 1) for j in range(couplings))
        self.means = nn.Parameter(torch.randn(classes, features), requires_grad=trainable_prior)
        # softplus(rho) = 1
        self.rho = nn.Parameter(torch.full((classes,), math.log(math.e - 1)), requires_grad=trainable_prior)
        self.mixture_logits = nn.Parameter(torch.ones(classes), requires_grad=trainable_prior)

    def forward(self, x: torch.Tensor) -> FlowOutput:
        checked_samples(x, "x", (self.features,))
        if x.dtype != self.means.dtype and torch.float64 in (x.dtype, self.means.dtype):
            x = x.to(self.means.dtype)
        return FlowOutput(*fused_head(self, x, self.prior_parameters(), self.eps))

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """z: (N, D) -> x (N, D) with `head(x).z == z`, in evaluation mode (dropout is not invertible)."""
        checked_samples(z, "z", (self.features,))
        with torch.autocast(z.device.type, enabled=False):
            return invert_layers(self.couplings, [z.to(self.means.dtype)])

    @torch.no_grad()
    def sample(self, n: int, label=None, generator: torch.Generator | None = None) -> torch.Tensor:
        """-> (n, D) features of class `label`, an int or (n,) one per row, or of the mixture."""
        return self.inverse(self.sample_latent(n, label, generator))

    def log_class_prior(self) -> torch.Tensor:
        """-> (K,) log pi."""
        return (self.mixture_logits.softmax(0) + self.eps).log()

    def prior_parameters(self) -> list[nn.Parameter]:
        """-> the mixture's means (K, D), rho (K,) and logits (K,)."""
        return [self.means, self.rho, self.mixture_logits]

    @classmethod
    def from_reference(cls, state: dict, means, rho, weights) -> "FlowHead":
        """The published flow's state dict, means (K, D), rho (K,) and mixture logits (K,) -> the same head here.

        Names in `state` end in `body.J.st_net.{0,3,5}.{weight,bias}` and `body.J.rescale.weight_{g,v}`, J the
        coupling, behind any prefix. Raises KeyError if a tensor is missing.
        """
        tensors = {"body." + name.rpartition("body.")[2]: torch.as_tensor(value) for name, value in state.items()}
        couplings = 1 + max((int(name.split(".")[1]) for name in tensors if ".st_net." in name), default=-1)
        if not couplings:
            raise KeyError("no body.0.st_net.0.weight in the state dict: not the flow of a NorMatch checkpoint")
        hidden, features = tensors["body.0.st_net.0.weight"].shape
        means = torch.as_tensor(means)
        head = cls(features, len(means), couplings, hidden, compat="reference").to(means)
        with torch.no_grad():
            head.means.copy_(means)
            head.rho.copy_(torch.as_tensor(rho))
            head.mixture_logits.copy_(torch.as_tensor(weights))
        for j, coupling in enumerate(head.couplings):
            coupling.load_published(tensors, f"body.{j}.")
        return head

    def extra_repr(self):
        return f"features={self.features}, classes={self.classes}"
