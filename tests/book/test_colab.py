"""Every committed notebook as Google Colab would run it: a fresh environment with only the wheel.

The environment has Colab's packages (here: those of the tests) but not this checkout; the module
`google.colab` exists; `%pip` writes down what it is asked to install; the folder is empty.
"""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import make_notebooks
import nbformat
import pytest
import yaml
from nbclient import NotebookClient

CHAPTERS = list(make_notebooks.chapters(make_notebooks.ROOT))
STARTUP = """\
import sys, types
from pathlib import Path
google = types.ModuleType("google")
google.colab = types.ModuleType("google.colab")
sys.modules |= {"google": google, "google.colab": google.colab}
def pip(line):
    with Path(%r).open("a") as record:
        record.write(line + "\\n")
get_ipython().register_magic_function(pip, "line", "pip")
"""


@dataclass(frozen=True)
class Colab:
    """A place that looks like Colab to a notebook."""

    python: Path
    installed: Path  # what %pip was asked for, a line each


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A fresh Python with the wheel; the other packages are borrowed, this checkout is not."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "-q",
        "--no-deps",
    ]
    subprocess.run([*install, "--no-index", wheel], check=True)
    (packages,) = {path.parent for path in folder.rglob("site-packages/blr")}
    # A path in a .pth file is searched, but its own .pth files, by which an editable install of
    # this checkout would be found, are not read.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts / "python"


@pytest.fixture
def colab(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Colab:
    """A kernel of that Python that believes to be Colab's."""
    installed = tmp_path / "installed.txt"
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text(STARTUP % str(installed))
    kernel = tmp_path / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(environment), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    return Colab(environment, installed)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    folder.mkdir()  # empty, and not the checkout
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="colab", resources=resources).execute()


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_colab(
    colab: Colab, chapter: Path, tmp_path: Path, root: Path, needs
) -> None:
    target = chapter.with_suffix(".ipynb")
    needs(target.exists(), f"{target.name} is missing: make notebooks")
    notebook = nbformat.read(target, 4)
    notebook.cells.append(nbformat.v4.new_code_cell("import blr\nprint(blr.__file__)"))
    run(notebook, tmp_path / "content")

    imported = Path(notebook.cells[-1].outputs[0].text.strip())
    assert imported.is_relative_to(colab.python.parent.parent)  # the wheel, not the checkout
    url = yaml.safe_load((root / "_config.yml").read_text())["repository"]["url"]
    expected = f'install -q "bayesian-learning-rule @ git+{url}"\n'
    assert colab.installed.read_text() == expected


def test_outside_colab_nothing_is_installed(colab: Colab, tmp_path: Path) -> None:
    source = make_notebooks.COLAB.format(url="https://example.org/x")
    cells = [
        nbformat.v4.new_code_cell(cell) for cell in ("del sys.modules['google.colab']", source)
    ]
    cells[0].source = "import sys; " + cells[0].source
    run(nbformat.v4.new_notebook(cells=cells), tmp_path / "content")
    assert not colab.installed.exists()
