"""The networks of `benchmarks/networks.py`: data, process, parameterisation and length of training of each.

Each takes one core half a minute to four minutes. They are what a user has after a while of training: samples look like
data, scores are far from exact.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import scoresde as S
from scoresde.codecs.scaling import Scaling
from scoresde.data import Dataset, Digits, EpochOrder, Idx, Moons, Pinwheel, Split, SwissRoll
from scoresde.losses import DenoisingLoss, EDMWeighting, Likelihood, LogNormalTimes, Simple, UniformTimes
from scoresde.losses.denoising import Times, Weighting
from scoresde.train import EMA, Trainer
from scoresde.train.state import TrainingState


class TableTimes(Times):
    """The N times of a table, each as often: the discrete loss that networks with a β table are trained with."""

    def sample(self, sde: S.SDE, n: int, rng: S.Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        steps = round(1 / sde.t_min)
        t = (rng.integers(steps, (n,), device=device) + 1).double() / steps
        return t, torch.ones_like(t)


class Plain(nn.Module):
    """Dense layers with one activation throughout, on x and waves of c_noise: a network as users write them."""

    def __init__(self, dims: int, width: int, depth: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.embedding = S.nn.FourierEmbedding(32, 0.3)
        sizes = [dims + 32, *[width] * depth]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dims))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, self.embedding(c_noise).to(x.dtype)], 1))


def step_index(sde: S.SDE, t: Tensor) -> Tensor:
    """The step 0 … N − 1 of a table at time t, as networks with a β table are told it."""
    return t / sde.t_min - 1


def linear_betas(steps: int = 1000) -> S.SDE:
    """The β table of DDPM (Ho et al. 2020, sec. 4)."""
    return S.TableSDE((1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0).tolist())


def cosine_betas(steps: int = 1000) -> S.SDE:
    """The β table of Nichol & Dhariwal (2021, eq. 17)."""
    level = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return S.TableSDE((1 - (1 - level[1:] / level[:-1]).clamp(max=0.999)).cumprod(0).tolist())


def continuous(name: str, values: Tensor) -> Dataset:
    """Real vectors, a tenth of them held out; the order is the file's, shuffled once."""
    values = values[S.Rng(0).permutation(len(values))].float()
    test = len(values) // 10
    return Dataset(name, Split(values[test:]), Split(values[:test]), Scaling.identity())


def digits(data: Path) -> Dataset:
    return Digits()


def mnist(data: Path) -> Dataset:
    return Idx(str(data / "mnist"))


def cifar(data: Path) -> Dataset:
    with np.load(data / "cifar10_4000" / "images.npz", allow_pickle=False) as file:
        raw = torch.from_numpy(file["x"]).permute(0, 3, 1, 2).contiguous()
    return Dataset("cifar", Split(raw[400:]), Split(raw[:400]), Scaling(levels=256))


