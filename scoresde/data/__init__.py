"""Data in memory: raw values, how they become model data, and the volume of that map."""

from .augment import Augmentation
from .dataset import Dataset, Split
from .digits import Digits
from .files import Arrays
from .folder import ImageFolder
from .idx import Idx
from .loader import Loader
from .molecules import Molecules
from .order import EpochOrder
from .recode import centred, patched, standardised
from .sigma_max import suggest_sigma_max
from .sound import SoundFolder
from .table import Table
from .toys import Checkerboard, EightGaussians, Moons, Pinwheel, SwissRoll, Toy, toy_dataset
from .video import VideoFolder

__all__ = [
    "Arrays", "Augmentation", "Checkerboard", "Dataset", "Digits", "EightGaussians", "EpochOrder", "Idx", "ImageFolder",
    "Loader", "Molecules", "Moons", "Pinwheel", "SoundFolder", "Split", "SwissRoll", "Table", "Toy", "VideoFolder",
    "centred", "patched", "standardised", "suggest_sigma_max", "toy_dataset",
]  # fmt: skip
