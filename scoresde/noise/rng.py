"""Randomness as an argument: one stream, or one stream per sample."""

from __future__ import annotations

import copy
import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from . import draws, philox
from .address import Noise
from .position import DevicePosition, Position
from .switch import enabled

VERSION = 2
"""Of the numbers that a seed stands for: 1 was Philox4x32, rows by themselves; 2 is `philox`."""
_AHEAD = 2**15
"""Small draws are made ahead, so many words at once, because a call of NumPy costs as much as thousands of numbers."""


class Rng:
    r"""A source of random numbers that is passed, saved and restored like any other value.

    Numbers are made by counting (`philox`): each is a function of a seed, the number of the draw, its row, its place in
    the row and the size of that, alone. So a seed means the same on every device, and

    * `Rng(seed)` numbers its rows: sample k is the same in a batch of any size;
    * `Rng(seed).share(rank, world)` makes the rows of one process only, so a batch has the same noise whether it is
      divided among processes or not;
    * `Rng(seeds=[…])` gives every sample a seed of its own: its noise depends on that seed and on the number of draws
      before, never on its neighbours, so a sample can be made again alone (it is row 0 of `Rng(seed)`).

    Normals have the precision of float32, in float64 too.

    Args:
        seed: seed of the single stream, an integer in [0, 2^63).
        seeds: one seed per sample; exclusive with `seed`.

    Raises:
        ValueError: neither or both are given, there are no seeds, or a seed is out of range.
    """

    def __init__(self, seed: int | None = None, *, seeds: Sequence[int] | None = None):
        if (seed is None) == (seeds is None):
            raise ValueError(f"Rng needs a seed or a list of seeds, one of the two; got seed={seed}, seeds={seeds}.")
        if seeds is not None and len(seeds) == 0:
            raise ValueError("Rng(seeds=[]) has no stream; give one seed per sample.")
        values = [whole(value, "A seed (below 2^63)", 0) for value in ([seed] if seeds is None else seeds)]
        if max(values) >= 2**63:
            raise ValueError(f"A seed is a whole number below 2^63; got {max(values)}.")
        with torch.inference_mode(False):  # or the count could not move on outside of it
            streams = torch.tensor(values, dtype=torch.int64, device="cpu")
            self._position = Position(streams, per_sample=seeds is not None)
        # the rows of the last draw, and what was made ahead of it: the number of a first draw, and all numbers
        self._ahead: dict[str, tuple[tuple[int, ...], int, Tensor | Sequence[Tensor]]] = {}

    def __repr__(self) -> str:
        seeds = self._position.seeds.tolist()
        return (
            f"Rng(seeds={textwrap.shorten(str(seeds), 80, placeholder=' …')})"
            if self.per_sample
            else f"Rng({seeds[0]})"
        )

    def __len__(self) -> int:
        """Number of streams: 1, or one per sample."""
        return len(self._position.seeds)

    @property
    def per_sample(self) -> bool:
        """Whether every sample has a stream of its own."""
        return self._position.per_sample

    @property
    def layout(self) -> tuple[bool, int, int]:
        """(whether there is one stream per sample, number of streams, rank of a share), which a CUDA graph fixes."""
        return self.per_sample, len(self), self._position.rank

    def share(self, rank: int, world: int) -> Rng:
        """This stream for one of `world` processes: n rows drawn are rows rank·n … (rank+1)·n − 1 of a draw of world·n.

        Every process has to draw the same shapes in the same order, so that their streams move on together.

        Raises:
            ValueError: there are per-sample seeds, which need no sharing, or the rank is outside 0 … world − 1.
        """
        return self._at(self._position.share(rank, world))

    def rows(self, rows: Tensor) -> Rng:
        """The streams of the samples `rows` (n,) alone, shared with this Rng: a draw moves these on, here and there.

        A single stream is returned unchanged.
        """
        return self._at(self._position.rows(rows)) if self.per_sample else self

    def skip(self, draws: int) -> None:
        """Moves on by `draws` ≥ 0, which were made elsewhere."""
        self._position.skip(draws)

    def state_dict(self) -> dict[str, Tensor]:
        """Every stream's seed and the number of its next draw, (streams, 2) int64, and the version of the noise."""
        streams = torch.stack([self._position.seeds, self._position.numbers()], 1)
        return {"streams": streams, "version": torch.tensor(VERSION, device="cpu")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a state, with a warning where it is of a version that drew other numbers."""
        self._position.restore(state["streams"])
        self._ahead = {}
        if (version := int(state.get("version", 1))) != VERSION:
            warnings.warn(
                f"This state is of version {version} of the noise, and this release has version {VERSION}. Seeds are "
                "kept and draws counted on, but the draws from here on are of another stream than they would have "
                "been; to go on with the same ones, use the release that wrote the state.",
                stacklevel=2,
            )

    def captured(self, device: torch.device | str) -> CapturedRng:
        """An Rng that starts here and has its position in device memory, for a CUDA graph."""
        return CapturedRng(self, torch.device(device))

    def noise(self, x: Tensor) -> Tensor | Noise:
        """Standard normals for a batch like x (B, *event), or their address if kernels make them when they are needed.

        This is for `scoresde.ops`. The numbers are those that `normal_like(x)` would have given.
        """
        if _in_kernels(x.device, x.dtype):
            return self._position.find(x.shape, x.device)
        # half types are rounded once, at the end of a sum
        return self.normal(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Standard normals of `shape`; with per-sample seeds `shape[0]` must be their number. By default float32."""
        dtype, place = dtype or torch.float32, torch.device(device or "cpu")
        if self._by_op(place, dtype):
            return draws.normal(shape, dtype, self._position.find(shape, place))
        return self._draw("normal", shape, philox.normals).to(place, dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape, dtype=x.dtype, device=x.device)

    def uniform(
        self, shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Uniforms in [0, 1): 53 random bits in float64, the first 24 of them in float32, fewer in half types."""
        dtype = dtype or torch.float32
        digits = round(1 - math.log2(torch.finfo(dtype).eps))
        words = (self._words("uniform", shape) >> (64 - digits)) & (2**digits - 1)
        return (words.to(torch.float64) * 2.0**-digits).to(device, dtype)

    def integers(self, high: int, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """Integers in {0, …, high − 1}, 1 ≤ high < 2^63, of probability 1/high each to within 2^-63."""
        if not 1 <= high < 2**63:
            raise ValueError(f"integers needs 1 <= high < 2^63; got high={high}.")
        return (((self._words("integers", shape) >> 1) & (2**63 - 1)) % high).to(device)

    def rademacher_like(self, x: Tensor) -> Tensor:
        """Signs −1 or +1 with equal probability."""
        if self._by_op(x.device, x.dtype):
            return draws.rademacher(x.shape, x.dtype, self._position.find(x.shape, x.device))
        return self._draw("rademacher", x.shape, philox.signs).to(x.device, x.dtype)

    def stratified(self, n: int, *, device: torch.device | str | None = None) -> Tensor:
        """n float64 numbers in [0, 1), one in each interval of length 1/n, in random order.

        Each is uniform, and their mean varies far less than that of independent ones.

        For a share, the intervals are those of the whole batch.
        """
        total, first = n * self._position.world, n * self._position.rank
        strata = self.permutation(total)[first : first + n]
        return ((strata + self.uniform((n,), dtype=torch.float64)) / total).to(device)

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 … n − 1 from the single stream, equal for every share."""
        if self.per_sample:
            raise ValueError("A permutation is one draw for all samples; use Rng(seed), not Rng(seeds=[…]).")
        return self._draw("permutation", (1, n), philox.bits, everybody=True).flatten().argsort(stable=True)

    def _at(self, position: Position) -> Rng:
        part = copy.copy(self)
        part._position, part._ahead = position, {}
        return part

    def _by_op(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a torch op draws, in place of NumPy, which makes small draws ahead."""
        return torch.compiler.is_compiling() or _in_kernels(device, dtype)

    def _words(self, kind: str, shape: Sequence[int]) -> Tensor:
        """64 random bits for each entry of `shape`, int64."""
        if torch.compiler.is_compiling():
            return draws.bits(shape, self._position.find(shape, torch.device("cpu")))
        return self._draw(kind, shape, philox.bits)

    def _draw(self, kind: str, shape: Sequence[int], make: philox.Maker, everybody: bool = False) -> Tensor:
        rows, row, draw, own = self._position.take(shape, everybody)
        n, seeds = math.prod(shape[1:]), self._position.seeds
        asked, many = (row, rows, n), _AHEAD // (rows * (n // 2 + 1) or 1)
        before, first, numbers = self._ahead.get(kind, ((), 0, ()))
        # made alone: what is large, what is at another place in each stream, and what comes for the first time
        if many < 2 or own is not None or before != asked:
            self._ahead[kind] = asked, 0, ()
            return make(philox.streams(seeds, row, draw if own is None else own, rows), n).reshape(tuple(shape))
        if not first <= draw < first + len(numbers):
            first, many = draw, min(many, 64)
            where = philox.streams(seeds, row, torch.arange(draw, draw + many, device="cpu")[:, None], rows)
            numbers = make(where, n).unflatten(0, (many, rows))
            self._ahead[kind] = asked, first, numbers
        return numbers[draw - first].clone().reshape(tuple(shape))


def _in_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type != "cpu" and enabled(device, dtype)


class CapturedRng(Rng):
    """An `Rng` whose position lies in device memory, for the capture of a CUDA graph.

    A replay numbers its draws from what the device tensors hold. `load(rng)` before a replay lets it start where `rng`
    stands, and moves `rng` on as if it had drawn. A graph that ends with `advance()` moves on by itself, so that every
    replay has fresh noise.
    """

    _position: DevicePosition

    def __init__(self, rng: Rng, device: torch.device):
        self._position, self._ahead = DevicePosition(rng._position, device), {}

    def load(self, rng: Rng) -> None:
        """Starts where `rng` stands, which moves on by the draws of the graph.

        Raises:
            ValueError: `rng` has another number of streams.
        """
        if len(rng) != len(self):
            raise ValueError(f"The graph was captured for {len(self)} streams; this Rng has {len(rng)}.")
        self._position.load(rng._position)

    def rewind(self) -> None:
        """Makes the next draw the first of the graph again: after the runs that warm it up, before its capture."""
        self._position.rewind()

    def advance(self) -> None:
        """Ends a graph, after its last draw."""
        self._position.advance()

    def _by_op(self, device: torch.device, dtype: torch.dtype) -> bool:
        return True

    def _draw(self, kind: str, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError(
            f"Numbers of kind {kind!r} are made on the CPU, which a CUDA graph cannot do; draw them before."
        )
