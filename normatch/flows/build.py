"""Flows and densities from a configuration: any object with the keys of `normatch train` as attributes."""

import math

import torch
from torch import Tensor, nn

from ..errors import UserError
from .density import FlowClassifier, GaussianMixture
from .flow import initialize
from .glow import Glow, GlowMNIST
from .realnvp import RealNVP, RealNVPMNIST, RealNVPTabular
from .scnf import SCNF, ConditionalFlow, MaskedGlow, PointFlow

ROW_FLOWS = ("tabular", "toy")  # they take rows of numbers, an image's pixels too

# flow: its class, how often it halves an image, its options
IMAGE_FLOWS = {
    "realnvp": (RealNVP, None, {}),
    "realnvp-1x1": (RealNVP, None, {"conv": True}),
    "realnvp-1x1-actnorm": (RealNVP, None, {"conv": True, "actnorm": True}),
    "realnvp-mnist": (RealNVPMNIST, 2, {}),
    "glow": (Glow, None, {}),
    "glow-mnist": (GlowMNIST, 2, {}),
    "mnist-masked": (MaskedGlow, 2, {}),
}

CONV_FORMS = {"full": "full", "hh": "householder", "qr": "qr"}  # SCNF's names of the 1 x 1 convolutions


def make_flowgmm(config, shape: tuple[int, ...], classes: int, x: Tensor | None = None) -> FlowClassifier:
    """A flow with a mixture for samples of this shape, (D,) or (C, H, W); the means are 0 until they are placed.

    x: (n, *shape), training samples that initialize the ActNorms; without them the density waits for weights.
    """
    flow = make_flow(config, shape)
    if x is not None:
        initialize(flow, x[:512])
    return FlowClassifier(flow, make_prior(config, torch.zeros(classes, math.prod(shape))))


def make_scnf(config, shape: tuple[int, ...], classes: int, x: Tensor | None = None, y: Tensor | None = None) -> SCNF:
    """A semi-conditional flow for samples of this shape, (D,) or (C, H, W).

    x: (n, *shape), y: (n,), labeled training samples, which set the ActNorms and p(y); without them the density waits
    for weights. Raises `UserError` for sizes that do not fit.
    """
    f = make_flow(config, shape)
    deep = config.ssl_dim or f.features
    if deep > f.features:
        raise UserError(f"ssl_dim is {deep}, but a sample has only {f.features} dimensions")
    h = "shift"
    if config.ssl_model == "cond-flow":
        if deep < 4 ** (config.ssl_l - 1) * 2:
            raise UserError(f"{deep} dimensions have no room for ssl_l {config.ssl_l}: take --ssl_l 1")
        form, factors = CONV_FORMS[config.ssl_conv], config.ssl_hh
        h = ConditionalFlow(deep, max(10, classes), config.ssl_l, config.ssl_k, config.ssl_hd, form, factors)
    model = SCNF(f, h, classes, deep, None if y is None else torch.bincount(y, minlength=classes))
    if x is not None:  # with the noise of training, without which pixels that are always 0 have no deviation
        x = x[:512]
        initialize(model, x + config.noise * torch.randn_like(x))
    return model


def make_flow(config, shape: tuple[int, ...]) -> nn.Module:
    """The flow that `config.flow` names, for samples of this shape: (D,) or (C, H, W)."""
    if config.flow == "toy":
        return PointFlow(*shape, config.couplings, config.hidden)
    if config.flow == "tabular":
        return RealNVPTabular(
            *shape, config.couplings, config.hidden, config.layers, config.dropout, zero_init=config.zero_init
        )
    kind, halvings, options = IMAGE_FLOWS[config.flow]
    if kind is Glow and shape[0] < 2:
        raise UserError("flow glow couples the halves of the channels, and a gray image has one: take glow-mnist")
    if halvings is None:
        halvings, options = config.flow_scales - (kind is not Glow), {**options, "scales": config.flow_scales}
    if shape[1] % 2**halvings or shape[2] % 2**halvings:
        raise UserError(
            f"flow {config.flow} halves an image {halvings} times: its side, {shape[1]}, must be divisible by "
            f"{2**halvings}; --image_size gives another"
        )
    if kind is MaskedGlow:
        form = CONV_FORMS[config.conv]
        return MaskedGlow(shape, config.flow_width, form, config.hh_factors, reversible=config.reversible)
    return kind(shape, width=config.flow_width, blocks=config.flow_blocks, reversible=config.reversible, **options)


def make_prior(config, means: Tensor) -> GaussianMixture:
    """means: (K, D) -> the mixture of width `config.sigma`; `config` says which of its parameters are trained."""
    trained = {"means": "means", "rho": "covs", "mixture_logits": "weights"}
    rho = torch.full((len(means),), config.sigma + math.log(-math.expm1(-config.sigma)))  # softplus(rho) = sigma
    trainable = tuple(name for name, key in trained.items() if getattr(config, f"{key}_trainable"))
    return GaussianMixture(means, rho, trainable=trainable)


def decays(flow: str, name: str) -> bool:
    """Whether FlowGMM's weight decay applies to the parameter `name` of this flow: of image flows only to gains."""
    return flow in ROW_FLOWS or name.endswith(("weight_g", "original0", "gain"))
