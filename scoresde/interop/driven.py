"""A step of ours in a loop of somebody else's, who calls the network: one output goes in, and x moves by one step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.prediction import Prediction
from ..noise.position import Position
from ..noise.rng import Rng
from ..ops.broadcast import as_double, host
from ..sampling.sampler import Step
from .schedules import Process

Generators = torch.Generator | Sequence[torch.Generator] | None


class Asked(Exception):
    """A step needs the network's output at x and t before it can go on."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = x


class Told(Denoiser):
    """The denoiser of a network that is called elsewhere: each call takes the next of `outputs`, or raises `Asked`."""

    def __init__(self, process: Process, data_std: float):
        super().__init__(process.sde, data_std)
        self.process = process
        self.outputs: Iterator[Tensor] = iter(())

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        output = next(self.outputs, None)
        if output is None:
            raise Asked(x)
        return self.process.parameterization.prediction(output, x, self.sde.at(t, x))


class Drawn(Rng):
    """The `Rng` of the generators that a pipeline is given, which are asked for its seeds when there is noise to draw.

    A list has one generator for each sample, whose noise depends on that generator alone; one generator, or None for
    torch's global one, gives the seed of a single stream.
    """

    def __init__(self, generators: Generators):
        self.generators = generators
        self._ahead = {}

    @functools.cached_property
    def _position(self) -> Position:  # type: ignore[override]
        if self.generators is None or isinstance(self.generators, torch.Generator):
            return Rng(_seed(self.generators))._position
        return Rng(seeds=[_seed(one) for one in self.generators])._position

    def mark(self) -> Tensor | None:
        """Where the streams stand; None before the first draw."""
        return self.state_dict()["streams"] if "_position" in vars(self) else None

    def rewind(self, mark: Tensor | None) -> None:
        """Goes back there."""
        if (now := self.mark()) is not None:
            self.load_state_dict(self.state_dict() | {"streams": now * host([1, 0]).long() if mark is None else mark})


def _seed(generator: torch.Generator | None) -> int:
    place = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=place))


class Driven:
    """One run of `step` over `times`, of which the caller does the loop and the network's calls.

    A step that asks the network more than once is taken again from its beginning with all that was heard, until that
    is enough; what the caller gets in between is the x to ask at.

    Args:
        told: the process.
        step: of a fixed number of evaluations.
        times: falling, float64; x moves from each to the next.
        denoise: end with x̂_0 at the last time, by one more call.

    Raises:
        ValueError: a step that changes x before it asks the network.

    Attributes:
        asked: the time of each call of the network, float64 on the CPU.
    """

    def __init__(self, told: Told, step: Step, times: Tensor, *, denoise: bool):
        self.told, self.step, self.times, self.denoise = told, step, times, denoise
        self.asked = torch.stack(_rehearsed(told, step, times, denoise))
        self.start(0)

    def start(self, begin: int) -> None:
        """Begins a run, with `begin` calls left out, as for given samples that were noised that far.

        Raises:
            ValueError: calls are left out of steps that do not have one each, at its beginning.
        """
        if begin and not torch.equal(self.asked, self.times[: len(self.asked)]):
            raise ValueError(
                f"{self.step!r} does not ask the network once a step, so it cannot begin at call {begin}: for img2img "
                "and inpainting take a multistep method of order 3 or below, or DDIM."
            )
        self.calls, self.index = begin, begin  # network calls, and steps
        self.heard: list[Tensor] = []
        self.state: Any = None
        self.x: Tensor | None = None  # in full precision
        self.returned: Tensor | None = None

    def __call__(self, output: Tensor, x: Tensor, rng: Drawn) -> Tensor:
        """What to call the network at next, in the end the sample, from x (B, *event) and the network's output there.

        Raises:
            RuntimeError: the run is over.
        """
        if self.calls >= len(self.asked):
            raise RuntimeError(f"All {self.calls} calls were made: set_timesteps starts another run.")
        self.calls += 1
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        if not self.heard:
            self._take(x, wide)
        self.heard.append(output.to(wide))
        self.told.outputs, mark = iter(self.heard), rng.mark()
        try:
            self.x, self.state = _move(self, self.x, self.state, self.index, rng)
            self.index, self.heard, following = self.index + 1, [], self.x
        except Asked as ask:
            rng.rewind(mark)
            following = ask.x
        self.returned = following.to(dtype)
        return self.returned

    def _take(self, x: Tensor, wide: torch.dtype) -> None:
        """Takes x at the beginning of a step, which may have been changed since it was returned."""
        given = x.to(wide)
        if self.x is None:
            self.x, self.state = given, self.step.init(given)
        elif not (x is self.returned or torch.equal(x, self.returned)):  # type: ignore[arg-type]
            self.state = self.step.moved(self.told, self.state, self.times[self.index], given - self.x)
            self.x = given


def _move(run: Driven, x: Tensor | None, state: Any, index: int, rng: Rng) -> tuple[Tensor, Any]:
    """Step number `index` of a run, or its last denoising."""
    t = run.times[index]
    with torch.no_grad():
        if index + 1 == len(run.times):
            return run.told(x, t).x0, state
        return run.step(run.told, x, t, run.times[index + 1], state, cond=None, rng=rng)  # type: ignore[arg-type]


def _rehearsed(told: Told, step: Step, times: Tensor, denoise: bool) -> list[Tensor]:
    """The time of each call of a run, from one of a single number.

    Raises:
        ValueError: a step changes x before it asks the network, which the caller has asked at x itself by then.
    """
    asked: list[tuple[Tensor, Tensor]] = []

    class Recording(Told):
        def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
            asked.append((x, t))
            return super().forward(x, t, cond)

    recording, x = Recording(told.process, told.data_std), torch.ones(1, 1, dtype=torch.float32, device="cpu")
    recording.outputs, state, rng = itertools.repeat(x), step.init(x), Rng(0)
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            before, given = len(asked), x
            x, state = step(recording, x, t, s, state, cond=None, rng=rng)
            if not torch.equal(asked[before][0], given):
                raise ValueError(
                    f"{step!r} changes x before it asks the network, and a pipeline has asked it by then. Take a step "
                    "that asks at x_t first: a multistep method, DDIM, Heun …"
                )
    return [*(t for _, t in asked), *([times[-1]] if denoise else [])]


def noised(process: Process, x0: Tensor, noise: Tensor, index: Tensor | float) -> Tensor:
    """x_t = α x_0 + σ ε at the network's time steps `index`, () or (B,)."""
    place = as_double(index)
    t = process.time(place.to(x0.device) if place.numel() > 1 else host(float(place)))
    wide = torch.promote_types(x0.dtype, torch.float32)
    return process.sde.perturb(x0.to(wide), t, noise.to(wide)).to(x0.dtype)
