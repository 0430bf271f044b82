"""Figures that a reader can move, with no kernel: in Jupyter, in Colab, and in the static page.

    frames(draw, **axis)        a slider over figures drawn now
    drag_regression(x, y)       drag a point: the fit, its leverage and its influence follow
    family_explorer()           move λ: A(λ), its slope μ, its dual A*(μ), its curvature F

Each is one piece of HTML with its data and its script in it, plus a picture for places that show
no scripts. `data-state` on the outer element holds what the reader sees as JSON, in full precision.
"""

from blr.interactive._families import family_explorer
from blr.interactive._figure import InteractiveFigure
from blr.interactive._frames import frames
from blr.interactive._regression import drag_regression

__all__ = ["InteractiveFigure", "drag_regression", "family_explorer", "frames"]
