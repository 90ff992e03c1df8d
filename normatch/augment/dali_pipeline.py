"""The DALI pipeline of `normatch.augment.dali`: its graph, and the operations in DALI's arithmetic."""

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from normatch.augment.policy import OPS


def build(source, batch_size: int, device: torch.device, mean, std, num_threads: int):
    """source: a `dali.Views`, which feeds the pipeline -> the pipeline, built."""
    policy, size = source.policy, (source.height, source.width)
    gpu = device.type == "cuda"
    number = {name: i for i, name in enumerate(OPS)}

    layouts = ["" if source.files else "HWC"] + [""] * (4 + 4 * policy.num_ops)

    @pipeline_def(enable_conditionals=True, exec_dynamic=True)
    def pipeline():
        inputs = fn.external_source(source.feed, num_outputs=len(layouts), layout=layouts, batch=True)
        image, flip, crop, anchor, extent = inputs[:5]
        if source.files:
            # As folders.fit: the center square, resized by a triangle filter.
            shape = fn.peek_image_shape(image, dtype=types.FLOAT)[:2]
            side = fn.reductions.min(shape)
            start = (shape - side) / 2
            image = fn.decoders.image(image, device="mixed" if gpu else "cpu", output_type=types.RGB)
            image = fn.resize(
                image, size=size, roi_start=start, roi_end=start + side, interp_type=types.INTERP_TRIANGULAR
            )
        elif gpu:
            image = image.gpu()
        if not policy.ops_first:
            image = _cropped(image, flip, crop, policy.padding, size)
        for k in range(policy.num_ops):
            op, value, matrix, mask = inputs[5 + 4 * k : 9 + 4 * k]
            if op == number["Identity"]:
                made = image
            elif op == number["Rotate"]:
                made = fn.warp_affine(image, matrix=matrix, fill_value=0, interp_type=types.INTERP_NN)
            elif op == number["Brightness"]:
                made = _floored(value * image)
            elif op == number["Color"]:
                made = _blended(fn.cast(_luma(image), dtype=types.FLOAT), image, value)
            elif op == number["Contrast"]:
                made = _contrasted(image, value, size)
            elif op == number["Sharpness"]:
                made = _sharpened(image, value, size)
            elif op == number["Posterize"]:
                made = image & mask
            elif op == number["Solarize"]:
                made = _solarized(image, value)
            elif op == number["AutoContrast"]:
                made = _autocontrasted(image)
            else:
                made = fn.equalize(image)
            image = fn.reshape(made, layout="HWC")
        image = fn.erase(image, anchor=anchor, shape=extent, axis_names="HW", fill_value=list(policy.cutout_fill))
        if policy.ops_first:
            image = _cropped(image, flip, crop, policy.padding, size)
        if mean is None:
            return image
        scaled = {"mean": [255 * float(m) for m in mean], "std": [255 * float(s) for s in std]}
        return fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="HWC", **scaled)

    device_id = (device.index or 0) if gpu else None
    made = pipeline(batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=2)
    made.build()
    return made


def _padded(image, size):
    """Surrounds the image by its reflection, an eighth of its size wide."""
    height, width = size
    pad_y, pad_x = height // 8, width // 8
    if pad_x:
        left = fn.flip(image[:, 1 : pad_x + 1], horizontal=1)
        right = fn.flip(image[:, width - 1 - pad_x : width - 1], horizontal=1)
        image = fn.cat(left, image, right, axis=1)
    if pad_y:
        above = fn.flip(image[1 : pad_y + 1], horizontal=0, vertical=1)
        below = fn.flip(image[height - 1 - pad_y : height - 1], horizontal=0, vertical=1)
        image = fn.cat(above, image, below, axis=0)
    return image


def _cropped(image, flip, crop, padding, size):
    image = fn.flip(image, horizontal=flip)
    offset = (size[0] // 8, size[1] // 8)
    if padding == "reflect":
        image, offset = _padded(image, size), (0, 0)
    start = crop - types.Constant(np.array(offset, np.int32))
    return fn.slice(image, start=start, shape=size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)


def _floored(values):
    return fn.cast(dali_math.clamp(dali_math.floor(values), 0.0, 255.0), dtype=types.UINT8)


def _blended(back, image, factor):
    return _floored(back + factor * (fn.cast(image, dtype=types.FLOAT) - back))


def _luma(image):
    whole = fn.cast(image, dtype=types.INT32)
    return (whole[:, :, 0:1] * 19595 + whole[:, :, 1:2] * 38470 + whole[:, :, 2:3] * 7471 + 32768) // 65536


def _contrasted(image, factor, size):
    pixels = size[0] * size[1]
    total = fn.reductions.sum(_luma(image), dtype=types.INT64)
    return _blended(fn.cast((2 * total + pixels) // (2 * pixels), dtype=types.FLOAT), image, factor)


def _sharpened(image, factor, size):
    height, width = size
    if height < 3 or width < 3:
        return image
    whole = fn.cast(image, dtype=types.INT32)
    middle = whole[1 : height - 1, 1 : width - 1]
    total = middle * 4
    for y in range(3):
        for x in range(3):
            total = total + whole[y : height - 2 + y, x : width - 2 + x]
    smooth = fn.cast((2 * total + 13) // 26, dtype=types.FLOAT)
    inner = _blended(smooth, image[1 : height - 1, 1 : width - 1], factor)
    inner = fn.cat(image[1 : height - 1, 0:1], inner, image[1 : height - 1, width - 1 : width], axis=1)
    return fn.cat(image[0:1], inner, image[height - 1 : height], axis=0)


def _autocontrasted(image):
    values = fn.cast(image, dtype=types.FLOAT64)
    lo = fn.cast(fn.reductions.min(image, axes=(0, 1), keep_dims=True), dtype=types.FLOAT64)
    hi = fn.cast(fn.reductions.max(image, axes=(0, 1), keep_dims=True), dtype=types.FLOAT64)
    flat = fn.cast(hi <= lo, dtype=types.FLOAT64)
    scale = 255.0 / (hi - lo + flat)
    return _floored((values * scale - lo * scale) * (1.0 - flat) + values * flat)


def _solarized(image, threshold):
    keep = fn.cast(fn.cast(image, dtype=types.FLOAT) < threshold, dtype=types.UINT8)
    return fn.cast(image * keep + (255 - image) * (1 - keep), dtype=types.UINT8)
