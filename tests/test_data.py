"""The data sets are the published ones, and the one that may be missing says how to get it."""

import gzip
import hashlib
import struct
import sys
import types
from collections import Counter

import numpy as np
import pytest

import blr.data as data

SHAPES = {
    "austen": (269, 300),
    "breast_cancer": (569, 30),
    "coal": (112, 1),
    "coal_dates": (191, 1),
    "diabetes": (442, 10),
    "digits": (1797, 64),
    "duncan": (45, 2),
    "engel": (235, 1),
    "faithful": (272, 1),
    "iris": (150, 4),
    "stackloss": (21, 3),
}
# Intervals in days between 191 disasters as printed by Jarrett (1979), Table 1.
JARRETT = """
157 123 2 124 12 4 10 216 80 12 33 66 232 826 40 12 29 190 97 65 186 23 92 197 431 16 154 95 25 19
78 202 36 110 276 16 88 225 53 17 538 187 34 101 41 139 42 1 250 80 3 324 56 31 96 70 41 93 24 91
143 16 27 144 45 6 208 29 112 43 193 134 420 95 125 34 127 218 2 0 378 36 15 31 215 11 137 4 15 72
96 124 50 120 203 176 55 93 59 315 59 61 1 13 189 345 20 81 286 114 108 188 233 28 22 61 78 99 326
275 54 217 113 32 388 151 361 312 354 307 275 78 17 1205 644 467 871 48 123 456 498 49 131 182 255
194 224 566 462 228 806 517 1643 54 326 1312 348 745 217 120 275 20 66 292 4 368 307 336 19 329
330 312 536 145 75 364 37 19 156 47 129 1630 29 217 7 18 1358 2366 952 632
"""


