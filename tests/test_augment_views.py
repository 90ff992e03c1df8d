"""The native views: Pillow's own pixels, for every operation, level and sign, on any backend and any batch."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import DEVICES, with_kernels
from PIL import Image
from real_data import CIFAR10

from normatch import ops, reference
from normatch.augment.draws import View, draw_parameters
from normatch.augment.pillow import apply_op
from normatch.augment.policy import GEOMETRIC, OPS, POLICIES, encode_policy, op_values
from normatch.data import load_dataset
from normatch.data.philox import random_words

KEK, LEE, PAPER = POLICIES["kekmodel"], POLICIES["leedoyup"], POLICIES["fixmatch-paper"]
STRONG, WEAK = int(View.UNLABELED_STRONG), int(View.UNLABELED_WEAK)


@pytest.fixture(scope="module")
def real():
    """(500, 32, 32, 3): digits, and CIFAR-10's photographs where they are at hand."""
    images = [load_dataset("digits").train_x[:200]]
    if CIFAR10:
        images.append(load_dataset("cifar10", CIFAR10).train_x[:300])
    return torch.from_numpy(np.concatenate(images))


def draws_of(rows, visit=0, view=STRONG, samples=None):
    rows = torch.as_tensor(rows)
    samples = rows if samples is None else torch.as_tensor(samples)
    return torch.stack([rows, samples, torch.full_like(rows, visit), torch.full_like(rows, view)], 1)


def only(op, value, base=LEE):
    """A policy that does op with this value to every image and nothing else, in the middle of the padding."""
    ranges = {name: (0.0, 0.0) for name in base.ranges} | {op: (value, value)}
    return replace(
        base, ops=(op,), num_ops=1, ranges=ranges, levels=0, probability=1.0, random_sign=False, cutout_fraction=0.0,
        cutout_pixels=0, ops_first=True,
    )  # fmt: skip


def by_pillow(images, op, value):
    return np.stack([np.asarray(apply_op(Image.fromarray(x), op, float(np.float32(value)))) for x in images.numpy()])


def uncropped(images, policy, device="cpu", seed=0):
    """The strong views of `images`, each made often enough that one of its visits moves and mirrors nothing."""
    h, w = images.shape[1:3]
    count = len(images)
    found = torch.full((count,), -1)
    for start in range(0, 4096, 128):
        visits = torch.arange(start, start + 128).repeat(count)
        rows = torch.arange(count).repeat_interleave(128)
        p = draw_parameters(policy, seed, visits.numpy(), rows.numpy(), STRONG, h, w, strong=True, flip=False)
        still = torch.from_numpy((p.row == h // 8) & (p.col == w // 8)).view(count, 128)
        found = torch.where((found < 0) & still.any(1), start + still.int().argmax(1), found)
        if (found >= 0).all():
            break
    draws = draws_of(torch.arange(count))
    draws[:, 2] = found
    out = ops.augment_views(images.to(device), draws.to(device), policy, seed, dtype=torch.uint8, flip=False)
    return out.permute(0, 2, 3, 1).cpu().numpy()


def values_of(op):
    """Every level of kekmodel's, both signs, and the ends, the middle and odd places of the continuous range."""
    if op not in KEK.ranges:
        return [0.0]
    levels = op_values(KEK, 32, 32)[OPS.index(op)].tolist()
    lo, hi = LEE.ranges[op]
    size = 32 if op.startswith("Translate") else 1
    more = [lo * size, hi * size, (lo + 0.37 * (hi - lo)) * size, (lo + 0.871 * (hi - lo)) * size]
    signed = [s * v for v in levels for s in ((1, -1) if op in GEOMETRIC else (1,))]
    return signed + [v for v in more if op != "Posterize" or v <= 8]


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_every_operation_level_and_sign_gives_pillows_pixels(op, device, real):
    images = real[::20] if op in ("Rotate", "Sharpness", "Color", "Contrast") else real[::10]
    for value in values_of(op):
        pixels = value / 32 if op.startswith("Translate") else value
        policy = only(op, pixels)
        want = by_pillow(images, op, op_values(policy, 32, 32)[OPS.index(op), 0])
        got = uncropped(images, policy, device)
        assert np.array_equal(got, want), (op, value, np.abs(got.astype(int) - want).max())


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3), (7, 5), (17, 33), (28, 28), (96, 84)])
@pytest.mark.parametrize("contrast", [(0, 256), (90, 140), (77, 78)])
def test_operations_on_odd_sizes_and_flat_images(size, contrast, device):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(*contrast, (3, *size, 3), dtype=np.uint8))
    for op in OPS:
        for value in values_of(op)[:: 1 if size[0] < 20 else 4]:
            policy = only(op, value / 32 if op.startswith("Translate") else value)
            want = by_pillow(images, op, op_values(policy, *size)[OPS.index(op), 0])
            assert np.array_equal(uncropped(images, policy, device), want), (op, value)


