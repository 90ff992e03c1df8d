import pytest
import torch

from normatch import ops, reference

# changed, channels of x, P
PARTS = [("first", 4, 2), ("second", 4, 2), ("first", 5, 2), ("second", 5, 3), ("even", 3, 3), ("odd", 1, 1)]
# gain?, shift_first, eps: FlowGMM's layer, SCNF's channel and masked ones, Glow's, and RealNVP's order with a gain
FORMS = [(True, True, 0.0), (False, True, 1e-6), (False, False, 0.0), (False, True, 0.0), (True, False, 0.0)]


def inputs(part, form, n=2, h=3, w=5, dtype=torch.float32):
    changed, c, p = part
    has_gain, shift_first, eps = form
    args = [torch.randn(n, c, h, w).to(dtype), (2 * torch.randn(n, 2 * p, h, w)).to(dtype)]
    if has_gain:
        args.append((1 + 0.3 * torch.randn(p, dtype=torch.float64)).to(reference.accumulation_dtype(dtype)))
    return args, {"changed": changed, "shift_first": shift_first, "eps": eps}


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
