"""Training, from configuration to summary, in reading order."""

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from .. import ops
from ..config import Config, make_config, method_class
from ..errors import Interrupted, UserError
from ..methods import distributed
from ..methods.base import Method
from ..methods.density import DensityMethod
from ..tools.flow_figures import leave_figures
from ..tools.plot import leave_figure
from .report import Clock, Progress, StopRequest, Trace
from .run import Run, device_name
from .state import State
from .step import TrainStep


@dataclass(frozen=True)
class Result:
    """What a run returns: its folder, and the content of its summary.json."""

    out: Path
    summary: dict

    @property
    def test_accuracy(self) -> float:
        """Percent, of the averaged weights on the test set."""
        return self.summary["test_accuracy"]


def train(
    config: Config | dict | str | None = None,
    backbone: nn.Module | str | None = None,
    method: type[Method] | str | None = None,
    **keys,
) -> Result:
    """Train as `config` says (a Config, a preset's name, or a dict of keys), leave a run folder, return its summary.

    `keys` win over `config`. `backbone`: a name, or any module from images (N, 3, H, W) to features (N, D) or maps
    (N, D, h, w). `method`: a name, or a class of your own (`normatch.methods.base.Method`). Raises `UserError` for
    anything the user can fix.
    """
    if isinstance(backbone, str):
        keys["backbone"], backbone = backbone, None
    if method is not None:
        keys["method"] = method
    if isinstance(config, str):
        config = make_config(config, **keys)
    elif not isinstance(config, Config):
        config = make_config(**{**(config or {}), **keys})
    elif keys:
        config = make_config(config, **keys)
    cls = method_class(method if isinstance(method, type) else config.method)

    # ---- Data, method and checkpoint. Whatever can be wrong is noticed before the run folder is touched.
    device = distributed.start(config.device)
    run = Run(config)
    checkpoint = run.checkpoint_to_resume(config)
    torch.manual_seed(config.seed)
    state = State(config, cls, device, backbone)
    if distributed.rank():
        torch.manual_seed(config.seed + distributed.rank())  # all start from one set of weights, but draw own dropout
    if checkpoint:
        state.load(checkpoint)
    start = state.step
    check_same_start(run, state)
    run.open(config, device, start)
    run.save_split(state.split)
    if run.source and not run.best.exists():
        state.best = None
    if config.progress and distributed.rank() == 0:
        print(yaml.safe_dump(config.model_dump(), sort_keys=False), file=sys.stderr)

    session = Session(run, state)
    session.loop()
    summary = session.summary(start if checkpoint else None)
    run.write_summary(summary)
    if distributed.rank() == 0:
        leave_figure(run.folder)
        if isinstance(state.method, DensityMethod):
            leave_figures(run.folder, state.average.module, state.dataset, state.split)
    return Result(run.folder, summary)


def check_same_start(run: Run, state: State):
    """Make all processes start alike. Raises `UserError` where they found checkpoints of different steps."""
    steps = sorted(set(distributed.gather(state.step)))
    if len(steps) > 1:
        raise UserError(
            f"the processes found checkpoints of different steps, {' and '.join(map(str, steps))}: the run folder "
            f"{run.folder} must be one that all of them see"
        )
    for module in (state.method, state.average.module):  # a network of yours may start with other weights in each
        distributed.share((*module.parameters(), *module.buffers()))
    distributed.barrier()  # all have looked at the run folder


