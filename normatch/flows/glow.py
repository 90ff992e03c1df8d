"""FlowGMM's Glow (Izmailov et al. 2020, after Kingma & Dhariwal 2018) for images."""

from collections.abc import Sequence

from .layers import FactorOut, Squeeze
from .realnvp import CHECKERBOARD, HALVES, ImageFlow, coupling_steps


class Glow(ImageFlow):
    """x: (N, *shape) in [0, 1] -> z (N, D), logdet (N,): FlowGMM's Glow (after Kingma & Dhariwal 2018).

    Steps of ActNorm, 1 x 1 convolution and a coupling of the first half of the channels (the middle one of an odd
    number is left out), three before and three after a squeeze, four and four at the last scale. Arguments as in
    `RealNVP`.
    """

    def __init__(
        self, shape: Sequence[int] = (3, 32, 32), scales: int = 2, width: int = 64, blocks: int = 8, **options
    ):
        layers, channels = [], shape[0]
        for scale in range(scales):
            last = scale == scales - 1
            changed = ("first",) * (4 if last else 3)
            layers += coupling_steps(channels, width, blocks, changed, conv=True, actnorm=True)
            layers.append(Squeeze())
            layers += coupling_steps(4 * channels, 2 * width, blocks, changed, conv=True, actnorm=True)
            if not last:
                layers.append(FactorOut(2 * channels))
            channels, width = 2 * channels, 2 * width
        super().__init__(layers, shape, **options)


class GlowMNIST(ImageFlow):
    """x: (N, *shape) in [0, 1] -> z (N, D), logdet (N,): FlowGMM's Glow for MNIST, 14 steps of one width.

    Steps of ActNorm, 1 x 1 convolution and a coupling as in `RealNVPMNIST`. Arguments as there.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), width: int = 64, blocks: int = 4, **options):
        layers, channels = [], shape[0]
        for halves in (HALVES, HALVES[:2]):
            layers += coupling_steps(channels, width, blocks, CHECKERBOARD, conv=True, actnorm=True)
            layers.append(Squeeze())
            layers += coupling_steps(4 * channels, width, blocks, halves, conv=True, actnorm=True)
            layers.append(FactorOut(2 * channels))
            channels = 2 * channels
        layers += coupling_steps(channels, width, blocks, CHECKERBOARD, conv=True, actnorm=True)
        super().__init__(layers, shape, **options)
