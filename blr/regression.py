r"""Bayesian linear regression: leave-one-out for every example without refitting.

    ℓᵢ = (yᵢ − xᵢᵀθ)²/(2σ²)      λ̃ᵢ = (xᵢyᵢ/σ², −½ xᵢxᵢᵀ/σ²)      S = S₀ + XᵀX/σ²
    vᵢ = xᵢᵀS⁻¹xᵢ                hᵢ = vᵢ/σ²                       rᵢ = yᵢ − xᵢᵀm
    m − m^{\i} = S⁻¹xᵢ (yᵢ − xᵢᵀm^{\i})/σ²                       yᵢ − xᵢᵀm^{\i} = rᵢ/(1 − hᵢ)

Sensitivity is prediction variance times prediction error. The leverages hᵢ cost one triangular
solve; nothing here is larger than X itself.

References: Cook (1977), Detection of influential observation in linear regression; Belsley, Kuh &
Welsch (1980), Regression diagnostics; Nickl et al. (2023), theorem 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blr import _validate
from blr._tree import Tree
from blr.conjugate import ConjugateModel, as_groups
from blr.families.gaussian import Gaussian
from blr.families.normal_gamma import NormalGamma

CHUNK = 8_192
"""Rows of X worked on at a time: temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Exact changes on removing each example by itself. Changes are "with" minus "without".

    Args:
        X: Inputs, shape (N, D).
        residual: rᵢ = yᵢ − xᵢᵀm, shape (N,).
        cholesky: Factor L of the full-data precision in units of the noise, σ²S = LLᵀ.
        noise_variance: σ², known or estimated.
        rss: Sum of squares from which σ² was estimated; None if it is known. 2b of a normal-gamma.
        loo_dof: Degrees of freedom of that estimate without example i: N − 1 − D of least squares,
            2a − 1 of a normal-gamma.
    """

    X: Tensor
    residual: Tensor
    cholesky: Tensor
    noise_variance: Tensor
    rss: Tensor | None = None
    loo_dof: Tensor | None = None

    @cached_property
    def leverage(self) -> Tensor:
        """hᵢ = xᵢᵀS⁻¹xᵢ/σ², between 0 and 1, shape (N,)."""
        return _squared_norms(self.cholesky, self.X)

    @cached_property
    def loo_residual(self) -> Tensor:
        r"""yᵢ − xᵢᵀm^{\i} = rᵢ/(1 − hᵢ), the residual of an example that was not seen, (N,).

        Raises:
            ValueError: If an example has leverage 1: without it the fit is not determined.
        """
        _validate.require(
            1 - self.leverage > 1e-12,
            "leverage",
            "below 1 for every example",
            self.leverage,
            "without such an example the fit is not determined: use a prior, or drop a column",
        )
        return self.residual / (1 - self.leverage)

    @cached_property
    def mean_change(self) -> Tensor:
        r"""m − m^{\i} = S⁻¹xᵢ (yᵢ − xᵢᵀm^{\i})/σ², shape (N, D)."""
        inverse = torch.cholesky_inverse(self.cholesky)
        return (self.X @ inverse).mul_(self.loo_residual.unsqueeze(-1))

    @cached_property
    def loo_noise_variance(self) -> Tensor:
        r"""σ²_(i) = (RSS − rᵢ²/(1 − hᵢ))/dof, estimated without example i; σ² if known, (N,)."""
        if self.rss is None or self.loo_dof is None:
            return self.noise_variance.expand(self.residual.shape)
        rss = (self.rss - self.residual * self.loo_residual).clamp_min(0)
        return torch.where(self.loo_dof > 0, rss / self.loo_dof, torch.nan)

    @property
    def unit(self) -> Tensor:
        """Posterior standard deviations of θ divided by σ, shape (D,)."""
        return torch.cholesky_inverse(self.cholesky).diagonal().sqrt()

    @property
    def dfbeta(self) -> Tensor:
        """The statisticians' name for `mean_change`, shape (N, D)."""
        return self.mean_change

    @property
    def dfbetas(self) -> Tensor:
        """mean_change in units of the posterior standard deviation with σ² = σ²_(i), (N, D)."""
        deviation = self.loo_noise_variance.sqrt().unsqueeze(-1)
        return (self.mean_change / self.unit).div_(deviation)

    @property
    def prediction_change(self) -> Tensor:
        r"""xᵢᵀ(m − m^{\i}) = hᵢrᵢ/(1 − hᵢ): variance times error, shape (N,)."""
        return self.leverage * self.loo_residual

    @property
    def cooks_distance(self) -> Tensor:
        r"""(m − m^{\i})ᵀ S (m − m^{\i})/D = hᵢ rᵢ²/(D σ² (1 − hᵢ)²), shape (N,)."""
        D = self.X.shape[-1]
        return self.leverage * self.loo_residual**2 / (D * self.noise_variance)

    @property
    def loo_log_score(self) -> Tensor:
        r"""log p(yᵢ | the rest), in nats, shape (N,).

        Centre xᵢᵀm^{\i} and squared scale σ²_(i)/(1 − hᵢ); Gaussian if σ² is known, else the
        Student-t with the degrees of freedom that are left without example i.
        """
        scale2 = self.loo_noise_variance / (1 - self.leverage)
        return _log_density(self.loo_residual, scale2, self.loo_dof)


