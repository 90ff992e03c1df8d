import numpy as np
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
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from normatch import FlowHead, ops, reference
from normatch.data.philox import philox, split_key

# rows, features, classes, hidden units, couplings
SIZES = [
    (0, 5, 3, 4, 2),
    (1, 2, 1, 1, 1),
    (7, 33, 3, 8, 3),
    (33, 21, 10, 5, 2),
    (38, 128, 10, 32, 6),
    (3, 123, 17, 33, 4),
    (9, 21, 4, 5, 24),  # deep: what is rebuilt from the output must not lose digits on the way
]
PARTS = ["weight0", "bias0", "weight1", "bias1", "weight2", "bias2", "gain"]


def inputs(n, d, k, h, depth, dtype=torch.float32, device="cpu", layout="dense"):
    """x, means, rho, logits, then the parameters of the couplings."""
    acc = reference.accumulation_dtype(dtype)
    couplings = []
    for j in range(depth):
        kept = d - d // 2 if j % 2 else d // 2
        shapes = [(h, kept), (h,), (h, h), (h,), (2 * (d - kept), h), (2 * (d - kept),)]
        couplings += [torch.randn(shape, device=device).to(acc) / (4 * shape[-1]) ** 0.5 for shape in shapes]
        couplings.append(1 + 0.3 * torch.randn(d - kept, device=device).to(acc))
    prior = [torch.randn(k, d, device=device), 0.3 * torch.randn(k, device=device) + 1, torch.randn(k, device=device)]
    return [laid_out(torch.randn(n, d, device=device).to(dtype), layout), *(p.to(acc) for p in prior), *couplings]


def grads(n, d, k, h=0, depth=0, device="cpu"):
    return [torch.randn(shape, device=device) for shape in ((n, d), (n,), (n, k), (n,))]


def names(depth):
    return ["x", "means", "rho", "logits", *(f"{part} {j}" for j in range(depth) for part in PARTS)]


def taking_a_list(op, **options):
    """op with the couplings' parameters one after another behind the others."""

    def call(x, means, rho, logits, *parameters):
        couplings = [parameters[i : i + 7] for i in range(0, len(parameters), 7)]
        return op(x, couplings, means, rho, logits, **options)

    return call


def expected_path(device="cpu"):
    return "fused" if device in ops.kernels()["flow_head"] else "composed"


