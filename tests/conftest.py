"""Shared fixtures: the numbers recorded from the published implementations, and the GPU marker."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line does; read when torch is loaded

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
# The smaller files travel with the repository; the larger ones lie beside a developer's checkout.
GOLDEN_FOLDERS = [TESTS / "golden", TESTS.parent.parent / "shared" / "golden"]


@pytest.fixture
def golden():
    """name -> {key: array} of one recorded file; the test is skipped where the file is not at hand."""

    def load(name: str) -> dict[str, np.ndarray]:
        for folder in GOLDEN_FOLDERS:
            if (folder / f"{name}.npz").is_file():
                return dict(np.load(folder / f"{name}.npz", allow_pickle=False))
        pytest.skip(f"{name}.npz is one of the larger recorded files, which are not in the repository")

    return load


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
