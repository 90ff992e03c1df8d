"""The state of a run: all that steps change and checkpoints hold, whatever the method."""

import inspect
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import __version__
from ..config import Config
from ..data import Dataset, Split, load_dataset, make_split
from ..data.base import standardize
from ..errors import UserError
from ..methods import distributed
from ..methods.base import Method, Task
from ..methods.scorer import count, scores
from ..published.checkpoints import FORMAT, load_checkpoint, load_pretrained, upgrade_optimizer
from .loader import Batches, StepDraws, StepViews, choose_backend, make_batches, row_batches
from .optim import EMA, SWA, Optimizer, lr_factor


class State:
    """The data, the method, its optimizer and average, and how far the run is.

    cls: the method's class.   backbone: a network in place of the configured one, for methods that take one.
    dataset, split: in place of those that the configuration names.

    Raises `UserError` for anything the user can fix, before the run folder is touched.
    """

    def __init__(
        self,
        config: Config,
        cls: type[Method],
        device: torch.device,
        backbone: nn.Module | None = None,
        dataset: Dataset | None = None,
        split: Split | None = None,
    ):
        self.config, self.device = config, device
        if dataset is None:
            dataset = load_dataset(
                config.dataset, config.data_dir, config.download, config.image_size, config.compat, config.in_memory
            )
        self.dataset = cls.prepare(dataset, config)
        self.split = split or make_split(dataset, config.num_labels, config.seed, config.num_val)
        views = not self.dataset.is_table and config.augment != "none"
        self.augment_backend = choose_backend(config.augment_backend, device) if views else None

        self.task = make_task(self.dataset, self.split)
        self.backbone = "given" if backbone else "named"
        if backbone is not None and "backbone" not in inspect.signature(cls).parameters:
            raise UserError(f"method {config.method} takes no backbone: leave it out")
        self.method = cls(self.task, config, **({} if backbone is None else {"backbone": backbone}))
        if getattr(config, "pretrained", None):
            load_pretrained(self.method, config.pretrained)
        self.method.to_device(device)
        self.draws = self._make_draws(views)
        self.images_per_step = config.batch_size * (1 + self.method.uratio * (2 if views else 1))

        groups = self.method.groups()
        self.optimizer = Optimizer(groups)
        if config.swa_start is None:
            copied = [p for group in groups if not group.get("average", True) for p in group["params"]]
            self.average = EMA(self.method, config.ema_decay, copied)
        else:
            self.average = SWA(self.method, config.swa_start, config.swa_every)
        self.meter = Meter()  # of the steps since the last log point
        self.step = 0  # optimizer steps done
        self.device_step = torch.zeros((), dtype=torch.int64, device=device)  # `step`, for losses that depend on it
        self.best = None  # {"accuracy", "step"} of the best evaluation
        self.seconds = 0.0  # of training so far, evaluations included

    def _make_draws(self, views: bool) -> StepDraws:
        config, ranks = self.config, distributed.ranks()
        if config.accumulate > 1 and config.batch_size % (config.accumulate * ranks):
            processes = f" times the {ranks} processes" if ranks > 1 else ""
            raise UserError(
                f"batch_size {config.batch_size} is not divisible by accumulate {config.accumulate}{processes}"
            )
        batch = {
            "seed": config.seed,
            "batch_size": config.batch_size // config.accumulate,
            "uratio": self.method.uratio,
            "rank": distributed.rank(),
            "ranks": ranks,
        }
        if views:
            return StepViews(self.dataset, self.split, config.augment, **batch)
        return StepDraws(self.dataset, self.split, **batch)

    def batches(self, start: int) -> Batches:
        """The micro-batches of steps `start`, `start` + 1, ...: each a function of its number alone."""
        config = self.config
        start, stop = start * config.accumulate, config.steps * config.accumulate
        if self.augment_backend is None:
            x = torch.from_numpy(self.dataset.train_x)
            mean, std = (torch.as_tensor(v, device=self.device) for v in (self.dataset.mean, self.dataset.std))
            if self.dataset.is_table:
                return row_batches(self.draws, standardize(x, mean, std), start, stop, self.device)
            return row_batches(self.draws, x, start, stop, self.device, lambda images: standardize(images, mean, std))
        dtype = self.method.input_dtype
        return make_batches(self.draws, start, stop, self.augment_backend, self.device, dtype, config.num_workers)

    def begin_step(self) -> float:
        """Set this step's learning rates; returns the one to report."""
        config = self.config
        self.method.begin_step(self.step)
        factor = lr_factor(config.schedule, self.step, config.steps, config.warmup)
        if config.swa_start is not None and config.swa_lr is not None and self.step >= config.swa_start:
            factor = config.swa_lr / config.lr if config.lr else 0.0
        self.optimizer.set_lr(factor)
        return config.lr * factor

    def evaluate(self, last: bool) -> dict[str, float]:
        """Scores of the averaged weights: `val_accuracy` and so on, or without validation images `test_accuracy`.

        At the end of a run (`last`), those of the test set in any case.
        """
        data, held_out, result = self.dataset, self.split.validation, {}
        parts = {"val": (data.train_x, data.train_labels, held_out)} if len(held_out) else {}
        if last or not len(held_out):
            parts["test"] = data.test_x, data.test_labels, slice(None)
        for part, (x, labels, rows) in parts.items():
            result |= scores(count(self.average.module, x[rows], labels[rows], data.mean, data.std), part)
        return result

    def finite(self) -> bool:
        """Whether all weights are numbers. Waits for the device."""
        return all(bool(p.isfinite().all()) for p in self.method.parameters())

    def fixed_tensors(self):
        """What steps read or change besides the parameters and the buffers of `method`: always the same tensors."""
        yield self.device_step
        yield from self.optimizer.rates
        for memory in self.optimizer.state:
            for tensors in memory.values():
                yield from tensors
        yield from self.average.module.parameters()
        yield from self.average.module.buffers()

    # ---- Checkpoints

    def content(self) -> dict:
        """The checkpoint: tensors and plain values, so that it loads with weights_only=True."""
        return {
            "format": FORMAT,
            "normatch": __version__,
            "config": self.config.model_dump(),
            "classes": list(self.dataset.classes),
            "mean": torch.as_tensor(self.dataset.mean).tolist() if self.dataset.is_table else list(self.dataset.mean),
            "std": torch.as_tensor(self.dataset.std).tolist() if self.dataset.is_table else list(self.dataset.std),
            "image_size": self.dataset.image_size,
            "shape": list(self.task.shape),
            "gray": self.task.gray,
            "columns": list(self.dataset.columns),
            "backbone": self.backbone,
            "split": self.split.sha256,
            "policy": self._policy(),
            "held_out": len(self.split.validation),
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "meter": self.meter.total,
            "model": self.method.state_dict(),
            "ema": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            # Batches are functions of the step; these generators draw dropout, the sampled voter and the like.
            "rng": distributed.gather(torch.get_rng_state()),
            "rng_cuda": distributed.gather(self._cuda_rng()),
        }

    def load(self, content: dict):
        """Resume from a checkpoint. Raises `UserError` where it does not belong to this run."""
        if content["split"] is None:
            raise UserError("the checkpoint was converted: it holds no optimizer, so training cannot resume from it")
        if content["split"] != self.split.sha256:
            raise UserError("the checkpoint was trained on other labeled images than this data set and seed give")
        saved, policy = content.get("policy"), self._policy()
        if saved and policy and saved != policy:  # its file may have been edited in between
            field = next(name for name in policy if saved.get(name) != policy[name])
            raise UserError(
                f"the augmentation policy {self.config.augment} has changed since the checkpoint was made: {field} was "
                f"{saved.get(field)}, is {policy[field]}"
            )
        if content["step"] >= self.config.steps:
            raise UserError(
                f"this run has finished: its checkpoint is of step {content['step']} of {self.config.steps}"
            )
        self.method.load_state_dict(content["model"])
        self.average.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(upgrade_optimizer(content, self.optimizer))
        self.step, self.best, self.seconds = content["step"], content["best"], content["seconds"]
        self.average.resume(self.step)
        self.meter.total = None if content["meter"] is None else content["meter"].to(self.device)
        rank = distributed.rank()
        if len(content["rng"]) != distributed.ranks():  # of another number of processes: new streams from here on
            torch.manual_seed(hash((self.config.seed, self.step, rank)))
            return
        torch.set_rng_state(content["rng"][rank])
        if self.device.type == "cuda" and content["rng_cuda"][rank] is not None:
            torch.cuda.set_rng_state(content["rng_cuda"][rank], self.device)

    def load_chosen(self, path: Path):
        """Replace the averaged weights by those of a checkpoint, for a last evaluation."""
        self.average.module.load_state_dict(load_checkpoint(path)["ema"])

    def _policy(self) -> dict | None:
        """The augmentation policy as plain values: the configuration may only name a file of it."""
        return asdict(self.draws.policy) if isinstance(self.draws, StepViews) else None

    def _cuda_rng(self) -> torch.Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None


