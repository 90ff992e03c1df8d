"""Semi-conditional flows against the recorded numbers of the published ones, and against the laws of densities."""

import copy

import numpy as np
import pytest
import torch
from accuracy import assert_near, with_jacobian
from torch import nn

from normatch import UserError
from normatch.flows import SCNF, ConditionalFlow, MaskedGlow, PointFlow, initialize
from normatch.flows.layers import (
    ActNorm,
    ConditionalShift,
    DoubleCoupling,
    FactorOut,
    ImageCoupling,
    InvertibleConv,
    Logit,
    Squeeze,
)
from normatch.flows.scnf import ConditionalNet, image_net, vector_net

# fp32: the largest gap that the published code itself shows between fp32 and fp64 (outputs, gradients).
GAPS = 5.0e-06, 2.5e-06


def recorded_layers(data):
    """Recorded name -> (layer, its arguments besides x, whether the published inverse is exact)."""
    e = torch.tensor(data["in/cond_emb"]).double()
    shift = torch.tensor(data["param/cond_shift/factors.weight"]).double()[torch.tensor(data["in/cond_shift/y"])]

    class Given(ConditionalNet):
        """x: (N, C, H, W) -> (N, ...): the network with the recorded embedding."""

        def forward(self, x):
            return super().forward(x, e)

    datainit = ActNorm(3).double()
    initialize(datainit, torch.tensor(data["in/actnorm_datainit/x"]).double())
    return {
        "cond_coupling_1x1": (DoubleCoupling(vector_net(7, 8, 6), vector_net(7, 8, 6)), [e], True),
        "cond_coupling_3x3net": (
            DoubleCoupling(*(image_net(6, 6, 4, ConditionalNet) for _ in range(2))),
            [e],
            True,
        ),
        "cond_masked": (ImageCoupling(image_net(6, 6, 4, Given), 2, "odd", gained=False, shift_first=False), [], True),
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

    labeled = y >= 0
    w = torch.where(labeled, float(data["in/sup_weight"]), 1.0).to(dtype)
    generative = -(w / w.sum() * elbo).sum()
    assert_near(generative, data["out64/gen_loss"], gap, exact)
    classification = nn.functional.cross_entropy(out.class_log_prob[labeled], y[labeled])
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


def randomized(model):
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


MODELS = [pytest.param(randomized(model.double()), id=name) for name, model in small_models()]


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


def test_actnorms_of_both_flows_are_initialized_in_one_pass():
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
    plain = randomized(SCNF(MaskedGlow((1, 8, 8), 4, levels=None), ConditionalFlow(10, 4, 1, 1, 8), 3).double())
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


def test_compiler_takes_the_model_whole():
    model = SCNF(PointFlow(4, 1, 4), ConditionalFlow(4, 10, 2, 1, 4), 3)
    x = torch.rand(3, 4)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = call(x)
        results.append([*out, *torch.autograd.grad(-out.log_prob.mean(), list(model.parameters()))])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
