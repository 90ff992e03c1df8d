"""normatch::coupling2d and its inverse: affine coupling layers of image flows."""

import torch
from torch import Tensor

from normatch import reference
from normatch.ops._library import (
    KERNELS,
    check_dims,
    check_eps,
    check_float,
    check_no_tangent,
    check_same,
    check_shape,
    register,
)
from normatch.reference import accumulation_dtype

# The part that changes: the first or the last P channels, or the pixels (i, j) with i + j even or odd.
_CHANGED = ("first", "second", "even", "odd")


def _check(op: str, name: str, x: Tensor, params: Tensor, gain: Tensor | None, changed: str, eps: float) -> None:
    check_float(op, name, x)
    check_dims(op, name, x, ("N", "C", "H", "W"))
    check_float(op, "params", params)
    check_same(op, "params", params, name, x, dtype=False)
    check_dims(op, "params", params, ("N", "2P", "H", "W"))
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
        check_same(op, "gain", gain, name, x, dtype=False)
    check_eps(op, eps)
    if not eps >= 0 or (eps and gain is not None):
        raise ValueError(f"{op}: eps must be 0 with a gain, and not negative without one, but is {eps}")
    check_no_tangent(op, x, params, gain)


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
    y has the dtype and the memory format (contiguous or channels-last) of x; logdet, in nats, is float32 (float64 for
    float64). params (whose network may run under autocast) and gain may have any float dtype; params is cast to the
    dtype of x, gain to that of logdet. x may be a slice of channels or samples; params is copied only if its memory
    format differs from that of x.

    Raises TypeError for an argument that is not a float tensor, and ValueError for a wrong shape, mixed devices, an
    unknown `changed`, a negative eps, or both eps and a gain; the message names the argument.
    """
    op = "coupling2d"
    _check(op, "x", x, params, gain, changed, eps)
    if x.device.type not in KERNELS[op]:
        return reference.coupling2d(x, params, gain, changed, shift_first, eps)
    if gain is not None:
        gain = gain.to(accumulation_dtype(x.dtype))
    return torch.ops.normatch.coupling2d.default(
        x, params.to(x.dtype), gain, _CHANGED.index(changed), bool(shift_first), float(eps), _is_channels_last(x)
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(3) != 1


def _fake(x, params, gain, changed, shift_first, eps, channels_last):
    return _new_images(x, x.shape[1], channels_last), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _new_images(like: Tensor, channels: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _save(ctx, inputs, output):
    x, params, gain, *ctx.options = inputs
    _, shift_first, _, _ = ctx.options
    ctx.save_for_backward(output[0] if shift_first else x, params, gain)  # the side that is multiplied by the scale


def _backward(ctx, grad_y, grad_logdet):
    grad_x, grad_params, grad_gain = torch.ops.normatch.coupling2d_backward.default(
        grad_y, grad_logdet, *ctx.saved_tensors, *ctx.options
    )
    return grad_x, grad_params, grad_gain if ctx.saved_tensors[2] is not None else None, None, None, None, None


def _backward_fake(grad_y, grad_logdet, saved, *rest):
    return _inverse_backward_fake(grad_y, saved, *rest)


register("coupling2d", _fake, _backward, _save)
register("coupling2d_backward", _backward_fake)


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

    The inverse of `coupling2d`: x = y / scale - t, or (y - t) / scale with shift_first=False, with the same arguments
    and errors.
    """
    op = "coupling2d_inverse"
    _check(op, "y", y, params, gain, changed, eps)
    if y.device.type not in KERNELS[op]:
        return reference.coupling2d_inverse(y, params, gain, changed, shift_first, eps)
    if gain is not None:
        gain = gain.to(accumulation_dtype(y.dtype))
    return torch.ops.normatch.coupling2d_inverse.default(
        y, params.to(y.dtype), gain, _CHANGED.index(changed), bool(shift_first), float(eps), _is_channels_last(y)
    )


def _inverse_fake(y, params, gain, changed, shift_first, eps, channels_last):
    return _new_images(y, y.shape[1], channels_last)


def _inverse_save(ctx, inputs, output):
    y, params, gain, *ctx.options = inputs
    _, shift_first, _, _ = ctx.options
    ctx.save_for_backward(y if shift_first else output, params, gain)


def _inverse_backward(ctx, grad_x):
    grad_y, grad_params, grad_gain = torch.ops.normatch.coupling2d_inverse_backward.default(
        grad_x, *ctx.saved_tensors, *ctx.options
    )
    return grad_y, grad_params, grad_gain if ctx.saved_tensors[2] is not None else None, None, None, None, None


def _inverse_backward_fake(grad_x, saved, params, gain, changed, shift_first, eps, channels_last):
    grad_gain = saved.new_empty((0 if gain is None else len(gain),), dtype=accumulation_dtype(saved.dtype))
    images = (_new_images(saved, channels, channels_last) for channels in (saved.shape[1], params.shape[1]))
    return *images, grad_gain


register("coupling2d_inverse", _inverse_fake, _inverse_backward, _inverse_save)
register("coupling2d_inverse_backward", _inverse_backward_fake)