def dropped_out(device="cpu"):
    return {"dropout": 0.3, "seed": torch.tensor(-(2**62) - 12345, device=device)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [*((torch.float32, layout) for layout in LAYOUTS), *((dtype, "misaligned") for dtype in DTYPES[1:])],
)
def test_is_as_accurate_as_plain_pytorch(dtype, layout, device):
    for size in SIZES:

        def draw(size=size):
            return inputs(*size, dtype, device, layout), grads(*size, device=device)

        check_accuracy(taking_a_list(ops.flow_head), taking_a_list(reference.flow_head), draw, names(size[-1]))


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_and_classes_are_as_accurate_as_plain_pytorch(device):
    for size in [(700, 64, 10, 32, 4), (100, 512, 100, 32, 2), (5, 40, 1000, 8, 2)]:

        def draw(size=size):
            return inputs(*size, device=device), grads(*size, device=device)

        check_accuracy(taking_a_list(ops.flow_head), taking_a_list(reference.flow_head), draw, names(size[-1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(9, 600, 3, 128, 1), (530, 260, 2, 128, 1), (3, 4000, 5, 4, 2)])
def test_weights_and_states_beyond_shared_memory_are_as_accurate_as_plain_pytorch(size, device):
    """What does not fit a block's shared memory: the weights with few or many rows, and the state of several rows."""
    assert ops.flow_head_path(size[1], size[3], device, size[2], size[4]) == expected_path(device)
    check_accuracy(
        taking_a_list(ops.flow_head),
        taking_a_list(reference.flow_head),
        lambda: (inputs(*size, device=device), grads(*size, device=device)),
        names(size[-1]),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_that_of_plain_pytorch(device):
    for size in [(70, 33, 3, 13, 3), (9, 16, 4, 32, 6)]:

        def draw(size=size):
            return inputs(*size, device=device), grads(*size, device=device)

        options = dropped_out(device)
        fused, plain = (taking_a_list(module.flow_head, **options) for module in (ops, reference))
        check_accuracy(fused, plain, draw, names(size[-1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}, "dropout"])
def test_gradcheck(options, device):
    options = dropped_out(device) if options == "dropout" else options
    args = [value.requires_grad_() for value in inputs(3, 5, 3, 4, 2, torch.float64, device)]
    assert torch.autograd.gradcheck(taking_a_list(ops.flow_head, **options), args)


@with_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_opcheck(dropout, requires_grad):
    x, means, rho, logits, *couplings = (value.requires_grad_(requires_grad) for value in inputs(5, 7, 3, 4, 2))
    seed = torch.tensor(7) if dropout else None
    torch.library.opcheck(torch.ops.normatch.flow_head.default, (x, couplings, means, rho, logits, seed, dropout, 1e-6))


@with_kernels
@pytest.mark.parametrize("given", [{0, 1, 2, 3}, {2}, {1, 3}, set()])
def test_opcheck_of_the_gradient(given):
    z, means, rho, logits, *couplings = inputs(5, 7, 3, 4, 2)
    upstream = [grad if i in given else None for i, grad in enumerate(grads(5, 7, 3))]
    class_log_prob = reference.gmm_log_prob(z, means, rho, logits)
    args = (
        *upstream,
        z.double(),
        class_log_prob,
        couplings,
        means,
        rho,
        logits,
        torch.tensor(3),
        0.2,
        0.0,
        torch.float32,
    )
    torch.library.opcheck(torch.ops.normatch.flow_head_backward.default, args)


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, "dropout"])
def test_compiles(options, device):
    options = dropped_out(device) if options == "dropout" else options
    size = (33, 16, 4, 8, 3)
    op = taking_a_list(ops.flow_head, **options)
    check_compiles(op, inputs(*size, device=device), grads(*size, device=device))


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_with_odd_strides(device):
    """After cat, transpose and expand gradients arrive as slices and views; they count like dense ones."""
    size = n, d, k, *_ = 33, 16, 4, 8, 2
    args = inputs(*size, device=device)
    op = taking_a_list(ops.flow_head)
    weights = torch.randn(d + k, n, device=device)

    def through_views(*values):
        z, logdet, class_log_prob, log_prob = op(*values)
        return (torch.cat([z, class_log_prob], 1).t() * weights).sum() + logdet.sum() - log_prob.sum()

    got = run(through_views, args, [torch.tensor(1.0, device=device)])[1:]
    ones = torch.ones(n, device=device)
    dense = [weights.t()[:, :d].contiguous(), ones, weights.t()[:, d:].contiguous(), -ones]
    for first, second in zip(got, run(op, args, dense)[4:], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(4))
def test_one_output_alone_has_gradients(index, device):
    args = [value.requires_grad_() for value in inputs(7, 5, 3, 4, 2, device=device)]
    used = {0: [0], 1: [0], 2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}[index]  # the mixture does not enter z and logdet
    found = []
    for module in (ops, reference):
        out = taking_a_list(module.flow_head)(*args)[index].square().sum()
        wanted = [args[i] for i in used] + args[4:-7] + args[-7:-1] + args[-1:]
        found.append(torch.autograd.grad(out, wanted, allow_unused=True))
    for got, expected in zip(*found, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_parameters_of_another_dtype_get_their_gradients_in_that_dtype():
    x, *others = inputs(7, 5, 3, 4, 2)
    others = [value.bfloat16().requires_grad_() for value in others]
    outputs = taking_a_list(ops.flow_head)(x, *others)
    assert all(value.dtype == torch.float32 for value in outputs)
    outputs[3].sum().backward()
    assert all(value.grad.dtype == torch.bfloat16 for value in others)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(700, 20, 3, 8, 3), (3, 1000, 20, 4, 2)])
def test_same_bits_every_time(size, device):
    op = taking_a_list(ops.flow_head, **dropped_out(device))
    check_repeatable(op, inputs(*size, device=device), grads(*size, device=device))


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [70, 600])  # with few rows and with many the GPU takes tiles of different heights
def test_a_row_does_not_depend_on_the_others(rows, device):
    args = inputs(rows, 33, 3, 8, 3, device=device)
    op = taking_a_list(ops.flow_head)
    for whole, part in zip(op(*args), op(args[0][5:50], *args[1:]), strict=True):
        assert torch.equal(whole[5:50], part)


def test_random_words_are_those_of_the_augmentation():
    """The same words from NumPy, for views, and from PyTorch, for masks, which the kernels' masks are compared with."""
    counter, key = np.arange(40).reshape(4, 10), 2**63 + 12345
    expected = philox(counter.astype(np.uint64), split_key(key))
    words = philox(torch.from_numpy(counter), split_key(torch.tensor(key - 2**64)))
    assert torch.equal(torch.stack(words), torch.from_numpy(np.stack(expected).astype(np.int64)))


