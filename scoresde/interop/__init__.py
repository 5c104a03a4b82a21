"""Networks and weights of other projects, and ours for them: one file a format."""

from ..sampling.fitted import FittedStep

__all__ = ["FittedStep"]
