"""How the tests of the ops judge numbers, and the inputs they have in common."""

import numpy as np
import pytest
import torch
from torch import Tensor

from normatch import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["dense", "half", "misaligned", "transposed"]

with_kernels = pytest.mark.skipif(ops.backend()[0] == "reference", reason="the compiled ops are not in use")


def assert_as_accurate(got: list[Tensor], plain: list[Tensor], exact: list[Tensor], what: str = "") -> None:
    """`got` may be twice as far from `exact` (float64) as plain PyTorch is in the same dtype.

    Each list holds the results of independent draws of the inputs. Errors are largest absolute ones, averaged over
    the draws: on a single one either side may be right by luck. The floor, for sums that plain PyTorch happens to
    make without any error, is two units in the last place of the largest exact value.
    """
    errors, allowed, floors = [], [], []
    for result, low, oracle in zip(got, plain, exact, strict=True):
        assert result.dtype == low.dtype, f"{what}: {result.dtype} instead of {low.dtype}"
        assert result.shape == low.shape == oracle.shape, f"{what}: shape {result.shape} instead of {oracle.shape}"
        if oracle.numel():
            assert oracle.isfinite().all(), f"{what}: the oracle is not finite"
            errors.append((result.double() - oracle).abs().max().item())
            allowed.append((low.double() - oracle).abs().max().item())
            floors.append(2 * torch.finfo(result.dtype).eps * oracle.abs().max().item())
    if errors:
        error, plain_error, floor = (sum(values) / len(values) for values in (errors, allowed, floors))
        assert error <= 2 * plain_error + floor, (  # a NaN fails too
            f"{what}: error {error:.3g}, plain PyTorch's {plain_error:.3g}, floor {floor:.3g}"
        )


def assert_near(got: Tensor, want: np.ndarray, gap: float, exact: bool) -> None:
    """`got` against a recorded float64 array: to 1e-9 of its largest entry if `exact`, that is for float64, and

    for float32 to four times `gap`, by which the published code itself differed between float32 and float64.
    """
    got = got.detach().double().numpy()
    limit = 1e-9 * np.abs(want).max() if exact else max(4 * gap * np.abs(want).max(), 1e-6)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= limit


def with_jacobian(function, row: Tensor) -> tuple[Tensor, Tensor]:
    """row: (D,) -> function(row[None])[0]: (D,) and its Jacobian (D, D), by one backward pass of D equal rows."""
    rows = row.detach().expand(len(row), -1).clone().requires_grad_()
    z = function(rows)
    (jacobian,) = torch.autograd.grad(z.diagonal().sum(), rows)
    return z[0].detach(), jacobian


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same (N, H) values, lying in memory as they come in practice."""
    n, h = values.shape
    if layout == "dense":
        return values.contiguous()
    if layout == "half":  # the right half of a wider matrix
        return torch.cat([values, values], 1)[:, h:]
    if layout == "misaligned":  # one value off the allocation's 16-byte boundary
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(n, h)
    return values.t().contiguous().t()


def run(op, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """What op(*inputs) returns and then, for these gradients of it, the gradients of the inputs."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    outputs = op(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    found = torch.autograd.grad(outputs, inputs, [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)])
    return [out.detach() for out in outputs] + list(found)


def check_accuracy(op, plain, draw, names: list[str]) -> None:
    """Values and gradients of `op` against `plain` in the same dtype, and both against `plain` in float64.

    draw() returns fresh inputs and gradients; few values are drawn more often, to leave less to luck.
    """
    results = ([], [], [])
    inputs, grads = draw()
    for _ in range(16 if inputs[0].numel() < 100 else 4):
        results[0].append(run(op, inputs, grads))
        results[1].append(run(plain, inputs, grads))
        results[2].append(run(plain, [value.double() for value in inputs], [grad.double() for grad in grads]))
        inputs, grads = draw()
    labels = [f"output {i}" for i in range(len(results[0][0]) - len(names))] + [f"gradient of {name}" for name in names]
    for i, label in enumerate(labels):
        assert_as_accurate(*([found[i] for found in result] for result in results), what=label)


def check_repeatable(op, inputs: list[Tensor], grads: list[Tensor]) -> None:
    """The same bits from two runs, and from one thread and two."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            results.append(run(op, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def check_compiles(op, inputs: list[Tensor], grads: list[Tensor]) -> None:
    """torch.compile takes the op whole, forward and backward, and changes nothing."""
    torch._dynamo.reset()
    compiled = run(torch.compile(op, fullgraph=True), inputs, grads)
    for first, second in zip(compiled, run(op, inputs, grads), strict=True):
        assert torch.equal(first, second)
