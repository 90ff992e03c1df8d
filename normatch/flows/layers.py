"""The layers of image flows: x -> z, logdet, and back by `inverse`.

Shapes are (N, C, H, W) and, if the docstring says so, also (..., C), vectors whose leading axes may broadcast. logdet
is (N,), for vectors (...), in nats, float32 (float64 for float64). Layers keep no state between calls.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..reference import accumulation_dtype


def dequantize(x: Tensor, levels: int = 256, noise: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """x: (...) in [0, 1], of `levels` gray levels -> v: (...) in (0, 1), (level + noise in [0, 1)) / levels.

    With `noise=False` it is 1/2, the middle of each level. The log-density of the levels themselves is
    log p(v) - D log(levels) (Theis, van den Oord & Bethge 2016, section 3.1).
    """
    u = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) if noise else 0.5
    return ((levels - 1) * x + u) / levels


class Logit(nn.Module):
    """v in [0, 1]: (N, ...) -> logit(c v + (1 - c) / 2), logdet (N,): pixels to the real line (Dinh et al. 2017, 4.1).

    c keeps 0 and 1 finite: 0.90 in FlowGMM, 0.95 in SCNF. FlowGMM's published inverse stops at the sigmoid, which
    leaves pixels in [(1 - c) / 2, (1 + c) / 2]; this one is exact.
    """

    def __init__(self, c: float = 0.90):
        super().__init__()
        self.c = c

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        w = v * self.c + (1 - self.c) / 2
        z = w.log() - (-w).log1p()
        # d logit(w) / dw = 1 / (w (1 - w)); softplus stays finite if w is rounded to 1
        return z, ops.logdet(F.softplus(z) + F.softplus(-z) + math.log(self.c))

    def inverse(self, z: Tensor) -> Tensor:
        return (z.sigmoid() - (1 - self.c) / 2) / self.c

    def extra_repr(self):
        return f"c={self.c}"


class Squeeze(nn.Module):
    """x: (N, C, H, W) -> (N, 4 C, H / 2, W / 2), logdet 0: each 2 x 2 block of pixels becomes channels.

    Output channel 4 c + 2 dy + dx for order "channel" (FlowGMM), (2 dy + dx) C + c for "space" (SCNF, TensorFlow).
    """

    def __init__(self, order: str = "channel"):
        super().__init__()
        if order not in ("channel", "space"):
            raise ValueError(f"order must be 'channel' or 'space', not {order!r}")
        self.order = order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.pixel_unshuffle(x, 2)
        if self.order == "space":
            z = z.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
        return z, x.new_zeros((), dtype=accumulation_dtype(x.dtype)).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        if self.order == "space":
            z = z.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(z, 2)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = shape
        if height % 2 or width % 2:
            raise ValueError(f"an image of {height} x {width} cannot be squeezed: its sides must be even")
        return 4 * channels, height // 2, width // 2

    def extra_repr(self):
        return f"order={self.order!r}"


class FactorOut(nn.Module):
    """x: (N, C, H, W) or (..., C) -> the remaining channels, those factored out, which skip the following layers.

    Multi-scale architecture of Dinh et al. 2017, section 3.6. Factors out the last `out` channels, or with `first` the
    first ones (SCNF).
    """

    def __init__(self, out: int, first: bool = False):
        super().__init__()
        self.out, self.first = out, first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = _channel_axis(x)
        rest = x.shape[axis] - self.out
        if self.first:
            out, x = x.split((self.out, rest), axis)
            return x, out
        return x.split((rest, self.out), axis)

    def inverse(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.cat((out, x) if self.first else (x, out), _channel_axis(x))

    def extra_repr(self):
        return f"out={self.out}, first={self.first}"


class ActNorm(nn.Module):
    """x: (N, C, H, W) or (..., C) -> (x - bias) exp(logs), logdet (Kingma & Dhariwal 2018, section 3.1).

    Starts as the identity. While `initializing` is set, a call first sets bias and logs from its input, so that each
    output channel has mean 0 and deviation 1: `initialize(flow, x)` does that once, so that no step has to ask whether
    it is the first.   variance_floor: smaller variances count as this one, 0.2 in FlowGMM.
    """

    def __init__(self, channels: int, variance_floor: float | None = None):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.variance_floor = variance_floor
        self.initializing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initializing:
            self._initialize(x)
        z = (x - _per_channel(self.bias, x)) * _per_channel(self.logs, x).exp()
        return z, _logdet_of_channels(self.logs.sum(), x)

    def inverse(self, z: Tensor) -> Tensor:
        return z * _per_channel(-self.logs, z).exp() + _per_channel(self.bias, z)

    @torch.no_grad()
    def _initialize(self, x):
        rows = x.transpose(1, -1).flatten(0, -2) if x.dim() == 4 else x.flatten(0, -2)
        self.bias.copy_(rows.mean(0))
        if self.variance_floor is None:
            self.logs.copy_(-(rows.std(0) + 1e-6).log())
        else:
            self.logs.copy_(-0.5 * rows.var(0, correction=0).clamp(min=self.variance_floor).log())

    def extra_repr(self):
        return f"{len(self.logs)}"


class NetActNorm(ActNorm):
    """x: (N, C, H, W) or (..., C) -> (x - bias) exp(logs): an ActNorm within a network, without log-det."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class InvertibleConv(nn.Module):
    """x: (N, C, H, W) or (..., C) -> W x over the channels, logdet H W log |det W|: an invertible 1 x 1 convolution.

    Glow (Kingma & Dhariwal 2018, section 3.2).   form: "full", any matrix, initially the identity, with log-det and
    inverse in float64; "householder", a product of `factors` reflections I - 2 v v' / |v|^2 (log-det 0); "qr", such a
    product times an upper triangular matrix with diagonal softplus(s), so that the log-det is a sum (Hoogeboom et al.
    2019; both as in SCNF).   rotation: start as a random rotation, and add a bias (FlowGMM, whose published matrix is
    initialized like any convolution's, at times close to singular).
    """

    def __init__(self, channels: int, form: str = "full", factors: int = 2, rotation: bool = False):
        super().__init__()
        if form not in ("full", "householder", "qr"):
            raise ValueError(f"form must be 'full', 'householder' or 'qr', not {form!r}")
        self.form, self.channels = form, channels
        if form == "full":
            self.W = nn.Parameter(torch.eye(channels))
            if rotation:
                nn.init.orthogonal_(self.W)
        else:
            self.v = nn.Parameter(torch.randn(factors, channels))
        if form == "qr":
            self.s = nn.Parameter(torch.zeros(channels))  # softplus(0) = ln 2
            self.R = nn.Parameter(torch.zeros(channels, channels))  # above the diagonal
        self.bias = nn.Parameter(torch.zeros(channels)) if rotation else None

    def matrix(self) -> Tensor:
        """-> (C, C) W."""
        if self.form == "full":
            return self.W
        product = torch.eye(self.channels, dtype=self.v.dtype, device=self.v.device)
        for v in self.v:
            product = product - 2 * torch.outer(product @ v, v) / v.square().sum()
        return product if self.form == "householder" else product @ (self.R.triu(1) + F.softplus(self.s).diag())

    def log_abs_det(self) -> Tensor:
        """-> () log |det W|."""
        if self.form == "full":
            return torch.linalg.slogdet(self.W.double()).logabsdet.to(self.W.dtype)
        return F.softplus(self.s).log().sum() if self.form == "qr" else self.v.new_zeros(())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return _over_channels(x, self.matrix(), self.bias), _logdet_of_channels(self.log_abs_det(), x)

    def inverse(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            matrix = self.matrix()
            inverse = matrix.T if self.form == "householder" else torch.linalg.inv(matrix.double()).to(matrix.dtype)
            return _over_channels(z if self.bias is None else z - _per_channel(self.bias, z), inverse, None)

    def extra_repr(self):
        return f"{self.channels}, form={self.form!r}"


class ResidualBlock(nn.Sequential):
    """x: (...) -> x + layers(x): named layers, one after the other, with a skip around them."""

    def __init__(self, **layers: nn.Module):
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def zero_last(net: nn.Sequential) -> nn.Sequential:
    """Sets the last layer's weight and bias to 0, so that the network starts as the constant 0."""
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


class ImageCoupling(nn.Module):
    """x: (N, C, H, W) -> z, logdet: an affine coupling of a channel half or of a checkerboard (`ops.coupling2d`).

    net: the kept half (N, C // 2, H, W), or the whole image with the changed pixels 0, -> (N, 2 P, H, W), raw scale
    and shift of the P changed channels.   changed: "first" or "second" half of the channels; "even" or "odd" pixels of
    the checkerboard, the top left one being even.   gained: bound the scale by a tanh with a gain per channel
    (FlowGMM), else by a sigmoid (SCNF).   shift_first: whether the shift comes before the scale.
    """

    def __init__(self, net: nn.Module, channels: int, changed: str, gained: bool = True, shift_first: bool = True):
        super().__init__()
        if changed in ("first", "second") and channels < 2:
            raise ValueError("one channel has no halves to couple: take a coupling of the checkerboard")
        self.net, self.changed, self.shift_first = net, changed, shift_first
        affected = channels if changed in ("even", "odd") else channels // 2
        self.gain = nn.Parameter(torch.ones(affected)) if gained else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple(ops.coupling2d, x, self.net(self.kept(x)))

    def inverse(self, z: Tensor) -> Tensor:
        return self._couple(ops.coupling2d_inverse, z, self.net(self.kept(z)))

    def rebuild(self, z: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """As `rebuild` below, but runs the network once instead of twice: z already holds its input."""
        kept = z.detach().requires_grad_()
        params = self.net(self.kept(kept))
        with torch.no_grad():
            x = self._couple(ops.coupling2d_inverse, z, params)
        x.requires_grad_()
        return x.detach(), [x, kept], *self._couple(ops.coupling2d, x, params)

    def kept(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> the input of the network."""
        if self.changed in ("even", "odd"):
            return x * checkerboard(*x.shape[2:], kept="odd" if self.changed == "even" else "even", like=x)
        half = x.shape[1] // 2
        return x[:, -half:] if self.changed == "first" else x[:, :half]

    def _couple(self, op, x, params):
        return op(x, params, self.gain, changed=self.changed, shift_first=self.shift_first)

    def extra_repr(self):
        return f"changed={self.changed!r}"


class DoubleCoupling(nn.Module):
    """x: (N, C, H, W) or (..., C) -> z, logdet: SCNF's coupling, which changes the halves of the channels in turn.

    net1: second half (N, C / 2, H, W) -> (N, C, H, W), raw scale and shift of the first half; net2: likewise from the
    changed first half for the second. scale = sigmoid(raw + 2) + 1e-6, after the shift. An embedding e, (N, E) or for
    vectors (..., E), is the second argument of both networks (conditional coupling).
    """

    def __init__(self, net1: nn.Module, net2: nn.Module):
        super().__init__()
        self.net1, self.net2 = net1, net2

    def forward(self, x: Tensor, *e: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet1 = _couple(ops.coupling2d, x, self.net1(_halves(x)[1], *e), "first")
        x, logdet2 = _couple(ops.coupling2d, x, self.net2(_halves(x)[0], *e), "second")
        return x, logdet1 + logdet2

    def inverse(self, z: Tensor, *e: Tensor) -> Tensor:
        z = _couple(ops.coupling2d_inverse, z, self.net2(_halves(z)[0], *e), "second")
        return _couple(ops.coupling2d_inverse, z, self.net1(_halves(z)[1], *e), "first")


class ConditionalShift(nn.Module):
    """x: (..., D), shift: (..., D) of the class -> x - shift, logdet 0: with a Gaussian prior, SCNF-GMM."""

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        z = x - shift
        return z, z.new_zeros(()).expand(z.shape[:-1])

    def inverse(self, z: Tensor, shift: Tensor) -> Tensor:
        return z + shift


def _couple(op, x, params, changed):
    if x.dim() == 4:
        return op(x, params, changed=changed, eps=1e-6)
    lead = params.shape[:-1]
    x, params = (v.expand(*lead, v.shape[-1]).reshape(-1, v.shape[-1], 1, 1) for v in (x, params))
    result = op(x, params, changed=changed, eps=1e-6)
    if isinstance(result, Tensor):
        return result.reshape(*lead, x.shape[1])
    return result[0].reshape(*lead, x.shape[1]), result[1].reshape(lead)


def _halves(x):
    return x.chunk(2, _channel_axis(x))


def checkerboard(height: int, width: int, kept: str, like: Tensor) -> Tensor:
    """(height, width) of 1 where i + j is even (kept="even") or odd, else 0, of the dtype and device of `like`."""
    row, column = (torch.arange(size, device=like.device) for size in (height, width))
    return ((row[:, None] + column) % 2 == (kept == "odd")).to(like.dtype)


def rebuild(layer: nn.Module, z: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """A layer's output z -> its input x, the leaves whose gradients sum to that of x, z and logdet recomputed."""
    if hasattr(layer, "rebuild"):
        return layer.rebuild(z)
    with torch.no_grad():
        x = layer.inverse(z)
    leaf = x.detach().requires_grad_()
    return x, [leaf], *layer(leaf)


def _channel_axis(x):
    return 1 if x.dim() == 4 else -1


def _per_channel(value, x):
    return value[:, None, None] if x.dim() == 4 else value


def _logdet_of_channels(one_pixel, x):
    if x.dim() == 4:
        return (one_pixel * (x.shape[2] * x.shape[3])).expand(len(x))
    return one_pixel.expand(x.shape[:-1])


def _over_channels(x, matrix, bias):
    if x.dim() == 4:
        return F.conv2d(x, matrix[:, :, None, None], bias)
    return F.linear(x, matrix, bias)
