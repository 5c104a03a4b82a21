"""Networks F(x, c_noise, cond): they see a noise level as one number per sample, never an SDE."""

from .conditioning import Cond, Conditioning
from .embedding import FourierEmbedding, SinusoidalEmbedding
from .mlp import MLP
from .resample import Downsample, Upsample
from .unet import UNet

__all__ = [
    "MLP", "Cond", "Conditioning", "Downsample", "FourierEmbedding", "SinusoidalEmbedding", "UNet",
    "Upsample",
]  # fmt: skip
