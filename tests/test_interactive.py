"""The interactive figures compute what the library computes, for mouse, touch and keyboard."""

import json
import re

import numpy as np
import pytest
import torch

from blr import data
from blr.families.bernoulli import Bernoulli
from blr.families.exponential import Exponential
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.poisson import Poisson
from blr.interactive import InteractiveFigure, drag_regression, family_explorer, frames

HEAD = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture
def show(chromium, tmp_path):
    """`show(figure)`: a page with the figures, opened from a file; errors on it fail the test."""
    opened, errors = [], []

    def show(*figures, viewport=DESK, **options):
        page_file = tmp_path / "page.html"
        page_file.write_text(HEAD + "\n".join(f.html for f in figures), encoding="utf-8")
        context = chromium.new_context(viewport=viewport, **options)
        opened.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on(
            "request",
            lambda request: errors.append(request.url) if "http" in request.url[:4] else None,
        )
        page.goto(page_file.as_uri())
        return page

    yield show
    for context in opened:
        context.close()
    assert errors == []


def state(page, k=0):
    return json.loads(page.locator(".blr-interactive").nth(k).get_attribute("data-state"))


def fit(x, y, delta=0.0):
    """Intercept and slope by a factorisation of the whole problem, prior as one more row."""
    X = np.column_stack([np.ones_like(x), x])
    prior = [[0.0, np.sqrt(delta)]]
    return np.linalg.lstsq(np.vstack([X, prior]), np.append(y, 0.0), rcond=None)[0]


def assert_equals_refits(shown, x, y, delta=0.0):
    """Every number of the figure against fits with and without the selected point."""
    i = shown["selected"]
    assert (shown["x"], shown["y"]) == (x[i], y[i])
    theta = fit(x, y, delta)
    without = fit(np.delete(x, i), np.delete(y, i), delta)
    X = np.column_stack([np.ones_like(x), x])
    H = X.T @ X + np.diag([0, delta])
    r = y - X @ theta
    change = theta - without
    want = {
        "intercept": theta[0],
        "slope": theta[1],
        "intercept_without": without[0],
        "slope_without": without[1],
        "leverage": X[i] @ np.linalg.solve(H, X[i]),
        "residual": r[i],
        "loo_residual": y[i] - X[i] @ without,
        "cooks_distance": change @ H @ change / (2 * (r @ r) / (len(x) - 2)),
        "slope_change": change[1],
    }
    for key, value in want.items():
        scale = max(abs(value), 1e-3 * np.abs(y).max() if "residual" in key else 0)
        assert shown[key] == pytest.approx(value, abs=1e-10 * scale, rel=1e-10), key


@pytest.fixture
def duncan():
    d = data.load("duncan")
    return d.X[:, 0].copy(), d.y.copy(), d.example_names


def center(page, i):
    """Where point i is on the screen."""
    box = page.locator(f'[data-hit="{i}"]').bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.parametrize("delta", [0.0, 5000.0])
def test_the_first_view_shows_the_refits_of_the_most_influential_point(show, duncan, delta):
    x, y, labels = duncan
    page = show(drag_regression(x, y, labels=labels, prior_precision=delta))
    shown = state(page)
    assert_equals_refits(shown, x, y, delta)
    if delta == 0:
        influence = pytest.importorskip("statsmodels.api").OLS(y, np.column_stack([np.ones(45), x]))
        cook = influence.fit().get_influence().cooks_distance[0]
        assert shown["selected"] == np.argmax(cook)
        assert shown["cooks_distance"] == pytest.approx(cook.max(), rel=1e-10)


