"""The ops of the flow head, each case under the name of its op.

bytes and flop are what the mathematics needs (each input read once, each output written once), the same for every
provider of a case, so that rates compare. The published formulations follow the code of NorMatch and FlowGMM:
full-width tensors with masks for the coupling, one MultivariateNormal a class for the mixture.
"""

import math

import pytest
import torch
from conftest import DEVICE, operations

from normatch import ops, reference

SMALL, LARGE = "small", "large"
PROVIDERS = ["published", "closed", "closed_compiled", "normatch"]
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def rate(value, exact):
    """Largest error, relative to the largest value."""
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def forward(op, inputs):
    with torch.no_grad():
        return op(*inputs)


def outputs_of(result):
    return list(result) if isinstance(result, tuple) else [result]


def make_call(op, inputs, direction):
    """(call, results): call() is what is timed, results() what it computes."""
    if direction in ("forward", "inverse"):
        return lambda: forward(op, inputs), lambda: outputs_of(forward(op, inputs))
    inputs = [value.detach().requires_grad_() for value in inputs]
    outputs = outputs_of(op(*inputs))
    torch.manual_seed(1)
    grads = [torch.randn_like(output, dtype=torch.float32).to(output.dtype) for output in outputs]
    if direction == "backward":
        call = lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)  # noqa: E731
    else:  # training: forward and backward
        call = lambda: torch.autograd.grad(outputs_of(op(*inputs)), inputs, grads)  # noqa: E731
    return call, lambda: list(call())


def bench(measure, group, provider, providers, inputs, direction, moved, flop):
    torch._dynamo.reset()
    op = providers[provider]
    call, _ = make_call(op, inputs, direction)
    # Agreement first, with float64 and on these fresh random inputs.
    few = [value[:256] if value.dim() == 2 and len(value) > 4096 else value for value in inputs]
    exact = make_call(providers["closed"], [value.double() for value in few], direction)[1]()
    tolerance = 2e-2 if inputs[0].dtype == torch.bfloat16 else 2e-4
    errors = [rate(got, want) for got, want in zip(make_call(op, few, direction)[1](), exact, strict=True)]
    assert max(errors) < tolerance, f"{provider} disagrees: {errors}"
    count = None if provider == "closed_compiled" else operations(call)
    shape = [tuple(value.shape) for value in inputs]
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    measure(group, provider, call, moved, flop, operations=count, shapes=str(shape), dtype=dtype, direction=direction)


# ---- affine_coupling ----------------------------------------------------------------------------------------------


