"""Weak and strong (RandAugment) views of uint8 images, drawn from counters instead of a random state.

Three steps, each usable alone:

    random_words      Philox4x32-10: (seed, visit, sample, view) -> 32-bit words
    draw_parameters   words -> a table of flips, crops, operations and cutout boxes for a batch
    weak_views, strong_views   table + uint8 images -> uint8 views

A view depends on (seed, visit, sample, view) alone, never on the batch it is in, the worker that makes it or
the order of the batches. `sample` is the image's index in the training set and `visit` says how often the
image has been seen before; as every pass of the sampler shows each image once, the loader uses the number of
the pass. (The step number would not do: where the labelled set is smaller than a batch, one step shows an
image several times.)

All decisions fall in `draw_parameters`, in integer and plain float32 arithmetic that any other backend can
repeat to the bit; the images are then made by Pillow, which the other backends are compared with.
"""

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from .errors import UserError, nearest


class View(IntEnum):
    """Which view of an image the words are for; part of the counter, so never renumber."""

    LABELED_WEAK = 0
    UNLABELED_WEAK = 1
    UNLABELED_STRONG = 2


# The position in this tuple is the operation's number in the parameter table: never reorder.
OPS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Identity",
    "Posterize",
    "Rotate",
    "Sharpness",
    "ShearX",
    "ShearY",
    "Solarize",
    "TranslateX",
    "TranslateY",
)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


@dataclass(frozen=True, eq=False)  # told apart by identity, so that what follows from a policy can be kept
class Policy:
    """An augmentation, as data. Sizes not in pixels are fractions of the image's width or height."""

    num_ops: int  # drawn with replacement from `ops`; 0: the strong view is another weak one
    ranges: dict[str, tuple[float, float]]  # lo, hi of each operation that has a parameter
    levels: int  # > 0: value = lo + (hi - lo) v / levels with an integer v in 1..levels-1; 0: uniform in [lo, hi)
    probability: float  # that a drawn operation is applied
    random_sign: bool  # negate the value of a geometric operation half of the time
    whole_pixels: bool  # translations are truncated to whole pixels
    padding: str  # of the random crop, in the weak views too: "reflect" or "zero"
    ops_first: bool  # operations, cutout, flip, crop; otherwise flip, crop, operations, cutout
    cutout_pixels: int  # side of the square; 0: drawn from [0, cutout_fraction) of the width
    cutout_fraction: float
    cutout_downwards: bool  # the centre is drawn from (1, W], down from W; otherwise from [0, W)
    cutout_fill: tuple[int, int, int]
    ops: tuple[str, ...] = OPS
    flip: bool = True  # whether views may be mirrored, where the images allow it


POLICIES = {
    # RandAugmentMC(n=2, m=10) of the PyTorch FixMatch by kekmodel, which NorMatch uses.
    "kekmodel": Policy(
        num_ops=2,
        ranges={
            "Brightness": (0.05, 0.95),
            "Color": (0.05, 0.95),
            "Contrast": (0.05, 0.95),
            "Posterize": (4, 8),
            "Rotate": (0, 30),
            "Sharpness": (0.05, 0.95),
            "ShearX": (0, 0.3),
            "ShearY": (0, 0.3),
            "Solarize": (256, 0),
            "TranslateX": (0, 0.3),
            "TranslateY": (0, 0.3),
        },
        levels=10,
        probability=0.5,
        random_sign=True,
        whole_pixels=True,
        padding="reflect",
        ops_first=False,
        cutout_pixels=16,  # whatever the image's size
        cutout_fraction=0.0,
        cutout_downwards=False,
        cutout_fill=(127, 127, 127),
    ),
    # RandAugment(3, 5) of the PyTorch FixMatch by LeeDoYup.
    "leedoyup": Policy(
        num_ops=3,
        ranges={
            "Brightness": (0.05, 0.95),
            "Color": (0.05, 0.95),
            "Contrast": (0.05, 0.95),
            "Posterize": (4, 8),
            "Rotate": (-30, 30),
            "Sharpness": (0.05, 0.95),
            "ShearX": (-0.3, 0.3),
            "ShearY": (-0.3, 0.3),
            "Solarize": (0, 256),
            "TranslateX": (-0.3, 0.3),
            "TranslateY": (-0.3, 0.3),
        },
        levels=0,
        probability=1.0,
        random_sign=False,
        whole_pixels=False,
        padding="zero",
        ops_first=True,
        cutout_pixels=0,
        cutout_fraction=0.5,
        cutout_downwards=True,
        cutout_fill=(125, 123, 114),
    ),
}
# RandAugment as the FixMatch paper describes it: the ranges of its appendix (those of LeeDoYup's code), two operations
# of random magnitude on every image, then Cutout; flip and shift come first and reflect, as its weak augmentation does.
POLICIES["fixmatch-paper"] = replace(
    POLICIES["leedoyup"],
    num_ops=2,
    padding="reflect",
    ops_first=False,
    cutout_downwards=False,
    cutout_fill=(127, 127, 127),
)
# Flip and shift alone: the strong view is a second weak one.
POLICIES["weak"] = replace(POLICIES["kekmodel"], num_ops=0, cutout_pixels=0)
# For densities, whose samples have to stay what they are: two of a slight turn and slight shears.
POLICIES["affine"] = replace(
    POLICIES["weak"],
    num_ops=2,
    ops=("Rotate", "ShearX", "ShearY"),
    ranges={"Rotate": (0, 20), "ShearX": (0, 0.25), "ShearY": (0, 0.25)},
    levels=0,
    probability=1.0,
)

