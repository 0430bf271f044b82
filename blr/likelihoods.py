"""Losses: a sum over examples, and a Gaussian prior.

    ℓ̄(θ) = (N/|B|) Σ_{i∈B} ℓ(f(θ, xᵢ), yᵢ) + ½ Σⱼ δⱼ θⱼ²

A loss is any function of θ that gives a number. One that knows its examples also gives minibatches
B, gradients of single examples, and the curvature of Gauss and Newton. The data are weighted so
that a minibatch is unbiased; the prior is never subsampled.

References: Khan & Rue (2023), sections 4.1 and 4.4; McCullagh & Nelder (1989).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blr import _validate


@dataclass(frozen=True, eq=False)
class TotalLoss:
    """ℓ̄(θ): a function of θ, shape (P,), that knows the examples of which it is the sum.

    Args:
        model: f(θ, X), outputs of shape (N,) or (N, K).
        per_example_loss: ℓ(f, y), shape (N,), from outputs and targets.
        inputs: X, shape (N, …).
        targets: y, shape (N, …).
        prior_precision: δ of a Gaussian prior with mean zero, a number or one for each parameter.
        num_data: N, if `inputs` are a minibatch of N examples; their number if missing.

    Raises:
        ValueError: If there are no examples, or not as many inputs as targets.
    """

    model: Callable[[Tensor, Tensor], Tensor]
    per_example_loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    prior_precision: float | Tensor = 0.0
    num_data: int | None = None

    def __post_init__(self) -> None:
        """Check that inputs and targets belong together."""
        if not 0 < len(self.inputs) == len(self.targets):
            raise ValueError(
                f"inputs and targets must be as many, and at least one, got {len(self.inputs)} "
                f"and {len(self.targets)}; pass one target for each input"
            )
        delta = _validate.as_float("prior_precision", self.prior_precision)
        remedy = "pass a precision, or zero for no prior"
        _validate.require(delta >= 0, "prior_precision", "at least zero", delta, remedy)

    @property
    def weight(self) -> float:
        """N/|B|, what each example counts; 1 for the whole data."""
        return (self.num_data or len(self.inputs)) / len(self.inputs)

    def examples(self, theta: Tensor) -> Tensor:
        """ℓᵢ(θ), without weight, shape (|B|,)."""
        return self.per_example_loss(self.model(theta, self.inputs), self.targets)

    def __call__(self, theta: Tensor) -> Tensor:
        """ℓ̄(θ), a number."""
        return self.weight * self.examples(theta).sum() + self.prior(theta)

    def prior(self, theta: Tensor) -> Tensor:
        """½ Σⱼ δⱼ θⱼ²."""
        return 0.5 * (self.prior_precision * theta**2).sum()

    def minibatches(
        self, batch: int, generator: torch.Generator | None = None
    ) -> Iterator[TotalLoss]:
        """Unbiased losses of |B| = `batch` examples, without end, each epoch in a new order.

        Args:
            batch: |B|; the last one of an epoch may have fewer, and weighs them accordingly.
            generator: Source of the orders.
        """
        N = self.num_data or len(self.inputs)
        for B in batches(len(self.inputs), batch, generator, self.inputs.device):
            inputs, targets = self.inputs[B], self.targets[B]
            yield dataclasses.replace(self, inputs=inputs, targets=targets, num_data=N)


def batches(
    n: int, batch: int, generator: torch.Generator | None, device: torch.device
) -> Iterator[Tensor]:
    """Indices of minibatches of n examples, without end, each epoch in a new order.

    Args:
        n: Number of examples.
        batch: Examples in a minibatch; the last one of an epoch may have fewer.
        generator: Source of the orders; it may be on another device.
        device: Where the indices are wanted.

    Raises:
        ValueError: If `batch` is less than 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    while True:
        source = device if generator is None else generator.device
        yield from torch.randperm(n, generator=generator, device=source).to(device).split(batch)


@dataclass(frozen=True, eq=False)
class ModuleModel:
    """A network as a model f(θ, X); an output of shape (N, 1) becomes one of shape (N,).

    Args:
        module: Any module; it is called with θ in the place of its parameters, which stay as they
            are.
    """

    module: torch.nn.Module

    def __call__(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """f(θ, X), shape (N,) or (N, K)."""
        parameters = dict(self.module.named_parameters())
        parts = theta.split([p.numel() for p in parameters.values()])
        values = {
            name: part.view(p.shape)
            for (name, p), part in zip(parameters.items(), parts, strict=True)
        }
        f = torch.func.functional_call(self.module, values, (inputs,))
        return f.squeeze(-1) if f.ndim == 2 and f.shape[-1] == 1 else f


def from_module(module: torch.nn.Module) -> tuple[ModuleModel, Tensor]:
    """A network as a model f(θ, X), and its parameters as the vector θ.

    Args:
        module: Any module.

    Returns:
        The model, and θ of shape (P,), a copy of the parameters in their order, without gradient.
    """
    parameters = [p.detach().reshape(-1) for p in module.parameters()]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters; there is nothing to learn")
    return ModuleModel(module), torch.cat(parameters)


def linear(theta: Tensor, inputs: Tensor) -> Tensor:
    """f = Xθ, the linear model; shape (N,)."""
    return inputs @ theta


def squared_error(f: Tensor, y: Tensor) -> Tensor:
    """ℓ = ½(y − f)², noise of variance one; shape (N,)."""
    return 0.5 * (y - f) ** 2


def logistic(f: Tensor, y: Tensor) -> Tensor:
    """ℓ = log(1 + eᶠ) − y f for labels y of 0 and 1; shape (N,)."""
    # Not softplus: torch's is linear from 20 on, an error of 2e-9 in its derivative.
    return torch.logsumexp(torch.stack([f, torch.zeros_like(f)]), 0) - y * f


def softmax(f: Tensor, y: Tensor) -> Tensor:
    """ℓ = log Σₖ exp fₖ − f_y for outputs (N, K) and classes y = 0 … K − 1; shape (N,)."""
    return torch.logsumexp(f, -1) - f.gather(-1, y.unsqueeze(-1)).squeeze(-1)
