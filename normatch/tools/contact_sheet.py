"""`normatch data`: counts the images of a data set or folder, and draws the views that a policy makes of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .. import ops, reference
from ..augment.draws import View, draw_parameters
from ..augment.policy import OPS, find_policy
from ..data import DATASETS, Dataset, load_images
from ..data.folders import check, find_tables
from ..errors import UserError
from ..training.loader import BACKENDS, choose_backend

_GAP = 6  # pixels


def data_arguments(parser) -> None:
    parser.add_argument("dataset", nargs="?", default="digits", help="data set, or your folder or table of images")
    parser.add_argument("--data_dir", help="folder that holds the data set, or your own folder or table")
    parser.add_argument("--augment", default="kekmodel", help="policy or YAML file (default: kekmodel)")
    parser.add_argument("--augment_backend", default="auto", help=f"{', '.join(BACKENDS)} (default: auto)")
    parser.add_argument("--image_size", type=int, help="side that your own images are resized to")
    parser.add_argument("--out", default="views.png", help="file of the picture (default: views.png)")
    parser.add_argument("--rows", type=int, default=8, help="images in the picture (default: 8)")
    parser.add_argument("--weak", type=int, default=3, help="weak views of each (default: 3)")
    parser.add_argument("--strong", type=int, default=6, help="strong views of each (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--download", action="store_true", help="let torchvision download the data set")


def data_command(options) -> int:
    """Prints counts, checks a folder's files and writes the picture. Returns the exit status."""
    name, place = options.dataset, options.data_dir
    if name not in DATASETS:  # `normatch data photos`
        if Path(name).is_dir():
            name, place = ("csv" if find_tables(Path(name)) else "folder"), name
        elif name.lower().endswith((".csv", ".parquet")):
            name, place = "csv", name
    policy = find_policy(options.augment)
    backend, reason = choose_backend(options.augment_backend, "cpu")
    from_files = name in ("folder", "csv")
    if from_files:  # the check comes first, as loading stops at the first bad file
        print("\n".join(check(Path(place or "data"), table=name == "csv")[0]))
    dataset = load_images(name, place, options.download, options.image_size, in_memory=False)
    if not from_files:
        print("\n".join(describe(dataset)))
    print(f"{'mean':10} {', '.join(f'{m:.4f}' for m in dataset.mean)}")
    print(f"{'std':10} {', '.join(f'{s:.4f}' for s in dataset.std)}")
    print(f"{'views':10} {options.augment} by {backend} ({reason})")
    title = f"{Path(place).resolve().name if from_files and place else name}: {options.augment} by {backend}"
    sheet = contact_sheet(dataset, policy, backend, options.rows, options.weak, options.strong, options.seed, title)
    try:
        sheet.save(options.out)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.out} cannot be written: {error}") from None
    print(f"{'picture':10} {options.out}, {sheet.width}x{sheet.height}")
    return 0


def describe(dataset: Dataset) -> list[str]:
    """dataset -> lines of text: images and classes of its parts."""
    known = dataset.train_labels[dataset.train_labels >= 0]
    counts = np.bincount(known, minlength=len(dataset.classes))
    height, width = dataset.train_x.shape[1:3]
    lines = [f"{'train':10} {len(dataset.train_x)} images of {len(dataset.classes)} classes, {width}x{height}"]
    widest = max(map(len, dataset.classes))
    lines += [f"  {name:<{widest}} {count}" for name, count in zip(dataset.classes[:20], counts, strict=False)]
    if len(counts) > 20:
        lines.append(f"  and {len(counts) - 20} more, {counts.min()} to {counts.max()} images each")
    if len(known) < len(dataset.train_labels):
        lines.append(f"{'unlabeled':10} {len(dataset.train_labels) - len(known)} images")
    lines.append(f"{'test':10} {len(dataset.test_x)} images")
    return lines


