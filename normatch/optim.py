"""Optimisation as FixMatch and NorMatch publish it: decay groups, the 7/16 cosine, and the averaged model.

The optimisers differ from those of torch.optim in form alone: a step is a function of tensors, the gradients among
them, so that it can stand in the same compiled graph as the forward and backward pass.
"""

import copy
import math

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float, by_name: bool = False) -> list[dict]:
    """The parameters of `model` as two optimiser groups: matrices and filters decay, biases and norms do not.

    by_name: as the published code tells them, by "bias" or "bn" in the name, which misses the norms of a ResNet's
    shortcuts.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decaying = {name for name, p in named if (not ("bias" in name or "bn" in name) if by_name else p.ndim > 1)}
    return [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]


class Optimizer(nn.Module):
    """Groups of parameters, {"params", "weight_decay"}, and what a rule remembers of each, in buffers.

    `lr` is a scalar on the parameters' device, to be set before a step. Gradients come in the order of the groups.
    """

    remembers = ()  # the names of what a rule keeps of each parameter, all zeros at first

    def __init__(self, groups: list[dict], lr: float):
        super().__init__()
        self.param_groups = groups
        self.trained = [p for group in groups for p in group["params"]]
        self.decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        self.register_buffer("lr", self.trained[0].new_full((), lr, requires_grad=False), persistent=False)
        for name in self.remembers:
            for i, p in enumerate(self.trained):
                self.register_buffer(f"{name}_{i}", torch.zeros_like(p, requires_grad=False))

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor | None]):
        """Move the parameters, a gradient for each; one without a gradient stays as it is."""
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        for decay in dict.fromkeys(self.decays):
            own = [i for i in used if self.decays[i] == decay]
            if own:
                memory = [[getattr(self, f"{name}_{i}") for i in own] for name in self.remembers]
                self.rule([self.trained[i] for i in own], [gradients[i] for i in own], decay, *memory)


class SGD(Optimizer):
    """Nesterov momentum (Sutskever et al. 2013): v <- 0.9 v + g', p <- p - lr (g' + 0.9 v), g' = g + decay p."""

    remembers = ("velocity",)
    momentum = 0.9

    def rule(self, parameters, gradients, decay, velocities):
        if decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=decay)
        torch._foreach_mul_(velocities, self.momentum)
        torch._foreach_add_(velocities, gradients)
        moves = torch._foreach_add(gradients, velocities, alpha=self.momentum)
        torch._foreach_mul_(moves, self.lr)
        torch._foreach_sub_(parameters, moves)


class AdamW(Optimizer):
    """Loshchilov & Hutter (2019), with beta = (0.9, 0.999) and eps = 1e-8; the decay multiplies lr."""

    remembers = ("mean", "square")
    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, lr)
        # A whole number: torch.compile forgets what a graph adds to a scalar in float64 on the CPU.
        self.register_buffer("steps", torch.zeros_like(self.lr, dtype=torch.int64))

    def step(self, gradients):
        self.steps.add_(1)
        super().step(gradients)

    def rule(self, parameters, gradients, decay, means, squares):
        steps = self.steps.to(self.lr.dtype)
        torch._foreach_mul_(parameters, 1 - self.lr * decay)
        torch._foreach_lerp_(means, gradients, 1 - self.beta1)
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - self.beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - self.beta2**steps).sqrt())
        torch._foreach_add_(scales, self.eps)
        moves = torch._foreach_div(means, scales)
        torch._foreach_mul_(moves, self.lr / (1 - self.beta1**steps))
        torch._foreach_sub_(parameters, moves)


@torch.no_grad()
def clip(gradients: list[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients in place where their common L2 norm exceeds `limit` (0: never) -> the norm before."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
        pairs = list(zip(self.module.buffers(), module.buffers(), strict=True))
        for floating in (True, False):  # of one dtype each, which a GPU copies at once
            own = [pair for pair in pairs if pair[0].is_floating_point() == floating]
            if own:
                torch._foreach_copy_([copied for copied, _ in own], [source for _, source in own])
