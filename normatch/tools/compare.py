"""`normatch compare`: what a flow has to beat on few labels, scikit-learn's classics, a network, the Pi-model."""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..config import METHODS, make_config, presets, read_config, trains_flow
from ..data import TABLES, Split, load_dataset, make_split, standardize
from ..errors import UserError, nearest
from ..training.optim import SCHEDULES
from ..training.run import check_same_run
from ..training.trainer import train
from .tables import markdown, write_json


def nearest_neighbors(x, y, unlabeled, test, angular, seed):
    """With the k in 1..19 of the best leave-one-out accuracy on the labeled rows."""
    from sklearn.neighbors import KNeighborsClassifier

    metric = "cosine" if angular else "euclidean"
    order = KNeighborsClassifier(1, metric=metric).fit(x, y).kneighbors(n_neighbors=min(19, len(x) - 1))[1]
    votes = np.cumsum(np.eye(y.max() + 1)[y[order]], axis=1)  # (n, k, K) of the row's neighbors
    k = 1 + int((votes.argmax(2) == y[:, None]).mean(0).argmax())
    return KNeighborsClassifier(k, metric=metric).fit(x, y).predict(test)


def logistic_regression(x, y, unlabeled, test, angular, seed):
    """Multinomial, C = 1, on the labeled rows."""
    from sklearn.linear_model import LogisticRegression

    if angular:
        x, test = _unit(x), _unit(test)
    return LogisticRegression(max_iter=3000).fit(x, y).predict(test)


def knn_label_spreading(x, y, unlabeled, test, angular, seed):
    """16 neighbors, alpha 0.1."""
    # Label mass shrinks by 0.1 per edge: any tolerance would stop before it reaches rows far from a label.
    graph = {"kernel": "knn", "n_neighbors": 16, "alpha": 0.1, "tol": 0, "max_iter": 100}
    return _label_spreading(x, y, unlabeled, test, angular, seed, 10000, **graph)


def rbf_label_spreading(x, y, unlabeled, test, angular, seed):
    """exp(-4 (1 - cos)), or exp(-2 |a - b|^2 / v), v the variance of all features together; alpha = 2/3."""
    gamma = 2.0 if angular else 2.0 / float(unlabeled.var(0).sum())
    graph = {"kernel": "rbf", "gamma": gamma, "alpha": 2 / 3, "tol": 1e-3, "max_iter": 30}
    return _label_spreading(x, y, unlabeled, test, angular, seed, 5000, **graph)


