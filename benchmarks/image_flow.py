"""Flows of images against the published formulation: `python benchmarks/image_flow.py [mixture] [step] [memory]`.

mixture   the Gaussian mixture over D = 3,072 dimensions with K = 10 classes, forward and backward: one
          MultivariateNormal a class (published), the closed form in plain PyTorch, the op
step      a training step of RealNVP, forward and backward: the published formulation (masks of full width, four
          evaluations of one MultivariateNormal a class), the closed form, the ops, these compiled, with networks in
          bf16, and with the reversible gradient
memory    what a step keeps for the gradient, by the number of couplings, with and without the reversible gradient

Results are checked against each other first; seconds are medians of rounds in which every rung runs once. Prints the
tables, and leaves each part in benchmarks/results/image-flow/PART.json. Sizes: --batch, --width, --blocks, --rounds.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch.nn import functional as F

from normatch import ops, reference
from normatch.flows import Flow, FlowClassifier, GaussianMixture, RealNVPMNIST
from normatch.flows.layers import ImageCoupling
from normatch.flows.realnvp import ResidualNet

RESULTS = Path(__file__).parent / "results" / "image-flow"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def published_mixture(z, means, rho, logits):
    """(N, K) as the published class has it: the full covariance of each class, factorised anew at each evaluation."""
    log_pi = logits.softmax(0).log()
    sigma = F.softplus(rho)
    gaussians = [
        torch.distributions.MultivariateNormal(mean, s * s * torch.eye(len(mean), dtype=z.dtype, device=z.device))
        for mean, s in zip(means, sigma, strict=True)
    ]
    return torch.stack([gaussian.log_prob(z) for gaussian in gaussians], 1) + log_pi


def published_coupling2d(x, params, gain, changed="first", shift_first=True, eps=0.0):
    """The published layer's arithmetic: masks over the whole image, built pixel by pixel on every call."""
    s, t = params.chunk(2, 1)
    s = gain[:, None, None] * s.tanh()
    if changed in ("even", "odd"):
        height, width = x.shape[2:]
        mask = torch.tensor([[(i % 2 + j) % 2 for j in range(width)] for i in range(height)], dtype=x.dtype)
        mask = mask.to(x.device) if changed == "even" else 1 - mask.to(x.device)
        s, t = s * (1 - mask), t * (1 - mask)
        scale = s.exp()
        if scale.isnan().any():
            raise RuntimeError
        return x * mask + (x + t) * scale * (1 - mask), s.flatten(1).sum(1)
    first, second = x.chunk(2, 1)
    scale = s.exp()
    if scale.isnan().any():
        raise RuntimeError
    first, second = ((first + t) * scale, second) if changed == "first" else (first, (second + t) * scale)
    return torch.cat((first, second), 1), s.flatten(1).sum(1)


@contextmanager
def coupling_is(function):
    """Within, flows compute their couplings by this function."""
    own = ops.coupling2d
    ops.coupling2d = function
    try:
        yield
    finally:
        ops.coupling2d = own


def medians(calls: dict, rounds: int) -> dict[str, float]:
    """Seconds of each call: rounds in which each runs once, in turn, after one that does not count."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def show(part: str, rows: dict[str, float], unit: str, facts: dict, errors: dict[str, float] | None = None):
    """Print and keep a part: its rows, the sizes it was measured at, and how far gradients are from normatch's."""
    first = next(iter(rows.values()))
    print(f"\n{part}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for name, value in rows.items():
        print(f"  {name:32s} {value:12.5f} {unit}" + (f" {first / value:10.1f}x" if unit == "s" else ""))
    if errors:
        print("  relative distance from normatch in fp32:")
        for name, error in errors.items():
            print(f"  {name:32s} {error:.1e}")
    facts = {**facts, "device": str(DEVICE), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record = {**facts, "load": round(os.getloadavg()[0], 1), "unit": unit, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{part}.json").write_text(json.dumps({**record, "errors": errors or {}}, indent=1) + "\n")


def assert_close(found: dict[str, list[torch.Tensor]], tolerance: float):
    """Largest differences relative to the largest value, of every provider from the first."""
    (first, want), *others = found.items()
    for name, got in others:
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
    weights = torch.randn(args.batch, k, device=DEVICE)

    def call(function):
        out = function(z, means, rho, logits)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), z)]

    calls = {
        "published, one evaluation": lambda: call(published_mixture),
        "closed form": lambda: call(reference.gmm_log_prob),
        "normatch": lambda: call(ops.gmm_log_prob),
    }
    assert_close({name: f() for name, f in calls.items()}, 1e-4)
    slow = medians({"published, one evaluation": calls.pop("published, one evaluation")}, 1)
    fast = medians(calls, max(args.rounds, 20))
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
    prior = model.prior

    def grads(loss):
        return [loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))]

    def loss_of(class_log_prob, logdet):
        return F.cross_entropy(class_log_prob, y) - (class_log_prob.logsumexp(1) + logdet).mean()

    def published():
        with coupling_is(published_coupling2d):
            z, logdet = flow(x)
        evaluate = lambda: published_mixture(z, prior.means, prior.rho, prior.mixture_logits)  # noqa: E731
        with torch.no_grad():  # the class of the other view, and the consistency's density
            evaluate(), evaluate()
        return grads(F.cross_entropy(evaluate(), y) - (evaluate().logsumexp(1) + logdet).mean())

    def closed():
        with coupling_is(reference.coupling2d):
            z, logdet = flow(x)
        return grads(loss_of(reference.gmm_log_prob(z, prior.means, prior.rho, prior.mixture_logits), logdet))

    def ours(f=model):
        out = f(x)
        return grads(loss_of(out.class_log_prob, out.logdet))

    def bf16():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = model(x)
        return grads(loss_of(out.class_log_prob, out.logdet))

    def reversible():
        flow.reversible = True
        try:
            return ours()
        finally:
            flow.reversible = False

    compiled = torch.compile(model)
    calls = {
        "published": published,
        "closed form": closed,
        "normatch": ours,
        "normatch, compiled": lambda: ours(compiled),
        "normatch, bf16 networks": bf16,
        "normatch, reversible": reversible,
    }
    if args.no_compile:
        del calls["normatch, compiled"]
    found = {name: call() for name, call in calls.items()}
    low = found.pop("normatch, bf16 networks")
    assert_close({name: value[:1] for name, value in found.items()}, 1e-4)
    want = torch.cat([g.flatten() for g in found["normatch"][1:]])
    errors = {
        name: ((torch.cat([g.flatten() for g in value[1:]]) - want).norm() / want.norm()).item()
        for name, value in {**found, "normatch, bf16 networks": low}.items()
    }
    errors["loss of bf16 networks"] = abs(low[0] / found["normatch"][0] - 1).item()
    errors["published and closed form at most"] = max(errors.pop("published"), errors.pop("closed form"))
    show("step", medians(calls, args.rounds), "s", sizes(args), errors)


def sizes(args) -> dict:
    return {"batch": args.batch, "width": args.width, "blocks": args.blocks}


def memory(args):
    """Bytes that autograd keeps between forward and backward (on CUDA also the peak), for more and more couplings."""
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
    parser.add_argument("parts", nargs="*", choices=["mixture", "step", "memory", []], help="which; none: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    args = parser.parse_args()
    for part in args.parts or ["mixture", "step", "memory"]:
        {"mixture": mixture, "step": step, "memory": memory}[part](args)


if __name__ == "__main__":
    main()
