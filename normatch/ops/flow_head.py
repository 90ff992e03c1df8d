"""normatch::flow_head: a whole flow classifier in one op."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .. import reference
from ..reference import accumulation_dtype
from ._library import (
    BACKEND,
    DTYPES,
    KERNELS,
    build_info,
    check_float,
    check_integers,
    check_number,
    check_same,
    check_shape,
    register,
)
from .affine_coupling import affine_coupling
from .gmm_log_prob import check_mixture, gmm_log_prob

_LIMITS = build_info().get("limits", {})  # csrc/limits.h


def flow_head_path(
    features: int, hidden: int, device: str | torch.device = "cpu", classes: int = 1, couplings: int = 1
) -> str:
    """The path that `flow_head` takes for a head of this size: "fused" (one kernel) or "composed" (several).

    Fused if the device has a kernel and the networks are narrow (hidden <= 128, features <= 4096), so that the state
    of a tile of rows stays in the cache and library matrix products would not be faster. On a GPU also classes <=
    2048, couplings <= 64, and at most 2^19 parameters (couplings and means). Otherwise composed of library matrix
    products, `affine_coupling` and `gmm_log_prob`.
    """
    device = torch.device(device).type
    limits = _LIMITS.get(f"flow_head_{'cuda' if BACKEND == 'emulated' else device}")
    if device not in KERNELS["flow_head"] or limits is None:
        return "composed"
    first, second = features // 2, features - features // 2
    halves = (first, second), (second, first)
    weights = [hidden * (kept + hidden + 2 * changed + 2) + 3 * changed for kept, changed in halves]
    parameters = classes * features + (couplings + 1) // 2 * weights[0] + couplings // 2 * weights[1]
    sizes = {
        "hidden": hidden, "features": features, "classes": classes, "couplings": couplings, "parameters": parameters,
    }  # fmt: skip
    return "fused" if all(sizes[name] <= limit for name, limit in limits.items()) else "composed"


def flow_head(
    x: Tensor,
    couplings: Sequence[Sequence[Tensor]],
    means: Tensor,
    rho: Tensor,
    logits: Tensor,
    eps: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: (N, D), means: (K, D), rho, logits: (K,) -> z: (N, D), logdet: (N,), class_log_prob: (N, K), log_prob: (N,).

    A whole flow classifier, as in NorMatch (Deng et al. 2024): affine couplings (`affine_coupling`) with their
    networks, then the mixture of `gmm_log_prob`; log_prob = logsumexp_k class_log_prob + logdet. Coupling j keeps the
    first half of the features, [0, D // 2), for even j and the second half for odd j, and changes the rest:

        h = dropout(relu(kept @ weight0.T + bias0)),   s_raw, t = relu(h @ weight1.T + bias1) @ weight2.T + bias2

    couplings: for each coupling weight0 (H, kept), bias0 (H,), weight1 (H, H), bias1 (H,), weight2 (2 changed, H),
    bias2 (2 changed,) and gain (changed,), with the same H for all. Results and arithmetic are float32 (float64 for
    float64 x), with or without autocast; parameters may have any float dtype and are cast.
    Dropout applies if a seed is given, () int64 on the device of x. The dropped units depend on its value alone, on
    every device; the kernel reads it when it runs, so that replays of a CUDA graph follow the seed's current value.
    The backward pass reconstructs each coupling's input from its output: memory does not grow with their number.

    Raises ValueError also for D < 2, K = 0, a NaN in rho (where `gmm_log_prob` checks it) and a dropout outside [0, 1].
    """
    _check(x, couplings, means, rho, logits, eps, dropout, seed)
    if seed is None or dropout == 0:
        seed, dropout = None, 0.0
    sizes = x.shape[1], couplings[0][1].shape[0], x.device, means.shape[0], len(couplings)
    if flow_head_path(*sizes) == "composed":
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            parts = affine_coupling, gmm_log_prob
            return reference.flow_head(x, couplings, means, rho, logits, eps, dropout, seed, *parts)
    dtype = accumulation_dtype(x.dtype)
    parameters = [value if value.dtype == dtype else value.to(dtype) for coupling in couplings for value in coupling]
    rest = means.to(dtype), rho.to(dtype), logits.to(dtype), seed, float(dropout), float(eps)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FlowHead.apply(x, *rest, *parameters)[:4]
    return torch.ops.normatch.flow_head.default(x, parameters, *rest)[:4]


