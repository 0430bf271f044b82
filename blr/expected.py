"""Expected losses: E_q[ℓ̄] as a function of the expectation parameters μ, ready to differentiate.

    E_q[ℓ̄](μ) = (N/|B|) Σ_{i∈B} E_q[ℓᵢ](μᵢ, cᵢ) − E_q[log p₀],      cᵢ = c(μ_global, xᵢ)

Example i has a local block of its own, and of the global blocks it sees the message cᵢ alone. In a
mixture of Gaussians cᵢ is the expected log-density under each component. The prior p₀ is conjugate,
so that E_q[log p₀] = ⟨λ₀, μ⟩ − A(λ₀) + E_q[log h]. The gradient of this number in any block is the
block's natural gradient: no other algebra is needed for EM, VMP and SVI.

A discrete variable may be eliminated, min_q(z) E_q[ℓ] − H(q(z)) = −log Σ_k exp(c_k); the gradient
of that are its responsibilities.

References: Hoffman, Blei, Wang & Paisley (2013), sections 2 and 3; Khan & Rue (2023), section 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blr import _tree, _validate
from blr._tree import Tree
from blr.expfam import ExponentialFamily
from blr.families.categorical import Categorical
from blr.families.dirichlet import Dirichlet
from blr.families.product import Product
from blr.likelihoods import batches

Data: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class ExpectedLoss:
    """E_q[ℓ̄](μ) that knows the examples of which it is the sum.

    μ = (μ_local, *μ_global), the local block first; without local block, μ = μ_global.

    Args:
        message: c(μ_global, data), what the examples see of the global blocks: tensors with the
            examples along their first axis.
        per_example: E_q[ℓᵢ](μ_local, c), shape (|B|,); or E_q[ℓᵢ](c) without local block.
        data: Tensors with the examples along their first axis.
        prior: E_q[−log p₀](μ_global), from `conjugate`; p₀ is flat if missing.
        start: A local block for n examples, from which inference starts; None without local block.
        num_data: N, if `data` are a minibatch of N examples; their number if missing.
        slope: The derivative of Σᵢ E_q[ℓᵢ](μ_local, c) in μ_local, for speed where it is known;
            automatic differentiation finds it if missing.
        total: Σᵢ E_q[ℓᵢ](μ) as a function of (μ, data), for speed where there is a shorter way than
            to sum over `per_example`.

    Raises:
        ValueError: If there are no examples, or not as many in each tensor.
    """

    message: Callable[[Any, Data], Tree]
    per_example: Callable[..., Tensor]
    data: Data
    prior: Callable[[Any], Tensor] | None = None
    start: Callable[[int], ExponentialFamily] | None = None
    num_data: int | None = None
    slope: Callable[[Any, Any], Tree] | None = None
    total: Callable[[Any, Data], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check that the data belong together."""
        lengths = {len(x) for x in self.data}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"data must be tensors of as many examples, at least one, got {sorted(lengths)}; "
                "put the examples along the first axis of each"
            )

    def __len__(self) -> int:
        """|B|."""
        return len(self.data[0])

    @property
    def weight(self) -> float:
        """N/|B|, what each example counts; 1 for the whole data."""
        return (self.num_data or len(self)) / len(self)

    def examples(self, mu: tuple[Tree, ...]) -> Tensor:
        """E_q[ℓᵢ](μ), without weight, shape (|B|,)."""
        if self.start is None:
            return self.per_example(self.message(mu, self.data))
        return self.per_example(mu[0], self.message(mu[1:], self.data))

    def __call__(self, mu: tuple[Tree, ...]) -> Tensor:
        """E_q[ℓ̄](μ), a number."""
        total = self.examples(mu).sum() if self.total is None else self.total(mu, self.data)
        if self.prior is None:
            return self.weight * total
        return self.weight * total + self.prior(mu if self.start is None else mu[1:])

    def minibatches(
        self, batch: int, generator: torch.Generator | None = None
    ) -> Iterator[ExpectedLoss]:
        """Unbiased expected losses of |B| = `batch` examples, each epoch in a new order.

        Args:
            batch: |B|; the last one of an epoch may have fewer, and weighs them accordingly.
            generator: Source of the orders.
        """
        N = self.num_data or len(self)
        for B in batches(len(self), batch, generator, self.data[0].device):
            data = tuple(x[B] for x in self.data)
            yield dataclasses.replace(self, data=data, num_data=N)


