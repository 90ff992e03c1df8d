import math

import pytest
import torch
from accuracy import (
    DEVICES,
    DTYPES,
    LAYOUTS,
    check_accuracy,
    check_compiles,
    check_repeatable,
    laid_out,
    run,
    with_kernels,
)

from normatch import ops, reference

SIZES = [(0, 3, 5), (1, 1, 1), (7, 10, 33), (33, 7, 123), (5, 3, 1023), (5, 123, 7), (523, 5, 17), (2, 2, 4096)]
SIZES += [(40, 33, 136), (3, 17, 520), (3, 1000, 40)]
NAMES = ["z", "means", "rho", "logits"]


def inputs(n, k, d, dtype=torch.float32, device="cpu", layout="dense"):
    acc = reference.accumulation_dtype(dtype)
    z, means = torch.randn(n, d, device=device).to(dtype), torch.randn(k, d, device=device).to(acc)
    rho, logits = (torch.randn(k, device=device).to(acc) for _ in range(2))
    return [laid_out(z, layout), laid_out(means, layout), rho, logits]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_as_accurate_as_plain_pytorch(dtype, layout, device):
    for n, k, d in SIZES:

        def draw(n=n, k=k, d=d):
            return inputs(n, k, d, dtype, device, layout), [torch.randn(n, k, device=device)]

        check_accuracy(ops.gmm_log_prob, reference.gmm_log_prob, draw, NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 5), (1, 1, 1), (37, 10, 33), (5, 123, 7), (40, 33, 136)])
def test_posterior_is_as_accurate_as_plain_pytorch(n, k, d, dtype):
    def posterior(op):
        return lambda *args: tuple(op(*args)[i] for i in (0, 1, 3))

    def draw():
        z, means, rho, logits = inputs(n, k, d, dtype)
        means.mul_(0.3 / d**0.5), z.mul_(0.3)  # near one another: posteriors that are not 0 and 1
        return [z, means, rho, logits], [torch.randn(n, k), torch.randn(n), torch.randn(n)]

    check_accuracy(posterior(ops.gmm_posterior), posterior(reference.gmm_posterior), draw, NAMES)


