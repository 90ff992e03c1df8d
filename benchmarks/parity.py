"""Fills in the parity tables of docs/augmentation.md: `python benchmarks/parity.py [DATA_DIR]`.

Compares every available backend with Pillow, per operation: at all nine levels and both signs of kekmodel's policy and
at values from all of leedoyup's ranges, on digits, on photographs of CIFAR-10 if DATA_DIR holds them, and on noise of
odd sizes. A cell says "identical" or how far the levels of 0 to 255 are apart. Two more tables show what DALI makes of
encoded files, and how the levels are distributed after its Equalize, the one operation with an algorithm of its own.
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
from PIL import Image

from normatch import ops
from normatch.augment.dali import missing
from normatch.augment.draws import View
from normatch.augment.policy import OPS, POLICIES
from normatch.data import load_dataset
from normatch.data.folders import FileImages
from normatch.tools.contact_sheet import views_of
from normatch.tools.tables import markdown

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "augmentation.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
DRAWS = 500


def image_sets(data_dir: str | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sets = {"digits": load_dataset("digits").train_x[:150]}
    if data_dir:
        sets["CIFAR-10"] = load_dataset("cifar10", data_dir).train_x[:300]
    for size in ((7, 5), (33, 31), (96, 84)):
        sets[f"noise {size[0]}x{size[1]}"] = rng.integers(0, 256, (20, *size, 3), dtype=np.uint8)
    return sets


def make_draws(rows, samples, view: View) -> np.ndarray:
    """(N,), (N,) -> (N, 4) int64: first visits of these samples, for `ops.augment_views`."""
    return np.stack([rows, samples, 0 * rows, 0 * rows + int(view)], 1)


def measure(backend: str, device: str, data_dir: str | None) -> dict[str, str]:
    """operation or policy -> its cell in the table."""
    parts = {"cutout_pixels": 0, "cutout_fraction": 0.0}
    bases = [POLICIES["kekmodel"], POLICIES["leedoyup"]]
    policies = {op: [replace(base, ops=(op,), num_ops=1, probability=1.0, **parts) for base in bases] for op in OPS}
    policies |= {name: [policy] for name, policy in POLICIES.items()}
    cells = {}
    for name, variants in policies.items():
        differences = []
        for images in image_sets(data_dir).values():
            samples = np.arange(DRAWS if images.shape[1] <= 33 else DRAWS // 10)
            draws = make_draws(samples % len(images), samples, View.UNLABELED_STRONG)
            for policy in variants:
                differences.append(difference(images, draws, policy, backend, device))
        cells[name] = cell(differences)
    return cells


def difference(images, draws, policy, backend: str, device: str = "cpu", flip: bool = True) -> torch.Tensor:
    """(M, H, W, 3), (N, 4) -> (N * 3 * H * W,): by how many levels a backend's views differ from Pillow's."""
    want = views_of(images[:], draws, policy, 0, "pil", flip)
    return (views_of(images, draws, policy, 0, backend, flip, device).int() - want.int()).abs().flatten()


def cell(differences: list[torch.Tensor]) -> str:
    worst, total = max(int(d.max()) for d in differences), sum(float(d.sum()) for d in differences)
    count, differing = sum(d.numel() for d in differences), sum(int((d > 0).sum()) for d in differences)
    share = f"{100 * differing / count:.2g} % of levels differ, by {total / max(differing, 1):.1f} on average"
    return "identical" if worst == 0 else f"{share}, {worst} at most"


def decoded(images: np.ndarray) -> str:
    """A table of files of 32x32 and other sizes: DALI's decoder and resizing against Pillow's."""
    kinds = {"PNG": {}, "JPEG, 4:2:0": {"quality": 90}, "JPEG, 4:4:4": {"quality": 90, "subsampling": 0}, "WebP": {}}
    table, rows = [], np.arange(64)
    draws = make_draws(rows, rows, View.UNLABELED_WEAK)
    for kind, options in kinds.items():
        cells = []
        for size in ((32, 32), (96, 80), (24, 20)):
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder, f"{row}.{kind.split(',')[0].lower()}") for row in rows]
                for row, path in zip(rows, paths, strict=True):
                    Image.fromarray(images[row]).resize(size, Image.Resampling.BICUBIC).save(path, **options)
                cells.append(cell([difference(FileImages(paths, 32), draws, POLICIES["weak"], "dali")]))
        table.append((kind, *cells))
    return markdown(("files", "32x32, as they are", "96x80 to 32x32", "24x20 to 32x32"), table)


def equalized(images: np.ndarray) -> str:
    """A table of the levels after Equalize of 50,000 draws, by Pillow and by DALI."""
    policy = replace(POLICIES["kekmodel"], ops=("Equalize",), num_ops=1, probability=1.0, cutout_pixels=0)
    table, levels = [], np.arange(256)
    for name, backend in (("Pillow", "pil"), ("DALI", "dali")):
        count = np.zeros(256)
        for start in range(0, 50_000, 1000):
            samples = np.arange(start, start + 1000)
            draws = make_draws(samples % len(images), samples, View.UNLABELED_STRONG)
            views = views_of(images, draws, policy, 0, backend, True)
            count += torch.bincount(views.flatten().int(), minlength=256).numpy()
        share = count / count.sum()
        mean = share @ levels
        quartiles = np.searchsorted(share.cumsum(), (0.25, 0.5, 0.75))
        spread = np.sqrt(share @ (levels - mean) ** 2)
        table.append((name, f"{mean:.1f}", f"{spread:.1f}", ", ".join(map(str, quartiles)),
                      f"{100 * share[:16].sum():.1f} %", f"{100 * share[255]:.1f} %"))  # fmt: skip
    return markdown(("", "mean", "std", "quartiles", "below 16", "255"), table)


def columns():
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


def measure_apart(backend: str, device: str, library: str, data_dir: str | None) -> dict[str, str]:
    """`measure` in a process of its own, which loads this library of kernels."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--cells", backend, device, *([data_dir] if data_dir else [])],
        env={**os.environ, "NORMATCH_LIB": library, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{backend}, {device}, {library}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    if sys.argv[1:2] == ["--cells"]:
        print(json.dumps(measure(*sys.argv[2:4], sys.argv[4] if len(sys.argv) > 4 else None)))
        return
    data_dir = sys.argv[1] if len(sys.argv) > 1 else None
    cells = {title: measure_apart(*where, data_dir) for title, where in columns()}
    rows = [
        (name if name in OPS else f"whole views, `{name}`", *(cells[title][name] for title in cells))
        for name in (*OPS, *POLICIES)
    ]
    sets = image_sets(data_dir)
    text = f"Against Pillow {PIL.__version__}, on {', '.join(sets)}:\n\n{markdown(('operation', *cells), rows)}"
    if "DALI, CPU" in cells:
        images = sets["CIFAR-10" if data_dir else "digits"]
        text += f"\nFiles that DALI decodes and resizes (`in_memory: false`):\n\n{decoded(images)}"
        text += f"\nLevels after Equalize, over 50,000 draws:\n\n{equalized(images)}"
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    main()