def _label_spreading(x, y, unlabeled, test, angular, seed, rows, **options):
    """rows: of the unlabeled ones in the graph, as published for FlowGMM's tables."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.semi_supervised import LabelSpreading

    chosen = np.random.RandomState(seed).permutation(len(unlabeled))[:rows]
    points = np.concatenate((x, unlabeled[chosen]))
    labels = np.concatenate((y, np.full(len(chosen), -1)))
    if angular:
        points, test = _unit(points), _unit(test)
    with warnings.catch_warnings():  # without a tolerance it never reports convergence
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LabelSpreading(**options).fit(points, labels).predict(test)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def network(x, y, unlabeled, test, angular, seed, weight=0.0):
    """Three layers of 512 with dropout 0.5, cross-entropy on the labeled rows, AdamW 1e-3 with a cosine, 300 steps.

    weight: of the Pi-model's loss: two passes of dropout over 500 unlabeled rows per step have to agree.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, y, unlabeled, test = (torch.as_tensor(v) for v in (x, y, unlabeled, test))
        net = nn.Sequential(
            nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(512, int(y.max()) + 1),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 1e-3 * SCHEDULES["cosine"](step / 300)
            loss = F.cross_entropy(net(x), y)
            if weight:
                some = unlabeled[torch.randint(len(unlabeled), (min(500, len(unlabeled)),))]
                loss = loss + weight * (net(some).softmax(1) - net(some).softmax(1).detach()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            return net(test).argmax(1).numpy()


BASELINES = {
    "kNN": nearest_neighbors,
    "logistic regression": logistic_regression,
    "kNN label spreading": knn_label_spreading,
    "RBF label spreading": rbf_label_spreading,
    "network with dropout": network,
    "Pi-model": partial(network, weight=30.0),
}


def features(dataset) -> tuple[np.ndarray, np.ndarray]:
    """A data set -> (N, D) training and (M, D) test rows: standardized, or the pixels of images in [0, 1]."""
    if dataset.is_table:
        parts = map(torch.from_numpy, (dataset.train_x, dataset.test_x))
        return tuple(standardize(x, dataset.mean, dataset.std).numpy() for x in parts)
    gray = (dataset.train_x[:100] == dataset.train_x[:100, ..., :1]).all()
    train, test = (images[..., :1] if gray else images for images in (dataset.train_x, dataset.test_x))
    return tuple((images.reshape(len(images), -1) / 255).astype(np.float32) for images in (train, test))


def compare(
    *presets: str, seeds=(0, 1, 2), out: str | Path | None = None, runs: str | Path | None = None, **keys
) -> str:
    """Flows and all baselines on the same labels -> a Markdown table.

    presets: presets of flows, or data sets, which stand for their first preset; a data set without one, such as a
    table of your own, gets that of wine, which suits few dimensions.   out: where to write the records as JSON, with
    the table beside it.   runs: where to keep the flows' runs; finished ones are not repeated, stopped ones go on.
    keys: of the configuration.

    Raises UserError if there is no such preset, or if two of them differ in data or number of labels.
    """
    settings = {name: {**_flow_keys(name), **keys} for name in presets}
    first, *others = (make_config(**given) for given in settings.values())
    for preset, config in zip(presets[1:], others, strict=True):
        if (config.dataset, config.num_labels) != (first.dataset, first.num_labels):
            raise UserError(
                f"{preset} is {config.dataset} with {config.num_labels} labels and {presets[0]} {first.dataset} with "
                f"{first.num_labels}: only what learns from the same labels can be compared"
            )
    # The baselines see images at their full size: a smaller one is a setting of the flow.
    dataset = load_dataset(first.dataset, first.data_dir, first.download)
    if len(dataset.classes) < 2:
        raise UserError(f"{first.dataset} has one class: there is nothing to tell apart, and to compare")
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(runs or temporary)
        for seed in seeds:
            records += baseline_records(dataset, make_split(dataset, first.num_labels, seed), seed)
            for name, given in settings.items():
                config = make_config(**{**given, "seed": seed, "out": str(folder / f"{name}-{seed}"), "resume": "auto"})
                summary = _summary(config)
                accuracy, seconds = summary["test_accuracy"], summary["seconds_total"]
                records.append({"method": config.method, "seed": seed, "test_accuracy": accuracy, "seconds": seconds})
    table = comparison_table(records, f"{first.dataset}, {first.num_labels} labels")
    if out:
        write_json(Path(out).with_suffix(".json"), records)
        Path(out).with_suffix(".md").write_text(table)
    return table


def baseline_records(dataset, split: Split, seed: int) -> Iterator[dict]:
    """Trains each of BASELINES on the split's rows: a record each, announced on standard error."""
    train, test = features(dataset)
    y = dataset.train_labels[split.labeled]
    for name, predict in BASELINES.items():
        began = time.perf_counter()
        predicted = predict(train[split.labeled], y, train[split.unlabeled], test, dataset.angular, seed)
        accuracy, seconds = 100 * float((predicted == dataset.test_labels).mean()), time.perf_counter() - began
        print(f"seed {seed}: {name} {accuracy:.2f} % ({seconds:.0f} s)", file=sys.stderr)
        yield {"method": name, "seed": seed, "test_accuracy": accuracy, "seconds": seconds}


def _flow_keys(name: str) -> dict:
    """A preset that trains a flow end to end, or a data set -> keys for `make_config`.

    A data set stands for its reduced preset if it has one, else its first, FlowGMM's before SCNF's; a table without
    any, for that of wine.
    """
    flows = {preset: values for preset, values in presets().items() if trains_flow(values["method"])}
    if name in flows:
        return {"preset": name}
    candidates = [preset for preset, values in flows.items() if values["dataset"] == name]
    candidates.sort(key=lambda preset: list(METHODS).index(flows[preset]["method"]))
    if candidates:
        return {"preset": next((preset for preset in candidates if preset.endswith("-small")), candidates[0])}
    if name in TABLES:
        return {"preset": "flowgmm-wine", "dataset": name}
    known = nearest(name, [*flows, *TABLES, *(values["dataset"] for values in flows.values())])
    raise UserError(f"there is no preset or data set {name!r} for a flow{known}")


def _summary(config) -> dict:
    """The summary of the run that `config` describes, trained unless finished. Raises UserError for another run."""
    path = config.folder / "summary.json"
    if not path.exists():
        return train(config).summary
    check_same_run(read_config(config.folder / "config.yaml"), config, f"the run in {config.folder}")
    return json.loads(path.read_text())


def comparison_table(records: list[dict], title: str) -> str:
    """One row for each method: mean accuracy over the seeds, that of each seed, mean seconds."""
    rows = []
    for name in dict.fromkeys(record["method"] for record in records):
        of_method = [record for record in records if record["method"] == name]
        accuracies, seconds = ([record[key] for record in of_method] for key in ("test_accuracy", "seconds"))
        each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        rows.append((name, f"{np.mean(accuracies):.1f}", each, f"{np.mean(seconds):.0f}"))
    return markdown((title, "test accuracy, %", "seeds", "seconds"), rows)
