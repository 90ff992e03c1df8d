"""FlowGMM (Izmailov et al. 2020, ICML, arXiv 1912.13025): a flow whose latent space holds a Gaussian for each class.

The density of a labeled sample is that of its class, the density of any other the mixture's. The class posterior, in
which the Jacobian cancels, is the classifier.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, FiniteFloat
from torch.nn import functional as F

from ..config import Weight, key
from ..flows.build import decays, make_flowgmm
from .density import DensityKeys, DensityMethod
from .means import MEANS, place_means
from .terms import average, ramp, two_views


class FlowGMMKeys(DensityKeys):
    """FlowGMM's settings."""

    means: Literal[tuple(MEANS)] = key(
        "random", "where the classes' Gaussians stand; docs/flowgmm.md explains each rule"
    )
    means_r: FiniteFloat = key(1.0, "scale of the means")
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(1.0, "width of the Gaussians")
    means_trainable: bool = key(False, "train the means")
    weights_trainable: bool = key(False, "train the classes' shares")
    covs_trainable: bool = key(False, "train the widths")
    lr_gmm: Weight = key(1e-2, "learning rate of what is trained of the mixture")
    labeled_loss: Literal["joint", "classes"] = key(
        "joint", "-log p(x, y) of labeled samples, or -log p(y | x) with -log p(x)"
    )


class FlowGMM(DensityMethod):
    """batch: images (B + U, ...) or (B + 2U, ...), y (B,), u_y (U,) -> loss, metrics; `density`: a FlowClassifier.

    The samples are the labeled ones, the unlabeled ones and, for images, second views of the unlabeled ones, which then
    are the ones learned from.

        L = label_weight L_x + lambda_u L_u + r consistency_weight L_c

    L_x with labeled_loss "joint": -log p(x, y), the mean over labeled samples, eq. 8 of the paper; with "classes":
    -log p(y | x), the cross-entropy. L_u: -log p(x), the mean over unlabeled samples and, with "classes", over the
    labeled ones too, so that the two forms are one objective, p(x, y) = p(y | x) p(x), but for their weights. L_c:
    -log p(x' | y'), the mean over unlabeled samples x', with y' the class that their other views are given, section 4.
    r rises from 0 to 1 over the first `consistency_rampup` steps. Densities are in nats, in the units of the input.

    `noise` is added to all rows in training; without it, values on a grid have an unbounded density.
    u_y, the true labels where they are known and -1 where not, only enters the metrics.
    """

    Keys = FlowGMMKeys

    def build(self, task, x, y):
        config, classes = self.config, len(task.classes)
        density = make_flowgmm(config, self.shape, classes, x)
        if x is not None:
            means = place_means(config.means, config.means_r, classes, density.flow, x, y, self.shape)
            density.prior.means.data.copy_(means)
        return density

    def forward(self, batch, step):
        config, y, u_y = self.config, batch["y"], batch["u_y"]
        b, u = len(y), len(u_y)
        consistent = config.consistency_weight > 0 and u > 0
        if not (config.lambda_u or consistent):
            u, u_y = 0, u_y[:0]  # labeled only: the rest need not be looked at
        views, second = two_views(self.inputs(batch["images"]), b, u, config.noise)
        with self.autocast(views):
            if consistent:
                with torch.no_grad():  # first, as published, so that BatchNorm sees the other views last
                    guess = self.density(second).class_log_prob.argmax(1)
            out = self.density(views)

        of_class = out.class_log_prob[:b].gather(1, y[:, None])[:, 0]
        joint = config.labeled_loss == "joint"
        loss_x = -(of_class + out.logdet[:b]).mean() if joint else F.cross_entropy(out.class_log_prob[:b], y)
        loss = config.label_weight * loss_x
        metrics = {"loss_x": average(loss_x)}
        if u:
            loss_u = -out.log_prob[b if joint else 0 :].mean()
            loss = loss + config.lambda_u * loss_u
            metrics["loss_u"] = average(loss_u)
        if consistent:
            pi = self.density.log_class_prior()
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

    def groups(self):
        """The flow, and the mixture with its own rate and no decay; each clipped by itself, as published.

        In image flows, only the gains of weight-normalized layers decay.
        """
        prior = [p for p in self.density.prior.parameters() if p.requires_grad]
        named = [(name, p) for name, p in self.density.flow.named_parameters() if p.requires_grad]
        decaying = [p for name, p in named if decays(self.config.flow, name)]
        rest = [p for name, p in named if not decays(self.config.flow, name)]
        return [
            {"params": decaying, **self.recipe()},
            {"params": rest, **self.recipe(), "weight_decay": 0.0},
            {"params": prior, **self.recipe(), "weight_decay": 0.0, "lr": self.config.lr_gmm},
        ]
