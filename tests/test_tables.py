"""The data sets that are tables: the toys' published rows, bundled sets, texts, one's own files and their mistakes."""

import numpy as np
import pytest
import torch

from normatch.data import TABLES, load_dataset, make_split, standardize
from normatch.data.base import Request
from normatch.data.tables import read_texts
from normatch.errors import UserError


def standardized(table):
    return standardize(torch.from_numpy(table.train_x), table.mean, table.std).numpy()


@pytest.mark.parametrize(
    ("name", "rows", "counts"),
    [
        ("moons", {1: [0, 1, 3, 4, 5], 0: [2, 6, 7, 10, 17]}, [5, 5]),
        ("circles", {1: [0, 1, 3, 4], 0: [2, 6, 7, 10, 17, 19, 34]}, [7, 4]),
        ("8gaussians", {}, [6, 6, 7]),
        ("pinwheel", {}, [3, 2, 3, 2, 3]),
    ],
)
def test_toys_have_their_published_points_and_labels(name, rows, counts):
    toy = load_dataset(name)
    split = make_split(toy, sum(counts), seed=3)
    labels = toy.train_labels[split.labeled]
    assert toy.train_x.shape == (1000, 2) and len(split.unlabeled) == 1000
    assert np.bincount(labels).tolist() == counts
    for label, expected in rows.items():
        assert split.labeled[labels == label].tolist() == expected
    assert np.array_equal(standardized(toy), toy.train_x)  # in their own units
    assert np.array_equal(load_dataset(name).train_x, toy.train_x)


def test_eight_gaussians_are_eight_clusters_each_with_a_label():
    toy = load_dataset("8gaussians")
    angle = np.round(np.arctan2(*toy.train_x.T[::-1]) / (np.pi / 4)).astype(int) % 8
    centre = 2.83 * np.stack([np.cos(angle * np.pi / 4), np.sin(angle * np.pi / 4)], 1)
    assert abs((toy.train_x - centre).std() - 0.35) < 0.01
    assert (toy.train_labels == np.array([1, 2, 2, 2, 0, 0, 1, 1])[angle]).mean() > 0.995
    assert sorted(set(angle[toy.folds[0]])) == list(range(8))


@pytest.mark.parametrize(("name", "shape"), [("digits-table", (1297, 61)), ("wine", (142, 13)), ("iris", (120, 4))])
def test_bundled_tables_are_standardized_and_without_constant_columns(name, shape):
    table = load_dataset(name)
    x = standardized(table)
    assert x.shape == shape and x.dtype == np.float32
    assert np.abs(x.mean(0)).max() < 1e-4 and np.abs(x.std(0) - 1).max() < 1e-4


def test_a_picture_is_dense_where_it_is_dark(tmp_path):
    from PIL import Image

    pixels = np.full((40, 40), 255, np.uint8)
    pixels[:20, 20:] = 0  # dark in the upper right
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    x = load_dataset("picture", tmp_path / "corner.png").train_x
    assert ((x > -0.3).all(1)).mean() > 0.99 and x.max() > 3.5


def test_texts_are_embedded_and_those_of_the_test_left_out(tmp_path):
    words = [["war", "peace"], ["goal", "match"], ["bank", "profit"], ["chip", "web"]]
    rng = np.random.RandomState(0)

    def text(label):
        return " ".join(rng.choice([*words[label], "news"], 4)) + f" {rng.randint(999999)}"

    labels = np.tile(np.arange(4), 60)
    texts = [text(label) for label in labels]
    folder = tmp_path / "ag_news"
    folder.mkdir()
    lines = [f'{label + 1},"{t}"\n' for label, t in zip(labels, texts, strict=True)]
    (folder / "train.csv").write_text("label,content\n" + "".join(lines))
    (folder / "test.csv").write_text(f'"1","A title","{texts[0]}"\n' + "".join(lines[200:204]))
    assert len(read_texts(Request("ag-news", tmp_path))[0]) == 240 - 5
    with pytest.raises(UserError, match="hold few words"):  # 64 dimensions need more of them
        load_dataset("ag-news", tmp_path)

    np.savez(folder / "embeddings.npz", train=rng.randn(235, 7), test=rng.randn(5, 7))
    assert load_dataset("ag-news", tmp_path).train_x.shape == (235, 7)
    np.savez(folder / "embeddings.npz", train=rng.randn(9, 7), test=rng.randn(5, 7))
    with pytest.raises(UserError, match="of other texts"):
        load_dataset("ag-news", tmp_path)
    (folder / "train.csv").write_text("label,content\n7,who knows\n")
    with pytest.raises(UserError, match="row 2: it must begin with a class, 1 to 4"):
        load_dataset("ag-news", tmp_path)


