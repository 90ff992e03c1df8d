import pytest
import torch
from accuracy import DEVICES, DTYPES, LAYOUTS, check_accuracy, check_compiles, check_repeatable, laid_out, with_kernels

from normatch import ops, reference

SIZES = [(0, 5), (4, 0), (1, 1), (7, 33), (33, 7), (9, 123), (5, 1023), (3, 2049), (2, 5000)]
LONG = [(1, 70001), (3, 150000)]  # cut into pieces


def values(n, m, dtype, device="cpu"):
    return torch.randn(n, m, device=device).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_as_accurate_as_plain_pytorch(dtype, layout, device):
    for n, m in SIZES + (LONG if layout == "dense" else []):

        def draw(n=n, m=m):
            return [laid_out(values(n, m, dtype, device), layout)], [torch.randn(n, device=device)]

        check_accuracy(ops.logdet, reference.logdet, draw, ["log_scale"])


@pytest.mark.parametrize("shape", [(5,), (0,), (3, 4, 5), (2, 3, 8, 6), (2, 1, 4, 4), (3, 7, 1, 1), (2, 0, 3, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_trailing_shape(shape, channels_last):
    if channels_last and len(shape) != 4:
        pytest.skip("only images have channels")
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def draw():
        return [torch.randn(shape).contiguous(memory_format=layout)], [torch.randn(shape[0])]

    check_accuracy(ops.logdet, reference.logdet, draw, ["log_scale"])


def test_long_sums_of_equal_signs_keep_their_accuracy():
    def draw():
        return [torch.rand(2, 1 << 20)], [torch.ones(2)]

    check_accuracy(ops.logdet, reference.logdet, draw, ["log_scale"])


@with_kernels
def test_gradient_takes_no_memory():
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.ops.normatch.logdet(x).sum(), x)
    assert grad.stride(1) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    x = values(5, 7, torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(ops.logdet, x)
    assert torch.autograd.gradgradcheck(ops.logdet, x)


@with_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    torch.library.opcheck(torch.ops.normatch.logdet.default, (torch.randn(5, 7, requires_grad=requires_grad),))


@with_kernels
def test_compiles():
    check_compiles(ops.logdet, [torch.randn(33, 4, 5)], [torch.randn(33)])


def test_gradients_with_odd_strides():
    x = torch.randn(6, 5, requires_grad=True)
    weights = torch.randn(12)
    (torch.cat([ops.logdet(x), ops.logdet(2 * x)])[::2] * weights[::2]).sum().backward()
    rows = torch.zeros(6)
    rows[::2] += weights[:6:2] + 2 * weights[6::2]
    torch.testing.assert_close(x.grad, rows[:, None].expand(6, 5))


@pytest.mark.parametrize(("n", "m"), [(2000, 65), (3, 150000)])
def test_same_bits_every_time(n, m):
    check_repeatable(ops.logdet, [torch.randn(n, m)], [torch.randn(n)])


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (torch.tensor(1.0), ValueError, "log_scale must have shape"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "log_scale must be float32"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "log_scale must be float32"),
        ([1.0], TypeError, "log_scale must be a tensor, not list"),
        (torch.zeros(2, 2).to_sparse(), TypeError, r"log_scale must be dense, not torch\.sparse_coo"),
    ],
)
def test_bad_input_names_the_argument(argument, error, message):
    with pytest.raises(error, match=message):
        ops.logdet(argument)
