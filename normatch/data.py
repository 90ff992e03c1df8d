"""Image sets in memory, the labelled split, and the order in which a run visits the images.

Own images need no code: `folder` reads

    data_dir/train/CLASS/*     labelled images
    data_dir/unlabeled/**      images without a label (optional)
    data_dir/val/CLASS/*       held out to choose the best checkpoint (optional)
    data_dir/test/CLASS/*      held out to report the accuracy; val/ stands in where there is none

and `csv` a table of images and labels (`normatch.folders` has the details).
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .augment.philox import random_words
from .augment.policy import MAX_SIDE
from .errors import UserError, nearest
from .tables import TABLES, Table, load_table

DATASETS = (
    "digits", "cifar10", "cifar100", "svhn", "svhn+extra", "stl10", "mnist", "fashionmnist", "miniimagenet", "folder",
    "csv", *TABLES,
)  # fmt: skip


def _no_rows():
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 RGB, in memory; those to train on may be `folders.FileImages`. A label of -1 is unknown."""

    name: str
    train_images: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray  # (M, H, W, 3) uint8
    test_labels: np.ndarray  # (M,) int64
    classes: list[str]
    mean: tuple[float, float, float]  # of the training pixels in [0, 1]
    std: tuple[float, float, float]
    flip: bool  # whether a mirrored image still shows its class
    validation: np.ndarray = field(default_factory=_no_rows)  # training rows that the data set itself holds out
    folds: tuple[np.ndarray, ...] = ()  # training rows of the published labelled sets


def load_dataset(
    name: str,
    data_dir=None,
    download: bool = False,
    image_size: int | None = None,
    compat: str = "none",
    in_memory: bool = True,
) -> "Dataset | Table":
    """One of DATASETS; those of `normatch.tables` are a Table.

    data_dir (default "data") holds the files in torchvision's layout, or one's own images.

    image_size: their side, default as they are, or of one's own images what suits most of them. compat="reference":
    STL-10 and Mini-ImageNet as the published code handles them. in_memory=False: the training images of class folders
    and tables stay in their files, for sets larger than memory. Raises UserError for what the user can mend.
    """
    folder = Path(data_dir or "data")
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise UserError(f"image_size may be 1 to {MAX_SIDE}, not {image_size}")
    if name == "digits":
        return _sized(_digits(), image_size)
    if name in _TORCHVISION:
        return _sized(_from_torchvision(name, folder, download), image_size)
    if name in ("svhn", "svhn+extra"):
        return _sized(_svhn(name, folder, download), image_size)
    if name == "stl10":
        return _stl10(folder, download, compat == "reference")
    if name in TABLES:
        return load_table(name, data_dir)
    if name in ("folder", "csv", "miniimagenet"):
        from . import folders  # reads files only where there are some to read

        if name == "csv":
            return folders.load_table(folder, image_size, in_memory)
        if name == "folder":
            return folders.load_folder(folder, image_size, in_memory)
        return _miniimagenet(folder, image_size or 84, compat == "reference", in_memory)
    if name == "imagenet":
        raise UserError("dataset 'imagenet' is not there yet; class folders of it can be read as --dataset folder")
    if name and Path(name).exists():
        kind = "folder" if Path(name).is_dir() else "csv"
        raise UserError(f"unknown dataset {name!r}: your own images are --dataset {kind} --data_dir {name}")
    raise UserError(f"unknown dataset {name!r}{nearest(name, DATASETS)}; data sets: {', '.join(DATASETS)}")


def load_images(name: str, *arguments, **settings) -> Dataset:
    """`load_dataset` for what is done with images alone. Raises UserError for a table."""
    if name in TABLES:
        raise UserError(f"{name} is a table: there are no views of its rows")
    return load_dataset(name, *arguments, **settings)


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


# name: torchvision's class, the folder it looks for, mean and std of the published FixMatch and NorMatch code (those of
# MNIST and Fashion-MNIST: of their training pixels), whether a mirrored image still shows its class.
_TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), True),
    "cifar100": ("CIFAR100", "cifar-100-python", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), True),
    "mnist": ("MNIST", "MNIST/raw", (0.1307,) * 3, (0.3081,) * 3, False),
    "fashionmnist": ("FashionMNIST", "FashionMNIST/raw", (0.2860,) * 3, (0.3530,) * 3, True),
}
_HALF = (0.5, 0.5, 0.5)  # the published mean and std of SVHN and STL-10


def _parts(name: str, class_name: str, data_dir: Path, needed: str, download: bool, *arguments: dict) -> list:
    """torchvision's data set, once for each of `arguments`; what goes wrong is one line that says what to put where."""
    hint = f"put the unpacked {needed} there, name the folder that holds it with --data_dir, or pass --download"
    if not download and not (data_dir / needed).exists():
        raise UserError(f"{name} is not in {data_dir}: {hint}")
    try:
        from torchvision import datasets  # imported here because the digits do without it
    except Exception as error:  # a torchvision made for another torch fails with RuntimeError
        raise UserError(f"{name} is read through torchvision, which cannot be imported ({error})") from error
    try:
        return [getattr(datasets, class_name)(str(data_dir), **given, download=download) for given in arguments]
    except ImportError as error:  # SVHN's files are read by SciPy
        raise UserError(f"{name} cannot be read ({error}): pip install scipy") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if download:
            raise UserError(
                f"{name} could not be downloaded into {data_dir} ({error}): without a network, "
                f"put the unpacked {needed} there yourself"
            ) from error
        raise UserError(f"{name} in {data_dir} is incomplete or damaged: {hint}") from error


def _labels(labels) -> np.ndarray:
    return np.array(labels.tolist() if hasattr(labels, "tolist") else labels, dtype=np.int64)  # also of tensors


