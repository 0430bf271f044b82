"""All leave-one-out sensitivities of a linear regression: time against statsmodels and refitting.

    python benchmarks/leave_one_out.py [--json FILE]

Each ratio is taken in one run on one machine; each time is the best of several repeats, and
statsmodels' own loops run once. At N = 2,000 fitting is left out on both sides; at N = 100,000 it
is counted on both. Memory is the peak of this process above what it held before, in units of X.
"""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import numpy as np
import statsmodels
import statsmodels.api as sm
from _machine import best_of, provenance, report

import blr


def data(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """A regression problem with N = n, D = d and unit noise."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d))
    return X, X @ rng.standard_normal(d) + rng.standard_normal(n)


def everything(model: blr.LinearRegression) -> None:
    """All leave-one-out quantities for all examples."""
    s = model.sensitivity()
    _ = s.leverage, s.loo_residual, s.cooks_distance, s.dfbeta, s.dfbetas
    _ = s.prediction_change, s.loo_log_score


def small() -> dict[str, Any]:
    """N = 2,000, D = 30: everything, DFBETAS included."""
    X, y = data(2_000, 30)
    model = blr.LinearRegression(prior_precision=0).fit(X, y)
    ours = best_of(lambda: everything(model), 20)
    ols = sm.OLS(y, sm.add_constant(X)).fit()

    def peers() -> None:
        influence = ols.get_influence()
        _ = influence.hat_matrix_diag, influence.cooks_distance, influence.dfbetas
        _ = influence.resid_press

    def refit() -> None:
        rows = np.arange(len(y))
        for i in rows:
            kept = rows != i
            blr.LinearRegression(prior_precision=0).fit(X[kept], y[kept])

    peer, brute = best_of(peers, 1), best_of(refit, 1)
    gap = np.abs(model.sensitivity().dfbetas - ols.get_influence().dfbetas).max()
    return {
        "N": 2_000,
        "D": 30,
        "blr_seconds": ours,
        "statsmodels_over_blr": peer / ours,
        "refitting_over_blr": brute / ours,
        "largest_difference_of_dfbetas": gap,
    }


def large() -> dict[str, Any]:
    """N = 100,000, D = 50: statsmodels' leverage and Cook's distance alone, from the data.

    statsmodels takes the pseudo-inverse, which its leverages are made of, while it fits; so the
    ratios count the fit on both sides. Without it the two do about the same arithmetic.
    """
    X, y = data(100_000, 50)
    design = sm.add_constant(X)

    def fit() -> blr.LinearRegression:
        return blr.LinearRegression(prior_precision=0).fit(X, y)

    def two(model: blr.LinearRegression) -> None:
        s = model.sensitivity()
        _ = s.leverage, s.cooks_distance

    def peers(ols: Any) -> None:
        influence = ols.get_influence()
        _ = influence.hat_matrix_diag, influence.cooks_distance

    model, ols = fit(), sm.OLS(y, design).fit()
    peer = best_of(lambda: peers(sm.OLS(y, design).fit()), 5)
    return {
        "N": 100_000,
        "D": 50,
        "statsmodels_seconds": peer,
        "statsmodels_over_blr": peer / best_of(lambda: two(fit()), 10),
        "statsmodels_over_blr_everything": peer / best_of(lambda: everything(fit()), 10),
        "without_fitting": best_of(lambda: peers(ols), 10) / best_of(lambda: two(model), 10),
    }


def huge() -> dict[str, Any]:
    """N = 1,000,000, D = 50: it works, and what it holds beside X."""
    X, y = data(1_000_000, 50)
    model = blr.LinearRegression(prior_precision=0).fit(X, y)
    before = resident()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    s = model.sensitivity()
    _ = s.leverage, s.cooks_distance, s.loo_log_score
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "N": 1_000_000,
        "D": 50,
        "blr_seconds": seconds,
        "extra_memory_over_X": (max(peak) - before) / X.nbytes,
    }


def resident() -> int:
    """Bytes of memory held by this process now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def measure() -> dict[str, Any]:
    """All sizes."""
    return {
        **provenance(np, statsmodels),
        "small": small(),
        "large": large(),
        "huge": huge(),
    }


if __name__ == "__main__":
    report(__doc__, measure)
