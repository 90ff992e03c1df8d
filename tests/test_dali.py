"""DALI's views: Pillow's pixels for every operation that DALI lets us write, from the same counters, from any step."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from real_data import CIFAR10, ROOT

from normatch import reference
from normatch.augment.dali import Views, missing
from normatch.augment.draws import View
from normatch.augment.policy import OPS, POLICIES
from normatch.data import load_dataset, make_split, split_labels
from normatch.data.folders import FileImages
from normatch.errors import UserError
from normatch.training.loader import StepViews, choose_backend, make_batches

needs_dali = pytest.mark.skipif(missing() is not None, reason="DALI is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KEK, LEE = POLICIES["kekmodel"], POLICIES["leedoyup"]
EXACT = tuple(op for op in OPS if op != "Equalize")


@pytest.fixture(scope="module")
def images():
    photographs = load_dataset("cifar10", CIFAR10).train_x[:60] if CIFAR10 else np.empty((0, 32, 32, 3), np.uint8)
    return np.concatenate([load_dataset("digits").train_x[:40], photographs])


def draws_of(images, batches=1, view=View.UNLABELED_STRONG):
    rows = np.arange(len(images))
    return [np.stack([rows, rows, np.full_like(rows, visit), np.full_like(rows, view)], 1) for visit in range(batches)]


def both(images, policy, batches=2, view=View.UNLABELED_STRONG, seed=0, flip=True):
    draws = draws_of(images, batches, view)
    made = Views(images, policy, seed, len(images), draws, flip=flip, num_threads=2)
    for (rows, got), batch in zip(made, draws, strict=True):
        assert np.array_equal(rows, batch[:, 0])
        want = reference.augment_views(
            torch.from_numpy(images), torch.from_numpy(batch), policy, seed, dtype=torch.uint8, flip=flip
        )
        yield got, want


@needs_dali
@pytest.mark.parametrize("op", EXACT)
def test_an_operation_gives_pillows_pixels(op, images):
    for base in (KEK, LEE):
        policy = replace(base, ops=(op,), num_ops=1, probability=1.0)
        for got, want in both(images, policy, batches=3 if base is KEK else 2):
            assert torch.equal(got, want)


@needs_dali
def test_equalize_is_dalis_own():
    """The one exception. Pillow counts whole pixels a level, 3 or 4 for 1,024 of them, and so stretches further."""
    ramp = np.random.default_rng(0).normal(120, 40, (20, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    policy = replace(KEK, ops=("Equalize",), num_ops=1, probability=1.0, cutout_pixels=0)
    for got, want in both(ramp, policy, batches=1):
        difference = (got.int() - want.int()).abs().float()
        assert 0 < difference.mean() < 30
        order = got[0, 0].flatten().long() * 256 + want[0, 0].flatten()
        assert (order.sort().values % 256).diff().min() >= 0  # the same order of levels


@needs_dali
@pytest.mark.parametrize("policy", [KEK, LEE, POLICIES["fixmatch-paper"], POLICIES["weak"]])
@pytest.mark.parametrize("view", [View.UNLABELED_WEAK, View.UNLABELED_STRONG])
def test_whole_views(policy, view, images):
    for got, want in both(images, replace(policy, ops=EXACT), view=view, seed=9):
        assert torch.equal(got, want)
    for got, want in both(images[:5], replace(policy, ops=EXACT), batches=1, view=view, flip=False):
        assert torch.equal(got, want)


@needs_dali
@pytest.mark.parametrize("size", [(28, 28), (7, 5), (33, 48), (2, 9)])
def test_odd_sizes(size):
    odd = np.random.default_rng(0).integers(0, 256, (40, *size, 3), dtype=np.uint8)
    for policy in (KEK, LEE):
        for got, want in both(odd, replace(policy, ops=EXACT), batches=1):
            assert torch.equal(got, want)


@needs_dali
def test_batches_are_those_of_the_other_backends_from_any_step():
    digits = load_dataset("digits")
    split = split_labels(digits.train_labels, 40, 10, seed=0)
    steps = StepViews(digits, split, "kekmodel", 0, 4, 3)
    steps.policy = replace(steps.policy, ops=EXACT)
    want = list(make_batches(steps, 0, 6, "pil"))
    for start in (0, 4):
        batches = make_batches(steps, start, 6, "dali")
        got = list(batches)  # held all at once: each has memory of its own
        assert batches.backend == "dali" and len(got) == 6 - start
        for batch, expected in zip(got, want[start:], strict=True):
            assert batch["images"].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(batch["images"], expected["images"], rtol=0, atol=2e-6)
            assert all(torch.equal(batch[key], expected[key]) for key in ("y", "u_y", "u_index"))


@needs_dali
def test_encoded_files_are_decoded_and_resized(tmp_path, golden):
    """Decoding gives Pillow's levels; resizing rounds otherwise, which is at most three levels of 255."""
    photographs = golden("randaugment")["in/image"]
    orientation = Image.Exif()
    orientation[0x0112] = 6
    kinds = [
        ("a.png", (32, 32), "RGB", {}), ("b.jpg", (32, 32), "RGB", {"quality": 90}), ("c.png", (32, 32), "P", {}),
        ("d.png", (32, 32), "L", {}), ("e.jpg", (32, 32), "CMYK", {}),
        ("f.jpg", (32, 32), "RGB", {"exif": orientation}), ("g.png", (64, 48), "RGB", {}),
        ("h.jpg", (20, 91), "RGB", {}), ("i.webp", (33, 32), "RGB", {}),
    ]  # fmt: skip
    for name, size, mode, options in kinds:
        Image.fromarray(photographs).resize(size).convert(mode).save(tmp_path / name, **options)
    files = FileImages(sorted(tmp_path.iterdir()), 32)
    rows = np.arange(len(kinds))
    draws = [np.stack([rows, rows, 0 * rows, 0 * rows + int(View.UNLABELED_WEAK)], 1)]
    ((got_rows, got),) = Views(files, KEK, 0, len(rows), draws)
    want = reference.augment_views(torch.from_numpy(files[:]), torch.from_numpy(draws[0]), KEK, 0, dtype=torch.uint8)
    assert got_rows.tolist() == rows.tolist()
    apart = (got.int() - want.int()).abs().amax((1, 2, 3))
    assert (apart[:6] == 0).all() and apart[6:].max() <= 3


