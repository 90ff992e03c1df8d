"""The flow head against the recorded numbers of the published one, and against the laws that make it a flow."""

import math

import pytest
import torch
from accuracy import assert_near
from torch.nn import functional as F

import normatch
from normatch import FlowHead

FILES = [
    "normatch_head_d21_k3_odd",
    "normatch_head_d34_k7",
    "normatch_head_d128_k10",
    "normatch_head_d128_k10_refinit",
]
# fp32: four times the largest gap that the published code itself shows between fp32 and fp64, over these files.
OUTPUT_GAP, GRADIENT_GAP = 8.7e-06, 1.3e-05


def recorded_head(data, dtype):
    state = {k.removeprefix("param/"): torch.tensor(v).to(dtype) for k, v in data.items() if k.startswith("param/net.")}
    prior = (torch.tensor(data[f"param/prior.{k}"]).to(dtype) for k in ("means", "inv_cov_stds", "weights"))
    return FlowHead.from_reference(state, *prior).eval()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_head_gives_the_recorded_numbers(golden, file, dtype):
    data, exact = golden(file), dtype == torch.float64
    head = recorded_head(data, dtype)
    x, u = (torch.tensor(data[f"in/{k}"]).to(dtype).requires_grad_() for k in "xu")
    y, lambda_num = torch.tensor(data["in/y"]), float(data["in/lambda_num_in_grad"])

    out_x, out_u = head(x), head(u)
    for name, out in (("x", out_x), ("u", out_u)):
        assert_near(out.z, data[f"out64/z_{name}"], OUTPUT_GAP, exact)
        assert_near(out.logdet, data[f"out64/logdet_{name}"], OUTPUT_GAP, exact)
        assert_near(out.class_log_prob, data[f"out64/class_logits_{name}"], OUTPUT_GAP, exact)
        assert_near(out.log_prob - out.logdet, data[f"out64/log_prob_{name}"], OUTPUT_GAP, exact)
        assert_near(head.inverse(out.z), data[f"out64/inverse_{name}"], OUTPUT_GAP, exact)
        if exact:  # a posterior carries the absolute error of logits of several hundred nats
            assert_near(out.class_log_prob.softmax(1), data[f"out64/posterior_{name}"], OUTPUT_GAP, exact)

    loss_f = F.cross_entropy(out_x.class_log_prob, y)
    loss_n = -out_u.log_prob.mean()
    assert_near(loss_f, data["out64/L_f"], OUTPUT_GAP, exact)
    assert_near(loss_n, data["out64/L_n_noconst"], OUTPUT_GAP, exact)
    assert_near(loss_n + head.features * math.log(256), data["out64/L_n"], OUTPUT_GAP, exact)

    (loss_f + lambda_num * (loss_n + head.features * math.log(256))).backward()
    grads = {k.removeprefix("grad64/"): v for k, v in data.items() if k.startswith("grad64/")}
    assert_near(x.grad, grads["in/x"], GRADIENT_GAP, exact)
    assert_near(u.grad, grads["in/u"], GRADIENT_GAP, exact)
    for name, parameter in (("means", head.means), ("rho", head.rho), ("weights", head.mixture_logits)):
        assert_near(parameter.grad, grads[f"prior/{name}"], GRADIENT_GAP, exact)
    if file.endswith("_refinit"):
        return  # the gradients of its networks are not recorded
    # The layout changes gradients as it changes weights; that of the gain has the sign of weight_v.
    layout = {k: torch.tensor(v) for k, v in grads.items() if k.startswith("net.")}
    layout |= {
        k.removeprefix("param/"): torch.tensor(v)
        for k, v in data.items()
        if k.startswith("param/") and k.endswith("_v")
    }
    want = FlowHead.from_reference(layout, *(torch.tensor(grads[f"prior/{k}"]) for k in ("means", "rho", "weights")))
    for name, parameter in head.named_parameters():
        assert_near(parameter.grad, want.get_parameter(name).detach().numpy(), GRADIENT_GAP, exact)


@pytest.fixture(params=[(2, 1), (7, 3), (16, 4)], ids=lambda p: f"D{p[0]}K{p[1]}")
def head(request):
    features, classes = request.param
    return FlowHead(features, classes, couplings=3, hidden=8).double().eval()


def test_inverse_undoes_forward(head):
    x = torch.randn(9, head.features, dtype=torch.float64)
    assert torch.allclose(head.inverse(head(x).z), x, rtol=0, atol=1e-12)


