"""Whole runs on the bundled digits, small: learning, what a run leaves, resuming, validation, published behavior."""

import json
import re
import resource
import signal

import pytest
import torch
import yaml
from real_data import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import normatch
from normatch.config import make_config, method_class
from normatch.data import Split, load_dataset
from normatch.data.base import standardize
from normatch.errors import UserError
from normatch.methods import distributed
from normatch.published.checkpoints import load_checkpoint
from normatch.tools.convert import convert
from normatch.tools.verify import same
from normatch.training.run import Run
from normatch.training.state import State
from normatch.training.step import TrainStep

TINY = {
    "backbone": "wrn-10-1",
    "batch_size": 8,
    "uratio": 1,
    "eval_every": 10,
    "log_every": 5,
    "num_workers": 0,
    "progress": False,
    "device": "cpu",
}


METRICS = (ROOT / "docs" / "metrics.md").read_text().splitlines()


def tiny(out, **keys):
    keys = {**TINY, "steps": 10, **keys}
    if keys.get("method") == "supervised":
        del keys["uratio"]  # which it does not know
    return make_config(out=str(out), **keys)


def prepared(config):
    return State(config, method_class(config.method), torch.device("cpu"))


def lines(out, kind):
    return [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


@pytest.mark.parametrize("method", ["normatch", "fixmatch", "supervised"])
def test_training_teaches_and_leaves_a_run_folder(tmp_path, method):
    out = tmp_path / "run"
    result = normatch.train(
        tiny(out, method=method, steps=60, batch_size=16, eval_every=30, ema_decay=0.9, bn_momentum=0.1)
    )

    assert result.out == out and result.test_accuracy > 40  # chance is 10
    train, evaluations = lines(out, "train"), lines(out, "eval")
    assert [r["step"] for r in train] == list(range(5, 61, 5)) and [r["step"] for r in evaluations] == [30, 60]
    assert train[-1]["loss_x"] < 0.6 * train[0]["loss_x"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert {"method", "dataset", "num_labels", "seed", "steps", "test_accuracy", "test_accuracy_flow"} <= summary.keys()
    assert {"best_test_accuracy", "seconds_total", "seconds_per_step", "views_per_second"} <= summary.keys()
    assert {"device", "augment_backend", "ops_backend", "resumed_from_step", "protocol"} <= summary.keys()
    assert summary["test_accuracy"] == evaluations[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == max(r["test_accuracy"] for r in evaluations)
    assert (summary["test_accuracy_flow"] is not None) == (method == "normatch")
    assert summary["resumed_from_step"] is None
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == method
    assert json.loads((out / "env.json").read_text())["torch"] == torch.__version__
    assert Split.load(out / "split.npz").sha256 == summary["split_sha256"]
    recorded = {f"{r['kind']}/{name}" for r in (*train, *evaluations) for name in r.keys() - {"step", "kind"}}
    assert set(EventAccumulator(str(out / "tb")).Reload().Tags()["scalars"]) == recorded
    documented = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in METRICS if line.startswith("| `")))
    assert {name.partition("/")[2] for name in recorded} <= set(documented)
    for name in ("last", "best"):
        torch.load(out / "checkpoints" / f"{name}.pt", weights_only=True)
    assert not list(out.rglob("*.new"))


def test_the_reported_metrics_describe_the_pseudo_labels(tmp_path):
    normatch.train(tiny(tmp_path / "run"))
    (first, _) = lines(tmp_path / "run", "train")
    for name in ("mask_ratio", "consensus_ratio", "pseudo_label_accuracy", "flow_pseudo_label_accuracy", "data_wait"):
        assert 0 <= first[name] <= 1
    assert first["loss"] > 0 and first["views_per_second"] > 0


class Crash(Exception):
    pass


def crash_after(monkeypatch, step):
    """Let the run die right after the checkpoint of `step` is on the disk."""
    save = Run.save

    def save_and_crash(run, state, improved):
        save(run, state, improved)
        if state["step"] == step:
            raise Crash

    monkeypatch.setattr(Run, "save", save_and_crash)


@pytest.mark.parametrize(
    "keys",
    [
        {"third_voter": "sampled"},  # draws from the generator in every step, as does dropout
        {"compat": "reference", "warmup_flow": 1024, "steps": 20},  # its prior's gradients are never cleared
        {"method": "fixmatch", "accumulate": 2, "precision": "bf16", "num_workers": 1, "steps": 20},
    ],
    ids=["normatch", "reference", "fixmatch"],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, keys):
    keys = {"steps": 200, **keys}
    half = keys["steps"] // 2
    keys |= {"eval_every": half // 2, "log_every": half // 2}
    normatch.train(tiny(tmp_path / "whole", **keys))
    crash_after(monkeypatch, half)
    with pytest.raises(Crash):
        normatch.train(tiny(tmp_path / "parts", **keys))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "parts")["step"] == half

    result = normatch.train(tiny(tmp_path / "parts", resume="auto", **keys))
    assert result.summary["resumed_from_step"] == half
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizer", "rng", "best", "step"):
        assert same(whole.get(part), parts.get(part)), part

    assert figures(tmp_path / "whole") == figures(tmp_path / "parts"), "each step once, with the same figures"


def figures(out):
    """The lines of metrics.jsonl without what depends on the clock."""
    timing = ("seconds_per_step", "views_per_second", "data_wait")
    return [{k: v for k, v in r.items() if k not in timing} for kind in ("train", "eval") for r in lines(out, kind)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_in_progress(tmp_path, monkeypatch, number):
    normatch.train(tiny(tmp_path / "whole", steps=20))
    take = TrainStep.__call__

    def take_and_signal(step, batches):
        metrics = take(step, batches)
        if step.state.step == 7:  # between two log points and two evaluations
            signal.raise_signal(number)
        return metrics

    monkeypatch.setattr(TrainStep, "__call__", take_and_signal)
    before = signal.getsignal(number)
    with pytest.raises(UserError, match="step 7 of 20") as stopped:
        normatch.train(tiny(tmp_path / "parts", steps=20))
    monkeypatch.undo()
    assert stopped.value.status == 128 + number and signal.getsignal(number) is before
    normatch.train(tiny(tmp_path / "parts", steps=20, resume="auto"))
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch, capsys, damage):
    crash_after(monkeypatch, 20)
    with pytest.raises(Crash):
        normatch.train(tiny(tmp_path / "run", steps=30))
    monkeypatch.undo()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0x10
    last.write_bytes({"truncated": content[:1000], "flipped": content, "empty": b""}[damage])
    result = normatch.train(tiny(tmp_path / "run", steps=30, resume="auto"))
    assert result.summary["resumed_from_step"] == 10
    message = capsys.readouterr().err
    assert "last.pt" in message and "previous.pt" in message and "step 10" in message


def test_a_full_disk_while_logging_is_named_with_the_step(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    def log(run, *_):
        monkeypatch.setattr(run.tensorboard, "close", fail)
        fail()

    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(UserError, match=r"stopped at step 5, its checkpoints are intact: .*No space left"):
        normatch.train(tiny(tmp_path / "run"))


def test_processes_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda step: [step, 8])
    with pytest.raises(UserError, match="different steps, 0 and 8"):
        normatch.train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_training_does_not_go_on_from_a_converted_checkpoint(tmp_path):
    normatch.train(tiny(tmp_path / "run", steps=2))
    converted = convert(tmp_path / "run", tmp_path / "new.pt")
    with pytest.raises(UserError, match="converted"):
        normatch.train(tiny(tmp_path / "more", steps=2, resume=str(converted)))


@pytest.mark.parametrize(
    ("error", "keys", "message"),
    [
        (torch.OutOfMemoryError, {}, "memory was full after step 0"),
        (torch._dynamo.exc.TorchDynamoException, {"compile": True}, "leave --compile out; no C compiler"),
    ],
)
def test_what_fails_in_a_step_is_one_line(tmp_path, monkeypatch, error, keys, message):
    def take(step, batches):
        raise error("no C\ncompiler")

    monkeypatch.setattr(TrainStep, "__call__", take)
    with pytest.raises(UserError, match=message):
        normatch.train(tiny(tmp_path / "run", **keys))


def test_an_unfinished_file_of_a_killed_process_is_cleared(tmp_path, monkeypatch):
    crash_after(monkeypatch, 10)
    with pytest.raises(Crash):
        normatch.train(tiny(tmp_path / "run", steps=20))
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoints" / "last.new").write_bytes(b"half a checkpoint")
    normatch.train(tiny(tmp_path / "run", steps=20, resume="auto"))
    assert not list((tmp_path / "run").rglob("*.new"))


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save = torch.save

    def full(state, file):
        if state["step"] == 20:
            file.write(b"x" * 100)
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        normatch.train(tiny(tmp_path / "run", steps=30))
    assert load_checkpoint(tmp_path / "run")["step"] == 10
    assert not list((tmp_path / "run").rglob("*.new"))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    """As the kernel reports it: from step 20 on no file may grow beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Run.save

    def save_on_a_full_disk(run, state, improved):
        if state["step"] == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(run, state, improved)

    monkeypatch.setattr(Run, "save", save_on_a_full_disk)
    try:
        with pytest.raises(UserError, match=r"could not be written.*File too large"):
            normatch.train(tiny(tmp_path / "run", steps=30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path / "run")["step"] == 10
    assert not list((tmp_path / "run").rglob("*.new"))


def test_resume_auto_starts_afresh_where_there_is_nothing(tmp_path):
    assert normatch.train(tiny(tmp_path / "run", resume="auto")).summary["resumed_from_step"] is None


def test_a_checkpoint_can_be_resumed_into_another_folder(tmp_path, monkeypatch):
    crash_after(monkeypatch, 10)
    with pytest.raises(Crash):
        normatch.train(tiny(tmp_path / "a", steps=20))
    monkeypatch.undo()
    result = normatch.train(tiny(tmp_path / "b", steps=20, resume=str(tmp_path / "a")))
    assert result.summary["resumed_from_step"] == 10 and result.out == tmp_path / "b"


def test_validation_images_choose_and_the_test_set_is_seen_once(tmp_path):
    out = tmp_path / "run"
    result = normatch.train(tiny(out, steps=30, num_val=50))
    evaluations = lines(out, "eval")
    assert all("val_accuracy" in r for r in evaluations)
    assert [("test_accuracy" in r) for r in evaluations] == [False, False, True]
    assert "validation" in result.summary["protocol"] and "50" in result.summary["protocol"]
    split = Split.load(out / "split.npz")
    assert len(split.validation) == 50
    assert not set(split.validation) & (set(split.labeled) | set(split.unlabeled))
    best = max(evaluations, key=lambda r: r["val_accuracy"])
    assert result.summary["best_step"] == best["step"]
    chosen = normatch.evaluate(out / "checkpoints" / "best.pt")
    assert result.summary["best_test_accuracy"] == pytest.approx(chosen["test_accuracy"])


def test_the_papers_protocol_is_named(tmp_path):
    assert "paper" in normatch.train(tiny(tmp_path / "run")).summary["protocol"]


def test_a_loaded_model_is_the_averaged_one(tmp_path):
    result = normatch.train(tiny(tmp_path / "run", steps=20, ema_decay=0.5))
    model = normatch.load(tmp_path / "run")
    dataset = load_dataset("digits")
    predicted = model.predict(dataset.test_x)
    accuracy = 100 * (predicted.numpy() == dataset.test_labels).mean()
    assert accuracy == pytest.approx(result.test_accuracy)
    x = standardize(torch.from_numpy(dataset.test_x[:5]), model.mean, model.std)
    assert torch.equal(model.logits(x).argmax(1), predicted[:5])
    scores = normatch.evaluate(tmp_path / "run")
    assert scores["test_accuracy"] == pytest.approx(result.test_accuracy)
    assert scores["test_accuracy_flow"] == pytest.approx(result.summary["test_accuracy_flow"])


def test_any_module_can_be_the_backbone(tmp_path):
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.ReLU())
    result = normatch.train(tiny(tmp_path / "run"), backbone=backbone)
    assert load_checkpoint(tmp_path / "run")["model"]["classifier.fc.weight"].shape == (10, 6)
    with pytest.raises(UserError, match="backbone of yours"):
        normatch.load(result.out)


def test_config_can_be_a_preset_or_keys(tmp_path):
    first = normatch.train("digits", out=str(tmp_path / "a"), **{**TINY, "steps": 5})
    second = normatch.train({**TINY, "steps": 5, "out": str(tmp_path / "b")}, seed=1)
    assert (first.summary["seed"], second.summary["seed"]) == (0, 1)
    assert first.summary["split_sha256"] != second.summary["split_sha256"]


def test_bf16_autocast_trains(tmp_path):
    normatch.train(tiny(tmp_path / "run", precision="bf16"))
    assert lines(tmp_path / "run", "train")[-1]["loss"] > 0


def test_reference_flow_loses_its_dropout_after_the_first_epoch():
    config = tiny("unused", compat="reference", steps=2000)
    state = prepared(config)
    state.method.train()
    for step, expected in ((1023, True), (1024, False)):
        state.step = step
        state.begin_step()
        assert state.method.flows[0].training is expected


def test_reference_uses_the_live_flow_and_the_raw_transition(tmp_path):
    config = tiny(tmp_path / "run", compat="reference", warmup_flow=0)
    result = normatch.train(config)
    model = normatch.load(tmp_path / "run")
    assert model.method.classifier.backbone.block2.layer[0].raw
    state = load_checkpoint(tmp_path / "run")
    live, average = state["model"], state["ema"]
    flow = [name for name in live if name.startswith("flows.")]
    assert all(torch.equal(model.method.state_dict()[name], live[name]) for name in flow)
    assert all(torch.equal(average[name], live[name]) for name in flow), "it has no average"
    assert not torch.equal(average["classifier.fc.weight"], live["classifier.fc.weight"])
    scores = normatch.evaluate(tmp_path / "run")
    assert scores["test_accuracy_flow"] == pytest.approx(result.summary["test_accuracy_flow"])


def test_compiled_training_gives_the_same_losses(tmp_path):
    # At a small learning rate: rounding is amplified tenfold a step at the preset's.
    keys = {"steps": 4, "log_every": 1, "dropout": 0.0, "lr": 1e-3, "flow_lr": 1e-4, "precision": "fp32"}
    for name, flag in (("eager", False), ("compiled", True)):
        normatch.train(tiny(tmp_path / name, compile=flag, **keys))
    eager, compiled = ([r["loss"] for r in lines(tmp_path / name, "train")] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path):
    """Supervised, with BatchNorm out of the way: the mean over parts is then the mean over the batch."""
    keys = {"method": "supervised", "precision": "fp64", "steps": 3, "log_every": 1}
    for name, parts in (("whole", 1), ("parts", 4)):
        backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.ReLU())
        torch.manual_seed(0)
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.1)
        normatch.train(tiny(tmp_path / name, accumulate=parts, **keys), backbone=backbone)
    whole, parts = ([r["loss"] for r in lines(tmp_path / name, "train")] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-6)  # the metrics are kept in fp32
    a, b = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-9) for name in a)


def test_mixing_and_memory_format_reach_the_network():
    for on in (False, True):
        network = prepared(tiny("unused", mixing=on, channels_last=on)).method.classifier.backbone
        assert network.mixing is on
        filters = network.block1.layer[0].conv2.weight
        assert filters.is_contiguous(memory_format=torch.channels_last) is on and filters.is_contiguous() is not on


def test_parts_that_do_not_divide_the_batch_are_refused(tmp_path):
    with pytest.raises(UserError, match="not divisible by accumulate 3"):
        normatch.train(tiny(tmp_path / "run", accumulate=3))


def test_a_profile_is_a_chrome_trace_of_some_steps(tmp_path):
    normatch.train(tiny(tmp_path / "run", steps=12, profile=True))
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 5 and any("convolution" in event.get("name", "") for event in events)


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path):
    normatch.train(tiny(tmp_path / "run", steps=50, eval_every=10, keep=4))
    steps = {path.name: load_checkpoint(path)["step"] for path in (tmp_path / "run" / "checkpoints").iterdir()}
    del steps["best.pt"]
    assert steps == {"last.pt": 50, "previous.pt": 40, "previous-2.pt": 30, "previous-3.pt": 20}


def test_compat_follows_the_published_names_and_mirrors(tmp_path):
    config = tiny(tmp_path / "run", compat="reference", backbone="resnet18", image_size=32)
    for compat, decays in (("none", False), ("reference", True)):
        state = prepared(config.model_copy(update={"compat": compat}))
        decaying = {id(p) for group in state.optimizer.groups if group["weight_decay"] for p in group["params"]}
        norm = state.method.classifier.backbone.layer2[0].downsample[1].weight
        assert (id(norm) in decaying) is decays
