"""Semi-conditional normalizing flows (SCNF: Atanov, Volokhova, Ashukha, Sosnovik & Vetrov 2019)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference import log_softplus
from .density import FlowDensity, FlowOutput, checked_classes, draw_classes
from .flow import Flow, invert_layers, load_weights, run_layers
from .layers import (
    ActNorm,
    ConditionalShift,
    DoubleCoupling,
    FactorOut,
    ImageCoupling,
    InvertibleConv,
    Logit,
    NetActNorm,
    ResidualBlock,
    Squeeze,
    zero_last,
)


class ConditionalNet(nn.Sequential):
    """x: (N, C, H, W), e: (N, E) -> (N, ...), or x: (..., C), e: (..., E) -> (..., ...): layers applied to [x, e].

    A linear first layer is applied to x and to e separately: the class's part is computed once for all rows, and the
    row's part once for all classes.
    """

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        first, *rest = self
        if isinstance(first, nn.Linear):
            weight_x, weight_e = first.weight.split((x.shape[-1], e.shape[-1]), 1)
            h = F.linear(x, weight_x) + F.linear(e, weight_e, first.bias)
        else:
            h = first(torch.cat((x, e[:, :, None, None].expand(-1, -1, *x.shape[2:])), 1))
        for layer in rest:
            h = layer(h)
        return h


def image_net(inputs: int, width: int, outputs: int, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """(N, inputs, H, W) -> (N, outputs, H, W): SCNF's network of four residual blocks, initially constant 0."""
    return _residual_net(lambda a, b: (nn.ReflectionPad2d(1), nn.Conv2d(a, b, 3)), inputs, width, outputs, kind)


def vector_net(inputs: int, width: int, outputs: int) -> ConditionalNet:
    """[x, e]: (..., inputs) -> (..., outputs): the same network for vectors, initially constant 0."""
    return _residual_net(lambda a, b: (nn.Linear(a, b),), inputs, width, outputs, ConditionalNet)


def _residual_net(layer, inputs, width, outputs, kind):
    def block():
        return ResidualBlock(net=nn.Sequential(nn.ReLU(), *layer(width, width), nn.ReLU(), *layer(width, width)))

    blocks = (block() for _ in range(4))
    return zero_last(kind(*layer(inputs, width), *blocks, NetActNorm(width), nn.ReLU(), *layer(width, outputs)))


class MaskedGlow(Flow):
    """x: (N, *shape) in [0, 1] -> z (N, D), logdet (N,): SCNF's unconditional flow f for MNIST.

    Steps of 1 x 1 convolution, coupling and ActNorm at three scales. The first two have three steps with checkerboard
    couplings, a squeeze and two steps with channel couplings, then factor out half of the channels; the last has three
    and two steps. For MNIST z has 392 + 196 dimensions factored out and 196 deep ones.

    shape: (C, H, W), sides divisible by 4, at least 8.   width: of the networks.   conv, factors: form and number of
    reflections of the 1 x 1 convolutions (see `InvertibleConv`).   options: levels (256), reversible, see `Flow`.
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), width: int = 64, conv: str = "full", factors: int = 2, **options
    ):
        def masked(channels):
            for changed in ("even", "odd", "even"):
                net = image_net(channels, width, 2 * channels)
                yield InvertibleConv(channels, conv, factors)
                yield ImageCoupling(net, channels, changed, gained=False, shift_first=False)
                yield ActNorm(channels)

        def halves(channels):
            for _ in range(2):
                nets = (image_net(channels // 2, width, channels) for _ in range(2))
                yield InvertibleConv(channels, conv, factors)
                yield DoubleCoupling(*nets)
                yield ActNorm(channels)

        if any(side % 4 or side < 8 for side in shape[1:]):
            raise ValueError(f"the sides must be divisible by 4 and at least 8, not {' x '.join(map(str, shape[1:]))}")
        channels, layers = shape[0], [Logit(0.95)]
        for _ in range(2):
            out = _half_to_even(4 * channels)
            layers += [*masked(channels), Squeeze("space"), *halves(4 * channels), FactorOut(out, first=True)]
            channels = 4 * channels - out
        layers += [*masked(channels), *halves(channels)]
        super().__init__(layers, shape, options.pop("levels", 256), **options)


class PointFlow(Flow):
    """x: (N, D) -> z (N, D), logdet (N,): `steps` of 1 x 1 convolution, coupling, ActNorm; SCNF's f for the plane."""

    def __init__(self, features: int = 2, steps: int = 5, width: int = 64):
        first, second = features - features // 2, features // 2

        def net(inputs, outputs):
            layers = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)
            return nn.Sequential(layers[0], nn.LeakyReLU(), layers[1], nn.LeakyReLU(), layers[2])

        layers = []
        for _ in range(steps):
            nets = net(second, 2 * first), net(first, 2 * second)
            layers += [InvertibleConv(features), DoubleCoupling(*nets), ActNorm(features)]
        super().__init__(layers, (features,))


