"""A small Sphinx extension: what the built site needs beyond Jupyter Book's own options.

Citations get round brackets, Khan and Rue (2023). Pages lose what would fail in a browser without a
network: the theme's font preloads (refused when a page is opened from a folder; the icons come from
a script) and Thebe, which would run cells on a server that we do not have. Docstrings, which are
plain text with Unicode mathematics, are shown as such: names in backticks become code, indented
equations keep their layout.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinxcontrib.bibtex.plugin import register_plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

UNWANTED = re.compile(
    r'<link rel="preload" as="font"[^>]*>\s*'
    r"|<link [^>]*sphinx-thebe\.css[^>]*>\s*"
    r"|<script [^>]*sphinx-thebe\.js[^>]*></script>\s*"
    r"|<script>const THEBE_JS_URL.*?</script>\s*"
    r'|<script type="text/x-thebe-config">.*?</script>\s*'
    r"|<script>kernelName = .*?</script>\s*",
    re.S,
)


class RoundAuthorYear(AuthorYearReferenceStyle):
    """Author-year citations in round brackets."""

    def __post_init__(self) -> None:
        """Set the brackets before the base class hands them on."""
        self.bracket_textual = self.bracket_parenthetical = BracketStyle("(", ")", sep="; ")
        super().__post_init__()


def drop_unwanted(app: Sphinx, error: Exception | None) -> None:
    """Clean all pages written."""
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        text = page.read_text(encoding="utf-8")
        if UNWANTED.search(text):
            page.write_text(UNWANTED.sub("", text), encoding="utf-8")


def plain_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Make a plain docstring reStructuredText that reads the same, before Google's sections."""
    shown: list[str] = []
    above = ""  # the last line with text
    for n, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and n and not lines[n - 1] and not above.startswith(" "):
            shown += ["::", ""]
            above = " ::"
        literal = above == " ::" and (indented or not line)
        shown.append(line if literal or line.lstrip().startswith(">>>") else escape(line))
        above = above if literal or not line else line
    lines[:] = shown


def escape(line: str) -> str:
    """A line without accidental markup."""
    parts = re.split(r"`+([^`]+)`+", line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", text) for text in parts[::2]]
    parts[1::2] = [f"``{code}``" for code in parts[1::2]]
    return "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    register_plugin("sphinxcontrib.bibtex.style.referencing", "author_year_round", RoundAuthorYear)
    app.connect("build-finished", drop_unwanted)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # napoleon: 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
