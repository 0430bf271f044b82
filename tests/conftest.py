"""What the tests of the whole house share.

A test may need something that a user's machine lacks: a browser, a built site. It then says so with

    needs(shutil.which("chromium"), "install Chromium: apt install chromium")

and is skipped there with that remedy; where `CI` is set, the same call fails, so that nothing is
left out silently where everything must run.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """One thread, before anything imports torch, and no windows; kernels choose for themselves."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import matplotlib

    matplotlib.use("agg")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def needs() -> Callable[[object, str], None]:
    """`needs(condition, remedy)`: go on, or skip with the remedy; in CI, fail."""

    def needs(condition: object, remedy: str) -> None:
        if condition:
            return
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(f"CI must run this: {remedy}", pytrace=False)
        pytest.skip(remedy)

    return needs


@pytest.fixture(scope="session")
def chromium(needs: Callable[[object, str], None]) -> Iterator[Any]:
    """A real browser; one for all tests of a process, since two would stand in each other's way."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    needs(found, "install a browser: apt install chromium")
    needs(find_spec("playwright"), "pip install playwright")
    from playwright.sync_api import sync_playwright

    quiet = "--disable-background-networking --disable-component-update --disable-sync"
    arguments = f"--no-sandbox --disable-gpu --no-first-run {quiet}".split()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def wheel(needs: Callable[[object, str], None]) -> Path:
    """The wheel of this checkout, built by `make wheel` (and so by `make test`)."""
    wheels = sorted((ROOT / "_build" / "dist").glob("*.whl"))
    needs(wheels, "build the wheel: make wheel")
    shipped = [ROOT / "pyproject.toml", *(ROOT / "blr").rglob("*.py")]
    newest = max(path.stat().st_mtime for path in shipped)
    needs(wheels[-1].stat().st_mtime >= newest, "the wheel is older than the code: make wheel")
    return wheels[-1]
