"""`normatch bench kernels`: every op beside the published formulation and the closed form in plain PyTorch.

The published formulations follow the code of NorMatch and FlowGMM: full-width tensors with masks for the coupling, one
MultivariateNormal a class for the mixture. The closed form, eager and compiled, is the fair rival.

On the CPU the process keeps the memory that it has freed (`measure.keep_memory`), for every provider alike: pages new
from the system cost several times what a kernel does with them. What a copy gets into such memory is reported beside
the roof, a copy into memory that is there. "% of copy" is that of a large copy which takes turns with the case's
providers, because the memory of a shared machine is not as fast at all times.
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from .. import ops, reference
from ..errors import UserError
from .measure import BYTES, Case, compare, copy_roof, keep_memory, machine

# ---- the rivals


def published_coupling(x, s_raw, t, gain):
    """The whole width D = 2 H with the unchanged half masked, as the published code computes it."""
    mask = torch.zeros(2 * x.shape[1], device=x.device, dtype=x.dtype)
    mask[x.shape[1] :] = 1
    x, s_raw, t = (torch.cat([value, value], 1) for value in (x, s_raw, t))
    s = torch.cat([gain, gain]) * torch.tanh(s_raw) * mask
    y = x * (1 - mask) + (x * mask + t * mask) * s.exp() * mask
    return y[:, mask.numel() // 2 :].to(x.dtype), s.sum(1)


def published_inverse(y, s_raw, t, gain):
    mask = torch.zeros(2 * y.shape[1], device=y.device, dtype=y.dtype)
    mask[y.shape[1] :] = 1
    y, s_raw, t = (torch.cat([value, value], 1) for value in (y, s_raw, t))
    s = torch.cat([gain, gain]) * torch.tanh(s_raw) * mask
    x = y * (1 - mask) + (y * mask * (-s).exp() - t * mask) * mask
    return x[:, mask.numel() // 2 :].to(y.dtype)


def published_coupling2d(x, params, gain, changed):
    """Masks for a checkerboard, halves cut and joined for channels; and a look for NaN, which waits for a GPU."""
    s, t = params.chunk(2, 1)
    s = gain.view(-1, 1, 1) * torch.tanh(s)
    if changed == "even":
        height, width = x.shape[2:]
        mask = torch.tensor([[(i + j) % 2 for j in range(width)] for i in range(height)], device=x.device).to(x.dtype)
        s, t = s * (1 - mask), t * (1 - mask)
        kept, part = x * mask, x * (1 - mask)
    else:
        part, kept = x.chunk(2, 1)
    scale = s.exp()
    if scale.isnan().any():
        raise RuntimeError("the scale has values that are NaN")
    part = (part + t) * scale
    y = kept + part * (1 - mask) if changed == "even" else torch.cat([part.to(x.dtype), kept], 1)
    return y.to(x.dtype), s.flatten(1).sum(-1, dtype=torch.float32)


def published_logdet(log_scale):
    return (log_scale * torch.ones_like(log_scale)).view(len(log_scale), -1).sum(-1, dtype=torch.float32)


def published_mixture(z, means, rho, logits):
    """One MultivariateNormal with a full covariance for every class."""
    eye = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
    normals = [
        torch.distributions.MultivariateNormal(mean, softplus(r) ** 2 * eye)
        for mean, r in zip(means, rho, strict=True)
    ]  # fmt: skip
    return torch.stack([normal.log_prob(z) for normal in normals], 1) + logits.softmax(0).log()


def expanded_mixture(z, means, rho, logits):
    """The closed form by a matrix product: |z - mu|^2 = |z|^2 - 2 z.mu + |mu|^2. Faster, and less exact."""
    sigma = softplus(rho)
    distance = z.square().sum(1, keepdim=True) - 2 * z @ means.t() + means.square().sum(1)
    offset = logits.log_softmax(0) - z.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi))
    return offset - 0.5 * distance / sigma.square()


def _couplings(values: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [values[i : i + 7] for i in range(0, len(values), 7)]


def published_head(x, means, rho, logits, *values):
    """Once for the labelled rows and once for the others, one to seven, as the published step calls it."""
    parts = [_published_head(rows, means, rho, logits, *values) for rows in x.tensor_split([len(x) // 8])]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _published_head(x, means, rho, logits, *values):
    """Every layer at the full width of the features, halves of which are masked out; the mixture once for the classes
    and once for the density."""
    features, logdet = x.shape[1], 0
    for j, (weight0, bias0, weight1, bias1, weight2, bias2, gain) in enumerate(_couplings(values)):
        kept = slice(features // 2, None) if j % 2 else slice(None, features // 2)
        changed = slice(None, features // 2) if j % 2 else slice(features // 2, None)
        mask = x.new_zeros(features)
        mask[kept] = 1
        first, last, shift, scale = (
            x.new_zeros(shape)
            for shape in ((len(bias0), features), (2, features, len(bias1)), (2, features), (features,))
        )
        first[:, kept], scale[changed] = weight0, gain
        last[:, changed], shift[:, changed] = weight2.view(2, len(gain), -1), bias2.view(2, -1)
        hidden = linear(linear(x * mask, first, bias0).relu(), weight1, bias1).relu()
        s, t = linear(hidden, last.flatten(0, 1), shift.flatten()).chunk(2, 1)
        s, t = scale * torch.tanh(s) * (1 - mask), t * (1 - mask)
        x = x * mask + ((x * (1 - mask) + t) * s.exp()) * (1 - mask)
        logdet = logdet + s.sum(1)
    log_prob = published_mixture(x, means, rho, logits).logsumexp(1) + logdet
    return x, logdet, published_mixture(x, means, rho, logits), log_prob


def closed_head(x, means, rho, logits, *values):
    mixture = lambda z, means, rho, logits, eps: expanded_mixture(z, means, rho, logits)  # noqa: E731
    return reference.compose_flow_head(reference.affine_coupling, mixture, x, _couplings(values), means, rho, logits)


def fused_head(x, means, rho, logits, *values):
    return ops.flow_head(x, _couplings(values), means, rho, logits)


# ---- the cases


def _providers(published, closed, ours, **more) -> dict:
    found = {"published": published, "closed": closed, "closed_compiled": torch.compile(closed, fullgraph=True)}
    for name, op in more.items():
        found |= {name: op, f"{name}_compiled": torch.compile(op, fullgraph=True)}
    return found | {"normatch": ours}


def _coupling(direction: str, n: int, h: int, dtype: torch.dtype) -> Case:
    inverse = direction == "inverse"
    providers = _providers(
        published_inverse if inverse else published_coupling,
        reference.affine_coupling_inverse if inverse else reference.affine_coupling,
        ops.affine_coupling_inverse if inverse else ops.affine_coupling,
    )

    def inputs(device):
        return [torch.randn(n, h, device=device).to(dtype) for _ in range(3)] + [torch.randn(h, device=device)]

    moved = n * h * BYTES[dtype] * (5 if direction == "backward" else 4)
    return Case("affine_coupling", direction, f"{n}x{h}", n * h, dtype, providers, inputs, moved, 45 * n * h)


def _coupling2d(direction: str, shape: tuple[int, ...], changed: str, dtype: torch.dtype, layout: str) -> Case:
    n, c, h, w = shape
    parts = c if changed == "even" else c // 2
    at = {"changed": changed}
    if direction == "inverse":
        providers = _providers(
            None,
            lambda y, params, gain: reference.coupling2d_inverse(y, params, gain, **at),
            lambda y, params, gain: ops.coupling2d_inverse(y, params, gain, **at),
        )
        del providers["published"]
    else:
        providers = _providers(
            lambda x, params, gain: published_coupling2d(x, params, gain, **at),
            lambda x, params, gain: reference.coupling2d(x, params, gain, **at),
            lambda x, params, gain: ops.coupling2d(x, params, gain, **at),
        )
    memory = torch.channels_last if layout == "channels-last" else torch.contiguous_format

    def inputs(device):
        images = [torch.randn(n, channels, h, w, device=device) for channels in (c, 2 * parts)]
        return [value.to(dtype, memory_format=memory) for value in images] + [torch.randn(parts, device=device)]

    pixels = n * h * w
    moved = BYTES[dtype] * pixels * (parts * (6 if direction == "backward" else 4) + 2 * (c - parts))
    name = f"{'x'.join(map(str, shape))} {'checkerboard' if changed == 'even' else 'channels'} {layout}"
    return Case("coupling2d", direction, name, pixels * c, dtype, providers, inputs, moved, 45 * pixels * c // 2)


def _logdet(n: int, m: int, dtype: torch.dtype) -> Case:
    providers = _providers(published_logdet, reference.logdet, ops.logdet)
    return Case(
        "logdet", "forward", f"{n}x{m}", n * m, dtype, providers,
        lambda device: [torch.randn(n, m, device=device).to(dtype)], n * m * BYTES[dtype], n * m,
    )  # fmt: skip


def _mixture(direction: str, n: int, k: int, d: int) -> Case:
    providers = _providers(published_mixture, reference.gmm_log_prob, ops.gmm_log_prob, expanded=expanded_mixture)
    if n * k * d > 1 << 26 or k > 10:
        del providers["published"]  # takes minutes
    read = 4 * (n * d + k * d + n * k)
    moved, flop = (read, 3 * n * k * d) if direction == "forward" else (3 * read, 10 * n * k * d)
    return Case(
        "gmm_log_prob", direction, f"N={n} K={k} D={d}", n * d, torch.float32, providers,
        lambda device: [torch.randn(shape, device=device) for shape in ((n, d), (k, d), (k,), (k,))], moved, flop,
    )  # fmt: skip


def _head(direction: str, n: int, d: int, k: int, depth: int) -> Case:
    from ..flows import FlowHead

    providers = _providers(published_head, closed_head, fused_head)
    if n > 512 or depth > 6 or d * k > 12800:
        del providers["published"]  # takes seconds a call
    head = FlowHead(d, k, couplings=depth)
    weights = [value.detach() for coupling in head.couplings for value in coupling.tensors()]
    prior = [value.detach() for value in head.prior_parameters()]
    count = sum(value.numel() for value in weights)
    moved, flop = 4 * (2 * n * d + n * k + 2 * n + count + k * d), n * (2 * count + 3 * k * d)
    factor = 3 if direction == "training" else 1
    return Case(
        "flow_head", direction, f"N={n} D={d} K={k} couplings={depth}", n * d, torch.float32, providers,
        lambda device: [torch.randn(n, d, device=device), *(value.to(device) for value in prior + weights)],
        factor * moved, factor * flop, few_rows=False,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    """Every op and direction, from what a head's step needs to what no cache holds; `quick`: the small ones alone."""
    rows = [512] if quick else [512, 8192, 65536]
    types = [torch.float32, torch.bfloat16]
    found = [
        _coupling(direction, n, 64 if n == 512 else 512, dtype)
        for direction in ("forward", "inverse", "backward") for n in rows for dtype in types
    ]  # fmt: skip
    images = [(64, 12, 16, 16)] if quick else [(64, 12, 16, 16), (512, 12, 32, 32)]
    for direction in ("forward", "inverse", "backward"):
        for shape in images:
            found += [_coupling2d(direction, shape, "first", dtype, "contiguous") for dtype in types]
            found += [_coupling2d(direction, shape, "first", torch.float32, "channels-last")]
            found += [_coupling2d(direction, shape, "even", torch.float32, "contiguous")]
        if not quick:
            found += [_coupling2d(direction, (8, 3, 256, 256), "even", torch.float32, "contiguous")]
    found += [_logdet(n, m, dtype) for n, m in [(512, 64), (2048, 3072), (16384, 3072)][: len(rows)] for dtype in types]
    sizes = [(512, 10, 128), (512, 100, 512), (8192, 10, 128), (65536, 10, 128)][: 2 if quick else 4]
    found += [_mixture(direction, *size) for direction in ("forward", "training") for size in sizes]
    heads = [(512, 128, 10, 6), (512, 128, 100, 6), (512, 512, 100, 6), (8192, 128, 10, 6), (512, 128, 10, 24)]
    heads = heads[: 1 if quick else 5]
    return found + [_head(direction, *size) for direction in ("forward", "training") for size in heads]


