"""Training of an image classifier: a backbone, and one of `METHODS` on its features and logits."""

import torch
from torch import nn

from . import distributed
from .backbones import Classifier, build_backbone
from .config import Config
from .data import load_dataset, make_split
from .errors import UserError
from .evaluation import accuracy
from .loader import Batches, StepViews, choose_backend, make_batches
from .methods import METHODS
from .optim import EMA, cosine_7_16, decay_groups
from .state import TrainingState
from .tables import Table


class ClassifierState(TrainingState):
    """SGD with Nesterov momentum trains the classifier, AdamW the flow heads; the average follows both."""

    def __init__(self, config: Config, device: torch.device, backbone: nn.Module | None = None):
        super().__init__(config, device)
        self.dataset = load_dataset(
            config.dataset, config.data_dir, config.download, config.image_size, config.compat, config.in_memory
        )
        if isinstance(self.dataset, Table):
            raise UserError(
                f"{self.dataset.name} is a table: the methods that train on tables are flows, --method flowgmm"
            )
        self.split = make_split(self.dataset, config.num_labels, config.seed, config.num_val)
        uratio = config.uratio if METHODS[config.method].uses_unlabeled else 0
        self.images_per_step = config.batch_size * (1 + 2 * uratio)
        self.bf16 = uses_bf16(config.precision, device)
        self.augment_backend = choose_backend(config.augment_backend, device)
        self.views = StepViews(
            self.dataset,
            self.split,
            config.augment,
            config.seed,
            config.batch_size,
            uratio,
            rank=distributed.rank(),
            ranks=distributed.ranks(),
        )

        image_size, classes = self.dataset.train_images.shape[1], len(self.dataset.classes)
        self.backbone = "given" if backbone else "named"
        if backbone is None:
            transition = "raw" if config.compat == "reference" else "activated"
            backbone = build_backbone(config.backbone, transition, config.bn_momentum, image_size)
        classifier = Classifier(backbone, classes, image_size)
        method = METHODS[config.method](classifier.features, classes, config)
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.objective = Objective(classifier, method, self.bf16).to(device, dtype)
        if config.channels_last:
            classifier.to(memory_format=torch.channels_last)
        if config.sync_bn:
            distributed.synchronize_batch_norm(classifier)
        self.flows = method.flows
        self.optimizers = {
            "optimizer": torch.optim.SGD(
                decay_groups(classifier, config.weight_decay), lr=config.lr, momentum=0.9, nesterov=True, fused=True
            )
        }
        if self.flows:
            self.optimizers["flow_optimizer"] = torch.optim.AdamW(
                self.flows.parameters(), lr=config.flow_lr, weight_decay=config.weight_decay, fused=True
            )
        self.ema = EMA(self.objective, config.ema_decay)

    def batches(self, start: int) -> Batches:
        config = self.config
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return make_batches(
            self.views, start, config.steps, self.augment_backend, self.device, dtype, config.num_workers
        )

    def begin_step(self) -> float:
        config = self.config
        if self.flows and config.compat == "reference" and self.step >= 1024:
            # The published test() puts the flow into evaluation mode and nothing takes it out: dropout ends there.
            self.flows.eval()
        factor = cosine_7_16(self.step, config.steps, config.warmup)
        for name, lr in (("optimizer", config.lr), ("flow_optimizer", config.flow_lr)):
            for group in self.optimizers[name].param_groups if name in self.optimizers else ():
                group["lr"] = lr * factor
        return config.lr * factor

    def update(self):
        optimizer = self.optimizers["optimizer"]
        optimizer.step()
        optimizer.zero_grad()
        if self.flows:
            reference = self.config.compat == "reference"
            update_flows(self.flows, self.optimizers["flow_optimizer"], self.config.clip, reference)
        self.ema.update(self.objective)
        self.step += 1

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
            # The published code adds them up over the whole run; otherwise there are none between steps.
            "prior_gradients": [p.grad for p in self._priors()],
        }

    def load(self, content: dict):
        super().load(content)
        for parameter, gradient in zip(self._priors(), content["prior_gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(self.device)

    def _priors(self) -> list[nn.Parameter]:
        return [p for flow in self.flows for p in flow.prior_parameters()]


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


def update_flows(flows: nn.ModuleList, optimizer: torch.optim.Optimizer, clip: float, reference: bool) -> list:
    """Clip, step and clear the gradients of the flow heads; returns the gradient norms before clipping, one a flow.

    `reference`: the prior's gradients are neither clipped nor ever cleared, so that they add up over the whole run,
    as in the published code, where the prior's tensors are not parameters of the flow module.
    """
    norms = []
    for flow in flows:
        prior = set(flow.prior_parameters())
        clipped = [p for p in flow.parameters() if not (reference and p in prior)]
        norms.append(nn.utils.clip_grad_norm_(clipped, clip or float("inf")))
    optimizer.step()
    for flow in flows:
        prior = set(flow.prior_parameters())
        for parameter in flow.parameters():
            if not (reference and parameter in prior):
                parameter.grad = None
    return norms


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs under bf16 autocast."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
