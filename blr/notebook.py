"""The first line of every chapter: one look, one thread, the same numbers every time."""

import os

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
