"""`normatch data`: the counts it prints, the picture it writes, and what it says of a damaged folder."""

import argparse

import numpy as np
import pytest
from PIL import Image

from normatch.augment import POLICIES
from normatch.contact_sheet import contact_sheet, data_arguments, data_command, describe
from normatch.data import load_dataset
from normatch.errors import UserError


def run(*arguments):
    parser = argparse.ArgumentParser()
    data_arguments(parser)
    return data_command(parser.parse_args([str(a) for a in arguments]))


def test_the_sheet_shows_images_and_views():
    digits = load_dataset("digits")
    sheet = np.asarray(contact_sheet(digits, POLICIES["kekmodel"], "pil", rows=3, weak=1, strong=2))
    assert sheet.shape == (14 + 4 + 3 * 68, 4 + 4 * 68, 3)
    first = sheet[18 : 18 + 64 : 2, 4 : 4 + 64 : 2]
    assert np.array_equal(first, digits.train_images[0])
    cells = [sheet[18 : 18 + 64, 4 + 68 * i : 68 + 68 * i] for i in range(4)]
    assert len({cell.tobytes() for cell in cells}) == 4


def test_backends_and_repetitions_draw_the_same_sheet():
    digits = load_dataset("digits")
    sheets = [contact_sheet(digits, POLICIES["leedoyup"], b, rows=4).tobytes() for b in ("pil", "native", "native")]
    assert len(set(sheets)) == 1
    assert contact_sheet(digits, POLICIES["leedoyup"], "native", rows=4, seed=1).tobytes() != sheets[0]


def test_data_prints_counts_and_writes_the_picture(tmp_path, capsys):
    assert run("digits", "--out", tmp_path / "views.png") == 0
    text = capsys.readouterr().out
    assert "1297 images of 10 classes, 32x32" in text and "test       500 images" in text and "views.png" in text
    assert Image.open(tmp_path / "views.png").width == 4 + 10 * 68


def test_a_folder_is_checked_and_shown(tmp_path, capsys):
    for part, name, count in (("train", "a", 3), ("train", "b", 2), ("test", "a", 1), ("test", "b", 1)):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (10, 12), (i * 9, 100, 50)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "unlabeled").mkdir()
    (tmp_path / "unlabeled" / "bad.png").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 1 unlabelled images"):
        assert run(tmp_path, "--out", tmp_path / "v.png", "--augment", "weak", "--augment_backend", "pil") == 0
    text = capsys.readouterr().out
    for line in ("5 images of 2 classes", "  a 3", "10x12 (7)", "unreadable 1 files", "bad.png: it is not an image",
                 "weak by pil (as asked for)"):  # fmt: skip
        assert line in text, line
    (tmp_path / "train" / "a" / "worse.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"worse\.jpg cannot be read: the file is empty"):
        run(tmp_path, "--out", tmp_path / "v.png")
    assert "unreadable 2 files" in capsys.readouterr().out  # the check is printed first


def test_mistakes_are_one_line(tmp_path):
    for arguments, message in (
        (("cifar11",), "did you mean 'cifar10'"),
        (("digits", "--augment", "kekmodle"), "did you mean 'kekmodel'"),
        (("digits", "--augment_backend", "cv2"), "augment_backend may be"),
        (("digits", "--out", tmp_path / "no" / "v.png"), "cannot be written"),
        (("digits", "--out", tmp_path / "v.xyz"), "cannot be written"),
        (("digits", "--rows", 0), "rows must be"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)


def test_many_classes_are_summed_up():
    from dataclasses import replace

    digits = load_dataset("digits")
    many = replace(digits, classes=[f"class {i}" for i in range(100)])
    assert any("and 80 more" in line for line in describe(many))
