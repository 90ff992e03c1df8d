"""What keeps FlowGMM from collapsing in few dimensions: `python benchmarks/means.py`, the table of docs/flowgmm.md.

Accuracy on the held-out rows of wine, breast cancer, iris and the digits as a table, by where the means stand, how the
flow starts and how much noise is on the rows: 400 steps, networks of 64, everything else as in the presets. Beside it
logistic regression and label spreading on the same labels. Leaves both in benchmarks/results/means/.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from normatch.flow_training import FlowState
from normatch.state import TrainStep

from normatch import make_config
from normatch.tools.compare import BASELINES, features

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
BESIDE = ("logistic regression", "kNN label spreading")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    records, labels = [], {}
    for name in SETS:
        for seed in options.seeds:
            for recipe, keys in RECIPES.items():
                state = trained(f"flowgmm-{name}", seed=seed, steps=400, hidden=64, **keys)
                accuracy = state.evaluate(last=True)["test_accuracy"]
                records.append({"set": name, "recipe": recipe, "seed": seed, "test_accuracy": accuracy})
            split, data = state.split, state.dataset
            labels[name] = len(split.labeled)
            x, test = features(data)
            for method in BESIDE:
                y = data.train_labels[split.labeled]
                guess = BASELINES[method](x[split.labeled], y, x[split.unlabeled], test, False, seed)
                accuracy = 100 * float((guess == data.test_labels).mean())
                records.append({"set": name, "recipe": method, "seed": seed, "test_accuracy": accuracy})
        print(make_table(records, labels), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "table.md").write_text(make_table(records, labels))


def trained(preset: str, **keys) -> FlowState:
    config = make_config(preset, **keys)
    torch.manual_seed(config.seed)
    state = FlowState(config, torch.device("cpu"))
    state.objective.train()
    step = TrainStep(state)
    for batch in state.batches(0):
        state.begin_step()
        step([batch])
    return state


def make_table(records, labels) -> str:
    rows = [f"| | {' | '.join(f'{name}, {count} labels' for name, count in labels.items())} |"]
    rows.append("| --- |" + " --- |" * len(labels))
    for recipe in (*RECIPES, *BESIDE):
        cells = []
        for name in labels:
            own = [r["test_accuracy"] for r in records if (r["set"], r["recipe"]) == (name, recipe)]
            cells.append(f"{statistics.mean(own):.0f}")
        rows.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
