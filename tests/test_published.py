"""Checkpoints of the public repositories: recorded ones against their outputs, small ones in every layout."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import GOLDEN_FOLDERS
from torch import nn

import normatch
from normatch.cli import main
from normatch.errors import UserError
from normatch.flows import FlowHead
from normatch.methods.backbones import Classifier, build_backbone
from normatch.model import build_model
from normatch.published import checkpoints, layouts
from normatch.tools.convert import convert

needs_safetensors = pytest.mark.skipif(not find_spec("safetensors"), reason="the package safetensors is not installed")
SUFFIXES = [".pt", pytest.param(".safetensors", marks=needs_safetensors)]

# The recorded gap between the published code's fp32 and fp64 outputs; four times it is allowed, and 1e-6.
RECORDED = {"kekmodel": 2.1e-7, "leedoyup": 4.1e-7, "normatch": 2.2e-7, "normatch_two_flows": 2.3e-7}


@pytest.fixture(params=RECORDED)
def recorded(request, golden):
    """-> the path of a checkpoint that a public repository wrote, the outputs recorded there, their tolerance."""
    arrays = golden(f"upstream_{request.param}_expected")
    for folder in GOLDEN_FOLDERS:
        for path in sorted((folder / f"upstream_{request.param}").glob("*")):
            return path, arrays, RECORDED[request.param]
    pytest.skip(f"upstream_{request.param} is one of the larger recorded files, which are not in the repository")


def flows_of(model):
    return getattr(model.method, "flows", [])  # FixMatch has none


def assert_recorded(model, arrays, gap, kind):
    features, logits = model.method.classifier(torch.tensor(arrays["in/x"]))
    outputs = {"feat": features, "logits": logits}
    for name, flow in zip(("flow_logits", "flow2_logits"), flows_of(model), strict=False):
        outputs[name] = flow(features).class_log_prob
    wanted = {name: arrays[f"out64/{name}_{kind}"] for name in outputs if f"out64/{name}_{kind}" in arrays}
    assert "logits" in wanted and len(wanted) == sum(k.startswith("out64/") for k in arrays) // 2
    for name, want in wanted.items():
        got = outputs[name].double().numpy()
        assert np.abs(got - want).max() <= max(4 * gap * np.abs(want).max(), 1e-6), name


def test_recorded_checkpoint_gives_its_recorded_outputs(recorded):
    path, arrays, gap = recorded
    model = normatch.load(path)
    assert model.config.backbone == f"wrn-{arrays['meta/depth']}-{arrays['meta/widen']}"
    assert_recorded(model, arrays, gap, "ema")
    x = torch.tensor(arrays["in/x"])
    assert torch.equal(model.logits(x), model.method.classifier(x)[1])
    state = checkpoints.read(path)
    assert_recorded(build_model({**state, "ema": state["model"]}, path), arrays, gap, "raw")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_recorded_checkpoint_survives_conversion(recorded, tmp_path, suffix):
    path, arrays, _ = recorded
    before, after = normatch.load(path), normatch.load(convert(path, tmp_path / f"new{suffix}"))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    x = torch.tensor(arrays["in/x"])
    assert torch.equal(before.logits(x), after.logits(x))
    assert (after.classes, after.mean, after.std, after.source) == (
        before.classes,
        before.mean,
        before.std,
        before.source,
    )


def test_recorded_checkpoint_is_evaluated_and_predicts(recorded, tmp_path, capsys):
    path, _, _ = recorded
    scores = normatch.evaluate(path, dataset="digits")
    assert scores["images"] == 500 and np.sum(scores["confusion"]) == 500
    assert ("test_accuracy_flow" in scores) == ("normatch" in str(path))
    new = str(convert(path, tmp_path / "new.pt"))
    capsys.readouterr()
    assert main(["eval", new, "--dataset", "digits", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scores


# ---- Small checkpoints, made here in the layouts of the repositories --------------------------------


def network(transition, classes=10, seed=0):
    """A trained-looking wide ResNet 10-1 as the repositories save it -> names and tensors, optimiser state, model."""
    torch.manual_seed(seed)
    model = Classifier(build_backbone("wrn-10-1", transition), classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32))[1], torch.arange(4) % classes).backward()
        optimizer.step()
    tensors = {name.removeprefix("backbone."): value.clone() for name, value in model.state_dict().items()}
    return tensors, optimizer.state_dict(), model.eval()


def published_flow(features=64, classes=10, seed=0):
    """The tensors of a NorMatch flow: full-width layers, of which one half is dead."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for j in range(6):
        shapes = {"0": (32, features), "3": (32, 32), "5": (2 * features, 32)}
        for layer, shape in shapes.items():
            state[f"net.body.{j}.st_net.{layer}.weight"] = 0.1 * torch.randn(shape, generator=draw)
            state[f"net.body.{j}.st_net.{layer}.bias"] = 0.1 * torch.randn(shape[0], generator=draw)
        for part in "gv":
            state[f"net.body.{j}.rescale.weight_{part}"] = torch.randn(features, generator=draw)
    means = torch.randn(classes, features, generator=draw).requires_grad_()
    return state, means, torch.full((classes,), 0.5).requires_grad_(), torch.ones(classes).requires_grad_()


