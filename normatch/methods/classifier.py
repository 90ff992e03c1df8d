"""What the methods on image classifiers share: a backbone with a linear classifier, and its recipe."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..config import Config, Share, key
from ..errors import UserError
from . import distributed
from .backbones import Classifier, build_backbone
from .base import Method, Task


class ClassifierKeys(Config):
    """The settings of every method on an image classifier."""

    backbone: str = key("wrn-28-2", "wrn-DEPTH-WIDEN, resnet18, resnet50, torchvision:NAME, timm:NAME")
    bn_momentum: Share | None = key(None, "BatchNorm momentum, the weight of the new batch; none: the backbone's own")
    mixing: bool = key(False, "wide ResNets: mix the last channels with each other in half of the batches")
    sync_bn: bool = key(False, "several processes: BatchNorm over the images of all of them")
    channels_last: bool = key(True, "memory format of images and weights")


class ImageClassifier(Method):
    """`classifier`: images (N, 3, H, W) -> features (N, D), logits (N, K), trained by SGD with Nesterov momentum.

    backbone: any module from images to features (N, D) or maps (N, D, h, w), in place of the configured one.
    `classify` runs it under bf16 autocast where the precision says so; losses and likelihoods stay in float32.
    """

    Keys = ClassifierKeys

    def __init__(self, task: Task, config: ClassifierKeys, backbone: nn.Module | None = None):
        super().__init__(task, config)
        if len(task.shape) != 3:
            raise UserError(f"method {config.method} classifies images: for rows of a table take --method flowgmm")
        if config.sync_bn and task.labeled and not distributed.launched():
            raise UserError("sync_bn is for training in several processes: leave it out")
        size = task.shape[1]
        if backbone is None:
            transition = "raw" if config.compat == "reference" else "activated"
            backbone = build_backbone(config.backbone, transition, config.bn_momentum, size, config.mixing)
        self.classifier = Classifier(backbone, len(task.classes), size)
        self.bf16 = False  # `to_device` decides

    @staticmethod
    def prepare(dataset, config):
        if dataset.is_table:
            raise UserError(f"{dataset.name} is a table: the methods that train on tables are flows, --method flowgmm")
        if config.compat == "reference" and dataset.name.startswith("svhn"):
            return replace(dataset, flip=True)  # the paper does not mirror digits
        return dataset

    def to_device(self, device: torch.device):
        """Move to `device` in the configured precision and memory format."""
        super().to_device(device)
        self.bf16 = uses_bf16(self.config.precision, device)
        if self.config.channels_last:
            self.classifier.to(memory_format=torch.channels_last)
        if self.config.sync_bn and distributed.ranks() > 1:
            distributed.synchronize_batch_norm(self.classifier)
        return self

    @property
    def input_dtype(self):
        return torch.bfloat16 if self.bf16 else torch.float32

    def classify(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (N, 3, H, W) -> features (N, D), logits (N, K), in the dtype of the weights."""
        dtype = self.classifier.fc.weight.dtype
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features, logits = self.classifier(x if self.bf16 else x.to(dtype))
        return features.to(dtype), logits.to(dtype)

    def class_log_prob(self, x):
        return {"linear": self.classifier(x)[1]}

    def groups(self):
        config = self.config
        return [
            {**group, "optimizer": "sgd", "lr": config.lr}
            for group in decay_groups(self.classifier, config.weight_decay, by_name=config.compat == "reference")
        ]


def decay_groups(model: nn.Module, weight_decay: float, by_name: bool = False) -> list[dict]:
    """The parameters of `model` in two groups: matrices and filters decay, biases and norms do not.

    by_name: tell them as the published code does, by "bias" or "bn" in the name, which misses the norms of a ResNet's
    shortcuts.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decaying = {name for name, p in named if (not ("bias" in name or "bn" in name) if by_name else p.ndim > 1)}
    return [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs under bf16 autocast: where asked for, and with "auto" where bf16 is native.

    That is on every GPU that there are kernels for, and on CPUs with AMX or AVX-512 BF16 instructions. It is a rule,
    not a trial, so that a run computes the same bits each time. On such a CPU a step takes half the time in bf16, for
    small networks as for large ones; on others bf16 is emulated and slower.
    """
    return precision == "bf16" or (precision == "auto" and (device.type == "cuda" or native_bf16()))


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers in one instruction, according to Linux."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"})
