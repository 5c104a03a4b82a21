"""The Haar transform against a matrix written out, and its bands against each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from scoresde import Rng
from scoresde.codecs import (
    Centred,
    Chain,
    Codec,
    Haar,
    HaarDetails,
    HaarLow,
    LiftedDetails,
    LiftedLow,
    Scaling,
    Standardise,
)
from scoresde.config import build
from scoresde.data import Dataset, Split
from scoresde.data.excerpt import packed
from scoresde.data.recode import haar_details, haar_low, upsampled

SHAPES = [(1, 2), (3, 6), (2, 4, 2), (1, 6, 4), (2, 2, 4, 2)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return Rng(seed).normal(shape, dtype=torch.float64)


def pictures(*shape: int, seed: int = 5) -> Tensor:
    return Rng(seed).integers(256, shape).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_band_is_the_sum_of_a_block_under_its_signs(shape: tuple[int, ...]) -> None:
    """Channel b·C + c at a place is 2^{−d/2} Σ_i (−1)^{popcount(i & b)} v_i, by the definition alone."""
    raw, (channels, *sizes) = draw(3, *shape), shape
    x, d = Haar().encode(raw), len(shape) - 1
    assert x.shape[1:] == (channels << d, *(n // 2 for n in sizes)) == Haar().encoded_shape(shape)
    for band, place in itertools.product(range(1 << d), itertools.product(*(range(n // 2) for n in sizes))):
        total = torch.zeros(3, channels, dtype=torch.float64)
        for corner in itertools.product((0, 1), repeat=d):
            sign = (-1) ** sum(bit * (band >> axis & 1) for axis, bit in enumerate(corner))
            at = tuple(2 * p + bit for p, bit in zip(place, corner, strict=True))
            total += sign * raw[(slice(None), slice(None), *at)]
        found = x[(slice(None), slice(band * channels, (band + 1) * channels), *place)]
        torch.testing.assert_close(found, total * 2 ** (-d / 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_orthonormal_and_undone(shape: tuple[int, ...]) -> None:
    """J Jᵀ = 1, so its volume, autograd's log |det J|, is 0."""
    raw, codec = draw(2, *shape), Haar()
    jacobian = torch.autograd.functional.jacobian(lambda v: codec.transform(v[None])[0].flatten(), raw[0]).flatten(1)
    torch.testing.assert_close(jacobian @ jacobian.T, torch.eye(len(jacobian), dtype=torch.float64))
    assert codec.log_volume(raw, codec.encode(raw)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(codec.decode(codec.encode(raw)), raw, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 4, 5), (1, 2, 2, 2, 2), ()])
def test_odd_sizes_are_refused_in_words(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="with even sizes, which it halves; got"):
        Haar().encoded_shape(shape)


def test_integers_are_refused_and_scaled_ones_are_not() -> None:
    raw = pictures(2, 1, 4, 4)
    with pytest.raises(TypeError, match="expected floating-point values"):
        Haar().encode(raw)
    codec = Chain((Scaling(levels=256), Haar()))
    assert torch.equal(codec.decode(codec.encode(raw, rng=Rng(1))), raw)


def stages(codec: Codec, levels: int) -> list[Codec]:
    return [HaarLow(codec, levels), *(HaarDetails(codec, level) for level in range(levels, 0, -1))]


@pytest.mark.parametrize("shape, levels", [((1, 4, 4), 1), ((2, 8, 4), 2), ((3, 8), 3), ((1, 4, 4, 8), 2)])
def test_the_bands_of_all_stages_are_a_map_whose_volume_is_theirs_together(shape: tuple[int, ...], levels: int) -> None:
    """The stages' model data together are as many numbers as raw ones; autograd's log |det| of all is Σ log_volume."""
    codec = Scaling(-1, 2, raw_low=-5, raw_high=3, bounded=False)
    raw, bands = draw(1, *shape), stages(codec, levels)

    def every(value: Tensor) -> Tensor:
        return torch.cat([band.transform(value[None])[0].flatten() for band in bands])

    jacobian = torch.autograd.functional.jacobian(every, raw[0]).flatten(1)
    found = sum(float(band.log_volume(raw, band.encode(raw))) for band in bands)
    assert found == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-9)
    assert [tuple(band.encode(raw).shape[1:]) for band in bands] == [band.encoded_shape(shape) for band in bands]


