import pytest
import torch
from accuracy import DEVICES, DTYPES, check_accuracy, check_compiles, check_repeatable, run, with_kernels

from normatch import ops, reference

# changed, C, P
PARTS = [("first", 4, 2), ("second", 4, 2), ("first", 5, 2), ("second", 5, 3), ("even", 3, 3), ("odd", 1, 1)]
# gain?, shift_first, eps: FlowGMM's layer, SCNF's channel and masked ones, Glow's, and RealNVP's order with a gain
FORMS = [(True, True, 0.0), (False, True, 1e-6), (False, False, 0.0), (False, True, 0.0), (True, False, 0.0)]
SIZES = [(0, 3, 5), (2, 0, 3), (1, 1, 1), (3, 7, 7), (70, 5, 4)]
LONG = [(1, 111, 123)]  # a sample cut into pieces
FORWARD = pytest.param(ops.coupling2d, reference.coupling2d, id="forward")
INVERSE = pytest.param(ops.coupling2d_inverse, reference.coupling2d_inverse, id="inverse")
LAYOUTS = ["contiguous", "channels_last", "slice", "channels_last_slice", "misaligned", "mixed", "transposed"]
NAMES = ["x", "params", "gain"]


def laid_out(values, layout):
    """The same (N, C, H, W) values, lying in memory as they come in practice."""
    c = values.shape[1]
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "slice":  # some channels of more
        return torch.cat([values, values], 1)[:, c:]
    if layout == "channels_last_slice":
        return torch.cat([values, values], 1).contiguous(memory_format=torch.channels_last)[:, c:]
    if layout == "misaligned":  # one value off the allocation's 16-byte boundary
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    return values.contiguous()


def inputs(part, form, n=2, h=3, w=5, dtype=torch.float32, layout="contiguous", device="cpu"):
    changed, c, p = part
    has_gain, shift_first, eps = form
    images = torch.randn(n, c, h, w, device=device).to(dtype), 2 * torch.randn(n, 2 * p, h, w, device=device).to(dtype)
    args = [laid_out(images[0], layout), laid_out(images[1], "channels_last" if layout == "mixed" else layout)]
    if has_gain:
        gain = 1 + 0.3 * torch.randn(p, dtype=torch.float64, device=device)
        args.append(gain.to(reference.accumulation_dtype(dtype)))
    return args, {"changed": changed, "shift_first": shift_first, "eps": eps}


def with_options(op, options):
    """`op` of tensors alone."""
    return lambda x, params, gain=None: op(x, params, gain, **options)


def grads(op, args):
    grad = torch.randn(args[0].shape, device=args[0].device).to(args[0].dtype)
    return [grad] if op is ops.coupling2d_inverse else [grad, torch.randn(len(grad), device=grad.device)]


