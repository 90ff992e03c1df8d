"""Your own image files as a data set: class folders, or a table of paths and labels.

Class folders:

    data_dir/train/CLASS/*     labeled images
    data_dir/unlabeled/**      images without a label (optional)
    data_dir/val/CLASS/*       held out to choose the best checkpoint (optional)
    data_dir/test/CLASS/*      held out to report the accuracy (default: val/)

`find_rows` describes tables. Sizes, formats and pixel types may be mixed: one channel, palettes, 16 bits, transparency
(dropped) and EXIF orientation (applied). Labeled, validation and test images must be readable; unreadable unlabeled
ones are left out with one warning that counts them.
"""

import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..errors import UserError
from .arrays import pixel_statistics
from .base import MAX_SIDE, Dataset, Request, read_csv

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".jp2", ".tif", ".tiff", ".tga",
    ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
PARTS = ("train", "unlabeled", "val", "test")
_THREADS = min(16, os.cpu_count() or 1)  # decoders release the GIL


@dataclass(frozen=True)
class Item:
    """An image file, its part of the data set and its label (None if unknown)."""

    path: Path
    part: str  # one of PARTS
    label: str | None
    source: str  # what errors name: the path, or the table's line


def read_image(path: str | Path) -> Image.Image:
    """An image file -> RGB, upright. Raises ValueError with the reason if it cannot be read."""
    if not os.path.exists(path):
        raise ValueError("there is no such file")
    if not os.path.isfile(path):  # reading a pipe would block
        raise ValueError("it is not a regular file")
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    try:
        with Image.open(path) as image:
            _check_size(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ValueError:
        raise
    except Exception as error:  # decoders of damaged bytes raise anything: SyntaxError, struct.error, ...
        raise ValueError(_reason(error)) from None


def _in_threads(function, items: list, title: str) -> list:
    """[function(item) for item in items], in threads, with a progress bar."""
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=_THREADS) as pool:
        # Such images are refused here. Warning filters are global, hence set outside the threads.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        results = pool.map(function, items)
        return list(tqdm(results, title, len(items), unit="", delay=3, leave=False, disable=None))


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"it claims to be {width} x {height} pixels")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "it claims to be far too large an image"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image"
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits (also stored in 32), or floats in [0, 1]
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" else (1.0 if values.max(initial=0) <= 1 else 255.0)
        image = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> np.ndarray:
    """image -> (size, size, 3) uint8: the shorter side resized to `size`, then the center square."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


class FileImages:
    """N image files as an (N, size, size, 3) uint8 array that reads rows on demand and keeps none.

    Its rows equal those of the array that `read_all` returns.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: list[Path], size: int):
        self.paths = np.array([str(path) for path in paths])  # one block of memory, shared with forked workers
        self.shape = (len(paths), size, size, 3)
        self.nbytes = int(np.prod(self.shape))  # of the array it stands for

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows) -> np.ndarray:
        """rows: any index of one axis -> (n, size, size, 3), or (size, size, 3) for one row.

        Raises UserError for a file that has become unreadable.
        """
        paths = self.paths[rows]
        if isinstance(paths, str):
            return self[[rows]][0]
        images = np.empty((len(paths), *self.shape[1:]), np.uint8)

        def read(i: int) -> None:
            try:
                images[i] = fit(read_image(paths[i]), self.shape[1])
            except (ValueError, OSError) as error:
                raise UserError(f"{paths[i]} cannot be read any more: {_reason(error)}") from None

        in_worker = torch.utils.data.get_worker_info() is not None  # the other workers use the other cores
        with ThreadPoolExecutor(max_workers=1 if in_worker else _THREADS) as pool:
            list(pool.map(read, range(len(paths))))
        return images

    def encoded(self, rows: np.ndarray) -> list[np.ndarray]:
        """rows: (n,) -> the bytes of n files, uint8 arrays. Raises UserError for a missing one."""
        try:
            return [np.fromfile(path, np.uint8) for path in self.paths[rows]]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read any more: {error.strerror}") from None


