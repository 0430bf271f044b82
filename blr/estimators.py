"""Scikit-learn's face of the conjugate models: fit, predict, and ask what each example did.

    posterior_ = N(m, S⁻¹),   S = S₀ + XᵀX/σ²,   dual_[i] = (xᵢyᵢ/σ², −½ xᵢxᵢᵀ/σ²)

The mathematics is `blr.regression`; here arrays come in, arrays go out, and input is checked in
scikit-learn's way.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from blr.conjugate import as_indices
from blr.families.gaussian import Gaussian
from blr.regression import GaussianRegression, LeaveGroupOut, LeaveOneOut


@dataclass(frozen=True)
class Duals:
    """λ̃ᵢ of every example of a linear regression, built when asked for: N × D numbers, not N × D².

    `duals[i]` is the pair (xᵢyᵢ/σ², −½ xᵢxᵢᵀ/σ²); an index array gives a leading axis;
    `duals.total(indices)` adds them up.
    """

    model: GaussianRegression
    X: Tensor
    y: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.y)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """λ̃ at `index`."""
        rows = torch.arange(len(self))[index]
        lam1, lam2 = self.model.duals((self.X[rows.reshape(-1)], self.y[rows.reshape(-1)]))
        return (lam1, lam2) if rows.ndim else (lam1[0], lam2[0])

    def total(self, indices: Any = None) -> tuple[Tensor, Tensor]:
        """Σ λ̃ᵢ over `indices`, or over all examples."""
        rows = slice(None) if indices is None else as_indices(indices, len(self))
        return self.model.total_dual((self.X[rows], self.y[rows]))


class Sensitivity:
    """Exact leave-one-out, or leave-group-out, as arrays; see `blr.regression`.

    Changes are "with" minus "without". Coefficients come intercept first, if there is one. For
    groups, `prediction_change` and `loo_residual` are lists with one array for each group.
    """

    def __init__(self, exact: LeaveOneOut | LeaveGroupOut) -> None:
        """Wrap the tensors of `exact`."""
        self._exact = exact

    @property
    def leverage(self) -> NDArray[np.float64]:
        """hᵢ = xᵢᵀS⁻¹xᵢ/σ², shape (N,); summed over each group."""
        return self._exact.leverage.numpy()

    @property
    def cooks_distance(self) -> NDArray[np.float64]:
        r"""(m − m^{\i})ᵀ S (m − m^{\i})/P with P coefficients, shape (N,)."""
        return self._exact.cooks_distance.numpy()

    @property
    def mean_change(self) -> NDArray[np.float64]:
        r"""m − m^{\i}, shape (N, P)."""
        return self._exact.mean_change.numpy()

    @property
    def dfbeta(self) -> NDArray[np.float64]:
        """The statisticians' name for `mean_change`."""
        return self.mean_change

    @property
    def dfbetas(self) -> NDArray[np.float64]:
        """`mean_change` in standard deviations of the coefficients, σ² without i, (N, P)."""
        return self._exact.dfbetas.numpy()

    @property
    def prediction_change(self) -> Any:
        r"""xᵢᵀ(m − m^{\i}), shape (N,)."""
        return _arrays(self._exact.prediction_change)

    @property
    def loo_residual(self) -> Any:
        r"""yᵢ − xᵢᵀm^{\i}, shape (N,)."""
        return _arrays(self._exact.loo_residual)

    @property
    def loo_log_score(self) -> NDArray[np.float64]:
        """log p(yᵢ | the rest), in nats, shape (N,); jointly for each group."""
        return self._exact.loo_log_score.numpy()


