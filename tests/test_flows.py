"""The flows against the recorded numbers of the published ones, and against the laws that make them flows."""

import copy
import math

import numpy as np
import pytest
import torch
from accuracy import assert_near, with_jacobian
from torch import nn

from normatch import UserError
from normatch.flows import (
    Flow,
    FlowClassifier,
    GaussianMixture,
    Glow,
    GlowMNIST,
    MaskedGlow,
    RealNVP,
    RealNVPMNIST,
    RealNVPTabular,
    dequantize,
    initialize,
)
from normatch.flows.layers import (
    ActNorm,
    FactorOut,
    ImageCoupling,
    InvertibleConv,
    Logit,
    Squeeze,
    checkerboard,
)

# fp32: the largest gap that the published code itself shows between fp32 and fp64 (outputs, gradients).
TABULAR_GAPS = 6.8e-07, 9.9e-07
IMAGE_GAPS = 3.7e-06, 1.4e-04


def tensors(data, prefix, dtype):
    """The recorded arrays whose names begin with `prefix`, by the rest of their names; floats of this type."""
    found = {k.removeprefix(prefix): torch.as_tensor(v) for k, v in data.items() if k.startswith(prefix)}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def recorded_prior(data, dtype):
    prior = tensors(data, "param/prior.", dtype)
    return GaussianMixture(prior["means"], prior["inv_cov_stds"], prior["weights"], trainable=True)


def mixed_loss(out, model, y, features):
    """FlowGMM's loss of a batch with labels of -1: mean of -(log p(z[|y]) - D log 256 + logdet)."""
    of_class = out.class_log_prob - model.log_class_prior()
    chosen = torch.where(y < 0, out.log_prob - out.logdet, of_class.gather(1, y.clamp(min=0)[:, None])[:, 0])
    return chosen, -(chosen - features * math.log(256) + out.logdet).mean()


