"""VOGN: the posterior of a network from squared gradients of single examples.

    q = N(m, 1/(N(h + δ)))      θ ~ q,  ĥ = mean gᵢ²,  gᵢ = ∇ℓᵢ(θ),  m ← m − α ḡ/(h + δ)

The Gauss-Newton matrix is approximated by the squares of gradients of examples, which are never
negative, so that h needs no protection. The price is that each example's gradient is formed; here
in chunks, by `vmap`. The equations are in `_functional.vogn_step_`.

References: Khan et al. (2018), Fast and scalable Bayesian deep learning by weight-perturbation in
Adam; Osawa et al. (2019), Practical deep learning with Bayesian principles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import Module

from blr._modules import call_with
from blr.families.gaussian import DiagonalGaussian
from blr.optim import _functional, _options
from blr.optim._gaussian import GaussianOptimizer, gathered
from blr.optim._pieces import Piece


class VOGN(GaussianOptimizer):
    """Variational online Gauss–Newton.

    In place of `loss.backward()` call `optimizer.backward(model, per_example_loss, x, y)`, inside
    of `sampled_params(train=True)` or after `train()`. Clipping changes the slope and not the
    squares, and loss scaling has no place: losses of single examples do not underflow.

    Args:
        params: Parameters, named parameters, or groups of them with their own options.
        lr: Learning rate α.
        ess: Effective number N of examples.
        hess_init: h at the start.
        betas: Decays β₁ of the gradient and β₂ of the squares.
        weight_decay: δ, the precision of the prior divided by `ess`.
        damping: γ, added to h + δ in the step and not in the posterior.
        debias: Divide ḡ by the weight 1 − β₁ᵗ that it has gathered. The published buffer adds
            gradients without the factor 1 − β₁ and has no such division.
        seed: Says which noise, together with step, sample and place.
        prior: A Gaussian over the parameters, in place of weight decay; see `IVON`.

    Raises:
        ValueError: If an option is out of its range, naming it, its value and the remedy.
    """

    _linear = False
    _transient: ClassVar[tuple[str, ...]] = ("product", "squares")

    def __init__(
        self,
        params: Any,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        damping: float = 0.0,
        debias: bool = True,
        seed: int = 0,
        prior: DiagonalGaussian | None = None,
    ) -> None:
        options = dict(lr=lr, ess=ess, hess_init=hess_init, betas=betas, weight_decay=weight_decay)
        super().__init__(params, options | dict(damping=damping, debias=debias, seed=seed), prior)

    def backward(
        self,
        model: Module,
        per_example_loss: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        *,
        chunk_size: int = 64,
        weight: float = 1.0,
    ) -> Tensor:
        """Add the mean of the examples' gradients to `p.grad`, and note the mean of their squares.

        Args:
            model: The model, all of whose parameters get gradients, as from `loss.backward()`.
                BatchNorm in training mode mixes examples and is refused by `vmap`.
            per_example_loss: From outputs and targets, shapes (1, ...), to a loss.
            inputs: Shape (B, ...).
            targets: Shape (B, ...).
            chunk_size: Examples whose gradients are held at once.
            weight: Share of this batch, where several make up one.

        Returns:
            The mean loss, detached.

        Raises:
            ValueError: If there is no example.
        """
        if not len(inputs):
            raise ValueError(
                f"inputs must have at least one example, got shape {tuple(inputs.shape)}; skip "
                "empty batches"
            )
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = call_with(model, params, (x.unsqueeze(0),))
            return per_example_loss(outputs, y.unsqueeze(0)).sum()

        one_by_one = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")
        params = {name: p.detach() for name, p in named.items()}
        total = inputs.new_zeros(())
        for p in named.values():
            if p in self._index and "squares" not in self.state[p]:
                self.state[p]["squares"] = torch.zeros_like(p, requires_grad=False)
        for x, y in zip(inputs.split(chunk_size), targets.split(chunk_size), strict=True):
            gradients, losses = one_by_one(params, x, y)
            total = total + losses.detach().sum()
            for name, g in gradients.items():
                self._note(named[name], g, weight / len(inputs))
        return total / len(inputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the squares with them."""
        super().zero_grad(set_to_none)
        self._renew()

    def _renew(self) -> None:
        for state in self.state.values():
            state.pop("squares", None)

    @torch.no_grad()
    def _note(self, p: Tensor, gradients: Tensor, weight: float) -> None:
        mean = gradients.sum(0).mul_(weight)
        p.grad = mean if p.grad is None else p.grad.add_(mean)
        if p in self._index:
            self.state[p]["squares"].add_(gradients.square_().sum(0), alpha=weight)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        _options.number(group, "damping", 0, "pass 0 for none", closed=True)

    def _product(
        self, b: Piece, group: dict[str, Any], gradient: Tensor, theta: Tensor, mean: Tensor
    ) -> Tensor:
        if not all("squares" in state for state in b.states):
            raise RuntimeError(
                "VOGN found gradients without squares of single examples; call "
                "optimizer.backward(model, per_example_loss, x, y) in place of loss.backward()"
            )
        return b.read("squares").to(mean.dtype)

    def _learn(
        self, b: Piece, group: dict[str, Any], mean: Tensor, gradient: Tensor, product: Tensor
    ) -> None:
        momentum, hess = b.read("momentum"), b.read("hess")
        _functional.vogn_step_(
            mean, momentum, hess, gradient, product, self._prior(b, group),
            lr=float(group["lr"]),
            betas=group["betas"],
            gathered=gathered(group),
            damping=group["damping"],
        )  # fmt: skip
        b.write("momentum", momentum)
        b.write("hess", hess)
