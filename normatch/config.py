"""The settings of a run: their names, types and defaults, the presets, and how they are put together."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from .data import TABLES
from .errors import UserError, nearest

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

FLOWS = ("flowgmm", "scnf")  # the methods that train a flow end to end, on images or tables


def key(default, text):
    return Field(default, description=text)


class Config(BaseModel):
    """Every setting of a training run. Steps are optimiser steps; batch sizes are in images."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    method: Literal["normatch", "fixmatch", "supervised", "flowgmm", "scnf"] = key("normatch", "what is trained")
    dataset: str = key(
        "digits",
        "images: digits, cifar10, cifar100, svhn, svhn+extra, stl10, mnist, fashionmnist, miniimagenet; your own: "
        "folder, csv. Tables, for flows: moons, circles, 8gaussians, pinwheel, picture, digits-table, breast-cancer, "
        "wine, iris, miniboone, hepmass, ag-news, yahoo; your own: table",
    )
    data_dir: str | None = key(None, "folder that holds the data set")
    download: bool = key(False, "let torchvision download the data set into data_dir")
    image_size: Positive | None = key(
        None, "side of the images, pixels; none: as they are, of own ones what suits most"
    )
    in_memory: bool = key(
        True, "no: read the training images of a folder or table from their files for each view, not once"
    )
    num_labels: NonNegative = key(40, "labelled images, the same number of every class; 0: all that there are")
    num_val: NonNegative = key(
        0,
        "training images held out to choose the best checkpoint; 0: by the test set, as in the papers",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = key(
        0, "seeds the labelled split, the data order, the augmentation and the weights"
    )

    backbone: str = key("wrn-28-2", "wrn-DEPTH-WIDEN, resnet18, resnet50, torchvision:NAME, timm:NAME")
    bn_momentum: Share | None = key(None, "BatchNorm momentum, the weight of the new batch; none: the backbone's own")

    steps: Positive = key(2**20, "optimiser steps")
    batch_size: Positive = key(64, "labelled images a step")
    uratio: Positive = key(7, "unlabelled images a step, as a multiple of batch_size (mu)")
    accumulate: Positive = key(
        1, "parts that a step's images are taken in, one after another, to save memory; da_window counts parts"
    )
    lr: Weight = key(0.03, "learning rate, of SGD with Nesterov momentum 0.9, or of a flow's optimizer")
    weight_decay: Weight = key(5e-4, "weight decay of both optimisers")
    warmup: NonNegative = key(0, "steps of linear learning-rate warm-up")
    ema_decay: Share = key(0.999, "decay of the averaged weights that are evaluated")

    lambda_u: Weight = key(1.0, "weight of the unlabelled loss")
    mixing: bool = key(False, "wide ResNets: mix the last channels with each other in half of the batches")
    T: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(1.0, "temperature of the pseudo-labels")
    p_cutoff: Share = key(0.95, "confidence threshold of FixMatch; for NorMatch only reported")
    hard_label: bool | None = key(
        None, "one-hot pseudo-labels; none: as published, yes for fixmatch and three voters, no for normatch"
    )

    dist_align: bool = key(True, "normatch: align the pseudo-labels with the uniform class distribution")
    da_window: Positive = key(32, "normatch: batches in the alignment window")
    lambda_flow: Weight = key(1.0, "normatch: weight of the flow's cross-entropy on labelled images")
    lambda_flow_unsup: Weight = key(1e-6, "normatch: weight of the flow's negative log-likelihood, nats")
    warmup_flow: NonNegative = key(5120, "normatch: steps over which the flow losses rise to their weight")
    third_voter: Literal["none", "flow", "sampled"] = key(
        "none", "normatch: also let a second flow, or a sampled linear classifier, vote"
    )
    couplings: Positive = key(6, "couplings of the flow head, or of a tabular flow")
    hidden: Positive = key(32, "width of the couplings' networks")
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.5, "dropout in the couplings' networks")
    trainable_prior: bool = key(True, "normatch: train the means, widths and shares of the mixture")
    flow_lr: Weight = key(1e-3, "normatch: learning rate of AdamW on the flow")
    clip: Weight = key(50.0, "largest gradient norm of the flow; 0: no clipping")

    flow: Literal[
        "tabular", "toy", "realnvp", "realnvp-1x1", "realnvp-1x1-actnorm", "realnvp-mnist", "glow", "glow-mnist",
        "mnist-masked",
    ] = key("tabular", "flowgmm, scnf: the flow; all but tabular and toy are of images")  # fmt: skip
    flow_scales: Positive = key(2, "scales of the image flows realnvp* and glow")
    flow_width: Positive = key(64, "channels of an image flow's networks, at its first scale")
    flow_blocks: NonNegative = key(8, "residual blocks of an image flow's networks; of mnist-masked four")
    reversible: bool = key(False, "flowgmm, scnf: keep no activations of an image flow, rebuild them for the gradient")
    layers: NonNegative = key(1, "flow tabular: inner layers of its networks")
    zero_init: bool = key(False, "flow tabular: start from the identity, with last layers of zeros")
    means: Literal[
        "random", "circle", "diagonal", "simplex", "antipodal", "pixel_const", "split_dims", "split_dims_v2",
        "from_data", "from_latent", "from_z", "random_data", "spread",
    ] = key("random", "flowgmm: where the classes' Gaussians stand; docs/flowgmm.md explains each rule")  # fmt: skip
    means_r: FiniteFloat = key(1.0, "flowgmm: scale of the means")
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(1.0, "flowgmm: width of the Gaussians")
    means_trainable: bool = key(False, "flowgmm: train the means")
    weights_trainable: bool = key(False, "flowgmm: train the classes' shares")
    covs_trainable: bool = key(False, "flowgmm: train the widths")
    lr_gmm: Weight = key(1e-2, "flowgmm: learning rate of what is trained of the mixture")
    labelled_loss: Literal["joint", "classes"] = key(
        "joint", "flowgmm: -log p(x, y) of labelled samples, or -log p(y | x) with -log p(x)"
    )
    label_weight: Weight = key(1.0, "flowgmm: weight of the labelled loss; scnf: of a labelled sample")
    consistency_weight: Weight = key(0.0, "flowgmm, scnf: weight of the consistency between two views")
    consistency_rampup: NonNegative = key(0, "flowgmm, scnf: steps over which the consistency rises to its weight")
    noise: Weight = key(0.0, "flowgmm, scnf: standard deviation of the noise on rows in training")
    optimizer: Literal["adam", "adamw", "adamax", "sgd"] = key(
        "adam", "flowgmm, scnf: optimiser, with learning rate lr"
    )
    schedule: Literal["constant", "steps", "cosine", "wilson", "linear"] = key(
        "constant", "flowgmm, scnf: course of the learning rate; steps: a tenth at 50 % and again at 80 % of them"
    )
    swa_start: NonNegative | None = key(
        None, "flowgmm, scnf: step from which weights are averaged (SWA); none: by ema_decay"
    )
    swa_every: Positive = key(10, "flowgmm, scnf: steps between the weights that SWA averages")
    swa_lr: Weight | None = key(None, "flowgmm, scnf: learning rate from swa_start on; none: that of the schedule")

    ssl_model: Literal["cond-flow", "cond-shift"] = key(
        "cond-flow", "scnf: what tells the classes apart: a flow of the deep dimensions, or a shift (a mixture)"
    )
    ssl_dim: NonNegative = key(0, "scnf: deep dimensions; 0: all")
    ssl_l: Positive = key(2, "scnf: levels of the conditional flow, at each of which but the last half is finished")
    ssl_k: Positive = key(4, "scnf: couplings of a level of the conditional flow")
    ssl_hd: Positive = key(256, "scnf: width of the conditional flow's networks")
    ssl_conv: Literal["full", "hh", "qr"] = key("full", "scnf: form of the conditional flow's 1 x 1 convolutions")
    ssl_hh: Positive = key(2, "scnf: Householder reflections of each of them")
    conv: Literal["full", "hh", "qr"] = key("full", "flow mnist-masked: form of its 1 x 1 convolutions")
    hh_factors: Positive = key(2, "flow mnist-masked: Householder reflections of each of them")
    cl_weight: Weight = key(0.0, "scnf: weight of the cross-entropy of labelled samples")
    pretrained: str | None = key(None, "flowgmm, scnf: a run, or a published checkpoint, whose weights to begin with")

    augment: str = key(
        "kekmodel", "augmentation policy: kekmodel, leedoyup, fixmatch-paper, weak, a YAML file; flows: none, too"
    )
    augment_backend: Literal["auto", "native", "dali", "pil"] = key("auto", "what computes the views")
    num_workers: NonNegative | None = key(
        None, "pil: processes that compute views, 0: the training process itself; none: 4 with a GPU, 0 without"
    )

    device: str = key("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16", "fp64"] = key(
        "auto",
        "auto: bf16 autocast on CUDA and on CPUs with bf16 instructions, else, and for flowgmm and scnf, fp32; "
        "fp64: no rounding noise",
    )
    sync_bn: bool = key(False, "several processes: BatchNorm over the images of all of them")
    channels_last: bool = key(True, "memory format of images and weights")
    compile: bool | Literal["reduce-overhead"] = key(
        False,
        "torch.compile the whole step, a minute or two before the first; reduce-overhead: with CUDA graphs, where one "
        "process takes a batch at once",
    )
    profile: bool = key(False, "leave trace.json, a Chrome trace of five steps, in the run folder")
    compat: Literal["none", "reference"] = key("none", "reference: do what the published code does where it differs")

    eval_every: Positive = key(1024, "steps between evaluations, each of which writes a checkpoint")
    log_every: Positive = key(50, "steps between lines of metrics.jsonl")
    keep: Annotated[int, Field(ge=2)] = key(2, "checkpoints kept: the last, and those before it to fall back on")
    out: str | None = key(None, "the run folder; none: runs/DATASET-LABELS-METHOD-SEED")
    resume: str | None = key(
        None, "auto: go on from the run folder's last checkpoint, if there is one; or a run or checkpoint"
    )
    overwrite: bool = key(False, "delete an existing run folder first")
    progress: bool = key(True, "show a progress bar")

    @property
    def one_hot(self) -> bool:
        """Whether pseudo-labels are one-hot: as said, or as published for the method."""
        if self.hard_label is not None:
            return self.hard_label
        return self.method == "fixmatch" or self.third_voter != "none"

    @property
    def folder(self) -> Path:
        """The run folder."""
        voters = "" if self.third_voter == "none" else f"-{self.third_voter}"
        name = f"{self.dataset}-{self.num_labels}-{self.method}{voters}-seed{self.seed}"
        return Path("runs", name) if self.out is None else Path(self.out)


