"""Training, from configuration to summary, in reading order."""

import math
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from tqdm import tqdm

from . import __version__, distributed, ops
from .backbones import Classifier, build_backbone
from .config import Config, make_config
from .data import load_dataset, make_split
from .errors import Interrupted, UserError
from .evaluation import accuracy
from .loader import StepViews, choose_backend, make_batches
from .methods import METHODS
from .optim import EMA, cosine_7_16, decay_groups
from .plot import leave_figure
from .run import Run, device_name


@dataclass(frozen=True)
class Result:
    """What a run gives back: its folder, and the content of its summary.json."""

    out: Path
    summary: dict

    @property
    def test_accuracy(self) -> float:
        """Percent, of the averaged weights on the test set."""
        return self.summary["test_accuracy"]


def train(config: Config | dict | str | None = None, backbone: nn.Module | str | None = None, **keys) -> Result:
    """Train as `config` says (a Config, a preset's name, or a dict of keys), leave a run folder, return its summary.

    `keys` win over `config`. `backbone`: any module from images (N, 3, H, W) to features (N, D) or maps (N, D, h, w),
    in place of the one that the configuration names. Raises `UserError` for what the user can mend.
    """
    if isinstance(backbone, str):
        keys["backbone"], backbone = backbone, None
    if isinstance(config, Config):
        config = make_config(**{**config.model_dump(), **keys}) if keys else config
    elif isinstance(config, str):
        config = make_config(config, **keys)
    else:
        config = make_config(**{**(config or {}), **keys})

    # ---- What there is to train on. All that can be wrong is found before the run folder is touched.
    device = distributed.start(config.device)
    run = Run(config)
    checkpoint = run.checkpoint_to_resume(config)
    dataset = load_dataset(config.dataset, config.data_dir, config.download, config.image_size, config.compat)
    split = make_split(dataset, config.num_labels, config.seed, config.num_val)
    held_out = len(split.validation)
    uratio = config.uratio if METHODS[config.method].uses_unlabeled else 0
    rank, ranks = distributed.rank(), distributed.ranks()
    choose_backend(config.augment_backend, device)
    views = StepViews(dataset, split, config.augment, config.seed, config.batch_size, uratio, rank, ranks)

    # ---- What is trained.
    torch.manual_seed(config.seed)
    state = TrainingState(config, dataset, backbone, device)
    if rank:
        torch.manual_seed(config.seed + rank)  # the weights are everyone's, dropout is each process's own
    if checkpoint:
        state.load(checkpoint, split)
    start = state.step
    distributed.barrier()  # all have looked at the run folder
    run.open(config, device, start)
    run.save_split(split)
    if run.source and not run.best.exists():
        state.best = None
    if config.progress and rank == 0:
        print(yaml.safe_dump(config.model_dump(), sort_keys=False), file=sys.stderr)

    # ---- The loop.
    forward = torch.compile(state.objective) if config.compile else state.objective
    bf16 = uses_bf16(config.precision, device)
    batches = make_batches(
        views,
        start,
        config.steps,
        config.augment_backend,
        device,
        torch.bfloat16 if bf16 else torch.float32,
        config.num_workers,
    )
    if rank == 0:
        print(f"augmentation: {batches.backend} ({batches.reason})", file=sys.stderr)
    images_per_step = config.batch_size * (1 + 2 * uratio)
    report = Progress(config, start)
    clock = Clock(state.seconds)
    state.objective.train()
    stop = StopRequest()
    try:
        while state.step < config.steps:
            clock.start_step()
            batch = next(batches)
            clock.data_arrived()

            lr = state.begin_step()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                images = batch["images"].double() if config.precision == "fp64" else batch["images"]
                loss, metrics = forward(images, batch["y"], batch["u_y"], torch.tensor(state.step))
            loss.backward()
            distributed.average_gradients(state.objective.parameters())
            state.update()
            state.meter.add({"loss": torch.stack((loss.detach(), torch.ones_like(loss))), **metrics})
            clock.step_done()

            last = state.step == config.steps
            evaluating = last or state.step % config.eval_every == 0
            logging = evaluating or state.step % config.log_every == 0
            if logging:
                values = {**state.meter.read(), "lr": lr, **clock.read(images_per_step)}
                # One NaN in the window makes its mean NaN. Weights are looked at where they are about to be saved.
                if not math.isfinite(values["loss"]) or (evaluating and not state.finite()):
                    raise not_finite(state.step, run)
                run.log(state.step, "train", values)
                report.train(state.step, values)
            else:
                report.advance(state.step)

            if evaluating:
                scores = state.evaluate(dataset, split, last)
                run.log(state.step, "eval", scores)
                chosen = scores["val_accuracy" if held_out else "test_accuracy"]
                improved = state.best is None or chosen > state.best["accuracy"]
                if improved:
                    state.best = {"accuracy": chosen, "step": state.step}
                report.evaluation(state.step, scores)
                state.seconds = clock.total()
                run.save(state.content(split), improved)
            # Processes agree on when to stop at log points only, where they wait for each other anyway.
            if stop.agreed(ask=ranks == 1 or logging) and not last:
                if not evaluating:
                    if not state.finite():
                        raise not_finite(state.step, run)
                    state.seconds = clock.total()
                    run.save(state.content(split), improved=False)
                raise Interrupted(
                    f"stopped at step {state.step} of {config.steps}, which is saved: "
                    f"go on with --resume auto --out {run.folder}",
                    stop.signal or signal.SIGTERM,
                )
    except ValueError as error:  # the ops look for NaN themselves on the CPU
        if isinstance(error, UserError) or state.finite():
            raise
        raise not_finite(state.step, run) from error
    except OSError as error:
        raise UserError(f"the run stopped at step {state.step}, its checkpoints are intact: {error}") from error
    finally:
        stop.restore()
        batches.close()
        report.close()
        run.close()

    # ---- The summary.
    best_test = state.best["accuracy"]
    if held_out:  # the test set is touched here only: the last weights above, the chosen ones now
        distributed.barrier()
        state.ema.module.load_state_dict(torch.load(run.best, map_location=device, weights_only=True)["ema"])
        best_test = state.evaluate(dataset, split, last=True)["test_accuracy"]
    summary = {
        "method": config.method,
        "dataset": dataset.name,
        "num_labels": config.num_labels,
        "seed": config.seed,
        "steps": config.steps,
        "protocol": VALIDATION_PROTOCOL.format(held_out) if held_out else PAPER_PROTOCOL,
        "test_accuracy": scores["test_accuracy"],
        "test_accuracy_flow": scores.get("test_accuracy_flow"),
        "best_test_accuracy": best_test,
        "best_step": state.best["step"],
        "pseudo_label_accuracy": values.get("pseudo_label_accuracy"),
        "seconds_total": state.seconds,
        "seconds_per_step": clock.median(),
        "views_per_second": images_per_step / clock.median(),
        "data_wait": clock.data_share(),
        "device": device_name(device),
        "augment_backend": batches.backend,
        "ops_backend": ops.backend()[0],
        "resumed_from_step": start if checkpoint else None,
        "split_sha256": split.sha256,
        "out": str(run.folder),
    }
    run.write_summary(summary)
    if rank == 0:
        leave_figure(run.folder)
    return Result(run.folder, summary)


