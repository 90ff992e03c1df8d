"""Data sets of rows: the toys of the flow papers, scikit-learn's and UCI's tables, embedded texts, your own CSV files.

The toys and scikit-learn's tables need no files; the others are read from data_dir.
"""

import csv
import gzip
from pathlib import Path

import numpy as np

from ..errors import UserError
from .arrays import check_features, from_arrays
from .base import Dataset, Request, read_csv
from .split import split_labels

# ---- Toys, in the plane. As published: trained and tested on the same 1,000 points, in their own units.


def moons(request: Request) -> Dataset:
    """(1000, 2): two half circles. Toys and labeled rows are those of FlowGMM (Izmailov et al. 2020, section 5.1)."""
    from sklearn.datasets import make_moons  # slow to import

    x, y = make_moons(1000, noise=0.05, random_state=np.random.RandomState(0))
    return _toy(request, x, y, [0, 1, 2, 3, 4, 5, 6, 7, 10, 17])


def circles(request: Request) -> Dataset:
    """(1000, 2): a circle in a circle."""
    from sklearn.datasets import make_circles  # slow to import

    x, y = make_circles(1000, noise=0.05, factor=0.4, random_state=np.random.RandomState(0))
    return _toy(request, x, y, [0, 1, 2, 3, 4, 6, 7, 10, 17, 19, 34])


def eight_gaussians(request: Request) -> Dataset:
    """(1000, 2): three classes of 2, 3 and 3 clusters on a circle, with 6, 6 and 7 labels."""
    rng = np.random.RandomState(0)
    clusters = rng.randint(8, size=1000)
    angle = 2 * np.pi * clusters / 8
    x = 4 / np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.5 / np.sqrt(2) * rng.randn(1000, 2)
    y = np.array([1, 2, 2, 2, 0, 0, 1, 1])[clusters]  # clusters at 0, 45, ..., 315 degrees
    return _toy(request, x, y, _first_rows(clusters, y, (6, 6, 7)))


def pinwheels(request: Request) -> Dataset:
    """(1000, 2): five spiral arms, those of Johnson et al. 2016 (SVAE) at twice the scale; 3, 2, 3, 2 and 3 labels."""
    rng = np.random.RandomState(0)
    y = rng.randint(5, size=1000)
    x = rng.randn(1000, 2) * [0.3, 0.1] + [1, 0]
    angle = 2 * np.pi * y / 5 + 0.25 * np.exp(x[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    x = 2 * np.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 0] * sin + x[:, 1] * cos], 1)
    return _toy(request, x, y, _first_rows(y, y, (3, 2, 3, 2, 3)))


def _toy(request: Request, x, y, labeled) -> Dataset:
    classes = [str(k) for k in range(y.max() + 1)]
    folds = (np.sort(np.array(labeled, np.int64)),)
    return from_arrays(x, y, x, y, classes, request.name, scale="none", folds=folds)