# The published recipes (spec: SGD 0.03, 64 + 7 x 64 images, 2^20 steps, cosine 7/16, EMA 0.999 are the defaults above).
_CIFAR10 = {"dataset": "cifar10"}
_CIFAR100 = {"dataset": "cifar100", "backbone": "wrn-28-8", "weight_decay": 1e-3}
_MINI = {"dataset": "miniimagenet", "backbone": "resnet18", "da_window": 256}
_SVHN = {"dataset": "svhn", "lambda_flow_unsup": 0.0}

# FlowGMM. Toys as published but for smaller networks, a larger rate and fewer steps, which suffice; tables as published
# but for means and start; the digits' table, wine, ... are ours.
_FLOW = {"method": "flowgmm", "flow": "tabular", "augment": "weak"}
_TOY = {
    **_FLOW,
    "couplings": 5,
    "hidden": 128,
    "dropout": 0.0,
    "means": "circle",
    "label_weight": 0.5,
    "lambda_u": 0.5,
    "uratio": 5,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "schedule": "steps",
    "clip": 0.0,
    "ema_decay": 0.9,
    "steps": 2000,
    "eval_every": 500,
}
_TOYS = {
    "moons": {**_TOY, "dataset": "moons", "num_labels": 10, "batch_size": 10, "means": "diagonal", "means_r": 3.5},
    "circles": {**_TOY, "dataset": "circles", "num_labels": 11, "batch_size": 11, "means_r": 3.5},
    "8gaussians": {**_TOY, "dataset": "8gaussians", "num_labels": 19, "batch_size": 19, "means_r": 5.5},
    "pinwheel": {**_TOY, "dataset": "pinwheel", "num_labels": 13, "batch_size": 13, "means_r": 5.5},
}
_TABLE = {  # means on the data, a start from the identity, noise: what keeps few dimensions from collapsing
    **_FLOW,
    "couplings": 6,
    "hidden": 64,
    "zero_init": True,
    "dropout": 0.0,
    "means": "spread",
    "means_r": 15.0,
    "noise": 0.4,
    "optimizer": "adamw",
    "schedule": "cosine",
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "clip": 100.0,
    "ema_decay": 0.99,
    "steps": 1000,
    "eval_every": 250,
}
_PUBLISHED_TABLE = {
    **_FLOW,
    "dropout": 0.5,
    "means": "antipodal",
    "sigma": 1.3133,  # what the published code's standard deviation of 1 comes to
    "optimizer": "adamw",
    "schedule": "cosine",
    "lr": 3e-4,
    "weight_decay": 1e-5,
    "clip": 100.0,
    "ema_decay": 0.0,
}
_IMAGE = {
    **_FLOW,
    "means": "random",
    "labelled_loss": "classes",
    "label_weight": 3.0,
    "consistency_weight": 1.0,
    "batch_size": 32,
    "uratio": 1,
    "weight_decay": 5e-5,
    "clip": 100.0,
    "ema_decay": 0.0,
}

