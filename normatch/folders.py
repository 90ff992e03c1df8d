"""Image files as a data set: class folders, or a table of paths and labels.

Any mixture of sizes, formats and pixel types is read: one channel, palettes, 16 bits, transparency (dropped) and the
camera's orientation (applied). Labelled, validation and test images must be readable; unlabelled ones that are not are
left out, counted, and named in one warning.
"""

import csv
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from .augment.policy import MAX_SIDE
from .data import Dataset
from .errors import UserError

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".jp2", ".tif", ".tiff", ".tga",
    ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
MAX_PIXELS = 89_478_485  # Pillow's own limit, from which a small file is suspected to unpack to a huge image
PARTS = ("train", "unlabeled", "val", "test")
_THREADS = min(16, os.cpu_count() or 1)  # decoders do not hold Python's lock


@dataclass(frozen=True)
class Item:
    """An image file and where it belongs. A label of None is unknown."""

    path: Path
    part: str  # one of PARTS
    label: str | None
    source: str  # what to name in an error: the path, or the line of a table


# ---- One image


def read_image(path: str | Path) -> Image.Image:
    """An image file -> RGB, upright. Raises ValueError with the reason where it is not one that can be read."""
    if not os.path.exists(path):
        raise ValueError("there is no such file")
    if not os.path.isfile(path):  # a pipe would be waited for
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
    except Exception as error:  # whatever a decoder makes of damaged bytes: OSError, SyntaxError, struct.error, ...
        raise ValueError(_reason(error)) from None


@contextmanager
def _no_bomb_warnings():
    """Pillow warns of images that are refused here, with a reason. Not for use in threads: filters are global."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


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
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits (also as 32-bit numbers), or real numbers in [0, 1]
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" else (1.0 if values.max(initial=0) <= 1 else 255.0)
        image = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> np.ndarray:
    """-> (size, size, 3) uint8: the shorter side resized to `size`, then the middle square."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


class FileImages:
    """N image files as an (N, size, size, 3) uint8 array that reads rows when it is asked for them, and keeps none.

    Rows of it are those of the array that `read_all` would have made.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: list[Path], size: int):
        self.paths = np.array([str(path) for path in paths])  # one block of memory, which forked workers share
        self.shape = (len(paths), size, size, 3)
        self.nbytes = int(np.prod(self.shape))  # of the array that it stands for

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows) -> np.ndarray:
        """rows: anything that indexes one axis -> (n, size, size, 3), or (size, size, 3) for one row.

        Raises UserError for a file that has become unreadable since the start.
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

        if torch.utils.data.get_worker_info() is None:
            with ThreadPoolExecutor(max_workers=_THREADS) as pool:
                list(pool.map(read, range(len(paths))))
        else:  # there are other workers for the other cores
            list(map(read, range(len(paths))))
        return images

    def encoded(self, rows: np.ndarray) -> list[np.ndarray]:
        """rows: (n,) -> n files as they are, (bytes,) uint8 each. Raises UserError for one that is not there."""
        try:
            return [np.fromfile(path, np.uint8) for path in self.paths[rows]]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read any more: {error.strerror}") from None


# ---- What there is


