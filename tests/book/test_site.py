"""The built site, as a reader meets it: in a browser, without a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

Visit = Callable[..., Any]

# Elements of the article that stick out of the window and lie in no box that scrolls.
STICKING_OUT = """() => [...document.querySelectorAll(".bd-article *")].filter(node => {
  const box = node.getBoundingClientRect();
  if (!box.width || box.right <= innerWidth + 1 || node.closest("mjx-assistive-mml")) return false;
  for (let up = node.parentElement; up && !up.matches(".bd-main"); up = up.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return false;
  return true;
}).map(node => node.outerHTML.slice(0, 150))"""

# (contrast with the background behind it, tag, text) of every element that holds text itself.
CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const over = (top, below) => { const a = top[3] ?? 1;
    return [0, 1, 2].map(k => a * top[k] + (1 - a) * below[k]) };
  const behind = node => { const layers = [];
    for (let up = node; up; up = up.parentElement)
      layers.push(parse(getComputedStyle(up).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]) };
  const shown = node => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  return [...document.querySelectorAll(".bd-article *")]
    .filter(n => !n.closest("svg, mjx-container, script, style, .headerlink") && shown(n)
      && [...n.childNodes].some(t => t.nodeType === 3 && t.data.trim()))
    .map(n => { const back = behind(n), text = over(parse(getComputedStyle(n).color), back);
      const [a, b] = [light(back), light(text)].sort((x, y) => x - y);
      return [(b + 0.05) / (a + 0.05), n.tagName, n.textContent.trim().slice(0, 60)] }) }"""

# Running text in which TeX or a role is left over.
UNTRANSLATED = r"""() => [...document.querySelectorAll(".bd-article :is(p, li, td, figcaption)")]
  .map(node => { const copy = node.cloneNode(true);
    copy.querySelectorAll("code, pre, mjx-container, script").forEach(n => n.remove());
    return copy.textContent })
  .filter(text => /\\\(|\\\[|\$|\{(eq|ref|numref|doc|prf:ref|cite)/.test(text))"""


@pytest.fixture(scope="module")
def soups(site: Path) -> dict[str, BeautifulSoup]:
    return {
        str(path.relative_to(site)): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in site.rglob("*.html")
        if "_static" not in path.parts
    }


def test_every_entry_of_the_table_of_contents_has_a_page(
    soups: dict[str, BeautifulSoup], pages: list[str]
) -> None:
    assert set(pages) <= soups.keys()


def test_internal_links_lead_somewhere(site: Path, soups: dict[str, BeautifulSoup]) -> None:
    dead, ids = [], {}
    for name, soup in soups.items():
        ids[(site / name).resolve()] = {str(node["id"]) for node in soup.select("[id]")}
    for name, soup in soups.items():
        for link in soup.select("a[href], link[href], script[src], img[src]"):
            url = str(link.get("href") or link.get("src"))
            if url.startswith(("http:", "https:", "mailto:", "data:", "javascript:")):
                continue
            path, anchor = urldefrag(url.split("?")[0] if "#" not in url else url)
            target = (site / name).parent / unquote(path.split("?")[0]) if path else site / name
            if not target.exists():
                dead.append(f"{name}: {url}")
            elif anchor and unquote(anchor) not in ids.get(target.resolve(), {unquote(anchor)}):
                dead.append(f"{name}: no such place {url}")
    assert not dead, "\n".join(dead)


def test_the_colab_button_opens_the_notebook_beside_the_page(
    root: Path, soups: dict[str, BeautifulSoup], page: str
) -> None:
    source = root / page.replace(".html", ".ipynb")
    links = [str(a["href"]) for a in soups[page].select("a[href*='colab.research']")]
    if source.exists():
        assert links and all(link.endswith(f"/book/{source.name}") for link in links)
    else:
        assert not links


def test_a_page_is_whole_without_a_network(visit: Visit, address: str, page: str) -> None:
    view = visit(f"{address}/{page}")
    article = view.locator(".bd-article")

    formulas = view.evaluate("document.querySelectorAll('.math').length")
    assert view.locator(".math mjx-container").count() == formulas
    assert article.locator("mjx-merror, [data-mjx-error], mjx-mtext[style*='red']").count() == 0
    assert not view.evaluate("[...document.fonts].filter(font => font.status === 'error').length")
    left = view.evaluate(UNTRANSLATED)
    assert not left, left

    images = article.locator("img").evaluate_all(
        "nodes => nodes.map(n => [n.alt, n.complete && n.naturalWidth, n.src.slice(0, 80)])"
    )
    assert all(alt.strip() and width for alt, width, _ in images), images


def test_a_page_fits_a_phone(visit: Visit, address: str, page: str) -> None:
    view = visit(f"{address}/{page}", width=390)
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    assert not view.evaluate(STICKING_OUT)


def test_a_page_is_legible_light_and_dark(visit: Visit, address: str, page: str) -> None:
    view = visit(f"{address}/{page}")
    for theme in ("light", "dark"):
        for _ in range(3):
            if view.evaluate("document.documentElement.dataset.mode") == theme:
                break
            view.locator("button.theme-switch-button:visible").first.click()
        assert view.evaluate("document.documentElement.dataset.theme") == theme
        view.wait_for_timeout(350)  # colours change gradually
        faint = [found for found in view.evaluate(CONTRAST) if found[0] < 4.5]
        assert not faint, (theme, faint)


def test_interactive_figures_move(
    visit: Visit, address: str, soups: dict[str, BeautifulSoup], page: str
) -> None:
    kinds = [str(n["data-kind"]) for n in soups[page].select(".blr-interactive")]
    for width in (1280, 390) if kinds else ():
        view = visit(f"{address}/{page}", width=width)
        for n, kind in enumerate(kinds):
            figure = view.locator(".blr-interactive").nth(n)
            figure.scroll_into_view_if_needed()
            before = json.loads(figure.get_attribute("data-state"))
            for slider in figure.locator("input[type=range]").all():
                slider.press("End")
                slider.press("ArrowLeft")
            if kind == "drag_regression":
                drag(view, figure)
            after = json.loads(figure.get_attribute("data-state"))
            assert after.keys() == before.keys() and after != before, (page, kind)
            if kind == "drag_regression":
                assert after["slope"] != before["slope"]
                assert after["leverage"] == pytest.approx(before["leverage"])  # y moved, not x
                assert after["cooks_distance"] != before["cooks_distance"]


def drag(view: Any, figure: Any) -> None:
    """Pull the selected point straight up or down."""
    selected = json.loads(figure.get_attribute("data-state"))["selected"]
    point = figure.locator(f"[data-hit='{selected}']")
    point.scroll_into_view_if_needed()
    box, frame = point.bounding_box(), figure.locator("svg").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    step = 30 if y < frame["y"] + 120 else -30
    view.mouse.move(x, y)
    view.mouse.down()
    view.mouse.move(x, y + step, steps=4)
    view.mouse.up()


@pytest.mark.parametrize("from_folder", [False, True])
def test_search_finds_cook(visit: Visit, address: str, site: Path, from_folder: bool) -> None:
    place = site.as_uri() if from_folder else address
    view = visit(f"{place}/search.html?q=Cook")
    view.wait_for_selector("#search-results ul.search li a", timeout=10_000)
    titles = view.locator("#search-results ul.search li a").all_inner_texts()
    assert any("regression" in title.lower() for title in titles), titles


def test_a_page_opened_from_a_folder_is_whole(visit: Visit, site: Path, pages: list[str]) -> None:
    for page in pages[:2]:
        view = visit(f"{site.as_uri()}/{page}")
        formulas = view.evaluate("document.querySelectorAll('.math').length")
        assert view.locator(".math mjx-container").count() == formulas
        icons = view.locator(".article-header-buttons svg").evaluate_all(
            "nodes => nodes.map(node => node.getBoundingClientRect().width)"
        )
        assert icons and max(icons) > 0
