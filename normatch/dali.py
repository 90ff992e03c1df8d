"""Views by an NVIDIA DALI pipeline (optional: pip install nvidia-dali-cuda130), on the CPU or a GPU.

The pipeline draws nothing itself: flips, crops, operations, values and boxes come from the same counters as everywhere
(`normatch.augment`), as explicit parameters of each sample. So its state is the number of the step, and it goes on from
any. All operations but Equalize, for which DALI has its own operator, are written in DALI's arithmetic after the rules
of `csrc/augment_views.h`; docs/augmentation.md lists what differs from Pillow.
"""

import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .augment import GEOMETRIC, OPS, View, draw_parameters
from .data.folders import FileImages
from .errors import UserError

INSTALL = f"pip install nvidia-dali-cuda{(torch.version.cuda or '13').split('.')[0]}0"


def missing() -> str | None:
    """Why DALI cannot be used, or None where it can."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return f"NVIDIA DALI is not installed ({INSTALL})"
    return None


def dali_batches(views, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The batches of `normatch.loader.Batches`, by DALI; the tensors are DALI's own memory where the dtype allows."""
    dataset = views.dataset
    labels = torch.from_numpy(dataset.train_labels).to(device)
    b = views.batch_size // views.ranks
    u = b * views.uratio
    draws = (views.draws(step) for step in range(start, stop))
    made = Views(dataset.train_x, views.policy, views.seed, b + 2 * u, draws, device, dataset.mean, dataset.std,
                 dataset.flip)  # fmt: skip
    for rows, images in made:
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        yield {
            "images": images.to(dtype),
            "y": labels[index[:b]],
            "u_y": labels[index[b : b + u]],
            "u_index": index[b : b + u],
        }


class Views:
    """Iterates over ((N,) row numbers, (N, 3, H, W) channels-last views) for each (N, 4) array of `draws`.

    images: (M, H, W, 3) uint8, or FileImages, which DALI then decodes and brings to their size itself. Without mean and
    std the views are uint8. Raises UserError, from the iteration, for a file that DALI cannot decode.
    """

    def __init__(self, images, policy, seed, batch_size, draws, device="cpu", mean=None, std=None, flip=True,
                 num_threads=None):  # fmt: skip
        if reason := missing():
            raise UserError(f"augment_backend dali is not there: {reason}")
        self.images, self.policy, self.seed, self.flip = images, policy, seed, flip
        self.files = isinstance(images, FileImages)
        self.height, self.width = images.shape[1:3]
        self.draws = iter(draws)
        self.rows: list[np.ndarray] = []  # of the batches that DALI has been given and not yet returned
        device = torch.device(device)
        self.pipeline = _build(self, batch_size, device, mean, std, num_threads or min(16, os.cpu_count() or 1))

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
        """The next batch's images and parameters, as DALI takes them: a list of arrays for each input."""
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
        op[geometric] = OPS.index("Rotate")  # which is done for all of them
        images = self.images.encoded(rows) if self.files else self.images[rows]
        bits = np.where(op == OPS.index("Posterize"), p.value, 8).astype(np.int64)
        per_op = []
        for k in range(op.shape[1]):
            mask = (256 - (1 << (8 - bits[:, k]))).astype(np.uint8)
            per_op += [op[:, k], p.value[:, k], matrix[:, k], mask]
        crop = np.stack([p.row, p.col], 1).astype(np.int32)
        arrays = [images, p.flip.astype(np.int32), crop, anchor, extent, *per_op]
        return [array if isinstance(array, list) else np.ascontiguousarray(array) for array in arrays]


def _undecodable(paths) -> str | None:
    """The first of these files that DALI cannot decode: it does not say which it was."""
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
    """(2, 3) float32 from output to input pixels, both at their centres: Pillow's 16.16 fixed-point numbers."""
    import math

    def fixed(v):
        return math.floor(v * 65536 + 0.5)

    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if op == "TranslateX":
        return np.array([[1, 0, math.floor(value + 0.5)], [0, 1, 0]], np.float32)
    if op == "TranslateY":
        return np.array([[1, 0, 0], [0, 1, math.floor(value + 0.5)]], np.float32)
    if op == "ShearX":
        b = value
    elif op == "ShearY":
        d = value
    else:
        angle = -math.radians(value % 360.0)
        a, b, d, e = (round(v, 15) for v in (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)))
        cx, cy = width / 2, height / 2
        c, f = a * -cx + b * -cy + cx, d * -cx + e * -cy + cy
    rows = [(fixed(a), fixed(b), fixed(c + a * 0.5 + b * 0.5)), (fixed(d), fixed(e), fixed(f + d * 0.5 + e * 0.5))]
    # The fixed-point offset is that of the first pixel's centre; the 2^-17 keeps a centre that falls on the border
    # between two pixels on Pillow's side of it.
    return np.array([[r[0], r[1], r[2] - (r[0] + r[1]) / 2] for r in rows], np.float64).astype(np.float32) / 65536