def make_task(dataset: Dataset, split: Split) -> Task:
    """What the method is told about the data."""
    if dataset.is_table:
        return Task(dataset.train_x.shape[1:], dataset.classes, labeled=lambda: labeled_samples(dataset, split))
    size, some = dataset.image_size, dataset.train_x[np.arange(min(100, len(dataset.train_x)))]
    gray = bool((some == some[..., :1]).all())
    return Task((3, size, size), dataset.classes, gray, lambda: labeled_samples(dataset, split))


def labeled_samples(dataset: Dataset, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """-> x (n, *shape), standardized, y (n,): the labeled training samples."""
    x, y = torch.from_numpy(dataset.train_x[split.labeled]), torch.from_numpy(dataset.train_labels[split.labeled])
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(dataset.classes):
        raise UserError(
            f"{dataset.name}: labels must lie in 0..{len(dataset.classes) - 1}, or be -1 where they are unknown"
        )
    return standardize(x, dataset.mean, dataset.std), y


class Meter:
    """Adds up the metrics of each step on the device, and reads them back at log points only."""

    def __init__(self):
        self.names = []
        self.total = None

    def add(self, metrics: dict[str, torch.Tensor]):
        """metrics: name -> (2,), a sum and the number of its terms."""
        self.names = list(metrics)
        values = torch.stack(list(metrics.values()))
        self.total = values if self.total is None else self.total.add_(values)

    def read(self) -> dict[str, float]:
        """The averages since the last call; a metric that nothing was counted for is left out."""
        totals = distributed.sum_(self.total).tolist()
        values = {name: total / count for name, (total, count) in zip(self.names, totals, strict=True) if count}
        self.total = None
        return values
