"""One's own images: any format and size becomes a data set; whatever is wrong becomes one line, and nothing hangs."""

import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from real_data import MNIST, ROOT

from normatch import evaluate, train
from normatch.data import folders, load_dataset, make_split
from normatch.data.folders import check, fit, read_image
from normatch.errors import UserError
from normatch.training.loader import StepViews, make_batches

RNG = np.random.default_rng(0)


def picture(level=100, size=(12, 12), mode="RGB"):
    pixels = np.clip(RNG.integers(level - 20, level + 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def put(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture() if image is None else image).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of different brightness, four images of each, unlabeled ones in sub-folders, and a test set."""
    for number, name in enumerate(("cat", "dog")):
        for i in range(4):
            put(tmp_path / "train" / name / f"{i}.png", picture(60 + 100 * number))
        put(tmp_path / "test" / name / "t.png", picture(60 + 100 * number))
    for i in range(6):
        put(tmp_path / "unlabeled" / f"part{i % 2}" / f"{i}.jpg")
    return tmp_path


def load(folder, name="folder", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset(name, folder, **options)


def one_line(raised):
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    return str(raised.value)


# ---- What is read


def test_a_folder_is_a_data_set(folder):
    data = load(folder)
    assert data.classes == ["cat", "dog"] and data.train_x.shape == (14, 12, 12, 3)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 6 and data.test_labels.tolist() == [0, 1]
    assert data.train_x[:4].mean() < 100 < data.train_x[4:8].mean()
    pixels = data.train_x / 255
    assert np.allclose(pixels.mean((0, 1, 2)), data.mean, atol=1e-4)
    assert np.allclose(pixels.std((0, 1, 2)), data.std, atol=1e-4)
    split = make_split(data, 4, seed=0)
    assert len(split.unlabeled) == 14 and (data.train_labels[split.labeled] >= 0).all()


def test_validation_images_are_held_out(folder):
    put(folder / "val" / "dog" / "v.png")
    data = load(folder)
    assert len(data.train_labels) == 15 and data.train_labels[data.validation].tolist() == [1]
    split = make_split(data, 0, seed=0)
    assert split.validation.tolist() == data.validation.tolist() and len(split.labeled) == 8
    assert not set(split.validation) & set(split.unlabeled)


def test_validation_images_stand_in_for_missing_test_images(folder):
    (folder / "test").rename(folder / "val")
    data = load(folder)
    assert data.test_labels.tolist() == [0, 1] and len(data.validation) == 0 and len(data.train_labels) == 14


def test_sizes_are_brought_together(folder):
    assert load(folder, image_size=20).train_x.shape[1:] == (20, 20, 3)
    put(folder / "train" / "cat" / "wide.png", picture(size=(61, 30)))
    put(folder / "train" / "cat" / "tall.png", picture(size=(1, 90)))
    assert load(folder).train_x.shape[1:] == (16, 16, 3)  # the median of the shorter sides, in eights
    for size in ((7, 3), (3, 7), (1, 1), (9, 9)):
        assert fit(picture(size=size), 8).shape == (8, 8, 3)
    middle = Image.fromarray(np.repeat(np.array([[[0], [200], [0]]], np.uint8), 3, axis=2).repeat(9, 0).repeat(9, 1))
    assert (fit(middle, 9) == 200).all()  # the middle square, not the squeezed whole


def test_every_kind_of_pixel_is_read(tmp_path):
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    gray = Image.fromarray(ramp)
    cases = {
        "gray.png": gray,
        "16bit.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "16bit.tif": Image.fromarray(ramp.astype(np.uint16) * 257),
        "32bit.tif": Image.fromarray(ramp.astype(np.int32) * 257),
        "real.tif": Image.fromarray(ramp.astype(np.float32) / 255),
        "palette.png": gray.convert("P"),
        "alpha.png": gray.convert("RGBA"),
        "grayalpha.png": gray.convert("LA"),
        "gray.gif": gray,
        "gray.bmp": gray,
        "cmyk.tif": gray.convert("RGB").convert("CMYK"),
    }
    for name, image in cases.items():
        got = np.asarray(read_image(put(tmp_path / name, image)))
        assert got.shape == (16, 16, 3) and got.dtype == np.uint8, name
        assert np.abs(got.astype(int) - ramp[..., None]).max() <= 1, name
    put(tmp_path / "clear.png", gray.convert("P"), transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(read_image(tmp_path / "clear.png")).shape == (16, 16, 3)
    put(tmp_path / "bits.png", gray.convert("1"))
    assert set(np.unique(np.asarray(read_image(tmp_path / "bits.png")))) <= {0, 255}
    turned = put(tmp_path / "turned.jpg", picture(size=(20, 10)), exif=Image.Exif())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(size=(20, 10)).save(turned, exif=exif)
    assert read_image(turned).size == (10, 20)


def test_files_that_are_no_images_by_name_are_passed_over(folder):
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", ".hidden.png"):
        (folder / "train" / "cat" / name).write_text("x")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "readme.txt").write_text("x")
    assert len(load(folder).train_labels) == 14


# ---- Tables


def table(folder, rows, name="data.csv", header="path,label,split"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder / name


ROWS = [
    *(f"train/cat/{i}.png,cat,train" for i in range(4)),
    *(f"train/dog/{i}.png,dog," for i in range(4)),
    "unlabeled/part0/0.jpg,,",
    "unlabeled/part1/1.jpg,-1,",
    "unlabeled/part0/2.jpg,cat,unlabeled",  # a label that must not be used
    "test/cat/t.png,cat,test",
    "test/dog/t.png,dog,test",
]


def test_a_table_is_a_data_set(folder):
    data = load(table(folder, ROWS), "csv")
    assert data.classes == ["cat", "dog"]
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 3 and data.test_labels.tolist() == [0, 1]
    files = load(folder)
    assert np.array_equal(data.train_x[:8], files.train_x[:8])


def test_columns_go_by_many_names_and_labels_by_numbers(folder):
    rows = [f"0,train/cat/{i}.png,10" for i in range(4)] + [f"0,train/dog/{i}.png,9" for i in range(4)]
    test = ["0,test/cat/t.png,10", "0,test/dog/t.png,9"]
    table(folder, rows, "train.csv", "id,Filename,Class")
    table(folder, test, "test.csv", "id,file,target")
    table(folder, ["unlabeled/part0/0.jpg"], "unlabeled.csv", "\ufeffimage")  # as a spreadsheet saves it
    data = load(folder, "csv")
    assert data.classes == ["9", "10"]  # in order of number
    assert data.train_labels.tolist() == [1] * 4 + [0] * 4 + [-1] and data.test_labels.tolist() == [1, 0]


def test_whole_numbers_may_be_real_and_other_labels_stay_as_they_are(folder):
    rows = [*(f"train/cat/{i}.png,1.0," for i in range(4)), *(f"train/dog/{i}.png,v2.0," for i in range(4)),
            "unlabeled/part0/0.jpg,-1.0,", "test/cat/t.png,1,test"]  # fmt: skip
    data = load(table(folder, rows), "csv")
    assert data.classes == ["1", "v2.0"] and data.train_labels.tolist() == [0] * 4 + [1] * 4 + [-1]


def test_parquet_needs_pyarrow_and_says_so(folder):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        (folder / "data.parquet").write_bytes(b"PAR1")
        with pytest.raises(UserError, match="needs pyarrow: pip install pyarrow"):
            load(folder / "data.parquet", "csv")
        return
    rows = [row.split(",") for row in ROWS]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("path", "label", "split"))}
    columns["label"] = [label or None for label in columns["label"]]
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    assert load(folder / "data.parquet", "csv").train_labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 3
    (folder / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load(folder / "bad.parquet", "csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, "train/cat/none.png,cat,train"), r"data\.csv, line 2: .*none\.png cannot be read: there is no such file"),
        ((-1, "test/dog/t.png,bird,test"), r"line 14: the label 'bird' has no training image; classes are cat, dog"),
        ((-1, "test/dog/t.png,,test"), r"line 14: an image of test needs a label"),
        ((0, ",cat,train"), "line 2: the path is empty"),
        ((0, "train/cat/0.png,cat,later"), "line 2: split may be train, unlabeled, val, test, not 'later'"),
    ],
)
def test_rows_that_are_wrong_are_named(folder, change, message):
    rows = list(ROWS)
    rows[change[0]] = change[1]
    with pytest.raises(UserError, match=message) as raised:
        load(table(folder, rows), "csv")
    one_line(raised)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'path', only none at all"),
        ("name,label\n", "has no column 'path', only name, label"),
        ("path\nx.png\n", "has no column 'label'"),
        ("path,label\n", "holds no image"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "data.csv", "csv")
    one_line(raised)


def test_a_missing_or_binary_table(tmp_path):
    with pytest.raises(UserError, match="there is no table"):
        load(tmp_path / "none.csv", "csv")
    with pytest.raises(UserError, match=r"neither train\.csv nor train\.parquet"):
        load(tmp_path, "csv")
    (tmp_path / "data.csv").write_bytes(b"\xff\xfe\x00\x80\x81")
    with pytest.raises(UserError, match="cannot be read as a CSV file"):
        load(tmp_path / "data.csv", "csv")


# ---- Damaged files


def bomb(path):
    """A PNG of a hundred bytes that declares 100,000 x 100,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def large_claim(path):
    """Between Pillow's warning and its error: 100 million pixels."""
    Image.new("1", (10_000, 10_000)).save(path)


def truncated(path):
    put(path, picture(size=(200, 200)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated.jpg": (truncated, "truncated"),
    "empty.png": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text.png": (lambda p: p.write_text("not an image at all\n" * 9), "it is not an image"),
    "bomb.png": (bomb, "far too large"),
    "large.png": (large_claim, "claims to be 10000 x 10000"),
    "noise.jpg": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + RNG.bytes(500)), ""),
    "cut.gif": (lambda p: p.write_bytes(b"GIF89a\x10\x00"), ""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_labeled_files_are_named(folder, name):
    make, reason = DAMAGE[name]
    make(folder / "train" / "dog" / name)
    with pytest.raises(UserError, match=f"dog.{name} cannot be read: .*{reason}") as raised:
        load(folder)
    one_line(raised)


def test_damaged_unlabeled_files_are_counted_and_left_out(folder):
    for name, (make, _) in DAMAGE.items():
        make(folder / "unlabeled" / name)
    (folder / "unlabeled" / "gone.png").symlink_to(folder / "nowhere.png")
    with pytest.warns(UserWarning, match=r"8 of 14 unlabeled images in .* cannot be read and are left out") as caught:
        data = load_dataset("folder", folder)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 6
    assert data.train_x[8:].std() > 0
    split = make_split(data, 8, seed=0)
    (batch,) = make_batches(StepViews(data, split, "kekmodel", 0, 2, 3), 0, 1)
    assert batch["images"].shape == (14, 3, 12, 12)


def test_unlabeled_rows_without_a_file_are_counted(folder):
    rows = [*ROWS, "unlabeled/none.jpg,,", "unlabeled/nothing.jpg,-1,"]
    with pytest.warns(UserWarning, match=r"2 of 5 unlabeled images .*line 15: there is no such file"):
        data = load_dataset("csv", table(folder, rows))
    assert len(data.train_labels) == 11


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(folder):
    os.mkfifo(folder / "unlabeled" / "pipe.png")
    with pytest.warns(UserWarning, match="not a regular file"):
        assert len(load_dataset("folder", folder).train_labels) == 14


# ---- Images that stay in their files


def batches_of(folder, start=0, backend="auto", num_workers=None, **load):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_dataset("folder", folder, **load)
    steps = StepViews(data, make_split(data, 8, seed=0), "kekmodel", 0, 2, 3)
    return make_batches(steps, start, 4, backend, num_workers=num_workers)


@pytest.mark.parametrize("settings", [{}, {"backend": "pil"}, {"backend": "pil", "num_workers": 2}])
def test_images_left_in_their_files_give_the_same_batches(folder, settings):
    DAMAGE["truncated.jpg"][0](folder / "unlabeled" / "truncated.jpg")  # which has to be left out of both
    put(folder / "train" / "dog" / "odd.png", picture(size=(31, 17), mode="L"))
    want = list(batches_of(folder, image_size=16))
    for start in (0, 2):
        got = batches_of(folder, start, **settings, image_size=16, in_memory=False)
        for batch, expected in zip(got, want[start:], strict=True):
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
        if got.backend == "native":
            assert "stream from their files" in got.reason


@pytest.mark.parametrize("settings", [{}, {"backend": "pil"}, {"backend": "pil", "num_workers": 1}])
def test_a_file_that_vanishes_stops_the_run_with_its_name(folder, settings):
    batches = batches_of(folder, **settings, in_memory=False)
    for path in (folder / "unlabeled").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"\.jpg cannot be read any more: there is no such file") as raised:
        list(batches)
    one_line(raised)


def test_a_run_is_evaluated_as_it_was_trained(folder, monkeypatch):
    """A training set larger than memory must not be read into it to score the test set."""
    import normatch.model

    given = []
    monkeypatch.setattr(normatch.model, "load_dataset", lambda *a: given.append(load_dataset(*a)) or given[-1])
    arguments = {"dataset": "folder", "data_dir": str(folder), "num_labels": 8, "batch_size": 2, "uratio": 2,
                 "steps": 1, "backbone": "wrn-10-1", "device": "cpu", "progress": False}  # fmt: skip
    for in_memory in (True, False):
        result = train(**arguments, in_memory=in_memory, out=str(folder / f"run{in_memory}"))
        scores = evaluate(folder / f"run{in_memory}")
        assert scores["test_accuracy"] == result.test_accuracy
        assert isinstance(given[-1].train_x, np.ndarray) == in_memory


def test_rows_of_files_are_rows_of_the_array(folder):
    files = load_dataset("folder", folder, in_memory=False).train_x
    images = load_dataset("folder", folder).train_x
    assert files.shape == images.shape and files.nbytes == images.nbytes and len(files) == len(images)
    for rows in (3, slice(1, 9, 2), np.array([5, 0, 5]), np.arange(14) % 2 == 0):
        assert np.array_equal(files[rows], images[rows])


# ---- Folders that are not in order


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def without(*parts):
    def remove(folder):
        for part in parts:
            empty(folder / part)
            (folder / part).rmdir()

    return remove


def test_a_set_larger_than_memory_says_how_to_go_on(folder, monkeypatch):
    monkeypatch.setattr(folders.np, "empty", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match=r"14 images of 12x12 take 0 GiB, .*--in_memory false"):
        load(folder)


LAYOUTS = {
    "empty folder": (empty, "has no folder train .it is empty.: put labeled images in train/CLASS/"),
    "no train": (without("train"), "has no folder train .it holds test, unlabeled.: put labeled"),
    "no classes": (lambda f: empty(f / "train"), "no labeled training image: at least two classes"),
    "one class": (without("train/dog", "test/dog"), "only the class 'cat': at least two classes are needed"),
    "class without images": (lambda f: empty(f / "train" / "dog"), "class 'dog' has no image"),
    "no test images": (without("test"), "neither test nor val images"),
    "unknown test class": (lambda f: put(f / "test" / "bird" / "b.png"), "the label 'bird' has no training image"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_folders_that_cannot_be_trained_on(folder, case):
    change, message = LAYOUTS[case]
    change(folder)
    with pytest.raises(UserError, match=message) as raised:
        load(folder)
    one_line(raised)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none: name yours with --data_dir"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="your own images are --dataset folder --data_dir"):
        load_dataset(str(tmp_path))
    with pytest.raises(UserError, match="image_size may be 1 to 2048, not 0"):
        load(tmp_path, image_size=0)


# ---- Looking, and real images


def test_check_counts_classes_sizes_and_unreadable_files(folder):
    put(folder / "train" / "cat" / "wide.png", picture(size=(30, 20), mode="L"))
    DAMAGE["text.png"][0](folder / "unlabeled" / "text.png")
    DAMAGE["bomb.png"][0](folder / "train" / "dog" / "bomb.png")
    lines, bad = check(folder)
    text = "\n".join(lines)
    assert bad == 2
    expected = """train      10 images of 2 classes
  cat 5
  dog 5
unlabeled  7 images
12x12 (16), 30x20 (1)
RGB (16), L (1)
unreadable 2 files
text.png: it is not an image
bomb.png: """
    for line in expected.splitlines():
        assert line in text, line
    lines, bad = check(table(folder, ROWS), table=True)
    assert bad == 0 and "train      8 images of 2 classes" in lines


def test_check_says_what_prevents_training(folder):
    without("train/dog", "test/dog")(folder)
    assert any("at least two classes" in line for line in check(folder)[0])


@pytest.mark.skipif(MNIST is None, reason="MNIST is not at hand")
def test_a_folder_of_mnist_images_trains(tmp_path):
    mnist = load_dataset("mnist", MNIST)
    for i in range(300):
        place = tmp_path / ("unlabeled" if i >= 100 else f"train/{mnist.train_labels[i]}")
        put(place / f"{i}.png", Image.fromarray(mnist.train_x[i, :, :, 0]))
    for i in range(50):
        put(tmp_path / "test" / str(mnist.test_labels[i]) / f"{i}.png", Image.fromarray(mnist.test_x[i, :, :, 0]))
    data = load(tmp_path)
    assert data.train_x.shape == (300, 28, 28, 3) and (data.train_labels == -1).sum() == 200
    assert data.classes == list("0123456789")
    assert np.array_equal(np.sort(data.train_x.sum((1, 2, 3))), np.sort(mnist.train_x[:300].sum((1, 2, 3))))
    code = (
        "import sys, normatch\n"
        f"r = normatch.train(dataset='folder', data_dir={str(tmp_path)!r}, num_labels=10, batch_size=4, uratio=2,\n"
        "    backbone='wrn-10-1', steps=4, eval_every=4, log_every=2, in_memory=False, device='cpu', progress=False,\n"
        f"    out={str(tmp_path / 'run')!r})\n"
        "assert 0 <= r.test_accuracy <= 100\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_mini_imagenet_is_class_folders_at_84_pixels(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    (place / "mini-imagenet").symlink_to(folder)
    data, published = (load_dataset("miniimagenet", place, compat=compat) for compat in ("none", "reference"))
    assert data.name == "miniimagenet" and data.train_x.shape == (14, 84, 84, 3) and data.classes == ["cat", "dog"]
    assert data.mean == published.mean == (0.485, 0.456, 0.406) and data.flip
    assert (data.std[1], published.std[1]) == (0.224, 0.84)  # the published code's misprint, on request
