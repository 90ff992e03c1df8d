"""Several processes, one run: what they exchange. Without torchrun, every function here does nothing.

The rule: `batch_size` is that of all processes together and the number of steps does not change with theirs. Of each
global batch process r of n works on images r, r + n, ...; gradients, alignment statistics and metrics are averaged, so
that all processes hold the same weights at every step.
"""

import atexit
import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UserError


def launched() -> bool:
    """Whether torchrun started this process, be it the only one. Schedulers set some of these variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def start(name: str) -> torch.device:
    """The device `name` (auto, cpu, cuda, cuda:N) of this process; joins the others if torchrun started it.

    NCCL between GPUs, gloo between CPUs. Raises `UserError` where the device is not there.
    """
    ranks, local = (int(os.environ.get(k, d)) if launched() else d for k, d in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks > 1:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
        atexit.register(_leave)
    return device


def _leave():
    """Leave the group: a communication thread still alive at the end of the interpreter would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """tensor: any shape -> itself, replaced by its sum over the processes. No gradient."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """tensor: any shape -> its mean over the processes. No gradient."""
    return sum_(tensor.detach().clone()) / ranks() if dist.is_initialized() else tensor


def average_(gradients: list[torch.Tensor], parts: int = 1):
    """Average in place gradients that are sums over `parts` micro-batches, over these and the processes."""
    if not dist.is_initialized():
        if parts > 1:
            torch._foreach_div_(gradients, parts)
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks() * parts
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


def share(tensors: Iterable[torch.Tensor]):
    """Broadcast the floating-point tensors of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            if tensor.is_floating_point():
                value = tensor.detach().contiguous()
                dist.broadcast(value, 0)
                tensor.detach().copy_(value)


def gather(value) -> list:
    """Every process's value, anything that pickles, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """Make every BatchNorm2d in `module` take its statistics over the images of all processes; returns the module.

    Raises `UserError` for one of a kind of its own, as timm's networks have.
    """
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced.to(child.weight))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"sync_bn is for BatchNorm2d alone, and the backbone has {type(child).__name__}: leave it out"
            )
        else:
            synchronize_batch_norm(child)
    return module


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """x: (N, C, H, W) -> (N, C, H, W): BatchNorm2d over the images of all processes, equally many in each.

    PyTorch's own SyncBatchNorm is for GPUs alone.
    """

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        center = _Mean.apply(wide.mean((0, 2, 3)))
        centered = wide - center[:, None, None]
        variance = _Mean.apply(centered.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = ranks() * x.numel() / x.shape[1]
            self.running_mean.lerp_(center, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Mean(torch.autograd.Function):
    """The mean over the processes; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx, x):
        return mean(x)

    @staticmethod
    def backward(ctx, gradient):
        return mean(gradient.contiguous())
