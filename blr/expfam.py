"""Exponential families: a posterior is a point λ.

    q(θ) = h(θ) exp(⟨λ, T(θ)⟩ − A(λ)),      μ = ∇A(λ) = E_q[T(θ)],      F = ∇²A(λ) = Cov_q[T(θ)]

λ is the only state. A new family must write one method, the log-partition function A; its
derivatives give expectation parameters and the Fisher information, its Bregman divergence is the
Kullback–Leibler divergence, and learning and forgetting are λ + λ̃ and λ − λ̃.

References: Wainwright & Jordan (2008), Graphical models, exponential families, and variational
inference, section 3; Khan & Rue (2023), The Bayesian learning rule, section 2.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blr import _tree, _validate
from blr._tree import Dims, Tree


@dataclass(frozen=True, eq=False, repr=False)
class ExponentialFamily(ABC):
    """A member q_λ of an exponential family, or a batch of them.

    Args:
        natural: Natural parameters λ: one tensor, or a tuple of blocks. Each block has shape
            (*batch, *event) with the number of event axes given by `natural_ndims`.

    Raises:
        ValueError: If λ is outside the domain of A, or its shapes do not fit.
    """

    natural: Tree

    natural_ndims: ClassVar[Dims] = 0
    """Event axes of each block of λ, in the structure of λ."""

    parameters: ClassVar[tuple[str, ...]] = ("natural",)
    """The properties by which the field knows a member; shown by `repr`."""

    def __post_init__(self) -> None:
        """Convert, broadcast and check λ."""
        lam = _tree.tree_map(lambda x: _validate.as_float("natural", x), self.natural)
        try:
            shapes = set(_tree.batch_shapes(lam, self.natural_ndims))
            # torch takes microseconds to broadcast even one shape.
            batch = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"natural parameters of {type(self).__name__} do not fit together: "
                f"{_tree.structure(lam)}; pass blocks with {self.natural_ndims} event axes"
            ) from error
        blocks = iter(_validate.common(*_tree.leaves(lam)))
        events = _tree.event_shapes(lam, self.natural_ndims)
        lam = _tree.tree_map(lambda _: next(blocks).expand((*batch, *next(events))), lam)
        object.__setattr__(self, "natural", lam)
        self._validate()

    # ---- what a family writes -----------------------------------------------------------------

    @abstractmethod
    def log_partition(self) -> Tensor:
        """A(λ) = log ∫ h(θ) exp⟨λ, T(θ)⟩ dθ, shape (*batch)."""

    def sufficient_statistics(self, theta: Any) -> Tree:
        """T(θ), with the structure of `natural`; the identity unless a family says otherwise."""
        return _validate.as_float("theta", theta)

    def log_base_measure(self, theta: Any) -> Tensor:
        """log h(θ), shape (*batch) or broadcastable to it; zero unless a family overrides it."""
        return next(_tree.leaves(self.natural)).new_zeros(())

    def expected_log_base_measure(self) -> Tensor:
        """E_q[log h(θ)], shape (*batch) or broadcastable to it."""
        return next(_tree.leaves(self.natural)).new_zeros(())

    def outside_support(self, theta: Any) -> Tensor:
        """Where q has no mass, as a boolean tensor broadcastable to the shape of `log_prob`."""
        return torch.zeros((), dtype=torch.bool, device=next(_tree.leaves(self.natural)).device)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Any:
        """n draws θ ~ q, shape (n, *batch, *event).

        Args:
            n: Number of draws.
            generator: Source of randomness; the library seeds nothing.
        """
        raise TypeError(f"{type(self).__name__} has no sampler; override `sample` to draw from it")

    @classmethod
    def initial_natural(cls, mu: Tree) -> Tree:
        """A point of the domain from which Newton's method in `from_expectation` starts."""
        return _tree.tree_map(torch.zeros_like, mu)

    def _validate(self) -> None:
        """Raise ValueError where λ is outside the domain: A(λ) is not finite there."""
        _validate.finite("log_partition() of natural", self.log_partition())

    # ---- what follows from A ------------------------------------------------------------------

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of members; empty for one."""
        return next(_tree.batch_shapes(self.natural, self.natural_ndims))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of λ."""
        return next(_tree.leaves(self.natural)).dtype

    def at(self, natural: Tree) -> Self:
        """The member of the same family, with the same fixed parameters, at another λ."""
        return dataclasses.replace(self, natural=natural)

    def _at(self, natural: Tree) -> Self:
        # Without validation, so that torch.func can trace it; never leaves this file.
        q = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(q, field.name, getattr(self, field.name))
        object.__setattr__(q, "natural", natural)
        return q

    def expectation(self) -> Tree:
        """μ = E_q[T(θ)] = ∇A(λ), with the structure of `natural`."""
        return torch.func.grad(lambda lam: self._at(lam).log_partition().sum())(self.natural)

    @classmethod
    def from_expectation(cls, mu: Tree, like: Self | None = None) -> Self:
        """The member with E_q[T(θ)] = μ, by Newton's method on the convex A(λ) − ⟨λ, μ⟩.

        Args:
            mu: Expectation parameters μ, with the structure and shapes of `natural`.
            like: A member whose fixed parameters to share, for families that have them.

        Raises:
            ValueError: If no member has this expectation.
        """
        mu = _tree.tree_map(lambda x: _validate.as_float("mu", x), mu)
        dtype = next(_tree.leaves(mu)).dtype
        mu = _tree.tree_map(lambda x: _validate.finite("mu", x).double(), mu)
        start = cls.initial_natural(mu)
        q = _newton(cls(natural=start) if like is None else like.at(start), mu)
        return q.at(_tree.tree_map(lambda x: x.to(dtype), q.natural))

    def fisher(self) -> Tensor:
        """Fisher information F = ∇²A(λ) = ∂μ/∂λ, shape (*batch, d, d).

        The d coordinates are the blocks of λ in order, matrices row by row; the matrix has d²
        entries, so this is for small families.
        """
        dims, batch = self.natural_ndims, self.batch_shape
        one = _tree.tree_map(lambda x: x.reshape(-1, *x.shape[len(batch) :])[0], self.natural)

        def mu(flat: Tensor) -> Tensor:
            q = self._at(_tree.unflatten(flat, one, dims))
            return _tree.flatten(q.expectation(), dims)

        lam = _tree.flatten(self.natural, dims)
        F = torch.func.vmap(torch.func.jacfwd(mu))(lam.reshape(-1, lam.shape[-1]))
        # Forward mode may promote float32 to float64 on the way (seen in torch 2.13).
        return F.reshape(*batch, lam.shape[-1], lam.shape[-1]).to(lam.dtype)

    def entropy(self) -> Tensor:
        """H(q) = A(λ) − ⟨λ, μ⟩ − E_q[log h(θ)] in nats, shape (*batch)."""
        pairing = _tree.inner(self.natural, self.expectation(), self.natural_ndims)
        return self.log_partition() - pairing - self.expected_log_base_measure()

    def entropy_gradient(self) -> Tree:
        """∇_μH = −λ − ∇_μE_q[log h], with the structure of `natural`; −λ if h is constant.

        A family whose base measure is not constant overrides it.
        """
        return _tree.scale(-1.0, self.natural)

    def kl(self, other: Self) -> Tensor:
        """KL(q‖p) = A(λ_p) − A(λ_q) − ⟨λ_p − λ_q, μ_q⟩ in nats, the Bregman divergence of A.

        Args:
            other: The second argument p, of the same family.

        Returns:
            Shape (*batch); zero up to the rounding of A when the two agree.
        """
        self._check_same_family(other)
        difference = _tree.sub(other.natural, self.natural)
        pairing = _tree.inner(difference, self.expectation(), self.natural_ndims)
        return other.log_partition() - self.log_partition() - pairing

    def log_prob(self, theta: Any) -> Tensor:
        """log q(θ) = ⟨λ, T(θ)⟩ − A(λ) + log h(θ); −∞ outside the support."""
        # 0·∞ = 0: a block with λ = 0 does not see an infinite statistic, as in Beta(1, 1) at θ = 0.
        T = _tree.tree_map(
            lambda lam, t: torch.where((lam == 0) & torch.isinf(t), torch.zeros_like(t), t),
            self.natural,
            self.sufficient_statistics(theta),
        )
        pairing = _tree.inner(self.natural, T, self.natural_ndims)
        density = pairing - self.log_partition() + self.log_base_measure(theta)
        return torch.where(self.outside_support(theta), density.new_tensor(-torch.inf), density)

    # ---- learning and forgetting --------------------------------------------------------------

    def add(self, dual: Tree) -> Self:
        """The posterior with the dual λ̃ added: λ + λ̃. A batch of duals gives a batch."""
        return self.at(_tree.add(self.natural, dual))

    def remove(self, dual: Tree) -> Self:
        """The posterior without the dual λ̃: λ − λ̃. A batch of duals gives a batch.

        Raises:
            ValueError: If λ − λ̃ leaves the domain, as when data are removed that were never added.
        """
        try:
            return self.at(_tree.sub(self.natural, dual))
        except ValueError as error:
            raise ValueError(
                f"removing this dual leaves the domain of {type(self).__name__}: {error}. "
                "Remove only duals that were added, and not more of them than the rest can bear"
            ) from error

    def _check_same_family(self, other: ExponentialFamily) -> None:
        if type(other) is not type(self):
            raise TypeError(
                f"expected another {type(self).__name__}, got {type(other).__name__}; "
                "divergences are defined here within one family"
            )

    def __repr__(self) -> str:
        """The usual parameters, rounded."""
        shown = ", ".join(f"{name}={_show(getattr(self, name))}" for name in self.parameters)
        return f"{type(self).__name__}({shown})"


