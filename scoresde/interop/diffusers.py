"""Our steps as a scheduler of diffusers: `pipe.scheduler = Scheduler.from_config(pipe.scheduler.config)`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..config import ConfigError, build, targets
from ..diffusion.grids import Grid, check_grid
from ..ops.broadcast import host
from ..sampling.default import default_sampler
from ..sampling.sampler import Step
from .driven import Drawn, Driven, Generators, Told, noised
from .schedules import process, spaced

OWN = "timesteps"
"""The grid of the pipeline or of diffusers' own spacing."""


class Scheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    r"""A scheduler for any pipeline of diffusers that moves latents by a step of ours on a grid of ours.

        pipe.scheduler = Scheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, step=scoresde.UniPC(3), grid="timesteps")

    After `set_timesteps(n)` x is moved as by `Sampler(step, grid, n, denoise=False)`, or, where `denoise` is true, by
    `Sampler(step, grid, n − 1)`, which ends in x̂_0; `timesteps` has one entry for each call of the network. It hears
    time steps between those of its table, as our samplers let it. `clip_sample`, `thresholding` and the karras,
    exponential and beta sigmas of other schedulers are not carried over: choose `grid`.

    Args:
        step: any step of fixed size: `Multistep` and its kin, a `FittedStep`, `DDIM`, `Heun` …; None for that of
            `default_sampler` for n calls. Pipelines that begin in the middle (img2img) take those that ask the network
            once a step. Noise, where it draws any, is of our `Rng`, with seeds from the
            pipeline's generators: a list has one for each sample, which then depends on its own alone.
        grid: (sde, n) -> times, such as a `FittedGrid`; "timesteps" for diffusers' own (`timestep_spacing`,
            `steps_offset`, the shift of a flow); None for that of the step, or for what the pipeline hands on.
        denoise: None does as diffusers does on its own time steps, and not on grids of ours.
        data_std: standard deviation of what is denoised, where grids expect noise to become data: about 1 for latents,
            0.5 for pictures in [−1, 1].
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the table, see
            `schedules.alpha_bar`.
        timestep_spacing, steps_offset: of grid="timesteps".
        flow_shift, use_dynamic_shifting: of the own grid of a flow; the second takes the pipeline's `mu`.

    Raises:
        ValueError: an adaptive step, a process that is not one of these.
    """

    order = 1
    _compatibles = [one.name for one in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        step: Step | Mapping[str, Any] | None = None,
        grid: Grid | Mapping[str, Any] | str | None = None,
        denoise: bool | None = None,
        data_std: float = 1.0,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ):
        self._step: Step | None = _object(step, "step")
        self._grid: Any = grid if grid == OWN else _object(grid, "grid")
        self.register_to_config(step=_node(step), grid=grid if grid == OWN else _node(grid))
        # diffusers takes what is given by position for a default, which another scheduler's from_config would drop
        usual = inspect.signature(type(self).__init__).parameters
        left = [name for name in self.config.get("_use_default_values", ()) if self.config[name] == usual[name].default]
        self.register_to_config(_use_default_values=left)
        if self._step is not None and self._step.evaluations is None:
            raise ValueError(
                f"{self._step!r} decides as it goes how often it asks the network, and a pipeline has to know before: "
                "take a step of fixed size."
            )
        self._denoise, self._dynamic = denoise, use_dynamic_shifting
        self._begin: int | None = None
        self._rng: Drawn | None = None
        self.told = Told(process(self.config), data_std)
        self.init_noise_sigma = float(self.told.sde.marginal(host(self.told.sde.t_max))[1])
        self.alphas_cumprod = _alpha_bar(self.told)
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, device="cpu").float()
        self.run: Driven | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of another one's configuration; `kwargs` are arguments of this class and overrule it.

        Raises:
            ValueError: the configuration is of a process that cannot be taken over.
        """
        if isinstance(config, Mapping) and config.get("_class_name") != cls.__name__:
            known = process(config)
            if known.is_flow:
                kwargs = {"prediction_type": "flow_prediction", "flow_shift": known.shift} | kwargs
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Starts a run of n calls of the network.

        Args:
            num_inference_steps: n ≥ 1.
            device: where `timesteps` are to lie.
            timesteps, sigmas: falling indices of the table, or σ/α (σ of a flow), in place of diffusers' own. They
                are counted only, and give n, where the scheduler was made with a grid.
            mu: log of the shift of a flow, where `use_dynamic_shifting` is set.

        Raises:
            ValueError: none of the first, third and fourth, or times that do not fall.
        """
        handed = timesteps if timesteps is not None else sigmas
        n = num_inference_steps if handed is None else len(handed)
        if n is None:
            raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas.")
        own, sde, step = self.told.process, self.told.sde, self._step
        theirs = self._grid == OWN or (self._grid is None and handed is not None)
        default = default_sampler(self.told, n)
        step = default.step if step is None else step
        denoise = theirs if self._denoise is None else self._denoise
        if theirs:
            times = own.time(self._indices(n, timesteps, sigmas, mu))
        else:
            grid: Grid = self._grid or (
                default.grid_for(self.told) if self._step is None else step.default_grid(self.told)
            )
            length = n - int(denoise)
            times = grid(sde, length) if length else host([sde.t_max])
        if theirs and not denoise:
            times = torch.cat([times, host([sde.t_min])])
        if len(times) > 1:
            check_grid(times, sde)
        self.run = Driven(self.told, step, times.to("cpu", torch.float64), denoise=denoise)
        self.num_inference_steps, self._begin, self._rng = n, None, None
        self.timesteps = own.index(self.run.asked).float().to(device or "cpu")

    def _indices(self, n: int, timesteps: Any, sigmas: Any, mu: float | None) -> Tensor:
        """What the network hears on diffusers' own grid, (n,)."""
        own = self.told.process
        if timesteps is not None:
            return torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        shift = mu if self._dynamic else None
        if sigmas is None:
            if own.is_flow and shift is not None:
                sigmas = torch.linspace(1, 1 / own.steps, n, dtype=torch.float64, device="cpu")
            else:
                return spaced(self.config, n, own)
        levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        return own.steps * own.shifted(levels, shift) if own.is_flow else own.index(own.sde.time(-2 * levels.log()))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The number of steps that the pipeline leaves out, as for pictures that it noised that far."""
        self._begin = int(begin_index)

    @property
    def begin_index(self) -> int | None:
        return self._begin

    @property
    def step_index(self) -> int | None:
        """How many calls of the network lie behind; None before the first."""
        return None if self.run is None or self._rng is None else self.run.calls

    def index_for_timestep(self, timestep: Any) -> int:
        """The place in `timesteps` that is nearest to a time step."""
        wanted = torch.as_tensor(timestep, dtype=torch.float64, device=self.timesteps.device)
        return int((self.timesteps.double() - wanted).abs().argmin())

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """`sample` itself: these networks see x_t."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x at the next time from x_t `sample` (B, *event) and what the network said of it.

        Where the network has twice as many channels, the second half, a learned variance, is left out. x may have been
        changed between two calls, as by inpainting.

        Args:
            generator: one, or a list of one for each sample, that noise is drawn from; None for torch's global one.
            kwargs: `eta` and what else pipelines pass, which must ask for nothing.

        Raises:
            ValueError: an argument that asks for something that `step` of the constructor decides.
            RuntimeError: more calls than steps.
        """
        if asked := {name: value for name, value in kwargs.items() if value}:
            raise ValueError(f"{asked}: noise is chosen with the step, as in Scheduler(scoresde.DDIM(eta=1.0)).")
        if self.run is None:
            raise ValueError("No run has begun: set_timesteps(n) does it, with n calls of the network.")
        if self._rng is None:
            self.run.start(self.index_for_timestep(timestep) if self._begin is None else self._begin)
            self._rng = Drawn(generator)
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, 1)[0]
        previous = self.run(model_output, sample, self._rng)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α x_0 + σ ε at `timesteps` () or (B,)."""
        return noised(self.told.process, original_samples, noise, timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name that pipelines of flows have for it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.told.process.steps


def _alpha_bar(told: Told) -> Tensor:
    """α² at every training time step, which some pipelines read."""
    n = told.process.steps
    index = torch.arange(n, device="cpu")
    return (told.sde.marginal(told.process.time(index))[0] ** 2).float()


def _object(node: Any, name: str) -> Any:
    """What a configuration's node describes, built of published names alone; an object itself."""
    return build({**node, "_convert_": "all"}, key=name) if isinstance(node, Mapping) else node


def _node(value: Any) -> Any:
    """The node of an object of ours, of the arguments that made it, for `scheduler_config.json`.

    Raises:
        ConfigError: an object that no configuration can name.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {key: _node(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, Tensor)):
        return [_node(one) for one in (value.tolist() if isinstance(value, Tensor) else value)]
    name = type(value).__name__
    known = [target for target in (f"scoresde.{name}", f"scoresde.interop.{name}") if target in targets()]
    if not known:
        raise ConfigError(
            f"A step or grid of a scheduler is one that scoresde publishes, so that its configuration can be saved; "
            f"got {value!r}."
        )
    args, kwargs = value._made_by
    given = inspect.signature(type(value)).bind(*args, **kwargs).arguments
    return {"_target_": known[0], **{key: _node(one) for key, one in given.items()}}
