"""Where a value per sample meets a batch: one rule for every event shape."""

from __future__ import annotations

import pytest
import torch
from oracles import EVENT_SHAPES

from scoresde.ops.broadcast import as_time, coefficient, expand_as_batch


@pytest.mark.parametrize("event", [(), *EVENT_SHAPES])
def test_a_value_multiplies_its_own_sample(event) -> None:
    x = torch.randn(5, *event, generator=torch.Generator().manual_seed(0))
    value = torch.arange(1.0, 6.0)
    product = expand_as_batch(value, x) * x
    assert product.shape == x.shape
    for k in range(5):
        assert torch.equal(product[k], (k + 1) * x[k])
    assert expand_as_batch(torch.tensor(2.0), x).shape == ()


@pytest.mark.parametrize("shape", [(2,), (1,), (5, 1), (3, 1, 1)])
def test_wrong_shapes_are_refused(shape) -> None:
    # (2,) against (5, 2) would broadcast over the event without a word
    with pytest.raises(ValueError, match=r"shape \(\) or \(5,\)"):
        expand_as_batch(torch.ones(shape), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="one value per sample"):
        expand_as_batch(torch.ones(1), torch.zeros(()))


def test_coefficients_follow_the_batch_but_never_into_half_precision() -> None:
    value = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        got = coefficient(value, torch.zeros(2, 3, dtype=dtype))
        assert got.dtype == expected and got.shape == (2, 1)
        assert torch.equal(got[:, 0], value.to(expected))


def test_times_are_real_and_at_least_float32() -> None:
    x = torch.zeros(3, 2)
    assert as_time(0.1, x).dtype == torch.float64 and float(as_time(0.1, x)) == 0.1
    assert as_time(1, x).dtype == torch.float64
    assert as_time(torch.rand(3, dtype=torch.float64), x).dtype == torch.float64
    assert as_time(torch.rand(3), x).dtype == torch.float32
    assert as_time(torch.rand(3, dtype=torch.bfloat16), x).dtype == torch.float32
    assert as_time(torch.rand(3), torch.zeros(3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integer_times_are_refused(dtype) -> None:
    with pytest.raises(TypeError, match="noise_input"):
        as_time(torch.ones(3, dtype=dtype), torch.zeros(3, 2))