@dataclass(frozen=True)
class LeaveGroupOut:
    """Exact changes on removing groups M. Where an example has a number, a group has a tensor."""

    posteriors: list[Any]
    r"""q^{\M}, one for each group."""

    leverage: Tensor
    """Σ_{i∈M} hᵢ, shape (G,)."""

    mean_change: Tensor
    r"""m − m^{\M}, shape (G, D)."""

    cooks_distance: Tensor
    r"""(m − m^{\M})ᵀ S (m − m^{\M})/D, shape (G,)."""

    prediction_change: list[Tensor]
    r"""X_M(m − m^{\M}), one tensor for each group."""

    loo_residual: list[Tensor]
    r"""y_M − X_M m^{\M}, one tensor for each group."""

    loo_log_score: Tensor
    """log p(y_M | the rest), jointly, in nats, shape (G,)."""

    dfbetas: Tensor
    """mean_change in posterior standard deviations with σ² of the full data, shape (G, D)."""

    @property
    def dfbeta(self) -> Tensor:
        """The statisticians' name for `mean_change`."""
        return self.mean_change


@dataclass(frozen=True)
class GaussianRegression(ConjugateModel[Gaussian]):
    """y = Xθ + ε with ε ~ N(0, σ²), σ² known. Data are the pair (X, y), shapes (N, D) and (N,).

    Args:
        prior: A Gaussian over θ; or natural parameters (S₀m₀, −½S₀), which may be improper: zeros
            give least squares.
        noise_variance: σ².

    Raises:
        ValueError: If σ² is not positive.
    """

    prior: Gaussian | tuple[Tensor, Tensor]
    noise_variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        """Check σ²."""
        variance = _validate.as_float("noise_variance", self.noise_variance)
        object.__setattr__(self, "noise_variance", _validate.positive("noise_variance", variance))

    @property
    def prior_natural(self) -> Tree:
        """λ₀."""
        return self.prior if isinstance(self.prior, tuple) else self.prior.natural

    def member(self, natural: Tree) -> Gaussian:
        """N(m, S⁻¹) at λ."""
        try:
            return Gaussian(natural=natural)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"the posterior is improper: {error}. Fewer independent examples than "
                "coefficients, or constant columns, need a prior with positive precision"
            ) from error

    def duals(self, data: Any) -> tuple[Tensor, Tensor]:
        """λ̃ᵢ = (xᵢyᵢ/σ², −½ xᵢxᵢᵀ/σ²), shapes (N, D) and (N, D, D): for small data only."""
        X, y = as_regression_data(data)
        outer = X.unsqueeze(-1) * X.unsqueeze(-2)
        return y.unsqueeze(-1) * X / self.noise_variance, -0.5 * outer / self.noise_variance

    def total_dual(self, data: Any) -> tuple[Tensor, Tensor]:
        """Σᵢ λ̃ᵢ = (Xᵀy/σ², −½ XᵀX/σ²)."""
        X, y = as_regression_data(data)
        return X.mT @ y / self.noise_variance, -0.5 * (X.mT @ X) / self.noise_variance

    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ = −½ log 2πσ² − yᵢ²/(2σ²)."""
        y = as_regression_data(data)[1]
        return _log_density(y, _validate.as_float("noise_variance", self.noise_variance), None)

    def log_evidence(self, data: Any) -> Tensor:
        """log p(y | X), in nats.

        Raises:
            ValueError: If the prior is improper: it has no evidence.
        """
        log_partition = self.posterior(data).log_partition()
        prior = self.member(self.prior_natural)
        return log_partition - prior.log_partition() + self.log_carrier(data).sum()

    def predictive_mean(self, q: Gaussian, inputs: Any = None) -> Tensor:
        """E[y] = xᵀm for the rows of `inputs`, shape (N, D)."""
        return _rows(inputs, q.mean) @ q.mean

    def predictive_variance(self, q: Gaussian, inputs: Any) -> Tensor:
        """Var[y] = σ² + xᵀS⁻¹x for the rows of `inputs`, shape (N,)."""
        return self.noise_variance + _squared_norms(q.cholesky, _rows(inputs, q.mean))

    def log_predictive(self, q: Gaussian, data: Any) -> Tensor:
        """log p(yᵢ | xᵢ, q), shape (N,)."""
        X, y = as_regression_data(data)
        return _log_density(y - X @ q.mean, self.predictive_variance(q, X), None)

    def sensitivity(
        self, data: Any, groups: Any = None, posterior: Gaussian | None = None
    ) -> LeaveOneOut | LeaveGroupOut:
        """Exact changes on removing each example, or each group; see `ConjugateModel`."""
        X, y = as_regression_data(data)
        q = self.posterior((X, y)) if posterior is None else posterior
        variance = _validate.as_float("noise_variance", self.noise_variance).to(X.dtype)
        one = LeaveOneOut(
            X=X,
            residual=y - X @ q.mean,
            cholesky=q.cholesky * variance.sqrt(),
            noise_variance=variance,
        )
        return one if groups is None else _leave_groups_out(self, q, (X, y), one, groups)


@dataclass(frozen=True)
class NormalGammaRegression(ConjugateModel[NormalGamma]):
    """y = Xθ + ε with ε ~ N(0, 1/τ), τ unknown: λ̃ᵢ = (½, −½yᵢ², xᵢyᵢ, −½ xᵢxᵢᵀ).

    Args:
        prior: θ | τ ~ N(m, (τS)⁻¹) and τ ~ Gamma(a, b).
    """

    prior: NormalGamma

    def duals(self, data: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """λ̃ᵢ, with leading axis N; for small data only."""
        X, y = as_regression_data(data)
        outer = X.unsqueeze(-1) * X.unsqueeze(-2)
        return torch.full_like(y, 0.5), -0.5 * y**2, y.unsqueeze(-1) * X, -0.5 * outer

    def total_dual(self, data: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σᵢ λ̃ᵢ = (N/2, −½ yᵀy, Xᵀy, −½ XᵀX)."""
        X, y = as_regression_data(data)
        return y.new_tensor(len(y) / 2), -0.5 * y @ y, X.mT @ y, -0.5 * X.mT @ X

    def log_carrier(self, data: Any) -> Tensor:
        """log cᵢ = −½ log 2π."""
        y = as_regression_data(data)[1]
        return torch.full_like(y, -0.5 * math.log(2 * math.pi))

    def predictive_mean(self, q: NormalGamma, inputs: Any = None) -> Tensor:
        """E[y] = xᵀm for the rows of `inputs`, shape (N, D)."""
        return _rows(inputs, q.mean) @ q.mean

    def predictive_variance(self, q: NormalGamma, inputs: Any) -> Tensor:
        """Variance of the Student-t with 2a degrees of freedom; infinite for a ≤ 1, shape (N,)."""
        variance = self._scale2(q, _rows(inputs, q.mean)) * q.shape / (q.shape - 1)
        return torch.where(q.shape > 1, variance, torch.inf)

    def log_predictive(self, q: NormalGamma, data: Any) -> Tensor:
        """log p(yᵢ | xᵢ, q), a Student-t with 2a degrees of freedom, shape (N,)."""
        X, y = as_regression_data(data)
        return _log_density(y - X @ q.mean, self._scale2(q, X), 2 * q.shape)

    def _scale2(self, q: NormalGamma, X: Tensor) -> Tensor:
        return q.rate / q.shape * (1 + _squared_norms(torch.linalg.cholesky(q.precision), X))

    def sensitivity(
        self, data: Any, groups: Any = None, posterior: NormalGamma | None = None
    ) -> LeaveOneOut | LeaveGroupOut:
        """Exact changes on removing each example, or each group; see `ConjugateModel`."""
        X, y = as_regression_data(data)
        q = self.posterior((X, y)) if posterior is None else posterior
        one = LeaveOneOut(
            X=X,
            residual=y - X @ q.mean,
            cholesky=torch.linalg.cholesky(q.precision),
            noise_variance=q.rate / q.shape,
            rss=2 * q.rate,
            loo_dof=2 * q.shape - 1,
        )
        return one if groups is None else _leave_groups_out(self, q, (X, y), one, groups)


