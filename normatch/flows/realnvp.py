"""RealNVP (Dinh, Sohl-Dickstein & Bengio 2017) as FlowGMM builds it, for tables and for images."""

import torch
from torch import nn

from .. import ops
from .density import GaussianMixture
from .head import Coupling


class RealNVPTabular(nn.Module):
    """x: (N, D) -> z (N, D), logdet (N,): affine couplings on alternating halves (FlowGMM, Izmailov et al. 2020).

    features: D, at least 2.   couplings: their number.   hidden: width of their networks.   layers: inner layers of
    each network.   dropout: after each network's first layer, in training mode.   zero_init: start as the identity.
    """

    def __init__(
        self,
        features: int,
        couplings: int = 6,
        hidden: int = 256,
        layers: int = 2,
        dropout: float = 0.0,
        zero_init: bool = False,
    ):
        super().__init__()
        if features < 2:
            raise ValueError(f"features must be at least 2, one for each half, not {features}")
        if couplings < 1 or hidden < 1 or layers < 0:
            raise ValueError("couplings and hidden must be at least 1, layers at least 0")
        self.features, self.hidden, self.layers, self.dropout = features, hidden, layers, dropout
        self.couplings = nn.ModuleList(
            Coupling(features, hidden, dropout, swap=j % 2 == 1, layers=layers) for j in range(couplings)
        )
        if zero_init:
            for coupling in self.couplings:
                nn.init.zeros_(coupling.net[-1].weight)
                nn.init.zeros_(coupling.net[-1].bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, logdet = self._check(x, "x"), 0.0
        for coupling in self.couplings:
            z, term = coupling(z)
            logdet = logdet + term
        return z, logdet

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """z: (N, D) -> x (N, D), in evaluation mode (dropout is not invertible)."""
        x = self._check(z, "z")
        for coupling in reversed(self.couplings):
            x = coupling.inverse(x)
        return x

    def head_with(self, prior: GaussianMixture, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """z, logdet, class_log_prob, log_prob by one op for flow and prior, where there is a kernel for it."""
        x = self._check(x, "x")
        if self.layers != 1 or ops.flow_head_path(self.features, self.hidden, x.device) != "fused":
            return None
        seed = None
        if self.training and self.dropout > 0:
            seed = torch.randint(2**63 - 1, (), device=x.device)
        couplings = [coupling.tensors() for coupling in self.couplings]
        return ops.flow_head(
            x, couplings, prior.means, prior.rho, prior.mixture_logits, dropout=self.dropout, seed=seed
        )

    def load_published(self, state: dict):
        """Take the weights of FlowGMM's tabular RealNVP: `body.J.st_net.*` and `body.J.rescale.*` of its state dict."""
        for j, coupling in enumerate(self.couplings):
            coupling.load_published(state, f"body.{j}.")

    def extra_repr(self):
        return f"features={self.features}"

    def _check(self, x, name):
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"{name} must have shape (N, {self.features}), not {tuple(x.shape)}")
        return x
