"""`normatch verify-resume`: shows by trial that a run survives being killed."""

import contextlib
import json
import multiprocessing
import random
import shutil
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import Config
from ..errors import UserError
from ..published.checkpoints import load_checkpoint
from ..training.run import Run

COMPARED = ("step", "best", "model", "ema", "optimizer", "meter", "rng")


def verify_resume(config: Config, kills: int = 20) -> dict:
    """Train once without interruption and once under `kills` kill -9 at random moments; compare the bits.

    The killed run is resumed each time. Leaves both runs and certificate.json, which it returns, in the run folder.
    Raises `UserError` if a resumed run fails or a single bit differs.
    """
    _clear(config, kills)
    whole = config.model_copy(update={"out": str(config.folder / "whole"), "overwrite": False, "progress": False})
    killed = whole.model_copy(update={"out": str(config.folder / "killed"), "resume": "auto"})
    _finish(_start(whole))
    began = time.perf_counter()
    shutil.rmtree(whole.out)
    _finish(_start(whole))  # again, to time it without start-up
    resumed_from = _killed_steps(killed, kills, time.perf_counter() - began)
    if not (Path(killed.out) / "summary.json").exists():
        _finish(_start(killed))

    runs = Run(whole), Run(killed)
    a, b = (load_checkpoint(run.last) for run in runs)
    different = [part for part in COMPARED if not same(a.get(part), b.get(part))]
    if not same(*(load_checkpoint(run.best)["ema"] for run in runs)):
        different.append("best")
    unfinished = [path.name for path in Path(killed.out).rglob("*.new")]
    certificate = {
        "bit_equal": not different and not unfinished,
        "steps": a["step"],
        "kills": len(resumed_from),
        "checkpoints_at_the_kills": resumed_from,
        "compared": list(COMPARED),
        "different": different,
        "unfinished_files": unfinished,
        "torch": torch.__version__,
        "config": config.model_dump(),
    }
    (config.folder / "certificate.json").write_text(json.dumps(certificate, indent=2) + "\n")
    if not certificate["bit_equal"]:
        raise UserError(f"the resumed run differs from the uninterrupted one in {', '.join(different + unfinished)}")
    return certificate


def _clear(config: Config, kills: int):
    """Removes the runs of an earlier verification, if `config` allows it. Raises `UserError`."""
    folder = config.folder
    if kills < 1:
        raise UserError(f"kills {kills}: at least one is needed to certify anything")
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder} exists: replace it with --overwrite, or give another --out")
    if folder.exists() and not (folder / "whole" / "config.yaml").is_file():
        raise UserError(f"{folder} holds no runs of verify-resume, and --overwrite replaces nothing else")
    shutil.rmtree(folder, ignore_errors=True)


def _killed_steps(config: Config, kills: int, seconds: float) -> list[int]:
    """Train `config`, a run of `seconds`, killing and resuming it -> the step of the checkpoint at each kill."""
    draw, steps, run = random.Random(config.seed), [], Run(config)

    def written() -> int | None:
        return run.last.stat().st_mtime_ns if run.last.exists() else None

    for kill in range(kills):
        process = _start(config)
        # Three times out of four, wait for a new checkpoint; else the run may still be starting or before its first.
        before = written()
        wait = draw.random() < 0.75
        while wait and written() == before and process.exitcode is None:
            time.sleep(0.001)
        process.join(draw.uniform(0, seconds / (2 * kills)))
        if process.exitcode is not None:
            _finish(process)
            break
        process.kill()
        process.join()
        steps.append(_newest_step(run))
        print(f"kill {kill + 1} of {kills}: the checkpoint at hand is of step {steps[-1]}", flush=True)
        if (run.folder / "summary.json").exists():  # it had only to exit
            break
    if not steps:
        raise UserError("the run ended before it could be killed: give it more --steps")
    return steps


def _start(config: Config):
    # Children are forked from a server that has imported everything: a kill hits training, not start-up.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["normatch.training.trainer", "torch.utils.tensorboard", "sklearn.datasets"])
    process = context.Process(target=_train, args=(config,))
    process.start()
    return process


def _train(config: Config):
    from ..training.trainer import train

    tqdm.set_lock(threading.RLock())  # its default is a system semaphore, which a killed process would leak
    train(config)


def _finish(process):
    process.join()
    if process.exitcode:
        raise UserError(f"a training run ended with status {process.exitcode}; its own message stands above")


def _newest_step(run: Run) -> int:
    """The step of the newest complete checkpoint, 0 if there is none yet."""
    for path in (run.last, *run.earlier):
        with contextlib.suppress(UserError):
            return load_checkpoint(path)["step"]
    return 0


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
