r"""Inverse problems: samples of p(x_0 | y), y = A(x_0) + noise, from a denoiser of p(x_0).

    seen = Observation(y, Mask(mask), std=0.05)
    x = Sampler(DDIM(eta=1.0), steps=100)(MMPS(denoiser, seen), shape)

Take `MMPS` where its backward passes are affordable, `PiGDM` where one is, `DiffPIR` where none is, and `TwistedSMC`
around one of them where the posterior has to be right.
"""

from .gaussian import DPS, MMPS, TMPD, DiffPIR, PiGDM
from .observation import Observation
from .operators import Blur, ColourMix, Compose, DownSample, Magnitude, Mask, RandomProjection
from .particles import TwistedSMC
from .replacement import RePaint, Replacement

__all__ = [
    "DPS",
    "MMPS",
    "TMPD",
    "Blur",
    "ColourMix",
    "Compose",
    "DiffPIR",
    "DownSample",
    "Magnitude",
    "Mask",
    "Observation",
    "PiGDM",
    "RandomProjection",
    "RePaint",
    "Replacement",
    "TwistedSMC",
]
