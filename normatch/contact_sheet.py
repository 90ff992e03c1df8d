"""`normatch data`: what a data set or a folder holds, and a picture of the views that a policy makes of it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .augment import View, find_policy
from .data import Dataset, load_dataset
from .errors import UserError
from .loader import BACKENDS, choose_backend

_GAP, _TITLE = 4, 14


def data_arguments(parser) -> None:
    parser.add_argument(
        "dataset", nargs="?", default="digits", help="a data set's name, or a folder or table of images"
    )
    parser.add_argument("--data_dir", help="folder that holds the data set, or one's own folder or table")
    parser.add_argument("--augment", default="kekmodel", help="policy, or a YAML file of one (default: kekmodel)")
    parser.add_argument("--augment_backend", default="auto", help=f"{', '.join(BACKENDS)} (default: auto)")
    parser.add_argument("--image_size", type=int, help="side that one's own images are brought to")
    parser.add_argument("--out", default="views.png", help="the picture (default: views.png)")
    parser.add_argument("--rows", type=int, default=8, help="images on the picture (default: 8)")
    parser.add_argument("--weak", type=int, default=3, help="weak views of each (default: 3)")
    parser.add_argument("--strong", type=int, default=6, help="strong views of each (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--download", action="store_true", help="let torchvision download the data set")


def data_command(options) -> int:
    """Print what there is, check a folder's files, and write the picture. Returns the exit status."""
    name, place = options.dataset, options.data_dir
    if Path(name).is_dir() or name.lower().endswith((".csv", ".parquet")):  # `normatch data photos/`
        name, place = ("folder" if Path(name).is_dir() else "csv"), name
    policy = find_policy(options.augment)
    backend, reason = choose_backend(options.augment_backend, "cpu")
    if name in ("folder", "csv"):
        from .folders import check

        lines, _ = check(Path(place or "data"), table=name == "csv")
        print("\n".join(lines))
    dataset = load_dataset(name, place, options.download, options.image_size)
    if name not in ("folder", "csv"):
        print("\n".join(describe(dataset)))
    print(f"{'mean':10} {', '.join(f'{m:.4f}' for m in dataset.mean)}")
    print(f"{'std':10} {', '.join(f'{s:.4f}' for s in dataset.std)}")
    print(f"{'views':10} {options.augment} by {backend} ({reason})")
    sheet = contact_sheet(dataset, policy, backend, options.rows, options.weak, options.strong, options.seed)
    try:
        sheet.save(options.out)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.out} cannot be written: {error}") from None
    print(f"{'picture':10} {options.out}, {sheet.width}x{sheet.height}")
    return 0


def describe(dataset: Dataset) -> list[str]:
    """What is in a data set, as lines of text."""
    known = dataset.train_labels[dataset.train_labels >= 0]
    counts = np.bincount(known, minlength=len(dataset.classes))
    height, width = dataset.train_images.shape[1:3]
    lines = [f"{'train':10} {len(dataset.train_images)} images of {len(dataset.classes)} classes, {width}x{height}"]
    widest = max(map(len, dataset.classes))
    shown = list(zip(dataset.classes, counts.tolist(), strict=True))
    lines += [f"  {name:<{widest}} {count}" for name, count in shown[:20]]
    if len(shown) > 20:
        lines.append(f"  and {len(shown) - 20} more, {counts.min()} to {counts.max()} images each")
    if len(known) < len(dataset.train_labels):
        lines.append(f"{'unlabeled':10} {len(dataset.train_labels) - len(known)} images")
    lines.append(f"{'test':10} {len(dataset.test_images)} images")
    return lines


def contact_sheet(
    dataset: Dataset, policy, backend: str = "native", rows: int = 8, weak: int = 3, strong: int = 6, seed: int = 0
) -> Image.Image:
    """A row for each of `rows` training images, spread over the set: the image, then its weak and its strong views."""
    from .bench.views import views_of  # any backend, by name

    if rows < 1 or weak < 0 or strong < 0:
        raise UserError("rows must be at least 1, weak and strong at least 0")
    total = len(dataset.train_images)
    picked = np.linspace(0, total - 1, min(rows, total)).astype(np.int64)
    kinds = [View.UNLABELED_WEAK] * weak + [View.UNLABELED_STRONG] * strong
    visits = [*range(weak), *range(strong)]
    grid = [dataset.train_images[picked][:, None]]
    if kinds:
        draws = np.array([[row, row, visit, kind] for row in picked for visit, kind in zip(visits, kinds, strict=True)])
        views = views_of(dataset.train_images, draws, policy, seed, backend, dataset.flip)
        grid.append(views.permute(0, 2, 3, 1).numpy().reshape(len(picked), len(kinds), *dataset.train_images.shape[1:]))
    tiles = np.concatenate(grid, axis=1)
    zoom = max(1, 64 // max(tiles.shape[2:4]))
    height, width = tiles.shape[2] * zoom, tiles.shape[3] * zoom
    sheet = Image.new(
        "RGB",
        (tiles.shape[1] * (width + _GAP) + _GAP, tiles.shape[0] * (height + _GAP) + _GAP + _TITLE),
        (255, 255, 255),
    )
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            image = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (_GAP + x * (width + _GAP), _TITLE + _GAP + y * (height + _GAP)))
    draw = ImageDraw.Draw(sheet)
    for column, title in ((0, "image"), (1, "weak"), (1 + weak, "strong")):
        if column < tiles.shape[1] and (title != "weak" or weak) and (title != "strong" or strong):
            draw.text((_GAP + column * (width + _GAP), 2), title, fill=(0, 0, 0))
    return sheet
