"""Runs that draw a sample in stages: from a small picture, or from an embedding, to the whole."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import whole
from ..codecs import Codec, Haar
from ..codecs.codec import Drawn
from ..config import ConfigError
from ..data import Dataset
from ..diffusion.conditions import Cond, move, named, take, unnamed
from ..diffusion.denoiser import model_device
from ..likelihood.divergence import Divergence
from ..likelihood.ode import LogLikelihood, log_likelihood
from ..likelihood.solver import Solver
from ..nn.conditions import noised
from ..noise.rng import Rng
from ..sampling.sampler import Sampler
from .batches import joined, streams_of
from .model import Guidance
from .progress import track
from .run import Run
from .stage import check_fit, kind_of, without

Found = TypeVar("Found")
_APART = 1 << 24  # draws from a stream that a stage has for itself


@dataclass(frozen=True, eq=False)
class Cascade:
    """A first run and those that refine what it draws, each told what the one before it made.

    A stage of codec=haar_details adds details to that picture, which stays the low band, and a cascade of such stages
    alone has an exact density by the chain rule: log p(low) + log p(details | low) + log_volume. A stage of
    codec=upsampled draws a whole picture, and is told the small one with as much noise as `level` says (Ho et al. 2021,
    *Cascaded diffusion models*): this has no exact likelihood. Nor has a chain of a prior, which draws embeddings
    (codec=embeddings), and a decoder, which is told one (codec=with_embedding), as in unCLIP (Ramesh et al. 2022).

        cascade = scoresde.load(["runs/low", "runs/details"])
        raw = cascade.sample(16, budget=20)
        cascade.log_likelihood(raw, solver=scoresde.Budget(20)).bits_per_dim

    Args:
        runs: two or more, from coarse to fine, as `scoresde.load` makes them.

    Raises:
        ConfigError: a stage that is missing, or does not fit the one before it: its size, its codec, its data, or what
            it is told.
    """

    runs: Sequence[Run]

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
        if len(self.runs) < 2:
            raise ConfigError(f"A cascade has two stages or more, from coarse to fine; got {len(self.runs)}.")
        first = self.runs[0]
        first._check_draws()
        if first.codec.below is not None:
            raise ConfigError(
                f"{first.folder} draws the details of a picture and is no first stage: begin with the run of "
                "codec=haar_low that they belong to."
            )
        for below, run in zip(self.runs, self.runs[1:], strict=False):
            run._check_draws()
            check_fit(below, run)
        kinds = self.told.plain.kinds
        for run in self.plain:
            for name, kind in run.kinds.items():
                if str(kinds.get(name)) != str(kind):
                    raise ConfigError(f"{run.folder} is told {kind}, and {self.told.run.folder} is not.")

    def __repr__(self) -> str:
        return f"Cascade({' → '.join(str(run.folder) for run in self.runs)}: {self.dataset.name} {self.raw_shape})"

    @property
    def codec(self) -> Codec:
        """Raw values to model data of the last stage and back."""
        return self.runs[-1].codec.whole

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return self.runs[-1].raw_shape

    @property
    def plain(self) -> list[Run]:
        """The stages, told nothing of each other: with the conditions alone that the caller gives."""
        return [self.runs[0], *(without(run, kind_of(run)) for run in self.runs[1:])]

    @property
    def told(self) -> _Told:
        """The stage that is told most by the caller, with and without the picture of the one before it."""
        pairs = [_Told(run, plain) for run, plain in zip(self.runs, self.plain, strict=True)]
        return max(pairs, key=lambda pair: len(pair.plain.kinds))

    @property
    def dataset(self) -> Dataset:
        """The data of the last stage under the codec of whole samples."""
        return replace(self.plain[-1].dataset, codec=self.codec)

    @property
    def digest(self) -> str:
        """SHA-256 of those of the stages."""
        return hashlib.sha256("".join(run.digest for run in self.runs).encode()).hexdigest()

    @property
    def whole(self) -> Run:
        """Whole samples as if a single run, that of the stage which is told most, drew them: what is measured of them,
        and under which conditions. Its denoiser is of no use."""
        run = self.told.plain
        return replace(run, dataset=self.dataset, digest=self.digest, conditional=bool(run.kinds))

    def cond(self, given: Any, n: int) -> Cond:
        """The conditions of n samples, as `Run.cond` makes them for the stage that is told most."""
        return self.told.plain.cond(given, n)

    def cond_of(self, stage: int, cond: Cond, low: Tensor | None) -> Cond:
        """What a stage is told: its part of `cond`, and the `picture` of the stage before, (n, C, *sizes)."""
        run, own = self.runs[stage], self._own(self.runs[stage], cond)
        return unnamed(own if low is None else own | {kind_of(run): low})

    @staticmethod
    def _own(run: Run, cond: Cond) -> dict[str, Tensor]:
        return {name: value for name, value in named(cond).items() if name in run.kinds}

    def picture(self, stage: int, x: Tensor) -> Tensor:
        """What a stage has made, `joined`, as the next one is told it: a picture, or an embedding (n, dim)."""
        run, after = self.runs[stage], self.runs[stage + 1 : stage + 2]
        if after and kind_of(after[0]) == "vector":
            assert run.dataset.embedder is not None
            return run.dataset.embedder.on_sphere(run.codec.decode(x))
        return run.codec.whole.layout(x)

    def low(self, x: Tensor) -> Tensor:
        """The low resolution of whole model data x, as the last stage is told it: of a stage of codec=haar_details
        what it was made of, of one of codec=upsampled means of blocks."""
        codec = self.runs[-1].codec
        if codec.below is not None:
            return codec.below.layout(codec.parts(x)[0])
        return F.interpolate(codec.layout(x), self.runs[-1].kinds["image"].shape[1:], mode="area")

    def levels(self, level: float) -> list[float]:
        """The noise level of each stage: `level`, and 0 for those that were trained without.

        Raises:
            ConfigError: more noise than a stage has learned.
        """
        if not 0 <= level <= 1:
            raise ConfigError(f"level, the noise of the picture that a stage is told, lies in [0, 1]; got {level}.")
        found = [0.0]
        for run in self.runs[1:]:
            most = run.config["network"].get("cond_noise") or 0.0
            if 0 < most < level:
                raise ConfigError(f"level={level:g}: {run.folder} was trained with noise up to cond_noise={most:g}.")
            found.append(level if most else 0.0)
        return found

    @staticmethod
    def skipped(stage: int) -> int:
        """Draws of the stream of a sample before those of a stage, which has no numbers of another."""
        return stage * _APART

    def begin(self, stage: int, cond: Cond, x: Tensor | None, level: float, streams: Rng) -> Cond:
        """What a stage is told, where x is what the stage before made, and `streams` are as they were at its start."""
        if x is None:
            return self.cond_of(stage, cond, None)
        told = self.cond_of(stage, cond, self.picture(stage - 1, x))
        if not level:
            return told
        image, own = named(told)["image"], copy.deepcopy(streams)
        own.skip(self.skipped(stage) - _APART // 2)
        return named(told) | noised(image, torch.full_like(image.flatten(1)[:, 0], level), own.normal_like(image))

    def sample(
        self,
        n: int,
        *,
        cond: Any = None,
        budget: int | None = None,
        sampler: Sampler | Sequence[Sampler] | None = None,
        guidance: Guidance | Sequence[Guidance] = None,
        level: float = 0.1,
        rng: Rng | None = None,
        batch_size: int = 128,
        progress: bool = True,
    ) -> Tensor:
        """n samples as raw values (n, *raw shape), on the CPU.

        Args:
            cond: as in `Run.sample`, for the stages that know such a condition.
            budget: network calls of a sample in each stage.
            sampler, guidance: as in `Run.sample`, for all stages or a list of one for each.
            level: s in [0, 1] of the noise in the picture that a stage of codec=upsampled is told; others have none.
            n, rng, batch_size, progress: as in `Run.sample`.

        Raises:
            ValueError: as `Run.sample`; a list of another length, or a level that a stage was not trained with.
        """
        told, streams = self.cond(cond, whole(n, "n, the number of samples,")), streams_of(rng, n)
        x = torch.empty(0, device="cpu")
        samplers, guides = self.each("sampler", sampler), self.each("guidance", guidance)
        for stage, (run, noise) in enumerate(zip(self.runs, self.levels(level), strict=True)):
            own, rows = self.begin(stage, told, x if stage else None, noise, streams), copy.deepcopy(streams)
            rows.skip(self.skipped(stage))
            how: dict[str, Any] = {"budget": budget, "sampler": samplers[stage], "guidance": guides[stage]}
            made = run.draw(own, rows, **how, batch_size=batch_size, progress=progress)
            x = run.codec.joined(x, made) if stage else made
        return self.codec.decode(x)

    def each(self, name: str, given: Any) -> list[Any]:
        """One value for each stage.

        Raises:
            ConfigError: a list of another length.
        """
        if not isinstance(given, Sequence):
            return [given] * len(self.runs)
        if len(given) != len(self.runs):
            raise ConfigError(f"{name} is one for all stages or a list of {len(self.runs)}; got {given}.")
        return list(given)

    def log_likelihood(
        self,
        raw: Tensor,
        *,
        solver: Solver,
        cond: Any = None,
        divergence: Divergence | None = None,
        rng: Rng | None = None,
        t_min: float | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ) -> LogLikelihood:
        """log p(raw) of each sample in nats by the chain rule, see `Run.log_likelihood`; each stage is one solve.

        Integers are dequantised: what is measured is the density of that, whose mean bounds the log-probability of the
        integers, as for a model of the pixels (Theis et al. 2016).

        Raises:
            ConfigError: a stage of codec=upsampled, which draws a picture anew: it has no exact likelihood.
            TypeError, ValueError, SolverError: as `Run.log_likelihood`.
        """
        self.check_exact()
        raw = self.runs[-1]._checked(raw)
        n = len(raw)
        told, streams = None if cond is None else self.cond(cond, n), streams_of(rng, n)
        parts, found = torch.arange(n).split(whole(batch_size, "batch_size")), list[LogLikelihood]()
        for part in track(parts, "log-likelihood", len(parts), show=progress):
            rows = streams.rows(part)

            def of(run: Run, drawn: Drawn, own: Cond, rows: Rng) -> LogLikelihood:
                how: dict[str, Any] = {"divergence": divergence, "t_min": t_min, "scaling": drawn.codec}
                one = log_likelihood(run.denoiser, drawn.values, solver, cond=own, rng=rows, **how)
                return replace(one, log_prob=one.log_prob + drawn.log_volume)

            each = self.measured(raw[part], take(told, part), rows, of)
            log_prob = torch.stack([one.log_prob.cpu() for one in each]).sum(0)
            of_divergence, of_solver = (
                torch.stack([getattr(one, name).cpu() for one in each]).square().sum(0).sqrt()
                for name in ("divergence_error", "solver_error")
            )
            latent = each[0].latent.cpu()
            for one in each[1:]:  # an orthonormal map: white noise stays white noise
                latent = Haar().layout(torch.cat([latent, one.latent.cpu()], 1))
            calls, errors = sum(one.evaluations for one in each), (of_divergence, of_solver)
            found.append(LogLikelihood(log_prob, torch.hypot(*errors), latent, calls, *errors, dims=raw[0].numel()))
        return joined(found)

    def check_exact(self) -> None:
        """Refuses a cascade without an exact likelihood.

        Raises:
            ConfigError: says which stage draws a picture anew.
        """
        anew = [str(run.folder) for run in self.runs[1:] if run.codec.below is None]
        if anew:
            raise ConfigError(
                f"{anew[0]} draws a picture anew from what the stage before it drew, which is then no part of it: such "
                "a cascade has no exact likelihood. One of codec=haar_low and codec=haar_details has."
            )

    def measured(
        self, raw: Tensor, cond: Cond, rng: Rng, measure: Callable[[Run, Drawn, Cond, Rng], Found]
    ) -> list[Found]:
        """`measure(run, drawn, told, rng)` of each stage, with its part of raw samples. Each draws what it would by
        itself: integers that all of them dequantise get the same noise."""
        found = []
        for run in self.runs:
            device, rows = model_device(run.denoiser), copy.deepcopy(rng)
            drawn = run.codec.drawn(raw.to(device), rows)
            own = move(unnamed({**self._own(run, cond), **drawn.told}), device)
            found.append(measure(run, drawn, own, rows))
        return found


@dataclass(frozen=True, eq=False)
class _Told:
    run: Run
    plain: Run
