"""The spectrum of sound: an orthonormal transform, its inverse, and the volume of magnitudes and phases."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import dct

from scoresde.codecs import Chain, Scaling, Spectrum
from scoresde.codecs.spectrum import _transformed
from scoresde.noise.rng import Rng


def signals(n: int, channels: int = 2, length: int = 32) -> torch.Tensor:
    """Of magnitudes 1e-3 to 1."""
    return Rng(0).normal((n, channels, length), dtype=torch.float64) * torch.logspace(-3, 0, n)[:, None, None]


def test_the_transform_is_orthonormal_and_that_of_the_textbook() -> None:
    raw = signals(8)
    c = _transformed(raw, 4)
    assert c.shape == (8, 2, 4, 8) and torch.allclose(c.square().sum((1, 2, 3)), raw.square().sum((1, 2)), rtol=1e-12)
    # Princen & Bradley: the second frame, of a window of eight values, is a DCT-IV of what folding leaves of them
    window = torch.arange(8, dtype=torch.float64).add(0.5).mul(math.pi / 8).sin() * raw[0, 0, 4:12]
    first, second, third, fourth = window.view(4, 2)
    folded = torch.cat([-third.flip(0) - fourth, first - second.flip(0)])
    assert torch.allclose(c[0, 0, :, 1], torch.from_numpy(dct(folded.numpy(), 4, norm="ortho")), rtol=1e-9)


def test_decode_is_the_inverse_and_the_volume_that_of_autograd() -> None:
    raw = signals(4, 1, 16)
    codec = Spectrum.of(raw, 4, floor=0.01)  # between the faintest and the loudest
    x = codec.encode(raw)
    assert x.shape == (4, 4, 4) == (4, *codec.encoded_shape((1, 16)))
    assert torch.allclose(codec.decode(x), raw, rtol=1e-9, atol=1e-14)
    for k in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda r: codec.transform(r)[0].flatten(), raw[k : k + 1])
        expected = jacobian.view(16, 16).slogdet().logabsdet
        assert float(codec.log_volume(raw, x)[k]) == pytest.approx(float(expected), rel=1e-9)


def test_pairs_of_bands_are_standardised_and_silence_is_finite() -> None:
    raw = signals(64).float()
    codec = Spectrum.of(raw, 8)
    u, phase = codec.encode(raw).unflatten(1, (2, 2, 4)).unbind(2)
    assert torch.allclose(u.mean((0, 1, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(u.std((0, 1, 3), correction=0), torch.ones(4), atol=1e-5)
    assert float(phase.abs().max()) <= math.sqrt(3) * (1 + 1e-6)
    silence = codec.encode(torch.zeros(1, 2, 32))
    assert bool(silence.isfinite().all()) and codec.decode(silence - 1).abs().max() == 0
    assert bool(codec.layout(torch.full((1, 16, 4), 80.0)).isfinite().all())
    constant = Spectrum.of(torch.zeros(3, 1, 32), 8)
    assert constant.spread == (1.0,) * 4 and bool(constant.log_volume(raw[:1], silence[:, :8]).isfinite().all())


def test_sixteen_bits_come_back_from_float32() -> None:
    """A magnitude m is off by about 3e-7 m in float32, from x of size 3: at full scale 0.01 of an integer."""
    raw = (Rng(1).integers(65536, (4, 1, 256)) - 32768).to(torch.int16)
    raw[0] = 32767
    raw[1] = (32767 * (torch.arange(256) * 0.3).sin()).to(torch.int16)
    raw[2] = 0
    scaling = Scaling(levels=65536, offset=-32768)
    codec = Chain((scaling, Spectrum.of(scaling.encode(raw), 16)))
    assert torch.equal(codec.decode(codec.encode(raw)), raw)


def test_what_does_not_fit_is_refused() -> None:
    codec = Spectrum((0.0,), (1.0,), 1e-3)
    with pytest.raises(ValueError, match=r"spectrum of 2 bands is of signals \(C, L\), L a multiple; got \(1, 5\)"):
        codec.encode(torch.zeros(1, 1, 5))
    with pytest.raises(TypeError, match=r"torch.int16.*expected floating-point"):
        codec.encode(torch.zeros(1, 1, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(torch.tensor([[[0.0, 1.0, math.nan, 0.0]]]))
    with pytest.raises(ValueError, match="spread and floor are positive"):
        Spectrum((0.0,), (0.0,), 1.0)
    with pytest.raises(ValueError, match="bands is an even number; got 5"):
        Spectrum.of(torch.zeros(1, 1, 10), 5)
