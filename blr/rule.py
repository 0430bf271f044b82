"""The Bayesian learning rule: one update, of which learning algorithms are special cases.

    λ ← λ − ρ ∇_μ ( E_q[ℓ̄(θ)] − T H(q) )          ∇_μH = −λ − ∇_μE_q[log h]

ℓ̄ is the loss summed over the data with its regulariser, H the entropy of q, ρ the learning rate
and T a temperature. The gradient in μ is the natural gradient, F⁻¹∇_λ, without any F. Where h is
constant and ρ = T = 1, learning is λ ← −∇_μE_q[ℓ̄]; for a conjugate ℓ̄ that is Bayes' rule.

References: Khan & Rue (2023), The Bayesian learning rule, equations 1 to 5 and appendix F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from blr import _tree
from blr._tree import Tree
from blr.expfam import ExponentialFamily

Q = TypeVar("Q", bound=ExponentialFamily)


def learn(q: Q, gradient: Tree, lr: float = 1.0, temperature: float = 1.0) -> Q:
    """One step of the rule.

    Args:
        q: Current posterior q_λ.
        gradient: ∇_μ E_q[ℓ̄] at q, with the structure of `q.natural`.
        lr: Learning rate ρ. With ρ = T = 1 and a conjugate ℓ̄ this is Bayes' rule.
        temperature: Weight T of the entropy; 0 gives up the posterior's width.

    Returns:
        The updated posterior, of the same family.

    Raises:
        ValueError: If the step leaves the domain of the family, naming the block that does.
    """
    rho, T = lr, temperature
    kept = _kept(q, rho * T)  # λ + ρT ∇_μH
    return _at(q, _tree.add_to(kept, gradient, -rho), rho)


def _kept(q: Any, rate: float) -> Tree:
    """λ + c∇_μH, in memory of its own; at c = 1 nothing is left of a constant h's λ."""
    if type(q).entropy_gradient is ExponentialFamily.entropy_gradient:
        return _tree.scale(1 - rate, q.natural)
    return _tree.add(q.natural, q.entropy_gradient(), rate)


@dataclass(frozen=True)
class Rule:
    """The rule as a recipe: a gradient, a schedule of learning rates, and a memory.

    Args:
        gradient: An approximation of ∇_μ E_q[ℓ̄]: a function of (loss, q) from `blr.gradients`.
        lr: Learning rate ρ, or a function of the step t = 1, 2, … that gives it.
        temperature: Weight T of the entropy.
        momentum: γ of the heavy ball in λ, λ⁺ = (the rule's) + γ(λ − λ_previous); 0 is the rule.
        average: Decay β of an average of ∇_μ(E_q[ℓ̄] − T H(q)) that starts at zero and is divided by
            1 − βᵗ, the weight that it has gathered; 0 is the rule.
        step: A step from (q, gradient, ρ, T): `learn`, or `blr.improve` to stay in the domain.
    """

    gradient: Callable[[Any, Any], Tree]
    lr: float | Callable[[int], float] = 1.0
    temperature: float = 1.0
    momentum: float = 0.0
    average: float = 0.0
    step: Callable[[Any, Tree, float, float], Any] = learn

    def posteriors(self, losses: Iterable[Any], q: Q) -> Iterator[Q]:
        """q after each step, one step for each of `losses`, starting from q."""
        previous, mean = q, _tree.scale(0.0, q.natural) if self.average else ()
        for t, loss in enumerate(losses, 1):
            rho = self.lr(t) if callable(self.lr) else self.lr
            gradient, T = self.gradient(loss, q), self.temperature
            if self.average:
                # The entropy is part of what is averaged, so the step must not add it again.
                whole = _tree.sub(gradient, _tree.scale(T, q.entropy_gradient()))
                kept = _tree.scale(self.average, mean)
                mean = _tree.add(kept, _tree.scale(1 - self.average, whole))
                gradient, T = _tree.scale(1 / (1 - self.average**t), mean), 0.0
            after = self.step(q, gradient, rho, T)
            if self.momentum:
                move = _tree.sub(q.natural, previous.natural)
                after = _at(q, _tree.add(after.natural, move, self.momentum), rho)
                previous = q
                del move
            q = after
            # What nobody needs gives its memory to the next step, since new memory is slow to get.
            del gradient, after
            yield q


def _at(q: Q, natural: Tree, lr: float) -> Q:
    try:
        return q.at(natural)
    except ValueError as error:
        raise ValueError(
            f"the learning rate {lr:g} leads out of the domain of {type(q).__name__}: {error}. "
            "Lower lr, use a curvature that cannot be negative such as gauss_newton, or for "
            "Gaussians and gammas the improved rule, Rule(..., step=blr.improve)"
        ) from error