def audio(data: Path, window: int = 256) -> Dataset:
    """Windows (1, 256) of spoken digits at 8 kHz: in every recording the eight with most energy, over its RMS there."""
    with np.load(data / "spoken_digits" / "spoken_digits.npz", allow_pickle=False) as file:
        samples, offsets = file["samples"], file["offsets"]
    found = []
    for start, stop in itertools.pairwise(offsets):
        parts = torch.from_numpy(samples[start : start + (stop - start) // window * window]).float().view(-1, 1, window)
        parts = parts[parts.square().mean((1, 2)).topk(min(8, len(parts))).indices] / 32768
        found.append(parts / parts.square().mean().sqrt().clamp(min=1e-4))
    return continuous("audio", torch.cat(found))


def ethanol(data: Path) -> Dataset:
    """The positions (27,) of the nine atoms, centred and divided by one number, the standard deviation of them all."""
    with np.load(data / "molecules" / "ethanol.npz", allow_pickle=False) as file:
        x = torch.from_numpy(file["positions"]).flatten(1)
    x = x - x.mean(0)
    return continuous("ethanol", x / x.std())


def moons(data: Path) -> Dataset:
    return Moons().dataset()


def pinwheel(data: Path) -> Dataset:
    return Pinwheel().dataset()


def swiss_roll(data: Path) -> Dataset:
    return SwissRoll().dataset()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One network.

    Attributes:
        data: the folder that the user gives -> its data; the names inside are the functions' own.
        network, sde, parameterization, sigma_data, noise_input, scale_input: see `S.Preconditioned`; `scale` is that
            of classifier-free guidance, for networks that are told the class.
        times, weighting, images, batch, lr, clip: of training; images counts samples seen.
    """

    data: Callable[[Path], Dataset]
    network: Callable[[], nn.Module]
    sde: Callable[[], S.SDE]
    parameterization: S.Parameterization
    sigma_data: float = 1.0
    noise_input: Callable[[S.SDE, Tensor], Tensor] | None = None
    scale_input: bool = True
    scale: float | None = None
    times: Times
    weighting: Weighting
    images: int
    batch: int = 64
    lr: float = 2e-3
    clip: float = 10.0

    def denoiser(self) -> S.Preconditioned:
        """With the weights that training starts from."""
        torch.manual_seed(0)
        return S.Preconditioned(
            self.network(), self.sde(), self.parameterization, sigma_data=self.sigma_data,
            noise_input=self.noise_input, scale_input=self.scale_input,
        )  # fmt: skip

    def guided(self, denoiser: S.Denoiser) -> S.Denoiser:
        return denoiser if self.scale is None else S.ClassifierFree(denoiser, self.scale)

    def cond(self, n: int) -> S.Cond:
        """Of n samples: the ten classes in turn, where there is guidance."""
        return None if self.scale is None else torch.arange(n) % 10


def unet(shape: Sequence[int], width: int, multipliers: Sequence[int], **more: Any) -> Callable[[], nn.Module]:
    return partial(S.nn.UNet, shape, width=width, multipliers=multipliers, blocks=1, **more)


def _edm(sigma_data: float) -> dict[str, Any]:
    """EDM's reading of the output and its loss (Karras et al. 2022, table 1)."""
    return {"parameterization": S.EDM(sigma_data), "sigma_data": sigma_data, "times": LogNormalTimes(-1.0, 1.4),
            "weighting": EDMWeighting(sigma_data)}  # fmt: skip


def _discrete(sde: Callable[[], S.SDE]) -> dict[str, Any]:
    """What DDPM does: ε from x_t itself and the step, unweighted, at the table's own times."""
    return {"sde": sde, "parameterization": S.Eps(), "noise_input": step_index, "scale_input": False,
            "times": TableTimes(), "weighting": Simple(), "data": mnist,
            "network": unet((1, 28, 28), 16, (1, 2, 2), embedding="sinusoidal", embedding_scale=0.01)}  # fmt: skip


_likelihood = {"times": UniformTimes(), "weighting": Likelihood(), "clip": 500.0}  # a loss in nats
_eps = {"parameterization": S.Eps(), "times": UniformTimes(), "weighting": Simple()}
_digits = {"data": digits, "network": unet((1, 8, 8), 32, (1, 2))}
_flow = {"sde": S.RectifiedFlow, "parameterization": S.Velocity(), "times": UniformTimes(), "weighting": Simple()}
_points = {"images": 2_000_000, "batch": 512}

RECIPES: dict[str, Recipe] = {
    "moons_relu": Recipe(
        data=moons, network=partial(Plain, 2, 128, 3, nn.ReLU), sde=S.VPSDE, **_eps, **_points
    ),
    "pinwheel_leaky": Recipe(
        data=pinwheel, network=partial(Plain, 2, 128, 3, partial(nn.LeakyReLU, 0.2)),
        sde=partial(S.VESDE, sigma_max=10.0), **_edm(1.0), **_points,
    ),
    "swiss_silu": Recipe(data=swiss_roll, network=partial(Plain, 2, 128, 3, nn.SiLU), **_flow, **_points),
    "ethanol": Recipe(
        data=ethanol, network=partial(S.nn.MLP, (27,), width=192, depth=3), sde=S.EDMSDE, **_edm(1.0),
        images=600_000, batch=256,
    ),
    "digits_vp": Recipe(sde=S.VPSDE, parameterization=S.Eps(), **_likelihood, **_digits, images=100_000),
    "digits_edm": Recipe(sde=S.EDMSDE, **_edm(0.7), **_digits, images=50_000),
    "mnist_ddpm": Recipe(**_discrete(linear_betas), images=20_000),
    "digits_flow": Recipe(**_flow, **_digits, images=50_000),
    "audio": Recipe(
        data=audio, network=unet((1, 256), 16, (1, 2, 2, 2), attention=(32,)), sde=S.VPSDE, parameterization=S.V(),
        times=UniformTimes(), weighting=Simple(), images=40_000,
    ),
    "digits_ve": Recipe(
        sde=partial(S.VESDE, sigma_max=10.0), parameterization=S.EDM(0.7), sigma_data=0.7, **_likelihood, **_digits,
        images=50_000,
    ),
    "mnist_classes": Recipe(
        data=mnist, network=unet((1, 28, 28), 16, (1, 2, 2), attention=(7,), classes=10, cond_dropout=0.1),
        sde=S.VPSDE, **_edm(0.6), scale=2.0, images=18_000,
    ),
    "cifar": Recipe(
        data=cifar, network=unet((3, 32, 32), 16, (1, 2, 3, 4), attention=(8,)), sde=S.VPSDE, **_edm(0.5),
        images=14_000,
    ),
    "mnist_cosine": Recipe(**_discrete(cosine_betas), images=16_000),
}  # fmt: skip


def train(name: str, data: Path, folder: Path) -> None:
    """Trains one network and writes its averaged weights to `folder`/`name`.safetensors."""
    recipe = RECIPES[name]
    dataset, denoiser = recipe.data(data), recipe.denoiser()
    loss = DenoisingLoss(denoiser, recipe.times, recipe.weighting)
    optimizer = torch.optim.Adam(loss.parameters(), recipe.lr, betas=(0.9, 0.99), fused=True)
    state = TrainingState(
        loss, optimizer, EMA(loss, half_life=recipe.images / 20), dataset,
        EpochOrder(len(dataset.train), recipe.batch, 0), S.Rng(0), conditional=recipe.scale is not None,
    )  # fmt: skip
    trainer = Trainer(
        images=recipe.images, batch_size=recipe.batch, warmup=recipe.images // 30, cooldown=recipe.images // 2,
        clip=recipe.clip, log_every=recipe.images // 20,
    )  # fmt: skip
    trainer.fit(state)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in state.average.denoiser.network.state_dict().items()}
    measured = recipe.guided(state.average.denoiser).measure(dataset.encode(dataset.train.raw), recipe.cond(16))
    noted = {"shape": json.dumps(dataset.event_shape), "spread": str(measured.data_std),
             "roughness": str(measured.roughness)}  # fmt: skip
    save_file(weights, folder / f"{name}.safetensors", noted)


def facts(name: str, folder: Path | str) -> dict[str, str]:
    """What is noted beside the weights: shape of one sample, and what `Denoiser.measure` found."""
    with safe_open(Path(folder) / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def load(name: str, folder: Path | str) -> tuple[S.Denoiser, tuple[int, ...], Callable[[int], S.Cond]]:
    """A trained network.

    Returns:
        denoiser: in eval mode, with guidance around it where the recipe has some.
        shape: of one sample.
        cond: n -> the condition of n samples, classes in turn; None where the network takes none.

    Raises:
        FileNotFoundError: it has not been trained.
    """
    recipe, path = RECIPES[name], Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected weights; make them: python benchmarks/networks.py train {name}")
    denoiser = recipe.denoiser()
    denoiser.network.load_state_dict(load_file(path))
    denoiser = denoiser.eval().requires_grad_(False)
    guided, noted = recipe.guided(denoiser), facts(name, folder)
    guided.data_std, guided.roughness = float(noted["spread"]), float(noted["roughness"])
    return guided, tuple(json.loads(noted["shape"])), recipe.cond