def conjugate(prior: ExponentialFamily) -> Callable[[Tree], Tensor]:
    """E_q[−log p₀] = A(λ₀) − ⟨λ₀, μ⟩ − E_q[log h] as a function of μ, linear for a constant h.

    Args:
        prior: p₀, of the family of q, with a base measure h that is constant.
    """
    constant = prior.log_partition() - prior.expected_log_base_measure()
    return lambda mu: constant - _tree.inner(prior.natural, mu, prior.natural_ndims)


# ---- mixtures of Gaussians ----------------------------------------------------------------------


def gaussian_mixture(
    X: Any, num_components: int, prior: Product | None = None, latent: bool = True
) -> ExpectedLoss:
    """A mixture of K Gaussians, x | z ~ N(m_z, Λ_z⁻¹) and z ~ π, with μ = (z, π, components).

        c_k = E[log π_k] + ⟨E[T_k], (½, −½xxᵀ, x, −½)⟩ − ½ D log 2π

    T = (log|Λ|, Λ, Λm, mᵀΛm) is that of the normal-Wishart family. One component needs no π: then
    μ = (components,).

    Args:
        X: Data, shape (N, D). Far from the origin, in units of their spread, xxᵀ loses digits:
            subtract the mean.
        num_components: K.
        prior: A Dirichlet and a NormalWishart with batch (K,), under any names; flat if missing,
            as for maximum likelihood.
        latent: Whether z, a Categorical with batch (N,), is a block; otherwise it is eliminated,
            μ = (π, components).

    Raises:
        ValueError: If X is no matrix, or the prior is not that of K components.
    """
    X, K = _validate.finite("X", _validate.as_float("X", X)), num_components
    if X.ndim != 2 or X.shape[1] == 0 or K < 1:
        raise ValueError(f"X must have shape (N, D), and K >= 1, got {tuple(X.shape)} and {K}")
    if prior is not None and prior.factors[-1].batch_shape != (K,):
        raise ValueError(
            f"the prior of the components must have batch ({K},), got "
            f"{tuple(prior.factors[-1].batch_shape)}; give its mean the shape (K, D)"
        )
    forms = _Squares(X) if X.shape[1] <= max(24, 4 * K) else _Forms()

    def shared(mu: Any) -> Tensor:
        *log_pi, (log_det, _, m, square) = mu
        return sum(log_pi) + 0.5 * (log_det - square) - 0.5 * m.shape[-1] * math.log(2 * math.pi)

    def message(mu: Any, data: Data) -> Tensor:
        # Examples side by side: torch is slow along a last axis that is short.
        return (shared(mu).unsqueeze(1) + forms.each(data[0], *mu[-1][1:3])).mT

    def total(mu: Any, data: Data) -> Tensor:
        z, *mu = mu
        if z.requires_grad:
            return chosen(z, message(mu, data)).sum()
        # A z that is known weighs the examples before they meet the components.
        _one_for_each(z, (len(data[0]), K - 1))
        r = torch.cat([z.mT, 1 - z.mT.sum(0, keepdim=True)])
        return -(r.sum(1) @ shared(mu) + forms.weighted(data[0], r, *mu[-1][1:3]))

    log_prior = None if prior is None else conjugate(prior)
    if K == 1 or not latent:
        return ExpectedLoss(message, eliminated, (forms.data(X),), log_prior)
    uniform = lambda n: Categorical(natural=X.new_zeros(n, K - 1))  # noqa: E731
    return ExpectedLoss(message, chosen, (forms.data(X),), log_prior, uniform, total=total)


