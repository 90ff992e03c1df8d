"""How settings are put together, and what is said of wrong ones."""

import pytest
import yaml

from normatch.config import known_keys, make_config, method_class, preset_text, presets
from normatch.errors import UserError
from normatch.published.flags import _RENAMED, ALIASES, PUBLISHED, REFUSED, SWITCHES


def test_the_default_is_normatch_on_digits():
    config = make_config()
    assert (config.method, config.dataset, config.num_labels) == ("normatch", "digits", 40)


def test_keys_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.5\nsteps: 7\n")
    config = make_config("cifar10-250", file, steps=9)
    assert (config.num_labels, config.lr, config.steps) == (250, 0.5, 9)


def test_strings_are_converted_and_none_is_understood():
    config = make_config(lr="0.1", steps="12", dist_align="false", hard_label="true", bn_momentum=None)
    assert (config.lr, config.steps, config.dist_align, config.hard_label) == (0.1, 12, False, True)
    assert config.bn_momentum is None


def test_a_saved_configuration_loads_as_it_was(tmp_path):
    config = make_config("cifar100-2500", seed=3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    assert make_config(file=tmp_path / "config.yaml") == config


def test_pseudo_label_kind_follows_the_method():
    assert make_config("cifar10-40", method="fixmatch").one_hot is True
    assert make_config("cifar10-40", method="normatch").one_hot is False
    assert make_config("cifar10-40", method="fixmatch", hard_label=False).one_hot is False
    assert make_config("cifar10-40", third_voter="sampled").one_hot is True
    dumped = {
        k: v
        for k, v in make_config("cifar10-40").model_dump().items()
        if k in method_class("fixmatch").Keys.model_fields
    }
    assert make_config(**{**dumped, "method": "fixmatch"}).one_hot is True


def test_published_recipes():
    recipe = make_config("cifar10-40")
    assert (recipe.lr, recipe.batch_size, recipe.uratio, recipe.steps) == (0.03, 64, 7, 2**20)
    assert (recipe.weight_decay, recipe.ema_decay, recipe.backbone) == (5e-4, 0.999, "wrn-28-2")
    assert (recipe.lambda_flow_unsup, recipe.dist_align, recipe.da_window) == (1e-6, True, 32)
    large = make_config("cifar100-10000")
    assert (large.backbone, large.weight_decay, large.num_labels) == ("wrn-28-8", 1e-3, 10000)
    assert make_config("miniimagenet-1000").da_window == 256
    assert make_config("stl10-1000").hard_label is True
    assert make_config("svhn-40").lambda_flow_unsup == 0
    assert make_config("cifar10-4000-two-flows").third_voter == "flow"


def test_a_data_set_alone_takes_its_own_recipe():
    assert make_config(dataset="cifar100", num_labels=2500).backbone == "wrn-28-8"


def test_run_folders_tell_runs_apart():
    folders = [make_config("cifar10-40", seed=s, method=m).folder for s in (0, 1) for m in ("normatch", "fixmatch")]
    assert len(set(folders)) == 4


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_valid(preset):
    assert make_config(preset).num_labels == presets()[preset]["num_labels"]


def test_published_names_are_accepted():
    config = make_config(
        **{"num-labeled": 250, "mu": 3, "threshold": 0.9, "wdecay": 1e-3, "no-onehot": True, "amp": True}
    )
    assert (config.num_labels, config.uratio, config.p_cutoff, config.weight_decay) == (250, 3, 0.9, 1e-3)
    assert (config.hard_label, config.precision) == (False, "bf16")
    assert make_config(amp=False).precision == "auto"
    flow = make_config("flowgmm-mnist-100", gmm_trainable=True, swa_freq=5, max_grad_norm=3, supervised_only=False)
    assert flow.means_trainable and flow.weights_trainable and flow.covs_trainable
    assert (flow.swa_every, flow.clip, flow.lambda_u) == (5, 3, 1)
    assert make_config(use_two_flows="true").third_voter == "flow"
    labeled = make_config("flowgmm-mnist-100", supervised_only=True)  # CE alone, whose weight is not looked at
    assert (labeled.lambda_u, labeled.labeled_loss, labeled.label_weight) == (0, "classes", 1)


def test_published_command_lines_are_understood():
    keys = {"arch": "wideresnet", "expand-labels": True, "use_ema": True, "num-labeled": 4000, "lr": 0.03}
    config = make_config(dataset="cifar10", **keys)
    assert (config.backbone, config.num_labels) == ("wrn-28-2", 4000)
    assert make_config(dataset="mini_imagenet").dataset == "miniimagenet"
    keys = {"save_name": "mine", "load_path": "theirs.pth", "num_classes": 10, "world-size": 1, "train_sampler": "x"}
    assert make_config(**keys).model_dump().items() >= {"out": "mine", "resume": "theirs.pth"}.items()


def test_a_run_folder_is_gone_on_from_under_its_own_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset: cifar10\nmethod: fixmatch\nbatch_size: 4\noverwrite: true\n")
    config = make_config(resume="auto", out=str(tmp_path), lr=0.1)
    assert (config.dataset, config.method, config.batch_size, config.lr) == ("cifar10", "fixmatch", 4, 0.1)
    assert not config.overwrite and make_config(out=str(tmp_path)).dataset == "digits"


def test_none_means_none_where_a_key_may_be_empty():
    assert make_config(bn_momentum="none").bn_momentum is None
    assert make_config(compat="none").compat == "none"


def test_aliases_lead_somewhere():
    targets = {*ALIASES.values(), *_RENAMED.values(), *(key for ours in SWITCHES.values() for key in ours)}
    assert targets <= set(known_keys()) and not {*ALIASES, *PUBLISHED, *REFUSED} & set(known_keys())
    assert not {*ALIASES, *REFUSED} & PUBLISHED and not {*ALIASES} & {*REFUSED}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_lables": 40}, "num_labels"),
        ({"weigth_decay": 1}, "weight_decay"),
        ({"treshold": 1}, "threshold"),
        ({"steps": "many"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"lr": "nan"}, "lr"),
        ({"lr": -1}, "lr"),
        ({"T": "inf"}, "T"),
        ({"widen-factor": 8}, "backbone wrn-DEPTH-WIDTH"),
        ({"means_r": "nan"}, "means_r"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"method": "fixmach"}, "fixmatch"),
        ({"dist_align": "perhaps"}, "dist_align"),
        ({"p_cutoff": 2}, "p_cutoff"),
    ],
)
def test_wrong_keys_are_explained_in_one_line(keys, said):
    with pytest.raises(UserError, match=said) as error:
        make_config(**keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("preset", "said"), [("cifar10-41", "cifar10-4"), ("digit", "digits")])