_SCNF = {
    "method": "scnf",
    "optimizer": "adamax",
    "schedule": "linear",
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "clip": 0.0,
    "ema_decay": 0.0,
    "augment": "none",
}
_SCNF_MNIST = {**_SCNF, "dataset": "mnist", "num_labels": 100, "flow": "mnist-masked"}
_SCNF_TOY = {
    **_SCNF,
    "flow": "toy",
    "couplings": 5,
    "hidden": 64,
    "ssl_l": 1,
    "ssl_k": 2,
    "ssl_hd": 64,
    "uratio": 5,
    "lr": 2e-3,
    "cl_weight": 1.0,
    "noise": 0.1,  # and consistency under it, without which rings are cut where no label is near
    "consistency_weight": 1.0,
    "consistency_rampup": 500,
    "ema_decay": 0.99,
    "steps": 2000,
    "eval_every": 500,
}

PRESETS = {
    "digits": {
        "dataset": "digits",
        "num_labels": 40,
        "backbone": "wrn-10-1",
        "bn_momentum": 0.01,
        "steps": 1800,
        "batch_size": 16,
        "uratio": 4,
        "ema_decay": 0.995,
        "augment": "fixmatch-paper",
        "hard_label": True,
        "warmup_flow": 400,
        "eval_every": 200,
        "log_every": 20,
    },
    "cifar10-40": {**_CIFAR10, "num_labels": 40},
    "cifar10-250": {**_CIFAR10, "num_labels": 250},
    "cifar10-4000": {**_CIFAR10, "num_labels": 4000},
    "cifar10-4000-small": {  # ours: half an hour on one CPU core
        **_CIFAR10,
        "num_labels": 4000,
        "backbone": "wrn-10-1",
        "bn_momentum": 0.01,
        "steps": 15000,
        "batch_size": 32,
        "uratio": 2,
        "lr": 0.1,
        "ema_decay": 0.99,
        "p_cutoff": 0.8,
        "warmup_flow": 1000,
        "eval_every": 1000,
        "log_every": 50,
    },
    "cifar10-4000-two-flows": {**_CIFAR10, "num_labels": 4000, "third_voter": "flow", "hard_label": True},
    "cifar100-400": {**_CIFAR100, "num_labels": 400},
    "cifar100-2500": {**_CIFAR100, "num_labels": 2500},
    "cifar100-10000": {**_CIFAR100, "num_labels": 10000},
    "stl10-1000": {"dataset": "stl10", "num_labels": 1000, "backbone": "resnet18", "hard_label": True},
    "miniimagenet-1000": {**_MINI, "num_labels": 1000},
    "miniimagenet-10000": {**_MINI, "num_labels": 10000},
    "svhn-40": {**_SVHN, "num_labels": 40},
    "svhn-1000": {**_SVHN, "num_labels": 1000},
    "imagenet-13000": {"dataset": "imagenet", "num_labels": 13000},
    **_TOYS,
    **{f"{name}-labelled": {**values, "lambda_u": 0.0} for name, values in _TOYS.items()},
    "picture": {
        **_TOY,
        "dataset": "picture",
        "num_labels": 0,
        "batch_size": 200,
        "uratio": 1,
        "label_weight": 1.0,
        "lambda_u": 0.0,
        "steps": 5000,
    },
    "flowgmm-digits-table": {**_TABLE, "dataset": "digits-table", "num_labels": 100, "batch_size": 100, "uratio": 2},
    "flowgmm-breast-cancer": {**_TABLE, "dataset": "breast-cancer", "num_labels": 20, "batch_size": 20, "uratio": 10},
    "flowgmm-wine": {**_TABLE, "dataset": "wine", "num_labels": 15, "batch_size": 15, "means_r": 10.0, "steps": 500},
    "flowgmm-iris": {**_TABLE, "dataset": "iris", "num_labels": 15, "batch_size": 15, "noise": 0.1, "means_r": 10.0},
    "flowgmm-ag-news": {
        **_TABLE,
        "dataset": "ag-news",
        "num_labels": 200,
        "batch_size": 100,
        "uratio": 4,
        "couplings": 4,
        "hidden": 32,
        "means": "from_latent",
        "means_r": 1.0,
        "means_trainable": True,
        "lr": 3e-4,
        "lr_gmm": 1e-2,
        "lambda_u": 10.0,
        "noise": 0.1,
        "steps": 300,
        "eval_every": 100,
    },
    "flowgmm-ag-news-published": {
        **_PUBLISHED_TABLE,
        "dataset": "ag-news",
        "num_labels": 200,
        "batch_size": 200,
        "uratio": 25,
        "couplings": 7,
        "hidden": 1024,
        "lambda_u": 0.6,
        "steps": 2400,
    },
    "flowgmm-yahoo": {
        **_PUBLISHED_TABLE,
        "dataset": "yahoo",
        "num_labels": 800,
        "batch_size": 800,
        "uratio": 6,
        "couplings": 7,
        "hidden": 1024,
        "lambda_u": 0.2,
        "steps": 56000,
    },
    "flowgmm-miniboone": {
        **_PUBLISHED_TABLE,
        "dataset": "miniboone",
        "num_labels": 20,
        "batch_size": 20,
        "uratio": 250,
        "couplings": 10,
        "hidden": 256,
        "lambda_u": 3.0,
        "steps": 4200,
    },
    "flowgmm-hepmass": {
        **_PUBLISHED_TABLE,
        "dataset": "hepmass",
        "num_labels": 20,
        "batch_size": 20,
        "uratio": 250,
        "couplings": 10,
        "hidden": 256,
        "lambda_u": 10.0,
        "lr": 1e-3,
        "steps": 4200,
    },
    "flowgmm-mnist-100": {
        **_IMAGE,
        "dataset": "mnist",
        "num_labels": 100,
        "flow": "realnvp-mnist",
        "flow_blocks": 4,
        "lr": 1e-5,
        "steps": 90000,
        "consistency_rampup": 3000,
    },
    # Half an hour on two cores is more than it takes: pixels of 14 x 14 as rows, by the kernel of the flow head.
    "flowgmm-mnist-100-small": {
        **_TABLE,
        "dataset": "mnist",
        "num_labels": 100,
        "image_size": 14,
        "augment": "affine",
        "batch_size": 50,
        "uratio": 4,
        "consistency_weight": 2.0,
        "consistency_rampup": 1500,
        "steps": 8000,
        "eval_every": 1000,
    },
    "flowgmm-mnist-1000": {
        **_IMAGE,
        "dataset": "mnist",
        "num_labels": 1000,
        "flow": "realnvp-mnist",
        "flow_blocks": 4,
        "lr": 1e-5,
        "steps": 90000,
        "consistency_rampup": 3000,
    },
    "flowgmm-svhn-1000": {
        **_IMAGE,
        "dataset": "svhn",
        "num_labels": 1000,
        "flow": "realnvp",
        "lr": 1e-4,
        "steps": 46500,
        "consistency_rampup": 3100,
    },
    "flowgmm-cifar10-4000": {
        **_IMAGE,
        "dataset": "cifar10",
        "num_labels": 4000,
        "flow": "realnvp",
        "lr": 1e-4,
        "steps": 187625,
        "consistency_rampup": 12500,
    },
    # 500 passes of 235 batches; a third of each batch is labelled, as the sampler's weights have it on average.
    "scnf-mnist-100": {
        **_SCNF_MNIST,
        "batch_size": 85,
        "uratio": 2,
        "ssl_dim": 196,
        "steps": 117500,
        "eval_every": 2350,
    },
    # Half an hour on two cores is more than it takes: pixels of 14 x 14 as rows, and networks of linear layers. The
    # weights of the cross-entropies are large beside likelihoods of hundreds of nats: classes are then found sooner.
    "scnf-mnist-100-small": {
        **_SCNF,
        "dataset": "mnist",
        "num_labels": 100,
        "image_size": 14,
        "augment": "affine",
        "noise": 0.4,
        "flow": "toy",
        "couplings": 6,
        "hidden": 128,
        "ssl_dim": 98,
        "ssl_l": 1,
        "ssl_k": 2,
        "ssl_hd": 32,
        "batch_size": 50,
        "uratio": 2,
        "cl_weight": 50.0,
        "consistency_weight": 25.0,
        "consistency_rampup": 500,
        "lr": 3e-3,
        "clip": 100.0,
        "ema_decay": 0.99,
        "steps": 4000,
        "eval_every": 1000,
    },
    "scnf-moons": {**_SCNF_TOY, "dataset": "moons", "num_labels": 10, "batch_size": 10},
    "scnf-circles": {**_SCNF_TOY, "dataset": "circles", "num_labels": 11, "batch_size": 11},
    "scnf-gmm-moons": {
        **_SCNF_TOY,
        "dataset": "moons",
        "num_labels": 10,
        "batch_size": 10,
        "ssl_model": "cond-shift",
    },
    "scnf-gmm-circles": {
        **_SCNF_TOY,
        "dataset": "circles",
        "num_labels": 11,
        "batch_size": 11,
        "ssl_model": "cond-shift",
    },
}

