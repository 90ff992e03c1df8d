"""Published image sets: scikit-learn's digits, those that torchvision reads, and Mini-ImageNet."""

from dataclasses import replace

import numpy as np
from PIL import Image

from ..errors import UserError
from .arrays import rgb
from .base import Dataset, Request
from .folders import class_folders
from .split import split_labels

_HALF = (0.5, 0.5, 0.5)
# Mean and std of the pixels in [0, 1], as in the published FixMatch and NorMatch code; of digits, MNIST and
# Fashion-MNIST measured on the training images.
NORMALIZATION = {
    "digits": ((0.3048,) * 3, (0.3229,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "fashionmnist": ((0.2860,) * 3, (0.3530,) * 3),
    "svhn": (_HALF, _HALF),
    "stl10": (_HALF, _HALF),
    "miniimagenet": ((0.485, 0.456, 0.406), (0.229, 0.84, 0.225)),  # .84 for .224: a slip, but trained with
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# name: torchvision's class, the folder it reads, whether a mirrored image keeps its class
_TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", True),
    "cifar100": ("CIFAR100", "cifar-100-python", True),
    "mnist": ("MNIST", "MNIST/raw", False),
    "fashionmnist": ("FashionMNIST", "FashionMNIST/raw", True),
}
_DIGITS = [str(digit) for digit in range(10)]


def digits(request: Request) -> Dataset:
    """scikit-learn's handwritten digits: (1297, 32, 32, 3) to train, (500, 32, 32, 3) to test, 50 of each digit.

    Like a published one, the test set does not depend on the run's seed.
    """
    from sklearn.datasets import load_digits  # slow to import

    raw, labels = load_digits(return_X_y=True)
    # 0..16 -> 0..255, halves rounded up, in integers, which give the same on every platform.
    small = ((raw.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8)
    images, labels = rgb(_resized(small, 32)), labels.astype(np.int64)
    test = split_labels(labels, 500, 10, seed=0).labeled
    train = np.setdiff1d(np.arange(len(labels)), test)
    return _dataset(request, images[train], labels[train], images[test], labels[test], _DIGITS, flip=False)


def from_torchvision(request: Request) -> Dataset:
    """CIFAR-10, CIFAR-100, MNIST or Fashion-MNIST -> their (N, H, W, 3) images, gray ones with three equal channels."""
    class_name, needed, flip = _TORCHVISION[request.name]
    train, test = _parts(request, class_name, needed, {"train": True}, {"train": False})
    images, test_images, labels, test_labels = train.data, test.data, train.targets, test.targets
    return _dataset(request, rgb(images), labels, rgb(test_images), test_labels, train.classes, flip=flip)


def svhn(request: Request) -> Dataset:
    """Street View House Numbers: (73257, 32, 32, 3) to train (604,388 with the easier `extra` ones), 26,032 to test."""
    extra = ("extra",) if request.name == "svhn+extra" else ()
    splits = ({"split": split} for split in ("train", "test", *extra))
    train, test, *extra = _parts(request, "SVHN", f"{'extra' if extra else 'train'}_32x32.mat", *splits)
    images = _channels_last([part.data for part in (train, *extra)])
    labels = np.concatenate([part.labels for part in (train, *extra)])
    # The paper does not mirror them; the published PyTorch code does.
    return _dataset(request, images, labels, _channels_last([test.data]), test.labels, _DIGITS, flip=False)


def stl10(request: Request) -> Dataset:
    """STL-10 at 96 px: 5,000 labeled images in ten predefined folds of 1,000, and 100,000 unlabeled ones.

    As the published NorMatch code prepares it: only the 5,000 images, without folds, enlarged to 224 px.
    """
    splits = ("train", "test") if request.reference else ("train", "test", "unlabeled")
    train, test, *unlabeled = _parts(request, "STL10", "stl10_binary", *({"split": split} for split in splits))
    images, test_images = _channels_last([part.data for part in (train, *unlabeled)]), _channels_last([test.data])
    folds = ()
    if request.reference:
        images, test_images = _resized(images, 224), _resized(test_images, 224)
    else:
        try:
            lines = (request.folder / "stl10_binary" / "fold_indices.txt").read_text().splitlines()
            folds = tuple(np.sort(np.array(line.split(), np.int64)) for line in lines if line.strip())
        except (OSError, ValueError) as error:
            raise UserError(
                f"stl10 in {request.folder} is incomplete: fold_indices.txt cannot be read ({error})"
            ) from error
    labels = np.full(len(images), -1, np.int64)
    labels[: len(train.labels)] = train.labels
    classes = [line.strip() for line in train.classes]
    mean, std = NORMALIZATION["stl10"]
    return Dataset("stl10", images, labels, test_images, _labels(test.labels), classes, mean, std, True, folds=folds)


def miniimagenet(request: Request) -> Dataset:
    """Mini-ImageNet in class folders train/ and test/: 100 classes at 84 px, all training images in the pool."""
    places = (request.folder / name for name in ("", "miniimagenet", "mini-imagenet", "mini_imagenet"))
    place = next((p for p in places if (p / "train").is_dir()), None)
    if place is None:
        raise UserError(
            f"miniimagenet is not in {request.folder}: put its class folders there, as train/CLASS/* and test/CLASS/*"
        )
    data = class_folders(replace(request, data_dir=place, image_size=request.image_size or 84))
    mean, std = NORMALIZATION["miniimagenet" if request.reference else "imagenet"]
    return replace(data, mean=mean, std=std)


def _dataset(request: Request, images, labels, test_images, test_labels, classes, flip: bool) -> Dataset:
    """The data set with its published normalization, resized to request.image_size."""
    if request.image_size not in (None, images.shape[1]):
        images, test_images = (_resized(part, request.image_size) for part in (images, test_images))
    mean, std = NORMALIZATION[request.name.removesuffix("+extra")]
    labels, test_labels = _labels(labels), _labels(test_labels)
    return Dataset(request.name, images, labels, test_images, test_labels, list(classes), mean, std, flip)


def _parts(request: Request, class_name: str, needed: str, *arguments: dict) -> list:
    """torchvision's data set, once for each of `arguments`. Any failure is one line that says what to put where."""
    name, folder = request.name, request.folder
    hint = f"put the unpacked {needed} there, name the folder that holds it with --data_dir, or pass --download"
    if not request.download and not (folder / needed).exists():
        raise UserError(f"{name} is not in {folder}: {hint}")
    try:
        from torchvision import datasets  # digits and folders work without it
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        raise UserError(f"{name} is read through torchvision, which cannot be imported ({error})") from error
    try:
        return [getattr(datasets, class_name)(str(folder), **part, download=request.download) for part in arguments]
    except ImportError as error:  # torchvision reads SVHN with SciPy
        raise UserError(f"{name} cannot be read ({error}): pip install scipy") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if request.download:
            raise UserError(
                f"{name} could not be downloaded into {folder} ({error}): without a network, "
                f"put the unpacked {needed} there yourself"
            ) from error
        raise UserError(f"{name} in {folder} is incomplete or damaged: {hint}") from error


def _labels(labels) -> np.ndarray:
    return np.array(labels.tolist() if hasattr(labels, "tolist") else labels, dtype=np.int64)  # also of tensors


def _channels_last(parts) -> np.ndarray:
    """(n, 3, H, W) arrays -> (N, H, W, 3), concatenated without a second copy."""
    out = np.empty((sum(map(len, parts)), *parts[0].shape[2:], 3), np.uint8)
    start = 0
    for part in parts:
        out[start : start + len(part)] = part.transpose(0, 2, 3, 1)
        start += len(part)
    return out


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) uint8 -> the same with H = W = size."""
    out = np.empty((len(images), size, size, *images.shape[3:]), np.uint8)
    for image, resized in zip(images, out, strict=True):
        resized[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    return out
