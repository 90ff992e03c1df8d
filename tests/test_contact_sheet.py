"""`normatch data`: the counts it prints, the picture it writes, and what it says of a damaged folder."""

import argparse
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from real_data import ROOT

from normatch.augment.draws import View, draw_parameters
from normatch.augment.pillow import strong_views, weak_views
from normatch.augment.policy import POLICIES
from normatch.data import load_dataset
from normatch.errors import UserError
from normatch.tools.contact_sheet import contact_sheet, data_arguments, data_command, describe


def run(*arguments):
    parser = argparse.ArgumentParser()
    data_arguments(parser)
    return data_command(parser.parse_args([str(a) for a in arguments]))


def cells(sheet, columns, rows, side=96, gap=6):
    """The tiles of a sheet, from its right and bottom margins."""
    sheet = np.asarray(sheet)
    left = sheet.shape[1] - gap - columns * (side + gap)
    tops = []
    for y in range(sheet.shape[0]):  # a row of pixels without gaps begins a row of tiles
        if (sheet[y, left : left + side] != 255).mean() > 0.9 and (not tops or y >= tops[-1] + side):
            tops.append(y)
    assert len(tops) == rows
    return [[sheet[y : y + side, left + i * (side + gap) :][:, :side] for i in range(columns)] for y in tops]


def test_the_sheet_shows_images_views_and_what_made_them():
    digits = load_dataset("digits")
    policy = replace(POLICIES["kekmodel"], ops=("Posterize",), ranges={"Posterize": (4, 4)}, probability=1.0)
    sheet = contact_sheet(digits, policy, "pil", rows=3, weak=1, strong=2, title="digits: mine by pil")
    found = cells(sheet, 4, 3)
    p = draw_parameters(policy, 0, [0, 1], [0, 0], View.UNLABELED_STRONG, 32, 32, strong=True, flip=False)
    weak = draw_parameters(policy, 0, 0, [0], View.UNLABELED_WEAK, 32, 32, strong=False, flip=False)
    first = [
        digits.train_x[:1],
        weak_views(digits.train_x[:1], weak, "reflect"),
        strong_views(digits.train_x[[0, 0]], p, policy),
    ]
    for cell, tile in zip(found[0], np.concatenate(first), strict=True):
        assert np.array_equal(cell[::3, ::3], tile)
    plain = contact_sheet(digits, policy, "pil", rows=3, weak=1, strong=2)
    assert sheet.height == plain.height + 24 and plain.height == 22 + 3 * (96 + 2 * 12 + 6) + 6  # two lines of captions
    none = contact_sheet(digits, replace(policy, probability=0.0), "pil", rows=3, weak=1, strong=2)
    assert none.height == 22 + 3 * (96 + 6) + 6


def test_backends_and_repetitions_draw_the_same_sheet():
    digits = load_dataset("digits")
    sheets = [contact_sheet(digits, POLICIES["leedoyup"], b, rows=4).tobytes() for b in ("pil", "native", "native")]
    assert len(set(sheets)) == 1
    assert contact_sheet(digits, POLICIES["leedoyup"], "native", rows=4, seed=1).tobytes() != sheets[0]


def test_data_prints_counts_and_writes_the_picture(tmp_path, capsys):
    assert run("digits", "--out", tmp_path / "views.png") == 0
    text = capsys.readouterr().out
    assert "1297 images of 10 classes, 32x32" in text and "test       500 images" in text and "views.png" in text
    assert len(cells(Image.open(tmp_path / "views.png"), 10, 8)) == 8


def test_a_folder_is_checked_and_shown(tmp_path, capsys):
    for part, name, count in (("train", "a", 3), ("train", "b", 2), ("test", "a", 1), ("test", "b", 1)):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (10, 12), (i * 9, 100, 50)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "unlabeled").mkdir()
    (tmp_path / "unlabeled" / "bad.png").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 1 unlabeled images"):
        assert run(tmp_path, "--out", tmp_path / "v.png", "--augment", "weak", "--augment_backend", "pil") == 0
    text = capsys.readouterr().out
    for line in ("5 images of 2 classes", "  a 3", "10x12 (7)", "unreadable 1 files", "bad.png: it is not an image",
                 "weak by pil (as asked for)"):  # fmt: skip
        assert line in text, line
    (tmp_path / "train" / "a" / "worse.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"worse\.jpg cannot be read: the file is empty"):
        run(tmp_path, "--out", tmp_path / "v.png")
    assert "unreadable 2 files" in capsys.readouterr().out  # the check is printed first


def test_data_sets_come_before_folders_of_their_name_and_folders_of_tables_are_seen(tmp_path, capsys, monkeypatch):
    (tmp_path / "digits").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "train.csv").write_text("path,label\n0.png,a\n1.png,b\n")
    (tmp_path / "test.csv").write_text("path,label\n2.png,a\n3.png,b\n")
    monkeypatch.chdir(tmp_path)
    for name, count in (("digits", 1297), (".", 2)):
        assert run(name, "--augment_backend", "pil", "--rows", 1) == 0
        assert f"{count} images of" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path):
    for arguments, message in (
        (("cifar11",), "did you mean 'cifar10'"),
        (("iris",), "iris is a table"),
        (("digits", "--augment", "kekmodle"), "did you mean 'kekmodel'"),
        (("digits", "--augment_backend", "cv2"), "augment_backend may be"),
        (("digits", "--out", tmp_path / "no" / "v.png"), "cannot be written"),
        (("digits", "--out", tmp_path / "v.xyz"), "cannot be written"),
        (("digits", "--rows", 0), "rows must be"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)


def test_many_classes_are_summed_up():
    digits = load_dataset("digits")
    many = replace(digits, classes=[f"class {i}" for i in range(100)])
    assert any("and 80 more" in line for line in describe(many))


def test_a_warning_is_one_line(tmp_path):
    for i, place in enumerate(("train/a", "train/b", "test/a", "test/b", "unlabeled")):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / place / "0.png")
    (tmp_path / "unlabeled" / "1.png").write_text("no image")
    command = [sys.executable, "-m", "normatch", "data", str(tmp_path), "--out", str(tmp_path / "v.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stderr.splitlines() if "unlabeled" in line]
    assert done.returncode == 0, done.stderr
    assert len(lines) == 1 and lines[0].startswith("normatch: 1 of 2 unlabeled images in ")
    assert "folders.py" not in done.stderr