# Published flag -> ours, or the values of ours that the flag alone stands for.
ALIASES = {
    "num_labeled": "num_labels",
    "total_steps": "steps",
    "num_train_iter": "steps",
    "eval_step": "eval_every",
    "num_eval_iter": "eval_every",
    "mu": "uratio",
    "learning_rate": "lr",
    "wdecay": "weight_decay",
    "ema_m": "ema_decay",
    "ulb_loss_ratio": "lambda_u",
    "threshold": "p_cutoff",
    "da_cache": "da_window",
    "arch": "backbone",
    "net": "backbone",
    "flow_dist_trainable": "trainable_prior",
    "no_onehot": {"hard_label": "false"},
    "no_grad_clip": {"clip": "0"},
    "no_progress": {"progress": "false"},
    "use_two_flows": {"third_voter": "flow"},
    "amp": {"precision": "bf16"},
    "data": "dataset",
    "supervised": "num_labels",
    "sup_weight": "label_weight",
    "swa_freq": "swa_every",
    "max_grad_norm": "clip",
    "unlab_weight": "lambda_u",
    "cov_std": "sigma",
    "data_path": "data_dir",
    "save_name": "out",
    "load_path": "resume",
    "supervised_only": {"lambda_u": "0"},
    "gmm_trainable": {"means_trainable": "true", "weights_trainable": "true", "covs_trainable": "true"},
}


