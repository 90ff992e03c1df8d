"""Views by an NVIDIA DALI pipeline (optional: pip install nvidia-dali-cuda130), on the CPU or a GPU.

The pipeline draws nothing itself: flips, crops, operations, values and boxes come from the same counters as in all
backends (`normatch.augment.draws`), as parameters of each sample. So its only state is the step number, and it can
start at any step. All operations except Equalize, which is DALI's own operator, are written in DALI's arithmetic after
the rules of `csrc/augment_views.h`; docs/augmentation.md lists the differences from Pillow.
"""

import importlib.util
import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from normatch.augment.draws import View, draw_parameters
from normatch.augment.policy import GEOMETRIC, OPS
from normatch.data.folders import FileImages
from normatch.errors import UserError

INSTALL = f"pip install nvidia-dali-cuda{(torch.version.cuda or '13').split('.')[0]}0"


def missing() -> str | None:
    """-> why DALI cannot be used, or None if it can."""
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return None if installed else f"NVIDIA DALI is not installed ({INSTALL})"


def dali_batches(
    steps, start: int, stop: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (B + 2U, 3, H, W) views and (B + 2U,) rows of a `StepViews`, in DALI's own memory if the dtype allows."""
    data = steps.dataset
    count = steps.num_labeled + 2 * steps.num_unlabeled
    draws = (steps.draws(step) for step in range(start, stop))
    views = Views(data.train_x, steps.policy, steps.seed, count, draws, device, data.mean, data.std, data.flip)
    for rows, images in views:
        yield images.to(dtype), torch.from_numpy(rows).to(device, non_blocking=True)


class Views:
    """Iterates over ((N,) rows, (N, 3, H, W) channels-last views) for each (N, 4) array of `draws`.

    images: (M, H, W, 3) uint8, or FileImages, which DALI then decodes and resizes itself. Without mean and std the
    views are uint8. Iterating raises UserError for a file that DALI cannot decode.
    """

    def __init__(self, images, policy, seed, batch_size, draws, device="cpu", mean=None, std=None, flip=True,
                 num_threads=None):  # fmt: skip
        if reason := missing():
            raise UserError(f"augment_backend dali is not there: {reason}")
        from normatch.augment.dali_pipeline import build  # imports DALI

        self.images, self.policy, self.seed, self.flip = images, policy, seed, flip
        self.files = isinstance(images, FileImages)
        self.height, self.width = images.shape[1:3]
        self.draws = iter(draws)
        self.rows: list[np.ndarray] = []  # of the batches that DALI is working on
        device = torch.device(device)
        self.pipeline = build(self, batch_size, device, mean, std, num_threads or min(16, os.cpu_count() or 1))

    def __iter__(self):
        return self

    def __next__(self) -> tuple[np.ndarray, Tensor]:
        try:
            (views,) = self.pipeline.run()  # StopIteration comes from the source
        except RuntimeError as error:
            if self.files and (path := _undecodable(self.images.paths[np.concatenate(self.rows)])):
                message = f"DALI cannot decode {path}: take another augment_backend, or in_memory true"
                raise UserError(message) from error
            raise
        rows = self.rows.pop(0)
        return rows, torch.from_dlpack(views.as_tensor()).permute(0, 3, 1, 2)

    def feed(self):
        """-> the next batch's images and parameters as DALI takes them: a list of arrays for each input."""
        draws = next(self.draws)
        rows, samples, visits, kinds = np.asarray(draws).T
        self.rows.append(np.ascontiguousarray(rows))
        strong = kinds == View.UNLABELED_STRONG
        p = draw_parameters(self.policy, self.seed, visits, samples, kinds, self.height, self.width, True, self.flip)
        applied = p.applied & strong[:, None]
        op = np.where(applied, p.op, OPS.index("Identity")).astype(np.int32)
        box = np.where(strong[:, None], p.box, [0, 0, -1, -1])
        anchor = box[:, [1, 0]].astype(np.float32)
        extent = np.maximum(box[:, [3, 2]] - box[:, [1, 0]] + 1, 0).astype(np.float32)
        matrix = np.tile(np.array([[1, 0, 0], [0, 1, 0]], np.float32), (*op.shape, 1, 1))
        geometric = np.isin(op, [OPS.index(name) for name in GEOMETRIC])
        for i, k in zip(*np.nonzero(geometric), strict=True):
            matrix[i, k] = affine_matrix(OPS[op[i, k]], float(p.value[i, k]), self.height, self.width)
        op[geometric] = OPS.index("Rotate")  # stands for all of them
        images = self.images.encoded(rows) if self.files else self.images[rows]
        bits = np.where(op == OPS.index("Posterize"), p.value, 8).astype(np.int64)
        mask = (256 - (1 << (8 - bits))).astype(np.uint8)
        per_op = [values[:, k] for k in range(op.shape[1]) for values in (op, p.value, matrix, mask)]
        crop = np.stack([p.row, p.col], 1).astype(np.int32)
        arrays = [images, p.flip.astype(np.int32), crop, anchor, extent, *per_op]
        return [array if isinstance(array, list) else np.ascontiguousarray(array) for array in arrays]


def _undecodable(paths) -> str | None:
    """-> the first of these files that DALI cannot decode, since its error does not name the file."""
    from nvidia.dali import fn, pipeline_def

    for path in dict.fromkeys(paths.tolist()):
        try:
            data = np.fromfile(path, np.uint8)
            pipeline_def(lambda data=data: fn.decoders.image(fn.external_source(lambda: [data], batch=True)))(
                batch_size=1, num_threads=1, device_id=None
            ).run()
        except (RuntimeError, OSError):
            return path
    return None


def affine_matrix(op: str, value: float, height: int, width: int) -> np.ndarray:
    """-> (2, 3) float32 from output to input pixels, both at their centers: Pillow's 16.16 fixed-point numbers."""

    def fixed(v):
        return math.floor(v * 65536 + 0.5)

    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if op == "TranslateX":
        c = math.floor(value + 0.5)
    elif op == "TranslateY":
        f = math.floor(value + 0.5)
    elif op == "ShearX":
        b = value
    elif op == "ShearY":
        d = value
    else:
        angle = -math.radians(value % 360.0)
        a, b, d, e = (round(v, 15) for v in (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)))
        cx, cy = width / 2, height / 2
        c, f = a * -cx + b * -cy + cx, d * -cx + e * -cy + cy
    rows = [(fixed(a), fixed(b), fixed(c + a * 0.5 + b * 0.5)), (fixed(d), fixed(e), fixed(f + d * 0.5 + e * 0.5))]
    # The fixed-point offset is that of the first pixel's center; the 2^-17 keeps a center that falls on the border
    # between two pixels on Pillow's side of it.
    return np.array([[r[0], r[1], r[2] - (r[0] + r[1]) / 2] for r in rows], np.float64).astype(np.float32) / 65536
