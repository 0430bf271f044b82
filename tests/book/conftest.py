"""What the tests of the book share: its tools, its pages, and a browser without a network."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_tools"))

Needs = Callable[[object, str], None]


def pages() -> list[str]:
    """The pages of _toc.yml, relative to the site."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    return [file.removesuffix(".md") + ".html" for file in files]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `page` runs on every page."""
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", pages())


@pytest.fixture(scope="session", name="pages")
def all_pages() -> list[str]:
    return pages()


@pytest.fixture(scope="session")
def site(needs: Needs) -> Path:
    """The built site, no older than its sources."""
    built = ROOT / "_build" / "html"
    needs((built / "index.html").exists(), "build the site: make book")
    sources = [path for name in ("*.md", "_assets/*.*") for path in (ROOT / "book").glob(name)]
    newest = max(path.stat().st_mtime for path in [*sources, *ROOT.glob("_*.yml")])
    written = (built / "searchindex.js").stat().st_mtime
    needs(written >= newest, "the site is older than its sources: make book")
    return built


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`visit(url, width=1280, dark=False)`: the page, rendered; at the end of the test no error.

    Whatever is neither a file nor on this machine is refused, and counts as an error.
    """
    contexts, errors = [], []

    def local(url: str) -> bool:
        return url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))

    def visit(url: str, width: int = 1280, dark: bool = False) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        context.route(lambda target: not local(target), lambda route: route.abort())
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and errors.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: errors.append(f"script: {error}"))
        page.on("request", lambda r: local(r.url) or errors.append(f"external request: {r.url}"))
        page.on("requestfailed", lambda r: errors.append(f"failed request: {r.url}"))
        page.on("response", lambda r: r.status >= 400 and errors.append(f"{r.status}: {r.url}"))
        page.goto(url)
        page.wait_for_function("!window.MathJax || MathJax.startup.promise.then(() => true)")
        page.evaluate("document.fonts.ready.then(() => 0)")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not errors, "\n".join(dict.fromkeys(errors))
