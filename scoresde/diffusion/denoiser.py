"""From networks and score functions to `Prediction`: the one interface that samplers, losses and likelihoods use."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checks import positive
from ..noise.rng import Rng
from ..ops.broadcast import as_time, host, per_sample, samples
from .conditions import Cond as Cond
from .conditions import checked_told, named, tell
from .network import Call, WeightType, module_of, read, unwrapped
from .parameterization import Parameterization
from .prediction import Prediction
from .sde import EDMSDE, SDE, Scales
from .undisturbed import undisturbed


class Denoiser(nn.Module, abc.ABC):
    """Anything that estimates (x̂_0, ε̂) from x_t. Guidance and posterior methods are denoisers around denoisers.

    Args:
        sde: the forward process the estimate is for.

    Attributes:
        fits: how many samples `prepare` wants; 0 where it does nothing.
        kind: what it is, in words: a denoiser, or what a run trains in the place of one.
        draws: whether samples can be drawn from it, as from every denoiser; a classifier has no noise to start from.
        encodes: whether it is an autoencoder, which no denoiser is.
        data_mean, data_var: moments of the data (numbers, or tensors of the event shape) that the prior at t_max
            takes into account: p_T ≈ N(α_T mean, (α_T² var + σ_T²) I). 0 gives the usual N(0, σ_T² I).
        prior_evaluations: network calls of `prior_log_prob_given`.
        data_std: standard deviation of the data about their mean, > 0: the noise level at which solvers and grids
            expect noise to become data. `measure` takes it from samples.
        roughness: how far x̂_0 strays at t_max, where it can know no more than the data's mean: its standard deviation
            over draws from the prior, in units of data_std. 0 for exact scores; 0.03 to 1.1 was seen on networks
            that predict x_0, v or EDM's F, 2 to 12 on ones that predict noise; inf until `measure` knows.
        trials: the samplers that `pilot` chose for it; None where `sample` is to try none, as of all that nobody has
            measured, and of what may know one batch only: energies and posteriors.
        told: what it is told beside its conditions. With "end" it is a flow map: cond["end"], a time s ≤ t (B,), makes
            its x̂_0 that g(x_t, t, s) with which a DDIM step from t to s ends where the ODE does. Without that entry s
            is t, where g is the usual E[x_0 | x_t]. With "scale", cond["scale"] (B,) is a guidance scale.
        heads: how many outputs the network has for each dimension of x: 2 where it learns a variance (`Split`).
    """

    kind, draws, encodes = "a denoiser", True, False
    heads = 1
    fits = 0
    told: tuple[str, ...] = ()

    def __init__(self, sde: SDE, data_std: float = 1.0):
        super().__init__()
        self.sde = sde
        self.data_std = positive(data_std, "data_std", "the standard deviation of the data")
        self.roughness = math.inf
        self.trials: dict[Any, Any] | None = None
        self.data_mean: Tensor | float = 0.0
        self.data_var: Tensor | float = 0.0
        self.prior_evaluations = 0

    @abc.abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        """The prediction at x (B, *event) and t (() or (B,)); a t of shape () may lie on the CPU."""

    @undisturbed
    @torch.no_grad()
    def measure(self, x0: Tensor, cond: Cond = None, *, data_std: float | None = None) -> Self:
        """Sets `data_std` and `roughness`, which `sample` goes by, and returns the denoiser itself. One network call.

        From then on `sample` chooses a sampler by trial, once for each budget (see `pilot`).

        Args:
            x0: data as the network sees them, (n, *event) with n ≥ 2, on its device.
            cond: conditions, one for each of the first 16 of them or fewer; None for none.
            data_std: the standard deviation of the data, where it is known of more than these; None takes theirs.

        Raises:
            ValueError: fewer than two samples, data that do not vary, or values that are not finite.
        """
        x0 = samples(x0, "x0")
        if len(x0) < 2:
            raise ValueError(f"The standard deviation of the data needs two samples or more; got {len(x0)}.")
        found = sample_std(x0) if data_std is None else data_std
        self.data_std = positive(found, "data_std", "the standard deviation of these samples")
        noise = self.prior_sample((min(len(x0), 16), *x0.shape[1:]), rng=Rng(0), dtype=x0.dtype, device=x0.device)
        strayed = sample_std(self(noise, host(self.sde.t_max), cond).x0)
        if not strayed < math.inf:
            raise ValueError(f"x0 predicted from the prior's noise is not finite (t = {self.sde.t_max}).")
        self.roughness, self.trials = strayed / self.data_std, {}
        return self

    def prepare(self, x0: Tensor, held_out: Tensor) -> str:
        """Takes from training data what the model starts from, and says in words what that is; as a rule, nothing.

        Args:
            x0: training data as the network sees them, up to `fits` of them (n, *event).
            held_out: others to choose by.
        """
        return ""

    def null(self, cond: Cond) -> Cond:
        """The null condition: one entry like those of `cond` that says nothing. None of None, or if there is none."""
        return None

    def prior_sample(self, shape: tuple[int, ...], *, rng, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """x_T of shape (B, *event) from the prior of the SDE for data of these moments."""
        return self.sde.prior_sample(shape, rng=rng, mean=self.data_mean, var=self.data_var, dtype=dtype, device=device)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Log-density of that prior in nats, shape (B,)."""
        return self.sde.prior_log_prob(z, mean=self.data_mean, var=self.data_var)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        """log p_T(z | cond) in nats, (B,): that of the prior, corrected for the condition where that is known.

        Guidance and posterior methods know it up to second order in the trace of the data that σ_T leaves, see
        `guidance/tilt.py`.
        """
        return self.prior_log_prob(z)


