"""Training objectives: denoising score matching, couplings of noise and data, classifiers, autoencoders, flow maps."""

from .autoencoder import AutoencoderLoss, VariationalAutoencoder
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
from .flow_map import ConsistencyLoss, FlowMapLoss, MeanFlowLoss, Pairs, SemigroupLoss
from .hybrid import HybridLoss
from .loss import Loss, Terms
from .trajectory import TrajectoryLoss

__all__ = [
    "AutoencoderLoss",
    "ClassifierLoss",
    "ConsistencyLoss",
    "DenoisingLoss",
    "DiscreteTimes",
    "EDMWeighting",
    "FlowMapLoss",
    "HybridLoss",
    "Independent",
    "Likelihood",
    "LogNormalTimes",
    "LogSNRTimes",
    "Loss",
    "MeanFlowLoss",
    "MinSNR",
    "NoisyClassifier",
    "OptimalTransport",
    "Pairs",
    "SemigroupLoss",
    "Simple",
    "StratifiedTimes",
    "Terms",
    "TrajectoryLoss",
    "UniformTimes",
    "VariationalAutoencoder",
]
