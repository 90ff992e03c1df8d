"""The measuring harness: check agreement, then time all providers in turns in one process, and report medians.

Shared machines and varying clocks make timings comparable only within one process. Providers therefore alternate, so
that a disturbance hits all of them alike, and rates are given as a share of a large copy measured beside them.
"""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SLICE = 0.02  # seconds of one provider's turn
LONG = 0.5  # seconds
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}

# ---- what is measured


@dataclass(frozen=True)
class Case:
    """One op in one direction at one size; `bytes` and `flop` are what the mathematics needs, for every provider."""

    op: str
    direction: str  # forward, inverse, backward, or training: forward and backward
    size: str
    elements: int  # orders the cases in the plot
    dtype: torch.dtype
    providers: dict[str, Callable]
    inputs: Callable[[str], list[Tensor]]  # device -> fresh ones
    bytes: int
    flop: int
    few_rows: bool = True  # whether the first rows of the inputs suffice to check agreement
    loss: Callable[..., Tensor] | None = None  # of the outputs; without it output gradients are random

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.size} {str(self.dtype).removeprefix('torch.')}"


def outputs_of(result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def make_call(op, inputs: list[Tensor], direction: str, loss=None) -> Callable[[], list[Tensor]]:
    """The function to time: calls `op`, or computes its gradients, and returns the result."""
    if direction in ("forward", "inverse"):
        return torch.no_grad()(lambda: outputs_of(op(*inputs)))
    torch._functorch.config.donated_buffer = False  # allows a compiled backward to run repeatedly
    inputs = [value.detach().requires_grad_() for value in inputs]
    outputs = outputs_of(op(*inputs))
    if loss:
        leaves = [out.detach().requires_grad_() for out in outputs]
        grads = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    else:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    used = [i for i, grad in enumerate(grads) if grad is not None]
    grads = [grads[i] for i in used]

    def gradients(outputs, keep=False):
        return list(torch.autograd.grad([outputs[i] for i in used], inputs, grads, retain_graph=keep))

    if direction == "backward":
        return lambda: gradients(outputs, keep=True)
    return lambda: gradients(outputs_of(op(*inputs)))


def check_agreement(case: Case, provider: str, inputs: list[Tensor]) -> None:
    """Raises RuntimeError if a provider is further from the closed form in float64 than its dtype explains.

    Output gradients are random here, so that every output's gradient is checked, whichever of them a loss uses.
    """
    rows = max(len(value) for value in inputs)
    few = [value[:16] if case.few_rows and value.dim() > 1 and len(value) == rows > 256 else value for value in inputs]
    for _ in range(3):  # gradients jump where a ReLU's input is within rounding of 0, but hardly at three points
        exact = make_call(case.providers["closed"], [value.double() for value in few], case.direction)()
        results = make_call(case.providers[provider], few, case.direction)()
        pairs = zip(results, exact, strict=True)
        worst = max(((got.double() - want).abs().max() / want.abs().max()).item() for got, want in pairs)
        if worst < TOLERANCE[case.dtype]:
            return
        few = [value + 1e-3 * torch.randn_like(value) for value in few]
    raise RuntimeError(f"{case.name}: {provider} is wrong, by {worst:.2g} of the largest value")


class _Operations(TorchDispatchMode):
    """Counts the operations dispatched to kernels, views excluded: each is at least one launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(call: Callable) -> int:
    with _Operations() as counter:
        call()
    return counter.count


def launches(call: Callable) -> int:
    """The number of kernels that one call launches on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


# ---- clocks


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable, device: str, repeat: int = 1) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def side_by_side(
    calls: Mapping, device: str, rounds: int, repeat: int | None = None, warmup: int = 2, pause: Mapping | None = None
) -> dict[str, list[float]]:
    """name -> seconds per call in each round; the calls alternate.

    repeat: calls per turn. By default as many as take `SLICE` seconds, with at most three rounds of calls that take
    longer than `LONG`.   pause: name -> seconds to wait after a turn, for providers with work in the background.
    """
    times, latest = {name: [] for name in calls}, {}
    for turn in range(-warmup, rounds):
        for name, call in calls.items():
            if turn < 0:
                latest[name] = seconds(call, device)
            elif repeat or latest[name] < LONG or turn < 3:
                count = repeat or max(1, min(1000, int(SLICE / latest[name])))
                times[name].append(seconds(call, device, count))
            if pause and name in pause:
                time.sleep(pause[name])
    return times


def medians(times: Mapping) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


class Laps:
    """Seconds from one call to the next, by name; waits for the device."""

    def __init__(self, device: str):
        self.device, self.times = device, {}

    def start(self):
        synchronize(self.device)
        self.tick = time.perf_counter()

    def end(self, name: str):
        before = self.tick
        self.start()
        self.times.setdefault(name, []).append(self.tick - before)


# ---- the machine


def keep_memory() -> None:
    """Makes the C library keep freed memory, so that large results reuse pages the process already has.

    By default blocks above some 32 MB are returned to the system and mapped again, page by page, each one cleared
    first: for results of that size this takes far longer than any provider's computation.
    """
    trim_threshold, mmap_max = -1, -4  # of mallopt(3)
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
    except (OSError, AttributeError):  # a C library without mallopt
        pass


def copy_roof(device: str, fresh: bool = False) -> float:
    """Bytes per second, read and written, of the fastest of many large copies into existing memory.

    With `fresh`: the median of copies into newly allocated memory.
    """
    source = torch.ones(1 << 25, device=device)
    if fresh:
        return 2 * source.nbytes / statistics.median(seconds(source.clone, device) for _ in range(5))
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(30))


def machine(device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "capability": None if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---- records


def rates(moved: int, flop: int, seconds: float, roof: float) -> dict[str, float]:
    return {
        "gb_per_s": moved / seconds / 1e9,
        "percent_of_copy": 100 * moved / seconds / roof,
        "gflop_per_s": flop / seconds / 1e9,
    }


def compare(case: Case, device: str, rounds: int, leave_out=()) -> list[dict]:
    """One record per provider, with the median of its rounds; a large copy takes turns with them, as their roof."""
    torch.manual_seed(0)
    inputs = case.inputs(device)
    names = [name for name in case.providers if name not in leave_out]
    torch._dynamo.reset()
    for name in names:
        check_agreement(case, name, inputs)
    calls = {name: make_call(case.providers[name], inputs, case.direction, case.loss) for name in names}
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    times = side_by_side({**calls, "copy": lambda: target.copy_(source)}, device, rounds)
    roof = 2 * source.nbytes / statistics.median(times["copy"])
    records = []
    for name, call in calls.items():
        median = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else (median,) * 3
        records.append({
            "case": case.name, "op": case.op, "direction": case.direction, "size": case.size,
            "elements": case.elements, "dtype": str(case.dtype).removeprefix("torch."), "provider": name,
            "seconds": median, "quartiles": [low, high], "rounds": len(times[name]),
            "bytes": case.bytes, "flop": case.flop, **rates(case.bytes, case.flop, median, roof),
            "operations": None if "compiled" in name else operations(call),
            "launches": launches(call) if device == "cuda" else None,
        })  # fmt: skip
    return records
