"""What the methods that train a flow end to end share: a density of samples and classes, its settings, its recipe."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from ..config import Config, NonNegative, Positive, Weight, key
from ..errors import UserError
from ..flows.build import ROW_FLOWS
from .base import Method, Task


class DensityKeys(Config):
    """The settings of every method that trains a flow end to end."""

    uratio: Positive = key(7, "unlabeled samples per step, as a multiple of batch_size")
    lambda_u: Weight = key(1.0, "weight of the unlabeled loss")
    lr: Weight = key(0.03, "learning rate of the flow")
    optimizer: Literal["adam", "adamw", "adamax", "sgd"] = key("adam", "optimizer")
    schedule: Literal["constant", "steps", "cosine", "wilson", "linear", "cosine-7-16"] = key(
        "constant", Config.model_fields["schedule"].description
    )
    clip: Weight = key(50.0, "largest gradient norm of the flow, and of the mixture; 0: no clipping")
    flow: Literal[
        "tabular", "toy", "realnvp", "realnvp-1x1", "realnvp-1x1-actnorm", "realnvp-mnist", "glow", "glow-mnist",
        "mnist-masked",
    ] = key("tabular", "the flow; all but tabular and toy are of images")  # fmt: skip
    couplings: Positive = key(6, "couplings of a tabular or toy flow")
    hidden: Positive = key(32, "width of the couplings' networks")
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.5, "dropout in the couplings' networks")
    layers: NonNegative = key(1, "flow tabular: inner layers of its networks")
    zero_init: bool = key(False, "flow tabular: start from the identity, with last layers of zeros")
    flow_scales: Positive = key(2, "scales of the image flows realnvp* and glow")
    flow_width: Positive = key(64, "channels of an image flow's networks, at its first scale")
    flow_blocks: NonNegative = key(8, "residual blocks of an image flow's networks; mnist-masked has four")
    conv: Literal["full", "hh", "qr"] = key("full", "flow mnist-masked: form of its 1 x 1 convolutions")
    hh_factors: Positive = key(2, "flow mnist-masked: Householder reflections of each of them")
    reversible: bool = key(False, "image flows: keep no activations, recompute them in the backward pass")
    pretrained: str | None = key(None, "a run, or a published checkpoint, whose weights to start from")
    label_weight: Weight = key(1.0, "weight of the labeled loss; scnf: of a labeled sample")
    consistency_weight: Weight = key(0.0, "weight of the consistency between two views")
    consistency_rampup: NonNegative = key(0, "steps over which the consistency rises to its weight")
    noise: Weight = key(0.0, "standard deviation of the noise on rows in training")


class DensityMethod(Method):
    """`density`: samples (N, C, H, W) or rows (N, D) -> FlowOutput. A subclass builds it and defines the loss."""

    Keys = DensityKeys

    def __init__(self, task: Task, config: DensityKeys):
        super().__init__(task, config)
        self.rows, self.channels = config.flow in ROW_FLOWS, 1 if task.gray else 3
        self.shape = tuple(task.shape)  # of a sample, as the flow takes it
        if len(task.shape) == 3:
            _, height, width = task.shape
            self.shape = (self.channels * height * width,) if self.rows else (self.channels, height, width)
        x = y = None
        if task.labeled:
            x, y = task.labeled()
            missing = set(range(len(task.classes))) - set(y.tolist())
            if missing:
                raise UserError(f"class {task.classes[min(missing)]!r} has no labeled row")
            x = self.samples(x)
        self.density = self.build(task, x, y)

    def build(self, task: Task, x: torch.Tensor | None, y: torch.Tensor | None):
        """x: (n, *shape), y: (n,), the labeled training samples, or None where weights are loaded -> the density."""
        raise NotImplementedError

    @staticmethod
    def prepare(dataset, config):
        rows = config.flow in ROW_FLOWS
        if dataset.is_table and not rows:
            raise UserError(f"{dataset.name} is a table and {config.flow} a flow of images: take --flow tabular")
        if config.reversible and rows:
            raise UserError(f"reversible is for flows of images, which keep many activations: {config.flow} is of rows")
        if config.reversible and config.compile:
            raise UserError("reversible and compile exclude each other: a graph cannot be run backwards")
        if config.noise and not rows:
            raise UserError("noise is for rows: pixels have to stay in [0, 1], and are dequantized with noise anyway")
        if dataset.is_table or rows:
            return dataset
        return replace(dataset, mean=(0.0,) * 3, std=(1.0,) * 3)  # image flows take pixels in [0, 1]

    @property
    def uratio(self):
        return self.config.uratio if self.config.lambda_u or self.config.consistency_weight else 0

    def samples(self, x: torch.Tensor) -> torch.Tensor:
        """x: standardized, (N, 3, H, W) or (N, D) -> what the flow takes: (N, C, H, W), C = 1 if gray, or (N, D)."""
        if x.ndim != 4:
            return x
        x = x[:, : self.channels]
        return x.flatten(1) if self.rows else x.contiguous()

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """`samples`, in the dtype of the weights."""
        return self.samples(x).to(next(self.density.parameters()).dtype)

    def class_log_prob(self, x):
        return {"flow": self.density(self.inputs(x))}

    def autocast(self, x: torch.Tensor):
        """bf16 for the networks in the couplings alone; sums and likelihoods stay in float32."""
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def recipe(self) -> dict:
        """The settings of every parameter group."""
        config = self.config
        return {
            "optimizer": config.optimizer,
            "momentum": 0.0,  # of SGD, as published
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "clip": config.clip,
        }
