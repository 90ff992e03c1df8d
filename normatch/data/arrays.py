"""Arrays in memory as a data set, and the statistics that samples are standardized by."""

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from .base import Dataset


def from_arrays(
    train_x, train_labels, test_x=None, test_labels=None, classes=None, name="arrays", scale="column", **fields
) -> Dataset:
    """train_x: (N, D) rows, or (N, H, W, 3) or (N, H, W) uint8 images; train_labels: (N,) in 0..K-1, -1 if unlabeled.

    classes: K names (default: the numbers).   scale, of rows: "column" standardizes each by its own deviation,
    "common" all by one, "none" keeps the units.   fields: further fields of `Dataset`.

    Raises UserError for labels out of range, NaN, constant columns and shapes that do not match.
    """
    train, labels = _samples(train_x, name), np.asarray(train_labels, np.int64)
    test = train[:0] if test_x is None else _samples(test_x, name)
    test_labels = np.asarray(labels[:0] if test_x is None else test_labels, np.int64)
    if not len(train):
        raise UserError(f"{name}: there are no training samples")
    if test.shape[1:] != train.shape[1:]:
        raise UserError(f"{name}: training samples are {train.shape[1:]}, test samples {test.shape[1:]}")
    classes = [str(k) for k in range(labels.max(initial=-1) + 1)] if classes is None else list(classes)
    if train.ndim == 2:
        check_features(train, name if test_x is None else f"{name}, training rows", fields.get("columns"))
        if not np.isfinite(test).all():
            raise UserError(f"{name}, test rows: some features are NaN or infinite")
    for x, y in ((train, labels), (test, test_labels)):
        if y.shape != x.shape[:1]:
            raise UserError(f"{name}: {len(x)} samples need labels of shape ({len(x)},), not {y.shape}")
        if len(y) and not -1 <= y.min() <= y.max() < len(classes):
            raise UserError(f"{name}: labels must lie in 0..{len(classes) - 1}, or be -1 where they are unknown")
    mean, std = pixel_statistics(train) if train.ndim == 4 else _row_statistics(train, scale)
    return Dataset(name, train, labels, test, test_labels, classes, mean, std, **fields)


def _samples(x, name: str) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim == 2:
        return np.require(x, np.float32, "W")  # PyTorch warns of read-only memory
    if x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)):
        raise UserError(f"{name}: samples must be (N, D), or (N, H, W, 3) uint8, not {x.shape} {x.dtype}")
    return np.require(rgb(x), requirements="W")


def rgb(images) -> np.ndarray:
    """(N, H, W, 3) or (N, H, W) uint8 -> (N, H, W, 3), contiguous: torchvision's are often transposed views."""
    images = np.asarray(images)
    return np.ascontiguousarray(np.broadcast_to(images[..., None], (*images.shape, 3)) if images.ndim == 3 else images)


def check_features(x: np.ndarray, where: str, names=None, first: int = 0):
    """x: (N, D). Raises UserError if a value is not finite or a column is constant.

    names: of the columns.   first: number of the first row, for the message.

    A density cannot be fitted to a constant column: it grows without bound as it narrows there.
    """
    bad = ~np.isfinite(x)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f"{where}: {bad.any(1).sum()} rows have NaN or infinite features, the first is row {row + first}, "
            f"column {names[column] if names else column}: leave them out or fill them in"
        )
    constant = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if len(constant):
        shown = ", ".join(str(names[c] if names else c) for c in constant[:5]) + (", ..." if len(constant) > 5 else "")
        raise UserError(f"{where}: {len(constant)} columns are constant ({shown}): leave them out, they tell nothing")


def _row_statistics(x: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray]:
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    if scale == "common":
        std = np.full_like(std, np.sqrt((std**2).mean()))
    elif scale == "none":
        mean, std = np.zeros_like(mean), np.ones_like(std)
    return mean.astype(np.float32), std.astype(np.float32)


def pixel_statistics(images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """images: (N, H, W, 3) uint8 -> mean and positive std of the channels in [0, 1], from up to 5,000 images."""
    rows = np.arange(0, len(images), -(-len(images) // 5000))
    counts = np.zeros((3, 256), np.int64)  # exact for any N
    pieces = np.array_split(rows, -(-len(rows) // 100))  # bincount needs 8 bytes per pixel
    for piece in tqdm(pieces, "mean of the images", unit="", delay=3, leave=False, disable=None):
        pixels = images[piece]
        counts += np.stack([np.bincount(pixels[..., c].reshape(-1), minlength=256) for c in range(3)])
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1)).clip(1 / 255)
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)
