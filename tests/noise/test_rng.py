"""Rng: each number is a function of its seed, row, draw and place; the laws of all draws but normals; saved state.

The law of the normals is in test_noise.py, the bits themselves in test_philox.py.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scoresde import Rng
from scoresde.noise import philox
from scoresde.noise.philox import Streams, bits, normals, signs

LEVEL = 1e-6  # of every test of a law: its seeds are fixed, so it fails once, when somebody changes the numbers

KINDS = ("normal", "uniform", "integers", "rademacher")


def draw(rng: Rng, kind: str, shape: tuple[int, ...]) -> Tensor:
    """One draw, float64."""
    if kind == "normal":
        return rng.normal(shape, dtype=torch.float64)
    if kind == "uniform":
        return rng.uniform(shape, dtype=torch.float64)
    if kind == "integers":
        return rng.integers(1000, shape).double()
    return rng.rademacher_like(torch.zeros(shape, dtype=torch.float64))


def defined(kind: str, seed: int, row: int, number: int, event: tuple[int, ...]) -> Tensor:
    """What the sample of that seed, row and draw number has to be, by itself."""
    where, n = Streams(*(np.array([part], np.uint64) for part in (seed, number)), row, 1), math.prod(event)
    if kind == "normal":
        return normals(where, n).double().reshape(event)
    if kind == "rademacher":
        return signs(where, n).double().reshape(event)
    words = [int(word) % 2**64 for word in bits(where, n)[0]]
    values = [(word >> 11) / 2**53 if kind == "uniform" else (word >> 1) % 1000 for word in words]
    return torch.tensor(values, dtype=torch.float64).reshape(event)


class Story:
    """An Rng, and beside it the seed, row and number of draw of each of its samples, kept in the plainest way."""

    def __init__(self, rng: Rng, seeds: list[int], numbers: list[int], offset: int | None):
        self.rng, self.seeds, self.numbers, self.offset = rng, seeds, numbers, offset

    def check(self, kind: str, rows: int, event: tuple[int, ...], part: list[int] | None = None) -> None:
        if self.offset is None:
            ids = list(range(len(self.seeds))) if part is None else part
            rng = self.rng if part is None else self.rng.rows(torch.tensor(part))
            at = [(self.seeds[k], 0, self.numbers[k]) for k in ids]
        else:
            ids, rng = [0], self.rng
            at = [(self.seeds[0], self.offset * rows + k, self.numbers[0]) for k in range(rows)]
        got = draw(rng, kind, (len(at), *event))
        expected = [defined(kind, *where, event) for where in at]
        assert torch.equal(got, torch.stack(expected) if at else torch.empty(0, *event, dtype=torch.float64))
        self.move(1, ids)

    def move(self, by: int, ids: list[int] | None = None) -> None:
        for k in range(len(self.numbers)) if ids is None else ids:
            self.numbers[k] += by


STORIES = {
    "one": lambda: Story(Rng(7), [7], [0], 0),
    "share": lambda: Story(Rng(2**40 + 1).share(2, 3), [2**40 + 1], [0], 2),
    "per sample": lambda: Story(Rng(seeds=[11, 5, 2**62, 5 + 2**32]), [11, 5, 2**62, 5 + 2**32], [0] * 4, None),
}


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("make", STORIES.values(), ids=STORIES.keys())
def test_every_draw_of_a_long_story(make, parts: bool) -> None:
    """200 draws, kinds and shapes mixed, with runs of one shape (which are made ahead), skips, copies and state."""
    story, dice = make(), random.Random(3)
    kind, rows, event = "normal", 4, (3,)
    for _ in range(200):
        if dice.random() < 0.4:
            kind, event = dice.choice(KINDS), dice.choice([(), (3,), (2, 5), (1, 1, 130), (0,)])
            rows = len(story.seeds) if story.offset is None else dice.choice([0, 1, 2, 4])
        part = dice.sample(range(4), dice.choice([1, 2, 4])) if parts and dice.random() < 0.3 else None
        story.check(kind, rows, event, part)
        chance = dice.random()
        if chance < 0.05:
            story.rng.skip(5)
            story.move(5)
        elif chance < 0.1:
            state = story.rng.state_dict()
            fresh = make().rng
            draw(fresh, "normal", (4, 3))
            fresh.load_state_dict(state)
            story.rng = fresh
        elif chance < 0.15:
            state, before = story.rng.state_dict(), list(story.numbers)
            story.check(kind, rows, event)
            story.rng.load_state_dict(state)
            story.numbers = before
        elif chance < 0.2:
            story.rng = copy.deepcopy(story.rng)


DRAWS = {
    "normal": lambda rng, b: rng.normal((b, 3, 2)),
    "normal_like": lambda rng, b: rng.normal_like(torch.zeros(b, 5, dtype=torch.float64)),
    "uniform": lambda rng, b: rng.uniform((b, 4)),
    "uniform_scalar_event": lambda rng, b: rng.uniform((b,), dtype=torch.float64),
    "integers": lambda rng, b: rng.integers(1000, (b, 3)),
    "rademacher_like": lambda rng, b: rng.rademacher_like(torch.zeros(b, 64)),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@each_draw
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


@each_draw
def test_a_seed_of_its_own_is_row_0_of_a_single_stream(draw) -> None:
    own, single = Rng(seeds=[9]), Rng(9)
    for _ in range(3):
        assert torch.equal(draw(own, 1), draw(single, 4)[:1])


@each_draw
def test_a_sample_does_not_know_the_size_of_its_batch(draw) -> None:
    whole, less, more = Rng(3), Rng(3), Rng(3)
    for _ in range(3):  # the second and third are made ahead
        eight = draw(whole, 8)
        assert torch.equal(draw(less, 5), eight[:5])
        assert torch.equal(draw(more, 300)[:8], eight)


def test_types_are_roundings_of_one_number() -> None:
    wide = Rng(0).normal((50, 7), dtype=torch.float64)
    assert torch.equal(wide.float().double(), wide)  # a normal is a float32
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(Rng(0).normal((50, 7), dtype=dtype), wide.to(dtype))
        assert torch.equal(Rng(0).normal_like(wide.to(dtype)), wide.to(dtype))
        noise = Rng(0).noise(wide.to(dtype))  # for a sum in float32, which is rounded once
        assert isinstance(noise, Tensor) and noise.dtype == torch.float32 and torch.equal(noise.double(), wide)
        assert torch.equal(Rng(1).rademacher_like(wide.to(dtype)).double(), Rng(1).rademacher_like(wide))
    assert torch.equal(Rng(0).noise(wide), wide)
    uniform = Rng(0).uniform((50, 7), dtype=torch.float64)
    for dtype, digits in (
        (torch.float32, 24),
        (torch.float16, 11),
        (torch.bfloat16, 8),
    ):  # the first bits: < 1 stays < 1
        assert torch.equal(Rng(0).uniform((50, 7), dtype=dtype).double(), (uniform * 2**digits).floor() / 2**digits)


def test_devices_and_default_types() -> None:
    assert Rng(0).normal((2, 3)).dtype == Rng(0).uniform((2,)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)  # which is for what a user makes, and changes no draw
    assert Rng(0).normal((2, 3)).dtype == Rng(0).uniform((2,)).dtype == torch.float32
    assert Rng(0).integers(3, (2,)).dtype == torch.int64
    assert Rng(0).normal_like(torch.empty(2, 3, device="meta")).device.type == "meta"
    assert Rng(seeds=[0, 1]).rademacher_like(torch.empty(2, 3, device="meta")).device.type == "meta"
    like = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)  # places are those of the logical order
    assert torch.equal(Rng(0).normal_like(like), Rng(0).normal((2, 3, 4, 4)))


def test_what_was_drawn_is_the_callers() -> None:
    """Draws that were made ahead lie side by side: to write into one changes neither itself later nor the next."""
    asks = (
        lambda rng: rng.normal((2, 3)),
        lambda rng: rng.uniform((2, 3)),
        lambda rng: rng.integers(9, (2, 3)),
        lambda rng: rng.rademacher_like(torch.zeros(2, 3)),
        lambda rng: rng.permutation(3),
    )
    for ask in asks:
        rng, other = Rng(1), Rng(1)
        mine = [ask(rng) for _ in range(4)]
        kept = [x.clone() for x in mine]
        for k, x in enumerate(mine):
            assert x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
            x.zero_()
            assert all(map(torch.equal, mine[k + 1 :], kept[k + 1 :]))
        ask(rng).zero_()
        theirs = [ask(other) for _ in range(6)]
        assert all(map(torch.equal, theirs, kept)) and torch.equal(ask(rng), theirs[5])


def test_a_number_is_everybodys() -> None:
    for rank in range(3):
        assert torch.equal(Rng(4).share(rank, 3).normal(()), Rng(4).normal((1,))[0])
        rng, twin = Rng(4).share(rank, 3), Rng(4)
        for _ in range(3):
            assert torch.equal(rng.uniform(()), twin.uniform(()))
        assert torch.equal(rng.uniform((1,)), twin.uniform((3,))[rank : rank + 1])  # and what is made ahead is, too


def words(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call for random words from now on, by their number."""
    made: list[int] = []
    parts = philox._parts

    def counting(*args: Any) -> Iterator[Any]:
        for part in parts(*args):
            made.append(part[-1].size)
            yield part

    monkeypatch.setattr(philox, "_parts", counting)
    return made