def test_dropout_drops_the_share_it_says():
    mask = reference.dropout_mask(torch.tensor(3), 1000, 30, 2, 0.3, torch.float32)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs((mask == 0).double().mean() - 0.3) < 0.01
    assert not torch.equal(mask, reference.dropout_mask(torch.tensor(3), 1000, 30, 1, 0.3, torch.float32))
    assert not torch.equal(mask, reference.dropout_mask(torch.tensor(4), 1000, 30, 2, 0.3, torch.float32))
    for share, value in ((0.0, 1.0), (1.0, 0.0)):
        mask = reference.dropout_mask(torch.tensor(3), 10, 5, 0, share, torch.float32)
        assert (mask == value).all()


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_none_and_of_all(dropout):
    args = inputs(9, 8, 3, 5, 2)
    got, expected = (
        taking_a_list(module.flow_head, dropout=dropout, seed=torch.tensor(1))(*args) for module in (ops, reference)
    )
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_special_values_stay_in_their_row(device):
    args = inputs(40, 9, 3, 4, 3, device=device)
    clean = taking_a_list(ops.flow_head)(*args)
    args[0][7, 2], args[0][11, 5] = float("nan"), float("inf")
    touched = taking_a_list(ops.flow_head)(*args)
    rest = [i for i in range(40) if i not in (7, 11)]
    for before, after in zip(clean, touched, strict=True):
        assert torch.equal(before[rest], after[rest])
        assert not after[[7, 11]].isfinite().all()


