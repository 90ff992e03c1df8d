"""Training of flows: whole runs on toys and images, what the configuration sets, mistakes."""

import functools
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from test_flows import published_state
from test_step import NoReadBack
from torch.nn import functional as F

import normatch
import normatch.tools.convert
from normatch.cli import main
from normatch.config import make_config, method_class
from normatch.data import Dataset, Split, load_dataset
from normatch.errors import UserError
from normatch.flows.build import make_prior
from normatch.published.checkpoints import load_checkpoint
from normatch.tools.verify import same
from normatch.training.optim import SCHEDULES, SWA
from normatch.training.state import State
from normatch.training.step import TrainStep

CPU = torch.device("cpu")


def tiny(out, preset="moons", **keys):
    given = {"steps": 60, "hidden": 32, "eval_every": 30, "log_every": 15, "progress": False, "device": "cpu"}
    return make_config(preset, out=str(out), **{**given, **keys})


def make_state(config, dataset=None, split=None):
    return State(config, method_class(config.method), CPU, dataset=dataset, split=split)


def test_training_teaches_the_moons_and_leaves_a_run_folder(tmp_path):
    out = tmp_path / "run"
    result = normatch.train(tiny(out, steps=300, eval_every=100, lr=3e-3, label_weight=1.0, lambda_u=1.0))
    assert result.test_accuracy > 97  # untrained below 90, a straight line 88
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert train[-1]["loss_u"] < train[0]["loss_u"] - 1 and train[-1]["pseudo_label_accuracy"] > 0.95
    assert "test_log_prob" in lines[-1]
    assert json.loads((out / "summary.json").read_text())["test_accuracy"] == result.test_accuracy
    assert yaml.safe_load((out / "config.yaml").read_text())["flow"] == "tabular"
    for name in ("plane.png", "latent.png", "curves.png"):
        assert (out / name).stat().st_size > 10000


@pytest.mark.parametrize("keys", [{}, {"swa_start": 8, "swa_every": 3}], ids=["ema", "swa"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, keys):
    noisy = {"dropout": 0.2, "noise": 0.1, "means_trainable": True, "covs_trainable": True, **keys}
    noisy |= {"steps": 20, "eval_every": 10}
    normatch.train(tiny(tmp_path / "whole", **noisy))
    normatch.train(tiny(tmp_path / "half", **noisy))
    whole = load_checkpoint(tmp_path / "whole")
    half = tmp_path / "half" / "checkpoints"
    (half / "last.pt").write_bytes((half / "previous.pt").read_bytes())  # of step 10
    assert load_checkpoint(tmp_path / "half")["step"] == 10
    normatch.train(tiny(tmp_path / "half", resume="auto", **noisy))
    again = load_checkpoint(tmp_path / "half")
    assert same(whole["model"], again["model"]) and same(whole["ema"], again["ema"])
    assert not same(whole["model"]["density.prior.means"], place(tmp_path))


def place(folder):
    return make_state(tiny(folder)).method.density.prior.means.data


def test_x_train_an_image_flow(tmp_path):
    keys = {"dataset": "digits", "num_labels": 20, "image_size": 8, "flow": "realnvp", "flow_width": 4, "lr": 1e-3}
    more = {"flow_blocks": 1, "batch_size": 4, "means_r": 0.3, "steps": 6, "eval_every": 6, "log_every": 3}
    result = normatch.train(tiny(tmp_path / "run", "flowgmm-mnist-100", **keys, **more))
    assert 0 <= result.test_accuracy <= 100
    train = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert train[1]["loss_u"] < train[0]["loss_u"] and "loss_consistency" in train[0]
    assert (tmp_path / "run" / "samples.png").stat().st_size > 5000


def test_flows_train_in_bf16_and_fp64_and_in_a_graph(tmp_path, monkeypatch):
    image = {**SMALL_IMAGES, "flow": "realnvp-1x1-actnorm"}
    losses = {}
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}.items():
        torch.manual_seed(0)
        state = make_state(make_config("flowgmm-mnist-100", precision=precision, **image))
        batch, seen = next(state.batches(0)), []
        state.method.density.register_forward_hook(lambda model, x, out, seen=seen: seen.append(out))
        state.begin_step()
        TrainStep(state)([batch])
        assert {v.dtype for out in seen for v in out} == {dtype} and state.finite()
        losses[precision] = -seen[-1].log_prob.mean().item()
    assert abs(losses["bf16"] / losses["fp32"] - 1) < 0.05 and losses["bf16"] != losses["fp32"]

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    alone = {**image, "consistency_weight": 0.0}  # half of the graph
    for preset, keys in {"flowgmm-mnist-100": alone, "scnf-moons": {"hidden": 8, "ssl_hd": 8, "ssl_k": 1}}.items():
        results = []
        for mode in (None, "default"):
            torch.manual_seed(0)
            state = make_state(make_config(preset, **keys))
            step, batch = TrainStep(state, mode), next(state.batches(0))
            state.begin_step()
            torch.manual_seed(1)
            results.append(step([batch]))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_swa_is_the_mean_of_the_weights_it_saw():
    layer = torch.nn.Linear(1, 1)
    swa, seen = SWA(layer, start=2, every=2), []
    for n in range(1, 7):
        layer.weight.data.fill_(n)
        swa.update()
        seen.append(swa.module.weight.item())
    assert seen == [1, 2, 2, 3, 3, 4]  # a copy; then the means of 2 | 2, 4 | 2, 4, 6