def published_coupling(x, s_raw, t, gain):
    """The whole width D = 2 H with the unchanged half masked, as the published code computes it."""
    mask = torch.zeros(2 * x.shape[1], device=x.device, dtype=x.dtype)
    mask[x.shape[1] :] = 1
    x, s_raw, t = (torch.cat([value, value], 1) for value in (x, s_raw, t))
    gain = torch.cat([gain, gain])
    s = gain * torch.tanh(s_raw) * mask
    y = x * (1 - mask) + (x * mask + t * mask) * s.exp() * mask
    return y[:, mask.numel() // 2 :].to(x.dtype), s.sum(1)


def published_inverse(y, s_raw, t, gain):
    mask = torch.zeros(2 * y.shape[1], device=y.device, dtype=y.dtype)
    mask[y.shape[1] :] = 1
    y, s_raw, t = (torch.cat([value, value], 1) for value in (y, s_raw, t))
    s = torch.cat([gain, gain]) * torch.tanh(s_raw) * mask
    x = y * (1 - mask) + (y * mask * (-s).exp() - t * mask) * mask
    return x[:, mask.numel() // 2 :].to(y.dtype)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "backward", "inverse"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def bench_affine_coupling(measure, size, direction, dtype, provider):
    n, h = {SMALL: (512, 64), LARGE: (65536, 512)}[size]
    inverse = direction == "inverse"
    closed = reference.affine_coupling_inverse if inverse else reference.affine_coupling
    providers = {
        "published": published_inverse if inverse else published_coupling,
        "closed": closed,
        "closed_compiled": torch.compile(closed, fullgraph=True),
        "normatch": ops.affine_coupling_inverse if inverse else ops.affine_coupling,
    }
    inputs = [torch.randn(n, h, device=DEVICE).to(dtype) for _ in range(3)] + [torch.randn(h, device=DEVICE)]
    moved = n * h * BYTES[dtype] * (5 if direction == "backward" else 4)
    group = f"affine_coupling {direction} {n}x{h} {str(dtype)[6:]}"
    bench(measure, group, provider, providers, inputs, direction, moved, 45 * n * h)


# ---- logdet -------------------------------------------------------------------------------------------------------


def published_logdet(log_scale):
    return (log_scale * torch.ones_like(log_scale)).view(len(log_scale), -1).sum(-1, dtype=torch.float32)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def bench_logdet(measure, size, dtype, provider):
    n, m = {SMALL: (512, 64), LARGE: (16384, 3072)}[size]
    providers = {
        "published": published_logdet,
        "closed": reference.logdet,
        "closed_compiled": torch.compile(reference.logdet, fullgraph=True),
        "normatch": ops.logdet,
    }
    inputs = [torch.randn(n, m, device=DEVICE).to(dtype)]
    group = f"logdet forward {n}x{m} {str(dtype)[6:]}"
    bench(measure, group, provider, providers, inputs, "forward", n * m * BYTES[dtype], n * m)


# ---- gmm_log_prob -------------------------------------------------------------------------------------------------


def published_mixture(z, means, rho, logits):
    """One MultivariateNormal with a full covariance for every class."""
    eye = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
    normals = [
        torch.distributions.MultivariateNormal(mean, torch.nn.functional.softplus(r) ** 2 * eye)
        for mean, r in zip(means, rho, strict=True)
    ]
    return torch.stack([normal.log_prob(z) for normal in normals], 1) + logits.softmax(0).log()


def expanded_mixture(z, means, rho, logits):
    """The closed form by a matrix product: |z - mu|^2 = |z|^2 - 2 z.mu + |mu|^2. Faster, and less exact."""
    sigma = torch.nn.functional.softplus(rho)
    distance = z.square().sum(1, keepdim=True) - 2 * z @ means.t() + means.square().sum(1)
    offset = logits.log_softmax(0) - z.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi))
    return offset - 0.5 * distance / sigma.square()


@pytest.mark.parametrize("provider", [*PROVIDERS, "expanded", "expanded_compiled"])
@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize(
    ("n", "k", "d"), [(512, 10, 128), (512, 100, 512), (65536, 10, 128)], ids=["head10", "head100", "large"]
)
def bench_gmm_log_prob(measure, n, k, d, direction, provider):
    providers = {
        "published": published_mixture,
        "closed": reference.gmm_log_prob,
        "closed_compiled": torch.compile(reference.gmm_log_prob, fullgraph=True),
        "expanded": expanded_mixture,
        "expanded_compiled": torch.compile(expanded_mixture, fullgraph=True),
        "normatch": ops.gmm_log_prob,
    }
    if provider == "published" and n * k * d > 1 << 26:
        pytest.skip("takes minutes")
    shapes = [(n, d), (k, d), (k,), (k,)]
    inputs = [torch.randn(shape, device=DEVICE) for shape in shapes]
    read = 4 * (n * d + k * d + n * k)
    moved, flop = (read, 3 * n * k * d) if direction == "forward" else (3 * read, 9 * n * k * d)
    bench(measure, f"gmm_log_prob {direction} N={n} K={k} D={d}", provider, providers, inputs, direction, moved, flop)


# pytest collects functions called test_*; these are called bench_*.
test_affine_coupling, test_logdet, test_gmm_log_prob = bench_affine_coupling, bench_logdet, bench_gmm_log_prob
