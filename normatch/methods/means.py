"""Rules that place the K means of a Gaussian-mixture prior in latent space: `MEANS`, applied by `place_means`.

The rules up to `split_dims_v2` look at no data: in few dimensions the flow then has to carry each class to wherever
its mean happens to be, and unlabeled rows settle around the wrong ones. `spread` starts where the classes are.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError


def place_means(rule: str, r: float, classes: int, flow, x, y, shape=None, generator=None) -> Tensor:
    """x: (n, ...), y: (n,) -> (K, D) means by one of the rules in MEANS, scaled by r, on the CPU.

    flow: x -> z (n, D), logdet, untrained.   x, y: some training rows and their labels, -1 where unknown; every class
    has at least one row.   shape: (C, H, W) of a sample, for split_dims_v2.   generator: for the random rules.
    """
    given = Placement(r, classes, math.prod(x.shape[1:]), flow, x, y, shape, generator)
    return MEANS[rule](given).to(x.dtype).cpu()


class Placement(NamedTuple):
    """What a rule may use; see `place_means`."""

    r: float
    classes: int
    features: int
    flow: nn.Module
    x: Tensor
    y: Tensor
    shape: tuple[int, ...] | None
    generator: torch.Generator | None


def random(p: Placement) -> Tensor:
    """N(0, I): nearly orthogonal in many dimensions."""
    return p.r * torch.randn(p.classes, p.features, generator=p.generator)


def circle(p: Placement) -> Tensor:
    """In the first two coordinates, at equal angles, radius r."""
    means = torch.zeros(p.classes, p.features)
    if p.classes > 1:
        angle = 2 * torch.pi * torch.arange(p.classes) / p.classes
        means[:, 0], means[:, 1] = p.r * angle.cos(), p.r * angle.sin()
    return means


def diagonal(p: Placement) -> Tensor:
    """On the line through all corners, from (-r, ...) to (r, ...)."""
    corner = torch.zeros(1) if p.classes == 1 else 2 * torch.arange(p.classes) / (p.classes - 1) - 1
    return (p.r * corner)[:, None].repeat(1, p.features)


def simplex(p: Placement) -> Tensor:
    """At pairwise distance r; on a circle where D < K - 1."""
    return p.r * regular_simplex(p.classes, p.features)


def antipodal(p: Placement) -> Tensor:
    """+-3.75 in a random direction for two classes, 0.56 N(0, I) for more (published for tables), times r."""
    means = 0.56 * p.r * torch.randn(p.classes, p.features, generator=p.generator)
    if p.classes != 2:
        return means
    first = 3.75 * p.r * F.normalize(means[0], dim=0)
    return torch.stack((first, -first))


def pixel_const(p: Placement) -> Tensor:
    """k - (K - 2) / 2 in every coordinate."""
    return (p.r * (torch.arange(p.classes) - (p.classes - 2) / 2))[:, None].repeat(1, p.features)


def split_dims(p: Placement) -> Tensor:
    """1 in the k-th part of D // K coordinates, 0 elsewhere."""
    part = p.features // p.classes
    if not part:
        raise UserError(
            f"means split_dims: {p.features} dimensions are too few for a part for each of {p.classes} classes"
        )
    means = torch.zeros(p.classes, p.features)
    for label in range(p.classes):
        means[label, label * part : (label + 1) * part] = p.r
    return means


def split_dims_v2(p: Placement) -> Tensor:
    """1 in a horizontal stripe of one channel, 0 elsewhere."""
    if p.shape is None or len(p.shape) != 3:
        raise UserError("means split_dims_v2 are stripes of an image: of rows take split_dims")
    channels, height, _ = p.shape
    if channels * height < p.classes:
        raise UserError(f"means split_dims_v2: an image of {height} rows has no stripe for each of {p.classes} classes")
    means = torch.zeros(p.classes, *p.shape)
    # The classes are dealt to the channels, the last ones getting more: 3 + 3 + 4.
    for channel, labels in enumerate(np.array_split(np.arange(p.classes)[::-1], channels)[::-1]):
        for rows, label in zip(np.array_split(np.arange(height), max(1, len(labels))), labels[::-1], strict=False):
            means[label, channel, rows] = p.r
    return means.flatten(1)


def from_data(p: Placement) -> Tensor:
    """The mean of a class's rows."""
    return p.r * class_means(p.x.flatten(1), p.y, p.classes)


def from_latent(p: Placement) -> Tensor:
    """The mean of a class's latent points, f(x)."""
    return p.r * class_means(latent(p.flow, p.x), p.y, p.classes)


def from_z(p: Placement) -> Tensor:
    """The latent point of the mean of a class's rows."""
    return p.r * latent(p.flow, class_means(p.x.flatten(1), p.y, p.classes).view(p.classes, *p.x.shape[1:]))


def random_data(p: Placement) -> Tensor:
    """The latent point of a class's first row."""
    z = latent(p.flow, p.x)
    return p.r * torch.stack([z[p.y == label][0] for label in range(p.classes)])


def spread(p: Placement) -> Tensor:
    """The mean of a class's latent points, centered and pushed apart to a mean pairwise distance of at least r."""
    means = class_means(latent(p.flow, p.x), p.y, p.classes)
    means = means - means.mean(0)
    if p.classes > 1:
        means = means * (p.r / torch.pdist(means).mean().clamp(min=1e-6)).clamp(min=1.0)
    return means


MEANS = {
    rule.__name__: rule
    for rule in (
        random, circle, diagonal, simplex, antipodal, pixel_const, split_dims, split_dims_v2,
        from_data, from_latent, from_z, random_data, spread,
    )
}  # fmt: skip


def regular_simplex(classes: int, features: int) -> Tensor:
    """-> (K, D) points of pairwise distance 1 around the origin; where D < K - 1, on a circle, neighbors 1 apart."""
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


def class_means(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """x: (n, D), y: (n,) -> (K, D); rows labeled -1 count for no class."""
    member = F.one_hot(y.clamp(min=0), classes).to(x) * (y >= 0)[:, None].to(x)
    return (member.T @ x) / member.sum(0)[:, None]


@torch.no_grad()
def latent(flow: nn.Module, x: Tensor, rows: int = 256) -> Tensor:
    """x: (n, ...) -> z (n, D), in evaluation mode, `rows` at a time."""
    training = flow.training
    flow.eval()
    z = torch.cat([flow(part)[0] for part in x.split(rows)])
    flow.train(training)
    return z
