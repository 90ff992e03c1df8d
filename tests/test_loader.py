"""The batches of a run: functions of the step alone, whoever makes them."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from real_data import ROOT

from normatch import ops
from normatch.augment import native
from normatch.augment.draws import View, draw_parameters
from normatch.augment.pillow import StepImages, make_loader, strong_views, weak_views
from normatch.augment.policy import POLICIES
from normatch.data import LABELED, Dataset, load_dataset, split_labels, standardize
from normatch.errors import UserError
from normatch.training.loader import StepViews, choose_backend, make_batches


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(100) % 10
    labels[95:] = -1
    return Dataset(
        "noise",
        images,
        labels,
        images[:10],
        labels[:10],
        list("abcdefghij"),
        (0.5,) * 3,
        (0.25,) * 3,
        flip=True,
    )


class Steps(StepViews):
    """step -> the uint8 views of its images by kind, and the labels and rows of its batch."""

    def __getitem__(self, step):
        views, _ = StepImages(self)[step]
        sizes = [self.num_labeled, self.num_unlabeled, self.num_unlabeled]
        (batch,) = make_batches(self, step, step + 1, "pil")
        whole = dict(zip(("x", "u_weak", "u_strong"), views.split(sizes), strict=True)) | batch
        return {key: value for key, value in whole.items() if key != "images" and len(value)}


def views(dataset, num_labels=20, num_val=0, policy="kekmodel", seed=0, batch_size=8, uratio=3):
    split = split_labels(dataset.train_labels, num_labels, 10, seed=0, num_val=num_val)
    return Steps(dataset, split, policy, seed, batch_size, uratio)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


def test_shapes_and_types(dataset):
    batch = views(dataset)[5]
    assert set(batch) == {"x", "y", "u_weak", "u_strong", "u_y", "u_index"}
    assert batch["x"].shape == (8, 32, 32, 3) and batch["u_weak"].shape == batch["u_strong"].shape == (
        24,
        32,
        32,
        3,
    )
    assert all(batch[key].dtype == torch.uint8 for key in ("x", "u_weak", "u_strong"))
    assert batch["y"].shape == (8,) and batch["u_y"].shape == batch["u_index"].shape == (24,)
    assert all(batch[key].dtype == torch.int64 for key in ("y", "u_y", "u_index"))
    assert set(views(dataset, uratio=0)[5]) == {"x", "y"}


def test_labels_belong_to_their_images(dataset):
    steps = views(dataset)
    assert np.bincount(torch.cat([steps[s]["y"] for s in range(5)])).tolist() == [4] * 10  # two passes of 20 labels
    for s in range(4):
        assert torch.equal(steps[s]["u_y"], torch.from_numpy(dataset.train_labels)[steps[s]["u_index"]])
    assert any((steps[s]["u_y"] == -1).any() for s in range(5))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")  # on a machine of two cores
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("policy", ["kekmodel", "leedoyup"])
def test_workers_make_no_difference(dataset, workers, policy):
    steps = views(dataset, policy=policy)
    batches = list(make_loader(steps, 3, 9, num_workers=workers))
    assert len(batches) == 6
    for step, (images, rows) in zip(range(3, 9), batches, strict=True):
        want, of_images = StepImages(steps)[step]
        assert torch.equal(images, want) and torch.equal(rows, of_images)


def test_starting_late_gives_the_batches_of_running_through(dataset):
    through = list(make_loader(views(dataset), 0, 12))
    resumed = list(make_loader(views(dataset), 7, 12))
    for (images, rows), (want, of_images) in zip(resumed, through[7:], strict=True):
        assert torch.equal(images, want) and torch.equal(rows, of_images)


@pytest.mark.parametrize("uratio", [1, 3, 7])
def test_every_image_comes_equally_often(dataset, uratio):
    steps = views(dataset, batch_size=10, uratio=uratio)
    batches = [steps[s] for s in range(10)]
    assert (torch.cat([b["u_index"] for b in batches]).bincount(minlength=100) == uratio).all()
    # 100 labeled draws are five passes of 20 images.
    drawn = np.concatenate([steps.draw(LABELED, s)[0] for s in range(10)])
    assert (np.bincount(drawn, minlength=100)[steps.split.labeled] == 5).all()
    # One image a class: the labels tell that these are the images shown.
    steps = views(dataset, num_labels=10, batch_size=8, uratio=0)
    assert torch.cat([steps[s]["y"] for s in range(5)]).bincount().tolist() == [4] * 10


def test_views_differ_between_seeds_steps_kinds_and_repetitions(dataset):
    steps = views(dataset, num_labels=10, batch_size=30)
    batch = steps[0]
    assert not torch.equal(batch["x"], views(dataset, num_labels=10, batch_size=30, seed=1)[0]["x"])
    assert not torch.equal(batch["x"], steps[1]["x"])
    assert not torch.equal(batch["u_weak"], batch["u_strong"])
    # Ten labeled images, thirty views: each image three times in one step, and hardly ever the same view.
    assert batch["y"].bincount().tolist() == [3] * 10
    assert len(batch["x"].flatten(1).unique(dim=0)) >= 25


def test_a_view_depends_on_its_image_and_visit_alone(dataset):
    """Batches of another size cut the same row of views elsewhere: same images, same views."""

    def row(batch_size, uratio, key):
        steps = views(dataset, batch_size=batch_size, uratio=uratio)
        return torch.cat([steps[s][key] for s in range(120 // (batch_size * uratio))])

    for key in ("u_index", "u_weak", "u_strong"):
        assert torch.equal(row(8, 3, key), row(10, 4, key)), key


def test_views_are_those_of_the_stated_counter(dataset):
    steps, policy = views(dataset, seed=3), POLICIES["kekmodel"]
    batch = steps[6]  # labeled: positions 48..55 of passes of 20; unlabeled: 144..167 of passes of 100
    kinds = {
        "x": (View.LABELED_WEAK, steps.draw(LABELED, 6)[0], 2),
        "u_weak": (View.UNLABELED_WEAK, batch["u_index"].numpy(), 1),
        "u_strong": (View.UNLABELED_STRONG, batch["u_index"].numpy(), 1),
    }
    for key, (view, index, visit) in kinds.items():
        p = draw_parameters(policy, 3, visit, index, view, 32, 32, strong=key == "u_strong")
        images = dataset.train_x[index]
        want = strong_views(images, p, policy) if key == "u_strong" else weak_views(images, p, "reflect")
        assert np.array_equal(batch[key], want), key


def test_validation_images_are_never_shown(dataset):
    steps = views(dataset, num_val=20)
    shown = torch.cat([steps[s]["u_index"] for s in range(10)])
    assert not np.isin(steps.split.validation, shown).any() and len(shown.unique()) == 80


def test_digits_are_never_mirrored():
    digits = load_dataset("digits")
    split = split_labels(digits.train_labels, 1240, 10, seed=0)
    steps = Steps(digits, split, "kekmodel", 0, 64, 7)
    batch = steps[0]
    # An unmirrored weak view keeps the image's inside; a shift by at most four pixels finds it again.
    for view, index in zip(batch["u_weak"].numpy(), batch["u_index"].tolist(), strict=True):
        inside = digits.train_x[index][4:-4, 4:-4]
        assert any(np.array_equal(view[i : i + 24, j : j + 24], inside) for i in range(9) for j in range(9))


def test_a_batch_larger_than_the_labeled_set_is_fine(dataset):
    assert views(dataset, num_labels=10, batch_size=64, uratio=1)[100]["x"].shape == (64, 32, 32, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"batch_size": 101, "uratio": 0},
            "batch_size 101 is larger than noise with its 100 training images",
        ),
        (
            {"batch_size": 51, "uratio": 2},
            "uratio 2 x batch_size 51 is 102 .* pool of 100 .*: take a smaller",
        ),
        ({"batch_size": 45, "uratio": 2, "num_val": 20}, "more than the pool of 80 unlabeled"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"uratio": -1}, "uratio -1"),
        ({"policy": "kekmodle"}, "unknown policy 'kekmodle'; did you mean 'kekmodel'"),
    ],
)
def test_impossible_settings_are_one_line(dataset, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        views(dataset, **settings)
    assert "\n" not in str(raised.value)


# ---- Backends


def batches_of(dataset, start=0, stop=6, **settings):
    given = {k: settings.pop(k) for k in ("backend", "resident", "num_workers", "dtype") if k in settings}
    return list(make_batches(views(dataset, **settings), start, stop, **given))


needs_native = pytest.mark.skipif("cpu" not in ops.kernels()["augment_views"], reason="the compiled op is not in use")


@needs_native
@pytest.mark.parametrize("policy", POLICIES)
def test_native_batches_are_pillows(dataset, policy):
    native, pil = (batches_of(dataset, backend=b, policy=policy) for b in ("native", "pil"))
    assert len(native) == len(pil) == 6
    for got, want in zip(native, pil, strict=True):
        assert_same(got, want)
        assert got["images"].shape == (8 + 2 * 24, 3, 32, 32)
        assert got["images"].is_contiguous(memory_format=torch.channels_last)


@needs_native
@pytest.mark.parametrize("settings", [{"resident": False}, {"resident": True}, {"backend": "pil", "num_workers": 2}])
def test_every_way_to_a_batch_gives_the_same(dataset, settings):
    want = batches_of(dataset, 0, 150, backend="native")
    for got, expected in zip(batches_of(dataset, 0, 150, **settings), want, strict=True):
        assert_same(got, expected)
    for got, expected in zip(batches_of(dataset, 70, 150, **settings), want[70:], strict=True):  # a resumed run
        assert_same(got, expected)


def test_batches_are_the_normalised_step_views(dataset):
    steps = views(dataset)
    for step, batch in enumerate(make_batches(steps, 0, 3)):
        plain = steps[step]
        images = torch.cat([plain["x"], plain["u_weak"], plain["u_strong"]])
        assert torch.equal(batch["images"], standardize(images, dataset.mean, dataset.std))
        assert all(torch.equal(batch[key], plain[key]) for key in ("y", "u_y", "u_index"))


def test_supervised_batches_have_no_unlabeled_part(dataset):
    for backend in ("auto", "pil"):
        (batch,) = make_batches(views(dataset, uratio=0), 4, 5, backend)
        assert batch["images"].shape == (8, 3, 32, 32) and len(batch["u_y"]) == len(batch["u_index"]) == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one_process(dataset, ranks):
    split = split_labels(dataset.train_labels, 20, 10, seed=0)
    arguments = (dataset, split, "kekmodel", 0, 8, 3)
    whole = list(make_batches(StepViews(*arguments), 0, 4))
    parts = [list(make_batches(StepViews(*arguments, rank=r, ranks=ranks), 0, 4)) for r in range(ranks)]
    for step, batch in enumerate(whole):
        x, weak, strong = batch["images"].split([8, 24, 24])
        for rank, mine in enumerate(part[step] for part in parts):
            want = torch.cat([x[rank::ranks], weak[rank::ranks], strong[rank::ranks]])
            assert torch.equal(mine["images"], want) and torch.equal(mine["y"], batch["y"][rank::ranks])
            assert torch.equal(mine["u_index"], batch["u_index"][rank::ranks])
    with pytest.raises(UserError, match="not divisible by the 3 processes"):
        StepViews(*arguments, ranks=3)


@needs_native
def test_bfloat16_batches(dataset):
    (batch,) = batches_of(dataset, stop=1, dtype=torch.bfloat16)
    (full,) = batches_of(dataset, stop=1)
    assert torch.equal(batch["images"], full["images"].to(torch.bfloat16))


@needs_native
def test_the_images_are_in_memory_once(dataset):
    """The native backend reads the data set's own memory, in this process."""
    steps = views(dataset)
    batches = make_batches(steps, 0, 2, backend="native")
    first = next(batches)["images"].clone()
    saved = dataset.train_x.copy()
    try:
        dataset.train_x[:] = 0
        assert not torch.equal(next(iter(make_batches(steps, 0, 1)))["images"], first)
        black = standardize(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), dataset.mean, dataset.std)
        assert (next(batches)["images"][:8] == black).all()
    finally:
        dataset.train_x[:] = saved