MAX_OPS, MAX_LEVELS, MAX_SIDE = 8, 32, 2048  # what the native op has room for


def find_policy(name: str) -> Policy:
    """One of POLICIES, or a YAML file of a policy's fields; those it leaves out are those of its `base` (kekmodel)."""
    if name in POLICIES:
        return POLICIES[name]
    if not str(name).endswith((".yaml", ".yml")):
        raise UserError(
            f"unknown policy {name!r}{nearest(name, POLICIES)}; policies: {', '.join(POLICIES)}, or a YAML file"
        )
    import yaml  # only files need it

    try:
        fields = yaml.safe_load(Path(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"policy {name} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UserError(f"policy {name} must hold `field: value` lines")
    base = str(fields.pop("base", "kekmodel"))
    known = Policy.__dataclass_fields__
    if base not in POLICIES or not fields.keys() <= known.keys():
        wrong = base if base not in POLICIES else next(f for f in fields if f not in known)
        near = nearest(wrong, POLICIES if base not in POLICIES else known)
        raise UserError(f"policy {name}: there is no '{wrong}'{near}; fields are base, {', '.join(known)}")
    try:
        for field, value in fields.items():
            if isinstance(value, list):
                fields[field] = tuple(value)
        if "ranges" in fields:
            given = {op: (float(lo), float(hi)) for op, (lo, hi) in fields["ranges"].items()}
            fields["ranges"] = POLICIES[base].ranges | given
        policy = replace(POLICIES[base], **fields)
        _check_policy(policy)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"policy {name}: {error}") from None
    return policy


def _check_policy(p: Policy) -> None:
    """Raises ValueError for what cannot be applied."""
    for field in Policy.__dataclass_fields__.values():
        value, kind = getattr(p, field.name), field.type
        if kind not in (int, float, bool, str):  # looked at below
            continue
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{field.name} is {value!r}, not {kind.__name__}")
    unknown = [op for op in (*p.ops, *p.ranges) if op not in OPS]
    limits = {
        f"unknown operation {unknown[:1]}: there are {', '.join(OPS)}": bool(unknown),
        f"num_ops may be 0 to {MAX_OPS}": not 0 <= p.num_ops <= MAX_OPS,
        f"ops may name 1 to {len(OPS)} operations, each once": not p.ops or len(set(p.ops)) < len(p.ops),
        f"levels may be 0 or 2 to {MAX_LEVELS}": p.levels != 0 and not 2 <= p.levels <= MAX_LEVELS,
        "probability may be 0 to 1": not 0 <= p.probability <= 1,
        "ranges must be numbers": not all(math.isfinite(v) for bounds in p.ranges.values() for v in bounds),
        "padding may be reflect or zero": p.padding not in ("reflect", "zero"),
        "cutout_fill must be three levels of 0 to 255": len(p.cutout_fill) != 3
        or any(not isinstance(v, int) or not 0 <= v <= 255 for v in p.cutout_fill),
        "cutout sizes must not be negative": p.cutout_pixels < 0 or not 0 <= p.cutout_fraction <= 1,
        "Posterize keeps 0 to 8 bits": not all(0 <= bits <= 8 for bits in p.ranges.get("Posterize", (4, 8))),
        "TranslateX and TranslateY may move by the image's size at most": any(
            abs(v) > 1 for op in ("TranslateX", "TranslateY") for v in p.ranges.get(op, (0, 0))
        ),
        "ShearX and ShearY may be -2 to 2": any(
            abs(v) > 2 for op in ("ShearX", "ShearY") for v in p.ranges.get(op, (0, 0))
        ),
    }
    for message, broken in limits.items():
        if broken:
            raise ValueError(message)


# ---- Random words --------------------------------------------------------------------------------


def philox(counter, key):
    """counter: (..., 4), key: (2,) uint32 -> (..., 4) uint32, by Philox4x32-10 (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = int(key[0]), int(key[1])
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_words(seed: int, visit, samples, view, count: int):
    """visit, view: int or (N,), samples: (N,) -> (N, count) uint32.

    Word w is word w % 4 of the block with counter (w // 4, view, sample, visit); the key is the low and the
    high half of the seed.
    """
    samples = np.asarray(samples)
    counter = np.empty((len(samples), -(-count // 4), 4), dtype=np.uint32)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.broadcast_to(view, samples.shape)[:, None]
    counter[..., 2] = samples[:, None]
    counter[..., 3] = np.broadcast_to(visit, samples.shape)[:, None]
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return philox(counter, key).reshape(len(samples), 4 * counter.shape[1])[:, :count]


def _below(words, n: int):
    """uint32 words -> integers in [0, n): the high half of the 64-bit product words * n."""
    return ((words.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)).astype(np.int32)


def _unit(words):
    """uint32 words -> float32 in [0, 1): the top 24 bits times 2^-24, exactly."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _coin(words):
    """uint32 words -> bool, the top bit."""
    return (words >> np.uint32(31)).astype(bool)


# ---- The parameters of a batch -------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Everything random about N views. Weak views leave the last four empty (n = 0 operations, no box).

    A box holds both its ends and lies inside the image; it is empty where x1 < x0.
    """

    flip: np.ndarray  # (N,) bool
    row: np.ndarray  # (N,) int32: the crop's first row in the padded image
    col: np.ndarray  # (N,) int32
    op: np.ndarray  # (N, n) int32, into OPS
    applied: np.ndarray  # (N, n) bool
    value: np.ndarray  # (N, n) float32: degrees, shear, pixels, bits, threshold or blend factor, sign included
    box: np.ndarray  # (N, 4) int32: x0, y0, x1, y1 of the cutout


@lru_cache(maxsize=32)
def op_values(policy: Policy, height: int, width: int):
    """(14, levels - 1) float32, the value of each operation at v = 1, 2, ...; or (14, 2), its lo and hi.

    Computed in float64 and rounded once, so that it holds the published code's own values. A backend takes
    this table rather than the formula.
    """
    levels = policy.levels or 1
    points = range(1, levels) if policy.levels else (0, 1)
    table = np.zeros((len(OPS), len(points)), dtype=np.float32)
    sizes = {"TranslateX": width, "TranslateY": height}
    for op, (lo, hi) in policy.ranges.items():
        for i, point in enumerate(points):
            value = lo + (hi - lo) * point / levels
            if op in sizes:
                value = value * sizes[op]
                value = int(value) if policy.whole_pixels else value
            table[OPS.index(op), i] = value
    table.flags.writeable = False  # it is shared by all who ask
    return table


@lru_cache(maxsize=32)
def encode_policy(policy: Policy, height: int, width: int, flip: bool) -> tuple[list[int], list[float]]:
    """What the native op is told about a policy: whole numbers and the operations drawn from, and real numbers."""
    rules = [
        policy.num_ops,
        policy.levels,
        policy.random_sign,
        policy.padding == "reflect",
        policy.ops_first,
        policy.cutout_pixels,
        policy.cutout_downwards,
        flip and policy.flip,
        *policy.cutout_fill,
        *(OPS.index(op) for op in policy.ops),
    ]
    values = [policy.probability, policy.cutout_fraction, *op_values(policy, height, width).reshape(-1).tolist()]
    return [int(rule) for rule in rules], values


def normalization(mean, std) -> tuple[np.ndarray, np.ndarray]:
    """(3,), (3,) of values in [0, 1] -> (3,), (3,) float32 scale, shift: v * scale - shift normalises v in 0..255."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return 1 / (np.float32(255) * std), mean / std


def draw_parameters(
    policy: Policy,
    seed: int,
    visit,
    samples,
    view,
    height: int,
    width: int,
    strong: bool,
    flip: bool = True,
) -> Parameters:
    """visit, view: int or (N,), samples: (N,) -> Parameters of N views of height x width images.

    The words of a view, by position, where below(w, n) = (w * n) >> 32, unit(w) = (w >> 8) * 2^-24 and
    coin(w) = w >> 31. Float32 throughout, each operation rounded on its own (no fused multiply-add):

        0           flip      coin (and `flip`: off for images that mean something else when mirrored; and the policy's)
        1, 2        row, col  below(2 * pad + 1), pad = size // 8
        3           -
        4           cutout    side = (unit * cutout_fraction) * width, where it is not fixed
        5, 6        cutout    centre x, y = unit * size, or downwards: size + unit * (1 - size)
        7           -
        8 + 4i      op i      ops[below(len(ops))]
        9 + 4i      value     table[op, below(levels - 1)], or lo + unit * (hi - lo)
        10 + 4i     applied   unit < probability
        11 + 4i     sign      coin: negate (geometric operations under `random_sign`)
    """
    n = policy.num_ops if strong else 0
    words = random_words(seed, visit, samples, view, 8 + 4 * n if strong else 4)
    count = len(words)
    if not strong:
        op, applied, value = (np.zeros((count, 0), dtype) for dtype in (np.int32, bool, np.float32))
        box = np.tile(np.array([0, 0, -1, -1], np.int32), (count, 1))
    else:
        per_op = words[:, 8:].reshape(count, n, 4)
        pool = np.array([OPS.index(name) for name in policy.ops], np.int32)
        op = pool[_below(per_op[..., 0], len(pool))]
        table = op_values(policy, height, width)
        if policy.levels:
            value = table[op, _below(per_op[..., 1], policy.levels - 1)]
        else:
            lo, hi = table[op, 0], table[op, 1]
            value = lo + _unit(per_op[..., 1]) * (hi - lo)
        applied = _unit(per_op[..., 2]) < np.float32(policy.probability)
        if policy.random_sign:
            geometric = np.isin(OPS, GEOMETRIC)[op]
            value = np.where(_coin(per_op[..., 3]) & geometric, -value, value)

        if policy.cutout_pixels:
            side = np.full(count, policy.cutout_pixels, np.float32)
        else:
            side = (_unit(words[:, 4]) * np.float32(policy.cutout_fraction)) * np.float32(width)
        centre = []
        for word, size in ((words[:, 5], np.float32(width)), (words[:, 6], np.float32(height))):
            centre.append(size + _unit(word) * (1 - size) if policy.cutout_downwards else _unit(word) * size)
        box = cutout_box(*centre, side, height, width)
    return Parameters(
        flip=_coin(words[:, 0]) & (flip and policy.flip),
        row=_below(words[:, 1], 2 * (height // 8) + 1),
        col=_below(words[:, 2], 2 * (width // 8) + 1),
        op=op,
        applied=applied,
        value=value,
        box=box,
    )


def cutout_box(cx, cy, side, height: int, width: int):
    """cx, cy, side: (N,) float32 -> (N, 4) int32 x0, y0, x1, y1, ends included; empty where side is 0.

    At the left and top edge the published code shifts the box, at the others it cuts it; and it counts both
    ends, so that a box of 16 pixels is 17 wide. The truncations are part of it.
    """
    ends = []
    for centre, size in ((cx, width), (cy, height)):
        first = np.trunc(np.maximum(centre - side * np.float32(0.5), 0))
        last = np.trunc(np.minimum(first + side, size))
        ends.append((first, np.where(side > 0, np.minimum(last, size - 1), -1)))
    (x0, x1), (y0, y1) = ends
    return np.stack([x0, y0, x1, y1], axis=-1).astype(np.int32)


# ---- Views ---------------------------------------------------------------------------------------


def weak_views(images, p: Parameters, padding: str):
    """images: (N, H, W, 3) uint8 -> (N, H, W, 3) uint8: flip, pad by an eighth, crop."""
    count, height, width, _ = images.shape
    rows = p.row[:, None] + np.arange(height) - height // 8
    cols = p.col[:, None] + np.arange(width) - width // 8
    if padding == "reflect":
        rows = (height - 1) - np.abs((height - 1) - np.abs(rows))
        cols = (width - 1) - np.abs((width - 1) - np.abs(cols))
    outside_rows, outside_cols = (rows < 0) | (rows >= height), (cols < 0) | (cols >= width)
    cols = np.where(p.flip[:, None], width - 1 - cols, cols)
    # Whole pixels as three-byte items: one gather for the batch, and a fast one.
    pixels = np.ascontiguousarray(images).view("V3")
    index = (np.arange(count)[:, None] * height + rows.clip(0, height - 1))[:, :, None] * width
    index = index + cols.clip(0, width - 1)[:, None, :]
    out = pixels.reshape(-1).take(index).view(np.uint8).reshape(images.shape)
    if padding == "zero":
        out[outside_rows[:, :, None] | outside_cols[:, None, :]] = 0
    return out


def strong_views(images, p: Parameters, policy: Policy):
    """images: (N, H, W, 3) uint8 -> (N, H, W, 3) uint8: all of it, in the policy's order."""
    if policy.ops_first:
        return weak_views(_operate(images.copy(), p, policy), p, policy.padding)
    return _operate(weak_views(images, p, policy.padding), p, policy)


def _operate(images, p: Parameters, policy: Policy):
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


def normalize(images, mean, std, dtype=torch.float32):
    """images: (N, H, W, 3) uint8 tensor -> (N, 3, H, W) channels-last, (x / 255 - mean) / std.

    mean and std may be tensors on the images' device, which spares a copy from the host.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device)
    std = torch.as_tensor(std, dtype=torch.float32, device=images.device)
    scaled = images.to(torch.float32) * (1 / (255 * std)) - mean / std
    return scaled.to(dtype).permute(0, 3, 1, 2)


# ---- The fourteen operations ---------------------------------------------------------------------


def apply_op(image: Image.Image, op: str, value: float) -> Image.Image:
    """image: RGB, any size -> the same size. Operations without a parameter ignore the value.

    Geometric operations take the nearest pixel and fill with black. A positive angle turns counter-clockwise,
    a positive translation moves the picture left or up, a shear reads x + value * y (or y + value * x).
    """
    return _APPLY[op](image, value)


def _lookup(image, table):
    """table: (256,) or (3, 256) uint8, one row a channel."""
    pixels = np.asarray(image)
    if table.ndim == 2:
        pixels = pixels + np.array([0, 256, 512])
    return Image.fromarray(table.reshape(-1).take(pixels))


def _affine(image, a, b, c, d, e, f):
    """Output (x, y) reads the input at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def _autocontrast(image, _):
    tables = np.tile(np.arange(256.0), (3, 1))
    for table, (lo, hi) in zip(tables, image.getextrema(), strict=True):
        if hi > lo:
            scale = 255.0 / (hi - lo)
            table[:] = table * scale + -lo * scale
    return _lookup(image, tables.clip(0, 255).astype(np.uint8))


def _equalize(image, _):
    histogram = np.array(image.histogram()).reshape(3, 256)
    tables = np.tile(np.arange(256), (3, 1))
    for table, counts in zip(tables, histogram, strict=True):
        levels = counts[counts > 0]
        step = (levels.sum() - levels[-1]) // 255
        if len(levels) > 1 and step > 0:
            table[:] = np.minimum((step // 2 + counts.cumsum() - counts) // step, 255)
    return _lookup(image, tables.astype(np.uint8))


def _contrast(image, factor):
    luma = np.asarray(image.convert("L"))
    gray = int(luma.sum(dtype=np.int64) / luma.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (gray, gray, gray)), image, factor)


def _posterize(image, bits):
    return _lookup(image, np.arange(256, dtype=np.uint8) & np.uint8(256 - (1 << (8 - int(bits)))))


def _solarize(image, threshold):
    levels = np.arange(256)
    return _lookup(image, np.where(levels < threshold, levels, 255 - levels).astype(np.uint8))


_APPLY = {
    "AutoContrast": _autocontrast,
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": _contrast,
    "Equalize": _equalize,
    "Identity": lambda image, _: image,
    "Posterize": _posterize,
    "Rotate": lambda image, degrees: image.rotate(degrees),
    "Sharpness": lambda image, factor: Image.blend(image.filter(ImageFilter.SMOOTH), image, factor),
    "ShearX": lambda image, shear: _affine(image, 1, shear, 0, 0, 1, 0),
    "ShearY": lambda image, shear: _affine(image, 1, 0, 0, shear, 1, 0),
    "Solarize": _solarize,
    "TranslateX": lambda image, pixels: _affine(image, 1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda image, pixels: _affine(image, 1, 0, 0, 0, 1, pixels),
}
