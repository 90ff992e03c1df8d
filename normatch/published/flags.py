"""Published flags and configuration files -> keys under our names.

A plain alias (`--mu`) is another name of a key of ours, anywhere. A command or file that holds a flag which only
published code has (`--expand-labels`) is a published one: what it leaves out means what it means there, unless a preset
is named, which then says the rest. `translate` is the one place where all this happens, for command lines, YAML files
and Python, and warns in one line of what it changed.
"""

import math
import os
import warnings

from ..data import TABLES
from ..errors import UserError, nearest

# Plain alias -> our key.
ALIASES = {
    "num_labeled": "num_labels",
    "total_steps": "steps",
    "num_train_iter": "steps",
    "eval_step": "eval_every",
    "num_eval_iter": "eval_every",
    "mu": "uratio",
    "learning_rate": "lr",
    "wdecay": "weight_decay",
    "ulb_loss_ratio": "lambda_u",
    "threshold": "p_cutoff",
    "da_cache": "da_window",
    "flow_dist_trainable": "trainable_prior",
    "data": "dataset",
    "sup_weight": "label_weight",
    "swa_freq": "swa_every",
    "max_grad_norm": "clip",
    "unlab_weight": "lambda_u",
    "data_path": "data_dir",
    "labelled_loss": "labeled_loss",
}

# The same, but of published commands alone.
_RENAMED = {"save_name": "out", "load_path": "resume", "algorithm": "method"}

# Published on/off flag -> what it sets here.
SWITCHES = {
    "no_onehot": {"hard_label": False},
    "no_grad_clip": {"clip": 0},
    "no_progress": {"progress": False},
    "use_two_flows": {"third_voter": "flow"},
    "amp": {"precision": "bf16"},
    "supervised_only": {"lambda_u": 0, "labeled_loss": "classes", "label_weight": 1},
    "gmm_trainable": {"means_trainable": True, "weights_trainable": True, "covs_trainable": True},
}

# Published flags for what always holds here: endless sampling, averaging; or what torchrun, the data set and the
# checkpoint say: processes, devices, classes, where to go on. Switches, and flags with a value.
UNNEEDED_SWITCHES = ("expand_labels", "nesterov", "use_ema", "multiprocessing_distributed")
UNNEEDED = (
    *UNNEEDED_SWITCHES, "opt_level", "gpu_id", "gpu", "local_rank", "rank", "world_size", "dist_url", "dist_backend",
    "num_classes", "train_sampler", "eval_batch_size", "epoch", "start_epoch",
)  # fmt: skip
# Published flag -> the one value that it can have here.
FIXED = {"nesterov": True, "use_ema": True, "momentum": 0.9, "leaky_slope": 0.1}

# Published flags that have no counterpart -> why.
_BACKBONE = "is part of the network's name here: --backbone"
_FLOWGMM = (
    "is of FlowGMM's published scripts, which count in epochs and in half-labeled batches: take a preset, such as "
    "flowgmm-mnist-100, and the keys of `normatch train --method flowgmm --help`"
)
REFUSED = {
    "depth": f"{_BACKBONE} wrn-DEPTH-WIDTH",
    "widen_factor": f"{_BACKBONE} wrn-DEPTH-WIDTH",
    "net_from_name": f"{_BACKBONE} torchvision:NAME",
    "cov_std": "is ignored by FlowGMM's image scripts and put through a softplus by its others: say --sigma",
    **dict.fromkeys(
        ("label_path", "logdir", "ckptdir", "use_validation", "gpu_ids", "num_epochs", "num_samples", "save_freq",
         "eval_freq", "swa", "acc_train_all_labels", "confusion", "n_gaussians", "net_config", "trainer_config"),
        _FLOWGMM,
    ),
}  # fmt: skip

