"""normatch::affine_coupling and its inverse: the changed half of an affine coupling layer."""

import torch
from torch import Tensor

from .. import reference
from ..reference import accumulation_dtype
from ._library import KERNELS, check_float, check_no_tangent, check_same, check_shape, register


def _couple(op: str, name: str, x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor):
    """Checks the arguments and applies op, `affine_coupling` or its inverse; name: what it calls x."""
    check_float(op, name, x, ("N", "H"))
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for argument, value in (("s_raw", s_raw), ("t", t)):
        check_float(op, argument, value)
        check_shape(op, argument, value, x.shape, name)
        check_same(op, argument, value, name, x, dtype=not autocast)
    check_float(op, "gain", gain)
    check_shape(op, "gain", gain, x.shape[1:], name)
    check_same(op, "gain", gain, name, x)
    check_no_tangent(op, x, s_raw, t, gain)
    s_raw, t = s_raw.to(x.dtype), t.to(x.dtype)
    if x.device.type not in KERNELS[op]:
        return getattr(reference, op)(x, s_raw, t, gain)
    return getattr(torch.ops.normatch, op).default(x, s_raw, t, gain.to(accumulation_dtype(x.dtype)))


def affine_coupling(x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """x, s_raw, t: (N, H), gain: (H,) -> y: (N, H), logdet: (N,).

    The changed half of an affine coupling layer (RealNVP: Dinh, Sohl-Dickstein and Bengio, ICLR 2017, eqs. 4-6) as
    NorMatch has it: translation comes first, and a tanh with a gain per feature bounds the scale:

        s = gain * tanh(s_raw),   y = (x + t) * exp(s),   logdet_n = sum_h s_nh

    y has the dtype of x. gain may have any float dtype and is cast to that of logdet. Under autocast, so may s_raw and
    t, which are cast to that of x. Rows may be strided (half of a wider matrix); they are not copied.
    """
    return _couple("affine_coupling", "x", x, s_raw, t, gain)


def affine_coupling_inverse(y: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    """y, s_raw, t: (N, H), gain: (H,) -> x: (N, H).

    The inverse of `affine_coupling`: x = y * exp(-gain * tanh(s_raw)) - t.
    """
    return _couple("affine_coupling_inverse", "y", y, s_raw, t, gain)


def _fake(x, s_raw, t, gain):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _save(ctx, inputs, output):
    """For both directions: dy/ds = y, so neither x nor t is needed."""
    first, s_raw, _, gain = inputs
    y = output[0] if isinstance(output, tuple) else first
    ctx.save_for_backward(y, s_raw, gain)


def _backward(ctx, *grads):
    op = torch.ops.normatch.affine_coupling_backward
    grad_x, grad_s_raw, grad_gain = op.default(*grads, *ctx.saved_tensors)
    return grad_x, grad_s_raw, grad_x, grad_gain  # y depends on x + t


def _inverse_backward(ctx, grad_x):
    op = torch.ops.normatch.affine_coupling_inverse_backward
    grad_y, grad_s_raw, grad_gain = op.default(grad_x, *ctx.saved_tensors)
    return grad_y, grad_s_raw, -grad_x, grad_gain


def _backward_fake(*inputs):
    *_, y, _, gain = inputs
    return y.new_empty(y.shape), y.new_empty(y.shape), gain.new_empty(gain.shape)


register("affine_coupling", _fake, _backward, _save)
register("affine_coupling_backward", _backward_fake)
register("affine_coupling_inverse", lambda y, *rest: y.new_empty(y.shape), _inverse_backward, _save)
register("affine_coupling_inverse_backward", _backward_fake)
