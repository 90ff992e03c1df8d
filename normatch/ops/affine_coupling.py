"""normatch::affine_coupling and its inverse: the changed half of an affine coupling layer."""

import torch
from torch import Tensor

from normatch import reference
from normatch.ops._library import KERNELS, check_dims, check_float, check_no_tangent, check_same, check_shape, register
from normatch.reference import accumulation_dtype


def _check(op: str, name: str, x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> None:
    check_float(op, name, x)
    check_dims(op, name, x, ("N", "H"))
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for argument, value in (("s_raw", s_raw), ("t", t)):
        check_float(op, argument, value)
        check_shape(op, argument, value, x.shape, name)
        check_same(op, argument, value, name, x, dtype=not autocast)
    check_float(op, "gain", gain)
    check_shape(op, "gain", gain, x.shape[1:], name)
    check_same(op, "gain", gain, name, x, dtype=False)
    check_no_tangent(op, x, s_raw, t, gain)


def affine_coupling(x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """x, s_raw, t: (N, H), gain: (H,) -> y: (N, H), logdet: (N,).

    The changed half of an affine coupling layer (RealNVP: Dinh, Sohl-Dickstein and Bengio, ICLR 2017, eqs. 4-6) as
    NorMatch has it: translation comes first, and a tanh with a gain per feature bounds the scale:

        s = gain * tanh(s_raw),   y = (x + t) * exp(s),   logdet_n = sum_h s_nh

    y has the dtype of x; logdet, in nats, is float32 (float64 for float64). gain may have any float dtype and is cast
    to the dtype of logdet. Under autocast, so may s_raw and t, which are cast to the dtype of x. Rows may be strided
    (half of a wider matrix); they are not copied.

    Raises TypeError for an argument that is not a float tensor or for s_raw or t of another dtype than x, and
    ValueError for a wrong shape or mixed devices; the message names the argument.
    """
    _check("affine_coupling", "x", x, s_raw, t, gain)
    s_raw, t = s_raw.to(x.dtype), t.to(x.dtype)
    if x.device.type not in KERNELS["affine_coupling"]:
        return reference.affine_coupling(x, s_raw, t, gain)
    gain = gain.to(accumulation_dtype(x.dtype))
    return torch.ops.normatch.affine_coupling.default(x, s_raw, t, gain)


def _fake(x, s_raw, t, gain):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _save(ctx, inputs, output):
    _, s_raw, _, gain = inputs
    ctx.save_for_backward(output[0], s_raw, gain)  # dy/ds = y: neither x nor t is needed


def _backward(ctx, grad_y, grad_logdet):
    grad_x, grad_s_raw, grad_gain = torch.ops.normatch.affine_coupling_backward.default(
        grad_y, grad_logdet, *ctx.saved_tensors
    )
    return grad_x, grad_s_raw, grad_x, grad_gain  # y depends on x + t


def _backward_fake(grad_y, grad_logdet, y, s_raw, gain):
    return y.new_empty(y.shape), y.new_empty(y.shape), gain.new_empty(gain.shape)


register("affine_coupling", _fake, _backward, _save)
register("affine_coupling_backward", _backward_fake)


def affine_coupling_inverse(y: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    """y, s_raw, t: (N, H), gain: (H,) -> x: (N, H).

    The inverse of `affine_coupling`: x = y * exp(-gain * tanh(s_raw)) - t, with the same arguments and errors.
    """
    _check("affine_coupling_inverse", "y", y, s_raw, t, gain)
    s_raw, t = s_raw.to(y.dtype), t.to(y.dtype)
    if y.device.type not in KERNELS["affine_coupling_inverse"]:
        return reference.affine_coupling_inverse(y, s_raw, t, gain)
    gain = gain.to(accumulation_dtype(y.dtype))
    return torch.ops.normatch.affine_coupling_inverse.default(y, s_raw, t, gain)


def _inverse_fake(y, s_raw, t, gain):
    return y.new_empty(y.shape)


def _inverse_save(ctx, inputs, output):
    y, s_raw, _, gain = inputs
    ctx.save_for_backward(y, s_raw, gain)


def _inverse_backward(ctx, grad_x):
    grad_y, grad_s_raw, grad_gain = torch.ops.normatch.affine_coupling_inverse_backward.default(
        grad_x, *ctx.saved_tensors
    )
    return grad_y, grad_s_raw, -grad_x, grad_gain


def _inverse_backward_fake(grad_x, y, s_raw, gain):
    return y.new_empty(y.shape), y.new_empty(y.shape), gain.new_empty(gain.shape)


register("affine_coupling_inverse", _inverse_fake, _inverse_backward, _inverse_save)
register("affine_coupling_inverse_backward", _inverse_backward_fake)
