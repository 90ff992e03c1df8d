"""Benchmarks on pytest-benchmark: `pytest benchmarks`, or a part of them with `-k`.

One group per case, with its providers side by side in one process: the published formulation, the closed form in plain
PyTorch (eager and compiled), and normatch. Every provider is first checked against float64 on fresh inputs. The record
(`--benchmark-json FILE`, `--benchmark-compare`) holds bytes, FLOP and percent of the measured roof.
"""

import pytest
import torch

from normatch.bench.measure import copy_roof, keep_memory, machine, rates, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # on the command line: pytest collects it without help
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_configure(config):
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    config.option.benchmark_sort = "name"


@pytest.fixture(scope="session")
def roof():
    """Bytes per second that a large copy reads and writes."""
    if DEVICE == "cpu":
        keep_memory()
    return copy_roof(DEVICE)


@pytest.fixture
def measure(benchmark, roof):
    """measure(group, provider, call, moved, flop, **facts): time call() and record its rates."""

    def finished(call):
        call()
        synchronize(DEVICE)

    def run(group, provider, call, moved, flop, **facts):
        benchmark.group = group
        benchmark(finished, call)
        seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")  # no stats: --benchmark-disable
        measured = {"bytes": moved, "flop": flop, "copy_gb_per_s": roof / 1e9, **rates(moved, flop, seconds, roof)}
        benchmark.extra_info.update(provider=provider, **machine(DEVICE), **measured, **facts)

    return run
