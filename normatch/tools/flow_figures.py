"""Figures of a trained flow for its run folder: the plane, the latent space, calibration, samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..data import standardize
from ..flows import FlowDensity, FlowOutput
from .plot import COLORS, colors, new_figure

LABELED = {"marker": "^", "s": 70, "edgecolors": "black", "linewidths": 0.9, "zorder": 5}


@torch.inference_mode()
def leave_figures(folder: Path, method, dataset, split) -> list[Path]:
    """Draws the figures that fit the data of a method with a density, in evaluation mode; returns their files.

    plane.png     for points of the plane: data, latent points, samples, grids through the flow and its inverse,
                  decision regions, density
    latent.png    distances of the means, reliability diagram, log p(x) in and out of distribution
    samples.png   for images: samples of each class, and lines between test images in latent space
    """
    model = method.density
    weight = next(model.parameters())

    def inputs(x):
        return method.inputs(standardize(torch.from_numpy(x).to(weight.device), dataset.mean, dataset.std))

    told = np.full(len(dataset.train_labels), -1)  # -1 for rows whose label the method was not told
    told[split.labeled] = dataset.train_labels[split.labeled]
    rows = np.random.RandomState(0).permutation(len(told))[:5000]
    rows = np.union1d(rows, split.labeled[:1000])
    train = inputs(dataset.train_x[rows]), torch.from_numpy(told[rows])
    test = inputs(dataset.test_x), torch.from_numpy(dataset.test_labels).to(weight.device)
    figures = {"latent.png": latent_figure(model, train, test, shuffled(test[0]), dataset.classes)}
    if train[0].shape[1:] == (2,):
        figures["plane.png"] = plane_figure(model, *train)
    if not dataset.is_table:
        channels, size = method.channels, dataset.image_size
        mean, std = (torch.tensor(v[:channels]).to(weight)[:, None, None] for v in (dataset.mean, dataset.std))

        def pixels(x):  # what the flow takes -> (n, C, H, W) in [0, 1]
            return x.view(len(x), channels, size, size) * std + mean

        figures["samples.png"] = samples_figure(model, test[0], dataset.classes, pixels)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """x: (n, ...) -> (n, ...), each feature or pixel shuffled among the rows, hence out of distribution."""
    generator = torch.Generator().manual_seed(0)
    flat = x.flatten(1)
    order = torch.rand(flat.shape, generator=generator).argsort(0).to(x.device)
    return flat.gather(0, order).view_as(x)


# ---- The plane


def plane_figure(model: FlowDensity, x: torch.Tensor, y: torch.Tensor, points: int = 150):
    """x: (n, 2), y: (n,), -1 without label -> Figure of six panels, after the toys of Izmailov et al. 2020."""
    figure, panels = new_figure(2, 3, (13.5, 9))
    out = model(x)
    guess, z, known = _classes(out), _host(out.z), _host(y)
    latent = model.sample_latent(1000)
    sampled = model.inverse(latent)
    sampled_class = _classes(model(sampled))
    x_limits = _limits(_host(x))
    z_limits = _limits(np.concatenate((z, _host(model.class_means()))), 0.9)

    axes = np.meshgrid(*(np.linspace(*limit, points) for limit in x_limits))
    plane = model(torch.tensor(np.stack([axis.ravel() for axis in axes], 1), dtype=x.dtype, device=x.device))
    region, density = _classes(plane).reshape(points, points), _host(plane.log_prob).reshape(points, points)
    classes = plane.class_log_prob.shape[1]
    panels[2].contourf(*axes, region, levels=np.arange(classes + 1) - 0.5, colors=colors(classes), alpha=0.35)
    extent = (*x_limits[0], *x_limits[1])
    shown = panels[5].imshow(np.maximum(density, density.max() - 12), origin="lower", extent=extent, aspect="auto")
    figure.colorbar(shown, ax=panels[5], label="log p(x), nats")

    panel_rows = (  # title, limits, points, limits of the grid and the map through which it is seen
        ("Data, by the class they are given", x_limits, (_host(x), guess, known), x_limits, lambda line: line),
        ("In latent space z = f(x), with the grid", z_limits, (z, guess, known), x_limits, lambda line: model(line).z),
        ("Decision regions", x_limits, (_host(x), guess, known), None, None),
        ("Samples in latent space", z_limits, (_host(latent), sampled_class), z_limits, lambda line: line),
        ("Through the inverse, x = f⁻¹(z), with the grid", x_limits, (_host(sampled), sampled_class), z_limits,
         model.inverse),
        ("Density", x_limits, None, None, None),
    )  # fmt: skip
    for axes, (title, limits, scatter, grid_limits, through) in zip(panels, panel_rows, strict=True):
        if scatter:
            _scatter(axes, *scatter)
        if through:
            _grid(axes, grid_limits, through, x)
        axes.set(xlim=limits[0], ylim=limits[1], title=title)
    return figure


def _host(value: torch.Tensor) -> np.ndarray:
    return value.cpu().numpy()


def _classes(out: FlowOutput) -> np.ndarray:
    """-> (n,) the most probable ones."""
    return _host(out.class_log_prob.argmax(1))


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
            axes.plot(*_host(through(line)).T, color="#555555", linewidth=0.4, alpha=0.6, zorder=0)


def _limits(points, margin=0.25):
    low, high = points.min(0), points.max(0)
    pad = margin * np.maximum(high - low, 1e-6) / 2
    return [(float(a), float(b)) for a, b in zip(low - pad, high + pad, strict=True)]


# ---- Latent space and calibration


def latent_figure(model: FlowDensity, train, test, shuffled, classes: list[str]):
    """-> Figure: distances of the means in widths, a reliability diagram, histograms of log p(x).

    With a single class only the histograms. The area of a dot in the diagram is the share of samples in its bin.
    """
    samples = {"training": train[0], "test": test[0], "shuffled": shuffled}
    parts = {name: _outputs(model, x[:5000]) for name, x in samples.items()}
    figure, panels = new_figure(1, 1, (6, 4.4)) if len(classes) == 1 else new_figure(1, 3, (14.5, 4.4))
    _densities(panels[-1], {name: _host(part.log_prob) for name, part in parts.items()})
    if len(classes) == 1:
        return figure
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

    With equal widths τ is a variance shared by all components (Izmailov et al. 2020, section 6.1). Ternary search over
    log τ in [-5, 7]: the cross-entropy is convex in 1/τ, hence has a single minimum.
    """

    def loss(log_tau):
        return F.cross_entropy(logits.double() / np.exp(log_tau), y).item()

    low, high = -5.0, 7.0
    for _ in range(50):
        a, b = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def reliability(probs: torch.Tensor, y: torch.Tensor, bins: int = 15):
    """probs: (n, K), y: (n,) -> mean confidence, accuracy and share of each non-empty bin, each (b,); ECE."""
    confidence, choice = map(_host, probs.max(1))
    right = choice == _host(y)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    full = count > 0
    mean = np.bincount(index, confidence, bins)[full] / count[full]
    accuracy = np.bincount(index, right, bins)[full] / count[full]
    share = count[full] / max(1, len(right))
    return mean, accuracy, share, float((share * np.abs(mean - accuracy)).sum())


def _outputs(model, x, rows=1000):
    return FlowOutput(*map(torch.cat, zip(*(model(part) for part in x.split(rows)), strict=True)))


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
