"""Drag a point and see what the line would be without it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from blr import plotting
from blr.interactive._figure import InteractiveFigure, assemble, picture

Vector = NDArray[np.float64]


def drag_regression(
    x: ArrayLike,
    y: ArrayLike,
    *,
    prior_precision: float = 0.0,
    labels: Sequence[str] = (),
    x_label: str = "x",
    y_label: str = "y",
) -> InteractiveFigure:
    """Scatter plot with the least-squares line, in which the reader drags any point.

    With all points and without the selected one: the two lines, leverage h, residual r, residual
    r / (1 − h) of the line that has not seen the point, Cook's distance D = h r² / (2 s² (1 − h)²)
    with s² = Σ r² / (N − 2) of the full fit, and the change of slope.

    Args:
        x: Input, shape (N,).
        y: Target, shape (N,).
        prior_precision: δ, added to Σ (x − x̄)²: prior precision of the slope in units of the
            noise precision. The intercept has a flat prior. 0 is least squares.
        labels: Names of the N points; their numbers if empty.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.

    Raises:
        ValueError: If there are fewer than four points, they are not finite, or all x are equal.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    _check(x, y, prior_precision, labels)
    influence = _influence(x, y, prior_precision)
    cook = np.nan_to_num(influence["cooks_distance"])
    start = int(np.argmax(cook))
    chosen = {key: values[start] for key, values in influence.items()}
    name = labels[start] if labels else f"point {start}"
    lines = [
        chosen["intercept" + which] + chosen["slope" + which] * x for which in ("", "_without")
    ]
    data = {
        "x": x.tolist(),
        "y": y.tolist(),
        "xlim": _limits(x),
        "ylim": _limits(np.concatenate([y, *lines])),
        "prior_precision": float(prior_precision),
        "labels": list(map(str, labels)),
        "x_label": x_label,
        "y_label": y_label,
        "selected": start,
    }
    alt = (
        f"{y_label} against {x_label}, {len(x)} points, with the least-squares line of slope "
        f"{chosen['slope']:.4g}. Without {name}, the most influential (leverage "
        f"{chosen['leverage']:.3f}, Cook's distance {chosen['cooks_distance']:.3f}), the slope is "
        f"{chosen['slope_without']:.4g}."
    )
    instruction = (
        "Drag any point, or choose one and press the arrow keys. The larger a point, the larger "
        "its Cook’s distance (up to 2), that is, the more the fit depends on it."
    )

    def still(figure: Figure) -> None:
        ax = figure.subplots()
        colors = np.full(len(x), plotting.BLUE)
        colors[start] = plotting.VERMILLION
        area = 20 + 400 * np.minimum(cook, 2)
        ax.scatter(x, y, s=area, c=colors, alpha=0.6, edgecolors="white")
        at = np.array([x.min(), x.max()])
        ax.plot(at, chosen["intercept"] + chosen["slope"] * at, label="fit to all points")
        without = chosen["intercept_without"] + chosen["slope_without"] * at
        ax.plot(at, without, "--", label=f"fit without {name}")
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.legend()

    image = picture(still)
    rounded = {"selected": start} | {key: float(f"{v:.6g}") for key, v in chosen.items()}
    return assemble(("axes", "drag_regression"), instruction, data, rounded, image, alt)


def _check(x: Vector, y: Vector, prior_precision: float, labels: Sequence[str]) -> None:
    if x.ndim != 1 or x.shape != y.shape or len(x) < 4:
        raise ValueError(f"x {x.shape} and y {y.shape} must be vectors of one length, at least 4")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x or y contains NaN or infinity; drop those points")
    if len(np.unique(x)) < 2:
        raise ValueError(f"all x are {x[0]}: the slope is not determined; pass different x")
    if np.linalg.matrix_rank(np.column_stack([np.ones_like(x), x, y])) < 3:
        raise ValueError("the points lie on a line: no residual to show; pass noisy points")
    if prior_precision < 0:
        raise ValueError(f"prior_precision is {prior_precision}; pass 0 or a positive number")
    if len(labels) not in (0, len(x)):
        raise ValueError(f"labels has {len(labels)} names for {len(x)} points; pass one for each")


def _influence(x: Vector, y: Vector, delta: float) -> dict[str, Vector]:
    """What the figure shows of each point, shape (N,): the closed forms of `drag_regression.js`."""
    N, c = len(x), x - x.mean()
    H = c @ c + delta
    slope = c @ y / H
    intercept = y.mean() - slope * x.mean()
    r = y - intercept - slope * x
    h = 1 / N + c**2 / H
    alone = h > 1 - 1e-12  # without this point the others have one x and no slope
    r_loo = np.where(alone, np.nan, r / np.where(alone, 1, 1 - h))
    cook = h * r_loo**2 / (2 * (r @ r) / (N - 2))
    change = c / H * r_loo
    return {
        "x": x,
        "y": y,
        "intercept": np.full(N, intercept),
        "slope": np.full(N, slope),
        "intercept_without": intercept - r_loo / N + x.mean() * change,
        "slope_without": slope - change,
        "leverage": h,
        "residual": r,
        "loo_residual": r_loo,
        "cooks_distance": cook,
        "slope_change": change,
    }


def _limits(values: Vector) -> list[float]:
    """A window with room to drag a point out of the cloud."""
    margin = 0.15 * np.ptp(values) or 1.0
    return [float(values.min() - margin), float(values.max() + margin)]
