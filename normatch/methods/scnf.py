"""SCNF (Atanov et al. 2019, INNF, arXiv 1905.00505): a flow whose last dimensions alone depend on the class.

One pass of the large flow gives the density of a sample under every class, so that an unlabeled sample, whose class is
summed out, costs hardly more than a labeled one.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from ..config import NonNegative, Positive, Weight, key
from ..flows.build import make_scnf
from .density import DensityKeys, DensityMethod
from .terms import average, ramp, two_views


class SCNFKeys(DensityKeys):
    """SCNF's settings, under their published names."""

    ssl_model: Literal["cond-flow", "cond-shift"] = key(
        "cond-flow", "what tells the classes apart: a flow of the deep dimensions, or a shift (a mixture)"
    )
    ssl_dim: NonNegative = key(0, "deep dimensions; 0: all")
    ssl_l: Positive = key(2, "levels of the conditional flow; all but the last factor out half of the dimensions")
    ssl_k: Positive = key(4, "couplings per level of the conditional flow")
    ssl_hd: Positive = key(256, "width of the conditional flow's networks")
    ssl_conv: Literal["full", "hh", "qr"] = key("full", "form of the conditional flow's 1 x 1 convolutions")
    ssl_hh: Positive = key(2, "Householder reflections of each of them")
    cl_weight: Weight = key(0.0, "weight of the cross-entropy of labeled samples")


class SemiConditional(DensityMethod):
    """batch: images (B + U, ...) or (B + 2U, ...), y (B,), u_y (U,) -> loss, metrics; `density`: an SCNF.

    The samples are the labeled ones, the unlabeled ones and, for images, second views of the unlabeled ones, which then
    are the ones learned from.

        L = -(w sum_labeled log p(x | y) + sum_unlabeled log p(x)) / (w B + U)
            + cl_weight CE + r consistency_weight L_c

    with w = label_weight (published: sup_weight) and CE = -mean_labeled log p(y | x), in nats (section 2.3 of the
    paper). log p(y) is left out of the first term, where it is a constant. L_c, which the published SCNF lacks:
    -mean_unlabeled log p(y' | x'), with y' the class that the other view of x' is given (FlowGMM's consistency); r
    rises from 0 to 1 over the first `consistency_rampup` steps.
    u_y, the true labels where they are known and -1 where not, only enters the metrics.
    """

    Keys = SCNFKeys

    def build(self, task, x, y):
        return make_scnf(self.config, self.shape, len(task.classes), x, y)

    def forward(self, batch, step):
        config, y, u_y = self.config, batch["y"], batch["u_y"]
        b, u = len(y), len(u_y)
        consistent = config.consistency_weight > 0 and u > 0
        views, second = two_views(self.inputs(batch["images"]), b, u, config.noise)
        with self.autocast(views):
            if consistent:
                with torch.no_grad():
                    guess = self.density(second).class_log_prob.argmax(1)
            out = self.density(views)

        joint = out.class_log_prob[:b].gather(1, y[:, None])[:, 0] + out.logdet[:b]
        labeled = joint - self.density.log_class_prior()[y]
        loss = -(config.label_weight * labeled.sum() + out.log_prob[b:].sum()) / (config.label_weight * b + u)
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

    def groups(self):
        """One group, in which everything decays, as published."""
        return [{"params": list(self.density.parameters()), **self.recipe()}]
