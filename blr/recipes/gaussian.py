"""Gradient descent, SGD, Newton's method, Laplace's approximation and Bayes' rule.

m ← m − ρS₀⁻¹∇ℓ̄(m)                          q = N(m, S₀⁻¹), S₀ known
S ← (1 − ρ)S + ρ∇²ℓ̄(m),  m ← m − ρS⁻¹∇ℓ̄(m)      q = N(m, S⁻¹), the new S
λ ← λ₀ + Σᵢ λ̃ᵢ                              any q that is conjugate to ℓ̄
"""

from __future__ import annotations

from blr.expfam import ExponentialFamily
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.gaussian import Gaussian
from blr.gradients import delta, exact
from blr.recipes._row import Row
from blr.rule import Rule


def gradient_descent(lr: float = 0.1, momentum: float = 0.0) -> Rule:
    """m ← m − ρS₀⁻¹∇ℓ̄(m) + γ(m − m_previous): gradient descent and, on minibatches, SGD."""
    return Rule(delta, lr=lr, momentum=momentum)


def newton() -> Rule:
    """S ← ∇²ℓ̄(m), m ← m − S⁻¹∇ℓ̄(m)."""
    return Rule(delta)


def laplace(lr: float = 0.5) -> Rule:
    """S ← (1 − ρ)S + ρ∇²ℓ̄(m), m ← m − ρS⁻¹∇ℓ̄(m): at rest, Laplace's approximation."""
    return Rule(delta, lr=lr)


def bayes() -> Rule:
    """λ ← −∇_μE_q[ℓ̄ + log h] = λ₀ + Σᵢ λ̃ᵢ: Bayes' rule, in one step from anywhere."""
    return Rule(exact)


GRADIENT_DESCENT = Row(
    name="Gradient descent",
    section="1.3",
    family=FixedGaussian,
    gradient="delta",
    liberties=(),
    schedule="all data, constant ρ",
    build=gradient_descent,
    oracle="torch.optim.SGD on all data, step by step",
    reference="Cauchy (1847)",
    equation="eq-br-gd",
)

SGD = Row(
    name="SGD",
    section="4.1",
    family=FixedGaussian,
    gradient="delta",
    liberties=("momentum in λ",),
    schedule="minibatches, constant ρ",
    build=gradient_descent,
    oracle="torch.optim.SGD with momentum on the same minibatches, step by step",
    reference="Robbins & Monro (1951)",
    equation="eq-op-sgd",
)

NEWTON = Row(
    name="Newton",
    section="1.3",
    family=Gaussian,
    gradient="delta, exact Hessian",
    liberties=(),
    schedule="all data, ρ = 1",
    build=newton,
    oracle="textbook Newton by NumPy, step by step; scikit-learn's minimum",
    reference="Nocedal & Wright (2006), section 3.3",
    equation="eq-br-newton",
)

LAPLACE = Row(
    name="Laplace",
    section="4.4",
    family=Gaussian,
    gradient="delta, exact Hessian",
    liberties=(),
    schedule="all data, constant ρ, to convergence",
    build=laplace,
    oracle="scikit-learn's minimum, the Hessian there by NumPy, and its log evidence",
    reference="Laplace (1774); MacKay (1992)",
    equation="eq-br-laplace",
)

CONJUGATE_BAYES = Row(
    name="Conjugate Bayes",
    section="5.1",
    family=ExponentialFamily,
    gradient="exact",
    liberties=(),
    schedule="all data, one step with ρ = 1",
    build=bayes,
    oracle="closed-form posteriors: beta, gamma and Gaussian",
    reference="Bayes (1763); Raiffa & Schlaifer (1961)",
    equation="eq-br-bayes",
)
