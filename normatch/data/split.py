"""The labeled split, and the order in which a run visits the samples."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..errors import UserError
from .base import Dataset
from .philox import random_words


@dataclass(frozen=True)
class Split:
    """Which training samples a run uses, and for what: sorted int64 indices (n,) each."""

    labeled: np.ndarray
    unlabeled: np.ndarray
    validation: np.ndarray

    @property
    def sha256(self) -> str:
        """Identifies the split: equal on every platform, different if any index differs."""
        digest = hashlib.sha256()
        for name in ("labeled", "unlabeled", "validation"):
            indices = np.ascontiguousarray(getattr(self, name), dtype="<i8")
            digest.update(f"{name} {len(indices)}\n".encode())
            digest.update(indices.tobytes())
        return digest.hexdigest()

    def save(self, path):
        with open(path, "wb") as file:  # given a name, NumPy would append .npz to it
            np.savez_compressed(file, **vars(self), sha256=np.array(self.sha256))

    @staticmethod
    def load(path) -> "Split":
        """Raises UserError for a file that is damaged or no split."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                split = Split(stored["labeled"], stored["unlabeled"], stored["validation"])
                sha256 = str(stored["sha256"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is not a readable split ({error})") from error
        if sha256 != split.sha256:
            raise UserError(f"{path} is damaged: its indices do not match its hash")
        return split


def make_split(dataset: Dataset, num_labels: int, seed: int, num_val: int = 0) -> Split:
    """dataset -> Split with num_labels labeled and num_val validation samples, equally many of each class.

    num_labels=0: all labeled samples, whatever the balance. If the data set has published labeled sets of that size
    (STL-10 at 1,000 labels), number seed % len(folds) of them. Samples that the data set itself holds out for
    validation are in neither pool.
    """
    labels = dataset.train_labels
    if len(dataset.validation):
        if num_val:
            raise UserError(f"{dataset.name} has validation images of its own: leave num_val at 0")
        labels = labels.copy()
        labels[dataset.validation] = -1
    classes = len(dataset.classes)
    fold = dataset.folds[seed % len(dataset.folds)] if dataset.folds else None
    if num_labels == 0:
        fold = np.flatnonzero(labels >= 0)
        missing = np.setdiff1d(np.arange(classes), labels[fold])
        if len(missing):
            raise UserError(f"class '{dataset.classes[missing[0]]}' has no labeled image")
    if fold is not None and (num_labels == 0 or num_labels == len(fold)):
        held = dataset.validation
        if num_val:
            rest = labels.copy()
            rest[fold if num_labels else []] = -1
            held = split_labels(rest, num_val, classes, seed, names=dataset.classes).labeled
            fold = np.setdiff1d(fold, held)
        split = Split(np.sort(fold), np.arange(len(labels), dtype=np.int64), np.sort(held))
    else:
        split = split_labels(labels, num_labels, classes, seed, num_val, dataset.classes)
        if not num_val:
            split = replace(split, validation=np.sort(dataset.validation))
    return replace(split, unlabeled=np.setdiff1d(split.unlabeled, split.validation))


def split_labels(
    labels, num_labels: int, num_classes: int, seed: int, num_val: int = 0, names: list[str] | None = None
) -> Split:
    """labels: (N,) int64, -1 if unknown -> Split with num_labels / num_classes labeled samples of each class.

    The unlabeled pool holds all training samples, the labeled ones too, as published. Validation samples, equally
    many of each class, are in neither. num_val does not change which samples are labeled. names: of the classes, for
    error messages.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    most = int(counts.min()) * num_classes
    for key, number, least in (("num_labels", num_labels, num_classes), ("num_val", num_val, 0)):
        if number < least or number % num_classes:
            below = number // num_classes * num_classes
            near = sorted({min(max(n, least), most) for n in (below, below + num_classes)})
            raise UserError(
                f"{key} {number} is not divisible by the {num_classes} classes: "
                f"the nearest possible is {' or '.join(map(str, near))}"
            )
    if num_labels + num_val > most:
        scarce = int(counts.argmin())
        asked = f"num_labels {num_labels}" + (f" and num_val {num_val}" if num_val else "")
        name = names[scarce] if names else scarce
        raise UserError(
            f"{asked} are more than there are: class {name} has {counts[scarce]} training images, "
            f"which allows {most} in all"
        )
    order = sample_order(len(labels), seed, SPLIT, 0, len(labels))
    take, hold = num_labels // num_classes, num_val // num_classes
    by_class = [order[labels[order] == c] for c in range(num_classes)]
    labeled = np.sort(np.concatenate([indices[:take] for indices in by_class]))
    validation = np.sort(np.concatenate([indices[take : take + hold] for indices in by_class]))
    unlabeled = np.setdiff1d(np.arange(len(labels), dtype=np.int64), validation)
    return Split(labeled, unlabeled, validation)


# Streams of `sample_order`: part of the random counter, so never renumber.
LABELED, UNLABELED, SPLIT = 0, 1, 2
# Added to the stream, in the counter word where augmentation has its view, so that the two never share random words.
_SAMPLER = 1 << 16


@lru_cache(maxsize=8)
def _passes(n: int, seed: int, stream: int, block: int):
    """-> (max(1, 4096 // n) * n,): the block-th group of permutations of range(n), for small n many in one call."""
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
    order.flags.writeable = False  # shared through the cache
    return order


def sample_order(n: int, seed: int, stream: int, start: int, count: int):
    """-> (count,) int64: positions start, start + 1, ... of an endless sequence of permutations of range(n).

    Permutation p depends only on (seed, stream, p), so any position is available at any time: a resumed run starts
    further on, and a set smaller than a batch is visited several times per batch, always completely.
    """
    length = max(1, 4096 // n) * n
    blocks = range(start // length, (start + count - 1) // length + 1) if count else ()
    pieces = [_passes(n, seed, stream, b)[max(0, start - b * length) : start + count - b * length] for b in blocks]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
