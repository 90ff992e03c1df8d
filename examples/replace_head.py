"""Replaces the head of a plain PyTorch model by normatch's flow head, and times a step of both.

python examples/replace_head.py
"""

import argparse

import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy

import normatch
from normatch.bench.measure import medians, side_by_side


class PlainHead(nn.Module):
    """x: (N, D) -> (N, K): the same head, with the same parameters, in plain PyTorch."""

    def __init__(self, head: normatch.FlowHead):
        super().__init__()
        self.head = head

    def forward(self, x):
        couplings = [coupling.tensors() for coupling in self.head.couplings]
        return normatch.reference.flow_head(x, couplings, *self.head.prior_parameters())[2]


class FusedHead(nn.Module):
    """x: (N, D) -> (N, K)."""

    def __init__(self, head: normatch.FlowHead):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x).class_log_prob


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7, help="measurements; their median counts (default: 7)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch, 3, 32, 32, device=device)
    labels = torch.randint(options.classes, (options.batch,), device=device)

    # A model ...
    model = torchvision.models.resnet18(num_classes=options.classes).to(device)
    before = model.fc

    # ... and its head replaced: class_log_prob (N, K) takes the place of the logits; log_prob (N,) is a density.
    head = normatch.FlowHead(model.fc.in_features, options.classes, dropout=0.0).to(device)
    model.fc = nn.Identity()
    logits = head(model(images)).class_log_prob
    print(f"loss: {cross_entropy(logits, labels):.3f}")

    features = model(images).detach()
    with torch.no_grad():
        plain, fused = PlainHead(head)(features), FusedHead(head)(features)
    error = ((plain - fused).abs().max() / plain.abs().max()).item()
    if not error < 1e-4:
        raise SystemExit(f"the two heads disagree, by {error:.2g} of the largest value")
    print(f"the flow head in plain PyTorch and normatch's agree to {error:.1g} of the largest value")

    def step(head, through):
        def call():
            cross_entropy(head(through()), labels).backward()

        return call

    heads = {"linear": before, "flow head, plain PyTorch": PlainHead(head), "flow head, normatch": FusedHead(head)}
    for what, through in (("the head alone", lambda: features), ("the whole model", lambda: model(images))):
        calls = {name: step(module, through) for name, module in heads.items()}
        times = side_by_side(calls, device, options.rounds)
        print(f"\nforward and backward of {what}, {options.batch} images, {device}")
        for name, seconds in medians(times).items():
            print(f"  {name:<26}{1e3 * seconds:9.2f} ms")


if __name__ == "__main__":
    main()
