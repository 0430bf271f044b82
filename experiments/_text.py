"""Text as tokens: read from files, numbered without any download, mapped from disk.

    bytes        256 tokens, any text
    characters   the characters that occur in the training part, then bytes for all others
    words        the most frequent words and marks of the training part, spelled in bytes if rare

Every kind is lossless, so that losses in bits per byte compare between them. A folder with
`train.bin` and `val.bin`, 16-bit GPT-2 tokens as the nanoGPT recipe prepares OpenWebText, is taken
as it is.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _common
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AUSTEN = "janeaustenr/data/Rdata.rdb"
R_LIBRARY = Path("/usr/lib/R/site-library")
GPT2_VOCABULARY = 50257
PARTS = "train", "validation"
ENDINGS = {".txt", ".md", ".rst"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of a training and a validation part, on disk.

    Args:
        train: Tokens, shape (N,), mapped from a file.
        validation: Tokens, shape (M,), mapped from a file.
        vocabulary: Number of different tokens.
        bytes_per_token: Of the validation part, for bits per byte; missing where unknown.
    """

    train: NDArray
    validation: NDArray
    vocabulary: int
    bytes_per_token: float | None


def prepared(folder: Path) -> Corpus:
    """The 16-bit tokens in `train.bin` and `val.bin` of a folder.

    Raises:
        FileNotFoundError: If one of them is not there.
    """
    for name in ("train.bin", "val.bin"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}; prepare OpenWebText with nanoGPT's data script, or pass "
                "--text with text files"
            )
    train, validation = (_mapped(folder / name, np.uint16) for name in ("train.bin", "val.bin"))
    return Corpus(train, validation, GPT2_VOCABULARY, None)


def tokenized(
    paths: Iterable[Path], kind: str, size: int, folder: Path, share: float = 0.1
) -> Corpus:
    """Texts as tokens, written to files in a folder and mapped from there.

    Args:
        paths: Text files, folders of them, or the R package with Austen's novels (Rdata.rdb).
        kind: "bytes", "characters" or "words".
        size: Most tokens of a vocabulary beyond the 256 bytes.
        folder: Where the tokens are written.
        share: The last part of every text that is kept for validation.

    Raises:
        FileNotFoundError: If there is no text.
    """
    parts = [_split(text, share) for text in texts(paths)]
    train, validation = (b"\n".join(part) for part in zip(*parts, strict=True))
    known = _most_frequent(Counter(CUTS[kind](train.decode("utf-8"))), size)
    width = np.uint16 if known else np.uint8
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(PARTS, (train, validation), strict=True):
        _numbers(text, kind, known).astype(width).tofile(folder / f"{name}.bin")
    vocabulary, found = 256 + len(known), _mapped(folder / "validation.bin", width)
    return opened(folder, vocabulary, len(validation) / len(found))


def opened(folder: Path, vocabulary: int, bytes_per_token: float | None) -> Corpus:
    """What another process has written with `tokenized`."""
    width = np.uint16 if vocabulary > 256 else np.uint8
    train, validation = (_mapped(folder / f"{name}.bin", width) for name in PARTS)
    return Corpus(train, validation, vocabulary, bytes_per_token)


# ---- batches ------------------------------------------------------------------------------------


def windows(tokens: NDArray, starts: Iterable[int], length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both of shape (B, T): windows of T + 1 tokens, one later in targets."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]


def random_starts(tokens: NDArray, count: int, length: int, *place: int) -> list[int]:
    """Where the windows of a step begin: a function of the place in the run and nothing else.

    Raises:
        ValueError: If the text is shorter than a window.
    """
    room = len(tokens) - length
    if room < 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens, and a window needs {length + 1}; "
            "pass a longer text or a smaller --context"
        )
    return torch.randint(room, (count,), generator=_common.generator(*place)).tolist()


# ---- files --------------------------------------------------------------------------------------


