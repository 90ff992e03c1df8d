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
