"""Chapters as executed notebooks: book/NN_name.md -> book/NN_name.ipynb.

The source (MyST) is what we edit and what the site shows; the notebook is what Colab opens and
what the tests re-execute.

    make_notebooks.py               translate every chapter, execute those whose code changed
    make_notebooks.py NAME...       only these
    make_notebooks.py --all         execute in any case
    make_notebooks.py --check       is every notebook the executed translation of its source?
    make_notebooks.py --prime       give the outputs to Jupyter Book, which then executes nothing
    make_notebooks.py --normalise   rewrite the metadata of notebooks that an editor has touched

A notebook is stale when its code cells differ from its source's, or one was never executed, or
failed. A change of the library makes none stale: the tests re-execute every notebook and compare
all outputs but pictures; when the look of figures changed, use --all. Equal sources, equal bytes.

The first code cell of every notebook, which installs the library in Colab, is not in the source: it
is made here, from the repository's address in _config.yml.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml
from citations import Citations
from myst import Label, MystError, scan
from nbformat import NotebookNode
from pybtex.database import BibliographyData, parse_file
from translate import Translator

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
COLAB = """\
# Google Colab lacks this library; anywhere else this cell does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "bayesian-learning-rule @ git+{url}\""""
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
MACHINE = re.compile(r"0x[0-9a-f]{6,}|/(?:home|tmp|root|Users)/\w|ipykernel_\d")


@cache
def config(root: Path) -> dict[str, Any]:
    """Jupyter Book's configuration: the repository's address, the macros, the bibliography."""
    return yaml.safe_load((root / "_config.yml").read_text())


def chapters(root: Path) -> dict[Path, int]:
    """The numbered chapters of _toc.yml that exist, with their numbers."""
    parts = yaml.safe_load((root / "_toc.yml").read_text())["parts"]
    files = [root / c["file"] for part in parts if part.get("numbered") for c in part["chapters"]]
    return {path: n for n, path in enumerate(files, 1) if path.exists()}


def figure(cell: NotebookNode) -> dict[str, str]:
    """Name and caption of the figure that a code cell draws; empty for other cells."""
    options = cell.metadata.get("mystnb", {}).get("figure", {})
    if options and not {"name", "caption"} <= options.keys():
        raise MystError(f"a figure needs a name and a caption: {dict(options)}")
    return options


@cache
def labels(root: Path) -> dict[str, Label]:
    """Every label of the book with the number that Sphinx gives it."""
    found: dict[str, Label] = {}
    for path, number in chapters(root).items():
        cells = [(c.source, {}) if c.cell_type == "markdown" else ("", figure(c))
                 for c in jupytext.read(path).cells]  # fmt: skip
        for name, label in scan([cell for cell in cells if any(cell)], path.stem, number):
            if name in found:
                raise MystError(f"label {name!r} in both {found[name].chapter} and {path.stem}")
            found[name] = label
    return found


