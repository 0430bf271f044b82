"""Figures of the book: each function takes an Axes, draws one idea, and returns the Axes.

    use_style()                                 one style sheet, colour-blind safe
    scatter_identity(ax, exact, estimated)      does the estimate equal what retraining gives?
    influence_bubbles(ax, leverage, residual, cooks_distance)     who pulls the line?
    stems(ax, values)                           one number per example
    ellipse(ax, mean, covariance)               a Gaussian in the plane
    reliability_diagram(ax, reliability)        is the model right as often as it thinks?

The colours are those of Okabe and Ito (2008), Color universal design, in an order chosen for
lines and points on white; yellow is left out because it cannot be read there.
"""

from collections.abc import Sequence
from importlib import resources

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from numpy.typing import ArrayLike

from blr.metrics import Reliability

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, GREY = "#E69F00", "#56B4E9", "#4D4D4D"


def use_style() -> None:
    """Apply the book's style sheet to every figure that follows."""
    matplotlib.style.use(str(resources.files("blr") / "blr.mplstyle"))


def scatter_identity(
    ax: Axes,
    exact: ArrayLike,
    estimated: ArrayLike,
    *,
    xlabel: str = "exact (refitted)",
    ylabel: str = "estimated",
    **style: object,
) -> Axes:
    """Estimated against exact values with the line of equality and the largest deviation.

    Args:
        ax: Where to draw.
        exact: Values found by refitting, shape (N,).
        estimated: Values found without refitting, shape (N,).
        xlabel: What the exact values are.
        ylabel: What the estimated values are.
        style: Passed to `Axes.scatter`, for instance `color` and `label`.
    """
    exact, estimated = _same_length(exact=exact, estimated=estimated)
    both = np.concatenate([exact, estimated])
    margin = 0.05 * (np.ptp(both) or 1.0)
    ends = both.min() - margin, both.max() + margin
    ax.plot(ends, ends, color=GREY, linewidth=1, zorder=1)
    ax.scatter(exact, estimated, **{"s": 26, "alpha": 0.7, "zorder": 2, **style})
    deviation = np.abs(exact - estimated).max()
    ax.set(xlim=ends, ylim=ends, aspect="equal", xlabel=xlabel, ylabel=ylabel)
    ax.text(0.04, 0.96, f"largest deviation\n{deviation:.2g}", transform=ax.transAxes, va="top")
    return ax


def influence_bubbles(
    ax: Axes,
    leverage: ArrayLike,
    residual: ArrayLike,
    cooks_distance: ArrayLike,
    labels: Sequence[str] = (),
    *,
    num_labels: int = 3,
) -> Axes:
    """Residual against leverage; the area of a bubble is Cook's distance.

    Args:
        ax: Where to draw.
        leverage: h_i of each example, shape (N,).
        residual: Residual of each example in the unit of the target, shape (N,).
        cooks_distance: D_i of each example, shape (N,).
        labels: Names of the examples; their numbers if empty.
        num_labels: How many of the most influential are named.
    """
    h, r, cook = _same_length(leverage=leverage, residual=residual, cooks_distance=cooks_distance)
    top = np.argsort(-cook, kind="stable")[:num_labels]
    colors = np.full(len(h), BLUE)
    colors[top] = VERMILLION
    area = 900 * cook / (cook.max() or 1.0)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.scatter(h, r, s=12 + area, c=colors, alpha=0.55, edgecolors="white", linewidths=0.8)
    ax.margins(0.12)
    ax.set(xlabel="leverage $h_i$", ylabel="residual $r_i$")
    return annotate_points(ax, h, r, labels, top, offset=6 + np.sqrt(area / np.pi))


def stems(ax: Axes, values: ArrayLike, labels: Sequence[str] = (), *, num_labels: int = 3) -> Axes:
    """One stem per example; the largest in absolute value are coloured and named.

    Args:
        ax: Where to draw.
        values: One number per example, shape (N,).
        labels: Names of the examples; their numbers if empty.
        num_labels: How many are named.
    """
    (values,) = _same_length(values=values)
    top = np.argsort(-np.abs(values), kind="stable")[:num_labels]
    index = np.arange(len(values))
    colors = np.full(len(values), BLUE)
    colors[top] = VERMILLION
    ax.vlines(index, 0, values, colors=list(colors), linewidth=1.5)
    ax.scatter(index, values, s=14, c=colors)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.margins(y=0.15)
    if values.min() >= 0:
        ax.set_ylim(bottom=0)
    ax.set(xlabel="example")
    return annotate_points(ax, index, values, labels, top)


