"""A method of your own, `examples/own_method.py`: short, trained, resumed, loaded."""

import inspect
import json
import sys
from pathlib import Path

import pytest

import normatch
from normatch.config import key, make_config
from normatch.data import load_dataset
from normatch.errors import UserError
from normatch.published.checkpoints import load_checkpoint
from normatch.tools.verify import same
from normatch.training.run import Run

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from own_method import PiModel

KEYS = {"batch_size": 16, "eval_every": 30, "log_every": 5, "device": "cpu", "progress": False}


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss_x"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return normatch.train("digits", method=PiModel, out=str(tmp_path_factory.mktemp("pi") / "run"), steps=60, **KEYS)


def test_it_is_one_short_class():
    assert len(inspect.getsource(PiModel).splitlines()) <= 40


def test_it_learns(run):
    assert losses(run.out)[-1] < 0.6 * losses(run.out)[0]
    assert run.test_accuracy > 40  # chance is 10
    assert run.summary["method"] == "PiModel"


def test_its_run_resumes_with_the_same_bits(run, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    save = Run.save

    def save_and_crash(folder, state, improved):
        save(folder, state, improved)
        raise Crash

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", save_and_crash)
        with pytest.raises(Crash):
            normatch.train("digits", method=PiModel, out=str(out), steps=60, **KEYS)
    result = normatch.train(method=PiModel, out=str(out), resume="auto")
    assert result.summary["resumed_from_step"] == 30
    assert losses(out) == losses(run.out)
    whole, parts = (load_checkpoint(folder) for folder in (run.out, out))
    assert all(same(whole[part], parts[part]) for part in ("model", "ema", "optimizer"))


def test_its_model_predicts(run):
    model = normatch.load(run.out, method=PiModel)
    data = load_dataset("digits")
    accuracy = 100 * (model.predict(data.test_x).numpy() == data.test_labels).mean()
    assert accuracy == pytest.approx(run.test_accuracy)


def test_without_the_class_one_line_says_that_it_is_needed(run):
    with pytest.raises(UserError, match=r"needs its class") as refused:
        normatch.load(run.out)
    assert "method=PiModel" in str(refused.value) and "\n" not in str(refused.value)


def test_its_own_settings_are_the_only_ones_it_has(tmp_path):
    with pytest.raises(UserError, match="method PiModel has no such key"):
        normatch.train("digits", method=PiModel, out=str(tmp_path / "run"), backbone="wrn-10-1")
    assert not (tmp_path / "run").exists()


class Weighted(PiModel):
    """A method whose keys no method of the package has, two of which bear the names of published flags."""

    class Keys(PiModel.Keys):
        my_weight: float | None = key(1.0, "weight")
        momentum: float = key(0.5, "a published flag of others")
        threshold: float = key(0.3, "a published alias of p_cutoff")


def test_settings_of_its_own_are_known_whatever_their_names(tmp_path):
    given = {"my-weight": "none", "momentum": 0.7, "threshold": 0.1, "mu": 2}
    config = make_config(method=Weighted, **given)
    assert (config.my_weight, config.momentum, config.threshold, config.uratio) == (None, 0.7, 0.1, 2)
    keys = {**KEYS, "eval_every": 1, "batch_size": 4, "uratio": 1}
    out = normatch.train("digits", method=Weighted, out=str(tmp_path / "run"), steps=1, my_weight=2.0, **keys).out
    again = make_config(method=Weighted, out=str(out), resume="auto")
    assert (again.my_weight, again.steps) == (2.0, 1)
    assert make_config(make_config("digits"), method="fixmatch").method == "fixmatch"
    assert normatch.evaluate(out, method=Weighted)["images"] == 500


class Unfinished(normatch.Method):
    def forward(self, batch, step):
        return None, {}


class NoClass:
    pass


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Unfinished, "lacks class_log_prob, groups"),
        (NoClass, "lacks"),
        ("PiModel", "a class of yours"),
        ("", "unknown method ''"),
        ([1], "unknown method"),
        (type("fixmatch", (PiModel,), {}), "a name of its own"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(method, said, tmp_path):
    with pytest.raises(UserError, match=said) as refused:
        normatch.train("digits", method=method, out=str(tmp_path / "run"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
