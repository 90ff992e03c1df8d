"""The data set that everything else works on, and how its samples become a network's input."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError

MAX_SIDE = 2048  # pixels; the limit of the op that augments


@dataclass(frozen=True)
class Dataset:
    """train_x: (N, H, W, 3) uint8 images or (N, D) float32 rows of a table; train_labels: (N,), -1 for unknown.

    A network sees `standardize(x, mean, std)`.
    """

    name: str
    train_x: np.ndarray  # or `folders.FileImages`
    train_labels: np.ndarray  # (N,) int64
    test_x: np.ndarray  # (M, H, W, 3) uint8 or (M, D) float32
    test_labels: np.ndarray  # (M,) int64
    classes: list[str]
    mean: tuple[float, ...] | np.ndarray  # (3,) of the training pixels in [0, 1], or (D,) float32 of the rows;
    std: tuple[float, ...] | np.ndarray  # 0 and 1 where the units are part of the experiment
    flip: bool = False  # whether a mirrored image keeps its class
    validation: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # held out by the data set itself
    folds: tuple[np.ndarray, ...] = ()  # training indices of the published labeled sets
    angular: bool = False  # whether rows are compared by angle, as text embeddings are
    columns: tuple[str, ...] = ()  # names of the features, where known

    @property
    def is_table(self) -> bool:
        return len(self.train_x.shape) == 2

    @property
    def image_size(self) -> int | None:
        """The images' side H; None for rows."""
        return None if self.is_table else self.train_x.shape[1]


@dataclass(frozen=True)
class Request:
    """What `load_dataset` was asked for: the argument of every function that reads a data set."""

    name: str
    data_dir: Path | None = None
    download: bool = False
    image_size: int | None = None
    reference: bool = False  # prepare the data as the published code does
    in_memory: bool = True

    def __post_init__(self):
        if self.image_size is not None and not 1 <= self.image_size <= MAX_SIDE:
            raise UserError(f"image_size may be 1 to {MAX_SIDE}, not {self.image_size}")

    @property
    def folder(self) -> Path:
        return self.data_dir or Path("data")

    def subfolder(self, *names: str) -> Path:
        """The first of `names` that is a folder in data_dir, else data_dir."""
        return next((self.folder / name for name in names if (self.folder / name).is_dir()), self.folder)


def standardize(x: torch.Tensor, mean, std, dtype=torch.float32) -> torch.Tensor:
    """x: (N, H, W, 3) uint8 -> (N, 3, H, W) channels-last, (x / 255 - mean) / std; (N, D) -> (N, D), (x - mean) / std.

    Computed in float32, then converted. mean and std may be tensors on x's device, which saves a copy from the host.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=x.device)
    std = torch.as_tensor(std, dtype=torch.float32, device=x.device)
    if x.ndim == 2:
        return ((x.to(torch.float32) - mean) / std).to(dtype)
    # In place: a batch of temporaries for each operation fragments the heap.
    scaled = x.to(torch.float32, copy=True).mul_(1 / (255 * std)).sub_(mean / std)
    return scaled.to(dtype).permute(0, 3, 1, 2)


def read_csv(path: str | Path) -> list[list[str]]:
    """The rows of a UTF-8 CSV file, with or without a byte order mark."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}") from None
