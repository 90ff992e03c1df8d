"""The baselines beside the flows, and the table of both."""

import json

import numpy as np
import pytest

from normatch.cli import main
from normatch.errors import UserError
from normatch.tools.compare import BASELINES, _flow_keys, compare


@pytest.mark.parametrize(
    ("name", "angular"),
    [
        *((name, False) for name in BASELINES),
        ("kNN", True),
        ("kNN label spreading", True),
        ("RBF label spreading", True),
    ],
)
def test_every_baseline_learns_three_clusters(name, angular):
    rng = np.random.RandomState(0)
    centres = np.array([[4, 0, 0], [0, 4, 0], [0, 0, 4]], np.float32)
    y = np.arange(150) % 3
    x = (centres[y] + rng.randn(150, 3)).astype(np.float32)
    predicted = BASELINES[name](x[:9], y[:9], x, x[100:], angular, seed=0)
    assert (predicted == y[100:]).mean() > 0.9


def test_the_graph_uses_rows_without_a_label():
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    x = np.concatenate((circle, 3 * circle)).astype(np.float32)  # two rings, two labels on each
    y = np.repeat([0, 1], 200)
    labeled = [0, 100, 200, 300]
    spread = BASELINES["kNN label spreading"](x[labeled], y[labeled], x, x, False, seed=0)
    straight = BASELINES["logistic regression"](x[labeled], y[labeled], x, x, False, seed=0)
    assert (spread == y).mean() > 0.99 > 0.7 > (straight == y).mean()


def test_the_pi_model_is_more_than_its_network():
    rng = np.random.RandomState(0)
    x, y, unlabeled = rng.randn(6, 4), np.arange(6) % 2, rng.randn(200, 4)
    given = (x.astype(np.float32), y, unlabeled.astype(np.float32), rng.randn(500, 4).astype(np.float32), False, 0)
    one, other = (BASELINES[name](*given) for name in ("network with dropout", "Pi-model"))
    assert 0.01 < (one != other).mean() < 0.5


def test_compare_prints_and_leaves_the_table(tmp_path, capsys, monkeypatch):
    kept = ("kNN", "logistic regression")
    monkeypatch.setattr("normatch.tools.compare.BASELINES", {name: BASELINES[name] for name in kept})
    settings = {"steps": 40, "eval_every": 40, "lr": 1e-2, "hidden": 8, "progress": False, "device": "cpu"}
    table = compare("iris", seeds=(0, 1), out=tmp_path / "iris", **settings)
    assert (tmp_path / "iris.md").read_text() == table and table.count("\n") == 5
    assert "| iris, 15 labels | test accuracy, % | seeds | seconds |" in table and "| flowgmm |" in table
    records = json.loads((tmp_path / "iris.json").read_text())
    assert [r["method"] for r in records] == [*kept, "flowgmm"] * 2
    assert all(r["test_accuracy"] > (40 if r["method"] == "flowgmm" else 75) for r in records)
    assert "seed 1: kNN" in capsys.readouterr().err


def test_flows_are_compared_and_finished_runs_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("normatch.tools.compare.BASELINES", {"kNN": BASELINES["kNN"]})
    settings = {"eval_every": 4, "progress": False, "device": "cpu", "runs": tmp_path, "seeds": (0,)}
    compare("scnf-moons", steps=4, **settings)
    began = (tmp_path / "scnf-moons-0" / "summary.json").stat().st_mtime_ns
    table = compare("moons", "scnf-moons", steps=4, **settings)
    assert "| flowgmm |" in table and "| scnf |" in table and table.count("| kNN |") == 1
    assert (tmp_path / "scnf-moons-0" / "summary.json").stat().st_mtime_ns == began
    with pytest.raises(UserError, match="scnf-moons-0 was made with steps=4, this run has steps=8"):
        compare("scnf-moons", steps=8, **settings)


def test_what_cannot_be_compared_is_said(capsys):
    with pytest.raises(UserError, match="no preset or data set 'irs' for a flow; did you mean"):
        compare("irs")
    with pytest.raises(UserError, match="'cifar100' for a flow"):  # NorMatch's alone
        compare("cifar100")
    with pytest.raises(UserError, match="wine with 15 labels and moons moons with 10"):
        compare("moons", "wine")
    with pytest.raises(UserError, match="picture has one class"):
        compare("picture")
    own = {"preset": "flowgmm-wine", "dataset": "table"}
    for name, keys in {
        "mnist": {"preset": "flowgmm-mnist-100-small"},
        "wine": {"preset": "flowgmm-wine"},
        "table": own,
    }.items():
        assert _flow_keys(name) == keys
    assert main(["compare", "ag-news", "--data_dir", "/nowhere"]) == 1
    assert "ag-news is not in /nowhere" in capsys.readouterr().err
    assert main(["embed", "ag-news", "--data_dir", "/nowhere", "--model", "x"]) == 1
    assert "ag-news is not in /nowhere" in capsys.readouterr().err