def chosen(z: Tensor, c: Tensor) -> Tensor:
    """−Σ_k E[z = k] c_k for a Categorical z in minimal form, shape (N,)."""
    _one_for_each(z, c[:, 1:].shape)
    return -(z * (c[:, :-1] - c[:, -1:])).sum(-1) - c[:, -1]


def _one_for_each(z: Tensor, shape: tuple[int, ...]) -> None:
    if z.shape != shape:
        raise ValueError(
            f"z must have natural parameters of shape {tuple(shape)}, one member for each "
            f"example, got {tuple(z.shape)}; start from loss.start(len(loss))"
        )


class _Forms:
    # ⟨(Λ_k, Λ_k m_k), (−½xxᵀ, x)⟩ from the examples x, one component after another.

    def data(self, X: Tensor) -> Tensor:
        return X.mT.contiguous().mT

    def each(self, X: Tensor, precision: Tensor, precision_m: Tensor) -> Tensor:
        X = X.to(precision.dtype)
        squares = torch.stack([(X.mT * (L @ X.mT)).sum(0) for L in precision])
        return precision_m @ X.mT - 0.5 * squares

    def weighted(self, X: Tensor, r: Tensor, precision: Tensor, precision_m: Tensor) -> Tensor:
        X = X.to(precision.dtype)
        second = torch.stack([(w * X.mT) @ X for w in r])
        return (r @ X * precision_m).sum() - 0.5 * (second * precision).sum()


class _Squares:
    # The same from (−½xxᵀ, x) made beforehand: half the work, as long as D² numbers are few. xxᵀ
    # and Λ are symmetric: their upper triangles, those off the diagonal twice.

    def __init__(self, X: Tensor) -> None:
        self.i, self.j = torch.triu_indices(X.shape[1], X.shape[1], device=X.device)
        self.upper = self.i * X.shape[1] + self.j

    def data(self, X: Tensor) -> Tensor:
        i, j = self.i, self.j
        half = torch.where(i == j, -0.5, -1.0).to(X)
        return torch.cat([half * X.index_select(1, i) * X.index_select(1, j), X], 1)

    def each(self, duals: Tensor, precision: Tensor, precision_m: Tensor) -> Tensor:
        rows = self._rows(precision, precision_m)
        return rows @ duals.to(rows.dtype).mT

    def weighted(self, duals: Tensor, r: Tensor, precision: Tensor, precision_m: Tensor) -> Tensor:
        rows = self._rows(precision, precision_m)
        return (r @ duals.to(rows.dtype) * rows).sum()

    def _rows(self, precision: Tensor, precision_m: Tensor) -> Tensor:
        return torch.cat([precision.flatten(1).index_select(1, self.upper), precision_m], 1)


def eliminated(c: Tensor) -> Tensor:
    """−log Σ_k exp(c_k): the least that E[ℓ] − H(q(z)) can be, shape (N,)."""
    return -torch.logsumexp(c, -1)


# ---- topics -------------------------------------------------------------------------------------


