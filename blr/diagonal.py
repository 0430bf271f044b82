"""The rule for diagonal Gaussians in mean and precision, with the liberties of optimizers.

    s ← (1 − ρT)s + ρĥ          m ← m − ρĝ/s          ĝ ≈ E_q[∇ℓ̄],  ĥ ≈ diag E_q[∇²ℓ̄]

with the new s: that is the rule for q = N(m, 1/s). Optimizers depart from it in a few ways, each an
argument here whose default is the rule itself:

    ḡ ← β₁ḡ + (1 − β₁)ĝ                          momentum, of an average that starts at zero
    s ← (1 − ρT)s + ρĥ + ½ρ²(s − ĥ)²/(s + c)     a retraction, which keeps s + c positive
    m ← m − α clip((ḡ + δm)/(√s + c))            another rate, a root, a clip; c is ε, or δ + ε

Averages that start at zero may be corrected for it, and the prior, with its δm and δ, may be kept
out of either average and be added after it.

References: Khan & Rue (2023), sections 4.2 and 4.4; Kingma & Ba (2015), Adam; Khan et al. (2018),
Vadam; Osawa et al. (2019), VOGN; Lin, Schmidt & Khan (2020), Handling the positive-definite
constraint in the Bayesian learning rule; Shen et al. (2024), IVON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blr import _validate
from blr.families.gaussian import DiagonalGaussian
from blr.likelihoods import TotalLoss

Rate: TypeAlias = float | Callable[[int], float]
"""A learning rate, or a function of the step t = 1, 2, … that gives it."""


@dataclass(frozen=True)
class DiagonalRule:
    """The rule in (m, s) as a recipe. Without liberties it equals `Rule` on a DiagonalGaussian.

    Args:
        derivatives: (ĝ, ĥ) from (loss, q), such as `blr.gradients.at_mean`.
        lr: Rate ρ of the precision, a number or a function of the step t = 1, 2, …; 1 − β₂ in the
            optimizers.
        temperature: Weight T of the entropy.
        lr_mean: Rate α of the mean, a number or a function of the step; ρ if missing.
        momentum: Decay β₁ of an average of ĝ that starts at zero; 0 takes ĝ as it is.
        initial: The average of ĥ at the start, such as 0; what q's precision says if missing.
        debias: Divide averages that started at zero by the weight that they have gathered.
        root: Divide by √s + c in place of s + c. The posterior's precision is then (√s + c)².
        eps: ε, a constant that keeps the divisor from zero; damping.
        retraction: Add ½ρ²(s − ĥ)²/(s + c) to s: s + c is then at least half of what it was. T must
            be 1.
        clip_radius: ξ; no entry of the step (ḡ + δm)/(s + c) is longer than that before its rate.
        prior_in_momentum: False averages the gradients of the data, and adds δm to the average.
        prior_in_average: False averages the curvature of the data, and adds δ to the average.
        precision: The posterior's precision from (s, loss), where it is not what m is divided by.

    The prior can be kept out of the averages of a `TotalLoss`; other losses are averaged whole.

    Raises:
        ValueError: If an argument is out of its range or does not go with another.
    """

    derivatives: Callable[[Any, Any], tuple[Tensor, Tensor]]
    lr: Rate = 1.0
    temperature: float = 1.0
    lr_mean: Rate | None = None
    momentum: float = 0.0
    initial: float | None = None
    debias: bool = False
    root: bool = False
    eps: float = 0.0
    retraction: bool = False
    clip_radius: float = math.inf
    prior_in_momentum: bool = True
    prior_in_average: bool = True
    precision: Callable[[Tensor, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range, or does not go together."""
        _validate.number("lr", self.lr, lambda x: x > 0, "positive")
        _validate.number("lr_mean", self.lr_mean, lambda x: x > 0, "positive")
        _validate.number("temperature", self.temperature, lambda x: x >= 0, "at least zero")
        _validate.number("momentum", self.momentum, lambda x: 0 <= x < 1, "in [0, 1)")
        _validate.number("initial", self.initial, lambda x: x >= 0, "at least zero")
        _validate.number("eps", self.eps, lambda x: x >= 0, "at least zero")
        _validate.number("clip_radius", self.clip_radius, lambda x: x > 0, "positive")
        if self.retraction and (self.temperature != 1 or self.initial == 0):
            raise ValueError(
                "retraction needs temperature = 1 and a positive start, "
                f"got temperature = {self.temperature:g} and initial = {self.initial}"
            )
        if self.debias and self.initial == 0 and self.temperature == 0:
            raise ValueError(
                "debias needs a temperature above zero, since at zero nothing is averaged, "
                "got temperature = 0; leave debias out"
            )
        if self.precision is not None and self.initial is None:
            raise ValueError(
                "precision needs initial, since the precision of q does not say where s starts, "
                "got initial = None; pass initial=0.0"
            )

    def posteriors(self, losses: Iterable[Any], q: DiagonalGaussian) -> Iterator[DiagonalGaussian]:
        """q after each step, one step for each of `losses`, starting from q."""
        remedy = "use DiagonalGaussian.from_moments(mean, precision)"
        _validate.instance("q", q, DiagonalGaussian, remedy)
        m, s, gbar = q.mean, None, torch.zeros_like(q.mean)
        T, beta, xi = self.temperature, self.momentum, self.clip_radius
        missing = 1.0 if self.initial == 0 else 0.0  # weight that the average s has yet to gather
        for t, loss in enumerate(losses, 1):
            rho, alpha = self._rates(t)
            data, (delta_g, delta_m), (delta_h, delta_s) = self._split(loss)
            c = delta_s + self.eps
            s = self._start(q, c) if s is None else s

            # In place, since gbar, s and m belong to this loop, and new memory is slow to get.
            g, h = self.derivatives(data, q)
            gbar.lerp_(_plus(g, delta_g, m), 1 - beta)
            s = self._average(s, _plus(h, delta_h), c, rho)
            missing *= 1 - rho * T

            ghat = gbar / (1 - beta**t if self.debias else 1)
            shat = s / (1 - missing if self.debias else 1)
            divisor = _plus(shat.sqrt_() if self.root else shat, c)
            step = _plus(ghat, delta_m, m).div_(divisor)
            m.sub_(step if math.isinf(xi) else step.clamp_(-xi, xi), alpha=alpha)
            q = self._posterior(m, divisor, s, loss, t)
            del g, h, ghat, shat, divisor, step  # their memory is for the next gradient
            yield q

    def _rates(self, t: int) -> tuple[float, float]:
        """ρ and α at step t."""
        rho, alpha = self.lr, self.lr if self.lr_mean is None else self.lr_mean
        return rho(t) if callable(rho) else rho, alpha(t) if callable(alpha) else alpha

    def _split(self, loss: Any) -> tuple[Any, tuple[Any, Any], tuple[Any, Any]]:
        """The loss to differentiate, and the δ that is left: in or outside ḡ, in or outside s."""
        if (self.prior_in_momentum and self.prior_in_average) or not isinstance(loss, TotalLoss):
            return loss, (0.0, 0.0), (0.0, 0.0)
        delta = loss.prior_precision
        in_momentum = (delta, 0.0) if self.prior_in_momentum else (0.0, delta)
        in_average = (delta, 0.0) if self.prior_in_average else (0.0, delta)
        return dataclasses.replace(loss, prior_precision=0.0), in_momentum, in_average

    def _start(self, q: DiagonalGaussian, c: float | Tensor) -> Tensor:
        """The average at the start: the one with which q has its precision, if none is given."""
        if self.initial is not None:
            return torch.full_like(q.mean, self.initial)
        return (q.precision.sqrt() - c) ** 2 if self.root else q.precision - c

    def _average(self, s: Tensor, h: Tensor, c: float | Tensor, rho: float) -> Tensor:
        """(1 − ρT)s + ρĥ, and the retraction if asked for."""
        correction = (s - h).square_().div_(_plus(s, c)) if self.retraction else None
        s = s.mul_(1 - rho * self.temperature).add_(h, alpha=rho)
        return s if correction is None else s.add_(correction, alpha=0.5 * rho**2)

    def _posterior(
        self, m: Tensor, divisor: Tensor, s: Tensor, loss: Any, t: int
    ) -> DiagonalGaussian:
        precision = divisor.square_() if self.root else divisor
        if self.precision is not None:
            precision = self.precision(s, loss)
        try:
            return DiagonalGaussian(natural=(precision * m, -0.5 * precision))
        except ValueError as error:
            rho, alpha = self._rates(t)
            raise ValueError(
                f"the rates lr = {rho:g} of the precision and lr_mean = {alpha:g} of the mean lead "
                f"out of the domain of DiagonalGaussian: {error}. Lower lr or lr_mean, use a "
                "curvature that cannot be negative such as squared_gradients, or retraction=True; "
                "eps or a prior_precision keeps the precision of a parameter without gradient "
                "from zero"
            ) from error


def _plus(x: Tensor, delta: float | Tensor, y: float | Tensor = 1.0) -> Tensor:
    """x + δy, or x itself where δ is the number zero."""
    if isinstance(delta, Tensor):
        return x + delta * y
    return x if delta == 0 else torch.add(x, y, alpha=delta)