def test_unknown_preset_names_the_nearest(preset, said):
    with pytest.raises(UserError, match=said):
        make_config(preset)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "colour: red\n", ""])
def test_bad_files_are_explained(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError):
        make_config(file=tmp_path / "bad.yaml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        make_config(file=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("keys", "method", "optimizer_rate"),
    [
        ({"dataset": "mnist"}, "normatch", 0.03),  # images are classified, unless a flow is asked for
        ({"dataset": "mnist", "method": "fixmatch"}, "fixmatch", 0.03),
        ({"dataset": "mnist", "method": "flowgmm"}, "flowgmm", 1e-5),
        ({"dataset": "moons"}, "flowgmm", 1e-3),
        ({"dataset": "table"}, "flowgmm", 1e-3),
        ({"dataset": "digits", "method": "flowgmm"}, "flowgmm", 1e-3),
    ],
)
def test_without_a_preset_the_one_that_suits_data_and_method(keys, method, optimizer_rate):
    config = make_config(**keys)
    assert (config.method, config.lr) == (method, optimizer_rate)


def test_a_file_may_start_from_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: moons\nlr: 0.5\n")
    assert make_config(file=file) == make_config("moons", lr=0.5)
    assert make_config(file=file, lr=0.25).lr == 0.25
    # What comes later wins; a preset's keys that the method does not know are left out.
    config = make_config("cifar10-250", file, seed=3)
    assert (config.method, config.dataset, config.lr, config.seed) == ("flowgmm", "moons", 0.5, 3)
    file.write_text("preset: mine\n")  # presets are those that `normatch presets` lists: none can lead back here
    with pytest.raises(UserError, match="unknown preset 'mine'"):
        make_config(file=file)


@pytest.mark.parametrize("name", presets())
def test_a_preset_printed_to_a_file_is_the_preset(name, tmp_path):
    (tmp_path / "copy.yaml").write_text(preset_text(name))
    assert make_config(file=tmp_path / "copy.yaml") == make_config(name)
