"""FixMatch (Sohn et al. 2020, arXiv 2001.07685): confident predictions on weak views label the strong views."""

from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from ..config import Positive, Share, Weight, key
from .classifier import ClassifierKeys, ImageClassifier
from .terms import average, consistency


class PseudoLabelKeys(ClassifierKeys):
    """The settings of the methods that learn from the classifier's own pseudo-labels."""

    uratio: Positive = key(7, "unlabeled images per step, as a multiple of batch_size (mu)")
    lambda_u: Weight = key(1.0, "weight of the unlabeled loss")
    T: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(1.0, "temperature of the pseudo-labels")
    p_cutoff: Share = key(0.95, "confidence threshold of FixMatch; for NorMatch only reported")
    hard_label: bool | None = key(
        None, "one-hot pseudo-labels; none: as published, yes for fixmatch and three voters, no for normatch"
    )

    @property
    def one_hot(self) -> bool:
        """Whether pseudo-labels are one-hot."""
        return True if self.hard_label is None else self.hard_label


class FixMatch(ImageClassifier):
    """batch: images (B + 2 N_u, 3, H, W), y (B,), u_y (N_u,) -> loss, metrics.

    The images are the labeled ones, the weak and the strong views of the unlabeled ones. L = L_x + lambda_u L_u.
    u_y, the true labels where they are known and -1 where not, only enters the metrics.
    """

    Keys = PseudoLabelKeys

    def forward(self, batch, step):
        config, y, u_y = self.config, batch["y"], batch["u_y"]
        n = len(u_y)
        _, logits = self.classify(batch["images"])
        logits_x, logits_weak, logits_strong = logits.split((len(y), n, n))
        loss_x = F.cross_entropy(logits_x, y)
        loss_u, mask, confidence, pseudo_label = consistency(
            logits_weak,
            logits_strong,
            config.T,
            config.p_cutoff,
            config.one_hot,
            mask_temperature=config.T if config.compat == "reference" else 1.0,
        )
        loss = loss_x + config.lambda_u * loss_u
        right, known = pseudo_label == u_y, u_y >= 0
        return loss, {
            "loss_x": average(loss_x),
            "loss_u": average(loss_u),
            "mask_ratio": average(mask),
            "confidence": average(confidence),
            "pseudo_label_accuracy": average(right, known),
            "pseudo_label_accuracy_high_confidence": average(right, known & mask.bool()),
        }
