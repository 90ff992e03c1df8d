"""Image sets, the labelled split and the order of visits."""

import hashlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from normatch.augment import random_words
from normatch.data import LABELED, UNLABELED, Split, load_dataset, sample_order, split_labels
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
    assert digits.train_images.shape == (1297, 32, 32, 3) and digits.test_images.shape == (500, 32, 32, 3)
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int64
    assert (np.bincount(digits.test_labels) == 50).all()
    assert np.bincount(digits.train_labels).min() == 124
    assert digits.train_images.min() == 0 and digits.train_images.max() == 255
    assert not digits.flip and digits.classes == list("0123456789")


def test_digits_constants_are_those_of_the_training_images(digits):
    pixels = digits.train_images / 255
    assert np.allclose(pixels.mean((0, 1, 2)), digits.mean, atol=5e-5)
    assert np.allclose(pixels.std((0, 1, 2)), digits.std, atol=5e-5)


def test_digits_test_images_are_not_in_the_training_set(digits):
    raw = {image.tobytes() for image in digits.train_images}
    assert sum(image.tobytes() in raw for image in digits.test_images) == 0
    again = load_dataset("digits")
    assert np.array_equal(again.test_images, digits.test_images)


def test_digits_do_not_need_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from normatch.data import load_dataset\n"
        "assert len(load_dataset('digits').train_images) == 1297\n"
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
    assert data.train_images.shape == (6, 32, 32, 3) and data.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
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


def test_unknown_and_later_names_are_told_apart():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")
    with pytest.raises(UserError, match="did you mean"):
        load_dataset("")
    for name in ("svhn", "stl10", "mnist", "fashionmnist", "miniimagenet", "folder", "csv"):
        with pytest.raises(UserError, match=f"'{name}' is not there yet"):
            load_dataset(name)


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


def test_images_without_a_label_are_only_unlabelled():
    labels = np.where(np.arange(3000) % 2, LABELS, -1)
    split = split_labels(labels, 40, 10, seed=1)
    assert (labels[split.labeled] >= 0).all() and len(split.unlabeled) == 3000


def test_split_matches_the_recorded_laws(golden):
    data = golden("splits")
    for case in ("c10_40", "c10_250", "c10_4000", "c10_4000_noexp", "auto_small"):
        labels, settings = (
            data[f"in/{case}/labels"],
            {k: int(data[f"in/{case}/{k}"]) for k in ("num_labeled", "seed")},
        )
        split = split_labels(labels, settings["num_labeled"], 10, settings["seed"])
        assert np.array_equal(np.bincount(labels[split.labeled]), data[f"out/{case}/per_class_unique_counts"])
        assert np.array_equal(split.unlabeled, np.arange(data[f"out/{case}/unlabeled_len"]))
        # Where the published list is tiled, every labelled image comes equally often in one pass: so here.
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
        (
            {"num_labels": 45},
            "num_labels 45 is not divisible by the 10 classes: the nearest possible is 40 or 50",
        ),
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
