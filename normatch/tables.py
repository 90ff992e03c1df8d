"""Data sets that are tables of numbers: the toys of the flow papers, scikit-learn's, UCI's, and embedded texts.

moons, circles, 8gaussians, pinwheel, picture    made here, 1,000 points (picture: 20,000), no files
digits-table, breast-cancer, wine, iris          scikit-learn's own, no files
miniboone, hepmass                               UCI's files in data_dir
ag-news, yahoo                                   CSV files in data_dir, embedded by TF-IDF and a truncated SVD, or
                                                 by what `normatch embed` has left beside them
table                                            your own train.csv and test.csv in data_dir, with a column `label`
"""

import csv
import gzip
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import UserError

TABLES = (
    "moons", "circles", "8gaussians", "pinwheel", "picture", "digits-table", "breast-cancer", "wine", "iris",
    "miniboone", "hepmass", "ag-news", "yahoo", "table",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of features in memory. A label of -1 is unknown. A model sees (x - mean) / std."""

    name: str
    train_x: np.ndarray  # (N, D) float32
    train_labels: np.ndarray  # (N,) int64
    test_x: np.ndarray  # (M, D) float32
    test_labels: np.ndarray  # (M,) int64
    classes: list[str]
    mean: np.ndarray  # (D,) float32: of the training rows, or 0 where the units are part of the experiment
    std: np.ndarray  # (D,) float32: likewise, or 1
    validation: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64)
    )  # training rows that the data set itself holds out
    folds: tuple[np.ndarray, ...] = ()  # training rows of the published labelled sets
    angular: bool = False  # whether rows are alike by the angle between them, as embedded texts are
    columns: tuple[str, ...] = ()  # the names of the features in one's own files

    def standardized(self, x: np.ndarray) -> np.ndarray:
        """x: (n, D), as the data set has them -> (n, D) float32, as a model sees them."""
        return ((x - self.mean) / self.std).astype(np.float32)


def load_table(name: str, data_dir: str | Path | None = None) -> Table:
    """One of TABLES; data_dir (default "data") holds the files of those that have any. Raises UserError."""
    folder = Path(data_dir or "data")
    if name in ("moons", "circles", "8gaussians", "pinwheel"):
        return _toy(name)
    if name == "picture":
        return _picture(data_dir)
    if name in _BUNDLED:
        return _bundled(name)
    if name == "miniboone":
        return _miniboone(folder)
    if name == "hepmass":
        return _hepmass(folder)
    if name in _TEXTS:
        return _texts(name, folder)
    return _own(folder)


def check_features(x: np.ndarray, where: str, names=None, first: int = 0):
    """x: (N, D). Raises UserError where a value is no number, or a column the same in all rows.

    names: of the columns.   first: the number of the first row.

    A density may not be fitted to a constant column: it grows without bound as the column's width goes to nothing.
    """
    bad = ~np.isfinite(x)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f"{where}: {bad.any(1).sum()} rows have NaN or infinite features, the first is row {row + first}, "
            f"column {names[column] if names else column}: leave them out or fill them in"
        )
    constant = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if len(constant):
        shown = ", ".join(str(names[c] if names else c) for c in constant[:5]) + (", ..." if len(constant) > 5 else "")
        raise UserError(f"{where}: {len(constant)} columns are constant ({shown}): leave them out, they tell nothing")


def _make(name, train, train_labels, test, test_labels, classes, scale="column", **more) -> Table:
    """scale: "column", each by its own standard deviation; "common", all by one; "none", the units are to be kept."""
    train, test = np.asarray(train, np.float32), np.asarray(test, np.float32)
    check_features(train, f"{name}, training rows")
    if not np.isfinite(test).all():
        raise UserError(f"{name}, test rows: some features are NaN or infinite")
    for labels in (train_labels, test_labels):
        if len(labels) and not -1 <= np.min(labels) <= np.max(labels) < len(classes):
            raise UserError(f"{name}: labels must lie in 0..{len(classes) - 1}, or be -1 where they are unknown")
    d = train.shape[1]
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    if scale == "common":
        std = np.full(d, np.sqrt((std**2).mean()))
    elif scale == "none":
        mean, std = np.zeros(d), np.ones(d)
    return Table(
        name, train, np.asarray(train_labels, np.int64), test, np.asarray(test_labels, np.int64), list(classes),
        mean.astype(np.float32), std.astype(np.float32), **more,
    )  # fmt: skip


# ---- Toys, in the plane. As published: trained on and judged by the same 1,000 points, in their own units.


def _toy(name: str) -> Table:
    """The synthetic data of FlowGMM (Izmailov et al. 2020, section 5.1), with the labelled rows of its notebooks.

    moons, circles: their row numbers. 8gaussians (3 classes of 2, 3, 3 clusters) and pinwheel: their counts, 6 + 6 + 7
    and 3 + 2 + 3 + 2 + 3, taken in turn from each cluster of a class.
    """
    rng = np.random.RandomState(0)
    if name in ("moons", "circles"):
        from sklearn.datasets import make_circles, make_moons  # slow to import

        if name == "moons":
            x, y = make_moons(1000, noise=0.05, random_state=rng)
            labeled = [0, 1, 2, 3, 4, 5, 6, 7, 10, 17]
        else:
            x, y = make_circles(1000, noise=0.05, factor=0.4, random_state=rng)
            labeled = [0, 1, 2, 3, 4, 6, 7, 10, 17, 19, 34]
        clusters, classes, counts = y, ["0", "1"], None
    elif name == "8gaussians":
        clusters = rng.randint(8, size=1000)
        angle = 2 * np.pi * clusters / 8
        x = 4 / np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.5 / np.sqrt(2) * rng.randn(1000, 2)
        y = np.array([1, 2, 2, 2, 0, 0, 1, 1])[clusters]  # clusters at 0, 45, ..., 315 degrees
        classes, counts = ["0", "1", "2"], (6, 6, 7)
    else:
        x, clusters = pinwheel(1000, arms=5, rng=rng)
        y, classes, counts = clusters, [str(arm) for arm in range(5)], (3, 2, 3, 2, 3)
    if counts:
        labeled = []
        for label, count in enumerate(counts):
            rows = [np.flatnonzero(clusters == c) for c in np.unique(clusters[y == label])]
            labeled += [rows[i % len(rows)][i // len(rows)] for i in range(count)]
    return _make(name, x, y, x, y, classes, scale="none", folds=(np.sort(np.array(labeled, np.int64)),))


def pinwheel(n: int, arms: int, rng: np.random.RandomState, radial=0.3, tangential=0.1, rate=0.25):
    """-> (n, 2) points on spiral arms and (n,) their arm: Johnson et al. 2016 (SVAE), at twice their scale."""
    arm = rng.randint(arms, size=n)
    x = rng.randn(n, 2) * [radial, tangential] + [1, 0]
    angle = 2 * np.pi * arm / arms + rate * np.exp(x[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 0] * sin + x[:, 1] * cos], 1), arm


def _picture(path) -> Table:
    """A picture as a density over [-4, 4]^2, dark where it is dense; without data_dir scikit-learn's flower.

    22,000 pixels are drawn by their darkness and moved by Gaussian noise of half a pixel. There is one class.
    """
    from PIL import Image

    if path is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(255 - load_sample_image("flower.jpg")).crop((180, 20, 580, 420))
    else:
        try:
            image = Image.open(path)
        except OSError as error:
            raise UserError(f"picture: data_dir must name an image file: {error}") from None
    grey = np.asarray(image.convert("L").resize((100, 100)), np.float64)
    rng = np.random.RandomState(0)
    weight = (grey.max() - grey).ravel()
    if not weight.any():
        raise UserError("picture: the image has one colour everywhere, there is no density in it")
    pixel = rng.choice(weight.size, 22000, p=weight / weight.sum())
    row, column = np.divmod(pixel, 100)
    x = np.stack([column, 99 - row], 1) * (8 / 99) - 4 + 0.5 * (8 / 99) * rng.randn(len(pixel), 2)
    y = np.zeros(len(x), np.int64)
    return _make("picture", x[:20000], y[:20000], x[20000:], y[20000:], ["all"], scale="none")


# ---- scikit-learn's

_BUNDLED = {
    "digits-table": "load_digits",
    "breast-cancer": "load_breast_cancer",
    "wine": "load_wine",
    "iris": "load_iris",
}


def _bundled(name: str) -> Table:
    """A fifth of the rows, of each class, is the test set: the same whatever the run's seed. Digits: 500, as there."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    from .data import split_labels  # which knows these data sets

    bunch = getattr(datasets, _BUNDLED[name])()
    x, y = bunch.data, bunch.target.astype(np.int64)
    if name == "digits-table":
        test = split_labels(y, 500, 10, seed=0).labeled
        train = np.setdiff1d(np.arange(len(y)), test)
        x = x[:, np.ptp(x[train], axis=0) > 0]  # three pixels of the margin are never inked
    else:
        train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    return _make(name, x[train], y[train], x[test], y[test], [str(name) for name in bunch.target_names])


# ---- UCI's


def _miniboone(folder: Path) -> Table:
    """Electron against muon neutrinos: 2 x 36,499 rows of 50 features, every tenth a test row.

    Reads UCI's MiniBooNE_PID.txt (set 199). Where there is only an array of the density papers (miniboone*.npy, 43
    features of one class, as of Papamakarios et al. 2017), that: one class, whose density can be fitted.
    """
    folder = folder / "miniboone" if (folder / "miniboone").is_dir() else folder
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
    return _make("miniboone", x[~test], y[~test], x[test], y[test], classes)


def _hepmass(folder: Path) -> Table:
    """A new particle against background: UCI's 1000_train.csv.gz and 1000_test.csv.gz (set 347), 21 features.

    As for the density papers: a fifth of the training rows and 4 % of the test rows, without the features of which one
    value occurs in more than a thousandth of the rows.
    """
    folder = folder / "hepmass" if (folder / "hepmass").is_dir() else folder
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
    return _make("hepmass", train[:, kept], train_y, test[:, kept], test_y, ["background", "signal"])


# ---- Texts

# name: (the folder, the classes, how many test rows at most)
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
EMBEDDED = "embeddings.npz"  # what `normatch embed` leaves beside the texts


def read_texts(name: str, folder: Path):
    """ag-news or yahoo -> training texts, (N,) labels, test texts, (M,) labels, and the folder that they are in.

    Reads train*.csv and test.csv, rows of class (from 1) and the parts of a text. A training text that begins as a
    test text does is left out.
    """
    place, classes, most = _TEXTS[name]
    folder = folder / place if (folder / place).is_dir() else folder
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
    """What tells two texts apart, with or without a title: the last line's words."""
    return " ".join(text.rsplit("\n", 1)[-1].lower().split())


def _texts(name: str, folder: Path) -> Table:
    """Texts as points: embedded by TF-IDF (of words and pairs of words) and a truncated SVD to 64 dimensions.

    The rows of the SVD are brought to length 1.
    """
    texts, y, test_texts, test_y, folder = read_texts(name, folder)
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
            x, test = embed.fit_transform(texts), embed.transform(test_texts)
        except ValueError as error:  # scikit-learn's, of a vocabulary that is empty or smaller than the SVD's
            raise UserError(
                f"the {len(texts)} training texts of {name} hold few words to embed them by: {error}"
            ) from None
    # Directions of little variance tell little of a text: by one scale they stay small.
    return _make(name, x, y, test, test_y, _TEXTS[name][1], scale="common", angular=True)


def embed(name: str, data_dir: str | Path | None, model: str) -> Path:
    """Embed the texts of `name` by a sentence-transformers model on disk; returns the file, found by `load_table`."""
    texts, _, test_texts, _, folder = read_texts(name, Path(data_dir or "data"))
    if not Path(model).is_dir():
        raise UserError(f"there is no folder {model}: name one that holds a sentence-transformers model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(f"embedding needs sentence-transformers: pip install sentence-transformers ({error})") from None
    encoder = SentenceTransformer(model)
    x, test = (encoder.encode(part, show_progress_bar=True, convert_to_numpy=True) for part in (texts, test_texts))
    path = folder / EMBEDDED
    np.savez(path, train=x.astype(np.float32), test=test.astype(np.float32))
    return path


# ---- Own


def _own(folder: Path) -> Table:
    """train.csv and, to be judged by, test.csv: a header, numbers, and a column `label`; empty or -1 is unlabelled."""
    names, x, labels = _read_csv(folder / "train.csv")
    test = folder / "test.csv"
    test_names, test_x, test_labels = _read_csv(test) if test.is_file() else (names, x[:0], [])
    if test_names != names:
        raise UserError(f"the columns of {test} are not those of {folder / 'train.csv'}")
    classes = sorted({label for label in labels if label}, key=lambda s: (len(s), s) if s.isdigit() else (99, s))
    if not classes:
        raise UserError(f"{folder / 'train.csv'} has no labelled row")
    number = {name: k for k, name in enumerate(classes)}
    unknown = sorted({label for label in test_labels if label not in number})
    if unknown:
        raise UserError(f"{test}: every row needs one of the labels of train.csv, not {unknown[0]!r}")
    check_features(x, str(folder / "train.csv"), names, first=2)
    y, test_y = (np.array([number.get(v, -1) for v in values], np.int64) for values in (labels, test_labels))
    if not len(test_x):
        raise UserError(f"{folder} needs a test.csv, with a few labelled rows to judge the result by")
    return _make("table", x, y, test_x, test_y, classes, columns=tuple(names))


def read_rows(path: str | Path, features: int, columns=()) -> np.ndarray:
    """A CSV file with a header -> (N, D) float32, without a column `label`: the rows that a model is asked about.

    features: D.   columns: their names, where they are known. Raises UserError for a file of others.
    """
    names, x, _ = _read_csv(path, labelled=False)
    if len(names) != features or (columns and names != list(columns)):
        wanted = ", ".join(columns) or f"{features} of them"
        raise UserError(f"the columns of {path} ({', '.join(names)}) are not those of the model's table: {wanted}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise UserError(f"{path}, row {bad[0] + 2}: a feature is NaN or infinite")
    return x


def _read_csv(path: str | Path, labelled: bool = True) -> tuple[list[str], np.ndarray, list[str]]:
    """-> the names of the features, (N, D) their values, (N,) labels, "" where there is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # with or without the mark of Excel's files
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}") from None
    if not rows or (labelled and "label" not in rows[0]):
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
