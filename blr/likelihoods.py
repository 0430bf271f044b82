"""Losses: a sum over examples, and a Gaussian prior.

    ℓ̄(θ) = (N/|B|) Σ_{i∈B} ℓ(f(θ, xᵢ), yᵢ) + ½ Σⱼ δⱼ θⱼ²

A loss is any function of θ that gives a number. One that knows its examples also gives minibatches
B, gradients of single examples, and the curvature of Gauss and Newton. The data are weighted so
that a minibatch is unbiased; the prior is never subsampled.

References: Khan & Rue (2023), sections 4.1 and 4.4; McCullagh & Nelder (1989).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blr import _validate
from blr._modules import call_with


@dataclass(frozen=True, eq=False)
class TotalLoss:
    """ℓ̄(θ): a function of θ, shape (P,), that knows the examples of which it is the sum.

    Args:
        model: f(θ, X), outputs of shape (N,) or (N, K).
        per_example_loss: ℓ(f, y), shape (N,), from outputs and targets.
        inputs: X, shape (N, …).
        targets: y, shape (N, …); a column (N, 1) of numbers or labels means the same as (N,).
        prior_precision: δ of a Gaussian prior with mean zero, a number or one for each parameter.
        num_data: N, if `inputs` are a minibatch of N examples; their number if missing.

    Raises:
        ValueError: If there are no examples, not as many inputs as targets, labels that the loss
            does not know, or no such prior.
    """

    model: Callable[[Tensor, Tensor], Tensor]
    per_example_loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    prior_precision: float | Tensor = 0.0
    num_data: int | None = None

    def __post_init__(self) -> None:
        """Check that inputs and targets belong together, and what does not depend on θ."""
        if not 0 < len(self.inputs) == len(self.targets):
            raise ValueError(
                f"inputs and targets must be as many, and at least one, got {len(self.inputs)} "
                f"and {len(self.targets)}; pass one target for each input"
            )
        if self.num_data is not None and not self.num_data >= 1:
            raise ValueError(
                f"num_data must be at least 1, got {self.num_data}; "
                "pass the number of all examples, or leave it out"
            )
        if self.per_example_loss is logistic:
            _check_labels(self.targets)
        delta = _validate.as_float("prior_precision", self.prior_precision)
        remedy = "pass a precision, or zero for no prior"
        if delta.ndim > 1:
            raise ValueError(
                "prior_precision must be a number or of shape (P,), "
                f"got shape {tuple(delta.shape)}; {remedy}"
            )
        ok = (delta >= 0) & (delta < math.inf)
        _validate.require(ok, "prior_precision", "at least zero and finite", delta, remedy)

    @property
    def weight(self) -> float:
        """N/|B|, what each example counts; 1 for the whole data."""
        return (self.num_data or len(self.inputs)) / len(self.inputs)

    def examples(self, theta: Tensor) -> Tensor:
        """ℓᵢ(θ), without weight, shape (|B|,)."""
        return self.compare(self.model(theta, self.inputs), self.targets)

    def compare(self, f: Tensor, y: Tensor) -> Tensor:
        """ℓ(f, y), shape (|B|,): one number for each example, summed over outputs or positions.

        Raises:
            ValueError: If outputs and targets do not fit; broadcasting would count what is not
                there.
        """
        if self.per_example_loss in (squared_error, logistic):
            f, y = (x.squeeze(-1) if x.ndim == 2 else x for x in (f, y))
            if f.shape != y.shape:
                raise ValueError(
                    f"{self.per_example_loss.__name__} needs one shape for both, got outputs of "
                    f"shape {tuple(f.shape)} and targets of shape {tuple(y.shape)}; reshape one"
                )
        losses = self.per_example_loss(f, y)
        if losses.ndim > 1 and losses.shape == y.shape == f.shape[: y.ndim]:
            losses = losses.flatten(1).sum(1)
        if losses.shape != y.shape[:1]:
            raise ValueError(
                f"per_example_loss must give shape {tuple(y.shape[:1])}, got "
                f"{tuple(losses.shape)} from outputs of shape {tuple(f.shape)} and targets of "
                f"shape {tuple(y.shape)}; give one number for each example"
            )
        return losses

    def __call__(self, theta: Tensor) -> Tensor:
        """ℓ̄(θ), a number."""
        return self.weight * self.examples(theta).sum() + self.prior(theta)

    def prior(self, theta: Tensor) -> Tensor:
        """½ Σⱼ δⱼ θⱼ²."""
        delta = self.prior_precision
        if isinstance(delta, Tensor) and delta.ndim and len(delta) not in (1, theta.shape[-1]):
            raise ValueError(
                f"prior_precision must have one entry for each of the {theta.shape[-1]} "
                f"parameters, got {len(delta)}; pass as many, or a number"
            )
        return 0.5 * (delta * theta**2).sum()

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
            part = copy.copy(self)  # checked already
            part.__dict__.update(inputs=self.inputs[B], targets=self.targets[B], num_data=N)
            yield part


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
            are. What it uses twice, a layer or a parameter, is one part of θ.
    """

    module: nn.Module

    def __call__(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """f(θ, X), shape (N,) or (N, K).

        Raises:
            ValueError: If layers in training mode draw random numbers or keep statistics.
        """
        _check_modes(self.module)
        parameters = dict(self.module.named_parameters())
        parts = theta.split([p.numel() for p in parameters.values()])
        values = {
            name: part.view(p.shape)
            for (name, p), part in zip(parameters.items(), parts, strict=True)
        }
        f = call_with(self.module, values, (inputs,))
        return f.squeeze(-1) if f.ndim == 2 and f.shape[-1] == 1 else f


def from_module(module: nn.Module) -> tuple[ModuleModel, Tensor]:
    """A network as a model f(θ, X), and its parameters as the vector θ.

    Args:
        module: Any module; call `eval()` on one with Dropout, or with BatchNorm.

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
    """ℓ = log(1 + eᶠ) − y f for labels y of 0 and 1, or probabilities of 1; shape (N,)."""
    # Not softplus: torch's is linear from 20 on, an error of 2e-9 in its derivative.
    return torch.logsumexp(torch.stack([f, torch.zeros_like(f)]), 0) - y * f


def softmax(f: Tensor, y: Tensor) -> Tensor:
    """ℓ = log Σₖ exp fₖ − f_y for outputs (N, K) and classes y = 0 … K − 1; shape (N,).

    Outputs of shape (N,) are those of one class, and ℓ = 0.

    Raises:
        ValueError: If y are not classes of the outputs.
    """
    if f.shape == y.shape == y.shape[:1]:
        f = f.unsqueeze(-1)
    if f.shape[:-1] != y.shape or y.is_floating_point():
        raise ValueError(
            "softmax needs outputs of shape (N, K) and integer targets of shape (N,), got outputs "
            f"of shape {tuple(f.shape)} and targets of shape {tuple(y.shape)} and {y.dtype}; "
            "pass classes 0 … K − 1"
        )
    try:
        chosen = f.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    except RuntimeError as error:
        raise ValueError(
            f"targets of softmax must be classes 0 … {f.shape[-1] - 1}, got others: {error}; "
            "count them from 0, and use logistic for one output and two classes"
        ) from error
    return torch.logsumexp(f, -1) - chosen


def _check_labels(y: Tensor) -> None:
    low, high = (x.item() for x in torch.aminmax(y))
    if not 0 <= low <= high <= 1:
        raise ValueError(
            "targets of logistic must be 0 or 1, or probabilities of 1, got labels from "
            f"{low:g} to {high:g}; pass (y + 1)/2 for labels of −1 and 1"
        )


def _check_modes(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if layer.training and (_draws(layer) or getattr(layer, "running_mean", None) is not None):
            raise ValueError(
                f"module must be a function of θ, but its part {name!r}, {type(layer).__name__}, "
                "in training mode draws random numbers or changes its statistics; call "
                "module.eval()"
            )


def _draws(layer: nn.Module) -> bool:
    """Whether it is random in training mode."""
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
