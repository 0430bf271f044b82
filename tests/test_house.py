"""Claims about the house itself: what it is made of, what it promises, and where things stand."""

import ast
import doctest
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
ADDRESS = CONFIG["repository"]["url"]
MODULES = sorted((ROOT / "blr").rglob("*.py"))
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))

# What Colab shipped in August 2026; our floors must let it stand.
COLAB = {
    "numpy": "2.1.3",
    "scipy": "1.16.3",
    "torch": "2.11.0",
    "scikit-learn": "1.6.0",
    "matplotlib": "3.10.0",
    "tqdm": "4.67.0",
    "ipywidgets": "7.7.1",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(*groups: str) -> dict[str, SpecifierSet]:
    """Name and bounds of the hard dependencies and of the extras named."""
    lines = list(PROJECT["project"]["dependencies"])
    for group in groups:
        lines += PROJECT["project"]["optional-dependencies"][group]
    parsed = map(Requirement, lines)
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def constraints() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}


def our_files() -> list[Path]:
    """Text files of ours: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # a source archive: no git
        skipped = {".venv", "_build", "build"}
        paths = [p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts)]
    vendored = ROOT / "book" / "_assets" / "mathjax"
    binary = {".woff", ".woff2", ".png", ".ico", ".pyc", ".gz", ".npz"}
    return [
        p for p in paths if p.is_file() and p.suffix not in binary and vendored not in p.parents
    ]


# ---- dependencies -------------------------------------------------------------------------------


def test_hard_dependencies_are_the_six_and_no_more():
    assert set(requirements()) == {
        "numpy", "scipy", "torch", "scikit-learn", "matplotlib", "tqdm",
    }  # fmt: skip


def test_hard_dependencies_have_floors_only_and_colab_satisfies_them():
    for name, bounds in requirements("notebook").items():
        assert {bound.operator for bound in bounds} == {">="}, name
        assert bounds.contains(COLAB[name]), f"an install in Colab would replace {name}"
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains("3.13.0")


def test_every_requirement_is_pinned_within_its_bounds():
    pins = constraints()
    for name, bounds in requirements("notebook", "book", "test").items():
        assert bounds.contains(pins[name]), name
    assert pins["torch"] == "2.13.0"
    assert all(Version(pin).local is None for pin in pins.values())


def test_conda_environment_has_the_same_packages_with_the_same_bounds():
    conda_name = {"torch": "pytorch"}
    listed = yaml.safe_load(read("environment.yml"))["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = {r.name: r.specifier for r in map(Requirement, (e for e in listed if type(e) is str))}
    ours = requirements("notebook", "book", "test")
    for name, bounds in requirements("notebook").items():
        assert conda.pop(conda_name.get(name, name)) == bounds, name
    assert conda.pop("python") == SpecifierSet(PROJECT["project"]["requires-python"])
    assert conda.pop("setuptools") == Requirement(PROJECT["build-system"]["requires"][0]).specifier
    for name in conda.keys() - {"pip", "wheel"}:
        assert conda[name] == ours[name], name
    extras = re.search(r"--editable \.\[(.*)\]", "\n".join(pip))
    assert extras and set(extras[1].split(",")) == set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_importing_a_module_needs_hard_dependencies_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pillow = {"PIL"}  # matplotlib requires it
    assert third_party(tree.body) <= imports_of(requirements()) | pillow


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_import_what_the_book_installs(path):
    cells = "\n".join(code_cells(path))
    code = re.sub(r"^(\s*)[%!].*$", r"\1pass", cells, flags=re.M)
    allowed = imports_of(requirements("book", "notebook")) | {"blr", "google", "IPython", "pandas"}
    assert third_party(ast.walk(ast.parse(code))) <= allowed


def third_party(nodes) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"blr"}


def imports_of(names) -> set[str]:
    return {{"scikit-learn": "sklearn"}.get(name, name.replace("-", "_")) for name in names}


def code_cells(chapter: Path) -> list[str]:
    text = chapter.read_text(encoding="utf-8")
    cells = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    return [
        re.sub(r"\A(---\n.*?^---\n|(:[\w-]+:[^\n]*\n)+)", "", c, flags=re.M | re.S) for c in cells
    ]


# ---- floors and sizes ---------------------------------------------------------------------------


def test_every_module_has_a_floor():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (floors,) = (c for c in contracts if c["type"] == "layers")
    named = {name for layer in floors["layers"] for name in re.split(r"\s*[|:]\s*", layer)}
    ours = {path.relative_to(ROOT / "blr").parts[0].removesuffix(".py") for path in MODULES}
    assert floors["exhaustive"]
    assert ours - {"__init__"} == named, "give the new file a floor in pyproject.toml"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            last_line_of_docstring = node.body[0].end_lineno if documented else node.lineno
            assert node.end_lineno - last_line_of_docstring <= 60, node.name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_cells_fit_on_a_page(path):
    long = [line for cell in code_cells(path) for line in cell.splitlines() if len(line) > 80]
    assert not long, "code cells have at most 80 columns"


# ---- where things stand -------------------------------------------------------------------------


def test_no_file_names_a_machine_or_a_package_host():
    hosts = ["pypi.org", "pythonhosted.org", "download.pytorch.org", "npmjs.org", "deb.debian.org"]
    places = r"(?<![\w.])/(?:home|opt|root|work|farm|tmp|Users)/\w+/"
    pattern = re.compile("|".join([*map(re.escape, hosts), places]))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in our_files()
        if path != Path(__file__).resolve()
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_repository_address_stands_in_config_and_agrees_elsewhere():
    slug = ADDRESS.removeprefix("https://github.com/")
    fix = f"the address is {ADDRESS} (_config.yml): correct README.md and CITATION.cff"
    assert yaml.safe_load(read("CITATION.cff"))["repository-code"] == ADDRESS, fix
    branch = CONFIG["repository"]["branch"]
    badge = f"https://colab.research.google.com/github/{slug}/blob/{branch}/book/"
    badges = re.findall(r"https://colab\.research\.google\.com/[^)\s]*", read("README.md"))
    assert badges == [f"{badge}{path.stem}.ipynb" for path in toc()], fix
    # make_table.py writes the page of the table, and test_table.py checks that it did.
    checked = ("README.md", "CITATION.cff", "_config.yml", "book/table.md")
    generated = {ROOT / name for name in checked}
    elsewhere = [
        path.relative_to(ROOT)
        for path in our_files()
        if path not in generated
        and path.suffix != ".ipynb"
        and slug in path.read_text(encoding="utf-8")
    ]
    assert not elsewhere, "take the address from _config.yml"


def test_readme_lists_every_chapter_with_its_title():
    rows = re.findall(r"^\| \[(\d\d)\]\((book/\S+\.md)\) \| (.*?) \|", read("README.md"), re.M)
    assert [path for _, path, _ in rows] == [f"book/{path.name}" for path in toc()]
    for number, path, title in rows:
        assert Path(path).name.startswith(number)
        if (ROOT / path).exists():
            assert re.search(r"^# (.*)$", read(path), re.M)[1].strip() == title


def toc() -> list[Path]:
    parts = yaml.safe_load(read("_toc.yml"))["parts"]
    files = [ROOT / c["file"] for part in parts for c in part["chapters"]]
    return [path for path in files if re.match(r"\d\d_", path.name)]


def test_version_and_name_agree_everywhere():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == version
    assert citation["title"].startswith(PROJECT["project"]["name"])
    assert citation["license"] == PROJECT["project"]["license"]
    assert importlib.metadata.version(PROJECT["project"]["name"]) == version
    assert f'__version__ = "{version}"' in read("blr/__init__.py")
    assert re.search(rf"^## \[{re.escape(version)}\]", read("CHANGELOG.md"), re.M)


def test_licences_are_there():
    assert "Apache License" in read("LICENSE") and len(read("LICENSE")) > 10_000
    assert "CC-BY-4.0" in read("LICENSE-text")
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()


def test_commands_that_are_promised_exist():
    targets = set(re.findall(r"^([a-z]+):.*## ", read("Makefile"), re.M))
    for name in ["README.md", "CONTRIBUTING.md", "environment.yml", ".ci/run", "tests/conftest.py"]:
        promised = set(re.findall(r"(?:`|: |^|&& )make ([a-z]+)", read(name), re.M))
        assert promised <= targets, name
    assert {"book", "test", "lab", "lint", "clean"} <= targets
    assert re.search(r"^make test", read(".ci/run"), re.M)


def test_hooks_call_files_that_exist():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    for hook in hooks:
        for word in hook["entry"].split():
            assert "/" not in word or word.startswith(".venv/") or (ROOT / word).exists(), word


# ---- the wheel and the README -------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if not re.search(r"\.(dist-info|data)/", name)}
    results = {Path(name).name for name in names if "/share/blr/results/" in name}
    assert results == {path.name for path in (ROOT / "book" / "results").glob("*.json")}
    packed = (ROOT / "blr" / "datasets").glob("*.gz")  # no text, so not among `our_files`
    ours = [p for p in (*our_files(), *packed) if ROOT / "blr" in p.parents]
    on_disk = {str(p.relative_to(ROOT)) for p in ours}
    assert on_disk == package
    assert {"LICENSE", "LICENSE-text"} <= {Path(n).name for n in names if "/licenses/" in n}


def test_importing_the_wheel_draws_nothing_and_fetches_nothing(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import blr; "
        "eager = {'matplotlib', 'statsmodels', 'pooch', 'IPython'} & set(sys.modules); "
        "print(json.dumps([blr.__file__, sorted(eager)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    place, eager = json.loads(run.stdout)
    assert Path(place).parent == tmp_path / "blr"
    assert eager == []


def test_the_lines_in_the_readme_work():
    blocks = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.M | re.S)
    examples = [block for block in blocks if ">>>" in block]
    assert examples
    text = "\n".join(examples)
    test = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted and not result.failed
