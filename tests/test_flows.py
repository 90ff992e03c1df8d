"""The flows against the recorded numbers of the published ones, and against the laws that make them flows."""

import math

import pytest
import torch
from accuracy import assert_near

from normatch.flows import FlowClassifier, GaussianMixture, RealNVPTabular

# fp32: the largest gap that the published code itself shows between fp32 and fp64 (outputs, gradients).
TABULAR_GAPS = 6.8e-07, 9.9e-07


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
    for y, message in ((3, "0..2.*holds 3"), (torch.tensor([0, -2]), "holds -2"), (torch.zeros(3), "integers")):
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
