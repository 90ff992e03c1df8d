"""FlowGMM's RealNVPs (Izmailov et al. 2020; Dinh, Sohl-Dickstein & Bengio 2017) for tables and images."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import UserError
from .density import GaussianMixture, checked_samples
from .flow import Flow, invert_layers, load_weights, run_layers
from .head import Coupling, fused_head
from .layers import ActNorm, FactorOut, ImageCoupling, InvertibleConv, Logit, ResidualBlock, Squeeze, zero_last


class RealNVPTabular(nn.Module):
    """x: (N, D) -> z (N, D), logdet (N,): affine couplings on alternating halves (FlowGMM, Izmailov et al. 2020).

    features: D, at least 2.   couplings: number of couplings.   hidden: width of their networks.   layers: inner layers
    of each network.   dropout: after the first layer of each, in training mode.   zero_init: start as the identity.
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
        if couplings < 1 or hidden < 1 or layers < 0:
            raise ValueError("couplings and hidden must be at least 1, layers at least 0")
        self.features, self.hidden, self.layers, self.dropout = features, hidden, layers, dropout
        self.couplings = nn.ModuleList(
            Coupling(features, hidden, dropout, swap=j % 2 == 1, layers=layers) for j in range(couplings)
        )
        if zero_init:
            for coupling in self.couplings:
                zero_last(coupling.net)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (z,), logdet = run_layers(self.couplings, self._check(x, "x"))
        return z, logdet

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """z: (N, D) -> x (N, D), in evaluation mode (dropout is not invertible)."""
        return invert_layers(self.couplings, [self._check(z, "z")])

    def head_with(self, prior: GaussianMixture, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """x: (N, D) -> z, logdet, class_log_prob, log_prob by one op for flow and prior; None without a kernel."""
        x = self._check(x, "x")
        if self.layers != 1 or ops.flow_head_path(self.features, self.hidden, x.device) != "fused":
            return None
        return fused_head(self, x, [prior.means, prior.rho, prior.mixture_logits])

    def load_published(self, state: dict):
        """Take the weights of FlowGMM's tabular RealNVP: `body.J.st_net.*` and `body.J.rescale.*` of its state dict.

        Raises `UserError` for another architecture.
        """
        last = 3 + 2 * self.layers
        for j, coupling in enumerate(self.couplings):
            shapes = {
                "st_net.0.weight": (self.hidden, self.features),
                f"st_net.{last}.weight": (2 * self.features, self.hidden),
                "rescale.weight_g": (self.features,),
            }
            for name, shape in shapes.items():
                tensor = state.get(f"body.{j}.{name}")
                if tensor is None or tensor.shape != shape:
                    has = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise UserError(
                        f"the state dict is not of this RealNVPTabular: body.{j}.{name} is {has}, not of shape {shape}"
                    )
            coupling.load_published(state, f"body.{j}.")
        if f"body.{len(self.couplings)}.rescale.weight_g" in state:
            raise UserError(f"the state dict has more couplings than the {len(self.couplings)} of this RealNVPTabular")

    def extra_repr(self):
        return f"features={self.features}"

    def _check(self, x, name):
        return checked_samples(x, name, (self.features,), self.couplings[0].gain)


class WeightNormConv2d(nn.Module):
    """x: (N, in, H, W) -> (N, out, H, W): a convolution of weight g v / |v| per channel (Salimans & Kingma 2016)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, bias=bias)  # for its initial values
        self.bias = conv.bias
        self.weight_g = nn.Parameter(conv.weight.detach().flatten(1).norm(dim=1)[:, None, None, None])
        self.weight_v = nn.Parameter(conv.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)

    def extra_repr(self):
        outputs, inputs, kernel, _ = self.weight_v.shape
        return f"{inputs}, {outputs}, {kernel}"


def _residual_block(channels: int) -> ResidualBlock:
    """(N, C, H, W) -> the same shape: two normalized, weight-normalized 3 x 3 convolutions and a skip."""
    return ResidualBlock(
        in_norm=nn.BatchNorm2d(channels),
        in_relu=nn.ReLU(),
        in_conv=WeightNormConv2d(channels, channels, 3, bias=False),
        out_norm=nn.BatchNorm2d(channels),
        out_relu=nn.ReLU(),
        out_conv=WeightNormConv2d(channels, channels, 3),
    )


class ResidualNet(nn.Module):
    """x: (N, C, H, W) -> (N, 2 C, H, W): RealNVP's scale-and-shift network, with a skip from every block to the end.

    masked: half of the pixels are 0, so the normalized input is doubled.
    """

    def __init__(self, channels: int, width: int, blocks: int, masked: bool):
        super().__init__()
        self.masked = masked
        self.in_norm = nn.BatchNorm2d(channels)
        self.in_conv = WeightNormConv2d(2 * channels, width, 3)
        self.in_skip = WeightNormConv2d(width, width, 1)
        self.blocks = nn.ModuleList(_residual_block(width) for _ in range(blocks))
        self.skips = nn.ModuleList(WeightNormConv2d(width, width, 1) for _ in range(blocks))
        self.out_norm = nn.BatchNorm2d(width)
        self.out_conv = WeightNormConv2d(width, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.in_norm(x)
        if self.masked:
            h = 2 * h
        h = self.in_conv(torch.cat((h, -h), 1).relu())
        skips = self.in_skip(h)
        for block, skip in zip(self.blocks, self.skips, strict=True):
            h = block(h)
            skips = skips + skip(h)
        return self.out_conv(self.out_norm(skips).relu())


class ImageFlow(Flow):
    """A flow of images whose couplings have `ResidualNet`s."""

    def __init__(self, layers, shape: Sequence[int], levels: int | None = 256, reversible: bool = False):
        super().__init__([Logit(0.90), *layers], shape, levels, reversible=reversible)

    def load_published(self, state: dict):
        """Take the weights of FlowGMM's network from its state dict, layer by layer.

        A layer's tensors are `*.st_net.*` and `*.rescale.*` of a coupling, `*.weight` (C, C, 1, 1) and `*.bias` of a
        1 x 1 convolution, `*.weight` (C,), `*.bias` and `*.initialized` of an ActNorm, there (x + bias) exp(weight).
        Raises `UserError` for another architecture.
        """
        published = {}  # a layer's place in the published network -> its tensors
        for name, value in state.items():
            place = re.split(r"(?:st_net|rescale)\.|\w+$", name)[0]
            published.setdefault(place, {})[name.removeprefix(place)] = value
        places = sorted(published, key=lambda place: [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", place)])
        layers = [layer for layer in self.layers if isinstance(layer, (ImageCoupling, ActNorm, InvertibleConv))]
        kinds = [_published_kind(published[place]) for place in places]
        for kind, what in _PUBLISHED_KINDS.items():
            here = sum(isinstance(layer, kind) for layer in layers)
            if kinds.count(kind) != here:
                raise UserError(f"the state dict has {kinds.count(kind)} {what}, this flow {here}")
        for layer, place, kind in zip(layers, places, kinds, strict=True):
            if not isinstance(layer, kind):
                raise UserError(f"the state dict has one of its {_PUBLISHED_KINDS[kind]} at {place}, this flow has not")
            load_weights(layer, _published_layer(kind, published[place]), place.removesuffix("."))


_PUBLISHED_KINDS = {ImageCoupling: "couplings", ActNorm: "ActNorms", InvertibleConv: "1 x 1 convolutions"}


def _published_kind(tensors: dict) -> type[nn.Module]:
    if "weight" not in tensors:
        return ImageCoupling
    return InvertibleConv if tensors["weight"].dim() == 4 else ActNorm


def _published_layer(kind: type[nn.Module], tensors: dict) -> dict[str, Tensor]:
    """The tensors of a published layer -> its state dict here."""
    if kind is InvertibleConv:
        return {"W": tensors["weight"].flatten(1), "bias": tensors["bias"]}
    if kind is ActNorm:
        return {"logs": tensors["weight"], "bias": -tensors["bias"]}
    weights = {
        name.replace("st_net.", "net.", 1).replace(".conv.", "."): value
        for name, value in tensors.items()
        if name.startswith("st_net.")
    }
    if "rescale.weight_g" in tensors:  # the weight-normalised gain g v / |v| of one entry is g sign(v)
        weights["gain"] = (tensors["rescale.weight_g"] * tensors["rescale.weight_v"].sign()).flatten()
    return weights


def coupling_steps(channels, width, blocks, changed: Sequence[str], conv=False, actnorm=False) -> list[nn.Module]:
    """One coupling for each entry of `changed`, each preceded by an ActNorm and a 1 x 1 convolution if asked for."""
    layers = []
    for part in changed:
        if actnorm:
            layers.append(ActNorm(channels, variance_floor=0.2))
        if conv:
            layers.append(InvertibleConv(channels, rotation=True))
        masked = part in ("even", "odd")
        net = ResidualNet(channels if masked else channels // 2, width, blocks, masked)
        layers.append(ImageCoupling(net, channels, part))
    return layers


CHECKERBOARD = ("even", "odd", "even")
HALVES = ("first", "second", "first")


class RealNVP(ImageFlow):
    """x: (N, *shape) in [0, 1] -> z (N, D), logdet (N,): FlowGMM's RealNVP for images of 32 x 32.

    All scales but the last have three checkerboard couplings, a squeeze and three couplings of channel halves with
    twice the width, then factor out half of the channels; the last scale has four checkerboard couplings.

    shape: (C, H, W).   scales: number of scales.   width: of the networks at the first scale.   blocks: residual blocks
    per network.   conv: an invertible 1 x 1 convolution before each coupling.   actnorm: an ActNorm before that.
    doubling: whether the width doubles with each squeeze.   options: levels, reversible, see `Flow`.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        scales: int = 2,
        width: int = 64,
        blocks: int = 8,
        conv: bool = False,
        actnorm: bool = False,
        doubling: bool = True,
        **options,
    ):
        layers, channels = [], shape[0]
        for _ in range(scales - 1):
            layers += coupling_steps(channels, width, blocks, CHECKERBOARD, conv, actnorm)
            layers.append(Squeeze())
            width = 2 * width if doubling else width
            layers += coupling_steps(4 * channels, width, blocks, HALVES, conv, actnorm)
            layers.append(FactorOut(2 * channels))
            channels = 2 * channels
        layers += coupling_steps(channels, width, blocks, (*CHECKERBOARD, "odd"), conv, actnorm)
        super().__init__(layers, shape, **options)


class RealNVPMNIST(RealNVP):
    """x: (N, *shape) in [0, 1] -> z (N, D), logdet (N,): FlowGMM's RealNVP for MNIST, 16 couplings of one width.

    Arguments as of `RealNVP`; the sides must be divisible by 4.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), width: int = 64, blocks: int = 4, **options):
        super().__init__(shape, 3, width, blocks, doubling=False, **options)
