"""Figures draw the numbers they are given, and a notebook's set-up does what it says."""

import io
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from blr import metrics, plotting
from blr.notebook import results


@pytest.fixture
def ax():
    with matplotlib.rc_context():
        plotting.use_style()
        yield Figure().subplots()


def luminance(color):
    """Relative luminance of the web content accessibility guidelines."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_style_uses_the_palette_of_the_module(ax):
    cycle = [to_rgb(c) for c in matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]]
    module = [plotting.BLUE, plotting.VERMILLION, plotting.GREEN, plotting.PURPLE]
    module += [plotting.ORANGE, plotting.SKY, plotting.GREY]
    assert cycle == [to_rgb(c) for c in module]


def test_every_colour_is_visible_on_white_and_the_first_three_are_readable(ax):
    contrast = [
        1.05 / (luminance(c) + 0.05)
        for c in matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    ]
    assert min(contrast) > 2
    assert min(contrast[:3]) > 3


def test_figures_are_the_same_bytes_each_time():
    def draw(kind):
        with matplotlib.rc_context():
            plotting.use_style()
            figure = Figure()
            plotting.stems(figure.subplots(), [1.0, -2.0, 0.5])
            figure.savefig(
                out := io.BytesIO(), format=kind, metadata={"Date": None} if kind == "svg" else {}
            )
            return out.getvalue()

    assert draw("svg") == draw("svg")
    assert draw("png") == draw("png")


def test_scatter_identity_writes_the_largest_deviation_and_shows_every_point(ax):
    exact, estimated = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0])
    assert plotting.scatter_identity(ax, exact, estimated) is ax
    assert texts(ax) == ["largest deviation\n1"]
    np.testing.assert_array_equal(
        ax.collections[0].get_offsets(), np.column_stack([exact, estimated])
    )
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] < 1 and ax.get_xlim()[1] > 4


def test_scatter_identity_of_equal_constants_has_a_width(ax):
    plotting.scatter_identity(ax, [2.0, 2.0], [2.0, 2.0])
    assert ax.get_xlim()[0] < 2 < ax.get_xlim()[1]


def test_bubble_areas_grow_linearly_with_cooks_distance_and_the_largest_is_named(ax):
    v, r, cook = (
        np.array([0.1, 0.5, 0.2, 0.3]),
        np.array([1.0, 2.0, -1.0, 0.0]),
        np.array([1, 4, 2, 0]),
    )
    assert plotting.influence_bubbles(ax, v, r, cook, list("abcd"), num_labels=2) is ax
    area = ax.collections[0].get_sizes()
    np.testing.assert_allclose((area - area[3]) / (area[0] - area[3]), cook)
    assert texts(ax) == ["b", "c"]


def test_stems_end_at_the_values_and_name_the_largest_by_number(ax):
    values = np.array([0.5, -3.0, 1.0])
    assert plotting.stems(ax, values, num_labels=1) is ax
    ends = [segment[1, 1] for segment in ax.collections[0].get_segments()]
    assert ends == values.tolist()
    assert texts(ax) == ["1"]


@pytest.mark.parametrize("covariance", [[[4.0, 1.2], [1.2, 1.0]], [[1.0, -0.9], [-0.9, 3.0]]])
def test_points_of_an_ellipse_have_its_mahalanobis_radius(ax, covariance):
    mean = np.array([1.0, -2.0])
    assert plotting.ellipse(ax, mean, covariance, num_std=(0.5, 2.0), label="q") is ax
    for radius, patch in zip((0.5, 2.0), ax.patches, strict=True):
        assert isinstance(patch, Ellipse)
        angle = np.linspace(0, 2 * np.pi, 7)
        unit = np.column_stack([np.cos(angle), np.sin(angle)])
        z = patch.get_patch_transform().transform(unit) - mean
        distance = np.einsum("ni,ij,nj->n", z, np.linalg.inv(covariance), z)
        np.testing.assert_allclose(distance, radius**2, rtol=1e-10)
    assert ax.get_legend_handles_labels()[1] == ["q"]


def test_a_reliability_diagram_draws_the_bins_that_hold_examples(ax):
    p = torch.tensor([[0.1, 0.9], [0.35, 0.65], [0.37, 0.63], [1.0, 0.0]], dtype=torch.float64)
    bins = metrics.reliability(p, [1, 0, 1, 1], num_bins=5)
    assert plotting.reliability_diagram(ax, bins, color="#D55E00", label="IVON") is ax
    diagonal, line = ax.lines
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    np.testing.assert_allclose(line.get_xydata(), [[0.64, 0.5], [0.95, 0.5]], rtol=1e-12)
    (points,) = ax.collections
    np.testing.assert_array_equal(points.get_offsets(), line.get_xydata())
    area = points.get_sizes()
    assert area[0] == area[1]
    assert ax.get_legend_handles_labels()[1] == ["IVON: ECE 0.295"]
    assert to_rgb(line.get_color()) == to_rgb("#D55E00")


def test_areas_of_a_reliability_diagram_grow_linearly_with_the_examples(ax):
    p = torch.tensor([[0.9, 0.1]] * 6 + [[0.6, 0.4]] * 2 + [[0.75, 0.25]])
    bins = metrics.reliability(p, [0] * 9, num_bins=10)
    area = plotting.reliability_diagram(ax, bins).collections[0].get_sizes()
    assert area[2] - area[1] == pytest.approx(5 * (area[0] - area[1]))
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert ax.get_legend_handles_labels()[1] == ["ECE 0.183"]


def test_wrong_shapes_are_named(ax):
    with pytest.raises(ValueError, match=r"exact \(3,\), estimated \(2,\)"):
        plotting.scatter_identity(ax, [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="1 names for 2 points"):
        plotting.annotate_points(ax, [1, 2], [1, 2], ["a"], [0])
    with pytest.raises(ValueError, match="marginal of two coordinates"):
        plotting.ellipse(ax, [1, 2, 3], np.eye(3))
    with pytest.raises(ValueError, match="not positive definite"):
        plotting.ellipse(ax, [1, 2], [[1, 2], [2, 1]])


def test_setup_makes_a_notebook_reproducible():
    code = """
import matplotlib, numpy as np, torch, blr.notebook
state = torch.get_rng_state()
assert blr.notebook.setup() is None
assert torch.get_num_threads() == 1
assert torch.are_deterministic_algorithms_enabled()
assert torch.tensor([1.0]).dtype == torch.float64
assert matplotlib.rcParams["svg.hashsalt"] == "blr"
assert torch.equal(state, torch.get_rng_state())
print(torch.tensor([1e-5, 2.0]), np.array([1e-5, 2.0]))
blr.notebook.setup(dtype=torch.float32)
assert torch.tensor([1.0]).dtype == torch.float32
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "tensor([0.0000, 2.0000]) [0. 2.]\n"


def test_results_are_those_beside_the_chapter_and_a_missing_one_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.json").write_text('{"accuracy": 0.5}')
    assert results("mine") == {"accuracy": 0.5}
    with pytest.raises(FileNotFoundError, match=r"'other': looked for results.other\.json"):
        results("other")


def test_plotting_opens_no_window_and_needs_no_pyplot_figure(ax):
    before = plt.get_fignums()
    plotting.stems(ax, [1.0, 2.0])
    assert plt.get_fignums() == before
