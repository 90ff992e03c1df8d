"""The settings that every run has, with types and defaults, and how a configuration is put together.

A method adds its own settings in its `Keys`, a subclass of `Config` (`normatch/methods/`). Recipes are YAML files in
`normatch/presets/`. What comes later wins: defaults, preset, configuration file, keys.
"""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .data import TABLES
from .errors import UserError, nearest
from .published import flags

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

# Name -> where its class is. Imported on use: `normatch --help` need not wait for torch.
METHODS = {
    "normatch": "normatch.methods.normatch:NorMatch",
    "fixmatch": "normatch.methods.fixmatch:FixMatch",
    "supervised": "normatch.methods.supervised:Supervised",
    "flowgmm": "normatch.methods.flowgmm:FlowGMM",
    "scnf": "normatch.methods.scnf:SemiConditional",
}


def key(default, text):
    return Field(default, description=text)


class Config(BaseModel):
    """The settings of every training run. Steps are optimizer steps; batch sizes are in images."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    method: str = key("normatch", f"what is trained: {', '.join(METHODS)}")
    dataset: str = key(
        "digits",
        "images: digits, cifar10, cifar100, svhn, svhn+extra, stl10, mnist, fashionmnist, miniimagenet; your own: "
        "folder, csv. Tables, for flows: moons, circles, 8gaussians, pinwheel, picture, digits-table, breast-cancer, "
        "wine, iris, miniboone, hepmass, ag-news, yahoo; your own: table",
    )
    data_dir: str | None = key(None, "folder that holds the data set")
    download: bool = key(False, "let torchvision download the data set into data_dir")
    image_size: Positive | None = key(
        None, "side of the images, pixels; none: the data set's own, for your images the size that suits most of them"
    )
    in_memory: bool = key(
        True, "false: read the training images of a folder or csv file from disk for each view, instead of once"
    )
    num_labels: NonNegative = key(40, "labeled images, the same number of each class; 0: all labels there are")
    num_val: NonNegative = key(
        0, "training images held out to choose the best checkpoint; 0: choose by the test set, as the papers do"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = key(
        0, "seeds the labeled split, the data order, the augmentation and the weights"
    )

    steps: Positive = key(2**20, "optimizer steps")
    batch_size: Positive = key(64, "labeled images per step")
    accumulate: Positive = key(
        1, "micro-batches per step (gradient accumulation), to save memory; da_window counts micro-batches"
    )
    lr: Weight = key(0.03, "learning rate; of classifiers for SGD with Nesterov momentum 0.9")
    weight_decay: Weight = key(5e-4, "weight decay")
    warmup: NonNegative = key(0, "steps of linear learning-rate warm-up")
    schedule: Literal["cosine-7-16", "constant", "steps", "cosine", "wilson", "linear"] = key(
        "cosine-7-16",
        "learning-rate schedule: FixMatch's cos(7 pi/16 progress), or constant; steps: a tenth from 50 % and again "
        "from 80 % of the steps; cosine to zero; wilson: FlowGMM's for images; linear to zero",
    )
    ema_decay: Share = key(0.999, "decay of the averaged weights, which are the ones evaluated")
    swa_start: NonNegative | None = key(
        None, "step from which weights are averaged equally (SWA); none: the exponential average of ema_decay"
    )
    swa_every: Positive = key(10, "steps between the weights that SWA averages")
    swa_lr: Weight | None = key(None, "learning rate from swa_start on; none: that of the schedule")

    augment: str = key(
        "kekmodel", "augmentation policy: kekmodel, leedoyup, fixmatch-paper, weak, a YAML file; flows: none, too"
    )
    augment_backend: Literal["auto", "native", "dali", "pil"] = key("auto", "what computes the views")
    num_workers: NonNegative | None = key(
        None, "pil: worker processes that compute views, 0: the training process; none: 4 with a GPU, 0 without"
    )

    device: str = key("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16", "fp64"] = key(
        "auto",
        "auto: for classifiers bf16 autocast on CUDA and on CPUs with bf16 instructions, else fp32; fp64: no rounding "
        "noise",
    )
    compile: bool | Literal["reduce-overhead"] = key(
        False,
        "torch.compile the whole step, which takes a minute or two before the first; reduce-overhead: with CUDA "
        "graphs, for one process and no accumulation",
    )
    profile: bool = key(False, "leave trace.json, a Chrome trace of five steps, in the run folder")
    compat: Literal["none", "reference"] = key("none", "reference: do what the published code does where it differs")

    eval_every: Positive = key(1024, "steps between evaluations, each of which writes a checkpoint")
    log_every: Positive = key(50, "steps between lines of metrics.jsonl")
    keep: Annotated[int, Field(ge=2)] = key(2, "checkpoints kept: the last one and earlier ones to fall back on")
    out: str | None = key(None, "the run folder; none: runs/DATASET-LABELS-METHOD-SEED")
    resume: str | None = key(
        None, "auto: go on from the run folder's last checkpoint, if there is one; or a run or checkpoint"
    )
    overwrite: bool = key(False, "delete an existing run folder first")
    progress: bool = key(True, "show a progress bar")

    @property
    def folder(self) -> Path:
        """The run folder."""
        name = f"{self.dataset}-{self.num_labels}-{self.variant}-seed{self.seed}"
        return Path("runs", name) if self.out is None else Path(self.out)

    @property
    def variant(self) -> str:
        """What the default run folder calls the method."""
        return self.method


# What may differ between a checkpoint and the run that resumes from it. None of these changes what is computed, but
# device and compile change the rounding, and dali differs from the other backends in a few pixels.
FREE_KEYS = {
    "data_dir", "download", "device", "in_memory", "num_workers", "augment_backend", "compile", "log_every",
    "eval_every", "out", "resume", "overwrite", "progress", "profile", "keep",
}  # fmt: skip
IMAGE_KEYS = ("augment", "image_size", "in_memory")  # say nothing of a table


# ---- Methods ------------------------------------------------------------------------------------------------------


def method_class(method: str | type) -> type:
    """The name of a method, or a class of your own as it is -> its class. Raises `UserError` for anything else."""
    if isinstance(method, type):
        base = importlib.import_module("normatch.methods.base").Method
        missing = [n for n in ("forward", "class_log_prob", "groups") if getattr(method, n, None) is getattr(base, n)]
        if not issubclass(method, base) or missing or method.__name__ in METHODS:
            lacks = ", ".join(missing) or "normatch.Method as its base class, or a name of its own"
            raise UserError(f"{method.__name__} is not a method: it lacks {lacks}; see examples/own_method.py")
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(
            f"unknown method {method!r}{nearest(method, METHODS)}; methods: {', '.join(METHODS)}, or a class of yours "
            "in Python: normatch.train(method=...)"
        )
    module, name = METHODS[method].split(":")
    return getattr(importlib.import_module(module), name)


def trains_flow(method: str | type) -> bool:
    """Whether a method trains a flow end to end, on images or tables: it then has a key that names the flow."""
    return "flow" in method_class(method).Keys.model_fields


@cache
def known_keys() -> dict[str, tuple[str, ...]]:
    """Every key of any method -> the methods that know it."""
    fields = {name: method_class(name).Keys.model_fields for name in METHODS}
    return {key: tuple(m for m in METHODS if key in fields[m]) for name in METHODS for key in fields[name]}


def check_keys(keys: dict, method: str, cls: type):
    """Raises `UserError` for a key that `cls` does not know; the message says whose it is."""
    for name in keys:
        if name not in cls.Keys.model_fields:
            users = known_keys().get(name, ())
            belongs = f"belongs to {' and '.join(', '.join(users).rsplit(', ', 1))}" if users else "is unknown"
            raise UserError(f"{name} {belongs}: method {method} has no such key")


# ---- Presets and files --------------------------------------------------------------------------------------------


@cache
def presets() -> dict[str, dict]:
    """Every preset's name -> its keys; shorter names first, and those in order of their numbers."""

    def order(name):
        return len(name), [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    def whole(name):
        content = _read_yaml(_PRESETS / f"{name}.yaml")
        base = content.pop("preset", None)
        return {**(whole(base) if base else {}), **content}

    return {name: whole(name) for name in sorted((path.stem for path in _PRESETS.glob("*.yaml")), key=order)}


def preset_text(name: str) -> str:
    """The YAML file of a preset, comments included. Raises `UserError` for an unknown name."""
    _preset(name)
    return (_PRESETS / f"{name}.yaml").read_text()


_PRESETS = Path(__file__).with_name("presets")


def _preset(name: str) -> dict:
    if name not in presets():
        raise UserError(f"unknown preset {name!r}{nearest(name, presets())}; `normatch presets` lists them")
    return presets()[name]


def _preset_for(dataset: str, method: str | type | None) -> str:
    """The best preset for a data set and method: of both, of the data set and a similar method, or of similar data."""
    method = method or ("flowgmm" if dataset in TABLES else "normatch")
    flows = trains_flow(method) or (isinstance(method, type) and dataset in TABLES)
    trained = {name: keys["method"] for name, keys in presets().items() if keys["dataset"] == dataset}
    exact = [name for name in trained if trained[name] == method]
    similar = [name for name in trained if trains_flow(trained[name]) == flows]
    if exact or similar:
        return (exact or similar)[0]
    return ("flowgmm-wine" if dataset in TABLES else "flowgmm-mnist-100-small") if flows else "digits"


def _read_yaml(path: str | Path) -> dict:
    """A YAML file of flat `key: value` lines -> them."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return content


def read_config(path: str | Path, fields: dict | None = None) -> dict:
    """A configuration file -> its keys under our names, published flags as they are, and the preset that it names.

    fields: the keys of a method of the user's own.
    """
    content = upgraded(_read_yaml(path))
    base = content.pop("preset", None)
    return {**({} if base is None else {"preset": str(base)}), **_canonical(content, fields or {})}


def upgraded(keys: dict) -> dict:
    """The configuration of a run of any version -> its keys under today's names."""
    return flags.upgrade_config(keys, lambda method: method_class(method).Keys.model_fields)


# ---- Putting a configuration together -----------------------------------------------------------------------------


def make_config(preset: str | Config | None = None, file: str | Path | None = None, **keys) -> Config:
    """The preset, then the file, then the keys, where what comes later wins -> the checked configuration.

    preset: a name, or a configuration to start from. A file may name a preset in a `preset:` line. Without a preset,
    the best one for the data set and method that file or keys name; without these, `digits`. To resume
    (`resume="auto"`) a run folder, its own configuration. Keys of a preset that belong to another method than the
    chosen one are left out. `method` may be a class of your own; its keys win over published flags of the same name.
    Other published flags are taken in their published sense, see `published.flags`.

    Raises `UserError` for unknown presets and keys (with the nearest known one), for keys of another method, and for
    values of the wrong type.
    """
    custom = method_class(keys.pop("method")) if isinstance(keys.get("method"), type) else None
    fields = custom.Keys.model_fields if custom else {}
    keys, content = _canonical(keys, fields), {} if file is None else read_config(file, fields)
    starts = [start for start in (preset, content.pop("preset", None)) if start is not None]
    given = {**{name: value for name, value in content.items() if name not in keys}, **keys}
    resumed = not starts and given.get("resume") == "auto" and given.get("out")
    saved = resumed and Path(str(given["out"]), "config.yaml")
    saved = saved if saved and saved.is_file() else None
    given = _given(given, custom, complete=not (starts or saved))
    if saved:
        base = {**_nones(read_config(saved, fields), fields), "overwrite": False}
    else:
        starts = starts or [_preset_for(given.get("dataset", "digits"), custom or given.get("method"))]
        base = {name: value for start in starts for name, value in _keys_of(start).items()}
    method = custom or given.get("method", base.get("method", "normatch"))
    cls = method_class(method)
    name = cls.__name__ if custom else method
    check_keys(given, name, cls)
    base = {key: value for key, value in base.items() if key in cls.Keys.model_fields}
    if given.get("dataset", base.get("dataset")) in TABLES:
        meant = [key for key in IMAGE_KEYS if key in given and str(given[key]).lower() not in ("none", "true", "weak")]
        if meant:
            raise UserError(f"{meant[0]} is for images: {given.get('dataset', base.get('dataset'))} is a table")
    config = checked({**base, **given, "method": name}, cls)
    if config.out == "" or config.resume == "":
        raise UserError("--out and --resume need a folder's name, not an empty one")
    return config


def _given(keys: dict, custom: type | None, complete: bool) -> dict:
    """Keys of the file and the caller -> translated from published flags, those of a custom method as they are."""
    fields = custom.Keys.model_fields if custom else {}
    ours = {name: value for name, value in keys.items() if name in fields and name not in known_keys()}
    rest = {name: value for name, value in keys.items() if name not in ours}
    rest = flags.translate(rest, lambda method: method_class(custom or method).Keys.model_fields, complete)
    return _nones({**rest, **ours}, fields)


def _keys_of(start: str | Config) -> dict:
    return start.model_dump() if isinstance(start, Config) else _preset(start)


def checked(keys: dict, cls: type | None = None) -> Config:
    """The configuration of these keys. Raises `UserError` for values of the wrong type or out of their range."""
    cls = cls or method_class(keys.get("method", "normatch"))
    try:
        return cls.Keys(**keys)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None


def _canonical(keys: dict, fields: dict) -> dict:
    """Keys as the user wrote them -> under our names, those of published commands still to translate.

    fields: the keys of a method of the user's own.
    """
    names = {name: str(name).replace("-", "_") for name in keys}
    return {
        names[name] if names[name] in fields else flags.canonical(str(name), known_keys()): value
        for name, value in keys.items()
    }


def _nones(keys: dict, fields: dict) -> dict:
    """`none` becomes None where a key may be empty; `fields` as in `_canonical`."""

    def empty(name, value):
        users = known_keys().get(name)
        field = fields.get(name) or (method_class(users[0]).Keys.model_fields[name] if users else None)
        return field and type(None) in get_args(field.annotation) and str(value).lower() == "none"

    return {name: None if empty(name, value) else value for name, value in keys.items()}


def _explain(problem: dict) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"
