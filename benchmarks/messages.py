"""EM and stochastic variational inference at equal iterations: time against scikit-learn.

    python benchmarks/messages.py [--json FILE]

EM: a mixture of Gaussians, from one start, with `GaussianMixture` (which ends its fit with one more
E-step). SVI: topics, one pass over the documents from one random start, with
`LatentDirichletAllocation.partial_fit`; documents stop by the same rule, so both make the same
steps. What is made of the data before the first step is counted on both sides. One thread, timed
in turn.

Where a problem is small, scikit-learn is faster: our steps are tensor operations of some
microseconds each, a few hundred in an iteration of EM, which takes 0.9 ms for 150 points (0.3 of
its speed; 0.7 for 2000 points in the plane). With D = 50, K = 5 EM has 0.9 of its speed; SVI has
0.35 with minibatches of 16 short documents, and 0.6 to 0.7 with 32 or 64 long ones.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import sklearn
import torch
from _machine import in_turn, provenance, ratio, report
from sklearn.datasets import load_digits
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

import blr
import blr.data
from blr.expected import gaussian_mixture, topics
from blr.recipes import em, svi

ROUNDS = 7
STEPS = 20
"""Iterations of EM."""
ALPHA = ETA = 0.1


def mixture(n: int, d: int, classes: int) -> dict[str, Any]:
    """EM on N = n points in D = d dimensions, drawn from as many overlapping Gaussians."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((classes, d))
    spread = rng.uniform(0.5, 1.5, (classes, d))
    label = rng.integers(classes, size=n)
    X = centres[label] + spread[label] * rng.standard_normal((n, d))
    means, weights = X[rng.choice(n, classes, False)], np.full(classes, 1 / classes)
    start = blr.Product.from_factors(
        z=blr.Categorical(natural=torch.zeros(n, classes - 1).double()),
        pi=blr.Dirichlet.from_concentrations(1 + weights),
        components=blr.NormalWishart.from_parameters(means, 1.0, d + 1.0, np.eye(d)),
    )
    m_step = ("pi", "components")

    def ours() -> blr.Product:
        *_, q = blr.run(em(m_step, ("z", m_step)), gaussian_mixture(X, classes), start, STEPS)
        return q

    def theirs() -> GaussianMixture:
        model = GaussianMixture(
            classes,
            tol=0,
            reg_covar=0,
            max_iter=STEPS,
            weights_init=weights,
            means_init=means,
            precisions_init=np.stack([np.eye(d)] * classes),
        )
        return model.fit(X)

    m, expected = ours()["components"].mode[0].numpy(), theirs().means_
    times = in_turn(ROUNDS, ours=ours, theirs=theirs)
    return {
        "N": n,
        "D": d,
        "K": classes,
        "iterations": STEPS,
        "milliseconds_per_iteration": round(1e3 * min(times["ours"]) / STEPS, 2),
        "scikit_learn_over_blr": ratio(times["theirs"], times["ours"]),
        "largest_deviation": float(f"{np.abs(m - expected).max() / np.abs(expected).max():.1e}"),
    }


def documents(X: np.ndarray, classes: int, batch: int) -> dict[str, Any]:
    """One pass of SVI over counts, shape (N, V)."""
    X = X[np.random.default_rng(0).permutation(len(X))].astype(float)
    n, v = X.shape
    prior = blr.Dirichlet.from_concentrations(torch.full((classes, v), ETA, dtype=torch.float64))
    steps = -(-n // batch)

    def ours() -> blr.Product:
        rng = np.random.RandomState(0)
        beta = blr.Dirichlet.from_concentrations(rng.gamma(100.0, 0.01, (classes, v)))

        def start(size: int) -> blr.Dirichlet:
            return blr.Dirichlet.from_concentrations(rng.gamma(100.0, 0.01, (size, classes)))

        loss = topics(X, prior, ALPHA, start)
        q = blr.Product.from_factors(beta=beta)
        generator = torch.Generator().manual_seed(0)
        *_, q = blr.run(svi(), loss, q, steps, batch=batch, generator=generator)
        return q

    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()

    def theirs() -> LatentDirichletAllocation:
        model = LatentDirichletAllocation(
            classes,
            doc_topic_prior=ALPHA,
            topic_word_prior=ETA,
            learning_method="online",
            learning_offset=10.0,
            learning_decay=0.7,
            batch_size=batch,
            total_samples=n,
            random_state=0,
        )
        return model.partial_fit(X[order])

    alpha, expected = ours()["beta"].concentrations.numpy(), theirs().components_
    times = in_turn(ROUNDS, ours=ours, theirs=theirs)
    return {
        "documents": n,
        "words": v,
        "topics": classes,
        "batch": batch,
        "milliseconds_per_minibatch": round(1e3 * min(times["ours"]) / steps, 2),
        "scikit_learn_over_blr": ratio(times["theirs"], times["ours"]),
        "largest_deviation": float(f"{np.abs(alpha - expected).max() / expected.max():.1e}"),
    }


def drawn(n: int, v: int, classes: int) -> np.ndarray:
    """Counts of documents of 50 to 300 words that are drawn from topics, shape (n, v)."""
    rng = np.random.default_rng(0)
    beta = rng.dirichlet(np.full(v, 0.05), classes)
    lengths = rng.integers(50, 300, n)
    theta = rng.dirichlet(np.full(classes, 0.2), n)
    return np.stack([rng.multinomial(k, t @ beta) for k, t in zip(lengths, theta, strict=True)])


def measure() -> dict[str, Any]:
    """All sizes, on one thread, in double precision."""
    torch.set_num_threads(1)
    digits, austen = load_digits().data, blr.data.load("austen").X
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {
            **provenance(np, sklearn),
            "em": mixture(20_000, 10, 8),
            "em_iris_size": mixture(150, 4, 3),
            "em_small": mixture(2_000, 2, 3),
            "em_plane": mixture(20_000, 2, 3),
            "em_many_components": mixture(5_000, 10, 40),
            "em_many_dimensions": mixture(2_000, 50, 5),
            "svi_digits": documents(digits, 10, 100),
            "svi_digits_large_batch": documents(digits, 10, 256),
            "svi_austen": documents(austen, 10, 64),
            "svi_drawn": documents(drawn(1_500, 3_000, 10), 10, 256),
            "svi_drawn_small_batch": documents(drawn(1_500, 3_000, 10), 10, 100),
            "svi_drawn_tiny_batch": documents(drawn(1_500, 3_000, 10), 10, 32),
            "svi_small": documents(drawn(300, 200, 3), 3, 16),
            "svi_many_topics": documents(drawn(300, 5_000, 50), 50, 64),
        }


if __name__ == "__main__":
    report(__doc__, measure)
