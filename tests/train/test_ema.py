"""Averages of weights against sums over the whole path of the weights, in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde.train.ema import EMA, Average, PowerEMA, exponent, pull

YES, NO = torch.tensor(True), torch.tensor(False)
BATCH = 10
KINDS: dict[str, Any] = {
    "exponential": lambda module: EMA(module, half_life=150, ramp=0.2),
    "power": lambda module: PowerEMA(module, sigma_rel=(0.05, 0.1, 0.2)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Two parameters, a float and an integer buffer."""

    scale: Tensor
    calls: Tensor

    def __init__(self, width: int = 3):
        super().__init__()
        self.linear = nn.Linear(width, width)
        for p in self.linear.parameters():
            nn.init.constant_(p, 0.5)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


def path(steps: int, seed: int = 0, module: nn.Module | None = None) -> list[dict[str, Tensor]]:
    """States of a module whose weights walk at random: steps of 0.05 each."""
    generator = torch.Generator().manual_seed(seed)
    walker, states = Net() if module is None else module, []
    with torch.no_grad():
        for step in range(steps):
            for p in walker.parameters():
                p += (0.05 * torch.randn(p.shape, generator=generator)).to(p.dtype)
            for buffer in walker.buffers():
                buffer.fill_(step)
            states.append(copy.deepcopy(walker.state_dict()))
    return states


def follow(average: Average, states: list[dict[str, Tensor]], start: int = 0) -> None:
    """Updates with the states from number `start` on."""
    module = Net()
    for step, state in enumerate(states[start:], start + 1):
        module.load_state_dict(state)
        average.update(module, step * BATCH, BATCH, YES)


def bits(average: Average) -> list[bytes]:
    return [v.numpy().tobytes() for shadow in average.shadows.values() for v in shadow.state_dict().values()]


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma: float) -> None:
    """By quadrature of (γ+1) τ^γ on [0, 1]; EDM2 states γ = 16.97 and 6.94 for 0.05 and 0.1."""
    gamma = exponent(sigma)
    n = 200_000
    tau = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # midpoints: an error of γ²/(24 n²), 4e-9 for 0.02
    weight = (gamma + 1) * tau**gamma / n
    mean = (weight * tau).sum()
    assert float(weight.sum()) == pytest.approx(1, abs=1e-7)
    assert float((weight * (tau - mean) ** 2).sum().sqrt()) == pytest.approx(sigma, rel=1e-6)
    stated = {0.05: 16.97, 0.1: 6.94}
    assert gamma == pytest.approx(stated.get(sigma, gamma), abs=5e-3)


