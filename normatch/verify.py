"""Proof by trial that a run survives being killed: `normatch verify-resume`."""

import json
import multiprocessing
import random
import shutil
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .config import Config
from .errors import UserError
from .run import load_checkpoint

COMPARED = ("step", "best", "model", "ema", "optimizer", "flow_optimizer", "meter", "rng")


def verify_resume(config: Config, kills: int = 20) -> dict:
    """Train whole, then again under `kills` kill -9 at random moments, each time resumed; compare every bit.

    Leaves both runs and certificate.json, which it returns, in the run folder. Raises `UserError` where a resumed run
    fails or one bit differs.
    """
    folder = config.folder
    if kills < 1:
        raise UserError(f"kills {kills}: at least one is needed to certify anything")
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder} exists: replace it with --overwrite, or give another --out")
    if folder.exists() and not (folder / "whole" / "config.yaml").is_file():
        raise UserError(f"{folder} holds no runs of verify-resume, and --overwrite replaces nothing else")
    shutil.rmtree(folder, ignore_errors=True)
    whole = config.model_copy(update={"out": str(folder / "whole"), "overwrite": False, "progress": False})
    killed = whole.model_copy(update={"out": str(folder / "killed"), "resume": "auto"})

    # Children are forked from a server that has imported everything: a kill meets training, not start-up.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["normatch.trainer", "torch.utils.tensorboard", "sklearn.datasets"])

    def start(config):
        process = context.Process(target=_train, args=(config,))
        process.start()
        return process

    _finish(start(whole))
    begun = time.perf_counter()
    shutil.rmtree(whole.out)
    _finish(start(whole))  # again, for its time without start-up
    seconds = time.perf_counter() - begun

    draw, resumed_from = random.Random(config.seed), []
    last = Path(killed.out) / "checkpoints" / "last.pt"
    for kill in range(kills):
        process = start(killed)
        # Three times in four the run first gets on by a checkpoint, else it may still be starting or before its first.
        before = _written(last)
        get_on = draw.random() < 0.75
        while get_on and _written(last) == before and process.exitcode is None:
            time.sleep(0.001)
        process.join(draw.uniform(0, seconds / (2 * kills)))
        if process.exitcode is not None:
            _finish(process)
            break
        process.kill()
        process.join()
        resumed_from.append(_newest_step(Path(killed.out)))
        print(f"kill {kill + 1} of {kills}: the checkpoint at hand is of step {resumed_from[-1]}", flush=True)
        if (Path(killed.out) / "summary.json").exists():  # it had only to leave
            break
    if not resumed_from:
        raise UserError("the run ended before it could be killed: give it more --steps")
    if not (Path(killed.out) / "summary.json").exists():
        _finish(start(killed))

    a, b = (load_checkpoint(Path(run.out) / "checkpoints" / "last.pt") for run in (whole, killed))
    different = [part for part in COMPARED if not same(a.get(part), b.get(part))]
    chosen = [load_checkpoint(Path(run.out) / "checkpoints" / "best.pt") for run in (whole, killed)]
    different += [] if same(*(state["ema"] for state in chosen)) else ["best"]
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
    (folder / "certificate.json").write_text(json.dumps(certificate, indent=2) + "\n")
    if not certificate["bit_equal"]:
        raise UserError(f"the resumed run differs from the uninterrupted one in {', '.join(different + unfinished)}")
    return certificate


def _train(config: Config):
    from .trainer import train

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which a killed process leaves behind
    train(config)


def _finish(process):
    process.join()
    if process.exitcode:
        raise UserError(f"a training run ended with status {process.exitcode}; its own message stands above")


def _written(path: Path) -> int | None:
    """When the file was written, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _newest_step(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 where there is none yet."""
    for name in ("last.pt", "previous.pt"):
        try:
            return load_checkpoint(run / "checkpoints" / name)["step"]
        except UserError:
            continue
    return 0


def same(a, b) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
