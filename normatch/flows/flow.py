"""A flow of images or vectors: a sequence of layers, whose activations are stored or rebuilt for the gradient."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from .density import checked_samples, on_the_cpu
from .layers import ActNorm, DoubleCoupling, FactorOut, Squeeze, dequantize, rebuild


class Flow(nn.Module):
    """x: (N, *shape) -> z (N, D), logdet (N,): the layers in order, D the product of `shape`.

    Each layer maps x -> z, logdet and has an `inverse`. z starts with the dimensions that FactorOuts take out, in
    order, and ends with the output of the last layer.

    shape: of one sample.   levels: gray levels of images in [0, 1], which are dequantized, so that log p(x) is that of
    the dequantized values; None for continuous data.   noise: when dequantization is random, drawn from torch's
    generator: "train" (in training mode), "always" or "never" (the middle of each level, from which the inverse
    returns x exactly).   reversible: store no activations for the gradient but rebuild each layer's input from its
    output (Gomez et al. 2017), so that memory does not grow with depth, at the cost of one more pass through each
    coupling's network.

    Raises ValueError for x or z of another shape and, on the CPU, for pixels outside [0, 1]; TypeError if the dtype
    differs from that of the weights.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        shape: Sequence[int],
        levels: int | None = None,
        noise: str = "train",
        reversible: bool = False,
    ):
        super().__init__()
        if noise not in ("train", "always", "never"):
            raise ValueError(f"noise must be 'train', 'always' or 'never', not {noise!r}")
        self.layers = nn.ModuleList(layers)
        self.shape, self.levels, self.noise, self.reversible = tuple(shape), levels, noise, reversible
        self.features = math.prod(shape)
        self._pieces = []  # shapes of the parts of z
        shape = self.shape
        for layer in layers:
            if isinstance(layer, Squeeze):
                shape = layer.output_shape(shape)
            elif isinstance(layer, FactorOut):
                self._pieces.append((layer.out, *shape[1:]))
                shape = (shape[0] - layer.out, *shape[1:])
        self._pieces.append(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        checked_samples(x, "x", self.shape, next(self.parameters(), None))
        if self.levels:
            if on_the_cpu(x) and not bool(((x >= 0) & (x <= 1)).all()):
                raise ValueError(f"x must lie in [0, 1], but holds values from {x.min():g} to {x.max():g}")
            x = dequantize(x, self.levels, noise=self.noise == "always" or (self.noise == "train" and self.training))
        if self.reversible and torch.is_grad_enabled():
            return _reversible(self, x)
        return self._run(x)

    def inverse(self, z: Tensor) -> Tensor:
        """z: (N, D) -> x (N, *shape)."""
        checked_samples(z, "z", (self.features,), next(self.parameters(), None))
        x = invert_layers(self.layers, self._split(z))
        return (x * self.levels - 0.5) / (self.levels - 1) if self.levels else x

    def _run(self, x):
        pieces, logdet = run_layers(self.layers, x)
        return torch.cat([piece.flatten(1) for piece in pieces], 1), logdet

    def _split(self, z):
        """z: (N, D) -> its pieces (N, ...) in their shapes."""
        pieces = z.split([math.prod(shape) for shape in self._pieces], 1)
        return [piece.reshape(-1, *shape) for piece, shape in zip(pieces, self._pieces, strict=True)]

    def extra_repr(self):
        return f"shape={self.shape}, levels={self.levels}, reversible={self.reversible}"


def run_layers(layers: nn.ModuleList, x: Tensor, *e: Tensor) -> tuple[list[Tensor], Tensor]:
    """x -> what the FactorOuts take out, in order, and the last layer's output; logdet. e: for the DoubleCouplings."""
    logdet, pieces = 0.0, []
    for layer in layers:
        if isinstance(layer, FactorOut):
            x, piece = layer(x)
            pieces.append(piece)
        else:
            x, term = layer(x, *e) if isinstance(layer, DoubleCoupling) else layer(x)
            logdet = logdet + term
    return [*pieces, x], logdet


def invert_layers(layers: nn.ModuleList, pieces: Sequence[Tensor], *e: Tensor) -> Tensor:
    """The pieces of `run_layers` -> x."""
    *pieces, x = pieces
    for layer in reversed(layers):
        if isinstance(layer, FactorOut):
            x = layer.inverse(x, pieces.pop())
        else:
            x = layer.inverse(x, *e) if isinstance(layer, DoubleCoupling) else layer.inverse(x)
    return x


@torch.no_grad()
def initialize(model: nn.Module, x: Tensor) -> None:
    """x: (N, ...): sets every ActNorm in `model` from the values that reach it in `model(x)`, in one pass.

    Pixels are dequantized with noise: a pixel that is the same in all of x would have no deviation.
    """
    norms = [module for module in model.modules() if isinstance(module, ActNorm)]
    if not norms:
        return
    training, flows = model.training, [module for module in model.modules() if isinstance(module, Flow)]
    noises = [flow.noise for flow in flows]
    try:
        model.eval()  # leaves the statistics of BatchNorms alone
        for flow in flows:
            flow.noise = "always"
        for norm in norms:
            norm.initializing = True
        model(x)
    finally:
        model.train(training)
        for flow, noise in zip(flows, noises, strict=True):
            flow.noise = noise
        for norm in norms:
            norm.initializing = False


def load_weights(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Loads all of `state` into `module`. Raises `UserError` for the first tensor missing, unknown or of another shape.

    The caller leaves out of `state` what has no counterpart here, such as published masks and flags.
    """
    here = module.state_dict()
    for key in [*here, *state]:
        if key not in state:
            raise UserError(f"the state dict is of another architecture: {name}.{key} is missing")
        if key not in here:
            raise UserError(f"the state dict is of another architecture: there is no {name}.{key} here")
        if here[key].shape != state[key].shape:
            raise UserError(
                f"the state dict is of another architecture: {name}.{key} has shape {tuple(state[key].shape)}, "
                f"here {tuple(here[key].shape)}"
            )
    module.load_state_dict(state)


@torch.compiler.disable
def _reversible(flow, x):
    parameters = [p for p in flow.layers.parameters() if p.requires_grad]
    return _Reversible.apply(flow, parameters, x, *parameters)


class _Reversible(torch.autograd.Function):
    """All layers of a flow as one function that stores only its output."""

    @staticmethod
    def forward(ctx, flow, parameters, x, *_):
        ctx.flow, ctx.parameters = flow, parameters
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        z, logdet = flow._run(x)
        ctx.save_for_backward(z)
        return z, logdet

    @staticmethod
    def backward(ctx, grad_z, grad_logdet):
        flow, (z,) = ctx.flow, ctx.saved_tensors
        gradients = {}
        *pieces, x = flow._split(z)
        *grad_pieces, grad = flow._split(grad_z)
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(z.device.type, dtype, enabled), _statistics_kept(flow):
            for layer in reversed(flow.layers):
                if isinstance(layer, FactorOut):
                    x, grad = layer.inverse(x, pieces.pop()), layer.inverse(grad, grad_pieces.pop())
                    continue
                x, leaves, again, logdet = rebuild(layer, x)
                parameters = [p for p in layer.parameters() if p.requires_grad]
                outputs, grads = [again], [grad]
                if logdet.requires_grad:
                    outputs, grads = [again, logdet], [grad, grad_logdet]
                grads = torch.autograd.grad(outputs, [*leaves, *parameters], grads, allow_unused=True)
                grad = sum(g for g in grads[: len(leaves)] if g is not None)
                for parameter, g in zip(parameters, grads[len(leaves) :], strict=True):
                    if g is not None:  # couplings may share a network
                        gradients[parameter] = gradients[parameter] + g if parameter in gradients else g
        return None, None, grad, *(gradients.get(p) for p in ctx.parameters)


@contextmanager
def _statistics_kept(flow: nn.Module) -> Iterator[None]:
    """BatchNorms in training mode normalize as usual, but do not update their running statistics."""
    norms = [m for m in flow.modules() if isinstance(m, nn.BatchNorm2d) and m.training and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
