"""Data in memory: raw values, how they become model data, and the volume of that map."""

from .augment import Augmentation
from .dataset import Dataset, Split
from .digits import Digits
from .embedder import Embedding
from .loader import Loader
from .order import EpochOrder
from .readers.arrays import Arrays
from .readers.captions import Captions
from .readers.idx import Idx
from .readers.images import ImageFolder
from .readers.molecules import Molecules
from .readers.sound import SoundFolder
from .readers.table import Table
from .readers.video import VideoFolder
from .recode import centred, haar_details, haar_low, patched, standardised, upsampled
from .sigma_max import suggest_sigma_max
from .text import Bytes, Saved, Text, Words
from .toys import Checkerboard, EightGaussians, Moons, Pinwheel, SwissRoll, Toy, toy_dataset

__all__ = [
    "Arrays", "Augmentation", "Bytes", "Captions", "Checkerboard", "Dataset", "Digits", "EightGaussians", "Embedding",
    "EpochOrder", "Idx", "ImageFolder", "Loader", "Molecules", "Moons", "Pinwheel", "Saved", "SoundFolder", "Split",
    "SwissRoll", "Table", "Text", "Toy", "VideoFolder", "Words", "centred", "haar_details", "haar_low", "patched",
    "standardised", "suggest_sigma_max", "toy_dataset", "upsampled",
]  # fmt: skip
