"""SCNF (Atanov et al. 2019, INNF, arXiv 1905.00505): a flow whose last dimensions alone are told the class.

One pass of the large flow gives the density of a sample under every class, so that an unlabelled sample, whose class is
summed out, costs hardly more than a labelled one.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .flowgmm import two_views
from .metrics import average
from .normatch import ramp


class SemiConditional(nn.Module):
    """batch, step -> loss, metrics: `model`, an SCNF, in training; all that is averaged and saved.

    The batch holds images (B + U, ...) or (B + 2U, ...), y (B,) and u_y (U,): its rows are the labelled samples, the
    unlabelled ones and, in images, second views of the unlabelled ones, which then are the ones to learn from.

        L = -(w sum_labelled log p(x | y) + sum_unlabelled log p(x)) / (w B + U)
            + cl_weight CE + r consistency_weight L_c

    with w = label_weight (published: sup_weight) and CE = -mean_labelled log p(y | x), in nats (section 2.3 of the
    paper). log p(y) is left out of the first term, where it is a constant. L_c, which SCNF as published has not:
    -mean_unlabelled log p(y' | x'), with y' the class that the other view of x' is given (FlowGMM's consistency);
    r rises from 0 to 1 over the first `consistency_rampup` steps.
    u_y, the true labels where they are known and -1 where not, goes into the metrics only.
    """

    def __init__(self, model: nn.Module, config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: dict[str, torch.Tensor], step: torch.Tensor):
        config, y, u_y = self.config, batch["y"], batch["u_y"]
        b, u = len(y), len(u_y)
        consistent = config.consistency_weight > 0 and u > 0
        views, second = two_views(batch["images"], b, u, config.noise)
        # The networks in the couplings alone are for bf16; likelihoods stay in fp32.
        with torch.autocast(views.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            if consistent:
                with torch.no_grad():
                    guess = self.model(second).class_log_prob.argmax(1)
            out = self.model(views)

        joint = out.class_log_prob[:b].gather(1, y[:, None])[:, 0] + out.logdet[:b]
        labelled = joint - self.model.log_class_prior()[y]
        loss = -(config.label_weight * labelled.sum() + out.log_prob[b:].sum()) / (config.label_weight * b + u)
        loss_x = F.cross_entropy(out.class_log_prob[:b], y)
        if config.cl_weight:
            loss = loss + config.cl_weight * loss_x
        if consistent:
            loss_c = F.cross_entropy(out.class_log_prob[b:], guess)
            r = ramp(step, config.consistency_rampup)
            loss = loss + r * config.consistency_weight * loss_c
        metrics = {"loss_x": average(loss_x), "log_prob": average(out.log_prob), "logdet": average(out.logdet)}
        if consistent:
            metrics["loss_consistency"] = average(loss_c)
        if u:
            metrics["pseudo_label_accuracy"] = average(out.class_log_prob[b:].argmax(1) == u_y, u_y >= 0)
        return loss, metrics
