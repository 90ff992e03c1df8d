"""Image sets, the labeled split and the order of visits."""

import hashlib
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import CIFAR10, MNIST

from normatch.data import (
    LABELED,
    UNLABELED,
    Dataset,
    Split,
    from_arrays,
    load_dataset,
    make_split,
    sample_order,
    split_labels,
    standardize,
)
from normatch.data.philox import random_words
from normatch.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def fake_cifar(monkeypatch, error=None):
    """Puts a stand-in for torchvision's CIFAR10 in place; -> the arguments of each call."""
    from torchvision import datasets

    calls = []

    class CIFAR10:
        classes = ("airplane", "automobile")

        def __init__(self, root, train, download):
            calls.append((root, train, download))
            if error:
                raise error
            self.data = np.full((6 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = [0, 1] * (3 if train else 1)

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    return calls


# ---- Sets


def test_digits_are_1297_and_500_images_of_all_classes(digits):
    assert digits.train_x.shape == (1297, 32, 32, 3) and digits.test_x.shape == (500, 32, 32, 3)
    assert digits.train_x.dtype == np.uint8 and digits.train_labels.dtype == np.int64
    assert (np.bincount(digits.test_labels) == 50).all()
    assert np.bincount(digits.train_labels).min() == 124
    assert digits.train_x.min() == 0 and digits.train_x.max() == 255
    assert not digits.flip and digits.classes == list("0123456789")


def test_digits_constants_are_those_of_the_training_images(digits):
    pixels = digits.train_x / 255
    assert np.allclose(pixels.mean((0, 1, 2)), digits.mean, atol=5e-5)
    assert np.allclose(pixels.std((0, 1, 2)), digits.std, atol=5e-5)


def test_digits_test_images_are_not_in_the_training_set(digits):
    raw = {image.tobytes() for image in digits.train_x}
    assert sum(image.tobytes() in raw for image in digits.test_x) == 0
    again = load_dataset("digits")
    assert np.array_equal(again.test_x, digits.test_x)


def test_digits_do_not_need_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from normatch.data import load_dataset\n"
        "assert len(load_dataset('digits').train_x) == 1297\n"
        "try: load_dataset('cifar10', '.', download=True)\n"
        "except ValueError as error: assert 'torchvision' in str(error), error\n"
        "else: raise AssertionError('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_cifar_comes_through_torchvision(monkeypatch, tmp_path):
    calls = fake_cifar(monkeypatch)
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = load_dataset("cifar10", tmp_path)
    assert calls == [(str(tmp_path), True, False), (str(tmp_path), False, False)]
    assert data.train_x.shape == (6, 32, 32, 3) and data.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.test_labels.dtype == np.int64 and data.classes == ["airplane", "automobile"] and data.flip
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2471, 0.2435, 0.2616)


def test_download_happens_only_where_asked_for(monkeypatch, tmp_path):
    calls = fake_cifar(monkeypatch)
    with pytest.raises(UserError, match=r"cifar-10-batches-py.*--data_dir.*--download"):
        load_dataset("cifar10", tmp_path / "nowhere")
    assert calls == []
    load_dataset("cifar10", tmp_path, download=True)
    assert all(download for _, _, download in calls) and len(calls) == 2


@pytest.mark.parametrize(
    "download, error, message",
    [
        (False, RuntimeError("not found or corrupted"), "incomplete or damaged"),
        (True, OSError("no route"), "no route"),
    ],
)
def test_what_torchvision_raises_becomes_one_line(monkeypatch, tmp_path, download, error, message):
    fake_cifar(monkeypatch, error)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        load_dataset("cifar10", tmp_path, download)
    assert "\n" not in str(raised.value)


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")
    with pytest.raises(UserError, match="unknown dataset ''; data sets: digits, cifar10"):
        load_dataset("")


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
        ("svhn+extra", "extra_32x32.mat"),
        ("stl10", "stl10_binary"),
        ("mnist", "MNIST/raw"),
        ("fashionmnist", "FashionMNIST/raw"),
        ("miniimagenet", "train/CLASS"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, needed):
    with pytest.raises(UserError, match=f"{re.escape(name)} is not in .*{re.escape(needed)}") as raised:
        load_dataset(name, tmp_path)
    assert "\n" not in str(raised.value)


def fake_parts(monkeypatch, class_name, parts, size):
    """Puts a stand-in for a torchvision class with named splits in place; every image holds its own number."""
    from torchvision import datasets

    class Parts:
        classes = ("one", "two")

        def __init__(self, root, split, download):
            count = parts[split]
            first = 100 * list(parts).index(split)
            rows = np.arange(first, first + count, dtype=np.uint8)
            self.data = np.broadcast_to(rows[:, None, None, None], (count, 3, size, size)).copy()
            self.data[:, 1] += 1  # the channels differ
            self.labels = np.full(count, -1) if split == "unlabeled" else np.arange(count) % 2

    monkeypatch.setattr(datasets, class_name, Parts)


def test_svhn_with_and_without_extra(monkeypatch, tmp_path):
    fake_parts(monkeypatch, "SVHN", {"train": 6, "test": 4, "extra": 5}, 32)
    (tmp_path / "train_32x32.mat").touch()
    (tmp_path / "extra_32x32.mat").touch()
    plain, more = load_dataset("svhn", tmp_path), load_dataset("svhn+extra", tmp_path)
    assert plain.train_x.shape == (6, 32, 32, 3) and len(plain.test_x) == 4 and not plain.flip
    assert more.train_x[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 200, 201, 202, 203, 204]
    assert more.train_x[3, 5, 7].tolist() == [3, 4, 3] and more.train_labels.tolist() == [0, 1] * 5 + [0]
    assert plain.mean == plain.std == (0.5, 0.5, 0.5) and len(plain.classes) == 10


def test_stl10_has_its_folds_and_its_unlabeled_images(monkeypatch, tmp_path):
    fake_parts(monkeypatch, "STL10", {"train": 20, "test": 4, "unlabeled": 30}, 96)
    (tmp_path / "stl10_binary").mkdir()
    with pytest.raises(UserError, match=r"fold_indices\.txt"):
        load_dataset("stl10", tmp_path)
    folds = ["3 1 2 0", "7 6 5 4"]
    (tmp_path / "stl10_binary" / "fold_indices.txt").write_text("\n".join(folds) + "\n")
    data = load_dataset("stl10", tmp_path)
    assert data.train_x.shape == (50, 96, 96, 3) and (data.train_labels[20:] == -1).all()
    assert data.train_x[25, 3, 4].tolist() == [205, 206, 205]
    for seed in range(3):
        split = make_split(data, 4, seed)
        assert split.labeled.tolist() == ([0, 1, 2, 3], [4, 5, 6, 7])[seed % 2] and len(split.unlabeled) == 50
    assert len(make_split(data, 6, 0).labeled) == 6  # any other number is drawn from the 20
    held = make_split(data, 4, 0, num_val=4)
    assert not set(held.validation) & set(held.labeled) and len(held.validation) == 4 and len(held.unlabeled) == 46


def test_stl10_as_published(monkeypatch, tmp_path):
    fake_parts(monkeypatch, "STL10", {"train": 8, "test": 2, "unlabeled": 3}, 96)
    (tmp_path / "stl10_binary").mkdir()
    data = load_dataset("stl10", tmp_path, compat="reference")
    assert data.train_x.shape == (8, 224, 224, 3) and data.test_x.shape[1:] == (224, 224, 3)
    assert not data.folds and make_split(data, 4, 0).unlabeled.tolist() == list(range(8))


@pytest.mark.skipif(MNIST is None, reason="MNIST is not at hand")
def test_real_mnist():
    data = load_dataset("mnist", MNIST)
    assert data.train_x.shape == (60_000, 28, 28, 3) and data.test_x.shape == (10_000, 28, 28, 3)
    assert (data.train_x[..., 0] == data.train_x[..., 2]).all() and data.train_x.flags.c_contiguous
    assert np.bincount(data.train_labels).min() == 5421 and not data.flip
    assert abs(data.train_x.mean() / 255 - data.mean[0]) < 5e-5
    assert abs(data.train_x[:, :, :, 0].std() / 255 - data.std[0]) < 5e-5


@pytest.mark.skipif(CIFAR10 is None, reason="CIFAR-10 is not at hand")
def test_real_cifar10():
    data = load_dataset("cifar10", CIFAR10)
    assert data.train_x.shape == (50_000, 32, 32, 3) and data.train_x.flags.c_contiguous
    assert (np.bincount(data.train_labels) == 5000).all() and (np.bincount(data.test_labels) == 1000).all()
    assert np.abs(data.train_x[::10].mean((0, 1, 2)) / 255 - data.mean).max() < 5e-3


# ---- Arrays


def test_arrays_of_rows_are_a_data_set():
    x, y = np.random.default_rng(0).normal(3, 2, (50, 4)), np.arange(50) % 3 - 1
    data = from_arrays(x, y, x[:9], y[:9], name="mine", columns=tuple("abcd"))
    assert data.is_table and data.image_size is None and data.classes == ["0", "1"] and data.train_x.dtype == np.float32
    z = standardize(torch.from_numpy(data.train_x), data.mean, data.std)
    assert z.mean(0).abs().max() < 1e-6 and (z.std(0, correction=0) - 1).abs().max() < 1e-6
    assert standardize(torch.from_numpy(x), data.mean, data.std, torch.float64).dtype == torch.float64
    assert set(y[make_split(data, 0, seed=0).labeled]) == {0, 1}
    assert from_arrays(x, y, classes="uv").classes == ["u", "v"] and len(from_arrays(x, y).test_x) == 0


def test_arrays_of_images_are_a_data_set(digits):
    gray = from_arrays(digits.train_x[..., 0], digits.train_labels, digits.test_x, digits.test_labels, flip=True)
    assert not gray.is_table and gray.image_size == 32 and gray.flip and gray.classes == digits.classes
    assert np.array_equal(gray.train_x, digits.train_x)
    assert np.allclose((gray.mean, gray.std), (digits.mean, digits.std), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": [0, 1]}, r"5 samples need labels of shape \(5,\), not \(2,\)"),
        ({"classes": ["a"]}, r"labels must lie in 0\.\.0"),
        ({"train_x": np.zeros((5, 8, 8, 3))}, "samples must be"),
        ({"train_x": np.zeros((0, 2)), "train_labels": []}, "no training samples"),
        ({"train_x": np.ones((5, 2))}, r"2 columns are constant \(0, 1\)"),
        ({"test_x": np.zeros((1, 3)), "test_labels": [0]}, r"training samples are \(2,\), test samples \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    arrays = {"train_x": np.arange(10).reshape(5, 2), "train_labels": [0, 1, 0, 1, -1], **change}
    with pytest.raises(UserError, match=message):
        from_arrays(**arrays)


# ---- The split


LABELS = np.random.default_rng(0).integers(0, 10, 3000)


def test_split_is_balanced_and_the_pool_holds_all_images():
    split = split_labels(LABELS, 40, 10, seed=1)
    assert np.bincount(LABELS[split.labeled]).tolist() == [4] * 10 and len(set(split.labeled)) == 40
    assert np.array_equal(split.unlabeled, np.arange(3000)) and len(split.validation) == 0
    assert all(x.dtype == np.int64 for x in (split.labeled, split.unlabeled, split.validation))


def test_validation_images_are_in_neither_pool():
    split, plain = split_labels(LABELS, 40, 10, seed=1, num_val=200), split_labels(LABELS, 40, 10, seed=1)
    assert np.bincount(LABELS[split.validation]).tolist() == [20] * 10
    assert not set(split.validation) & set(split.labeled)
    assert np.array_equal(np.sort(np.concatenate([split.unlabeled, split.validation])), np.arange(3000))
    assert set(split.labeled) <= set(split.unlabeled)
    assert np.array_equal(split.labeled, plain.labeled)


def test_split_follows_the_seed():
    splits = [split_labels(LABELS, 40, 10, seed) for seed in (0, 0, 1)]
    assert splits[0].sha256 == splits[1].sha256 != splits[2].sha256
    assert len(set(splits[0].labeled) & set(splits[2].labeled)) < 10


def test_images_without_a_label_are_only_unlabeled():
    labels = np.where(np.arange(3000) % 2, LABELS, -1)
    split = split_labels(labels, 40, 10, seed=1)
    assert (labels[split.labeled] >= 0).all() and len(split.unlabeled) == 3000


def test_split_matches_the_recorded_laws(golden):
    data = golden("splits")
    for case in ("c10_40", "c10_250", "c10_4000", "c10_4000_noexp", "auto_small"):
        labels = data[f"in/{case}/labels"]
        settings = {k: int(data[f"in/{case}/{k}"]) for k in ("num_labeled", "seed")}
        split = split_labels(labels, settings["num_labeled"], 10, settings["seed"])
        assert np.array_equal(np.bincount(labels[split.labeled]), data[f"out/{case}/per_class_unique_counts"])
        assert np.array_equal(split.unlabeled, np.arange(data[f"out/{case}/unlabeled_len"]))
        # Where the published list is tiled, every labeled image comes equally often in one pass: so here.
        n = len(split.labeled)
        order = sample_order(n, settings["seed"], LABELED, 0, int(data[f"out/{case}/labeled_len"]))
        assert (np.bincount(order, minlength=n) == data[f"out/{case}/multiplicity"]).all()


def test_the_hash_is_of_the_indices_alone():
    split = Split(np.array([1, 5]), np.arange(6), np.array([], np.int64))
    numbers = [b"".join(i.to_bytes(8, "little") for i in indices) for indices in ([1, 5], range(6), [])]
    text = b"labeled 2\n" + numbers[0] + b"unlabeled 6\n" + numbers[1] + b"validation 0\n"
    assert split.sha256 == hashlib.sha256(text).hexdigest()
    assert split.sha256 == Split(*(x.astype(">i4") for x in vars(split).values())).sha256
    assert split.sha256 != Split(np.array([1]), np.arange(6), np.array([5])).sha256


def test_save_and_load(tmp_path):
    split = split_labels(LABELS, 40, 10, seed=1, num_val=10)
    split.save(tmp_path / "split.npz")
    loaded = Split.load(tmp_path / "split.npz")
    assert loaded.sha256 == split.sha256
    assert all(np.array_equal(a, b) for a, b in zip(vars(split).values(), vars(loaded).values(), strict=True))


def test_a_changed_or_broken_file_is_refused(tmp_path):
    split = split_labels(LABELS, 40, 10, seed=1)
    np.savez(tmp_path / "changed.npz", **(vars(split) | {"labeled": split.labeled + 1}), sha256=split.sha256)
    with pytest.raises(UserError, match="do not match its hash"):
        Split.load(tmp_path / "changed.npz")
    split.save(tmp_path / "split.npz")
    whole = (tmp_path / "split.npz").read_bytes()
    for cut in (0, 10, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a readable split"):
            Split.load(tmp_path / "cut.npz")
    for at in range(0, len(whole), 97):
        (tmp_path / "bad.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with suppress(UserError):
            assert Split.load(tmp_path / "bad.npz").sha256 == split.sha256  # a byte that carries nothing
    with pytest.raises(UserError, match=r"missing\.npz"):
        Split.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_labels": 45}, "num_labels 45 is not divisible by the 10 classes: the nearest possible is 40 or 50"),
        ({"num_labels": 0}, "nearest possible is 10$"),
        ({"num_labels": -5}, "nearest possible is 10$"),
        ({"num_labels": 40, "num_val": 3}, "num_val 3 is not divisible.*0 or 10"),
        ({"num_labels": 5000}, "num_labels 5000 are more than there are: class 3 has 20"),
        ({"num_labels": 205}, "nearest possible is 200$"),
        ({"num_labels": 190, "num_val": 20}, "num_labels 190 and num_val 20 are more.*200 in all"),
    ],
)
def test_impossible_splits_name_what_is_possible(settings, message):
    labels = np.concatenate([np.repeat(np.arange(10), 30), np.full(50, -1)])
    labels[90:100] = -1  # class 3 is left with 20
    with pytest.raises(UserError, match=message):
        split_labels(labels, num_classes=10, seed=0, **settings)


def test_a_class_with_too_few_images_is_called_by_its_name():
    with pytest.raises(UserError, match="class b has 1 training images"):
        make_split(data_with([0, 0, 0, 1]), 4, seed=0)


def data_with(labels, **more):
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    half = (0.5,) * 3
    return Dataset("own", images, np.array(labels), images[:2], np.array([0, 1]), ["a", "b"], half, half, True, **more)


def test_all_labels_there_are_may_be_unbalanced():
    split = make_split(data_with([0, 0, 0, 1, -1, -1]), 0, seed=0)
    assert split.labeled.tolist() == [0, 1, 2, 3] and split.unlabeled.tolist() == list(range(6))
    with pytest.raises(UserError, match="class 'b' has no labeled image"):
        make_split(data_with([0, 0, -1]), 0, seed=0)


def test_validation_images_of_the_data_set_are_in_neither_pool():
    data = data_with([0, 0, 1, 1, -1, 0, 1], validation=np.array([5, 6]))
    for num_labels in (0, 2):
        split = make_split(data, num_labels, seed=0)
        assert split.validation.tolist() == [5, 6] and split.unlabeled.tolist() == [0, 1, 2, 3, 4]
        assert not set(split.labeled) & {4, 5, 6}
    with pytest.raises(UserError, match="validation images of its own"):
        make_split(data, 2, seed=0, num_val=2)


def test_ordinary_splits_are_those_of_split_labels():
    digits = load_dataset("digits")
    for num_val in (0, 20):
        got = make_split(digits, 40, 3, num_val)
        assert got.sha256 == split_labels(digits.train_labels, 40, 10, 3, num_val).sha256


# ---- The order


@pytest.mark.parametrize("n", [1, 2, 40, 4095, 4096, 4097, 50_000])
def test_every_pass_shows_every_image_once(n):
    passes = sample_order(n, 3, UNLABELED, 0, 3 * n).reshape(3, n)
    assert passes.dtype == np.int64
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    if n >= 40:
        assert (passes[0] != passes[1]).any() and (passes[1] != passes[2]).any()


@pytest.mark.parametrize("n", [1, 3, 40, 1297, 5000])
def test_any_piece_of_the_order_can_be_asked_for(n):
    whole = sample_order(n, 3, LABELED, 0, 20_000)
    for start, count in ((0, 1), (17, 64), (4090, 10), (4999, 5003), (12_345, 448), (8000, 0)):
        assert np.array_equal(sample_order(n, 3, LABELED, start, count), whole[start : start + count])


def test_order_follows_seed_and_stream():
    orders = [sample_order(100, *key, 0, 100) for key in ((0, LABELED), (1, LABELED), (0, UNLABELED), (1 << 32, 0))]
    assert len({order.tobytes() for order in orders}) == 4


def test_order_is_uniform():
    """Each image is equally likely at each place of a pass: chi-square, 81 degrees of freedom, five sigma."""
    passes = sample_order(10, 0, LABELED, 0, 200_000).reshape(-1, 10)
    counts = np.stack([np.bincount(column, minlength=10) for column in passes.T])
    statistic = ((counts - 2000) ** 2 / 2000).sum()
    assert abs(statistic - 81) < 5 * np.sqrt(2 * 81)
    assert abs(np.mean(passes[1:, 0] == passes[:-1, 9]) - 0.1) < 5 * np.sqrt(0.09 / 20_000)


def test_the_order_sorts_the_words_of_the_counter():
    """No generator of numpy's is in it, as those may change: a run resumed elsewhere sees the same images."""
    for p in (0, 5):
        words = random_words(7, p, range(10), (1 << 16) + UNLABELED, 2).tolist()
        want = sorted(range(10), key=lambda i: words[i])
        assert sample_order(10, 7, UNLABELED, 10 * p, 10).tolist() == want
