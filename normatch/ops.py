"""Fused ops of a normalizing-flow head: affine coupling, log-determinant, Gaussian-mixture log-likelihood.

Each op is a kernel in `csrc/<op>.cpp` (and `.cu`), registered with PyTorch as `normatch::<op>`, with its fake kernel
and its gradient here beside the public function. The public functions check their arguments, so that an error names
the argument before any kernel runs; all of them are differentiable once (by autograd; forward mode and the transforms
of `torch.func` need `normatch.reference`), trace under `torch.compile(fullgraph=True)`, and write to none of their
arguments. Where no kernel is built (no extension, another device), `normatch.reference` does the same in plain PyTorch.

float32, bfloat16, float16 and float64 (which is there for gradient checks). Sums are made in float32, and
log-determinants and log-likelihoods are returned in it, in nats; for float64 all in float64.
"""

import importlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from normatch import reference
from normatch.augment import MAX_SIDE, Policy, encode_policy, normalization
from normatch.reference import accumulation_dtype

__all__ = [
    "affine_coupling",
    "affine_coupling_inverse",
    "augment_views",
    "backend",
    "coupling2d",
    "coupling2d_inverse",
    "flow_head",
    "flow_head_path",
    "gmm_log_prob",
    "gmm_posterior",
    "logdet",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MODULES = {"default": "normatch._C", "emulated": "normatch._C_emulated"}


def _load() -> tuple[str, str, dict]:
    """Imports the extension NORMATCH_LIB names, which registers the ops: (backend, reason, build info)."""
    choice = os.environ.get("NORMATCH_LIB", "default")
    if choice == "none":
        return "reference", "NORMATCH_LIB=none", {}
    if choice not in _MODULES:
        raise ImportError(f"NORMATCH_LIB is {choice!r}, but may be default, emulated or none")
    try:
        module = importlib.import_module(_MODULES[choice])
    except ImportError as error:
        if choice == "emulated":
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == _MODULES[choice]
        reason = "the compiled extension is not installed" if missing else f"the extension does not load: {error}"
        warnings.warn(f"normatch runs on plain PyTorch: {reason}", RuntimeWarning, stacklevel=2)
        return "reference", reason, {}
    return ("compiled" if choice == "default" else choice), f"from {module.__file__}", module.build_info()


_NAME, _REASON, _BUILD_INFO = _load()


def backend() -> tuple[str, str]:
    """(name, reason): where the ops come from, "compiled", "emulated" or "reference", and why."""
    return _NAME, _REASON


def build_info() -> dict:
    """What the extension was built with; empty without one."""
    return dict(_BUILD_INFO)


def _is_built(op: str) -> bool:
    return bool(_BUILD_INFO) and hasattr(torch.ops.normatch, op)  # an extension may be older than this file


def _devices_of(op: str) -> frozenset[str]:
    if not _is_built(op):
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(device for device, key in (("cpu", "CPU"), ("cuda", "CUDA")) if has_kernel(f"normatch::{op}", key))


_KERNELS = {
    op: _devices_of(op)
    for op in (
        "affine_coupling",
        "affine_coupling_inverse",
        "coupling2d",
        "coupling2d_inverse",
        "logdet",
        "gmm_log_prob",
        "gmm_posterior",
        "flow_head",
        "augment_views",
    )
}


def kernels() -> dict[str, frozenset[str]]:
    """op -> the device types it has a kernel for."""
    return dict(_KERNELS)


def _register(op: str, fake: Callable, backward: Callable | None = None, save: Callable | None = None) -> None:
    """Gives normatch::<op> its fake kernel and, for a differentiable op, its gradient."""
    if not _is_built(op):
        return
    torch.library.register_fake(f"normatch::{op}", fake)
    torch.library.register_autograd(f"normatch::{op}", backward or _no_second_derivative(op), setup_context=save)


def _no_second_derivative(op: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"normatch::{op} cannot be differentiated: the ops have first derivatives only; "
            "normatch.reference has all of them"
        )

    return backward


# ---- argument checks ----------------------------------------------------------------------------------------------


def _check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, not {value.layout}: take its to_dense()")


def _check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, not {value.dtype}")


def _check_dims(op: str, name: str, value: Tensor, shape: str) -> None:
    if value.dim() != shape.count(",") + (not shape.endswith(",)")):
        raise ValueError(f"{op}: {name} must have shape {shape}, not {tuple(value.shape)}")


def _check_shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], like: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)} to go with {like}, not {tuple(value.shape)}")


def _check_same(op: str, name: str, value: Tensor, first_name: str, first: Tensor, dtype: bool) -> None:
    if value.device != first.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but {first_name} on {first.device}")
    if dtype and value.dtype != first.dtype:
        raise TypeError(f"{op}: {name} is {value.dtype}, but {first_name} {first.dtype}")