# What may differ between a checkpoint and the run that goes on from it: nothing here changes what is computed, but
# device and compile change how it is rounded, and dali differs from the other backends in a few pixels.
FREE_KEYS = {
    "data_dir", "download", "device", "in_memory", "num_workers", "augment_backend", "compile", "log_every",
    "eval_every", "out", "resume", "overwrite", "progress", "profile", "keep",
}  # fmt: skip


# Published flags for what always holds here: endless sampling, Nesterov momentum, averaging; or what torchrun, the data
# set and the checkpoint say: processes, devices, classes, where to go on. Switches, and flags with a value.
UNNEEDED_SWITCHES = ("expand_labels", "nesterov", "use_ema", "multiprocessing_distributed")
UNNEEDED = (
    *UNNEEDED_SWITCHES, "opt_level", "gpu_id", "gpu", "local_rank", "rank", "world_size", "dist_url", "dist_backend",
    "num_classes", "train_sampler", "eval_batch_size", "epoch", "start_epoch", "save_dir",
)  # fmt: skip


# Published flags whose place is in the name of the backbone.
NETWORK_FLAGS = {
    "depth": "--backbone wrn-DEPTH-WIDTH",
    "widen_factor": "--backbone wrn-DEPTH-WIDTH",
    "net_from_name": "--backbone torchvision:NAME",
}