def annotate_points(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    labels: Sequence[str],
    which: ArrayLike,
    *,
    offset: ArrayLike = 8.0,
) -> Axes:
    """Names next to some of the points; points in the right half are named on their left.

    Args:
        ax: Where to draw.
        x: Horizontal positions, shape (N,).
        y: Vertical positions, shape (N,).
        labels: N names; the points' numbers if empty.
        which: Indices of the points to name.
        offset: Distance of the names from the points, in points; a scalar or shape (N,).
    """
    x, y = _same_length(x=x, y=y)
    if len(labels) not in (0, len(x)):
        raise ValueError(f"labels has {len(labels)} names for {len(x)} points; pass one for each")
    middle = np.mean(ax.get_xlim())
    offset = np.broadcast_to(np.asarray(offset, dtype=float), x.shape)
    for i in map(int, np.asarray(which)):
        side = -1 if x[i] > middle else 1
        ax.annotate(
            labels[i] if labels else str(i),
            (x[i], y[i]),
            xytext=(offset[i] * side, 4),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
        )
    return ax


def ellipse(
    ax: Axes,
    mean: ArrayLike,
    covariance: ArrayLike,
    *,
    num_std: Sequence[float] = (1.0, 2.0),
    color: str = BLUE,
    label: str | None = None,
) -> Axes:
    """Contours of a Gaussian in the plane, at the given numbers of standard deviations.

    Args:
        ax: Where to draw.
        mean: m, shape (2,).
        covariance: Σ, shape (2, 2).
        num_std: Mahalanobis radius of each contour; 1 holds 39 % and 2 holds 86 % of the mass.
        color: Colour of the contours and of the mean.
        label: Entry of the legend.
    """
    mean, covariance = np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float)
    if mean.shape != (2,) or covariance.shape != (2, 2):
        raise ValueError(
            f"mean {mean.shape} and covariance {covariance.shape} must have shapes (2,) and "
            "(2, 2); take the marginal of two coordinates"
        )
    variance, axes = np.linalg.eigh(covariance)
    if variance[0] <= 0:
        raise ValueError(f"covariance is not positive definite: eigenvalues {variance}")
    angle = np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
    for radius in num_std:
        height, width = 2 * radius * np.sqrt(variance)
        patch = Ellipse((mean[0], mean[1]), width, height, angle=angle, fill=False)
        patch.set(edgecolor=color, linewidth=1.8)
        ax.add_patch(patch)
    ax.plot(*mean, "o", color=color, markersize=4, label=label)
    ax.autoscale_view()
    return ax


def reliability_diagram(
    ax: Axes, reliability: Reliability, *, color: str = BLUE, label: str = ""
) -> Axes:
    """Accuracy against confidence in each bin that holds an example; on the diagonal is calibrated.

    Below the diagonal the model is too sure of itself, above it not sure enough. The area of
    a point is the share of examples in its bin. Call it again for other models on the same axes.

    Args:
        ax: Where to draw.
        reliability: Bins of a model, from `blr.metrics.reliability`.
        color: Colour of line and points.
        label: Name of the model; the legend adds its expected calibration error.
    """
    held = reliability.count > 0
    confidence, accuracy = (x[held].numpy() for x in (reliability.confidence, reliability.accuracy))
    share = (reliability.count[held] / reliability.count.sum()).numpy()
    name = f"{label}: ECE {reliability.ece:.3f}" if label else f"ECE {reliability.ece:.3f}"
    ax.plot((0, 1), (0, 1), color=GREY, linewidth=1, zorder=1)
    ax.plot(confidence, accuracy, color=color, label=name, zorder=2)
    # Bins of the almost certain lie on the border: their points are not cut off there.
    ax.scatter(confidence, accuracy, s=12 + 500 * share, color=color, alpha=0.55,
               edgecolors="white", linewidths=0.8, zorder=3, clip_on=False)  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence", ylabel="accuracy")
    return ax


def _same_length(**arrays: ArrayLike) -> list[np.ndarray]:
    """The arguments as vectors of one length."""
    vectors = [np.asarray(value, dtype=float) for value in arrays.values()]
    if any(v.ndim != 1 for v in vectors) or len({v.size for v in vectors}) > 1:
        shapes = ", ".join(f"{k} {v.shape}" for k, v in zip(arrays, vectors, strict=True))
        raise ValueError(f"{shapes}: pass vectors of one length")
    return vectors
