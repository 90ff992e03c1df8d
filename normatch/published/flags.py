"""Published flags and configuration files -> keys under our names."""

from ..data import TABLES
from ..errors import UserError, nearest

# Published flag -> ours, or the values of ours that the flag alone stands for.
ALIASES = {
    "num_labeled": "num_labels",
    "total_steps": "steps",
    "num_train_iter": "steps",
    "eval_step": "eval_every",
    "num_eval_iter": "eval_every",
    "mu": "uratio",
    "learning_rate": "lr",
    "wdecay": "weight_decay",
    "ema_m": "ema_decay",
    "ulb_loss_ratio": "lambda_u",
    "threshold": "p_cutoff",
    "da_cache": "da_window",
    "arch": "backbone",
    "net": "backbone",
    "flow_dist_trainable": "trainable_prior",
    "no_onehot": {"hard_label": "false"},
    "no_grad_clip": {"clip": "0"},
    "no_progress": {"progress": "false"},
    "use_two_flows": {"third_voter": "flow"},
    "amp": {"precision": "bf16"},
    "data": "dataset",
    "supervised": "num_labels",
    "sup_weight": "label_weight",
    "swa_freq": "swa_every",
    "max_grad_norm": "clip",
    "unlab_weight": "lambda_u",
    "cov_std": "sigma",
    "data_path": "data_dir",
    "save_name": "out",
    "load_path": "resume",
    "supervised_only": {"lambda_u": "0"},
    "labelled_loss": "labeled_loss",
    "gmm_trainable": {"means_trainable": "true", "weights_trainable": "true", "covs_trainable": "true"},
}

# Published flags for what always holds here: endless sampling, Nesterov momentum, averaging; or what torchrun, the data
# set and the checkpoint say: processes, devices, classes, where to go on. Switches, and flags with a value.
UNNEEDED_SWITCHES = ("expand_labels", "nesterov", "use_ema", "multiprocessing_distributed")
UNNEEDED = (
    *UNNEEDED_SWITCHES, "opt_level", "gpu_id", "gpu", "local_rank", "rank", "world_size", "dist_url", "dist_backend",
    "num_classes", "train_sampler", "eval_batch_size", "epoch", "start_epoch", "save_dir",
)  # fmt: skip


# Published flags whose place is in the name of the backbone.
NETWORK_FLAGS = {
    "depth": "--backbone wrn-DEPTH-WIDTH",
    "widen_factor": "--backbone wrn-DEPTH-WIDTH",
    "net_from_name": "--backbone torchvision:NAME",
}


def canonical(name: str, known) -> str | dict[str, str] | None:
    """A key as the user wrote it (`num-labeled`) -> ours (`num_labels`), or the values that it implies, or None."""
    name = name.replace("-", "_")
    if name in known:
        return name
    if name in ALIASES:
        return ALIASES[name]
    if name in UNNEEDED:
        return None
    if name in NETWORK_FLAGS:
        raise UserError(f"{name} is part of the network's name here: {NETWORK_FLAGS[name]}")
    raise UserError(f"unknown key {name!r}{nearest(name, [*known, *ALIASES, *UNNEEDED])}")


def translate(keys: dict, known) -> dict:
    """Keys as the user wrote them -> the same under our names; `known`: ours. Raises `UserError` for an unknown one."""
    result = {}
    for name, value in keys.items():
        name = canonical(str(name), known)
        if name is None or (name == "backbone" and str(value).lower() in ("wideresnet", "resnet")):
            continue  # a published flag that has nothing to say here: the preset knows the network
        if isinstance(name, dict):  # a published on/off flag
            result.update({} if str(value).lower() in ("false", "0", "no", "off") else name)
        elif name == "dataset" and value == "mini_imagenet":  # as NorMatch calls it
            result[name] = "miniimagenet"
        else:
            result[name] = value
    return result


# Keys of SCNF's published configuration that say nothing here: folders, records, and what always holds.
_SCNF_UNNEEDED = (
    "name", "root", "time", "id", "status", "config_file", "config", "tmp", "logits", "sup_ohe", "num_examples", "k",
    "l", "hid_dim", "data_seed", "ssl_nclasses", "clip_gn", "lr_gamma", "lr_steps", "lr_warmup", "log_each", "test_bs",
)  # fmt: skip


def from_scnf(content: dict) -> dict:
    """SCNF's published file of keys -> keys known here; any other file as it is.

    Its epochs become steps, and the weight s of the labelled samples in its sampler, which draws them in s / (1 + s) of
    the cases, that share of each batch.
    """
    if "train_bs" not in content:
        return content
    keys = {name: value for name, value in content.items() if name not in _SCNF_UNNEEDED and value != ""}
    try:
        rows = int(content.get("num_examples", -1))
        if rows < 1:  # all there are, of the toys 1,000
            rows = 60000 if keys.get("data", "mnist") == "mnist" else 1000
        batch, share = int(keys.pop("train_bs")), float(keys.pop("sup_sample_weight", 0.5))
        epoch = -(-rows // batch)
        keys["steps"] = int(keys.pop("epochs", 500)) * epoch
        schedule = keys.pop("lr_schedule", "hat")
        if schedule == "hat":
            keys["warmup"] = int(content.get("lr_warmup", 10)) * epoch
    except (TypeError, ValueError) as error:
        raise UserError(f"a number in the configuration of SCNF cannot be read: {error}") from None
    if share <= 0:
        raise UserError("sup_sample_weight must be positive: what share of a batch is labelled follows from it")
    keys["uratio"] = max(1, round(1 / share))
    keys["batch_size"] = max(1, batch // (1 + keys["uratio"]))
    keys["schedule"] = {"no": "constant"}.get(schedule, "linear")
    keys["flow"] = keys.pop("model", "mnist-masked")
    ours = {"noise": 0.0, "consistency_weight": 0.0, "ema_decay": 0.0, "clip": 0.0}  # what presets may have besides
    return {"method": "scnf", **ours, **keys}


def upgrade_config(keys: dict, known_by) -> dict:
    """A configuration that 0.1.0 saved, with the keys of every method -> those of its method; any other as it is.

    `known_by(method)`: the keys that the method knows.
    """
    if not {"means", "ssl_hd", "da_window"} <= keys.keys():
        return keys
    keys = {"labeled_loss" if name == "labelled_loss" else name: value for name, value in keys.items()}
    if keys["method"] not in ("flowgmm", "scnf"):
        keys["schedule"] = "cosine-7-16"  # was the only one of classifiers, and no key of theirs
    elif keys["dataset"] in TABLES:
        keys["augment"] = "none"  # said "weak", which means nothing for rows
    return {name: value for name, value in keys.items() if name in known_by(keys["method"])}
