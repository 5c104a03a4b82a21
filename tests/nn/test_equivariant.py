"""The network for sets of points: what turns, shifts and exchanges with its input, and what that makes of densities."""

from __future__ import annotations

import pytest
import torch

from scoresde import EDM, EDMSDE, Budget, Exact, Preconditioned, Rng, log_likelihood
from scoresde.nn import EGNN
from scoresde.ops.centred import centred_basis

WATER = (8, 1, 1)


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """In float64, what is zero at the start drawn at random."""
    for parameter in network.double().eval().parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return network


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turn(reflect: bool, d: int = 3) -> torch.Tensor:
    """A random orthogonal matrix of the determinant asked for."""
    q, _ = torch.linalg.qr(draws(d, d, seed=4))
    q[0] *= torch.linalg.det(q) * (-1 if reflect else 1)
    return q


def test_the_basis_is_orthonormal_and_blind_to_the_centre() -> None:
    for points in (2, 3, 9, 50):
        basis = centred_basis(points)
        assert basis.shape == (points - 1, points) and basis.dtype == torch.float64
        torch.testing.assert_close(basis @ basis.mT, torch.eye(points - 1).double(), rtol=0, atol=1e-14)
        torch.testing.assert_close(basis.sum(1), torch.zeros(points - 1).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("reflect", [True, False])
def test_the_output_turns_with_its_input(centred: bool, reflect: bool) -> None:
    network = awake(EGNN((4 - centred, 3), numbers=(*WATER, 6), centred=centred, width=16, depth=3, cond_dim=2))
    x, c_noise, cond, q = draws(5, 4 - centred, 3), draws(5), draws(5, 2), turn(reflect)
    here = network(x, c_noise, cond)
    assert here.abs().mean() > 0.05
    torch.testing.assert_close(network(x @ q, c_noise, cond), here @ q, rtol=0, atol=1e-13)
    single = network.float()(x.float() @ q.float(), c_noise.float(), cond.float())
    assert (single - here @ q).abs().max() < 1e-5  # the promise in float32


def test_it_lives_in_any_number_of_dimensions() -> None:
    network, x, c_noise = awake(EGNN((4, 2), width=8, depth=2)), draws(3, 4, 2), draws(3)
    torch.testing.assert_close(network(x @ turn(True, 2), c_noise), network(x, c_noise) @ turn(True, 2))


def test_shifted_points_are_the_same_points() -> None:
    network = awake(EGNN((3, 3), numbers=WATER, centred=False, width=16, depth=2))
    x, c_noise = draws(5, 3, 3), draws(5)
    here = network(x, c_noise)
    torch.testing.assert_close(network(x + draws(5, 1, 3, seed=2), c_noise), here, rtol=0, atol=1e-13)
    torch.testing.assert_close(here.mean(1), torch.zeros(5, 3).double(), rtol=0, atol=1e-15)


def test_in_the_coordinates_of_centred_points_it_is_the_same_network() -> None:
    whole = awake(EGNN((3, 3), numbers=WATER, centred=False, width=16, depth=2))
    within = EGNN((2, 3), numbers=WATER, width=16, depth=2).double().eval()
    within.load_state_dict(whole.state_dict())
    x, c_noise, basis = draws(5, 3, 3), draws(5), centred_basis(3)
    torch.testing.assert_close(within(basis @ x, c_noise), basis @ whole(x, c_noise), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("order", "follows"), [((0, 2, 1), True), ((1, 0, 2), False)])
def test_points_of_one_number_may_be_exchanged_and_others_may_not(order: tuple[int, ...], follows: bool) -> None:
    network = awake(EGNN((2, 3), numbers=WATER, width=16, depth=2))
    basis = centred_basis(3)
    exchange = basis @ torch.eye(3).double()[list(order)] @ basis.mT
    x, c_noise = draws(5, 2, 3), draws(5)
    apart = (network(exchange @ x, c_noise) - exchange @ network(x, c_noise)).abs().max()
    assert apart < 1e-13 if follows else apart > 1e-3


def test_untrained_under_edm_it_is_the_denoiser_of_a_gaussian() -> None:
    model = Preconditioned(EGNN((2, 3), numbers=WATER, width=8, depth=1).double(), EDMSDE(), EDM(0.7), sigma_data=0.7)
    x, sigma = draws(4, 2, 3), 1.3
    expected = x * 0.7**2 / (0.7**2 + sigma**2)
    torch.testing.assert_close(model(x, torch.tensor(sigma).double()).x0, expected)


def test_turned_and_exchanged_molecules_are_equally_likely() -> None:
    network = awake(EGNN((2, 3), numbers=WATER, width=16, depth=2))
    model = Preconditioned(network, EDMSDE(0.3, 10.0), EDM(0.7), sigma_data=0.7)
    x, basis = 0.7 * draws(4, 2, 3), centred_basis(3)
    exchange = basis @ torch.eye(3).double()[[0, 2, 1]] @ basis.mT
    # a fixed grid: tolerances are told by the size of single coordinates, which a turn changes
    score = lambda points: log_likelihood(model, points, Budget(20), divergence=Exact()).log_prob  # noqa: E731
    here, turned, exchanged = score(x), score(x @ turn(True)), score(exchange @ x)
    assert (here - torch.distributions.Normal(0, 0.7).log_prob(x).flatten(1).sum(1)).abs().min() > 0.1
    torch.testing.assert_close(turned, here, rtol=0, atol=1e-9)
    torch.testing.assert_close(exchanged, here, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"event_shape": (6,)}, r"\(points, coordinates\), such as \(9, 3\); got \(6,\)"),
        ({"numbers": (8, 1)}, r"each of the 3 points of samples \(2, 3\) \(centred=true.*got 2"),
        ({"numbers": (8, 1, -1)}, "Each of numbers .* at least 0; got -1"),
        ({"radial": 1}, "number of Gaussians, .* at least 2"),
        ({"depth": 0}, "number of rounds, .* at least 1"),
        ({"reach": 0.0}, "reach is a distance, > 0"),
        ({"cond_tokens": 3}, "no attention to read tokens"),
    ],
)
def test_what_does_not_fit_is_refused(keywords: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EGNN(**{"event_shape": (2, 3), "width": 8, **keywords})


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"for samples \(2, 3\); got \(3, 3\)"):
        EGNN((2, 3), width=8)(Rng(0).normal((1, 3, 3)), torch.zeros(1))