def test_stages_put_a_sample_together_and_keep_its_low_band() -> None:
    """Float32 model data of 8-bit pictures: what is joined has the given low band to rounding, 4 values of up to 2."""
    codec, low = Scaling(levels=256), draw(5, 1, 2, 2, seed=3).float()
    first, *later = stages(codec, 2)
    x = low
    for stage, details in zip(later, (draw(5, 3, 2, 2).float(), draw(5, 3, 4, 4).float()), strict=True):
        assert stage.below.encoded_shape((1, 8, 8)) == x.shape[1:]
        below, x = x, stage.joined(x, details)
        back = stage.parts(x)
        assert float((back[0] - below).abs().max()) <= 2e-6 and float((back[1] - details).abs().max()) <= 2e-6
        assert stage.whole.encoded_shape((1, 8, 8)) == x.shape[1:]
    assert later[-1].whole == codec and later[0].whole == later[1].below and later[0].below == first
    assert first.decode(low).shape == (5, 1, 2, 2) and first.decode(low).dtype == torch.uint8
    assert float((first.layout(low) - low / 4).abs().max()) == 0  # means of 16 values from sums over 4


def test_details_are_told_the_picture_of_their_own_draw() -> None:
    """One dequantisation for both: joined, they are integers' bins again, which two of them would miss."""
    raw, codec = pictures(4, 1, 6, 6), HaarDetails(Scaling(levels=256))
    drawn = codec.drawn(raw, Rng(seeds=[0, 1, 2, 3]))
    details = drawn.codec.encode(drawn.values)
    x = codec.joined(drawn.told["image"] * 2, details)
    assert torch.equal(codec.codec.decode(x), raw)
    torch.testing.assert_close(details, codec.encode(raw, rng=Rng(seeds=[0, 1, 2, 3])))
    torch.testing.assert_close(drawn.log_volume, codec.log_volume(raw, details))
    whole = Scaling(levels=256)
    assert float(drawn.log_volume[0] + codec.below.log_volume(raw, drawn.told["image"])[0]) == pytest.approx(
        float(whole.log_volume(raw, drawn.values)[0])
    )
    assert drawn.log_volume[0] == pytest.approx(27 * math.log(2 / 256))  # of 36 numbers


def test_a_run_folder_keeps_them() -> None:
    codec = HaarDetails(Scaling(levels=256), 2)
    raw = pictures(20, 1, 4, 4)
    record = packed(Dataset("x", Split(raw), Split(raw), codec))[1]["codec"]
    assert build(record) == codec