def _rgb(images) -> np.ndarray:
    """(N, H, W, 3) or (N, H, W) uint8 -> (N, H, W, 3), dense: torchvision's are often transposed views."""
    images = np.asarray(images)
    return np.ascontiguousarray(np.broadcast_to(images[..., None], (*images.shape, 3)) if images.ndim == 3 else images)


def _from_torchvision(name: str, data_dir: Path, download: bool) -> Dataset:
    class_name, needed, mean, std, flip = _TORCHVISION[name]
    train, test = _parts(name, class_name, data_dir, needed, download, {"train": True}, {"train": False})
    return Dataset(
        name=name,
        train_images=_rgb(train.data),
        train_labels=_labels(train.targets),
        test_images=_rgb(test.data),
        test_labels=_labels(test.targets),
        classes=list(train.classes),
        mean=mean,
        std=std,
        flip=flip,
    )


def _svhn(name: str, data_dir: Path, download: bool) -> Dataset:
    """Street View House Numbers: 73,257 images to train (604,388 with the easier `extra` ones), 26,032 to test."""
    splits = ("train", "test", "extra") if name == "svhn+extra" else ("train", "test")
    needed = "extra_32x32.mat" if name == "svhn+extra" else "train_32x32.mat"
    train, test, *extra = _parts(name, "SVHN", data_dir, needed, download, *({"split": s} for s in splits))
    images = _channels_last([part.data for part in (train, *extra)])
    return Dataset(
        name=name,
        train_images=images,
        train_labels=_labels(np.concatenate([part.labels for part in (train, *extra)])),
        test_images=_channels_last([test.data]),
        test_labels=_labels(test.labels),
        classes=[str(digit) for digit in range(10)],
        mean=_HALF,
        std=_HALF,
        flip=False,  # the paper does not mirror them; the published PyTorch code does
    )


def _channels_last(parts) -> np.ndarray:
    """(n, 3, H, W) arrays -> (N, H, W, 3), one after the other, without a second copy of them all."""
    out = np.empty((sum(map(len, parts)), *parts[0].shape[2:], 3), np.uint8)
    start = 0
    for part in parts:
        out[start : start + len(part)] = part.transpose(0, 2, 3, 1)
        start += len(part)
    return out


def _stl10(data_dir: Path, download: bool, reference: bool) -> Dataset:
    """STL-10 at 96 px: 5,000 labelled images in ten predefined folds of 1,000, and 100,000 unlabelled ones.

    reference: what the published NorMatch code trains on: the 5,000 images alone, without folds, enlarged to 224 px.
    """
    splits = ("train", "test") if reference else ("train", "test", "unlabeled")
    train, test, *unlabeled = _parts(
        "stl10", "STL10", data_dir, "stl10_binary", download, *({"split": split} for split in splits)
    )
    classes = [line.strip() for line in train.classes]
    folds = ()
    if reference:
        images, test_images = (_resized(_channels_last([part.data]), 224) for part in (train, test))
    else:
        images, test_images = _channels_last([part.data for part in (train, *unlabeled)]), _channels_last([test.data])
        try:
            lines = (data_dir / "stl10_binary" / "fold_indices.txt").read_text().splitlines()
            folds = tuple(np.sort(np.array(line.split(), np.int64)) for line in lines if line.strip())
        except (OSError, ValueError) as error:
            raise UserError(f"stl10 in {data_dir} is incomplete: fold_indices.txt cannot be read ({error})") from error
    labels = np.full(len(images), -1, np.int64)
    labels[: len(train.labels)] = train.labels
    return Dataset(
        name="stl10",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=_labels(test.labels),
        classes=classes,
        mean=_HALF,
        std=_HALF,
        flip=True,
        folds=folds,
    )


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    out = np.empty((len(images), size, size, 3), np.uint8)
    for image, place in zip(images, out, strict=True):
        place[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    return out


def _sized(dataset: Dataset, size: int | None) -> Dataset:
    if size in (None, dataset.train_images.shape[1]):
        return dataset
    images, test_images = (_resized(part, size) for part in (dataset.train_images, dataset.test_images))
    return replace(dataset, train_images=images, test_images=test_images)


def _miniimagenet(data_dir: Path, image_size: int, reference: bool, in_memory: bool) -> Dataset:
    """Mini-ImageNet in class folders train/ and test/, 100 classes at 84 px; all training images are the pool."""
    from . import folders

    places = [data_dir, *(data_dir / sub for sub in ("miniimagenet", "mini-imagenet", "mini_imagenet"))]
    place = next((p for p in places if (p / "train").is_dir()), None)
    if place is None:
        raise UserError(
            f"miniimagenet is not in {data_dir}: put its class folders there, as train/CLASS/* and test/CLASS/*"
        )
    data = folders.load_folder(place, image_size, in_memory)
    std = (0.229, 0.84 if reference else 0.224, 0.225)  # the published code has 0.84, surely for 0.224
    return replace(data, name="miniimagenet", mean=(0.485, 0.456, 0.406), std=std)


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


def make_split(dataset: Dataset, num_labels: int, seed: int, num_val: int = 0) -> Split:
    """The labelled, unlabelled and validation images of a run on `dataset`.

    num_labels 0: all labelled images there are, however many of each class. STL-10 at 1,000 labels: its predefined
    fold number seed % 10. What the data set itself holds out for validation is in neither pool.
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
            raise UserError(f"class '{dataset.classes[missing[0]]}' has no labelled image")
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
    """labels: (N,) int64, -1 unknown -> Split with num_labels / num_classes labelled images of each class.

    The unlabelled pool is all training images, the labelled ones included, as published. Validation images,
    equally many of each class, are taken out of both. The labelled images are the same whatever num_val is. `names`
    are the classes', for the message where one has too few.
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
