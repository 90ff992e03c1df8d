"""`normatch convert`: a checkpoint of any origin -> one that holds what using the model takes, and nothing more."""

import contextlib
import os
from pathlib import Path

import torch

from . import published
from .errors import UserError
from .evaluation import build_model, used_weights


def convert(source: str | Path, target: str | Path, dataset: str | None = None) -> Path:
    """source: a run, our checkpoint or a published one -> target: `.pt`, or `.safetensors`, by its name.

    The target holds the weights that are evaluated and no optimiser: `normatch eval`, `predict` and `load` take it,
    training cannot go on from it. An existing file is kept. `dataset`: as in `normatch.load`.
    """
    target = Path(target)
    if target.suffix not in (".pt", ".safetensors"):
        raise UserError(f"the name of {target} must end in .pt or .safetensors, which says what is written")
    if target.exists():
        raise UserError(f"{target} exists: delete it first, or give another name")
    state = published.read(source, dataset)
    build_model(state, source)  # what cannot be used is not written
    weights = used_weights(state)
    facts = {name: state[name] for name in published.FACTS if name in state}
    state = {**facts, "model": weights, "ema": weights, "split": None}  # no split: training refuses to resume from it
    # The new file appears under its name when it is whole.
    unfinished = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".pt":
            torch.save(state, unfinished)
        else:
            published.write_safetensors(state, unfinished)
        os.replace(unfinished, target)
    except (OSError, RuntimeError) as error:  # torch's writer has its own way to say that the disk is full
        raise UserError(f"{target} could not be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return target
