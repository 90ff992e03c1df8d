"""What a run reports while it trains: progress, speed, a trace; and the signals that stop it."""

import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import Config
from ..methods import distributed


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that the current step ends and is saved; a second SIGINT ends at once."""

    def __init__(self):
        self.signal = None
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def agreed(self, ask: bool) -> int | None:
        """The signal that any process was sent; `ask` says whether to ask the others now."""
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
    """A Chrome trace of `STEPS` steps, after the first `SKIPPED`, which allocate and compile."""

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
        self.marks = []  # on a GPU, which runs behind the host: events around each step of a window

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
    """On standard error: a bar on a terminal, elsewhere a line per log point; nothing if progress is off."""

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
