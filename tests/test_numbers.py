"""What enters as data is real and of 32 bits or more, or refused; whole numbers are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as S
from scoresde.checks import positive, whole
from scoresde.codecs import Scaling

SDE = S.VPSDE()
MODEL = S.Preconditioned(S.nn.MLP((2,), width=8, depth=1, classes=2), SDE, S.EDM()).eval()
SOLVER = S.Budget(8)
LABEL = torch.tensor([0, 1, 0])

# (x0) -> what is made of it
ENTRIES: dict[str, Callable[[Any], Any]] = {
    "loss": lambda x: S.DenoisingLoss(MODEL)(x, rng=S.Rng(0)),
    "classifier loss": lambda x: S.ClassifierLoss(S.NoisyClassifier(S.nn.Classifier((2,), classes=2), SDE))(
        x, LABEL, rng=S.Rng(0)
    ),
    "perturb": lambda x: SDE.perturb(x, 0.5, torch.zeros(3, 2)),
    "denoiser": lambda x: MODEL(x, torch.tensor(0.5)).x0,
    "score": lambda x: S.ScoreFunction(lambda x, t: -x, SDE)(x, torch.tensor(0.5)).x0,
    "encode": lambda x: S.AdaptiveODE(0.1, 0.1).encode(MODEL, x),
    "sampler": lambda x: S.Sampler(S.DDIM(), steps=2)(MODEL, x),
    "sdedit": lambda x: S.sdedit(MODEL, x, S.Sampler(S.DDIM(), steps=2), 0.5),
    "log p": lambda x: S.log_likelihood(MODEL, x, SOLVER).latent,
    "draw": lambda x: S.sample_with_log_prob(MODEL, x, SOLVER)[0],
    "elbo": lambda x: S.elbo(MODEL, x, samples=1).log_prob,
    "weighted": lambda x: S.importance_weighted(MODEL, x, steps=1, samples=1).log_prob,
    "classify": lambda x: S.classify(MODEL, x, 2, SOLVER).log_prob,
    "measure": lambda x: torch.tensor(S.ScoreFunction(lambda x, t: -x, SDE).measure(x).data_std),
    "continuous": lambda x: Scaling(raw_low=-1, raw_high=2).encode(x),
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_data_that_are_not_real_numbers_are_refused(entry: str, dtype: torch.dtype) -> None:
    """Noise of std 1 would be cast back to whole numbers, and the steps of a solve as well."""
    with pytest.raises((TypeError, ValueError), match=str(dtype)):
        ENTRIES[entry](torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=dtype))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_data_are_what_their_numbers_say_in_float32(entry: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = ENTRIES[entry](torch.tensor([[0, 0.5], [1, 0.25], [-0.5, 1]]).to(dtype))
    torch.manual_seed(0)
    right = ENTRIES[entry](torch.tensor([[0, 0.5], [1, 0.25], [-0.5, 1]]))  # numbers that all of these types have
    assert found.dtype == right.dtype and found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found, right)


def test_an_array_is_told_how_to_become_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"x0 is a tensor .*got ndarray. torch.as_tensor"):
        S.DenoisingLoss(MODEL)(np.zeros((3, 2), np.float32))


def test_small_noise_is_not_rounded_away() -> None:
    """σ = 1e-3 at t_min; the steps of bfloat16 near 1 are 8e-3."""
    noisy = SDE.perturb(torch.ones(1000, 2).bfloat16(), SDE.t_min, S.Rng(0).normal((1000, 2)))
    assert noisy.std().item() == pytest.approx(float(SDE.marginal(torch.tensor(SDE.t_min))[1]), rel=0.1)


WHOLE = [3, np.int32(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)]
NOT_WHOLE: list[Any] = [
    3.0,
    True,
    "3",
    None,
    np.float32(3),
    np.bool_(True),
    torch.tensor(3.0),
    torch.tensor(True),
    3j,
    [3],
]


@pytest.mark.parametrize("value", WHOLE)
def test_whole_numbers_of_any_library_are_taken(value: Any) -> None:
    found = whole(value, "n")
    assert found == 3 and type(found) is int
    assert S.Sampler(S.DDIM(), steps=value).steps == 3
    assert S.Sampler(S.DDIM(), steps=2)(MODEL, (value, 2)).shape == (3, 2)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda n: whole(n, "n"),
    "seed": lambda n: S.Rng(-1 if n is None else n),
    "seeds": lambda n: S.Rng(seeds=[n]),
    "shape": lambda n: S.Sampler(S.DDIM(), steps=2)(MODEL, (n, 2)),
    "budget": lambda n: S.sample(MODEL, (2, 2), budget=n),
    "calls": lambda n: S.Budget(n),
    "probes": lambda n: S.Hutchinson(n),
    "grid": lambda n: S.UniformGrid()(SDE, n),
    "classes": lambda n: S.classify(MODEL, torch.zeros(1, 2), n, SOLVER),
    "fit": lambda n: S.fit_grid(MODEL, S.Adams(2), steps=n, shape=(2,)),
    "width": lambda n: S.nn.MLP((2,), width=2, depth=n),
    "event": lambda n: S.nn.MLP((n,), width=2),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused(make: str, value: Any) -> None:
    if make == "classes" and value == [3]:
        return  # a list of conditions
    with pytest.raises(ValueError):
        MAKERS[make](value)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "1", None, 1j, [1.0], 10**400])
def test_numbers_that_are_not_positive_and_finite_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="c is a number, > 0 and finite"):
        positive(value, "c")
    for tolerances in ((value, 1e-3), (1e-3, value)):
        with pytest.raises(ValueError):
            S.Tolerance(*tolerances)
        with pytest.raises(ValueError):
            S.AdaptiveODE(*tolerances)


@pytest.mark.parametrize("make", [
    lambda: whole(2**63, "n"), lambda: S.Rng(2**63), lambda: S.Hutchinson(2**63), lambda: S.UniformGrid(float("inf")),
    lambda: S.EDMSDE(sigma_max=float("inf")), lambda: S.KarrasGrid(float("inf")), lambda: S.EDM(float("inf")),
])  # fmt: skip
def test_numbers_without_bound_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        make()


def test_positive_numbers_of_any_library_are_taken() -> None:
    assert [positive(value, "c") for value in (2, np.float32(2), torch.tensor(2.0))] == [2.0, 2.0, 2.0]


def test_a_time_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="t is a time; got nan"):
        SDE.perturb(torch.zeros(1, 2), float("nan"), torch.zeros(1, 2))


def test_interpolation_is_of_latents() -> None:
    whole_numbers: Tensor = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        S.interpolate(whole_numbers, whole_numbers, 0.5)
