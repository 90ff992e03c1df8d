"""`normatch info`: what is installed, where the ops come from and why, and what this machine can do."""

import importlib.metadata
import os
import platform
import sys

import torch

from normatch import __version__, ops
from normatch.augment import dali


def info() -> str:
    """A plain-text table, one fact per line. Never raises: a fact that cannot be determined says so in its line."""
    width = max(map(len, _FACTS))
    return "\n".join(f"{label:<{width}}  {_guarded(find)}" for label, find in _FACTS.items())


def _guarded(find) -> str:
    try:
        return find()
    except Exception as error:  # a report must come out whatever is broken
        return f"unknown ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torchvision() -> str:
    version = _version("torchvision")
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        return (
            version
            if version == "not installed"
            else f"{version}, but it cannot be imported: {str(error).splitlines()[0]}"
        )
    return version


def _kernels() -> str:
    kernels = ops.kernels().items()
    names = {device: ", ".join(op for op, devices in kernels if device in devices) for device in ("cpu", "cuda")}
    return "; ".join(f"{device.upper()}: {of_device or 'none'}" for device, of_device in names.items())


def _build() -> str:
    build = ops.build_info()
    if not build:
        return "no compiled extension"
    text = f"{build['compiler']}, PyTorch {build['built_with_torch']} (runs with {build['torch_target']} or later)"
    if build["emulated"]:
        text += f", CUDA kernels emulated on the CPU, thread order {build['thread_order']}"
    return text


def _cuda_architectures() -> str:
    build = ops.build_info()
    if not build.get("cuda"):
        return "none (built without nvcc)" if build else "none"
    return f"{build['cuda_architectures']} (nvcc {build['cuda']})"


def _gpu() -> str:
    if not torch.backends.cuda.is_built():
        return f"none (PyTorch {torch.__version__} has no CUDA)"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    listed = "; ".join(f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices)
    return listed or "none found"


def _dali() -> str:
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith("nvidia-dali-cuda"):
            return f"{distribution.version} ({name})"
    return f"not installed ({dali.INSTALL}); without it the native op makes the views"


def _cpu() -> str:
    used = ops.build_info().get("cpu_capability")
    ours = f"; the ops use {used}" if used else ""
    return f"{platform.machine()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}{ours}"


_FACTS = {
    "normatch": lambda: __version__,
    "Python": lambda: f"{platform.python_version()} ({sys.executable})",
    "PyTorch": lambda: torch.__version__,
    "torchvision": _torchvision,
    "ops": lambda: "{} ({})".format(*ops.backend()),
    "kernels": _kernels,
    "build": _build,
    "CUDA architectures": _cuda_architectures,
    "GPU": _gpu,
    "DALI": _dali,
    "CPU": _cpu,
    "threads": lambda: f"{torch.get_num_threads()} of {os.cpu_count()} logical processors",
}
