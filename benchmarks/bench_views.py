"""Augmented views, case `augment_views`: the step of the CIFAR-10 recipe, 64 weak, 448 weak and 448 strong views.

bytes are what a view must move: one read of the uint8 image and one write of the normalised view. NORMATCH_DATA names
the folder with CIFAR-10; without it the images are digits. `normatch bench augment` also compares numbers of cores.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE

from normatch import ops, reference
from normatch.augment.dali import Views, missing
from normatch.augment.draws import View
from normatch.augment.policy import OPS, POLICIES
from normatch.bench.views import views_of
from normatch.data import load_dataset

KINDS = {
    "weak": [View.UNLABELED_WEAK] * 960,
    "strong": [View.UNLABELED_STRONG] * 960,
    "step": [View.LABELED_WEAK] * 64 + [View.UNLABELED_WEAK] * 448 + [View.UNLABELED_STRONG] * 448,
}


@pytest.fixture(scope="module")
def dataset():
    folder = os.environ.get("NORMATCH_DATA")
    there = folder and (Path(folder) / "cifar-10-batches-py").is_dir()
    return load_dataset("cifar10", folder) if there else load_dataset("digits")


def draws_of(dataset, kind, visit):
    rows = np.random.default_rng(visit).integers(0, len(dataset.train_x), 960)
    return np.stack([rows, rows, np.full(960, visit), np.array(KINDS[kind], np.int64)], 1)


def provider_call(name, dataset, kind, policy, dtype):
    """A function that makes 960 views."""
    settings = (policy, 0, dataset.mean, dataset.std, dtype, dataset.flip)
    if name == "dali":
        endless = (draws_of(dataset, kind, i % 8) for i in range(10**9))
        views = Views(dataset.train_x, policy, 0, 960, endless, DEVICE, dataset.mean, dataset.std, dataset.flip)
        return lambda: next(views)[1].to(dtype)
    images = torch.from_numpy(dataset.train_x).to(DEVICE)
    draws = torch.from_numpy(draws_of(dataset, kind, 0)).to(DEVICE)
    make = ops.augment_views if name == "normatch" else reference.augment_views
    return lambda: make(images, draws, *settings)


@pytest.mark.parametrize("provider", ["normatch", "dali", "pil"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_augment_views(measure, dataset, kind, dtype, provider):
    if provider == "dali" and missing():
        pytest.skip(missing())
    policy = POLICIES["kekmodel"]
    fresh = draws_of(dataset, kind, int.from_bytes(os.urandom(3), "little"))
    if provider != "pil":  # agreement first; where DALI's own Equalize was drawn, none is asked for
        name = "native" if provider == "normatch" else "dali"
        got, want = (views_of(dataset.train_x, fresh, policy, 0, b, dataset.flip, DEVICE).int() for b in (name, "pil"))
        share = ((got - want).abs() > 1).flatten(1).any(1).float().mean()
        assert share <= (0 if provider == "normatch" else 1.5 / len(OPS)), f"{provider} disagrees"
    call = provider_call(provider, dataset, kind, policy, dtype)
    moved = 960 * dataset.train_x[0].size * (1 + dtype.itemsize)
    group = f"augment_views {kind} {str(dtype).removeprefix('torch.')}"
    measure(group, provider, call, moved, 0, views=960, policy="kekmodel", dataset=dataset.name)
