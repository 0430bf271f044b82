"""Move λ through a one-parameter family and see its dual picture."""

import numpy as np
from matplotlib.figure import Figure

from blr import plotting
from blr.interactive._figure import InteractiveFigure, assemble, picture


def family_explorer(natural: float = 1.0) -> InteractiveFigure:
    """Density, A(λ) with its tangent, and A*(μ) with its tangent, for a family and λ of choice.

    The reader chooses among Bernoulli, Poisson, exponential and Gaussian of variance 2, and moves
    λ. The tangent of A at λ has slope μ and meets λ = 0 at −A*(μ); the tangent of A* at μ has slope
    λ; the curvature of A is the Fisher information.

    Args:
        natural: λ of the Bernoulli that is shown first, in [−4, 4].

    Raises:
        ValueError: If `natural` is outside of that interval.
    """
    if not -4 <= natural <= 4:
        raise ValueError(f"natural is {natural}; the slider goes from -4 to 4")
    mu = 1 / (1 + np.exp(-natural))
    A = np.logaddexp(0, natural)
    dual = natural * mu - A
    state = {
        "family": "Bernoulli",
        "natural": natural,
        "expectation": mu,
        "log_partition": A,
        "dual": dual,
        "entropy": -dual,
        "fisher": mu * (1 - mu),
    }
    alt = (
        f"Bernoulli family at natural parameter {natural:g}: mean {mu:.3f}, log-partition {A:.3f}, "
        f"dual {dual:.3f}, Fisher information {mu * (1 - mu):.3f}. Panels: the probabilities, "
        "the log-partition function with its tangent, and its dual with its tangent."
    )
    instruction = (
        "Choose a family and move λ. The slope of A at λ is μ, and the slope of A* at μ is λ: each "
        "curve tells the place on the other. The tangent of A meets λ = 0 (open circle) at −A*(μ)."
    )
    image = picture(lambda figure: _still(figure, natural, mu, A, dual), size=(8.4, 3.0))
    rounded = {k: v if isinstance(v, str) else float(f"{v:.6g}") for k, v in state.items()}
    data = {"family": "Bernoulli", "natural": natural}
    return assemble(("axes", "family_explorer"), instruction, data, rounded, image, alt)


def _still(figure: Figure, lam: float, mu: float, A: float, dual: float) -> None:
    left, middle, right = figure.subplots(1, 3)
    lams, mus = np.linspace(-4.2, 4.2, 200), np.linspace(1e-6, 1 - 1e-6, 200)
    left.vlines([0, 1], 0, [1 - mu, mu], color=plotting.GREY, linewidth=4)
    left.axvline(mu, color=plotting.VERMILLION, linestyle=":")
    left.set(title="q(θ)", xlabel="θ", xlim=(-0.5, 1.5), ylim=(0, 1.05), xticks=[0, 1])
    middle.plot(lams, np.logaddexp(0, lams), color=plotting.GREY)
    middle.plot(lams, A + mu * (lams - lam), color=plotting.VERMILLION)
    middle.plot(lam, A, "o", color=plotting.GREY)
    middle.axvline(lam, color=plotting.BLUE, linestyle=":")
    middle.set(title="A(λ), slope μ", xlabel="λ", xlim=(-4.2, 4.2), ylim=(-0.8, 4.4))
    right.plot(mus, mus * np.log(mus) + (1 - mus) * np.log1p(-mus), color=plotting.GREY)
    right.plot(mus, dual + lam * (mus - mu), color=plotting.BLUE)
    right.plot(mu, dual, "o", color=plotting.GREY)
    right.axvline(mu, color=plotting.VERMILLION, linestyle=":")
    right.set(title="A*(μ), slope λ", xlabel="μ", xlim=(0, 1), ylim=(-0.8, 0.12))
