"""The noise of version 1, from 8d13689 to the release before version 2: Philox4x32-10, each row for itself.

With `use(monkeypatch)` the library draws by it, so that what it makes of an old run can be compared with the numbers of
then.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scoresde.noise import philox, rng
from scoresde.noise.philox import Streams

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)[:, None, None]
WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)[:, None, None]


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (bits, signs, normals):
        monkeypatch.setattr(philox, make.__name__, make)
    monkeypatch.setattr(rng, "VERSION", 1)


def words(where: Streams, n: int) -> np.ndarray:
    """(samples, n, 4): n blocks of 32-bit words."""
    seeds, draws = (np.repeat(part, where.rows)[:, None] for part in where[:2])
    rows = np.tile(np.arange(where.row, where.row + where.rows, dtype=np.uint64), len(where.seeds))[:, None]
    c = [x & LOW for x in np.broadcast_arrays(np.arange(n, dtype=np.uint64), rows, draws, draws >> HALF)]
    state, key = np.stack([c[0] << HALF | c[1], c[2] << HALF | c[3]]), np.stack([seeds & LOW, seeds >> HALF])
    for turn in range(10):
        bumped = ((key + np.uint64(turn) * WEYL) & LOW) << HALF
        state = state << HALF ^ bumped ^ ((state >> HALF) * MULTIPLIERS)[::-1]
    return np.stack([state[0] >> HALF, state[0] & LOW, state[1] >> HALF, state[1] & LOW], -1).astype(np.uint32)


def bits(where: Streams, n: int) -> Tensor:
    high, low = words(where, (n + 1) // 2).astype(np.uint64).reshape(-1, (n + 1) // 2 * 2, 2).transpose(2, 0, 1)
    return torch.from_numpy((high << HALF | low).view(np.int64)[:, :n].copy())


def signs(where: Streams, n: int) -> Tensor:
    octets = words(where, (n + 127) // 128).view(np.uint8).reshape(len(where.seeds) * where.rows, -1)
    return torch.from_numpy(np.unpackbits(octets, axis=1, count=n, bitorder="little")).float() * 2 - 1


def normals(where: Streams, n: int) -> Tensor:
    u, v = words(where, (n + 3) // 4).reshape(-1, (n + 3) // 4 * 2, 2).transpose(2, 0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(u.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)))
    angle = v.copy().view(np.int32).astype(np.float32) * np.float32(math.pi * 2.0**-31)
    made = np.stack([np.cos(angle) * radius, np.sin(angle) * radius], -1)
    return torch.from_numpy(made.reshape(len(made), made.shape[1] * 2)[:, :n].copy())