PAPER_PROTOCOL = "paper: test set at every evaluation, best of them"
VALIDATION_PROTOCOL = "validation on {} training images; test set at the end, for the last and the chosen weights"


def not_finite(step: int, run: Run) -> UserError:
    kept = f"; the last good checkpoint is {run.last}" if run.last.exists() else ""
    return UserError(
        f"loss or weights became NaN or infinite before step {step}{kept}: lower --lr, or --precision fp32"
    )


class Objective(nn.Module):
    """x: (B + 2 N_u, 3, H, W), y: (B,), u_y: (N_u,) -> loss, metrics: all that is trained, averaged and saved."""

    def __init__(self, classifier: nn.Module, method: nn.Module):
        super().__init__()
        self.classifier = classifier
        self.method = method

    def forward(self, x, y, u_y, step):
        features, logits = self.classifier(x)
        with torch.autocast(x.device.type, enabled=False):  # losses and likelihoods are not for bf16
            dtype = self.classifier.fc.weight.dtype
            return self.method(features.to(dtype), logits.to(dtype), y, u_y, step)


class TrainingState:
    """All that changes during a run, and therefore all that a checkpoint holds.

    SGD with Nesterov momentum trains the classifier, AdamW the flow heads; the average follows both.
    """

    def __init__(self, config: Config, dataset, backbone: nn.Module | None, device: torch.device):
        self.config, self.dataset, self.device = config, dataset, device
        image_size = dataset.train_images.shape[1]
        self.backbone = "given" if backbone else "named"
        if backbone is None:
            transition = "raw" if config.compat == "reference" else "activated"
            backbone = build_backbone(config.backbone, transition, config.bn_momentum, image_size)
        classifier = Classifier(backbone, len(dataset.classes), image_size)
        method = METHODS[config.method](classifier.features, len(dataset.classes), config)
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.objective = Objective(classifier, method).to(device, dtype)
        if config.channels_last:
            classifier.to(memory_format=torch.channels_last)
        if config.sync_bn:
            distributed.synchronize_batch_norm(classifier)
        self.optimizer = torch.optim.SGD(
            decay_groups(classifier, config.weight_decay), lr=config.lr, momentum=0.9, nesterov=True, fused=True
        )
        self.flows = method.flows
        self.flow_optimizer = None
        if self.flows:
            self.flow_optimizer = torch.optim.AdamW(
                self.flows.parameters(), lr=config.flow_lr, weight_decay=config.weight_decay, fused=True
            )
        self.ema = EMA(self.objective, config.ema_decay)
        self.meter = Meter()  # of the steps since the last log point
        self.step = 0  # optimiser steps done
        self.best = None  # {"accuracy", "step"} of the best evaluation
        self.seconds = 0.0  # of training so far, evaluations included

    def begin_step(self) -> float:
        """Put this step's learning rates into both optimisers; returns the classifier's."""
        if self.flows and self.config.compat == "reference" and self.step >= 1024:
            # The published test() puts the flow into evaluation mode and nothing takes it out: dropout ends there.
            self.flows.eval()
        factor = cosine_7_16(self.step, self.config.steps, self.config.warmup)
        for optimizer, lr in ((self.optimizer, self.config.lr), (self.flow_optimizer, self.config.flow_lr)):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = lr * factor
        return self.config.lr * factor

    def update(self):
        """One step of both optimisers and of the average, from the gradients that are there."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.flow_optimizer:
            update_flows(self.flows, self.flow_optimizer, self.config.clip, self.config.compat == "reference")
        self.ema.update(self.objective)
        self.step += 1

    def evaluate(self, dataset, split, last: bool) -> dict:
        """Accuracy of the averaged weights, in percent: on the validation images, or if there are none on the test set.

        At the end of a run (`last`) on the test set in any case.
        """
        averaged = self.ema.module
        # The published flow has no average: the live one then sees the averaged features.
        method = self.objective.method if self.config.compat == "reference" else averaged.method
        training = method.training
        method.eval()
        scores = {}
        if len(split.validation):
            images, labels = dataset.train_images[split.validation], dataset.train_labels[split.validation]
            scores |= accuracy(averaged.classifier, method.flows, images, labels, dataset.mean, dataset.std, "val")
        if last or not len(split.validation):
            images, labels = dataset.test_images, dataset.test_labels
            scores |= accuracy(averaged.classifier, method.flows, images, labels, dataset.mean, dataset.std)
        method.train(training)
        return scores

    def finite(self) -> bool:
        """Whether all weights are numbers. Waits for the device."""
        return all(bool(p.isfinite().all()) for p in self.objective.parameters())

    def content(self, split) -> dict:
        """The checkpoint: tensors and plain values, so that it loads with weights_only=True."""
        return {
            "normatch": __version__,
            "config": self.config.model_dump(),
            "backbone": self.backbone,
            "classes": list(self.dataset.classes),
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "image_size": self.dataset.train_images.shape[1],
            "split": split.sha256,
            "held_out": len(split.validation),
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "meter": self.meter.total,
            "model": self.objective.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "flow_optimizer": self.flow_optimizer.state_dict() if self.flow_optimizer else None,
            # The published code adds them up over the whole run; otherwise there are none between steps.
            "prior_gradients": [p.grad for flow in self.flows for p in flow.prior_parameters()],
            # Views and batch order are functions of the step; these generators draw dropout and the sampled voter.
            "rng": distributed.gather(torch.get_rng_state()),
            "rng_cuda": distributed.gather(self._cuda_rng()),
        }

    def load(self, content: dict, split):
        """Go on from a checkpoint. Raises `UserError` where it does not belong to this run."""
        if content["split"] != split.sha256:
            raise UserError("the checkpoint was trained on other labelled images than this data set and seed give")
        if content["step"] >= self.config.steps:
            raise UserError(
                f"this run has finished: its checkpoint is of step {content['step']} of {self.config.steps}"
            )
        self.objective.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.flow_optimizer:
            self.flow_optimizer.load_state_dict(content["flow_optimizer"])
            priors = [p for flow in self.flows for p in flow.prior_parameters()]
            for parameter, gradient in zip(priors, content["prior_gradients"], strict=True):
                parameter.grad = None if gradient is None else gradient.to(self.device)
        self.step, self.best, self.seconds = content["step"], content["best"], content["seconds"]
        self.meter.total = None if content["meter"] is None else content["meter"].to(self.device)
        rank = distributed.rank()
        if len(content["rng"]) != distributed.ranks():  # of another number of processes: new streams from here on
            torch.manual_seed(hash((self.config.seed, self.step, rank)))
            return
        torch.set_rng_state(content["rng"][rank])
        if self.device.type == "cuda" and content["rng_cuda"][rank] is not None:
            torch.cuda.set_rng_state(content["rng_cuda"][rank], self.device)

    def _cuda_rng(self) -> torch.Tensor | None:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None


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


class Meter:
    """Adds up the metrics of each step on the device, and reads them back at log points only."""

    def __init__(self):
        self.total = None

    def add(self, metrics: dict[str, torch.Tensor]):
        self.names = list(metrics)
        stacked = torch.stack(list(metrics.values()))
        self.total = stacked if self.total is None else self.total + stacked

    def read(self) -> dict[str, float]:
        """The averages since the last call; a metric that nothing was counted for is left out."""
        totals = distributed.sum_(self.total).tolist()
        values = {name: total / count for name, (total, count) in zip(self.names, totals, strict=True) if count}
        self.total = None
        return values


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that the step in progress ends and is saved; a second SIGINT ends at once."""

    def __init__(self):
        self.signal = None
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def agreed(self, ask: bool) -> int | None:
        """The signal that any process was sent; `ask` says whether this is the moment to ask the others."""
        if not ask:
            return None
        numbers = distributed.gather(self.signal)
        return next((number for number in numbers if number), None)

    def _remember(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Clock:
    """Times each step and the wait for its data, in seconds."""

    def __init__(self, before: float):
        self.began = time.perf_counter() - before
        self.steps, self.waits = [], []
        self.read_until = 0

    def start_step(self):
        self.tick = time.perf_counter()

    def data_arrived(self):
        self.waits.append(time.perf_counter() - self.tick)

    def step_done(self):
        self.steps.append(time.perf_counter() - self.tick)

    def read(self, images_per_step: int) -> dict[str, float]:
        """Speed since the last call."""
        steps, waits = self.steps[self.read_until :], self.waits[self.read_until :]
        self.read_until = len(self.steps)
        return {
            "seconds_per_step": statistics.median(steps),
            "views_per_second": images_per_step * len(steps) / sum(steps),
            "data_wait": sum(waits) / sum(steps),
        }

    def median(self) -> float:
        return statistics.median(self.steps)

    def data_share(self) -> float:
        return sum(self.waits) / sum(self.steps)

    def total(self) -> float:
        return time.perf_counter() - self.began


class Progress:
    """A bar on a terminal, a line at each log point elsewhere, on standard error; nothing where progress is off."""

    def __init__(self, config: Config, start: int):
        self.config = config
        self.shown = config.progress and distributed.rank() == 0
        self.on_terminal = self.shown and sys.stderr.isatty()
        name = f"{config.method} on {config.dataset}, {config.num_labels} labels"
        self.bar = tqdm(total=config.steps, initial=start, desc=name, unit="step", disable=not self.on_terminal)
        self.began, self.start = time.perf_counter(), start
        self.accuracy = ""
        if self.shown and not self.on_terminal:
            print(f"{name}: step {start} of {config.steps}", file=sys.stderr)

    def advance(self, step: int):
        self.bar.update(step - self.bar.n)

    def train(self, step: int, values: dict):
        self.advance(step)
        text = f"loss {values['loss']:.3f}"
        if "mask_ratio" in values:
            text += f" mask {values['mask_ratio']:.2f}"
        if "pseudo_label_accuracy" in values:
            text += f" pseudo-labels {100 * values['pseudo_label_accuracy']:.1f}%"
        text += f" {values['views_per_second']:.0f} views/s data {100 * values['data_wait']:.0f}%{self.accuracy}"
        self.bar.set_postfix_str(text)
        if self.shown and not self.on_terminal:
            seconds = (time.perf_counter() - self.began) / (step - self.start) * (self.config.steps - step)
            eta = f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"
            print(f"step {step}/{self.config.steps} ETA {eta} {text}", file=sys.stderr)

    def evaluation(self, step: int, scores: dict):
        self.accuracy = " | " + " ".join(f"{name} {value:.2f}%" for name, value in scores.items())
        if self.shown and not self.on_terminal:
            print(f"step {step}/{self.config.steps}{self.accuracy}", file=sys.stderr)

    def close(self):
        self.bar.close()
