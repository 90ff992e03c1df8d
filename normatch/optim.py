"""Optimisation as FixMatch and NorMatch publish it: decay groups, the 7/16 cosine, and the averaged model."""

import copy
import math

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters of `model` as two optimiser groups: matrices and filters decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def cosine_7_16(step: int, total: int, warmup: float = 0) -> float:
    """The factor of the learning rate at `step` (0-based) of `total`: cos(7 pi/16 progress), after a linear warm-up.

    FixMatch (Sohn et al. 2020), section 2.3. It ends at cos(7 pi/16) = 0.195. `warmup` is in steps, and the first of
    them has a factor of 0.
    """
    if step < warmup:
        return step / max(1.0, warmup)
    progress = (step - warmup) / max(1.0, total - warmup)
    return max(0.0, math.cos(7 / 16 * math.pi * progress))


# The learning rate's factor as a function of the share of the steps that are done.
SCHEDULES = {
    "constant": lambda p: 1.0,
    "steps": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.8 else 0.01,  # FlowGMM's toys
    "cosine": lambda p: max(0.5 * (1 + math.cos(math.pi * p)), 1e-3),  # FlowGMM's tables
    "wilson": lambda p: 1.0 if p < 0.5 else max(0.01, 1 - 0.99 * (p - 0.5) / 0.4),  # FlowGMM's images
    "linear": lambda p: 1 - p,  # SCNF
}


class SWA:
    """Stochastic weight averaging (Izmailov et al. 2018) by `torch.optim.swa_utils`: the mean of every `every`-th step.

    It begins with the weights after step `start`; up to there `module` is a copy. BatchNorm statistics are averaged
    like weights.
    """

    def __init__(self, module: nn.Module, start: int, every: int):
        self.start, self.every, self.step = start, every, 0
        self.averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True).eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        return self.averaged.module

    def update(self, module: nn.Module):
        self.step += 1
        if self.step <= self.start:
            self.averaged.n_averaged.zero_()  # so that this is a copy
        if self.step <= self.start or (self.step - self.start) % self.every == 0:
            self.averaged.update_parameters(module)

    def resume(self, step: int):
        """Go on as after `step` updates; the averaged weights themselves are the caller's to load."""
        self.step = step
        self.averaged.n_averaged.fill_(1 + max(0, (step - self.start) // self.every))


class EMA:
    """A copy of `module` whose parameters follow it: e <- decay e + (1 - decay) p after every step.

    Buffers (BatchNorm statistics among them) are copied. The copy is a module of its own, in evaluation mode, and is
    never swapped with the one in training, so that a compiled step cannot miss the change.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module):
        averaged, current = list(self.module.parameters()), list(module.parameters())
        torch._foreach_mul_(averaged, self.decay)
        torch._foreach_add_(averaged, current, alpha=1 - self.decay)
        buffers = list(self.module.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(module.buffers()))
