"""The toys: accuracy of FlowGMM and SCNF over all 1,000 points, with and without the unlabeled ones; time of a step.

    python benchmarks/toys.py [--seeds 0 1 2] [--sets moons circles ...] [--speed]

Trains every preset, and for FlowGMM its labeled-only twin, one seed after another, then times a training step of
FlowGMM beside the published formulation of the same step in one process (`--speed`: only that). Writes results.json,
speed.json, the tables and a figure for each run of the first seed to benchmarks/results/toys/; records of sets other
than `--sets` are kept.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from normatch import make_config, train
from normatch.bench.measure import medians, side_by_side
from normatch.bench.rivals import published_gaussians, published_layer
from normatch.methods.flowgmm import FlowGMM
from normatch.tools.tables import markdown, write_json
from normatch.training.state import State
from normatch.training.step import TrainStep

RESULTS = Path(__file__).parent / "results" / "toys"
TWINS = ("moons", "circles", "8gaussians", "pinwheel")  # also trained on the labeled points alone
SETS = (*TWINS, "scnf-moons", "scnf-circles", "scnf-gmm-moons", "scnf-gmm-circles")
# Accuracy over all 1,000 points: the goal, and what the published code of FlowGMM reaches with one seed.
ASKED = {"moons": 99.5, "circles": 98.0, "8gaussians": 99.0, "scnf-moons": 99.5, "scnf-circles": 98.0}
PUBLISHED = {"moons": (100.0, 82.2), "circles": (98.3, 87.6), "8gaussians": (99.3, None)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--speed", action="store_true", help="only time the step")
    options = parser.parse_args()
    if not options.speed:
        kept = RESULTS / "results.json"
        before = json.loads(kept.read_text()) if kept.exists() else []
        records = accuracies(options.sets, options.seeds)
        records += [r for r in before if r["preset"].removesuffix("-labeled") not in options.sets]
        records.sort(key=lambda r: SETS.index(r["preset"].removesuffix("-labeled")))
        write("results", records, make_table(records))
    rows = speed()
    write("speed", rows, speed_table(rows))


def write(name: str, records, table: str):
    write_json(RESULTS / f"{name}.json", records)
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


# ---- Accuracy


def accuracies(sets, seeds) -> list[dict]:
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept, records = ("test_accuracy", "test_log_prob", "steps", "seconds_total", "seconds_per_step"), []
    for name in sets:
        for preset in (name, f"{name}-labeled") if name in TWINS else (name,):
            for seed in seeds:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder, "run")
                    summary = train(preset, seed=seed, out=str(out), progress=False).summary
                    records.append({"preset": preset, "seed": seed, **{key: summary.get(key) for key in kept}})
                    print(f"{preset}, seed {seed}: {summary['test_accuracy']:.1f} %", flush=True)
                    if seed == seeds[0] and preset == name:
                        picture = Image.open(out / "plane.png").convert("RGB")
                        picture.thumbnail((1000, 1000))
                        picture.quantize(200).save(RESULTS / f"{name}.png", optimize=True)
    return records


def make_table(records) -> str:
    def cell(preset):
        seeds = [record["test_accuracy"] for record in records if record["preset"] == preset]
        each = ", ".join(f"{accuracy:.1f}" for accuracy in seeds)
        return f"{statistics.mean(seeds):.1f} ({each})" if seeds else "-"

    rows = []
    for name in dict.fromkeys(record["preset"].removesuffix("-labeled") for record in records):
        published = " / ".join("-" if v is None else f"{v:.1f}" for v in PUBLISHED.get(name, (None, None)))
        asked = f">= {ASKED[name]}" if name in ASKED else "-"
        rows.append((name, cell(name), cell(f"{name}-labeled"), asked, published))
    header = ("toy", "accuracy over all 1,000 points, %", "labeled points only, %", "goal",
              "published code, one seed")  # fmt: skip
    return markdown(header, rows)


# ---- Time of a step, moons: 10 labeled and 10 unlabeled points, 5 couplings, Adam


class PublishedCoupling(nn.Module):
    """x: (N, 2) -> z (N, 2), logdet (N,): a network as wide as the input, masks, a weight-normalized gain."""

    def __init__(self, hidden: int, swap: bool):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, 1.0] if swap else [1.0, 0.0]))
        self.net = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(), nn.Identity(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4)
        )
        self.weight_g, self.weight_v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return published_layer(x, self.net, self.weight_g * self.weight_v / self.weight_v.abs(), self.mask)


class PublishedStep:
    """Loss (a) of the paper by one full-covariance `MultivariateNormal` per class, built anew at each evaluation."""

    def __init__(self, hidden: int, means: torch.Tensor):
        self.layers = nn.ModuleList(PublishedCoupling(hidden, j % 2 == 1) for j in range(5))
        self.means, self.weights = means, torch.ones(len(means))
        self.optimizer = torch.optim.Adam(self.layers.parameters(), lr=1e-4, weight_decay=1e-2)

    def gaussians(self):
        return published_gaussians(self.means, torch.ones(len(self.means)))

    def log_prob(self, x, y):
        z, logdet = x, 0.0
        for layer in self.layers:
            z, term = layer(z)
            logdet = logdet + term
        every = torch.stack([g.log_prob(z) for g in self.gaussians()], 1) + self.weights.softmax(0).log()
        result = torch.zeros(len(z))
        result[y == -1] = every.logsumexp(1)[y == -1]
        for label in range(len(self.means)):
            result[y == label] += self.gaussians()[label].log_prob(z)[y == label]
        return result + logdet

    def __call__(self, x, y):
        loss = -self.log_prob(x, y).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class OurStep:
    """The trainer's step: objective, gradient, optimizer, average."""

    def __init__(self, config):
        self.state = State(config, FlowGMM, torch.device("cpu"))
        self.density = self.state.method.density
        self.step = TrainStep(self.state)

    def __call__(self, x, y):
        self.state.begin_step()
        labeled = len(y) // 2
        self.step([{"images": x, "y": y[:labeled], "u_y": torch.full_like(y[labeled:], -1)}])


