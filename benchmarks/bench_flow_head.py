"""The whole flow head, forward and training (forward and backward), at the sizes of NorMatch's recipes.

Rungs: the published formulation (full-width matrices and masks, one MultivariateNormal a class), the closed form in
plain PyTorch (only the live halves, squared distances by a matrix product), eager and compiled, and the one op.
bytes and flop are what the mathematics needs.
"""

import pytest
import torch
from bench_ops import expanded_mixture, published_mixture, rate
from conftest import DEVICE, operations

from normatch import FlowHead, ops, reference

SIZES = [(512, 128, 10, 6), (512, 512, 100, 6), (8192, 128, 10, 6), (512, 128, 10, 24)]


def published_head(x, couplings, means, rho, logits, eps=0.0):
    """Every layer at the full width of the features, halves of which are masked out, as the published code has it."""
    features = x.shape[1]
    logdet = 0
    for j, (weight0, bias0, weight1, bias1, weight2, bias2, gain) in enumerate(couplings):
        mask = torch.zeros(features, device=x.device, dtype=x.dtype)
        kept = slice(features // 2, None) if j % 2 else slice(None, features // 2)
        mask[kept] = 1
        changed = (mask == 0).nonzero().flatten()
        first = torch.zeros(len(bias0), features, device=x.device, dtype=x.dtype)
        first[:, kept] = weight0
        last = torch.zeros(2, features, len(bias1), device=x.device, dtype=x.dtype)
        last[:, changed] = weight2.view(2, len(gain), -1)
        shift = torch.zeros(2, features, device=x.device, dtype=x.dtype)
        shift[:, changed] = bias2.view(2, -1)
        scale = torch.zeros(features, device=x.device, dtype=x.dtype)
        scale[changed] = gain
        linear = torch.nn.functional.linear
        hidden = linear(linear(x * mask, first, bias0).relu(), weight1, bias1).relu()
        s, t = linear(hidden, last.flatten(0, 1), shift.flatten()).chunk(2, 1)
        s, t = scale * torch.tanh(s) * (1 - mask), t * (1 - mask)
        x = x * mask + ((x * (1 - mask) + t) * s.exp()) * (1 - mask)
        logdet = logdet + s.flatten(1).sum(1)
    class_log_prob = published_mixture(x, means, rho, logits)
    return x, logdet, class_log_prob, class_log_prob.logsumexp(1) + logdet


def closed_head(x, couplings, means, rho, logits):
    mixture = lambda z, means, rho, logits, eps: expanded_mixture(z, means, rho, logits)  # noqa: E731
    return reference.compose_flow_head(reference.affine_coupling, mixture, x, couplings, means, rho, logits)


def make_call(head, inputs, couplings, direction):
    """(call, results): call() is what is timed, results() what it computes."""
    flat = [inputs[0], *(value for coupling in couplings for value in coupling), *inputs[1:]]
    if direction == "forward":

        def forward():
            with torch.no_grad():
                return list(head(inputs[0], couplings, *inputs[1:]))

        return forward
    torch.manual_seed(1)
    n, k = len(inputs[0]), len(inputs[1])
    upstream = [torch.randn(n, k, device=DEVICE).to(flat[0].dtype), torch.randn(n, device=DEVICE).to(flat[0].dtype)]
    return lambda: list(torch.autograd.grad(list(head(inputs[0], couplings, *inputs[1:]))[2:], flat, upstream))


@pytest.mark.parametrize("provider", ["published", "closed", "closed_compiled", "normatch"])
@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize(("n", "d", "k", "depth"), SIZES, ids=["head10", "head100", "large", "deep"])
def bench_flow_head(measure, n, d, k, depth, direction, provider):
    if provider == "published" and (n > 512 or depth > 6):
        pytest.skip("takes minutes")
    torch._dynamo.reset()
    torch.manual_seed(0)
    head = FlowHead(d, k, couplings=depth).to(DEVICE)

    def leaves(dtype):
        inputs = [torch.randn(n, d, generator=torch.Generator().manual_seed(2)).to(DEVICE), *head.prior_parameters()]
        make = lambda value: value.detach().to(dtype).requires_grad_()  # noqa: E731
        return [make(v) for v in inputs], [[make(v) for v in coupling.tensors()] for coupling in head.couplings]

    heads = {
        "published": published_head,
        "closed": closed_head,
        "closed_compiled": torch.compile(closed_head, fullgraph=True),
        "normatch": ops.flow_head,
    }
    call = make_call(heads[provider], *leaves(torch.float32), direction)
    exact = make_call(closed_head, *leaves(torch.float64), direction)()  # agreement first
    errors = [rate(got, want) for got, want in zip(call(), exact, strict=True)]
    assert max(errors) < 1e-3, f"{provider} disagrees: {errors}"

    weights = sum(v.numel() for coupling in head.couplings for v in coupling.tensors())
    moved = 4 * (2 * n * d + n * k + 2 * n + weights + k * d)
    flop = n * (2 * weights + 3 * k * d)
    if direction == "training":
        moved, flop = 3 * moved, 3 * flop
    count = None if provider == "closed_compiled" else operations(call)
    group = f"flow_head {direction} N={n} D={d} K={k} couplings={depth}"
    measure(group, provider, call, moved, flop, operations=count, direction=direction)


test_flow_head = bench_flow_head  # pytest collects functions called test_*