def find_items(folder: Path) -> list[Item]:
    """The image files of a folder in the layout that `normatch.data` describes."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name yours with --data_dir")
    if not (folder / "train").is_dir():
        below = sorted(p.name for p in folder.iterdir() if p.is_dir())
        seen = f" (it holds {', '.join(below[:5])}{', ...' if len(below) > 5 else ''})" if below else " (it is empty)"
        raise UserError(
            f"{folder} has no folder train{seen}: put labelled images in train/CLASS/, test images in test/CLASS/ "
            "and others in unlabeled/"
        )
    items = []
    for part in ("train", "val", "test"):
        for place in sorted(p for p in (folder / part).glob("*") if p.is_dir() and not p.name.startswith(".")):
            found = _images_below(place)
            if not found:
                known = ", ".join(sorted(IMAGE_SUFFIXES))
                raise UserError(f"class '{place.name}' has no image: {place} holds none of {known}")
            items += [Item(path, part, place.name, str(path)) for path in found]
    items += [Item(path, "unlabeled", None, str(path)) for path in _images_below(folder / "unlabeled")]
    return items


def _images_below(folder: Path) -> list[Path]:
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
    """The rows of a CSV or Parquet file, or of the files train, unlabeled, val, test (.csv, .parquet) of a folder.

    Columns: path (relative to the table), label (-1 or empty: unknown), and split (train, unlabeled, val or test;
    without it all rows are of the part the file is named after, else train).
    """
    if table.is_dir():
        if not is_tables(table):
            raise UserError(f"{table} holds neither train.csv nor train.parquet: name the table with --data_dir")
        return [item for part in PARTS for file in _tables(table, part) for item in _rows_of(file, part)]
    if not table.is_file():
        raise UserError(f"there is no table {table}: name it with --data_dir")
    return _rows_of(table, "train")


def is_tables(folder: Path) -> bool:
    """Whether a folder holds tables, as `find_rows` reads them."""
    return bool(_tables(folder, "train"))


def _tables(folder: Path, part: str) -> list[Path]:
    return [p for p in (folder / f"{part}.csv", folder / f"{part}.parquet") if p.is_file()]


def _rows_of(table: Path, default_part: str) -> list[Item]:
    columns, rows = _read_parquet(table) if table.suffix.lower() == ".parquet" else _read_csv(table)
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
    for number, row in enumerate(rows, start=2 if table.suffix.lower() != ".parquet" else 0):
        source = f"{table}, {'row' if table.suffix.lower() == '.parquet' else 'line'} {number}"
        path, label, part = (cell(row, name) for name in ("path", "label", "part"))
        if not path and not label:
            continue
        if not path:
            raise UserError(f"{source}: the path is empty")
        part = _PART_NAMES.get(part.lower()) if part else default_part
        if part is None:
            raise UserError(f"{source}: split may be {', '.join(PARTS)}, not '{cell(row, 'part')}'")
        if (
            label.removesuffix(".0").removeprefix("-").isdecimal()
        ):  # whole numbers that a spreadsheet or pandas made real
            label = label.removesuffix(".0")
        label = None if label in ("", "-1") or part == "unlabeled" else label
        if label is None and part in ("val", "test"):
            raise UserError(f"{source}: an image of {part} needs a label")
        items.append(Item(table.parent / path, "unlabeled" if label is None else part, label, source))
    return items


def _read_csv(table: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as CSV in UTF-8: {error}") from None
    return (rows[0], rows[1:]) if rows else ([], [])


def _read_parquet(table: Path) -> tuple[list[str], list[tuple]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{table} needs pyarrow: pip install pyarrow, or save it as CSV") from None
    try:
        content = parquet.read_table(table)
    except Exception as error:
        raise UserError(f"{table} cannot be read as Parquet: {' '.join(str(error).split())}") from None
    return list(content.column_names), list(zip(*(column.to_pylist() for column in content.columns), strict=True))


# ---- All of them


def load_folder(folder: Path, image_size: int | None = None, in_memory: bool = True) -> Dataset:
    return _load("folder", folder, find_items(folder), image_size, in_memory)


def load_table(table: Path, image_size: int | None = None, in_memory: bool = True) -> Dataset:
    return _load("csv", table, find_rows(table), image_size, in_memory)


def _load(name: str, place: Path, items: list[Item], image_size: int | None, in_memory: bool) -> Dataset:
    classes = class_names(place, items)
    number = {c: i for i, c in enumerate(classes)}
    parts = {part: [item for item in items if item.part == part] for part in PARTS}
    if not parts["test"]:
        if not parts["val"]:
            raise UserError(f"{place} has neither test nor val images: without any there is no accuracy to report")
        parts["test"] = parts["val"]
    size = image_size or common_size(items)
    order = parts["train"] + parts["unlabeled"] + (parts["val"] if parts["val"] is not parts["test"] else [])
    images, kept = read_all(order, size, place, in_memory)
    labels = np.array([-1 if item.label is None else number[item.label] for item in kept], np.int64)
    validation = np.flatnonzero([item.part == "val" for item in kept])
    test_images, tests = read_all(parts["test"], size, place)
    mean, std = _statistics(images)
    return Dataset(
        name=name,
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=np.array([number[item.label] for item in tests], np.int64),
        classes=classes,
        mean=mean,
        std=std,
        flip=True,
        validation=validation,
    )


def class_names(place: Path, items: list[Item]) -> list[str]:
    """The classes of the labelled training images, in order of name (of number, where all are numbers).

    Raises UserError for fewer than two, and for a label of a validation or test image that is not among them.
    """
    found = {item.label for item in items if item.part == "train"}
    classes = sorted(found, key=int) if all(c.isdecimal() for c in found) else sorted(found)
    if not items:
        raise UserError(f"{place} holds no image")
    if len(classes) < 2:
        seen = f"only the class '{classes[0]}'" if classes else "no labelled training image"
        raise UserError(f"{place} has {seen}: at least two classes are needed")
    for item in items:
        if item.label is not None and item.label not in found:
            near = f"{', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}"
            raise UserError(f"{item.source}: the label '{item.label}' has no training image; classes are {near}")
    return classes


def common_size(items: list[Item], most: int = 224) -> int:
    """The side of the square that images are brought to: their own where all agree, else the median of the shorter
    sides of up to 500 of them, as a multiple of 8; at most `most`. Labelled images decide, as they are all readable."""
    sizes = []
    labeled = [item for item in items if item.label is not None]
    for item in labeled[:: max(1, len(labeled) // 500)]:
        try:
            if item.path.is_file():
                with _no_bomb_warnings(), Image.open(item.path) as image:  # reads the header alone
                    _check_size(image)
                    sizes.append(image.size)
        except Exception:  # reported when it is read
            continue
    if not sizes:
        return 32
    shorter = sorted(min(size) for size in sizes)
    if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1]:
        return min(sizes[0][0], MAX_SIDE, most)
    return max(8, min(most, round(shorter[len(shorter) // 2] / 8) * 8))


def read_all(
    items: list[Item], size: int, place: Path, in_memory: bool = True
) -> tuple["np.ndarray | FileImages", list[Item]]:
    """-> (N, size, size, 3) uint8, and the N items they show: all but the unlabelled ones that cannot be read.

    An unreadable labelled image raises UserError. Without in_memory the images are read once, to know that they can
    be, and again when they are asked for.
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

    with _no_bomb_warnings(), ThreadPoolExecutor(max_workers=_THREADS) as pool:
        done = pool.map(read, range(len(items)))
        reasons = list(tqdm(done, "reading images", len(items), unit="", delay=3, leave=False, disable=None))
    bad = [i for i, reason in enumerate(reasons) if reason is not None]
    for i in bad:
        if items[i].part != "unlabeled":
            more = sum(items[j].part != "unlabeled" for j in bad) - 1
            others = f" (and {more} more)" if more else ""
            file = "" if str(items[i].path) == items[i].source else f": {items[i].path}"
            raise UserError(f"{items[i].source}{file} cannot be read: {reasons[i]}{others}")
    if bad:
        warnings.warn(
            f"{len(bad)} of {sum(item.part == 'unlabeled' for item in items)} unlabelled images in {place} cannot be "
            f"read and are left out, the first being {items[bad[0]].source}: {reasons[bad[0]]}",
            stacklevel=2,
        )
        keep = np.setdiff1d(np.arange(len(items)), bad)
        items = [items[i] for i in keep]
        if in_memory:
            for to, i in enumerate(keep):  # in place: a copy of a set that fills the memory would not fit beside it
                images[to] = images[i]
            images = images[: len(keep)]
    return images if in_memory else FileImages([item.path for item in items], size), items


