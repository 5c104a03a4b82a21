"""The address of a draw, for those who make its numbers only when they need them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Noise(NamedTuple):
    """Standard normals of one draw for a batch (B, *event), given not as numbers but by all that determines them.

    Entry `element` of sample k is that of `philox.normals` for the seed, row and draw of sample k, so it can be made
    anywhere, in any order, and again. The state is in device tensors, so a CUDA graph that was captured with them draws
    by what they hold when it is replayed.

    Attributes:
        seeds: (1,) or (B,) int64, one seed for all samples or one for each, on the device of the batch.
        draws: int64 on that device, the number of a first draw: (1,), or one for each seed.
        draw: ≥ 0, added to `draws`.
        row: row of the first sample. With one seed, sample k has row `row` + k; with one seed each, all have `row`.
    """

    seeds: Tensor
    draws: Tensor
    draw: int
    row: int