def contact_sheet(
    dataset: Dataset, policy, backend="native", rows=8, weak=3, strong=6, seed=0, title=""
) -> Image.Image:
    """A row for each of `rows` training images, spread over the set: its class, the image, its weak and strong views.

    Captions list the operations of each strong view, with their values.
    """
    if rows < 1 or weak < 0 or strong < 0:
        raise UserError("rows must be at least 1, weak and strong at least 0")
    total = len(dataset.train_x)
    picked = np.linspace(0, total - 1, min(rows, total)).astype(np.int64)
    images = dataset.train_x[picked]
    kinds = (View.UNLABELED_WEAK, weak), (View.UNLABELED_STRONG, strong)
    views = [(visit, kind) for kind, count in kinds for visit in range(count)]
    tiles, captions = images[:, None], [[[]] * (1 + weak) for _ in picked]
    if views:
        draws = np.array([(i, row, *view) for i, row in enumerate(picked) for view in views])
        made = views_of(images, draws, policy, seed, backend, dataset.flip).permute(0, 2, 3, 1).numpy()
        tiles = np.concatenate((tiles, made.reshape(len(picked), len(views), *images.shape[1:])), axis=1)
        for sample, row in zip(picked, captions, strict=True):
            row += _operations(policy, seed, sample, strong, *images.shape[1:3])
    classes = ["no label" if label < 0 else dataset.classes[label] for label in dataset.train_labels[picked]]
    return _draw(tiles, classes, captions, weak, title)


def views_of(images, draws: np.ndarray, policy, seed: int, backend: str, flip: bool, device="cpu") -> torch.Tensor:
    """images: (M, H, W, 3) uint8, draws: (N, 4) -> (N, 3, H, W) uint8 on the host, by any backend."""
    if backend == "dali":
        from ..augment.dali import Views

        ((_, views),) = Views(images, policy, seed, len(draws), [draws], device, flip=flip)
        return views.cpu().clone()
    make = ops.augment_views if backend == "native" else reference.augment_views
    device = torch.device(device if backend == "native" else "cpu")
    images, draws = torch.from_numpy(images).to(device), torch.from_numpy(draws).to(device)
    return make(images, draws, policy, seed, dtype=torch.uint8, flip=flip).cpu()


def _operations(policy, seed: int, sample: int, strong: int, height: int, width: int) -> list[list[str]]:
    """The operations of each of a sample's strong views, in order: "Rotate -12", ..."""
    samples = np.full(strong, sample)
    p = draw_parameters(policy, seed, np.arange(strong), samples, View.UNLABELED_STRONG, height, width, strong=True)
    return [
        [f"{OPS[op]} {value:.3g}" if OPS[op] in policy.ranges else OPS[op] for op, value, done in view if done]
        for view in (zip(*of_view, strict=True) for of_view in zip(p.op, p.value, p.applied, strict=True))
    ]


def _draw(tiles: np.ndarray, classes: list[str], captions: list[list[list[str]]], weak: int, title: str) -> Image.Image:
    """tiles: (rows, columns, H, W, 3) uint8 -> the sheet."""
    small, large = ImageFont.load_default(10), ImageFont.load_default(14)
    zoom = max(1, 96 // max(tiles.shape[2:4]))
    height, width = tiles.shape[2] * zoom, tiles.shape[3] * zoom
    left = 2 * _GAP + max(int(large.getlength(_shortened(name))) for name in classes)
    below = 12 * max(len(lines) for row in captions for lines in row)
    top = (24 if title else 0) + 22
    step_x, step_y = width + _GAP, height + below + _GAP
    size = (left + tiles.shape[1] * step_x + _GAP, top + tiles.shape[0] * step_y + _GAP)
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 5), title, fill=(0, 0, 0), font=large)
    for column, heading in ((0, "image"), (1, "weak"), (1 + weak, "strong")):
        if column < tiles.shape[1] and (heading != "weak" or weak):
            draw.text((left + column * step_x, top - 18), heading, fill=(90, 90, 90), font=large)
    for y, (row, name, lines) in enumerate(zip(tiles, classes, captions, strict=True)):
        draw.text((_GAP, top + y * step_y + height // 2 - 8), _shortened(name), fill=(0, 0, 0), font=large)
        for x, (tile, caption) in enumerate(zip(row, lines, strict=True)):
            place = (left + x * step_x, top + y * step_y)
            sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), place)
            for i, line in enumerate(caption):
                draw.text((place[0], place[1] + height + 12 * i), line, fill=(90, 90, 90), font=small)
    return sheet


def _shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
