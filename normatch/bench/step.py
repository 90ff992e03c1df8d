"""`normatch bench step`: one training step beside the published formulation of the same step, and where its time goes.

The published formulation follows the code of NorMatch: fp32, NCHW, eager, Pillow's views in two worker processes, a
flow of full-width masked layers that is called once for labeled and once for unlabeled images, one MultivariateNormal
per class, and a handful of device-to-host reads. The closed form is our step with the flow head in plain PyTorch. All
take turns in one process, step by step, after their losses have been compared.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from ..config import Config, make_config, method_class
from ..errors import UserError
from ..flows import FlowHead, FlowOutput
from ..methods import distributed
from ..methods.classifier import decay_groups
from ..tools.tables import write_json
from ..training.loader import Batches
from ..training.optim import Optimizer
from ..training.state import State
from ..training.step import TrainStep
from .measure import Laps, machine, medians, side_by_side
from .rivals import closed_head, full_width, published_flow


def add_arguments(parser) -> None:
    parser.add_argument("--dataset", default="cifar10", help="the images (default: cifar10)")
    parser.add_argument("--data_dir", help="folder that holds the data set")
    parser.add_argument("--method", default="normatch", choices=("normatch", "fixmatch"), help="(default: normatch)")
    parser.add_argument("--backbone", default="wrn-28-2", help="(default: wrn-28-2)")
    parser.add_argument("--batch_size", type=int, help="labeled images (default: 64 on a GPU, else 8)")
    parser.add_argument("--uratio", type=int, default=7, help="unlabeled images for each of them (default: 7)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="ours (default: auto)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--rounds", type=int, default=11, help="steps; their median counts (default: 11)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile versions")
    parser.add_argument("--out", type=Path, help="folder for step.json (default: nothing is written)")


def run(options) -> int:
    """Prints both tables; writes step.json if asked to."""
    device = distributed.start(options.device or "auto")
    if options.rounds < 1:
        raise UserError(f"rounds must be at least 1, not {options.rounds}")
    batch_size = options.batch_size or (64 if device.type == "cuda" else 8)
    config = make_config(
        dataset=options.dataset, data_dir=options.data_dir, method=options.method, backbone=options.backbone,
        batch_size=batch_size, uratio=options.uratio, precision=options.precision, device=device.type,
    )  # fmt: skip
    facts = machine(device.type)
    print(f"{facts['device']}, {facts['threads']} threads, PyTorch {facts['torch']}")
    check_agreement(config, device)
    providers = make_providers(config, device, compiled=not options.no_compile)
    bf16 = providers["normatch"][0].bf16
    print(
        f"{config.method}, {config.backbone}, {config.dataset}: {batch_size} labelled and 2 x {config.uratio} x "
        f"{batch_size} unlabelled views a step; ours in {'bf16' if bf16 else 'fp32'}, channels-last"
    )
    calls = {name: lambda step=step, its=its: step(next(its)) for name, (step, its) in providers.items()}
    pause = {"published": 0.1}  # keeps its workers from preparing views in another's time
    try:  # three rounds of warm-up, which compile too
        seconds = medians(side_by_side(calls, device.type, options.rounds, repeat=1, warmup=3, pause=pause))
        parts = breakdown(config, device, options.rounds)
    finally:
        for _, batches in providers.values():
            batches.close()
    best = min((name for name in seconds if name.startswith("normatch")), key=seconds.get)
    rest = {name: 1 - seconds[f"backbone{name.removeprefix('normatch')}"] / seconds[name]
            for name in seconds if name.startswith("normatch")}  # fmt: skip
    report(seconds, rest, parts)
    if options.out:
        result = {
            "machine": facts, "method": config.method, "backbone": config.backbone, "dataset": config.dataset,
            "batch_size": batch_size, "uratio": config.uratio, "bf16": bf16, "rounds": options.rounds,
            "seconds": seconds, "times_published": seconds["published"] / seconds[best],
            "share_besides_backbone": rest, "parts": parts,
        }  # fmt: skip
        write_json(options.out / "step.json", result)
        print(f"\n{options.out / 'step.json'}")
    return 0


def report(seconds: dict, rest: dict, parts: dict) -> None:
    print(f"\n  {'a step':<34}{'ms':>10}{'of the published':>18}")
    for name, median in seconds.items():
        ratio = f"{seconds['published'] / median:.2f} x faster" if not name.startswith("backbone") else ""
        print(f"  {name:<34}{1e3 * median:>10.2f}{ratio:>18}")
    for name, share in rest.items():
        print(f"  {name}: all but the backbone's forward and backward pass is {100 * share:.1f} % of it")
    total = sum(parts.values())
    print(f"\n  {'where it goes, eager':<34}{'ms':>10}{'share':>18}")
    for name, median in parts.items():
        print(f"  {name:<34}{1e3 * median:>10.2f}{100 * median / total:>16.1f} %")


# ---- the training core: the rest of this file knows nothing of it


class OurStep:
    """A run that is ready for step `first`: its networks and its batches; called with a batch it takes our step.

    closed: whether flow heads are in plain PyTorch.   mode: of torch.compile.
    """

    def __init__(self, config: Config, device: torch.device, closed=False, mode: str | None = None, first: int = 0):
        torch.manual_seed(config.seed)
        self.config, self.first = config, first
        self.state = state = State(config, method_class(config.method), device)
        state.method.train()
        state.step = first
        state.device_step.fill_(first)
        self.classifier, self.bf16 = state.method.classifier, state.method.bf16
        self.flows, self.averaged = getattr(state.method, "flows", ()), state.average.module.classifier
        for head in self.flows if closed else ():
            head.forward = MethodType(_closed_forward, head)
        self.update = TrainStep(state, mode)

    def batches(self) -> Batches:
        return self.state.batches(0)

    def __call__(self, batch: dict) -> torch.Tensor:
        """-> the loss."""
        self.state.begin_step()
        metrics = self.update([batch])
        self.state.meter.add(metrics)
        return metrics["loss"][0]


def _closed_forward(head: FlowHead, x) -> FlowOutput:
    """In vectorized plain PyTorch and without dropout."""
    values = [value for coupling in head.couplings for value in coupling.tensors()]
    return FlowOutput(*closed_head(x, *head.prior_parameters(), *values))


def breakdown(config: Config, device: torch.device, rounds: int) -> dict[str, float]:
    """part -> its median seconds in our eager step, with a synchronization after each part."""
    state, laps = OurStep(config, device).state, Laps(device.type)
    method, batches, groups = state.method, state.batches(0), state.method.groups()
    sgd = Optimizer([group for group in groups if group["optimizer"] == "sgd"])
    adamw = Optimizer([group for group in groups if group["optimizer"] == "adamw"])
    try:
        for turn in range(rounds + 2):
            if turn == 2:  # after the warm-up
                laps.times.clear()
            state.begin_step()
            laps.start()
            batch = next(batches)
            laps.end("data")
            features, logits = method.classify(batch["images"])
            laps.end("backbone forward")
            seen_x, seen_y = (value.detach().requires_grad_() for value in (features, logits))
            if adamw.trained:
                laps.start()
                outputs = [flow(seen_x[: len(batch["y"]) + len(batch["u_y"])].detach()) for flow in method.flows]
                loss = sum(out.class_log_prob.sum() + out.log_prob.sum() for out in outputs)
                torch.autograd.grad(loss, adamw.trained)
                laps.end("flow head, both ways")
            with mock.patch.object(method, "classify", lambda images, seen=(seen_x, seen_y): seen):
                loss, metrics = method(batch, state.device_step)
            gradient, *of_flows = torch.autograd.grad(loss, [seen_y, *adamw.trained])
            laps.end("loss, both ways")
            of_classifier = torch.autograd.grad(logits, sgd.trained, gradient, allow_unused=True)
            laps.end("backbone backward")
            sgd.step(of_classifier)
            laps.end("SGD")
            if adamw.trained:
                adamw.step(of_flows)
                laps.end("AdamW of the flow")
            state.average.update()
            laps.end("average")
            state.meter.add(metrics)
            laps.end("metrics")
            state.step += 1
    finally:
        batches.close()
    parts = medians(laps.times)
    if adamw.trained:  # the method's forward and backward pass includes the head's
        parts["loss, both ways"] = max(0.0, parts["loss, both ways"] - parts["flow head, both ways"])
    return parts


# ---- the rivals


PUBLISHED = {
    "precision": "fp32", "channels_last": False, "compat": "reference", "augment_backend": "pil", "num_workers": 2,
}  # fmt: skip


def make_providers(config: Config, device: torch.device, compiled: bool) -> dict[str, tuple[Callable, Iterator]]:
    """-> the published step, the closed form, ours, and the backbone alone, eager and compiled; the batches of each."""
    published = OurStep(config.model_copy(update=PUBLISHED), device)
    providers = {"published": (published_step(published), published.batches())}
    for suffix, mode in (("", None), (", compiled", "default"))[: 1 + compiled]:
        if published.flows:
            closed = OurStep(config, device, closed=True, mode=mode)
            providers["closed form" + suffix] = closed, closed.batches()
        ours, alone = OurStep(config, device, mode=mode), OurStep(config, device)
        providers["normatch" + suffix] = ours, ours.batches()
        providers["backbone" + suffix] = _backbone_step(alone, mode), _repeat_first(alone.batches())
    return providers


def _repeat_first(batches: Batches):
    batch = next(batches)
    batches.close()
    while True:
        yield batch


def _backbone_step(ours: OurStep, mode: str | None):
    """Only the backbone's forward and backward pass."""
    backbone, bf16 = ours.classifier.backbone, ours.bf16
    parameters = [p for p in backbone.parameters() if p.requires_grad]

    def once(batch):
        images = batch["images"]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            features = backbone(images if bf16 else images.to(parameters[0].dtype))
        return torch.autograd.grad(features.float().square().mean(), parameters, allow_unused=True)

    return torch.compile(once, mode=mode, fullgraph=True) if mode else once


