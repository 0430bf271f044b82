"""The Bayesian learning rule, executably: a posterior is a point λ, and data are vectors.

Learning adds natural parameters to λ; asking "what if" subtracts them. The chapters of the book are
the other half of each module.
"""

from blr import expected, gradients, likelihoods, messages, metrics, mixtures, recipes
from blr.conjugate import BetaBernoulli, DirichletMultinomial, GammaPoisson, GaussianMean
from blr.diagonal import DiagonalRule
from blr.estimators import LinearRegression
from blr.families.bernoulli import Bernoulli, SignBernoulli
from blr.families.categorical import Categorical
from blr.families.dirichlet import Beta, Dirichlet
from blr.families.exponential import Exponential
from blr.families.fixed_gaussian import FixedGaussian
from blr.families.gamma import Gamma, InverseGamma
from blr.families.gaussian import DiagonalGaussian, Gaussian
from blr.families.low_rank import LowRankGaussian
from blr.families.mixture import Mixture, StudentT
from blr.families.normal_gamma import NormalGamma
from blr.families.normal_wishart import NormalWishart
from blr.families.poisson import Poisson
from blr.families.product import Product
from blr.families.spike_and_slab import SpikeAndSlab
from blr.families.wishart import Wishart
from blr.improved import improve
from blr.optim import IVON, VOGN, BayesBiNN, NamedGaussian
from blr.predict import predict, prediction_variance, sample_outputs
from blr.recipes import TABLE, run
from blr.regression import GaussianRegression, NormalGammaRegression
from blr.rule import Rule, learn
from blr.slang import LowRankRule

__version__ = "0.1.0"

__all__ = [
    "BayesBiNN",
    "Bernoulli",
    "Beta",
    "BetaBernoulli",
    "Categorical",
    "DiagonalGaussian",
    "DiagonalRule",
    "Dirichlet",
    "DirichletMultinomial",
    "Exponential",
    "FixedGaussian",
    "Gamma",
    "GammaPoisson",
    "Gaussian",
    "GaussianMean",
    "GaussianRegression",
    "IVON",
    "InverseGamma",
    "LinearRegression",
    "LowRankGaussian",
    "LowRankRule",
    "Mixture",
    "NamedGaussian",
    "NormalGamma",
    "NormalGammaRegression",
    "NormalWishart",
    "Poisson",
    "Product",
    "Rule",
    "SignBernoulli",
    "SpikeAndSlab",
    "StudentT",
    "TABLE",
    "VOGN",
    "Wishart",
    "expected",
    "gradients",
    "improve",
    "learn",
    "likelihoods",
    "messages",
    "mixtures",
    "metrics",
    "predict",
    "prediction_variance",
    "recipes",
    "run",
    "sample_outputs",
]
