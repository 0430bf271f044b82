"""BayesBiNN: networks whose weights are signs, by the rule for Bernoulli posteriors.

    q(θ = ±1) = σ(±2λ)      λ ← (1 − ρ)λ − ρ(N s∘∇ℓ(θ) − λ₀)      θ = tanh((λ + ½ logit u)/τ)

The state is λ, one number for each weight. Training samples are relaxed signs, through which
gradients pass, and the scale s turns them into natural gradients; samples that are only looked at
are signs. At rest the parameters are the most probable signs. Equations in `_functional`.

References: Meng, Bachmann & Khan (2020), Training binary neural networks using the Bayesian
learning rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blr.families.bernoulli import Bernoulli
from blr.optim import _functional, _options, _state
from blr.optim._base import TRAINING, PosteriorOptimizer
from blr.optim._pieces import Piece, local


class BayesBiNN(PosteriorOptimizer):
    """The Bayesian learning rule for binary networks. Weights become ±1 when it is made.

    Args:
        params: Parameters, or groups of them with their own options; biases and normalisation go
            to another optimizer.
        lr: Learning rate ρ.
        ess: Effective number N of terms whose mean is the loss.
        natural_init: |λ| at the start; the sign is that of the weight.
        relaxation: τ. The variance of gradients grows as 1/τ, their bias falls with τ.
        beta: Decay β of the average of natural gradients.
        temperature: Weight T of the entropy.
        seed: Says which noise, together with step, sample and place.
        prior: λ₀ of all weights, or of those that are not frozen, shape (P,), such as half of
            `posterior().natural` of an earlier task; 0, all signs equally probable, where missing.

    Raises:
        ValueError: If an option is out of its range, naming it, its value and the remedy.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        ess: float,
        natural_init: float = 10.0,
        relaxation: float = 1.0,
        beta: float = 0.99,
        temperature: float = 1.0,
        seed: int = 0,
        prior: Tensor | None = None,
    ) -> None:
        options = dict(lr=lr, ess=ess, natural_init=natural_init, relaxation=relaxation, beta=beta)
        super().__init__(params, options | dict(temperature=temperature, seed=seed))
        if prior is not None:
            self._set_prior(prior)

    def posterior(self) -> Bernoulli:
        """q over the weights that are not frozen, one after the other: P(θ = 1) = σ(2λ).

        Raises:
            ValueError: If all are frozen.
        """
        chosen = _state.free(self.param_groups)
        return Bernoulli(2 * torch.cat([self.state[p]["mean"].flatten() for p in chosen]))

    def _check(self, group: dict[str, Any]) -> None:
        _options.check_common(group)
        _options.number(group, "natural_init", 0, "pass such as 10, or 1 for open signs")
        _options.number(group, "relaxation", 0, "pass 1, or less for signs that are less relaxed")
        _options.number(group, "temperature", 0, "pass 1, or 0 to give up the width", closed=True)
        _options.number(group, "beta", 0, "pass such as 0.99", closed=True)
        if not group["beta"] < 1:
            raise ValueError(f"beta must be in [0, 1), got {group['beta']!r}; pass such as 0.99")

    def _initial(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(p, dtype=_state.dtype(p), requires_grad=False)}

    def _apart(self, dtype: torch.dtype) -> bool:
        return True

    def _shown(self, mean: Tensor) -> Tensor:
        return torch.where(mean >= 0, 1.0, -1.0).to(mean.dtype)

    def _unshown(self, shown: Tensor, group: dict[str, Any]) -> Tensor:
        return self._shown(shown) * group["natural_init"]

    def _visible(self, sample: Tensor, stream: int) -> Tensor:
        return sample.tanh() if stream == TRAINING else self._shown(sample)

    def _draw(self, b: Piece, group: dict[str, Any], mean: Tensor, noise: Tensor) -> Tensor:
        return _functional.binary_sample(mean, noise, group["relaxation"])

    def _product(
        self, b: Piece, group: dict[str, Any], gradient: Tensor, theta: Tensor, mean: Tensor
    ) -> Tensor:
        scale = _functional.binary_scale(mean, theta, group["relaxation"])
        return scale.mul_(gradient).mul_(group["ess"])

    def _learn(
        self, b: Piece, group: dict[str, Any], mean: Tensor, gradient: Tensor, product: Tensor
    ) -> None:
        momentum = b.read("momentum")
        _functional.bayesbinn_step_(
            mean, momentum, product, b.read("prior") if "prior" in b.states[0] else 0.0,
            lr=float(group["lr"]),
            beta=group["beta"],
            gathered=1 - group["beta"] ** (group["step"] + 1),
            temperature=group["temperature"],
        )  # fmt: skip
        b.write("momentum", momentum)

    @torch.no_grad()
    def _set_prior(self, prior: Tensor) -> None:
        every = [p for group in self.param_groups for p in group["params"]]
        params = _state.counted(prior, every, "weights")
        given = dict(zip(params, prior.split([p.numel() for p in params]), strict=True))
        for p in every:
            lam0 = given[p].reshape(p.shape) if p in given else torch.zeros(p.shape)
            self.state[p]["prior"] = lam0.to(local(p).device, _state.dtype(p))