def _build(source: Views, batch_size: int, device: torch.device, mean, std, num_threads: int):
    from nvidia.dali import fn, math, pipeline_def, types

    policy, (height, width) = source.policy, (source.height, source.width)
    pad_y, pad_x = height // 8, width // 8
    gpu = device.type == "cuda"
    number = {name: i for i, name in enumerate(OPS)}

    def padded(image):
        """The image with its reflection around it; zeros are filled in by the slice."""
        if policy.padding != "reflect":
            return image
        if pad_x:
            left = fn.flip(image[:, 1 : pad_x + 1], horizontal=1)
            right = fn.flip(image[:, width - 1 - pad_x : width - 1], horizontal=1)
            image = fn.cat(left, image, right, axis=1)
        if pad_y:
            above = fn.flip(image[1 : pad_y + 1], horizontal=0, vertical=1)
            below = fn.flip(image[height - 1 - pad_y : height - 1], horizontal=0, vertical=1)
            image = fn.cat(above, image, below, axis=0)
        return image

    def cropped(image, flip, crop):
        image = padded(fn.flip(image, horizontal=flip))
        offset = (0, 0) if policy.padding == "reflect" else (pad_y, pad_x)
        start = crop - types.Constant(np.array(offset, np.int32))
        return fn.slice(
            image, start=start, shape=(height, width), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
        )

    def floored(values):
        return fn.cast(math.clamp(math.floor(values), 0.0, 255.0), dtype=types.UINT8)

    def blended(back, image, factor):
        return floored(back + factor * (fn.cast(image, dtype=types.FLOAT) - back))

    def luma(image):
        whole = fn.cast(image, dtype=types.INT32)
        return (whole[:, :, 0:1] * 19595 + whole[:, :, 1:2] * 38470 + whole[:, :, 2:3] * 7471 + 32768) // 65536

    def contrasted(image, factor):
        pixels = height * width
        total = fn.reductions.sum(luma(image), dtype=types.INT64)
        return blended(fn.cast((2 * total + pixels) // (2 * pixels), dtype=types.FLOAT), image, factor)

    def sharpened(image, factor):
        if height < 3 or width < 3:
            return image
        whole = fn.cast(image, dtype=types.INT32)
        middle = whole[1 : height - 1, 1 : width - 1]
        total = middle * 4
        for y in range(3):
            for x in range(3):
                total = total + whole[y : height - 2 + y, x : width - 2 + x]
        smooth = fn.cast((2 * total + 13) // 26, dtype=types.FLOAT)
        inner = blended(smooth, image[1 : height - 1, 1 : width - 1], factor)
        inner = fn.cat(image[1 : height - 1, 0:1], inner, image[1 : height - 1, width - 1 : width], axis=1)
        return fn.cat(image[0:1], inner, image[height - 1 : height], axis=0)

    def autocontrasted(image):
        values = fn.cast(image, dtype=types.FLOAT64)
        lo = fn.cast(fn.reductions.min(image, axes=(0, 1), keep_dims=True), dtype=types.FLOAT64)
        hi = fn.cast(fn.reductions.max(image, axes=(0, 1), keep_dims=True), dtype=types.FLOAT64)
        flat = fn.cast(hi <= lo, dtype=types.FLOAT64)
        scale = 255.0 / (hi - lo + flat)
        return floored((values * scale - lo * scale) * (1.0 - flat) + values * flat)

    def solarized(image, threshold):
        keep = fn.cast(fn.cast(image, dtype=types.FLOAT) < threshold, dtype=types.UINT8)
        return fn.cast(image * keep + (255 - image) * (1 - keep), dtype=types.UINT8)

    @pipeline_def(enable_conditionals=True, exec_dynamic=True)
    def pipeline():
        inputs = fn.external_source(
            source.feed,
            num_outputs=5 + 4 * policy.num_ops,
            layout=["" if source.files else "HWC"] + [""] * (4 + 4 * policy.num_ops),
            batch=True,
        )
        image, flip, crop, anchor, extent = inputs[:5]
        if source.files:
            # As folders.fit: the middle square, brought to the size by a triangle filter.
            shape = fn.peek_image_shape(image, dtype=types.FLOAT)[:2]
            side = fn.reductions.min(shape)
            start = (shape - side) / 2
            image = fn.decoders.image(image, device="mixed" if gpu else "cpu", output_type=types.RGB)
            image = fn.resize(
                image, size=(height, width), roi_start=start, roi_end=start + side, interp_type=types.INTERP_TRIANGULAR
            )
        elif gpu:
            image = image.gpu()
        if not policy.ops_first:
            image = cropped(image, flip, crop)
        for k in range(policy.num_ops):
            op, value, matrix, mask = inputs[5 + 4 * k : 9 + 4 * k]
            if op == number["Identity"]:
                made = image
            elif op == number["Rotate"]:
                made = fn.warp_affine(image, matrix=matrix, fill_value=0, interp_type=types.INTERP_NN)
            elif op == number["Brightness"]:
                made = floored(value * image)
            elif op == number["Color"]:
                made = blended(fn.cast(luma(image), dtype=types.FLOAT), image, value)
            elif op == number["Contrast"]:
                made = contrasted(image, value)
            elif op == number["Sharpness"]:
                made = sharpened(image, value)
            elif op == number["Posterize"]:
                made = image & mask
            elif op == number["Solarize"]:
                made = solarized(image, value)
            elif op == number["AutoContrast"]:
                made = autocontrasted(image)
            else:
                made = fn.equalize(image)
            image = fn.reshape(made, layout="HWC")
        image = fn.erase(image, anchor=anchor, shape=extent, axis_names="HW", fill_value=list(policy.cutout_fill))
        if policy.ops_first:
            image = cropped(image, flip, crop)
        if mean is None:
            return image
        return fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * float(m) for m in mean],
            std=[255 * float(s) for s in std],
        )

    made = pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=2,
    )
    made.build()
    return made
