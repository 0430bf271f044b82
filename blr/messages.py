"""Message passing: the rule on a product of factors, block by block.

    λ_b ← λ_b − ρ ∇_{μ_b} ( E_q[ℓ̄] − H(q_b) )          the other blocks as they are by now

E_q[ℓ̄] is the user's function of all expectation parameters, and the messages to a block are its
gradient in that block, by automatic differentiation. Where it is linear in μ_b, ρ = 1 is the exact
minimum over q_b: variational message passing, whose bound never falls. Where it is not, this is
non-conjugate variational message passing, which may need ρ < 1. EM shows the other blocks T(θ_b) at
the mode in the place of μ_b = E[T(θ_b)]. Stochastic variational inference brings the local blocks
of a minibatch to rest and then makes one step with ρ_t in the global ones.

References: Khan & Rue (2023), sections 5.2 and 5.3; Winn & Bishop (2005), Variational message
passing; Knowles & Minka (2011); Hoffman, Blei, Wang & Paisley (2013).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blr import _tree
from blr._tree import Tree
from blr.expected import ExpectedLoss
from blr.families.gaussian import DiagonalGaussian, Gaussian
from blr.families.product import Product
from blr.rule import learn

Expected: TypeAlias = Callable[[Any], Tensor]
"""E_q[ℓ̄], from the tuple μ of the blocks' expectation parameters to a number."""
Rate: TypeAlias = float | Callable[[int], float]
"""A learning rate ρ, or ρ_t as a function of the step t = 1, 2, …"""
SPAN = 10
"""Local steps between two looks at which examples are at rest: a look takes as long as a step."""


@dataclass(frozen=True)
class Messages:
    """The rule on a `Product`, block by block.

    Args:
        order: Blocks in the order in which they learn; a tuple of names learns together, each from
            the others as they were. All blocks, one after another, if missing.
        lr: Learning rate ρ of all blocks, or of each by name (the rest have 1).
        point: Blocks of which the others see the mode.
        gradients: For blocks in which E_q[ℓ̄] is no known function of μ_b, an approximation from
            `blr.gradients`, such as `delta`: it gets the function of θ_b that puts T(θ_b) for μ_b.
        step: A step from (q_b, gradient, ρ): `learn`, or `blr.improve` to stay in the domain.
    """

    order: tuple[str | tuple[str, ...], ...] | None = None
    lr: Rate | Mapping[str, Rate] = 1.0
    point: tuple[str, ...] = ()
    gradients: Mapping[str, Callable[[Any, Any], Tree]] = field(default_factory=dict)
    step: Callable[[Any, Tree, float], Any] = learn

    def posteriors(self, losses: Iterable[Expected], q: Product) -> Iterator[Product]:
        """q after each sweep over the blocks, one sweep for each of `losses`.

        Raises:
            ValueError: If there is no such block, or a block leaves the domain of its family.
        """
        seen = self.see(q)
        for t, loss in enumerate(losses, 1):
            q, seen = self.sweep(loss, q, seen, t)
            yield q

    def see(self, q: Product) -> dict[str, Tree]:
        """What the blocks show to each other: μ_b, or T(θ_b) at the mode."""
        groups = [(g,) if isinstance(g, str) else g for g in self.order or ()]
        rates = self.lr if isinstance(self.lr, Mapping) else ()
        for name in itertools.chain(*groups, self.point, rates, self.gradients):
            _ = q[name]  # raises, and lists the blocks, if this is none of them
        return {b: _shown(b, q[b], b in self.point) for b in q.names}

    def sweep(
        self, loss: Expected, q: Product, seen: dict[str, Tree], t: int = 1
    ) -> tuple[Product, dict[str, Tree]]:
        """One step in each block of the order.

        Args:
            loss: E_q[ℓ̄](μ).
            q: Posterior.
            seen: What its blocks show to each other.
            t: Number of the step, for rates that depend on it.

        Returns:
            The new posterior, and what its blocks show.
        """
        for group in self.order or q.names:
            names = (group,) if isinstance(group, str) else group
            new = {b: self._learn(b, g, q[b], t) for b, g in self._messages(loss, q, seen, names)}
            q = q.replace(**new)
            seen = seen | {b: _shown(b, f, b in self.point) for b, f in new.items()}
        return q, seen

    def _messages(
        self, loss: Expected, q: Product, seen: dict[str, Tree], names: tuple[str, ...]
    ) -> Iterator[tuple[str, Tree]]:
        # ∇_{μ_b} E_q[ℓ̄] of the blocks of a group: where it is known, of all at once.

        def with_blocks(blocks: dict[str, Any]) -> Tensor:
            mu = seen | blocks
            value = loss(tuple(mu[b] for b in q.names))
            if value.ndim:
                raise TypeError(
                    f"E_q[ℓ̄] must be a number, got shape {tuple(value.shape)}; sum over examples"
                )
            return value

        exact = [b for b in names if b not in self.gradients]
        if exact:
            of_mu = lambda mu: with_blocks(dict(zip(exact, mu, strict=True)))  # noqa: E731
            yield from zip(exact, _gradient(of_mu, tuple(seen[b] for b in exact)), strict=True)
        for b in names:
            if b in self.gradients:
                T = q[b].sufficient_statistics
                yield b, self.gradients[b](lambda theta, b=b, T=T: with_blocks({b: T(theta)}), q[b])

    def _learn(self, name: str, gradient: Tree, q: Any, t: int) -> Any:
        rate = self.lr.get(name, 1.0) if isinstance(self.lr, Mapping) else self.lr
        try:
            return self.step(q, gradient, _rate(rate, t))
        except ValueError as error:
            raise ValueError(
                f"block {name!r}: {error}. If the block is conjugate, what is missing is a proper "
                "prior: the other blocks leave it too little data, or data that do not vary"
            ) from error


