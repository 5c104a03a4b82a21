"""Training objectives: denoising score matching, the coupling of noise and data, and noise-conditional classifiers."""

from .classifier import ClassifierLoss, NoisyClassifier
from .coupling import Independent, OptimalTransport
from .denoising import (
    DenoisingLoss,
    DiscreteTimes,
    EDMWeighting,
    Likelihood,
    LogNormalTimes,
    LogSNRTimes,
    MinSNR,
    Simple,
    StratifiedTimes,
    UniformTimes,
)
from .loss import Loss, Terms

__all__ = [
    "ClassifierLoss",
    "DenoisingLoss",
    "DiscreteTimes",
    "EDMWeighting",
    "Independent",
    "Likelihood",
    "LogNormalTimes",
    "LogSNRTimes",
    "Loss",
    "MinSNR",
    "NoisyClassifier",
    "OptimalTransport",
    "Simple",
    "StratifiedTimes",
    "Terms",
    "UniformTimes",
]
