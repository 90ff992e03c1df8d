"""Semi-conditional flows against the recorded numbers of the published ones, and against the laws of densities."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import assert_near, with_jacobian
from torch import nn

import normatch
from normatch import UserError
from normatch.config import make_config
from normatch.data import load_dataset, make_split
from normatch.flow_training import FlowState
from normatch.flows import SCNF, ConditionalFlow, MaskedGlow, PointFlow, initialize
from normatch.flows.layers import (
    ActNorm,
    ConditionalMaskedCoupling,
    ConditionalShift,
    DoubleCoupling,
    FactorOut,
    ImageCoupling,
    InvertibleConv,
    Logit,
    Squeeze,
)
from normatch.flows.scnf import ConditionalNet, image_net, vector_net
from normatch.methods.scnf import SemiConditional

# fp32: the largest gap that the published code itself shows between fp32 and fp64 (outputs, gradients).
GAPS = 5.0e-06, 2.5e-06


def recorded_layers(data):
    """Recorded name -> (layer, its arguments besides x, whether the published inverse is exact)."""
    e = torch.tensor(data["in/cond_emb"]).double()
    shift = torch.tensor(data["param/cond_shift/factors.weight"]).double()[torch.tensor(data["in/cond_shift/y"])]
    datainit = ActNorm(3).double()
    initialize(datainit, torch.tensor(data["in/actnorm_datainit/x"]).double())
    return {
        "cond_coupling_1x1": (DoubleCoupling(vector_net(7, 8, 6), vector_net(7, 8, 6)), [e], True),
        "cond_coupling_3x3net": (
            DoubleCoupling(*(image_net(6, 6, 4, ConditionalNet) for _ in range(2))),
            [e],
            True,
        ),
        "cond_masked": (ConditionalMaskedCoupling(image_net(6, 6, 4, ConditionalNet), 2, "odd"), [e], True),
        "coupling": (DoubleCoupling(image_net(2, 6, 4), image_net(2, 6, 4)), [], True),
        "masked0_even": (ImageCoupling(image_net(2, 6, 4), 2, "even", gained=False, shift_first=False), [], False),
        "masked1_odd": (ImageCoupling(image_net(2, 6, 4), 2, "odd", gained=False, shift_first=False), [], False),
        "invconv": (InvertibleConv(5), [], True),
        "actnorm": (ActNorm(3), [], True),
        "actnorm_datainit": (datainit, [], True),
        "tologits": (Logit(0.95), [], True),
        "cond_shift": (ConditionalShift(), [shift], True),
        "toy2d_flow": (PointFlow(steps=3), [], True),
    }


@pytest.mark.parametrize(
    "name",
    [
        "cond_coupling_1x1",
        "cond_coupling_3x3net",
        "cond_masked",
        "coupling",
        "masked0_even",
        "masked1_odd",
        "invconv",
        "actnorm",
        "actnorm_datainit",
        "tologits",
        "cond_shift",
        "toy2d_flow",
    ],
)
def test_layer_gives_the_recorded_numbers(golden, name):
    data = golden("scnf_layers")
    layer, context, inverts = recorded_layers(data)[name]
    layer.double()
    x = torch.tensor(data[f"in/{name}/x"]).double()
    vectors = name in ("cond_coupling_1x1", "cond_shift", "toy2d_flow")
    x = (x.flatten(1) if vectors else x).requires_grad_()
    own = dict(layer.named_parameters())

    def ours(key):
        return key.rpartition("/")[2].replace("modules_.", "layers.")

    if name not in ("actnorm_datainit", "cond_shift"):
        for key, value in data.items():
            if key.startswith(f"param/{name}/") and ours(key) in own:
                own[ours(key)].data.copy_(torch.tensor(value).reshape(own[ours(key)].shape))
    z, logdet = layer(x, *context)

    def near(got, want):
        assert_near(got, want.reshape(got.shape), 0, exact=True)

    near(z, data[f"out64/{name}/y"])
    near(logdet, data[f"out64/{name}/logdet"])
    if name == "actnorm_datainit":
        near(layer.logs, data["out64/actnorm_datainit/logs"])
        near(layer.bias, data["out64/actnorm_datainit/bias"])
    if inverts:
        near(layer.inverse(z, *context), data[f"out64/{name}/inverse"])
    torch.testing.assert_close(layer.inverse(z, *context), x, rtol=0, atol=1e-9)  # published: sometimes off by 1e-6

    weights = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape)
    total = (z * weights).sum() + (torch.arange(1, len(z) + 1) * logdet).sum()
    keys = [key for key in data if key.startswith(f"grad64/{name}/") and (ours(key) == "x" or ours(key) in own)]
    assert f"grad64/{name}/in/x" in keys
    leaves = [x if ours(key) == "x" else own[ours(key)] for key in keys]
    for key, grad in zip(keys, torch.autograd.grad(total, leaves), strict=True):
        near(grad, data[key])


LAYERS = {  # of images (C, H, W), or of vectors (C,)
    "actnorm": (ActNorm(3), (3, 2, 3)),
    "logit": (Logit(0.95), (2, 2, 3)),
    "coupling": (DoubleCoupling(image_net(2, 3, 4), image_net(2, 3, 4)), (4, 2, 3)),
    "odd-coupling": (DoubleCoupling(image_net(1, 3, 4), image_net(2, 3, 2)), (3, 2, 3)),
    "conditional-coupling": (DoubleCoupling(vector_net(5, 4, 6), vector_net(6, 4, 4)), (5,)),
    "masked": (ImageCoupling(image_net(2, 3, 4), 2, "even", gained=False, shift_first=False), (2, 2, 3)),
    "conditional-masked": (ConditionalMaskedCoupling(image_net(5, 3, 4, ConditionalNet), 2, "odd"), (2, 2, 3)),
    "conditional-flow-hh": (ConditionalFlow(5, 3, 2, 1, 4, "householder"), (5,)),
    "conditional-flow-qr": (ConditionalFlow(5, 3, 2, 1, 4, "qr"), (5,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_a_bijection_with_the_logdet_of_its_jacobian(name):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, e = torch.rand(2, *shape, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)

    def run(method, rows):
        return method(rows, e.expand(len(rows), -1)) if "conditional" in name else method(rows)

    z, logdet = run(layer, x)
    torch.testing.assert_close(run(layer.inverse, z), x, rtol=0, atol=1e-9)
    for row, found in zip(x, logdet, strict=True):
        _, jacobian = with_jacobian(lambda rows: run(layer, rows.unflatten(1, shape))[0].flatten(1), row.flatten())
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-9)


def test_shapes_change_as_recorded(golden):
    data = golden("scnf_layers")
    squeezed = Squeeze("space")(torch.tensor(data["in/space_to_depth/x"]))[0]
    assert torch.equal(squeezed, torch.tensor(data["out/space_to_depth/y"]))
    kept, out = FactorOut(4, first=True)(torch.tensor(data["in/factor_out/x"]))
    assert kept.shape[1] == 2 and out.shape[1] == 4


def recorded_model(data, dtype):
    size = {k: int(data[f"meta/{k}"]) for k in ("H", "hid_f", "K", "ssl_dim", "hid_h", "ssl_l", "ssl_k")}
    f = MaskedGlow((1, size["H"], size["H"]), size["hid_f"], levels=None)
    h = ConditionalFlow(size["ssl_dim"], levels=size["ssl_l"], steps=size["ssl_k"], hidden=size["hid_h"])
    counts = torch.tensor(data["in/py_counts"]).to(dtype)
    model = SCNF(f, h, size["K"], class_prior=counts).to(dtype)
    model.load_published(
        {k.removeprefix("param/"): torch.tensor(v).to(dtype) for k, v in data.items() if k.startswith("param/")}
    )
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_gives_the_recorded_numbers(golden, dtype):
    data, exact = golden("scnf_12x12_k5"), dtype == torch.float64
    gap, gradient_gap = GAPS
    model = recorded_model(data, dtype)
    x = torch.tensor(data["in/x"]).to(dtype).requires_grad_()
    y = torch.tensor(data["in/y"])

    out = model(x)
    assert_near(out.z, data["out64/z"], gap, exact)
    assert_near(out.logdet, data["out64/logdet_f"], gap, exact)
    joint = out.class_log_prob + out.logdet[:, None]
    assert_near(joint, data["out64/log_joint"], gap, exact)
    assert_near(model.log_class_prior(), data["out64/log_py"], gap, exact)
    assert_near(joint - model.log_class_prior(), data["out64/log_px_given_y"], gap, exact)
    assert_near(out.log_prob, data["out64/log_px"], gap, exact)
    assert_near(out.class_log_prob.log_softmax(1), data["out64/log_posterior"], gap, exact)
    elbo = model.log_prob(x, y)
    assert_near(elbo, data["out64/elbo"], gap, exact)
    z_h = model.embed(x, torch.ones(len(x), dtype=torch.long))[1]
    assert_near(z_h, data["out64/z_h"][:, 1], gap, exact)
    deep = model.h.inverse(z_h, model.embedding[1])
    assert_near(deep, data["out64/inverse_h_y1"], gap, exact)
    torch.testing.assert_close(model.inverse(out.z), x, rtol=0, atol=1e-9 if exact else 1e-5)

    labelled = y >= 0
    w = torch.where(labelled, float(data["in/sup_weight"]), 1.0).to(dtype)
    generative = -(w / w.sum() * elbo).sum()
    assert_near(generative, data["out64/gen_loss"], gap, exact)
    classification = nn.functional.cross_entropy(out.class_log_prob[labelled], y[labelled])
    assert_near(classification, data["out64/cl_loss"], gap, exact)
    loss = generative + float(data["in/cl_weight"]) * classification
    assert_near(loss, data["out64/loss"], gap, exact)

    loss.backward()
    assert_near(x.grad, data["grad64/in/x"], gradient_gap, exact)
    # The gradients go where the weights they belong to would go.
    grads = copy.deepcopy(model)
    grads.load_published(
        {
            k.removeprefix("param/"): torch.tensor(data.get(f"grad64/{k.removeprefix('param/')}", v * np.nan)).to(dtype)
            for k, v in data.items()
            if k.startswith("param/")
        }
    )
    recorded = [name for name, p in grads.named_parameters() if not p.isnan().any()]
    assert len(recorded) == sum(key.startswith("grad64/") for key in data) - 1
    for name in recorded:
        want = grads.get_parameter(name).detach().double().numpy()
        assert_near(model.get_parameter(name).grad, want, gradient_gap, exact)


def test_published_models_have_their_numbers_of_parameters():
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        f, h = MaskedGlow(), ConditionalFlow(196)
        assert parameters(f) == 6_299_987
        assert parameters(h) + 10 * h.embedding == 9_574_676
        assert parameters(PointFlow()) == 44_220


def randomised(model):
    """No zero in it: what begins as the identity would hide mistakes. Its samples are close to the mean."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.aux_rho.data -= 4
    model.deep_rho.data -= 4
    return model


