"""Networks and weights of other projects, and ours for them: one file a format."""

from ..sampling.fitted import FittedStep
from .diffusers_model import DiffusersModel, beta_table
from .folder import no_data
from .imported import Imported
from .pickles import ForeignFileError
from .read import read

__all__ = ["DiffusersModel", "FittedStep", "ForeignFileError", "Imported", "beta_table", "no_data", "read"]