@with_kernels
def test_recorded_images(golden):
    """The published code's own pixels, without a detour over our Pillow oracle."""
    data, checked = golden("randaugment"), 0
    for key, want in data.items():
        parts = key.split("/")
        if not key.startswith(("out/kek/", "out/kek_edge/", "out/lee/")) or parts[2] == "Cutout16":
            continue
        image = torch.from_numpy(data["in/image_edge" if parts[1] == "kek_edge" else "in/image"])[None]
        op = parts[2].removesuffix("_allv")
        if parts[1] == "lee":
            value = float(data[key.replace("out/", "in/")])
        else:
            sign = -1 if parts[-1] == "neg" else 1
            value = sign * float(op_values(KEK, 32, 32)[OPS.index(op), int(parts[3][1:]) - 1])
            value = value / 32 if op.startswith("Translate") else value
        assert np.array_equal(uncropped(image, only(op, value))[0], want), key
        checked += 1
    assert checked == 171


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POLICIES)
def test_whole_views_are_those_of_the_oracle(name, device, real):
    """Flip, crop, operations, cutout and order together, of all kinds, for many counters: not one level differs."""
    policy, rng = POLICIES[name], np.random.default_rng(1)
    n = 3000
    draws = np.stack(
        [rng.integers(0, len(real), n), rng.integers(0, 2**31, n), rng.integers(0, 2**20, n), rng.integers(0, 3, n)], 1
    )
    draws = torch.from_numpy(draws)
    for seed, flip in ((3, True), (2**63 + 5, False), (-1, True)):
        got = ops.augment_views(real.to(device), draws.to(device), policy, seed, dtype=torch.uint8, flip=flip).cpu()
        want = reference.augment_views(real, draws, policy, seed, dtype=torch.uint8, flip=flip)
        assert torch.equal(got, want)


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 24), (28, 28), (33, 31), (224, 200)])
def test_whole_views_of_any_size(size, device):
    images = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (6, *size, 3), dtype=np.uint8))
    n = 24 if size[0] > 100 else 200
    for policy in (KEK, LEE, PAPER, replace(KEK, padding="zero", num_ops=8, probability=1.0, flip=False)):
        for view in (WEAK, STRONG):
            draws = draws_of(torch.arange(n) % 6, view=view, samples=torch.arange(n))
            got = ops.augment_views(images.to(device), draws.to(device), policy, 1, dtype=torch.uint8).cpu()
            assert torch.equal(got, reference.augment_views(images, draws, policy, 1, dtype=torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(32, 32), (7, 5), (1, 1)])
