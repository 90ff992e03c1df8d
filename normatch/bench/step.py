"""`normatch bench step`: one training step beside the published formulation of the same step, and where its time goes.

The published formulation follows the code of NorMatch: fp32, NCHW, eager, Pillow's views in two worker processes, a
flow of full-width masked layers that is called once for labelled and once for unlabelled images, one
MultivariateNormal a class, and a handful of read-backs. The closed form is our step with the flow head in plain
PyTorch. All take turns in one process, step by step, after their losses have been compared.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .. import distributed
from ..classifier import ClassifierState
from ..config import Config, make_config
from ..errors import UserError
from ..flows import FlowHead
from ..flows.head import FlowOutput
from ..optim import decay_groups
from ..state import TrainStep
from ..training.loader import make_batches
from .kernels import closed_head
from .measure import machine, seconds


def add_arguments(parser) -> None:
    parser.add_argument("--dataset", default="cifar10", help="the images (default: cifar10)")
    parser.add_argument("--data_dir", help="folder that holds the data set")
    parser.add_argument("--method", default="normatch", choices=("normatch", "fixmatch"), help="(default: normatch)")
    parser.add_argument("--backbone", default="wrn-28-2", help="(default: wrn-28-2)")
    parser.add_argument("--batch_size", type=int, help="labelled images (default: 64 on a GPU, else 8)")
    parser.add_argument("--uratio", type=int, default=7, help="unlabelled images for each of them (default: 7)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="ours (default: auto)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=11, help="steps, of which the median counts (default: 11)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's versions out")
    parser.add_argument("--out", type=Path, help="folder for step.json (default: nothing is written)")


def run(options) -> int:
    """Prints both tables; writes step.json where asked to."""
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
    bf16 = providers["normatch"].state.bf16
    print(
        f"{config.method}, {config.backbone}, {config.dataset}: {batch_size} labelled and 2 x {config.uratio} x "
        f"{batch_size} unlabelled views a step; ours in {'bf16' if bf16 else 'fp32'}, channels-last"
    )
    try:
        medians = measure(providers, device.type, options.rounds)
        parts = breakdown(config, device, options.rounds)
    finally:
        for provider in providers.values():
            provider.close()
    best = min((name for name in medians if name.startswith("normatch")), key=medians.get)
    print(f"\n  {'a step':<34}{'ms':>10}{'of the published':>18}")
    for name, median in medians.items():
        ratio = f"{medians['published'] / median:.2f} x faster" if not name.startswith("backbone") else ""
        print(f"  {name:<34}{1e3 * median:>10.2f}{ratio:>18}")
    rest = {name: 1 - medians[f"backbone{name.removeprefix('normatch')}"] / medians[name]
            for name in medians if name.startswith("normatch")}  # fmt: skip
    for name, share in rest.items():
        print(f"  {name}: all but the backbone's forward and backward pass is {100 * share:.1f} % of it")
    total = sum(parts.values())
    print(f"\n  {'where it goes, eager':<34}{'ms':>10}{'share':>18}")
    for name, median in parts.items():
        print(f"  {name:<34}{1e3 * median:>10.2f}{100 * median / total:>16.1f} %")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": facts, "method": config.method, "backbone": config.backbone, "dataset": config.dataset,
            "batch_size": batch_size, "uratio": config.uratio, "bf16": bf16, "rounds": options.rounds,
            "seconds": medians, "times_published": medians["published"] / medians[best],
            "share_besides_backbone": rest, "parts": parts,
        }  # fmt: skip
        (options.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{options.out / 'step.json'}")
    return 0


def measure(providers: dict[str, "Provider"], device: str, rounds: int) -> dict[str, float]:
    """name -> the median seconds of a step; the providers take turns, so that a busy machine hits all alike."""
    times = {name: [] for name in providers}
    for round_ in range(rounds + 3):  # the first three warm up, and compile
        for name, provider in providers.items():
            took = seconds(provider.step, device)
            if round_ > 2:
                times[name].append(took)
            provider.rest()
    return {name: statistics.median(found) for name, found in times.items()}


# ---- the rivals


class Provider:
    """One formulation of the step, with weights, optimisers and batches of its own."""

    def __init__(self, state: ClassifierState, step: Callable[[dict], object], batches, pause: float = 0.0):
        self.state, self._step, self.batches, self.pause = state, step, batches, pause

    def step(self):
        self._step(next(self.batches))

    def rest(self):
        time.sleep(self.pause)  # what works ahead in the background is not to do so in another's time

    def close(self):
        self.batches.close()


def make_providers(config: Config, device: torch.device, compiled: bool) -> dict[str, Provider]:
    """The published step, the closed form, ours, and the backbone alone, eager and compiled."""
    found = {}
    state = fresh_state(config.model_copy(update=PUBLISHED), device)
    views = make_batches(state.draws, 0, config.steps, "pil", device, num_workers=2)
    found["published"] = Provider(state, published_step(state), views, pause=0.1)
    for suffix, mode in (("", None), (", compiled", "default"))[: 1 + compiled]:
        for name, close in (("closed form", True), ("normatch", False)):
            state = fresh_state(config, device)
            if close:
                if not state.flows:
                    continue
                for flow in state.flows:
                    flow.__class__ = ClosedHead
            found[name + suffix] = Provider(state, _our_step(state, mode), state.batches(0))
        state = fresh_state(config, device)
        found["backbone" + suffix] = Provider(state, _backbone_step(state, mode), _same(next(state.batches(0))))
    return found


PUBLISHED = {"precision": "fp32", "channels_last": False, "compat": "reference"}


def fresh_state(config: Config, device: torch.device) -> ClassifierState:
    torch.manual_seed(config.seed)
    state = ClassifierState(config, device)
    state.objective.train()
    return state


def _our_step(state: ClassifierState, mode: str | None):
    step = TrainStep(state, mode)

    def once(batch):
        state.begin_step()
        state.meter.add(step([batch]))

    return once


def _same(batch):
    while True:
        yield batch


def _backbone_step(state: ClassifierState, mode: str | None):
    """The backbone's forward and backward pass, and nothing else."""
    backbone, bf16 = state.objective.classifier.backbone, state.bf16
    parameters = [p for p in backbone.parameters() if p.requires_grad]

    def once(batch):
        images = batch["images"]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            features = backbone(images if bf16 else images.to(parameters[0].dtype))
        return torch.autograd.grad(features.float().square().mean(), parameters, allow_unused=True)

    return torch.compile(once, mode=mode, fullgraph=True) if mode else once