def test_miniboone_reads_both_layouts(tmp_path):
    rng = np.random.RandomState(0)
    np.save(tmp_path / "miniboone_maf.npy", rng.randn(50, 43))
    assert load_dataset("miniboone", tmp_path).classes == ["signal"]
    rows = "\n".join(" ".join(f"{v:.4f}" for v in row) for row in rng.randn(70, 50))
    (tmp_path / "MiniBooNE_PID.txt").write_text(f" 30 40\n{rows}\n")
    table = load_dataset("miniboone", tmp_path)
    assert len(table.train_x) + len(table.test_x) == 60  # as many of each class
    assert np.bincount(np.concatenate([table.train_labels, table.test_labels])).tolist() == [30, 30]


def test_hepmass_drops_features_that_repeat_a_value(tmp_path):
    rng = np.random.RandomState(0)
    for name, columns in (("1000_train.csv", 29), ("1000_test.csv", 30)):
        x = rng.randn(400, columns)
        x[:, 0], x[:, 5] = rng.randint(2, size=400), rng.randint(3, size=400)
        (tmp_path / name).write_text("names\n" + "\n".join(",".join(map(repr, map(float, row))) for row in x) + "\n")
    table = load_dataset("hepmass", tmp_path)
    assert table.train_x.shape[1] == table.test_x.shape[1] == 27
    assert 50 < len(table.train_x) < 110 and 2 < len(table.test_x) < 40


def write(path, *rows):
    path.write_bytes("\n".join((*rows, "")).encode(errors="surrogateescape"))


def test_an_own_table_is_read_with_its_unlabeled_rows(tmp_path):
    write(tmp_path / "train.csv", "\ufeffa,label,b", "1,yes,2", "2,,3", "0.5,no,9", "3,-1,4")  # as Excel saves it
    write(tmp_path / "test.csv", "a,label,b", "1,yes,2", "7,no,8")
    table = load_dataset("table", tmp_path)
    assert table.classes == ["no", "yes"] and table.train_labels.tolist() == [1, -1, 0, -1]
    assert table.train_x.tolist() == [[1, 2], [2, 3], [0.5, 9], [3, 4]] and table.test_labels.tolist() == [1, 0]
    assert make_split(table, 0, seed=0).labeled.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,b", "1,2"], "one of them `label`"),
        (["a,label", "1,x", "2,y,3"], "row 3: 3 values, where the first row names 2"),
        (["a,label", "one,x"], "row 2: could not convert"),
        (["a,label", "1,x", "2,y"], "at least two columns of features"),
        (["a,b,label"], "needs rows of"),
        (["a,b,label", "1,2,caf\udce9"], "cannot be read as a CSV file: 'utf-8' codec"),
        (["a,b,label", "1,nan,x", "2,3,y"], "NaN or infinite features, the first is row 2, column b"),
        (["a,b,label", "1,5,x", "2,5,y"], r"1 columns are constant \(b\)"),
        (["a,b,label", "1,5,", "2,6,"], "no labeled row"),
    ],
)
def test_a_mistake_in_an_own_table_is_one_line(tmp_path, rows, message):
    write(tmp_path / "train.csv", *rows)
    with pytest.raises(UserError, match=message):
        load_dataset("table", tmp_path)


def test_what_is_not_there_is_said(tmp_path):
    for name in ("miniboone", "hepmass", "ag-news", "yahoo"):
        with pytest.raises(UserError, match=f"{name} is not in"):
            load_dataset(name, tmp_path)
    with pytest.raises(UserError, match="did you mean 'moons'"):
        load_dataset("moon")
    assert len(set(TABLES)) == len(TABLES)
