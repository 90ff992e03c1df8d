"""What a flow has to beat on few labels: scikit-learn's classics, a network with dropout, the Pi-model; their table."""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from .config import FLOWS, PRESETS, make_config
from .data import TABLES, Split, load_dataset, make_split, standardize
from .errors import UserError, nearest
from .optim import SCHEDULES

# As published for FlowGMM's tables: how many unlabelled rows the graphs of label spreading hold.
KNN_ROWS, RBF_ROWS = 10000, 5000


def nearest_neighbours(x, y, unlabeled, test, angular, seed):
    """The k of 1..19 with the best leave-one-out accuracy on the labelled rows."""
    from sklearn.neighbors import KNeighborsClassifier

    metric = "cosine" if angular else "euclidean"
    order = KNeighborsClassifier(1, metric=metric).fit(x, y).kneighbors(n_neighbors=min(19, len(x) - 1))[1]
    votes = np.cumsum(np.eye(y.max() + 1)[y[order]], axis=1)  # (n, k, K) of the row's own neighbours
    k = 1 + int((votes.argmax(2) == y[:, None]).mean(0).argmax())
    return KNeighborsClassifier(k, metric=metric).fit(x, y).predict(test)


def logistic_regression(x, y, unlabeled, test, angular, seed):
    """Multinomial, C = 1, on the labelled rows."""
    from sklearn.linear_model import LogisticRegression

    if angular:
        x, test = _unit(x), _unit(test)
    return LogisticRegression(max_iter=3000).fit(x, y).predict(test)


def knn_label_spreading(x, y, unlabeled, test, angular, seed):
    """16 neighbours, alpha 0.1."""
    # What reaches a row over n edges is 0.1^n: any tolerance would stop before rows far from a label get theirs.
    graph = {"kernel": "knn", "n_neighbors": 16, "alpha": 0.1, "tol": 0, "max_iter": 100}
    return _label_spreading(x, y, unlabeled, test, angular, seed, KNN_ROWS, **graph)


def rbf_label_spreading(x, y, unlabeled, test, angular, seed):
    """exp(-4 (1 - cos)), or exp(-2 |a - b|^2 / v), v the variance of all features together; alpha = 2/3."""
    gamma = 2.0 if angular else 2.0 / float(unlabeled.var(0).sum())
    graph = {"kernel": "rbf", "gamma": gamma, "alpha": 2 / 3, "tol": 1e-3, "max_iter": 30}
    return _label_spreading(x, y, unlabeled, test, angular, seed, RBF_ROWS, **graph)


def _label_spreading(x, y, unlabeled, test, angular, seed, rows, **options):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.semi_supervised import LabelSpreading

    chosen = np.random.RandomState(seed).permutation(len(unlabeled))[:rows]
    points = np.concatenate((x, unlabeled[chosen]))
    labels = np.concatenate((y, np.full(len(chosen), -1)))
    if angular:
        points, test = _unit(points), _unit(test)
    with warnings.catch_warnings():  # without a tolerance it never says that it has converged
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LabelSpreading(**options).fit(points, labels).predict(test)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def network(x, y, unlabeled, test, angular, seed):
    """Three layers of 512 with dropout 0.5, cross-entropy on the labelled rows, AdamW 1e-3 with a cosine, 300 steps."""
    return _train_network(x, y, unlabeled, test, seed, weight=0.0)


def pi_model(x, y, unlabeled, test, angular, seed):
    """The network, with two passes of dropout over 500 unlabelled rows a step that have to agree (weight 30)."""
    return _train_network(x, y, unlabeled, test, seed, weight=30.0)


