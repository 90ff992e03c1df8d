"""FlowGMMClassifier: scikit-learn's conventions, what it learns, and what it refuses."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris, load_wine, make_moons
from sklearn.utils.estimator_checks import parametrize_with_checks

from normatch import FlowGMMClassifier
from normatch.data import load_dataset

# What does not apply: scikit-learn's own semi-supervised estimators are exempted from the first by name.
EXCEPTIONS = {"check_classifiers_classes": "its labels are -1 and 1, but -1 means unlabeled"}


@parametrize_with_checks(
    [FlowGMMClassifier(steps=10, couplings=2, hidden=8)], expected_failed_checks=lambda estimator: EXCEPTIONS
)
def test_keeps_scikit_learns_conventions(estimator, check):
    check(estimator)


def few_labels(X, y, per_class, seed=0):
    order = np.random.RandomState(seed).permutation(len(y))
    partly = np.full(len(y), -1)
    for label in np.unique(y):
        rows = order[y[order] == label][:per_class]
        partly[rows] = label
    return partly


def test_unlabeled_rows_teach_it_the_moons():
    moons = load_dataset("moons")
    X, y, labeled = moons.train_x, moons.train_labels, moons.folds[0]
    partly = np.full(1000, -1)
    partly[labeled] = y[labeled]
    given = {"hidden": 32, "couplings": 5, "batch_size": 60, "noise": 0.05, "lr": 3e-3, "random_state": 0}
    assert FlowGMMClassifier(steps=1, **given).fit(X, partly).score(X, y) < 0.93  # the best a straight line does
    assert FlowGMMClassifier(steps=250, **given).fit(X, partly).score(X, y) > 0.98


@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_data_driven_means_keep_few_dimensions_from_collapsing(load):
    X, y = load(return_X_y=True)
    partly = few_labels(X, y, 5)
    spread = FlowGMMClassifier(steps=200, random_state=0).fit(X, partly).score(X, y)
    blind = FlowGMMClassifier(steps=200, random_state=0, means="antipodal").fit(X, partly).score(X, y)
    assert spread > 0.85 and spread > blind + 0.1


def test_densities_samples_and_labels_of_any_kind():
    X, y = make_moons(300, noise=0.05, random_state=0)
    X = X * [10, 0.1]
    model = FlowGMMClassifier(steps=150, noise=0.1, random_state=0).fit(X, np.where(y == 1, 7, 3))
    assert model.classes_.tolist() == [3, 7] and set(model.predict(X)) == {3, 7}
    # Integrates to 1 over the plane, in the units of X.
    a, b = np.meshgrid(np.linspace(-40, 50, 300), np.linspace(-0.4, 0.5, 300))
    density = np.exp(model.score_samples(np.stack([a.ravel(), b.ravel()], 1)))
    assert abs(density.sum() * (90 / 299) * (0.9 / 299) - 1) < 0.05
    samples = model.sample(200, label=7)
    assert samples.shape == (200, 2) and (model.predict(samples) == 7).mean() > 0.9
    with pytest.raises(ValueError, match="label must be one of"):
        model.sample(1, label=5)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))


def test_labels_may_be_names():
    X, y = load_iris(return_X_y=True)
    partly = few_labels(X, y, 10)
    names = np.array(["setosa", "versicolor", "virginica"], object)[partly]
    names[partly == -1] = -1
    named = FlowGMMClassifier(steps=20, random_state=0).fit(X, names)
    assert named.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    numbered = FlowGMMClassifier(steps=20, random_state=0).fit(X, partly)
    assert np.array_equal(named.predict(X), named.classes_[numbered.predict(X)])


def test_leaves_the_global_generator_alone_and_repeats_itself():
    X, y = load_iris(return_X_y=True)
    torch.manual_seed(5)
    first = FlowGMMClassifier(steps=5, random_state=3).fit(X, y).predict_proba(X)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    assert np.array_equal(FlowGMMClassifier(steps=5, random_state=3).fit(X, y).predict_proba(X), first)


def test_refuses_what_it_cannot_learn_from():
    X, y = make_moons(50, noise=0.05, random_state=0)
    model = FlowGMMClassifier(steps=2)
    with pytest.raises(ValueError, match="no row has a label"):
        model.fit(X, np.full(50, -1))
    with pytest.raises(ValueError, match=r"1 columns are constant \(2\)"):
        model.fit(np.c_[X, np.ones(50)], y)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.where(np.arange(100).reshape(50, 2) == 7, np.nan, X), y)
    for name, value in {"means": "everywhere", "steps": 0, "lr": -1.0, "hidden": 3.5, "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"^{name}.*, not {value!r}$"):  # one line
            FlowGMMClassifier(**{name: value}).fit(X, y)
    with pytest.raises(ValueError, match="y holds the text '-1'"):
        model.fit(X, np.where(np.arange(50) < 10, np.array(["north", "south"])[y], "-1"))
    with pytest.raises(ValueError, match="smaller lr"):
        FlowGMMClassifier(steps=20, lr=1e6).fit(X, y)
