"""How kernels are measured: agreement first, then every provider in turn, round after round; medians; against a roof.

Machines are shared and clocks wander, so a figure means something next to the others of its process only. A round runs
each provider once for about `SLICE` seconds, so that what disturbs one disturbs all.
"""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SLICE = 0.02
LONG = 0.5  # seconds
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One op in one direction at one size; `bytes` and `flop` are what the mathematics needs, for every provider."""

    op: str
    direction: str  # forward, inverse, backward, or training: forward and backward
    size: str
    elements: int  # places the case on the plot's axis
    dtype: torch.dtype
    providers: dict[str, Callable]
    inputs: Callable[[str], list[Tensor]]  # device -> fresh ones
    bytes: int
    flop: int
    few_rows: bool = True  # whether agreement can be judged on the first rows of the inputs

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.size} {str(self.dtype).removeprefix('torch.')}"


def outputs_of(result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def make_call(op, inputs: list[Tensor], direction: str) -> Callable[[], list[Tensor]]:
    """What is timed: a call of `op`, or of its gradients, that returns what it computes."""
    if direction in ("forward", "inverse"):

        def forward():
            with torch.no_grad():
                return outputs_of(op(*inputs))

        return forward
    inputs = [value.detach().requires_grad_() for value in inputs]
    outputs = outputs_of(op(*inputs))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    if direction == "backward":
        return lambda: list(torch.autograd.grad(outputs, inputs, grads, retain_graph=True))
    return lambda: list(torch.autograd.grad(outputs_of(op(*inputs)), inputs, grads))


def rate(value: Tensor, exact: Tensor) -> float:
    """Largest error, relative to the largest value."""
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def check_agreement(case: Case, provider: str, inputs: list[Tensor]) -> None:
    """Raises RuntimeError where a provider is further from the closed form in float64 than its dtype explains."""
    rows = max(len(value) for value in inputs)
    few = [value[:16] if case.few_rows and value.dim() > 1 and len(value) == rows > 256 else value for value in inputs]
    for _ in range(3):  # gradients jump where a ReLU's input is within rounding of 0: not near three points in a row
        exact = make_call(case.providers["closed"], [value.double() for value in few], case.direction)()
        found = make_call(case.providers[provider], few, case.direction)()
        worst = max(rate(got, want) for got, want in zip(found, exact, strict=True))
        if worst < TOLERANCE[case.dtype]:
            return
        few = [value + 1e-3 * torch.randn_like(value) for value in few]
    raise RuntimeError(f"{case.name}: {provider} is wrong, by {worst:.2g} of the largest value")


class _Operations(TorchDispatchMode):
    """Counts the operations dispatched to kernels: each is at least one launch on a GPU; views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(call: Callable) -> int:
    with _Operations() as counter:
        call()
    return counter.count


def launches(call: Callable) -> int | None:
    """Kernels that one call starts on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def seconds(call: Callable, device: str, repeat: int = 1) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def keep_memory() -> None:
    """Has the C library keep what is freed, so that large results lie in memory that the process has already.

    By default memory beyond some 32 MB goes back to the system each time and comes anew, page by page, each cleared
    first: for results of that size this takes far longer than computing them, whoever computes them.
    """
    trim_threshold, mmap_max = -1, -4  # of mallopt(3)
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
    except (OSError, AttributeError):  # another C library, with other habits
        pass


def copy_roof(device: str, fresh: bool = False) -> float:
    """Bytes per second, read and written, of the fastest of many large copies into memory that is there already.

    With `fresh`, into memory allocated for each of them, and their median.
    """
    source = torch.ones(1 << 25, device=device)
    if fresh:
        return 2 * source.nbytes / statistics.median(seconds(source.clone, device) for _ in range(5))
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(30))


def side_by_side(calls: dict[str, Callable], device: str, rounds: int) -> dict[str, list[float]]:
    """name -> seconds a call in each round; what takes longer than `LONG` has three rounds at most."""
    repeat, limit = {}, {}
    for name, call in calls.items():
        call()
        once = seconds(call, device)
        repeat[name] = max(1, min(1000, int(SLICE / once)))
        limit[name] = rounds if once < LONG else min(rounds, 3)
    times = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn < limit[name]:
                times[name].append(seconds(call, device, repeat[name]))
    return times


def compare(case: Case, device: str, rounds: int, leave_out=()) -> list[dict]:
    """One record a provider, with the median of its rounds; a large copy takes turns with them, as their roof."""
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # so that a compiled backward can be run again and again
    inputs = case.inputs(device)
    names = [name for name in case.providers if name not in leave_out]
    torch._dynamo.reset()
    for name in names:
        check_agreement(case, name, inputs)
    calls = {name: make_call(case.providers[name], inputs, case.direction) for name in names}
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    times = side_by_side({**calls, "copy": lambda: target.copy_(source)}, device, rounds)
    roof = 2 * source.nbytes / statistics.median(times["copy"])
    records = []
    for name, call in calls.items():
        median = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else (median,) * 3
        records.append(
            {
                "case": case.name, "op": case.op, "direction": case.direction, "size": case.size,
                "elements": case.elements, "dtype": str(case.dtype).removeprefix("torch."), "provider": name,
                "seconds": median, "quartiles": [low, high], "rounds": len(times[name]),
                "bytes": case.bytes, "flop": case.flop,
                "gb_per_s": case.bytes / median / 1e9, "percent_of_copy": 100 * case.bytes / median / roof,
                "gflop_per_s": case.flop / median / 1e9,
                "operations": None if "compiled" in name else operations(call),
                "launches": launches(call) if device == "cuda" else None,
            }
        )  # fmt: skip
    return records


def machine(device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "capability": None if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