def test_a_share_does_not_draw_what_is_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = words(monkeypatch)
    Rng(0).share(3, 1000).normal((6, 8))
    assert sum(made) == 6 * 4
    Rng(0).share(3, 1000).uniform((6,))
    assert sum(made) == 6 * 4 + 6


def test_small_draws_are_made_ahead_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, made = Rng(0), words(monkeypatch)
    for _ in range(129):
        rng.normal((4, 4))
    assert made == [8, 64 * 8, 64 * 8]
    made.clear()
    for _ in range(4):
        rng.normal((4096, 8))
    assert made == [2**14] * 4
    for kind in KINDS:
        made.clear()
        for _ in range(40):
            draw(rng, kind, (50, 100))
        assert max(made) <= philox._CACHED and sum(made) <= 2 * 40 * 50 * 100


def test_uniforms_are_uniform() -> None:
    u = Rng(1).uniform((20_000,), dtype=torch.float64)
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > LEVEL
    assert ((u * 2**53).long() % 2).bool().any() and ((u * 2**53).long() % 2 == 0).any()  # the last of 53 bits


def test_a_uniform_is_below_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_in_turn", lambda *args: np.full((1, args[-1]), 2**64 - 1, np.uint64))
    for dtype, digits in ((torch.float64, 53), (torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        assert float(Rng(0).uniform((), dtype=dtype)) == 1 - 2.0**-digits
    assert int(Rng(0).integers(2**63 - 1, ())) == 0  # 63 ones, less one whole round


@pytest.mark.parametrize("high", [1, 2, 3, 7, 10, 256])
def test_small_integers_are_even(high: int) -> None:
    counts = torch.bincount(Rng(2).integers(high, (25_600,)), minlength=high)
    assert len(counts) == high
    # χ² of expected counts of 100 and more; 2^63 values in `high` classes are even to 2^-63
    assert scipy.stats.chisquare(counts.numpy()).pvalue > LEVEL or high == 1


@pytest.mark.parametrize("high", [2**62, 2**62 - 1, 2**61 + 1, 2**40 + 12345])
def test_large_integers_are_even(high: int) -> None:
    drawn = Rng(3).integers(high, (20_000,))
    assert int(drawn.min()) >= 0 and int(drawn.max()) < high
    # 2^63 words over `high` values: the first 2^63 mod high of them have one word more than the others
    turns, rest = divmod(2**63, high)
    exact = ((turns + 1) * drawn.double().clamp(max=rest) + turns * (drawn.double() - rest).clamp(min=0)) / 2**63
    assert scipy.stats.kstest(exact.numpy(), "uniform").pvalue > LEVEL
    assert scipy.stats.chisquare(torch.bincount(drawn % 16, minlength=16).numpy()).pvalue > LEVEL


def test_signs_are_even() -> None:
    n = 20_000
    drawn = Rng(3).rademacher_like(torch.zeros(n, dtype=torch.float64))
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert scipy.stats.binomtest(int((drawn > 0).sum()), n).pvalue > LEVEL


def test_permutations_are_even() -> None:
    rng = Rng(4)
    orders = Counter(tuple(rng.permutation(4).tolist()) for _ in range(4800))
    assert len(orders) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert scipy.stats.chisquare(list(orders.values())).pvalue > LEVEL
    assert torch.equal(rng.permutation(1000).sort().values, torch.arange(1000))
    assert rng.permutation(0).tolist() == [] and rng.permutation(1).tolist() == [0]
    with pytest.raises(ValueError, match="one draw for all samples"):
        Rng(seeds=[1, 2]).permutation(2)


@pytest.mark.parametrize("high", [0, -1, 2**63])
def test_integers_below_nothing_are_refused(high: int) -> None:
    with pytest.raises(ValueError, match="1 <= high < 2\\^63"):
        Rng(0).integers(high, (2,))


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


def test_state_is_a_seed_and_a_number() -> None:
    rng = Rng(seeds=[3, 1, 4])
    rng.normal((3, 2))
    rng.rows(torch.tensor([2, 0])).normal((2, 2))
    assert rng.state_dict()["streams"].tolist() == [[3, 2], [1, 1], [4, 2]]
    assert rng.rows(torch.tensor([1, 2])).state_dict()["streams"].tolist() == [[1, 1], [4, 2]]
    # a state takes its seeds along: what was made ahead of another seed is forgotten
    single, other = Rng(8), Rng(9)
    for _ in range(3):
        single.normal((2, 2)), other.normal((2, 2))
    single.load_state_dict(other.state_dict())
    assert torch.equal(single.normal((2, 2)), other.normal((2, 2)))


def test_a_part_moves_its_own_streams() -> None:
    rng = Rng(seeds=[3, 1, 4, 1])
    part = rng.rows(torch.tensor([2, 0]))
    state = part.state_dict()
    first = part.normal((2, 3))
    part.skip(4)
    assert rng.state_dict()["streams"].tolist() == [[3, 5], [1, 0], [4, 5], [1, 0]]
    part.load_state_dict(state)
    assert rng.state_dict()["streams"].tolist() == [[3, 0], [1, 0], [4, 0], [1, 0]]
    assert torch.equal(rng.normal((4, 3))[[2, 0]], first)
    inner = rng.rows(torch.tensor([3, 2])).rows(torch.tensor([1]))
    inner.load_state_dict(rng.state_dict() | {"streams": torch.tensor([[4, 9]])})
    assert rng.state_dict()["streams"].tolist() == [[3, 1], [1, 1], [4, 9], [1, 1]]


def test_streams_of_another_number_or_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="2 streams, this Rng has 1"):
        Rng(0).load_state_dict(Rng(seeds=[1, 2]).state_dict())
    generators = torch.stack([torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)])
    for old in (generators, generators[:, :2], generators.long()):  # what torch's generators kept
        with pytest.raises(ValueError, match=r"each is \(seed, draw\) in int64"):
            Rng(seeds=[1, 2]).load_state_dict({"streams": old})