@dataclass(frozen=True)
class Stochastic:
    """Minibatches: their local blocks to rest, then one step of the rule in the global ones.

    Runs on an `ExpectedLoss` from a `Product` of the global blocks, with `batch=…` on minibatches.
    Each of them gets local blocks of its own, which start anew.

    Args:
        globally: The step in the global blocks, with its learning rate ρ_t; they learn together
            unless its order says otherwise.
        local_steps: Most steps with ρ = 1 in the local blocks.
        local_tolerance: An example is at rest when the mean change of its λ is less than this.
        name: Name of the local block.
    """

    globally: Messages = Messages()
    local_steps: int = 100
    local_tolerance: float = 1e-3
    name: str = "local"

    def posteriors(self, losses: Iterable[ExpectedLoss], q: Product) -> Iterator[Product]:
        """The global blocks after each minibatch, one for each of `losses`.

        Raises:
            TypeError: If a loss does not know its examples.
            ValueError: If a block leaves the domain of its family.
        """
        recipe, seen = self.globally, self.globally.see(q)
        if recipe.order is None:
            recipe = dataclasses.replace(recipe, order=(q.names,))
        for t, loss in enumerate(losses, 1):
            if not isinstance(loss, ExpectedLoss):
                raise TypeError(f"minibatches need an ExpectedLoss, got {type(loss).__name__}")
            local = () if loss.start is None else (self._settle(loss, seen).expectation(),)
            given = lambda mu: loss((*local, *mu))  # noqa: B023, E731
            q, seen = recipe.sweep(given, q, seen, t)
            yield q

    def complete(self, loss: ExpectedLoss, q: Product) -> Product:
        """The product of the local block, at rest, of the examples of a loss and the global ones.

        The examples need not be among those that the global blocks have learned from.

        Raises:
            ValueError: If the loss has no local block.
        """
        if loss.start is None:
            raise ValueError("the loss has no local block, so q is complete as it is")
        local = self._settle(loss, self.globally.see(q))
        blocks = dict(zip(q.names, q.factors, strict=True))
        return Product.from_factors(**{self.name: local}, **blocks)

    def _settle(self, loss: ExpectedLoss, seen: dict[str, Tree]) -> Any:
        assert loss.start is not None
        local, c = loss.start(len(loss)), loss.message(tuple(seen.values()), loss.data)
        slope = loss.slope or (lambda mu, c: _gradient(lambda m: loss.per_example(m, c), mu))
        rest, index = local.natural, torch.arange(len(loss), device=loss.data[0].device)
        for first in range(0, self.local_steps, SPAN):
            path = [local]
            for _ in range(first, min(first + SPAN, self.local_steps)):
                path.append(learn(path[-1], slope(path[-1].expectation(), c)))
            lam = _tree.tree_map(lambda *x: torch.stack(x), *(q.natural for q in path))
            steps = _tree.sub(_tree.take(lam, slice(1, None)), _tree.take(lam, slice(-1)))
            moves = _tree.flatten(steps, local.natural_ndims).abs().mean(-1) >= self.local_tolerance
            # The first step that is no move is the last that an example makes.
            made = moves.cumprod(0).sum(0)
            last = (made + 1).clamp_max(len(moves))
            each = torch.arange(len(last), device=last.device)
            rest = _put(rest, index, _tree.take(lam, (last, each)))
            local, moving = path[-1], made == len(moves)
            if not moving.any():
                break
            if not moving.all():
                local, c = local.at(_tree.take(local.natural, moving)), _tree.take(c, moving)
                index = index[moving]
        return local.at(rest)


