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

SIZES = [(0, 5), (4, 0), (1, 1), (7, 33), (33, 7), (70, 64), (5, 1023), (3, 2100)]
LONG = [(2, 70001)]  # rows cut into pieces
NAMES = ["x", "s_raw", "t", "gain"]
OPS = [
    pytest.param(ops.affine_coupling, reference.affine_coupling, id="forward"),
    pytest.param(ops.affine_coupling_inverse, reference.affine_coupling_inverse, id="inverse"),
]


def inputs(n, h, dtype=torch.float32, device="cpu", layout="dense"):
    matrices = [laid_out(torch.randn(n, h, device=device).to(dtype), layout) for _ in range(3)]
    matrices[1].mul_(2)  # far into the tanh
    return [
        *matrices,
        1 + 0.3 * torch.randn(h, device=device, dtype=torch.float64).to(reference.accumulation_dtype(dtype)),
    ]


def grads(op, n, h, dtype=torch.float32, device="cpu"):
    grad = torch.randn(n, h, device=device).to(dtype)
    return [grad] if op is ops.affine_coupling_inverse else [grad, torch.randn(n, device=device).to(dtype)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "plain"), OPS)
def test_is_as_accurate_as_plain_pytorch(op, plain, dtype, layout, device):
    for n, h in SIZES + (LONG if layout == "dense" else []):

        def draw(n=n, h=h):
            return inputs(n, h, dtype, device, layout), grads(op, n, h, dtype, device)

        check_accuracy(op, plain, draw, NAMES)


def test_extreme_scales_are_as_accurate_as_plain_pytorch():
    """The whole range of the exponential, denormal results and the tanh's linear and flat ends included."""
    h = 4096
    s_raw = torch.linspace(-12, 12, h).repeat(2, 1)
    s_raw[1] *= 1e-4
    matrices = [torch.randn(2, h), s_raw, torch.randn(2, h)]
    for gain in (87.0, -87.0, 1e-3):
        for op, plain in (p.values for p in OPS):
            exact = plain(*[m.double() for m in matrices], torch.full((h,), gain).double())
            got, low = (f(*matrices, torch.full((h,), gain)) for f in (op, plain))
            if op is ops.affine_coupling:
                got, low, exact = got[0], low[0], exact[0]
            scale = exact.abs().clamp(min=torch.finfo(torch.float32).tiny)  # element by element, unlike elsewhere
            error, allowed = (((y.double() - exact).abs() / scale).max() for y in (got, low))
            assert error <= 2 * allowed


def test_special_values_pass_through():
    x = torch.tensor([[float("nan"), 1.0, float("inf"), 1.0, 0.0]])
    s_raw = torch.tensor([[0.0, float("nan"), 0.0, float("inf"), -float("inf")]])
    y, logdet = ops.affine_coupling(x, s_raw, torch.zeros(1, 5), torch.ones(5))
    expected, _ = reference.affine_coupling(x, s_raw, torch.zeros(1, 5), torch.ones(5))
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert logdet.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "plain"), OPS)
def test_gradcheck(op, plain, device):
    args = [value.requires_grad_() for value in inputs(5, 7, torch.float64, device)]
    assert torch.autograd.gradcheck(op, args)


@with_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", ["affine_coupling", "affine_coupling_inverse"])
def test_opcheck(op, requires_grad):
    args = [value.requires_grad_(requires_grad) for value in inputs(5, 7)]
    torch.library.opcheck(getattr(torch.ops.normatch, op).default, tuple(args))


@with_kernels
def test_opcheck_of_the_gradients():
    x, s_raw, _, gain = inputs(5, 7)
    grad_y, grad_logdet = grads(ops.affine_coupling, 5, 7)
    torch.library.opcheck(torch.ops.normatch.affine_coupling_backward.default, (grad_y, grad_logdet, x, s_raw, gain))
    torch.library.opcheck(torch.ops.normatch.affine_coupling_inverse_backward.default, (grad_y, x, s_raw, gain))


@with_kernels
@pytest.mark.parametrize(("op", "plain"), OPS)
def test_compiles(op, plain):
    check_compiles(op, inputs(33, 16), grads(op, 33, 16))


@pytest.mark.parametrize(("op", "plain"), OPS)
def test_gradients_with_odd_strides(op, plain):
    """After cat, transpose and expand gradients arrive as slices and views; they count like dense ones."""
    n, h = 33, 16
    args = inputs(n, h)

    def through_views(*values):
        outputs = op(*values)
        y = outputs[0] if isinstance(outputs, tuple) else outputs
        joined = torch.cat([values[0], y], 1).t()
        total = (joined * weights).sum()
        return total + outputs[1].sum() if isinstance(outputs, tuple) else total  # sum's gradient is expanded

    weights = torch.randn(2 * h, n)
    got = run(through_views, args, [torch.tensor(1.0)])[1:]
    dense = [weights.t()[:, h:].contiguous(), torch.ones(n)]
    expected = run(op, args, dense if op is ops.affine_coupling else dense[:1])[-4:]
    expected[0] = expected[0] + weights.t()[:, :h]
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_one_output_alone_has_gradients():
    args = [value.requires_grad_() for value in inputs(7, 5)]
    for index in (0, 1):
        got = torch.autograd.grad(ops.affine_coupling(*args)[index].sum(), args[1])[0]
        expected = torch.autograd.grad(reference.affine_coupling(*args)[index].sum(), args[1])[0]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float64])
