"""Image sets in memory, the labelled split, and the order in which a run visits the images."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .augment import random_words
from .errors import UserError

DATASETS = ("digits", "cifar10", "cifar100")
LATER = ("svhn", "stl10", "mnist", "fashionmnist", "miniimagenet", "folder", "csv")


@dataclass(frozen=True)
class Dataset:
    """Images in memory, as uint8 RGB. A label of -1 is unknown."""

    name: str
    train_images: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray  # (M, H, W, 3) uint8
    test_labels: np.ndarray  # (M,) int64
    classes: list[str]
    mean: tuple[float, float, float]  # of the training pixels in [0, 1]
    std: tuple[float, float, float]
    flip: bool  # whether a mirrored image still shows its class


def load_dataset(name: str, data_dir=None, download: bool = False) -> Dataset:
    """One of DATASETS. data_dir (default "data") holds the files in torchvision's layout."""
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, Path(data_dir or "data"), download)
    if name in LATER:
        raise UserError(f"dataset '{name}' is not there yet: this version has {', '.join(DATASETS)}")
    near = get_close_matches(str(name), DATASETS + LATER, n=1, cutoff=0)[0]
    raise UserError(f"unknown dataset '{name}': did you mean '{near}'? There are {', '.join(DATASETS)}")


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits: 1,297 to train, 500 to test, at 32x32.

    The test set holds 50 images of each digit. It is the same whatever the run's seed, as a published test
    set would be.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed for this set alone

    raw, labels = load_digits(return_X_y=True)
    # 0..16 -> 0..255, halves rounded up: integers, hence the same everywhere.
    small = ((raw.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8)
    images = np.stack(
        [np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB")) for x in small]
    )
    labels = labels.astype(np.int64)
    test = split_labels(labels, 500, 10, seed=0).labeled
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Dataset(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=[str(digit) for digit in range(10)],
        mean=(0.3048, 0.3048, 0.3048),  # of the 1,297 training images
        std=(0.3229, 0.3229, 0.3229),
        flip=False,
    )


# The constants of the published FixMatch and NorMatch code.
_CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", "cifar-100-python", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def _cifar(name: str, data_dir: Path, download: bool) -> Dataset:
    class_name, folder, mean, std = _CIFAR[name]
    hint = f"put the unpacked {folder} there, name the folder that holds it with --data_dir, or pass --download"
    if not download and not (data_dir / folder).is_dir():
        raise UserError(f"{name} is not in {data_dir}: {hint}")
    try:
        from torchvision import datasets  # imported here because the digits do without it
    except Exception as error:  # a torchvision made for another torch fails with RuntimeError
        raise UserError(f"{name} is read through torchvision, which cannot be imported ({error})") from error
    try:
        train, test = (
            getattr(datasets, class_name)(str(data_dir), train=part, download=download) for part in (True, False)
        )
    except (OSError, RuntimeError) as error:
        if download:
            raise UserError(f"{name} could not be downloaded into {data_dir} ({error})") from error
        raise UserError(f"{name} in {data_dir} is incomplete or damaged: {hint}") from error
    return Dataset(
        name=name,
        train_images=np.ascontiguousarray(train.data),  # torchvision's are transposed views
        train_labels=np.array(train.targets, dtype=np.int64),
        test_images=np.ascontiguousarray(test.data),
        test_labels=np.array(test.targets, dtype=np.int64),
        classes=list(train.classes),
        mean=mean,
        std=std,
        flip=True,
    )


# ---- The labelled split --------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which training images a run may use, and for what: sorted int64 indices."""

    labeled: np.ndarray
    unlabeled: np.ndarray
    validation: np.ndarray

    @property
    def sha256(self) -> str:
        """Names the split: equal on every platform, different as soon as one index is."""
        digest = hashlib.sha256()
        for name in ("labeled", "unlabeled", "validation"):
            indices = np.ascontiguousarray(getattr(self, name), dtype="<i8")
            digest.update(f"{name} {len(indices)}\n".encode())
            digest.update(indices.tobytes())
        return digest.hexdigest()

    def save(self, path):
        with open(path, "wb") as file:  # an open file, because numpy would append .npz to a name
            np.savez_compressed(
                file,
                labeled=self.labeled,
                unlabeled=self.unlabeled,
                validation=self.validation,
                sha256=np.array(self.sha256),
            )

    @staticmethod
    def load(path) -> "Split":
        try:
            with np.load(path, allow_pickle=False) as stored:
                split = Split(stored["labeled"], stored["unlabeled"], stored["validation"])
                sha256 = str(stored["sha256"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is not a readable split ({error})") from error
        if sha256 != split.sha256:
            raise UserError(f"{path} is damaged: its indices do not match its hash")
        return split


def split_labels(labels, num_labels: int, num_classes: int, seed: int, num_val: int = 0) -> Split:
    """labels: (N,) int64, -1 unknown -> Split with num_labels / num_classes labelled images of each class.

    The unlabelled pool is all training images, the labelled ones included, as published. Validation images,
    equally many of each class, are taken out of both. The labelled images are the same whatever num_val is.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    most = int(counts.min()) * num_classes
    for what, number, least in (("num_labels", num_labels, num_classes), ("num_val", num_val, 0)):
        if number < least or number % num_classes:
            below = number // num_classes * num_classes
            near = sorted({min(max(n, least), most) for n in (below, below + num_classes)})
            raise UserError(
                f"{what} {number} is not divisible by the {num_classes} classes: "
                f"the nearest possible is {' or '.join(map(str, near))}"
            )
    if num_labels + num_val > most:
        scarce = int(counts.argmin())
        asked = f"num_labels {num_labels}" + (f" and num_val {num_val}" if num_val else "")
        raise UserError(
            f"{asked} are more than there are: class {scarce} has {counts[scarce]} training images, "
            f"which allows {most} in all"
        )
    order = sample_order(len(labels), seed, SPLIT, 0, len(labels))
    take, hold = num_labels // num_classes, num_val // num_classes
    by_class = [order[labels[order] == c] for c in range(num_classes)]
    labeled = np.sort(np.concatenate([indices[:take] for indices in by_class]))
    validation = np.sort(np.concatenate([indices[take : take + hold] for indices in by_class]))
    unlabeled = np.setdiff1d(np.arange(len(labels), dtype=np.int64), validation)
    return Split(labeled, unlabeled, validation)


# ---- The order of visits -------------------------------------------------------------------------

# Streams of sample_order: part of the random counter, so never renumber.
LABELED, UNLABELED, SPLIT = 0, 1, 2
# Added to a stream's number where an augmentation has its view's, so that the two never share random words.
_SAMPLER = 1 << 16


@lru_cache(maxsize=8)
def _passes(n: int, seed: int, stream: int, block: int):
    """The block-th run of `max(1, 4096 // n)` permutations end to end: those of small sets in one sweep."""
    per_block = max(1, 4096 // n)
    first = block * per_block
    words = random_words(
        seed,
        np.repeat(np.arange(first, first + per_block), n),
        np.tile(np.arange(n), per_block),
        _SAMPLER + stream,
        count=2,
    ).astype(np.uint64)
    keys = (words[:, 0] << np.uint64(32)) | words[:, 1]
    order = keys.reshape(per_block, n).argsort(axis=1, kind="stable").astype(np.int64).reshape(-1)
    order.flags.writeable = False  # it is shared by all who ask
    return order


def sample_order(n: int, seed: int, stream: int, start: int, count: int):
    """-> (count,) int64: positions start, start + 1, ... of an endless row of permutations of range(n).

    Permutation p depends on (seed, stream, p) alone, so that any position can be asked for at any time: a
    resumed run only starts further on, and a set smaller than a batch is simply passed over several times,
    always in full.
    """
    length = max(1, 4096 // n) * n
    blocks = range(start // length, (start + count - 1) // length + 1) if count else ()
    pieces = [_passes(n, seed, stream, b)[max(0, start - b * length) : start + count - b * length] for b in blocks]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