class Session:
    """The loop over the remaining steps of a run, and its summary."""

    def __init__(self, run: Run, state: State):
        self.run, self.state, self.config = run, state, state.config
        self.held_out = len(state.split.validation)
        self.batches = state.batches(state.step)
        self.clock = Clock(state.seconds, state.device)
        self.values, self.scores = {}, {}  # of the last log point, of the last evaluation

    def loop(self):
        """Train to the last step. Raises `UserError` for what stops a run early; its checkpoints are intact then."""
        config, state, run = self.config, self.state, self.run
        if distributed.rank() == 0:
            print(f"augmentation: {self.batches.backend} ({self.batches.reason})", file=sys.stderr)
        report, stop = Progress(config, state.step), StopRequest()
        trace = Trace(run.folder / "trace.json", state.device) if config.profile and distributed.rank() == 0 else None
        step = TrainStep(state, "default" if config.compile is True else config.compile or None)
        state.method.train()
        try:
            while state.step < config.steps:
                self.clock.start_step()
                micro_batches = [next(self.batches) for _ in range(config.accumulate)]
                self.clock.data_arrived()
                lr = state.begin_step()
                state.meter.add(step(micro_batches))
                self.clock.step_done()
                if trace:
                    trace.step_done()

                evaluating = state.step == config.steps or state.step % config.eval_every == 0
                logging = evaluating or state.step % config.log_every == 0
                if logging:
                    self.log(lr, evaluating)
                    report.train(state.step, self.values)
                else:
                    report.advance(state.step)
                if evaluating:
                    self.evaluate()
                    report.evaluation(state.step, self.scores)
                # Processes agree on when to stop at log points only, where they wait for each other anyway.
                if stop.agreed(ask=distributed.ranks() == 1 or logging) and state.step < config.steps:
                    self.stopped(stop.signal or signal.SIGTERM, saved=evaluating)
        except Exception as error:
            explained = self.explained(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            stop.restore()
            if trace:
                trace.close()
            self.batches.close()
            report.close()
            run.close()

    def log(self, lr: float, evaluating: bool):
        """Read the metrics back and write their line."""
        state = self.state
        self.values = {**state.meter.read(), "lr": lr, **self.clock.read(state.images_per_step)}
        # One NaN in the window makes its mean NaN. Weights are checked only where they are about to be saved.
        if not math.isfinite(self.values["loss"]) or (evaluating and not state.finite()):
            raise self.not_finite()
        self.run.log(state.step, "train", self.values)

    def evaluate(self):
        """Score the averaged weights, and save a checkpoint."""
        state = self.state
        # Statistics of BatchNorm that is not synced differ between processes: judge what the checkpoint holds.
        distributed.share(state.average.module.buffers())
        self.scores = state.evaluate(state.step == self.config.steps)
        self.run.log(state.step, "eval", self.scores)
        chosen = self.scores["val_accuracy" if self.held_out else "test_accuracy"]
        improved = state.best is None or chosen > state.best["accuracy"]
        if improved:
            state.best = {"accuracy": chosen, "step": state.step}
        state.seconds = self.clock.total()
        self.run.save(state.content(), improved)

    def stopped(self, number: int, saved: bool):
        """Save the step and raise `Interrupted`."""
        state = self.state
        if not saved:
            if not state.finite():
                raise self.not_finite()
            state.seconds = self.clock.total()
            self.run.save(state.content(), improved=False)
        raise Interrupted(
            f"stopped at step {state.step} of {self.config.steps}, which is saved: "
            f"go on with --resume auto --out {self.run.folder}",
            number,
        )

    def not_finite(self) -> UserError:
        kept = f"; the last good checkpoint is {self.run.last}" if self.run.last.exists() else ""
        return UserError(
            f"loss or weights became NaN or infinite before step {self.state.step}{kept}: lower --lr, or "
            "--precision fp32"
        )

    def explained(self, error: Exception) -> Exception:
        """What stopped the loop -> the same, or a `UserError` that says what to do."""
        step = self.state.step
        if isinstance(error, UserError):
            return error
        if isinstance(error, ValueError) and not self.state.finite():  # the ops look for NaN themselves on the CPU
            return self.not_finite()
        if isinstance(error, torch.OutOfMemoryError):
            return UserError(
                f"the GPU's memory was full after step {step}, checkpoints are intact: take a smaller --batch_size or "
                "--uratio, or a larger --accumulate"
            )
        if self.config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = " ".join(str(error).split())[:300]
            return UserError(f"torch.compile fails here: leave --compile out; {reason}")
        if isinstance(error, OSError):
            return UserError(f"the run stopped at step {step}, its checkpoints are intact: {error}")
        return error

    def summary(self, resumed_from: int | None) -> dict:
        """The content of summary.json."""
        state, config, clock = self.state, self.config, self.clock
        best_test = state.best["accuracy"]
        if self.held_out:  # the test set is touched here only: for the last weights above, the chosen ones now
            distributed.barrier()
            state.load_chosen(self.run.best)
            best_test = state.evaluate(last=True)["test_accuracy"]
        return {
            "method": config.method,
            "dataset": state.dataset.name,
            "num_labels": config.num_labels,
            "seed": config.seed,
            "steps": config.steps,
            "protocol": VALIDATION_PROTOCOL.format(self.held_out) if self.held_out else PAPER_PROTOCOL,
            "test_accuracy": self.scores["test_accuracy"],
            "test_accuracy_flow": self.scores.get("test_accuracy_flow"),
            "best_test_accuracy": best_test,
            "best_step": state.best["step"],
            "pseudo_label_accuracy": self.values.get("pseudo_label_accuracy"),
            "seconds_total": state.seconds,
            "seconds_per_step": clock.median(),
            "views_per_second": state.images_per_step / clock.median(),
            "data_wait": clock.data_share(),
            "device": device_name(state.device),
            "augment_backend": self.batches.backend,
            "ops_backend": ops.backend()[0],
            "resumed_from_step": resumed_from,
            "split_sha256": state.split.sha256,
            "out": str(self.run.folder),
        }


PAPER_PROTOCOL = "paper: test set at every evaluation, best of them"
VALIDATION_PROTOCOL = "validation on {} training images; test set at the end, for the last and the chosen weights"
