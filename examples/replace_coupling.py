"""Replaces the coupling layers of a normflows Glow by normatch's fused op, and times both.

    pip install normflows
    python examples/replace_coupling.py

normflows' AffineCouplingBlock splits the image and the network's output, transforms one half, and concatenates again;
`ops.coupling2d` does all of that in one pass each way.
"""

import argparse
import copy

import normflows
import torch
from torch import Tensor

from normatch import ops
from normatch.bench.measure import medians, side_by_side


class FusedCoupling(normflows.flows.Flow):
    """A normflows AffineCouplingBlock with scale_map="sigmoid" and split_mode="channel", with its own network.

    z: (N, C, H, W) -> (N, C, H, W), logdet (N,). As in normflows, `inverse` maps data to latents.
    """

    def __init__(self, block: normflows.flows.AffineCouplingBlock):
        super().__init__()
        coupling = block.flows[1]
        if coupling.scale_map != "sigmoid" or block.flows[0].mode != "channel":
            raise ValueError("only scale_map='sigmoid' with split_mode='channel'")
        self.param_map = coupling.param_map

    def params(self, z: Tensor) -> Tensor:
        """z: (N, C, H, W) -> (N, C, H, W). normflows' network interleaves shifts and scales; ops.coupling2d takes all
        scales, then all shifts, and adds what normflows subtracts."""
        shift, scale = self.param_map(z[:, : (z.shape[1] + 1) // 2]).unflatten(1, (-1, 2)).unbind(2)
        return torch.cat([scale, -shift], 1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return ops.coupling2d(z, self.params(z), changed="second")

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        params = self.params(z)
        x = ops.coupling2d_inverse(z, params, changed="second")
        return x, -ops.coupling2d(x, params, changed="second")[1]


def replace_couplings(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the same parameters, and every coupling fused."""
    for block in model.modules():
        if isinstance(block, normflows.flows.GlowBlock):
            block.flows[0] = FusedCoupling(block.flows[0])
    return model


class Glow(torch.nn.Module):
    """x: (N, C, H, W) -> latents (N, C, H, W), logdet (N,)."""

    def __init__(self, channels: int, hidden: int, depth: int):
        super().__init__()
        blocks = (normflows.flows.GlowBlock(channels, hidden, init_zeros=False) for _ in range(depth))
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for block in self.blocks:
            x, logdet = block.inverse(x)
            total = total + logdet
        return x, total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--hidden", type=int, default=32, help="width of the networks (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements; their median counts (default: 7)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch, 12, 16, 16, device=device)

    before = Glow(12, options.hidden, depth=4).to(device)
    before(images)  # ActNorm initializes itself from a batch
    after = replace_couplings(copy.deepcopy(before))

    def run(model):
        z, logdet = model(images)
        loss = (0.5 * z.square().flatten(1).sum(1) - logdet).mean() / images[0].numel()
        return [z.detach(), logdet.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    pairs = list(zip(run(before), run(after), strict=True))
    error = max(((old - new).abs().max() / old.abs().max().clamp(min=1e-12)).item() for old, new in pairs)
    if not error < 1e-3:
        raise SystemExit(f"the two models disagree, by {error:.2g} of the largest value")
    print(f"latents, log-determinants and all gradients agree to {error:.1g} of the largest value")

    z, old, new = images, before.blocks[0].flows[0], after.blocks[0].flows[0]
    with torch.no_grad():
        param, params = old.flows[1].param_map(z[:, :6]), new.params(z)

    class Given(torch.nn.Module):  # replaces the network by its recorded output
        def forward(self, _):
            return param

    bare = normflows.flows.AffineCouplingBlock(Given(), scale_map="sigmoid")
    cases = {
        "one coupling, its network's output given": (
            lambda: bare.inverse(z), lambda: ops.coupling2d(z, params, changed="second"),
        ),
        "forward and backward of the whole flow": (lambda: run(before), lambda: run(after)),
    }  # fmt: skip
    for what, (first, second) in cases.items():
        times = side_by_side({"normflows": first, "normatch": second}, device, options.rounds)
        print(f"\n{what}, {options.batch} images, {device}")
        for name, seconds in medians(times).items():
            print(f"  {name:<12}{1e3 * seconds:9.3f} ms")


if __name__ == "__main__":
    main()