def texts(paths: Iterable[Path]) -> Iterator[str]:
    """The text of every file, in order of names.

    Raises:
        FileNotFoundError: If a path is missing, or a folder has no text.
    """
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in ENDINGS and p.is_file())
            if not inside:
                raise FileNotFoundError(f"no {', '.join(sorted(ENDINGS))} file in {path}")
            yield from (p.read_text(encoding="utf-8", errors="replace") for p in inside)
        elif not path.is_file():
            raise FileNotFoundError(f"no text at {path}; pass --text with files or folders")
        elif path.suffix == ".rdb":
            yield from _r_texts(path.read_bytes())
        else:
            yield path.read_text(encoding="utf-8", errors="replace")


def austen() -> Path:
    """The six novels of Jane Austen in the R package `janeaustenr`, without R.

    Raises:
        FileNotFoundError: If it is on none of the places that are named in the message.
    """
    own = os.environ.get("BLR_DATA")
    places = [Path(own) / AUSTEN] if own else []
    places.append(R_LIBRARY / AUSTEN)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        "Austen's novels (4.0 MB of text) are not on this machine: "
        f"no {', '.join(map(str, places))}.\n"
        "  any text:          pass --text with files or folders\n"
        "  Debian or Ubuntu:  apt-get install r-cran-janeaustenr\n"
        "  without R:         apt-get download r-cran-janeaustenr; dpkg-deb -x …deb FOLDER;\n"
        "                     BLR_DATA=FOLDER/usr/lib/R/site-library\n"
        "  small and here:    --smoke, with the chapters of this book"
    )


def _r_texts(packed: bytes) -> Iterator[str]:
    """Vectors of lines in a lazy-load file of R: pieces with their lengths, each compressed."""
    while packed:
        unpack = zlib.decompressobj()
        raw = unpack.decompress(packed[4:])
        packed = unpack.unused_data
        lines = list(_r_strings(raw))
        if lines:
            yield "\n".join(lines) + "\n"


def _r_strings(raw: bytes) -> Iterator[str]:
    """The strings of one vector in R's XDR serialisation, version 3 with its native encoding."""
    if raw[:6] != b"X\n\0\0\0\3":
        raise ValueError(f"an R object begins with {raw[:6]!r}; only XDR of version 3 is read")
    (name,) = struct.unpack_from(">i", raw, 14)
    place = 18 + name
    kind, count = struct.unpack_from(">ii", raw, place)
    place += 8
    if kind & 255 != 16:  # a vector of strings
        return
    for _ in range(count):
        _, size = struct.unpack_from(">ii", raw, place)
        yield raw[place + 8 : place + 8 + max(0, size)].decode("utf-8", errors="replace")
        place += 8 + max(0, size)


def _split(text: str, share: float) -> tuple[bytes, bytes]:
    """The first and the last part of a text, cut after a line where there is one."""
    cut = int(len(text) * (1 - share))
    line = text.find("\n", cut)
    cut = line + 1 if 0 <= line < len(text) - 1 else cut
    return text[:cut].encode(), text[cut:].encode()


def _mapped(path: Path, width: type) -> NDArray:
    return np.memmap(path, dtype=width, mode="r")


# ---- tokens -------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Words with the space before them, and runs of marks and of spaces."""
    return re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)


CUTS: dict[str, Callable[[str], list[str]]] = {
    "bytes": lambda text: [],
    "characters": list,
    "words": _words,
}
"""How a text is cut into pieces that may have a number of their own."""


def _most_frequent(counts: Counter[str], size: int) -> dict[str, int]:
    """Numbers after the 256 bytes, in order of frequency and then of the alphabet."""
    size = min(size, 2**16 - 256)
    order = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return {piece: 256 + i for i, piece in enumerate(order[:size])}


def _numbers(text: bytes, kind: str, known: dict[str, int]) -> NDArray:
    """A text as numbers; what has none of its own is spelled in bytes."""
    if kind == "bytes":
        return np.frombuffer(text, np.uint8)
    numbers: list[int] = []
    for piece in CUTS[kind](text.decode("utf-8")):
        if piece in known:
            numbers.append(known[piece])
        else:
            numbers.extend(piece.encode())
    return np.array(numbers)
