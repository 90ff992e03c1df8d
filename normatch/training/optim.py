"""Optimizers as functions of tensors, learning-rate schedules, and averages of weights."""

import copy
import math
from typing import ClassVar

import torch
from torch import nn
from torch.optim.adam import adam
from torch.optim.adamax import adamax
from torch.optim.sgd import sgd

from ..errors import UserError


class Optimizer:
    """Parameter groups, each with its own rule, rate, decay and clip, in `torch.optim`'s functional forms.

    groups: {"params", "optimizer": sgd, adam, adamw or adamax, "lr"}, and optionally "weight_decay" (0), "momentum" of
    sgd (Nesterov's, 0.9), "clip", the largest norm of the group's gradients (0: no clipping), "keep_gradients":
    gradients add up over the whole run, and "average": False, for parameters that are copied into the average.

    `torch.optim`'s classes take gradients from `.grad` and rates from Python numbers. Here both are tensors, so that a
    step can stand in the same compiled graph as the forward and backward pass. `trained`: the parameters in turn.
    """

    MEMORY: ClassVar = {  # rule -> what it remembers of each parameter
        "sgd": ("momentum_buffer",),
        "adam": ("exp_avg", "exp_avg_sq"),
        "adamw": ("exp_avg", "exp_avg_sq"),
        "adamax": ("exp_avg", "exp_inf"),
    }

    def __init__(self, groups: list[dict]):
        defaults = {"weight_decay": 0.0, "momentum": 0.9, "clip": 0.0, "keep_gradients": False}
        groups = [{**defaults, **group, "params": list(group["params"])} for group in groups]
        self.groups = [group for group in groups if group["params"]]
        for group in self.groups:
            if group.get("optimizer") not in self.MEMORY or "lr" not in group:
                raise UserError(f"a parameter group needs lr, and as optimizer one of {', '.join(self.MEMORY)}")
        self.trained = [p for group in self.groups for p in group["params"]]
        self.state, self.rates = [], []
        for group in self.groups:
            params = group["params"]
            names = [] if group["optimizer"] == "sgd" and not group["momentum"] else [*self.MEMORY[group["optimizer"]]]
            names += ["gradient_sum"] if group["keep_gradients"] else []
            state = {name: [torch.zeros_like(p, requires_grad=False) for p in params] for name in names}
            if group["optimizer"] != "sgd":
                state["step"] = [torch.zeros((), device=p.device) for p in params]
            self.state.append(state)
            # As exact as the Python number that it stands for; on a GPU the fused kernels read a float32.
            dtype = torch.float64 if params[0].device.type == "cpu" else torch.float32
            # (1,), not (): torch.compile takes a float64 scalar on the CPU for a Python number, and traces twice.
            self.rates.append(torch.tensor([group["lr"]], dtype=dtype, device=params[0].device))

    def set_lr(self, factor: float):
        """Set every group's rate to its own, times `factor`."""
        for group, rate in zip(self.groups, self.rates, strict=True):
            rate.fill_(group["lr"] * factor)

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor | None]):
        """Move the parameters by one gradient for each of `trained`; a parameter with None stays as it is."""
        first = 0
        for group, state, rate in zip(self.groups, self.state, self.rates, strict=True):
            part = gradients[first : first + len(group["params"])]
            first += len(group["params"])
            used = [i for i, gradient in enumerate(part) if gradient is not None]
            if used:
                memory = {name: [values[i] for i in used] for name, values in state.items()}
                self._update(group, [group["params"][i] for i in used], [part[i] for i in used], memory, rate)

    def _update(self, group, params, gradients, memory, rate):
        # The fused kernels take gradients to be laid out as their parameters, which autograd does not promise.
        gradients = [
            g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(params, gradients, strict=True)
        ]
        if group["clip"]:
            gradients = clipped(gradients, group["clip"])
        if group["keep_gradients"]:
            torch._foreach_add_(memory["gradient_sum"], gradients)
            gradients = memory["gradient_sum"]
        compiling = torch.compiler.is_compiling()
        on_gpu = params[0].device.type == "cuda"
        # Compiled, Inductor fuses the list form itself; `capturable` keeps the count of steps a tensor.
        forms = {"foreach": compiling, "fused": not compiling}
        decay, steps = group["weight_decay"], memory.get("step", [])
        exact = compiling and params[0].dtype == torch.float64
        if exact:  # a graph computes 1 - beta^step in the dtype of step
            steps = [step.double() for step in steps]
        if group["optimizer"] == "sgd":
            sgd(
                params, gradients, memory.get("momentum_buffer", []), lr=rate, weight_decay=decay,
                momentum=group["momentum"], nesterov=group["momentum"] > 0, dampening=0.0, maximize=False, **forms,
            )  # fmt: skip
        elif group["optimizer"] == "adamax":  # which has no fused form
            adamax(
                params, gradients, memory["exp_avg"], memory["exp_inf"], steps, foreach=True,
                capturable=compiling or on_gpu, lr=rate if compiling or on_gpu else rate.item(), weight_decay=decay,
                beta1=0.9, beta2=0.999, eps=1e-8,
            )  # fmt: skip
        else:
            adam(
                params, gradients, memory["exp_avg"], memory["exp_avg_sq"], [], steps, lr=rate,
                weight_decay=decay, decoupled_weight_decay=group["optimizer"] == "adamw", amsgrad=False, beta1=0.9,
                beta2=0.999, eps=1e-8, maximize=False, capturable=compiling, **forms,
            )  # fmt: skip
        if exact and steps:
            torch._foreach_add_(memory["step"], 1)

    def state_dict(self) -> list[dict]:
        """Of each group what its rule remembers: name -> a tensor for each parameter."""
        return self.state

    def load_state_dict(self, state: list[dict]):
        """Raises ValueError for the state of other groups."""
        if [entry.keys() for entry in state] != [entry.keys() for entry in self.state]:
            raise ValueError("the optimizer's state is of other parameter groups")
        for saved, current in zip(state, self.state, strict=True):
            for name, values in current.items():
                for value, source in zip(values, saved[name], strict=True):
                    value.copy_(source)