# Flags that tell whose command it is. Those of `_HINTS` are a convenience too, and tell so only beside a data set.
_MARKERS = {
    "NorMatch": ("expand_labels", "arch", "nesterov", "use_ema", "opt_level", "gpu_id", "start_epoch", "local_rank"),
    "LeeDoYup": (
        "net", "save_dir", "save_name", "load_path", "epoch", "eval_batch_size", "num_classes", "train_sampler",
        "world_size", "rank", "dist_url", "dist_backend", "gpu", "multiprocessing_distributed", "momentum",
        "leaky_slope", "algorithm",
    ),
    "SCNF": ("train_bs", "test_bs", "sup_sample_weight", "ssl_nclasses"),
}  # fmt: skip
_HINTS = {
    "NorMatch": ("amp", "no_progress", "no_onehot", "no_grad_clip", "use_two_flows"),
    "LeeDoYup": ("ema_m",),
}
_HINTED_DATA = ("cifar10", "cifar100", "svhn", "stl10", "miniimagenet", "imagenet")

# What published code takes for a flag that is left out, where it is not what our presets take.
_LEFT_OUT = {
    "NorMatch": {
        "dataset": "cifar10", "num_labels": 4000, "dist_align": False, "hard_label": True, "lambda_flow_unsup": 0,
        "trainable_prior": False, "da_window": 32, "weight_decay": 5e-4,
    },
    "LeeDoYup": {
        "method": "fixmatch", "dataset": "cifar10", "num_labels": 4000, "T": 0.5, "weight_decay": 5e-4,
        "eval_every": 10_000, "backbone": "wrn-28-2",
    },
}  # fmt: skip
_WARMUP_EPOCHS = 5
# --arch and data set -> the network; None: any other data set
_NETWORKS = {
    "wideresnet": {"cifar100": "wrn-28-8", None: "wrn-28-2"},
    "resnet": {"stl10": "resnet18", "miniimagenet": "resnet18", None: "resnet50"},
}

# Keys of SCNF's published configuration that say nothing here: folders, records, and what always holds.
_SCNF_UNNEEDED = (
    "name", "root", "time", "id", "status", "config_file", "config", "tmp", "logits", "sup_ohe", "k", "hid_dim",
    "data_seed", "ssl_nclasses", "clip_gn", "lr_gamma", "lr_steps", "log_each", "test_bs",
)  # fmt: skip
_SCNF = (
    *_SCNF_UNNEEDED, "num_examples", "train_bs", "sup_sample_weight", "epochs", "lr_schedule", "lr_warmup", "model", "l"
)  # fmt: skip

# Everything that only published code knows, but for plain aliases.
PUBLISHED = {*SWITCHES, *UNNEEDED, *FIXED, *_RENAMED, *_SCNF, "arch", "net", "ema_m", "save_dir", "supervised"}


def canonical(name: str, known) -> str:
    """A key as the user wrote it (`num-labeled`) -> ours (`num_labels`), or a published one that is still to translate.

    `known`: our keys. Raises `UserError` for an unknown one, and for a published one without a counterpart.
    """
    name = name.replace("-", "_")
    if name in known or name in PUBLISHED:
        return name
    if name in REFUSED:
        raise UserError(f"{name} {REFUSED[name]}")
    if name not in ALIASES:
        raise UserError(f"unknown key {name!r}{nearest(name, [*known, *ALIASES, *sorted(PUBLISHED - {*_SCNF})])}")
    return ALIASES[name]


def translate(keys: dict, known_by, complete: bool) -> dict:
    """Keys under the names of `canonical`, of which later ones win -> under our names and with our meaning.

    known_by(method): the keys that the method knows.   complete: whether keys that a published command leaves out get
    the values that they have there. Raises `UserError` for what cannot be said here.
    """
    family = _family(keys)
    result, changes, unneeded = {}, {}, []
    if family == "SCNF":
        unneeded = [name for name in keys if name in _SCNF_UNNEEDED]
        theirs, keys = keys, _from_scnf(keys)
        changes = {name: keys[name] for name in ("steps", "batch_size", "uratio", "schedule") if name not in theirs}
    epoch = int(_number("eval_every", keys.get("eval_every", 1024))) if family else 1024  # the published one, in steps
    for name, value in keys.items():
        if name in FIXED:
            _check_fixed(name, value)
        if name in UNNEEDED or name in FIXED:
            unneeded.append(name)
            continue
        if name in _SCNF:
            raise UserError(f"{name} is a key of SCNF's published configuration, which needs train_bs, too")
        new = _translated(name, value, keys, family, epoch, complete)
        result.update(new)
        if new != {name: value} and name not in ("dataset", *SWITCHES, *_RENAMED):
            changes.update(new)
    left_out = _left_out(family, result, known_by, epoch) if complete else {}
    _tell(family, changes, left_out, unneeded)
    return {**left_out, **result}


