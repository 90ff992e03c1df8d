"""What a run trains: the state that steps change and checkpoints hold, whatever the method."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from . import __version__, distributed
from .config import Config
from .errors import UserError
from .training.loader import Batches, StepViews


class TrainingState:
    """All that changes during a run. A subclass is a family of methods; its constructor takes (config, device) and sets

        dataset, split   what is trained on: `dataset.name`, `dataset.classes`, `split.validation`, `split.sha256`
        draws            `StepViews` of them, or `StepDraws` where there are no views
        objective        nn.Module: batch (a dict of tensors), step (a tensor) -> loss, metrics; all that is trained
        optimizers       name in the checkpoint -> one of normatch.optim, or of torch.optim where `one_graph` is False
        ema              `EMA` of the objective, or what has its `module` and `update`: the weights that are evaluated
        images_per_step  how many images (rows, points) a step works on

    and all that the user can mend raises `UserError` there, before the run folder is touched.
    """

    one_graph = False  # whether `update` is a function of tensors, which a compiled step takes in

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.meter = Meter()  # of the steps since the last log point
        self.step = 0  # optimiser steps done
        self.clock = torch.zeros((), dtype=torch.int64, device=device)  # the same, for the device
        self.best = None  # {"accuracy", "step"} of the best evaluation
        self.seconds = 0.0  # of training so far, evaluations included

    # ---- What a subclass defines.

    def batches(self, start: int) -> Batches:
        """The batches of steps `start`, `start` + 1, ...: each a function of its step's number alone."""
        raise NotImplementedError

    def begin_step(self) -> float:
        """Put this step's learning rates into the optimisers; returns the one to report."""
        raise NotImplementedError

    def update(self, gradients: list):
        """One step of the optimisers and of the average, by a gradient or None for each of `trained()`."""
        raise NotImplementedError

    def evaluate(self, last: bool) -> dict:
        """Scores of the averaged weights, percent: `val_accuracy`, or without validation images `test_accuracy`.

        At the end of a run (`last`) `test_accuracy` in any case.
        """
        raise NotImplementedError

    def leave_figures(self, folder: Path):
        """Pictures of what was trained, into the run folder of a finished run; none where there are none to draw."""

    # ---- What they share.

    def gradients(self, batch: dict) -> tuple[list, torch.Tensor]:
        """A forward and a backward pass -> the gradients that `update` takes, and the metrics (M, 2) for the meter."""
        loss, metrics = self.objective(batch, self.clock)
        gradients = torch.autograd.grad(loss, self.trained(), allow_unused=True)
        metrics = {"loss": torch.stack((loss.detach(), torch.ones_like(loss))), **metrics}
        self.meter.names = list(metrics)
        return list(gradients), torch.stack(list(metrics.values()))

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the optimisers in turn."""
        return [p for o in self.optimizers.values() for group in o.param_groups for p in group["params"]]

    def finite(self) -> bool:
        """Whether all weights are numbers. Waits for the device."""
        return all(bool(p.isfinite().all()) for p in self.objective.parameters())

    def content(self) -> dict:
        """The checkpoint: tensors and plain values, so that it loads with weights_only=True."""
        return {
            "normatch": __version__,
            "config": self.config.model_dump(),
            "classes": list(self.dataset.classes),
            "split": self.split.sha256,
            "policy": self._policy(),
            "held_out": len(self.split.validation),
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "meter": self.meter.total,
            "model": self.objective.state_dict(),
            "ema": self.ema.module.state_dict(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            # Batches are functions of the step; these generators draw dropout, the sampled voter and the like.
            "rng": distributed.gather(torch.get_rng_state()),
            "rng_cuda": distributed.gather(self._cuda_rng()),
        }

    def load(self, content: dict):
        """Go on from a checkpoint. Raises `UserError` where it does not belong to this run."""
        if content["split"] is None:
            raise UserError("the checkpoint was converted: it holds no optimiser, and training cannot go on from it")
        if content["split"] != self.split.sha256:
            raise UserError("the checkpoint was trained on other labelled images than this data set and seed give")
        saved, policy = content.get("policy"), self._policy()
        if saved and policy and saved != policy:  # a file of one may have been edited in between
            field = next(name for name in policy if saved.get(name) != policy[name])
            raise UserError(
                f"the augmentation policy {self.config.augment} has changed since the checkpoint was made: {field} was "
                f"{saved.get(field)}, is {policy[field]}"
            )
        if content["step"] >= self.config.steps:
            raise UserError(
                f"this run has finished: its checkpoint is of step {content['step']} of {self.config.steps}"
            )
        self.objective.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content[name])
        self.step, self.best, self.seconds = content["step"], content["best"], content["seconds"]
        self.meter.total = None if content["meter"] is None else content["meter"].to(self.device)
        rank = distributed.rank()
        if len(content["rng"]) != distributed.ranks():  # of another number of processes: new streams from here on
            torch.manual_seed(hash((self.config.seed, self.step, rank)))
            return
        torch.set_rng_state(content["rng"][rank])
        if self.device.type == "cuda" and content["rng_cuda"][rank] is not None:
            torch.cuda.set_rng_state(content["rng_cuda"][rank], self.device)

    def load_chosen(self, path: Path):
        """Put the averaged weights of a checkpoint in the place of these, for a last evaluation."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.ema.module.load_state_dict(content["ema"])

    def _policy(self) -> dict | None:
        """What the views of this run are made by, as plain values: their configuration may only name a file of it."""
        return asdict(self.draws.policy) if isinstance(self.draws, StepViews) else None

    def _cuda_rng(self) -> torch.Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None