def test_schedules_are_as_published():
    assert [SCHEDULES["steps"](p) for p in (0.49, 0.5, 0.8)] == [1.0, 0.1, 0.01]
    assert SCHEDULES["wilson"](0.5) == 1.0 and abs(SCHEDULES["wilson"](0.7) - 0.505) < 1e-9
    assert SCHEDULES["wilson"](0.95) == 0.01 and SCHEDULES["cosine"](1.0) == 1e-3
    assert SCHEDULES["linear"](0.25) == 0.75


# ---- What is set from the configuration


def test_each_kind_of_parameter_has_its_rate_and_decay():
    keys = {"lr": 1e-3, "lr_gmm": 0.3, "weight_decay": 0.1, "means_trainable": True}
    state = make_state(make_config("flowgmm-mnist-100", **{**SMALL_IMAGES, **keys}))
    names = {p: name for name, p in state.method.density.named_parameters()}
    rates = {names[p]: (g["lr"], g["weight_decay"]) for g in state.optimizer.groups for p in g["params"]}
    assert rates.pop("prior.means") == (0.3, 0.0)
    gains = {name for name in rates if name.endswith(("weight_g", ".gain"))}
    assert gains and all(rates[name] == (1e-3, 0.1) for name in gains)
    assert all(rates[name] == (1e-3, 0.0) for name in set(rates) - gains)
    flow = state.method.density.flow
    assert set(rates) == {f"flow.{name}" for name, p in flow.named_parameters() if p.requires_grad}
    rows = state_of(np.random.RandomState(0).randn(6, 2), [0, 1, 0, 1, -1, -1], ["a", "b"], weight_decay=0.1)
    assert [group["weight_decay"] for group in rows.optimizer.groups] == [0.1]


def test_gradients_are_clipped_group_by_group():
    x = np.random.RandomState(0).randn(6, 2)
    keys = {"optimizer": "sgd", "lr": 1.0, "lr_gmm": 1.0, "means_trainable": True, "weight_decay": 0.0}
    state = state_of(x, [0, 1, 0, 1, -1, -1], ["a", "b"], clip=1e-3, **keys)
    before = [[p.detach().clone() for p in group["params"]] for group in state.optimizer.groups]
    state.begin_step()
    TrainStep(state)([next(state.batches(0))])
    for group, old in zip(state.optimizer.groups, before, strict=True):
        moved = torch.cat([(p - q).flatten() for p, q in zip(group["params"], old, strict=True)]).norm()
        assert abs(moved / 1e-3 - 1) < 0.05  # both gradients are longer than that


def test_the_rate_rises_falls_and_stays_where_weights_are_averaged():
    x, y = np.random.RandomState(0).randn(6, 2), [0, 1, 0, 1, -1, -1]
    keys = {"lr": 0.1, "lr_gmm": 0.2, "means_trainable": True, "schedule": "linear", "warmup": 4, "steps": 12}

    def rates(**more):
        state = state_of(x, y, ["a", "b"], **keys, **more)
        for state.step in range(12):
            rate = state.begin_step()
            assert [tensor.item() for tensor in state.optimizer.rates] == pytest.approx([rate, 2 * rate])
            yield rate

    falling = [0.1 * (1 - step / 8) for step in range(8)]
    assert list(rates()) == pytest.approx([0.0, 0.025, 0.05, 0.075, *falling])
    assert list(rates(swa_start=9, swa_lr=0.03))[9:] == pytest.approx([0.03] * 3)


def test_the_mixture_has_the_width_asked_for_and_trains_what_it_is_told_to():
    means = torch.eye(3)
    for name, parameter in {"means": "means", "covs": "rho", "weights": "mixture_logits"}.items():
        prior = make_prior(make_config("moons", sigma=1.3133, **{f"{name}_trainable": True}), means)
        torch.testing.assert_close(F.softplus(prior.rho), torch.full((3,), 1.3133))
        assert [n for n, p in prior.named_parameters() if p.requires_grad] == [parameter]


