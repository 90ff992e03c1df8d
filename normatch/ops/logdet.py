"""normatch::logdet: the log-determinant of an elementwise scaling."""

import torch
from torch import Tensor

from .. import reference
from ..reference import accumulation_dtype
from ._library import KERNELS, check_float, check_no_tangent, register


def logdet(log_scale: Tensor) -> Tensor:
    """log_scale: (N, ...) -> (N,).

    The log-determinant of an elementwise scaling, logdet_n = sum of log_scale[n] (RealNVP: Dinh, Sohl-Dickstein and
    Bengio, ICLR 2017, eq. 6), in nats, summed and returned in float32 (float64 for float64). Contiguous and
    channels-last tensors, and strided rows of them, are read in place; other layouts are copied first.
    """
    check_float("logdet", "log_scale", log_scale)
    check_no_tangent("logdet", log_scale)
    if log_scale.dim() == 0:
        raise ValueError("logdet: log_scale must have shape (N, ...), not ()")
    if log_scale.device.type not in KERNELS["logdet"]:
        return reference.logdet(log_scale)
    if log_scale.dim() == 4 and log_scale.stride(1) == 1:
        log_scale = log_scale.permute(0, 2, 3, 1)  # sum in memory order
    rows = log_scale.unsqueeze(1) if log_scale.dim() == 1 else log_scale.flatten(1)
    return torch.ops.normatch.logdet.default(rows)


def _fake(log_scale):
    return log_scale.new_empty(log_scale.shape[:1], dtype=accumulation_dtype(log_scale.dtype))


def _save(ctx, inputs, output):
    (log_scale,) = inputs
    ctx.shape, ctx.dtype = log_scale.shape, log_scale.dtype


def _backward(ctx, grad):
    # All elements of a row have the row's gradient. An expanded view of N values is free, where a kernel would write
    # N x M of them; operations that need them dense write them as part of their own work.
    return grad.to(ctx.dtype).unsqueeze(1).expand(ctx.shape)


register("logdet", _fake, _backward, _save)
