"""NorMatch, FixMatch and supervised training at equal steps, labels and network: the tables of docs/results.md.

    python benchmarks/methods.py digits                                      # 40 labels, three seeds
    python benchmarks/methods.py cifar10-4000-small --data_dir DIR --seeds 0     # 4,000 labels, a small network

Runs the three methods one after another with one preset, so that they differ only in the method; for the digits also
two classical baselines on the same labeled images. Writes results.json and curves.png to benchmarks/results/PRESET/,
and the table to docs/results.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.semi_supervised import LabelSpreading

from normatch import train
from normatch.data import load_dataset, make_split
from normatch.tools.tables import markdown, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).parents[1]
METHODS = {"normatch": "NorMatch", "fixmatch": "FixMatch", "supervised": "Supervised"}
COLORS = {"normatch": "#c1440e", "fixmatch": "#2b6cb0", "supervised": "#718096"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=("digits", "cifar10-4000-small"))
    parser.add_argument("--data_dir", help="folder that holds CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="(default: the preset's)")
    options = parser.parse_args()
    given = {"steps": options.steps, "data_dir": options.data_dir}
    given = {name: value for name, value in given.items() if value is not None}

    records = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for method in METHODS:
                out = Path(folder, f"{method}-{seed}")
                result = train(options.preset, method=method, seed=seed, out=str(out), **given)
                lines = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
                curve = [(line["step"], line["test_accuracy"]) for line in lines if line["kind"] == "eval"]
                records.append({**result.summary, "curve": curve, "out": None})
            if options.preset == "digits":
                records += baselines(seed)

    results = REPOSITORY / "benchmarks" / "results" / options.preset
    write_json(results / "results.json", records)
    draw(records, results / "curves.png")
    table = make_table(records)
    print(table)
    page = REPOSITORY / "docs" / "results.md"
    mark = f"<!-- {options.preset} table -->\n"
    before, rest = page.read_text().split(mark)
    after = rest.split("<!-- end -->\n", 1)[1]
    page.write_text(f"{before}{mark}{table}<!-- end -->\n{after}")


def baselines(seed: int) -> list[dict]:
    """Logistic regression and label spreading on the pixels, with the labeled images of this seed."""
    dataset = load_dataset("digits")
    labeled = make_split(dataset, 40, seed).labeled
    x, test = (images[..., 0].reshape(len(images), -1) / 255 for images in (dataset.train_x, dataset.test_x))
    y = dataset.train_labels
    hidden = np.full_like(y, -1)
    hidden[labeled] = y[labeled]
    models = {
        "label spreading": LabelSpreading(kernel="knn", n_neighbors=7).fit(x, hidden),
        "logistic regression": LogisticRegression(max_iter=1000).fit(x[labeled], y[labeled]),
    }
    return [
        {"method": name, "seed": seed, "test_accuracy": 100 * model.score(test, dataset.test_labels)}
        for name, model in models.items()
    ]


def make_table(records) -> str:
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        runs = [r for r in records if r["method"] == method]
        accuracies = [r["test_accuracy"] for r in runs]
        seconds = f"{statistics.mean(r['seconds_total'] for r in runs):.0f}" if "seconds_total" in runs[0] else ""
        each = ", ".join(f"{a:.1f}" for a in accuracies)
        name = METHODS.get(method, f"{method} (scikit-learn)")
        rows.append((name, f"{statistics.mean(accuracies):.1f}", each, seconds))
    return markdown(("method", "test accuracy, %", "seeds", "seconds a run"), rows)


def draw(records, path: Path):
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for method, name in METHODS.items():
        curves = np.array([r["curve"] for r in records if r["method"] == method])
        steps, accuracy = curves[0, :, 0], curves[:, :, 1]
        mean = accuracy.mean(0)
        axes.plot(steps, mean, color=COLORS[method], label=f"{name}: {mean[-1]:.1f} %")
        axes.fill_between(steps, accuracy.min(0), accuracy.max(0), color=COLORS[method], alpha=0.2, linewidth=0)
    first = records[0]
    axes.set(xlabel="step", ylabel="test accuracy, %", xlim=(0, None))
    axes.set_title(f"{first['dataset']}, {first['num_labels']} labels: mean and range of the seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