def speed(rounds: int = 7, steps: int = 60) -> list[dict]:
    """Medians of `rounds` times `steps` steps, the rivals in turns, after a check that their losses agree."""
    torch.set_num_threads(1)  # faster for each of them at this size
    config = make_config("moons")
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    y = torch.cat((torch.arange(10) % 2, torch.full((10,), -1)))
    means = torch.tensor([[-3.5, -3.5], [3.5, 3.5]])
    rivals = {
        ("published formulation", 512): PublishedStep(512, means),
        ("normatch", 512): OurStep(config.model_copy(update={"hidden": 512})),
        ("published formulation", 128): PublishedStep(128, means),
        ("normatch", 128): OurStep(config),  # as in the preset
    }
    check_same_loss(rivals["published formulation", 128], rivals["normatch", 128].density, x, y)
    calls = {name: lambda step=step: step(x, y) for name, step in rivals.items()}
    times = side_by_side(calls, "cpu", rounds, repeat=steps)
    return [
        {
            "what": name,
            "hidden": hidden,
            "milliseconds": 1e3 * median,
            "lowest_and_highest": [1e3 * min(times[name, hidden]), 1e3 * max(times[name, hidden])],
            "threads": torch.get_num_threads(),
        }
        for (name, hidden), median in medians(times).items()
    ]


def speed_table(rows) -> str:
    """Each step beside the published formulation, at the published width and at the same width."""
    published = {row["hidden"]: row["milliseconds"] for row in rows if row["what"] == "published formulation"}
    cells = [
        (row["what"], row["hidden"], f"{row['milliseconds']:.2f}",
         *(f"{published[width] / row['milliseconds']:.1f} x" for width in (512, row["hidden"])))
        for row in rows
    ]  # fmt: skip
    header = ("step of moons, 20 points", "networks of", "ms", "published formulation at 512", "at equal width")
    return markdown(header, cells)


@torch.no_grad()
def check_same_loss(published: PublishedStep, density, x, y):
    """Compares log-likelihoods with the published weights: there is no point in timing different computations."""
    state = {}
    for j, layer in enumerate(published.layers):
        state |= {f"body.{j}.st_net.{name}": value for name, value in layer.net.state_dict().items()}
        state |= {f"body.{j}.rescale.weight_g": layer.weight_g, f"body.{j}.rescale.weight_v": layer.weight_v}
    density.flow.load_published(state)
    difference = (published.log_prob(x, y) - density.log_prob(x, y)).abs().max().item()
    if not math.isfinite(difference) or difference > 1e-4:
        raise SystemExit(f"the two formulations differ by {difference}: nothing is timed")


if __name__ == "__main__":
    main()
