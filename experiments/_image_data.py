"""Images from a directory of the user's, in the formats in which they are published; no downloads.

    MNIST, FashionMNIST, KMNIST, …   train-images-idx3-ubyte and three more, with or without .gz
    CIFAR-10                         data_batch_1 … 5 and test_batch, pickles or .bin
    CIFAR-100                        train and test, pickles or .bin; fine labels
    SVHN                             train_32x32.mat and test_32x32.mat
    TinyImageNet                     train/WNID/images/*.JPEG, val/val_annotations.txt; needs Pillow

The directory may be the data set's own or one above it. Two names need no directory, if what they
name is on the machine: `fashion_mnist`, and `digits`, the 8×8 images of scikit-learn.
"""

from __future__ import annotations

import codecs
import gzip
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io
import torch
from _common import generator
from numpy.typing import NDArray
from torch import Tensor

import blr.data

Part = tuple[NDArray, NDArray]
"""Images, uint8 of shape (N, C, H, W), and classes, int64 of shape (N,)."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set, as bytes, in memory.

    Args:
        x: Training images, uint8 of shape (N, C, H, W).
        y: Their classes, shape (N,).
        test_x: Test images.
        test_y: Their classes.
        kind: What was found.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    kind: str

    @property
    def classes(self) -> int:
        """Number K of classes."""
        return int(self.y.max()) + 1

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return self._each(lambda part: part.to(device))

    def first(self, count: int | None) -> Images:
        """With fewer examples in training and test, for a small run."""
        return self._each(lambda part: part[:count])

    def _each(self, f: Callable[[Tensor], Tensor]) -> Images:
        return Images(f(self.x), f(self.y), f(self.test_x), f(self.test_y), self.kind)

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training pixels of each channel, shape (1, C, 1, 1)."""
        levels = torch.arange(256, dtype=torch.float64, device=self.x.device)
        moments = []
        for c in range(self.x.shape[1]):
            p = torch.bincount(self.x[:, c].reshape(-1).int(), minlength=256).double()
            p /= p.sum()
            mean = (p * levels).sum()
            moments.append(torch.stack([mean, ((levels - mean).square() * p).sum().sqrt()]))
        mean, deviation = torch.stack(moments, -1).float().view(2, 1, -1, 1, 1)
        return mean, deviation.clamp(min=1e-3)


def read(where: str) -> Images:
    """The data set in a directory, or of a name.

    Raises:
        FileNotFoundError: If nothing that is known is there, saying what was looked for.
    """
    if where in NAMES:
        return _images(where, *NAMES[where]())
    folder = Path(where)
    looked = []
    for kind, markers, load in FORMATS:
        for place in _places(folder):
            if any((place / marker).is_file() for marker in markers):
                return _images(kind, *load(place))
        looked.append(f"  {kind}: {' or '.join(markers)}")
    raise FileNotFoundError(
        f"no images that are known in {folder} or one folder below it. Looked for\n"
        + "\n".join(looked)
        + f"\nPass --data with such a directory, or one of the names {', '.join(NAMES)}."
    )