class LinearRegression(RegressorMixin, BaseEstimator):
    """Bayesian linear regression that knows what each example did to it.

    Args:
        prior_precision: δ, precision of the Gaussian prior on the coefficients, a number or shape
            (D,). The intercept has a flat prior. 0 is least squares.
        noise_variance: σ²; None estimates it as the residual sum of squares of least squares over
            N − P, P the number of coefficients with the intercept. Sensitivities with a prior
            hold it at its value.
        fit_intercept: Whether to add a constant column, which comes first everywhere.

    Attributes:
        coef_: Posterior mean of the coefficients, shape (D,).
        intercept_: Posterior mean of the intercept; 0.0 without one.
        noise_variance_: σ², given or estimated.
        posterior_: `Gaussian` over (intercept, coefficients).
        dual_: λ̃ᵢ of every example.

    The training data are kept, because removing an example needs it. Source: Cook (1977); Nickl et
    al. (2023), theorem 3.

    >>> import numpy as np
    >>> X, y = np.array([[0.0], [1.0], [2.0], [9.0]]), np.array([0.1, 0.9, 2.1, 4.0])
    >>> model = LinearRegression(prior_precision=0).fit(X, y)
    >>> model.sensitivity().leverage.round(2)
    array([0.43, 0.33, 0.27, 0.97])
    >>> model.coef_.round(2), model.remove([3]).coef_.round(2)
    (array([0.4]), array([1.]))
    """

    def __init__(
        self,
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        fit_intercept: bool = True,
    ) -> None:
        """Store the settings; they are checked in `fit`."""
        self.prior_precision = prior_precision
        self.noise_variance = noise_variance
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to X of shape (N, D) and y of shape (N,), forgetting what was seen before.

        Raises:
            ValueError: If the data do not determine the coefficients and the prior does not
                help, or there are too few examples to estimate the noise variance.
        """
        return self._see(X, y, reset=True)

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Add examples: λ + Σ λ̃ᵢ, the same as fitting to all of them at once."""
        return self._see(X, y, reset=not hasattr(self, "_gram"))

    def _see(self, X: Any, y: Any, *, reset: bool) -> Self:
        # On a copy: whatever fails, the model stays as it was.
        new = copy.copy(self)
        X, y = validate_data(new, X, y, reset=reset, dtype=np.float64, y_numeric=True)
        X = self._design(X)
        y = torch.from_numpy(np.array(y, dtype=np.float64))
        seen = [] if reset else self._seen
        # NumPy, unlike torch, sees that XᵀX is symmetric and does half of the work.
        gram = (X.mT @ y, torch.from_numpy(X.numpy().T @ X.numpy()))
        if not reset:
            gram = (self._gram[0] + gram[0], self._gram[1] + gram[1])
        new._adopt(gram, [*seen, (X, y)])
        self.__dict__ = new.__dict__
        return self

    def _adopt(self, gram: tuple[Tensor, Tensor], seen: list[tuple[Tensor, Tensor]]) -> None:
        unit = GaussianRegression(self._prior(gram[1]), 1.0)
        if self.noise_variance is not None:
            variance = float(self.noise_variance)
            if not variance > 0:
                raise ValueError(
                    f"noise_variance must be positive or None, got {self.noise_variance!r}; "
                    "None estimates it"
                )
        else:
            variance = _estimate_noise(unit, gram, seen)
        model = GaussianRegression(unit.prior, variance)
        prior: Any = model.prior_natural
        posterior = model.member(
            (prior[0] + gram[0] / variance, prior[1] - 0.5 * gram[1] / variance)
        )
        self._gram, self._seen, self._model = gram, seen, model
        self.posterior_: Gaussian = posterior
        self.noise_variance_ = variance
        mean = posterior.mean.numpy()
        self.coef_ = mean[1:] if self.fit_intercept else mean
        self.intercept_ = float(mean[0]) if self.fit_intercept else 0.0

    def _design(self, X: Any) -> Tensor:
        columns = [np.ones((len(X), 1)), X] if self.fit_intercept else [X]
        return torch.from_numpy(np.concatenate(columns, axis=1))

    def _prior(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """(0, −½S₀) with S₀ = diag(δ), and 0 for the intercept."""
        D = len(gram) - bool(self.fit_intercept)
        delta = np.asarray(self.prior_precision, dtype=np.float64)
        if delta.shape not in ((), (D,)) or not np.all(np.isfinite(delta) & (delta >= 0)):
            raise ValueError(
                f"prior_precision must be a non-negative number or have shape ({D},), got "
                f"{self.prior_precision!r}; 0 is least squares"
            )
        diagonal = torch.zeros(len(gram), dtype=torch.float64)
        diagonal[bool(self.fit_intercept) :] = torch.from_numpy(np.array(delta))
        return torch.zeros_like(diagonal), torch.diag(-0.5 * diagonal)

    def _data(self) -> tuple[Tensor, Tensor]:
        if len(self._seen) > 1:
            X, y = zip(*self._seen, strict=True)
            self._seen = [(torch.cat(X), torch.cat(y))]
        return self._seen[0]

    @property
    def dual_(self) -> Duals:
        """λ̃ᵢ of every example; see `Duals`."""
        check_is_fitted(self)
        return Duals(self._model, *self._data())

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predictive mean xᵀm for X of shape (M, D), shape (M,).

        Args:
            X: Inputs, shape (M, D).
            return_std: Also return the standard deviation of a new observation, √(σ² + xᵀS⁻¹x).
        """
        check_is_fitted(self)
        X = self._design(validate_data(self, X, reset=False, dtype=np.float64))
        mean = self._model.predictive_mean(self.posterior_, X).numpy()
        if not return_std:
            return mean
        return mean, self._model.predictive_variance(self.posterior_, X).sqrt().numpy()

    def remove(self, indices: Any) -> Self:
        """A new fitted model without these training examples: λ − Σ λ̃ᵢ.

        Args:
            indices: Positions in the order in which the examples were seen, or a boolean mask.

        Raises:
            ValueError: If an index does not exist or repeats, or what remains does not determine
                the coefficients.
        """
        check_is_fitted(self)
        X, y = self._data()
        index = as_indices(indices, len(y))
        keep = torch.ones(len(y), dtype=torch.bool)
        keep[index] = False
        # The posterior checks that what remains is more than rounding errors.
        self.posterior_.remove(self.dual_.total(index))
        gram = (
            self._gram[0] - X[index].mT @ y[index],
            self._gram[1] - X[index].mT @ X[index],
        )
        other: Any = clone(self)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(other, name, getattr(self, name))
        other._adopt(gram, [(X[keep], y[keep])])
        return other

    def sensitivity(self, groups: Any = None) -> Sensitivity:
        """What would change without each training example, or each group, without refitting.

        Args:
            groups: Labels of shape (N,), one group for each value in sorted order; or a list of
                index lists; or None for every example by itself.
        """
        check_is_fitted(self)
        X, y = self._data()
        exact = self._model.sensitivity((X, y), groups, self.posterior_)
        least_squares = self.noise_variance is None and not np.any(self.prior_precision)
        if isinstance(exact, LeaveOneOut) and least_squares:
            dof = len(y) - X.shape[1]
            rss, loo_dof = exact.noise_variance * dof, exact.noise_variance.new_tensor(dof - 1)
            exact = replace(exact, rss=rss, loo_dof=loo_dof)
        return Sensitivity(exact)


def _estimate_noise(
    unit: GaussianRegression, gram: tuple[Tensor, Tensor], seen: list[tuple[Tensor, Tensor]]
) -> float:
    """σ̂² = RSS/(N − P) of least squares; P is the rank where a prior allows less than full."""
    prior: Any = unit.prior_natural
    n = sum(len(y) for _, y in seen)
    if not prior[1].any():
        mean, rank = unit.member((gram[0], -0.5 * gram[1])).mean, len(gram[0])
    else:
        X = torch.cat([X for X, _ in seen]).numpy()
        y = torch.cat([y for _, y in seen]).numpy()
        solution, _, rank, _ = scipy.linalg.lstsq(X, y)  # type: ignore[misc]
        mean = torch.from_numpy(solution)
    if n <= rank:
        raise ValueError(
            f"noise_variance=None needs more examples than coefficients, got n_samples={n} and "
            f"{rank} coefficients; pass noise_variance"
        )
    rss = sum(float(((y - X @ mean) ** 2).sum()) for X, y in seen)
    power = sum(float((y**2).sum()) for _, y in seen)
    # A perfect fit leaves no noise; its rounding errors do.
    floor = max(np.finfo(np.float64).eps ** 2 * power, np.finfo(np.float64).tiny)
    return max(rss, floor) / (n - rank)


def _arrays(x: Tensor | list[Tensor]) -> Any:
    return [part.numpy() for part in x] if isinstance(x, list) else x.numpy()
