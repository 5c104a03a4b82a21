r"""Counter-based random bits: Philox4x32-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*).

A block of 128 bits is a function of a 64-bit key, the seed, and of a 128-bit counter: the number of the block in its
sample, the row of the sample and the number of the draw. So every number of every sample can be made alone, in any
order, on any device and again, and the only state is the number of the draw.

It is NumPy, as torch has no unsigned 64-bit arithmetic, and works in pieces that stay in the processor's cache. The
kernels have the same function in C (`csrc/scoresde_math.h`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)[:, None, None]
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)[:, None, None]
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_CACHED = 8192
"""Blocks made at once: their two arrays of 128 KiB fit in a second-level cache."""
_TINY, _TWICE, _TURN = np.float32(2.0**-32), np.float32(-2), np.float32(math.pi * 2.0**-31)


class Streams(NamedTuple):
    """Seed, row and draw of S samples whose numbers are wanted, uint64 (S,) each."""

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
    # points in a plane need half a block
    out = np.empty((len(where.seeds), (n + 3) // 4, 1 if n < 3 else 2, 2), np.float32)
    for part, words in _parts(where, out.shape[1]):
        halves = words[: out.shape[2]].view(np.uint32)  # b, a, b, a, …: words lie with their low half first
        radius, angle = halves[..., 1::2].astype(np.float32), halves[..., 0::2].view(np.int32).astype(np.float32)
        np.add(np.multiply(radius, _TINY, out=radius), 0.5 * _TINY, out=radius)
        np.sqrt(np.multiply(np.log(radius, out=radius), _TWICE, out=radius), out=radius)
        np.multiply(angle, _TURN, out=angle)
        made = np.moveaxis(out[part], 2, 0)
        np.multiply(np.cos(angle), radius, out=made[..., 0])
        np.multiply(np.sin(angle, out=angle), radius, out=made[..., 1])
    return torch.from_numpy(out.reshape(len(out), math.prod(out.shape[1:]))[:, :n]).contiguous()


def _words(where: Streams, n: int) -> np.ndarray:
    out = np.empty((len(where.seeds), n, 2), np.uint64)
    for part, words in _parts(where, n):
        np.moveaxis(out[part], 2, 0)[...] = words
    return out


def _parts(where: Streams, n: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Yields (samples, blocks) and both words of each, (2, samples, blocks), a cacheful at a time in one array."""
    seeds, rows, draws = where
    shared = len(seeds) < 2 or bool((seeds == seeds[0]).all())
    width = max(min(n, _CACHED), 1)
    height = max(_CACHED // width, 1)
    room = np.empty((2, 2 * height * width), np.uint64)
    for first in range(0, len(seeds), height):
        samples = slice(first, min(first + height, len(seeds)))
        key = seeds[samples, None][: 1 if shared else None]
        draw = draws[samples, None]
        for begin in range(0, n, width):
            blocks = slice(begin, min(begin + width, n))
            shape = 2, samples.stop - first, blocks.stop - begin
            state, product = (part[: math.prod(shape)].reshape(shape) for part in room)
            np.left_shift(np.arange(begin, blocks.stop, dtype=np.uint64)[None], _HALF, out=state[0])
            np.bitwise_or(state[0], rows[samples, None], out=state[0])
            state[1] = (draw << _HALF) | (draw >> _HALF)
            _rounds(state, product, np.stack([key & _LOW, key >> _HALF]))
            yield (samples, blocks), state


def _rounds(state: np.ndarray, product: np.ndarray, key: np.ndarray) -> None:
    """Ten rounds in place on (c0, c1) and (c2, c3), the former in the high halves; `product` is room."""
    crossed = product[::-1]
    for turn in range(10):
        bumped = ((key + np.uint64(turn) * _WEYL) & _LOW) << _HALF
        np.multiply(np.right_shift(state, _HALF, out=product), _MULTIPLIERS, out=product)
        # (c0, c1) ← (high half of c2's product ^ c1 ^ key, its low half), and the same the other way round
        np.bitwise_xor(np.left_shift(state, _HALF, out=state), bumped, out=state)
        np.bitwise_xor(state, crossed, out=state)