def test_gain_of_another_dtype_gets_its_gradient_in_that_dtype(gain_dtype):
    *matrices, gain = inputs(7, 5)
    gain = gain.to(gain_dtype).requires_grad_()
    y, logdet = ops.affine_coupling(*matrices, gain)
    assert (y.dtype, logdet.dtype) == (torch.float32, torch.float32)
    (grad,) = torch.autograd.grad(y.sum() + logdet.sum(), gain)
    assert grad.dtype == gain_dtype


@pytest.mark.parametrize(("op", "plain"), OPS)
@pytest.mark.parametrize(("n", "h"), [(2000, 65), (3, 30000)])
def test_same_bits_every_time(op, plain, n, h):
    check_repeatable(op, inputs(n, h), grads(op, n, h))


@pytest.mark.parametrize("device", DEVICES)
def test_inverse_undoes_forward(device):
    x, s_raw, t, gain = inputs(33, 123, torch.float64, device)
    y, _ = ops.affine_coupling(x, s_raw, t, gain)
    torch.testing.assert_close(ops.affine_coupling_inverse(y, s_raw, t, gain), x, rtol=0, atol=1e-13)


def test_logdet_is_that_of_the_jacobian():
    *matrices, gain = inputs(4, 9, torch.float64)
    for x, s_raw, t in zip(*(m.split(1) for m in matrices), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v, s=s_raw, t=t: ops.affine_coupling(v, s, t, gain)[0], x)
        sign, expected = torch.linalg.slogdet(jacobian.view(9, 9))
        assert sign == 1
        torch.testing.assert_close(ops.affine_coupling(x, s_raw, t, gain)[1][0], expected, rtol=0, atol=1e-12)


@with_kernels
@pytest.mark.parametrize(("op", "plain"), OPS)
def test_second_derivatives_raise(op, plain):
    args = [value.requires_grad_() for value in inputs(3, 4)]
    outputs = op(*args)
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    (grad,) = torch.autograd.grad(y.square().sum(), args[1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_autocast_may_have_lowered_what_the_network_gives():
    x, s_raw, t, gain = (value.requires_grad_() for value in inputs(5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        for op, plain in ((ops.affine_coupling, reference.affine_coupling),
                          (ops.affine_coupling_inverse, reference.affine_coupling_inverse)):  # fmt: skip
            found = op(x, s_raw.bfloat16(), t.bfloat16(), gain)
            torch.testing.assert_close(found, plain(x, s_raw.bfloat16().float(), t.bfloat16().float(), gain))
    with pytest.raises(TypeError, match=r"s_raw is torch\.bfloat16"):
        ops.affine_coupling(x, s_raw.bfloat16(), t, gain)


@with_kernels
def test_forward_mode_is_refused():
    x = torch.randn(3, 4)
    couplings = [[torch.randn(shape) for shape in ((5, 2), (5,), (5, 5), (5,), (4, 5), (4,), (2,))]]
    mixture = torch.randn(2, 4), torch.zeros(2), torch.zeros(2)
    image = torch.randn(3, 2, 2, 2)
    for op in (
        lambda x: ops.affine_coupling(x, x, x, torch.ones(4))[0],
        lambda x: ops.affine_coupling_inverse(torch.ones(3, 4), torch.ones(3, 4), x, torch.ones(4)),
        lambda x: ops.coupling2d(image, x[:, :2, None, None].expand(3, 2, 2, 2))[0],
        lambda x: ops.logdet(x),
        lambda x: ops.gmm_log_prob(x, *mixture),
        lambda x: ops.flow_head(x, couplings, *mixture)[0],
    ):
        with pytest.raises(RuntimeError, match="there is no forward-mode derivative"):
            torch.func.jvp(op, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \(N, H\)"),
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, not list"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"s_raw": torch.zeros(3, 5)}, ValueError, r"s_raw must have shape \(3, 4\)"),
        ({"s_raw": torch.zeros(3, 4).half()}, TypeError, "s_raw is torch.float16, but x torch.float32"),
        ({"t": torch.zeros(4)}, ValueError, "t must have shape"),
        ({"t": torch.zeros(3, 4, device="meta")}, ValueError, "t is on meta, but x on cpu"),
        ({"gain": torch.zeros(4, device="meta")}, ValueError, "gain is on meta, but x on cpu"),
        ({"gain": torch.zeros(5)}, ValueError, r"gain must have shape \(4,\)"),
        ({"gain": torch.zeros(4, dtype=torch.int32)}, TypeError, "gain must be float32"),
        ({"gain": 1.0}, TypeError, "gain must be a tensor, not float"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ops.affine_coupling(**{**dict(zip(NAMES, inputs(3, 4), strict=True)), **change})


def test_bad_input_to_the_inverse_names_y():
    _, *others = inputs(3, 4)
    with pytest.raises(ValueError, match=r"affine_coupling_inverse: y must have shape \(N, H\)"):
        ops.affine_coupling_inverse(torch.zeros(3), *others)