def _family(keys: dict) -> str | None:
    """Whose published command this is, if it is one."""
    dataset = str(keys.get("dataset", "")).replace("mini_", "mini")
    hinted = {family: names if dataset in _HINTED_DATA else () for family, names in _HINTS.items()}
    families = [f for f, names in _MARKERS.items() if any(name in keys for name in (*names, *hinted.get(f, ())))]
    return families[0] if families else None


def _translated(name: str, value, keys: dict, family: str | None, epoch: int, complete: bool) -> dict:
    """One key -> what it says in ours."""
    if name in SWITCHES:
        return SWITCHES[name] if _is_on(value) else {}
    if name in ("save_dir", "save_name"):
        return {"out": os.path.join(str(keys.get("save_dir", "")), str(keys.get("save_name", "fixmatch")))}
    if name in _RENAMED:
        return {_RENAMED[name]: value}
    if name in ("arch", "net"):
        return _network(name, str(value), keys, complete)
    if name == "ema_m":
        decay = _number(name, value)
        return {"ema_decay": decay} | ({} if "bn_momentum" in keys else {"bn_momentum": round(1 - decay, 12)})
    if name == "supervised":
        if (count := int(_number(name, value))) == 0:
            raise UserError("supervised 0 means no labels at all in SCNF's published code: there is nothing to learn")
        return {"num_labels": max(0, count)}
    if name == "dataset" and value == "mini_imagenet":
        return {"dataset": "miniimagenet"}
    if name == "warmup_flow" and family == "NorMatch":
        return {"warmup_flow": round(_number(name, value) * epoch)}
    if name == "batch_size" and family == "NorMatch":  # is that of a process there
        return {"batch_size": int(_number(name, value)) * _processes()} if _processes() > 1 else {name: value}
    if name == "dropout" and family == "LeeDoYup":
        if _number(name, value):
            raise UserError("dropout is the wide ResNet's in LeeDoYup's published code, and those here have none")
        return {}
    if name == "hard_label" and family == "LeeDoYup" and "algorithm" not in keys:
        return {"hard_label": True}  # their parser takes every word for true
    return {name: value}


def _network(name: str, value: str, keys: dict, complete: bool) -> dict:
    kind = value.lower()
    if kind == "wideresnet" and (name == "net" or not complete):
        return {}  # the default of `_LEFT_OUT`, or what the preset says
    if kind == "resnet" and not complete:
        raise UserError(f"{name} {value} does not tell which network: say --backbone resnet18 or resnet50")
    if kind in _NETWORKS:
        dataset = str(keys.get("dataset", "cifar10")).replace("mini_", "mini")
        return {"backbone": _NETWORKS[kind].get(dataset, _NETWORKS[kind][None])}
    return {"backbone": value.replace("_", "-") if kind.startswith("wrn_") else value}


def _left_out(family: str | None, given: dict, known_by, epoch: int) -> dict:
    """What a published command takes for the flags that it leaves out."""
    values = dict(_LEFT_OUT.get(family, {}))
    dataset = given.get("dataset", values.get("dataset"))
    method = given.get("method") or values.get("method") or ("flowgmm" if dataset in TABLES else "normatch")
    if family == "NorMatch":
        values |= {"warmup_flow": _WARMUP_EPOCHS * epoch, **_network("arch", "wideresnet", given, True)}
        values |= {"batch_size": 64 * _processes()} if _processes() > 1 else {}
    known = known_by(method) if values else ()
    return {} if "flow" in known else {k: v for k, v in values.items() if k in known and k not in given}


