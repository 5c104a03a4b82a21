r"""Inverse problems: samples of p(x_0 | y), y = A(x_0) + noise, by telling a denoiser of y.

    seen = Observation(y, Mask(mask), std=0.05)
    x = Sampler(DDIM(eta=1.0), steps=100)(MMPS(denoiser, seen), shape)

Which one? `MMPS` where its backward passes can be paid for, `PiGDM` where not, `DiffPIR` where none can;
`TwistedSMC` around one of them where the posterior has to be right.
"""

from .conjugate import conjugate_gradients
from .gaussian import (
    DPS,
    MMPS,
    TMPD,
    DiffPIR,
    Matched,
    PiGDM,
    Posterior,
    PosteriorPrediction,
)
from .observation import Linear, Measured, Observation, WithoutMeasurement
from .operators import (
    Blur,
    ColourMix,
    Compose,
    DownSample,
    Magnitude,
    Mask,
    Operator,
    RandomProjection,
    grey,
)
from .particles import Particles, TwistedSMC
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
    "Linear",
    "Magnitude",
    "Mask",
    "Matched",
    "Measured",
    "Observation",
    "Operator",
    "Particles",
    "PiGDM",
    "Posterior",
    "PosteriorPrediction",
    "RandomProjection",
    "RePaint",
    "Replacement",
    "TwistedSMC",
    "WithoutMeasurement",
    "conjugate_gradients",
    "grey",
]
