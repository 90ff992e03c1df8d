"""`normatch plot`: the curves of one or several runs, from their metrics.jsonl."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from ..config import FREE_KEYS
from ..errors import UserError


@dataclass(frozen=True)
class Panel:
    """One set of axes: `curves` maps metrics to their names in the legend; metrics that no run has are left out."""

    title: str
    curves: dict[str, str]
    unit: str = ""
    scale: float = 1.0  # the metric is multiplied by it
    log: bool = False


# fmt: off
PANELS = [
    Panel("Accuracy of the averaged weights", {
        "test_accuracy": "linear classifier", "test_accuracy_flow": "flow",
        "val_accuracy": "linear, validation", "val_accuracy_flow": "flow, validation",
    }, "%"),
    Panel("Losses", {
        "loss": "total", "loss_x": "labeled", "loss_u": "unlabeled", "loss_flow": "flow, labeled",
    }, "nats", log=True),
    Panel("Loss of the averaged weights", {"test_loss": "test", "val_loss": "validation"}, "nats", log=True),
    Panel("Negative log-likelihood of features", {"loss_flow_unsup": "flow"}, "nats"),
    Panel("Unlabeled images: share", {
        "mask_ratio": "mean weight (mask ratio)", "high_confidence_ratio": "confident",
        "consensus_ratio": "classifiers agree",
    }, "%", scale=100),
    Panel("Pseudo-labels: share that is correct", {
        "pseudo_label_accuracy": "all", "pseudo_label_accuracy_high_confidence": "confident",
        "pseudo_label_accuracy_consensus": "classifiers agree",
        "pseudo_label_accuracy_disagreement": "classifiers disagree",
    }, "%", scale=100),
    Panel("Learning rate", {"lr": "classifier"}),
    Panel("Time per step", {"seconds_per_step": "step (median)", "data_seconds": "waiting for data"}, "ms", scale=1000),
]
# fmt: on

STYLES = ["-", "--", ":", "-."]
# Wong's palette (Nature Methods 2011), which color-blind readers can tell apart, without its yellow; then three of
# Tol's, for ten classes.
COLORS = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#882255", "#999933", "#888888",
]  # fmt: skip
POINTS = 400  # longer curves are averaged down to this many

NOT_THE_EXPERIMENT = {"seed", *FREE_KEYS}  # may differ between runs of the same experiment


@dataclass
class RunCurves:
    """A run folder's configuration, and its curves: metric -> (steps (n,), values (n,))."""

    folder: Path
    config: dict
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


def plot(runs, out: str | Path | None = None) -> Path:
    """Run folders -> the figure's path: `out`, by default RUN/curves.png for one run, curves.png for several.

    Runs that differ only in their seed are drawn as their mean within a band of one standard deviation.
    """
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    folders = list(dict.fromkeys(map(Path, runs)))
    if not folders:
        raise UserError("there is no run to plot")
    out = Path(out) if out else (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"the name of {out} must end in .png, .pdf or .svg, which says what is drawn")
    figure = draw([read_run(folder) for folder in folders])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}") from None
    return out


def leave_figure(folder: str | Path) -> Path | None:
    """At the end of a run: draws FOLDER/curves.png; if that fails, says so on standard error and returns None."""
    try:
        return plot([folder])
    except UserError as error:
        print(f"normatch: no figure: {error}", file=sys.stderr)
        return None


