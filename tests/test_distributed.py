"""Several processes against one on the same global batches."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from real_data import ROOT
from torch import nn

from normatch.errors import UserError
from normatch.methods.distributed import synchronize_batch_norm
from normatch.model import evaluate
from normatch.published.checkpoints import load_checkpoint

KEYS = ["--backbone", "wrn-10-1", "--batch_size", "8", "--uratio", "2", "--steps", "50", "--eval_every", "25"]
KEYS += ["--log_every", "1", "--device", "cpu", "--dropout", "0", "--sync_bn", "--progress", "false"]
KEYS += ["--precision", "fp64"]  # in fp32 rounding alone grows to 1e-2 within 50 steps


def torchrun(ranks, out, *keys):
    return launch(ranks, "-m", "normatch", "train", *KEYS, *keys, "--out", str(out))


def launch(ranks, *program):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[:2000] + output[-2000:]  # torchrun's own words come last


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines if line["kind"] == "train"], dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    finished(torchrun(1, out))
    return out


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_that_share_a_batch_train_like_one(alone, tmp_path, ranks):
    out = tmp_path / "run"
    finished(torchrun(ranks, out))
    assert len(losses(out)) == 50
    assert (losses(out) - losses(alone)).abs().max() < 1e-6  # the metrics are kept in fp32
    one, many = load_checkpoint(alone), load_checkpoint(out)
    for part in ("model", "ema"):
        for name, value in one[part].items():
            error = (many[part][name].double() - value.double()).abs().max()
            assert error <= 1e-9 * max(value.abs().max().item(), 1e-3), f"{part} {name}: {error}"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (alone, out)]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]
    assert len(many["rng"]) == ranks and (out / "summary.json").exists()


def test_what_is_judged_is_what_the_checkpoint_holds(tmp_path):
    """With BatchNorm statistics of each process's own, of which the checkpoint has the first one's."""
    out = tmp_path / "run"
    finished(torchrun(2, out, "--sync_bn", "false", "--bn_momentum", "0.5", "--steps", "3", "--eval_every", "3"))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate(out)["test_loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_a_batch_norm_that_cannot_be_synced_is_refused():
    with pytest.raises(UserError, match="BatchNorm1d"):
        synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2)))


def test_a_killed_process_ends_the_others_and_the_run_resumes_on_fewer(tmp_path):
    out, keys = tmp_path / "run", ("--eval_every", "15", "--precision", "fp32")
    process = torchrun(2, out, *keys)
    while not (out / "checkpoints" / "last.pt").exists():
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in output
    step = load_checkpoint(out)["step"]
    finished(torchrun(1, out, *keys, "--resume", "auto"))
    assert json.loads((out / "summary.json").read_text())["resumed_from_step"] == step < 50


COMPILED = """
import functools, os, sys, torch
from torch import nn
import normatch
from normatch.methods import distributed

torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the graphs, without the time a compiler takes
for name in ("eager", "compiled"):
    torch.manual_seed(int(os.environ["RANK"]))  # a module of each process's own making
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU())
    normatch.train(
        backbone=backbone, compile=name == "compiled", sync_bn=True, steps=3, batch_size=4, uratio=1, eval_every=3,
        log_every=1, couplings=1, dropout=0.0, precision="fp64", device="cpu", out=f"{sys.argv[1]}/{name}",
    )
    ours, theirs = distributed.gather([p.detach() for p in backbone.parameters()])
    assert all(map(torch.equal, ours, theirs)), "the processes trained two networks"
    assert len(set(distributed.gather(torch.rand(1).item()))) == 2, "both draw the same dropout"
    sums = [torch.full((2,), 1.0 + 2 * distributed.rank())]  # 1 and 3, each over two parts of a batch
    distributed.average_(sums, parts=2)
    assert sums[0].tolist() == [1, 1]
"""


def test_compiled_processes_train_like_eager_ones(tmp_path):
    (tmp_path / "train.py").write_text(COMPILED)
    finished(launch(2, str(tmp_path / "train.py"), str(tmp_path)))
    eager, compiled = (losses(tmp_path / name) for name in ("eager", "compiled"))
    assert len(eager) == 3 and (eager - compiled).abs().max() < 1e-6


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    process = torchrun(2, tmp_path / "run", "--batch_size", "7")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "batch_size 7 is not divisible by the 2 processes" in output
