"""Predicting with a posterior: averages over its samples, and variances of a linearised model.

    p(y | x) = E_q[p(y | x, θ)] ≈ (1/S) Σₛ p(y | x, θₛ),     θₛ ~ q
    Var_q[f(x)] ≈ J S⁻¹ Jᵀ,                                  J = ∂f(x, m)/∂θ

Probabilities are averaged, not outputs and not logarithms. Samples go through the model together, a
chunk at a time, and memory is that of a chunk. The model computes as in `eval()`, without dropout,
and is afterwards what it was, for `torch.func` puts samples in the place of its parameters.

BatchNorm's running statistics are no parameters, and q does not know them. They are averages over
the last steps of training, at the samples that the optimizer then drew. At a sample, a unit's
variance over the data is larger than at the mean m, in expectation mᵀΣm + tr(ΣV) for inputs of
covariance Σ and a posterior of covariance V. So stored statistics suit the average of many samples,
each single one roughly, and the mean least. `statistics` estimates them anew at every sample.

References: Shen et al. (2024), Variational learning is effective for large deep networks; Khan et
al. (2019), Approximate inference turns deep networks into Gaussian processes; Izmailov et al.
(2018), Averaging weights leads to wider optima and better generalization, for BatchNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn import Module

from blr import _network
from blr._network import Inputs
from blr.expfam import ExponentialFamily
from blr.families.gaussian import DiagonalGaussian, Gaussian


def predict(
    model: Module,
    q: ExponentialFamily,
    x: Inputs,
    samples: int = 32,
    *,
    logits: bool = False,
    activation: Callable[[Tensor], Tensor] | None = None,
    statistics: Iterable[Inputs] | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 8,
) -> Tensor:
    """The predictive distribution, averaged over samples of the posterior.

    Args:
        model: The network. Parameters that q does not have, such as frozen ones, stay as they are.
        q: Posterior over its parameters: that of an optimizer, or any family over vectors θ of
            shape (P,), in the order of `model.parameters()`. An optimizer needs names,
            `IVON(model.named_parameters())` or some of them, if its posterior was saved or if this
            is a copy of the model that it trained. Without names such a posterior is refused,
            unless it is over all parameters in that order.
        x: Inputs, one batch: a tensor, a tuple of arguments, or a mapping of arguments by name.
        samples: Number S of samples.
        logits: Return log p in place of p, added up in logarithms, so that no tail is lost. Its
            softmax is p.
        activation: From outputs to what is averaged; softmax over the last axis if missing. Pass
            `torch.sigmoid` for one logit per example, and `torch.nn.Identity()` for regression.
        statistics: Batches of training inputs, from which BatchNorm's statistics are estimated at
            every sample; the stored ones if missing.
        generator: Source of randomness, on the device of q. The same seed gives the same samples
            for every batch of inputs and for every chunk.
        chunk: Samples at once; fewer need less memory. With 1 the model is called without `vmap`,
            which some models need.

    Returns:
        p or log p, of the shape of the model's outputs, at least in float32, without gradient.

    Raises:
        ValueError: If q does not fit the model, or the outputs do not fit softmax.
        TypeError: If the model does not return a tensor.
    """
    if logits and activation is not None:
        raise ValueError("logits are those of softmax; leave out activation, or take the logarithm")
    to_mean = activation or (_log_softmax if logits else _softmax)
    parts = _outputs(model, q, x, samples, to_mean, statistics, generator, chunk)
    if not logits:
        return sum(p.sum(0) for p in parts) / samples  # type: ignore[return-value]
    total = next(parts).logsumexp(0)
    for log_p in parts:
        total = torch.logaddexp(total, log_p.logsumexp(0))
    return total - math.log(samples)


def sample_outputs(
    model: Module,
    q: ExponentialFamily,
    x: Inputs,
    samples: int = 32,
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    statistics: Iterable[Inputs] | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 8,
) -> Tensor:
    """The outputs of the model at each sample, shape (S, …): how far samples disagree.

    Args:
        model: The network.
        q: Posterior over its parameters.
        x: Inputs, one batch.
        samples: Number S of samples.
        activation: Applied to the outputs at each sample; nothing if missing.
        statistics: As in `predict`.
        generator: As in `predict`, with the same samples for the same seed.
        chunk: As in `predict`.
    """
    f = activation or torch.nn.Identity()
    return torch.cat(list(_outputs(model, q, x, samples, f, statistics, generator, chunk)))


def prediction_variance(
    model: Module, q: DiagonalGaussian | Gaussian, x: Tensor, *, chunk: int = 8
) -> Tensor:
    """J S⁻¹ Jᵀ, the covariance of the outputs of the model linearised at the mean.

    Exact for models that are linear in θ; for others the limit of narrow posteriors.

    Args:
        model: The network, called as in `eval()` with one example at a time.
        q: Gaussian posterior over its parameters.
        x: Inputs, shape (N, …).
        chunk: Examples whose Jacobians, of shape (K, P), are held at once.

    Returns:
        Covariances of the K outputs of each example, shape (N, K, K); variances, shape (N,), for
        models whose outputs have shape (N,).

    Raises:
        TypeError: If q is not one Gaussian with a precision of its own.
        ValueError: If q does not fit the model, or the outputs are no vectors.
    """
    if not isinstance(q, DiagonalGaussian | Gaussian) or q.batch_shape:
        raise TypeError(f"q must be one Gaussian or DiagonalGaussian, got {q!r}; pass another")
    _at_least_one("chunk", chunk)
    model = _network.bare(model)
    place = _network.placing(model, q)

    def output(theta: Tensor, x_i: Tensor) -> Tensor:
        return _network.call(model, place(theta), x_i.unsqueeze(0))[0]

    def variance(part: Tensor) -> Tensor:
        J = vmap(jacrev(output), (None, 0))(q.mean, part)
        if J.ndim > 3:
            raise ValueError(
                f"outputs must have shape (N,) or (N, K), got {tuple(J.shape[1:-1])} for one "
                "example; flatten them"
            )
        root = _times_root(J, q)
        return root @ root.mT if J.ndim == 3 else root.square().sum(-1)

    with _network.evaluating(model), torch.no_grad():
        return torch.cat([variance(part) for part in x.split(chunk)])


def _times_root(J: Tensor, q: DiagonalGaussian | Gaussian) -> Tensor:
    """J R with RRᵀ = S⁻¹, of the shape of J."""
    if isinstance(q, DiagonalGaussian):
        return J * q.precision.rsqrt()
    rows = J.reshape(-1, J.shape[-1])
    return torch.linalg.solve_triangular(q.cholesky, rows.mT, upper=False).mT.reshape(J.shape)


# ---- samples ------------------------------------------------------------------------------------


@torch.no_grad()
def _outputs(
    model: Module,
    q: ExponentialFamily,
    x: Inputs,
    samples: int,
    activation: Callable[[Tensor], Tensor],
    statistics: Iterable[Inputs] | None,
    generator: torch.Generator | None,
    chunk: int,
) -> Iterator[Tensor]:
    """Activations of the outputs at θₛ, for a chunk of samples at a time, shape (s, …)."""
    _at_least_one("samples", samples)
    _at_least_one("chunk", chunk)
    model, batches = _network.bare(model), _batches(statistics)
    place = _network.placing(model, q)

    def output(tensors: dict[str, Tensor]) -> Tensor:
        f = activation(_network.call(model, tensors, x))
        return f.to(torch.promote_types(f.dtype, torch.float32))

    def drawn() -> dict[str, Tensor]:
        tensors = place(_draw(q, generator))
        found = {} if batches is None else _network.statistics(model, tensors, batches)
        return tensors | found

    for start in range(0, samples, chunk):
        # One at a time, so that the noise does not depend on the chunk.
        yield _together(model, output, [drawn() for _ in range(min(chunk, samples - start))], chunk)


def _draw(q: ExponentialFamily, generator: torch.Generator | None) -> Tensor:
    theta = q.sample(1, generator)
    if not isinstance(theta, Tensor) or theta.ndim != 2:
        raise TypeError(
            f"q must be one distribution over vectors of shape (P,), got {q!r}; "
            "pass the posterior() of an optimizer, or a Gaussian over the parameters"
        )
    return theta[0]


def _together(
    model: Module, output: Callable[[Any], Tensor], every: list[dict[str, Tensor]], chunk: int
) -> Tensor:
    """The outputs at some samples, which are given up as soon as they are stacked."""
    with _network.evaluating(model):
        if chunk == 1:
            return output(every[0]).unsqueeze(0)
        stacked = {name: torch.stack([tensors[name] for tensors in every]) for name in every[0]}
        every.clear()
        try:
            return vmap(output, randomness="different")(stacked)
        except RuntimeError as error:
            error.add_note("If vmap cannot follow this model, pass chunk=1, which does without it.")
            raise


def _batches(statistics: Iterable[Inputs] | None) -> Iterable[Inputs] | None:
    """Batches that can be gone through at every sample."""
    if statistics is None:
        return None
    if isinstance(statistics, Tensor):
        return [statistics]
    if isinstance(statistics, Mapping):
        raise TypeError("statistics must be batches, got a mapping; pass it in a list")
    if iter(statistics) is statistics:
        raise TypeError(
            "statistics must be batches that can be gone through at every sample, got an "
            f"iterator ({type(statistics).__name__}); pass a list"
        )
    return statistics


# ---- what is averaged ---------------------------------------------------------------------------


def _softmax(f: Tensor) -> Tensor:
    return _classes(f).softmax(-1)


def _log_softmax(f: Tensor) -> Tensor:
    return _classes(f).log_softmax(-1)


def _classes(f: Tensor) -> Tensor:
    """Outputs of two classes or more, at least in float32."""
    if f.ndim < 2 or f.shape[-1] < 2:
        raise ValueError(
            "outputs must have shape (..., K) with two classes or more for softmax, got "
            f"{tuple(f.shape)}; pass activation=torch.sigmoid or torch.nn.Identity()"
        )
    return f.to(torch.promote_types(f.dtype, torch.float32))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