@pytest.mark.parametrize("delta", [0.0, 5000.0])
def test_a_dragged_point_shows_the_refits_at_its_new_place(show, duncan, delta):
    x, y, labels = duncan
    page = show(drag_regression(x, y, labels=labels, prior_precision=delta))
    for i, (dx, dy) in [(26, (60, 80)), (5, (-40, 30))]:
        px, py = center(page, i)
        page.mouse.move(px, py)
        page.mouse.down()
        page.mouse.move(px + dx, py + dy, steps=4)
        page.mouse.up()
        shown = state(page)
        assert shown["selected"] == i
        assert (shown["x"] - x[i]) * dx > 0 and (shown["y"] - y[i]) * dy < 0
        x[i], y[i] = shown["x"], shown["y"]
        assert_equals_refits(shown, x, y, delta)
        px, py = center(page, i)
    page.mouse.move(px + 100, py)  # let go: the point stays
    assert state(page)["x"] == x[5]


def test_the_numbers_on_the_page_are_the_numbers_of_the_state(show, duncan):
    page = show(drag_regression(*duncan[:2], labels=duncan[2]))
    rows = dict(
        zip(page.locator("th").all_inner_texts(), page.locator("td").all_inner_texts(), strict=True)
    )
    shown = state(page)
    pairs = {
        "leverage h": "leverage",
        "residual r": "residual",
        "Cook’s distance D": "cooks_distance",
    }
    for name, key in (pairs | {"slope without it": "slope_without"}).items():
        assert float(rows[name].replace("−", "-")) == pytest.approx(shown[key], rel=2e-3)