def small_models():
    yield (
        "image",
        SCNF(MaskedGlow((1, 8, 8), 4, levels=None), ConditionalFlow(10, 4, 2, 1, 8), 3, class_prior=[2, 1, 1]),
    )
    yield "odd", SCNF(PointFlow(5, 2, 8), ConditionalFlow(3, 4, 1, 2, 8, "qr"), 4)
    yield "plane", SCNF(PointFlow(2, 2, 8), ConditionalFlow(2, levels=1, steps=2, hidden=8), 2)
    yield "shift", SCNF(PointFlow(2, 2, 8), "shift", 3)


MODELS = [pytest.param(randomised(model.double()), id=name) for name, model in small_models()]


@pytest.mark.parametrize("model", MODELS)
def test_marginal_is_the_sum_over_the_classes(model):
    x = torch.rand(3, *model.f.shape, dtype=torch.float64)
    joint = torch.stack([model.log_prob(x, k) + model.log_class_prior()[k] for k in range(model.classes)], 1)
    torch.testing.assert_close(model.log_prob(x), joint.logsumexp(1))
    torch.testing.assert_close(model.class_log_prob(x), joint)
    torch.testing.assert_close(model.class_probs(x), joint.softmax(1))


@pytest.mark.parametrize("model", MODELS)
def test_density_given_a_class_is_that_of_its_bijection(model):
    x = torch.rand(2, *model.f.shape, dtype=torch.float64)
    y = torch.tensor([0, model.classes - 1])

    def whole(rows, label):
        z, z_h = model.embed(rows.unflatten(1, model.f.shape), label.expand(len(rows)))
        return torch.cat((z[:, : -model.deep], z_h), 1)

    sigma = torch.nn.functional.softplus(torch.cat((model.aux_rho, model.deep_rho)))
    for row, label, found in zip(x, y, model.log_prob(x, y), strict=True):
        z, jacobian = with_jacobian(lambda rows, label=label: whole(rows, label), row.flatten())
        density = torch.distributions.Normal(0, sigma).log_prob(z).sum()
        torch.testing.assert_close(found, density + torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("model", MODELS)
def test_samples_come_back_as_the_noise_they_were_made_of(model):
    y = torch.arange(12) % model.classes
    x = model.sample(12, y, torch.Generator().manual_seed(2))
    noise = torch.randn(12, model.f.features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z, z_h = model.embed(x, y)
    z = torch.cat((z[:, : -model.deep], z_h), 1)
    sigma = torch.nn.functional.softplus(torch.cat((model.aux_rho, model.deep_rho)))
    torch.testing.assert_close(z, noise * sigma, rtol=0, atol=1e-7)
    assert model.sample(4).shape == (4, *model.f.shape)


def test_actnorms_of_both_flows_are_initialised_in_one_pass():
    model = SCNF(MaskedGlow((1, 8, 8), 4), ConditionalFlow(10, 4, 2, 1, 8), 3)
    x = torch.randint(0, 256, (16, 1, 8, 8)) / 255
    x[:, :, 0] = 0  # constant pixels, as at the border of MNIST
    initialize(model, x)
    norms = [module for module in model.modules() if isinstance(module, ActNorm)]
    assert all(norm.bias.isfinite().all() and norm.bias.any() for norm in norms)
    assert model.f.noise == "train"
    with torch.no_grad():
        out = model.train()(x)
    assert abs(float(out.z.mean())) < 0.1 and 0.8 < float(out.z.std()) < 1.2


def test_scnf_reversible_gradient_is_the_ordinary_one():
    plain = randomised(SCNF(MaskedGlow((1, 8, 8), 4, levels=None), ConditionalFlow(10, 4, 1, 1, 8), 3).double())
    frugal = copy.deepcopy(plain)
    frugal.f.reversible = True
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for model in (plain, frugal):
        (-model(x).log_prob.mean()).backward()
    for ours, theirs in zip(frugal.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)


def test_mistakes_are_named(golden):
    data = golden("scnf_12x12_k5")
    state = {k.removeprefix("param/"): torch.tensor(v) for k, v in data.items() if k.startswith("param/")}
    with pytest.raises(UserError, match="another architecture"):
        SCNF(MaskedGlow((1, 12, 12), 8), ConditionalFlow(36, hidden=24, steps=2), 5).load_published(state)
    with pytest.raises(ValueError, match="3 positive numbers"):
        SCNF(PointFlow(), "shift", 3, class_prior=[1, 0, 2])
    with pytest.raises(ValueError, match="cannot tell 11 classes apart"):
        SCNF(PointFlow(), ConditionalFlow(2, levels=1), 11)
    with pytest.raises(ValueError, match="none left to couple at level 2"):
        ConditionalFlow(2, levels=2)
    with pytest.raises(ValueError, match="cannot be the deep ones"):
        SCNF(PointFlow(), ConditionalFlow(4), 2)
    with pytest.raises(ValueError, match="a ConditionalFlow or 'shift', not 'shft'"):
        SCNF(PointFlow(), "shft", 2)
    assert SCNF(PointFlow(), "shift", 2).sample(0).shape == (0, 2)


# ---- Training -----------------------------------------------------------------------------------------------------


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


def test_objective_is_that_of_the_paper():
    model = randomised(SCNF(PointFlow(2, 2, 8), ConditionalFlow(2, 10, 1, 2, 8), 3, class_prior=[3, 1, 1]))
    batch = {"images": torch.randn(7, 2), "y": torch.tensor([2, 0, 1]), "u_y": torch.full((4,), -1)}
    config = make_config("scnf-moons", label_weight=1.5, cl_weight=0.3, noise=0.0, consistency_weight=0.0)
    loss, metrics = SemiConditional(model, config)(batch, torch.tensor(0))
    log_prob = model.log_prob(batch["images"], torch.cat((batch["y"], batch["u_y"])))
    weights = torch.tensor([1.5] * 3 + [1.0] * 4)
    posterior = model.class_log_prob(batch["images"][:3]).log_softmax(1)
    expected = -(weights / weights.sum() * log_prob).sum() + 0.3 * nn.functional.nll_loss(posterior, batch["y"])
    torch.testing.assert_close(loss, expected)
    assert metrics["pseudo_label_accuracy"][1] == 0


def test_consistency_asks_for_the_class_of_the_other_view():
    model = randomised(SCNF(PointFlow(2, 2, 8), ConditionalFlow(2, 10, 1, 2, 8), 3))
    x = torch.randn(3 + 2 * 4, 2)
    batch = {"images": x, "y": torch.tensor([2, 0, 1]), "u_y": torch.full((4,), -1)}

    def loss_of(weight):
        keys = {"noise": 0.0, "consistency_weight": weight, "consistency_rampup": 10}
        return SemiConditional(model, make_config("scnf-moons", **keys))(batch, torch.tensor(5))

    without, _ = loss_of(0.0)
    loss, metrics = loss_of(2.0)
    of_other = model.class_log_prob(x[3:7]).argmax(1)  # the second views are learnt from
    expected = nn.functional.cross_entropy(model.class_log_prob(x[7:]), of_other)
    torch.testing.assert_close(metrics["loss_consistency"][0], expected.detach())
    torch.testing.assert_close(loss - without, 0.5 * 2.0 * expected)


def test_a_run_learns_resumes_and_leaves_its_pictures(tmp_path):
    result = normatch.train(toy_config(tmp_path / "run", steps=120, eval_every=120, lr=1e-2))
    assert result.test_accuracy > 80
    assert {"plane.png", "latent.png", "summary.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert normatch.evaluate(tmp_path / "run")["test_accuracy"] == pytest.approx(result.test_accuracy, abs=0.11)
    begun = FlowState(toy_config(tmp_path / "more", pretrained=str(tmp_path / "run")), torch.device("cpu"))
    assert begun.evaluate(last=True)["test_accuracy"] == pytest.approx(result.test_accuracy, abs=0.11)


def test_mixture_trains(tmp_path):
    state = FlowState(toy_config(tmp_path, ssl_model="cond-shift"), torch.device("cpu"))
    losses = []
    for step, batch in zip(range(30), state.batches(0), strict=False):
        loss, _ = state.objective.train()(batch, torch.tensor(step))
        state.begin_step()
        state.update(list(torch.autograd.grad(loss, state.trained())))
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_images_train_as_they_are(tmp_path):
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
    state = FlowState(toy_config(tmp_path, dataset="digits", **keys), torch.device("cpu"), few, split)
    batch = next(iter(state.batches(0)))
    pixels = torch.from_numpy(few.train_x[batch["u_index"].numpy(), :, :, 0]) / 255
    torch.testing.assert_close(batch["images"][10:, 0], pixels)
    loss, _ = state.objective.train()(batch, torch.tensor(0))
    state.begin_step()
    state.update(list(torch.autograd.grad(loss, state.trained())))
    assert state.finite() and 0 <= state.evaluate(last=True)["test_accuracy"] <= 100
    state.leave_figures(tmp_path)
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
    state = FlowState(toy_config(tmp_path, dataset="digits", **keys), torch.device("cpu"))
    ours = {name: torch.randn_like(value) for name, value in state.objective.model.state_dict().items()}
    names = (("f.layers.", "flow.modules_."), ("h.layers.", "prior.flow.modules_."))
    names += (("embedding", "prior.flow.embeddings.weight"), ("aux_rho", "prior.shallow_prior.logsigma"))
    names += (("deep_rho", "prior.deep_prior.logsigma"),)
    published = {"flow.modules_.2.mask": torch.ones(1), "prior.deep_prior.mean": torch.zeros(16)}
    for name, value in ours.items():
        for own, theirs in names:
            if name.startswith(own):
                published[theirs + name.removeprefix(own)] = value
    torch.save(published, tmp_path / "model.torch")
    begun = FlowState(
        toy_config(tmp_path, dataset="digits", pretrained=str(tmp_path / "model.torch"), **keys), torch.device("cpu")
    )
    for name, value in begun.objective.model.state_dict().items():
        assert name == "log_prior" or torch.equal(value, ours[name]), name
    with pytest.raises(UserError, match="another architecture"):
        FlowState(toy_config(tmp_path, pretrained=str(tmp_path / "model.torch")), torch.device("cpu"))
    with pytest.raises(UserError, match="there is no checkpoint"):
        FlowState(toy_config(tmp_path, pretrained=str(tmp_path / "none.torch")), torch.device("cpu"))


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
            FlowState(toy_config(tmp_path, **keys), torch.device("cpu"))


def test_compiler_takes_the_model_whole():
    model = SCNF(PointFlow(4, 1, 4), ConditionalFlow(4, 10, 2, 1, 4), 3)
    x = torch.rand(3, 4)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = call(x)
        results.append([*out, *torch.autograd.grad(-out.log_prob.mean(), list(model.parameters()))])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