def _statistics(images: np.ndarray) -> tuple[tuple, tuple]:
    """Mean and standard deviation of each channel, in [0, 1], of up to 5,000 images; no deviation is 0."""
    rows = np.arange(0, len(images), -(-len(images) // 5000))
    counts = np.zeros((3, 256), np.int64)  # exact, whatever N
    pieces = np.array_split(rows, -(-len(rows) // 100))  # bincount needs 8 bytes a pixel
    for piece in tqdm(pieces, "mean of the images", unit="", delay=3, leave=False, disable=None):
        some = images[piece]
        counts += np.stack([np.bincount(some[..., c].reshape(-1), minlength=256) for c in range(3)])
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1)).clip(1 / 255)
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


# ---- Looking before training


def check(place: Path, table: bool = False) -> tuple[list[str], int]:
    """Read every image of a folder or table -> lines that say what is there, and the number of unreadable files."""
    items = find_rows(place) if table else find_items(place)
    problems, sizes, modes = [], Counter(), Counter()

    def look(item: Item):
        try:
            read_image(item.path)
            with Image.open(item.path) as image:  # as it is in the file
                return image.size, image.mode, None
        except (ValueError, OSError) as error:
            return None, None, f"{item.path}: {_reason(error)}"

    with _no_bomb_warnings(), ThreadPoolExecutor(max_workers=_THREADS) as pool:
        done = pool.map(look, items)
        for size, mode, problem in tqdm(done, "looking", len(items), unit="", delay=3, leave=False, disable=None):
            if problem:
                problems.append(problem)
            else:
                sizes[size] += 1
                modes[mode] += 1
    lines = []
    for part in PARTS:
        found = Counter(item.label for item in items if item.part == part)
        if not found:
            continue
        total = sum(found.values())
        if part == "unlabeled":
            lines.append(f"{part:10} {total} images")
        else:
            lines.append(f"{part:10} {total} images of {len(found)} classes")
            width = max(len(str(label)) for label in found)
            lines += [f"  {label:<{width}} {count}" for label, count in sorted(found.items())]
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