def _check_no_tangent(op: str, *values: Tensor | None) -> None:
    """Raises RuntimeError for a forward-mode derivative, which torch.library would drop without a word."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values):
        raise RuntimeError(f"{op}: there is no forward-mode derivative; normatch.reference has one")


def _check_coupling(op: str, name: str, x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> None:
    _check_tensor(op, name, x)
    _check_float(op, name, x)
    _check_dims(op, name, x, "(N, H)")
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    for other, value in (("s_raw", s_raw), ("t", t)):
        _check_tensor(op, other, value)
        _check_float(op, other, value)
        _check_shape(op, other, value, x.shape, name)
        _check_same(op, other, value, name, x, dtype=not autocast)
    _check_tensor(op, "gain", gain)
    _check_float(op, "gain", gain)
    _check_shape(op, "gain", gain, x.shape[1:], name)
    _check_same(op, "gain", gain, name, x, dtype=False)
    _check_no_tangent(op, x, s_raw, t, gain)


def _check_mixture(op: str, name: str, z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float) -> None:
    for other, value in (("means", means), ("rho", rho), ("logits", logits)):
        _check_tensor(op, other, value)
        _check_float(op, other, value)
        _check_same(op, other, value, name, z, dtype=False)
    _check_dims(op, "means", means, "(K, D)")
    if means.shape[0] == 0:
        raise ValueError(f"{op}: means must have at least one class, not shape {tuple(means.shape)}")
    _check_shape(op, "means", means, (means.shape[0], z.shape[1]), name)
    _check_shape(op, "rho", rho, means.shape[:1], "means")
    _check_shape(op, "logits", logits, means.shape[:1], "means")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, not {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, but is {eps}")
    _check_no_tangent(op, z, means, rho, logits)


def _check_points(op: str, z: Tensor) -> None:
    _check_tensor(op, "z", z)
    _check_float(op, "z", z)
    _check_dims(op, "z", z, "(N, D)")
    if z.shape[1] == 0:
        raise ValueError(f"{op}: z must have at least one feature, not shape {tuple(z.shape)}")


def _check_no_nan(op: str, name: str, value: Tensor) -> None:
    """value: (K,). Where looking costs nothing: not on a GPU, which would have to be waited for, nor while tracing."""
    seen = value.device.type == "cpu" and type(value) in (Tensor, Parameter) and not torch.compiler.is_compiling()
    if seen and any(map(math.isnan, value.tolist())):
        raise ValueError(f"{op}: {name} has values that are NaN")


# ---- affine coupling ----------------------------------------------------------------------------------------------


def affine_coupling(x: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """x, s_raw, t: (N, H), gain: (H,) -> y: (N, H), logdet: (N,).

    The changed half of an affine coupling layer (RealNVP: Dinh, Sohl-Dickstein and Bengio, ICLR 2017, eqs. 4-6) in
    the form of NorMatch, which translates first and bounds the scale by a tanh with a gain per feature:

        s = gain * tanh(s_raw),   y = (x + t) * exp(s),   logdet_n = sum_h s_nh

    y has the dtype of x; logdet, in nats, is float32 (float64 for float64). gain may have any float dtype and is
    cast to the dtype of logdet; so may s_raw and t under autocast, where a network's outputs are cast to the dtype of
    x. Rows may be strided (a half of a wider matrix): no copy is made.

    Raises TypeError for an argument that is no float tensor or for s_raw, t of another dtype than x, and ValueError
    for a wrong shape or mixed devices; the message names the argument.
    """
    _check_coupling("affine_coupling", "x", x, s_raw, t, gain)
    s_raw, t = s_raw.to(x.dtype), t.to(x.dtype)
    if x.device.type not in _KERNELS["affine_coupling"]:
        return reference.affine_coupling(x, s_raw, t, gain)
    gain = gain.to(accumulation_dtype(x.dtype))
    return torch.ops.normatch.affine_coupling.default(x, s_raw, t, gain)


def _affine_coupling_fake(x, s_raw, t, gain):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _affine_coupling_save(ctx, inputs, output):
    _, s_raw, _, gain = inputs
    ctx.save_for_backward(output[0], s_raw, gain)  # dy/ds = y: neither x nor t is kept


def _affine_coupling_backward(ctx, grad_y, grad_logdet):
    grad_x, grad_s_raw, grad_gain = torch.ops.normatch.affine_coupling_backward.default(
        grad_y, grad_logdet, *ctx.saved_tensors
    )
    return grad_x, grad_s_raw, grad_x, grad_gain  # x and t enter as their sum


def _affine_coupling_backward_fake(grad_y, grad_logdet, y, s_raw, gain):
    return y.new_empty(y.shape), y.new_empty(y.shape), gain.new_empty(gain.shape)


_register("affine_coupling", _affine_coupling_fake, _affine_coupling_backward, _affine_coupling_save)
_register("affine_coupling_backward", _affine_coupling_backward_fake)


def affine_coupling_inverse(y: Tensor, s_raw: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    """y, s_raw, t: (N, H), gain: (H,) -> x: (N, H).

    What `affine_coupling` maps to y: x = y * exp(-gain * tanh(s_raw)) - t. Arguments and errors as there.
    """
    _check_coupling("affine_coupling_inverse", "y", y, s_raw, t, gain)
    s_raw, t = s_raw.to(y.dtype), t.to(y.dtype)
    if y.device.type not in _KERNELS["affine_coupling_inverse"]:
        return reference.affine_coupling_inverse(y, s_raw, t, gain)
    gain = gain.to(accumulation_dtype(y.dtype))
    return torch.ops.normatch.affine_coupling_inverse.default(y, s_raw, t, gain)


def _affine_coupling_inverse_fake(y, s_raw, t, gain):
    return y.new_empty(y.shape)


def _affine_coupling_inverse_save(ctx, inputs, output):
    y, s_raw, _, gain = inputs
    ctx.save_for_backward(y, s_raw, gain)


def _affine_coupling_inverse_backward(ctx, grad_x):
    grad_y, grad_s_raw, grad_gain = torch.ops.normatch.affine_coupling_inverse_backward.default(
        grad_x, *ctx.saved_tensors
    )
    return grad_y, grad_s_raw, -grad_x, grad_gain


def _affine_coupling_inverse_backward_fake(grad_x, y, s_raw, gain):
    return y.new_empty(y.shape), y.new_empty(y.shape), gain.new_empty(gain.shape)


_register(
    "affine_coupling_inverse",
    _affine_coupling_inverse_fake,
    _affine_coupling_inverse_backward,
    _affine_coupling_inverse_save,
)
_register("affine_coupling_inverse_backward", _affine_coupling_inverse_backward_fake)


# ---- affine coupling of images ------------------------------------------------------------------------------------

# What is changed: the first or the last P channels, or the pixels (i, j) with i + j even or odd.
_CHANGED = ("first", "second", "even", "odd")


def _check_coupling2d(op: str, name: str, x: Tensor, params: Tensor, gain: Tensor | None, changed: str, eps) -> None:
    _check_tensor(op, name, x)
    _check_float(op, name, x)
    _check_dims(op, name, x, "(N, C, H, W)")
    _check_tensor(op, "params", params)
    _check_float(op, "params", params)
    _check_same(op, "params", params, name, x, dtype=False)
    _check_dims(op, "params", params, "(N, 2P, H, W)")
    if changed not in _CHANGED:
        raise ValueError(f"{op}: changed must be one of {', '.join(_CHANGED)}, not {changed!r}")
    n, c, h, w = x.shape
    channels = params.shape[1]
    if changed in ("even", "odd") or channels % 2 or channels > 2 * c:
        channels = 2 * c if changed in ("even", "odd") else 2 * (c // 2)
    _check_shape(op, "params", params, (n, channels, h, w), f"{name} and changed={changed!r}")
    if gain is not None:
        _check_tensor(op, "gain", gain)
        _check_float(op, "gain", gain)
        _check_shape(op, "gain", gain, (channels // 2,), "params")
        _check_same(op, "gain", gain, name, x, dtype=False)
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, not {type(eps).__name__}")
    if not eps >= 0 or (eps and gain is not None):
        raise ValueError(f"{op}: eps must be 0 with a gain, and not negative without one, but is {eps}")
    _check_no_tangent(op, x, params, gain)


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

    An affine coupling layer of an image flow (RealNVP: Dinh, Sohl-Dickstein and Bengio, ICLR 2017, section 3.4), given
    the whole image x and the unsplit output `params` of the layer's network: s_raw in the first P channels, t in the
    last P. `changed` says what of x is transformed; the rest is copied to y:

        "first", "second"    the first or the last P channels (P is that of params, commonly C / 2)
        "even", "odd"        the pixels (i, j) with i + j even or odd, in all channels (P = C)

    The scale is bounded by a tanh with a gain per channel (FlowGMM: Izmailov et al., ICML 2020), or, without a gain,
    by a sigmoid (Glow: Kingma and Dhariwal, NeurIPS 2018; SCNF: Atanov et al., 2019):

        log scale = gain * tanh(s_raw)    or    log(sigmoid(s_raw + 2) + eps)
        y = (x + t) * scale,    with shift_first=False    y = x * scale + t
        logdet_n = sum of the log scale over what is changed

    FlowGMM's layers are those with a gain; SCNF's channel coupling has eps=1e-6, its masked one shift_first=False.
    y has the dtype and the memory format (contiguous or channels-last) of x; logdet, in nats, is float32 (float64 for
    float64). params (whose network may run under autocast) and gain may have any float dtype and are cast, params to
    that of x and gain to that of logdet. x may be a slice of channels or samples; params is copied only where its
    memory format is not that of x.

    Raises TypeError for an argument that is no float tensor, and ValueError for a wrong shape, mixed devices, an
    unknown `changed`, or an eps that is negative or stands beside a gain; the message names the argument.
    """
    op = "coupling2d"
    _check_coupling2d(op, "x", x, params, gain, changed, eps)
    if x.device.type not in _KERNELS[op]:
        return reference.coupling2d(x, params, gain, changed, shift_first, eps)
    if gain is not None:
        gain = gain.to(accumulation_dtype(x.dtype))
    return torch.ops.normatch.coupling2d.default(
        x, params.to(x.dtype), gain, _CHANGED.index(changed), bool(shift_first), float(eps), _is_channels_last(x)
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(3) != 1


def _coupling2d_fake(x, params, gain, changed, shift_first, eps, channels_last):
    return _new_images(x, x.shape[1], channels_last), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _new_images(like: Tensor, channels: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _coupling2d_save(ctx, inputs, output):
    x, params, gain, *ctx.options = inputs
    _, shift_first, _, _ = ctx.options
    ctx.save_for_backward(output[0] if shift_first else x, params, gain)  # the side that the scale is next to


def _coupling2d_backward(ctx, grad_y, grad_logdet):
    grad_x, grad_params, grad_gain = torch.ops.normatch.coupling2d_backward.default(
        grad_y, grad_logdet, *ctx.saved_tensors, *ctx.options
    )
    return grad_x, grad_params, grad_gain if ctx.saved_tensors[2] is not None else None, None, None, None, None


def _coupling2d_backward_fake(grad_y, grad_logdet, saved, *others):
    return _coupling2d_inverse_backward_fake(grad_y, saved, *others)


_register("coupling2d", _coupling2d_fake, _coupling2d_backward, _coupling2d_save)
_register("coupling2d_backward", _coupling2d_backward_fake)


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

    What `coupling2d` maps to y: x = y / scale - t, or (y - t) / scale with shift_first=False. Arguments and errors as
    there.
    """
    op = "coupling2d_inverse"
    _check_coupling2d(op, "y", y, params, gain, changed, eps)
    if y.device.type not in _KERNELS[op]:
        return reference.coupling2d_inverse(y, params, gain, changed, shift_first, eps)
    if gain is not None:
        gain = gain.to(accumulation_dtype(y.dtype))
    return torch.ops.normatch.coupling2d_inverse.default(
        y, params.to(y.dtype), gain, _CHANGED.index(changed), bool(shift_first), float(eps), _is_channels_last(y)
    )


def _coupling2d_inverse_fake(y, params, gain, changed, shift_first, eps, channels_last):
    return _new_images(y, y.shape[1], channels_last)


def _coupling2d_inverse_save(ctx, inputs, output):
    y, params, gain, *ctx.options = inputs
    _, shift_first, _, _ = ctx.options
    ctx.save_for_backward(y if shift_first else output, params, gain)


def _coupling2d_inverse_backward(ctx, grad_x):
    grad_y, grad_params, grad_gain = torch.ops.normatch.coupling2d_inverse_backward.default(
        grad_x, *ctx.saved_tensors, *ctx.options
    )
    return grad_y, grad_params, grad_gain if ctx.saved_tensors[2] is not None else None, None, None, None, None


def _coupling2d_inverse_backward_fake(grad_x, saved, params, gain, changed, shift_first, eps, channels_last):
    grad_gain = saved.new_empty((0 if gain is None else len(gain),), dtype=accumulation_dtype(saved.dtype))
    images = (_new_images(saved, channels, channels_last) for channels in (saved.shape[1], params.shape[1]))
    return *images, grad_gain


_register("coupling2d_inverse", _coupling2d_inverse_fake, _coupling2d_inverse_backward, _coupling2d_inverse_save)
_register("coupling2d_inverse_backward", _coupling2d_inverse_backward_fake)


# ---- log-determinant ----------------------------------------------------------------------------------------------


def logdet(log_scale: Tensor) -> Tensor:
    """log_scale: (N, ...) -> (N,).

    The log-determinant of an elementwise scaling, logdet_n = sum of log_scale[n] (RealNVP: Dinh, Sohl-Dickstein and
    Bengio, ICLR 2017, eq. 6), in nats, summed and returned in float32 (float64 for float64). Contiguous and
    channels-last tensors, and strided rows of them, are read in place; other layouts are copied first.

    Raises TypeError for an argument that is no float tensor, ValueError for one without dimensions.
    """
    _check_tensor("logdet", "log_scale", log_scale)
    _check_float("logdet", "log_scale", log_scale)
    _check_no_tangent("logdet", log_scale)
    if log_scale.dim() == 0:
        raise ValueError("logdet: log_scale must have shape (N, ...), not ()")
    if log_scale.device.type not in _KERNELS["logdet"]:
        return reference.logdet(log_scale)
    if log_scale.dim() == 4 and log_scale.stride(1) == 1:
        log_scale = log_scale.permute(0, 2, 3, 1)  # a sum may take the values in the order they lie in
    rows = log_scale.unsqueeze(1) if log_scale.dim() == 1 else log_scale.flatten(1)
    return torch.ops.normatch.logdet.default(rows)


def _logdet_fake(log_scale):
    return log_scale.new_empty(log_scale.shape[:1], dtype=accumulation_dtype(log_scale.dtype))


def _logdet_save(ctx, inputs, output):
    (log_scale,) = inputs
    ctx.shape, ctx.dtype = log_scale.shape, log_scale.dtype


def _logdet_backward(ctx, grad):
    # Every element of a row has the row's gradient: a view of N values costs nothing, where a kernel would have to
    # write N x M of them. Whoever needs them dense writes them while doing its own work.
    return grad.to(ctx.dtype).unsqueeze(1).expand(ctx.shape)


_register("logdet", _logdet_fake, _logdet_backward, _logdet_save)


# ---- Gaussian mixture ---------------------------------------------------------------------------------------------


def gmm_log_prob(z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float = 0.0) -> Tensor:
    """z: (N, D), means: (K, D), rho, logits: (K,) -> (N, K).

    The class log-probabilities of a mixture of isotropic Gaussians, the prior of FlowGMM (Izmailov et al., ICML 2020,
    eq. 2) and NorMatch:

        out_nk = log(softmax(logits)_k + eps) + log N(z_n; means_k, sigma_k^2 I),   sigma_k = softplus(rho_k)

    in nats, float32 (float64 for float64 z). Its logsumexp over k is the log-likelihood, its softmax the posterior.
    means, rho and logits may have any float dtype and are cast to that of the result. NorMatch's code adds
    eps = 1e-6. Distances are sums of (z - mu)^2, never the expanded square, and any rho gives a finite sigma.

    Raises TypeError for an argument that is no float tensor (or an eps that is no number), and ValueError for a wrong
    shape, K = 0, D = 0, mixed devices, a negative eps or a rho that is NaN; the message names the argument. (On a GPU
    and under `torch.compile` the values of rho are not looked at: a NaN there makes the results NaN.)
    """
    op = "gmm_log_prob"
    _check_points(op, z)
    _check_mixture(op, "z", z, means, rho, logits, eps)
    _check_no_nan(op, "rho", rho)
    if z.device.type not in _KERNELS[op]:
        return reference.gmm_log_prob(z, means, rho, logits, eps)
    dtype = accumulation_dtype(z.dtype)
    return torch.ops.normatch.gmm_log_prob.default(z, means.to(dtype), rho.to(dtype), logits.to(dtype), float(eps))


def _gmm_log_prob_fake(z, means, rho, logits, eps):
    return means.new_empty((z.shape[0], means.shape[0]))


def _gmm_log_prob_save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gmm_log_prob_backward(ctx, grad):
    return *torch.ops.normatch.gmm_log_prob_backward.default(grad, *ctx.saved_tensors, ctx.eps), None


def _gmm_log_prob_backward_fake(grad, z, means, rho, logits, eps):
    return z.new_empty(z.shape), means.new_empty(means.shape), rho.new_empty(rho.shape), rho.new_empty(rho.shape)


_register("gmm_log_prob", _gmm_log_prob_fake, _gmm_log_prob_backward, _gmm_log_prob_save)
_register("gmm_log_prob_backward", _gmm_log_prob_backward_fake)


class GmmPosterior(NamedTuple):
    """What a mixture says of points (N, D); in nats, float32 (float64 for float64 points)."""

    class_log_prob: Tensor  # (N, K) log pi_k + log N(z; mu_k, sigma_k^2 I)
    log_prob: Tensor  # (N,) its logsumexp over k
    label: Tensor  # (N,) int64, the most probable class, the first among equals
    confidence: Tensor  # (N,) its posterior probability


def gmm_posterior(z: Tensor, means: Tensor, rho: Tensor, logits: Tensor, eps: float = 0.0) -> GmmPosterior:
    """z: (N, D), means: (K, D), rho, logits: (K,) -> class_log_prob: (N, K), log_prob, label, confidence: (N,).

    `gmm_log_prob` and, in the same pass, what pseudo-labelling asks of it: the log-likelihood of each point, its most
    probable class and that class's posterior probability (FixMatch: Sohn et al., NeurIPS 2020, section 2). Arguments
    and errors as there. All outputs but the label are differentiable.
    """
    op = "gmm_posterior"
    _check_points(op, z)
    _check_mixture(op, "z", z, means, rho, logits, eps)
    _check_no_nan(op, "rho", rho)
    if z.device.type not in _KERNELS[op]:
        return GmmPosterior(*reference.gmm_posterior(z, means, rho, logits, eps))
    dtype = accumulation_dtype(z.dtype)
    return GmmPosterior(
        *torch.ops.normatch.gmm_posterior.default(z, means.to(dtype), rho.to(dtype), logits.to(dtype), float(eps))
    )


def _gmm_posterior_fake(z, means, rho, logits, eps):
    n = z.shape[0]
    rows = means.new_empty((n,))
    return means.new_empty((n, means.shape[0])), rows, z.new_empty((n,), dtype=torch.int64), rows.clone()


def _gmm_posterior_save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # which outputs were used decides what is computed


def _gmm_posterior_backward(ctx, grad_class, grad_log_prob, _, grad_confidence):
    *inputs, class_log_prob, log_prob, label, confidence = ctx.saved_tensors
    # log_prob's gradient is the posterior p, that of confidence c = p_label is c (onehot - p).
    shared = grad_log_prob
    if grad_confidence is not None:
        pull = grad_confidence * confidence
        shared = -pull if shared is None else shared - pull
    grad = grad_class
    if shared is not None:
        through = (class_log_prob - log_prob.unsqueeze(1)).exp() * shared.unsqueeze(1)
        if grad_confidence is not None:
            through = through.scatter_add(1, label.unsqueeze(1), pull.unsqueeze(1))
        grad = through if grad is None else grad + through
    if grad is None:
        return (None,) * 5
    return *torch.ops.normatch.gmm_log_prob_backward.default(grad, *inputs, ctx.eps), None


_register("gmm_posterior", _gmm_posterior_fake, _gmm_posterior_backward, _gmm_posterior_save)


# ---- flow head ----------------------------------------------------------------------------------------------------


class _FusedLimits(NamedTuple):
    """Up to where one kernel for the whole head is sensible."""

    hidden: int
    features: int
    classes: float = float("inf")
    couplings: float = float("inf")
    parameters: float = float("inf")


_FUSED_LIMITS = {
    "cpu": _FusedLimits(hidden=128, features=4096),
    # classes, couplings: what shared memory and a kernel's arguments hold (csrc/flow_head.cu). parameters: each of 32
    # blocks, at the least, adds up gradients for itself, in 64 MB together.
    "cuda": _FusedLimits(hidden=128, features=4096, classes=2048, couplings=64, parameters=2**19),
}


def flow_head_path(
    features: int, hidden: int, device: str | torch.device = "cpu", classes: int = 1, couplings: int = 1
) -> str:
    """How `flow_head` computes a head of this size: "fused", by one kernel, or "composed", by several.

    Fused where a kernel is built for the device and the networks are narrow (hidden <= 128, features <= 4096), so that
    a tile of rows keeps its state in the cache and matrix products are too small for a library's to be faster. On a
    GPU also classes <= 2048, couplings <= 64, and 2^19 parameters at most, of couplings and means together. Composed
    of library matrix products and the ops above elsewhere.
    """
    device = torch.device(device).type
    if device not in _KERNELS["flow_head"]:
        return "composed"
    limits = _FUSED_LIMITS["cuda" if _NAME == "emulated" else device]
    half, other = features // 2, features - features // 2
    weights = [
        hidden * (kept + hidden + 2 * changed + 2) + 3 * changed for kept, changed in ((half, other), (other, half))
    ]
    parameters = classes * features + (couplings + 1) // 2 * weights[0] + couplings // 2 * weights[1]
    found = (hidden, features, classes, couplings, parameters)
    return "fused" if all(value <= limit for value, limit in zip(found, limits, strict=True)) else "composed"


def flow_head(
    x: Tensor,
    couplings: Sequence[Sequence[Tensor]],
    means: Tensor,
    rho: Tensor,
    logits: Tensor,
    eps: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: (N, D), means: (K, D), rho, logits: (K,) -> z: (N, D), logdet: (N,), class_log_prob: (N, K), log_prob: (N,).

    A whole flow classifier, as in NorMatch (Deng et al. 2024): affine couplings (`affine_coupling`) with the networks
    that drive them, then the mixture of `gmm_log_prob`; log_prob = logsumexp_k class_log_prob + logdet. Coupling j
    keeps the first half of the features, [0, D // 2), for even j and the second one for odd j, and changes the other:

        h = dropout(relu(kept @ weight0.T + bias0)),   s_raw, t = relu(h @ weight1.T + bias1) @ weight2.T + bias2

    couplings: for each one weight0 (H, kept), bias0 (H,), weight1 (H, H), bias1 (H,), weight2 (2 changed, H),
    bias2 (2 changed,) and gain (changed,), with the same H for all. All results are float32 (float64 for float64 x),
    and so is the arithmetic, autocast or not; parameters may have any float dtype and are cast to it.
    dropout applies if a seed is given, () int64 on the device of x: the units dropped follow from its value alone, on
    every device, and it is read when the kernel runs, so that a CUDA graph draws anew if its seed does.
    The gradient rebuilds each coupling's input from its output: what is kept for it does not grow with their number.

    Raises TypeError for an argument that is no tensor or of a wrong dtype, and ValueError for a wrong shape, no
    coupling, D < 2, K = 0, mixed devices, a rho that is NaN (where that can be seen, as in `gmm_log_prob`), a negative
    eps or a dropout outside [0, 1]; the message names the argument.
    """
    _check_flow_head(x, couplings, means, rho, logits, eps, dropout, seed)
    if seed is None or dropout == 0:
        seed, dropout = None, 0.0
    sizes = x.shape[1], couplings[0][1].shape[0], x.device, means.shape[0], len(couplings)
    if flow_head_path(*sizes) == "composed":
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return reference.compose_flow_head(
                affine_coupling, gmm_log_prob, x, couplings, means, rho, logits, eps, dropout, seed
            )
    dtype = accumulation_dtype(x.dtype)
    parameters = [value if value.dtype == dtype else value.to(dtype) for coupling in couplings for value in coupling]
    rest = means.to(dtype), rho.to(dtype), logits.to(dtype), seed, float(dropout), float(eps)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FlowHead.apply(x, *rest, *parameters)[:4]
    return torch.ops.normatch.flow_head.default(x, parameters, *rest)[:4]


class _FlowHead(torch.autograd.Function):
    """The gradient that the op has anyhow, without torch.library's walks through lists of tensors: 0.1 ms a step."""

    @staticmethod
    def forward(x, means, rho, logits, seed, dropout, eps, *parameters):
        return torch.ops.normatch.flow_head.default(x, parameters, means, rho, logits, seed, dropout, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *rest = inputs
        _flow_head_save(ctx, (x, rest[6:], *rest[:6]), output)

    @staticmethod
    def backward(ctx, *grads):
        grad_x, grad_parameters, *rest = _flow_head_backward(ctx, *grads)
        return grad_x, *rest, *grad_parameters


_COUPLING_NAMES = ("weight0", "bias0", "weight1", "bias1", "weight2", "bias2", "gain")


def _check_flow_head(x, couplings, means, rho, logits, eps, dropout, seed) -> None:
    op = "flow_head"
    _check_tensor(op, "x", x)
    _check_float(op, "x", x)
    _check_dims(op, "x", x, "(N, D)")
    features = x.shape[1]
    if features < 2:
        raise ValueError(f"{op}: x must have at least two features, one for each half, not shape {tuple(x.shape)}")
    if not hasattr(couplings, "__len__"):
        raise TypeError(f"{op}: couplings must be a list of couplings, not {type(couplings).__name__}")
    if not len(couplings):
        raise ValueError(f"{op}: couplings must hold at least one coupling")
    device, hidden = x.device, None
    for j, coupling in enumerate(couplings):
        if not hasattr(coupling, "__len__"):
            raise TypeError(f"{op}: couplings[{j}] must be a list of tensors, not {type(coupling).__name__}")
        if len(coupling) != len(_COUPLING_NAMES):
            raise ValueError(f"{op}: couplings[{j}] must be {', '.join(_COUPLING_NAMES)}, not {len(coupling)} tensors")
        for name, value in zip(_COUPLING_NAMES, coupling, strict=True):
            if not isinstance(value, Tensor) or value.dtype not in _DTYPES or value.device != device:
                name = f"{name} of couplings[{j}]"
                _check_tensor(op, name, value)
                _check_float(op, name, value)
                _check_same(op, name, value, "x", x, dtype=False)
        if hidden is None:
            _check_dims(op, "bias0 of couplings[0]", coupling[1], "(H,)")
            hidden = coupling[1].shape[0]
            if hidden == 0:
                raise ValueError(f"{op}: bias0 of couplings[0] must have at least one unit")
        kept = features - features // 2 if j % 2 else features // 2
        changed = features - kept
        shapes = (
            (hidden, kept),
            (hidden,),
            (hidden, hidden),
            (hidden,),
            (2 * changed, hidden),
            (2 * changed,),
            (changed,),
        )
        for name, value, shape in zip(_COUPLING_NAMES, coupling, shapes, strict=True):
            if value.shape != shape:
                _check_shape(op, f"{name} of couplings[{j}]", value, shape, "x and bias0 of couplings[0]")
    _check_mixture(op, "x", x, means, rho, logits, eps)
    _check_no_nan(op, "rho", rho)
    if not isinstance(dropout, (int, float)):
        raise TypeError(f"{op}: dropout must be a number, not {type(dropout).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{op}: dropout must lie in [0, 1], but is {dropout}")
    if seed is not None:
        _check_tensor(op, "seed", seed)
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be torch.int64, not {seed.dtype}")
        if seed.dim():
            raise ValueError(f"{op}: seed must have shape (), not {tuple(seed.shape)}")
        _check_same(op, "seed", seed, "x", x, dtype=False)


def _flow_head_fake(x, couplings, means, rho, logits, seed, dropout, eps):
    n = x.shape[0]
    return (
        means.new_empty((n, x.shape[1])),
        means.new_empty((n,)),
        means.new_empty((n, means.shape[0])),
        means.new_empty((n,)),
        means.new_empty((n, x.shape[1]), dtype=torch.float64),
    )


def _flow_head_save(ctx, inputs, output):
    x, couplings, means, rho, logits, seed, ctx.dropout, ctx.eps = inputs
    ctx.dtype, ctx.couplings = x.dtype, len(couplings)
    ctx.set_materialize_grads(False)  # results that nobody used cost nothing
    # The last output is z in double, from which the couplings' inputs can be rebuilt to the bit (csrc/flow_head.cpp).
    _, _, class_log_prob, _, state = output
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(state, class_log_prob, *couplings, means, rho, logits, seed)


def _flow_head_backward(ctx, *grads):
    state, class_log_prob, *couplings, means, rho, logits, seed = ctx.saved_tensors
    grad_x, grad_couplings, *grad_mixture = torch.ops.normatch.flow_head_backward.default(
        *grads[:4], state, class_log_prob, couplings, means, rho, logits, seed, ctx.dropout, ctx.eps, ctx.dtype
    )
    return grad_x, grad_couplings, *grad_mixture, None, None, None


def _flow_head_backward_fake(
    grad_z, grad_logdet, grad_class_log_prob, grad_log_prob, state, class_log_prob, couplings, means, rho, logits, seed,
    dropout, eps, dtype,
):  # fmt: skip
    return (
        state.new_empty(state.shape, dtype=dtype),
        [value.new_empty(value.shape) for value in couplings],
        *(value.new_empty(value.shape) for value in (means, rho, logits)),
    )


_register("flow_head", _flow_head_fake, _flow_head_backward, _flow_head_save)
_register("flow_head_backward", _flow_head_backward_fake)


# ---- augmented views ----------------------------------------------------------------------------------------------


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

    Augmented views in one pass: gather, flip, crop, operations, cutout, normalisation to (v / 255 - mean) / std. A row
    of draws is (row, sample, visit, view): the place in `images`, and the counter from which, with `seed`, all that is
    random about the view follows (`normatch.augment`). A view of kind View.UNLABELED_STRONG is strong, others are
    weak. The pixels are those that Pillow makes, on every device; dtype uint8 returns them unnormalised.

    Raises TypeError or ValueError, naming the argument, for what is not as above, for sides of 0 or above 2048, and,
    on the CPU, for a row that `images` has not.
    """
    op = "augment_views"
    for name, value, want, shape in (
        ("images", images, torch.uint8, "(M, H, W, 3)"),
        ("draws", draws, torch.int64, "(N, 4)"),
    ):
        _check_tensor(op, name, value)
        if value.dtype != want:
            raise TypeError(f"{op}: {name} must be {want}, not {value.dtype}")
        if value.dim() != shape.count(",") + 1 or value.shape[-1] != int(shape[-2]):
            raise ValueError(f"{op}: {name} must have shape {shape}, not {tuple(value.shape)}")
    if not isinstance(policy, Policy):
        raise TypeError(f"{op}: policy must be a Policy, as in normatch.augment.POLICIES, not {policy!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or uint8, not {dtype}")
    _check_same(op, "draws", draws, "images", images, dtype=False)
    count, height, width, _ = images.shape
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"{op}: images must have sides of 1 to {MAX_SIDE}, not {height} x {width}")
    if draws.device.type == "cpu" and len(draws):
        rows = draws[:, 0]
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            raise ValueError(f"{op}: draws names rows {int(rows.min())} to {int(rows.max())}, but images has {count}")
    if images.device.type not in _KERNELS[op]:
        return reference.augment_views(images, draws, policy, seed, mean, std, dtype, flip)
    rules, values = encode_policy(policy, height, width, bool(flip))
    scale, shift = (v.tolist() for v in normalization(mean, std))
    seed = (seed + 2**63) % 2**64 - 2**63  # its 64 bits, as a signed number
    views = torch.ops.normatch.augment_views.default(
        images.contiguous(), draws.contiguous(), seed, rules, values, scale, shift, dtype
    )
    return views.permute(0, 3, 1, 2)


def _augment_views_fake(images, draws, seed, rules, values, scale, shift, dtype):
    return images.new_empty((draws.shape[0], *images.shape[1:]), dtype=dtype)


if _BUILD_INFO:  # no gradient: neither images nor counters have one
    torch.library.register_fake("normatch::augment_views", _augment_views_fake)