@torch.no_grad()
def clipped(gradients: list[torch.Tensor], limit: float) -> list[torch.Tensor]:
    """The gradients, scaled down where their common L2 norm exceeds `limit`."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return list(torch._foreach_mul(gradients, (limit / (norm + 1e-6)).clamp(max=1.0)))


# The learning rate's factor as a function of the share of the steps that are done.
SCHEDULES = {
    "cosine-7-16": lambda p: max(0.0, math.cos(7 / 16 * math.pi * p)),  # FixMatch, section 2.3; ends at 0.195
    "constant": lambda p: 1.0,
    "steps": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.8 else 0.01,  # FlowGMM's toys
    "cosine": lambda p: max(0.5 * (1 + math.cos(math.pi * p)), 1e-3),  # FlowGMM's tables
    "wilson": lambda p: 1.0 if p < 0.5 else max(0.01, 1 - 0.99 * (p - 0.5) / 0.4),  # FlowGMM's images
    "linear": lambda p: 1 - p,  # SCNF
}


def lr_factor(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """The factor of the learning rate at `step` (0-based) of `total`, after `warmup` steps of linear rise from 0."""
    if step < warmup:
        return step / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))


class EMA:
    """A copy of `module` whose parameters follow it: e <- decay e + (1 - decay) p after every step.

    Buffers (BatchNorm statistics among them) are copied, and so are the parameters in `copied`. The copy is a module of
    its own, in evaluation mode, and is never swapped with the one in training, so that a compiled step cannot miss the
    change.
    """

    def __init__(self, module: nn.Module, decay: float, copied=()):
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        without = {id(p) for p in copied}
        names = [name for name, p in module.named_parameters() if id(p) in without]
        copies, originals = dict(self.module.named_parameters()), dict(module.named_parameters())
        self._averaged = [(copies[name], p) for name, p in originals.items() if name not in names]
        self._copied = [(copies[name], originals[name]) for name in names]
        self._copied += zip(self.module.buffers(), module.buffers(), strict=True)

    @torch.no_grad()
    def update(self):
        averaged, current = ([pair[i] for pair in self._averaged] for i in (0, 1))
        torch._foreach_mul_(averaged, self.decay)
        torch._foreach_add_(averaged, current, alpha=1 - self.decay)
        for floating in (True, False):  # of one dtype each, which a GPU copies at once
            pairs = [pair for pair in self._copied if pair[0].is_floating_point() == floating]
            if pairs:
                torch._foreach_copy_([copied for copied, _ in pairs], [source for _, source in pairs])

    def resume(self, step: int):
        """Go on as after `step` updates; the caller loads the averaged weights."""


class SWA:
    """Stochastic weight averaging (Izmailov et al. 2018) by `torch.optim.swa_utils`: the mean of every `every`-th step.

    It begins with the weights after step `start`, up to which `module` is a copy. BatchNorm statistics are averaged
    like weights.
    """

    def __init__(self, module: nn.Module, start: int, every: int):
        self.start, self.every, self.step, self.source = start, every, 0, module
        self.averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True).eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        return self.averaged.module

    def update(self):
        self.step += 1
        if self.step <= self.start:
            self.averaged.n_averaged.zero_()  # so that this is a copy
        if self.step <= self.start or (self.step - self.start) % self.every == 0:
            self.averaged.update_parameters(self.source)

    def resume(self, step: int):
        """Go on as after `step` updates; the caller loads the averaged weights."""
        self.step = step
        self.averaged.n_averaged.fill_(1 + max(0, (step - self.start) // self.every))
