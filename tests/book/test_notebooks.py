"""The committed notebooks: what their sources say, with the site's numbers, reproducible."""

import configparser
import re
import shutil
from pathlib import Path

import make_notebooks
import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from myst import MystError

CHAPTERS = list(make_notebooks.chapters(make_notebooks.ROOT))
SMALL = """\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A page

Before.

```{code-cell} ipython3
---
tags: [hide-input]
mystnb:
  image:
    alt: nothing
  figure:
    caption: A **figure**, $\\E$
    name: fig-a
---
print("one")
print("two")
```

After {numref}`fig-a`, by {cite:t}`cook1977`.
"""


@pytest.fixture
def book(tmp_path: Path, root: Path) -> Path:
    """A book of one small chapter, with this book's configuration."""
    (tmp_path / "book").mkdir()
    shutil.copy(root / "_config.yml", tmp_path)
    shutil.copy(root / "book" / "references.bib", tmp_path / "book")
    toc = {"root": "book/index", "parts": [{"numbered": True, "chapters": [{"file": "book/a.md"}]}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "book" / "a.md").write_text(SMALL)
    return tmp_path


def soup_of(site: Path, chapter: Path) -> BeautifulSoup:
    """The page of a chapter."""
    page = site / "book" / f"{chapter.stem}.html"
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_is_the_executed_translation_of_its_source(chapter: Path) -> None:
    assert make_notebooks.check(chapter) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_code_cell_was_executed_so_that_nbval_compares_it(chapter: Path) -> None:
    notebook = nbformat.read(chapter.with_suffix(".ipynb"), 4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)) and len(counts) > 1


def test_the_numbers_in_the_notebooks_are_those_of_the_site(site: Path) -> None:
    labels = make_notebooks.labels(make_notebooks.ROOT)
    assert labels
    soups = {path.stem: soup_of(site, path) for path in CHAPTERS}
    for name, label in labels.items():
        page = soups[label.chapter]
        if label.kind == "Section":
            place = page.find(id=name) or page.find("section")
            shown = place.find_parent("section") if place.name == "span" else place
            text = shown.find(class_="section-number").get_text().strip(" .\n")
            assert text == label.number, name
        elif label.kind == "Eq.":
            text = page.find(id=f"equation-{name}").find(class_="eqno").get_text()
            assert text.startswith(f"({label.number})"), name
        else:
            text = page.find(id=name).find(class_="caption-number").get_text()
            assert text.split() == [*label.kind.split(), label.number], name


def test_every_number_of_the_site_has_a_label_that_the_notebooks_know(site: Path) -> None:
    labels = make_notebooks.labels(make_notebooks.ROOT).values()
    numbers = {(label.chapter, label.number) for label in labels}
    for path in CHAPTERS:
        for found in soup_of(site, path).select(".bd-article .eqno, .bd-article .caption-number"):
            number = re.search(r"[\d.]*\d", found.get_text())
            assert number and (path.stem, number[0]) in numbers, found


def test_a_chapter_is_executed_once_and_again_only_when_its_code_changes(book: Path) -> None:
    source, target = book / "book" / "a.md", book / "book" / "a.ipynb"
    assert "missing" in make_notebooks.check(source, book)[0]
    assert "executed" in make_notebooks.build(source, book)
    first = target.read_bytes()
    assert make_notebooks.check(source, book) == []
    assert "up to date" in make_notebooks.build(source, book) and target.read_bytes() == first
    assert "executed" in make_notebooks.build(source, book, force=True)
    assert target.read_bytes() == first

    source.write_text(SMALL.replace("Before.", "Now."))
    assert "not the translation" in make_notebooks.check(source, book)[0]
    assert "up to date" in make_notebooks.build(source, book) and target.read_bytes() != first
    source.write_text(SMALL.replace('print("two")', "2"))
    assert "executed" in make_notebooks.build(source, book)


def test_the_notebook_of_a_chapter_has_colabs_cell_caption_and_references(book: Path) -> None:
    cells = make_notebooks.translate(book / "book" / "a.md", book).cells
    assert [cell.cell_type for cell in cells] == [
        "markdown", "code", "code", "markdown", "markdown", "markdown",
    ]  # fmt: skip
    url = yaml.safe_load((book / "_config.yml").read_text())["repository"]["url"]
    assert cells[1].source.splitlines()[-1].strip() == (
        f'%pip install -q "bayesian-learning-rule @ git+{url}"'
    )
    assert cells[2].metadata.jupyter.source_hidden
    assert cells[3].source == "**Fig. 1.1.** A **figure**, $\\mathbb{E}$"
    assert cells[4].source.startswith("After Fig. 1.1, by [Cook (1977)](https://doi.org/")
    assert "R. Dennis Cook" in cells[5].source


def test_a_notebook_that_an_editor_touched_is_put_right(book: Path) -> None:
    source, target = book / "book" / "a.md", book / "book" / "a.ipynb"
    make_notebooks.build(source, book)
    clean = target.read_text()
    touched = nbformat.reads(clean, 4)
    touched.metadata.widgets, touched.metadata.kernelspec.display_name = {}, "mine"
    for n, cell in enumerate(touched.cells):
        cell.id, cell.metadata["collapsed"] = str(n), True
    assert make_notebooks.dumps(make_notebooks.normalise(touched)) == clean


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import sys; print('x', file=sys.stderr)", "stderr"),
        ("object()", "of this machine"),
        ("print('/home/me')", "of this machine"),
    ],
)
def test_outputs_that_cannot_be_committed_are_refused(book: Path, code: str, fault: str) -> None:
    source = book / "book" / "a.md"
    source.write_text(SMALL.replace('print("one")', code).replace('print("two")\n', ""))
    with pytest.raises(MystError, match=fault):
        make_notebooks.build(source, book)


def test_a_failing_cell_and_a_missing_key_stop_the_build(book: Path) -> None:
    source = book / "book" / "a.md"
    source.write_text(SMALL.replace('print("one")', "assert False"))
    with pytest.raises(Exception, match="AssertionError"):
        make_notebooks.build(source, book)
    source.write_text(SMALL.replace("cook1977", "nobody1900"))
    with pytest.raises(MystError, match="nobody1900"):
        make_notebooks.build(source, book)


def test_jupyter_book_finds_the_outputs_in_its_cache(book: Path) -> None:
    from jupyter_cache import get_cache

    source = book / "book" / "a.md"
    make_notebooks.build(source, book)
    make_notebooks.prime(source, book)
    (record,) = get_cache(book / "_build" / ".jupyter_cache").list_cache_records()
    assert record.uri == str(source)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<Line at 0x7f01ab23cd>", "<Line at 0x7faaaa0001>"),
        ("took 1.3 s", "took 22 ms"),
        ("0.123456789", "0.123411111"),
        ("-0.00", "0.00"),
    ],
)
def test_strict_comparison_forgives_what_differs_between_honest_runs(
    root: Path, one: str, other: str
) -> None:
    rules = configparser.RawConfigParser()
    rules.read(root / "tests" / "nbval_sanitize.cfg")

    def sanitize(text: str) -> str:
        for rule in rules.sections():
            text = re.sub(rules[rule]["regex"], rules[rule]["replace"], text)
        return text

    assert sanitize(one) == sanitize(other) and sanitize("0.1234") != sanitize("0.1235")