class ConditionalFlow(nn.Module):
    """x: (..., D), e: (..., E) -> z (..., D), logdet (...): SCNF's flow h of the deep dimensions, given a class.

    The leading axes of x and of the class embedding e broadcast: x (1, N, D) with e (K, 1, E) gives every sample under
    every class in one pass. Each of the `levels` has `steps` of ActNorm, 1 x 1 convolution and conditional coupling;
    all levels but the last factor out half of the dimensions.
    """

    def __init__(
        self,
        features: int,
        embedding: int = 10,
        levels: int = 2,
        steps: int = 4,
        hidden: int = 256,
        conv: str = "full",
        factors: int = 2,
    ):
        super().__init__()
        self.features, self.embedding = features, embedding
        layers, pieces = [], []
        for level in range(levels):
            if features < 2:
                raise ValueError(f"a flow of {self.features} dimensions has none left to couple at level {level + 1}")
            first, second = features - features // 2, features // 2
            halves = (second, first), (first, second)
            for _ in range(steps):
                nets = (vector_net(kept + embedding, hidden, 2 * changed) for kept, changed in halves)
                layers += [ActNorm(features), InvertibleConv(features, conv, factors), DoubleCoupling(*nets)]
            if level < levels - 1:
                pieces.append(_half_to_even(features))
                layers.append(FactorOut(pieces[-1], first=True))
                features -= pieces[-1]
        self.layers = nn.ModuleList(layers)
        self._pieces = [*pieces, features]

    def forward(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        pieces, logdet = run_layers(self.layers, x, e)
        return torch.cat(pieces, -1), logdet

    def inverse(self, z: Tensor, e: Tensor) -> Tensor:
        """z: (..., D), e: (..., E) -> x (..., D)."""
        return invert_layers(self.layers, z.split(self._pieces, -1), e)


def _half_to_even(channels):
    half = channels // 2
    return half + half % 2


class SCNF(FlowDensity):
    """x: (N, *shape) -> FlowOutput: an unconditional flow f and, on its last dimensions, a flow h given the class.

    z = f(x) = [z_aux, z_deep], z_h = h(z_deep; y); z_aux and z_h have Gaussian priors with mean 0 and a deviation
    softplus(rho) per dimension (Atanov et al. 2019, section 2.2):

        log p(x | y) = log |det df/dx| + log N(z_aux) + log |det dh_y/dz_deep| + log N(h(z_deep; y))

    f runs once for all classes, h for all of them in one batch. The z of the result is that of f.

    f: a `Flow`.   h: a `ConditionalFlow`, or "shift": z_h = z_deep - mean_y, a mixture of Gaussians (SCNF-GMM).
    classes: K.   deep: dimensions of z_deep; None: those of h, or all.   class_prior: (K,) p(y), or counts of the
    labels, which stay fixed; None: uniform.
    """

    def __init__(
        self,
        f: Flow,
        h: ConditionalFlow | str,
        classes: int,
        deep: int | None = None,
        class_prior: Tensor | Sequence[float] | None = None,
    ):
        super().__init__()
        if not (isinstance(h, ConditionalFlow) or h == "shift"):
            raise ValueError(f"h must be a ConditionalFlow or 'shift', not {h!r}")
        deep = deep or (f.features if h == "shift" else h.features)
        if deep > f.features:
            raise ValueError(f"f has {f.features} dimensions, of which {deep} cannot be the deep ones")
        if h == "shift":
            h, embedding = ConditionalShift(), torch.randn(classes, deep)
        elif h.features != deep:
            raise ValueError(f"h is a flow of {h.features} dimensions, of which there are {deep}")
        elif h.embedding < classes:
            raise ValueError(f"embeddings of {h.embedding} dimensions cannot tell {classes} classes apart")
        else:
            embedding = torch.eye(classes, h.embedding)
        self.f, self.h, self.deep, self.classes = f, h, deep, classes
        self.embedding = nn.Parameter(embedding)
        self.aux_rho = nn.Parameter(torch.zeros(f.features - deep))
        self.deep_rho = nn.Parameter(torch.zeros(deep))
        prior = torch.ones(classes) if class_prior is None else torch.as_tensor(class_prior) * 1.0
        if prior.shape != (classes,) or not bool((prior > 0).all()):
            raise ValueError(f"class_prior must be {classes} positive numbers, not {prior.tolist()}")
        self.register_buffer("log_prior", (prior / prior.sum()).log())

    def forward(self, x: Tensor) -> FlowOutput:
        z, logdet = self.f(x)
        aux, deep = self._split(z)
        z_h, logdet_h = self.h(deep[None], self.embedding[:, None])
        deep_log_prob = logdet_h + _log_normal(z_h, self.deep_rho)  # (K, N)
        class_log_prob = self.log_prior + _log_normal(aux, self.aux_rho)[:, None] + deep_log_prob.T
        return FlowOutput(z, logdet, class_log_prob, class_log_prob.logsumexp(1) + logdet)

    def inverse(self, z: Tensor) -> Tensor:
        """z: (N, D) of f -> x (N, *shape)."""
        return self.f.inverse(z)

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, *shape), y: (N,) -> z_f (N, D), z_h (N, deep) given those classes."""
        z = self.f(x)[0]
        return z, self.h(self._split(z)[1], self.embedding[checked_classes(y, len(x), self.classes, z.device)])[0]

    @torch.no_grad()
    def sample_latent(self, n: int, y=None, generator: torch.Generator | None = None) -> Tensor:
        """-> (n, D) points of f's latent space of class y, an int or (n,) one per row, or drawn from p(y)."""
        if y is None:
            y = draw_classes(self.log_prior.exp(), n, generator)
        y = checked_classes(y, n, self.classes, self.embedding.device)
        like = self.embedding
        noise = torch.randn(n, self.f.features, generator=generator, device=like.device, dtype=like.dtype)
        aux, deep = self._split(noise * F.softplus(torch.cat((self.aux_rho, self.deep_rho))))
        return torch.cat((aux, self.h.inverse(deep, self.embedding[y])), 1)

    def class_means(self) -> Tensor:
        """-> (K, D) the points of f's latent space that h maps to 0 given each class."""
        deep = self.h.inverse(self.deep_rho.new_zeros(self.classes, self.deep), self.embedding)
        return torch.cat((deep.new_zeros(self.classes, self.f.features - self.deep), deep), 1)

    def width(self) -> Tensor:
        """-> () the mean standard deviation of z_h."""
        return F.softplus(self.deep_rho).mean()

    def log_class_prior(self) -> Tensor:
        """-> (K,) log p(y)."""
        return self.log_prior

    def load_published(self, state: dict):
        """Take the weights from the state dict of the published model, `flow.modules_.*` and `prior.*`.

        It has no p(y), which stays as it is. Raises `UserError` for another architecture.
        """
        weights, here = {"log_prior": self.log_prior}, self.state_dict()
        for name, value in state.items():
            name = name.removeprefix("module.")
            # Masks follow from the layer, ActNorms have no flag here, and the means are always 0.
            if name.rpartition(".")[2] in ("mask", "requires_init", "mean"):
                continue
            for theirs, ours in _PUBLISHED_NAMES:
                if name.startswith(theirs):
                    name = ours + name.removeprefix(theirs)
                    break
            if name.endswith("factors.weight"):
                name = "embedding"
            if name in here and here[name].dim() == value.dim() - 2:  # published vectors are images of one pixel
                value = value.flatten(-3)
            weights[name] = value
        load_weights(self, weights, "SCNF")

    def _split(self, z):
        return z.split((z.shape[1] - self.deep, self.deep), 1)

    def extra_repr(self):
        return f"classes={self.classes}, deep={self.deep}"


_PUBLISHED_NAMES = (
    ("flow.modules_.", "f.layers."),
    ("prior.flow.modules_.", "h.layers."),
    ("prior.flow.embeddings.weight", "embedding"),
    ("prior.shallow_prior.logsigma", "aux_rho"),
    ("prior.deep_prior.logsigma", "deep_rho"),
)


def _log_normal(z, rho):
    """z: (..., D), rho: (D,) -> (...) log N(z; 0, diag softplus(rho)^2)."""
    log_sigma = log_softplus(rho)
    constant = -log_sigma.sum() - 0.5 * math.log(2 * math.pi) * z.shape[-1]
    return constant - 0.5 * ((z * (-log_sigma).exp()).square()).sum(-1)
