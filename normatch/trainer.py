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

from . import distributed, ops
from .classifier import ClassifierState
from .config import Config, make_config
from .errors import Interrupted, UserError
from .flow_training import FLOW_METHODS, FlowState
from .run import Run, device_name
from .state import TrainingState, TrainStep
from .tools.plot import leave_figure


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

    # ---- What is trained, and on what. All that can be wrong is found before the run folder is touched.
    device = distributed.start(config.device)
    run = Run(config)
    checkpoint = run.checkpoint_to_resume(config)
    torch.manual_seed(config.seed)
    state = make_state(config, device, backbone)
    held_out = len(state.split.validation)
    rank, ranks = distributed.rank(), distributed.ranks()
    if rank:
        torch.manual_seed(config.seed + rank)  # the weights are everyone's, dropout is each process's own
    if checkpoint:
        state.load(checkpoint)
    start = state.step
    if len(found := set(distributed.gather(start))) > 1:
        raise UserError(
            f"the processes found checkpoints of different steps, {' and '.join(map(str, sorted(found)))}: the run "
            f"folder {run.folder} must be one that all of them see"
        )
    for module in (state.objective, state.ema.module):  # a network of one's own may start with other weights in each
        distributed.share((*module.parameters(), *module.buffers()))
    distributed.barrier()  # all have looked at the run folder
    run.open(config, device, start)
    run.save_split(state.split)
    if run.source and not run.best.exists():
        state.best = None
    if config.progress and rank == 0:
        print(yaml.safe_dump(config.model_dump(), sort_keys=False), file=sys.stderr)

    # ---- The loop.
    step = TrainStep(state, "default" if config.compile is True else config.compile or None)
    batches = state.batches(start)
    if rank == 0:
        print(f"augmentation: {batches.backend} ({batches.reason})", file=sys.stderr)
    report = Progress(config, start)
    clock = Clock(state.seconds, device)
    state.objective.train()
    stop = StopRequest()
    trace = Trace(run.folder / "trace.json", device) if config.profile and rank == 0 else None
    try:
        while state.step < config.steps:
            clock.start_step()
            parts = [next(batches) for _ in range(config.accumulate)]
            clock.data_arrived()

            lr = state.begin_step()
            state.meter.add(step(parts))
            clock.step_done()
            if trace:
                trace.step_done()

            last = state.step == config.steps
            evaluating = last or state.step % config.eval_every == 0
            logging = evaluating or state.step % config.log_every == 0
            if logging:
                values = {**state.meter.read(), "lr": lr, **clock.read(state.images_per_step)}
                # One NaN in the window makes its mean NaN. Weights are looked at where they are about to be saved.
                if not math.isfinite(values["loss"]) or (evaluating and not state.finite()):
                    raise not_finite(state.step, run)
                run.log(state.step, "train", values)
                report.train(state.step, values)
            else:
                report.advance(state.step)

            if evaluating:
                # BatchNorm that is not synced has statistics of its own in each: judged is what the checkpoint holds.
                distributed.share(state.ema.module.buffers())
                scores = state.evaluate(last)
                run.log(state.step, "eval", scores)
                chosen = scores["val_accuracy" if held_out else "test_accuracy"]
                improved = state.best is None or chosen > state.best["accuracy"]
                if improved:
                    state.best = {"accuracy": chosen, "step": state.step}
                report.evaluation(state.step, scores)
                state.seconds = clock.total()
                run.save(state.content(), improved)
            # Processes agree on when to stop at log points only, where they wait for each other anyway.
            if stop.agreed(ask=ranks == 1 or logging) and not last:
                if not evaluating:
                    if not state.finite():
                        raise not_finite(state.step, run)
                    state.seconds = clock.total()
                    run.save(state.content(), improved=False)
                raise Interrupted(
                    f"stopped at step {state.step} of {config.steps}, which is saved: "
                    f"go on with --resume auto --out {run.folder}",
                    stop.signal or signal.SIGTERM,
                )
    except ValueError as error:  # the ops look for NaN themselves on the CPU
        if isinstance(error, UserError) or state.finite():
            raise
        raise not_finite(state.step, run) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory was full after step {state.step}, checkpoints are intact: take a smaller --batch_size "
            "or --uratio, or a larger --accumulate"
        ) from error
    except RuntimeError as error:
        if not config.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"torch.compile fails here: leave --compile out; {reason}") from error
    except OSError as error:
        raise UserError(f"the run stopped at step {state.step}, its checkpoints are intact: {error}") from error
    finally:
        stop.restore()
        if trace:
            trace.close()
        batches.close()
        report.close()
        run.close()

    # ---- The summary.
    best_test = state.best["accuracy"]
    if held_out:  # the test set is touched here only: the last weights above, the chosen ones now
        distributed.barrier()
        state.load_chosen(run.best)
        best_test = state.evaluate(last=True)["test_accuracy"]
    summary = {
        "method": config.method,
        "dataset": state.dataset.name,
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
        "views_per_second": state.images_per_step / clock.median(),
        "data_wait": clock.data_share(),
        "device": device_name(device),
        "augment_backend": batches.backend,
        "ops_backend": ops.backend()[0],
        "resumed_from_step": start if checkpoint else None,
        "split_sha256": state.split.sha256,
        "out": str(run.folder),
    }
    run.write_summary(summary)
    if rank == 0:
        leave_figure(run.folder)
        state.leave_figures(run.folder)
    return Result(run.folder, summary)