# ---- the command


def add_arguments(parser) -> None:
    parser.add_argument("--only", default="", help="cases whose name contains this, such as 'gmm_log_prob forward'")
    parser.add_argument("--quick", action="store_true", help="the small sizes alone")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements, of which the median counts (default: 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's versions out")
    parser.add_argument(
        "--out", type=Path, help="folder for kernels.json and kernels.png (default: nothing is written)"
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a kernels.json of this machine to compare with")
    parser.add_argument("--tolerance", type=float, default=15, help="loss that fails --compare, percent (default: 15)")


def run(options) -> int:
    """Prints the table; status 1 where --compare finds a loss."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"there is no device {device!r} here")
    if options.rounds < 1:
        raise UserError(f"rounds must be at least 1, not {options.rounds}")
    before = _load(options.compare) if options.compare else None
    chosen = [case for case in cases(options.quick) if options.only in case.name]
    if not chosen:
        raise UserError(f"no case's name contains {options.only!r}; one is {cases(True)[0].name!r}")
    fresh = copy_roof(device, fresh=True)
    if device == "cpu":
        keep_memory()
    roof = copy_roof(device)
    facts = machine(device)
    print(f"{facts['device']}, {facts['threads']} threads, PyTorch {facts['torch']}")
    print(f"copy: {roof / 1e9:.1f} GB/s; into memory new from the system: {fresh / 1e9:.1f} GB/s")
    print(_HEADER)
    records = []
    start = time.monotonic()
    for number, case in enumerate(chosen, 1):
        leave_out = [name for name in case.providers if options.no_compile and "compiled" in name]
        found = compare(case, device, options.rounds, leave_out)
        records += found
        ours = next(record["seconds"] for record in found if record["provider"] == "normatch")
        print(f"\n{case.name}  [{number} of {len(chosen)}, {time.monotonic() - start:.0f} s]")
        for record in found:
            record["speedup"] = record["seconds"] / ours
            print(_line(record), flush=True)
    result = {
        "machine": facts, "copy_gb_per_s": roof / 1e9, "copy_fresh_gb_per_s": fresh / 1e9, "records": records,
    }  # fmt: skip
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result, options.out / "kernels.png")
        print(f"\n{options.out / 'kernels.json'}, {options.out / 'kernels.png'}")
    return _compare(before, result, options.tolerance) if before else 0


_HEADER = (
    f"  {'provider':<20}{'ms':>10}{'GB/s':>9}{'% of copy':>11}{'GFLOP/s':>10}{'operations':>12}{'launches':>10}"
    f"{'ours is faster':>16}"
)


def _line(record: dict) -> str:
    count, launches = ("" if record[key] is None else record[key] for key in ("operations", "launches"))
    faster = "" if record["provider"] == "normatch" else f"{record['speedup']:.2f} x"
    return (
        f"  {record['provider']:<20}{1e3 * record['seconds']:>10.4f}{record['gb_per_s']:>9.2f}"
        f"{record['percent_of_copy']:>11.1f}{record['gflop_per_s']:>10.1f}{count:>12}{launches:>10}{faster:>16}"
    )


def _load(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        return {**found, "records": list(found["records"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no kernels.json: {error}") from error


def _compare(before: dict, now: dict, tolerance: float) -> int:
    """Times as shares of what the copy takes, which leaves out a machine that is slower as a whole today."""
    share = {(r["case"], r["provider"]): r["percent_of_copy"] for r in before["records"]}
    losses = 0
    print(f"\ncompared with {before['machine']['device']}, PyTorch {before['machine']['torch']}:")
    for record in now["records"]:
        old = share.get((record["case"], record["provider"]))
        if record["provider"] != "normatch" or old is None:
            continue
        change = 100 * (record["percent_of_copy"] / old - 1)
        lost = change < -tolerance
        losses += lost
        print(f"  {record['case']:<55}{old:>8.1f} % of copy -> {record['percent_of_copy']:>6.1f} ({change:+.0f} %)"
              f"{'  LOST' if lost else ''}")  # fmt: skip
    return 1 if losses else 0


def draw(result: dict, path: Path) -> None:
    """Size against time for every op and direction, with the time that the bytes alone take as the roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in result["records"] if r["dtype"] == "float32"] or result["records"]
    panels = list(dict.fromkeys((r["op"], r["direction"]) for r in records))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 4 * lines), squeeze=False, layout="constrained")
    colours = dict(zip(dict.fromkeys(r["provider"] for r in records), (f"C{i}" for i in range(10)), strict=False))
    colours["normatch"] = "#c1440e"
    labelled = {}
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = sorted((r for r in records if (r["op"], r["direction"]) == panel), key=lambda r: r["elements"])
        sizes = list(dict.fromkeys(r["size"] for r in own))  # one place each: some have the same number of elements
        for name, colour in colours.items():
            points = [(sizes.index(r["size"]), 1e3 * r["seconds"]) for r in own if r["provider"] == name]
            if points:
                (labelled[name],) = axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour,
                                              linewidth=2 if name == "normatch" else 1)  # fmt: skip
        roof = {sizes.index(r["size"]): r["bytes"] / result["copy_gb_per_s"] / 1e6 for r in own}
        (labelled["its bytes at copy speed"],) = axis.plot(list(roof), list(roof.values()), "k:")
        axis.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right", fontsize=7)
        axis.set(yscale="log", ylabel="ms", title=" ".join(panel))
        axis.grid(alpha=0.3, which="both")
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
