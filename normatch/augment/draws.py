"""Random words -> the parameters of views: flips, crops, operations and cutout boxes.

A view depends on (seed, visit, sample, view) alone, never on its batch, the worker that makes it or the order of the
batches. `sample` is the image's index in the training set and `visit` counts how often the image was drawn before: the
number of the sampler's pass, as each pass shows every image once. (The step number would not do: where the labeled
set is smaller than a batch, one step shows an image several times.)

All decisions are made in `draw_parameters`, in integer and plain float32 arithmetic that every backend repeats bit for
bit.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from normatch.augment.policy import GEOMETRIC, OPS, Policy, op_values
from normatch.data.philox import random_words


class View(IntEnum):
    """The view of an image that words are drawn for; part of the counter, so never renumber."""

    LABELED_WEAK = 0
    UNLABELED_WEAK = 1
    UNLABELED_STRONG = 2


@dataclass(frozen=True)
class Parameters:
    """Everything random about N views. For weak views the last four are empty (n = 0 operations, no box).

    A box includes both its ends and lies inside the image; it is empty if x1 < x0.
    """

    flip: np.ndarray  # (N,) bool
    row: np.ndarray  # (N,) int32: the crop's first row in the padded image
    col: np.ndarray  # (N,) int32
    op: np.ndarray  # (N, n) int32, into OPS
    applied: np.ndarray  # (N, n) bool
    value: np.ndarray  # (N, n) float32: degrees, shear, pixels, bits, threshold or blend factor, sign included
    box: np.ndarray  # (N, 4) int32: x0, y0, x1, y1 of the cutout


def draw_parameters(
    policy: Policy, seed: int, visit, samples, view, height: int, width: int, strong: bool, flip: bool = True
) -> Parameters:
    """visit, view: int or (N,), samples: (N,) -> Parameters of N views of height x width images.

    The words of a view, by position, where below(w, n) = (w * n) >> 32, unit(w) = (w >> 8) * 2^-24 and
    coin(w) = w >> 31. Float32 throughout, each operation rounded separately (no fused multiply-add):

        0           flip      coin (and `flip`, off for images that change meaning when mirrored, and the policy's flip)
        1, 2        row, col  below(2 * pad + 1), pad = size // 8
        3           -
        4           cutout    side = (unit * cutout_fraction) * width, unless it is fixed
        5, 6        cutout    center x, y = unit * size, or downwards: size + unit * (1 - size)
        7           -
        8 + 4i      op i      ops[below(len(ops))]
        9 + 4i      value     table[op, below(levels - 1)], or lo + unit * (hi - lo)
        10 + 4i     applied   unit < probability
        11 + 4i     sign      coin: negate (geometric operations under `random_sign`)
    """
    n = policy.num_ops if strong else 0
    words = random_words(seed, visit, samples, view, 8 + 4 * n if strong else 4)
    count = len(words)
    per_op = words[:, 8:].reshape(count, n, 4)
    pool = np.array([OPS.index(name) for name in policy.ops], np.int32)
    op = pool[_below(per_op[..., 0], len(pool))]
    table = op_values(policy, height, width)
    if policy.levels:
        value = table[op, _below(per_op[..., 1], policy.levels - 1)]
    else:
        lo, hi = table[op, 0], table[op, 1]
        value = lo + _unit(per_op[..., 1]) * (hi - lo)
    if policy.random_sign:
        value = np.where(_coin(per_op[..., 3]) & np.isin(OPS, GEOMETRIC)[op], -value, value)
    box = np.tile(np.array([0, 0, -1, -1], np.int32), (count, 1))
    if strong:
        side = (_unit(words[:, 4]) * np.float32(policy.cutout_fraction)) * np.float32(width)
        if policy.cutout_pixels:
            side = np.full(count, policy.cutout_pixels, np.float32)
        center = []
        for word, size in ((words[:, 5], np.float32(width)), (words[:, 6], np.float32(height))):
            center.append(size + _unit(word) * (1 - size) if policy.cutout_downwards else _unit(word) * size)
        box = cutout_box(*center, side, height, width)
    applied = _unit(per_op[..., 2]) < np.float32(policy.probability)
    row, col = (_below(words[:, 1 + i], 2 * (size // 8) + 1) for i, size in enumerate((height, width)))
    return Parameters(_coin(words[:, 0]) & (flip and policy.flip), row, col, op, applied, value, box)


def cutout_box(cx, cy, side, height: int, width: int):
    """cx, cy, side: (N,) float32 -> (N, 4) int32 x0, y0, x1, y1, ends included; empty where side is 0.

    The published code shifts the box at the left and top edges and cuts it at the others, truncates as here, and
    includes both ends, so that a box of 16 pixels is 17 wide.
    """
    ends = []
    for center, size in ((cx, width), (cy, height)):
        first = np.trunc(np.maximum(center - side * np.float32(0.5), 0))
        last = np.trunc(np.minimum(first + side, size))
        ends.append((first, np.where(side > 0, np.minimum(last, size - 1), -1)))
    (x0, x1), (y0, y1) = ends
    return np.stack([x0, y0, x1, y1], axis=-1).astype(np.int32)


def _below(words, n: int):
    """uint32 words -> integers in [0, n): the high half of the 64-bit product words * n."""
    return ((words.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)).astype(np.int32)


def _unit(words):
    """uint32 words -> float32 in [0, 1): the top 24 bits times 2^-24, exactly."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _coin(words):
    """uint32 words -> bool, the top bit."""
    return (words >> np.uint32(31)).astype(bool)
