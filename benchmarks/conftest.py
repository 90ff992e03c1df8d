"""Benchmarks on pytest-benchmark: `pytest benchmarks`, or a part of them with `-k`.

One group per case; within it the providers side by side in one process: the published formulation, the closed form in
plain PyTorch (eager and compiled), and normatch. Every provider is first checked against float64 on fresh inputs.
The record (`--benchmark-json FILE`, `--benchmark-compare`) carries bytes, FLOP and percent of the measured roof.
"""

import time

import pytest
import torch
import torch._functorch.config
from torch.utils._python_dispatch import TorchDispatchMode

torch._functorch.config.donated_buffer = False  # so that a compiled backward can be timed alone, again and again
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collect_file(file_path, parent):
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_configure(config):
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    config.option.benchmark_sort = "name"


def synchronised(call):
    """`call`, finished: for a GPU, when its kernels are."""
    if DEVICE == "cpu":
        return call

    def run():
        call()
        torch.cuda.synchronize()

    return run


class _Operations(TorchDispatchMode):
    """Counts the operations dispatched to kernels: each is at least one launch on a GPU; views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(call) -> int:
    with _Operations() as counter:
        call()
    return counter.count


@pytest.fixture(scope="session")
def copy_roof():
    """Bytes per second, read and written, of the fastest of many large copies.

    Into new memory each time, as every functional op writes: on a CPU the kernel's page faults are most of its cost,
    and they are the same for every provider.
    """
    source = torch.empty(1 << 25, device=DEVICE).normal_()
    copy = synchronised(source.clone)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        copy()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


@pytest.fixture
def measure(benchmark, copy_roof):
    """measure(group, provider, call, moved, flop, **facts): time call() and record its rates."""

    def run(group, provider, call, moved, flop, **facts):
        benchmark.group = group
        benchmark(synchronised(call))
        seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")  # no stats: --benchmark-disable
        benchmark.extra_info.update(
            provider=provider,
            device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            bytes=moved,
            flop=flop,
            gb_per_s=round(moved / seconds / 1e9, 2),
            gflop_per_s=round(flop / seconds / 1e9, 2),
            percent_of_copy=round(100 * moved / seconds / copy_roof, 1),
            copy_gb_per_s=round(copy_roof / 1e9, 2),
            **facts,
        )

    return run