def elbo(loss: Expected, q: Product, point: tuple[str, ...] = ()) -> Tensor:
    """The bound H(q) − E_q[ℓ̄] on the log evidence, a number.

    Args:
        loss: E_q[ℓ̄](μ).
        q: Posterior.
        point: Blocks taken at their mode, without entropy: the bound that EM climbs.
    """
    seen = Messages(point=point).see(q)
    entropies = (q[b].entropy().sum() for b in q.names if b not in point)
    return sum(entropies) - loss(tuple(seen.values()))


def robbins_monro(offset: float = 10.0, decay: float = 0.7) -> Callable[[int], float]:
    """ρ_t = (τ₀ + t)^−κ: Σρ_t = ∞ and Σρ_t² < ∞ for ½ < κ ≤ 1.

    Args:
        offset: τ₀ ≥ 0, which slows the first steps.
        decay: κ, in (½, 1].

    Raises:
        ValueError: If κ is not in (½, 1], or τ₀ is negative.
    """
    if not 0.5 < decay <= 1 or offset < 0:
        raise ValueError(
            f"decay must be in (0.5, 1] and offset at least 0, got {decay:g} and {offset:g}; "
            "other rates do not converge"
        )
    return lambda t: (offset + t) ** -decay


def _rate(rate: Rate, t: int) -> float:
    return rate(t) if callable(rate) else rate


def _shown(name: str, q: Any, point: bool) -> Tree:
    if not point:
        return q.expectation()
    if isinstance(q, Gaussian | DiagonalGaussian):
        return q.sufficient_statistics(q.mean)
    if not hasattr(type(q), "mode"):
        raise TypeError(f"block {name!r}: {type(q).__name__} has no mode; leave it out of `point`")
    try:
        return q.sufficient_statistics(q.mode)
    except ValueError as error:
        raise ValueError(f"block {name!r} has no mode to show: {error}") from error


def _gradient(f: Callable[[Any], Tensor], mu: Tree) -> Tree:
    # ∂(Σ f)/∂μ. torch.func.grad takes twice as long, and this is called for every local step.
    with torch.enable_grad():
        mu = _tree.tree_map(lambda x: x.detach().requires_grad_(), mu)
        value = f(mu).sum()
    if not value.requires_grad:
        return _tree.tree_map(torch.zeros_like, mu)
    parts = iter(torch.autograd.grad(value, tuple(_tree.leaves(mu)), materialize_grads=True))
    return _tree.tree_map(lambda _: next(parts), mu)


def _put(a: Tree, index: Tensor, values: Tree) -> Tree:
    return _tree.tree_map(lambda x, y: x.index_copy(0, index, y), a, values)
