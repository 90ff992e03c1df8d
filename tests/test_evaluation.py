"""Scores of a model against plain counting, and the model's own faces."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import normatch
from normatch import evaluation
from normatch.cli import main
from normatch.data import load_dataset
from normatch.errors import UserError


class Says(nn.Module):
    """A classifier whose logits (N, K) are written in the images' first pixels."""

    def __init__(self, k):
        super().__init__()
        self.k, self.fc = k, nn.Linear(1, k)

    def forward(self, x):
        logits = x[:, 0, 0, : self.k]
        return logits, logits


def images_that_say(logits):
    """logits: (N, K) in 0..255 -> (N, 1, K, 3) uint8."""
    return np.repeat(np.asarray(logits, np.uint8)[:, None, :, None], 3, 3)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_counts_are_those_of_counting(k, batch_size):
    rng = np.random.default_rng(0)
    logits, labels = rng.permuted(np.tile(np.arange(k) * 20, (61, 1)), axis=1), rng.integers(0, k, 61)
    counts = evaluation.count(
        Says(k), (), images_that_say(logits), labels, (0.5,) * 3, (0.2,) * 3, batch_size=batch_size
    )
    expected = np.zeros((k, k), int)
    for row, label in zip(logits, labels, strict=True):
        expected[label, row.argmax()] += 1
    assert np.array_equal(counts["confusion"], expected) and "confusion_flow" not in counts
    ranked = np.argsort(-logits, 1)[:, :5]
    assert counts["top5"] == (ranked == labels[:, None]).any(1).sum()
    scores = evaluation.accuracy(Says(k), (), images_that_say(logits), labels, (0.5,) * 3, (0.2,) * 3, "val")
    said = (torch.from_numpy(logits).double() / 255 - 0.5) / 0.2
    loss = torch.nn.functional.cross_entropy(said, torch.from_numpy(labels)).item()
    accuracy = 100 * (logits.argmax(1) == labels).mean()
    assert scores == {"val_accuracy": pytest.approx(accuracy), "val_loss": pytest.approx(loss, rel=1e-5)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "run"
    keys = {"backbone": "wrn-10-1", "batch_size": 8, "uratio": 1, "num_workers": 0, "progress": False, "device": "cpu"}
    return normatch.train("digits", steps=20, ema_decay=0.5, out=str(out), **keys)


def test_scores_of_a_run(run):
    scores = normatch.evaluate(run.out)
    assert scores["test_accuracy"] == run.test_accuracy
    assert scores["test_accuracy_flow"] == run.summary["test_accuracy_flow"]
    data = load_dataset("digits")
    predicted = normatch.load(run.out).predict(data.test_x).numpy()
    for k, (name, score) in enumerate(scores["per_class"].items()):
        assert name == data.classes[k]
        assert score == pytest.approx(100 * (predicted[data.test_labels == k] == k).mean())
    assert scores["confusion"][3][8] == ((data.test_labels == 3) & (predicted == 8)).sum()
    assert scores["test_balanced_accuracy"] == pytest.approx(np.mean(list(scores["per_class"].values())))
    assert scores["test_accuracy"] <= scores["test_top5"] <= 100


def test_a_class_without_images_is_left_out_of_the_mean(run, monkeypatch, capsys):
    data = load_dataset("digits")
    some = data.test_labels != 4
    fewer = dataclasses.replace(data, test_x=data.test_x[some], test_labels=data.test_labels[some])
    monkeypatch.setattr(evaluation, "load_dataset", lambda *_: fewer)
    scores = normatch.evaluate(run.out)
    assert scores["per_class"]["4"] is None
    others = [score for score in scores["per_class"].values() if score is not None]
    assert len(others) == 9 and scores["test_balanced_accuracy"] == pytest.approx(np.mean(others))
    assert main(["eval", str(run.out), "--device", "cpu"]) == 0
    assert "no image" in capsys.readouterr().out


def test_eval_prints_every_class(run, capsys):
    assert main(["eval", str(run.out), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for text in ("test_accuracy ", "test_accuracy_flow", "test_top5", "test_balanced_accuracy", "most often taken for"):
        assert text in out
    assert len(out.splitlines()) == 1 + 4 + 2 + 10


def test_classes_of_another_data_set_are_refused(run, monkeypatch):
    data = load_dataset("digits")
    letters = dataclasses.replace(data, classes=list("abcdefghij"))
    monkeypatch.setattr(evaluation, "load_dataset", lambda *_: letters)
    with pytest.raises(UserError, match="classes"):
        normatch.evaluate(run.out)
    assert "a" in normatch.evaluate(run.out, dataset="digits")["per_class"]  # named by the user: the number must fit
    fewer = dataclasses.replace(data, classes=list("abc"))
    monkeypatch.setattr(evaluation, "load_dataset", lambda *_: fewer)
    with pytest.raises(UserError, match="classes"):
        normatch.evaluate(run.out, dataset="digits")


def test_a_checkpoint_that_does_not_fit_is_a_user_error(run, tmp_path):
    state = torch.load(run.out / "checkpoints" / "last.pt", weights_only=True)

    def refused(said, **changed):
        torch.save({**state, **changed}, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=said) as error:
            normatch.load(tmp_path / "changed.pt")
        assert "changed.pt" in str(error.value) and "\n" not in str(error.value)

    refused("configuration", config={**state["config"], "key_of_the_future": 1})
    refused("configuration", config=[1])
    refused("tensors", config={**state["config"], "backbone": "wrn-16-1"})
    refused("tensors", ema={})
    refused("backbone of your own", backbone="given")
    torch.save({k: v for k, v in state.items() if k != "mean"}, tmp_path / "changed.pt")
    with pytest.raises(UserError, match="'mean' is missing"):
        normatch.load(tmp_path / "changed.pt")


def test_probabilities_of_no_image(run):
    assert normatch.load(run.out).predict_proba(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 10)
