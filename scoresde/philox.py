r"""Counter-based random bits: Philox4x32-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*).

A block of 128 bits is a function of a 64-bit key, the seed, and a 128-bit counter: where the block is needed, by the
number of the block in its sample, the row of the sample and the number of the draw. So every number of every sample can
be made alone, in any order, on any device and again, and there is no state but the number of the draw.

`csrc/scoresde_math.h` says the same in C. This is NumPy, as torch has no unsigned 64-bit arithmetic, in blocks that
stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_CACHED = 8192
"""Blocks that are made at once: their four arrays of 64 KiB fit in a second-level cache."""


class Streams(NamedTuple):
    """S samples whose numbers are wanted, uint64 (S,) each."""

    seeds: np.ndarray
    rows: np.ndarray  # below 2^32
    draws: np.ndarray


Maker = Callable[[Streams, int], Tensor]


def streams(seeds: Tensor, row: int, draws: Tensor, rows: int) -> Streams:
    """The samples of draws that stack as (…, rows), flattened.

    Args:
        seeds: (1,) or (rows,) int64.
        row: row of the first sample; with one seed sample k has row + k, with one seed each all have `row`.
        draws: int64 that broadcasts to (…, rows).
        rows: number of samples.
    """
    shape = torch.broadcast_shapes(draws.shape, (rows,))
    numbered = torch.arange(row, row + rows) if len(seeds) == 1 else torch.tensor(row)
    return Streams(*(part.expand(shape).flatten().numpy().view(np.uint64) for part in (seeds, numbered, draws)))


def bits(where: Streams, n: int) -> Tensor:
    """64-bit words (S, n) as int64, n ≥ 0 of each of S samples.

    Word j is half j % 2 of the sample's block j // 2: (w0, w1) or (w2, w3), the former the high 32 bits.
    """
    return torch.from_numpy(_words(where, (n + 1) // 2).view(np.int64)).flatten(1)[:, :n].contiguous()


def signs(where: Streams, n: int) -> Tensor:
    """−1 or +1 (S, n) in float32: number e is bit e % 32 of 32-bit word e // 32."""
    words = _words(where, (n + 127) // 128)
    words = (words << _HALF) | (words >> _HALF)  # they lie with their low half first
    octets = words.view(np.uint8).reshape(len(words), 16 * words.shape[1])
    one = np.unpackbits(octets, axis=1, count=n, bitorder="little")
    return torch.from_numpy(one).float().mul_(2).sub_(1)


def normals(where: Streams, n: int) -> Tensor:
    r"""Standard normals (S, n) in float32, n ≥ 0 of each of S samples.

    Word j = (a, b) gives numbers 2j and 2j + 1, √(−2 ln u) (cos πv, sin πv), with u = (a + ½)/2³² and v = b/2³¹, b
    signed (Box & Muller 1958). The largest that can be had is 6.76.
    """
    out = torch.empty(len(where.seeds), (n + 3) // 4, 2, 2)
    for part, words in _parts(where, out.shape[1]):
        whole = words.view(np.uint32)
        u = torch.from_numpy(whole[..., 1::2].astype(np.float32))
        radius = u.mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2).sqrt_()
        angle = torch.from_numpy(whole[..., 0::2].view(np.int32).astype(np.float32)).mul_(math.pi * 2.0**-31)
        torch.mul(angle.cos(), radius, out=out[part][..., 0])
        torch.mul(angle.sin_(), radius, out=out[part][..., 1])
    return out.flatten(1)[:, :n].contiguous()


def _words(where: Streams, n: int) -> np.ndarray:
    out = np.empty((len(where.seeds), n, 2), np.uint64)
    for part, words in _parts(where, n):
        out[part] = words
    return out


def _parts(where: Streams, n: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """(samples, blocks) and their words (samples, blocks, 2), a cacheful at a time; the array is used again."""
    seeds, rows, draws = where
    width = max(min(n, _CACHED), 1)
    height = max(_CACHED // width, 1)
    room = np.empty((4, height * width), np.uint64)
    words = np.empty(2 * height * width, np.uint64)
    for first in range(0, len(seeds), height):
        samples = slice(first, min(first + height, len(seeds)))
        for begin in range(0, n, width):
            blocks = slice(begin, min(begin + width, n))
            shape = samples.stop - first, blocks.stop - begin
            size = shape[0] * shape[1]
            a, b, p, q = (part[:size].reshape(shape) for part in room)
            np.left_shift(np.arange(begin, blocks.stop, dtype=np.uint64)[None], _HALF, out=a)
            np.bitwise_or(a, rows[samples, None], out=a)
            draw = draws[samples, None]
            b[...] = (draw << _HALF) | (draw >> _HALF)
            _rounds(a, b, p, q, seeds[samples])
            made = words[: 2 * size].reshape(*shape, 2)
            made[..., 0], made[..., 1] = a, b
            yield (samples, blocks), made


def _rounds(a: np.ndarray, b: np.ndarray, p: np.ndarray, q: np.ndarray, seeds: np.ndarray) -> None:
    """Ten rounds in place on a = (c0, c1) and b = (c2, c3), the former in the high halves; p and q are room."""
    low, high = seeds & _LOW, seeds >> _HALF
    one = len(seeds) == 1 or bool((seeds == seeds[0]).all())
    for turn in range(10):
        keys = [
            ((half + np.uint64(turn * weyl & 0xFFFFFFFF)) & _LOW) << _HALF
            for half, weyl in zip((low, high), _WEYL, strict=True)
        ]
        first, second = (key[0] if one else key[:, None] for key in keys)
        np.multiply(np.right_shift(a, _HALF, out=p), _MULTIPLIERS[0], out=p)
        np.multiply(np.right_shift(b, _HALF, out=q), _MULTIPLIERS[1], out=q)
        # (c0, c1, c2, c3) ← (high q ^ c1 ^ key, low q, high p ^ c3 ^ key', low p)
        np.bitwise_xor(np.bitwise_xor(np.left_shift(a, _HALF, out=a), first, out=a), q, out=a)
        np.bitwise_xor(np.bitwise_xor(np.left_shift(b, _HALF, out=b), second, out=b), p, out=b)
