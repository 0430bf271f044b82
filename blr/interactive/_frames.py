"""A slider over pictures that are drawn now."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from blr.interactive._figure import InteractiveFigure, address, assemble, picture


def frames(
    draw: Callable[[Axes, float], object],
    *,
    label: str | None = None,
    alt: Callable[[float], str] | None = None,
    start: int = 0,
    size: tuple[float, float] | None = None,
    **axis: Sequence[float],
) -> InteractiveFigure:
    """A slider over the pictures `draw(ax, value)`, one for each value, of about 6 kB each.

    Args:
        draw: Draws one picture on an empty Axes.
        label: Name of the slider for the reader, for instance "λ"; the keyword if None.
        alt: Describes the picture of a value in words, for those who cannot see it.
        start: Index of the picture that is shown first, and alone where no script runs.
        size: Width and height in inches; the style's size if None.
        axis: One keyword, the name of the slider, with its values: `frames(draw, rho=[0.1, 0.5])`.

    Raises:
        ValueError: If there is not exactly one axis, with at least two values.
    """
    if len(axis) != 1:
        raise ValueError(
            f"frames has {len(axis)} axes {tuple(axis)}; pass one, as in rho=[0.1, 0.5]"
        )
    ((name, values),) = axis.items()
    if len(values) < 2 or not 0 <= start < len(values):
        raise ValueError(
            f"{name} has {len(values)} values and start is {start}; pass two values or more "
            "and the index of one of them"
        )
    pictures = [
        picture(lambda figure, v=v: draw(figure.subplots(), v), size=size, dpi=80) for v in values
    ]
    label, texts = label or name, [f"{v:g}" for v in values]
    alts = [alt(v) if alt else f"{label} = {text}" for v, text in zip(values, texts, strict=True)]
    data = {
        "name": label,
        "start": start,
        "frames": [
            {"value": text, "alt": words, "src": "" if k == start else address(image)}
            for k, (text, words, image) in enumerate(zip(texts, alts, pictures, strict=True))
        ],
    }
    state = {"index": start, "value": texts[start]}
    instruction = f"Move the slider to change {label}."
    return assemble(("frames",), instruction, data, state, pictures[start], alts[start])
