"""The terms that losses share: metrics, ramps, distribution alignment, thresholds, and pairs of views."""

import torch
from torch.nn import functional as F

from . import distributed


def average(values: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """values, where: any shape -> (2,) fp32, the sum of the values and their number, where `where` is true.

    Metrics are such pairs, which stay on the device until the trainer reads them.
    """
    values = values.detach().float()
    where = torch.ones_like(values) if where is None else where.float()
    return torch.stack(((values * where).sum(), where.sum()))


def ramp(step, length: int, staircase: bool = False):
    """step: 0-based, int or () tensor -> the factor in [0, 1] of a loss that rises linearly over `length` steps.

    The published NorMatch code knows only epochs of 1,024 steps: `staircase` keeps the factor constant within each, so
    that the flow losses are off for the whole of the first.
    """
    if length <= 0:
        return 1.0
    if staircase:
        step = step // 1024 * 1024
    progress = step / length
    return progress.clamp(max=1.0) if isinstance(progress, torch.Tensor) else min(progress, 1.0)


def align(q, queue):
    """q: (N_u, K), queue: (W, K) batch means, oldest first -> aligned q (N_u, K), the queue with this batch's mean.

    Distribution alignment towards the uniform marginal (ReMixMatch, Berthelot et al. 2020): q_k is divided by the mean
    of class k over the last W batches, this one included, and renormalized. The sum serves as the mean, whose factor
    cancels; rows not yet filled are zero. A class whose share underflows in all W batches is held at the smallest
    normal number.
    """
    queue = torch.cat((queue[1:], distributed.mean(q.mean(0, keepdim=True)).to(queue.dtype)))
    q = q / queue.sum(0).clamp_min(torch.finfo(queue.dtype).tiny)
    return q / q.sum(1, keepdim=True), queue


def consistency(logits_weak, logits_strong, T, p_cutoff, hard_label, mask_temperature=1.0):
    """logits_weak, logits_strong: (N_u, K) -> L_u (), mask (N_u,), confidence (N_u,), pseudo-labels (N_u,).

    L_u = 1/N_u sum_i 1[max_k p_ik >= p_cutoff] H(target_i, softmax(logits_strong_i)), FixMatch eq. 4, the mean over all
    rows. The target is argmax_k p_ik, or with soft labels softmax(logits_weak / T), eq. 5.
    p = softmax(logits_weak / mask_temperature), which is 1 in the paper; kekmodel's published code puts T there.
    """
    logits_weak = logits_weak.detach()
    confidence, pseudo_label = (logits_weak / mask_temperature).softmax(1).max(1)
    mask = (confidence >= p_cutoff).to(logits_strong.dtype)
    target = pseudo_label if hard_label else (logits_weak / T).softmax(1)
    loss_u = (F.cross_entropy(logits_strong, target, reduction="none") * mask).mean()
    return loss_u, mask, confidence, pseudo_label


def two_views(images, b: int, u: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """images: (B + U, ...) or (B + 2U, ...) -> samples to learn from (B + U, ...), other views of the last U of them.

    Of two views, the second, which is the stronger one where the policy makes a difference, is learned from. Where
    there is only one, as of tables, the other is the same row. Both get Gaussian noise of deviation `noise`, drawn
    independently.
    """
    views, second = images[: b + u], images[b : b + u]
    if u and len(images) == b + 2 * u:
        views = torch.cat((images[:b], images[b + u :]))
    if noise:
        views, second = (rows + noise * torch.randn_like(rows) for rows in (views, second))
    return views, second
