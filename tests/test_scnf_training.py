"""SCNF: its loss against its definition, whole runs, published configurations and checkpoints."""

from dataclasses import replace

import pytest
import torch
from test_scnf import randomized
from torch import nn

import normatch
from normatch import UserError
from normatch.config import make_config
from normatch.data import load_dataset, make_split
from normatch.flows import SCNF, ConditionalFlow, PointFlow
from normatch.methods.base import Task
from normatch.methods.scnf import SemiConditional
from normatch.tools.flow_figures import leave_figures
from normatch.training.state import State

CPU = torch.device("cpu")


def toy_config(out, **keys):
    keys = {
        "couplings": 2,
        "hidden": 16,
        "ssl_k": 2,
        "ssl_hd": 16,
        "steps": 30,
        "eval_every": 15,
        "log_every": 5,
        **keys,
    }
    return make_config("scnf-moons", out=str(out), progress=False, device="cpu", **keys)


def state_of(config, dataset=None, split=None):
    return State(config, SemiConditional, CPU, dataset=dataset, split=split)


def loss_of(model, batch, step, **keys):
    """A batch of points -> loss, metrics of the method with this model of three classes."""
    method = SemiConditional(Task((2,), ["a", "b", "c"]), make_config("scnf-moons", **keys))
    method.density = model
    return method(batch, torch.tensor(step))


def test_objective_is_that_of_the_paper():
    model = randomized(SCNF(PointFlow(2, 2, 8), ConditionalFlow(2, 10, 1, 2, 8), 3, class_prior=[3, 1, 1]))
    batch = {"images": torch.randn(7, 2), "y": torch.tensor([2, 0, 1]), "u_y": torch.full((4,), -1)}
    keys = {"label_weight": 1.5, "cl_weight": 0.3, "noise": 0.0, "consistency_weight": 0.0}
    loss, metrics = loss_of(model, batch, 0, **keys)
    log_prob = model.log_prob(batch["images"], torch.cat((batch["y"], batch["u_y"])))
    weights = torch.tensor([1.5] * 3 + [1.0] * 4)
    posterior = model.class_log_prob(batch["images"][:3]).log_softmax(1)
    expected = -(weights / weights.sum() * log_prob).sum() + 0.3 * nn.functional.nll_loss(posterior, batch["y"])
    torch.testing.assert_close(loss, expected)
    assert metrics["pseudo_label_accuracy"][1] == 0


def test_consistency_asks_for_the_class_of_the_other_view():
    model = randomized(SCNF(PointFlow(2, 2, 8), ConditionalFlow(2, 10, 1, 2, 8), 3))
    x = torch.randn(3 + 2 * 4, 2)
    batch = {"images": x, "y": torch.tensor([2, 0, 1]), "u_y": torch.full((4,), -1)}

    keys = {"noise": 0.0, "consistency_rampup": 10}
    without, _ = loss_of(model, batch, 5, consistency_weight=0.0, **keys)
    loss, metrics = loss_of(model, batch, 5, consistency_weight=2.0, **keys)
    of_other = model.class_log_prob(x[3:7]).argmax(1)  # the second views are learned from
    expected = nn.functional.cross_entropy(model.class_log_prob(x[7:]), of_other)
    torch.testing.assert_close(metrics["loss_consistency"][0], expected.detach())
    torch.testing.assert_close(loss - without, 0.5 * 2.0 * expected)