def test_a_published_checkpoint_can_be_begun_with(tmp_path):
    keys = {**SMALL_IMAGES, "flow": "realnvp-1x1-actnorm"}
    flow = make_state(make_config("flowgmm-mnist-100", **keys)).method.density.flow
    state, means = published_state(flow), torch.randn(10, 64)
    net = {f"module.{name}": value for name, value in state.items()}
    torch.save({"net": net, "epoch": 3, "means": means}, tmp_path / "published.pt")
    begun = make_state(make_config("flowgmm-mnist-100", pretrained=str(tmp_path / "published.pt"), **keys))
    flow.load_published(state)
    for name, value in flow.state_dict().items():
        assert torch.equal(begun.method.density.flow.state_dict()[name], value), name
    assert torch.equal(begun.method.density.prior.means, means)


# ---- Mistakes


def state_of(x, y, classes, **keys):
    x = np.asarray(x, np.float32)
    d = x.shape[1]
    table = Dataset("own", x, np.asarray(y), x, np.asarray(y), classes, np.zeros(d, "f4"), np.ones(d, "f4"))
    labeled = np.flatnonzero(np.asarray(y) >= 0)
    split = Split(labeled, np.arange(len(y)), np.empty(0, np.int64))
    return make_state(make_config("moons", batch_size=2, uratio=1, **keys), table, split)


def test_mistakes_are_told_before_training():
    x = np.random.RandomState(0).randn(6, 2)
    with pytest.raises(UserError, match="class 'c' has no labeled row"):  # more components than classes
        state_of(x, [0, 1, 0, 1, -1, -1], ["a", "b", "c"])
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.1"):
        state_of(x, [0, 1, 0, 2, -1, -1], ["a", "b"])
    with pytest.raises(UserError, match="is a table and glow a flow of images"):
        state_of(x, [0, 1, 0, 1, -1, -1], ["a", "b"], flow="glow")
    with pytest.raises(UserError, match="the methods that train on tables are flows"):
        normatch.train(make_config("moons", method="fixmatch", out="never"))
    with pytest.raises(UserError, match="must be divisible by 4"):
        make_state(make_config("flowgmm-mnist-100", dataset="digits", num_labels=20, image_size=10))
    with pytest.raises(UserError, match="noise is for rows"):
        make_state(make_config("flowgmm-mnist-100", dataset="digits", num_labels=20, noise=0.1))
    with pytest.raises(UserError, match="exclude each other"):
        make_state(make_config("flowgmm-mnist-100", reversible=True, compile=True, **SMALL_IMAGES))
    with pytest.raises(UserError, match="reversible is for flows of images"):
        state_of(x, [0, 1, 0, 1, -1, -1], ["a", "b"], reversible=True)
    with pytest.raises(UserError, match="a gray image has one"):
        make_state(make_config("flowgmm-mnist-100", dataset="digits", num_labels=20, image_size=8, flow="glow"))
    for rule, message in {"split_dims": "2 dimensions are too few", "split_dims_v2": "stripes of an image"}.items():
        with pytest.raises(UserError, match=message):
            state_of(x, [0, 1, 2, 1, -1, -1], ["a", "b", "c"], means=rule)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    normatch.train(tiny(tmp_path / "run", steps=2, eval_every=1))
    with pytest.raises(UserError, match="couplings=5, this run has couplings=3"):
        normatch.train(tiny(tmp_path / "other", steps=2, resume=str(tmp_path / "run"), couplings=3))


def test_a_density_of_one_class_is_a_model_too(tmp_path):
    result = normatch.train(tiny(tmp_path / "run", "picture", steps=20, eval_every=10))
    assert result.test_accuracy == 100.0
    assert load_dataset("picture").classes == ["all"]