def augment(images: Tensor, shift: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crops of images padded with black, and mirrored where `flip`.

    Args:
        images: Shape (B, C, H, W), on any device.
        shift: Rows and columns at which crops begin, from 0 to 2·padding, shape (B, 2).
        flip: Whether to mirror, shape (B,).
        padding: Width of the black border.
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = torch.arange(height, device=images.device) + shift[:, :1]
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + shift[:, 1:]
    example = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def epoch_batches(
    count: int, size: int, padding: int, mirror: bool, *place: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which examples the batches of an epoch hold, and how they are cropped and mirrored.

    The same on every process, whatever their number; an incomplete last batch is left out.

    Args:
        count: Number N of examples.
        size: Examples B in a batch of all processes.
        padding: As in `augment`.
        mirror: Whether half of the images are mirrored.
        place: Place in the run, such as (seed, epoch).

    Yields:
        Indices of shape (B,), shifts of shape (B, 2), and whether to mirror, of shape (B,).
    """
    g = generator(*place)
    order = torch.randperm(count, generator=g)
    shift = torch.randint(2 * padding + 1, (count, 2), generator=g)
    flip = torch.rand(count, generator=g) < (0.5 if mirror else 0.0)
    for start in range(0, count - size + 1, size):
        part = slice(start, start + size)
        yield order[part], shift[part], flip[part]


# ---- formats ------------------------------------------------------------------------------------


def _images(kind: str, train: Part, test: Part) -> Images:
    x, y, test_x, test_y = (torch.from_numpy(np.array(a)) for part in (train, test) for a in part)
    return Images(x, y, test_x, test_y, kind)


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no directory {folder}; pass --data with one, or one of the names {', '.join(NAMES)}"
        )
    return [folder, *sorted(p for p in folder.rglob("*") if p.is_dir() and _near(p, folder))]


def _near(place: Path, folder: Path) -> bool:
    return len(place.relative_to(folder).parts) <= 2 and "images" not in place.parts


def _idx_parts(folder: Path) -> tuple[Part, Part]:
    def part(split: str) -> Part:
        x, y = (_idx(folder, f"{split}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        return x[:, None], y.astype(np.int64)

    return part("train"), part("t10k")


def _idx(folder: Path, name: str) -> NDArray:
    """An array in an IDX file: two zero bytes, type, number of dimensions, sizes, values."""
    path = folder / name
    zipped = folder / f"{name}.gz"
    if not (path.is_file() or zipped.is_file()):
        raise FileNotFoundError(f"neither {path} nor {zipped.name} is there; all four are needed")
    raw = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes; fetch it again")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _pickled(label: str, train: Iterable[str], test: str) -> Callable[[Path], tuple[Part, Part]]:
    """CIFAR's pickles: a mapping with rows of 3072 bytes and a list of classes."""

    def part(paths: Iterable[Path]) -> Part:
        found = [_unpickle(path) for path in paths]
        x = np.concatenate([batch[b"data"] for batch in found]).reshape(-1, 3, 32, 32)
        return x, np.concatenate([batch[label.encode()] for batch in found]).astype(np.int64)

    return lambda folder: (part(folder / name for name in train), part([folder / test]))


class _Careful(pickle.Unpickler):
    """Arrays and nothing else: a pickle could otherwise run any program."""

    _allowed: ClassVar[dict[str, Any]] = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.empty(0).__reduce__()[0],
        "encode": codecs.encode,  # how later versions of Python write bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("numpy", "_codecs") and name in self._allowed:
            return self._allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images")


def _unpickle(path: Path) -> dict[bytes, Any]:
    with path.open("rb") as file:
        return _Careful(file, encoding="bytes").load()


def _binary(labels: int, train: Iterable[str], test: str) -> Callable[[Path], tuple[Part, Part]]:
    """CIFAR's binary files: rows of `labels` bytes, the last of them the class, and 3072 pixels."""

    def part(paths: Iterable[Path]) -> Part:
        rows = np.concatenate([np.fromfile(path, np.uint8) for path in paths])
        rows = rows.reshape(-1, labels + 3072)
        return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)

    return lambda folder: (part(folder / name for name in train), part([folder / test]))


def _svhn(folder: Path) -> tuple[Part, Part]:
    def part(split: str) -> Part:
        found = scipy.io.loadmat(folder / f"{split}_32x32.mat")
        y = found["y"].reshape(-1).astype(np.int64) % 10  # its 10 is the digit 0
        return found["X"].transpose(3, 2, 0, 1), y

    return part("train"), part("test")


def _tiny_imagenet(folder: Path) -> tuple[Part, Part]:
    names = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    number = {name: k for k, name in enumerate(names)}
    train = [
        (path, number[name])
        for name in names
        for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))
    ]
    listed = (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    fields = [line.split("\t") for line in listed if line]
    test = [(folder / "val" / "images" / field[0], number[field[1]]) for field in fields]
    return _pictures(train), _pictures(test)


def _pictures(listed: list[tuple[Path, int]]) -> Part:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("TinyImageNet has JPEG files: pip install pillow") from error
    x = np.empty((len(listed), 3, 64, 64), np.uint8)
    for i, (path, _) in enumerate(listed):
        with Image.open(path) as image:
            x[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return x, np.array([k for _, k in listed], np.int64)


def _fashion_mnist() -> tuple[Part, Part]:
    both = [blr.data.load(name) for name in ("fashion_mnist", "fashion_mnist_test")]
    train, test = ((d.X[:, None], d.y) for d in both)
    return train, test


def _digits() -> tuple[Part, Part]:
    """1257 digits for training and 540 for the test, in the order in which they are published."""
    d = blr.data.load("digits")
    x, y = (d.X * 15.9375).astype(np.uint8).reshape(-1, 1, 8, 8), d.y
    return (x[:1257], y[:1257]), (x[1257:], y[1257:])


BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
IDX = "train-images-idx3-ubyte"
FORMATS: list[tuple[str, tuple[str, ...], Callable[[Path], tuple[Part, Part]]]] = [
    ("IDX files", (IDX, f"{IDX}.gz"), _idx_parts),
    ("CIFAR-10", ("data_batch_1",), _pickled("labels", BATCHES, "test_batch")),
    (
        "CIFAR-10 (binary)",
        ("data_batch_1.bin",),
        _binary(1, [f"{name}.bin" for name in BATCHES], "test_batch.bin"),
    ),
    ("TinyImageNet", ("val/val_annotations.txt",), _tiny_imagenet),
    ("CIFAR-100 (binary)", ("train.bin",), _binary(2, ["train.bin"], "test.bin")),
    ("CIFAR-100", ("train",), _pickled("fine_labels", ["train"], "test")),
    ("SVHN", ("train_32x32.mat",), _svhn),
]
NAMES: dict[str, Callable[[], tuple[Part, Part]]] = {
    "fashion_mnist": _fashion_mnist,
    "digits": _digits,
}