def translate(path: Path, root: Path = ROOT, draft: bool = False) -> NotebookNode:
    """The notebook of a chapter, without outputs."""
    files = [parse_file(root / file) for file in config(root)["bibtex_bibfiles"]]
    works = Citations(BibliographyData({k: e for file in files for k, e in file.entries.items()}))
    macros = config(root)["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    number = chapters(root)[path]
    page = Translator(path.stem, number, labels(root), macros, works.cite, draft)
    cells: list[NotebookNode] = []
    v4, hidden = nbformat.v4, False
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            if gates := re.findall(r"\{solution-(start|end)\}", cell.source):
                hidden = gates[-1] == "start"
            cells.append(v4.new_markdown_cell(page.markdown(cell.source)))
            continue
        if not any(c.cell_type == "code" for c in cells):
            cells.append(v4.new_code_cell(COLAB.format(url=config(root)["repository"]["url"])))
        tags = cell.metadata.get("tags", [])
        metadata = {"tags": tags} if tags else {}
        if hidden or FOLDED.intersection(tags):
            metadata["jupyter"] = {"source_hidden": True}
        cells.append(v4.new_code_cell(cell.source, metadata=metadata))
        if options := figure(cell):
            label = page.find(options["name"])
            caption = page.inline(" ".join(options["caption"].split()))
            cells.append(v4.new_markdown_cell(f"**Fig. {label.number}.** {caption}"))
    if works.used:
        cells.append(v4.new_markdown_cell(works.references()))
    return normalise(v4.new_notebook(cells=cells))


def normalise(notebook: NotebookNode) -> NotebookNode:
    """The notebook with only the metadata that we mean, and ids made from the cells."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, -1) + 1
        cell.id = digest + (f"-{seen[digest]}" if seen[digest] else "")
        kept = {key: cell.metadata[key] for key in ("jupyter", "tags") if key in cell.metadata}
        cell.metadata = NotebookNode(kept)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    return notebook


def merge_streams(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring pieces of one stream joined: where a stream is cut is chance."""
    merged: list[NotebookNode] = []
    for output in outputs:
        if merged and output.get("name") and output.get("name") == merged[-1].get("name"):
            merged[-1] = NotebookNode(merged[-1], text=merged[-1].text + output.text)
        else:
            merged.append(output)
    return merged


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def carry_over(new: NotebookNode, old: NotebookNode) -> bool:
    """Give `new` the outputs of `old`; False where the code differs: they would not be its own."""
    pairs = list(zip(code_cells(new), code_cells(old), strict=False))
    if len(code_cells(new)) != len(code_cells(old)) or any(a.source != b.source for a, b in pairs):
        return False
    for a, b in pairs:
        a.outputs, a.execution_count = merge_streams(b.outputs), b.execution_count
    return True


def faults(notebook: NotebookNode) -> list[str]:
    """What must not be in the outputs of a committed notebook."""
    found = []
    for n, cell in enumerate(code_cells(notebook), 1):
        where = f"code cell {n} ({cell.source.strip().splitlines()[-1][:50]!r})"
        if cell.execution_count != n:
            found.append(f"{where} was not executed in order")
        may_fail = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            if output.output_type == "error" and not may_fail:
                found.append(f"{where} failed: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"{where} wrote to stderr: {output.text[:200]!r}")
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            if machine := MACHINE.search(text):
                found.append(f"{where} printed something of this machine or run: {machine[0]!r}")
    return found


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel, in place."""
    from nbclient import NotebookClient

    os.environ.pop("MPLBACKEND", None)  # agg would show no figure
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=120, kernel_name="python3", record_timing=False,
                   extra_arguments=["--IPKernelApp.log_level=ERROR"],
                   resources={"metadata": {"path": str(folder)}}).execute()  # fmt: skip


def build(path: Path, root: Path = ROOT, force: bool = False, draft: bool = False) -> str:
    """Write the notebook of a chapter, executed if need be; say what was done."""
    start, target = time.perf_counter(), path.with_suffix(".ipynb")
    notebook = translate(path, root, draft)
    old = nbformat.read(target, 4) if target.exists() else None
    fresh = old is not None and not force and carry_over(notebook, old) and not faults(notebook)
    if not fresh:
        execute(notebook, path.parent)
    if found := faults(normalise(notebook)):
        raise MystError("\n".join(f"{path.name}: {fault}" for fault in found))
    target.write_text(dumps(notebook), encoding="utf-8")
    seconds = time.perf_counter() - start
    return f"{path.stem}: " + ("up to date" if fresh else f"executed in {seconds:.1f} s")


def dumps(notebook: NotebookNode) -> str:
    """The bytes of a notebook's file."""
    return nbformat.writes(notebook) + "\n"


def check(path: Path, root: Path = ROOT) -> list[str]:
    """Why the committed notebook of a chapter is not the executed translation of its source."""
    target = path.with_suffix(".ipynb")
    remedy = "run `python book/_tools/make_notebooks.py`"
    if not target.exists():
        return [f"{target.name} is missing: {remedy}"]
    text, notebook = target.read_text(encoding="utf-8"), translate(path, root)
    if not carry_over(notebook, nbformat.reads(text, 4)) or dumps(notebook) != text:
        return [f"{target.name} is not the translation of {path.name}: {remedy}"]
    return [f"{target.name}: {fault}" for fault in faults(notebook)]


def prime(path: Path, root: Path = ROOT) -> None:
    """Put the outputs of a chapter into Jupyter Book's cache of executed notebooks."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    from myst_nb.core.read import read_myst_markdown_notebook
    from myst_parser.config.main import MdParserConfig

    source = read_myst_markdown_notebook(path.read_text(), MdParserConfig(), path=str(path))
    outputs = code_cells(nbformat.read(path.with_suffix(".ipynb"), 4))[1:]  # [0] is Colab's
    for cell, executed in zip(code_cells(source), outputs, strict=True):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    store = get_cache(root / config(root)["execute"]["cache"])
    bundle = CacheBundleIn(nb=source, uri=str(path))
    store.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", help="chapters, as names or files (default: all)")
    parser.add_argument("-j", type=int, default=2, help="chapters executed at a time")
    for flag in ("all", "check", "prime", "normalise"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--draft", action="store_true", help="show unknown references as ??")
    a = parser.parse_args(arguments)
    wanted = {Path(name).stem for name in a.names}
    paths = [path for path in chapters(ROOT) if not wanted or path.stem in wanted]
    if unknown := wanted - {path.stem for path in paths}:
        parser.error(f"not a chapter of _toc.yml: {', '.join(sorted(unknown))}")
    try:
        if a.check:
            found = [fault for path in paths for fault in check(path)]
            print("\n".join(found) or f"{len(paths)} notebooks are what their sources say")
            return bool(found)
        if a.normalise:
            for path in (p.with_suffix(".ipynb") for p in paths):
                if not path.exists():
                    continue
                path.write_text(dumps(normalise(nbformat.read(path, 4))), encoding="utf-8")
        elif a.prime:
            for path in paths:
                prime(path)
        else:
            with ProcessPoolExecutor(a.j) as pool:
                for line in pool.map(partial(build, force=a.all, draft=a.draft), paths):
                    print(line)
    except MystError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