def test_a_state_of_the_noise_before_says_that_the_numbers_are_others() -> None:
    """Up to 0.1 numbers were those of Philox4x32; nothing of that is left, so a stream goes on with other ones."""
    rng, old = Rng(seeds=[1, 2]), {"streams": torch.tensor([[3, 5], [4, 6]])}
    with pytest.warns(UserWarning, match="of another stream"):
        rng.load_state_dict(old)
    assert rng.state_dict()["streams"].tolist() == [[3, 5], [4, 6]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rng.load_state_dict(rng.state_dict())


class Tape(TorchDispatchMode):
    """Ops in the order they ran, to run again on what their tensors hold by then: as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})

    def replay(self) -> list[Tensor]:
        made = [(func, func(*args, **kwargs)) for func, args, kwargs in self.ops]
        return [out for func, out in made if func.namespace == "scoresde"]


CAPTURED = {
    "one": lambda: Rng(5),
    "share": lambda: Rng(5).share(1, 2),
    "per sample": lambda: Rng(seeds=[4, 2, 9]),
    "apart": lambda: (rng := Rng(seeds=[4, 2, 9]), rng.rows(torch.tensor([1])).normal((1, 2)))[0],
    "part": lambda: Rng(seeds=[4, 2, 9, 7, 6]).rows(torch.tensor([4, 1, 3])),
}


@pytest.mark.parametrize("make", CAPTURED.values(), ids=CAPTURED.keys())
def test_a_captured_stream_draws_what_the_rng_would_have_drawn(make) -> None:
    x, rng, twin = torch.zeros(3, 5), make(), make()
    rng.normal((3, 1)), twin.normal((3, 1))

    def graph(rng: Rng) -> list[Tensor]:
        return [rng.normal((3, 2, 2)), rng.noise(x), rng.rademacher_like(x), rng.normal_like(x.double())]

    held = rng.captured("cpu")
    tape = Tape()
    with tape:
        graph(held)
        held.advance()
    for _ in range(3):
        held.load(rng)
        for got, want in zip(tape.replay(), graph(twin), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(rng.uniform((3,)), twin.uniform((3,)))  # outside the graph it goes on behind it
    held.load(rng)
    for _ in range(3):  # without a load a graph goes on by itself
        for got, want in zip(tape.replay(), graph(twin), strict=True):
            assert torch.equal(got, want)


def test_a_captured_stream_refuses_what_the_processor_makes() -> None:
    held = Rng(0).captured("cpu")
    for kind, ask in (
        ("uniform", lambda: held.uniform((2,))),
        ("integers", lambda: held.integers(2, (2,))),
        ("permutation", lambda: held.permutation(2)),
    ):
        with pytest.raises(RuntimeError, match=f"'{kind}' are made on the CPU"):
            ask()
    with pytest.raises(ValueError, match="captured for 1 streams; this Rng has 2"):
        held.load(Rng(seeds=[1, 2]))


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
    [
        {},
        {"seed": 1, "seeds": [1]},
        {"seeds": []},
        {"seed": -1},
        {"seed": True},
        {"seed": 1.0},
        {"seed": 2**63},
        {"seeds": [1, "2"]},
    ],
)
def test_bad_seeds_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match="seed"):
        Rng(**arguments)


def test_seeds_may_be_numpys() -> None:
    assert torch.equal(Rng(np.int64(2**40)).normal((3,)), Rng(2**40).normal((3,)))
    assert torch.equal(Rng(seeds=np.arange(3)).normal((3,)), Rng(seeds=[0, 1, 2]).normal((3,)))


@pytest.mark.parametrize("shape", [(), (3,), (4, 2)])
def test_a_batch_of_another_size_than_the_seeds_is_refused(shape) -> None:
    rng = Rng(seeds=[1, 2])
    assert len(rng) == 2 and len(Rng(0)) == 1
    with pytest.raises(ValueError, match="first dimension must be 2"):
        rng.normal(shape)
    assert rng.state_dict()["streams"].tolist() == [[1, 0], [2, 0]]  # what was refused was not drawn


def test_every_bit_of_a_seed_counts() -> None:
    for seed in (0, 5, 2**63 - 1):
        seeds = [seed, *(seed ^ 1 << bit for bit in range(63))]
        first = Rng(seeds=seeds).uniform((64, 1), dtype=torch.float64)
        assert len(set(first.flatten().tolist())) == 64


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_are_rows_of_the_whole_draw(world: int) -> None:
    """Every kind of draw, in one sequence: what all shares drew, put together, is what one process draws."""

    def draws(rng: Rng, n: int) -> list[torch.Tensor]:
        return [
            rng.normal((n, 3)),
            rng.uniform((n,), dtype=torch.float64),
            rng.stratified(n),
            rng.integers(9, (n, 2)),
            rng.rademacher_like(torch.zeros(n, 5)),
            rng.normal((n,)),
        ]

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
