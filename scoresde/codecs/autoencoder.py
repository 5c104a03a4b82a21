"""The latents of a frozen autoencoder, as a codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..noise.rng import Rng
from .codec import Codec, decodable
from .frozen import Frozen

_AT_ONCE = 256  # samples that go through the network together, where these have no more
_NUMBERS = 2**20  # than so many numbers; one at least


@dataclass(frozen=True, eq=False)
class Autoencoder(Frozen, Codec):
    r"""x = (z − mean)/std of latents z ~ q(z | raw), and back by the mean of p(raw | z).

    With `log_volume` = log p(raw | z) − log q(x | raw) the model data have a bound and no equality:

        log p(raw) ≥ E_q [log p(x) + log_volume(raw, x)],

    tight where q is the posterior p(z | raw). Raw integers have a probability, without any dequantisation, if the
    network has one for them; of floats it is their density.

    Args:
        base: raw data to what the network encodes, a codec of the same integers; its volume counts for floats.
        network: `encode(x) -> (mean, std)` of q(z | x), `decode(z) -> x`, `log_prob(x, z) -> (B,)` nats, as
            `nn.Autoencoder` has them, and `levels`, None for floats. It is taken as it is, in eval mode and without
            gradients of its weights.
        mean, std: of each channel of z over the training data, so that x has mean 0 and variance 1; () leaves z alone.
        node: JSON of the node of a configuration that makes the network, so that a run folder can keep it.

    Raises:
        ValueError: another number of means than of deviations, or a deviation that is not positive.
    """

    base: Codec
    network: Any
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    node: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.mean) != len(self.std) or not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"Expected as many means as deviations > 0; got {self.mean} and {self.std}.")
        super().__post_init__()

    def __repr__(self) -> str:
        return f"Autoencoder({self.base}, latents {self.digest[:12]})"

    def __eq__(self, other: Any) -> bool:
        """Alike in every weight and number."""
        if other.__class__ is not self.__class__:
            return NotImplemented
        return bool((self.digest, self.mean, self.std) == (other.digest, other.mean, other.std))

    def __hash__(self) -> int:
        return hash(self.digest)

    def scaled(self, moments: Iterator[Tensor]) -> Autoencoder:
        """The codec whose x has mean 0 and variance 1 in each channel, over all `moments` of training data."""
        total: Any = 0.0
        squares: Any = 0.0
        count = 0
        for part in moments:
            mean, std = part.double().transpose(0, 2).flatten(2).unbind(1)
            total, squares = total + mean.sum(1), squares + (mean.square() + std.square()).sum(1)
            count += mean.shape[1]
        centre = total / count
        return replace(self, mean=tuple(centre.tolist()), std=tuple((squares / count - centre**2).sqrt().tolist()))

    def moments(self, raw: Tensor) -> Tensor:
        """Mean and standard deviation of q(z | raw), (B, 2, *latent)."""
        return torch.stack(self._posterior(self._inside(raw)), 1)

    @property
    def redraw(self) -> Redraw:
        """What makes model data of `moments`."""
        return Redraw(self.mean, self.std)

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses what the codec below refuses."""
        self.base.check(raw, name)

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of latents.

        Raises:
            ValueError: samples of another shape than the autoencoder was trained on.
        """
        shape, own = self.base.encoded_shape(raw_shape), tuple(self.network.event_shape)
        if shape != own:
            raise ValueError(f"This autoencoder was trained on samples of shape {own}; these have {shape}.")
        return tuple(self.network.latent_shape)

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """x of z ~ q(z | raw) by `rng`; of the mean of q without one."""
        return self.redraw.transform(self.moments(raw), rng=rng)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of the mean of p(raw | z), integers rounded."""
        decodable(x)
        with torch.no_grad():
            return self.base.decode(self.unfold(x))

    def unfold(self, x: Tensor) -> Tensor:
        """The mean of p(· | z) as model data of `base`, differentiable in x."""
        return self._by_parts(self.network.decode, self.redraw.undo(x))

    def layout(self, x: Tensor) -> Tensor:
        """Samples, as model data of the codec below, of latents within four deviations."""
        with torch.no_grad():
            return self.base.layout(self.unfold(x.clamp(-4, 4)))

    @torch.no_grad()
    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p(raw | z) − log q(x | raw) of each sample, (B,) float64 nats; a bound's part, see the class."""
        inside, z = self._inside(raw), self.redraw.undo(x)
        mean, std = (each.double() for each in self._posterior(inside))
        log_q = -0.5 * ((z.double() - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        log_p = self._by_parts(self.network.log_prob, inside, z).double()
        if self.network.levels is None:
            log_p = log_p + self.base.log_volume(raw, inside)
        return log_p - log_q.flatten(1).sum(1) - self.redraw.log_scale(x)

    @property
    def bound(self) -> bool:
        """Its volume makes a lower bound of a density."""
        return True

    @property
    def pixels(self) -> Codec:
        """The codec below."""
        return self.base.pixels

    @property
    def discrete(self) -> bool:
        """Integers are not dequantised."""
        return False

    @property
    def levels(self) -> int | None:
        """How many integers every raw value may be."""
        return self.base.levels

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which `decode` returns raw values."""
        return self.base.raw_dtype

    @property
    def raw_range(self) -> tuple[float, float] | None:
        """(least, greatest) raw value."""
        return self.base.raw_range

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        return self.base.expects

    def _inside(self, raw: Tensor) -> Tensor:
        """What is encoded: integers at the centres of their bins."""
        return self.base.transform(raw)

    @torch.no_grad()
    def _posterior(self, inside: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._on(inside).encode(part) for part in inside.split(self._at_once)]
        mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
        return mean, std

    @property
    def _at_once(self) -> int:
        return max(1, min(_AT_ONCE, _NUMBERS // math.prod(self.network.event_shape)))

    def _by_parts(self, of: Callable[..., Tensor], *values: Tensor) -> Tensor:
        self._on(values[0])
        return torch.cat([of(*part) for part in zip(*(each.split(self._at_once) for each in values), strict=True)])

    def _on(self, like: Tensor) -> Any:
        """The network, on the device of `like`."""
        here = next(iter(self.network.parameters()), like)
        return self.network if here.device == like.device else self.network.to(like.device)


@dataclass(frozen=True)
class Redraw:
    """Moments (B, 2, *latent) of q, which are stored, to latents drawn of it, with mean 0 and variance 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self, moments: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Draws by `rng`, or means without it."""
        mean, std = moments.unbind(1)
        z = mean if rng is None else mean + std * rng.normal_like(mean)
        return (z - self._row(self.mean, z)) / self._row(self.std, z) if self.std else z

    def undo(self, x: Tensor) -> Tensor:
        """Latents z of x."""
        return x * self._row(self.std, x) + self._row(self.mean, x) if self.std else x

    def log_scale(self, x: Tensor) -> float:
        """log |dz/dx| of a sample, so that log q(x) = log q(z) + this."""
        return x[0, 0].numel() * sum(map(math.log, self.std))

    @staticmethod
    def _row(numbers: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 2))