DIGITS = {"dataset": "digits", "num_labels": 20, "image_size": 8, "batch_size": 4, "flow_width": 4, "flow_blocks": 1}
SMALL_IMAGES = {**DIGITS, "means_r": 0.3}


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("moons", {"noise": 0.1, "means_trainable": True}),
        ("flowgmm-wine", {"means_trainable": True}),
        ("flowgmm-mnist-100", {**SMALL_IMAGES, "flow": "realnvp-1x1-actnorm", "means_trainable": True}),
        # Adamax counts its steps in the host's memory and reads them there, which nobody waits for.
        ("scnf-moons", {"clip": 1.0, "optimizer": "adam"}),
        ("scnf-mnist-100", {**DIGITS, "ssl_dim": 16, "ssl_hd": 8, "augment": "weak", "optimizer": "adam"}),
    ],
)
def test_a_step_reads_nothing_back(preset, keys, monkeypatch):
    # The check reads values on the CPU, but not on a GPU. (`normatch.ops.gmm_log_prob` is the function.)
    monkeypatch.setattr(sys.modules["normatch.ops.gmm_log_prob"], "_check_no_nan", lambda *arguments: None)
    monkeypatch.setattr("normatch.flows.flow.on_the_cpu", lambda x: False)
    state = make_state(make_config(preset, consistency_weight=1.0, **keys))
    state.method.train()
    batches, step = state.batches(0), TrainStep(state)
    state.begin_step()
    step([next(batches)])  # the optimizer makes its state in the first step
    batch = next(batches)
    with NoReadBack():
        state.begin_step()
        state.meter.add(step([batch]))
    assert state.step == 2 and all(np.isfinite(value) for value in state.meter.read().values())


@pytest.mark.parametrize("preset", ["moons", "flowgmm-mnist-100", "pixels"])
def test_a_finished_run_can_be_loaded_evaluated_and_converted(tmp_path, preset):
    image = {"dataset": "digits", "num_labels": 20, "image_size": 8, "batch_size": 4, "means_r": 0.3}
    keys = {"moons": {}, "flowgmm-mnist-100": {**image, "flow": "realnvp", "flow_width": 4, "flow_blocks": 1}}
    keys = keys.get(preset, {**image, "flow": "tabular", "hidden": 8})
    preset = "flowgmm-mnist-100" if preset == "pixels" else preset
    result = normatch.train(tiny(tmp_path / "run", preset, steps=2, eval_every=2, **keys))
    scores = normatch.evaluate(result.out)
    assert abs(scores["test_accuracy"] - result.test_accuracy) < 1e-6
    model = normatch.load(result.out)
    data = normatch.data.load_dataset(model.config.dataset, image_size=model.image_size)
    samples = data.test_x
    probs = model.predict_proba(samples)
    assert probs.shape == (len(samples), len(data.classes)) and (probs.sum(1) - 1).abs().max() < 1e-5
    converted = normatch.tools.convert.convert(result.out, tmp_path / "model.safetensors")
    assert torch.equal(normatch.load(converted).predict_proba(samples), probs)
    state = load_checkpoint(result.out)
    state["config"]["couplings" if state["config"]["flow"] == "tabular" else "flow_blocks"] += 1
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=r"the tensors of .* are not those of a flowgmm"):
        normatch.load(tmp_path / "wrong.pt")


def test_rows_of_a_file_are_predicted(tmp_path, capsys):
    x = np.random.RandomState(0).randn(40, 2).round(3)
    lines = [f"{a},{'high' if b > 0 else 'low'},{b}" for a, b in x.tolist()]
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("\n".join(("a,label,b", *lines)) + "\n")
    keys = {"dataset": "table", "data_dir": str(tmp_path), "num_labels": 0, "hidden": 8, "uratio": 1}
    run = normatch.train(tiny(tmp_path / "run", "flowgmm-wine", steps=2, eval_every=2, **keys)).out
    normatch.tools.convert.convert(run, tmp_path / "model.safetensors")
    (tmp_path / "new.csv").write_text("a,b\n0.5,2\n0.5,-2\n")
    (tmp_path / "other.csv").write_text("a,c\n0.5,2\n")
    (tmp_path / "gap.csv").write_text("a,b\n0.5,1\nnan,2\n")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n")
    model = normatch.load(run)
    expected = model.predict_proba(np.array([[0.5, 2], [0.5, -2]], np.float32))
    assert torch.equal(model.predict_proba([tmp_path / "new.csv"]), expected)
    capsys.readouterr()
    for source in (run, tmp_path / "model.safetensors"):
        files = [str(tmp_path / name) for name in ("other.csv", "new.csv", "photo.png", "gap.csv")]
        assert main(["predict", str(source), *files]) == 1
        printed = capsys.readouterr()
        rows = [line.split("\t") for line in printed.out.splitlines()]
        assert [row[0] for row in rows] == [f"{files[1]}:2", f"{files[1]}:3"]
        assert [row[1] for row in rows] == [model.classes[k] for k in expected.argmax(1)]
        other, photo, gap = printed.err.splitlines()
        assert "the columns of" in other and "(a, c) are not those of the model's table: a, b" in other
        assert "photo.png cannot be read as a CSV file" in photo and "gap.csv, row 3: a feature is NaN" in gap
    assert main(["predict", str(run), files[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["row"] == f"{files[1]}:2"
