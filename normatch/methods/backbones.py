"""Backbones: images (N, 3, H, W) -> features (N, D), and the linear classifier on top of one."""

import re

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError


class WideResNet(nn.Module):
    """x: (N, 3, H, W) -> features (N, D), D = `self.features`: the pre-activation wide residual network.

    Zagoruyko & Komodakis (2016) as FixMatch uses it: LeakyReLU(0.1), BatchNorm momentum 0.001, global average
    pooling after the last activation. Three stages where depth = 6 n + 4 (28-2, 28-8, 10-1), four stages where
    depth = 8 n + 5 (37-2, for 96-pixel images); the shortcut convolutions count towards the depth.

    `transition` says what the first block of a stage feeds to its convolution and to its shortcut:
    "activated", act(bn(x)) to both, as published by Zagoruyko & Komodakis; "raw", x itself to both from the
    second stage on, as in the published NorMatch code, where the activation is computed and thrown away.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 2,
        transition: str = "activated",
        bn_momentum: float = 0.001,
        mixing: bool = False,
    ):
        super().__init__()
        self.mixing = mixing
        if transition not in ("activated", "raw"):
            raise ValueError(f"transition must be 'activated' or 'raw', not {transition!r}")
        if depth >= 10 and (depth - 4) % 6 == 0:
            stages, blocks = 3, (depth - 4) // 6
        elif depth >= 13 and (depth - 5) % 8 == 0:
            stages, blocks = 4, (depth - 5) // 8
        else:
            raise UserError(
                f"a wide ResNet has depth 6n+4 (10, 16, 22, 28, ...) or 8n+5 (13, 21, 29, 37, ...), not {depth}"
            )
        if widen < 1:
            raise UserError(f"a wide ResNet is widened by 1 or more, not by {widen}")

        widths = [16] + [16 * widen * 2**i for i in range(stages)]
        self.features = widths[-1]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        for i in range(stages):
            raw = transition == "raw" and i > 0
            stage = _Stage(blocks, widths[i], widths[i + 1], stride=1 if i == 0 else 2, raw=raw, momentum=bn_momentum)
            self.add_module(f"block{i + 1}", stage)
        self.stages = stages
        self.bn1 = nn.BatchNorm2d(self.features, momentum=bn_momentum)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.conv1(x)
        for i in range(self.stages):
            x = self.get_submodule(f"block{i + 1}")(x)
        x = _act(self.bn1(x))
        return (mix(x) if self.mixing and self.training else x).mean((2, 3))


def mix(x: torch.Tensor) -> torch.Tensor:
    """x: (N, C, H, W) -> (N, C, H, W), NorMatch's `--mixing`: in half of the calls, mixes each channel with another.

    LeakyReLU(0.1)(a x + (1 - a) x'), x' the channels of x in a random order, without a gradient, and a = max(b, 1 - b)
    for b ~ Beta(0.1, 0.1). Decided and drawn on the device.
    """
    noise = torch.rand(2, device=x.device)
    # A Gamma(1.1) variable times the tenth power of a uniform one is Gamma(0.1); two of those make Beta(0.1, 0.1).
    gammas = torch._standard_gamma(torch.full((2,), 1.1, device=x.device)).log() + 10 * noise.log()
    a = gammas.softmax(0).amax().to(x.dtype)
    mixed = _act(a * x + (1 - a) * x.detach()[:, torch.randperm(x.shape[1], device=x.device)])
    return torch.where(torch.rand((), device=x.device) < 0.5, mixed, x)


class _Stage(nn.Module):
    def __init__(self, blocks, width_in, width_out, stride, raw, momentum):
        super().__init__()
        first = _Block(width_in, width_out, stride, raw, momentum)
        self.layer = nn.Sequential(
            first, *(_Block(width_out, width_out, 1, False, momentum) for _ in range(blocks - 1))
        )

    def forward(self, x):
        return self.layer(x)


class _Block(nn.Module):
    def __init__(self, width_in, width_out, stride, raw, momentum):
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(width_in, momentum=momentum)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out, momentum=momentum)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        same = width_in == width_out
        # named as in the published state dicts
        self.convShortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x):
        if self.raw:
            if self.training:
                self.bn1(x)  # only its running statistics move, as in the published code
            residual = x
        else:
            residual = _act(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(residual)
        return shortcut + self.conv2(_act(self.bn2(self.conv1(residual))))


def _act(x):
    return F.leaky_relu(x, 0.1, inplace=True)


class Classifier(nn.Module):
    """x: (N, 3, H, W) -> features (N, D), logits (N, K): a backbone and a linear layer.

    `backbone` is any module that maps images to (N, D), or to maps (N, D, h, w), which are then averaged. D is
    found with one forward pass of an `image_size` image.
    """

    def __init__(self, backbone: nn.Module, classes: int, image_size: int = 32):
        super().__init__()
        self.backbone = backbone
        self.features = feature_width(backbone, image_size)
        self.fc = nn.Linear(self.features, classes)
        nn.init.xavier_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        features = _pooled(self.backbone(x))
        return features, self.fc(features)


def _pooled(x):
    return x.mean((2, 3)) if isinstance(x, torch.Tensor) and x.ndim == 4 else x


@torch.no_grad()
def feature_width(backbone: nn.Module, image_size: int = 32) -> int:
    """The D of the features (N, D) that `backbone` makes of (N, 3, image_size, image_size) images."""
    training = backbone.training
    parameter = next(backbone.parameters(), torch.empty(0))
    x = torch.zeros(2, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    try:
        features = _pooled(backbone.eval()(x))
    except RuntimeError as error:
        raise UserError(f"the backbone does not take {image_size} x {image_size} images: {error}") from error
    finally:
        backbone.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise UserError(
            f"a backbone must return features (N, D) or maps (N, D, h, w); this one returns {shape} for N=2"
        )
    return features.shape[1]


def build_backbone(
    name: str,
    transition: str = "activated",
    bn_momentum: float | None = None,
    image_size: int = 32,
    mixing: bool = False,
) -> nn.Module:
    """`wrn-DEPTH-WIDEN`, `resnet18`, `resnet50`, `torchvision:NAME` or `timm:NAME` -> a module that returns features.

    `bn_momentum` is in PyTorch's sense (the weight of the new batch) and None keeps the network's own: 0.001 for
    wide ResNets, 0.1 for torchvision's. `mixing`: of wide ResNets alone, see `mix`. Raises `UserError` for a name that
    none of the sources knows.
    """
    source, _, model = name.rpartition(":")
    if not source and model.startswith("wrn-"):
        numbers = re.fullmatch(r"wrn-(\d{1,4})-(\d{1,4})", model, re.ASCII)
        if numbers is None:
            raise UserError(f"backbone {name!r}: a wide ResNet is named wrn-DEPTH-WIDEN, such as wrn-28-2")
        momentum = 0.001 if bn_momentum is None else bn_momentum
        return WideResNet(int(numbers[1]), int(numbers[2]), transition, momentum, mixing)
    if mixing:
        raise UserError(f"mixing is a part of the wide ResNets, backbone {name!r} has none")

    if source == "torchvision" or (not source and model in ("resnet18", "resnet50")):
        backbone = _torchvision(model)
    elif source == "timm":
        backbone = _timm(model, image_size)
    else:
        raise UserError(
            f"unknown backbone {name!r}: give wrn-DEPTH-WIDEN, resnet18, resnet50, torchvision:NAME or timm:NAME"
        )
    if bn_momentum is not None:
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum
    return backbone


def _torchvision(name):
    try:
        from torchvision import models
    except Exception as error:  # a torchvision built for another torch fails with anything but ImportError
        raise UserError(f"backbone {name!r} needs torchvision, which does not import here: {error}") from error
    if name not in models.list_models(models):
        raise UserError(f"torchvision.models has no {name!r}; see torchvision.models.list_models()")
    # Auxiliary heads would change the output's type; only the two Inception models have them.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    backbone = models.get_model(name, weights=None, **options)
    heads = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if heads:  # the last linear layer is the classifier; SqueezeNet alone has none, and keeps its 1,000 outputs
        backbone.set_submodule(heads[-1], nn.Identity())
    return backbone


def _timm(name, image_size):
    try:
        import timm
    except ImportError as error:
        raise UserError(f"backbone 'timm:{name}' needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; see timm.list_models()")
    return timm.create_model(name, num_classes=0)
