"""Figures of a trained flow for its run folder: the plane, the latent space, calibration, samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..flows import FlowDensity
from .plot import COLORS, colors, new_figure

LABELED = {"marker": "^", "s": 70, "edgecolors": "black", "linewidths": 0.9, "zorder": 5}


@torch.inference_mode()
def leave_figures(
    folder: Path, model: FlowDensity, train, test, shuffled, classes: list[str], images: Callable | None = None
) -> list[Path]:
    """Draws the figures that fit the data of a model in evaluation mode; returns their files.

    train, test: (x (n, ...), y (n,)), with y -1 for rows whose label the model was not told.   shuffled: (m, ...) test
    samples with each feature shuffled among the rows, hence out of distribution.   images: turns the model's samples
    into (n, C, H, W) pixels in [0, 1]; None if they are not images.

        plane.png     for points of the plane: data, latent points, samples, grids through the flow and its inverse,
                      decision regions, density
        latent.png    distances of the means, reliability diagram, log p(x) in and out of distribution
        samples.png   for images: samples of each class, and lines between test images in latent space
    """
    figures = {"latent.png": latent_figure(model, train, test, shuffled, classes)}
    if train[0].shape[1:] == (2,):
        figures["plane.png"] = plane_figure(model, *train)
    if images:
        figures["samples.png"] = samples_figure(model, test[0], classes, images)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


# ---- The plane


def plane_figure(model: FlowDensity, x: torch.Tensor, y: torch.Tensor, points: int = 150):
    """x: (n, 2), y: (n,), -1 without label -> Figure of six panels, after the toys of Izmailov et al. 2020."""
    figure, panels = new_figure(2, 3, (13.5, 9))
    out = model(x)
    guess = out.class_log_prob.argmax(1).cpu().numpy()
    z, known = out.z.cpu().numpy(), y.cpu().numpy()
    x_limits = _limits(x.cpu().numpy())
    z_limits = _limits(np.concatenate((z, model.class_means().cpu().numpy())), 0.9)
    drawn = model.sample_latent(1000)
    sampled = model.inverse(drawn)
    sampled_class = model(sampled).class_log_prob.argmax(1).cpu().numpy()
    drawn, sampled = drawn.cpu().numpy(), sampled.cpu().numpy()

    _scatter(panels[0], x.cpu().numpy(), guess, known)
    _grid(panels[0], x_limits, lambda line: line, x)
    panels[0].set_title("Data, by the class they are given")
    _scatter(panels[1], z, guess, known)
    _grid(panels[1], x_limits, lambda line: model(line).z, x)
    panels[1].set_title("In latent space z = f(x), with the grid")
    axes = np.meshgrid(np.linspace(*x_limits[0], points), np.linspace(*x_limits[1], points))
    plane = torch.tensor(np.stack([axis.ravel() for axis in axes], 1), dtype=x.dtype, device=x.device)
    here = model(plane)
    region = here.class_log_prob.argmax(1).cpu().numpy().reshape(points, points)
    classes = here.class_log_prob.shape[1]
    levels = np.arange(classes + 1) - 0.5
    panels[2].contourf(*axes, region, levels=levels, colors=colors(classes), alpha=0.35)
    _scatter(panels[2], x.cpu().numpy(), guess, known)
    panels[2].set_title("Decision regions")
    _scatter(panels[3], drawn, sampled_class)
    _grid(panels[3], z_limits, lambda line: line, x)
    panels[3].set_title("Samples in latent space")
    _scatter(panels[4], sampled, sampled_class)
    _grid(panels[4], z_limits, model.inverse, x)
    panels[4].set_title("Through the inverse, x = f⁻¹(z), with the grid")
    density = here.log_prob.cpu().numpy().reshape(points, points)
    shown = panels[5].imshow(
        np.maximum(density, density.max() - 12), origin="lower", extent=(*x_limits[0], *x_limits[1]), aspect="auto"
    )
    figure.colorbar(shown, ax=panels[5], label="log p(x), nats")
    panels[5].set_title("Density")
    for index, axes in enumerate(panels):
        limits = z_limits if index in (1, 3) else x_limits
        axes.set(xlim=limits[0], ylim=limits[1])
    return figure


def _scatter(axes, points, labels, known=None):
    for label in np.unique(labels):
        rows = labels == label
        axes.scatter(*points[rows].T, s=6, color=colors(label + 1)[label], alpha=0.55, linewidths=0)
    if known is not None:
        for label in np.unique(known[known >= 0]):
            axes.scatter(*points[known == label].T, color=colors(label + 1)[label], **LABELED)


def _grid(axes, limits, through, like, lines=15, points=150):
    """Lines of equal x_0 and of equal x_1, mapped by `through`, which takes points of the dtype of `like`."""
    along = [torch.linspace(*limit, points, dtype=like.dtype, device=like.device) for limit in limits]
    for axis in (0, 1):
        for value in torch.linspace(*limits[axis], lines, dtype=like.dtype, device=like.device):
            line = torch.stack((value.expand(points), along[1]) if axis == 0 else (along[0], value.expand(points)), 1)
            axes.plot(*through(line).cpu().numpy().T, color="#555555", linewidth=0.4, alpha=0.6, zorder=0)


def _limits(points, margin=0.25):
    low, high = points.min(0), points.max(0)
    pad = margin * np.maximum(high - low, 1e-6) / 2
    return [(float(a), float(b)) for a, b in zip(low - pad, high + pad, strict=True)]


# ---- Latent space and calibration


def latent_figure(model: FlowDensity, train, test, shuffled, classes: list[str]):
    """-> Figure: distances of the means in widths, a reliability diagram, histograms of log p(x).

    With a single class only the histograms. The area of a dot in the diagram is the share of samples in its bin.
    """
    parts = {"training": train[0], "test": test[0], "shuffled": shuffled}
    parts = {name: _outputs(model, x[:5000]) for name, x in parts.items()}
    values = {name: part.log_prob.cpu().numpy() for name, part in parts.items()}
    if len(classes) == 1:
        figure, panels = new_figure(1, 1, (6, 4.4))
        _densities(panels[0], values)
        return figure
    figure, panels = new_figure(1, 3, (14.5, 4.4))
    means = model.class_means().cpu()
    distance = (torch.cdist(means, means) / model.width().cpu()).numpy()
    shown = panels[0].imshow(distance, cmap="viridis")
    figure.colorbar(shown, ax=panels[0], label="in widths σ")
    panels[0].set_title("Distances of the means")
    if len(classes) <= 12:
        panels[0].set_xticks(range(len(classes)), classes, rotation=60, fontsize=7)
        panels[0].set_yticks(range(len(classes)), classes, fontsize=7)
        for (i, j), value in np.ndenumerate(distance):
            color = "black" if value > 0.6 * distance.max() else "white"
            panels[0].text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=6)

    y = test[1][:5000]
    tuned, judged = slice(0, None, 2), slice(1, None, 2)  # the temperature is fitted on one, judged on the other
    logits = parts["test"].class_log_prob
    tau = temperature(logits[tuned], y[tuned]) if len(y) > 3 else 1.0
    for value, color in ((1.0, COLORS[1]), (tau, COLORS[0])):
        confidence, accuracy, share, ece = reliability((logits[judged] / value).softmax(1), y[judged])
        label = f"τ = {value:.3g}: ECE {ece:.3f}"
        panels[1].scatter(confidence, accuracy, 3 + 300 * share, color=color, alpha=0.6, linewidths=0, label=label)
    panels[1].plot([0, 1], [0, 1], "--", color="#999999", linewidth=1)
    panels[1].set(xlabel="confidence", ylabel="accuracy", title="Reliability, with a temperature τ", xlim=(0, 1.02))
    panels[1].legend(loc="upper left", frameon=False, fontsize=8)

    _densities(panels[2], values)
    return figure


def _densities(axes, values: dict[str, np.ndarray]):
    """name -> log p(x) (n,): histograms, whose first bin holds everything below it."""
    here = np.concatenate((values["training"], values["test"]))
    low = min(np.percentile(v, 2) for v in values.values())
    bins = np.linspace(max(low, np.median(here) - 40 * max(np.std(here), 1e-3)), np.percentile(here, 99.9), 60)
    for (name, value), color in zip(values.items(), COLORS, strict=False):
        weights = np.full(len(value), 1 / len(value))
        axes.hist(np.clip(value, bins[0], bins[-1]), bins, weights=weights, alpha=0.5, color=color, label=name)
    axes.set(xlabel="log p(x), nats (in the first bin all below)", ylabel="share")
    axes.set_title("Density, in and out of the distribution")
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def temperature(logits: torch.Tensor, y: torch.Tensor) -> float:
    """logits: (n, K), y: (n,) -> the τ that minimises the cross-entropy of softmax(logits / τ) (Guo et al. 2017).

    With equal widths τ is a variance shared by all components (Izmailov et al. 2020, section 6.1). Golden-section
    search over log τ in [-5, 7]: the cross-entropy is convex in 1/τ, hence has a single minimum.
    """

    def loss(log_tau):
        return F.cross_entropy(logits.double() / np.exp(log_tau), y).item()

    low, high, ratio = -5.0, 7.0, (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    for _ in range(40):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return float(np.exp((low + high) / 2))


def reliability(probs: torch.Tensor, y: torch.Tensor, bins: int = 15):
    """probs: (n, K), y: (n,) -> mean confidence, accuracy and share of each non-empty bin, each (b,); ECE."""
    confidence, choice = (v.cpu().numpy() for v in probs.max(1))
    right = choice == y.cpu().numpy()
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    full = count > 0
    mean = np.bincount(index, confidence, bins)[full] / count[full]
    accuracy = np.bincount(index, right, bins)[full] / count[full]
    share = count[full] / max(1, len(right))
    return mean, accuracy, share, float((share * np.abs(mean - accuracy)).sum())


def _outputs(model, x, rows=1000):
    return type(model(x[:1]))(
        *(torch.cat(parts) for parts in zip(*(model(part) for part in x.split(rows)), strict=True))
    )


# ---- Images


def samples_figure(model: FlowDensity, x: torch.Tensor, classes: list[str], images: Callable, columns: int = 10):
    """x: (n, ...) test samples -> Figure: `columns` samples of each class, and as many lines between pairs of x.

    images: turns samples into (n, C, H, W) pixels in [0, 1].
    """
    k = min(len(classes), 12)
    drawn = torch.cat([model.sample(columns, label) for label in range(k)])
    z = model(x[: 2 * k]).z
    share = torch.linspace(0, 1, columns, dtype=z.dtype, device=x.device)[:, None]
    lines = torch.cat([model.inverse(a + share * (b - a)) for a, b in zip(z[0::2], z[1::2], strict=False)])
    figure, panels = new_figure(1, 2, (11, 0.5 * k + 0.6))
    for axes, samples, title in zip(panels, (drawn, lines), ("Samples of each class", "Between images"), strict=True):
        shown = images(samples).clamp(0, 1)
        axes.imshow(_tiled(shown, columns), cmap="gray", vmin=0, vmax=1)
        axes.set(title=title, xticks=[], yticks=[], frame_on=False)
    side = shown.shape[2] + 1  # of a tile with its margin
    panels[0].set_yticks([side * (row + 0.5) for row in range(k)], classes[:k], fontsize=8)
    panels[0].tick_params(length=0)
    return figure


def _tiled(images, columns):
    """images: (n, C, H, W) -> (H', W'[, C]) one picture, rows of `columns` tiles with white lines between them."""
    images = F.pad(images, (0, 1, 0, 1), value=1.0)
    n, c, h, w = images.shape
    tiles = images.reshape(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    return tiles.squeeze(-1).float().cpu().numpy()
