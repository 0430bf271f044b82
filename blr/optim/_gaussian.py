"""Optimizers whose posterior is N(m, 1/(N(h + δ))), one average h of curvature and the prior δ.

θ = m + ε/√(N(h + δ))          prior N(λ₀/δ, 1/(Nδ)), by default weight decay δ and λ₀ = 0
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from blr.families.gaussian import DiagonalGaussian
from blr.optim import _functional, _options, _state
from blr.optim._base import PosteriorOptimizer
from blr.optim._functional import Prior
from blr.optim._pieces import Piece, local
from blr.optim.posterior import NamedGaussian


class GaussianOptimizer(PosteriorOptimizer):
    """Mean, momentum, curvature, and a Gaussian prior for each parameter."""

    def __init__(self, params: Any, defaults: dict[str, Any], prior: Any = None) -> None:
        super().__init__(params, defaults)
        if prior is not None:
            self._set_prior(prior)

    def posterior(self) -> NamedGaussian:
        """q = N(m, diag(s)⁻¹) over the parameters that are not frozen, by name.

        Names are those of `model.named_parameters()` if the optimizer was given that; else the
        numbers "0", "1", … of the parameters, of which it remembers the tensors.

        Raises:
            ValueError: If all parameters are frozen.
        """
        mean, precision = {}, {}
        known = {p: name for name, p in _state.names(self.param_groups)}
        self._works(_state.free(self.param_groups))
        for group in self.param_groups:
            for p in filter(lambda p: p.requires_grad, group["params"]):
                resting = (self._at is None or p not in self._held) and not self._apart(p.dtype)
                mean[known[p]] = local(p if resting else self.state[p]["mean"])
                delta = self.state[p].get("prior_precision", group["ess"] * group["weight_decay"])
                precision[known[p]] = local(group["ess"] * self.state[p]["hess"] + delta)
        q = NamedGaussian.from_named(mean, precision)
        if any("param_names" in group for group in self.param_groups):
            return q
        return replace(q, tensors=WeakValueDictionary({name: p for p, name in known.items()}))

    def _check(self, group: dict[str, Any]) -> None:
        _options.check_common(group)
        _options.check_gaussian(group)

    def _initial(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        momentum = torch.zeros_like(p, dtype=_state.dtype(p), requires_grad=False)
        state = {"momentum": momentum, "hess": torch.full_like(momentum, group["hess_init"])}
        thaws = p in self._index and "hess" not in self.state[p]
        return self._decay(p, group) | state if thaws and self._has_prior(group) else state

    def _draw(self, b: Piece, group: dict[str, Any], mean: Tensor, noise: Tensor) -> Tensor:
        delta = self._prior(b, group).delta
        return _functional.sample(mean, b.read("hess"), noise, delta, group["ess"])

    def _prior(self, b: Piece, group: dict[str, Any]) -> Prior:
        if "prior_precision" not in b.states[0]:
            return Prior(group["weight_decay"])
        s, lam1 = b.read("prior_precision"), b.read("prior_shift")
        return Prior(s / group["ess"], lam1 / group["ess"])

    @torch.no_grad()
    def _set_prior(self, prior: DiagonalGaussian) -> None:
        for p, lam1, s in _state.priors(prior, self.param_groups):
            like = torch.empty_like(p, dtype=_state.dtype(p), requires_grad=False)
            self.state[p]["prior_shift"] = like.copy_(lam1)
            self.state[p]["prior_precision"] = torch.empty_like(like).copy_(s)
        for group in filter(self._has_prior, self.param_groups):
            for p in filter(lambda p: p.requires_grad, group["params"]):
                if "prior_precision" not in self.state[p]:
                    self.state[p] |= self._decay(p, group)

    def _has_prior(self, group: dict[str, Any]) -> bool:
        return any("prior_precision" in self.state.get(p, {}) for p in group["params"])

    def _decay(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Weight decay as a prior, as others have one in the group, which is worked on at once."""
        zero = torch.zeros_like(p, dtype=_state.dtype(p), requires_grad=False)
        s = torch.full_like(zero, group["ess"] * group["weight_decay"])
        return {"prior_shift": zero, "prior_precision": s}


def gathered(group: dict[str, Any]) -> float:
    """1 − β₁ᵗ, the weight that the average of gradients has gathered after this step."""
    return 1 - group["betas"][0] ** (group["step"] + 1) if group["debias"] else 1.0