class ClosedHead(FlowHead):
    """The flow head in vectorised plain PyTorch."""

    def forward(self, x):
        values = [value for coupling in self.couplings for value in coupling.tensors()]
        return FlowOutput(*closed_head(x, self.means, self.rho, self.mixture_logits, *values))


# ---- the published step


class PublishedFlow(nn.Module):
    """x: (N, D) -> z (N, D), logdet (N,), class_log_prob (N, K), log_prob (N,), as published: full width, with masks.

    Its means, rho and shares are plain tensors, whose gradients nothing clears.
    """

    def __init__(self, head: FlowHead):
        super().__init__()
        d, layers = head.features, []
        for coupling in head.couplings:
            first, _, dropout, middle, _, last = coupling.net
            kept, changed = (half.flatten() for half in coupling.split(torch.arange(d)[None]))
            net = nn.Sequential(
                nn.Linear(d, first.out_features), nn.ReLU(), nn.Dropout(dropout.p), copy.deepcopy(middle), nn.ReLU(),
                nn.Linear(middle.out_features, 2 * d),
            )  # fmt: skip
            net.gain = nn.Parameter(torch.ones(d))
            rows = torch.cat((changed, d + changed))
            with torch.no_grad():
                net[0].weight[:, kept], net[0].bias[:] = first.weight, first.bias
                net[5].weight[rows], net[5].bias[rows] = last.weight, last.bias
                net.gain[changed] = coupling.gain
            layers.append(net)
        self.layers = nn.ModuleList(layers).to(head.means.device)
        self.prior = [value.detach().clone().requires_grad_() for value in head.prior_parameters()]

    def forward(self, x):
        d, logdet = x.shape[1], 0
        for j, net in enumerate(self.layers):
            mask = torch.zeros(d)
            mask[slice(d // 2, None) if j % 2 else slice(None, d // 2)] = 1
            mask = mask.to(x.device)
            s, t = net(x * mask).chunk(2, 1)
            s, t = net.gain * s.tanh() * (1 - mask), t * (1 - mask)
            scale = s.exp()
            if torch.isnan(scale).any():
                raise RuntimeError("the scale is not a number")
            x = x * mask + (x * (1 - mask) + t) * scale * (1 - mask)
            logdet = logdet + s.sum(1)
        log_prob = torch.logsumexp(self.class_log_prob(x), 1)  # the density and the logits are computed separately
        return x, logdet, self.class_log_prob(x), log_prob + logdet

    def class_log_prob(self, z):
        means, rho, logits = self.prior
        eye = torch.eye(z.shape[1], device=z.device)
        normals = [
            torch.distributions.MultivariateNormal(mean, F.softplus(r) ** 2 * eye)
            for mean, r in zip(means, rho, strict=True)
        ]
        log_prob = torch.stack([normal.log_prob(z) for normal in normals], 1)
        return log_prob + torch.log(F.softmax(logits, 0) + 1e-6)


def published_step(state: ClassifierState):
    """-> a function of a batch (fp32, made contiguous) that takes the published step and returns its loss."""
    config, classifier = state.config, state.objective.classifier
    flow = PublishedFlow(state.flows[0]) if state.flows else None
    sgd = torch.optim.SGD(
        decay_groups(classifier, config.weight_decay), lr=config.lr, momentum=0.9, nesterov=True
    )  # fmt: skip
    averaged = state.ema.module.classifier
    if flow:
        adamw = torch.optim.AdamW(
            [*flow.parameters(), *flow.prior], lr=config.flow_lr, weight_decay=config.weight_decay
        )
    queue, read = [], []

    def once(batch):
        images, y, u_y = batch["images"].contiguous(), batch["y"], batch["u_y"]
        b, n, groups = len(y), len(u_y), 2 * config.uratio + 1
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
            if config.one_hot:
                cross_entropy = F.cross_entropy(logits_strong, label, reduction="none")
            else:
                cross_entropy = -(q * logits_strong.log_softmax(1)).sum(1)
            loss_u = (cross_entropy * weight).mean()
            loss_f = F.cross_entropy(flow_x[2], y)
            loss_n = -(flow_u[3] - features.shape[1] * math.log(256)).mean()
            r = min(state.step // 1024 * 1024 / max(config.warmup_flow, 1), 1)
            loss = loss_x + config.lambda_u * loss_u
            loss = loss + r * config.lambda_flow * loss_f + r * config.lambda_flow_unsup * loss_n
        else:
            mask = confidence.ge(config.p_cutoff).float()
            loss_u = (F.cross_entropy(logits_strong, label, reduction="none") * mask).mean()
            loss = loss_x + config.lambda_u * loss_u
            weight = mask
        sgd.zero_grad()
        if flow:
            flow.zero_grad()
        loss.backward()
        sgd.step()
        if flow:
            nn.utils.clip_grad_norm_(flow.parameters(), config.clip)
            adamw.step()
        with torch.no_grad():
            current, ours = classifier.state_dict(), averaged.state_dict()
            for name, _ in averaged.named_parameters():
                ours[name].copy_(ours[name] * config.ema_decay + (1 - config.ema_decay) * current[name])
            for name, _ in averaged.named_buffers():
                ours[name].copy_(current[name])
        right = label.eq(u_y).float()
        read[:] = [value.item() for value in (loss, loss_x, loss_u, weight.mean(), right.mean(), confidence.mean())]
        state.step += 1
        return loss.detach()

    return once


def interleave(x, size: int):
    """x: (N, ...) -> the same rows, every size-th one together; a second call with N / size restores their order."""
    return x.reshape(-1, size, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def check_agreement(config: Config, device: torch.device) -> None:
    """Raises RuntimeError where the three steps do not find the same losses and averages from the same weights on."""
    config = config.model_copy(
        update={**PUBLISHED, "batch_size": 8, "dropout": 0.0, "ema_decay": 0.9, "augment_backend": "pil"}
    )
    found = {}
    for name in ("published", "closed form", "normatch"):
        state = fresh_state(config, device)
        state.step = 2048  # the flow losses count
        state.clock.fill_(state.step)
        for flow in state.flows if name == "closed form" else ():
            flow.__class__ = ClosedHead
        batch, before = next(state.batches(0)), copy.deepcopy(state.ema.module.classifier)
        if name == "published":
            step = published_step(state)
            found[name] = [step(batch).item() for _ in range(2)]
        else:
            step = TrainStep(state)
            found[name] = [step([batch])[0, 0].item() for _ in range(2)]
        pairs = zip(state.ema.module.classifier.parameters(), before.parameters(), strict=True)
        found[name].append(sum((after - first).abs().sum() for after, first in pairs).item())
    # The published negative log-likelihood holds a constant, D ln 256, times r = 0.4 and its weight of about 1e-6.
    wanted = found["published"]
    if not all(
        math.isclose(a, b, rel_tol=2e-3) for values in found.values() for a, b in zip(values, wanted, strict=True)
    ):
        raise RuntimeError(f"the steps do not agree: loss, loss after a step, path of the average: {found}")


# ---- where the time goes


def breakdown(config: Config, device: torch.device, rounds: int) -> dict[str, float]:
    """part -> the median seconds of our eager step that it takes, the device waited for after each."""
    state = fresh_state(config, device)
    batches, objective, laps = state.batches(0), state.objective, Laps(device.type)
    sgd, adamw = state.optimizers["optimizer"], state.optimizers.get("flow_optimizer")
    flow_parameters = adamw.trained if adamw else []
    try:
        for round_ in range(rounds + 2):
            if round_ == 2:  # the first two warm up
                laps.times.clear()
            state.begin_step()
            laps.start()
            batch = next(batches)
            laps.end("data")
            features, logits = forward(state, batch["images"])
            laps.end("backbone forward")
            seen_x, seen_y = (value.detach().float().requires_grad_() for value in (features, logits))
            if adamw:
                laps.start()
                outputs = [flow(seen_x[: len(batch["y"]) + len(batch["u_y"])].detach()) for flow in state.flows]
                torch.autograd.grad(
                    sum(out.class_log_prob.sum() + out.log_prob.sum() for out in outputs), flow_parameters
                )
                laps.end("flow head, both ways")
            loss, metrics = objective.method(seen_x, seen_y, batch["y"], batch["u_y"], state.clock)
            gradient, *of_flows = torch.autograd.grad(loss, [seen_y, *flow_parameters])
            laps.end("loss, both ways")
            of_classifier = torch.autograd.grad(logits, sgd.trained, gradient.to(logits.dtype), allow_unused=True)
            laps.end("backbone backward")
            sgd.step(of_classifier)
            laps.end("SGD")
            if adamw:
                adamw.step(of_flows)
                laps.end("AdamW of the flow")
            state.ema.update(objective)
            laps.end("average")
            state.meter.add(torch.stack(list(metrics.values())))
            laps.end("metrics")
            state.step += 1
    finally:
        batches.close()
    medians = {name: statistics.median(found) for name, found in laps.times.items()}
    if adamw:  # the method's forward and backward pass holds the head's
        medians["loss, both ways"] = max(0.0, medians["loss, both ways"] - medians["flow head, both ways"])
    return medians


class Laps:
    """Seconds between one call and the next, by name; waits for the device."""

    def __init__(self, device: str):
        self.device, self.times = device, {}

    def start(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.tick = time.perf_counter()

    def end(self, name: str):
        before = self.tick
        self.start()
        self.times.setdefault(name, []).append(self.tick - before)


def forward(state: ClassifierState, images):
    with torch.autocast(images.device.type, torch.bfloat16, enabled=state.bf16):
        return state.objective.classifier(images if state.bf16 else images.float())
