"""Checkpoint files of any origin -> the state that `normatch.load` builds a model from.

Ours of any version, ours as safetensors, and the published ones of `layouts`. Only tensors and plain values are ever
read: nothing in a file can run code.
"""

import json
import pickle
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ..config import upgraded
from ..errors import UserError
from ..flows.flow import load_weights
from .layouts import first_line, from_published, load_flow

FORMAT = 2  # of our checkpoints; 0.1.0 wrote 1, without saying so

# What our own state holds besides the tensors of "model" and "ema"; in a safetensors file each is one JSON string.
FACTS = (
    "format", "normatch", "config", "backbone", "transition", "source", "classes", "mean", "std", "image_size", "shape",
    "gray", "columns",
)  # fmt: skip
OPTIONAL = {"transition", "source"}  # absent from the checkpoints that training writes


def read(path: str | Path, dataset: str | None = None) -> dict:
    """A run folder or a checkpoint of any origin -> its state in our layout. Raises `UserError`.

    `dataset`: what a published checkpoint was trained on, where that is not the usual one for its network.
    """
    path = Path(path)
    if path.is_dir():
        return _whole(load_checkpoint(path, chosen=True), path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint of normatch or of a published layout")
    if "normatch" in content:
        return _whole(upgrade(content, path), path)
    try:
        return from_published(content, dataset)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:  # a file can hold anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} has the keys of a published layout, but not its content: {reason}") from None


def _whole(state: dict, path) -> dict:
    missing = {"model", "ema", *FACTS} - OPTIONAL - state.keys()
    if missing:
        raise UserError(f"{path} is not a whole checkpoint of normatch: {min(missing)!r} is missing")
    return state


def load_checkpoint(path: str | Path, chosen: bool = False) -> dict:
    """A run folder or a checkpoint file -> its state, tensors and plain values only. Raises `UserError`.

    Of a folder the last checkpoint; `chosen`: the one that validation images chose, where there were any.
    """
    path = Path(path)
    if path.is_dir():
        best, path = path / "checkpoints" / "best.pt", path / "checkpoints" / "last.pt"
        if chosen and best.exists() and path.exists():
            state = load_checkpoint(path)
            return load_checkpoint(best) if state.get("held_out") else state
    state = read_tensors(path)
    if not isinstance(state, dict) or not {"normatch", "config", "model", "ema"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of normatch")
    return upgrade(state, path)


def read_tensors(path: str | Path):
    """What torch.save wrote to the file, if it is tensors and plain values alone. Raises `UserError`."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):  # checkpoints older than PyTorch 1.6 are not zip files
            with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
                if (bad := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {bad} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the archive or the unpickler makes of damaged bytes
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} was refused: it holds more than tensors and plain values, which could run code when it is "
                "unpickled; nothing of it was run"
            ) from None
        raise UserError(f"{path} is not a readable checkpoint (truncated or damaged?): {reason}") from None


# ---- Earlier versions ----------------------------------------------------------------------------


def upgrade(state: dict, path) -> dict:
    """Our state of any version -> today's. Raises `UserError` for one of a later version, or a damaged one."""
    if state.get("format", 1) > FORMAT:
        raise UserError(f"{path} was written by normatch {state['normatch']}, which is later than this one: update")
    if state.get("format", 1) == FORMAT:
        return state
    try:
        config = upgraded(state["config"])
        flow = config["method"] in ("flowgmm", "scnf")
        size = state.get("image_size")
        shape = (3, size, size) if size else tuple(state["shape"])
        gray = bool(flow and size) and torch.Size(state["shape"]).numel() == size * size
        model, average = (
            {name.removeprefix("method.") if not flow else name.replace("model.", "density.", 1): value
             for name, value in state[part].items()}
            for part in ("model", "ema")
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a whole checkpoint of normatch: {reason}") from None
    if config.get("compat") == "reference":  # the published flow has no average: the live one was evaluated
        average |= {name: value for name, value in model.items() if name.startswith(("flows.", "da_queue"))}
    columns = state.get("columns", [])
    backbone = "named" if flow else state["backbone"]
    facts = {"format": FORMAT, "config": config, "shape": list(shape), "gray": gray, "columns": columns}
    return {**state, **facts, "backbone": backbone, "model": model, "ema": average}


def upgrade_optimizer(content: dict, optimizer) -> list[dict]:
    """The optimizer's state in a checkpoint of any version -> that of `optimizer`, a `training.optim.Optimizer`.

    0.1.0 had optimizers of its own for classifiers, and torch.optim's on one flat tensor per group for flows.
    """
    saved = content["optimizer"]
    if isinstance(saved, list):
        return saved
    if "state" in saved:
        return [_split(saved["state"].get(i, {}), group["params"]) for i, group in enumerate(optimizer.groups)]
    old = {"momentum_buffer": "velocity", "exp_avg": "mean", "exp_avg_sq": "square", "gradient_sum": "prior_sum"}
    taken, result = dict.fromkeys(old, 0), []
    for group, state in zip(optimizer.groups, optimizer.state, strict=True):
        source = saved if group["optimizer"] == "sgd" else content["flow_optimizer"]
        entry = {}
        for name in state.keys() & old.keys():
            entry[name] = [source[f"{old[name]}_{taken[name] + i}"] for i in range(len(group["params"]))]
            taken[name] += len(group["params"])
        if "step" in state:
            entry["step"] = [source["steps"].float()] * len(group["params"])
        result.append(entry)
    return result


def _split(state: dict, params) -> dict:
    """A flat tensor per name -> a tensor for each parameter."""
    sizes = [p.numel() for p in params]
    entry = {"step": [torch.as_tensor(state["step"], dtype=torch.float32)] * len(params)} if state else {}
    for name in state.keys() - {"step"}:
        entry[name] = [part.view_as(p) for part, p in zip(state[name].flatten().split(sizes), params, strict=True)]
    return entry


def load_pretrained(method, path: str):
    """Give a method the weights of a run, or of a published checkpoint. Raises `UserError` where they do not fit."""
    content = load_checkpoint(path, chosen=True) if Path(path).is_dir() else read_tensors(path)
    if "normatch" in content:
        weights = {name.removeprefix("density."): value for name, value in upgrade(content, path)["ema"].items()}
        load_weights(method.density, weights, "density")
    else:
        load_flow(method.density, content)


# ---- safetensors ---------------------------------------------------------------------------------


def write_safetensors(state: dict, path: Path):
    """Our state -> a safetensors file: the tensors of "ema", the rest as JSON in the file's metadata."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state["ema"].items()}
    facts = {name: json.dumps(state[name]) for name in FACTS if name in state}
    # Not save_file, whose files only their owner may read.
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt", **facts}))


def read_safetensors(path: Path) -> dict:
    """A safetensors file that `write_safetensors` wrote -> the state."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no dictionary
    except Exception as error:  # the package's own errors, and the system's
        raise UserError(f"{path} is not a readable safetensors file: {first_line(error)}") from None
    if "normatch" not in facts:
        raise UserError(f"{path} was not written by normatch: its metadata do not say what the tensors are")
    try:
        state = {name: json.loads(facts[name]) for name in FACTS if name in facts}
    except ValueError:
        raise UserError(f"the metadata of {path} are damaged") from None
    return {**state, "model": tensors, "ema": tensors}
