"""Optimizers whose state is a posterior."""

from blr.optim._distributed import per_rank_noise
from blr.optim.bayesbinn import BayesBiNN
from blr.optim.ivon import IVON
from blr.optim.posterior import NamedGaussian
from blr.optim.vogn import VOGN

__all__ = ["IVON", "VOGN", "BayesBiNN", "NamedGaussian", "per_rank_noise"]
