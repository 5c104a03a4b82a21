"""Rng: the law of its numbers, and that sample k depends on seed k only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoresde import Rng

# Kolmogorov–Smirnov at level 1e-5: sup|F_n − F| √n exceeds √(−ln(α/2)/2) with probability at most α (Massart 1990).
KS_CRITICAL = math.sqrt(-math.log(1e-5 / 2) / 2)


def ks(uniforms: Tensor) -> float:
    """sup|F_n − F| √n of numbers that should be uniform on [0, 1]."""
    u = uniforms.double().flatten().sort().values
    n = len(u)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((u - steps[:-1]).abs().max(), (u - steps[1:]).abs().max())) * math.sqrt(n)


DRAWS = {
    "normal": lambda rng, b: rng.normal((b, 3, 2)),
    "normal_like": lambda rng, b: rng.normal_like(torch.zeros(b, 5, dtype=torch.float64)),
    "uniform": lambda rng, b: rng.uniform((b, 4)),
    "uniform_scalar_event": lambda rng, b: rng.uniform((b,), dtype=torch.float64),
    "integers": lambda rng, b: rng.integers(1000, (b, 3)),
    "rademacher_like": lambda rng, b: rng.rademacher_like(torch.zeros(b, 64)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_sample_k_depends_on_seed_k_only(draw) -> None:
    seeds = [11, 5, 7, 2**40]
    together = Rng(seeds=seeds)
    first, second = draw(together, 4), draw(together, 4)
    order = [2, 0, 3, 1]
    shuffled = Rng(seeds=[seeds[k] for k in order])
    assert torch.equal(draw(shuffled, 4), first[order])
    assert torch.equal(draw(shuffled, 4), second[order])
    for k, seed in enumerate(seeds):
        alone = Rng(seeds=[seed])
        assert torch.equal(draw(alone, 1)[0], first[k])
        assert torch.equal(draw(alone, 1)[0], second[k])
    assert not torch.equal(first, second)


def test_normals_are_normal() -> None:
    one_stream = Rng(0).normal((20_000,), dtype=torch.float64)
    assert ks(torch.special.ndtr(one_stream)) < KS_CRITICAL
    # the first number of every stream: neighbouring seeds are as independent as one stream
    across = Rng(seeds=list(range(4000))).normal((4000, 1), dtype=torch.float64)
    assert ks(torch.special.ndtr(across)) < KS_CRITICAL


def test_uniforms_are_uniform() -> None:
    u = Rng(1).uniform((20_000,), dtype=torch.float64)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert ks(u) < KS_CRITICAL


def test_integers_and_signs_are_even() -> None:
    n, high = 20_000, 10
    draws = Rng(2).integers(high, (n,))
    counts = torch.bincount(draws, minlength=high).double()
    assert len(counts) == high
    # each count is binomial(n, 1/high); 4.5 standard errors over 10 cells is a level below 1e-4
    assert float((counts - n / high).abs().max()) < 4.5 * math.sqrt(n / high * (1 - 1 / high))
    signs = Rng(3).rademacher_like(torch.zeros(n, dtype=torch.float64))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(n)


def test_permutation_is_one() -> None:
    order = Rng(4).permutation(1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, torch.arange(1000))
    with pytest.raises(ValueError, match="one draw for all samples"):
        Rng(seeds=[1, 2]).permutation(2)


def test_streams_are_reproducible_and_seeds_differ() -> None:
    assert torch.equal(Rng(5).normal((10,)), Rng(5).normal((10,)))
    assert not torch.equal(Rng(5).normal((10,)), Rng(6).normal((10,)))


@pytest.mark.parametrize("make", [lambda: Rng(7), lambda: Rng(seeds=[3, 1, 4])], ids=["one", "per-sample"])
def test_state_round_trip(make) -> None:
    rng, other = make(), make()
    rng.normal((3, 5))
    state = rng.state_dict()
    expected = rng.normal((3, 7)), rng.uniform((3, 2)), rng.integers(9, (3,))
    other.uniform((3, 1))
    other.load_state_dict(state)
    for got, want in zip((other.normal((3, 7)), other.uniform((3, 2)), other.integers(9, (3,))), expected, strict=True):
        assert torch.equal(got, want)
    assert all(isinstance(value, Tensor) for value in state.values())  # what a safetensors file can hold


def test_state_of_another_number_of_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="2 streams, this Rng has 1"):
        Rng(0).load_state_dict(Rng(seeds=[1, 2]).state_dict())


def test_dtypes_and_devices() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        like = torch.empty(2, 3, dtype=dtype)
        assert Rng(0).normal_like(like).dtype == dtype
        assert Rng(0).rademacher_like(like).dtype == dtype
        assert Rng(0).uniform((2,), dtype=dtype).dtype == dtype
    assert Rng(0).normal((2, 3)).dtype == torch.get_default_dtype()
    assert Rng(0).integers(3, (2,)).dtype == torch.int64
    assert Rng(0).normal_like(torch.empty(2, 3, device="meta")).device.type == "meta"
    assert Rng(seeds=[0, 1]).rademacher_like(torch.empty(2, 3, device="meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_seed_means_the_same_on_a_gpu() -> None:
    assert torch.equal(Rng(8).normal((64,), device="cuda").cpu(), Rng(8).normal((64,)))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    rng = Rng(0)
    rng.normal((4,)), rng.uniform((4,)), rng.integers(3, (4,)), rng.permutation(5)
    assert torch.equal(before, torch.get_rng_state())
    expected = Rng(1).normal((4,))
    torch.manual_seed(321)
    assert torch.equal(Rng(1).normal((4,)), expected)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"seed": 1, "seeds": [1]}, {"seeds": []}, {"seed": -1}, {"seed": True}, {"seed": 1.0}, {"seed": 2**63},
     {"seeds": [1, "2"]}],
)  # fmt: skip
def test_bad_seeds_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match="seed"):
        Rng(**arguments)


@pytest.mark.parametrize("shape", [(), (3,), (4, 2)])
def test_a_batch_of_another_size_than_the_seeds_is_refused(shape) -> None:
    rng = Rng(seeds=[1, 2])
    assert len(rng) == 2 and len(Rng(0)) == 1
    with pytest.raises(ValueError, match="first dimension must be 2"):
        rng.normal(shape)


def test_every_bit_of_a_seed_counts() -> None:
    """torch's CPU generator reads 32 bits; seeds that differ above them are different streams all the same."""
    seeds = [5, 5 + 2**32, 5 + 2**33, 5 + 2**62, 6 + 2**32, 2**63 - 1]
    first = Rng(seeds=seeds).normal((len(seeds), 1), dtype=torch.float64)
    assert len(set(first.flatten().tolist())) == len(seeds)
    generator = torch.Generator().manual_seed(5)  # below them a seed is torch's own
    assert torch.equal(Rng(5).normal((3,)), torch.randn(3, generator=generator))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_are_rows_of_the_whole_draw(world: int) -> None:
    """Every kind of draw, in one sequence: what all shares drew, put together, is what one process draws."""

    def draws(rng: Rng, n: int) -> list[torch.Tensor]:
        return [
            rng.normal((n, 3)), rng.uniform((n,), dtype=torch.float64), rng.stratified(n), rng.integers(9, (n, 2)),
            rng.rademacher_like(torch.zeros(n, 5)), rng.normal((n,)),
        ]  # fmt: skip

    whole, parts = draws(Rng(3), 8), [draws(Rng(3).share(rank, world), 8 // world) for rank in range(world)]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), expected)
    assert torch.equal(Rng(3).share(world - 1, world).permutation(7), Rng(3).permutation(7))


def test_strata_hold_one_number_each() -> None:
    u = Rng(0).stratified(50)
    assert torch.equal((50 * u).floor().sort().values, torch.arange(50, dtype=torch.float64))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_shares_out_of_range_are_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="0 <= rank < world"):
        Rng(0).share(rank, world)
    with pytest.raises(ValueError, match="single stream"):
        Rng(seeds=[0, 1]).share(0, 1)