# ---- the published step


class PublishedFlow(nn.Module):
    """x: (N, D) -> as `rivals.published_flow`. The prior's tensors are no parameters, and keep their gradients."""

    def __init__(self, head: FlowHead):
        super().__init__()
        wide = (full_width(coupling.tensors(), j, head.features) for j, coupling in enumerate(head.couplings))
        self.layers = nn.ModuleList(nn.ParameterList(value.detach().clone() for value in layer) for layer in wide)
        self.prior = [value.detach().clone().requires_grad_() for value in head.prior_parameters()]
        self.dropout = head.dropout

    def forward(self, x):
        return published_flow(x, self.layers, self.prior, eps=1e-6, dropout=self.dropout)


def published_step(ours: OurStep):
    """-> a function of a batch (fp32, made contiguous) that takes the published step and returns its loss."""
    config, classifier, averaged = ours.config, ours.classifier, ours.averaged
    flow = PublishedFlow(ours.flows[0]) if ours.flows else None
    groups = decay_groups(classifier, config.weight_decay)
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    if flow:
        trained = [*flow.parameters(), *flow.prior]
        adamw = torch.optim.AdamW(trained, lr=config.flow_lr, weight_decay=config.weight_decay)
    queue, read, steps = [], [], itertools.count(ours.first)

    def losses(batch):
        images, y = batch["images"].contiguous(), batch["y"]
        b, n, groups = len(y), len(batch["u_y"]), 2 * config.uratio + 1
        features, logits = classifier(interleave(images, groups))
        features, logits = (interleave(value, len(images) // groups) for value in (features, logits))
        logits_x, logits_weak, logits_strong = logits[:b], logits[b : b + n], logits[b + n :]
        loss_x = F.cross_entropy(logits_x, y)
        q = (logits_weak.detach() / config.T).softmax(1)
        if flow:
            queue.append(q.mean(0))
            del queue[: -config.da_window]
            q = q / torch.stack(queue).mean(0)
            q = q / q.sum(1, keepdim=True)
        confidence, label = q.max(1)
        if flow:
            flow_x, flow_u = flow(features[:b].detach()), flow(features[b : b + n].detach())
            pi, choice = flow_u[2].softmax(1).max(1)
            agree = choice.eq(label).float()
            weight = torch.max(agree, (1 - agree) * torch.min(confidence, pi))
            loss_f = F.cross_entropy(flow_x[2], y)
            loss_n = -(flow_u[3] - features.shape[1] * math.log(256)).mean()
        else:
            weight = confidence.ge(config.p_cutoff).float()
        if flow and not config.one_hot:
            cross_entropy = -(q * logits_strong.log_softmax(1)).sum(1)
        else:
            cross_entropy = F.cross_entropy(logits_strong, label, reduction="none")
        loss_u = (cross_entropy * weight).mean()
        loss = loss_x + config.lambda_u * loss_u
        if flow:
            r = min(next(steps) // 1024 * 1024 / max(config.warmup_flow, 1), 1)
            loss = loss + r * config.lambda_flow * loss_f + r * config.lambda_flow_unsup * loss_n
        return loss, loss_x, loss_u, weight.mean(), label.eq(batch["u_y"]).float().mean(), confidence.mean()

    def once(batch):
        metrics = losses(batch)
        sgd.zero_grad()
        if flow:
            flow.zero_grad()
        metrics[0].backward()
        sgd.step()
        if flow:
            nn.utils.clip_grad_norm_(flow.parameters(), config.clip)
            adamw.step()
        with torch.no_grad():
            current, target = classifier.state_dict(), averaged.state_dict()
            for name, _ in averaged.named_parameters():
                target[name].copy_(target[name] * config.ema_decay + (1 - config.ema_decay) * current[name])
            for name, _ in averaged.named_buffers():
                target[name].copy_(current[name])
        read[:] = [value.item() for value in metrics]
        return metrics[0].detach()

    return once


def interleave(x, size: int):
    """x: (N, ...) -> the same rows, every size-th one together; a second call with N / size restores their order."""
    return x.reshape(-1, size, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def check_agreement(config: Config, device: torch.device) -> None:
    """Raises RuntimeError unless the three steps have equal losses and averages, starting from the same weights."""
    same = {**PUBLISHED, "num_workers": 0, "batch_size": 8, "dropout": 0.0, "ema_decay": 0.9}
    config = config.model_copy(update={**same, "steps": 2**20, "warmup": 0})  # a constant rate
    results = {}
    for name in ("published", "closed form", "normatch"):
        ours = OurStep(config, device, closed=name == "closed form", first=2048)  # where the flow losses count
        batch, before = next(ours.batches()), copy.deepcopy(ours.averaged)
        step = published_step(ours) if name == "published" else ours
        results[name] = [step(batch).item() for _ in range(2)]
        pairs = zip(ours.averaged.parameters(), before.parameters(), strict=True)
        results[name].append(sum((after - first).abs().sum() for after, first in pairs).item())
    # The published negative log-likelihood has a constant, D ln 256, times r = 0.4 and its weight of about 1e-6.
    wanted = results["published"]
    if not all(
        math.isclose(a, b, rel_tol=2e-3) for values in results.values() for a, b in zip(values, wanted, strict=True)
    ):
        raise RuntimeError(f"the steps do not agree: loss, loss after a step, path of the average: {results}")