def least_squares(X, y):
    return np.linalg.lstsq(np.column_stack([np.ones(len(X)), X]), y, rcond=None)[0]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without FashionMNIST: no own directory, no system path, an empty cache."""
    monkeypatch.delenv("BLR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_SYSTEM", tmp_path / "system")
    return tmp_path


def write_idx(directory, file, array, monkeypatch):
    """A small IDX file in place of a big one, with its hash."""
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    raw = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{file}.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setitem(data._FASHION_SHA256, file, hashlib.sha256(raw).hexdigest())


def test_every_name_that_is_listed_loads_or_is_fashion_mnist():
    assert set(data.names()) == {*SHAPES, "fashion_mnist", "fashion_mnist_test"}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_types_and_names_agree(name):
    d = data.load(name)
    assert d.X.shape == SHAPES[name]
    assert d.y.shape == (len(d.X),)
    assert d.X.dtype == np.float64
    assert d.y.dtype in (np.float64, np.int64)
    assert len(d.feature_names) == d.X.shape[1]
    assert np.isfinite(d.X).all() and np.isfinite(d.y).all()
    assert d.description and d.source and d.target_name
    for names in (d.example_names, d.groups):
        assert len(names) in (0, len(d.y))
    if d.class_names:
        assert set(d.y) == set(range(len(d.class_names)))


@pytest.mark.parametrize("name", ["engel", "stackloss"])
def test_classics_equal_the_copy_in_statsmodels(name):
    datasets = pytest.importorskip("statsmodels.datasets", reason="pip install statsmodels")
    d, copy = data.load(name), getattr(datasets, name).load_pandas()
    if name == "engel":
        pairs = [(d.X[:, 0], copy.data["income"]), (d.y, copy.data["foodexp"])]
    else:
        pairs = [(d.X, copy.exog), (d.y, copy.endog)]
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs.to_numpy())


@pytest.mark.parametrize("name", ["diabetes", "breast_cancer", "digits", "iris"])
def test_bundled_sets_are_those_of_scikit_learn(name):
    import sklearn.datasets

    bunch, d = getattr(sklearn.datasets, f"load_{name}")(), data.load(name)
    np.testing.assert_array_equal(d.X, bunch.data)
    np.testing.assert_array_equal(d.y, bunch.target)


def test_duncan_gives_the_regression_printed_by_fox():
    d = data.load("duncan")
    # Fox, Applied Regression Analysis, section 5.2.1.
    np.testing.assert_allclose(least_squares(d.X, d.y), [-6.0647, 0.59873, 0.54583], rtol=1e-4)
    assert Counter(d.groups) == {"bc": 21, "prof": 18, "wc": 6}
    assert {"minister", "reporter", "railroad engineer"} < set(d.example_names)


def test_stackloss_gives_the_regression_printed_by_brownlee():
    d = data.load("stackloss")
    published = [-39.9197, 0.7156, 1.2953, -0.1521]
    np.testing.assert_allclose(least_squares(d.X, d.y), published, atol=5e-5)


def test_engel_gives_the_regression_printed_by_koenker():
    d = data.load("engel")
    np.testing.assert_allclose(least_squares(d.X, d.y), [147.4754, 0.4852], rtol=1e-4)


def test_faithful_has_the_published_means_and_slope():
    d = data.load("faithful")
    np.testing.assert_allclose([d.X.mean(), d.y.mean()], [3.487783, 70.89706], rtol=1e-6)
    np.testing.assert_allclose(least_squares(d.y[:, None], d.X[:, 0]), [-1.874016, 0.075628], 1e-5)


def test_coal_dates_have_the_intervals_printed_by_jarrett():
    d = data.load("coal_dates")
    assert np.diff(d.X[:, 0]).astype(int).tolist() == [int(n) for n in JARRETT.split()]
    assert (d.example_names[0], d.example_names[-1]) == ("1851-03-15", "1962-03-22")
    assert d.y[-1] == 191


def test_coal_counts_are_the_dates_counted_by_year():
    d, dates = data.load("coal"), data.load("coal_dates")
    assert d.y.sum() == 191
    assert (d.X[0, 0], d.X[-1, 0]) == (1851, 1962)
    count = Counter(int(date[:4]) for date in dates.example_names)
    assert d.y.tolist() == [count[int(year)] for year in d.X[:, 0]]
    assert d.y[:10].tolist() == [4, 5, 4, 1, 0, 4, 3, 4, 0, 6]  # Carlin, Gelfand, Smith (1992)


def test_austen_has_the_chapters_of_the_six_novels_and_their_words_where_they_belong():
    d = data.load("austen")
    chapters = [50, 61, 48, 55, 31, 24]
    assert list(Counter(d.groups).values()) == chapters == np.bincount(d.y).tolist()
    assert d.example_names[50] == "Pride and Prejudice, chapter 1"
    assert tuple(d.class_names[k] for k in d.y) == d.groups
    assert len(set(d.feature_names)) == 300 and (d.X >= 0).all() and (d.X % 1 == 0).all()
    count = dict(zip(d.feature_names, d.X.T, strict=True))
    # The play that is rehearsed in Mansfield Park from chapter 13 on; grep finds 32 in the text.
    theatre = [count["theatre"][d.y == k].sum() for k in range(6)]
    assert theatre == [0, 1, 32, 0, 10, 2]
    assert d.example_names[count["theatre"].argmax()] == "Mansfield Park, chapter 13"
    for word in ("elizabeth", "pemberley", "the", "you"):  # neither names nor words of every page
        assert word not in count


def test_a_wrong_name_is_answered_with_the_right_ones():
    with pytest.raises(ValueError, match=r"'mnist'.*breast_cancer.*stackloss"):
        data.load("mnist")


def test_a_missing_data_set_says_size_places_fixes_and_stand_in(nowhere, monkeypatch):
    monkeypatch.setenv("BLR_DATA", str(nowhere / "own"))
    with pytest.raises(data.DataUnavailable) as error:
        data.load("fashion_mnist")
    places = [nowhere / "own", nowhere / "system", nowhere / "cache" / "blr"]
    for part in ["30.9 MB", "apt-get", "download=True", "BLR_DATA", "digits", *map(str, places)]:
        assert part in str(error.value)


def test_download_without_pooch_says_that_it_needs_pooch(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(data.DataUnavailable, match="needs the package pooch"):
        data.load("fashion_mnist", download=True)


def test_download_without_a_network_raises_the_same_error_from_the_networks(nowhere, monkeypatch):
    def retrieve(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    with pytest.raises(data.DataUnavailable, match=r"download failed \(no network\)") as error:
        data.load("fashion_mnist", download=True)
    assert isinstance(error.value.__cause__, ConnectionError)


def test_download_goes_to_the_cache_and_only_when_asked(nowhere, monkeypatch):
    X = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    y = np.array([9, 0, 3, 3, 1])
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        array = X if "images" in fname else y
        write_idx(path, fname.removesuffix(".gz"), array, monkeypatch)
        return str(path / fname)

    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    d = data.load("fashion_mnist_test", download=True)
    np.testing.assert_array_equal(d.X, X)
    np.testing.assert_array_equal(d.y, y)
    again = data.load("fashion_mnist_test")
    np.testing.assert_array_equal(again.X, X)
    assert len(asked) == 2


def test_own_directory_comes_before_the_system(nowhere, monkeypatch):
    monkeypatch.setenv("BLR_DATA", str(nowhere / "own"))
    for place, value in (("system", 8), ("own", 7)):  # the hash is that of the last
        write_idx(nowhere / place, "t10k-images-idx3-ubyte", np.full((2, 28, 28), 1), monkeypatch)
        write_idx(nowhere / place, "t10k-labels-idx1-ubyte", np.full(2, value), monkeypatch)
    assert data.load("fashion_mnist_test").y.tolist() == [7, 7]


def test_a_damaged_file_is_named(nowhere, monkeypatch):
    write_idx(nowhere / "system", "train-images-idx3-ubyte", np.zeros((2, 28, 28)), monkeypatch)
    monkeypatch.setitem(data._FASHION_SHA256, "train-images-idx3-ubyte", "0" * 64)
    with pytest.raises(data.DataUnavailable, match=r"train-images-idx3-ubyte.gz is damaged"):
        data.load("fashion_mnist")


def test_fashion_mnist_is_the_published_one(needs):
    needs(data._SYSTEM.is_dir(), "apt-get install dataset-fashion-mnist")
    d = data.load("fashion_mnist")
    assert d.X.shape == (60_000, 28, 28)
    assert d.X.dtype == np.uint8
    assert np.bincount(d.y).tolist() == [6000] * 10
    np.testing.assert_allclose([d.X.mean() / 255, d.X.std() / 255], [0.2860, 0.3530], atol=1e-4)