def topics(
    counts: Any,
    prior: Dirichlet,
    concentration: float = 0.1,
    start: Callable[[int], Dirichlet] | None = None,
) -> ExpectedLoss:
    """Latent Dirichlet allocation: words of document d ~ Σ_k θ_dk β_k, with μ = (θ, β).

        E_q[ℓ_d] = −Σ_w n_dw log Σ_k exp(E[log θ_dk] + E[log β_kw]) − E[log Dirichlet(θ_d; α)]

    The topic of each word is eliminated. θ is a Dirichlet with batch (N,), β one with batch (K,).

    Args:
        counts: n_dw, how often word w is in document d, shape (N, V). Documents may be empty.
        prior: Of the topics β, a Dirichlet over V words with batch (K,), K ≥ 2.
        concentration: α, of the prior of θ.
        start: θ for n documents from which their inference starts; uniform if missing.

    Raises:
        ValueError: If a count is negative, or the prior does not fit.
    """
    n, alpha = _validate.finite("counts", _validate.as_float("counts", counts)), concentration
    _validate.require(n >= 0, "counts", "at least zero", n, "count the words of each document")
    K, V = prior.concentrations.shape[-2:] if prior.natural.ndim == 2 else (0, 0)
    if n.ndim != 2 or n.shape[1] != V or not len(n) or K < 2:
        raise ValueError(
            f"counts must have shape (N, V) and the prior shape (K, V) with K >= 2, got "
            f"{tuple(n.shape)} and {tuple(prior.natural.shape)}"
        )
    theta_prior = Dirichlet.from_concentrations(n.new_full((K,), alpha))
    normaliser = theta_prior.log_partition()

    def message(mu: Any, data: Data) -> Tree:
        # Words that no topic expects would underflow: measure each from its best topic.
        (log_beta,), (words, n) = mu, data
        best = log_beta.detach().amax(0)
        beta = (log_beta - best).exp().mT.contiguous().index_select(0, words.flatten())
        return beta.reshape(*words.shape, K).mT, n, normaliser - (n * best[words]).sum(-1)

    def per_example(log_theta: Tensor, c: Any) -> Tensor:
        beta, n, rest = c
        p = torch.bmm(log_theta.exp().unsqueeze(1), beta).squeeze(1)
        return rest - torch.xlogy(n, p).sum(-1) - log_theta @ theta_prior.natural

    def slope(log_theta: Tensor, c: Any) -> Tensor:
        (beta, n, _), theta = c, log_theta.exp().unsqueeze(1)
        r = theta * torch.bmm(n.unsqueeze(1) / torch.bmm(theta, beta), beta.mT)
        return -(theta_prior.natural + r.squeeze(1))

    return ExpectedLoss(
        message,
        per_example,
        _words(n),
        conjugate(Product.from_factors(beta=prior)),
        start or (lambda size: Dirichlet(natural=n.new_zeros(size, K))),
        slope=slope,
    )


def _words(counts: Tensor) -> Data:
    # The words of each document and their counts, padded by words that are there no times.
    document, word = counts.nonzero(as_tuple=True)
    lengths = document.bincount(minlength=len(counts))
    place = torch.arange(len(word), device=counts.device) - (lengths.cumsum(0) - lengths)[document]
    n = counts.new_zeros(len(counts), max(1, int(lengths.max())))
    words = torch.zeros_like(n, dtype=torch.long)
    n[document, place], words[document, place] = counts[document, word], word
    return words, n


# ---- regression ---------------------------------------------------------------------------------


def expected_softplus(mean: Tensor, variance: Tensor) -> Tensor:
    """E[log(1 + eᶠ)] for f ~ N(m, v), elementwise: the loss of logistic regression.

    By the trapezoid rule, whose error falls like exp(−2π²/h) for a step h in f, since the nearest
    singularities are at ±iπ, and like exp(−2π²/h²) for a step h in (f − m)/√v. Gauss–Hermite
    quadrature of a fixed size is off where v is large.

    Args:
        mean: m.
        variance: v > 0, same shape.
    """
    remedy = "it is what a Gaussian leaves of E[f²] − m²"
    sd = _validate.positive("variance", variance, remedy).sqrt()
    half = math.ceil(9 / 0.5 * max(1.0, sd.detach().max().item()))
    noise = torch.linspace(-9, 9, 2 * half + 1, dtype=mean.dtype, device=mean.device)
    weights = torch.softmax(-0.5 * noise**2, 0)
    f = mean.unsqueeze(-1) + sd.unsqueeze(-1) * noise
    return -torch.nn.functional.logsigmoid(-f) @ weights
