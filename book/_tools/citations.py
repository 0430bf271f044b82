"""Citations in author-year form and the list of the works cited, from the book's BibTeX file."""

import re
from dataclasses import dataclass, field

from myst import MystError
from pybtex.database import BibliographyData, Entry
from pybtex.plugin import find_plugin
from pybtex.richtext import Text


@dataclass
class Citations:
    """Cites works and remembers which."""

    works: BibliographyData
    used: set[str] = field(default_factory=set)

    def cite(self, kind: str, key: str) -> str:
        """Author and year, linked to the work; kind "t" for running text, "p" for parentheses."""
        if key not in self.works.entries:
            raise MystError(f"no entry {key!r} in the bibliography")
        self.used.add(key)
        entry = self.works.entries[key]
        names = [plain(" ".join(p.prelast_names + p.last_names)) for p in entry.persons["author"]]
        authors = names[0] + " et al." if len(names) > 2 else " and ".join(names)
        year = entry.fields["year"]
        text = f"{authors} ({year})" if kind == "t" else f"{authors}, {year}"
        return f"[{text}]({address(entry)})" if address(entry) else text

    def references(self) -> str:
        """The works cited so far, as a markdown list."""
        style = find_plugin("pybtex.style.formatting", "plain")()
        entries = [self.works.entries[key] for key in self.used]
        texts = {e.key: e.text.render_as("text") for e in style.format_entries(entries)}
        rows = []
        for entry in sorted(entries, key=order):
            link = address(entry)
            text = re.sub(r"(doi:|URL: )\S+", "", texts[entry.key]).rstrip(" ,.") + "."
            shown = f" [{link.removeprefix('https://')}]({link})" if link else ""
            rows.append(f"- {text}{shown}")
        return "\n".join(["## References", "", *rows])


def plain(latex: str) -> str:
    """Text without LaTeX's accents and braces."""
    return str(Text.from_latex(latex)).replace("{", "").replace("}", "")


def order(entry: Entry) -> tuple[str, str, str]:
    """First author, year, key."""
    return str(entry.persons["author"][0]), entry.fields["year"], entry.key


def address(entry: Entry) -> str:
    """Where the work is: its DOI, else its URL, else nothing."""
    doi = entry.fields.get("doi")
    return f"https://doi.org/{doi}" if doi else entry.fields.get("url", "")
