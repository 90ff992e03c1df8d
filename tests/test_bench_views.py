"""`normatch bench augment` and `normatch bench loader`: agreement is checked first, and ratios match the times."""

import argparse
import json
import os

import pytest
import torch

from normatch import ops
from normatch.bench import views as bench
from normatch.errors import UserError

needs_native = pytest.mark.skipif("cpu" not in ops.kernels()["augment_views"], reason="the compiled op is not in use")


def records(capsys, command, arguments, *given):
    parser = argparse.ArgumentParser()
    arguments(parser)
    assert command(parser.parse_args([*given, "--json"])) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@needs_native
def test_augment_compares_backends_on_one_core_and_on_all(capsys, monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 60)
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = records(capsys, bench.augment, bench.augment_arguments, "--rounds", "1", "--backend", "native", "--backend",
                    "pil")  # fmt: skip
    kinds = {(r["cores"], r["kind"]) for r in found}
    assert {kind for _, kind in kinds} == {"weak", "strong", "step"} and len(found) == 2 * len(kinds)
    for cores_and_kind in kinds:
        native, pil = (r for r in found if (r["cores"], r["kind"]) == cores_and_kind)
        assert (native["backend"], pil["backend"]) == ("native", "pil") and "times_pil" not in pil
        assert native["times_pil"] == pytest.approx(pil["us_per_view"] / native["us_per_view"], abs=0.01)
    assert torch.get_num_threads() == threads  # and it leaves the process as it was
    assert cores is None or os.sched_getaffinity(0) == cores


@needs_native
def test_augment_times_nothing_that_differs(capsys, monkeypatch):
    honest = ops.augment_views
    monkeypatch.setattr(ops, "augment_views", lambda *a, **k: honest(*a, **k) + (1 if k.get("dtype") else 0))
    with pytest.raises(UserError, match="native does not make the views that Pillow makes"):
        records(capsys, bench.augment, bench.augment_arguments, "--rounds", "1", "--backend", "native")
    assert capsys.readouterr().out == ""


def test_a_backend_that_is_not_there_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(ops, "kernels", lambda: {"augment_views": frozenset()})
    monkeypatch.setattr(bench, "BATCH", 30)
    first, *others = records(capsys, bench.loader, bench.loader_arguments, "--rounds", "1", "--busy", "1",
                             "--batch_size", "2", "--backend", "native", "--backend", "pil")  # fmt: skip
    assert first["backend"] == "native" and "no native kernel for cpu" in first["left_out"]
    (pil,) = others
    assert pil["backend"] == "pil" and pil["views"] == 2 * 15 and 0 < pil["wait_percent"] < 100
    assert pil["wait_percent"] == pytest.approx(100 * pil["wait_ms"] / (pil["wait_ms"] + 1), abs=0.02)
