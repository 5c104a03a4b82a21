"""Networks and weights of other projects, and ours for them: one file a format."""

from ..sampling.fitted import FittedStep
from .diffusers_model import DiffusersModel, beta_table
from .folder import no_data
from .imported import Imported
from .pickles import ForeignFileError
from .pipeline_model import KL, Sentences, TextToImage
from .read import read

__all__ = [
    "KL",
    "DiffusersModel",
    "FittedStep",
    "ForeignFileError",
    "Imported",
    "Sentences",
    "TextToImage",
    "beta_table",
    "no_data",
    "read",
]
