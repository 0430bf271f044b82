"""The straight-through estimator and BayesBiNN: the rule for networks with weights ±1.

    λ ← (1 − ρT)λ − ρ∇ℓ̄(sign λ)                                   STE on latent weights λ
    λ ← (1 − ρ)λ + ρ(λ₀ − (1/S) Σₛ sₛ∘∇ℓ̄(θₛ))                      BayesBiNN

θₛ = tanh((λ + δₛ)/τ) with logistic noise δₛ, sₛ = (1 − θₛ²)/(τ(1 − tanh²λ)), and λ₀ of the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from blr.families.bernoulli import SignBernoulli
from blr.gradients import relaxed, straight_through, with_prior
from blr.recipes._row import Row
from blr.rule import Rule


def ste(
    lr: float | Callable[[int], float] = 0.01, temperature: float = 1.0, momentum: float = 0.0
) -> Rule:
    """λ ← (1 − ρT)λ − ρ∇ℓ̄(sign λ): SGD on latent weights with weight decay T.

    Args:
        lr: Learning rate ρ, or a function of the step.
        temperature: T; 0 is the straight-through estimator as it is mostly used.
        momentum: γ of the heavy ball.
    """
    return Rule(straight_through, lr=lr, temperature=temperature, momentum=momentum)


def bayesbinn(
    lr: float | Callable[[int], float] = 0.01,
    relaxation: float = 1.0,
    num_samples: int = 1,
    beta: float = 0.0,
    temperature: float = 1.0,
    prior: SignBernoulli | None = None,
    generator: torch.Generator | None = None,
) -> Rule:
    """λ ← λ − ρ m/(1 − βᵗ), m ← βm + (1 − β)(mean sₛ∘∇ℓ̄(θₛ) + Tλ − λ₀).

    Args:
        lr: Learning rate ρ, or a function of the step.
        relaxation: Temperature τ of the relaxed signs.
        num_samples: S.
        beta: Decay β of the average of natural gradients.
        temperature: Weight T of the entropy; the paper's is 1.
        prior: p₀ with natural parameters λ₀, such as the posterior of an earlier task; all signs
            equally probable, λ₀ = 0, if missing.
        generator: Source of randomness.
    """
    gradient = partial(relaxed, relaxation=relaxation, num_samples=num_samples, generator=generator)
    if prior is not None:
        gradient = with_prior(gradient, prior)
    return Rule(gradient, lr=lr, temperature=temperature, average=beta)


STE = Row(
    name="STE",
    section="4.5",
    family=SignBernoulli,
    gradient="delta at sign λ",
    liberties=("gradient at the mode", "T = 0 as mostly used"),
    schedule="minibatches, constant ρ",
    build=ste,
    oracle="torch.optim.SGD on latent weights under a straight-through sign, step by step",
    reference="Hinton (2012); Bengio, Léonard & Courville (2013)",
    equation="eq-bn-ste",
)

BAYESBINN = Row(
    name="BayesBiNN",
    section="4.5",
    family=SignBernoulli,
    gradient="samples of relaxed signs, exact scale",
    liberties=("average of natural gradients",),
    schedule="minibatches, constant ρ",
    build=bayesbinn,
    oracle="the paper's recursion by NumPy, with the same noise, step by step",
    reference="Meng, Bachmann & Khan (2020)",
    equation="eq-bn-bayesbinn",
)
