"""The rule for diagonal Gaussians in mean and precision, with the liberties of optimizers.

    s ← (1 − ρT)s + ρĥ          m ← m − ρĝ/s          ĝ ≈ E_q[∇ℓ̄],  ĥ ≈ diag E_q[∇²ℓ̄]

with the new s: that is the rule for q = N(m, 1/s). Optimizers depart from it in a few ways, each an
argument here whose default is the rule itself: another rate α for m, momentum of ĝ, averages that
start at zero and are corrected for it, division by the square root of the average, a constant
ε that keeps the divisor from zero, and a retraction that keeps s positive for every ĥ.

References: Khan & Rue (2023), sections 4.2 and 4.4; Kingma & Ba (2015), Adam; Lin, Schmidt & Khan
(2020), Handling the positive-definite constraint in the Bayesian learning rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blr.families.gaussian import DiagonalGaussian


@dataclass(frozen=True)
class DiagonalRule:
    """The rule in (m, s) as a recipe. Without liberties it equals `Rule` on a DiagonalGaussian.

    Args:
        derivatives: (ĝ, ĥ) from (loss, q), such as `blr.gradients.at_mean`.
        lr: Rate ρ of the precision; 1 − β₂ in the optimizers.
        temperature: Weight T of the entropy.
        lr_mean: Rate α of the mean; ρ if missing.
        momentum: Decay β₁ of an average of ĝ that starts at zero; 0 takes ĝ as it is.
        initial: The average of ĥ at the start, such as 0; the precision of q if missing.
        debias: Divide averages that started at zero by the weight that they have gathered.
        root: Divide by √s + ε in place of s + ε. The posterior's precision is then (√s + ε)².
        eps: ε.
        retraction: Add ½ρ²(s − ĥ)²/s to s, which is then at least half of what it was. T must be 1.
    """

    derivatives: Callable[[Any, Any], tuple[Tensor, Tensor]]
    lr: float = 1.0
    temperature: float = 1.0
    lr_mean: float | None = None
    momentum: float = 0.0
    initial: float | None = None
    debias: bool = False
    root: bool = False
    eps: float = 0.0
    retraction: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.retraction and (self.temperature != 1 or self.initial == 0):
            raise ValueError(
                "retraction needs temperature = 1 and a positive start, "
                f"got temperature = {self.temperature:g} and initial = {self.initial}"
            )

    def posteriors(self, losses: Iterable[Any], q: DiagonalGaussian) -> Iterator[DiagonalGaussian]:
        """q after each step, one step for each of `losses`, starting from q."""
        alpha = self._lr_mean
        m, gbar = q.mean, torch.zeros_like(q.mean)
        s = q.precision if self.initial is None else torch.full_like(m, self.initial)
        for t, loss in enumerate(losses, 1):
            g, h = self.derivatives(loss, q)
            gbar = self.momentum * gbar + (1 - self.momentum) * g
            s = self._average(s, h)
            scale = s / self._gathered(1 - self.lr, t) if self.initial == 0 else s
            divisor = scale.sqrt() + self.eps if self.root else scale + self.eps
            m = m - alpha * gbar / self._gathered(self.momentum, t) / divisor
            q = self._posterior(m, divisor**2 if self.root else divisor)
            yield q

    @property
    def _lr_mean(self) -> float:
        return self.lr if self.lr_mean is None else self.lr_mean

    def _average(self, s: Tensor, h: Tensor) -> Tensor:
        """(1 − ρT)s + ρĥ, and the correction if asked for."""
        rho, T = self.lr, self.temperature
        correction = 0.5 * rho**2 * (s - h) ** 2 / s if self.retraction else 0.0
        return (1 - rho * T) * s + rho * h + correction

    def _gathered(self, decay: float, t: int) -> float:
        """1 − βᵗ, the weight in an average that started at zero; 1 if it is not corrected."""
        return 1 - decay**t if self.debias else 1.0

    def _posterior(self, m: Tensor, precision: Tensor) -> DiagonalGaussian:
        try:
            return DiagonalGaussian.from_moments(m, precision)
        except ValueError as error:
            raise ValueError(
                f"the rates lr = {self.lr:g} and lr_mean = {self._lr_mean:g} lead out of the "
                f"domain of DiagonalGaussian: {error}. Lower lr, use a curvature that cannot be "
                "negative such as squared_gradients, or retraction=True; eps or a "
                "prior_precision keeps the precision of a parameter without gradient from zero"
            ) from error