def test_logdet_is_that_of_the_jacobian(head):
    x = torch.randn(4, head.features, dtype=torch.float64)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda row: head(row[None]).z[0], row) for row in x])
    assert torch.allclose(head(x).logdet, torch.linalg.slogdet(jacobians).logabsdet, atol=1e-10)


def test_every_parameter_gets_a_gradient(head):
    out = head(torch.randn(32, head.features, dtype=torch.float64))
    (F.cross_entropy(out.class_log_prob, torch.arange(32) % head.classes) - out.log_prob.mean()).backward()
    # A mixture of one component has but one share, which is 1 whatever its logit.
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert without == ([] if head.classes > 1 else ["mixture_logits"])


def test_density_integrates_to_one():
    head = FlowHead(2, 3, couplings=2, hidden=8).double().eval()
    with torch.no_grad():
        head.means.mul_(0.5)
        axis = torch.linspace(-14, 14, 401, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        total = head(grid).log_prob.exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 1e-3


def test_samples_have_the_class_they_were_drawn_from():
    head = FlowHead(16, 4, couplings=3).eval()
    with torch.no_grad():
        head.means.mul_(5)  # far apart, so that each sample's class is beyond doubt
    label = torch.arange(40) % 4
    x = head.sample(40, label)
    assert torch.equal(head(x).class_log_prob.argmax(1), label)
    assert (head(head.sample(10, 2)).class_log_prob.argmax(1) == 2).all()
    with pytest.raises(ValueError, match="label"):
        head.sample(3, label=4)


def test_sampling_follows_the_generator_and_the_mixture():
    head = FlowHead(4, 3, couplings=2).eval()
    draws = [head.sample(5, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].shape == (5, 4)
    with torch.no_grad():
        head.means.copy_(10 * torch.eye(3, 4))
        head.mixture_logits.copy_(torch.tensor([-50.0, 0.0, 0.0]))
    classes = head(head.sample(300)).class_log_prob.argmax(1)
    assert set(classes.tolist()) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_computed_in_fp32(dtype):
    head = FlowHead(12, 3).eval()
    x = torch.randn(6, 12).to(dtype)
    low, full = head(x), head(x.float())
    for got, want in zip(low, full, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x).log_prob, full.log_prob)


def test_compiles_to_one_graph():
    head = FlowHead(12, 3, couplings=2).eval()
    x = torch.randn(6, 12)
    compiled = torch.compile(head, fullgraph=True)
    for got, want in zip(compiled(x), head(x), strict=True):
        assert torch.allclose(got, want, atol=1e-4)


def test_compat_adds_the_published_epsilon():
    torch.manual_seed(1)
    clean = FlowHead(4, 3).double().eval()
    torch.manual_seed(1)
    published = FlowHead(4, 3, compat="reference").double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    difference = published(x).class_log_prob - clean(x).class_log_prob
    assert torch.allclose(difference, torch.tensor(math.log(1 / 3 + 1e-6) - math.log(1 / 3), dtype=torch.float64))


def test_frozen_prior_gets_no_gradient():
    head = FlowHead(4, 3, trainable_prior=False)
    head(torch.randn(5, 4)).log_prob.sum().backward()
    assert all(p.grad is None for p in head.prior_parameters())
    assert head.couplings[0].gain.grad is not None


def test_empty_batch():
    out = FlowHead(5, 3)(torch.empty(0, 5))
    assert [tuple(t.shape) for t in out] == [(0, 5), (0,), (0, 3), (0,)]


@pytest.mark.parametrize(
    "arguments", [{"features": 1}, {"classes": 0}, {"couplings": 0}, {"hidden": 0}, {"compat": "published"}]
)
def test_impossible_head_is_refused(arguments):
    with pytest.raises(ValueError):
        FlowHead(**{"features": 4, "classes": 2, **arguments})


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        FlowHead(4, 2)(torch.randn(3, 5))


def test_state_dict_of_something_else_is_refused():
    with pytest.raises(KeyError, match="NorMatch"):
        FlowHead.from_reference({"conv1.weight": torch.zeros(1)}, torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))


def test_public_names():
    assert normatch.FlowHead is FlowHead
    assert callable(normatch.train) and callable(normatch.evaluate) and callable(normatch.load)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    head, x = FlowHead(8, 3, hidden=64, dropout=0.5), torch.randn(4, 8)
    with torch.no_grad():
        for coupling in head.couplings:
            coupling.net[-1].weight.normal_()
    assert not torch.equal(head(x).z, head(x).z)
    head.eval()
    assert torch.equal(head(x).z, head(x).z)