def _leave_groups_out(
    model: ConjugateModel, q: Any, data: tuple[Tensor, Tensor], one: LeaveOneOut, groups: Any
) -> LeaveGroupOut:
    X, y = data
    members = as_groups(groups, len(y))
    without = [model.remove(q, (X[M], y[M])) for M in members]
    change = torch.stack([q.mean - p.mean for p in without])
    log_c, A = model.log_carrier(data), q.log_partition()
    scores = [A - p.log_partition() + log_c[M].sum() for p, M in zip(without, members, strict=True)]
    return LeaveGroupOut(
        posteriors=without,
        leverage=torch.stack([one.leverage[M].sum() for M in members]),
        mean_change=change,
        cooks_distance=((change @ one.cholesky) ** 2).sum(-1) / X.shape[1] / one.noise_variance,
        prediction_change=[X[M] @ d for M, d in zip(members, change, strict=True)],
        loo_residual=[y[M] - X[M] @ p.mean for p, M in zip(without, members, strict=True)],
        loo_log_score=torch.stack(scores),
        dfbetas=change / one.unit / one.noise_variance.sqrt(),
    )


def _squared_norms(L: Tensor, X: Tensor) -> Tensor:
    """xᵀ(LLᵀ)⁻¹x = ‖L⁻¹x‖² for the rows of X."""
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False).mT
    return torch.cat([(rows @ inverse).square().sum(-1) for rows in X.split(CHUNK)])


