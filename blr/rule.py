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
    # The entropy first: at ρ = T = 1 it cancels λ without rounding.
    kept = _tree.add(q.natural, _tree.scale(rho * T, q.entropy_gradient()))
    return _at(q, _tree.sub(kept, _tree.scale(rho, gradient)), lr)


@dataclass(frozen=True)
class Rule:
    """The rule as a recipe: a gradient, a schedule of learning rates, and a memory.

    Args:
        gradient: An approximation of ∇_μ E_q[ℓ̄]: a function of (loss, q) from `blr.gradients`.
        lr: Learning rate ρ, or a function of the step t = 1, 2, … that gives it.
        temperature: Weight T of the entropy.
        momentum: γ of the heavy ball in λ, λ⁺ = (the rule's) + γ(λ − λ_previous); 0 is the rule.
    """

    gradient: Callable[[Any, Any], Tree]
    lr: float | Callable[[int], float] = 1.0
    temperature: float = 1.0
    momentum: float = 0.0

    def posteriors(self, losses: Iterable[Any], q: Q) -> Iterator[Q]:
        """q after each step, one step for each of `losses`, starting from q."""
        previous = q
        for t, loss in enumerate(losses, 1):
            rho = self.lr(t) if callable(self.lr) else self.lr
            after = learn(q, self.gradient(loss, q), rho, self.temperature)
            if self.momentum:
                ball = _tree.scale(self.momentum, _tree.sub(q.natural, previous.natural))
                after = _at(q, _tree.add(after.natural, ball), rho)
            q, previous = after, q
            yield q


def _at(q: Q, natural: Tree, lr: float) -> Q:
    try:
        return q.at(natural)
    except ValueError as error:
        raise ValueError(
            f"the learning rate {lr:g} leads out of the domain of {type(q).__name__}: {error}. "
            "Lower lr, or use a curvature that cannot be negative, such as gauss_newton"
        ) from error