def sample_std(x: Tensor) -> float:
    """The standard deviation over the samples (n, *event): the root of the variance averaged over the dimensions."""
    return float(x.double().var(0).mean().sqrt())


def default_noise_input(sde: SDE, t: Tensor) -> Tensor:
    """c_noise = −λ/8 = ¼ log(σ/α), the EDM convention for every SDE (Karras et al. 2022, table 1)."""
    return -sde.log_snr(t) / 8


class Preconditioned(Denoiser):
    r"""A network made into a denoiser: F = network(c_in x_t, c_noise, cond), read as the parameterisation says.

    `c_in = 1/√(α²σ_d² + σ²)`, so the network sees unit variance at every t. Coefficients are float32 (float64 for
    float64 inputs); only the network itself runs under `autocast`.

    Args:
        network: callable (x (B, *event), c_noise (B,), cond) -> tensor like x; one that takes no third argument, or
            gets no condition, is called without. x comes in the dtype of its weights, c_noise in float32 or wider. A
            tuple or mapping with one tensor in it will do, and the output of diffusers' models.
        sde: the forward process.
        parameterization: what the output means.
        sigma_data: σ_d > 0 in c_in: the standard deviation of the data that the network was trained with. It belongs to
            the network and never changes.
        noise_input: (sde, t (B,)) -> c_noise (B,), for networks trained elsewhere: `lambda sde, t: 999 * t` for
            score_sde, `lambda sde, t: sde.marginal(t)[1]` for k-diffusion. Default −log_snr/8.
        scale_input: False feeds x_t itself.
        autocast: dtype of the network's autocast region ("bfloat16" or "float16"); None for whatever the caller's is.
        data_std: see `Denoiser`; None takes σ_d, until `measure` knows better.
        told: ("end",) makes a flow map of it, see `Denoiser`: the network gets cond["end"] in the units of c_noise, and
            ¼ log of cond["scale"], (B,) each.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        sde: SDE,
        parameterization: Parameterization,
        *,
        sigma_data: float = 1.0,
        noise_input: Callable[[SDE, Tensor], Tensor] | None = None,
        scale_input: bool = True,
        autocast: str | None = None,
        data_std: float | None = None,
        told: Sequence[str] = (),
    ):
        sigma_data = positive(sigma_data, "sigma_data", "the standard deviation of the data that c_in divides by")
        super().__init__(sde, sigma_data if data_std is None else data_std)
        if autocast not in (None, "bfloat16", "float16"):
            raise ValueError(f"autocast is None, 'bfloat16' or 'float16'; got {autocast!r}.")
        self.network, self.sigma_data = network, sigma_data
        self.inside = module_of(network)  # so that its parameters and its mode are found
        self._call, self._weight_type = Call(network), WeightType(self)
        self.parameterization = parameterization
        self.noise_input = default_noise_input if noise_input is None else noise_input
        self.scale_input, self.told = scale_input, checked_told(told)
        self.autocast = None if autocast is None else getattr(torch, autocast)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        x = samples(x, "x_t")
        scales = self.sde.at(t, x)
        return self.parameterization.prediction(self.output(x, scales, cond), x, scales)

    def output(self, x: Tensor, scales: Scales, cond: Cond) -> Tensor:
        """F (B, heads · C, *sizes) of the network at x_t (B, C, *sizes)."""
        c_noise = per_sample(self.noise_input(self.sde, scales.t), x)
        c_in = (scales.alpha**2 * self.sigma_data**2 + scales.sigma**2).rsqrt() if self.scale_input else None
        scaled = x if c_in is None else c_in * x
        own = contextlib.nullcontext() if self.autocast is None else torch.autocast(x.device.type, dtype=self.autocast)
        with own:
            output = read(self._say(scaled, c_noise, self._in_its_units(cond, x)), "The network")
        if output.shape != (expected := (x.shape[0], self.heads * x.shape[1], *x.shape[2:])):
            raise ValueError(
                f"The network returned shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}; expected "
                f"{expected}. Of twice the channels the second half is a learned variance: denoiser=split with "
                "network.outputs=2 has it, and denoiser=preconditioned has none."
            )
        return output.to(scaled.dtype)

    def _in_its_units(self, cond: Cond, x: Tensor) -> Cond:
        """The condition with what the network is told besides as it takes it; other names are the network's own."""
        given = {name: value for name, value in named(cond, "").items() if name in self.told}
        units = {"end": lambda s: self.noise_input(self.sde, as_time(s, x)), "scale": lambda w: w.log() / 4}
        return tell(cond, **{n: per_sample(units[n](v), x) for n, v in given.items()}) if given else cond

    def _say(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Any:
        """What the network returns, called in the dtype of its weights."""
        dtype = self._weight_type() or x.dtype
        c_noise = c_noise.to(torch.promote_types(dtype, torch.float32))
        args, kwargs = self._call.arguments(cond)
        try:
            return self.network(x.to(dtype), c_noise, *args, **kwargs)
        except RuntimeError as error:
            if dtype.itemsize > 2 or "type" not in str(error):
                raise
            raise TypeError(
                f"The network has weights of {dtype}. It is called with x in that dtype and c_noise in float32, which "
                f"it has to convert: c_noise.to(x.dtype). Or keep float32 weights, and autocast=. ({error})"
            ) from error

    def null(self, cond: Cond) -> Cond:
        """The network's own: `network.null(cond)`."""
        own = getattr(unwrapped(self.network), "null", None)
        return None if own is None else own(cond)


class ScoreFunction(Denoiser):
    """Any callable score ∇ log p_t(x): another library's network, a classifier's gradient, a closed form.

    Args:
        fn: (x (B, *event), t (B,)) -> score like x, or (x, t, cond) when a condition is given.
        sde: the process whose marginals the score belongs to.
        data_std: see `Denoiser`.
    """

    def __init__(self, fn: Callable[..., Tensor], sde: SDE, *, data_std: float = 1.0):
        super().__init__(sde, data_std)
        self.fn = fn

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        x = samples(x, "x_t")
        scales = self.sde.at(t, x)
        times = per_sample(scales.t, x)
        score = read(self.fn(x, times) if cond is None else self.fn(x, times, cond), "The score function")
        if score.shape != x.shape:
            raise ValueError(f"The score has shape {tuple(score.shape)}, expected that of x, {tuple(x.shape)}.")
        eps = -scales.sigma * score
        return Prediction((x - scales.sigma * eps) / scales.alpha, eps, scales)


class DenoiserFunction(Denoiser):
    """Any callable D(y, ς) ≈ E[x_0 | y], y = x_0 + ς ε: the convention of EDM and k-diffusion, under every SDE.

    With y = x/α and ς = σ/α it is the denoiser of x_t = α x_0 + σ ε (Karras et al. 2022, eq. 2–4), so a network of one
    process samples by any other.

    Args:
        fn: (y (B, *event), ς (B,)) -> x̂_0 like y, or (y, ς, cond) when a condition is given.
        sde: the process to sample by, by default `EDMSDE()`, in which y is x and ς is t.
        data_std: see `Denoiser`.
    """

    def __init__(self, fn: Callable[..., Tensor], sde: SDE | None = None, *, data_std: float = 1.0):
        super().__init__(EDMSDE() if sde is None else sde, data_std)
        self.fn = fn

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        x = samples(x, "x_t")
        scales = self.sde.at(t, x)
        y, ratio = x / scales.alpha, per_sample((scales.sigma / scales.alpha).flatten(), x)
        x0 = read(self.fn(y, ratio) if cond is None else self.fn(y, ratio, cond), "The denoiser")
        if x0.shape != x.shape:
            raise ValueError(f"The denoiser returned shape {tuple(x0.shape)}, expected that of x, {tuple(x.shape)}.")
        return Prediction(x0, (x - scales.alpha * x0) / scales.sigma, scales)


class DenoiserWrapper(Denoiser):
    """A denoiser around another, of the same SDE and with the same prior; a subclass defines `forward`.

    Args:
        denoiser: the one inside.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser.sde, denoiser.data_std)
        self.denoiser, self.roughness, self.heads = denoiser, denoiser.roughness, denoiser.heads
        self.trials = None if denoiser.trials is None else {}
        self.data_mean, self.data_var = denoiser.data_mean, denoiser.data_var
        self.prior_evaluations, self.told = denoiser.prior_evaluations, denoiser.told

    def null(self, cond: Cond) -> Cond:
        return self.denoiser.null(cond)

    def prior_sample(self, shape: tuple[int, ...], *, rng, dtype: torch.dtype | None = None, device=None) -> Tensor:
        return self.denoiser.prior_sample(shape, rng=rng, dtype=dtype, device=device)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        return self.denoiser.prior_log_prob(z)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        # a prior of its own stays, with what the condition makes of the one inside
        gain = self.denoiser.prior_log_prob_given(z, cond) - self.denoiser.prior_log_prob(z)
        return self.prior_log_prob(z) + gain


class CountingDenoiser(DenoiserWrapper):
    """Counts network calls: a benchmark reports these, and not what a solver thinks that it made.

    Attributes:
        evaluations: forward calls so far.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser)
        self.evaluations = 0

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        self.evaluations += 1
        return self.denoiser(x, t, cond)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        self.evaluations += self.prior_evaluations
        return self.denoiser.prior_log_prob_given(z, cond)


def model_device(denoiser: Denoiser) -> torch.device:
    """Where the parameters of `denoiser` live; the CPU if it has none."""
    return next((parameter.device for parameter in denoiser.parameters()), torch.device("cpu"))
