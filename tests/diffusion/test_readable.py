"""What objects are shown as: the call that made them."""

from __future__ import annotations

import copy

import pytest
import torch

import scoresde as S
from scoresde.data import Split


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (S.VPSDE(), "VPSDE(beta_min=0.1, beta_max=20.0)"),
        (S.VPSDE(0.2, t_min=1e-3), "VPSDE(beta_min=0.2, beta_max=20.0, t_min=0.001)"),
        (S.EDMSDE(), "EDMSDE(sigma_min=0.002, sigma_max=80.0)"),
        (S.X0(), "X0()"),
        (S.UniPC(order=2), "UniPC(order=2, variant='bh2', eta=0.0)"),
        (S.KarrasGrid(), "KarrasGrid(rho=7.0)"),
        (S.Exact(chunk=8), "Exact(chunk=8)"),
        (S.Rng(3), "Rng(3)"),
        (S.Rng(seeds=[1, 2]), "Rng(seeds=[1, 2])"),
        (
            Split(torch.zeros(3, 2), torch.tensor([0, 1, 0])),
            "Split(3 samples (2,) of torch.float32, label)",
        ),
        (
            S.Sampler(S.DDIM(), S.LogSNRGrid(t_end=0.01), steps=4),
            "Sampler(step=DDIM(eta=0.0), grid=LogSNRGrid(t_end=0.01), steps=4, denoise=True, cuda_graph=False)",
        ),
    ],
)
def test_an_object_is_shown_as_the_call_that_made_it(made: object, shown: str) -> None:
    assert repr(made) == repr(copy.deepcopy(made)) == shown


def test_a_table_is_cut() -> None:
    assert len(repr(S.TableSDE(torch.linspace(0.99, 0.01, 1000)))) < 300


def test_a_likelihood_is_its_mean_and_error() -> None:
    sure, unsure, none = torch.tensor([-2.0, -4.0]), torch.tensor([0.1, 0.2]), torch.zeros(2)
    result = S.LogLikelihood(sure, unsure, torch.zeros(2, 5), 30, none, none)
    # standard deviation √2 over √2; D ln 2 = 3.466
    assert repr(result) == "LogLikelihood(-3 ± 1 nats, 0.86562 ± 0.29 bits/dim; samples: 2, evaluations: 30)"
    one = S.LogLikelihood(sure[:1], unsure[:1], torch.zeros(1, 5), 30, none, none)
    assert repr(one) == "LogLikelihood(-2 ± 0.1 nats, 0.57708 ± 0.029 bits/dim; samples: 1, evaluations: 30)"


def test_only_public_names_are_listed() -> None:
    assert dir(S) == sorted(S.__all__)