def make_state(config: Config, device: torch.device, backbone: nn.Module | None = None) -> TrainingState:
    """The state that a run of this configuration starts from: what its family of methods trains."""
    if config.method in FLOW_METHODS:
        if config.accumulate > 1:
            raise UserError(f"method {config.method} takes a step's images at once: --accumulate 1")
        if config.sync_bn:
            raise UserError(f"method {config.method} has no BatchNorm over several processes: leave --sync_bn out")
        return FlowState(config, device)
    return ClassifierState(config, device, backbone)


PAPER_PROTOCOL = "paper: test set at every evaluation, best of them"
VALIDATION_PROTOCOL = "validation on {} training images; test set at the end, for the last and the chosen weights"


def not_finite(step: int, run: Run) -> UserError:
    kept = f"; the last good checkpoint is {run.last}" if run.last.exists() else ""
    return UserError(
        f"loss or weights became NaN or infinite before step {step}{kept}: lower --lr, or --precision fp32"
    )


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


class Trace:
    """A Chrome trace of `STEPS` steps, after the first few, which allocate and compile."""

    SKIPPED, STEPS = 5, 5

    def __init__(self, path: Path, device: torch.device):
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=self.SKIPPED - 1, warmup=1, active=self.STEPS, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        )
        self.left = self.SKIPPED + self.STEPS
        self.profiler.start()

    def step_done(self):
        if self.left:
            self.profiler.step()
            self.left -= 1
            if not self.left:
                self.profiler.stop()

    def close(self):
        if self.left:
            self.profiler.stop()
            print(f"normatch: no trace.json, which takes {self.SKIPPED + self.STEPS} steps", file=sys.stderr)


class Clock:
    """Times each step and the wait for its data, in seconds."""

    def __init__(self, before: float, device: torch.device):
        self.began = time.perf_counter() - before
        self.steps, self.waits = [], []
        self.read_until = 0
        self.on_gpu = device.type == "cuda"
        self.marks = []  # on a GPU, which works on when the host has long gone on: the start of a window, ends of steps

    def start_step(self):
        if self.on_gpu and not self.marks:
            self._mark()
        self.tick = time.perf_counter()

    def data_arrived(self):
        self.waits.append(time.perf_counter() - self.tick)

    def step_done(self):
        self.steps.append(time.perf_counter() - self.tick)
        if self.on_gpu:
            self._mark()

    def _mark(self):
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def read(self, images_per_step: int) -> dict[str, float]:
        """Speed since the last call. Waits for the device."""
        if self.marks:
            self.marks[-1].synchronize()
            pairs = zip(self.marks, self.marks[1:], strict=False)
            self.steps[self.read_until :] = [start.elapsed_time(end) / 1000 for start, end in pairs]
            self.marks = []
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
        name = f"{config.method} on {config.dataset}, {config.num_labels or 'all'} labels"
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
        self.accuracy = " | " + " ".join(
            f"{name} {value:.2f}{'%' * ('accuracy' in name)}" for name, value in scores.items()
        )
        if self.shown and not self.on_terminal:
            print(f"step {step}/{self.config.steps}{self.accuracy}", file=sys.stderr)

    def close(self):
        self.bar.close()