def test_the_longest_profile_is_the_plain_mean() -> None:
    average, states = PowerEMA(Net(), sigma_rel=[12**-0.5]), path(40)
    follow(average, states)
    mean = torch.stack([state["linear.weight"].double() for state in states]).mean(0)
    # 40 roundings of numbers of order 1
    torch.testing.assert_close(average.module.get_parameter("linear.weight").double(), mean, rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch", [1, 10, 64])
def test_the_power_average_is_the_weighted_sum_over_the_path(batch: int) -> None:
    """Σ_k w_k θ_k with w_k = (τ_k^{γ+1} − τ_{k−1}^{γ+1})/t^{γ+1}, for steps of any size, mixed ones included."""
    steps = 120
    sizes = [batch if k % 7 else 2 * batch for k in range(steps)]
    ends = torch.tensor([0, *sizes], dtype=torch.float64).cumsum(0)
    average, module, states = PowerEMA(Net(), sigma_rel=(0.05, 0.1, 0.2)), Net(), path(steps)
    for k, state in enumerate(states):
        module.load_state_dict(state)
        average.update(module, int(ends[k + 1]), sizes[k], YES)
    assert list(average.shadows) == ["ema", "ema-0.1", "ema-0.2"] and average.module is average.shadows["ema"]
    weights = torch.stack([state["linear.weight"].double() for state in states])
    for sigma, shadow in zip(average.sigma_rel, average.shadows.values(), strict=True):
        share = ((ends / ends[-1]) ** (exponent(sigma) + 1)).diff()
        exact = (share[:, None, None] * weights).sum(0)
        # 120 roundings of 6e-8 of numbers of order 1, most of which are forgotten
        torch.testing.assert_close(shadow.get_parameter("linear.weight").double(), exact, rtol=0, atol=3e-6)


def test_the_first_step_forgets_the_start() -> None:
    average = PowerEMA(Net())
    states = path(1, seed=3)
    follow(average, states)
    for shadow in average.shadows.values():
        assert torch.equal(shadow.get_parameter("linear.weight"), states[0]["linear.weight"])


def test_a_skipped_first_step_counts_as_the_start() -> None:
    """The weights did not move in it, so the start is what the average of that time is."""
    module = Net()
    start = module.linear.weight.detach().double()
    average = PowerEMA(module, sigma_rel=[0.1])
    average.update(module, BATCH, BATCH, NO)
    state = path(1, seed=3)[0]
    module.load_state_dict(state)
    average.update(module, 2 * BATCH, BATCH, YES)
    share = 0.5 ** (exponent(0.1) + 1)
    exact = share * start + (1 - share) * state["linear.weight"].double()
    torch.testing.assert_close(average.module.get_parameter("linear.weight").double(), exact, rtol=0, atol=1e-6)


@each_kind
def test_a_step_that_is_not_kept_changes_no_bit(kind: str) -> None:
    """Neither parameters nor buffers, even where the weights were spoiled."""
    average, states = KINDS[kind](Net()), path(20)
    follow(average, states)
    before, spoiled = bits(average), Net()
    spoiled.load_state_dict({name: torch.full_like(value.double(), 9.0) for name, value in states[0].items()})
    average.update(spoiled, 21 * BATCH, BATCH, NO)
    assert bits(average) == before
    average.update(spoiled, 21 * BATCH, BATCH, YES)
    assert all(a != b for a, b in zip(bits(average), before, strict=True))


@pytest.mark.parametrize("share", [1e-4, 0.3, 1.0])
def test_what_a_device_does_is_what_the_cpu_does(share: float) -> None:
    """The branch that never reads `keep`, on a stand-in for a flag that lives on a device."""

    class Elsewhere:
        device = torch.device("cuda")

        def __init__(self, flag: Tensor):
            self.flag = flag

        def to(self, dtype: torch.dtype) -> Tensor:
            return self.flag.to(dtype)

        def __bool__(self) -> bool:
            raise AssertionError("this would wait for the device")

    def tensors(seed: int) -> list[Tensor]:
        return list(torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).unbind())

    here, there, weights = tensors(0), tensors(0), tensors(1)
    pull(there, weights, share, Elsewhere(NO))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    pull(here, weights, share, YES)
    pull(there, weights, share, Elsewhere(YES))  # type: ignore[arg-type]
    for a, b in zip(here, there, strict=True):  # three roundings of 1.2e-7 of numbers below 4
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@each_kind
@pytest.mark.parametrize("stop", [1, 7, 30])
def test_resuming_during_warm_up_changes_no_bit(kind: str, stop: int) -> None:
    """R21: the state is the shadows'; the length in force follows from the images. One image fewer would show."""
    states = path(60)
    unbroken = KINDS[kind](Net())
    follow(unbroken, states)
    first, second = KINDS[kind](Net()), KINDS[kind](Net())
    follow(first, states[:stop])
    for name, shadow in second.shadows.items():
        shadow.load_state_dict(first.shadows[name].state_dict())
    follow(second, states, stop)
    assert bits(second) == bits(unbroken)
    late = KINDS[kind](Net())
    for name, shadow in late.shadows.items():
        shadow.load_state_dict(first.shadows[name].state_dict())
    module = Net()
    for step, state in enumerate(states[stop:], stop + 1):
        module.load_state_dict(state)
        late.update(module, step * BATCH - 1, BATCH, YES)
    assert bits(late) != bits(unbroken)


