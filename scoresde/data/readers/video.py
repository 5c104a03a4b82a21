"""A folder of videos."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import whole
from ...codecs import Codec, Scaling
from ..dataset import Dataset, Split, count_classes, given
from .pictures import in_pixels, squared
from .source import existing, misfit, unpacked_bytes
from .tree import listed

# Which reader of FFmpeg a file is given to: what it finds inside is not asked, for a playlist may name other files.
_FORMATS = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".avi": "avi", ".mkv": "matroska", ".webm": "matroska"}
_SUFFIXES = (".gif", *_FORMATS)
_OTHERS = (".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".mts", ".3gp", ".apng", ".y4m")


def VideoFolder(
    path: str,
    frames: int = 8,
    size: int | None = None,
    stride: int = 1,
    grey: bool | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
) -> Dataset:
    """The beginnings of the videos of a folder, (C, T, H, W): GIFs, or what FFmpeg reads (MP4, MOV, AVI, MKV, WebM).

    Videos lie as the pictures of `ImageFolder` do: in the folder itself, in a sub-folder for each class, or so in
    train and test. Each is one sample: its frames 0, stride, 2 stride … Rates of frames are not looked at.

    Args:
        path: the folder.
        frames: T ≥ 1.
        size: cut each frame to its largest central square and resize it to size × size (Lanczos); None takes frames as
            they are, all of one size.
        stride: ≥ 1, from one frame that is taken to the next.
        grey: one channel (colour becomes luma), or three; None is one where no frame has a colour.
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there are labels. Not used where folders
            say it.
        codec: of a model that is measured on these videos, of 256 levels; all are held out, or those of a folder for
            that.

    Returns:
        raw (N, 1 or 3, T, H, W) uint8 in 256 levels.

    Raises:
        ImportError: pillow is missing, or for another file than a GIF PyAV.
        FileNotFoundError: no such folder.
        ValueError: no videos, mixed sizes, a video that is damaged, too short, or so large that its frames would fill
            the memory; path, expected and found are named.
    """
    frames, stride = whole(frames, "frames"), whole(stride, "stride")
    if size is not None:
        size = whole(size, "size in pixels", otherwise="None to keep frames as they are")
    folder = existing(path, folder=True)
    tree, clips = listed(folder, _SUFFIXES, "videos", _OTHERS), list[Tensor]()
    for file in tree.files:
        clip = read_video(file, frames, stride=stride, size=size)
        if clips and clip.shape != clips[0].shape:
            expected = f"{in_pixels(clips[0][:, 0])} pixels as in {tree.files[0].name}"
            raise misfit(file, expected, in_pixels(clip[:, 0]), "Give size=… to cut and resize all of them.")
        clips.append(clip)
    raw = torch.stack(clips)
    if grey or (grey is None and bool((raw == raw[:, :1]).all())):
        raw = _luma(raw)
    samples, own = Split(raw, tree.labels), folder.resolve().name
    if codec is not None:
        if codec.levels != 256:
            raise misfit(folder, f"samples of {codec}", "8-bit videos", "Give the values themselves: data=arrays.")
        return given(own, tree.held_out(samples), codec, tree.names)
    splits, classes, both = tree.split(samples, test_fraction, seed), count_classes(samples), (str(path), str(path))
    return Dataset(own, *splits, Scaling(levels=256), classes, class_names=tree.names, files=both)


def read_video(path: str | Path, frames: int, *, stride: int = 1, size: int | None = None) -> Tensor:
    """Frames 0, stride, … of a video, (3, frames, H, W) uint8; see `VideoFolder`."""
    file = existing(path)
    last = (frames - 1) * stride
    reading, taken, found = (_gif if file.suffix.lower() == ".gif" else _ffmpeg)(file, last + 1), list[np.ndarray](), 0
    try:
        for image in itertools.islice(reading, last + 1):
            if found % stride == 0:
                taken.append(np.asarray(image if size is None else squared(image, size)))
            found += 1
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything
        if str(error).startswith(str(file)):
            raise
        raise misfit(file, "a video", f"a damaged or other file ({error!s:.200})") from error
    if found <= last:
        wanted = f"at least {last + 1} frames, {frames} with stride={stride}"
        raise misfit(file, wanted, found, "Remove it, or ask for fewer frames.")
    if len({one.shape for one in taken}) > 1:
        raise misfit(file, "frames of one size", "several")
    return torch.from_numpy(np.stack(taken)).permute(3, 0, 1, 2).contiguous()


def _gif(file: Path, count: int) -> Iterator[Any]:
    """The first frames of a GIF, RGB pictures of pillow."""
    try:
        from PIL import Image, ImageSequence
    except ImportError as error:
        raise ImportError("GIFs are read with pillow: pip install 'scoresde[data]'.") from error
    with Image.open(file, formats=["GIF"]) as image:
        for frame in ImageSequence.Iterator(image):
            _bounded(file, *frame.size, count)  # nothing of this frame is unpacked yet
            yield frame.convert("RGB")


def _ffmpeg(file: Path, count: int) -> Iterator[Any]:
    """The first frames of another video, RGB pictures of pillow, turned as its header says."""
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos other than GIFs are read with PyAV: pip install 'scoresde[video]'.") from error
    with av.open(str(file), format=_FORMATS[file.suffix.lower()]) as content:
        if not content.streams.video:
            raise misfit(file, "a video", "no stream of pictures in it")
        stream = content.streams.video[0]
        _bounded(file, stream.codec_context.width, stream.codec_context.height, count)
        for frame in content.decode(stream):
            yield frame.to_image().rotate(frame.rotation, expand=True)


def _bounded(file: Path, width: int, height: int, count: int) -> None:
    """Refuses what would unpack to far more than the file: what its header says is looked at before anything else."""
    size, most = 3 * width * height * count, unpacked_bytes(file.stat().st_size)
    if size > most:
        found = f"{count} of {width} × {height} pixels, {size:,} bytes"
        raise misfit(file, f"frames of at most {most:,} bytes", found, "Ask for fewer frames, or resize it first.")


def _luma(raw: Tensor) -> Tensor:
    """(N, 1, …) uint8 of colours (N, 3, …), as pillow computes it: exact where the three are equal."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int64, device="cpu").reshape(3, *[1] * (raw.ndim - 2))
    return torch.stack([((one * weights).sum(0, keepdim=True) + 32768 >> 16).to(torch.uint8) for one in raw])