MEASURE = """
import gc, os, sys
import numpy as np
from normatch.data import Dataset, split_labels
from normatch.training.loader import StepViews, make_batches

def proportional(pid):  # MB, where a page that n processes share counts 1/n for each; not of libraries' files, which
    lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()  # unrelated processes share, too
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024

def children():
    return [int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()]

backend, workers = sys.argv[1], int(sys.argv[2])
warm = np.zeros((100, 32, 32, 3), np.uint8)
def batches(images):
    labels = np.arange(len(images)) % 10
    half = (0.5,) * 3
    data = Dataset("noise", images, labels, images[:1], labels[:1], list("abcdefghij"), half, half, flip=True)
    split = split_labels(labels, 20, 10, seed=0)
    return make_batches(StepViews(data, split, "weak", 0, 8, 3), 0, 60, backend, num_workers=workers)

def total(images):
    made = batches(images)
    for _ in range(40):
        next(made)
    found = sum(map(proportional, [os.getpid(), *children()]))
    made.close()
    gc.collect()
    return found

before = total(warm)
print(total(np.full((50_000, 32, 32, 3), 7, np.uint8)) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is measured as Linux reports it")
@pytest.mark.parametrize(("backend", "workers"), [("auto", 0), ("pil", 4)])
def test_fifty_thousand_images_take_their_154_megabytes_once(backend, workers):
    """All processes of a run together, with as many images as CIFAR-10 has and with hardly any."""
    command = [sys.executable, "-c", MEASURE, backend, str(workers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    once = 50_000 * 3072 / 2**20  # the rest is each worker's order of the images, and its batches
    assert 0.95 * once < float(done.stdout) < 1.6 * once


def test_read_only_images_are_fine(dataset):
    from dataclasses import replace

    frozen = dataset.train_x.copy()
    frozen.flags.writeable = False
    same = replace(dataset, train_x=frozen)
    assert torch.equal(
        next(make_batches(views(same), 0, 1))["images"], next(make_batches(views(dataset), 0, 1))["images"]
    )


@needs_native
def test_closing_ends_the_thread_that_gathers(dataset):
    import threading

    batches = make_batches(views(dataset), 0, 10**6, resident=False)
    next(batches)
    next(batches)
    assert any(t.name == "normatch-images" for t in threading.enumerate())
    batches.close()
    for _ in range(100):
        if not any(t.name == "normatch-images" for t in threading.enumerate()):
            break
        time.sleep(0.02)
    assert not any(t.name == "normatch-images" for t in threading.enumerate())


@needs_native
def test_an_error_in_the_thread_reaches_the_loop(dataset, monkeypatch):
    steps = views(dataset)
    batches = make_batches(steps, 0, 100, resident=False)
    next(batches)
    monkeypatch.setattr(steps, "draws", lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for _ in range(10):
            next(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only, and so know the patched views")
def test_a_worker_that_dies_is_one_line(dataset, monkeypatch):
    steps, honest = views(dataset), StepImages.__getitem__
    monkeypatch.setattr(
        StepImages, "__getitem__", lambda self, step: honest(self, step) if step < 2 else os.kill(os.getpid(), 9)
    )
    batches = make_batches(steps, 0, 8, "pil", num_workers=1)
    with pytest.raises(UserError, match=r"a process that makes the views has died.*: take fewer --num_workers"):
        list(batches)


def test_the_choice_is_explained(monkeypatch):
    name, reason = choose_backend("auto", "cpu")
    if "cpu" in ops.kernels()["augment_views"]:
        assert (name, reason) == ("native", f"auto: the {ops.backend()[0]} op has a kernel for cpu")
    monkeypatch.setattr(ops, "kernels", lambda: {"augment_views": frozenset()})
    name, reason = choose_backend("auto", "cpu")
    assert name == "pil" and reason.startswith("auto: no native kernel for cpu")
    with pytest.raises(UserError, match="augment_backend native is not there"):
        choose_backend("native", "cpu")
    with pytest.raises(UserError, match="augment_backend may be auto, native, dali, pil, not 'cv2'"):
        choose_backend("cv2", "cpu")
    assert choose_backend("pil", "cpu") == ("pil", "as asked for")


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_batches_on_the_gpu_are_those_of_the_cpu(dataset, resident):
    steps = views(dataset)
    got = list(make_batches(steps, 0, 80, device="cuda", resident=resident))
    for batch, want in zip(got, make_batches(steps, 0, 80), strict=True):
        assert all(value.device.type == "cuda" for value in batch.values())
        assert_same({key: value.cpu() for key, value in batch.items()}, want)


@pytest.mark.gpu
def test_batches_made_beside_a_step_are_whole_and_not_written_over(dataset):
    steps, got = views(dataset), []
    for batch in make_batches(steps, 0, 40, device="cuda", resident=True):
        torch.cuda._sleep(5_000_000)  # this step is still to come when the next batch is made
        got.append(batch["images"].double().sum((1, 2, 3)))
    want = [batch["images"].double().sum((1, 2, 3)) for batch in make_batches(steps, 0, 40)]
    torch.testing.assert_close(torch.stack(got).cpu(), torch.stack(want))


def test_the_next_batch_is_made_before_this_one_is_handed_out(monkeypatch):
    """And each stream waits for the other: for memory that is free again, for the batch. No GPU: streams by name."""
    told = []

    class Stream:
        def __init__(self, device):
            self.name = device

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    made = (told.append(f"{n} made") or {"n": n} for n in range(2))
    for batch in native.beside(made, "device"):
        told.append(f"{batch['n']} used")
    turn = ["main waits for side", "side waits for main"]
    assert told == [turn[1], "0 made", *turn, "1 made", "0 used", *turn, "1 used"]