def find_items(folder: Path) -> list[Item]:
    """A folder in the layout above -> its image files. Raises UserError for any other folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name yours with --data_dir")
    if not (folder / "train").is_dir():
        below = sorted(p.name for p in folder.iterdir() if p.is_dir())
        seen = f" (it holds {', '.join(below[:5])}{', ...' if len(below) > 5 else ''})" if below else " (it is empty)"
        raise UserError(
            f"{folder} has no folder train{seen}: put labeled images in train/CLASS/, test images in test/CLASS/ "
            "and others in unlabeled/"
        )
    items = []
    for part in ("train", "val", "test"):
        for place in sorted(p for p in (folder / part).glob("*") if p.is_dir() and not p.name.startswith(".")):
            paths = _images_below(place)
            if not paths:
                known = ", ".join(sorted(IMAGE_SUFFIXES))
                raise UserError(f"class '{place.name}' has no image: {place} holds none of {known}")
            items += [Item(path, part, place.name, str(path)) for path in paths]
    items += [Item(path, "unlabeled", None, str(path)) for path in _images_below(folder / "unlabeled")]
    return items


def _images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, in order of name, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and not p.is_dir()
    )


_COLUMNS = {
    "path": ("path", "file", "filename", "image", "filepath", "file_name"),
    "label": ("label", "class", "category", "target", "class_name"),
    "part": ("split", "part", "subset"),
}
_PART_NAMES = {"train": "train", "training": "train", "": "train", "unlabeled": "unlabeled", "unlabelled": "unlabeled",
               "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}  # fmt: skip


def find_rows(table: Path) -> list[Item]:
    """A CSV or Parquet file, or a folder of train, unlabeled, val and test (.csv, .parquet) -> its rows.

    Columns: path (relative to the table), label (-1 or empty: unknown), and split (train, unlabeled, val or test;
    default: the part that the file is named after, else train).
    """
    if table.is_dir():
        if not find_tables(table):
            raise UserError(f"{table} holds neither train.csv nor train.parquet: name the table with --data_dir")
        return [item for part in PARTS for file in find_tables(table, part) for item in _rows_of(file, part)]
    if not table.is_file():
        raise UserError(f"there is no table {table}: name it with --data_dir")
    return _rows_of(table, "train")


def find_tables(folder: Path, part: str = "train") -> list[Path]:
    """The tables of `part` in a folder: at most one CSV and one Parquet file."""
    return [p for p in (folder / f"{part}.csv", folder / f"{part}.parquet") if p.is_file()]


def _rows_of(table: Path, default_part: str) -> list[Item]:
    is_parquet = table.suffix.lower() == ".parquet"
    columns, *rows = _read_parquet(table) if is_parquet else read_csv(table) or [[]]
    index = {}
    for want, names in _COLUMNS.items():
        index[want] = next((i for i, c in enumerate(columns) if c.strip().lower() in names), None)
    for want in ("path", "label"):
        if index[want] is None and not (want == "label" and default_part == "unlabeled"):
            raise UserError(f"{table} has no column '{want}', only {', '.join(columns) or 'none at all'}")

    def cell(row, name):
        i = index[name]
        value = None if i is None or i >= len(row) else row[i]
        return "" if value is None or value != value else str(value).strip()  # NaN is empty too

    items = []
    for number, row in enumerate(rows, start=0 if is_parquet else 2):
        source = f"{table}, {'row' if is_parquet else 'line'} {number}"
        path, label, part = (cell(row, name) for name in ("path", "label", "part"))
        if not path and not label:
            continue
        if not path:
            raise UserError(f"{source}: the path is empty")
        part = _PART_NAMES.get(part.lower()) if part else default_part
        if part is None:
            raise UserError(f"{source}: split may be {', '.join(PARTS)}, not '{cell(row, 'part')}'")
        if label.removesuffix(".0").removeprefix("-").isdecimal():  # integers that pandas stored as floats
            label = label.removesuffix(".0")
        label = None if label in ("", "-1") or part == "unlabeled" else label
        if label is None and part in ("val", "test"):
            raise UserError(f"{source}: an image of {part} needs a label")
        items.append(Item(table.parent / path, "unlabeled" if label is None else part, label, source))
    return items


def _read_parquet(table: Path) -> list:
    """-> the column names, then the rows."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{table} needs pyarrow: pip install pyarrow, or save it as CSV") from None
    try:
        content = parquet.read_table(table)
    except Exception as error:
        raise UserError(f"{table} cannot be read as Parquet: {' '.join(str(error).split())}") from None
    return [content.column_names, *zip(*(column.to_pylist() for column in content.columns), strict=True)]


