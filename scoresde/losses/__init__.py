"""Training objectives: denoising score matching, couplings, classifiers, autoencoders, embedders, flow maps."""

from .autoencoder import AutoencoderLoss, VariationalAutoencoder
from .classifier import ClassifierLoss, NoisyClassifier
from .contrastive import Contrastive, ContrastiveLoss
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
    "Contrastive",
    "ContrastiveLoss",
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