def read_run(folder: Path) -> RunCurves:
    """A run folder, finished or not -> its curves. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a run folder: it has no {Path(error.filename).name}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'} must hold `key: value` lines")

    points = {}
    for line in lines:
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, KeyError, TypeError):  # a line that a crash cut short
            continue
        if {"data_wait", "seconds_per_step"} <= values.keys():  # logged as a share of the step
            values["data_seconds"] = values["data_wait"] * values["seconds_per_step"]
        for name, value in values.items():
            if isinstance(value, int | float):
                points.setdefault(name, {})[step] = value
    if not points:
        raise UserError(f"{folder} has nothing to plot yet: its metrics.jsonl is empty")
    curves = {name: tuple(np.array(sorted(by_step.items()), float).T) for name, by_step in points.items()}
    return RunCurves(folder, config, curves)


def group(runs: list[RunCurves]) -> dict[str, list[RunCurves]]:
    """Runs -> label -> the runs that differ only in their seed. The label says what sets the group apart."""
    groups = {}
    for run in runs:
        experiment = {k: v for k, v in run.config.items() if k not in NOT_THE_EXPERIMENT}
        groups.setdefault(json.dumps(experiment, sort_keys=True, default=str), []).append(run)
    configs = [members[0].config for members in groups.values()]
    named = ("method", "dataset", "num_labels")
    keys = dict.fromkeys(k for config in configs for k in config if k not in {*NOT_THE_EXPERIMENT, *named})
    # `hard_label` and the like follow from the method: named only if they differ within one method.
    pairs = [(a, b) for a in configs for b in configs if a.get("method") == b.get("method")]
    distinct = [k for k in keys if any(a.get(k) != b.get(k) for a, b in pairs)]
    result = {}
    for members in groups.values():
        config = members[0].config
        label = f"{config.get('method')}, {config.get('dataset')}, {config.get('num_labels')} labels"
        label += "".join(f", {k}={config.get(k)}" for k in distinct[:4])
        label += f", seed {config.get('seed')}" if len(members) == 1 else f" ({len(members)} seeds: mean ± std)"
        result[label if label not in result else f"{label}, {members[0].folder}"] = members
    return result


def overlap(curves: list) -> bool:
    """[(steps, values)] of several runs -> whether some step lies within all of them."""
    return bool(curves) and max(steps[0] for steps, _ in curves) <= min(steps[-1] for steps, _ in curves)


def mean_and_std(curves: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[(steps, values)] of several runs -> steps (n,), mean (n,), standard deviation (n,) over the runs at each step.

    Only over the range that all runs cover: the mean would jump where one of them ends.
    """
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    steps = np.unique(np.concatenate([steps[(steps >= first) & (steps <= last)] for steps, _ in curves]))
    values = np.stack([np.interp(steps, *curve) for curve in curves])
    return steps, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """steps, values: (n,) -> at most `points` of each, averages of neighbors."""
    width = math.ceil(len(steps) / points)
    starts = np.arange(0, len(steps), width)
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def draw(runs: list[RunCurves]):
    """Runs -> a matplotlib Figure: a panel each for accuracy, losses, pseudo-labels, learning rate, time."""
    from matplotlib.lines import Line2D

    groups = group(runs)
    panels = [p for p in PANELS if any(name in run.curves for run in runs for name in p.curves)]
    if not panels:
        raise UserError(f"{runs[0].folder} has none of the metrics that are plotted")

    rows = 1 if len(panels) <= 3 else 2
    columns = math.ceil(len(panels) / rows)
    figure, grid = new_figure(rows, columns, (4.2 * columns, 3.4 * rows + 0.35 * math.ceil(len(groups) / 2)))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
        names = [name for name in panel.curves if any(name in run.curves for run in runs)]
        for members, color in zip(groups.values(), colors(len(groups)), strict=True):
            for name, style in zip(names, STYLES, strict=False):
                curves = [run.curves[name] for run in members if name in run.curves]
                for together in [curves] if overlap(curves) else [[curve] for curve in curves]:
                    steps, mean, std = mean_and_std(together)
                    steps, mean, std = thin(steps, steps)[0], *(panel.scale * thin(steps, v)[1] for v in (mean, std))
                    axes.plot(steps, mean, style, color=color, linewidth=1.4)
                    if len(together) > 1:
                        below = np.maximum(mean - std, 1e-9) if panel.log and (mean >= 0).all() else mean - std
                        axes.fill_between(steps, below, mean + std, color=color, alpha=0.15, linewidth=0)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(panel.unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        # The limits follow the lines: a band may reach below zero, where neither a logarithm nor a share can be.
        values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        if panel.log and (values >= 0).all() and (values > 0).any():  # the losses of a density may be negative
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(values[values > 0].min(), 1e-4 * values.max()) / 1.5)
        elif (values >= 0).all():
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        if len(names) > 1:
            handles = [Line2D([], [], color="#444444", linestyle=style) for style in STYLES[: len(names)]]
            axes.legend(handles, [panel.curves[name] for name in names], fontsize=7.5, framealpha=0.6)
    handles = [Line2D([], [], color=color, linewidth=3) for color in colors(len(groups))]
    place = {"loc": "outside upper center", "ncols": min(2, len(groups))}
    figure.legend(handles, list(groups), **place, fontsize=9, frameon=False)
    return figure


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple:
    """A matplotlib Figure of `size` inches with a grid of axes -> the Figure, its axes row by row."""
    from matplotlib.figure import Figure  # without pyplot: no window, and the user's own figures stay untouched

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def colors(n: int) -> list[str]:
    """n colors of COLORS, over and over."""
    return [COLORS[i % len(COLORS)] for i in range(n)]