def _show(x: Tree) -> str:
    if isinstance(x, tuple):
        return "(" + ", ".join(map(_show, x)) + ")"
    if x.numel() > 9:
        return f"<{'×'.join(map(str, x.shape))}>"
    if x.ndim:
        return "[" + ", ".join(map(_show, x)) + "]"
    return f"{x.item():.4g}"


def _newton(q: ExponentialFamily, mu: Tree, tolerance: float = 1e-12, steps: int = 200) -> Any:
    # Damped Newton: halve the step until A is finite and the objective has gone down.
    dims = q.natural_ndims
    target, lam = _tree.flatten(mu, dims), _tree.flatten(q.natural, dims)

    def member(flat: Tensor) -> ExponentialFamily:
        return q._at(_tree.unflatten(flat, q.natural, dims))

    def objective(flat: Tensor) -> Tensor:
        value = member(flat).log_partition() - (flat * target).sum(-1)
        return torch.where(torch.isfinite(value), value, torch.inf)

    gap = torch.full_like(target, torch.inf)
    for _ in range(steps):
        q = member(lam)
        gap = _tree.flatten(q.expectation(), dims) - target
        if bool((gap.abs() <= tolerance * (1 + target.abs())).all()):
            return q
        step, singular = torch.linalg.solve_ex(q.fisher(), gap.unsqueeze(-1))
        if bool(singular.any()):
            break
        step = step.squeeze(-1)
        decrease = (gap * step).sum(-1)
        t, before = torch.ones_like(decrease), objective(lam)
        slack = 1e-14 * (1 + before.abs())
        for _ in range(60):
            too_far = objective(lam - t[..., None] * step) > before - 1e-4 * t * decrease + slack
            if not bool(too_far.any()):
                break
            t = torch.where(too_far, t / 2, t)
        lam = lam - t[..., None] * step
    # The last digits of A limit what can be reached; 1e-10 is what is promised.
    if bool((gap.abs() <= 1e-10 * (1 + target.abs())).all()):
        return q
    raise ValueError(
        f"no member of {type(q).__name__} with expectation {_tree.structure(mu)} was found: "
        f"Newton's method stopped where the mean is off by {gap.abs().max().item():.3g}; "
        "check that mu is inside the mean-parameter space"
    )
