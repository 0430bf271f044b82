"""Spike and slab: each unit of a network is at work, or nearly zero.

    q(θ) = ∏_j [ π N(θ_j; m_j, s⁻¹) + (1 − π) N(θ_j; 0, s₀⁻¹) ]        λ = s∘m

θ_j are the weights that leave unit j, and they come and go together: the hidden indicator z_j of
the slab has probability π. Only the means m of the slabs are free. Given z this is an exponential
family, so it is a minimal conditional one, as the mixtures are.

References: Khan & Rue (2023), section 4.3; Mitchell & Beauchamp (1988).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from blr import _validate


@dataclass(frozen=True, eq=False, repr=False)
class SpikeAndSlab:
    """A spike and a slab for each unit, over P parameters.

    Args:
        natural: λ = s∘m, shape (P,).
        precision: s of the slabs, known, shape (P,).
        unit: The unit to which each parameter belongs, integers 0, …, U−1 of shape (P,); −1 for
            parameters that have only a slab, such as biases.
        keep: π, the weight of the slab, between zero and one.
        spike_precision: s₀, far above s.

    Raises:
        ValueError: If shapes do not fit, or a number is out of its range.
    """

    natural: Tensor
    precision: Tensor
    unit: Tensor
    keep: float
    spike_precision: float = 1e6

    def __post_init__(self) -> None:
        """Convert and check."""
        lam = _validate.vector("natural = s·m", _validate.as_float("natural", self.natural))
        s = _validate.as_float("precision", self.precision).to(lam.dtype)
        unit = torch.as_tensor(self.unit, device=lam.device)
        if lam.ndim != 1 or unit.shape != lam.shape or unit.is_floating_point():
            raise ValueError(
                f"unit must hold one integer for each of {tuple(lam.shape)} parameters, got "
                f"{unit.dtype} of shape {tuple(unit.shape)}; use −1 for those never dropped"
            )
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be between zero and one, got {self.keep:g}; it is 1 − p")
        _validate.finite("natural = s·m", lam)
        _validate.positive("precision s of the slabs", s)
        _validate.positive("spike_precision", _validate.as_float("", self.spike_precision))
        object.__setattr__(self, "natural", lam)
        object.__setattr__(self, "precision", s.expand(lam.shape))
        object.__setattr__(self, "unit", unit)

    @classmethod
    def from_moments(
        cls, slab_mean: Any, precision: Any, unit: Any, keep: float, spike_precision: float = 1e6
    ) -> Self:
        """The posterior with slab means m and slab precisions s, both of shape (P,)."""
        m = _validate.vector("slab_mean", _validate.as_float("slab_mean", slab_mean))
        s = _validate.as_float("precision", precision).to(m.dtype)
        return cls(s * m, s, unit, keep, spike_precision)

    def at(self, natural: Tensor) -> Self:
        """The member with the same units and known precisions at another λ."""
        return dataclasses.replace(self, natural=natural)

    @property
    def num_units(self) -> int:
        """U."""
        return int(self.unit.max()) + 1 if (self.unit >= 0).any() else 0

    @property
    def slab_mean(self) -> Tensor:
        """m = λ/s, shape (P,)."""
        return self.natural / self.precision

    @property
    def inclusion(self) -> Tensor:
        """P(z = 1) for each parameter: π, or 1 where there is no spike; shape (P,)."""
        return torch.where(self.unit >= 0, self.keep, torch.ones_like(self.natural))

    @property
    def mean(self) -> Tensor:
        """E[θ] = πm: the weights that a network with dropout uses at test time; shape (P,)."""
        return self.inclusion * self.slab_mean

    @property
    def variance(self) -> Tensor:
        """π(1/s + m²) + (1 − π)/s₀ − (πm)², shape (P,)."""
        pi, m = self.inclusion, self.slab_mean
        return pi * (1 / self.precision + m**2) + (1 - pi) / self.spike_precision - self.mean**2

    def expand(self, indicators: Tensor) -> Tensor:
        """z for each parameter, shape (..., P), from z for each unit, shape (..., U)."""
        always = torch.ones_like(indicators[..., :1])
        # The index −1 of parameters without a spike meets the one that is appended.
        return torch.cat([indicators, always], -1)[..., self.unit].to(self.natural.dtype)

    def indicators(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of z ~ Bernoulli(π) for each unit, shape (n, U)."""
        pi = self.natural.new_full((n, self.num_units), self.keep)
        return torch.bernoulli(pi, generator=generator)

    def responsibilities(self, theta: Tensor | None = None) -> Tensor:
        """r_j: the probability that unit j is at work given θ_j; at the slab's mean if missing."""
        slab, spike = self._log_joint(self.slab_mean if theta is None else theta)
        return torch.sigmoid(slab - spike)

    def entropy_gradient(self) -> Tensor:
        """∇_μH ≈ (1 − r_j) s₀ m_j by the delta method: what keeps a slab away from its spike."""
        r = self.expand(self.responsibilities())
        return torch.where(
            self.unit >= 0, (1 - r) * self.spike_precision * self.slab_mean, torch.zeros_like(r)
        )

    def log_prob(self, theta: Any) -> Tensor:
        """log q(θ) for θ of shape (P,)."""
        theta = _validate.as_float("theta", theta)
        alone = self._log_normal(theta - self.slab_mean, self.precision)[self.unit < 0].sum()
        return torch.logaddexp(*self._log_joint(theta)).sum() + alone

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, P)."""
        z = self.expand(self.indicators(n, generator))
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        slab = self.slab_mean + noise * self.precision.rsqrt()
        return torch.where(z > 0, slab, noise * self.spike_precision**-0.5)

    def _log_joint(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """log π N(θ_j; m_j, s⁻¹) and log (1 − π) N(θ_j; 0, s₀⁻¹), shape (U,) each."""
        slab = self._log_normal(theta - self.slab_mean, self.precision)
        spike = self._log_normal(theta, torch.full_like(theta, self.spike_precision))
        held = self.unit >= 0

        def by_unit(x: Tensor) -> Tensor:
            return x.new_zeros(self.num_units).index_add(0, self.unit[held], x[held])

        return math.log(self.keep) + by_unit(slab), math.log1p(-self.keep) + by_unit(spike)

    @staticmethod
    def _log_normal(d: Tensor, s: Tensor) -> Tensor:
        return 0.5 * (s.log() - math.log(2 * math.pi) - s * d**2)

    def __repr__(self) -> str:
        """Sizes and known parameters."""
        return (
            f"SpikeAndSlab({len(self.natural)} parameters, {self.num_units} units, "
            f"keep={self.keep:g}, spike_precision={self.spike_precision:g})"
        )
