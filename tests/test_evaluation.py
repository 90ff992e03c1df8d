"""Scores of a model against plain counting, and the model's own faces."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import normatch
from normatch.cli import main
from normatch.config import make_config, method_class
from normatch.data import load_dataset, standardize
from normatch.errors import UserError
from normatch.methods.base import Task
from normatch.methods.scorer import count, scores


class Says(nn.Module):
    """A method whose logits (N, K) are written in the images' first pixels."""

    def __init__(self, k):
        super().__init__()
        self.k, self.fc = k, nn.Linear(1, k)

    def class_log_prob(self, x):
        return {"linear": x[:, 0, 0, : self.k]}


def images_that_say(logits):
    """logits: (N, K) in 0..255 -> (N, 1, K, 3) uint8."""
    return np.repeat(np.asarray(logits, np.uint8)[:, None, :, None], 3, 3)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_counts_are_those_of_counting(k, batch_size):
    rng = np.random.default_rng(0)
    logits, labels = rng.permuted(np.tile(np.arange(k) * 20, (61, 1)), axis=1), rng.integers(0, k, 61)
    counts = count(Says(k), images_that_say(logits), labels, (0.5,) * 3, (0.2,) * 3, batch_size=batch_size)
    expected = np.zeros((k, k), int)
    for row, label in zip(logits, labels, strict=True):
        expected[label, row.argmax()] += 1
    assert np.array_equal(counts["linear"]["confusion"], expected) and counts.keys() == {"linear"}
    ranked = np.argsort(-logits, 1)[:, :5]
    assert counts["linear"]["top5"] == (ranked == labels[:, None]).any(1).sum()
    said = (torch.from_numpy(logits).double() / 255 - 0.5) / 0.2
    loss = torch.nn.functional.cross_entropy(said, torch.from_numpy(labels)).item()
    accuracy = 100 * (logits.argmax(1) == labels).mean()
    assert scores(counts, "val") == {"val_accuracy": pytest.approx(accuracy), "val_loss": pytest.approx(loss, rel=1e-5)}


def test_the_density_of_every_voter_is_its_mean():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(61, 2, generator=generator), np.arange(61) % 2
    for preset in ("moons", "scnf-moons"):
        config = make_config(preset, hidden=8)
        method = method_class(config.method)(Task((2,), ["a", "b"]), config).eval()
        counts = count(method, x.numpy(), labels, (1.0, 2.0), (3.0, 4.0), batch_size=7)
        with torch.no_grad():
            out = method.density((x - torch.tensor([1.0, 2.0])) / torch.tensor([3.0, 4.0]))
        expected = {
            "test_accuracy": 100 * (out.class_log_prob.argmax(1).numpy() == labels).mean(),
            "test_loss": torch.nn.functional.cross_entropy(out.class_log_prob, torch.from_numpy(labels)).item(),
            "test_log_prob": out.log_prob.mean().item(),
        }
        assert scores(counts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("preset", ["moons", "scnf-moons"])
def test_eval_reports_the_density_of_a_flow(tmp_path, capsys, preset):
    keys = {"hidden": 8, "steps": 2, "progress": False, "device": "cpu", "out": str(tmp_path / "run")}
    run = normatch.train(preset, **keys).out
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    figures = normatch.evaluate(run)
    assert figures["test_log_prob"] == pytest.approx(last["test_log_prob"], rel=1e-6)
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert f"{'test_log_prob':22} {figures['test_log_prob']:6.2f} nats" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "run"
    keys = {"backbone": "wrn-10-1", "batch_size": 8, "uratio": 1, "num_workers": 0, "progress": False, "device": "cpu"}
    return normatch.train("digits", steps=20, ema_decay=0.5, out=str(out), **keys)


def test_scores_of_a_run(run):
    figures = normatch.evaluate(run.out)
    assert figures["test_accuracy"] == run.test_accuracy
    assert figures["test_accuracy_flow"] == run.summary["test_accuracy_flow"]
    data, model = load_dataset("digits"), normatch.load(run.out)
    predicted = model.predict(data.test_x).numpy()
    with torch.no_grad():
        features, _ = model.method.classifier(standardize(torch.from_numpy(data.test_x), data.mean, data.std))
        log_prob = model.method.flows[0](features).log_prob.mean().item()
    assert figures["test_log_prob_flow"] == pytest.approx(log_prob, rel=1e-4) and "test_log_prob" not in figures
    for k, (name, score) in enumerate(figures["per_class"].items()):
        assert name == data.classes[k]
        assert score == pytest.approx(100 * (predicted[data.test_labels == k] == k).mean())
    assert figures["confusion"][3][8] == ((data.test_labels == 3) & (predicted == 8)).sum()
    assert figures["test_balanced_accuracy"] == pytest.approx(np.mean(list(figures["per_class"].values())))
    assert figures["test_accuracy"] <= figures["test_top5"] <= 100


def test_a_class_without_images_is_left_out_of_the_mean(run, monkeypatch, capsys):
    data = load_dataset("digits")
    some = data.test_labels != 4
    fewer = dataclasses.replace(data, test_x=data.test_x[some], test_labels=data.test_labels[some])
    monkeypatch.setattr(normatch.model, "load_dataset", lambda *_: fewer)
    figures = normatch.evaluate(run.out)
    assert figures["per_class"]["4"] is None
    others = [score for score in figures["per_class"].values() if score is not None]
    assert len(others) == 9 and figures["test_balanced_accuracy"] == pytest.approx(np.mean(others))
    assert main(["eval", str(run.out), "--device", "cpu"]) == 0
    assert "no image" in capsys.readouterr().out


def test_eval_prints_every_class(run, capsys):
    assert main(["eval", str(run.out), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for text in (
        "test_accuracy ",
        "test_accuracy_flow",
        "test_log_prob_flow",
        "test_top5",
        "test_balanced_accuracy",
        "most often taken for",
    ):
        assert text in out
    assert len(out.splitlines()) == 1 + 5 + 2 + 10


def test_classes_of_another_data_set_are_refused(run, monkeypatch):
    data = load_dataset("digits")
    letters = dataclasses.replace(data, classes=list("abcdefghij"))
    monkeypatch.setattr(normatch.model, "load_dataset", lambda *_: letters)
    with pytest.raises(UserError, match="classes"):
        normatch.evaluate(run.out)
    assert "a" in normatch.evaluate(run.out, dataset="digits")["per_class"]  # named by the user: the number must fit
    fewer = dataclasses.replace(data, classes=list("abc"))
    monkeypatch.setattr(normatch.model, "load_dataset", lambda *_: fewer)
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
    refused("backbone of yours", backbone="given")
    torch.save({k: v for k, v in state.items() if k != "mean"}, tmp_path / "changed.pt")
    with pytest.raises(UserError, match="'mean' is missing"):
        normatch.load(tmp_path / "changed.pt")


def test_probabilities_of_no_image(run):
    assert normatch.load(run.out).predict_proba(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 10)
