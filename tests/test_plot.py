"""Figures: that every run folder gives one, what is in it, and how runs are put together."""

import json

import matplotlib
import numpy as np
import pytest
import yaml

import normatch
from normatch.cli import main
from normatch.errors import UserError
from normatch.tools import plot as plots

matplotlib.use("Agg")


def write_run(folder, seed=0, steps=100, method="normatch", offset=0.0, **keys):
    """A run folder such as training leaves it, with invented curves."""
    folder.mkdir(parents=True)
    config = {"method": method, "dataset": "digits", "num_labels": 40, "lr": 0.03, "seed": seed, "out": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **keys}))
    lines = []
    for step in range(10, steps + 1, 10):
        values = {"loss": 2 / step + offset, "loss_x": 1 / step, "lr": 0.03, "seconds_per_step": 0.01, "data_wait": 0.2}
        if method == "normatch":
            values |= {"loss_flow_unsup": -3.0, "consensus_ratio": 0.5}
        if method != "supervised":
            values |= {"mask_ratio": 0.5, "pseudo_label_accuracy": 0.9}
        lines += [{"step": step, "kind": "train", **values}]
        lines += [{"step": step, "kind": "eval", "test_accuracy": 50 + offset}] if step % 50 == 0 else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drawn(*folders):
    """-> title -> axes, of the panels that are shown."""
    figure = plots.draw([plots.read_run(folder) for folder in folders])
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}, figure


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_real_run_gets_its_figure(tmp_path, capsys):
    keys = {"backbone": "wrn-10-1", "batch_size": 8, "uratio": 1, "num_workers": 0, "progress": False, "device": "cpu"}
    normatch.train("digits", steps=4, eval_every=2, log_every=2, out=str(tmp_path / "run"), **keys)
    assert main(["plot", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "curves.png"
    assert capsys.readouterr().out.strip() == str(path) and is_png(path)
    titles = set(drawn(tmp_path / "run")[0])
    assert titles == {panel.title for panel in plots.PANELS}


def test_panels_without_curves_are_left_out(tmp_path):
    axes, _ = drawn(write_run(tmp_path / "a", method="supervised"))
    assert set(axes) == {"Accuracy of the averaged weights", "Losses", "Learning rate", "Time per step"}


def test_values_are_those_of_the_metrics(tmp_path):
    axes, _ = drawn(write_run(tmp_path / "a", offset=1.5))
    (line,) = axes["Accuracy of the averaged weights"].get_lines()
    assert line.get_xydata().tolist() == [[50, 51.5], [100, 51.5]]
    step, data = axes["Time per step"].get_lines()
    assert np.allclose(step.get_ydata(), 10) and np.allclose(data.get_ydata(), 2)


def test_runs_that_differ_in_their_seed_are_a_mean_and_a_band(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed, offset=float(seed)) for seed in range(3)]
    other = write_run(tmp_path / "other", method="fixmatch")
    axes, figure = drawn(*folders, other)
    accuracy = axes["Accuracy of the averaged weights"]
    assert [line.get_ydata().tolist() for line in accuracy.get_lines()] == [[51, 51], [50, 50]]
    (band,) = accuracy.collections
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (50, 52)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["normatch, digits, 40 labels (3 seeds: mean ± std)", "fixmatch, digits, 40 labels, seed 0"]


def test_labels_name_what_sets_runs_apart(tmp_path):
    runs = [plots.read_run(write_run(tmp_path / str(lr), lr=lr)) for lr in (0.01, 0.03)]
    assert [label for label in plots.group(runs)] == [
        "normatch, digits, 40 labels, lr=0.01, seed 0",
        "normatch, digits, 40 labels, lr=0.03, seed 0",
    ]
    keys = {f"key{i}": 0 for i in range(5)}  # more than a label has room for: still two groups
    runs = [plots.read_run(write_run(tmp_path / f"x{i}", **{**keys, "key4": i})) for i in (1, 2)]
    runs.append(plots.read_run(write_run(tmp_path / "y", **{k: 9 for k in keys})))
    assert len(plots.group(runs)) == 3


def test_mean_ends_where_the_shortest_run_ends():
    long, short = (np.arange(1, n + 1.0) for n in (10, 4))
    steps, mean, std = plots.mean_and_std([(long, long), (short, short + 2)])
    assert steps.tolist() == [1, 2, 3, 4] and mean.tolist() == [2, 3, 4, 5]
    assert plots.mean_and_std([(long, long), (short[2:], short[2:])])[0].tolist() == [3, 4]
    assert len(plots.mean_and_std([(short, short), (long[5:], long[5:])])[0]) == 0  # nothing in common
    assert np.allclose(std, np.sqrt(2))


def test_seeds_of_very_different_length_are_drawn(tmp_path):
    longer = [write_run(tmp_path / str(seed), seed=seed, steps=20000) for seed in (0, 1)]
    short = write_run(tmp_path / "short", seed=2, steps=20)
    (line,) = drawn(longer[0], short)[0]["Learning rate"].get_lines()
    assert line.get_xdata().tolist() == [10, 20]
    (line,) = drawn(*longer)[0]["Learning rate"].get_lines()
    assert len(line.get_xdata()) == plots.POINTS
    content = (longer[1] / "metrics.jsonl").read_text().splitlines()
    (longer[1] / "metrics.jsonl").write_text("\n".join(line for line in content if json.loads(line)["step"] > 50))
    first, second = drawn(longer[1], short)[0]["Learning rate"].get_lines()  # nothing in common: each by itself
    assert len(first.get_xdata()) > 100 and second.get_xdata().tolist() == [10, 20]


def test_a_long_run_is_averaged_down():
    steps = np.arange(1000.0)
    thin, values = plots.thin(steps, 2 * steps, points=300)
    assert len(thin) == 250 and thin[0] == 1.5 and np.allclose(values, 2 * thin)
    thin, _ = plots.thin(steps[:7], steps[:7], points=3)
    assert thin.tolist() == [1, 4, 6]


def test_a_loss_below_zero_is_seen(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = [{"step": step, "kind": "train", "loss": loss} for step, loss in ((1, 2.0), (2, -3.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = drawn(folder)[0]["Losses"]
    assert losses.get_yscale() == "linear" and losses.get_ylim()[0] < -3


def test_an_unfinished_run_is_drawn(tmp_path):
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "kind": "tr')
    assert is_png(plots.plot(folder))


def test_several_runs_and_other_formats(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / name) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert plots.plot(folders).resolve() == tmp_path / "curves.png" and is_png(tmp_path / "curves.png")
    assert plots.plot(folders, tmp_path / "deep" / "c.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in plots.plot(folders[:1], tmp_path / "c.svg").read_bytes()


def test_what_cannot_be_plotted_is_a_user_error(tmp_path, capsys):
    empty = write_run(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    unknown = write_run(tmp_path / "unknown")
    (unknown / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "fps": 3}\n')
    listed = write_run(tmp_path / "listed")
    (listed / "config.yaml").write_text("- 1\n")
    whole = write_run(tmp_path / "whole")
    (tmp_path / "file").write_text("")
    for arguments, said in (
        ([tmp_path / "none"], "no run folder"),
        ([tmp_path], "metrics.jsonl"),
        ([whole, empty], "nothing to plot"),
        ([unknown], "none of the metrics"),
        ([listed], "config.yaml"),
        ([whole, "--out", tmp_path / "c.gif"], ".png"),
        ([whole, "--out", tmp_path / "c"], ".png"),
        ([whole, "--out", tmp_path / "file" / "c.png"], "written"),
    ):
        capsys.readouterr()
        assert main(["plot", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""
    with pytest.raises(UserError):
        plots.plot([])


def test_a_run_whose_figure_cannot_be_written_still_ends_well(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (folder / "curves.png").mkdir()
    assert plots.leave_figure(folder) is None
    assert "curves.png could not be written" in capsys.readouterr().err
    (folder / "curves.png").rmdir()
    assert is_png(plots.leave_figure(folder))
