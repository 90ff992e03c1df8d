"""Supervised training on the labeled images alone: the baseline that every other method has to beat."""

from torch.nn import functional as F

from .classifier import ImageClassifier
from .terms import average


class Supervised(ImageClassifier):
    """batch: images (B, 3, H, W), y (B,) -> cross-entropy (), metrics."""

    def forward(self, batch, step):
        _, logits = self.classify(batch["images"])
        loss = F.cross_entropy(logits, batch["y"])
        return loss, {"loss_x": average(loss)}
