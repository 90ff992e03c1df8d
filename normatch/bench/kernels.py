"""`normatch bench kernels`: every op beside the published formulation and the closed form in plain PyTorch.

`bench.rivals` has the published formulations; the closed form, eager and compiled, is the fair rival. Where an op is
followed by a loss, its backward pass gets that loss's gradients: the posteriors of a mixture in many dimensions are
partly subnormal numbers, which CPUs compute slowly, and random gradients hide that.

On the CPU the process keeps the memory it frees (`measure.keep_memory`), for every provider alike: newly mapped pages
cost several times a kernel's own time. The header reports a copy into existing memory, the roof, and one into new
memory. "% of copy" refers to a large copy that takes turns with the case's providers, because the memory bandwidth of a
shared machine varies.
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import ops, reference
from ..errors import UserError
from ..methods import distributed
from ..tools.plot import new_figure
from ..tools.tables import write_json
from . import rivals
from .measure import Case, compare, copy_roof, keep_memory, machine

# ---- the cases


def _providers(closed, ours, published=None, **more) -> dict:
    providers = {"published": published} if published else {}
    for name, op in {"closed": closed, **more}.items():
        providers |= {name: op, f"{name}_compiled": torch.compile(op, fullgraph=True)}
    return providers | {"normatch": ours}


def mixture_loss(class_log_prob: Tensor) -> Tensor:
    """(N, K) -> (): cross-entropy of random labels."""
    rows, classes = class_log_prob.shape
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    return cross_entropy(class_log_prob, labels.to(class_log_prob.device))


def head_loss(z: Tensor, logdet: Tensor, class_log_prob: Tensor, log_prob: Tensor) -> Tensor:
    """A flow head's outputs -> (): cross-entropy of random labels, and the negative log-likelihood."""
    return mixture_loss(class_log_prob) - log_prob.mean()


def fused_head(x, means, rho, logits, *values):
    return ops.flow_head(x, rivals.split_couplings(values), means, rho, logits)


def _coupling(direction: str, n: int, h: int, dtype: torch.dtype) -> Case:
    inverse = direction == "inverse"
    providers = _providers(
        reference.affine_coupling_inverse if inverse else reference.affine_coupling,
        ops.affine_coupling_inverse if inverse else ops.affine_coupling,
        rivals.published_inverse if inverse else rivals.published_coupling,
    )

    def inputs(device):
        return [torch.randn(n, h, device=device).to(dtype) for _ in range(3)] + [torch.randn(h, device=device)]

    moved = n * h * dtype.itemsize * (5 if direction == "backward" else 4)
    return Case("affine_coupling", direction, f"{n}x{h}", n * h, dtype, providers, inputs, moved, 45 * n * h)


