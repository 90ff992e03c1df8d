"""The examples run; each stops with an error if its replacement computes something else than the original."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, arguments, capsys):
    runpy.run_path(str(EXAMPLES / name))["main"](arguments)
    return capsys.readouterr().out


def test_replace_head(capsys):
    out = run("replace_head.py", ["--batch", "4", "--classes", "5", "--rounds", "1"], capsys)
    assert "agree" in out
    assert out.count("flow head, normatch") == 2


def test_replace_coupling(capsys):
    pytest.importorskip("normflows", reason="the example replaces a layer of normflows, which is not installed")
    out = run("replace_coupling.py", ["--batch", "2", "--hidden", "4", "--rounds", "1"], capsys)
    assert "all gradients agree" in out
    assert out.count("normatch ") == 2
