"""The arguments of the kernels in csrc/kernels.cu: its structs, field by field, and how threads divide a batch.

`backend.py` has checked the tensors: they have one device, one dtype and one dense memory format (contiguous or
channels-last), and the batch comes first. A coefficient is float64 and has shape (B,) on that device or () on it or on
the CPU; None stands for 1.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_uint32, c_void_p

from torch import Tensor

from ..noise.address import Noise

BLOCK = 128  # threads
# 2^19 threads fill a GPU (an H200 holds 132 · 2048 ≈ 2^18 at once). In larger batches a thread takes up to 8 quads,
# as its start (to find the sample, read coefficients and start the noise) costs about as much as a quad.
FULL, MOST_QUADS = 2**19, 8
# `Path` in kernels.cu: how a thread reads and writes the elements of a quad.
VECTOR, ROWS, SCATTERED = range(3)
# A warp works on one sample if that has enough quads: it then reads without gaps.
WARP = 32
# Threads, and the elements of a sample, are counted in 31 bits, as `Division` needs; a grid may round up by a block.
LIMIT = 2**31 - BLOCK


class Division(ctypes.Structure):
    """n // divisor for n < 2^31 by a multiplication (Granlund & Montgomery 1994, fig. 4.1)."""

    _fields_ = (("divisor", c_uint32), ("magic", c_uint32), ("shift", c_uint32))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def by(cls, divisor: int) -> Division:
        shift = (divisor - 1).bit_length()
        return cls(divisor, 2**32 * (2**shift - divisor) // divisor + 1, shift)


class Coefficient(ctypes.Structure):
    """A number that comes with the launch, or values in device memory: one for all samples, or one for each."""

    _fields_ = (("values", c_void_p), ("stride", c_int64), ("number", c_double))

    @classmethod
    def of(cls, values: Tensor | None) -> Coefficient:
        if values is None:
            return cls(None, 0, 1.0)
        if values.ndim == 0 and values.device.type == "cpu":
            return cls(None, 0, float(values))
        return cls(values.data_ptr(), values.stride(0) if values.ndim else 0, 0.0)


class Counters(ctypes.Structure):
    """`Noise` in C."""

    _fields_ = (
        ("seeds", c_void_p),
        ("draws", c_void_p),
        ("seed_stride", c_int64),
        ("draw_stride", c_int64),
        ("draw", c_int64),
        ("row", c_uint32),
        ("row_stride", c_uint32),
    )

    @classmethod
    def of(cls, noise: Noise | None) -> Counters:
        if noise is None:
            return cls()
        seeds, draws = noise.seeds, noise.draws
        shared = seeds.numel() == 1
        return cls(
            seeds=seeds.data_ptr(),
            draws=draws.data_ptr(),
            seed_stride=0 if shared else seeds.stride(0),
            draw_stride=0 if draws.numel() == 1 else draws.stride(0),
            draw=noise.draw,
            row=noise.row,
            row_stride=1 if shared else 0,
        )


def quads_of(like: Tensor) -> int:
    """Groups of four elements in one sample of `like` (B, *event), which is not empty.

    Raises:
        ValueError: the batch or its samples are too large for one launch.
    """
    samples = like.shape[0]
    elements = like.numel() // samples
    quads = -(-elements // 4)
    if samples * quads > LIMIT or elements > LIMIT:
        raise ValueError(
            f"A kernel takes at most {LIMIT} elements a sample and, in all, {LIMIT} groups of four of them; "
            f"got {samples} samples of {elements} elements. Split the batch."
        )
    return quads


def quads_per_thread(samples: int, quads: int) -> int:
    """As many as keep the GPU full and a warp busy with each sample, from 1 to `MOST_QUADS`."""
    return max(1, min(MOST_QUADS, samples * quads // FULL, quads // WARP))


class Layout(ctypes.Structure):
    _fields_ = (
        ("samples", c_uint32),
        ("elements", c_uint32),
        ("quads", c_uint32),
        ("path", c_uint32),
        ("threads", Division),
        ("inner", Division),
        ("channels", Division),
    )

    @classmethod
    def of(cls, tensors: Sequence[Tensor], quads: int, threads: int) -> Layout:
        """The layout of tensors of one shape (B, *event) and format, with `threads` for the `quads` of a sample."""
        like = tensors[0]
        elements = like.numel() // like.shape[0]
        channels = 1 if like.is_contiguous() else like.shape[1]
        inner = elements // channels
        packet = min(4 * like.element_size(), 16)
        if inner % 4:
            path = SCATTERED
        elif channels > 1:
            path = ROWS
        else:
            path = VECTOR if all(x.data_ptr() % packet == 0 for x in tensors) else SCATTERED
        return cls(
            samples=like.shape[0],
            elements=elements,
            quads=quads,
            path=path,
            threads=Division.by(threads),
            inner=Division.by(inner),
            channels=Division.by(channels),
        )


class Lincomb(ctypes.Structure):
    _fields_ = (
        ("layout", Layout),
        ("out", c_void_p),
        ("inputs", c_void_p * 5),
        ("coefficients", Coefficient * 5),
        ("std", Coefficient),
        ("noise", Counters),
    )


class Squares(ctypes.Structure):
    _fields_ = (
        ("layout", Layout),
        ("group", c_uint32),
        ("partials", c_void_p),
        ("a", c_void_p),
        ("eps", c_void_p),
        ("noise", Counters),
    )


class Finish(ctypes.Structure):
    _fields_ = (
        ("samples", c_uint32),
        ("parts", c_uint32),
        ("group", c_uint32),
        ("measured", c_uint32),
        ("partials", c_void_p),
        ("factor", Coefficient),
        ("snr", c_double),
        ("elements", c_double),
        ("eps", c_void_p),
        ("std", c_void_p),
        ("loss", c_void_p),
    )
