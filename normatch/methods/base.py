"""What a training run asks of a method, and what it tells the method about the data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import Dataset


@dataclass(frozen=True)
class Task:
    """What a method is told about its data.

    shape: of a standardized sample, (3, H, W) or (D,) of a row of a table.   classes: their names, K of them.
    gray: whether the three channels of the images are equal.   labeled: -> x (n, *shape), y (n,), the labeled training
    samples, for what is fitted to them before training; None for a model whose weights are loaded.
    """

    shape: tuple[int, ...]
    classes: list[str]
    gray: bool = False
    labeled: Callable[[], tuple[Tensor, Tensor]] | None = None


class Method(nn.Module):
    """One paper: the networks it trains, its loss, and its recipe of optimizers.

    A class of your own needs `__init__`, `forward`, `class_log_prob` and `groups`; see `examples/own_method.py`.
    Everything that is trained, averaged and saved is a parameter or buffer of the method.
    """

    Keys: type[Config] = Config  # its settings: a subclass of `Config` adds names, types, defaults and help texts

    def __init__(self, task: Task, config: Config):
        super().__init__()
        self.config = config

    def forward(self, batch: dict[str, Tensor], step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """batch, step () int64 -> the loss (), and metrics by name, each a pair (sum, count) from `terms.average`.

        batch: images (B + 2U, ...), y (B,), u_y (U,), u_index (U,), as `training.loader.Batches` describes them. Must
        not read tensors back to the host.
        """
        raise NotImplementedError

    def class_log_prob(self, x: Tensor) -> dict:
        """x: (N, *shape), standardized -> voter's name -> (N, K) logits, or the `FlowOutput` of a density.

        The first voter is the one that predicts.
        """
        raise NotImplementedError

    def groups(self) -> list[dict]:
        """The parameter groups, as `training.optim.Optimizer` takes them: the paper's recipe."""
        raise NotImplementedError

    # ---- What most methods leave as it is.

    @staticmethod
    def prepare(dataset: Dataset, config: Config) -> Dataset:
        """The data set as the method wants it. Raises `UserError` for one that it cannot take."""
        return dataset

    @property
    def uratio(self) -> int:
        """Unlabeled samples per labeled one in a batch."""
        return getattr(self.config, "uratio", 0)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the samples in a batch: float32, or bfloat16 for networks that run under autocast anyway."""
        return torch.float32

    def to_device(self, device: torch.device) -> "Method":
        """Move to `device`, in the configured precision."""
        return self.to(device, torch.float64 if self.config.precision == "fp64" else torch.float32)

    def begin_step(self, step: int):
        """Called before each step with its number, for what changes during a run."""
