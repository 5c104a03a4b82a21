"""tr ∂field/∂x beside the field, against the full Jacobian; one forward; probes and their stated error."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import EVENT_SHAPES
from torch import Tensor

from scoresde import Exact, Hutchinson, Rng
from scoresde.likelihood.divergence import HutchPlusPlus

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
    # several probes are calibrated (±4 sd of a variance from 4,000 draws) but for Student's 3.182 in place of 1.96;
    # one is at most 2D/(D − 2)·2 too wide
    assert ratio < (1.15 * (3.182 / 1.96) ** 2 if count > 1 else 5)


@pytest.mark.parametrize("probes", [2, 3, 4, 6, 30])
def test_an_interval_of_few_probes_is_students(probes: int) -> None:
    """Of normal estimates, ±1.96 stderr holds the mean in 95 % of 40,000 draws: sd 0.1 %, and the expansion 0.3 %."""
    estimates = Rng(0).normal((40_000, probes), dtype=torch.float64)
    mean, stderr = Hutchinson(probes).summarise(estimates, estimates)
    assert float((mean.abs() <= 1.96 * stderr).double().mean()) == pytest.approx(0.95, abs=0.007)


def low_rank(dims: int, rank: int, seed: int = 0) -> Tensor:
    """What M is 3 I minus: a matrix of the given rank with eigenvalues 1 to 3, an uneven diagonal, a little noise."""
    basis = torch.linalg.qr(Rng(seed).normal((dims, dims), dtype=torch.float64)).Q[:, :rank]
    diagonal = 0.02 * Rng(seed + 1).uniform((dims,), dtype=torch.float64)
    noise = 1e-3 * Rng(seed + 2).normal((dims, dims), dtype=torch.float64)
    return basis @ torch.diag(torch.linspace(1, 3, rank, dtype=torch.float64)) @ basis.T + torch.diag(diagonal) + noise


def integrated(divergence, matrix: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n independent estimates of tr(3 I − A) and their errors, the model looked at being x ↦ A x."""
    x = torch.zeros(n, len(matrix), dtype=torch.float64)
    probes = divergence.probes(x, Rng(seed), lambda z, ratio: z @ matrix)
    _, columns = divergence(lambda z: 3 * z - z @ matrix, x, probes)
    assert columns.shape[1] == divergence.columns(len(matrix))[0]
    return divergence.summarise(columns, probes)


def test_hutch_plus_plus_is_unbiased_and_beats_hutchinson_where_rank_is_low() -> None:
    """Eight products each, D = 40, rank 3: the mean within 4 of its standard errors, the variance 20 times smaller."""
    matrix = low_rank(40, 3)
    exact = 3 * 40 - float(matrix.trace())
    n = 4_000
    ours, stated = integrated(HutchPlusPlus(4, 4), matrix, n, 1)
    plain, _ = integrated(Hutchinson(8), matrix, n, 2)
    assert abs(float(ours.mean()) - exact) < 4 * float(ours.std()) / math.sqrt(n)
    assert float(plain.var()) > 20 * float(ours.var())
    inside = (ours - exact).abs() <= 1.96 * stated
    assert float(inside.double().mean()) > 0.93


def test_hutch_plus_plus_is_unbiased_whatever_the_basis() -> None:
    """A basis of nothing but noise, a Jacobian of full rank that is not symmetric: the mean is still the trace."""
    field, x = draw((6,), n=1)
    trace = float(field.jacobians(x)[0].trace())
    n = 20_000
    divergence, many = HutchPlusPlus(2, 2), x.expand(n, 6)
    probes = divergence.probes(many, Rng(3), lambda z, ratio: torch.zeros_like(z))
    estimate, _ = divergence.summarise(divergence(field, many, probes)[1], probes)
    assert abs(float(estimate.mean()) - trace) < 4 * float(estimate.std()) / math.sqrt(n)


@each_event
def test_hutch_plus_plus_has_a_basis_of_the_range_and_signs(event) -> None:
    """Orthonormal rows, of the row space of the Jacobian looked at; a basis of all dimensions is the exact trace."""
    field, x = draw(event)
    dims = math.prod(event)
    k = min(3, dims)
    flat = Rng(4).normal((k, dims), dtype=torch.float64)
    projector = flat.T @ torch.linalg.inv(flat @ flat.T) @ flat
    probes = (
        HutchPlusPlus(3, 2).probes(x, Rng(0), lambda z, ratio: (z.flatten(1) @ projector).reshape(z.shape)).flatten(2)
    )
    basis, signs = probes[:, :k], probes[:, k:]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(k, dtype=torch.float64).expand(3, k, k))
    torch.testing.assert_close(basis @ projector, basis)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    whole = HutchPlusPlus(dims + 5, 2)
    probes = whole.probes(x, Rng(0), lambda z, ratio: field(z))
    estimate, stderr = whole.summarise(whole(field, x, probes)[1], probes)
    torch.testing.assert_close(estimate, field.jacobians(x).diagonal(dim1=1, dim2=2).sum(1))
    assert not stderr.any()


def test_hutch_plus_plus_is_exact_for_a_diagonal_beside_its_basis() -> None:
    """c I minus a matrix of the basis' own rank: nothing is left to chance, whatever the probes."""
    basis = torch.linalg.qr(Rng(0).normal((12, 2), dtype=torch.float64)).Q
    matrix = basis @ basis.T
    estimate, stderr = integrated(HutchPlusPlus(2, 2), matrix, 50, 1)
    torch.testing.assert_close(estimate, torch.full((50,), 3.0 * 12 - 2, dtype=torch.float64))
    assert float(stderr.max()) < 1e-10


@pytest.mark.parametrize(
    "divergence",
    [Exact(2), Hutchinson(1), Hutchinson(2), HutchPlusPlus(1, 2)],
    ids=["exact", "one probe", "two probes", "hutch++"],
)
def test_rates_carry_gradients_when_asked(divergence) -> None:
    """d rates/dx against central differences, D = 3; without being asked nothing carries any."""
    field, x = draw((3,), n=2)
    probes = divergence.probes(x, Rng(0), lambda z, ratio: field(z))
    leaf = x.clone().requires_grad_()
    value, rates = divergence(field, leaf, probes, differentiable=True)
    direction = Rng(5).normal(x.shape, dtype=torch.float64)
    found = []
    for output in (value, rates):
        (grad,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
        found.append(float((grad * direction).sum()))
    sides = [divergence(field, x + h * direction, probes) for h in (1e-5, -1e-5)]
    for k, got in enumerate(found):
        assert got == pytest.approx(float((sides[0][k] - sides[1][k]).sum()) / 2e-5, rel=1e-6, abs=1e-8)
    assert not any(output.requires_grad for output in divergence(field, leaf, probes))


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
    with pytest.raises(ValueError, match="Exact's chunk is a whole number of at least 1; got 0"):
        Exact(0)
    with pytest.raises(ValueError, match="Hutchinson's number of probes is a whole number of at least 1; got 0"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="'rademacher' or 'gaussian'"):
        Hutchinson(1, "uniform")
    wrongs = {
        "sketch": (0, "at least 1; got 0"),
        "probes": (1, "at least 2; got 1"),
        "level": (0.0, "> 0 and finite; got 0.0"),
    }
    for name, (value, message) in wrongs.items():
        with pytest.raises(ValueError, match=f"HutchPlusPlus's .*{message}"):
            HutchPlusPlus(**{name: value})
    with pytest.raises(ValueError, match="looks at the model first"):
        HutchPlusPlus().probes(torch.zeros(2, 3), Rng(0))
