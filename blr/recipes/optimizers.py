"""Optimizers of deep learning: the rule for diagonal Gaussians, with their liberties.

s ← (1 − ρ)s + ρĥ,  m ← m − αĝ/s        ĥ: squared gradients, in several ways
"""

from __future__ import annotations

from functools import partial

import torch

from blr.diagonal import DiagonalRule
from blr.families.gaussian import DiagonalGaussian
from blr.gradients import at_mean, at_samples, squared_batch_gradient, squared_gradients
from blr.recipes._row import Row


def rmsprop(lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8) -> DiagonalRule:
    """s ← αs + (1 − α)ĝ², m ← m − lr ĝ/(√s + ε)."""
    return DiagonalRule(
        partial(at_mean, curvature=squared_batch_gradient),
        lr=1 - alpha,
        lr_mean=lr,
        initial=0.0,
        root=True,
        eps=eps,
    )


def adam(
    lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> DiagonalRule:
    """RMSprop with momentum, and with both averages corrected for their start at zero."""
    return DiagonalRule(
        partial(at_mean, curvature=squared_batch_gradient),
        lr=1 - betas[1],
        lr_mean=lr,
        momentum=betas[0],
        initial=0.0,
        debias=True,
        root=True,
        eps=eps,
    )


def ogn(lr: float = 0.1, beta: float = 0.01) -> DiagonalRule:
    """s ← (1 − β)s + β(Σᵢ gᵢ² + δ), m ← m − α ∇ℓ̄(m)/s: online Gauss–Newton."""
    return DiagonalRule(partial(at_mean, curvature=squared_gradients), lr=beta, lr_mean=lr)


def vogn(
    lr: float = 0.1,
    beta: float = 0.01,
    momentum: float = 0.0,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> DiagonalRule:
    """OGN at samples θ ~ q: variational online Gauss–Newton."""
    derivatives = partial(
        at_samples, num_samples=num_samples, generator=generator, curvature=squared_gradients
    )
    return DiagonalRule(derivatives, lr=beta, lr_mean=lr, momentum=momentum)


RMSPROP = Row(
    name="RMSprop",
    section="4.2",
    family=DiagonalGaussian,
    gradient="delta, squared minibatch gradient",
    liberties=("own rate", "√-scale", "starts at zero", "ε"),
    schedule="minibatches, constant ρ",
    build=rmsprop,
    oracle="torch.optim.RMSprop on the same minibatches, step by step",
    reference="Tieleman & Hinton (2012)",
    equation="eq-op-rmsprop",
)

ADAM = Row(
    name="Adam",
    section="4.2",
    family=DiagonalGaussian,
    gradient="delta, squared minibatch gradient",
    liberties=("own rate", "√-scale", "starts at zero", "ε", "momentum", "bias correction"),
    schedule="minibatches, constant ρ",
    build=adam,
    oracle="torch.optim.Adam on the same minibatches, step by step",
    reference="Kingma & Ba (2015)",
    equation="eq-op-adam",
)

OGN = Row(
    name="OGN",
    section="4.4",
    family=DiagonalGaussian,
    gradient="delta, squared gradients of examples",
    liberties=("own rate",),
    schedule="minibatches, constant ρ",
    build=ogn,
    oracle="the textbook recursion in means per example, by NumPy, step by step",
    reference="Khan et al. (2018); Osawa et al. (2019)",
    equation="eq-op-ogn",
)

VOGN = Row(
    name="VOGN",
    section="4.4",
    family=DiagonalGaussian,
    gradient="samples, squared gradients of examples",
    liberties=("own rate", "momentum"),
    schedule="minibatches, constant ρ",
    build=vogn,
    oracle="the textbook recursion in means per example, by NumPy, with the same noise",
    reference="Khan et al. (2018); Osawa et al. (2019)",
    equation="eq-op-vogn",
)
