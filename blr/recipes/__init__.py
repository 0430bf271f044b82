"""The table: learning algorithms as instances of one rule.

    algorithm  =  family  ×  approximation of ∇_μ E_q[ℓ̄]  ×  liberties  ×  schedule

Each row of `TABLE` names its parts and builds its recipe; `run` runs any of them. The tests go
through the rows and hold each against its oracle, an independent implementation or a known answer.

References: Khan & Rue (2023), The Bayesian learning rule, table 1.
"""

from __future__ import annotations

from blr.recipes._row import Row
from blr.recipes._run import Recipe, run
from blr.recipes.gaussian import (
    CONJUGATE_BAYES,
    GRADIENT_DESCENT,
    LAPLACE,
    NEWTON,
    SGD,
    bayes,
    gradient_descent,
    laplace,
    newton,
)
from blr.recipes.optimizers import ADAM, OGN, RMSPROP, VOGN, adam, ogn, rmsprop, vogn

TABLE: tuple[Row, ...] = (
    GRADIENT_DESCENT,
    NEWTON,
    SGD,
    RMSPROP,
    ADAM,
    OGN,
    VOGN,
    LAPLACE,
    CONJUGATE_BAYES,
)

__all__ = [
    "Recipe",
    "Row",
    "TABLE",
    "adam",
    "bayes",
    "gradient_descent",
    "laplace",
    "newton",
    "ogn",
    "rmsprop",
    "run",
    "vogn",
]