def test_posterior_agrees_with_itself():
    args = inputs(200, 20, 9)
    found = ops.gmm_posterior(*args)
    assert torch.equal(found.class_log_prob, ops.gmm_log_prob(*args))
    assert torch.equal(found.label, found.class_log_prob.argmax(1))
    torch.testing.assert_close(found.confidence, found.class_log_prob.softmax(1).amax(1))
    even = ops.gmm_posterior(args[0], torch.zeros(5, 9), torch.zeros(5), torch.zeros(5))
    assert (even.label == 0).all()  # the first among equals
    torch.testing.assert_close(even.confidence, torch.full((200,), 0.2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [5, 40])
def test_nan_has_no_confidence(classes, device):
    """Neither a point that is NaN nor a class, be it the first that is looked at or the last."""
    z, means, rho, logits = inputs(40, classes, 9, device=device)
    z[3, 2] = float("nan")
    found = ops.gmm_posterior(z, means, rho, logits)
    expected = reference.gmm_posterior(z, means, rho, logits)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    for k in (0, classes - 1):
        found = ops.gmm_posterior(z, means.index_fill(0, torch.tensor(k, device=device), float("nan")), rho, logits)
        assert found.log_prob.isnan().all() and found.confidence.isnan().all()


def test_each_output_of_the_posterior_alone_has_gradients():
    args = [value.requires_grad_() for value in inputs(7, 5, 3)]
    for index in (0, 1, 3):
        got = torch.autograd.grad(ops.gmm_posterior(*args)[index].sum(), args)
        expected = torch.autograd.grad(reference.gmm_posterior(*args)[index].sum(), args)
        for first, second in zip(got, expected, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_keep_the_accuracy_of_the_parameters_gradients(device):
    def draw():
        return inputs(20000, 3, 5, device=device), [torch.rand(20000, 3, device=device)]

    check_accuracy(ops.gmm_log_prob, reference.gmm_log_prob, draw, NAMES)


@pytest.mark.parametrize("name", ["normatch_head_d128_k10", "normatch_head_d34_k7", "normatch_head_d21_k3_odd"])
def test_published_head(golden, name):
    """The published prior's class logits, float64, from the recorded latent points."""
    data = {key: torch.from_numpy(value) for key, value in golden(name).items() if value.dtype.kind == "f"}
    prior = [data[f"param/prior.{key}"].double() for key in ("means", "inv_cov_stds", "weights")]
    for part in ("x", "u"):
        got = ops.gmm_log_prob(data[f"out64/z_{part}"], *prior, eps=1e-6)
        expected = data[f"out64/class_logits_{part}"]
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_density_integrates_to_one():
    z = torch.linspace(-60, 60, 200001, dtype=torch.float64)
    _, means, rho, logits = inputs(0, 5, 1, torch.float64)
    density = ops.gmm_log_prob(z[:, None], means, rho, logits).logsumexp(1).exp()
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=1e-12)


def test_is_the_mixture_of_multivariate_normals():
    z, means, rho, logits = inputs(9, 4, 6, torch.float64)
    for k in range(4):
        sigma = torch.nn.functional.softplus(rho[k])
        normal = torch.distributions.MultivariateNormal(means[k], sigma**2 * torch.eye(6, dtype=torch.float64))
        expected = normal.log_prob(z) + logits.softmax(0)[k].log()
        torch.testing.assert_close(ops.gmm_log_prob(z, means, rho, logits)[:, k], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("plain", [False, True])
def test_any_rho_gives_a_finite_density_on_the_mean(plain):
    """Narrow to the point where 1 / sigma^2 leaves float32, and wide; log sigma -> rho on the left, log rho right."""
    op = reference.gmm_log_prob if plain else ops.gmm_log_prob

    def sigma(rho):
        return rho + math.log1p(math.exp(-rho)) if rho > 0 else math.log1p(math.exp(rho))

    rho = torch.tensor([-300.0, -100.0, -30.0, -20.0, 0.0, 20.0, 1e6], requires_grad=True)
    means = torch.randn(7, 3)
    log_prob = op(means, means, rho, torch.zeros(7)).diagonal()
    log_sigma = [r if r < -30 else math.log(sigma(r)) for r in rho.tolist()]
    expected = torch.tensor([-math.log(7) - 3 * (s + 0.5 * math.log(2 * math.pi)) for s in log_sigma])
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(log_prob.sum(), rho)
    torch.testing.assert_close(slope[:4], torch.full((4,), -3.0))


def test_vanishing_weights():
    """Without eps the log-weight is exact however small it is; with it it ends at log(eps)."""
    z, means, rho, _ = inputs(2, 2, 3)
    logits = torch.tensor([0.0, -300.0], requires_grad=True)
    even = ops.gmm_log_prob(z, means, rho, torch.zeros(2)) + math.log(2)
    for eps, expected in ((0.0, -300.0), (1e-6, math.log(1e-6))):
        got = ops.gmm_log_prob(z, means, rho, logits, eps)
        torch.testing.assert_close(got[:, 1] - even[:, 1], torch.full((2,), expected), rtol=0, atol=1e-4)
        (grad,) = torch.autograd.grad(got[:, 1].sum(), logits)
        torch.testing.assert_close(grad, torch.tensor([-2.0, 2.0]) if eps == 0 else torch.zeros(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_gradcheck(eps, device):
    args = [value.requires_grad_() for value in inputs(6, 3, 5, torch.float64, device)]
    assert torch.autograd.gradcheck(lambda *a: ops.gmm_log_prob(*a, eps=eps), args)
    assert torch.autograd.gradcheck(lambda *a: [ops.gmm_posterior(*a, eps=eps)[i] for i in (0, 1, 3)], args)


@with_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    args = [value.requires_grad_(requires_grad) for value in inputs(5, 3, 7)]
    torch.library.opcheck(torch.ops.normatch.gmm_log_prob.default, (*args, 1e-6))
    torch.library.opcheck(torch.ops.normatch.gmm_posterior.default, (*args, 1e-6))


@with_kernels
def test_opcheck_of_the_gradient():
    torch.library.opcheck(torch.ops.normatch.gmm_log_prob_backward.default, (torch.randn(5, 3), *inputs(5, 3, 7), 1e-6))


@with_kernels
def test_compiles():
    check_compiles(ops.gmm_log_prob, inputs(33, 4, 16), [torch.randn(33, 4)])


@with_kernels
def test_posterior_compiles():
    def likelihood(*args):
        return ops.gmm_posterior(*args).log_prob

    check_compiles(likelihood, inputs(33, 4, 16), [torch.randn(33)])


def test_gradients_with_odd_strides():
    n, k = 9, 4
    args = inputs(n, k, 5)
    weights = torch.randn(n, 2 * k)

    def joined(*values):
        log_prob = ops.gmm_log_prob(*values)
        return (torch.cat([log_prob, log_prob], 1) * weights).sum() + log_prob.sum() + log_prob.t()[1].sum()

    dense = weights[:, :k] + weights[:, k:] + 1
    dense[:, 1] += 1
    got, expected = run(joined, args, [torch.tensor(1.0)])[1:], run(ops.gmm_log_prob, args, [dense])[1:]
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    for layout in ("half", "transposed"):
        got = run(ops.gmm_log_prob, args, [laid_out(dense, layout)])[1:]
        assert all(torch.equal(first, second) for first, second in zip(got, expected, strict=True))
    expanded = run(ops.gmm_log_prob, args, [torch.ones(1, 1).expand(n, k)])[1:]
    ones = run(ops.gmm_log_prob, args, [torch.ones(n, k)])[1:]
    assert all(torch.equal(first, second) for first, second in zip(expanded, ones, strict=True))


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype_get_their_gradients_in_it(parameters):
    z, *others = inputs(5, 3, 4)
    others = [value.to(parameters).requires_grad_() for value in others]
    log_prob = ops.gmm_log_prob(z, *others)
    assert log_prob.dtype == torch.float32
    assert all(grad.dtype == parameters for grad in torch.autograd.grad(log_prob.sum(), others))


@pytest.mark.parametrize(("n", "k", "d"), [(3000, 10, 33), (130, 100, 65)])
def test_same_bits_every_time(n, k, d):
    check_repeatable(ops.gmm_log_prob, inputs(n, k, d), [torch.randn(n, k)])


@with_kernels
def test_second_derivatives_raise():
    args = [value.requires_grad_() for value in inputs(3, 2, 4)]
    (grad,) = torch.autograd.grad(ops.gmm_log_prob(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.zeros(4)}, ValueError, r"z must have shape \(N, D\)"),
        ({"z": None}, TypeError, "z must be a tensor, not NoneType"),
        ({"z": torch.zeros(5, 4).int()}, TypeError, "z must be float32"),
        ({"means": torch.zeros(3, 5)}, ValueError, r"means must have shape \(3, 4\)"),
        ({"means": torch.zeros(0, 4)}, ValueError, "means must have at least one class"),
        ({"means": torch.zeros(3, 4, device="meta")}, ValueError, "means is on meta, but z on cpu"),
        ({"z": torch.zeros(5, 0), "means": torch.zeros(3, 0)}, ValueError, "z must have at least one feature"),
        ({"rho": torch.zeros(2)}, ValueError, r"rho must have shape \(3,\)"),
        ({"rho": torch.tensor([0.0, float("nan"), 0.0])}, ValueError, "rho has values that are NaN"),
        ({"logits": torch.zeros(3, 1)}, ValueError, r"logits must have shape \(3,\)"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"eps": float("nan")}, ValueError, "eps must not be negative"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    for op in (ops.gmm_log_prob, ops.gmm_posterior):
        with pytest.raises(error, match=message):
            op(**{**dict(zip(NAMES, inputs(5, 3, 4), strict=True)), **change})