@each_kind
def test_another_module_is_refused(kind: str) -> None:
    """R21: fewer, more, renamed, reordered or reshaped parameters and buffers; nothing has moved then."""
    average = KINDS[kind](Net())
    before = bits(average)
    fewer, more, swapped, buffered = Net(), Net(), Net(), Net()
    fewer.linear.bias = None  # type: ignore[assignment]
    more.extra = nn.Linear(1, 1)
    swapped.linear = nn.Module()  # type: ignore[assignment]
    swapped.linear.bias, swapped.linear.weight = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 3))
    buffered.register_buffer("scale", torch.ones(3))
    wrong = {
        "has 2 parameters and the module 1, .*: the average's linear.bias": fewer,
        "has 2 parameters and the module 4": more, "same order": swapped,
        r"the average's linear.weight \(3, 3\), .*the module's linear.weight \(4, 4\)": Net(4),
        r"2 buffers .*: the average's scale \(2,\), the module's scale \(3,\)": buffered,
    }  # fmt: skip
    for message, module in wrong.items():
        with pytest.raises(ValueError, match=message):
            average.update(module, BATCH, BATCH, YES)
        assert bits(average) == before


def test_a_shape_that_would_broadcast_is_refused() -> None:
    """(3, 3) and (3,) have the same count and could be averaged without a word."""
    average, wrong = EMA(nn.Linear(3, 3, bias=False)), nn.Linear(3, 3, bias=False)
    wrong.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"the average's weight \(3, 3\), the module's weight \(3,\)"):
        average.update(wrong, BATCH, BATCH, YES)


@each_kind
def test_shadows_are_copies_of_their_own(kind: str) -> None:
    """R21: there is no swap of weights to be interrupted; what happens to one leaves the others alone."""
    module = Net().double()
    average = KINDS[kind](module)
    owners = [module, *average.shadows.values()]
    places = [p.data_ptr() for owner in owners for p in [*owner.parameters(), *owner.buffers()]]
    assert len(set(places)) == len(places)
    for shadow in average.shadows.values():
        assert not shadow.training
        for p in shadow.parameters():
            assert p.dtype == torch.float32 and not p.requires_grad


@each_kind
def test_buffers_are_copied_as_they_are(kind: str) -> None:
    """R21: integers too, which an average would spoil; each step takes the latest."""
    average, states = KINDS[kind](Net()), path(30)
    for start in (10, 30):
        follow(average, states[:start])
        for shadow in average.shadows.values():
            assert torch.equal(shadow.get_buffer("calls"), torch.tensor(start - 1))
            assert torch.equal(shadow.get_buffer("scale"), torch.full((2,), start - 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_drift_of_a_long_average_is_that_of_float32(dtype: torch.dtype) -> None:
    """R21: decay 0.9999 on weights of either type, against the same recursion in float64 on the same weights.

    A shadow of size M is rounded by at most 2^-24 M in each of n steps, so |error| ≤ n M 2^-24: 3.6e-4 for 3000 steps
    and M = 2. It has moved by 0.1 or more, where one kept in bfloat16 could not move at all.
    """
    module = Net().to(dtype)
    average = EMA(module, half_life=math.log(0.5) / math.log(0.9999), ramp=None)
    exact = {name: p.detach().double() for name, p in module.named_parameters()}
    begin = {name: value.clone() for name, value in exact.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 3001):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
        average.update(module, step, 1, YES)
        for name, p in module.named_parameters():
            exact[name] += (1 - 0.9999) * (p.detach().double() - exact[name])
    for name, value in exact.items():
        error = float((average.module.get_parameter(name).double() - value).abs().max())
        assert error < 3000 * 2 * 2**-24, (name, error)
        assert float((value - begin[name]).abs().min()) > 0.1


@pytest.mark.parametrize("wrong", [[], [0.0], [-0.1], [0.3], [0.1, 0.1], [math.nan]], ids=str)
def test_lengths_out_of_range_are_named(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="sigma_rel is a"):
        PowerEMA(Net(), sigma_rel=wrong)


def test_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Average(Net())  # type: ignore[abstract]
