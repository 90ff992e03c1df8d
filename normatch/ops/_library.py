"""What the ops share: the extension, the registration of fake kernels and gradients, and argument checks."""

import importlib
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MODULES = {"default": "normatch._C", "emulated": "normatch._C_emulated"}
_OPS = (
    "affine_coupling", "affine_coupling_inverse", "coupling2d", "coupling2d_inverse", "logdet", "gmm_log_prob",
    "gmm_posterior", "flow_head", "augment_views",
)  # fmt: skip


def _load() -> tuple[str, str, dict]:
    """Imports the extension that NORMATCH_LIB selects, which registers the ops -> (backend, reason, build info)."""
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


BACKEND, _REASON, _BUILD_INFO = _load()


def backend() -> tuple[str, str]:
    """-> (name, reason): which implementation the ops use ("compiled", "emulated" or "reference"), and why."""
    return BACKEND, _REASON


def build_info() -> dict:
    """-> the extension's build settings; empty without an extension."""
    return dict(_BUILD_INFO)


def is_built(op: str) -> bool:
    return bool(_BUILD_INFO) and hasattr(torch.ops.normatch, op)  # the extension may be older than this file


def _has_kernel(op: str, device: str) -> bool:
    return is_built(op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"normatch::{op}", device.upper())


KERNELS = {op: frozenset(device for device in ("cpu", "cuda") if _has_kernel(op, device)) for op in _OPS}


def kernels() -> dict[str, frozenset[str]]:
    """-> the device types that each op has a kernel for."""
    return dict(KERNELS)


def register(op: str, fake: Callable, backward: Callable | None = None, save: Callable | None = None) -> None:
    """Gives normatch::<op> its fake kernel and, if differentiable, its gradient."""
    if not is_built(op):
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


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, not {value.layout}: take its to_dense()")


def check_float(op: str, name: str, value: object, axes: tuple[str, ...] = ()) -> None:
    """axes: their names, if their number is fixed."""
    check_tensor(op, name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, not {value.dtype}")
    if axes:
        check_dims(op, name, value, axes)


def check_integers(op: str, name: str, value: object, dtype: torch.dtype, axes: tuple[str | int, ...]) -> None:
    check_tensor(op, name, value)
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, not {value.dtype}")
    check_dims(op, name, value, axes)


def check_dims(op: str, name: str, value: Tensor, axes: tuple[str | int, ...]) -> None:
    """axes: the name of each axis, or its size where that is fixed."""
    fits = value.dim() == len(axes)
    if not fits or any(axis != size for axis, size in zip(axes, value.shape, strict=True) if isinstance(axis, int)):
        shape = ", ".join(map(str, axes)) + ("," if len(axes) == 1 else "")
        raise ValueError(f"{op}: {name} must have shape ({shape}), not {tuple(value.shape)}")


def check_shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], like: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)} to go with {like}, not {tuple(value.shape)}")


def check_same(op: str, name: str, value: Tensor, first_name: str, first: Tensor, dtype: bool = False) -> None:
    """Raises if `value` is on another device than `first` or, with `dtype`, of another dtype."""
    if value.device != first.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but {first_name} on {first.device}")
    if dtype and value.dtype != first.dtype:
        raise TypeError(f"{op}: {name} is {value.dtype}, but {first_name} {first.dtype}")


def check_number(op: str, name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, not {type(value).__name__}")


def check_no_tangent(op: str, *values: Tensor | None) -> None:
    """Raises for a forward-mode derivative, which torch.library would silently drop."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values):
        raise RuntimeError(f"{op}: there is no forward-mode derivative; normatch.reference has one")
