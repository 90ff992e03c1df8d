"""FixMatch (Sohn et al. 2020, arXiv 2001.07685): confident predictions on weak views label the strong views."""

from torch import nn
from torch.nn import functional as F

from .metrics import average


class FixMatch(nn.Module):
    """features: (B + 2 N_u, D), logits: (B + 2 N_u, K), y: (B,), u_y: (N_u,) -> loss, metrics.

    Rows are the labelled images, the weak and the strong views of the unlabelled ones. L = L_x + lambda_u L_u.
    u_y, the true labels where they are known and -1 where not, goes into the metrics only.
    """

    uses_unlabeled = True
    flows = ()

    def __init__(self, features: int, classes: int, config):
        super().__init__()
        self.config = config

    def forward(self, features, logits, y, u_y, step):
        config = self.config
        n = len(u_y)
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


def consistency(logits_weak, logits_strong, T, p_cutoff, hard_label, mask_temperature=1.0):
    """logits_weak, logits_strong: (N_u, K) -> L_u (scalar), mask, confidence, pseudo-labels (N_u,).

    L_u = 1/N_u sum_i 1[max_k p_ik >= p_cutoff] H(target_i, softmax(logits_strong_i)), eq. 4 of the paper, the mean
    over all rows. The target is argmax_k p_ik, or with soft labels softmax(logits_weak / T), eq. 5.
    p = softmax(logits_weak / mask_temperature); kekmodel's published code puts T there, the paper 1.
    """
    logits_weak = logits_weak.detach()
    confidence, pseudo_label = (logits_weak / mask_temperature).softmax(1).max(1)
    mask = (confidence >= p_cutoff).to(logits_strong.dtype)
    target = pseudo_label if hard_label else (logits_weak / T).softmax(1)
    loss_u = (F.cross_entropy(logits_strong, target, reduction="none") * mask).mean()
    return loss_u, mask, confidence, pseudo_label
