"""The table: learning algorithms as instances of one rule.

    algorithm  =  family  ×  approximation of ∇_μ E_q[ℓ̄]  ×  liberties  ×  schedule

Each row of `TABLE` names its parts and builds its recipe; `run` runs any of them. The tests go
through the rows and hold each against its oracle, an independent implementation or a known answer.

References: Khan & Rue (2023), The Bayesian learning rule, table 1.
"""

from __future__ import annotations

from blr.recipes._row import Row
from blr.recipes._run import Recipe, run
from blr.recipes.binary import BAYESBINN, STE, bayesbinn, ste
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
from blr.recipes.improved_rule import IMPROVED_DIAGONAL, IMPROVED_FULL, IMPROVED_GAMMA, improved
from blr.recipes.low_rank import SLANG, slang
from blr.recipes.messages import EM, NONCONJUGATE_VMP, SVI, VMP, em, ncvmp, svi, vmp
from blr.recipes.mixtures import (
    DROPOUT,
    MULTIMODAL,
    NONCONJUGATE_VI,
    dropout,
    mixture_vi,
    multimodal,
)
from blr.recipes.optimizers import (
    ADAM,
    IVON,
    OGN,
    RMSPROP,
    VADAM,
    VOGN,
    VON,
    VPROP,
    adam,
    ivon,
    ogn,
    rmsprop,
    vadam,
    vogn,
    von,
    vprop,
)

TABLE: tuple[Row, ...] = (
    GRADIENT_DESCENT,
    NEWTON,
    MULTIMODAL,
    SGD,
    RMSPROP,
    ADAM,
    DROPOUT,
    STE,
    OGN,
    VOGN,
    BAYESBINN,
    LAPLACE,
    CONJUGATE_BAYES,
    EM,
    SVI,
    VMP,
    NONCONJUGATE_VMP,
    NONCONJUGATE_VI,
    IVON,
    VON,
    VPROP,
    VADAM,
    SLANG,
    IMPROVED_FULL,
    IMPROVED_DIAGONAL,
    IMPROVED_GAMMA,
)

__all__ = [
    "Recipe",
    "Row",
    "TABLE",
    "adam",
    "bayes",
    "bayesbinn",
    "dropout",
    "em",
    "gradient_descent",
    "improved",
    "ivon",
    "laplace",
    "mixture_vi",
    "multimodal",
    "ncvmp",
    "newton",
    "ogn",
    "rmsprop",
    "run",
    "slang",
    "ste",
    "svi",
    "vadam",
    "vmp",
    "vogn",
    "von",
    "vprop",
]
