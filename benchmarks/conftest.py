"""Benchmarks on pytest-benchmark: `pytest benchmarks`, or a part of them with `-k`.

One group per case; within it the providers side by side in one process: the published formulation, the closed form in
plain PyTorch (eager and compiled), and normatch. Every provider is first checked against float64 on fresh inputs.
The record (`--benchmark-json FILE`, `--benchmark-compare`) carries bytes, FLOP and percent of the measured roof.
"""

import pytest
import torch
import torch._functorch.config

from normatch.bench.measure import copy_roof, keep_memory

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


@pytest.fixture(scope="session")
def roof():
    """Bytes per second that a large copy reads and writes."""
    if DEVICE == "cpu":
        keep_memory()
    return copy_roof(DEVICE)


@pytest.fixture
def measure(benchmark, roof):
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
            percent_of_copy=round(100 * moved / seconds / roof, 1),
            copy_gb_per_s=round(roof / 1e9, 2),
            **facts,
        )

    return run
