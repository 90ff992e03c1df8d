"""Augmented views, case `augment_views`: 960 views, weak, strong, or a step of the CIFAR-10 recipe (64 + 448 + 448).

`bytes` is what a view must move: one read of the uint8 image and one write of the standardized view. NORMATCH_DATA
names the folder with CIFAR-10; without it the images are digits. Pillow runs in as many processes as there are threads.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

from normatch.augment.dali import missing
from normatch.augment.policy import POLICIES
from normatch.bench.views import KINDS, check, maker
from normatch.data import load_dataset


@pytest.fixture(scope="module")
def dataset():
    folder = os.environ.get("NORMATCH_DATA")
    exists = folder and (Path(folder) / "cifar-10-batches-py").is_dir()
    return load_dataset("cifar10", folder) if exists else load_dataset("digits")


@pytest.mark.parametrize("backend", ["native", "dali", "pil"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_augment_views(measure, dataset, kind, dtype, backend):
    if backend == "dali" and missing():
        pytest.skip(missing())
    device, policy = torch.device(DEVICE), POLICIES["kekmodel"]
    check(dataset, policy, [backend], device)
    with ExitStack() as pools:
        call, views = maker(backend, dataset, policy, kind, torch.get_num_threads(), device, pools, dtype)
        moved = views * dataset.train_x[0].size * (1 + dtype.itemsize)
        group = f"augment_views {kind} {str(dtype).removeprefix('torch.')}"
        measure(group, backend, call, moved, 0, views=views, policy="kekmodel", dataset=dataset.name)