class Meter:
    """Adds up the metrics of each step on the device, and reads them back at log points only."""

    def __init__(self):
        self.names = []
        self.total = None

    def add(self, metrics: torch.Tensor):
        """metrics: (M, 2), of each of `names` a sum and the number of its terms."""
        self.total = metrics.clone() if self.total is None else self.total.add_(metrics)

    def read(self) -> dict[str, float]:
        """The averages since the last call; a metric that nothing was counted for is left out."""
        totals = distributed.sum_(self.total).tolist()
        values = {name: total / count for name, (total, count) in zip(self.names, totals, strict=True) if count}
        self.total = None
        return values


class TrainStep:
    """batches -> metrics (M, 2): one step of a state by the mean gradient of its batches: one, or more to save memory.

    mode: None runs it as it is. "default", "reduce-overhead", ... compile it as `torch.compile` knows them:

        whole        forward, backward, optimisers and average in one graph, for one batch in one process
        gradients    forward and backward; several batches or processes add up or exchange the gradients after it
        update       optimisers and average; torch.optim's own (flows trained end to end) are left as they are
    """

    def __init__(self, state: TrainingState, mode: str | None = None):
        self.state = state
        self.gradients, self.update, self.whole = state.gradients, state.update, self._whole
        if mode:
            torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad ends the graph
            alone = distributed.ranks() == 1  # an exchange inside (alignment, BatchNorm) ends a graph
            # A CUDA graph returns memory that the next call of any writes to, so gradients cannot be added up there.
            parts = "default" if state.one_graph else mode
            self.gradients = torch.compile(self.gradients, mode=parts, fullgraph=alone)
            if state.one_graph:
                self.update = torch.compile(self.update, mode=parts, fullgraph=True)
                self.whole = torch.compile(self.whole, mode=mode, fullgraph=True)

    def _whole(self, batch):
        gradients, metrics = self.state.gradients(batch)
        self.state.update(gradients)
        return metrics

    def __call__(self, batches: list[dict]) -> torch.Tensor:
        self.state.clock.fill_(self.state.step)
        if self.state.one_graph and len(batches) == 1 and distributed.ranks() == 1:
            metrics = self.whole(batches[0])
        else:
            gradients, metrics = self.gradients(batches[0])
            for batch in batches[1:]:
                more, counted = self.gradients(batch)
                torch._foreach_add_(*([g for g in part if g is not None] for part in (gradients, more)))
                metrics = metrics + counted
            distributed.average_([g for g in gradients if g is not None], len(batches))
            self.update(gradients)
        self.state.step += 1
        return metrics