def _first_rows(clusters, y, counts) -> list[int]:
    """counts[k] rows of class k, taken in turn from each of its clusters."""
    labeled = []
    for label, count in enumerate(counts):
        rows = [np.flatnonzero(clusters == c) for c in np.unique(clusters[y == label])]
        labeled += [rows[i % len(rows)][i // len(rows)] for i in range(count)]
    return labeled


def picture(request: Request) -> Dataset:
    """(20000, 2): a picture as a density over [-4, 4]^2, dense where it is dark. data_dir: its file, default a flower.

    22,000 pixels are drawn by darkness and moved by Gaussian noise of half a pixel, all of one class.
    """
    from PIL import Image

    if request.data_dir is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(255 - load_sample_image("flower.jpg")).crop((180, 20, 580, 420))
    else:
        try:
            image = Image.open(request.data_dir)
        except OSError as error:
            raise UserError(f"picture: data_dir must name an image file: {error}") from None
    gray = np.asarray(image.convert("L").resize((100, 100)), np.float64)
    rng = np.random.RandomState(0)
    weight = (gray.max() - gray).ravel()
    if not weight.any():
        raise UserError("picture: the image has one color everywhere, there is no density in it")
    pixel = rng.choice(weight.size, 22000, p=weight / weight.sum())
    row, column = np.divmod(pixel, 100)
    x = np.stack([column, 99 - row], 1) * (8 / 99) - 4 + 0.5 * (8 / 99) * rng.randn(len(pixel), 2)
    y = np.zeros(len(x), np.int64)
    return from_arrays(x[:20000], y[:20000], x[20000:], y[20000:], ["all"], "picture", scale="none")


def bundled(request: Request) -> Dataset:
    """(N, D): one of scikit-learn's tables. A fifth of each class is the test set, whatever the run's seed.

    digits-table: the test set is that of digits, 500 rows.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = getattr(datasets, f"load_{request.name.removesuffix('-table').replace('-', '_')}")()
    x, y = bunch.data, bunch.target.astype(np.int64)
    if request.name == "digits-table":
        test = split_labels(y, 500, 10, seed=0).labeled
        train = np.setdiff1d(np.arange(len(y)), test)
        x = x[:, np.ptp(x[train], axis=0) > 0]  # three pixels of the margin are always 0
    else:
        train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    classes = [str(name) for name in bunch.target_names]
    return from_arrays(x[train], y[train], x[test], y[test], classes, request.name)


def miniboone(request: Request) -> Dataset:
    """(N, 50): electron and muon neutrinos, 2 x 36,499 rows, a tenth of them for the test.

    Reads UCI's MiniBooNE_PID.txt (set 199), or without it the array of the density papers (Papamakarios et al. 2017):
    miniboone*.npy, 43 features of a single class, whose density can be fitted.
    """
    folder = request.subfolder("miniboone")
    text, arrays = folder / "MiniBooNE_PID.txt", sorted(folder.glob("miniboone*.npy"))
    if text.is_file():
        with open(text) as file:
            signal, background = map(int, file.readline().split())
            x = np.loadtxt(file, dtype=np.float32)
        least = min(signal, background)
        x = np.concatenate([x[:least], x[signal : signal + least]])
        y = np.repeat(np.array([1, 0]), least)
        classes = ["background", "signal"]
    elif arrays:
        x = np.load(arrays[0], allow_pickle=False)
        y, classes = np.zeros(len(x), np.int64), ["signal"]
    else:
        raise UserError(
            f"miniboone is not in {folder}: put UCI's MiniBooNE_PID.txt there, or name its folder, --data_dir"
        )
    test = np.random.RandomState(0).permutation(len(x)) < len(x) // 10
    return from_arrays(x[~test], y[~test], x[test], y[test], classes, "miniboone")


def hepmass(request: Request) -> Dataset:
    """(N, 21): a new particle and background, UCI's 1000_train.csv.gz and 1000_test.csv.gz (set 347).

    As in the density papers: a fifth of the training rows and 4 % of the test rows, without features that repeat one
    value in more than a thousandth of the rows.
    """
    folder = request.subfolder("hepmass")
    parts = []
    for name, share in (("1000_train.csv", 0.2), ("1000_test.csv", 0.04)):
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise UserError(f"hepmass is not in {folder}: put UCI's 1000_train.csv.gz and 1000_test.csv.gz there")
        chosen = np.random.RandomState(0)
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            next(file)
            rows = (line for line in file if chosen.random_sample() < share)
            parts.append(np.loadtxt(rows, delimiter=",", dtype=np.float32))
    (train, train_y), (test, test_y) = ((part[:, 1:29], part[:, 0].round().astype(np.int64)) for part in parts)
    often = np.array([np.unique(column, return_counts=True)[1].max() for column in train.T])
    kept = often <= max(5, len(train) // 1000)
    return from_arrays(train[:, kept], train_y, test[:, kept], test_y, ["background", "signal"], "hepmass")


# ---- Texts

# name: (folder, classes, largest number of test rows)
_TEXTS = {
    "ag-news": ("ag_news", ("World", "Sports", "Business", "Sci/Tech"), None),
    "yahoo": (
        "yahoo_answers",
        (
            "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet",
            "Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
        ),
        10000,
    ),
}  # fmt: skip
EMBEDDED = "embeddings.npz"  # written by `normatch embed` beside the texts


def read_texts(request: Request):
    """ag-news or yahoo -> N training texts, (N,) labels, M test texts, (M,) labels, and the folder they are in.

    Reads train*.csv and test.csv, rows of class (from 1) and the parts of a text. Training texts with the body of a
    test text are left out.
    """
    name = request.name
    place, classes, most = _TEXTS[name]
    folder = request.subfolder(place)
    train, test = sorted(folder.glob("train*.csv")), folder / "test.csv"
    if not train or not test.is_file():
        raise UserError(
            f"{name} is not in {folder}: put its train.csv and test.csv there, or name the folder, --data_dir"
        )
    rows = _text_rows(test, len(classes))[:most]
    test_texts, test_y = [text for _, text in rows], np.array([label for label, _ in rows])
    known = {_body(text) for text in test_texts}
    rows = [row for row in _text_rows(train[0], len(classes)) if _body(row[1]) not in known]
    return [text for _, text in rows], np.array([label for label, _ in rows]), test_texts, test_y, folder


def _text_rows(path: Path, classes: int) -> list[tuple[int, str]]:
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if number == 1 and row and not row[0].strip().isdigit():
                continue  # a header
            try:
                label = int(row[0]) - 1
            except (ValueError, IndexError):
                label = -1
            if not 0 <= label < classes:
                raise UserError(f"{path}, row {number}: it must begin with a class, 1 to {classes}")
            rows.append((label, "\n".join(row[1:])))
    return rows


def _body(text: str) -> str:
    """The words of the last line: the same for a text with and without its title."""
    return " ".join(text.rsplit("\n", 1)[-1].lower().split())


def texts(request: Request) -> Dataset:
    """(N, 64): texts, embedded by TF-IDF of words and word pairs, a truncated SVD and rows of length 1.

    If `normatch embed` has left its file beside the texts, its embeddings are taken instead.
    """
    name = request.name
    train_texts, y, test_texts, test_y, folder = read_texts(request)
    if (folder / EMBEDDED).is_file():
        try:
            with np.load(folder / EMBEDDED, allow_pickle=False) as stored:
                x, test = stored["train"], stored["test"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{folder / EMBEDDED} cannot be read ({error}): make it anew with normatch embed") from None
        if (len(x), len(test)) != (len(y), len(test_y)):
            raise UserError(f"{folder / EMBEDDED} is of other texts: make it anew with normatch embed")
    else:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        words = TfidfVectorizer(sublinear_tf=True, min_df=3, max_df=0.2, ngram_range=(1, 2), stop_words="english")
        embed = make_pipeline(words, TruncatedSVD(64, random_state=0), Normalizer())
        try:
            x, test = embed.fit_transform(train_texts), embed.transform(test_texts)
        except ValueError as error:  # the vocabulary is empty, or smaller than the SVD's dimensions
            raise UserError(
                f"the {len(train_texts)} training texts of {name} hold few words to embed them by: {error}"
            ) from None
    # Directions of little variance say little about a text: with a common scale they stay small.
    return from_arrays(x, y, test, test_y, _TEXTS[name][1], name, scale="common", angular=True)


def embed(name: str, data_dir: str | Path | None, model: str) -> Path:
    """Embeds the texts of data set `name` by a sentence-transformers model on disk -> the file that `texts` reads."""
    data_dir = Path(data_dir) if data_dir else None
    train_texts, _, test_texts, _, folder = read_texts(Request(name, data_dir))
    if not Path(model).is_dir():
        raise UserError(f"there is no folder {model}: name one that holds a sentence-transformers model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(f"embedding needs sentence-transformers: pip install sentence-transformers ({error})") from None
    encoder = SentenceTransformer(model)
    x, test = (encoder.encode(part, show_progress_bar=True) for part in (train_texts, test_texts))
    path = folder / EMBEDDED
    np.savez(path, train=x.astype(np.float32), test=test.astype(np.float32))
    return path


def csv_files(request: Request) -> Dataset:
    """(N, D): train.csv and test.csv, with a header, numbers and a column `label`, empty or -1 if unlabeled."""
    folder = request.folder
    names, x, labels = _numbers(folder / "train.csv")
    test = folder / "test.csv"
    test_names, test_x, test_labels = _numbers(test) if test.is_file() else (names, x[:0], [])
    if test_names != names:
        raise UserError(f"the columns of {test} are not those of {folder / 'train.csv'}")
    classes = sorted({label for label in labels if label}, key=lambda s: (len(s), s) if s.isdigit() else (99, s))
    if not classes:
        raise UserError(f"{folder / 'train.csv'} has no labeled row")
    number = {name: k for k, name in enumerate(classes)}
    unknown = sorted({label for label in test_labels if label not in number})
    if unknown:
        raise UserError(f"{test}: every row needs one of the labels of train.csv, not {unknown[0]!r}")
    check_features(x, str(folder / "train.csv"), names, first=2)
    y, test_y = (np.array([number.get(v, -1) for v in values], np.int64) for values in (labels, test_labels))
    if not len(test_x):
        raise UserError(f"{folder} needs a test.csv, with a few labeled rows to judge the result by")
    return from_arrays(x, y, test_x, test_y, classes, "table", columns=tuple(names))


def read_rows(path: str | Path, features: int, columns=()) -> np.ndarray:
    """A CSV file with a header -> (N, D) float32, without its column `label` if it has one: input for a model.

    features: D.   columns: their names, if known. Raises UserError if the file has other columns.
    """
    names, x, _ = _numbers(path, labeled=False)
    if len(names) != features or (columns and names != list(columns)):
        wanted = ", ".join(columns) or f"{features} of them"
        raise UserError(f"the columns of {path} ({', '.join(names)}) are not those of the model's table: {wanted}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise UserError(f"{path}, row {bad[0] + 2}: a feature is NaN or infinite")
    return x


def _numbers(path: str | Path, labeled: bool = True) -> tuple[list[str], np.ndarray, list[str]]:
    """A CSV file -> the names of D features, their values (N, D), and N labels, "" where unknown."""
    rows = read_csv(path)
    if not rows or (labeled and "label" not in rows[0]):
        raise UserError(f"{path} needs a first row that names its columns, one of them `label`")
    header = rows[0]
    label = header.index("label") if "label" in header else None
    values, labels = [], []
    for number, row in enumerate(rows[1:], 2):
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} values, where the first row names {len(header)}")
            values.append([float(v) for c, v in enumerate(row) if c != label])
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        text = "" if label is None else row[label].strip()
        labels.append("" if text == "-1" else text)
    names = [name for name in header if name != "label"]
    if len(names) < 2 or not values:
        raise UserError(f"{path} needs rows of at least two columns of features beside `label`")
    return names, np.array(values, np.float32), labels
