"""Where real data sets lie, for the tests that use them when they are at hand."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent


def data_folder(file: str) -> Path | None:
    """The folder with `file` (in torchvision's layout) below it: what NORMATCH_DATA names, or one by the checkout."""
    folders = [os.environ.get("NORMATCH_DATA"), ROOT / "data", ROOT.parent / "shared" / "data"]
    return next((Path(f) for f in folders if f and (Path(f) / file).exists()), None)


CIFAR10 = data_folder("cifar-10-batches-py/data_batch_1")
MNIST = data_folder("MNIST/raw/train-images-idx3-ubyte")