def canonical(name: str) -> str | dict[str, str] | None:
    """A key as the user wrote it (`num-labeled`) -> ours (`num_labels`), or the values that it implies, or None."""
    name = name.replace("-", "_")
    if name in Config.model_fields:
        return name
    if name in ALIASES:
        return ALIASES[name]
    if name in UNNEEDED:
        return None
    if name in NETWORK_FLAGS:
        raise UserError(f"{name} is part of the network's name here: {NETWORK_FLAGS[name]}")
    raise UserError(f"unknown key {name!r}{nearest(name, [*Config.model_fields, *ALIASES, *UNNEEDED])}")


def make_config(preset: str | None = None, file: str | Path | None = None, **keys) -> Config:
    """The preset, under the file, under the keys: what comes later wins. Returns the checked configuration.

    Without a preset, the first one of the data set and method that file or keys name; without these, `digits`. To go on
    (`resume="auto"`) from a run folder, its own configuration.
    Raises `UserError` for unknown presets and keys (with the nearest known one) and for values of the wrong type.
    """
    given = {**({} if file is None else read_config(file)), **_canonical_keys(keys)}
    saved = Path(given.get("out") or "", "config.yaml")
    if preset is None and given.get("resume") == "auto" and given.get("out") and saved.is_file():
        base = {name: value for name, value in read_config(saved).items() if name != "overwrite"}
    else:
        preset = preset or _preset_of(given.get("dataset", "digits"), given.get("method"))
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; presets: {', '.join(PRESETS)}")
        base = PRESETS[preset]
    config = checked({**base, **given})
    if config.out == "" or config.resume == "":
        raise UserError("--out and --resume need a folder's name, not an empty one")
    return config


