r"""Counter-based random bits: Philox4x64-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*).

A draw of a seed is a sequence of 64-bit words, that of `np.random.Philox(key=seed, counter=draw << 64)`, and of numbers
made from them. If a row has n of these, row k has the numbers k n … k n + n − 1. So every row of every draw can be made
alone, in any order, on any device and again, and the only state is the number of the draw. The rows of a batch are one
run of words, which NumPy makes in C.

The kernels have the same function in C (`csrc/scoresde_math.h`).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)[:, None, None]
_WEYL = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)[:, None, None]
_CACHED = 2**15
"""Words made at once: few enough for a second-level cache, and enough for the calls of NumPy to cost nothing."""
_SHORT, _MANY = 64, 64
"""From so many runs on, short ones are made side by side: to start one alone takes as long as to make 500 words."""
_TINY, _TWICE, _TURN = np.float32(2.0**-32), np.float32(-2), np.float32(math.pi * 2.0**-31)


class Streams(NamedTuple):
    """Runs of rows `row`, `row` + 1, … that are wanted, `rows` of each of R seeds and draws, uint64 (R,)."""

    seeds: np.ndarray
    draws: np.ndarray
    row: int
    rows: int


Maker = Callable[[Streams, int], Tensor]


def streams(seeds: Tensor, row: int, draws: Tensor | int, rows: int) -> Streams:
    """The samples of draws that stack as (…, rows).

    Args:
        seeds: (1,) or (rows,) int64.
        row: row of the first sample; with one seed sample k has row + k, with one seed each all have `row`.
        draws: int64, (…, 1) or, with one seed each, (…, rows); or one for all.
        rows: number of samples.
    """
    rows = rows if len(seeds) == 1 else 1
    if isinstance(draws, int):  # without the calls of torch, which cost a tenth of a draw of 64 images
        return Streams(seeds.numpy().view(np.uint64), np.full(len(seeds), draws, np.uint64), row, rows)
    shape = *draws.shape[:-1], len(seeds)
    each_seed, each_draw = (part.expand(shape).flatten().numpy().view(np.uint64) for part in (seeds, draws))
    return Streams(each_seed, each_draw, row, rows)


def bits(where: Streams, n: int) -> Tensor:
    """64-bit words (samples, n) as int64, n ≥ 0 of each sample."""
    return _rows(where, _words(where, where.row * n, where.rows * n).view(np.int64), 0, n)


def signs(where: Streams, n: int) -> Tensor:
    """−1 or +1 (samples, n) in float32: number e is bit e % 64 of word e // 64."""
    begin, skipped = divmod(where.row * n, 64)
    words = _words(where, begin, -(-(skipped + where.rows * n) // 64))
    octets = words.view(np.uint8).reshape(len(words), 8 * words.shape[1])
    return _rows(where, np.unpackbits(octets, axis=1, bitorder="little"), skipped, n).float().mul_(2).sub_(1)


def normals(where: Streams, n: int) -> Tensor:
    r"""Standard normals (samples, n) in float32, n ≥ 0 of each sample.

    Words 2j and 2j + 1 give numbers 4j … 4j + 3: (r₀ cos πv₀, r₁ cos πv₁, r₀ sin πv₀, r₁ sin πv₁), r = √(−2 ln u), with
    u = (a + ½)/2³² of the low and the high half a of the one and v = b/2³¹ of the halves b, signed, of the other
    (Box & Muller 1958). The largest that can be had is 6.76.
    """
    begin, skipped = divmod(where.row * n, 4)
    quads = -(-(skipped + where.rows * n) // 4)
    out = np.empty((len(where.seeds), quads, 2), np.uint64)  # two float32 each, which move together
    for runs, part, words in _parts(where, 2 * begin, 2 * quads):
        radius = words[:, 0::2].copy().view(np.uint32).astype(np.float32)
        angle = words[:, 1::2].copy().view(np.int32).astype(np.float32)
        np.add(np.multiply(radius, _TINY, out=radius), 0.5 * _TINY, out=radius)
        np.sqrt(np.multiply(np.log(radius, out=radius), _TWICE, out=radius), out=radius)
        np.multiply(angle, _TURN, out=angle)
        made, cosine = out[runs, part.start // 2 : part.stop // 2], np.cos(angle)
        made[..., 0] = np.multiply(cosine, radius, out=cosine).view(np.uint64)
        made[..., 1] = np.multiply(np.sin(angle, out=angle), radius, out=angle).view(np.uint64)
    return _rows(where, out.reshape(len(out), 2 * quads).view(np.float32), skipped, n)


def _rows(where: Streams, numbers: np.ndarray, skipped: int, n: int) -> Tensor:
    """(samples, n) of the numbers of every run (R, …), which begin with `skipped` of others."""
    wanted = np.ascontiguousarray(numbers[:, skipped : skipped + where.rows * n])
    return torch.from_numpy(wanted.reshape(len(numbers) * where.rows, n))


def _words(where: Streams, first: int, n: int) -> np.ndarray:
    out = np.empty((len(where.seeds), n), np.uint64)
    for runs, part, words in _parts(where, first, n):
        out[runs, part] = words
    return out


def _parts(where: Streams, first: int, n: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yields words first … first + n − 1 of every run as (runs, part of the n, words), a cacheful at a time."""
    width = max(min(n, _CACHED), 1)
    height = _CACHED // max(width, 4)
    for top in range(0, len(where.seeds), height):
        runs = slice(top, top + height)
        seeds, draws = where.seeds[runs], where.draws[runs]
        side_by_side = len(seeds) >= _MANY and n < _SHORT
        for begin in range(0, n, width):
            part = slice(begin, min(begin + width, n))
            # NumPy counts on before it makes a block, so the first is that of counter 1
            block, skipped = divmod(first + begin, 4)
            made = (_side_by_side if side_by_side else _in_turn)(seeds, draws, block, skipped + part.stop - begin)
            yield runs, part, made[:, skipped:]


@functools.cache
def _source(_: int) -> tuple[np.random.Philox, Any]:
    """A generator for a thread alone, with its state, to be set: a new one takes as long as 10⁴ numbers."""
    source = np.random.Philox(key=0)
    return source, source.state


def _in_turn(seeds: np.ndarray, draws: np.ndarray, block: int, n: int) -> np.ndarray:
    """(R, n) words of every seed and draw (R,), from a block on."""
    made, (source, state) = [], _source(threading.get_ident())
    key, counter = state["state"]["key"], state["state"]["counter"]
    for seed, draw in zip(seeds, draws, strict=True):
        key[0], counter[0], counter[1] = seed, block, draw
        source.state = state
        made.append(source.random_raw(n))
    return made[0][None] if len(made) == 1 else np.stack(made)


def _side_by_side(seeds: np.ndarray, draws: np.ndarray, block: int, n: int) -> np.ndarray:
    """What `_in_turn` makes, by calls of NumPy that are for all seeds."""
    even, odd = np.zeros((2, 2, len(seeds), -(-n // 4)), np.uint64)  # words 0 and 2, words 1 and 3
    even[0], odd[0] = np.arange(even.shape[2], dtype=np.uint64) + np.uint64(block + 1), draws[:, None]
    key = np.stack([seeds, np.zeros_like(seeds)])[..., None]
    for turn in range(10):
        even, odd = (_high(even)[::-1] ^ odd ^ (key + np.uint64(turn) * _WEYL)), (even * _MULTIPLIERS)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]], -1).reshape(len(seeds), -1)[:, :n]


def _high(x: np.ndarray) -> np.ndarray:
    """The high 64 bits of x times the multipliers, by halves."""
    (high, low), (left, right) = ((of >> _HALF, of & _LOW) for of in (x, _MULTIPLIERS))
    middle = high * right + (low * right >> _HALF)
    return high * left + (middle >> _HALF) + ((low * left + (middle & _LOW)) >> _HALF)
