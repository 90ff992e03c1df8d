"""normatch::augment_views: augmented views of uint8 images."""

import torch
from torch import Tensor

from .. import reference
from ..augment.policy import Policy, encode_policy, normalization
from ..data.base import MAX_SIDE
from ._library import KERNELS, check_integers, check_same, is_built


def augment_views(
    images: Tensor,
    draws: Tensor,
    policy: Policy,
    seed: int,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    flip: bool = True,
) -> Tensor:
    """images: (M, H, W, 3) uint8, draws: (N, 4) int64 -> (N, 3, H, W), channels-last.

    Augmented views in one pass: gather, flip, crop, operations, cutout, normalization to (v / 255 - mean) / std. A row
    of draws is (row, sample, visit, view): an index into `images`, and the counter that, with `seed`, determines
    everything random about the view (`normatch.augment.draws`). Views of kind View.UNLABELED_STRONG are strong, all
    others weak. The pixels equal Pillow's on every device; dtype uint8 returns them without normalization.

    Raises ValueError also for sides of 0 or above 2048 and, on the CPU, for rows outside `images`.
    """
    op = "augment_views"
    check_integers(op, "images", images, torch.uint8, ("M", "H", "W", 3))
    check_integers(op, "draws", draws, torch.int64, ("N", 4))
    if not isinstance(policy, Policy):
        raise TypeError(f"{op}: policy must be a Policy, as in normatch.augment.policy.POLICIES, not {policy!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or uint8, not {dtype}")
    check_same(op, "draws", draws, "images", images)
    count, height, width, _ = images.shape
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"{op}: images must have sides of 1 to {MAX_SIDE}, not {height} x {width}")
    if draws.device.type == "cpu" and len(draws):
        rows = draws[:, 0]
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            raise ValueError(f"{op}: draws names rows {int(rows.min())} to {int(rows.max())}, but images has {count}")
    if images.device.type not in KERNELS[op]:
        return reference.augment_views(images, draws, policy, seed, mean, std, dtype, flip)
    rules, values = encode_policy(policy, height, width, bool(flip))
    scale, shift = (v.tolist() for v in normalization(mean, std))
    seed = (seed + 2**63) % 2**64 - 2**63  # its 64 bits, as a signed number
    views = torch.ops.normatch.augment_views.default(
        images.contiguous(), draws.contiguous(), seed, rules, values, scale, shift, dtype
    )
    return views.permute(0, 3, 1, 2)


def _fake(images, draws, seed, rules, values, scale, shift, dtype):
    return images.new_empty((draws.shape[0], *images.shape[1:]), dtype=dtype)


if is_built("augment_views"):  # not differentiable: images and counters are integers
    torch.library.register_fake("normatch::augment_views", _fake)
