"""FlowGMM: its losses against their definition."""

import pytest
import torch
from torch.nn import functional as F

from normatch.config import make_config
from normatch.flows import FlowClassifier, GaussianMixture, RealNVPTabular
from normatch.methods.base import Task
from normatch.methods.flowgmm import FlowGMM


def model_of(features=3, classes=2):
    torch.manual_seed(0)
    flow = RealNVPTabular(features, couplings=2, hidden=8, layers=1)
    return FlowClassifier(flow, GaussianMixture(torch.randn(classes, features), mixture_logits=torch.randn(classes)))


def batch_of(b=4, u=6, views=1, features=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(b + views * u, features, generator=generator)
    return {"images": images, "y": torch.arange(b) % 2, "u_y": torch.full((u,), -1)}


def loss_of(model, batch, step=0, **keys):
    method = FlowGMM(Task((3,), ["a", "b"]), make_config("moons", **keys))
    method.density = model
    return method(batch, torch.tensor(step))


@pytest.mark.parametrize("labeled_loss", ["joint", "classes"])
def test_losses_are_those_of_the_paper(labeled_loss):
    model, batch = model_of(), batch_of(views=2)
    keys = {"labeled_loss": labeled_loss, "label_weight": 2.0, "lambda_u": 0.5, "consistency_weight": 3.0}
    loss, metrics = loss_of(model, batch, step=5, consistency_rampup=10, **keys)

    x, y = batch["images"], batch["y"]
    joint = model.class_log_prob(x)  # log p(x, y = k)
    with_label = joint[:4].gather(1, y[:, None])[:, 0]
    if labeled_loss == "joint":
        expected = 2 * -with_label.mean() + 0.5 * -joint[10:].logsumexp(1).mean()
    else:
        expected = 2 * F.cross_entropy(joint[:4], y) + 0.5 * -torch.cat((joint[:4], joint[10:])).logsumexp(1).mean()
    given = model.log_prob(x[10:], joint[4:10].argmax(1))  # log p(x' | class of the other view)
    expected = expected + 3.0 * 0.5 * -given.mean()  # half of the ramp
    torch.testing.assert_close(loss, expected)
    assert metrics["pseudo_label_accuracy"][1] == 0  # no label is known of these
    loss.backward()
    assert all(p.grad is not None for p in model.flow.parameters())


def test_cross_entropy_and_marginal_of_labeled_rows_are_the_joint_objective():
    model, batch = model_of(), batch_of(b=4, u=4)
    batch["images"][4:] = batch["images"][:4]  # the same rows, so that both marginals have the same mean
    classes, _ = loss_of(model, batch, labeled_loss="classes", label_weight=1.0, lambda_u=1.0)
    joint, _ = loss_of(model, batch, labeled_loss="joint", label_weight=1.0, lambda_u=0.0)
    torch.testing.assert_close(classes, joint)


def test_labeled_only_looks_at_nothing_else():
    model, batch = model_of(), batch_of()
    alone, metrics = loss_of(model, batch, lambda_u=0.0)
    batch["images"][4:] = float("nan")
    torch.testing.assert_close(loss_of(model, batch, lambda_u=0.0)[0], alone)
    assert "loss_u" not in metrics


def test_noise_makes_a_second_view_of_a_row():
    model, batch = model_of(), batch_of(b=2, u=50)
    model.prior.means.data *= 0.1
    torch.manual_seed(3)
    _, quiet = loss_of(model, batch, consistency_weight=1.0, noise=0.0)
    _, loud = loss_of(model, batch, consistency_weight=1.0, noise=3.0)
    # Without noise the guess is the row's own most probable class; with it, not always.
    out = model(batch["images"][2:])
    own = (out.class_log_prob - model.log_class_prior()).gather(1, out.class_log_prob.argmax(1)[:, None])[:, 0]
    torch.testing.assert_close(quiet["loss_consistency"][0], -(own + out.logdet).mean().detach())
    assert loud["loss_consistency"][0] > quiet["loss_consistency"][0]