def test_normalised_views_are_channels_last_and_equal_the_plain_formula(dtype, size, device):
    images = torch.randint(0, 256, (9, *size, 3), dtype=torch.uint8)
    draws, mean, std = draws_of(torch.arange(9)), (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    got = ops.augment_views(images.to(device), draws.to(device), KEK, 0, mean, std, dtype).cpu()
    assert got.dtype == dtype and got.shape == (9, 3, *size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, reference.augment_views(images, draws, KEK, 0, mean, std, dtype))
    levels = reference.augment_views(images, draws, KEK, 0, dtype=torch.uint8).double()
    exact = (levels / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_a_view_is_its_counters_alone(real):
    """Not the batch, its order, its size, the place in memory or the number of threads."""
    draws = draws_of(torch.arange(200))
    draws[::3, 3] = WEAK
    whole = ops.augment_views(real, draws, KEK, 7)
    order = torch.randperm(200)
    assert torch.equal(ops.augment_views(real, draws[order], KEK, 7), whole[order])
    assert torch.equal(ops.augment_views(real, draws[50:51], KEK, 7), whole[50:51])
    staged = draws.clone()
    staged[:, 0] = torch.arange(200).flip(0)
    assert torch.equal(ops.augment_views(real[:200].flip(0).contiguous(), staged, KEK, 7), whole)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(ops.augment_views(real, draws, KEK, 7), whole)
    finally:
        torch.set_num_threads(threads)
    for column in (1, 2, 3):  # and they do depend on each of its counters
        other = draws.clone()
        other[:, column] += 1
        assert not torch.equal(ops.augment_views(real, other, KEK, 7)[1], whole[1])
    assert not torch.equal(ops.augment_views(real, draws, KEK, 8)[1], whole[1])


def test_strided_images_and_draws(real):
    draws = draws_of(torch.arange(20))
    want = ops.augment_views(real[:40], draws * torch.tensor([2, 1, 1, 1]), KEK, 0)
    assert torch.equal(ops.augment_views(real[:40:2], draws, KEK, 0), want)
    planar = real[:40:2].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.cat([draws, draws], 1)[:, :4]
    assert torch.equal(ops.augment_views(planar, wide, KEK, 0), want)


def test_no_views():
    images = torch.zeros(0, 8, 8, 3, dtype=torch.uint8)
    out = ops.augment_views(images, torch.empty(0, 4, dtype=torch.int64), KEK, 0)
    assert out.shape == (0, 3, 8, 8)


@with_kernels
def test_opcheck():
    images, draws = torch.randint(0, 256, (4, 9, 8, 3), dtype=torch.uint8), draws_of(torch.arange(4))
    rules, values = encode_policy(KEK, 9, 8, True)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        arguments = (images, draws, 3, rules, values, [1.0] * 3, [0.0] * 3, dtype)
        torch.library.opcheck(torch.ops.normatch.augment_views.default, arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"images": np.zeros((2, 8, 8, 3))}, TypeError, "images must be a tensor"),
        ({"images": torch.zeros(2, 8, 8, 3)}, TypeError, "images must be torch.uint8, not torch.float32"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"images must have shape \(M, H, W, 3\)"),
        ({"images": torch.zeros(2, 8, 3, dtype=torch.uint8)}, ValueError, r"images must have shape"),
        ({"images": torch.zeros(2, 0, 8, 3, dtype=torch.uint8)}, ValueError, "sides of 1 to 2048, not 0 x 8"),
        ({"images": torch.zeros(1, 1, 2049, 3, dtype=torch.uint8)}, ValueError, "sides of 1 to 2048"),
        ({"draws": torch.zeros(2, 4)}, TypeError, "draws must be torch.int64"),
        ({"draws": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"draws must have shape \(N, 4\)"),
        ({"draws": torch.tensor([[2, 0, 0, 0]])}, ValueError, "names rows 2 to 2, but images has 2"),
        ({"draws": torch.tensor([[-1, 0, 0, 0]])}, ValueError, "names rows -1"),
        ({"policy": "kekmodel"}, TypeError, "policy must be a Policy"),
        ({"dtype": torch.float64}, TypeError, "dtype must be"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "draws": draws_of(torch.arange(2)), "policy": KEK}
    with pytest.raises(error, match=message):
        ops.augment_views(**{**given, "seed": 0, **change})


@with_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_views_are_the_same_on_every_machine(device):
    """By the CPU's kernel, the CUDA one and its emulation, whatever compiler made them: these bytes, once for all."""
    words = random_words(0, 0, np.arange(48), 0, 768).astype("<u4").view(np.uint8).reshape(48, 32, 32, 3)
    images = torch.from_numpy(words // 2 + np.arange(32, dtype=np.uint8)[:, None] * 3).to(device)
    digest = hashlib.sha256()
    for policy in (KEK, LEE, PAPER):
        for view in View:
            draws = draws_of(torch.arange(480) % 48, visit=5, view=int(view), samples=torch.arange(480))
            views = ops.augment_views(images, draws.to(device), policy, 11, dtype=torch.uint8)
            digest.update(views.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
    assert digest.hexdigest() == "159f490d86c2441bc00ce6d1ada23a0b68d1b83fbda697210ea96ffdb915ed73"
