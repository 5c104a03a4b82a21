"""Operators against dense algebra and torch's own, conjugate gradients against `linalg`, and what errors say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from posterior import matrix
from torch import Tensor

from scoresde import Rng
from scoresde.inverse import (
    Blur,
    ColourMix,
    Compose,
    DownSample,
    Magnitude,
    Mask,
    Observation,
    RandomProjection,
)
from scoresde.inverse.conjugate import conjugate_gradients, solve
from scoresde.inverse.operators import grey

IMAGE = (3, 8, 8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return Rng(seed).normal(shape, dtype=torch.float64)


def flip(x: Tensor) -> Tensor:
    return 2 * x.flip(-1)


LINEAR = {
    "mask": (Mask(draw(8, 8) > 0), IMAGE),
    "channel mask": (Mask(torch.tensor([1, 0, 1])[:, None, None]), IMAGE),
    "vector mask": (Mask(torch.arange(6) % 2), (6,)),
    "coarse": (DownSample(2), IMAGE),
    "coarse signal": (DownSample(4), (2, 12)),
    "coarse vector": (DownSample(3), (6,)),
    "coarse volume": (DownSample(2), (1, 2, 4, 2)),
    "reflected blur": (Blur(0.8), IMAGE),
    "circular blur": (Blur(0.6, "circular"), (2, 14)),
    "motion blur": (Blur(torch.tensor([0.5, 0.3, 0.2]), "circular"), (6,)),
    "grey": (grey(), IMAGE),
    "projection": (RandomProjection(5, IMAGE), IMAGE),
    "composition": (Compose(Blur(0.5), DownSample(4), grey()), IMAGE),
}
each_linear = pytest.mark.parametrize(("operator", "event"), LINEAR.values(), ids=LINEAR.keys())


@each_linear
def test_the_adjoint_and_the_pseudo_inverse_are_those_of_the_matrix(operator, event) -> None:
    """Aᵀ to the round-off of sums of 192 terms; A⁺ to the 1e-10 asked, times a condition of AᵀA of up to 1e4."""
    a, x = matrix(operator, event), draw(4, *event)
    near = Observation(operator(x[0:1]), operator).near(x, Observation(operator(x[0:1]), operator).split(None)[0])
    u = draw(4, len(a), seed=1).reshape_as(operator(x))
    torch.testing.assert_close(near.forward(x).flatten(1), x.flatten(1) @ a.mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(near.adjoint(u).flatten(1), u.flatten(1) @ a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(near.residual, operator(x[0:1]) - operator(x))
    target = operator(x) + u
    moved = Observation(None, operator).project(x, target, iterations=2000, tolerance=1e-10)
    want = x.flatten(1) + u.flatten(1) @ torch.linalg.pinv(a, rtol=1e-6).mT
    torch.testing.assert_close(moved.flatten(1), want, rtol=1e-5, atol=1e-6)


def test_operators_do_what_torch_does() -> None:
    """Beside average pooling, two-dimensional convolution with padding, the Fourier transform of a matrix, and luma."""
    x = draw(2, *IMAGE)
    torch.testing.assert_close(DownSample(4)(x), F.avg_pool2d(x, 4))
    line = torch.exp(-0.5 * (torch.arange(-4, 5, dtype=torch.float64) / 0.9) ** 2)
    line = line / line.sum()
    plane = torch.outer(line, line).expand(3, 1, 9, 9)
    for edges in ("reflect", "circular"):
        want = F.conv2d(F.pad(x, (4, 4, 4, 4), mode=edges), plane, groups=3)
        torch.testing.assert_close(Blur(0.9, edges)(x), want)
    # a kernel that is not symmetric is convolved, not correlated: y_i = Σ k_j x_{i−j}
    kernel, signal = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), draw(1, 6)
    spectrum = torch.fft.fft(F.pad(kernel, (0, 3)).roll(-1)) * torch.fft.fft(signal)
    torch.testing.assert_close(Blur(kernel, "circular")(signal), torch.fft.ifft(spectrum).real)
    torch.testing.assert_close(grey()(x)[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])
    angles = 2 * math.pi / 6 * torch.outer(torch.arange(6), torch.arange(6)).double()
    waves = torch.polar(torch.full_like(angles, 1 / math.sqrt(6)), -angles)
    torch.testing.assert_close(Magnitude()(signal), (signal.to(waves.dtype) @ waves).abs())
    torch.testing.assert_close(Magnitude(RandomProjection(4, (6,)))(signal), RandomProjection(4, (6,))(signal).abs())
    each = Mask(draw(2, 1, 8, 8) > 0)
    torch.testing.assert_close(each(x), x * each.mask)
    assert not Compose(Blur(0.5), flip).linear and not Magnitude().linear and Compose(Blur(0.5), grey()).linear


def test_a_projection_is_the_generators_and_mostly_keeps_lengths() -> None:
    """E‖M x‖² = rows/D ‖x‖²; the mean over 4000 rows of a χ² has a standard error of √(2/4000) = 2.2 %, times 4."""
    x = draw(1, 3, 5)
    wide = RandomProjection(4000, (3, 5), Rng(3))
    assert float((wide(x) ** 2).sum() / (x**2).sum() * 15 / 4000) == pytest.approx(1.0, abs=0.09)
    assert torch.equal(wide.matrix, RandomProjection(4000, (3, 5), Rng(3)).matrix)
    assert not torch.equal(wide.matrix, RandomProjection(4000, (3, 5), Rng(4)).matrix)


def test_a_function_that_is_not_linear_is_linearised() -> None:
    """A(x) = x³ with its first entry left out: the derivative is diag(3x²), forward and back."""
    x, v, u = draw(3, 4), draw(3, 4, seed=1), draw(3, 3, seed=2)
    seen = Observation(torch.zeros(3, dtype=torch.float64), lambda z: z[:, 1:] ** 3)
    near = seen.near(x, seen.split(None)[0])
    torch.testing.assert_close(near.residual, -(x[:, 1:] ** 3))
    torch.testing.assert_close(near.forward(v), (3 * x**2 * v)[:, 1:])
    torch.testing.assert_close(near.adjoint(u), F.pad(u, (1, 0)) * 3 * x**2)


def spd(n: int, distinct: int) -> Tensor:
    """Two symmetric matrices (2, n, n) of `distinct` eigenvalues each."""
    basis = torch.linalg.qr(draw(2, n, n)).Q
    values = 1.0 + torch.arange(n) % distinct
    return basis @ torch.diag_embed(values.double().expand(2, n)) @ basis.mT


def test_conjugate_gradients_end_after_as_many_steps_as_eigenvalues() -> None:
    """Three distinct ones: exact to round-off times a condition of 3 after three products, not after two."""
    s, b = spd(12, 3), draw(2, 12, seed=5)
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(1)
        return torch.einsum("bij,bj->bi", s, v)

    want = torch.linalg.solve(s, b)
    u = conjugate_gradients(product, b, iterations=50, tolerance=1e-10, strict=True)
    torch.testing.assert_close(u, want, rtol=1e-9, atol=1e-9)
    assert len(calls) == 3
    assert float((conjugate_gradients(product, b, iterations=2, tolerance=1e-10) - want).abs().max()) > 1e-3
    with pytest.raises(RuntimeError, match=r"did not reach 1e-10 in 2 iterations for samples \[0, 1\]"):
        conjugate_gradients(product, b, iterations=2, tolerance=1e-10, strict=True)


def test_samples_are_solved_apart() -> None:
    """A sample's solution is the same beside one that takes longer, one that is 0, and alone; it stops by itself."""
    s, b = torch.stack([spd(6, 2)[0], 3 * torch.eye(6, dtype=torch.float64), spd(6, 6)[1]]), draw(3, 6)
    b[1] = 0
    both = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", s, v), b, iterations=20, tolerance=1e-8)
    for k in range(3):
        alone = conjugate_gradients(lambda v, k=k: v @ s[k], b[k : k + 1], iterations=20, tolerance=1e-8)
        torch.testing.assert_close(both[k : k + 1], alone, rtol=1e-12, atol=1e-14)
    assert bool((both[1] == 0).all())