def class_folders(request: Request) -> Dataset:
    """Class folders in data_dir -> (N, size, size, 3) images."""
    return _load(request, find_items(request.folder))


def image_table(request: Request) -> Dataset:
    """A table of image files, or a folder of tables -> (N, size, size, 3) images."""
    return _load(request, find_rows(request.folder))


def _load(request: Request, items: list[Item]) -> Dataset:
    place = request.folder
    classes = class_names(place, items)
    number = {c: i for i, c in enumerate(classes)}
    parts = {part: [item for item in items if item.part == part] for part in PARTS}
    if not parts["test"]:
        if not parts["val"]:
            raise UserError(f"{place} has neither test nor val images: without any there is no accuracy to report")
        parts["test"] = parts["val"]
    size = request.image_size or common_size(items)
    order = parts["train"] + parts["unlabeled"] + (parts["val"] if parts["val"] is not parts["test"] else [])
    images, kept = read_all(order, size, place, request.in_memory)
    labels = np.array([-1 if item.label is None else number[item.label] for item in kept], np.int64)
    validation = np.flatnonzero([item.part == "val" for item in kept])
    test_images, tests = read_all(parts["test"], size, place)
    test_labels = np.array([number[item.label] for item in tests], np.int64)
    mean, std = pixel_statistics(images)
    return Dataset(request.name, images, labels, test_images, test_labels, classes, mean, std, True, validation)


def class_names(place: Path, items: list[Item]) -> list[str]:
    """The classes of the labeled training images, sorted by name, or by value if all are numbers.

    Raises UserError for fewer than two classes, and for a validation or test label that is not among them.
    """
    labels = {item.label for item in items if item.part == "train"}
    classes = sorted(labels, key=int) if all(c.isdecimal() for c in labels) else sorted(labels)
    if not items:
        raise UserError(f"{place} holds no image")
    if len(classes) < 2:
        seen = f"only the class '{classes[0]}'" if classes else "no labeled training image"
        raise UserError(f"{place} has {seen}: at least two classes are needed")
    for item in items:
        if item.label is not None and item.label not in labels:
            near = f"{', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}"
            raise UserError(f"{item.source}: the label '{item.label}' has no training image; classes are {near}")
    return classes