class _FlowHead(torch.autograd.Function):
    """The op's own gradient, without torch.library's traversal of tensor lists, which costs 0.1 ms per step."""

    @staticmethod
    def forward(x, means, rho, logits, seed, dropout, eps, *parameters):
        return torch.ops.normatch.flow_head.default(x, parameters, means, rho, logits, seed, dropout, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *rest = inputs
        _save(ctx, (x, rest[6:], *rest[:6]), output)

    @staticmethod
    def backward(ctx, *grads):
        grad_x, grad_parameters, *rest = _backward(ctx, *grads)
        return grad_x, *rest, *grad_parameters


_COUPLING_NAMES = ("weight0", "bias0", "weight1", "bias1", "weight2", "bias2", "gain")


def _check(x, couplings, means, rho, logits, eps, dropout, seed) -> None:
    op = "flow_head"
    check_float(op, "x", x, ("N", "D"))
    features = x.shape[1]
    if features < 2:
        raise ValueError(f"{op}: x must have at least two features, one for each half, not shape {tuple(x.shape)}")
    if not hasattr(couplings, "__len__"):
        raise TypeError(f"{op}: couplings must be a list of couplings, not {type(couplings).__name__}")
    if not len(couplings):
        raise ValueError(f"{op}: couplings must hold at least one coupling")
    device, hidden = x.device, None
    for j, coupling in enumerate(couplings):
        if not hasattr(coupling, "__len__"):
            raise TypeError(f"{op}: couplings[{j}] must be a list of tensors, not {type(coupling).__name__}")
        if len(coupling) != len(_COUPLING_NAMES):
            raise ValueError(f"{op}: couplings[{j}] must be {', '.join(_COUPLING_NAMES)}, not {len(coupling)} tensors")
        for name, value in zip(_COUPLING_NAMES, coupling, strict=True):
            if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.device != device:
                name = f"{name} of couplings[{j}]"
                check_float(op, name, value)
                check_same(op, name, value, "x", x)
        if hidden is None:
            check_float(op, "bias0 of couplings[0]", coupling[1], ("H",))
            hidden = coupling[1].shape[0]
            if hidden == 0:
                raise ValueError(f"{op}: bias0 of couplings[0] must have at least one unit")
        kept = features - features // 2 if j % 2 else features // 2
        changed = features - kept
        layers = (hidden, kept), (hidden, hidden), (2 * changed, hidden)
        shapes = [*(shape for layer in layers for shape in (layer, layer[:1])), (changed,)]
        for name, value, shape in zip(_COUPLING_NAMES, coupling, shapes, strict=True):
            if value.shape != shape:
                check_shape(op, f"{name} of couplings[{j}]", value, shape, "x and bias0 of couplings[0]")
    check_mixture(op, "x", x, means, rho, logits, eps)
    check_number(op, "dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"{op}: dropout must lie in [0, 1], but is {dropout}")
    if seed is not None:
        check_integers(op, "seed", seed, torch.int64, ())
        check_same(op, "seed", seed, "x", x)


def _fake(x, couplings, means, rho, logits, seed, dropout, eps):
    n = x.shape[0]
    outputs = (means.new_empty(shape) for shape in (x.shape, (n,), (n, means.shape[0]), (n,)))
    return *outputs, means.new_empty(x.shape, dtype=torch.float64)


def _save(ctx, inputs, output):
    x, couplings, means, rho, logits, seed, ctx.dropout, ctx.eps = inputs
    ctx.dtype, ctx.couplings = x.dtype, len(couplings)
    ctx.set_materialize_grads(False)  # unused results cost nothing
    # The last output is z in double, from which the couplings' inputs are reconstructed bit for bit
    # (csrc/flow_head_cpu.h).
    _, _, class_log_prob, _, state = output
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(state, class_log_prob, *couplings, means, rho, logits, seed)


def _backward(ctx, *grads):
    state, class_log_prob, *couplings, means, rho, logits, seed = ctx.saved_tensors
    grad_x, grad_couplings, *grad_mixture = torch.ops.normatch.flow_head_backward.default(
        *grads[:4], state, class_log_prob, couplings, means, rho, logits, seed, ctx.dropout, ctx.eps, ctx.dtype
    )
    return grad_x, grad_couplings, *grad_mixture, None, None, None


def _backward_fake(*inputs):
    state, _, couplings, *mixture, _, _, _, dtype = inputs[4:]  # after the gradients of the four results
    grad_couplings, grad_mixture = ([v.new_empty(v.shape) for v in values] for values in (couplings, mixture))
    return state.new_empty(state.shape, dtype=dtype), grad_couplings, *grad_mixture


register("flow_head", _fake, _backward, _save)
register("flow_head_backward", _backward_fake)