def test_a_run_learns_resumes_and_leaves_its_pictures(tmp_path):
    result = normatch.train(toy_config(tmp_path / "run", steps=120, eval_every=120, lr=1e-2))
    assert result.test_accuracy > 80
    assert {"plane.png", "latent.png", "summary.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert normatch.evaluate(tmp_path / "run")["test_accuracy"] == pytest.approx(result.test_accuracy, abs=0.11)
    begun = state_of(toy_config(tmp_path / "more", pretrained=str(tmp_path / "run")))
    assert begun.evaluate(last=True)["test_accuracy"] == pytest.approx(result.test_accuracy, abs=0.11)


def test_mixture_trains(tmp_path):
    state = state_of(toy_config(tmp_path, ssl_model="cond-shift"))
    losses = []
    for step, batch in zip(range(30), state.batches(0), strict=False):
        loss, _ = state.method.train()(batch, torch.tensor(step))
        state.begin_step()
        state.optimizer.step(list(torch.autograd.grad(loss, state.optimizer.trained)))
        state.average.update()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_x_train_as_they_are(tmp_path):
    digits = load_dataset("digits")
    few = replace(
        digits,
        train_x=digits.train_x[:100],
        train_labels=digits.train_labels[:100],
        test_x=digits.test_x[:20],
        test_labels=digits.test_labels[:20],
    )
    keys = {"flow": "mnist-masked", "noise": 0.0, "flow_width": 4, "ssl_dim": 16, "ssl_k": 1, "ssl_l": 2}
    keys |= {"batch_size": 10, "uratio": 2}
    split = make_split(few, 20, seed=0)
    state = state_of(toy_config(tmp_path, dataset="digits", **keys), few, split)
    batch = next(iter(state.batches(0)))
    pixels = torch.from_numpy(few.train_x[batch["u_index"].numpy(), :, :, 0]) / 255
    torch.testing.assert_close(batch["images"][10:, 0], pixels)
    loss, _ = state.method.train()(batch, torch.tensor(0))
    state.begin_step()
    state.optimizer.step(list(torch.autograd.grad(loss, state.optimizer.trained)))
    state.average.update()
    assert state.finite() and 0 <= state.evaluate(last=True)["test_accuracy"] <= 100
    leave_figures(tmp_path, state.average.module, state.dataset, state.split)
    assert (tmp_path / "samples.png").is_file()


def test_published_model_can_be_begun_with(tmp_path):
    keys = {
        "flow": "mnist-masked",
        "noise": 0.0,
        "flow_width": 4,
        "ssl_dim": 16,
        "num_labels": 40,
        "batch_size": 10,
        "uratio": 1,
    }
    state = state_of(toy_config(tmp_path, dataset="digits", **keys))
    ours = {name: torch.randn_like(value) for name, value in state.method.density.state_dict().items()}
    names = (("f.layers.", "flow.modules_."), ("h.layers.", "prior.flow.modules_."))
    names += (("embedding", "prior.flow.embeddings.weight"), ("aux_rho", "prior.shallow_prior.logsigma"))
    names += (("deep_rho", "prior.deep_prior.logsigma"),)
    published = {"flow.modules_.2.mask": torch.ones(1), "prior.deep_prior.mean": torch.zeros(16)}
    for name, value in ours.items():
        for own, theirs in names:
            if name.startswith(own):
                published[theirs + name.removeprefix(own)] = value
    torch.save(published, tmp_path / "model.torch")
    begun = state_of(toy_config(tmp_path, dataset="digits", pretrained=str(tmp_path / "model.torch"), **keys))
    for name, value in begun.method.density.state_dict().items():
        assert name == "log_prior" or torch.equal(value, ours[name]), name
    with pytest.raises(UserError, match="another architecture"):
        state_of(toy_config(tmp_path, pretrained=str(tmp_path / "model.torch")))
    with pytest.raises(UserError, match="there is no checkpoint"):
        state_of(toy_config(tmp_path, pretrained=str(tmp_path / "none.torch")))


PUBLISHED = """
seed: 0
data: mnist
num_examples: -1
sup_sample_weight: 0.5
lr: 0.001
epochs: 500
train_bs: 256
test_bs: 512
lr_schedule: linear
pretrained: ''
weight_decay: 1.0e-05
model: mnist-masked
conv: full
hid_dim: []
k: 4
l: 2
ssl_model: cond-flow
ssl_dim: 196
ssl_l: 2
ssl_k: 4
ssl_hd: 256
supervised: 100
sup_weight: 1
cl_weight: 0
clip_gn: 100
"""


def test_published_configuration_is_the_preset(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(PUBLISHED)
    assert make_config(file=path) == make_config("scnf-mnist-100")
    moons = PUBLISHED.replace("data: mnist", "data: moons").replace("model: mnist-masked", "model: toy")
    path.write_text(moons.replace("supervised: 100", "supervised: 10"))
    toy = make_config(file=path)  # not with what our preset of moons has besides
    assert (toy.flow, toy.num_labels, toy.noise, toy.consistency_weight, toy.ema_decay) == ("toy", 10, 0, 0, 0)
    path.write_text(PUBLISHED.replace("model: mnist-masked", "model: id"))
    with pytest.raises(UserError, match=r"^flow: .*not 'id'"):
        make_config(file=path)
    path.write_text(PUBLISHED.replace("lr_schedule: linear", "lr_schedule: hat\nlr_warmup: 10"))
    assert make_config(file=path).warmup == 2350
    path.write_text(PUBLISHED.replace("sup_sample_weight: 0.5", "sup_sample_weight: -1"))
    with pytest.raises(UserError, match="sup_sample_weight must be positive"):
        make_config(file=path)


def test_sizes_that_cannot_be_are_named(tmp_path):
    for keys, message in (
        ({"ssl_dim": 3}, "only 2 dimensions"),
        ({"ssl_l": 2}, "take --ssl_l 1"),
        ({"flow": "mnist-masked"}, "take --flow tabular"),
    ):
        with pytest.raises(UserError, match=message):
            state_of(toy_config(tmp_path, **keys))
