"""FlowGMM (Izmailov et al. 2020, ICML, arXiv 1912.13025): a flow whose latent space holds a Gaussian for each class.

The density of a labelled row is that of its class, the density of any other the mixture's; the class posterior, whose
Jacobian cancels, is the classifier.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from .metrics import average
from .normatch import ramp

MEANS = (
    "random", "circle", "diagonal", "simplex", "antipodal", "pixel_const", "split_dims", "split_dims_v2",
    "from_data", "from_latent", "from_z", "random_data", "spread",
)  # fmt: skip


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


def place_means(rule: str, r: float, classes: int, flow, x, y, shape=None, generator=None) -> torch.Tensor:
    """-> (K, D) means by one of the rules MEANS, each scaled by r.

    flow: x -> z (n, D), logdet, untrained.   x: (n, ...) some training rows, y: (n,) their labels, of which every
    class has at least one, -1 elsewhere.   shape: (C, H, W) of an image's samples, for split_dims_v2.

    random         N(0, I): nearly orthogonal in many dimensions
    circle         in the first two coordinates, at equal angles, radius r
    diagonal       on the line through all corners, from (-r, ...) to (r, ...)
    simplex        pairwise distance r; on a circle where D < K - 1
    antipodal      +-3.75 in a random direction for two classes, 0.56 N(0, I) for more (published for tables), times r
    pixel_const    k - (K - 2) / 2 in every coordinate
    split_dims     1 in the k-th part of D // K coordinates, 0 elsewhere
    split_dims_v2  1 in a horizontal stripe of one channel, 0 elsewhere
    from_data      the mean of a class's rows
    from_latent    the mean of their latent points, f(x)
    from_z         the latent point of their mean
    random_data    the latent point of a class's first row
    spread         from_latent, centred and pushed apart to a mean pairwise distance of at least r

    The first eight look at no data: in few dimensions the classes then have to be carried to where their means happen
    to be, and unlabelled rows settle at the wrong ones. `spread` starts where the classes are.
    """
    features = x[0].numel() if len(x) else int(np.prod(shape))
    k = torch.arange(classes, dtype=torch.float32)
    means = torch.zeros(classes, features)
    if rule == "random":
        means = r * torch.randn(classes, features, generator=generator)
    elif rule == "circle":
        angle = 2 * torch.pi * k / classes
        if classes > 1:
            means[:, 0], means[:, 1] = r * angle.cos(), r * angle.sin()
    elif rule == "diagonal":
        means[:] = r * (2 * k / max(1, classes - 1) - 1)[:, None] if classes > 1 else 0.0
    elif rule == "simplex":
        means = r * simplex(classes, features)
    elif rule == "antipodal":
        means = 0.56 * r * torch.randn(classes, features, generator=generator)
        if classes == 2:
            first = 3.75 * r * F.normalize(means[0], dim=0)
            means = torch.stack((first, -first))
    elif rule == "pixel_const":
        means[:] = r * (k - (classes - 2) / 2)[:, None]
    elif rule == "split_dims":
        part = features // classes
        if not part:
            raise UserError(
                f"means split_dims: {features} dimensions are too few for a part for each of {classes} classes"
            )
        for label in range(classes):
            means[label, label * part : (label + 1) * part] = r
    elif rule == "split_dims_v2":
        if shape is None or len(shape) != 3:
            raise UserError("means split_dims_v2 are stripes of an image: of rows take split_dims")
        channels, height, _ = shape
        if channels * height < classes:
            raise UserError(
                f"means split_dims_v2: an image of {height} rows has no stripe for each of {classes} classes"
            )
        picture = means.view(classes, *shape)
        # The classes are dealt to the channels, the more to the last: 3 + 3 + 4.
        for channel, own in enumerate(np.array_split(np.arange(classes)[::-1], channels)[::-1]):
            for rows, label in zip(np.array_split(np.arange(height), max(1, len(own))), own[::-1], strict=False):
                picture[label, channel, rows] = r
    elif rule == "from_data":
        means = r * class_means(x.flatten(1).cpu(), y, classes)
    elif rule == "from_z":
        means = r * latent(flow, class_means(x.flatten(1), y, classes).view(classes, *x.shape[1:]))
    else:
        z = latent(flow, x)
        if rule == "random_data":
            means = r * torch.stack([z[y == label][0] for label in range(classes)])
        else:
            means = class_means(z, y, classes)
            if rule == "from_latent":
                means = r * means
            else:
                means = means - means.mean(0)
                if classes > 1:
                    means = means * (r / torch.pdist(means).mean().clamp(min=1e-6)).clamp(min=1.0)
    return means.to(x.dtype).cpu()


def simplex(classes: int, features: int) -> torch.Tensor:
    """-> (K, D) points of pairwise distance 1, around the origin; where D < K - 1, on a circle, neighbours 1 apart."""
    points = torch.zeros(classes, features)
    if features >= classes - 1:
        u, s, _ = torch.linalg.svd(torch.eye(classes) - 1 / classes)
        points[:, : classes - 1] = (u * s / 2**0.5)[:, : classes - 1]
        return points
    angle = 2 * torch.pi * torch.arange(classes) / classes
    radius = 0.5 / np.sin(np.pi / classes)
    points[:, 0] = radius * angle.cos()
    if features > 1:
        points[:, 1] = radius * angle.sin()
    return points


def class_means(x, y, classes: int) -> torch.Tensor:
    """x: (n, D), y: (n,) -> (K, D); rows of label -1 are in none."""
    member = F.one_hot(y.clamp(min=0), classes).to(x) * (y >= 0)[:, None].to(x)
    return (member.T @ x) / member.sum(0)[:, None]


@torch.no_grad()
def latent(flow, x, rows: int = 256) -> torch.Tensor:
    """x: (n, ...) -> z (n, D), in evaluation mode."""
    training = flow.training
    flow.eval()
    z = torch.cat([flow(part)[0] for part in x.split(rows)])
    flow.train(training)
    return z