def common_size(items: list[Item], most: int = 224) -> int:
    """The side of the square that images are resized to: their own if all are equal squares, else the median of the
    shorter sides, rounded to a multiple of 8; at most `most`. From up to 500 labeled images, which must be readable."""

    def look(item: Item):
        try:
            if item.path.is_file():
                with Image.open(item.path) as image:  # reads only the header
                    _check_size(image)
                    return image.size
        except Exception:  # reported when the image is read
            return None

    labeled = [item for item in items if item.label is not None]
    sizes = [size for size in _in_threads(look, labeled[:: max(1, len(labeled) // 500)], "sizes") if size]
    if not sizes:
        return 32
    shorter = sorted(min(size) for size in sizes)
    if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1]:
        return min(sizes[0][0], MAX_SIDE, most)
    return max(8, min(most, round(shorter[len(shorter) // 2] / 8) * 8))


def read_all(items: list[Item], size: int, place: Path, in_memory: bool = True):
    """items -> (N, size, size, 3) uint8, and the N readable items, without unreadable unlabeled ones.

    Raises UserError for an unreadable labeled image. With in_memory=False the images are read once, to check them, and
    again on demand.
    """
    shape = (len(items) if in_memory else 0, size, size, 3)
    try:
        images = np.empty(shape, np.uint8)
    except MemoryError:
        raise UserError(
            f"{len(items)} images of {size}x{size} take {np.prod(shape) / 2**30:.0f} GiB, more than there is: take a "
            "smaller --image_size, or --in_memory false, which leaves them in their files"
        ) from None

    def read(i: int) -> str | None:
        try:
            image = read_image(items[i].path)
            if in_memory:
                images[i] = fit(image, size)
        except (ValueError, OSError) as error:
            return _reason(error)

    reasons = _in_threads(read, range(len(items)), "reading images")
    bad = [i for i, reason in enumerate(reasons) if reason is not None]
    for i in bad:
        if items[i].part != "unlabeled":
            more = sum(items[j].part != "unlabeled" for j in bad) - 1
            others = f" (and {more} more)" if more else ""
            file = "" if str(items[i].path) == items[i].source else f": {items[i].path}"
            raise UserError(f"{items[i].source}{file} cannot be read: {reasons[i]}{others}")
    if bad:
        warnings.warn(
            f"{len(bad)} of {sum(item.part == 'unlabeled' for item in items)} unlabeled images in {place} cannot be "
            f"read and are left out, the first being {items[bad[0]].source}: {reasons[bad[0]]}",
            stacklevel=2,
        )
        keep = np.setdiff1d(np.arange(len(items)), bad)
        items = [items[i] for i in keep]
        if in_memory:
            for to, i in enumerate(keep):  # in place: a copy might not fit in memory
                images[to] = images[i]
            images = images[: len(keep)]
    return images if in_memory else FileImages([item.path for item in items], size), items


def check(place: Path, table: bool = False) -> tuple[list[str], int]:
    """Reads every image of a folder or table -> a summary in lines, and the number of unreadable files."""
    items = find_rows(place) if table else find_items(place)

    def look(item: Item):
        try:
            read_image(item.path)
            with Image.open(item.path) as image:  # with its original mode
                return image.size, image.mode
        except (ValueError, OSError) as error:
            return f"{item.path}: {_reason(error)}"

    results = _in_threads(look, items, "looking")
    problems = [result for result in results if isinstance(result, str)]
    sizes, modes = (Counter(result[i] for result in results if not isinstance(result, str)) for i in (0, 1))
    lines = []
    for part in PARTS:
        counts = Counter(item.label for item in items if item.part == part)
        if part == "unlabeled" and counts:
            lines.append(f"{part:10} {counts.total()} images")
        elif counts:
            lines.append(f"{part:10} {counts.total()} images of {len(counts)} classes")
            width = max(map(len, counts))
            lines += [f"  {label:<{width}} {count}" for label, count in sorted(counts.items())]
    if sizes:
        common = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(5))
        lines.append(f"{'sizes':10} {common}{f', and {len(sizes) - 5} others' if len(sizes) > 5 else ''}")
        lines.append(f"{'pixels':10} {', '.join(f'{mode} ({n})' for mode, n in modes.most_common())}")
        lines.append(f"{'brought to':10} {common_size(items)}x{common_size(items)} (--image_size changes it)")
    lines.append(f"{'unreadable':10} {len(problems)} files")
    lines += [f"  {problem}" for problem in problems[:20]]
    if len(problems) > 20:
        lines.append(f"  and {len(problems) - 20} more")
    try:
        class_names(place, items)
    except UserError as error:
        lines.append(f"{'problem':10} {error}")
    return lines, len(problems)