def swipe_up(page, px, py):
    touch = page.context.new_cdp_session(page)
    for kind, step in [("touchStart", 0), ("touchMove", 20), ("touchMove", 60), ("touchEnd", None)]:
        points = [] if step is None else [{"x": px, "y": py - step}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_a_finger_on_a_point_drags_it_and_elsewhere_scrolls_the_page(show, duncan):
    x, y, labels = duncan
    figure = drag_regression(x, y, labels=labels)
    page = show(figure, family_explorer(), viewport=PHONE, has_touch=True, is_mobile=True)
    px, py = center(page, 15)
    swipe_up(page, px, py)
    shown = state(page)
    assert shown["selected"] == 15
    assert shown["y"] > y[15] + 20
    assert page.evaluate("window.scrollY") == 0
    x[15], y[15] = shown["x"], shown["y"]
    assert_equals_refits(shown, x, y)
    swipe_up(page, px - 60, py + 60)  # no point there
    page.wait_for_function("window.scrollY > 10")
    assert state(page) == shown


def test_the_keyboard_moves_selects_and_puts_back(show, duncan):
    x, y, labels = duncan
    page = show(drag_regression(x, y, labels=labels))
    page.locator("svg[tabindex='0']").focus()
    first = state(page)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowLeft")
    moved = state(page)
    assert moved["y"] > first["y"] and moved["x"] < first["x"]
    i = first["selected"]
    x[i], y[i] = moved["x"], moved["y"]
    assert_equals_refits(moved, x, y)
    page.keyboard.press("Home")
    assert state(page) == first
    page.keyboard.press("PageDown")
    assert state(page)["selected"] == i + 1
    page.locator("select").select_option("minister")
    assert labels[state(page)["selected"]] == "minister"
    page.locator("select").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the button
    assert state(page) == first


def test_a_click_on_a_bar_selects_its_point(show, duncan):
    page = show(drag_regression(*duncan[:2]))
    bars = page.locator("g rect")
    assert bars.count() == 45
    bars.nth(5).click(force=True)
    assert state(page)["selected"] == 5


def test_a_new_width_keeps_what_the_reader_did(show, duncan):
    page = show(drag_regression(*duncan[:2]))
    page.locator("svg[tabindex='0']").focus()
    page.keyboard.press("ArrowUp")
    before = state(page)
    page.set_viewport_size(PHONE)
    page.wait_for_function("document.querySelector('.blr-narrow')")
    assert state(page) == before


def test_a_point_that_alone_determines_the_slope_has_no_line_without_it(show):
    page = show(drag_regression([0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 3.0, 2.0]))
    page.locator("select").select_option("3")
    shown = state(page)
    assert shown["leverage"] == 1
    assert shown["slope_without"] is None
    assert "–" in page.locator("td").all_inner_texts()


MEMBERS = {
    "Bernoulli": lambda lam: Bernoulli(lam),
    "Poisson": lambda lam: Poisson(lam),
    "Exponential": lambda lam: Exponential(lam),
    "Gaussian, variance 2": lambda lam: FixedGaussian(
        lam.reshape(1), torch.tensor([[0.5]]).double()
    ),
}


@pytest.mark.parametrize("name", list(MEMBERS))
def test_the_explorer_shows_the_numbers_of_the_library(show, name):
    page = show(family_explorer())
    page.locator("select").select_option(name)
    slider = page.locator("input[type=range]")
    low, high = float(slider.get_attribute("min")), float(slider.get_attribute("max"))
    for part in (0.0, 0.25, 0.6, 1.0):
        slider.fill(f"{low + part * (high - low):.2f}")
        shown = state(page)
        lam = torch.tensor(shown["natural"], dtype=torch.float64)
        q = MEMBERS[name](lam)
        mu, A = q.expectation(), q.log_partition()
        want = {
            "expectation": mu,
            "log_partition": A,
            "dual": (lam * mu).sum() - A,
            "entropy": q.entropy(),
            "fisher": q.fisher(),
        }
        assert shown["family"] == name
        for key, value in want.items():
            assert shown[key] == pytest.approx(value.item(), rel=1e-10, abs=1e-12), key


@pytest.mark.parametrize("name", list(MEMBERS))
def test_the_drawn_tangents_touch_their_curves(show, name):
    page = show(family_explorer())
    page.locator("select").select_option(name)
    # The dots lie on the curves; a tangent passes through its dot.
    gap = page.evaluate("""() => {
      const dots = [...document.querySelectorAll('circle[r="6"]')];
      return ['#D55E00', '#0072B2'].map((color, k) => {
        const solid = `svg svg path[stroke="${color}"]:not([stroke-dasharray])`;
        const ends = document.querySelector(solid).getAttribute('d').slice(1).split('L');
        const [a, b] = ends.map((point) => point.split(',').map(Number));
        const x = +dots[k].getAttribute('cx'), y = +dots[k].getAttribute('cy');
        return Math.abs(a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) - y);
      });
    }""")
    assert max(gap) < 0.1


def test_the_explorer_starts_at_the_given_member_and_moves_with_the_keyboard(show):
    page = show(family_explorer(-0.5))
    assert state(page)["natural"] == -0.5
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert state(page)["natural"] == pytest.approx(-0.49)


def draw_wave(ax, omega):
    t = np.linspace(0, 6, 200)
    ax.plot(t, np.sin(omega * t))
    ax.set(xlabel="t (s)", ylabel="sin(ωt)")


def test_frames_switches_pictures_words_and_state(show):
    figure = frames(
        draw_wave, label="ω", alt=lambda v: f"a wave of frequency {v}", omega=[1, 2, 4], start=1
    )
    page = show(figure)
    picture = page.locator("img")
    seen = []
    page.get_by_label("ω").focus()
    for key in ["Home", "ArrowRight", "ArrowRight"]:
        page.keyboard.press(key)
        seen.append(
            (picture.get_attribute("alt"), picture.get_attribute("src"), state(page)["value"])
        )
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
    words, sources, values = zip(*seen, strict=True)
    assert words == tuple(f"a wave of frequency {v}" for v in (1, 2, 4))
    assert values == ("1", "2", "4")
    assert len(set(sources)) == 3


def test_eight_frames_stay_below_sixty_kilobytes():
    assert len(frames(draw_wave, omega=np.linspace(0.5, 4, 8)).html) < 60_000


FIGURES = {
    "frames": lambda: frames(draw_wave, omega=[1.0, 2.0]),
    "drag_regression": lambda: drag_regression([1.0, 2, 3, 5], [1.0, 2, 2, 5], labels=list("ab</")),
    "family_explorer": family_explorer,
}


@pytest.mark.parametrize("kind", list(FIGURES))
def test_a_figure_is_self_contained_deterministic_and_small(kind):
    figure = FIGURES[kind]()
    assert isinstance(figure, InteractiveFigure)
    assert FIGURES[kind]().html == figure.html
    assert "@import" not in figure.html and "url(" not in figure.html
    assert set(re.findall(r"https?://[^\"'\s]+", figure.html)) <= {"http://www.w3.org/2000/svg"}
    assert len(figure.html) < 60_000
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert figure.png.startswith(b"\x89PNG")
    assert repr(figure) == bundle["text/plain"] == figure.text
    json.dumps(bundle)


@pytest.mark.parametrize("viewport", [PHONE, DESK, {"width": 320, "height": 600}])
def test_all_figures_fit_the_width_and_are_readable_on_one_page(show, viewport):
    page = show(
        *(make() for make in FIGURES.values()), FIGURES["drag_regression"](), viewport=viewport
    )
    assert page.locator(".blr-interactive[data-ready]").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    small = page.evaluate("""() => [...document.querySelectorAll('svg text')].map((text) => {
      const svg = text.ownerSVGElement.closest('.blr-interactive svg'), box = svg.viewBox.baseVal;
      const scale = box.width ? svg.getBoundingClientRect().width / box.width : 1;
      return parseFloat(getComputedStyle(text).fontSize) * scale; })""")
    assert min(small) > 11


@pytest.mark.parametrize("kind", list(FIGURES))
def test_without_scripts_a_picture_with_words_remains(show, kind):
    page = show(FIGURES[kind](), java_script_enabled=False)
    picture = page.locator("img")
    assert picture.count() == 1
    assert picture.bounding_box()["width"] > 200
    assert len(picture.get_attribute("alt")) > 6


@pytest.mark.parametrize("kind", list(FIGURES))
def test_every_control_has_a_name_and_can_be_reached_with_tab(show, kind):
    page = show(FIGURES[kind]())
    controls = page.locator("input, select, button, svg[tabindex]")
    reached = set()
    for _ in range(controls.count() + 1):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName.toLowerCase()"))
    assert reached >= set(controls.evaluate_all("nodes => nodes.map(n => n.tagName.toLowerCase())"))
    named = controls.evaluate_all("""nodes => nodes.map((node) =>
      node.getAttribute('aria-label') || node.labels?.[0]?.textContent || node.textContent)""")
    assert all(named)


def test_a_dark_page_shows_dark_text_on_a_white_card(show):
    page = show(FIGURES["drag_regression"](), color_scheme="dark")
    page.evaluate("document.body.style.cssText = 'background: #111; color: #eee'")
    card, text = page.evaluate("""() => {
      const card = document.querySelector('.blr-interactive');
      const text = card.querySelector('th');
      return [getComputedStyle(card).backgroundColor, getComputedStyle(text).color]; }""")
    assert (card, text) == ("rgb(255, 255, 255)", "rgb(34, 34, 34)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drag_regression([1, 2, 3], [1, 2, 3]), r"at least 4"),
        (lambda: drag_regression([1, 2, 3, 4], [1, 2, 3, np.nan]), "NaN"),
        (lambda: drag_regression([2, 2, 2, 2], [1, 2, 3, 4]), "all x are 2.0"),
        (
            lambda: drag_regression([1, 2, 3, 4], [1, 2, 3, 5], prior_precision=-1),
            "prior_precision is -1",
        ),
        (lambda: drag_regression([1, 2, 3, 4], [1, 2, 3, 5], labels=["a"]), "1 names for 4 points"),
        (lambda: family_explorer(9.0), "natural is 9.0"),
        (lambda: frames(draw_wave), "pass one"),
        (lambda: frames(draw_wave, omega=[1.0]), "two values or more"),
    ],
)
def test_wrong_input_is_answered_with_its_name_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
