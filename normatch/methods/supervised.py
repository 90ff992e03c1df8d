"""Supervised training on the labelled images alone: the baseline that every other method has to beat."""

from torch import nn
from torch.nn import functional as F

from .metrics import average


class Supervised(nn.Module):
    """features: (B, D), logits: (B, K), y: (B,) -> cross-entropy, metrics."""

    uses_unlabeled = False
    flows = ()

    def __init__(self, features: int, classes: int, config):
        super().__init__()

    def forward(self, features, logits, y, u_y, step):
        loss = F.cross_entropy(logits, y)
        return loss, {"loss_x": average(loss)}