def _tell(family: str | None, changes: dict, left_out: dict, unneeded: list[str]):
    """Warn in one line of all that is not taken literally."""

    def text(keys):
        return ", ".join(f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in keys)

    parts = [text(changes.items())] if changes else []
    if left_out:
        parts.append(f"left out, so {text(left_out.items())}")
    if unneeded:
        parts.append(f"not needed here: {', '.join(unneeded)}")
    if parts:
        whose = f"as in the published code of {family}" if family else "translated"
        warnings.warn(f"{whose}: {'; '.join(parts)}", stacklevel=2)


def _check_fixed(name: str, value):
    wanted = FIXED[name]
    if not (_is_on(value) if wanted is True else _number(name, value) == wanted):
        raise UserError(f"{name} is always {str(wanted).lower()} here, not {value}")


def _is_on(value) -> bool:
    return str(value).lower() not in ("false", "0", "no", "off")


def _number(name: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name}: {value!r} is not a number")
    return number


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says


def _from_scnf(content: dict) -> dict:
    """SCNF's published keys -> those of `translate`.

    Its epochs become steps, and the weight s of the labeled samples in its sampler, which draws them in s / (1 + s) of
    the cases, that share of each batch.
    """
    keys = {name: value for name, value in content.items() if name not in _SCNF and value != ""}
    get = {"sup_sample_weight": -1, "epochs": 500, "train_bs": 256, "num_examples": -1, "lr_warmup": 10, **content}.get
    rows, epochs, batch, warmup = (int(_number(n, get(n))) for n in ("num_examples", "epochs", "train_bs", "lr_warmup"))
    share, schedule = _number("sup_sample_weight", get("sup_sample_weight")), get("lr_schedule", "hat")
    if rows < 1:  # all there are, of the toys 1,000
        rows = 60000 if keys.get("dataset", "mnist") == "mnist" else 1000
    if share <= 0 or batch < 1:
        raise UserError("sup_sample_weight must be positive: what share of a batch is labeled follows from it")
    epoch, flow = -(-rows // batch), get("model", "mnist-masked")
    uratio = max(1, round(1 / share))
    ours = {
        "method": "scnf", "dataset": "mnist", "flow": flow, "steps": epochs * epoch, "uratio": uratio,
        "batch_size": max(1, batch // (1 + uratio)), "schedule": {"no": "constant"}.get(schedule, "linear"),
        # What our presets may have besides, and the published defaults that are not ours.
        "noise": 0.0, "consistency_weight": 0.0, "ema_decay": 0.0, "clip": 0.0, "lr": 1e-3, "weight_decay": 0.0,
        "ssl_l": 2, "ssl_k": 3, "ssl_hd": 256, "cl_weight": 0.0, "ssl_dim": 0,
    }  # fmt: skip
    if schedule == "hat":
        ours["warmup"] = warmup * epoch
    if flow == "toy":
        ours |= {"couplings": int(_number("l", get("l", 2))), "hidden": 64}
    if int(_number("ssl_dim", keys.get("ssl_dim", 0))) < 0:
        del keys["ssl_dim"]  # all
    if "supervised" not in keys and "num_labels" not in keys:
        keys["supervised"] = 0
    return {**ours, **keys}


def upgrade_config(keys: dict, known_by) -> dict:
    """A configuration that 0.1.0 saved, with the keys of every method -> those of its method; any other as it is.

    `known_by(method)`: the keys that the method knows.
    """
    if not {"means", "ssl_hd", "da_window", "method", "dataset"} <= keys.keys():
        return keys
    keys = {"labeled_loss" if name == "labelled_loss" else name: value for name, value in keys.items()}
    if keys["method"] not in ("flowgmm", "scnf"):
        keys["schedule"] = "cosine-7-16"  # was the only one of classifiers, and no key of theirs
    elif keys["dataset"] in TABLES:
        keys["augment"] = "none"  # said "weak", which means nothing for rows
    return {name: value for name, value in keys.items() if name in known_by(keys["method"])}
