"""tr ∂field/∂x beside the field, against the full Jacobian; one forward; probes and their stated error."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import EVENT_SHAPES
from torch import Tensor

from scoresde import Exact, Hutchinson, Rng

each_event = pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)


class Field:
    """A smooth nonlinear field over any event shape, mixing every pair of dimensions; counts its calls."""

    def __init__(self, event: tuple[int, ...], seed: int = 0):
        dims = math.prod(event)
        self.mix = Rng(seed).normal((dims, dims), dtype=torch.float64) / math.sqrt(dims)
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        flat = x.flatten(1)
        return torch.tanh(flat @ self.mix.to(x.dtype)).mul(1 + flat.sum(1, keepdim=True).sin()).reshape(x.shape)

    def jacobians(self, x: Tensor) -> Tensor:
        """(B, D, D), by autograd, sample by sample."""
        dims = x[0].numel()
        rows = [torch.autograd.functional.jacobian(self, x[k : k + 1]).reshape(dims, dims) for k in range(len(x))]
        return torch.stack(rows)


def draw(event: tuple[int, ...], n: int = 3) -> tuple[Field, Tensor]:
    return Field(event), Rng(1).normal((n, *event), dtype=torch.float64)


@each_event
@pytest.mark.parametrize("chunk", [1, 5, 32, 1000])
def test_exact_is_the_trace(event, chunk: int) -> None:
    field, x = draw(event)
    exact = field.jacobians(x).diagonal(dim1=1, dim2=2).sum(1)
    field.calls = 0
    divergence = Exact(chunk)
    value, rates = divergence(field, x, divergence.probes(x, Rng(0)))
    assert field.calls == 1
    torch.testing.assert_close(value, field(x), rtol=0, atol=0)
    torch.testing.assert_close(rates, exact[:, None], rtol=1e-12, atol=1e-12)
    estimate, stderr = divergence.summarise(rates, divergence.probes(x, Rng(0)))
    assert torch.equal(estimate, rates[:, 0]) and not stderr.any()


@each_event
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("count", [1, 3])
def test_hutchinson_is_the_quadratic_form_of_its_probes(event, kind: str, count: int) -> None:
    field, x = draw(event)
    jacobian = field.jacobians(x)
    field.calls = 0
    divergence = Hutchinson(count, kind)
    probes = divergence.probes(x, Rng(2))
    assert probes.shape == (3, count, *event)
    if kind == "rademacher":
        assert torch.equal(probes.abs(), torch.ones_like(probes))
    value, rates = divergence(field, x, probes)
    assert field.calls == 1
    torch.testing.assert_close(value, field(x), rtol=0, atol=0)
    flat = probes.flatten(2)
    forms = torch.einsum("bpi,bij,bpj->bp", flat, jacobian, flat)
    torch.testing.assert_close(rates[:, :count], forms, rtol=1e-10, atol=1e-10)
    total, controlled = divergence.columns(math.prod(event))
    assert rates.shape == (3, total) and controlled == count


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_known_variance(kind: str) -> None:
    """20,000 probes: mean within 4 standard errors of tr J, variance Σ_{i≠j} S_ij² (+ 2Σ S_ii²), S = (J + Jᵀ)/2·√2.

    Var eᵀJe = 2Σ_{i≠j} S_ij² for Rademacher and 2‖S‖_F² for Gaussian probes, S the symmetric part (Hutchinson 1990).
    The variance of a variance estimated from n draws is (κ − 1)/n with kurtosis κ ≤ 15 for such forms: 4 sd = 11 %.
    """
    field, x = draw((4,), n=1)
    jacobian = field.jacobians(x)[0]
    n = 20_000
    divergence = Hutchinson(1, kind)
    many = x.expand(n, 4)
    _, rates = divergence(field, many, divergence.probes(many, Rng(3)))
    forms = rates[:, 0]
    symmetric = 0.5 * (jacobian + jacobian.T)
    off = symmetric - torch.diag(symmetric.diagonal())
    variance = 2 * (off if kind == "rademacher" else symmetric).square().sum()
    assert abs(float(forms.mean() - jacobian.trace())) < 4 * float((variance / n).sqrt())
    assert float(forms.var() / variance) == pytest.approx(1, abs=0.11)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_stated_error_covers_the_true_one(kind: str, count: int) -> None:
    """Mean of stderr² over many draws ≥ the true variance of the estimate (5 % aside): honest on average.

    Exact on average for several probes; conservative for one, whose own product stands in for the spread.
    """
    field, x = draw((12,), n=1)
    many = x.expand(4_000, 12)
    divergence = Hutchinson(count, kind)
    probes = divergence.probes(many, Rng(4))
    _, rates = divergence(field, many, probes)
    estimate, stderr = divergence.summarise(rates, probes)
    ratio = float(stderr.square().mean() / estimate.var())
    assert ratio > 0.95
    # several probes are calibrated (±4 sd of a variance from 4,000 draws); one is at most 2D/(D − 2)·2 too wide
    assert ratio < (1.15 if count > 1 else 5)


def test_probes_of_a_sample_follow_its_seed() -> None:
    x = torch.zeros(3, 2, 4)
    together = Hutchinson(2).probes(x, Rng(seeds=[7, 8, 9]))
    alone = Hutchinson(2).probes(x[:1], Rng(seeds=[8]))
    assert torch.equal(together[1], alone[0])


def test_a_constant_field_has_no_divergence() -> None:
    x = torch.ones(2, 3)
    for divergence in (Exact(), Hutchinson(1), Hutchinson(2)):
        value, rates = divergence(lambda y: torch.full((2, 3), 5.0), x, divergence.probes(x, Rng(0)))
        assert torch.equal(value, torch.full((2, 3), 5.0)) and not rates.any()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="chunk >= 1"):
        Exact(0)
    with pytest.raises(ValueError, match="at least one probe"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="'rademacher' or 'gaussian'"):
        Hutchinson(1, "uniform")