def checked(keys: dict) -> Config:
    """The configuration of these keys. Raises `UserError` for values of the wrong type or out of their range."""
    try:
        return Config(**keys)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None


def _preset_of(dataset: str, method: str | None) -> str:
    """The preset that suits best: of the data set and method, of a method alike, or of the same kind of data."""
    method = method or ("flowgmm" if dataset in TABLES else "normatch")
    flows = method in FLOWS
    alike = [
        name
        for name, values in PRESETS.items()
        if values["dataset"] == dataset and (values.get("method", "normatch") in FLOWS) == flows
    ]
    of_method = [name for name in alike if PRESETS[name].get("method", "normatch") == method]
    if of_method or alike:
        return (of_method or alike)[0]
    return ("flowgmm-wine" if dataset in TABLES else "flowgmm-mnist-100-small") if flows else "digits"


def read_config(path: str | Path) -> dict:
    """A YAML file of flat `key: value` lines -> its keys under our names."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return _canonical_keys(_from_scnf(content))


# Keys of SCNF's published configuration that say nothing here: folders, records, and what always holds.
_SCNF_UNNEEDED = (
    "name", "root", "time", "id", "status", "config_file", "config", "tmp", "logits", "sup_ohe", "num_examples", "k",
    "l", "hid_dim", "data_seed", "ssl_nclasses", "clip_gn", "lr_gamma", "lr_steps", "lr_warmup", "log_each", "test_bs",
)  # fmt: skip


def _from_scnf(content: dict) -> dict:
    """SCNF's published file of keys -> keys known here; any other file as it is.

    Its epochs become steps, and the weight s of the labelled samples in its sampler, which draws them in s / (1 + s) of
    the cases, that share of each batch.
    """
    if "train_bs" not in content:
        return content
    keys = {name: value for name, value in content.items() if name not in _SCNF_UNNEEDED and value != ""}
    try:
        rows = int(content.get("num_examples", -1))
        if rows < 1:  # all there are, of the toys 1,000
            rows = 60000 if keys.get("data", "mnist") == "mnist" else 1000
        batch, share = int(keys.pop("train_bs")), float(keys.pop("sup_sample_weight", 0.5))
        epoch = -(-rows // batch)
        keys["steps"] = int(keys.pop("epochs", 500)) * epoch
        schedule = keys.pop("lr_schedule", "hat")
        if schedule == "hat":
            keys["warmup"] = int(content.get("lr_warmup", 10)) * epoch
    except (TypeError, ValueError) as error:
        raise UserError(f"a number in the configuration of SCNF cannot be read: {error}") from None
    if share <= 0:
        raise UserError("sup_sample_weight must be positive: what share of a batch is labelled follows from it")
    keys["uratio"] = max(1, round(1 / share))
    keys["batch_size"] = max(1, batch // (1 + keys["uratio"]))
    keys["schedule"] = {"no": "constant"}.get(schedule, "linear")
    keys["flow"] = keys.pop("model", "mnist-masked")
    ours = {"noise": 0.0, "consistency_weight": 0.0, "ema_decay": 0.0, "clip": 0.0}  # what presets may have besides
    return {"method": "scnf", **ours, **keys}


def _canonical_keys(keys: dict) -> dict:
    result = {}
    for name, value in keys.items():
        name = canonical(str(name))
        if name is None or (name == "backbone" and str(value).lower() in ("wideresnet", "resnet")):
            continue  # a published flag that has nothing to say here: the preset knows the network
        if isinstance(name, dict):  # a published on/off flag
            result.update({} if str(value).lower() in ("false", "0", "no", "off") else name)
            continue
        if name == "dataset" and value == "mini_imagenet":  # as NorMatch calls it
            value = "miniimagenet"
        optional = type(None) in get_args(Config.model_fields[name].annotation)
        result[name] = None if optional and str(value).lower() == "none" else value
    return result


def _explain(problem: dict) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"