@needs_dali
def test_batches_from_files_and_a_file_that_dali_cannot_decode(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        place = tmp_path / ("unlabeled" if i >= 8 else f"{'train' if i < 6 else 'test'}/{'ab'[i % 2]}")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")

    def batches(start, stop):
        data = load_dataset("folder", tmp_path, in_memory=False)
        steps = StepViews(data, make_split(data, 4, 0), "weak", 0, 2, 3)
        return list(make_batches(steps, start, stop, "dali")), list(make_batches(steps, start, stop, "pil"))

    for start in (0, 3):
        for got, want in zip(*batches(start, 5), strict=True):
            torch.testing.assert_close(got["images"], want["images"], rtol=0, atol=2e-6)
            assert torch.equal(got["u_index"], want["u_index"])
    (tmp_path / "unlabeled" / "9.png").unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "unlabeled" / "9.gif")
    with pytest.raises(UserError, match=r"DALI cannot decode .*9\.gif: take another augment_backend"):
        batches(0, 5)
    files = FileImages([tmp_path / "unlabeled" / "8.png", tmp_path / "none.png"], 32)
    with pytest.raises(UserError, match=r"none\.png cannot be read any more"):
        list(Views(files, KEK, 0, 1, [np.array([[1, 1, 0, int(View.UNLABELED_WEAK)]])]))


def test_without_dali_everything_else_works():
    code = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'nvidia.dali' else find(name, *a)\n"
        "from normatch.training.loader import choose_backend\n"
        "from normatch.errors import UserError\n"
        "print(choose_backend('auto', 'cpu')[0])\n"
        "try: choose_backend('dali', 'cpu')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    first, second = done.stdout.strip().splitlines()
    assert first in ("native", "pil") and "pip install nvidia-dali-cuda" in second, done.stderr


@pytest.mark.skipif(missing() is None, reason="DALI is installed")
def test_asking_for_it_says_how_to_get_it():
    with pytest.raises(UserError, match="pip install nvidia-dali"):
        choose_backend("dali", "cpu")


@needs_dali
@pytest.mark.gpu
def test_on_the_gpu(images):
    policy = replace(KEK, ops=EXACT)
    (draws,) = draws_of(images)
    ((_, got),) = Views(images, policy, 0, len(images), [draws], device="cuda")
    want = reference.augment_views(torch.from_numpy(images), torch.from_numpy(draws), policy, 0, dtype=torch.uint8)
    assert got.is_cuda
    differs = (got.cpu().int() - want.int()).abs()
    assert differs.max() <= 1 or (differs > 1).float().mean() < 1e-3  # fused multiply-add; nearest pixels at ties
