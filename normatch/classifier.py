"""Training of an image classifier: a backbone, and one of `METHODS` on its features and logits."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import distributed
from .backbones import Classifier, build_backbone
from .config import Config
from .data import load_dataset, make_split
from .errors import UserError
from .evaluation import accuracy
from .methods import METHODS
from .optim import EMA, SGD, AdamW, clip, cosine_7_16, decay_groups
from .state import TrainingState
from .tables import Table
from .training.loader import Batches, StepViews, choose_backend, make_batches


class ClassifierState(TrainingState):
    """SGD with Nesterov momentum trains the classifier, AdamW the flow heads; the average follows both."""

    one_graph = True

    def __init__(self, config: Config, device: torch.device, backbone: nn.Module | None = None):
        super().__init__(config, device)
        self.dataset = load_dataset(
            config.dataset, config.data_dir, config.download, config.image_size, config.compat, config.in_memory
        )
        if isinstance(self.dataset, Table):
            raise UserError(
                f"{self.dataset.name} is a table: the methods that train on tables are flows, --method flowgmm"
            )
        if config.compat == "reference" and self.dataset.name.startswith("svhn"):
            self.dataset = replace(self.dataset, flip=True)  # the paper leaves digits as they are
        ranks = distributed.ranks()
        if config.accumulate > 1 and config.batch_size % (config.accumulate * ranks):
            processes = f" times the {ranks} processes" if ranks > 1 else ""
            raise UserError(
                f"batch_size {config.batch_size} is not divisible by accumulate {config.accumulate}{processes}"
            )
        self.split = make_split(self.dataset, config.num_labels, config.seed, config.num_val)
        uratio = config.uratio if METHODS[config.method].uses_unlabeled else 0
        self.images_per_step = config.batch_size * (1 + 2 * uratio)
        self.bf16 = uses_bf16(config.precision, device)
        self.augment_backend = choose_backend(config.augment_backend, device)
        self.draws = StepViews(
            self.dataset,
            self.split,
            config.augment,
            config.seed,
            config.batch_size // config.accumulate,
            uratio,
            rank=distributed.rank(),
            ranks=ranks,
        )

        image_size, classes = self.dataset.train_images.shape[1], len(self.dataset.classes)
        self.backbone = "given" if backbone else "named"
        if backbone is None:
            transition = "raw" if config.compat == "reference" else "activated"
            backbone = build_backbone(config.backbone, transition, config.bn_momentum, image_size, config.mixing)
        classifier = Classifier(backbone, classes, image_size)
        method = METHODS[config.method](classifier.features, classes, config)
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.objective = Objective(classifier, method, self.bf16).to(device, dtype)
        if config.channels_last:
            classifier.to(memory_format=torch.channels_last)
        if config.sync_bn:
            distributed.synchronize_batch_norm(classifier)
        self.flows = method.flows
        reference = config.compat == "reference"
        self.optimizers = {
            "optimizer": SGD(decay_groups(classifier, config.weight_decay, by_name=reference), config.lr)
        }
        if self.flows:
            self.optimizers["flow_optimizer"] = FlowOptimizer(
                self.flows, config.flow_lr, config.weight_decay, config.clip, reference
            )
        self.ema = EMA(self.objective, config.ema_decay)

    def batches(self, start: int) -> Batches:
        config = self.config
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        start, stop = start * config.accumulate, config.steps * config.accumulate
        return make_batches(self.draws, start, stop, self.augment_backend, self.device, dtype, config.num_workers)

    def begin_step(self) -> float:
        config = self.config
        if self.flows and config.compat == "reference" and self.step >= 1024:
            # The published test() puts the flow into evaluation mode and nothing takes it out: dropout ends there.
            self.flows.eval()
        factor = cosine_7_16(self.step, config.steps, config.warmup)
        self.optimizers["optimizer"].lr.fill_(config.lr * factor)
        if self.flows:
            self.optimizers["flow_optimizer"].lr.fill_(config.flow_lr * factor)
        return config.lr * factor

    def update(self, gradients: list):
        for optimizer in self.optimizers.values():
            count = len(optimizer.trained)
            optimizer.step(gradients[:count])
            gradients = gradients[count:]
        self.ema.update(self.objective)

    def evaluate(self, last: bool) -> dict:
        """On the validation images, or if there are none on the test set; at the end of a run there in any case."""
        dataset, held_out = self.dataset, self.split.validation
        averaged = self.ema.module
        # The published flow has no average: the live one then sees the averaged features.
        method = self.objective.method if self.config.compat == "reference" else averaged.method
        training = method.training
        method.eval()
        scores = {}
        if len(held_out):
            images, labels = dataset.train_images[held_out], dataset.train_labels[held_out]
            scores |= accuracy(averaged.classifier, method.flows, images, labels, dataset.mean, dataset.std, "val")
        if last or not len(held_out):
            images, labels = dataset.test_images, dataset.test_labels
            scores |= accuracy(averaged.classifier, method.flows, images, labels, dataset.mean, dataset.std)
        method.train(training)
        return scores

    def content(self) -> dict:
        return {
            **super().content(),
            "backbone": self.backbone,
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "image_size": self.dataset.train_images.shape[1],
        }


class Objective(nn.Module):
    """batch, step -> loss, metrics: all that is trained, averaged and saved.

    The batch holds images (B + 2 N_u, 3, H, W), y (B,) and u_y (N_u,), as `loader.Batches` describes them.
    """

    def __init__(self, classifier: nn.Module, method: nn.Module, bf16: bool = False):
        super().__init__()
        self.classifier = classifier
        self.method = method
        self.bf16 = bf16

    def forward(self, batch: dict[str, torch.Tensor], step: torch.Tensor):
        x, dtype = batch["images"], self.classifier.fc.weight.dtype
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features, logits = self.classifier(x if self.bf16 else x.to(dtype))
        # Losses and likelihoods are not for bf16.
        return self.method(features.to(dtype), logits.to(dtype), batch["y"], batch["u_y"], step)


class FlowOptimizer(AdamW):
    """AdamW on flow heads, each one's gradients clipped to a norm of `limit` (0: not at all) before.

    `reference`: the priors' gradients are not clipped and add up over the whole run, as in the published code, where
    the priors' tensors are not parameters of the flow module and nothing ever clears them.
    """

    def __init__(self, flows: nn.ModuleList, lr: float, weight_decay: float, limit: float, reference: bool):
        priors = [[p for p in flow.prior_parameters() if p.requires_grad] for flow in flows]
        known = {p for prior in priors for p in prior}
        nets = [[p for p in flow.parameters() if p.requires_grad and p not in known] for flow in flows]
        parts = list(zip(nets, priors, strict=True))
        super().__init__(
            [{"params": [p for own in parts for p in (*own[0], *own[1])], "weight_decay": weight_decay}], lr
        )
        self.sizes = [(len(net), len(prior)) for net, prior in parts]
        self.limit, self.reference = limit, reference
        for i, p in enumerate(p for prior in priors for p in prior) if reference else ():
            self.register_buffer(f"prior_sum_{i}", torch.zeros_like(p, requires_grad=False))

    def step(self, gradients: list) -> list:
        """As of any optimiser, -> the norms before clipping, one a flow."""
        norms, ready, sums = [], [], 0
        for net, prior in self.sizes:
            own, gradients = list(gradients[: net + prior]), gradients[net + prior :]
            norms.append(clip(own[:net] if self.reference else own, self.limit))
            if self.reference:
                for i in range(net, net + prior):
                    own[i] = getattr(self, f"prior_sum_{sums}").add_(own[i])
                    sums += 1
            ready += own
        super().step(ready)
        return norms


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs under bf16 autocast: where asked for, or by itself where bf16 is native.

    That is on every GPU that there are kernels for, and on CPUs with AMX or AVX-512 BF16 instructions. A rule and not
    a trial, so that a run takes the same bits today and tomorrow; on such a CPU a step took half the time in bf16, for
    small networks as for large ones, and on others bf16 is emulated and slower.
    """
    return precision == "bf16" or (precision == "auto" and (device.type == "cuda" or native_bf16()))


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers in one instruction, as Linux tells."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"})
