"""Networks and weights of other projects, and ours for them: one file a format."""

from ..sampling.fitted import FittedStep
from .folder import no_data
from .imported import Imported
from .pickles import ForeignFileError
from .read import read

__all__ = ["FittedStep", "ForeignFileError", "Imported", "no_data", "read"]
