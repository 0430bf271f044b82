"""One interactive figure as HTML that needs nothing else, with a still picture inside."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from importlib import resources

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from blr import plotting


@dataclass(frozen=True)
class InteractiveFigure:
    """What a cell displays: `html` where scripts run, `png` elsewhere, `text` in a terminal.

    Attributes:
        html: Self-contained element with style, data and script.
        png: Still picture.
        text: Description of the still picture.
    """

    html: str = field(repr=False)
    png: bytes = field(repr=False)
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """Every form at once; the front end takes the richest that it can show."""
        png = base64.b64encode(self.png).decode()
        return {"text/html": self.html, "image/png": png, "text/plain": self.text}


def assemble(
    scripts: tuple[str, ...],
    instruction: str,
    data: Mapping[str, object],
    state: object,
    still: Image.Image,
    alt: str,
) -> InteractiveFigure:
    """Put the scripts, of which the last is the figure's own, and their data into one element."""
    read = (resources.files("blr") / "interactive").joinpath
    css = read("figure.css").read_text(encoding="utf-8")
    js = "\n".join(read(f"{name}.js").read_text(encoding="utf-8") for name in ("figure", *scripts))
    html = (
        f'<div class="blr-interactive" data-kind="{scripts[-1]}" '
        f'data-state="{escape(_json(state))}">\n'
        f"<style>\n{css}</style>\n"
        f"<p>{escape(instruction)}</p>\n"
        f'<img alt="{escape(alt)}" src="{address(still)}">\n'
        f'<script type="application/json">{_json(data)}</script>\n'
        f"<script>\n(() => {{\n{js}}})();\n</script>\n</div>"
    )
    return InteractiveFigure(html, _bytes(still, "png"), alt)


def picture(
    draw: Callable[[Figure], object], *, size: tuple[float, float] | None = None, dpi: float = 100
) -> Image.Image:
    """A figure in the style of the book, in 32 colours so that it is small."""
    with matplotlib.rc_context():
        plotting.use_style()
        figure = Figure(figsize=size)
        draw(figure)
        figure.savefig(raw := io.BytesIO(), format="png", dpi=dpi)
    return Image.open(raw).convert("RGB").quantize(32, method=Image.Quantize.MAXCOVERAGE)


def address(image: Image.Image) -> str:
    """A URL that contains the picture."""
    return f"data:image/webp;base64,{base64.b64encode(_bytes(image, 'webp')).decode()}"


def _bytes(image: Image.Image, kind: str) -> bytes:
    if kind == "png":
        image.save(out := io.BytesIO(), format="png", optimize=True)
    else:
        image.convert("RGB").save(out := io.BytesIO(), format="webp", lossless=True, method=6)
    return out.getvalue()


def _json(data: object) -> str:
    """JSON that cannot end the script element around it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
