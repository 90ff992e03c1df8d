"""Published commands: each flag means what it means in the code that it comes from, or is refused."""

import subprocess
import sys
import warnings

import pytest
from test_cli import configured, refused

from normatch.config import make_config
from normatch.errors import UserError

NORMATCH = {"dataset": "cifar10", "arch": "wideresnet", "expand-labels": True}
LEEDOYUP = {"dataset": "cifar10", "net": "WideResNet", "num_classes": 10}
SCNF = {"data": "mnist", "train_bs": 256, "supervised": 100, "sup_sample_weight": 0.5, "lr_schedule": "linear"}


def command_line(keys):
    return ["train", *(f"--{name}" if value is True else f"--{name}={value}" for name, value in keys.items())]


def through(door, keys, tmp_path):
    """The configuration of keys given in Python, in a YAML file, or on the command line, and what is said of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if door == "python":
            config = make_config(**keys)
        elif door == "yaml":
            (tmp_path / "c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
            config = make_config(file=tmp_path / "c.yaml")
        else:
            config = configured(command_line(keys))
    return config, [str(warning.message) for warning in said]


CASES = {
    "left out, no alignment and one-hot": (NORMATCH, {"dist_align": False, "hard_label": True}),
    "given": ({**NORMATCH, "dist_align": True, "no_onehot": True}, {"dist_align": True, "hard_label": False}),
    "other defaults": (
        NORMATCH,
        {"num_labels": 4000, "lambda_flow_unsup": 0, "trainable_prior": False, "warmup_flow": 5120},
    ),
    "warmup_flow in epochs": ({**NORMATCH, "warmup_flow": 10}, {"warmup_flow": 10240}),
    "epochs of another length": ({**NORMATCH, "warmup_flow": 2, "eval-step": 100}, {"warmup_flow": 200}),
    "FixMatch has no flow": ({**NORMATCH, "method": "fixmatch"}, {"method": "fixmatch", "one_hot": True}),
    "wide network of CIFAR-100": (
        {**NORMATCH, "dataset": "cifar100"}, {"backbone": "wrn-28-8", "weight_decay": 5e-4},
    ),
    "residual networks": (
        {**NORMATCH, "dataset": "mini_imagenet", "arch": "resnet"},
        {"backbone": "resnet18", "dataset": "miniimagenet", "da_window": 32},
    ),
    "a switch beside a data set": ({"dataset": "svhn", "no-progress": True}, {"dist_align": False, "progress": False}),
    "LeeDoYup": (LEEDOYUP, {"method": "fixmatch", "T": 0.5, "num_labels": 4000, "backbone": "wrn-28-2"}),
    "LeeDoYup's CIFAR-100": ({**LEEDOYUP, "dataset": "cifar100"}, {"backbone": "wrn-28-2"}),
    "no dropout": ({**LEEDOYUP, "dropout": 0.0}, {"method": "fixmatch"}),
    "ema_m and BatchNorm": ({**LEEDOYUP, "ema_m": 0.99}, {"ema_decay": 0.99, "bn_momentum": 0.01}),
    "ema_m alone": ({"ema_m": 0.99}, {"ema_decay": 0.99, "bn_momentum": 0.01, "method": "normatch"}),
    "bn_momentum given": ({**LEEDOYUP, "ema_m": 0.99, "bn_momentum": 0.2}, {"ema_decay": 0.99, "bn_momentum": 0.2}),
    "hard_label is any word": ({**LEEDOYUP, "hard_label": "False"}, {"hard_label": True}),
    "USB": ({**LEEDOYUP, "algorithm": "fixmatch", "hard_label": "False"}, {"hard_label": False, "T": 0.5}),
    "folders": ({**LEEDOYUP, "save_dir": "a", "save_name": "b"}, {"out": "a/b"}),
    "what always holds": ({**LEEDOYUP, "momentum": 0.9, "leaky_slope": 0.1}, {"method": "fixmatch"}),
    "SCNF": (
        SCNF,
        {"method": "scnf", "steps": 117500, "num_labels": 100, "batch_size": 85, "uratio": 2, "ssl_k": 3, "noise": 0},
    ),
    "all of SCNF's labels": ({**SCNF, "supervised": -1, "ssl_dim": -1}, {"num_labels": 0, "ssl_dim": 0}),
    "SCNF's couplings": ({**SCNF, "data": "moons", "model": "toy", "l": 3}, {"flow": "toy", "couplings": 3}),
}  # fmt: skip


@pytest.mark.parametrize("door", ["python", "yaml", "command line"])
@pytest.mark.parametrize("case", CASES)
def test_published_flags_keep_their_meaning(case, door, tmp_path):
    keys, want = CASES[case]
    config, said = through(door, keys, tmp_path)
    assert {name: getattr(config, name) for name in want} == want
    assert len(said) == 1 and "\n" not in said[0]


REFUSALS = [
    ({**LEEDOYUP, "dropout": 0.3}, "dropout is the wide ResNet's"),
    ({**LEEDOYUP, "widen_factor": 8}, "wrn-DEPTH-WIDTH"),
    ({**LEEDOYUP, "leaky_slope": 0.2}, "leaky_slope is always 0.1"),
    ({**NORMATCH, "use_ema": "false"}, "use_ema is always true"),
    ({**NORMATCH, "warmup_flow": "long"}, "warmup_flow: 'long' is not a number"),
    ({"ema_m": "x"}, "ema_m: 'x' is not a number"),
    ({**NORMATCH, "warmup_flow": "nan"}, "warmup_flow: 'nan' is not a number"),
    ({"eval_every": "inf"}, "eval_every"),
    ({"supervised": "nan"}, "supervised: 'nan' is not a number"),
    ({"method": "flowgmm", "cov_std": 2}, "--sigma"),
    ({"method": "flowgmm", "logdir": "x"}, "FlowGMM's published scripts"),
    ({"epochs": 3}, "epochs is a key of SCNF"),
    ({**SCNF, "supervised": 0}, "no labels at all"),
    ({**SCNF, "sup_sample_weight": -1}, "sup_sample_weight must be positive"),
]


@pytest.mark.parametrize(("keys", "said"), REFUSALS)
def test_what_cannot_be_translated_is_refused(keys, said, capsys):
    with pytest.raises(UserError, match=said):
        make_config(**keys)
    refused(capsys, command_line(keys), said)


def test_one_line_on_standard_error_names_each_translation(tmp_path):
    keys = {**NORMATCH, "warmup_flow": 2, "gpu-id": 0, "data_dir": tmp_path / "none"}
    command = [sys.executable, "-m", "normatch", *command_line(keys)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    # Beside other lines, such as Matplotlib's at its first start, or that the ops run without the extension.
    *others, error = run.stderr.splitlines()
    (line,) = [line for line in others if line.startswith("normatch: as in the published code of NorMatch: ")]
    for text in ("warmup_flow 2048", "dist_align false", "hard_label true", "expand_labels, gpu_id"):
        assert text in line
    assert "--download" in error


@pytest.mark.parametrize(
    "keys", [{"num-labeled": 250, "mu": 3}, {"no_progress": True}, {"dataset": "digits", "no_progress": True}]
)
def test_another_name_of_our_key_does_not_make_a_published_command(keys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make_config(**keys)
    assert (config.dataset, config.dist_align, config.warmup_flow) == ("digits", True, 400)


def test_a_named_preset_says_what_is_left_out(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: cifar10-250\nexpand-labels: true\n")
    with pytest.warns(UserWarning, match="not needed here"):
        assert make_config("cifar10-250", arch="wideresnet", expand_labels=True) == make_config("cifar10-250")
    with pytest.warns(UserWarning, match="not needed here"):
        assert make_config(file=tmp_path / "c.yaml") == make_config("cifar10-250")
    with pytest.raises(UserError, match="--backbone"):
        make_config("cifar10-250", arch="resnet")


def test_flags_in_a_file_and_on_the_command_line_are_one_command(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset: cifar10\nexpand-labels: true\ndist_align: true\nwarmup_flow: 1\nmu: 3\n")
    with pytest.warns(UserWarning, match="warmup_flow 2048"):
        config = make_config(file=tmp_path / "c.yaml", warmup_flow=2, uratio=2)
    assert (config.dist_align, config.hard_label, config.warmup_flow, config.uratio) == (True, True, 2048, 2)


def test_batch_size_is_that_of_a_process_in_kekmodels_code(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="batch_size 64"):
        assert make_config(**NORMATCH, **{"batch-size": 16}).batch_size == 64
    with pytest.warns(UserWarning, match="batch_size 256"):
        assert make_config(**NORMATCH).batch_size == 256
    assert make_config(batch_size=16).batch_size == 16


def test_a_run_resumes_under_the_same_published_command(tmp_path):
    keys = {**NORMATCH, "out": str(tmp_path), "resume": "auto"}
    with pytest.warns(UserWarning):
        first = make_config(**keys)
    (tmp_path / "config.yaml").write_text(
        "".join(f"{k}: {'null' if v is None else v}\n" for k, v in first.model_dump().items())
    )
    with pytest.warns(UserWarning):
        assert make_config(**keys) == first
