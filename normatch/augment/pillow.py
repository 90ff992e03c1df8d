"""Views by Pillow: the reference that every other backend is compared with, and the backend `pil` itself."""

import gc
import sys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from normatch.augment.draws import Parameters, View, draw_parameters
from normatch.augment.policy import OPS, Policy
from normatch.data.base import standardize
from normatch.errors import UserError


def make_views(images, draws, policy: Policy, seed: int, flip: bool = True) -> np.ndarray:
    """images: (M, H, W, 3) uint8, draws: (N, 4) int64 -> (N, H, W, 3) uint8, as `ops.augment_views` defines them."""
    rows, samples, visits, kinds = draws.T
    views = np.empty((len(draws), *images.shape[1:]), np.uint8)
    strong = kinds == View.UNLABELED_STRONG
    for which, is_strong in ((~strong, False), (strong, True)):
        if which.any():
            counters = visits[which], samples[which], kinds[which]
            p = draw_parameters(policy, seed, *counters, *images.shape[1:3], is_strong, flip)
            originals = images[rows[which]]
            views[which] = strong_views(originals, p, policy) if is_strong else weak_views(originals, p, policy.padding)
    return views


def weak_views(images, p: Parameters, padding: str) -> np.ndarray:
    """images: (N, H, W, 3) uint8 -> (N, H, W, 3) uint8: flip, pad by an eighth, crop."""
    count, height, width, _ = images.shape
    rows = p.row[:, None] + np.arange(height) - height // 8
    cols = p.col[:, None] + np.arange(width) - width // 8
    if padding == "reflect":
        rows = (height - 1) - np.abs((height - 1) - np.abs(rows))
        cols = (width - 1) - np.abs((width - 1) - np.abs(cols))
    outside_rows, outside_cols = (rows < 0) | (rows >= height), (cols < 0) | (cols >= width)
    cols = np.where(p.flip[:, None], width - 1 - cols, cols)
    # Whole pixels as three-byte items: one fast gather for the batch.
    pixels = np.ascontiguousarray(images).view("V3")
    index = (np.arange(count)[:, None] * height + rows.clip(0, height - 1))[:, :, None] * width
    index = index + cols.clip(0, width - 1)[:, None, :]
    out = pixels.reshape(-1).take(index).view(np.uint8).reshape(images.shape)
    if padding == "zero":
        out[outside_rows[:, :, None] | outside_cols[:, None, :]] = 0
    return out


def strong_views(images, p: Parameters, policy: Policy) -> np.ndarray:
    """images: (N, H, W, 3) uint8 -> (N, H, W, 3) uint8: all of the policy, in its order."""
    if policy.ops_first:
        return weak_views(_operate(images.copy(), p, policy), p, policy.padding)
    return _operate(weak_views(images, p, policy.padding), p, policy)


def _operate(images, p: Parameters, policy: Policy) -> np.ndarray:
    """Applies the operations and the cutout in place."""
    applied = (p.applied & (p.op != OPS.index("Identity"))).tolist()
    ops, values, boxes = p.op.tolist(), p.value.tolist(), p.box.tolist()
    fill = np.array(policy.cutout_fill, np.uint8)
    for i in range(len(images)):
        if any(applied[i]):
            image = Image.fromarray(images[i])
            for op, value, apply in zip(ops[i], values[i], applied[i], strict=True):
                if apply:
                    image = apply_op(image, OPS[op], value)
            images[i] = np.asarray(image)
        x0, y0, x1, y1 = boxes[i]
        images[i, y0 : y1 + 1, x0 : x1 + 1] = fill
    return images


# ---- The fourteen operations


def apply_op(image: Image.Image, op: str, value: float) -> Image.Image:
    """image: RGB of any size -> the same size. Operations without a parameter ignore the value.

    Geometric operations take the nearest pixel and fill with black. A positive angle rotates counter-clockwise, a
    positive translation moves the image left or up, and a shear reads x + value * y (or y + value * x).
    """
    return _APPLY[op](image, value)


def _affine(image, a, b, c, d, e, f):
    """Output (x, y) reads the input at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def _posterize(image, bits):
    mask = 256 - (1 << (8 - int(bits)))
    return image.point([level & mask for level in range(256)] * 3)  # ImageOps.posterize of Pillow 13 refuses 0 bits


_APPLY = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Identity": lambda image, _: image,
    "Posterize": _posterize,
    "Rotate": lambda image, degrees: image.rotate(degrees),
    "Sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "ShearX": lambda image, shear: _affine(image, 1, shear, 0, 0, 1, 0),
    "ShearY": lambda image, shear: _affine(image, 1, 0, 0, shear, 1, 0),
    "Solarize": ImageOps.solarize,
    "TranslateX": lambda image, pixels: _affine(image, 1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda image, pixels: _affine(image, 1, 0, 0, 0, 1, pixels),
}


# ---- Batches


class StepImages:
    """step -> (B + 2U, H, W, 3) uint8 views and (B + 2U,) int64 rows: what a worker process makes of a `StepViews`."""

    def __init__(self, steps):
        self.steps = steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        draws, dataset = self.steps.draws(step), self.steps.dataset
        views = make_views(dataset.train_x, draws, self.steps.policy, self.steps.seed, dataset.flip)
        return torch.from_numpy(views), torch.from_numpy(draws[:, 0].copy())


def make_loader(steps, start: int, stop: int, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """-> the `StepImages` of steps start, start + 1, ..., stop - 1, in order. A resumed run starts later."""
    # Forked workers share the training images; others would each hold a copy. But fork is safe on Linux only.
    fork = "fork" if num_workers and sys.platform == "linux" else None
    return DataLoader(
        StepImages(steps),
        batch_size=None,  # an item is a whole batch
        sampler=range(start, stop),
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=fork,
        generator=torch.Generator(),  # unused, but leaves the global generator alone
        worker_init_fn=_freeze,
    )


def _freeze(worker: int) -> None:
    """Keeps a forked worker's garbage collector from touching, and so copying, memory shared with the trainer."""
    gc.freeze()


def pillow_batches(steps, start: int, stop: int, device: torch.device, dtype: torch.dtype, num_workers: int):
    """Yields (B + 2U, 3, H, W) normalized views and (B + 2U,) rows of each step, on the device."""
    mean, std = (torch.tensor(v, device=device) for v in (steps.dataset.mean, steps.dataset.std))
    for item in _plain_errors(make_loader(steps, start, stop, num_workers, pin_memory=device.type == "cuda")):
        images, rows = (value.to(device, non_blocking=True) for value in item)
        yield standardize(images, mean, std, dtype), rows


def _plain_errors(batches) -> Iterator:
    """Reduces a worker's UserError, which carries a traceback, to its message, and explains a worker that died."""
    try:
        yield from batches
    except UserError as error:
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.removeprefix(f"{UserError.__module__}.UserError: ")) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            "a process that makes the views has died, perhaps for want of memory: take fewer --num_workers (0: none)"
        ) from error
