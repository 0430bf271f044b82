"""Data sets of the book: real, small, and there without a network.

    load(name) -> Dataset(X, y)        X of shape (N, D), y of shape (N,)

A data set ships inside `blr` (tiny classics, `blr/datasets/README.md` says where they come
from), or inside scikit-learn, or is looked for in this order: the directory `$BLR_DATA`, the
system's data packages, the cache, the network if `download=True`. If it is nowhere, the error
`DataUnavailable` says what was searched, how to get it, and what to use instead.
"""

import csv
import datetime
import gzip
import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class DataUnavailable(RuntimeError):
    """The data set is not on this machine; the message says how to get it."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Inputs and targets with the names a figure needs.

    Attributes:
        name: Name given to `load`.
        X: Inputs, float64 of shape (N, D); images are uint8 of shape (N, 28, 28).
        y: Targets of shape (N,): float64 for regression, int64 for classes and counts.
        feature_names: Names of the D columns, with units where there are any.
        target_name: Name of the target, with its unit.
        description: What one example is, in a sentence.
        source: Original publication.
        class_names: Name of class k at position k; empty for regression.
        example_names: Names of the N examples; empty where they have none.
        groups: Group of each of the N examples; empty where there are none.
    """

    name: str
    X: NDArray
    y: NDArray
    feature_names: tuple[str, ...]
    target_name: str
    description: str
    source: str
    class_names: tuple[str, ...] = ()
    example_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, X {self.X.shape}, y {self.y.shape}: {self.description})"


_CLASSICS = {  # name: columns of X, target (column, label), description, source
    "engel": (
        {"income": "income (Belgian francs a year)"},
        ("food_expenditure", "food (Belgian francs a year)"),
        "Belgian working-class households of 1857: what they earn and what they spend on food",
        "Engel (1857), as used by Koenker and Bassett (1982), Econometrica 50, 43-61",
    ),
    "stackloss": (
        {
            "air_flow": "air flow",
            "water_temperature": "cooling water temperature (°C)",
            "acid_concentration": "acid concentration (per 1000, minus 500)",
        },
        ("stack_loss", "stack loss (0.1 % of ammonia)"),
        "21 days of a plant that oxidises ammonia to nitric acid: how much ammonia escapes",
        "Brownlee (1965), Statistical Theory and Methodology in Science and Engineering, 454",
    ),
    "duncan": (
        {
            "income": "income (% with $3,500 or more)",
            "education": "education (% with high school)",
        },
        ("prestige", "prestige (% rating it good)"),
        "45 occupations, United States 1950: prestige against the income and education of the men",
        "Duncan (1961), in Reiss, Occupations and Social Status, 109-138",
    ),
    "faithful": (
        {"eruptions": "eruption (minutes)"},
        ("waiting", "waiting time (minutes)"),
        "272 eruptions of the geyser Old Faithful, 1985: how long, and how long until the next",
        "Azzalini and Bowman (1990), Applied Statistics 39, 357-365",
    ),
}
_BUNDLED = {  # name in scikit-learn: description, source
    "diabetes": (
        "442 patients: ten standardised measurements, and the disease one year later",
        "Efron, Hastie, Johnstone and Tibshirani (2004), Annals of Statistics 32, 407-499",
    ),
    "breast_cancer": (
        "569 breast tumours: 30 measurements of cell nuclei, malignant (0) or benign (1)",
        "Street, Wolberg and Mangasarian (1993), UCI Machine Learning Repository",
    ),
    "digits": (
        "1797 handwritten digits of 8×8 pixels with values 0 to 16",
        "Alpaydin and Kaynak (1998), UCI Machine Learning Repository",
    ),
    "iris": (
        "150 iris flowers of three species: four lengths in cm",
        "Fisher (1936), Annals of Eugenics 7, 179-188",
    ),
}
_FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
_FASHION_CLASSES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
_FASHION_SHA256 = {  # of the uncompressed bytes: distributors compress them anew
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_SYSTEM = Path("/usr/share/datasets/fashion-mnist")


def names() -> tuple[str, ...]:
    """Names that `load` knows, in alphabetical order."""
    fashion = ("fashion_mnist", "fashion_mnist_test")
    return tuple(sorted((*_CLASSICS, *_BUNDLED, "austen", "coal", "coal_dates", *fashion)))


def load(name: str, *, download: bool = False) -> Dataset:
    """The data set of that name; `names()` lists them.

    Args:
        name: One of `names()`.
        download: Fetch what is not on this machine, once, into the cache.

    Raises:
        ValueError: If there is no data set of that name.
        DataUnavailable: If the data set is not on this machine and was not to be downloaded.
    """
    if name in _CLASSICS:
        return _load_classic(name)
    if name in _BUNDLED:
        return _load_bundled(name)
    if name in ("coal", "coal_dates"):
        return _load_coal(name)
    if name == "austen":
        return _load_austen()
    if name in ("fashion_mnist", "fashion_mnist_test"):
        return _load_fashion_mnist(name, download)
    raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(names())}")