def check_as_accurate(op, plain, part, form, sizes, dtype=torch.float32, layout="contiguous", device="cpu"):
    for n, h, w in sizes:
        args, options = inputs(part, form, n, h, w, dtype, layout, device)

        def draw(n=n, h=h, w=w):
            args = inputs(part, form, n, h, w, dtype, layout, device)[0]
            return args, grads(op, args)

        check_accuracy(*(with_options(f, options) for f in (op, plain)), draw, NAMES[: len(args)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("op", "plain"), [FORWARD, INVERSE])
def test_is_as_accurate_as_plain_pytorch(op, plain, part, form, device):
    sizes = SIZES + (LONG if part in PARTS[1::3] else [])
    check_as_accurate(op, plain, part, form, sizes, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [PARTS[1], PARTS[4]])
@pytest.mark.parametrize(("op", "plain"), [FORWARD, INVERSE])
def test_layouts_and_dtypes(op, plain, part, dtype, layout, device):
    form = FORMS[0] if part in PARTS[:3] else FORMS[2]
    check_as_accurate(op, plain, part, form, [(3, 7, 7)], dtype, layout, device)


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_packs(dtype, layout, channels):
    """Sizes that 16-byte accesses take whole."""
    for part in (("second", 2 * channels, channels), ("even", channels, channels)):
        check_as_accurate(*FORWARD.values, part, FORMS[0], [(3, 8, 8)], dtype, layout)


def test_extreme_scales_are_as_accurate_as_plain_pytorch():
    """Both ends of the sigmoid, with and without what bounds it from below."""
    s_raw = torch.linspace(-60, 60, 4096).view(1, 1, 64, 64)
    args = [torch.randn(1, 2, 64, 64), torch.cat([s_raw, torch.zeros_like(s_raw)], 1)]
    for eps in (0.0, 1e-6):
        for op, plain in (FORWARD.values, INVERSE.values):
            exact = plain(*[value.double() for value in args], eps=eps)
            got, low = (f(*args, eps=eps) for f in (op, plain))
            if op is ops.coupling2d:
                got, low, exact = got[0], low[0], exact[0]
            scale = exact[:, :1].abs()  # element by element, unlike elsewhere
            error, allowed = (((y[:, :1].double() - exact[:, :1]).abs() / scale).max() for y in (got, low))
            assert error <= 2 * allowed


def test_special_values_pass_through():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, 1.0, inf, 1.0, 0.0]).view(1, 1, 1, 5)
    s_raw = torch.tensor([0.0, nan, 0.0, inf, -inf]).view(1, 1, 1, 5)
    params = torch.cat([s_raw, torch.zeros_like(x)], 1)
    for gain in (None, torch.ones(1)):
        y, logdet = ops.coupling2d(x, params, gain)
        torch.testing.assert_close(y, reference.coupling2d(x, params, gain)[0], equal_nan=True)
        assert logdet.isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_logdet_is_that_of_the_jacobian_and_inverse_undoes_forward(part, form):
    args, options = inputs(part, form, dtype=torch.float64)
    y, logdet = ops.coupling2d(*args, **options)
    torch.testing.assert_close(ops.coupling2d_inverse(y, *args[1:], **options), args[0], rtol=0, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda x: ops.coupling2d(x, *args[1:], **options)[0], args[0])
    size = args[0][0].numel()
    for i in range(len(y)):
        _, expected = torch.linalg.slogdet(jacobian[i, :, :, :, i].reshape(size, size))
        torch.testing.assert_close(logdet[i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_inverse_undoes_forward_in_float32(form):
    args, options = inputs(PARTS[1], form, 3, 14, 14)
    y, _ = ops.coupling2d(*args, **options)
    torch.testing.assert_close(ops.coupling2d_inverse(y, *args[1:], **options), args[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", [ops.coupling2d, ops.coupling2d_inverse])
def test_gradcheck(op, form, layout):
    for part in (PARTS[3], PARTS[4]):
        args, options = inputs(part, form, 2, 2, 3, torch.float64, layout)
        assert torch.autograd.gradcheck(with_options(op, options), [value.requires_grad_() for value in args])


@with_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", ["coupling2d", "coupling2d_inverse"])
def test_opcheck(op, requires_grad):
    for part, form, layout, changed in (
        (PARTS[1], FORMS[0], "channels_last", 1),
        (PARTS[4], FORMS[2], "contiguous", 2),
    ):
        args, options = inputs(part, form, layout=layout)
        args = [value.requires_grad_(requires_grad) for value in args] + [None] * (3 - len(args))
        rest = (changed, options["shift_first"], options["eps"], layout == "channels_last")
        torch.library.opcheck(getattr(torch.ops.normatch, op).default, (*args, *rest))


@with_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_the_gradients(layout):
    (x, params, gain), _ = inputs(PARTS[1], FORMS[0], layout=layout)
    rest = (x, params, gain, 1, True, 0.0, layout == "channels_last")
    torch.library.opcheck(torch.ops.normatch.coupling2d_backward.default, (x, torch.randn(2), *rest))
    torch.library.opcheck(torch.ops.normatch.coupling2d_inverse_backward.default, (x, *rest))


@with_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [ops.coupling2d, ops.coupling2d_inverse])
def test_compiles(op, layout):
    args, options = inputs(PARTS[1], FORMS[0], 4, 6, 6, layout=layout)
    check_compiles(with_options(op, options), args, grads(op, args))


def test_keeps_the_memory_format():
    for layout in ("contiguous", "channels_last"):
        (x, params, gain), options = inputs(PARTS[1], FORMS[0], layout=layout)
        y, _ = ops.coupling2d(x, params, gain, **options)
        assert y.stride() == x.stride()
        assert ops.coupling2d_inverse(y, params, gain, **options).stride() == x.stride()


@pytest.mark.parametrize(("op", "plain"), [FORWARD, INVERSE])
def test_gradients_with_odd_strides(op, plain):
    """After cat, transpose and expand gradients arrive as slices and views; they count like dense ones."""
    args, options = inputs(PARTS[1], FORMS[0], 3, 4, 5)
    weights = torch.randn(3, 8, 5, 4)

    def through_views(*values):
        outputs = op(*values, **options)
        y = outputs[0] if isinstance(outputs, tuple) else outputs
        total = (torch.cat([values[0], y], 1).transpose(2, 3) * weights).sum()
        return total + outputs[1].sum() if isinstance(outputs, tuple) else total  # sum's gradient is expanded

    got = run(through_views, args, [torch.tensor(1.0)])[1:]
    dense = [weights.transpose(2, 3)[:, 4:].contiguous(), torch.ones(3)]
    expected = run(with_options(op, options), args, dense if op is ops.coupling2d else dense[:1])[-3:]
    expected[0] = expected[0] + weights.transpose(2, 3)[:, :4]
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_one_output_alone_has_gradients():
    args, options = inputs(PARTS[4], FORMS[0])
    for index in (0, 1):
        got, expected = (
            torch.autograd.grad(f(args[0], args[1].requires_grad_(), args[2], **options)[index].sum(), args[1])[0]
            for f in (FORWARD.values)
        )
        torch.testing.assert_close(got, expected)


def test_params_of_another_dtype_get_their_gradient_in_that_dtype():
    """The network under autocast, the flow in float32."""
    (x, params, gain), options = inputs(PARTS[1], FORMS[0])
    params, gain = params.bfloat16().requires_grad_(), gain.double().requires_grad_()
    y, logdet = ops.coupling2d(x, params, gain, **options)
    assert (y.dtype, logdet.dtype) == (torch.float32, torch.float32)
    found = torch.autograd.grad(y.sum() + logdet.sum(), (params, gain))
    assert [grad.dtype for grad in found] == [torch.bfloat16, torch.float64]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [ops.coupling2d, ops.coupling2d_inverse])
def test_same_bits_every_time(op, layout):
    for part, n, h, w in ((PARTS[1], 300, 4, 4), (PARTS[4], 2, 111, 123)):
        args, options = inputs(part, FORMS[0], n, h, w, layout=layout)
        check_repeatable(with_options(op, options), args, grads(op, args))


@with_kernels
def test_second_derivatives_raise():
    args, options = inputs(PARTS[1], FORMS[0])
    x = args[0].requires_grad_()
    for op in (ops.coupling2d, ops.coupling2d_inverse):
        outputs = op(*args, **options)
        y = outputs[0] if isinstance(outputs, tuple) else outputs
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, not list"),
        ({"x": torch.zeros(2, 4, 3, 5, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"params": None}, TypeError, "params must be a tensor, not NoneType"),
        ({"params": torch.zeros(2, 4, 3)}, ValueError, r"params must have shape \(N, 2P, H, W\)"),
        ({"params": torch.zeros(2, 4, 3, 4)}, ValueError, r"params must have shape \(2, 4, 3, 5\)"),
        ({"params": torch.zeros(2, 3, 3, 5)}, ValueError, r"params must have shape \(2, 4, 3, 5\)"),
        ({"params": torch.zeros(2, 10, 3, 5)}, ValueError, r"params must have shape \(2, 4, 3, 5\)"),
        ({"changed": "even"}, ValueError, r"params must have shape \(2, 8, 3, 5\) to go with x and changed='even'"),
        ({"params": torch.zeros(2, 4, 3, 5).int()}, TypeError, "params must be float32"),
        ({"params": torch.zeros(2, 4, 3, 5, device="meta")}, ValueError, "params is on meta, but x on cpu"),
        ({"gain": torch.zeros(2, device="meta")}, ValueError, "gain is on meta, but x on cpu"),
        ({"gain": torch.zeros(4)}, ValueError, r"gain must have shape \(2,\)"),
        ({"gain": 1.0}, TypeError, "gain must be a tensor, not float"),
        ({"changed": "left"}, ValueError, "changed must be one of first, second, even, odd, not 'left'"),
        ({"eps": 1e-6}, ValueError, "eps must be 0 with a gain"),
        ({"eps": None}, TypeError, "eps must be a number, not NoneType"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    (x, params, gain), options = inputs(PARTS[1], FORMS[0])
    with pytest.raises(error, match=f"coupling2d: {message}"):
        ops.coupling2d(**{"x": x, "params": params, "gain": gain, **options, **change})


def test_bad_input_to_the_inverse_names_y():
    with pytest.raises(ValueError, match=r"coupling2d_inverse: y must have shape \(N, C, H, W\)"):
        ops.coupling2d_inverse(torch.zeros(3), torch.zeros(3))
