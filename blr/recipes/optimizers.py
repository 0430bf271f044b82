"""Optimizers of deep learning: the rule for diagonal Gaussians, with their liberties.

s ← (1 − ρ)s + ρĥ,  m ← m − αĝ/s        ĥ: squared gradients, in several ways
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor

from blr import _validate
from blr.diagonal import DiagonalRule, Rate
from blr.families.gaussian import DiagonalGaussian
from blr.gradients import (
    at_mean,
    at_samples,
    reparametrized,
    squared_batch_gradient,
    squared_gradients,
)
from blr.likelihoods import TotalLoss
from blr.recipes._row import Row


def rmsprop(lr: Rate = 0.01, alpha: float = 0.99, eps: float = 1e-8) -> DiagonalRule:
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
    lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
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


def ogn(lr: Rate = 0.1, beta: Rate = 0.01) -> DiagonalRule:
    """s ← (1 − β)s + β(Σᵢ gᵢ² + δ), m ← m − α ∇ℓ̄(m)/s: online Gauss–Newton."""
    return DiagonalRule(partial(at_mean, curvature=squared_gradients), lr=beta, lr_mean=lr)


def vogn(
    lr: Rate = 0.1,
    beta: Rate = 0.01,
    momentum: float = 0.0,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    damping: float = 0.0,
) -> DiagonalRule:
    """OGN at samples θ ~ q: variational online Gauss–Newton, as it was published.

    Args:
        lr: Rate α of the mean.
        beta: Rate β of the precision.
        momentum: Decay of the average of ĝ. The published buffer adds gradients where this averages
            them, so its α is (1 − momentum) times this one.
        num_samples: S.
        generator: Source of randomness.
        temperature: T; the loss then needs the prior precision Tδ. The published algorithm keeps
            the prior outside of its average: at rest its precision is N ĥ/T + Tδ, where the rule
            and the tempered posterior have N ĥ/T + δ.
        damping: γ, for the sum of the losses: N times the published one.
    """
    return DiagonalRule(
        partial(
            at_samples, num_samples=num_samples, generator=generator, curvature=squared_gradients
        ),
        lr=beta,
        lr_mean=lr,
        momentum=momentum,
        temperature=temperature,
        eps=damping,
        prior_in_average=False,
    )


def von(
    lr: Rate = 0.1,
    beta: Rate = 0.01,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> DiagonalRule:
    """s ← (1 − β)s + β diag ∇²ℓ̄(θ), m ← m − α∇ℓ̄(θ)/s: variational online Newton."""
    derivatives = partial(at_samples, num_samples=num_samples, generator=generator)
    return DiagonalRule(derivatives, lr=beta, lr_mean=lr)


def vprop(
    lr: Rate = 0.01, beta: float = 0.01, generator: torch.Generator | None = None
) -> DiagonalRule:
    """RMSprop at θ ~ q: s ← (1 − β)s + βĝ², m ← m − α(ĝ + δm)/(√s + δ), precision s/N + δ.

    ĝ is the gradient of the data's part of a `TotalLoss`. Where it is zero, δ must be positive.
    """
    return DiagonalRule(
        partial(at_samples, generator=generator, curvature=squared_batch_gradient),
        lr=beta,
        lr_mean=lr,
        initial=0.0,
        root=True,
        prior_in_average=False,
        precision=variational_precision,
    )


def vadam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    generator: torch.Generator | None = None,
) -> DiagonalRule:
    """Adam at θ ~ q: Vprop with momentum of ĝ + δm, both averages corrected where m is changed."""
    return dataclasses.replace(vprop(lr, 1 - betas[1], generator), momentum=betas[0], debias=True)


def ivon(
    lr: Rate = 0.1,
    betas: tuple[float, float] = (0.9, 0.99999),
    clip_radius: float = math.inf,
    debias: bool = True,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> DiagonalRule:
    """The improved variational online Newton method, from gradients alone.

    s ← (1 − ρ)s + ρĥ + ½ρ²(s − ĥ)²/s,  m ← m − α(ḡ + δm)/s,  ĥ = s(θ − m)ĝ + δ,  ρ = 1 − β₂

    In the letters of its paper s is λ(h + δ/λ), with λ = N or, to temper the posterior, the
    `num_data` of the `TotalLoss`; the precision λ(h₀ + δ/λ) of the posterior to start from sets h₀.

    Args:
        lr: Rate α of the mean; the paper's times h₀ + δ/λ, if that is rescaled as in its code.
        betas: Decays of the averages ḡ and s. The prior is in s, but not in ḡ.
        clip_radius: ξ of the step before its rate.
        debias: Correct ḡ for its start at zero.
        num_samples: S.
        generator: Source of randomness.
    """
    return DiagonalRule(
        partial(reparametrized, num_samples=num_samples, generator=generator),
        lr=1 - betas[1],
        lr_mean=lr,
        momentum=betas[0],
        debias=debias,
        retraction=True,
        clip_radius=clip_radius,
        prior_in_momentum=False,
    )


def variational_precision(s: Tensor, loss: TotalLoss) -> Tensor:
    """s/N + δ: N times the average square of the mean gradient, and the prior.

    Raises:
        TypeError: If the loss does not know its N and δ.
    """
    _validate.instance("loss", loss, TotalLoss, "pass one, which knows its examples, N and δ")
    return s / (loss.num_data or len(loss.inputs)) + loss.prior_precision


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
    liberties=("own rate", "momentum", "prior outside the average", "damping"),
    schedule="minibatches, constant ρ",
    build=vogn,
    oracle="the published recursion in means per example, with T and γ, with the same noise",
    reference="Khan et al. (2018); Osawa et al. (2019)",
    equation="eq-op-vogn",
)

VON = Row(
    name="VON",
    section="–",
    family=DiagonalGaussian,
    gradient="samples, diagonal of the Hessian",
    liberties=("own rate",),
    schedule="minibatches, constant ρ",
    build=von,
    oracle="the published recursion in means per example, by NumPy, with the same noise",
    reference="Khan et al. (2018)",
    equation="eq-op-von",
)

VPROP = Row(
    name="Vprop",
    section="–",
    family=DiagonalGaussian,
    gradient="samples, squared minibatch gradient",
    liberties=("own rate", "√-scale", "starts at zero", "prior outside the average"),
    schedule="minibatches, constant ρ",
    build=vprop,
    oracle="the published recursion in means per example, by NumPy, with the same noise",
    reference="Khan et al. (2018)",
    equation="eq-op-vprop",
)

VADAM = Row(
    name="Vadam",
    section="–",
    family=DiagonalGaussian,
    gradient="samples, squared minibatch gradient",
    liberties=(*VPROP.liberties, "momentum", "bias correction"),
    schedule="minibatches, constant ρ",
    build=vadam,
    oracle="the published recursion by NumPy; torch.optim.Adam where there is no noise",
    reference="Khan et al. (2018)",
    equation="eq-op-vadam",
)

IVON = Row(
    name="IVON",
    section="–",
    family=DiagonalGaussian,
    gradient="samples, Stein's lemma",
    liberties=(
        "own rate",
        "momentum",
        "bias correction",
        "prior outside the momentum",
        "retraction",
        "clipping",
    ),
    schedule="minibatches, any schedule of α",
    build=ivon,
    oracle="the public package ivon-opt with the same noise, step by step",
    reference="Shen et al. (2024)",
    equation="eq-op-ivon",
)