def _train_network(x, y, unlabeled, test, seed, weight, steps=300, hidden=512, rows=500):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, y, unlabeled, test = (torch.as_tensor(v) for v in (x, y, unlabeled, test))
        net = nn.Sequential(
            nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(hidden, int(y.max()) + 1),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * SCHEDULES["cosine"](step / steps)
            loss = F.cross_entropy(net(x), y)
            if weight:
                some = unlabeled[torch.randint(len(unlabeled), (min(rows, len(unlabeled)),))]
                loss = loss + weight * (net(some).softmax(1) - net(some).softmax(1).detach()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            return net(test).argmax(1).numpy()


BASELINES = {
    "kNN": nearest_neighbours,
    "logistic regression": logistic_regression,
    "kNN label spreading": knn_label_spreading,
    "RBF label spreading": rbf_label_spreading,
    "network with dropout": network,
    "Pi-model": pi_model,
}


def features(dataset) -> tuple[np.ndarray, np.ndarray]:
    """A data set -> (N, D) training and (M, D) test rows: standardised, or the pixels of images in [0, 1]."""
    if dataset.is_table:
        parts = map(torch.from_numpy, (dataset.train_x, dataset.test_x))
        return tuple(standardize(x, dataset.mean, dataset.std).numpy() for x in parts)
    grey = (dataset.train_x[:100] == dataset.train_x[:100, ..., :1]).all()
    train, test = (images[..., :1] if grey else images for images in (dataset.train_x, dataset.test_x))
    return tuple((images.reshape(len(images), -1) / 255).astype(np.float32) for images in (train, test))


def baseline_accuracies(dataset, split: Split, seed: int):
    """Yields (name, accuracy in percent, seconds) of each of BASELINES, trained on the split's rows."""
    train, test = features(dataset)
    y = dataset.train_labels[split.labeled]
    angular = getattr(dataset, "angular", False)
    for name, predict in BASELINES.items():
        began = time.perf_counter()
        predicted = predict(train[split.labeled], y, train[split.unlabeled], test, angular, seed)
        yield name, 100 * float((predicted == dataset.test_labels).mean()), time.perf_counter() - began


def compare(
    *presets: str, seeds=(0, 1, 2), out: str | Path | None = None, runs: str | Path | None = None, **keys
) -> str:
    """The flows of presets (or of a data set's first one) and all baselines, on the same labels: a Markdown table.

    A data set without a preset, such as a table of one's own, gets that of wine, which suits few dimensions.
    out: where to leave the records as JSON, and beside it the table.   runs: where to keep the flows' runs; a run that
    is there is not repeated, and one that was stopped goes on.   keys: of the configuration.

    Raises UserError where there is no such preset, and where two have other data or another number of labels.
    """
    settings = {name: {**_flow_keys(name), **keys} for name in presets}
    configs = [make_config(**given) for given in settings.values()]
    first = configs[0]
    for preset, config in zip(presets, configs, strict=True):
        if (config.dataset, config.num_labels) != (first.dataset, first.num_labels):
            raise UserError(
                f"{preset} is {config.dataset} with {config.num_labels} labels and {presets[0]} {first.dataset} with "
                f"{first.num_labels}: only what learns from the same labels can be compared"
            )
    # Images for the baselines as they are: a smaller size is the flow's affair.
    dataset = load_dataset(first.dataset, first.data_dir, first.download)
    if len(dataset.classes) < 2:
        raise UserError(f"{first.dataset} has one class: there is nothing to tell apart, and to compare")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            split = make_split(dataset, first.num_labels, seed)
            for name, accuracy, seconds in baseline_accuracies(dataset, split, seed):
                records.append({"method": name, "seed": seed, "test_accuracy": accuracy, "seconds": seconds})
                print(f"seed {seed}: {name} {accuracy:.2f} % ({seconds:.0f} s)", file=sys.stderr)
            for name, given in settings.items():
                own = {"seed": seed, "out": str(Path(runs or folder) / f"{name}-{seed}"), "resume": "auto"}
                config = make_config(**{**given, **own})
                summary = _summary(config)
                accuracy, seconds = summary["test_accuracy"], summary["seconds_total"]
                records.append({"method": config.method, "seed": seed, "test_accuracy": accuracy, "seconds": seconds})
    table = comparison_table(records, f"{first.dataset}, {first.num_labels} labels")
    if out:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
        out.with_suffix(".md").write_text(table)
    return table


def _flow_keys(name: str) -> dict:
    """A preset that trains a flow end to end, or a data set -> what to configure.

    Of a data set's presets the first, but a reduced one where there is any; of a table without, that of wine.
    """
    flows = {preset: values for preset, values in PRESETS.items() if values.get("method") in FLOWS}
    if name in flows:
        return {"preset": name}
    found = [preset for preset, values in flows.items() if values["dataset"] == name]
    if found:
        return {"preset": next((preset for preset in found if preset.endswith("-small")), found[0])}
    if name in TABLES:
        return {"preset": "flowgmm-wine", "dataset": name}
    known = nearest(name, [*flows, *TABLES, *(values["dataset"] for values in flows.values())])
    raise UserError(f"there is no preset or data set {name!r} for a flow{known}")


def _summary(config) -> dict:
    """Of the run that `config` describes: what a finished one left, else trains it. Raises UserError for another's."""
    from .trainer import train

    path = config.folder / "summary.json"
    if not path.exists():
        return train(config).summary
    kept = yaml.safe_load((config.folder / "config.yaml").read_text())
    own = {"out", "resume", "progress", "overwrite", "data_dir"}
    other = [name for name, value in config.model_dump().items() if name not in own and kept.get(name) != value]
    if other:
        raise UserError(f"{config.folder} holds a run with another {other[0]}: remove it, or keep the runs elsewhere")
    return json.loads(path.read_text())


def comparison_table(records: list[dict], title: str) -> str:
    rows = [f"| {title} | test accuracy, % | seeds | seconds |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == name]
        accuracies = [record["test_accuracy"] for record in own]
        each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        seconds = np.mean([record["seconds"] for record in own])
        rows.append(f"| {name} | {np.mean(accuracies):.1f} | {each} | {seconds:.0f} |")
    return "\n".join(rows) + "\n"