def _rows(inputs: Any, mean: Tensor) -> Tensor:
    X = _validate.finite("inputs", _validate.as_float("inputs", inputs)).to(mean.dtype)
    if X.ndim != 2 or X.shape[1] != mean.shape[-1]:
        raise ValueError(f"inputs must have shape (N, {mean.shape[-1]}), got {tuple(X.shape)}")
    return X


def _log_density(error: Tensor, scale2: Tensor, dof: Tensor | None) -> Tensor:
    """Log density of a centred Gaussian, or of a Student-t, with squared scale `scale2`."""
    z2 = error**2 / scale2
    if dof is None:
        return -0.5 * (torch.log(2 * math.pi * scale2) + z2)
    constant = torch.lgamma((dof + 1) / 2) - torch.lgamma(dof / 2)
    return (
        constant - 0.5 * torch.log(math.pi * dof * scale2) - (dof + 1) / 2 * torch.log1p(z2 / dof)
    )


def as_regression_data(data: Any) -> tuple[Tensor, Tensor]:
    """(X, y) as finite tensors of shapes (N, D) and (N,) with one dtype.

    Raises:
        ValueError: If shapes do not fit or values are not finite.
    """
    if not isinstance(data, tuple) or len(data) != 2:
        raise ValueError("data must be the pair (X, y) with shapes (N, D) and (N,)")
    X, y = _validate.as_float("X", data[0]), _validate.as_float("y", data[1])
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(
            f"X and y must have shapes (N, D) and (N,), got {tuple(X.shape)} and {tuple(y.shape)}"
        )
    X, y = _validate.common(_validate.finite("X", X), _validate.finite("y", y))
    return X, y
