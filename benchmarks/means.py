"""What keeps FlowGMM from collapsing in few dimensions: `python benchmarks/means.py`, the table of docs/flowgmm.md.

Test accuracy on wine, breast cancer, iris and the digits as a table, by the rule for the means, the start of the flow
and the noise on the rows: 400 steps, networks of 64, everything else as in the presets. Beside it logistic regression
and label spreading on the same labels. Writes records and table to benchmarks/results/means/.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from normatch import train
from normatch.data import load_dataset, make_split
from normatch.tools.compare import BASELINES, features
from normatch.tools.tables import markdown, write_json

RESULTS = Path(__file__).parent / "results" / "means"
SETS = ("wine", "breast-cancer", "iris", "digits-table")
BLIND = {"zero_init": False, "noise": 0.0}
RECIPES = {
    "`antipodal`, the published rule": {"means": "antipodal", "means_r": 1.0, **BLIND},
    "`simplex`, distance 7.5": {"means": "simplex", "means_r": 7.5, **BLIND},
    "`from_latent`, from the identity": {"means": "from_latent", "means_r": 1.0, "noise": 0.0},
    "`spread` to 7.5, from the identity": {"means": "spread", "means_r": 7.5, "noise": 0.0},
    "the same with noise of 0.2": {"means": "spread", "means_r": 7.5, "noise": 0.2},
}
BASELINES_SHOWN = ("logistic regression", "kNN label spreading")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    records, labels = [], {}
    for name in SETS:
        for seed in options.seeds:
            for recipe, keys in RECIPES.items():
                with tempfile.TemporaryDirectory() as folder:
                    out = str(Path(folder, "run"))
                    run = train(f"flowgmm-{name}", seed=seed, steps=400, hidden=64, out=out, progress=False, **keys)
                accuracy, labels[name] = run.summary["test_accuracy"], run.summary["num_labels"]
                records.append({"set": name, "recipe": recipe, "seed": seed, "test_accuracy": accuracy})
            dataset = load_dataset(name)
            split = make_split(dataset, labels[name], seed)
            (x, test), y = features(dataset), dataset.train_labels[split.labeled]
            for method in BASELINES_SHOWN:
                guess = BASELINES[method](x[split.labeled], y, x[split.unlabeled], test, False, seed)
                accuracy = 100 * float((guess == dataset.test_labels).mean())
                records.append({"set": name, "recipe": method, "seed": seed, "test_accuracy": accuracy})
        print(make_table(records, labels), flush=True)
    write_json(RESULTS / "records.json", records)
    (RESULTS / "table.md").write_text(make_table(records, labels))


def make_table(records, labels) -> str:
    def mean(recipe, name):
        return statistics.mean(r["test_accuracy"] for r in records if (r["set"], r["recipe"]) == (name, recipe))

    rows = [[recipe, *(f"{mean(recipe, name):.0f}" for name in labels)] for recipe in (*RECIPES, *BASELINES_SHOWN)]
    return markdown(["", *(f"{name}, {count} labels" for name, count in labels.items())], rows)


if __name__ == "__main__":
    main()