def make(layout, **keys):
    """-> the content of a checkpoint, and its averaged network."""
    flows = {"normatch": [1], "two_flows": [1, 2]}.get(layout, [])
    transition = "activated" if layout == "leedoyup" else "raw"
    trained, optimizer, _ = network(transition, seed=1, **keys)
    averaged, _, model = network(transition, seed=2, **keys)
    common = {"optimizer": optimizer, "scheduler": {"last_epoch": 2, "lr_lambdas": [None]}}
    if layout == "leedoyup":
        return {"train_model": trained, "eval_model": averaged, "it": 2, **common}, model
    content = {"epoch": 1, "state_dict": trained, "ema_state_dict": averaged, "acc": 10.0, "best_acc": 10.0, **common}
    for n in flows:
        state, means, rho, weights = published_flow(seed=n)
        suffix = "" if n == 1 else "2"
        content |= {f"flow{suffix}_state_dict": state, f"flow_mean{suffix}": means}
        content |= {f"flow_std{suffix}": rho, f"flow_weights{suffix}": weights}
    if layout == "normatch":  # the script for two flows leaves them empty when there is one
        content |= {"flow2_state_dict": None, "flow_mean2": None, "flow_std2": None, "flow_weights2": None}
    return content, model


def saved(content, tmp_path, name="checkpoint.pth.tar"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@pytest.mark.parametrize("layout", ["kekmodel", "leedoyup", "normatch", "two_flows"])
def test_layout_is_found(tmp_path, layout):
    content, averaged = make(layout)
    model = normatch.load(saved(content, tmp_path))
    assert torch.equal(model.logits(X), averaged(X)[1])
    assert model.source == layout.replace("two_flows", "normatch") and model.config.backbone == "wrn-10-1"
    assert model.config.method == ("normatch" if flows_of(model) else "fixmatch") and len(model.classes) == 10
    assert len(flows_of(model)) == {"normatch": 1, "two_flows": 2}.get(layout, 0)
    for n, flow in enumerate(flows_of(model), 1):
        features = averaged(X)[0]
        expected = FlowHead.from_reference(*published_flow(seed=n)).eval()(features)
        assert torch.equal(flow(features).class_log_prob, expected.class_log_prob)


def test_each_source_has_its_own_normalisation(tmp_path):
    kekmodel, leedoyup = (normatch.load(saved(make(name)[0], tmp_path, name)) for name in ("kekmodel", "leedoyup"))
    assert kekmodel.mean == [0.4914, 0.4822, 0.4465] and kekmodel.std == [0.2471, 0.2435, 0.2616]
    assert leedoyup.mean == pytest.approx([125.3 / 255, 123.0 / 255, 113.9 / 255])
    assert leedoyup.std == pytest.approx([63.0 / 255, 62.1 / 255, 66.7 / 255])
    hundred = normatch.load(saved(make("leedoyup", classes=100)[0], tmp_path))
    assert hundred.mean == pytest.approx([129.3 / 255, 124.1 / 255, 112.4 / 255])
    assert hundred.config.dataset == "cifar100" and hundred.classes[-1] == "worm" and len(set(hundred.classes)) == 100
    svhn = normatch.load(saved(make("kekmodel")[0], tmp_path), dataset="svhn")
    assert svhn.mean == [0.5, 0.5, 0.5] and svhn.config.dataset == "svhn"


@pytest.mark.parametrize("layout", ["kekmodel", "leedoyup", "normatch"])
def test_prefix_of_a_parallel_wrapper_is_dropped(tmp_path, layout):
    content, averaged = make(layout)
    for key in layouts.NETWORKS["leedoyup" if layout == "leedoyup" else "kekmodel"]:
        content[key] = {f"module.{name}": value for name, value in content[key].items()}
    assert torch.equal(normatch.load(saved(content, tmp_path)).logits(X), averaged(X)[1])


def test_trained_weights_serve_where_there_is_no_average(tmp_path):
    content, _ = make("kekmodel")
    trained = network("raw", seed=1)[2]
    assert torch.equal(normatch.load(saved({**content, "ema_state_dict": None}, tmp_path)).logits(X), trained(X)[1])


@pytest.mark.parametrize("transition", ["raw", "activated"])
def test_variant_is_told_by_what_training_left_untouched(tmp_path, transition):
    tensors, optimizer, model = network(transition)
    # A bare state dict; a file in kekmodel's layout written by a network with the block as it was, or mended.
    for content in (tensors, {"state_dict": tensors, "optimizer": optimizer}):
        assert torch.equal(normatch.load(saved(content, tmp_path)).logits(X), model(X)[1])
    # Optimisers that fill in a zero for a gradient that never comes.
    optimizer["state"] = {parameter: {} for parameter in range(25)}
    content = {"state_dict": tensors, "optimizer": optimizer}
    assert torch.equal(normatch.load(saved(content, tmp_path)).logits(X), model(X)[1])


@pytest.mark.parametrize(("layout", "transition"), [("kekmodel", "raw"), ("leedoyup", "activated")])
def test_variant_without_an_optimiser_is_that_of_the_layout(tmp_path, layout, transition):
    content, _ = make(layout)
    del content["optimizer"]
    for key in layouts.NETWORKS[layout]:  # as if the discarded layer had been drawn at random
        content[key]["block2.layer.0.bn1.bias"] = torch.randn(16)
    assert checkpoints.read(saved(content, tmp_path))["transition"] == transition


@pytest.mark.parametrize("name", ["wrn-16-2", "wrn-21-1", "wrn-28-8"])
def test_depth_and_width_are_found(tmp_path, name):
    tensors = {k.removeprefix("backbone."): v for k, v in Classifier(build_backbone(name), 10).state_dict().items()}
    assert checkpoints.read(saved(tensors, tmp_path))["config"]["backbone"] == name


@pytest.mark.parametrize("head", ["fc1", "fc"])
def test_residual_network(tmp_path, head):
    pytest.importorskip("torchvision", reason="torchvision does not import beside this torch", exc_type=Exception)
    model = Classifier(build_backbone("resnet18"), 10, 32).eval()
    tensors = {k.removeprefix("backbone.").replace("fc.", f"{head}."): v for k, v in model.state_dict().items()}
    content = {"state_dict": tensors} if head == "fc1" else {"train_model": tensors, "eval_model": tensors}
    loaded = normatch.load(saved(content, tmp_path))
    assert torch.equal(loaded.logits(X), model(X)[1])
    assert (loaded.config.dataset, loaded.image_size) == (("stl10", 224) if head == "fc1" else ("cifar10", 32))


# ---- Files that are refused -------------------------------------------------------------------------


def refused(path, *said, dataset=None):
    with pytest.raises(UserError) as error:
        normatch.load(path, dataset=dataset)
    message = str(error.value)
    assert "\n" not in message
    for text in (path.name, *said):
        assert text in message, message


@pytest.mark.parametrize("key", ["state_dict", "eval_model", "args", "flow_mean"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys, key):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    content, _ = make("leedoyup" if key == "eval_model" else "normatch")
    path = saved({**content, key: Malicious()}, tmp_path)
    refused(path, "refused", "nothing of it was run")
    for command in (["eval", path], ["predict", path, path], ["convert", path, tmp_path / "new.pt"]):
        capsys.readouterr()
        assert main([str(a) for a in command]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "owned").exists() and not (tmp_path / "new.pt").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refused(saved({"weights": [1, 2]}, tmp_path), "published layout")
    refused(saved([1, 2], tmp_path))
    refused(saved({}, tmp_path))
    refused(saved({"weight": torch.ones(3)}, tmp_path), "linear layer")
    refused(saved({"state_dict": {"fc.weight": torch.ones(10, 3)}}, tmp_path), "ResNet")
    refused(saved({"state_dict": torch.ones(3)}, tmp_path), "dictionary of tensors")
    refused(saved({"state_dict": None}, tmp_path), "no network")
    refused(saved({"normatch": "0.1.0", "config": {}}, tmp_path), "missing")
    refused(tmp_path / "nothing.pth.tar", "there is no checkpoint")
    whole = saved(make("kekmodel")[0], tmp_path).read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for damaged in (whole[: len(whole) // 2], flipped, b"", b"hello"):
        (tmp_path / "damaged.pth").write_bytes(damaged)
        refused(tmp_path / "damaged.pth", "damaged")


def test_published_checkpoint_with_a_fault_is_refused(tmp_path):
    def broken(layout, edit):
        content, _ = make(layout)
        edit(content)
        return saved(content, tmp_path)

    refused(broken("normatch", lambda c: c.pop("flow_mean")), "flow_mean")
    refused(broken("normatch", lambda c: c.update(flow_mean=torch.ones(10, 32))))
    refused(broken("normatch", lambda c: c["flow_state_dict"].clear()), "body.0")
    refused(broken("two_flows", lambda c: c.update(flow_weights2=torch.ones(3))))
    refused(broken("kekmodel", lambda c: c["ema_state_dict"].pop("block3.layer.0.conv2.weight")), "block3.layer.0")
    refused(broken("kekmodel", lambda c: c["ema_state_dict"].update(other=torch.ones(3))), "other")
    refused(broken("kekmodel", lambda c: c.update(optimizer=[1])))
    # A block with a huge number would be a huge network, were the numbers believed.
    refused(broken("kekmodel", lambda c: c["ema_state_dict"].update({"block1.layer.99999999.x": torch.ones(1)})))


def test_classes_that_no_publication_had(tmp_path):
    path = saved(make("kekmodel", classes=7)[0], tmp_path)
    refused(path, "7 classes", "--dataset")
    refused(path, "7 classes", "svhn has 10", dataset="svhn")


# ---- convert and safetensors ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def our_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("convert") / "run"
    keys = {"backbone": "wrn-10-1", "steps": 4, "batch_size": 8, "uratio": 1, "num_workers": 0, "progress": False}
    normatch.train("digits", compat="reference", ema_decay=0.5, warmup_flow=0, device="cpu", out=str(out), **keys)
    return out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_our_run_is_converted(our_run, tmp_path, suffix, capsys):
    new = tmp_path / "folder" / f"new{suffix}"
    capsys.readouterr()
    assert main(["convert", str(our_run), str(new)]) == 0
    assert capsys.readouterr().out.strip() == str(new)
    assert list(new.parent.iterdir()) == [new]
    assert new.stat().st_size < 0.6 * (our_run / "checkpoints" / "last.pt").stat().st_size
    before, after = normatch.load(our_run), normatch.load(new)
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    assert before.config == after.config and before.classes == after.classes
    assert (before.mean, before.std, before.image_size) == (after.mean, after.std, after.image_size)
    assert normatch.evaluate(new) == normatch.evaluate(our_run)
    assert torch.equal(normatch.load(convert(new, tmp_path / "again.pt")).logits(X), before.logits(X))


@needs_safetensors
def test_safetensors_metadata_say_what_the_tensors_are(our_run, tmp_path):
    from safetensors import safe_open

    with safe_open(convert(our_run, tmp_path / "new.safetensors"), framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["classes"]) == [str(k) for k in range(10)]
    assert json.loads(facts["config"])["backbone"] == "wrn-10-1" and len(json.loads(facts["mean"])) == 3


def test_convert_refuses(our_run, tmp_path):
    (tmp_path / "old.pt").write_text("precious")
    for target, said in (("old.pt", "exists"), ("new.onnx", "must end in"), ("old.pt/new.pt", "written")):
        with pytest.raises(UserError, match=said):
            convert(our_run, tmp_path / target)
    assert (tmp_path / "old.pt").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@needs_safetensors
def test_safetensors_that_are_not_ours_are_refused(our_run, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    refused(path, "not written by normatch")
    save_file({"weight": torch.ones(3)}, path, metadata={"normatch": '"0.1.0"'})
    refused(path, "missing")
    save_file({"weight": torch.ones(3)}, path, metadata={"normatch": '"0.1.0"', "config": "{"})
    refused(path, "damaged")
    whole = convert(our_run, tmp_path / "new.safetensors").read_bytes()
    for damaged in (whole[:-100], b"", b"hello"):
        path.write_bytes(damaged)
        refused(path, "not a readable safetensors file")


def test_training_does_not_go_on_from_a_converted_checkpoint(our_run, tmp_path):
    new = convert(our_run, tmp_path / "new.pt")
    config = normatch.load(our_run).config.model_copy(update={"resume": str(new), "out": str(tmp_path / "run")})
    with pytest.raises(UserError):
        normatch.train(config)