def saved_bytes(depth):
    """Bytes that autograd keeps for the backward pass beyond the parameters themselves."""
    head = FlowHead(64, 5, couplings=depth, dropout=0.0)
    x = torch.randn(100, 64, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in head.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head(x)
    return sum(kept.values())


@with_kernels
def test_saved_activations_do_not_grow_with_depth():
    assert ops.flow_head_path(64, 32) == "fused"
    assert saved_bytes(2) == saved_bytes(24) <= 100 * (2 * 64 + 64 + 5 + 2) * 4


@with_kernels
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_training_step_dispatches_at_most_four_operations(dropout):
    head = FlowHead(128, 10, dropout=dropout)
    x = torch.randn(64, 128)
    upstream = [torch.randn(64, 10), torch.randn(64)]
    found = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        train_head(head, x, upstream)
    assert all(p.grad is not None for p in head.parameters())
    assert len(found) <= 4, found


def train_head(head, x, upstream):
    out = head(x)
    torch.autograd.backward([out.class_log_prob, out.log_prob], upstream)


@pytest.mark.skipif(ops.backend()[0] != "emulated", reason="counts the launches of the emulator")
@pytest.mark.parametrize(
    ("rows", "features", "classes", "hidden"), [(3, 128, 10, 32), (600, 20, 100, 32), (5, 600, 3, 128), (2, 4000, 5, 4)]
)
def test_emulated_launches(rows, features, classes, hidden):
    """One launch forward, two backward, wherever the weights are kept."""
    from normatch import _C_emulated

    head, x = FlowHead(features, classes, couplings=2, hidden=hidden), torch.randn(rows, features)
    before = _C_emulated.launches()
    out = head(x)
    assert _C_emulated.launches() - before == 1
    (out.log_prob.sum() + out.z.sum()).backward()
    assert _C_emulated.launches() - before == 3
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.gpu
@with_kernels
def test_gpu_launches():
    """A whole training step: the seed, one launch forward, two backward."""
    from torch.profiler import ProfilerActivity, profile

    head, x = FlowHead(128, 10).cuda(), torch.randn(512, 128, device="cuda")
    upstream = [torch.randn(512, 10, device="cuda"), torch.randn(512, device="cuda")]
    train_head(head, x, upstream)
    head.zero_grad()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        train_head(head, x, upstream)
        torch.cuda.synchronize()
    kernels = [event.name for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("flow_head" in name for name in kernels) == 3
    assert len(kernels) <= 4, kernels


@pytest.mark.gpu
@with_kernels
def test_cuda_graph_draws_anew():
    """A captured step computes what an eager one does, with the seed that is there when it is replayed."""
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    args = [value.requires_grad_() for value in inputs(100, 128, 10, 32, 6, device="cuda")]
    upstream = grads(100, 128, 10, device="cuda")
    op = taking_a_list(ops.flow_head, dropout=0.5, seed=seed)

    def step():
        outputs = op(*args)
        return [*outputs, *torch.autograd.grad(outputs, args, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


def test_path_is_chosen_by_size():
    fused = expected_path()
    assert ops.flow_head_path(128, 32) == ops.flow_head_path(512, 32, "cpu", 100, 6) == fused
    assert ops.flow_head_path(128, 1024) == ops.flow_head_path(8192, 32) == "composed"
    assert ops.flow_head_path(128, 32, "meta") == "composed"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "emulated"])
def test_path_on_a_gpu_heeds_classes_couplings_and_parameters(device):
    if device == "emulated":
        if ops.backend()[0] != "emulated":
            pytest.skip("the limits of the CUDA kernel, which is not in use")
        device = "cpu"
    sizes = {(128, 32, 10, 6): "fused", (128, 32, 10, 65): "composed", (16, 8, 3000, 2): "composed"}
    sizes |= {(1024, 32, 100, 6): "fused", (4096, 32, 10, 6): "composed"}
    for (features, hidden, classes, couplings), path in sizes.items():
        assert ops.flow_head_path(features, hidden, device, classes, couplings) == path


def test_composed_path_is_as_accurate_as_plain_pytorch():
    size = (20, 16, 3, 200, 2)
    assert ops.flow_head_path(size[1], size[3]) == "composed"
    with torch.autocast("cpu", torch.bfloat16):  # which it does not listen to
        check_accuracy(
            taking_a_list(ops.flow_head),
            taking_a_list(torch.autocast("cpu", enabled=False)(reference.flow_head)),
            lambda: (inputs(*size), grads(*size)),
            names(size[-1]),
        )


def test_shapes_without_values():
    """On the meta device, and under FakeTensorMode, where no value can be looked at."""
    size = (20, 16, 3, 8, 2)
    meta = [value.to("meta") for value in inputs(*size)]
    expected = [value.shape for value in taking_a_list(ops.flow_head)(*meta)]
    assert expected == [(20, 16), (20,), (20, 3), (20,)]
    with FakeTensorMode():
        assert [value.shape for value in taking_a_list(ops.flow_head)(*inputs(*size))] == expected


@with_kernels
def test_second_derivatives_raise():
    args = [value.requires_grad_() for value in inputs(3, 4, 2, 3, 1)]
    log_prob = taking_a_list(ops.flow_head)(*args)[3]
    (grad,) = torch.autograd.grad(log_prob.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \(N, D\)"),
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, not list"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"x": torch.zeros(3, 1)}, ValueError, "x must have at least two features"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"weight2 of couplings\[0\] must have shape \(6, 3\)"),
        ({"couplings": []}, ValueError, "couplings must hold at least one"),
        ({"couplings": 3}, TypeError, "couplings must be a list of couplings, not int"),
        ({"couplings": [3]}, TypeError, r"couplings\[0\] must be a list of tensors, not int"),
        ({"couplings": [[torch.zeros(2)]]}, ValueError, r"couplings\[0\] must be weight0, .*gain, not 1 tensors"),
        ({"means": torch.zeros(2, 5)}, ValueError, r"means must have shape \(2, 4\)"),
        ({"means": torch.zeros(0, 4)}, ValueError, "means must have at least one class"),
        ({"rho": torch.zeros(3)}, ValueError, r"rho must have shape \(2,\)"),
        ({"rho": torch.tensor([0.0, float("nan")])}, ValueError, "rho has values that are NaN"),
        ({"logits": torch.zeros(2, device="meta")}, ValueError, "logits is on meta, but x on cpu"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\]"),
        ({"dropout": "half"}, TypeError, "dropout must be a number, not str"),
        ({"seed": 3}, TypeError, "seed must be a tensor, not int"),
        ({"seed": torch.tensor(3.0)}, TypeError, "seed must be torch.int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed must have shape \(\)"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    x, means, rho, logits, *parameters = inputs(3, 4, 2, 3, 1)
    given = {"x": x, "couplings": [parameters], "means": means, "rho": rho, "logits": logits, **change}
    with pytest.raises(error, match=message):
        ops.flow_head(**given)


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda value: 1.0, TypeError, "must be a tensor, not float"),
        (lambda value: value.int(), TypeError, "must be float32"),
        (lambda value: value.to("meta"), ValueError, "is on meta, but x on cpu"),
        (lambda value: value[:0], ValueError, "must have"),
    ],
)
def test_bad_parameter_of_a_coupling_is_named(index, change, error, message):
    x, means, rho, logits, *parameters = inputs(3, 4, 2, 3, 2)
    couplings = [parameters[:7], parameters[7:]]
    couplings[1][index] = change(couplings[1][index])
    with pytest.raises(error, match=rf"flow_head: {PARTS[index]} of couplings\[1\] {message}"):
        ops.flow_head(x, couplings, means, rho, logits)