@pytest.mark.parametrize("file", ["flowgmm_tabular_d2", "flowgmm_tabular_d10"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tabular_flow_gives_the_recorded_numbers(golden, file, dtype):
    data, exact = golden(file), dtype == torch.float64
    gap, gradient_gap = TABULAR_GAPS
    sizes = {k: int(data[f"meta/{k}"]) for k in ("D", "num_couplings", "hidden", "num_layers")}
    flow = RealNVPTabular(sizes["D"], sizes["num_couplings"], sizes["hidden"], sizes["num_layers"]).to(dtype)
    flow.load_published(tensors(data, "param/", dtype))
    model = FlowClassifier(flow, recorded_prior(data, dtype))
    x = torch.tensor(data["in/x"]).to(dtype).requires_grad_()
    y = torch.tensor(data["in/y"])

    out = model(x)
    assert_near(out.z, data["out64/z"], gap, exact)
    assert_near(out.logdet, data["out64/logdet"], gap, exact)
    assert_near(out.class_log_prob, data["out64/class_logits"], gap, exact)
    assert_near(out.log_prob - out.logdet, data["out64/log_prob_marginal"], gap, exact)
    assert_near(model.log_prob(x), data["out64/log_px"], gap, exact)
    assert_near(model.class_probs(x), data["out64/class_probs"], gap, exact)
    assert_near(model.inverse(out.z), data["out64/inverse"], gap, exact)
    assert_near(model.log_prob(x, y) - out.logdet, data["out64/log_prob_mixed"], gap, exact)
    _, loss = mixed_loss(out, model, y, sizes["D"])
    assert_near(loss, data["out64/flow_loss_mixed"], gap, exact)

    loss.backward()
    grads = tensors(data, "grad64/", torch.float64)
    assert_near(x.grad, data["grad64/in/x"], gradient_gap, exact)
    for parameter, name in zip(model.prior_parameters(), ("means", "rho", "weights"), strict=True):
        assert_near(parameter.grad, data[f"grad64/prior/{name}"], gradient_gap, exact)
    # The layout changes gradients as it changes weights; that of the gain has the sign of weight_v.
    signs = {k: v for k, v in tensors(data, "param/", torch.float64).items() if k.endswith("weight_v")}
    want = RealNVPTabular(sizes["D"], sizes["num_couplings"], sizes["hidden"], sizes["num_layers"]).double()
    want.load_published({**grads, **signs})
    for name, parameter in flow.named_parameters():
        assert_near(parameter.grad, want.get_parameter(name).detach().numpy(), gradient_gap, exact)


@pytest.mark.parametrize("layers", [1, 2])
def test_fused_and_composed_tabular_flows_agree(layers):
    model = FlowClassifier(RealNVPTabular(5, 3, 16, layers), GaussianMixture(torch.randn(4, 5)))
    x = torch.randn(7, 5)
    z, logdet = model.flow(x)
    out = model(x)
    torch.testing.assert_close(out.z, z)
    torch.testing.assert_close(out.logdet, logdet)
    torch.testing.assert_close(out.class_log_prob, model.prior(z))
    torch.testing.assert_close(model.inverse(z), x, rtol=0, atol=1e-5)


def test_density_of_a_flow_with_its_prior():
    model = FlowClassifier(RealNVPTabular(3, 2, 8, zero_init=True), GaussianMixture(6 * torch.eye(3))).eval()
    x = model.sample(60, torch.arange(60) % 3, torch.Generator().manual_seed(1))
    assert torch.equal(model.class_probs(x).argmax(1), torch.arange(60) % 3)
    joint = model.class_log_prob(x)
    torch.testing.assert_close(joint.logsumexp(1), model.log_prob(x))
    torch.testing.assert_close(model.log_prob(x, 2), joint[:, 2] + math.log(3))
    y = torch.arange(60) % 4 - 1
    rows = model.log_prob(x, y)
    torch.testing.assert_close(rows[y < 0], model.log_prob(x)[y < 0])
    torch.testing.assert_close(rows[y == 1], model.log_prob(x, 1)[y == 1])


def test_mistakes_in_the_calls_are_named():
    model = FlowClassifier(RealNVPTabular(3, 2, 8), GaussianMixture(torch.eye(3)))
    x = torch.zeros(2, 3)
    for y, message in ((3, "0..2.*holds 3"), (torch.tensor([0, -2]), "holds -2"), (torch.zeros(3), "integer or 2 of")):
        with pytest.raises(ValueError, match=message):
            model.log_prob(x, y)
    with pytest.raises(ValueError, match="NaN"):
        model.class_probs(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match=r"shape \(N, 3\), not \(2, 4\)"):
        model(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 dimensions, the means of the prior have 2"):
        FlowClassifier(RealNVPTabular(3), GaussianMixture(torch.eye(2)))
    with pytest.raises(ValueError, match="one a class"):
        GaussianMixture(torch.eye(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        model.sample(2, 3)
    for label in (1.5, torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="must be an integer or 2 of them"):
            model.sample(2, label)
    assert model.sample(0).shape == model.sample(0, 1).shape == (0, 3)
    for names in (("mean",), "means"):
        with pytest.raises(ValueError, match="trainable must be True, False or a tuple of names"):
            GaussianMixture(torch.eye(2), trainable=names)


# ---- Images -------------------------------------------------------------------------------------------------------


def recorded_image_flow(data, file, dtype):
    flow = RealNVPMNIST(width=8, blocks=1) if "mnist" in file else RealNVP((3, 16, 16), width=8, blocks=1)
    flow = flow.to(dtype)
    flow.load_published(tensors(data, "param/body", dtype))
    flow.noise = "always"
    return FlowClassifier(flow, recorded_prior(data, dtype))


def coupling_at(flow, name):
    """The coupling that the published flow calls body.I.J.module1, counted from the first."""
    couplings = [layer for layer in flow.layers if isinstance(layer, ImageCoupling)]
    published = (2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20, 21)  # RealNVPMNIST, one in each place
    i, j = (int(part) for part in name.split(".")[1:3])
    return couplings[published.index(i) if len(couplings) == 16 else {2: 0, 4: 3, 6: 6, 7: 9}[i] + j]


@pytest.mark.parametrize("file", ["flowgmm_image_mnist_1x28", "flowgmm_image_realnvp_3x16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_image_flow_gives_the_recorded_numbers(golden, monkeypatch, file, dtype):
    data, exact = golden(file), dtype == torch.float64
    gap, gradient_gap = IMAGE_GAPS
    noise = torch.tensor(data["in/noise"]).to(dtype)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: noise)
    model = recorded_image_flow(data, file, dtype).eval()
    x = torch.tensor(data["in/x"]).to(dtype).requires_grad_()
    y = torch.tensor(data["in/y"])

    out = model(x)
    logits, logdet = model.flow.layers[0](dequantize(x))
    assert_near(logits, data["out64/ilogits_out"], gap, exact)
    assert_near(logdet, data["out64/ilogits_logdet"], gap, exact)
    pieces = [data[f"out64/piece{i}"].reshape(len(x), -1) for i in range(len(model.flow._pieces))]
    assert_near(out.z, np.concatenate(pieces, 1), gap, exact)
    assert_near(out.logdet, data["out64/logdet"], gap, exact)
    assert_near(out.class_log_prob, data["out64/class_logits"], gap, exact)
    assert_near(out.log_prob - out.logdet, data["out64/log_prob_marginal"], gap, exact)
    chosen, loss = mixed_loss(out, model, y, model.flow.features)
    assert_near(chosen, data["out64/log_prob_mixed"], gap, exact)
    assert_near(loss, data["out64/flow_loss_mixed"], gap, exact)
    # The published inverse leaves the logit's squeeze in; ours gives the pixels back.
    v = data["out64/ilogits_out"] * 0 + dequantize(x).detach().double().numpy()
    back = (model.inverse(out.z) * 255 + 0.5) / 256
    assert np.abs(back.detach().double().numpy() - v).max() < (1e-12 if exact else 1e-5)

    loss.backward()
    assert_near(x.grad, data["grad64/in/x"], gradient_gap, exact)
    for parameter, name in zip(model.prior_parameters(), ("means", "rho", "weights"), strict=True):
        assert_near(parameter.grad, data[f"grad64/prior/{name}"], gradient_gap, exact)
    for name in data["meta/grad_subset_couplings"]:
        coupling = coupling_at(model.flow, name)
        sign = np.sign(data[f"param/{name}.rescale.weight_v"]).ravel()
        want = data[f"grad64/{name}.rescale.weight_g"].ravel() * sign
        assert_near(coupling.gain.grad, want, gradient_gap, exact)
        recorded = {k: v for k, v in data.items() if k.startswith(f"grad64/{name}.st_net.")}
        assert len(recorded) == len(list(coupling.net.parameters()))
        for key, want in recorded.items():
            ours = key.removeprefix(f"grad64/{name}.st_net.").replace(".conv.", ".")
            assert_near(coupling.net.get_parameter(ours).grad, want, gradient_gap, exact)


@pytest.mark.parametrize("file", ["flowgmm_image_mnist_1x28", "flowgmm_image_realnvp_3x16"])
def test_image_flow_in_training_mode_gives_the_recorded_numbers(golden, monkeypatch, file):
    data = golden(file)
    noise = torch.tensor(data["in/noise"]).double()
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: noise)
    flow = recorded_image_flow(data, file, torch.float64).flow.train()
    flow.noise = "train"
    z, logdet = flow(torch.tensor(data["in/x"]).double())
    assert_near(z, data["out64/train_mode/z"], 0, exact=True)
    assert_near(logdet, data["out64/train_mode/logdet"], 0, exact=True)
    prefix = "out/train_mode/buffer_after/"
    buffers = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    assert buffers
    for name, want in buffers.items():  # recorded in fp32
        coupling, net = name.split(".st_net.")
        assert_near(coupling_at(flow, coupling).net.get_buffer(net), want, 1e-6, exact=False)


def test_layers_give_the_recorded_numbers(golden):
    data = golden("flowgmm_layers")
    x = torch.tensor(data["in/ilogits/x"]).double().requires_grad_()
    v = (255 * x + torch.tensor(data["in/ilogits/noise"])) / 256
    z, logdet = Logit(0.90)(v)
    assert_near(z, data["out64/ilogits/out"], 0, exact=True)
    assert_near(logdet, data["out64/ilogits/logdet"], 0, exact=True)
    torch.testing.assert_close(Logit(0.90).inverse(z), v, rtol=0, atol=1e-12)
    squeezed = Squeeze()(torch.tensor(data["in/squeeze/x"]))[0]
    assert torch.equal(squeezed, torch.tensor(data["out/squeeze/y"]))
    like = torch.zeros(())
    assert np.array_equal(checkerboard(5, 4, "odd", like), data["out/checkerboard_5x4"])
    assert np.array_equal(checkerboard(5, 4, "even", like), data["out/checkerboard_5x4_reverse"])


def test_flows_have_the_published_numbers_of_parameters():
    def parameters(flow):  # the published gain is weight-normalised: two tensors, of which one has no gradient
        gains = sum(layer.gain.numel() for layer in flow.layers if isinstance(layer, ImageCoupling))
        return gains + sum(p.numel() for p in flow.parameters())

    with torch.device("meta"):
        assert parameters(RealNVP()) == 19_631_640
        assert parameters(RealNVP((1, 28, 28))) == 19_552_008
        assert parameters(RealNVPMNIST()) == 5_144_664
        assert parameters(Glow()) == 60_030_546
        assert parameters(GlowMNIST()) == 4_498_586


def small_flows():
    yield "realnvp", RealNVP((3, 4, 4), width=4, blocks=1)
    yield "realnvp-conv-actnorm", RealNVP((2, 4, 4), width=4, blocks=1, conv=True, actnorm=True)
    yield "realnvp-mnist", RealNVPMNIST((1, 4, 4), width=4, blocks=1)
    yield "glow", Glow((3, 4, 4), width=4, blocks=1)
    yield "glow-mnist", GlowMNIST((1, 4, 4), width=4, blocks=1)
    for form in ("householder", "qr"):
        yield f"masked-glow-{form}", MaskedGlow((1, 8, 8), 2, form)
    yield "layers", Flow([Logit(0.95), Squeeze("space"), InvertibleConv(4), FactorOut(2, first=True)], (1, 4, 6), 17)


FLOWS = [pytest.param(flow, id=name) for name, flow in small_flows()]


@pytest.mark.parametrize("flow", FLOWS)
def test_image_flow_is_a_bijection_with_the_logdet_of_its_jacobian(flow):
    flow = copy.deepcopy(flow).double()
    levels, flow.levels = flow.levels, None  # the density is that of the dequantised pixels
    v = torch.rand(3, *flow.shape, dtype=torch.float64)
    initialize(flow, v)
    for parameter in flow.parameters():  # networks that begin as 0 would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    flow.eval()
    z, logdet = flow(v)
    assert z.shape == (3, flow.features) and logdet.shape == (3,)
    torch.testing.assert_close(flow.inverse(z), v, rtol=0, atol=1e-10)
    _, jacobian = with_jacobian(lambda rows: flow(rows.unflatten(1, flow.shape))[0], v[0].flatten())
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-9)

    flow.float().levels = levels
    x = torch.randint(0, levels, v.shape) / (levels - 1)
    z, logdet = flow(x)
    assert logdet.dtype == torch.float32
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["full", "householder", "qr"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (2, 3, 5), (4, 5)])
def test_invertible_convolution(form, shape):
    conv = InvertibleConv(5, form, factors=3, rotation=form == "full").double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64)
    z, logdet = conv(x)
    torch.testing.assert_close(conv.inverse(z), x, rtol=0, atol=1e-9)
    pixels = 6 if len(shape) == 4 else 1
    want = pixels * torch.linalg.slogdet(conv.matrix()).logabsdet
    torch.testing.assert_close(logdet, want.expand(logdet.shape), rtol=0, atol=1e-9)
    assert logdet.shape == shape[:1] if len(shape) == 4 else shape[:-1]


@pytest.mark.parametrize("floor", [None, 0.2])
def test_actnorm_is_initialized_once_and_from_data(floor):
    norm = ActNorm(3, variance_floor=floor)
    x = torch.randn(8, 3, 4, 4) * torch.tensor([2.0, 0.01, 1.0])[:, None, None] + 5
    assert torch.equal(norm(x)[0], x)
    initialize(norm, x)
    z, logdet = norm(x)
    deviations = z.transpose(0, 1).flatten(1).std(1)
    expected = torch.ones(3)
    if floor:
        expected[1] = x[:, 1].std() / floor**0.5
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(deviations, expected, rtol=0.01, atol=0)
    torch.testing.assert_close(norm.inverse(z), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(norm(x + 1)[1], logdet)  # a second batch changes nothing


def test_dequantisation_is_seeded_and_off_at_evaluation():
    flow = RealNVP((1, 4, 4), width=4, blocks=1)
    x = torch.randint(0, 256, (2, 1, 4, 4)) / 255
    flow.eval()
    assert torch.equal(flow(x)[0], flow(x)[0])
    flow.noise = "always"
    torch.manual_seed(3)
    first, second = flow(x)[0], flow(x)[0]
    torch.manual_seed(3)
    assert torch.equal(flow(x)[0], first) and not torch.equal(first, second)
    v = dequantize(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(v, dequantize(x, generator=torch.Generator().manual_seed(1)))
    assert torch.equal((v * 256).floor(), x * 255)


def test_flows_remember_nothing_of_the_last_call():
    flow = RealNVPMNIST((1, 4, 4), width=4, blocks=1).eval()
    x1, x2 = torch.rand(2, 3, 1, 4, 4)
    before = copy.deepcopy(flow.state_dict())
    z1, logdet1 = flow(x1)
    flow(x2)
    again = copy.deepcopy(flow)(x1)
    assert torch.equal(again[0], z1) and torch.equal(again[1], logdet1)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_reversible_gradient_is_the_ordinary_one(training):
    flow = RealNVP((2, 4, 4), width=4, blocks=1, conv=True, actnorm=True, levels=None).double().train(training)
    first, second, *_ = (layer for layer in flow.layers if isinstance(layer, ImageCoupling))
    if not training:  # where running statistics do not count how often a network is asked
        second.net = first.net
    x = torch.rand(4, 2, 4, 4, dtype=torch.float64)
    twin = copy.deepcopy(flow)
    twin.reversible = True
    results = []
    for model in (flow, twin):
        leaf = x.clone().requires_grad_()
        z, logdet = model(leaf)
        (z.square().sum() - (logdet * torch.arange(4)).sum()).backward()
        results.append([z, logdet, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, plain in zip(*results, strict=True):  # the buffers too: BatchNorm counts a batch once
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)


def test_state_dict_of_another_architecture_is_refused(golden):
    data = golden("flowgmm_image_mnist_1x28")
    state = tensors(data, "param/body", torch.float32)
    with pytest.raises(UserError, match="16 couplings, this flow 10"):
        RealNVP((1, 28, 28), width=8, blocks=1).load_published(state)
    with pytest.raises(UserError, match=r"blocks\.1.* is missing"):
        RealNVPMNIST(width=8, blocks=2).load_published(state)
    with pytest.raises(UserError, match=r"in_conv.bias has shape \(8,\), here \(4,\)"):
        RealNVPMNIST(width=4, blocks=1).load_published(state)
    state = tensors(golden("flowgmm_tabular_d10"), "param/", torch.float32)
    for other, message in (
        (RealNVPTabular(10, 6, 64), "body.5.st_net.0.weight is missing"),
        (RealNVPTabular(10, 4, 64), "more couplings than the 4"),
        (RealNVPTabular(9, 5, 64), r"\(64, 10\), not of shape \(64, 9\)"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_published(state)


def published_state(flow) -> dict:
    """Random weights under the published names: layers in nested sequences, each behind a `module1`."""
    state, generator = {}, torch.Generator().manual_seed(0)
    layers = [layer for layer in flow.layers if isinstance(layer, (ImageCoupling, ActNorm, InvertibleConv))]
    for number, layer in enumerate(layers):
        place = f"body.{2 + number // 12}.{number % 12}.module1."  # the 10th comes after the 9th
        names = layer.state_dict()
        if isinstance(layer, ImageCoupling):
            for name, value in names.items():
                name = name.replace("net.", "st_net.", 1).replace("conv.", "conv.conv.")
                state[place + name] = torch.rand(value.shape, generator=generator).to(value.dtype)
            gain = state.pop(f"{place}gain")[:, None, None]
            state |= {f"{place}rescale.weight_g": gain, f"{place}rescale.weight_v": torch.ones_like(gain)}
            continue
        c = len(names["bias"])
        state[f"{place}bias"] = torch.rand(c, generator=generator)
        if isinstance(layer, ActNorm):
            state |= {f"{place}weight": torch.rand(c, generator=generator), f"{place}initialized": torch.tensor(1)}
        else:
            state[f"{place}weight"] = torch.randn(c, c, 1, 1, generator=generator)
    return state


@pytest.mark.parametrize(
    "flow",
    [
        lambda: RealNVP((1, 8, 8), width=4, blocks=1, conv=True),
        lambda: RealNVP((1, 8, 8), width=4, blocks=1, conv=True, actnorm=True),
        lambda: GlowMNIST((1, 8, 8), width=4, blocks=1),
        lambda: Glow((2, 8, 8), width=4, blocks=1),
    ],
    ids=["realnvp-1x1", "realnvp-1x1-actnorm", "glow-mnist", "glow"],
)
def test_published_convolutions_and_actnorms_have_the_same_values_here(flow):
    flow = flow()
    state = published_state(flow)
    flow.load_published(state)
    places = iter(
        sorted({k.partition("module1.")[0] for k in state}, key=lambda k: [int(n) for n in k.split(".")[1:3]])
    )
    for layer in flow.layers:
        if not isinstance(layer, (ImageCoupling, ActNorm, InvertibleConv)):
            continue
        place = next(places)
        own = {k.partition("module1.")[2]: v for k, v in state.items() if k.startswith(place)}
        if isinstance(layer, ActNorm):
            x = torch.randn(2, len(own["bias"]), 3, 3)
            weight, bias = own["weight"][:, None, None], own["bias"][:, None, None]
            torch.testing.assert_close(layer(x)[0], (x + bias) * weight.exp())
            torch.testing.assert_close(layer(x)[1], (9 * own["weight"].sum()).expand(2))
        elif isinstance(layer, InvertibleConv):
            x = torch.randn(2, len(own["bias"]), 3, 3)
            torch.testing.assert_close(layer(x)[0], nn.functional.conv2d(x, own["weight"], own["bias"]))
        else:
            assert torch.equal(layer.net.out_conv.weight_g, own["st_net.out_conv.conv.weight_g"])
    other = {"RealNVP": RealNVP((1, 8, 8), width=4, blocks=1), "Glow": Glow((2, 8, 8), 1, width=4, blocks=1)}
    with pytest.raises(UserError, match=r"the state dict has \d+ .*, this flow \d+"):
        other["Glow" if type(flow) is Glow else "RealNVP"].load_published(state)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 28, 28\), not \(2, 3, 28, 28\)"):
        RealNVPMNIST(width=4, blocks=1)(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"z must have shape \(N, 784\)"):
        RealNVPMNIST(width=4, blocks=1).inverse(torch.zeros(2, 780))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], but holds values from nan"):
        RealNVPMNIST(width=4, blocks=1)(torch.full((2, 1, 28, 28), torch.nan))
    for dtype in (torch.uint8, torch.float64):
        with pytest.raises(TypeError, match=f"x is {dtype}, but the weights"):
            RealNVPMNIST(width=4, blocks=1)(torch.zeros(2, 1, 28, 28, dtype=dtype))
    model = FlowClassifier(RealNVPTabular(3, 2, 8), GaussianMixture(torch.eye(3)))
    for call in (model, model.log_prob, model.class_probs, model.inverse):
        with pytest.raises(TypeError, match="must be a tensor, not ndarray"):
            call(np.zeros((2, 3), np.float32))
        with pytest.raises(TypeError, match="float64, but the weights"):
            call(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="values from 0 to 255"):
        RealNVPMNIST(width=4, blocks=1)(255.0 * torch.eye(28).expand(2, 1, -1, -1))
    with pytest.raises(ValueError, match="one channel has no halves"):
        Glow((1, 8, 8), width=4, blocks=1)
    with pytest.raises(ValueError, match="5 x 4 cannot be squeezed"):
        RealNVP((1, 5, 4), width=4, blocks=1)


def test_compiler_takes_an_image_flow_whole():
    flow = RealNVP((1, 4, 4), scales=1, width=4, blocks=0, conv=True)
    model = FlowClassifier(flow, GaussianMixture(torch.randn(3, 16))).eval()
    x = torch.rand(3, 1, 4, 4)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = call(x)
        results.append([*out, *torch.autograd.grad(-out.log_prob.mean(), list(model.flow.parameters()))])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
