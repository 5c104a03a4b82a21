"""Folders of sound."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import whole
from ...codecs.chain import Chain
from ...codecs.codec import Codec
from ...codecs.scaling import Scaling
from ...codecs.spectrum import Spectrum
from ..dataset import Dataset, Split, given
from ..rows import Rows
from .source import existing, misfit
from .tree import listed

_SUFFIXES = (".wav", ".wave")
_OTHERS = (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".au", ".amr", ".caf")  # not read
_MANY = 10_000  # files up to which each has a checksum in a run folder
_STORED = {(1, 8): "|u1", (1, 16): "<i2", (1, 24): "<i3", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}
_EXTENSIBLE, _FASTEST = 0xFFFE, 768_000
_LOUDEST = 8.0  # of floats, whose full scale is 1
_MEASURED = 4096  # recordings that the scales of the bands are measured on
_REACH = 10  # of the filter of resample_poly, in frames of the lower rate


class Wav(NamedTuple):
    """What the header of an uncompressed WAV file says.

    Attributes:
        file: where it is.
        rate: frames a second; a frame has a value for each channel.
        channels, frames: their numbers.
        stored: as NumPy names it; "<i3" is 24 bits.
        start: first byte of the sound.
    """

    file: Path
    rate: int
    channels: int
    stored: str
    start: int
    frames: int

    @property
    def numbers(self) -> str:
        """How its values are stored, in words."""
        return f"{'floats' if self.stored[1] == 'f' else 'integers'} of {8 * int(self.stored[-1])} bits"

    @property
    def integers(self) -> bool:
        """Whether its values are kept as the integers that they are: of 8 and 16 bits."""
        return self.stored in ("|u1", "<i2")

    def read(self, frames: int) -> np.ndarray:
        """(C, frames): at most the first `frames` of the file. uint8 and int16 as they are, others as float32 of full
        scale 1.

        Raises:
            ValueError: the file has become shorter, or floats are NaN or far beyond full scale.
        """
        width, frames = int(self.stored[-1]), min(frames, self.frames)
        with self.file.open("rb") as file:
            file.seek(self.start)
            content = file.read(frames * self.channels * width)
        if len(content) < frames * self.channels * width:
            raise misfit(self.file, f"{frames:,} frames of sound", f"{len(content):,} bytes")
        if self.stored == "<i3":  # to the upper bytes of 32 bits
            padded = np.pad(np.frombuffer(content, "u1").reshape(-1, 3), ((0, 0), (1, 0)))
            values = padded.view("<i4")[:, 0]
        else:
            values = np.frombuffer(content, self.stored)
        if self.stored in ("<i3", "<i4"):
            values = values / 2.0**31
        if values.dtype.kind == "f" and not float(np.abs(values).max(initial=0)) <= _LOUDEST:
            found = f"values up to {float(np.abs(values).max()):.4g}"
            raise misfit(self.file, "floats between about -1 and 1", found, "Divide them by their full scale.")
        return values.reshape(frames, self.channels).T.astype(np.float32 if values.dtype.kind == "f" else values.dtype)


def SoundFolder(
    path: str,
    length: int,
    rate: int | None = None,
    channels: int | None = None,
    pad: bool = False,
    bands: int = 64,
    test_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
) -> Dataset:
    """WAV files of a folder, decoded once and kept in memory.

    Files lie in the folder itself (no labels), or all in its sub-folders: one class each, called by its name. Or so in
    two sub-folders train and test (validation, valid, val), of which the second is held out. Of each recording the
    first `length` frames are taken; of one that is longer nothing else is used. Integers of 8 and 16 bits stay
    integers, which the codec dequantises; 24 and 32 bits, and what is resampled or mixed, become floats of full scale
    1. Floats that are exactly 0 over a stretch, as where silence was filled in, have no density there.

    Args:
        path: the folder.
        length: frames of a sample, at its rate; a multiple of `bands`.
        rate: frames a second. Files of another rate are resampled (scipy.signal.resample_poly); None takes them as they
            are, all of one rate.
        channels: 1 mixes all channels into one, their mean; None takes them as they are, all of one number.
        pad: silence is added behind recordings that are shorter than `length`; False refuses them.
        bands: of `Spectrum`, as which the network sees the sound; 0 for the waveform itself.
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there are labels. Not used where folders
            say it.
        codec: of a model that is measured on these recordings; all are held out, or those of a folder for that.

    Returns:
        raw (N, C, length) uint8, int16 or float32, and its rate.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no WAV files, files that are damaged, compressed or too short, or of several rates, numbers of
            channels or kinds of numbers; path, expected and found are named.
    """
    length, bands = whole(length, "length in frames"), whole(bands, "bands", 0)
    folder = existing(path, folder=True)
    tree = listed(folder, _SUFFIXES, "WAV files", _OTHERS)
    wavs = [read_header(file) for file in tree.files]
    how = _Reading.of(wavs, length, rate, channels, pad)
    read = [how.sample(wav) for wav in wavs]
    samples, name = Split(torch.from_numpy(np.stack(read)), tree.labels), folder.resolve().name
    if codec is not None:
        return replace(given(name, tree.held_out(samples), codec, tree.names), rate=how.rate)
    train, test = tree.split(samples, test_fraction, seed)
    proposed, both = _proposed(train.raw, bands), (str(path), str(path))
    crc = {
        str(file.relative_to(folder)): f"{zlib.crc32(values.tobytes()):08x}"
        for file, values in zip(tree.files if len(read) <= _MANY else (), read, strict=False)
    }
    found = Dataset(name, train, test, proposed, len(tree.names), class_names=tree.names, files=both, checksums=crc)
    return replace(found, rate=how.rate, notes=how.notes(wavs))


def _proposed(raw: Tensor | Rows, bands: int) -> Codec:
    """The codec of sound (N, C, L): its waveform in [−1, 1], or the spectrum of that."""
    if raw.dtype == torch.uint8:
        scaling = Scaling(levels=256)
    elif raw.dtype == torch.int16:
        scaling = Scaling(levels=65536, offset=-32768)
    else:
        scaling = Scaling(raw_low=-1, raw_high=1, bounded=False)
    if not bands:
        return scaling
    some = raw[:: -(-len(raw) // _MEASURED)]
    return Chain((scaling, Spectrum.of(scaling.encode(some), bands)))


@dataclass(frozen=True)
class _Reading:
    """How all files of a data set become samples.

    Attributes:
        like: a file that all agree with.
        length, rate: of a sample, and frames a second.
        channels, pad: see `SoundFolder`.
        floats: samples are floats, not the integers of the files.
    """

    like: Wav
    length: int
    rate: int
    channels: int | None
    pad: bool
    floats: bool

    @classmethod
    def of(cls, wavs: Sequence[Wav], length: int, rate: int | None, channels: int | None, pad: bool) -> _Reading:
        """The one that suits all files.

        Raises:
            ValueError: a file that it does not suit.
        """
        if channels not in (None, 1):
            raise ValueError(f"channels is 1, which mixes them, or null for all that there are; got {channels}.")
        goal = wavs[0].rate if rate is None else whole(rate, "rate in frames a second")
        if goal > _FASTEST:
            raise ValueError(f"rate is at most {_FASTEST} frames a second; got {goal}.")
        changed = any(wav.rate != goal or (channels and wav.channels > 1) for wav in wavs)
        found = cls(wavs[0], length, goal, channels, pad, changed or not wavs[0].integers)
        for wav in wavs:
            found.check(wav, resample=rate is not None)
        return found

    def check(self, wav: Wav, *, resample: bool) -> None:
        """Refuses a file that does not fit."""
        as_in = f"as in {self.like.file.name}"
        if wav.rate != self.rate and not resample:
            advice = f"Give rate={self.rate} to resample what has another."
            raise misfit(wav.file, f"{self.rate} Hz {as_in}", wav.rate, advice)
        if wav.channels != self.like.channels and self.channels is None:
            advice = "Give channels=1 to mix them into one."
            raise misfit(wav.file, f"{self.like.channels} channels {as_in}", wav.channels, advice)
        if wav.stored != self.like.stored and (wav.integers or self.like.integers):
            advice = "Convert all to one: ffmpeg -i IN.wav -c:a pcm_s16le OUT.wav."
            raise misfit(wav.file, f"{self.like.numbers} {as_in}", wav.numbers, advice)
        if self.frames(wav) < self.length and not self.pad:
            advice = "Give a smaller length, or pad=true to add silence."
            raise misfit(wav.file, f"{self.length} frames at {self.rate} Hz", self.frames(wav), advice)

    def notes(self, wavs: Sequence[Wav]) -> str:
        """To how many recordings something is done, a sentence; empty if nothing is."""
        done = {
            f"are resampled from {other} to {self.rate} Hz": sum(wav.rate == other for wav in wavs)
            for other in sorted({wav.rate for wav in wavs} - {self.rate})
        }
        done[f"are cut at {self.length} frames"] = sum(self.frames(wav) > self.length for wav in wavs)
        done[f"get silence up to {self.length} frames"] = sum(self.frames(wav) < self.length for wav in wavs)
        said = ", ".join(f"{count:,} {what}" for what, count in done.items() if count)
        return f"Of {len(wavs):,} recordings {said}." if said else ""

    def frames(self, wav: Wav) -> int:
        """Of the recording at the rate of samples."""
        return -(-wav.frames * self.rate // wav.rate)

    def sample(self, wav: Wav) -> np.ndarray:
        """(C, length) of a file; no more of it is read than that needs."""
        common = math.gcd(self.rate, wav.rate)
        up, down = self.rate // common, wav.rate // common
        values = wav.read(-(-(self.length + _REACH) * down // up) + _REACH * max(1, down // up))
        silence = 128 if values.dtype == np.uint8 else 0
        if self.floats and values.dtype.kind != "f":
            full = 128 if values.dtype == np.uint8 else 32768
            values, silence = ((values.astype(np.float32) - silence) / full), 0
        if self.channels:
            values = values.mean(0, keepdims=True)
        if up != down:
            from scipy.signal import resample_poly

            values = resample_poly(values, up, down, axis=1).astype(np.float32)
        values = values[:, : self.length]
        return np.pad(values, ((0, 0), (0, self.length - values.shape[1])), constant_values=silence)


def read_header(path: str | Path) -> Wav:
    """The header of a WAV file, whose fields agree with each other and with the size of the file: a damaged one would
    give a part of the sound, or noise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else, compressed sound, a file that is cut off, or a header that is damaged; the message
            names the file, what was expected, and what was found.
    """
    path = existing(path)
    with path.open("rb") as file:
        found = dict[bytes, tuple[int, int]]()
        for name, start, size in _chunks(path, file):
            if name in found and name in (b"fmt ", b"data"):
                raise misfit(path, "one chunk of a kind", f"a second {name!r}")
            found[name] = start, size
        if missing := [name for name in (b"fmt ", b"data") if name not in found]:
            raise misfit(path, "chunks b'fmt ' and b'data'", f"no {missing[0]!r}")
        file.seek(found[b"fmt "][0])
        form = file.read(min(found[b"fmt "][1], 40))
    if len(form) < 16:
        raise misfit(path, "a format of 16 bytes or more", f"{len(form)}")
    kind, channels, rate, speed, block, bits = struct.unpack("<HHIIHH", form[:16])
    if kind == _EXTENSIBLE and len(form) == 40 and form[28:] == b"\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71":
        kind = int.from_bytes(form[24:28], "little")
    if (kind, bits) not in _STORED:
        found_kind = f"{_called(kind)} of {bits} bits"
        advice = "Convert it: ffmpeg -i IN.wav -c:a pcm_s16le OUT.wav."
        raise misfit(path, "uncompressed sound (PCM of 8, 16, 24 or 32 bits, floats of 32 or 64)", found_kind, advice)
    start, size = found[b"data"]
    agree = channels and block == channels * bits // 8 and speed == rate * block and size % block == 0
    if not agree or not 1 <= rate <= _FASTEST:
        said = f"{channels} channels of {bits} bits at {rate} Hz, blocks of {block} and {size} bytes, {speed} a second"
        raise misfit(path, f"a header whose fields agree, and 1 to {_FASTEST:,} Hz", said, "It is damaged.")
    if not size:
        raise misfit(path, "sound", "none (0 frames)")
    return Wav(path, rate, channels, _STORED[kind, bits], start, size // block)


def _chunks(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, size) of the chunks of a RIFF file, which fill it."""
    start = file.read(12)
    if len(start) < 12 or start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise misfit(path, "a WAV file (RIFF … WAVE)", f"one that begins with {start!r}")
    end, size, at = int.from_bytes(start[4:8], "little") + 8, path.stat().st_size, 12
    if end > size:
        raise misfit(path, f"{end:,} bytes, as its header says", f"{size:,}", "It is cut off or damaged.")
    while at < end:
        file.seek(at)
        head = file.read(8)
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if at + 8 + length > end or not name.isascii() or not name.decode("ascii").isprintable():
            left = max(end - at - 8, 0)
            found = f"{name!r} of {length:,} bytes at byte {at:,}, where {left:,} are left"
            raise misfit(path, "chunks that fill the file", found, "It is cut off or damaged.")
        yield name, at + 8, length
        at += 8 + length + length % 2


def _called(kind: int) -> str:
    """The name of a format of WAV files."""
    from scipy.io.wavfile import WAVE_FORMAT

    return next((known.name for known in WAVE_FORMAT if known == kind), f"format {kind:#06x}")
