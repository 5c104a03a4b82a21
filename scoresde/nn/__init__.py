"""Networks F(x, c_noise, cond): they see a noise level as one number per sample, never an SDE."""

from ..diffusion.conditions import Cond
from .affine import Affine
from .autoencoder import Autoencoder
from .classifier import Classifier
from .conditioning import Conditioning
from .conditions import Conditions, TextEncoder
from .embedder import Embedder
from .embedding import FourierEmbedding, SinusoidalEmbedding
from .equivariant import EGNN
from .hourglass import HourglassDiT
from .log_variance import LogVariance
from .magnitude import MagnitudeUNet
from .mlp import MLP
from .modulated import ModulatedUNet
from .resample import Downsample, Upsample
from .text import FrozenText, TextTransformer
from .transformer import DiT
from .unet import UNet

__all__ = [
    "EGNN",
    "MLP",
    "Affine",
    "Autoencoder",
    "Classifier",
    "Cond",
    "Conditioning",
    "Conditions",
    "DiT",
    "Downsample",
    "Embedder",
    "FourierEmbedding",
    "FrozenText",
    "HourglassDiT",
    "LogVariance",
    "MagnitudeUNet",
    "ModulatedUNet",
    "SinusoidalEmbedding",
    "TextEncoder",
    "TextTransformer",
    "UNet",
    "Upsample",
]
