"""normatch::coupling2d and its inverse: affine coupling layers of image flows."""

import torch
from torch import Tensor

from .. import reference
from ..reference import accumulation_dtype
from ._library import KERNELS, check_float, check_no_tangent, check_number, check_same, check_shape, register

# The part that changes: the first or the last P channels, or the pixels (i, j) with i + j even or odd.
_CHANGED = ("first", "second", "even", "odd")


def _couple(op: str, name: str, x, params, gain, changed: str, shift_first: bool, eps: float):
    """Checks the arguments and applies op, `coupling2d` or its inverse; name: what it calls x."""
    check_float(op, name, x, ("N", "C", "H", "W"))
    check_float(op, "params", params, ("N", "2P", "H", "W"))
    check_same(op, "params", params, name, x)
    if changed not in _CHANGED:
        raise ValueError(f"{op}: changed must be one of {', '.join(_CHANGED)}, not {changed!r}")
    n, c, h, w = x.shape
    channels = params.shape[1]
    if changed in ("even", "odd") or channels % 2 or channels > 2 * c:
        channels = 2 * c if changed in ("even", "odd") else 2 * (c // 2)
    check_shape(op, "params", params, (n, channels, h, w), f"{name} and changed={changed!r}")
    if gain is not None:
        check_float(op, "gain", gain)
        check_shape(op, "gain", gain, (channels // 2,), "params")
        check_same(op, "gain", gain, name, x)
    check_number(op, "eps", eps)
    if not eps >= 0 or (eps and gain is not None):
        raise ValueError(f"{op}: eps must be 0 with a gain, and not negative without one, but is {eps}")
    check_no_tangent(op, x, params, gain)
    if x.device.type not in KERNELS[op]:
        return getattr(reference, op)(x, params, gain, changed, shift_first, eps)
    if gain is not None:
        gain = gain.to(accumulation_dtype(x.dtype))
    channels_last = x.stride(1) == 1 and x.stride(3) != 1
    options = _CHANGED.index(changed), bool(shift_first), float(eps), channels_last
    return getattr(torch.ops.normatch, op).default(x, params.to(x.dtype), gain, *options)


def coupling2d(
    x: Tensor,
    params: Tensor,
    gain: Tensor | None = None,
    *,
    changed: str = "first",
    shift_first: bool = True,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x: (N, C, H, W), params: (N, 2P, H, W), gain: (P,) or None -> y: (N, C, H, W), logdet: (N,).

    An affine coupling layer of an image flow (RealNVP: Dinh, Sohl-Dickstein and Bengio, ICLR 2017, section 3.4). x is
    the whole image, `params` the output of the layer's network: s_raw in the first P channels, t in the last P.
    `changed` names the part of x that is transformed; the rest is copied to y:

        "first", "second"    the first or the last P channels (P follows from params, commonly C / 2)
        "even", "odd"        the pixels (i, j) with i + j even or odd, in all channels (P = C)

    A tanh with a gain per channel bounds the scale (FlowGMM: Izmailov et al., ICML 2020) or, without a gain, a sigmoid
    (Glow: Kingma and Dhariwal, NeurIPS 2018; SCNF: Atanov et al., 2019):

        log scale = gain * tanh(s_raw)    or    log(sigmoid(s_raw + 2) + eps)
        y = (x + t) * scale,    with shift_first=False    y = x * scale + t
        logdet_n = sum of the log scale over the changed part

    FlowGMM's layers have a gain; SCNF's channel coupling has eps=1e-6, its masked coupling shift_first=False.
    y has the dtype and the memory format (contiguous or channels-last) of x. params (whose network may run under
    autocast) and gain may have any float dtype; params is cast to that of x, gain to that of logdet. x may be a slice
    of channels or samples; params is copied only if its memory format differs from that of x.

    Raises ValueError also for an unknown `changed`, and for both eps and a gain.
    """
    return _couple("coupling2d", "x", x, params, gain, changed, shift_first, eps)


def coupling2d_inverse(
    y: Tensor,
    params: Tensor,
    gain: Tensor | None = None,
    *,
    changed: str = "first",
    shift_first: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """y: (N, C, H, W), params: (N, 2P, H, W), gain: (P,) or None -> x: (N, C, H, W).

    The inverse of `coupling2d`: x = y / scale - t, or (y - t) / scale with shift_first=False.
    """
    return _couple("coupling2d_inverse", "y", y, params, gain, changed, shift_first, eps)


def _new_images(like: Tensor, channels: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _fake(x, params, gain, changed, shift_first, eps, channels_last):
    return _inverse_fake(x, channels_last), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _inverse_fake(y, *options):
    return _new_images(y, y.shape[1], options[-1])


# Gradients of both directions.


def _save(ctx, inputs, output):
    first, params, gain, *ctx.options = inputs
    x, y = (first, output[0]) if isinstance(output, tuple) else (output, first)
    _, shift_first, _, _ = ctx.options
    ctx.save_for_backward(y if shift_first else x, params, gain)  # the side that is multiplied by the scale


def _backward(ctx, *grads):
    ops = torch.ops.normatch
    op = ops.coupling2d_backward if len(grads) == 2 else ops.coupling2d_inverse_backward
    grad_first, grad_params, grad_gain = op.default(*grads, *ctx.saved_tensors, *ctx.options)
    return grad_first, grad_params, grad_gain if ctx.saved_tensors[2] is not None else None, None, None, None, None


def _backward_fake(*inputs):
    *_, saved, params, gain, _, _, _, channels_last = inputs
    grad_gain = saved.new_empty((0 if gain is None else len(gain),), dtype=accumulation_dtype(saved.dtype))
    images = (_new_images(saved, channels, channels_last) for channels in (saved.shape[1], params.shape[1]))
    return *images, grad_gain


register("coupling2d", _fake, _backward, _save)
register("coupling2d_backward", _backward_fake)
register("coupling2d_inverse", _inverse_fake, _backward, _save)
register("coupling2d_inverse_backward", _backward_fake)