def _read(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file that ships with the package."""
    text = (resources.files("blr") / "datasets" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _load_classic(name: str) -> Dataset:
    features, (target, target_name), description, source = _CLASSICS[name]
    rows = _read(name)
    return Dataset(
        name,
        np.array([[float(row[column]) for column in features] for row in rows]),
        np.array([float(row[target]) for row in rows]),
        tuple(features.values()),
        target_name,
        description,
        source,
        example_names=tuple(row["occupation"] for row in rows if "occupation" in row),
        groups=tuple(row["type"] for row in rows if "type" in row),
    )


def _load_bundled(name: str) -> Dataset:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    classes = tuple(str(c) for c in getattr(bunch, "target_names", ()))
    return Dataset(
        name,
        np.asarray(bunch.data, dtype=np.float64),
        np.asarray(bunch.target, dtype=np.int64 if classes else np.float64),
        tuple(str(feature) for feature in bunch.feature_names),
        "class" if classes else "disease progression",
        *_BUNDLED[name],
        class_names=classes,
    )


def _load_coal(name: str) -> Dataset:
    """Disasters counted by year ("coal"), or one row per disaster ("coal_dates")."""
    dates = [datetime.date.fromisoformat(row["date"]) for row in _read("coal")]
    what = "explosions in British coal mines that killed ten or more men"
    source = "Jarrett (1979), Biometrika 66, 191-193"
    if name == "coal":
        X = np.arange(1851.0, 1963.0)[:, None]
        y = np.bincount([date.year - 1851 for date in dates], minlength=len(X))
        return Dataset(name, X, y, ("year",), "disasters in that year", f"{what}, by year", source)
    X = np.array([[float((date - dates[0]).days)] for date in dates])
    y = np.arange(1, len(dates) + 1)
    days = ("days since 15 March 1851",)
    iso = tuple(date.isoformat() for date in dates)
    text = f"dates of 191 {what}"
    return Dataset(name, X, y, days, "disasters so far", text, source, example_names=iso)


def _load_austen() -> Dataset:
    """Words counted in the chapters of six novels."""
    packed = (resources.files("blr") / "datasets" / "austen.csv.gz").read_bytes()
    header, *rows = csv.reader(gzip.decompress(packed).decode("utf-8").splitlines())
    novels = tuple(row[0] for row in rows)
    titles = tuple(dict.fromkeys(novels))
    return Dataset(
        "austen",
        np.array([row[2:] for row in rows], dtype=np.float64),
        np.array([titles.index(novel) for novel in novels]),
        tuple(header[2:]),
        "novel",
        "chapters of Jane Austen's six novels: how often each of 300 words stands in them",
        "Austen (1811-1817), public domain; texts from the R package janeaustenr, MIT licence",
        class_names=titles,
        example_names=tuple(f"{row[0]}, chapter {row[1]}" for row in rows),
        groups=novels,
    )


def _load_fashion_mnist(name: str, download: bool) -> Dataset:
    split = "t10k" if name.endswith("_test") else "train"
    X = _idx(f"{split}-images-idx3-ubyte", download)
    y = _idx(f"{split}-labels-idx1-ubyte", download)
    return Dataset(
        name,
        X,
        y.astype(np.int64),
        ("pixel (0 to 255)",),
        "class",
        f"{len(y)} photographs of clothes, 28×28 grey values",
        "Xiao, Rasul and Vollgraf (2017), arXiv:1708.07747, MIT licence",
        class_names=tuple(_FASHION_CLASSES.split(",")),
    )


def _idx(file: str, download: bool) -> NDArray[np.uint8]:
    """Array in an IDX file: two zero bytes, type, number of dimensions, sizes, values."""
    path = _find(file, download)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != _FASHION_SHA256[file]:
        raise DataUnavailable(f"{path} is damaged (wrong sha256): delete it and load again")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def _find(file: str, download: bool) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blr"
    own = os.environ.get("BLR_DATA")
    places = ([Path(own), Path(own) / "fashion-mnist"] if own else []) + [_SYSTEM, cache]
    for path in (place / f"{file}{ending}" for place in places for ending in (".gz", "")):
        if path.is_file():
            return path
    help_ = (
        f"FashionMNIST (30.9 MB) is not on this machine: no {file}.gz in "
        f"{', '.join(map(str, places))}.\n"
        "  Debian or Ubuntu:  apt-get install dataset-fashion-mnist\n"
        "  with a network:    pip install pooch, then load(..., download=True)\n"
        "  own copy:          set BLR_DATA to the directory with the four .gz files\n"
        "  offline stand-in:  load('digits')"
    )
    if not download:
        raise DataUnavailable(help_)
    try:
        import pooch
    except ImportError as error:
        raise DataUnavailable(f"downloading needs the package pooch.\n{help_}") from error
    try:
        url = f"{_FASHION_URL}{file}.gz"
        return Path(pooch.retrieve(url, known_hash=None, fname=f"{file}.gz", path=cache))
    except OSError as error:  # what requests and urllib raise without a network
        raise DataUnavailable(f"the download failed ({error}).\n{help_}") from error
