"""The first line of every chapter: one look, one thread, the same numbers every time."""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blr import plotting


def setup(*, dtype: torch.dtype = torch.float64) -> None:
    """Make a notebook's figures and numbers reproducible; seeds nothing.

    Figures get the book's style. PyTorch computes on one thread, with deterministic algorithms,
    and numbers print with four digits and without exponents.

    Args:
        dtype: What `torch.tensor([1.0])` is from now on. In float64 identities hold to 1e-10;
            PyTorch's own default is float32.
    """
    plotting.use_style()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA is deterministic with it
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=78)
    np.set_printoptions(precision=4, suppress=True, linewidth=78)


def results(name: str) -> dict[str, Any]:
    """What a run that is too large for a chapter has measured: `book/results/NAME.json`.

    The file beside the chapter counts first, so a run of your own is shown as soon as it is done;
    else the one that was installed with the library.

    Args:
        name: The name of the file without `.json`, such as "calibration".

    Raises:
        FileNotFoundError: If there is no such file, saying where it was looked for.
    """
    here = [Path("results"), Path("book", "results")]
    installed = metadata.files("bayesian-learning-rule") or []
    places = [folder / f"{name}.json" for folder in here]
    places += [Path(str(f.locate())) for f in installed if f.match(f"blr/results/{name}.json")]
    for place in places:
        if place.exists():
            return json.loads(place.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"no results called {name!r}: looked for {' and '.join(map(str, places))}; open the "
        "notebook in its folder, or install the library again"
    )
