"""The emulator that runs CUDA kernels on the CPU finds the faults it is there for (tests/emulator)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulator"
RIGHT = "189 190 191"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def built(folder: Path, *options: str) -> Path:
    program = folder / "faults"
    sources = ["-xc++", str(EMULATOR / "faults.cu"), str(EMULATOR / "cuda_shim.cpp")]
    subprocess.run([COMPILER, "-std=c++17", "-g", "-O1", *options, *sources, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return built(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return built(tmp_path_factory.mktemp("sanitized"), "-fsanitize=address,undefined", "-fsanitize-sections=nm_shared")


def run(program: Path, kernel: str, order: str = "forward") -> subprocess.CompletedProcess:
    env = {**os.environ, "NORMATCH_EMULATOR_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
    return subprocess.run([str(program), kernel], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize("kernel", ["block_sum", "warp_sum", "dynamic_sum", "copied_sum"])
def test_correct_kernels_run(program, sanitized, kernel, order):
    for build in (program, sanitized):
        done = run(build, kernel, order)
        assert (done.returncode, done.stdout.strip()) == (0, RIGHT)
        assert "ERROR" not in done.stderr and "runtime error" not in done.stderr  # the sanitizers' words


def test_missing_barrier_shows_in_one_order(program):
    results = {run(program, "missing_barrier", order).stdout.strip() for order in ("forward", "reversed")}
    assert results != {RIGHT}


@pytest.mark.parametrize("kernel", ["unwritten_shared", "unwaited_copy"])
def test_unwritten_shared_memory_shows(program, kernel):
    assert "nan" in run(program, kernel).stdout


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", "divergent barrier"),
        ("barriers_at_two_places", "divergent barrier"),
        ("divergent_shuffle", "divergent shuffle"),
        ("half_warp_shuffle", "less than the full warp"),
        ("odd_block", "48 threads"),
    ],
)
def test_what_would_hang_a_gpu_raises(program, kernel, message, order):
    done = run(program, kernel, order)
    assert done.returncode == 1
    assert message in done.stdout


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("past_the_end", "heap-buffer-overflow"),
        ("past_dynamic_shared", "heap-buffer-overflow"),
        ("past_shared", "global-buffer-overflow"),
    ],
)
def test_access_out_of_bounds_is_found_at_its_line(sanitized, kernel, message):
    done = run(sanitized, kernel)
    assert done.returncode != 0
    assert message in done.stderr
    assert "faults.cu:" in done.stderr
