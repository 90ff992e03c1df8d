"""`normatch convert`: a checkpoint of any origin -> one that holds only what inference needs."""

import contextlib
import os
from pathlib import Path

import torch

from ..errors import UserError
from ..model import build_model
from ..published import checkpoints


def convert(source: str | Path, target: str | Path, dataset: str | None = None) -> Path:
    """source: a run, one of its checkpoints or a published one -> target: a `.pt` or `.safetensors` file.

    The target holds the evaluated weights and no optimizer: `normatch eval`, `predict` and `load` accept it, training
    cannot resume from it. An existing file is never replaced. `dataset`: as in `normatch.load`.
    """
    target = Path(target)
    if target.suffix not in (".pt", ".safetensors"):
        raise UserError(f"the name of {target} must end in .pt or .safetensors, which says what is written")
    if target.exists():
        raise UserError(f"{target} exists: delete it first, or give another name")
    state = checkpoints.read(source, dataset)
    build_model(state, source)  # a model that cannot be built is not written
    weights = state["ema"]
    facts = {name: state[name] for name in checkpoints.FACTS if name in state}
    state = {**facts, "model": weights, "ema": weights, "split": None}  # no split: training refuses to resume from it
    # The file gets its name once it is complete.
    unfinished = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".pt":
            torch.save(state, unfinished)
        else:
            checkpoints.write_safetensors(state, unfinished)
        os.replace(unfinished, target)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise UserError(f"{target} could not be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return target