def floors(raw: Tensor) -> Tensor:
    """⌊(⌊(a + b)/2⌋ + ⌊(c + d)/2⌋)/2⌋ of blocks (a, c; b, d) of 2 × 2 integers (B, C, H, W)."""
    a, b, c, d = (raw[..., i::2, j::2].long() for j in (0, 1) for i in (0, 1))
    return ((a + b) // 2 + (c + d) // 2) // 2


@pytest.mark.parametrize("shape, levels", [((1, 4, 4), 1), ((2, 8, 4), 2), ((3, 8), 3), ((1, 4, 4, 8), 2)])
def test_integers_become_integers_and_come_back(shape: tuple[int, ...], levels: int) -> None:
    """Every one from all its bands, drawn anywhere in their bins; the low band is again of 8 bits."""
    raw, codec = pictures(50, *shape), Scaling(levels=256)
    first, *later = [
        LiftedLow(codec, levels),
        *(LiftedDetails(codec, level) for level in range(levels, 0, -1)),
    ]
    x = first.encode(raw, rng=Rng(1))
    assert first.decode(x).dtype == torch.uint8 and x.shape[1:] == first.encoded_shape(shape)
    for stage in later:
        low, details = x, stage.encode(raw, rng=Rng(2))
        told = stage.drawn(raw, Rng(3)).told["image"]
        torch.testing.assert_close(stage.below.layout(low), told, rtol=0, atol=1e-6)  # of the draw as of the centres
        x = stage.joined(low, details)
        back = stage.parts(x)
        torch.testing.assert_close(back[0], told, rtol=0, atol=1e-6)
        torch.testing.assert_close(back[1], stage.transform(raw), rtol=0, atol=1e-6)
    assert torch.equal(codec.decode(x), raw)


@pytest.mark.parametrize("shape", [(2, 6), (1, 4, 6), (1, 2, 4, 4)])
def test_details_that_lead_out_of_the_range_are_cut_and_the_low_band_stays(shape: tuple[int, ...]) -> None:
    """Any details whatever: samples are integers of the codec whose low band, by the definition, is the one given; and
    details that some integers have are never cut (they come back, above)."""
    codec = LiftedDetails(Scaling(levels=10, offset=-3))
    low = codec.below.encode(Rng(1).integers(10, (200, *shape)) - 3)
    details = 0.8 * Rng(2).normal((200, *codec.encoded_shape(shape)))
    x = codec.joined(low, details)
    raw = codec.codec.decode(x)
    torch.testing.assert_close(codec.codec.transform(raw), x)  # nothing is clamped by the decoder
    assert int(raw.min()) == -3 and int(raw.max()) == 6
    assert torch.equal(codec.below.decode(codec.below.encode(raw)), codec.below.decode(low))


def test_integers_of_a_picture_are_means_rounded_down_and_their_bins_hold_the_draws() -> None:
    raw, codec = pictures(30, 1, 6, 4), Scaling(levels=256)
    low, details = LiftedLow(codec), LiftedDetails(codec)
    assert torch.equal(low.decode(low.encode(raw)).long(), floors(raw))
    for band in (low, details):
        x = band.encode(raw, rng=Rng(4)).double()
        below, above = band.bins(raw)
        assert bool(((below - 1e-6 <= x) & (x <= above + 1e-6)).all()) and float((above - below).std()) < 1e-9
        volume = (above - below).log().flatten(1).sum(1)  # integers own bins of a width that is the slope's
        torch.testing.assert_close(band.log_volume(raw, x), volume, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="use HaarLow"):
        LiftedDetails(Scaling(-1, 1))


def test_recoded_data_have_the_picture_as_a_condition() -> None:
    raw = pictures(20, 1, 4, 4)
    data = Dataset("mine", Split(raw), Split(raw), Scaling(levels=256))
    means = data.codec.transform(floors(raw))
    torch.testing.assert_close(haar_low(data).codec.layout(haar_low(data).encode(raw)), means)
    for told in (haar_details(data), upsampled(data)):
        torch.testing.assert_close(told.test.conditions["image"], means)
    assert upsampled(data).event_shape == (1, 4, 4) and haar_details(data).event_shape == (3, 2, 2)
    _, cond = haar_details(data).drawn(raw[:3], {"image": means[:3]}, Rng(0), torch.device("cpu"))
    torch.testing.assert_close(cond["image"], means[:3])
    floats = Dataset("mine", Split(draw(9, 1, 4, 4).float()), Split(draw(9, 1, 4, 4).float()), Scaling.identity())
    means = floats.test.raw.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    torch.testing.assert_close(upsampled(floats).test.conditions["image"], means)
    torch.testing.assert_close(haar_low(floats).codec.layout(haar_low(floats).encode(floats.test.raw)), means)
    with pytest.raises(ValueError, match="has an image as a condition"):
        upsampled(upsampled(data))
    with pytest.raises(ValueError, match="even sizes"):
        haar_low(data, level=3)
    for wrong in (Standardise.of(draw(30, 2, 4, 4).float()), Chain((Scaling(levels=4), Haar())), Centred()):
        with pytest.raises(ValueError, match="slope · raw"):
            HaarLow(wrong)