def test_a_direction_of_negative_curvature_is_not_taken() -> None:
    """diag(2, −1): of b = (1, 0) the solution, of (0, 1) nothing."""
    s = torch.tensor([2.0, -1.0], dtype=torch.float64)
    b = torch.eye(2, dtype=torch.float64)
    u = conjugate_gradients(lambda v: s * v, b, iterations=5, tolerance=1e-8)
    torch.testing.assert_close(u, torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_a_matrix_that_is_not_symmetric_cannot_lead_far() -> None:
    """As a network's Jacobian may be: whatever the number of iterations, the residual is no larger than b."""
    s, b = draw(3, 30, 30) + 2 * torch.eye(30, dtype=torch.float64), draw(3, 30, seed=1)
    for iterations in (1, 5, 40):
        u = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", s, v), b, iterations=iterations, tolerance=1e-8)
        left = b - torch.einsum("bij,bj->bi", s, u)
        assert bool((left.norm(dim=1) <= (1 + 1e-9) * b.norm(dim=1)).all())


def test_systems_are_solved_written_out_or_by_products() -> None:
    """u and log det of diag(std²) + P beside `linalg`; by products log det is that of std² alone."""
    p, b, variance = spd(5, 4), draw(2, 5), 0.1 + draw(2, 5, seed=2) ** 2
    s = p + torch.diag_embed(variance)
    u, log_det = solve(lambda v: torch.einsum("bij,bj->bi", p, v), variance, b, iterations=5, tolerance=1e-9)
    torch.testing.assert_close(u, torch.linalg.solve(s, b), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(log_det, torch.logdet(s), rtol=1e-8, atol=1e-8)
    many = draw(2, 40)
    u, log_det = solve(lambda v: 2 * v, torch.full_like(many, 0.25), many, iterations=3, tolerance=1e-9)
    torch.testing.assert_close(u, many / 2.25)
    torch.testing.assert_close(log_det, torch.full((2,), 40 * math.log(0.25), dtype=torch.float64))


def test_a_sample_that_is_not_finite_leaves_the_others_alone() -> None:
    p, b = spd(3, 4).expand(2, 3, 3).clone(), draw(2, 3)
    p[0, 1, 1] = math.nan
    u, _ = solve(lambda v: torch.einsum("bij,bj->bi", p, v), torch.full_like(b, 0.1), b, iterations=3, tolerance=1e-9)
    assert bool(u[0].isnan().all())
    want = torch.linalg.solve(p[1] + 0.1 * torch.eye(3, dtype=torch.float64), b[1])
    torch.testing.assert_close(u[1], want, rtol=1e-8, atol=1e-10)


def test_what_a_network_made_negative_counts_by_its_size() -> None:
    """With P = diag(−5, 1) and std² = 0.1 the first direction is as uncertain as if P were 5 there."""
    p, b = torch.tensor([-5.0, 1.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    u, log_det = solve(lambda v: p * v, torch.full_like(b, 0.1), b, iterations=2, tolerance=1e-9)
    torch.testing.assert_close(u, torch.tensor([[1 / 5.1, 1 / 1.1]], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_det, torch.tensor([5.1 * 1.1], dtype=torch.float64).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_y_is_shared_or_per_sample_or_comes_with_the_condition(n) -> None:
    x, y = draw(n, 2, 4), draw(n, 2, 2, seed=1)
    operator = DownSample(2)
    own = Observation(y, operator, 0.1)
    for shared in (y[0], y[:1]):
        seen = Observation(shared, operator, 0.1)
        assert torch.equal(seen.near(x, seen.split(None)[0]).residual, y[:1] - operator(x))
    brought = Observation(None, operator, 0.1)
    measured, rest = brought.split({"y": y})
    assert rest is None
    assert torch.equal(brought.near(x, measured).residual, own.near(x, own.split(None)[0]).residual)
    label = torch.arange(n)
    assert torch.equal(brought.split({"y": y, "cond": label})[1], label)
    assert set(brought.split({"y": y, "label": label, "scale": label})[1]) == {"label", "scale"}
    assert own.split(label)[1] is label
    std = torch.linspace(0.1, 0.3, n)
    variance = brought.near(x, brought.split({"y": y, "std": std})[0]).variance
    torch.testing.assert_close(variance, (std.double()[:, None, None] ** 2).expand(n, 2, 2), rtol=1e-6, atol=0)
    # of as many samples as y has entries it is still one for each sample: solvers drop samples until that is so
    flat = Observation(None, lambda x: x, 0.1)
    square = flat.near(draw(n, n), flat.split({"y": draw(n, n), "std": std})[0]).variance
    torch.testing.assert_close(square, (std.double()[:, None] ** 2).expand(n, n), rtol=1e-6, atol=0)


ERRORS = {
    "NaN": (lambda: Observation(torch.tensor([1.0, math.nan]), flip), "y holds finite"),
    "integers": (lambda: Observation(torch.tensor([1, 2]), flip), "y holds finite floating-point"),
    "std": (lambda: Observation(torch.ones(2), flip, -0.1), "std is a noise level, ≥ 0"),
    "infinite std": (lambda: Observation(torch.ones(2), flip, math.inf), "std is a noise level"),
    "mask": (lambda: Mask(torch.tensor([0.5, 1.0])), "A mask is True or 1"),
    "no mask": (lambda: Mask(torch.zeros(3)), "something is seen"),
    "factor": (lambda: DownSample(0), "at least 1"),
    "blocks": (lambda: DownSample(3)(torch.ones(1, 1, 4, 4)), "An axis of 4 has no blocks of 3"),
    "wide": (lambda: Blur(3.0)(torch.ones(1, 1, 8, 8)), "too wide"),
    "edges": (lambda: Blur(1.0, "zero"), "'reflect' or 'circular'"),
    "even kernel": (lambda: Blur(torch.ones(4)), "k odd"),
    "blur": (lambda: Blur(0.0), "> 0"),
    "colours": (lambda: ColourMix(torch.ones(3)), r"\(K, C\)"),
    "rows": (lambda: RandomProjection(0, (3,)), "at least 1"),
    "half a row": (lambda: RandomProjection(2.5, (3,)), "rows is a whole number of at least 1; got 2.5"),
    "a number for a shape": (lambda: RandomProjection(2, 5), r"event_shape .* as in \(2,\) or \(1, 28, 28\); got 5"),
    "a shape of none": (lambda: RandomProjection(2, (3, 0)), r"got \(3, 0\)"),
    "a shape without axes": (lambda: RandomProjection(2, ()), r"got \(\)"),
    "list": (lambda: Observation([1.0], flip), "y holds finite.*got list"),
    "half a factor": (lambda: DownSample(2.5), "whole number"),
    "kernel": (lambda: Blur(torch.tensor([1.0, math.nan, 1.0])), "finite"),
    "mask of others": (lambda: Mask(torch.ones(4))(torch.ones(2, 5)), r"mask of shape \(4,\)"),
    "matrix of others": (lambda: RandomProjection(2, (6,))(torch.ones(2, 5)), "for 6 entries"),
    "nothing": (lambda: Compose(), "needs an operator"),
}


@pytest.mark.parametrize(("make", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_what_cannot_be_is_said_at_once(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()


FIRST_USE = {
    "shape": (Observation(torch.ones(3), flip), r"A\(x\) has shape \(2, 4\).*got \(3,\)"),
    "rows": (Observation(torch.ones(5, 4), flip), r"y is of 5 samples, and x of 2.*cond=\{\"y\": y\}"),
    "lie": (Observation(torch.ones(4), lambda x: x**2, linear=True), "said to be linear"),
    "affine": (Observation(torch.ones(4), lambda x: x + 1, linear=True), "take c from y"),
    "mixed": (Observation(torch.ones(4), lambda x: x.sum(0), linear=True), "keeps samples apart"),
    "one number": (Observation(torch.ones(2), lambda x: x.sum(1)), r"one number a sample \(B, 1\)"),
    "no y": (Observation(None, flip), r"has no y; give it as cond=\{\"y\": y\}"),
    "per-entry std": (Observation(torch.ones(4), flip, torch.ones(3)), r"std is a number, \(2,\) or of the shape of y"),
}


@pytest.mark.parametrize(("seen", "words"), FIRST_USE.values(), ids=FIRST_USE.keys())
def test_what_does_not_fit_is_said_at_first_use(seen, words) -> None:
    x = draw(2, 4)
    with pytest.raises(ValueError, match=words):
        seen.near(x, seen.split(None)[0])


def test_what_comes_with_the_condition_is_looked_at_too() -> None:
    y, x = torch.ones(2, 4), draw(2, 4)
    for cond, words in (
        ({"y": y * math.nan}, "y holds finite"),
        ({"y": y.long()}, "y holds finite"),
        ({"y": y, "std": -torch.ones(2)}, "std is a noise level"),
    ):
        seen = Observation(None, flip, 0.1)
        with pytest.raises(ValueError, match=words):
            seen.near(x, seen.split(cond)[0])
    with pytest.raises(TypeError, match="An operator is a function"):
        Observation(y, None)
    inner = {"y": y, "label": torch.ones(2)}
    assert Observation(2 * y, flip, 0.1).split(inner)[1] is inner  # that y is of an observation further inside
    assert Observation(2 * y, flip, 0.1).split({"label": y})[1] == {"label": y}  # others go on to the network


def test_a_false_claim_is_refused_at_every_call() -> None:
    x, y = draw(2, 4), torch.ones(4)
    for operator, linear, words in (
        (lambda x: x + 1, True, "said to be linear"),
        (lambda x: x**2, True, "said to be linear"),
        (lambda x: x - x.mean(0), True, "keeps samples apart"),
        (lambda x: x - x.mean(0), False, "keeps samples apart"),
        (torch.fft.fft, True, "real and imaginary parts"),
    ):
        seen = Observation(y, operator, 0.1, linear=linear)
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                seen.near(x, seen.split(None)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_depend_on_x_are_known_from_those_of_zeros(dtype) -> None:
    """A stencil of integers has no row of zeros, whatever its differences cancel; a mask has one for each hole."""
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=dtype)[None, None]
    x, mask = draw(2, 1, 28, 28).to(dtype), torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.5
    stencil = Observation(draw(1, 1, 26, 26).to(dtype), lambda x: F.conv2d(x, laplace), linear=True)
    assert stencil.near(x, stencil.split(None)[0]).reached.all()
    y = draw(1, 1, 28, 28).to(dtype) + 3 * ~mask
    near = (seen := Observation(y, Mask(mask), 0.1)).near(x, seen.split(None)[0])
    assert torch.equal(near.reached, mask.expand(2, 1, 28, 28))
    assert not near.residual[~near.reached].any() and torch.equal(near.residual[near.reached], (y - x)[near.reached])


def test_only_a_linear_operator_has_a_pseudo_inverse() -> None:
    with pytest.raises(ValueError, match="of a linear operator"):
        Observation(None, flip).project(draw(1, 4), draw(1, 4))
