"""Flows of images against the published formulation: `python benchmarks/image_flow.py [mixture] [step] [memory]`.

mixture   the Gaussian mixture over D = 3,072 dimensions with K = 10 classes, forward and backward: one
          MultivariateNormal per class (published), the closed form in plain PyTorch, the op
step      a training step of RealNVP, forward and backward: the published formulation (masks of full width, four
          evaluations of one MultivariateNormal per class), the closed form, the ops, these compiled, with networks in
          bf16, and with the reversible gradient
memory    what a step keeps for the backward pass, by the number of couplings, with and without the reversible gradient

Results are first checked against each other; times are medians of rounds in which every formulation runs once. Prints
the tables and writes each part to benchmarks/results/image-flow/PART.json. Sizes: --batch, --width, --blocks.
"""

import argparse
import os
from pathlib import Path
from unittest import mock

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch.nn import functional as F

from normatch import ops, reference
from normatch.bench.kernels import mixture_loss
from normatch.bench.measure import machine, medians, side_by_side
from normatch.bench.rivals import published_coupling2d, published_mixture
from normatch.flows import Flow, FlowClassifier, GaussianMixture, RealNVPMNIST
from normatch.flows.layers import ImageCoupling
from normatch.flows.realnvp import ResidualNet
from normatch.tools.tables import write_json

RESULTS = Path(__file__).parent / "results" / "image-flow"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(part: str, rows: dict[str, float], unit: str, facts: dict, errors: dict[str, float] | None = None):
    """Print and write a part: its rows, the sizes measured, and the distance of gradients from normatch's."""
    first = next(iter(rows.values()))
    print(f"\n{part}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for name, value in rows.items():
        print(f"  {name:32s} {value:12.5f} {unit}" + (f" {first / value:10.1f}x" if unit == "s" else ""))
    if errors:
        print("  relative distance from normatch in fp32:")
        for name, error in errors.items():
            print(f"  {name:32s} {error:.1e}")
    facts = {**facts, **machine(DEVICE.type), "load": round(os.getloadavg()[0], 1)}
    write_json(RESULTS / f"{part}.json", {**facts, "unit": unit, "rows": rows, "errors": errors or {}})


def assert_close(results: dict[str, list[torch.Tensor]], tolerance: float):
    """Check the largest difference of every provider from the first, relative to the largest value."""
    (first, want), *rest = results.items()
    for name, got in rest:
        for a, b in zip(got, want, strict=True):
            error = ((a - b).abs().max() / b.abs().max()).item()
            if not error <= tolerance:
                raise SystemExit(f"{name} and {first} disagree: {error:.2g}")


def mixture(args):
    d, k = 3072, 10
    torch.manual_seed(0)
    z = torch.randn(args.batch, d, device=DEVICE).requires_grad_()
    means, rho = torch.randn(k, d, device=DEVICE), torch.full((k,), 0.5413, device=DEVICE)
    logits = torch.ones(k, device=DEVICE)

    def call(function):
        class_log_prob = function(z, means, rho, logits)
        return [class_log_prob.detach(), *torch.autograd.grad(mixture_loss(class_log_prob), z)]

    calls = {
        "published, one evaluation": lambda: call(published_mixture),
        "closed form": lambda: call(reference.gmm_log_prob),
        "normatch": lambda: call(ops.gmm_log_prob),
    }
    assert_close({name: f() for name, f in calls.items()}, 1e-4)
    slow = {name: calls.pop(name) for name in list(calls)[:1]}
    slow = medians(side_by_side(slow, DEVICE.type, 1, repeat=1, warmup=1))
    fast = medians(side_by_side(calls, DEVICE.type, max(args.rounds, 20), repeat=1, warmup=1))
    rows = {**slow, "published, the step's four": 4 * slow["published, one evaluation"], **fast}
    show("mixture", rows, "s", {"batch": args.batch, "D": d, "K": k})


def step(args):
    torch.manual_seed(0)
    flow = RealNVPMNIST(width=args.width, blocks=args.blocks)
    model = FlowClassifier(flow, GaussianMixture(torch.randn(10, flow.features))).to(DEVICE).train()
    flow.noise = "never"
    n = args.batch
    x = (torch.randint(0, 256, (n, 1, 28, 28)) / 255).to(DEVICE)
    y = torch.randint(0, 10, (n,), device=DEVICE)
    prior = (model.prior.means, model.prior.rho, model.prior.mixture_logits)

    def grads(class_log_prob, logdet, density=None):
        density = class_log_prob if density is None else density
        loss = F.cross_entropy(class_log_prob, y) - (density.logsumexp(1) + logdet).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))]

    def published():
        with mock.patch.object(ops, "coupling2d", published_coupling2d):
            z, logdet = flow(x)
        with torch.no_grad():  # the class of the other view, and the consistency's density
            published_mixture(z, *prior), published_mixture(z, *prior)
        return grads(published_mixture(z, *prior), logdet, published_mixture(z, *prior))

    def closed():
        with mock.patch.object(ops, "coupling2d", reference.coupling2d):
            z, logdet = flow(x)
        return grads(reference.gmm_log_prob(z, *prior), logdet)

    def ours(f=model, reversible=False, bf16=False):
        flow.reversible = reversible
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            out = f(x)
        flow.reversible = False
        return grads(out.class_log_prob, out.logdet)

    compiled = torch.compile(model)
    calls = {
        "published": published,
        "closed form": closed,
        "normatch": ours,
        "normatch, compiled": lambda: ours(compiled),
        "normatch, bf16 networks": lambda: ours(bf16=True),
        "normatch, reversible": lambda: ours(reversible=True),
    }
    if args.no_compile:
        del calls["normatch, compiled"]
    results = {name: call() for name, call in calls.items()}
    assert_close({name: value[:1] for name, value in results.items() if "bf16" not in name}, 1e-4)
    flat = {name: torch.cat([grad.flatten() for grad in value[1:]]) for name, value in results.items()}
    want = flat["normatch"]
    errors = {name: ((value - want).norm() / want.norm()).item() for name, value in flat.items()}
    errors["loss of bf16 networks"] = abs(results["normatch, bf16 networks"][0] / results["normatch"][0] - 1).item()
    errors["published and closed form at most"] = max(errors.pop("published"), errors.pop("closed form"))
    seconds = medians(side_by_side(calls, DEVICE.type, args.rounds, repeat=1, warmup=1))
    show("step", seconds, "s", sizes(args), errors)


