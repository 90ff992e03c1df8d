"""FlowGMM (Izmailov et al. 2020, ICML, arXiv 1912.13025): a flow whose latent space holds a Gaussian for each class.

The density of a labelled row is that of its class, the density of any other the mixture's; the class posterior, whose
Jacobian cancels, is the classifier.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .metrics import average
from .normatch import ramp


class FlowGMM(nn.Module):
    """batch, step -> loss, metrics: `model`, a flow with its mixture, in training; all that is averaged and saved.

    The batch holds images (B + U, ...) or (B + 2U, ...), y (B,) and u_y (U,): its rows are the labelled samples, the
    unlabelled ones and, in images, second views of the unlabelled ones, which then are the ones to learn from.

        L = label_weight L_x + lambda_u L_u + r consistency_weight L_c

    L_x with labelled_loss "joint": -log p(x, y), the mean over labelled rows, eq. 8 of the paper; with "classes":
    -log p(y | x), the cross-entropy. L_u: -log p(x), the mean over unlabelled rows and, with "classes", over the
    labelled ones too, so that the two forms are one objective, p(x, y) = p(y | x) p(x), but for their weights. L_c:
    -log p(x' | y'), the mean over unlabelled rows x', with y' the class that their other views are given, section 4.
    r rises from 0 to 1 over the first `consistency_rampup` steps. Densities are in nats, of the rows as they are given.

    `noise`: of Gaussian noise on all rows in training, without which values on a grid have an unbounded density.
    u_y, the true labels where they are known and -1 where not, goes into the metrics only.
    """

    def __init__(self, model: nn.Module, config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: dict[str, torch.Tensor], step: torch.Tensor):
        config, y, u_y = self.config, batch["y"], batch["u_y"]
        b, u = len(y), len(u_y)
        consistent = config.consistency_weight > 0 and u > 0
        if not (config.lambda_u or consistent):
            u, u_y = 0, u_y[:0]  # labelled only: the rest need not be looked at
        views, second = two_views(batch["images"], b, u, config.noise)
        bf16 = config.precision == "bf16"  # the networks in the couplings alone; sums and likelihoods stay in fp32
        with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16):
            if consistent:
                with torch.no_grad():  # first, as published, so that BatchNorm sees the other views last
                    guess = self.model(second).class_log_prob.argmax(1)
            out = self.model(views)

        of_class = out.class_log_prob[:b].gather(1, y[:, None])[:, 0]
        joint = config.labelled_loss == "joint"
        loss_x = -(of_class + out.logdet[:b]).mean() if joint else F.cross_entropy(out.class_log_prob[:b], y)
        loss = config.label_weight * loss_x
        metrics = {"loss_x": average(loss_x)}
        if u:
            loss_u = -out.log_prob[b if joint else 0 :].mean()
            loss = loss + config.lambda_u * loss_u
            metrics["loss_u"] = average(loss_u)
        if consistent:
            pi = self.model.log_class_prior()
            likely = (out.class_log_prob[b:] - pi).gather(1, guess[:, None])[:, 0] + out.logdet[b:]
            loss_c = -likely.mean()
            r = ramp(step, config.consistency_rampup)
            loss = loss + r * config.consistency_weight * loss_c
            metrics["loss_consistency"] = average(loss_c)
        metrics["logdet"] = average(out.logdet)
        if u:
            choice = out.class_log_prob[b:].argmax(1)
            metrics["pseudo_label_accuracy"] = average(choice == u_y, u_y >= 0)
        return loss, metrics


def two_views(images, b: int, u: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """images: (B + U, ...) or (B + 2U, ...) -> what to learn from (B + U, ...), other views of its last U rows.

    Of two views the second, the stronger one where the policy makes a difference, is the one to learn from. Where there
    is one, as of tables, the other is the same row. Both get their own draw of Gaussian noise of deviation `noise`.
    """
    views, other = images[: b + u], images[b : b + u]
    if u and len(images) == b + 2 * u:
        views = torch.cat((images[:b], images[b + u :]))
    if noise:
        views, other = (rows + noise * torch.randn_like(rows) for rows in (views, other))
    return views, other
