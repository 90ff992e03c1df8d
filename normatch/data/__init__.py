"""Data sets of images and of rows, and the labeled split.

base       Dataset, `standardize`, what all readers share
split      the labeled split, and the order in which a run visits the samples
arrays     arrays in memory            folders    your own image files
tables     toys, tables, texts         vision     published image sets

Modules import only from those above them, and of the package only `augment` (random words) and `errors`.
Importing `normatch.data` loads neither NumPy nor PyTorch; a data set's module is imported when it is read.
"""

from importlib import import_module
from pathlib import Path

from ..errors import UserError, nearest

# Data set -> the function that reads it, `base.Request` -> `base.Dataset`.
_IMAGES = {
    "digits": "vision.digits",
    "cifar10": "vision.from_torchvision",
    "cifar100": "vision.from_torchvision",
    "svhn": "vision.svhn",
    "svhn+extra": "vision.svhn",
    "stl10": "vision.stl10",
    "mnist": "vision.from_torchvision",
    "fashionmnist": "vision.from_torchvision",
    "miniimagenet": "vision.miniimagenet",
    "folder": "folders.class_folders",
    "csv": "folders.image_table",
}
_ROWS = {
    "moons": "tables.moons",
    "circles": "tables.circles",
    "8gaussians": "tables.eight_gaussians",
    "pinwheel": "tables.pinwheels",
    "picture": "tables.picture",
    "digits-table": "tables.bundled",
    "breast-cancer": "tables.bundled",
    "wine": "tables.bundled",
    "iris": "tables.bundled",
    "miniboone": "tables.miniboone",
    "hepmass": "tables.hepmass",
    "ag-news": "tables.texts",
    "yahoo": "tables.texts",
    "table": "tables.csv_files",
}
DATASETS, TABLES = (*_IMAGES, *_ROWS), tuple(_ROWS)

_PUBLIC = {
    **dict.fromkeys(("Dataset", "standardize"), "base"),
    **dict.fromkeys(("Split", "make_split", "split_labels", "sample_order", "LABELED", "UNLABELED"), "split"),
    "from_arrays": "arrays",
}

__all__ = ["DATASETS", "TABLES", "load_dataset", "load_images", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_dataset(
    name: str,
    data_dir=None,
    download: bool = False,
    image_size: int | None = None,
    compat: str = "none",
    in_memory: bool = True,
):
    """name: one of DATASETS -> `Dataset` of images (N, H, W, 3) uint8, or for TABLES of rows (N, D) float32.

    data_dir: holds the files in torchvision's layout, or your own (default "data").   image_size: side to resize to;
    by default images keep theirs, and your own get their most common one.   compat="reference": STL-10 and
    Mini-ImageNet as the published code prepares them.   in_memory=False: read the training images of class folders and
    CSV files on demand, for sets larger than memory. Raises UserError for anything the user can fix.
    """
    from .base import Request

    data_dir = Path(data_dir) if data_dir else None
    request = Request(name, data_dir, download, image_size, compat == "reference", in_memory)
    if name in DATASETS:
        module, function = {**_IMAGES, **_ROWS}[name].split(".")
        return getattr(import_module(f".{module}", __name__), function)(request)
    if name == "imagenet":
        raise UserError("dataset 'imagenet' is not there yet; class folders of it can be read as --dataset folder")
    if name and Path(name).exists():
        kind = "folder" if Path(name).is_dir() else "csv"
        raise UserError(f"unknown dataset {name!r}: your own images are --dataset {kind} --data_dir {name}")
    raise UserError(f"unknown dataset {name!r}{nearest(name, DATASETS)}; data sets: {', '.join(DATASETS)}")


def load_images(name: str, *arguments, **settings):
    """`load_dataset` for commands that need images (N, H, W, 3). Raises UserError for a table."""
    if name in TABLES:
        raise UserError(f"{name} is a table: there are no views of its rows")
    return load_dataset(name, *arguments, **settings)