def sizes(args) -> dict:
    return {"batch": args.batch, "width": args.width, "blocks": args.blocks}


def memory(args):
    """Bytes that autograd keeps between forward and backward (on CUDA also the peak), by the number of couplings."""
    x = torch.rand(args.batch, 4, 14, 14, device=DEVICE)
    kept = {}
    for couplings in (4, 8, 16, 32):
        parts = ("even", "odd") * (couplings // 2)
        layers = [ImageCoupling(ResidualNet(4, args.width, args.blocks, masked=True), 4, part) for part in parts]
        flow = Flow(layers, (4, 14, 14)).to(DEVICE)
        for flow.reversible in (False, True):
            storages = {}

            def pack(value, storages=storages):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
                return value

            weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                z, logdet = flow(x)
            total = sum(size for pointer, size in storages.items() if pointer not in weights)
            (z.square().sum() - logdet.sum()).backward()
            name = f"{couplings} couplings, {'reversible' if flow.reversible else 'ordinary'}"
            kept[name] = total / 2**20
            if DEVICE.type == "cuda":
                kept[name + ", peak"] = torch.cuda.max_memory_allocated() / 2**20
    show("memory", kept, "MiB", sizes(args))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["mixture", "step", "memory", []], help="which (default: all)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    args = parser.parse_args()
    for part in args.parts or ["mixture", "step", "memory"]:
        {"mixture": mixture, "step": step, "memory": memory}[part](args)


if __name__ == "__main__":
    main()
