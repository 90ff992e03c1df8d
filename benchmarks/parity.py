"""Fills in the parity tables of docs/augmentation.md: `python benchmarks/parity.py [DATA_DIR]`.

Every operation, at all nine levels and both signs of kekmodel's policy and at values all over leedoyup's ranges, by
every backend that is at hand, against Pillow: on digits, on photographs of CIFAR-10 where DATA_DIR holds them, and on
noise of odd sizes. A cell says "identical" or how far the levels of 0 to 255 are apart. Two more tables say what DALI
makes of encoded files, and how the levels are distributed after its Equalize, the one operation that is its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "augmentation.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
DRAWS = 500


def image_sets(data_dir: str | None) -> dict[str, np.ndarray]:
    from normatch.data import load_dataset

    rng = np.random.default_rng(0)
    sets = {"digits": load_dataset("digits").train_x[:150]}
    if data_dir:
        sets["CIFAR-10"] = load_dataset("cifar10", data_dir).train_x[:300]
    for size in ((7, 5), (33, 31), (96, 84)):
        sets[f"noise {size[0]}x{size[1]}"] = rng.integers(0, 256, (20, *size, 3), dtype=np.uint8)
    return sets


def measure(backend: str, device: str, data_dir: str | None) -> dict[str, str]:
    """operation -> what the table says of it."""
    from normatch import reference
    from normatch.augment.draws import View
    from normatch.augment.policy import OPS, POLICIES
    from normatch.bench.views import views_of

    cells = {}
    everything = [*((op,) for op in OPS), *POLICIES]
    for what in everything:
        worst, total, count, differing = 0, 0.0, 0, 0
        for images in image_sets(data_dir).values():
            bases = [POLICIES[what]] if isinstance(what, str) else [POLICIES["kekmodel"], POLICIES["leedoyup"]]
            for base in bases:
                policy = base
                if not isinstance(what, str):
                    policy = replace(base, ops=what, num_ops=1, probability=1.0, cutout_pixels=0, cutout_fraction=0.0)
                number = DRAWS if images.shape[1] <= 33 else DRAWS // 10
                rows = np.arange(number) % len(images)
                draws = np.stack([rows, np.arange(number), 0 * rows, 0 * rows + int(View.UNLABELED_STRONG)], 1)
                want = reference.augment_views(
                    torch.from_numpy(images), torch.from_numpy(draws), policy, 0, dtype=torch.uint8
                )
                got = views_of(images, draws, policy, 0, backend, True, device)
                apart = (got.int() - want.int()).abs()
                worst = max(worst, int(apart.max()))
                total, count = total + float(apart.sum()), count + apart.numel()
                differing += int((apart > 0).sum())
        cells[what if isinstance(what, str) else what[0]] = cell(worst, total, count, differing)
    return cells


def cell(worst: int, total: float, count: int, differing: int) -> str:
    share = f"{100 * differing / count:.2g} % of levels differ, by {total / max(differing, 1):.1f} on average"
    return "identical" if worst == 0 else f"{share}, {worst} at most"


def decoded(images: np.ndarray) -> list[str]:
    """A table of files of 32x32 and other sizes: DALI's decoder and resizing against Pillow's."""
    from PIL import Image

    from normatch.augment.draws import View
    from normatch.augment.policy import POLICIES
    from normatch.bench.views import views_of
    from normatch.data.folders import FileImages

    kinds = {"PNG": {}, "JPEG, 4:2:0": {"quality": 90}, "JPEG, 4:4:4": {"quality": 90, "subsampling": 0}, "WebP": {}}
    lines = ["| files | 32x32, as they are | 96x80 to 32x32 | 24x20 to 32x32 |", "| --- | --- | --- | --- |"]
    rows = np.arange(64)
    draws = np.stack([rows, rows, 0 * rows, 0 * rows + int(View.UNLABELED_WEAK)], 1)
    for kind, options in kinds.items():
        cells = []
        for size in ((32, 32), (96, 80), (24, 20)):
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder, f"{row}.{kind.split(',')[0].lower()}") for row in rows]
                for row, path in zip(rows, paths, strict=True):
                    Image.fromarray(images[row]).resize(size, Image.Resampling.BICUBIC).save(path, **options)
                files = FileImages(paths, 32)
                got = views_of(files, draws, POLICIES["weak"], 0, "dali", True).int()
                apart = (got - views_of(files[:], draws, POLICIES["weak"], 0, "pil", True).int()).abs()
            cells.append(cell(int(apart.max()), float(apart.sum()), apart.numel(), int((apart > 0).sum())))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def equalized(images: np.ndarray) -> list[str]:
    """A table of the levels after Equalize of 50,000 draws, by Pillow and by DALI."""
    from normatch.augment.draws import View
    from normatch.augment.policy import POLICIES
    from normatch.bench.views import views_of

    policy = replace(POLICIES["kekmodel"], ops=("Equalize",), num_ops=1, probability=1.0, cutout_pixels=0)
    counts = {"Pillow": np.zeros(256), "DALI": np.zeros(256)}
    for start in range(0, 50_000, 1000):
        samples = np.arange(start, start + 1000)
        draws = np.stack([samples % len(images), samples, 0 * samples, 0 * samples + int(View.UNLABELED_STRONG)], 1)
        for name, backend in (("Pillow", "pil"), ("DALI", "dali")):
            views = views_of(images, draws, policy, 0, backend, True)
            counts[name] += torch.bincount(views.flatten().int(), minlength=256).numpy()
    lines = ["| | mean | std | quartiles | below 16 | 255 |", "| --- | --- | --- | --- | --- | --- |"]
    levels = np.arange(256)
    for name, count in counts.items():
        share = count / count.sum()
        mean = share @ levels
        quartiles = np.searchsorted(share.cumsum(), (0.25, 0.5, 0.75))
        lines.append(
            f"| {name} | {mean:.1f} | {np.sqrt(share @ (levels - mean) ** 2):.1f} | {', '.join(map(str, quartiles))} | "
            f"{100 * share[:16].sum():.1f} % | {100 * share[255]:.1f} % |"
        )
    return lines


def columns(data_dir: str | None):
    from normatch import ops
    from normatch.augment.dali import missing

    kernels = ops.kernels()["augment_views"]
    if "cpu" in kernels:
        yield "native, CPU", ("native", "cpu", "default")
    if list((ROOT / "normatch").glob("_C_emulated*")):
        yield "native, CUDA emulated", ("native", "cpu", "emulated")
    if "cuda" in kernels and torch.cuda.is_available():
        yield "native, CUDA", ("native", "cuda", "default")
    if not missing():
        yield "DALI, CPU", ("dali", "cpu", "default")
        if torch.cuda.is_available():
            yield "DALI, GPU", ("dali", "cuda", "default")


def main() -> int:
    if sys.argv[1:2] == ["--cells"]:
        print(json.dumps(measure(*sys.argv[2:4], sys.argv[4] if len(sys.argv) > 4 else None)))
        return 0
    data_dir = sys.argv[1] if len(sys.argv) > 1 else None
    table = {}
    for title, (backend, device, library) in columns(data_dir):
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--cells",
            backend,
            device,
            *([data_dir] if data_dir else []),
        ]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, env={**os.environ, "NORMATCH_LIB": library, "PYTHONPATH": path}, capture_output=True, text=True
        )
        if done.returncode:
            print(f"{title}: {done.stderr[-2000:]}", file=sys.stderr)
            return 1
        table[title] = json.loads(done.stdout.strip().splitlines()[-1])
    titles = list(table)
    rows = next(iter(table.values()))
    lines = ["| operation | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for name in rows:
        label = name if name[0].isupper() else f"whole views, `{name}`"
        lines.append(f"| {label} | " + " | ".join(table[title][name] for title in titles) + " |")
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    sets = ", ".join(image_sets(data_dir))
    lines = [f"Against Pillow {PIL.__version__}, on {sets}:", "", *lines]
    if "DALI, CPU" in table:
        images = image_sets(data_dir)["CIFAR-10" if data_dir else "digits"]
        lines += ["", "Files that DALI decodes and resizes (`in_memory: false`):", "", *decoded(images)]
        lines += ["", "Levels after Equalize, over 50,000 draws:", "", *equalized(images)]
    PAGE.write_text(before + "\n".join([BEGIN, *lines, END]) + after)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