def _coupling2d(direction: str, shape: tuple[int, ...], changed: str, dtype: torch.dtype, layout: str) -> Case:
    n, c, h, w = shape
    parts = c if changed == "even" else c // 2
    closed, ours, published = reference.coupling2d, ops.coupling2d, rivals.published_coupling2d
    if direction == "inverse":
        closed, ours, published = reference.coupling2d_inverse, ops.coupling2d_inverse, None

    def on_part(op):
        return op and (lambda x, params, gain: op(x, params, gain, changed=changed))

    providers = _providers(on_part(closed), on_part(ours), on_part(published))
    memory = torch.channels_last if layout == "channels-last" else torch.contiguous_format

    def inputs(device):
        images = [torch.randn(n, channels, h, w, device=device) for channels in (c, 2 * parts)]
        return [value.to(dtype, memory_format=memory) for value in images] + [torch.randn(parts, device=device)]

    pixels = n * h * w
    moved = dtype.itemsize * pixels * (parts * (6 if direction == "backward" else 4) + 2 * (c - parts))
    name = f"{'x'.join(map(str, shape))} {'checkerboard' if changed == 'even' else 'channels'} {layout}"
    return Case("coupling2d", direction, name, pixels * c, dtype, providers, inputs, moved, 45 * pixels * c // 2)


def _logdet(n: int, m: int, dtype: torch.dtype) -> Case:
    return Case(
        "logdet", "forward", f"{n}x{m}", n * m, dtype,
        _providers(reference.logdet, ops.logdet, rivals.published_logdet),
        lambda device: [torch.randn(n, m, device=device).to(dtype)], n * m * dtype.itemsize, n * m,
    )  # fmt: skip


def _mixture(direction: str, n: int, k: int, d: int) -> Case:
    minutes = n * k * d > 1 << 26 or k > 10
    published = None if minutes else rivals.published_mixture
    providers = _providers(reference.gmm_log_prob, ops.gmm_log_prob, published, expanded=rivals.expanded_mixture)
    read = 4 * (n * d + k * d + n * k)
    moved, flop = (read, 3 * n * k * d) if direction == "forward" else (3 * read, 10 * n * k * d)
    return Case(
        "gmm_log_prob", direction, f"N={n} K={k} D={d}", n * d, torch.float32, providers,
        lambda device: [torch.randn(shape, device=device) for shape in ((n, d), (k, d), (k,), (k,))], moved, flop,
        loss=mixture_loss,
    )  # fmt: skip


def _head(direction: str, n: int, d: int, k: int, depth: int) -> Case:
    from ..flows import FlowHead

    seconds_a_call = n > 512 or depth > 6 or d * k > 12800
    providers = _providers(rivals.closed_head, fused_head, None if seconds_a_call else rivals.published_head)
    head = FlowHead(d, k, couplings=depth)
    weights = [value.detach() for coupling in head.couplings for value in coupling.tensors()]
    prior = [value.detach() for value in head.prior_parameters()]
    count = sum(value.numel() for value in weights)
    moved, flop = 4 * (2 * n * d + n * k + 2 * n + count + k * d), n * (2 * count + 3 * k * d)
    factor = 3 if direction == "training" else 1
    return Case(
        "flow_head", direction, f"N={n} D={d} K={k} couplings={depth}", n * d, torch.float32, providers,
        lambda device: [torch.randn(n, d, device=device), *(value.to(device) for value in prior + weights)],
        factor * moved, factor * flop, few_rows=False, loss=head_loss,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    """Every op and direction, from the sizes of a head's step to more than any cache holds; `quick`: the small ones."""
    rows = [512] if quick else [512, 8192, 65536]
    types = [torch.float32, torch.bfloat16]
    chosen = [
        _coupling(direction, n, 64 if n == 512 else 512, dtype)
        for direction in ("forward", "inverse", "backward") for n in rows for dtype in types
    ]  # fmt: skip
    images = [(64, 12, 16, 16)] if quick else [(64, 12, 16, 16), (512, 12, 32, 32)]
    for direction in ("forward", "inverse", "backward"):
        for shape in images:
            chosen += [_coupling2d(direction, shape, "first", dtype, "contiguous") for dtype in types]
            chosen += [_coupling2d(direction, shape, "first", torch.float32, "channels-last")]
            chosen += [_coupling2d(direction, shape, "even", torch.float32, "contiguous")]
        if not quick:
            chosen += [_coupling2d(direction, (8, 3, 256, 256), "even", torch.float32, "contiguous")]
    sizes = [(512, 64), (2048, 3072), (16384, 3072)][: len(rows)]
    chosen += [_logdet(n, m, dtype) for n, m in sizes for dtype in types]
    sizes = [(512, 10, 128), (512, 100, 512), (8192, 10, 128), (65536, 10, 128)][: 2 if quick else 4]
    chosen += [_mixture(direction, *size) for direction in ("forward", "training") for size in sizes]
    heads = [(512, 128, 10, 6), (512, 128, 100, 6), (512, 512, 100, 6), (8192, 128, 10, 6), (512, 128, 10, 24)]
    heads = heads[: 1 if quick else 5]
    return chosen + [_head(direction, *size) for direction in ("forward", "training") for size in heads]


# ---- the command


def add_arguments(parser) -> None:
    parser.add_argument("--only", default="", help="cases whose name contains this, such as 'gmm_log_prob forward'")
    parser.add_argument("--quick", action="store_true", help="only the small sizes")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements; their median counts (default: 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile versions")
    parser.add_argument(
        "--out", type=Path, help="folder for kernels.json and kernels.png (default: nothing is written)"
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a kernels.json of this machine to compare with")
    parser.add_argument("--tolerance", type=float, default=15, help="loss that fails --compare, percent (default: 15)")


def run(options) -> int:
    """Prints the table; status 1 if --compare finds a loss."""
    device = distributed.start(options.device or "auto").type
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
    result = {"machine": facts, "copy_gb_per_s": roof / 1e9, "copy_fresh_gb_per_s": fresh / 1e9, "records": []}
    start = time.monotonic()
    for number, case in enumerate(chosen, 1):
        leave_out = [name for name in case.providers if options.no_compile and "compiled" in name]
        records = compare(case, device, options.rounds, leave_out)
        result["records"] += records
        ours = next(record["seconds"] for record in records if record["provider"] == "normatch")
        print(f"\n{case.name}  [{number} of {len(chosen)}, {time.monotonic() - start:.0f} s]")
        for record in records:
            record["speedup"] = record["seconds"] / ours
            print(_line(record), flush=True)
    if options.out:
        write_json(options.out / "kernels.json", result)
        draw(result, options.out / "kernels.png")
        print(f"\n{options.out / 'kernels.json'}, {options.out / 'kernels.png'}")
    return _compare(before, result, options.tolerance) if before else 0


_ROW = "  {:<20}{:>10}{:>9}{:>11}{:>10}{:>12}{:>10}{:>16}"
_HEADER = _ROW.format(
    "provider", "ms", "GB/s", "% of copy", "GFLOP/s", "operations", "launches", "ours is faster"
)  # fmt: skip


def _line(r: dict) -> str:
    counts = ("" if r[key] is None else r[key] for key in ("operations", "launches"))
    rates = (
        f"{1e3 * r['seconds']:.4f}",
        f"{r['gb_per_s']:.2f}",
        f"{r['percent_of_copy']:.1f}",
        f"{r['gflop_per_s']:.1f}",
    )
    return _ROW.format(r["provider"], *rates, *counts, "" if r["provider"] == "normatch" else f"{r['speedup']:.2f} x")


def _load(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text())
        return {**stored, "records": list(stored["records"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no kernels.json: {error}") from error


def _compare(before: dict, now: dict, tolerance: float) -> int:
    """Compares shares of the copy's speed, so that a machine that is slower as a whole today does not count."""
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
    """Time against size for every op and direction; the roof is the time to copy the bytes that must move."""
    records = [r for r in result["records"] if r["dtype"] == "float32"] or result["records"]
    panels = list(dict.fromkeys((r["op"], r["direction"]) for r in records))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = new_figure(lines, columns, (4.4 * columns, 4 * lines))
    colors = dict(zip(dict.fromkeys(r["provider"] for r in records), (f"C{i}" for i in range(10)), strict=False))
    colors["normatch"] = "#c1440e"
    labeled = {}
    for axis in grid[len(panels) :]:
        axis.remove()
    for axis, panel in zip(grid, panels, strict=False):
        shown = sorted((r for r in records if (r["op"], r["direction"]) == panel), key=lambda r: r["elements"])
        sizes = list(dict.fromkeys(r["size"] for r in shown))  # a tick each, as some sizes have equally many elements
        for name, color in colors.items():
            points = [(sizes.index(r["size"]), 1e3 * r["seconds"]) for r in shown if r["provider"] == name]
            if points:
                (labeled[name],) = axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color,
                                             linewidth=2 if name == "normatch" else 1)  # fmt: skip
        roof = {sizes.index(r["size"]): r["bytes"] / result["copy_gb_per_s"] / 1e6 for r in shown}
        (labeled["its bytes at copy speed"],) = axis.plot(list(roof), list(roof.values()), "k:")
        axis.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right", fontsize=7)
        axis.set(yscale="log", ylabel="ms", title=" ".join(panel))
        axis.grid(alpha=0.3, which="both")
    figure.legend(labeled.values(), labeled.keys(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
