"""What is built, what `normatch info` says of it, and what happens where it is not."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import with_kernels

from normatch import ops
from normatch.augment import policy
from normatch.data.base import MAX_SIDE
from normatch.tools.info import info

TESTS = Path(__file__).parent
EXAMPLE = """
import torch
from normatch import ops, reference
x, s, t, gain = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
for got, expected in zip(ops.affine_coupling(x, s, t, gain), reference.affine_coupling(x, s, t, gain)):
    torch.testing.assert_close(got, expected)
print(*ops.backend(), sep="|")
"""
HIDE_EXTENSION = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "normatch._C":
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Finder())
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "NORMATCH_LIB": "default", **env},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_info_states_the_facts():
    lines = dict(line.split("  ", 1) for line in info().splitlines())
    assert {"normatch", "PyTorch", "torchvision", "ops", "CUDA architectures", "GPU", "DALI", "CPU", "threads"} <= set(
        lines
    )
    assert lines["ops"].strip().startswith(ops.backend()[0])
    assert "unknown (" not in info()


def test_info_says_how_to_get_dali(monkeypatch):
    monkeypatch.setattr("normatch.tools.info.importlib.metadata.distributions", lambda: [])
    (line,) = [line for line in info().splitlines() if line.startswith("DALI")]
    assert "not installed (pip install nvidia-dali-cuda" in line and "native op" in line


def test_info_never_raises(monkeypatch):
    def broken(*args):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("torch.cuda.is_available", broken)
    monkeypatch.setattr("torch.get_num_threads", broken)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    monkeypatch.setattr("normatch.tools.info._version", lambda package: "1.0")
    monkeypatch.setattr(ops, "backend", broken)
    text = info()
    assert "unknown (RuntimeError: broken on purpose)" in text
    assert "cannot be imported" in text


def test_works_without_the_extension_and_says_so_once():
    done = python(HIDE_EXTENSION + EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference|the compiled extension is not installed"
    assert done.stderr.count("normatch runs on plain PyTorch") == 1


def test_plain_pytorch_on_request_is_no_warning():
    done = python(EXAMPLE, NORMATCH_LIB="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference|NORMATCH_LIB=none"
    assert "plain PyTorch" not in done.stderr


def test_unknown_library_is_an_error():
    done = python(EXAMPLE, NORMATCH_LIB="fast")
    assert done.returncode != 0
    assert "NORMATCH_LIB is 'fast', but may be default, emulated or none" in done.stderr


@with_kernels
def test_build_info():
    build = ops.build_info()
    assert build["torch_target"] == "2.11"
    assert build["cpu_capability"] in ("AVX-512", "AVX2", "baseline")
    assert bool(build["cuda"]) == bool(build["cuda_architectures"])
    assert ("cuda" in ops.kernels()["logdet"]) == (bool(build["cuda"]) and not build["emulated"])
    assert all("cpu" in devices for devices in ops.kernels().values())
    limits = build["limits"]
    assert set(limits) == {"flow_head_cpu", "flow_head_cuda", "augment_views"}
    assert limits["flow_head_cpu"].items() <= limits["flow_head_cuda"].items()
    views = {"max_side": MAX_SIDE, "max_ops": policy.MAX_OPS, "max_levels": policy.MAX_LEVELS}
    assert limits["augment_views"] == views  # which policies and data sets are checked against without the extension


def test_every_kernel_file_has_its_twin():
    """The emulated build leaves out the .cpp file of every .cu file, so both backends must be cut alike."""
    csrc = TESTS.parent / "csrc"
    kernels = {path.stem for path in csrc.glob("*.cpp")} - {"cpu", "module", "ops"}
    assert {path.stem for path in csrc.glob("*.cu")} == kernels


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no CUDA")
def test_pytorch_names_its_stream_where_the_kernels_look():
    """csrc/portable.h: a library that is loaded already, by this name, with this function. Needs no GPU."""
    library = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    assert library.aoti_torch_get_current_cuda_stream


@pytest.mark.skipif(ops.backend()[0] != "compiled", reason="tests the instruction sets of the CPU kernels")
@pytest.mark.parametrize(("capability", "name"), [("avx2", "AVX2"), ("default", "baseline")])
def test_narrower_instruction_sets_are_as_good(capability, name):
    """The kernels of machines older than this one: accuracy and pixels again, with PyTorch's own switch."""
    env = {"ATEN_CPU_CAPABILITY": capability}
    found = python(
        "from normatch import ops; print(ops.build_info()['cpu_capability'])", ATEN_CPU_CAPABILITY=capability
    )
    if found.stdout.strip() != name:
        pytest.skip(f"this machine has no {name}")
    stems = ("affine_coupling", "coupling2d", "logdet", "gmm_log_prob", "flow_head", "augment_views")
    files = [str(TESTS / f"test_{stem}.py") for stem in stems]
    chosen = "(accura and dense) or (accura and part1-form) or (views_of_any_size and size2)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env={**os.environ, **env}, cwd=TESTS.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
