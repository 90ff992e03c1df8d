"""`normatch.ops` as a package: its names are the functions, and importing it stays light."""

import importlib
import subprocess
import sys
import types

import pytest
from real_data import ROOT

import normatch
import normatch.ops
from normatch import ops
from normatch.ops import affine_coupling, logdet

STEMS = ("affine_coupling", "augment_views", "coupling2d", "flow_head", "gmm_log_prob", "logdet")


def test_names_are_functions_although_modules_bear_them_too():
    for stem in STEMS:
        module = importlib.import_module(f"normatch.ops.{stem}")
        assert isinstance(module, types.ModuleType)
        assert getattr(normatch.ops, stem) is getattr(ops, stem) is getattr(module, stem)
        assert isinstance(getattr(ops, stem), types.FunctionType)
    assert affine_coupling is ops.affine_coupling and logdet is ops.logdet
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("normatch", ("torch", "numpy", "PIL")),
        ("normatch.augment", ("torch", "numpy", "PIL")),
        ("normatch.augment.policy, normatch.augment.draws", ("torch", "PIL")),
        ("normatch.ops", ("PIL", "normatch.training")),
        ("normatch.augment.native, normatch.augment.pillow, normatch.augment.dali", ("normatch.training",)),
    ],
)
def test_imports_are_light(imported, absent):
    code = f"import sys, {imported}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
