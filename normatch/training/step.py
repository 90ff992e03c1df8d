"""One training step, eager or compiled."""

import torch

from ..methods import distributed
from .optim import EMA
from .state import State


class TrainStep:
    """micro-batches -> metrics, name -> (2,): one step of a state by the mean gradient of its micro-batches.

    mode: None runs it eagerly. "default", "reduce-overhead", ... compile it as `torch.compile` knows them:

        whole       forward, backward, optimizer and average in one graph, for one micro-batch in one process
        gradients   forward and backward; several micro-batches or processes add up or exchange gradients after it
        update      optimizer and average
    """

    def __init__(self, state: State, mode: str | None = None):
        self.state = state
        self.in_graph = isinstance(state.average, EMA)  # SWA counts steps in Python
        self.gradients, self.update, self.whole = self._gradients, self._update, self._whole
        if mode:
            torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad breaks the graph
            for tensor in state.fixed_tensors():  # else a CUDA graph would copy them in, and refuse to change them
                torch._dynamo.mark_static_address(tensor)
            alone = distributed.ranks() == 1  # an exchange inside (alignment, BatchNorm) breaks a graph
            # A CUDA graph returns memory that its next call overwrites, so gradients cannot be added up there.
            self.gradients = torch.compile(self.gradients, mode="default", fullgraph=alone)
            self.update = torch.compile(self.update, mode="default", fullgraph=True)
            self.whole = torch.compile(self.whole, mode=mode, fullgraph=True)

    def _gradients(self, batch):
        """-> a gradient or None for each trained parameter, metrics."""
        state = self.state
        loss, metrics = state.method(batch, state.device_step)
        gradients = torch.autograd.grad(loss, state.optimizer.trained, allow_unused=True)
        return list(gradients), {"loss": torch.stack((loss.detach(), torch.ones_like(loss))), **metrics}

    def _update(self, gradients):
        self.state.optimizer.step(gradients)
        if self.in_graph:
            self.state.average.update()

    def _whole(self, batch):
        gradients, metrics = self._gradients(batch)
        self._update(gradients)
        return metrics

    def __call__(self, batches: list[dict]) -> dict[str, torch.Tensor]:
        state = self.state
        state.device_step.fill_(state.step)
        if len(batches) == 1 and distributed.ranks() == 1:
            metrics = self.whole(batches[0])
        else:
            gradients, metrics = self.gradients(batches[0])
            for batch in batches[1:]:
                more, counted = self.gradients(batch)
                torch._foreach_add_(*([g for g in part if g is not None] for part in (gradients, more)))
                metrics = {name: metrics[name] + counted[name] for name in metrics}
            distributed.average_([g for g in gradients if g is not None], len(batches))
            self.update(gradients)
        if not self.in_graph:
            state.average.update()
        state.step += 1
        return metrics
