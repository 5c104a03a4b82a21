"""Where noise is to be found, for those who make it only when they need it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Noise(NamedTuple):
    """Standard normals of one draw for a batch (B, *event): not numbers, but all that fixes them.

    Entry `element` of sample k is `philox.normals` of seed k, row k, draw k and `element`, so it can be made anywhere,
    in any order, and again. State is in device tensors, so a CUDA graph that was captured with them replays with what
    they hold then.

    Attributes:
        seeds: (1,) or (B,) int64, seed of all samples or of each, on the device of the batch.
        draws: (1,) or (B,) int64 on that device: number of a first draw.
        draw: ≥ 0, added to `draws`.
        row: row of the first sample. With one seed sample k has row `row` + k; with one seed each, all have `row`.
    """

    seeds: Tensor
    draws: Tensor
    draw: int
    row: int
