"""Likelihoods of data under a model: along the probability-flow ODE, as bounds, and of classes by Bayes' rule."""

from .bounds import ImportanceBound, elbo, importance_weighted, ode_bound, vlb
from .budget import Budget, LikelihoodGrid
from .classify import Classification, classify
from .divergence import Exact, Hutchinson, HutchPlusPlus
from .few_steps import FlowMapSteps
from .latent import latent_bound
from .ode import LogLikelihood, bits_per_dim, log_likelihood, sample_with_log_prob
from .terms import Bound
from .tolerance import Tolerance

__all__ = [
    "Bound",
    "Budget",
    "Classification",
    "Exact",
    "FlowMapSteps",
    "HutchPlusPlus",
    "Hutchinson",
    "ImportanceBound",
    "LikelihoodGrid",
    "LogLikelihood",
    "Tolerance",
    "bits_per_dim",
    "classify",
    "elbo",
    "importance_weighted",
    "latent_bound",
    "log_likelihood",
    "ode_bound",
    "sample_with_log_prob",
    "vlb",
]
