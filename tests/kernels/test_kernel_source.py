"""csrc/kernels.cu and the calls of it, run on a CPU thread by thread, against a float64 oracle that shares no code."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import emulator as emulation
import numpy as np
import pytest
import torch
from emulator import CSRC, SCALARS, Emulator
from torch import Tensor

from scoresde.kernels import arguments, backend, cuda
from scoresde.kernels.arguments import Division
from scoresde.noise import draws
from scoresde.noise import philox as reference
from scoresde.noise.address import Noise
from scoresde.ops import library as ops

DTYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}
# largest relative error of one rounding, in the tensor and in the arithmetic
ROUNDING = {torch.float32: 2**-24, torch.float64: 2**-53, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ARITHMETIC = {torch.float32: 2**-24, torch.float64: 2**-53, torch.float16: 2**-24, torch.bfloat16: 2**-24}
SMALLEST = 2.0**-24  # subnormal of float16, the coarsest near 0
NORMAL = 2**-22  # |Δz| ≤ 2^-22 r: what the kernels promise of a normal z = r cos or r sin

# (batch, event, channels-last, elements by which the tensors are off their alignment)
SHAPES = [
    (1, (1,), False, 0),
    (3, (2,), False, 0),
    (300, (2,), False, 0),
    (17, (3,), False, 0),
    (3, (4,), False, 1),
    (17, (5,), False, 0),
    (3, (7,), False, 1),
    (300, (64,), False, 0),
    (3, (1000,), False, 0),
    (1, (4099,), False, 0),
    (1, (8192,), False, 0),
    (3, (3, 5, 5), False, 0),
    (3, (3, 8, 8), False, 2),
    (3, (3, 5, 5), True, 0),
    (17, (3, 8, 8), True, 0),
    (1, (5, 6, 2), True, 1),
    (3, (4, 1, 3), True, 0),
    (3, (3, 2, 4, 2), True, 0),
    (3, (2, 3, 3, 1), True, 0),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return emulation.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(library: Emulator) -> Iterator[Emulator]:
    library.launches, library.backwards = [], False
    yield library
    library.backwards = False


# ---- the oracle ----


def philox(key: Sequence[int], counter: Sequence[int]) -> list[int]:
    """Philox4x64-10 in Python's integers: the four words of a counter."""
    whole, c, k = 2**64 - 1, list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [b >> 64 ^ c[1] ^ k[0], b & whole, a >> 64 ^ c[3] ^ k[1], a & whole]
        k = [(k[0] + 0x9E3779B97F4A7C15) & whole, (k[1] + 0xBB67AE8584CAA73B) & whole]
    return c


def box_muller(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z0, z1 and r of words: u and v as float32 rounds them, the rest in float64."""
    u = first.astype(np.uint32).astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    v = second.astype(np.uint32).view(np.int32).astype(np.float32) * np.float32(2**-31)
    r = np.sqrt(-2 * np.log(u.astype(np.float64)))
    angle = np.pi * v.astype(np.float64)
    return r * np.cos(angle), r * np.sin(angle), r


def words_of(noise: Noise, samples: int, elements: int, numbers: int, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (samples, elements) of all elements in their draw, and for each the `words` that give `numbers` of them.

    By NumPy's own generator, which counts on before it makes a block of four words.
    """
    shared = len(noise.seeds) == 1
    index, found = np.empty((samples, elements), np.int64), np.empty((samples, elements, words), np.uint64)
    for k in range(samples):
        seed, draw = (int(x[k % len(x)]) % 2**64 for x in (noise.seeds, noise.draws + noise.draw))
        index[k] = (noise.row + k * shared) * elements + np.arange(elements)
        group = index[k] // numbers
        block, skipped = divmod(int(group[0]) * words, 4)
        source = np.random.Philox(key=seed, counter=(draw << 64) + block)
        made = source.random_raw(skipped + int(group[-1] - group[0] + 1) * words)[skipped:]
        found[k] = made.reshape(-1, words)[group - group[0]]
    return index, found


def normals_of(noise: Noise, samples: int, elements: int) -> tuple[Tensor, Tensor]:
    """z and r (samples, elements) in float64."""
    index, words = words_of(noise, samples, elements, 4, 2)
    halves = words >> (index % 2 * 32).astype(np.uint64)[..., None] & np.uint64(2**32 - 1)
    z0, z1, r = box_muller(halves[..., 0], halves[..., 1])
    return torch.from_numpy(np.where(index % 4 < 2, z0, z1)), torch.from_numpy(r)


# ---- tensors in memory that must not be touched around them ----


class Batch:
    """A tensor with NaN on both sides: read beyond its end and the result is NaN, write there and `check` fails."""

    MARGIN = 64

    def __init__(self, values: Tensor, channels_last: bool = False, shift: int = 0):
        start = self.MARGIN + shift
        self.memory = torch.full((values.numel() + 2 * self.MARGIN + shift,), torch.nan, dtype=values.dtype)
        self.inside = slice(start, start + values.numel())
        like = values
        if channels_last:
            form = torch.channels_last if values.ndim == 4 else torch.channels_last_3d
            like = values.contiguous(memory_format=form)
        self.tensor = self.memory[self.inside].as_strided(values.shape, like.stride(), start)
        self.tensor.copy_(values)

    def check(self) -> Tensor:
        outside = torch.ones(len(self.memory), dtype=torch.bool)
        outside[self.inside] = False
        assert self.memory[outside].isnan().all()
        return self.tensor


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coefficient(seed: int, samples: int, per_sample: bool) -> Tensor:
    """One for each sample, or one for all: a number, which comes with the launch, or (every other seed) in memory."""
    if per_sample:
        return random(seed, samples)
    one = random(seed, 1)
    return one.expand(samples) if seed % 2 else one[0]


def some_noise(samples: int, kind: int) -> Noise | None:
    """None, one seed for all, one seed and draw for each: with seeds and draws that need 64 bits."""
    if kind == 0:
        return None
    if kind == 1:
        return Noise(torch.tensor([2**45 + 17]), torch.tensor([2**34 + 5]), 3, 2**32 - 5)
    k = torch.arange(samples)
    return Noise(k * 2**33 + 11 - 2**60 * (k % 2), 2**33 * k + 1, 2, 0)


def column(value: Tensor) -> Tensor:
    """() or (B,) against (B, D)."""
    return value.reshape(-1, 1)


def compare(actual: Tensor, expected: Tensor, tolerance: Tensor, what: object) -> None:
    error = (actual.double().flatten(1) - expected).abs() - tolerance
    assert not (error > 0).any() and not actual.isnan().any(), f"{what}: {error.max()} beyond the tolerance"


# ---- the functions of the header ----


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0,) * 2, (0,) * 4, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((2**64 - 1,) * 2, (2**64 - 1,) * 4, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_known_answers_of_philox(key: tuple, counter: tuple, expected: str) -> None:
    """The vectors that Random123 (Salmon et al. 2011) ships for philox4x64-10."""
    assert " ".join(f"{w:016x}" for w in philox(key, counter)) == expected


def test_the_words_of_a_block(library: Emulator) -> None:
    """Of seeds, draws and blocks of all sizes, and the last before the counter is 0."""
    generator = np.random.default_rng(3)
    ends = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 2, 2**64 - 1]
    for seed, draw, block in [*itertools.product(ends, repeat=3), *generator.integers(0, 2**64, (99, 3), np.uint64)]:
        words, numbers = np.empty(4, np.uint64), [int(x) for x in (seed, draw, block)]
        library.libraries["float"].philox_words(*map(ctypes.c_uint64, numbers), pointer(words))
        assert words.tolist() == philox((numbers[0], 0), ((numbers[2] + 1) % 2**64, numbers[1], 0, 0))


def test_normals_are_those_of_the_definition(library: Emulator) -> None:
    generator = np.random.default_rng(0)
    edges = [0, 1, 2, 127, 128, 2**30, 2**31 - 128, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    edges += list(np.uint64(2) ** np.arange(3, 32, dtype=np.uint64))
    pairs = np.array([(a, b) for a in edges for b in edges], np.uint32)
    words = np.concatenate([pairs, generator.integers(0, 2**32, (500_000, 2), np.uint32)])
    z = np.empty(words.shape, np.float32)
    library.libraries["float"].box_muller_pairs(ctypes.c_size_t(len(words)), pointer(words), pointer(z))
    z0, z1, r = box_muller(words[:, 0].copy(), words[:, 1].copy())
    assert (np.abs(z[:, 0] - z0) <= NORMAL * r).all() and (np.abs(z[:, 1] - z1) <= NORMAL * r).all()
    assert r.min() == 0 and r.max() > 6.7  # u = 1 and u = 2^-33 are among them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_as_torch_reads_it(library: Emulator, dtype: torch.dtype) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    wide, back = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    functions = library.libraries[DTYPES[dtype]]
    functions.widen_all(ctypes.c_size_t(65536), pointer(bits), pointer(wide))
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float()
    numbers = ~expected.isnan()
    actual = torch.from_numpy(wide)
    assert torch.equal(actual.isnan(), ~numbers)
    assert torch.equal(actual.view(torch.int32)[numbers], expected.view(torch.int32)[numbers])
    functions.narrow_all(ctypes.c_size_t(65536), pointer(wide), pointer(back))
    assert (back == bits)[numbers.numpy()].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_are_rounded_to_halves_as_torch_rounds_them(library: Emulator, dtype: torch.dtype) -> None:
    """Random patterns of all magnitudes, and the neighbourhood of every half and of every tie between two."""
    spacing = 2**13 if dtype == torch.float16 else 2**16
    halves = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).float().view(torch.int32).numpy()
    near = [halves + delta for delta in (0, 1, -1, spacing // 2, spacing // 2 - 1, spacing // 2 + 1)]
    tiny = (np.arange(4097, dtype=np.float64) * 2.0**-26).astype(np.float32).view(np.int32)  # ties of subnormal halves
    patterns = np.random.default_rng(1).integers(-(2**31), 2**31, 200_000).astype(np.int32)
    floats = np.concatenate([*near, tiny, patterns]).astype(np.int32)
    narrow = np.empty(len(floats), np.uint16)
    library.libraries[DTYPES[dtype]].narrow_all(ctypes.c_size_t(len(floats)), pointer(floats), pointer(narrow))
    actual = torch.from_numpy(narrow.view(np.int16))
    expected = torch.from_numpy(floats).view(torch.float32).to(dtype)
    assert torch.equal(actual.view(dtype).isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers], expected.view(torch.int16)[numbers])


def test_division_by_multiplication_is_exact(library: Emulator) -> None:
    """At and around multiples of the divisor, where a quotient can be wrong, up to 2^31 − 1."""
    generator = np.random.default_rng(2)
    powers = 2 ** np.arange(31)
    divisors = {*range(1, 300), *powers, *(powers[1:] - 1), *(powers + 1), *generator.integers(1, 2**31, 300)}
    for divisor in map(int, divisors):
        multiples = generator.integers(0, 2**31 // divisor + 1, 100) * divisor
        numbers = np.concatenate([multiples - 1, multiples, multiples + 1, [0, 1, 2**31 - 1, 2**31 - 2]])
        numbers = numbers[(numbers >= 0) & (numbers < 2**31)].astype(np.uint32)
        quotients = np.empty_like(numbers)
        division = Division.by(divisor)
        library.libraries["float"].quotients(
            ctypes.c_size_t(len(numbers)), pointer(numbers), ctypes.byref(division), pointer(quotients)
        )
        assert (quotients == numbers // np.uint32(divisor)).all(), divisor


# ---- the kernels ----


def linear_tolerance(terms: Sequence[Tensor], noise: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Of Σ terms (the noise among them) in `dtype`, whose noise is within `noise`.

    A coefficient is rounded once and a term enters with one multiply-add, each rounding within the sum of |terms|; the
    result is rounded to the dtype, where it may be subnormal.
    """
    size = sum((term.abs() for term in terms), torch.zeros(()))
    return size * ((2 * len(terms) + 1) * ARITHMETIC[dtype] + ROUNDING[dtype]) * 1.001 + noise + SMALLEST / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [2**19, 4], ids=["one-quad", "many-quads"])
def test_lincomb(emulator: Emulator, dtype: torch.dtype, full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape and memory format, 0 to 5 inputs, each kind of noise and of coefficients; a GPU of any size."""
    monkeypatch.setattr(arguments, "FULL", full)
    monkeypatch.setattr(arguments, "WARP", 32 if full > 4 else 2)
    for case, (samples, event, channels_last, shift) in enumerate(SHAPES):
        elements = torch.Size(event).numel()
        inputs = [random(i, samples, *event, dtype=dtype) for i in range(5)]
        for count in range(6):
            kind = (case + count) % 3
            noise = some_noise(samples, kind)
            c = [coefficient(10 + i, samples, (case + i) % 2 == 0) for i in range(count)]
            std = coefficient(20, samples, case % 2 == 0)
            x = [Batch(value, channels_last, shift) for value in inputs[:count]]
            out = Batch(torch.full_like(inputs[0], torch.nan), channels_last, shift)
            cuda.lincomb(emulator.launch, out.tensor, [b.tensor for b in x], c, std if noise else None, noise)

            terms = [column(ci) * xi.double().flatten(1) for ci, xi in zip(c, inputs, strict=False)]
            expected, wrong = sum(terms, torch.zeros(samples, elements, dtype=torch.float64)), torch.zeros(())
            if noise:
                z, r = normals_of(noise, samples, elements)
                terms.append(column(std) * z)
                expected, wrong = expected + terms[-1], column(std).abs() * r * NORMAL
            tolerance = linear_tolerance(terms, wrong, dtype) if terms else torch.zeros(())
            compare(out.check(), expected, tolerance, (dtype, samples, event, channels_last, count, kind))
    assert emulator.launches == [f"lincomb_{n}" for n in range(6)] * len(SHAPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lincomb_into_its_inputs_and_with_coefficients_of_one(
    emulator: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place an element that is written twice, or read after it was written, is wrong."""
    monkeypatch.setattr(arguments, "FULL", 4)
    monkeypatch.setattr(arguments, "WARP", 2)
    noise, std = some_noise(3, 2), coefficient(5, 3, True)
    for event, channels_last in (((300,), False), ((301,), False), ((3, 8, 8), True), ((3, 5, 5), True)):
        x, y = random(1, 3, *event, dtype=dtype), random(2, 3, *event, dtype=dtype)
        apart = Batch(torch.full_like(x, torch.nan), channels_last)
        pair = [Batch(x, channels_last), Batch(y, channels_last)]
        cuda.lincomb(emulator.launch, apart.tensor, [b.tensor for b in pair], [None, std], std, noise)
        for place in range(2):
            pair = [Batch(x, channels_last), Batch(y, channels_last)]
            into = pair[place].tensor
            cuda.lincomb(emulator.launch, into, [b.tensor for b in pair], [None, std], std, noise)
            assert torch.equal(pair[place].check(), apart.check())
            assert torch.equal(pair[1 - place].check(), (y, x)[place])


def sums(dtype: torch.dtype, elements: int) -> float:
    """Relative error of a sum of squares: of each square and of the additions it takes part in.

    A thread adds at most 2 + D/4/32 quads (a sample has a thread for each quad, or at least a warp, and a thread takes
    two at a time), a tree of at most 7 levels follows, and the parts are added in float64.
    """
    return (4 * (2 + elements / 128) + 7 + 2) * ARITHMETIC[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dsm_loss(emulator: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise given, of one stream or of one for each sample: `w Σ (a − z)²/D`, few and many partial sums."""
    for case, (samples, event, channels_last, shift) in enumerate(SHAPES):
        monkeypatch.setattr(arguments, "FULL", (2**19, 4)[case % 2])
        monkeypatch.setattr(cuda, "PARTIALS", (2**15, 7)[case // 2 % 2])
        a, eps = (random(i, samples, *event, dtype=dtype) for i in range(2))
        weight = coefficient(12, samples, case % 2 == 0)
        elements = a[0].numel()
        for kind in range(3):
            noise = some_noise(samples, kind)
            z, r = normals_of(noise, samples, elements) if noise else (eps.double().flatten(1), torch.zeros(()))
            batches = [Batch(value, channels_last, shift) for value in (a, eps)]
            loss = torch.full((samples,), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
            cuda.dsm_loss(emulator.launch, loss, batches[0].tensor, weight, noise or batches[1].tensor)
            flat = a.double().flatten(1)
            error, size = flat - z, flat.abs() + z.abs()
            wrong = 5 * size * ARITHMETIC[dtype] + r * NORMAL
            scale = weight.abs() / elements
            expected = (weight * error.square().sum(1) / elements)[:, None]
            tolerance = scale * (2 * error.abs() * wrong + wrong**2).sum(1) + expected[:, 0].abs() * (
                sums(dtype, elements) + 2 * ARITHMETIC[dtype]
            )
            compare(loss[:, None], expected, tolerance[:, None], (dtype, samples, event, channels_last, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_partial_sums_than_threads_to_add_them(emulator: Emulator, dtype: torch.dtype) -> None:
    """One sample of 200,003 elements: 390 sums, which at most 128 threads add."""
    a, loss, one = random(1, 1, 200_003, dtype=dtype), torch.empty(1), torch.ones((), dtype=torch.float64)
    cuda.dsm_loss(emulator.launch, loss, a, one, torch.zeros_like(a))
    expected = a.double().square().mean()
    assert abs(loss.item() - expected) <= expected * (sums(dtype, 4) + 2**-24)  # a thread has one or two quads


def test_only_aligned_quads_are_read_in_one_access() -> None:
    """16 bytes, or the 8 of four halves: a GPU refuses what a CPU forgives."""
    for dtype in DTYPES:
        packet = min(4 * dtype.itemsize, 16)
        for shift in range(9):
            tensors = [Batch(torch.zeros(3, 8, dtype=dtype), shift=s).tensor for s in (0, shift)]
            whole = arguments.Layout.of(tensors, 2, 2).path == arguments.VECTOR
            assert whole == (shift * dtype.itemsize % packet == 0), (dtype, shift)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_langevin(emulator: Emulator, dtype: torch.dtype, measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`h = min(2 snr² σ² (D + 64)/(‖ε̂‖² + 64), σ²)` of each sample, or with ‖z‖² for D; out of place and in place."""
    capped = free = 0
    for case, (samples, event, channels_last, shift) in enumerate(SHAPES):
        monkeypatch.setattr(arguments, "FULL", (2**19, 4)[case % 2])
        monkeypatch.setattr(cuda, "PARTIALS", (2**15, 7)[case // 2 % 2])
        x = random(1, samples, *event, dtype=dtype)
        size = torch.linspace(0.1, 3, samples, dtype=torch.float64).reshape(-1, *[1] * len(event))
        eps = (random(2, samples, *event) * size).to(dtype)
        sigma, snr = coefficient(3, samples, case % 2 == 0).abs(), (0.16, 0.7)[case % 2]
        noise = some_noise(samples, 1 + case % 2)
        assert noise
        elements = x[0].numel()
        state = Batch(x, channels_last, shift)
        out = state if case % 3 == 0 else Batch(torch.full_like(x, torch.nan), channels_last, shift)
        score = Batch(eps, channels_last, shift)
        cuda.langevin(emulator.launch, out.tensor, state.tensor, score.tensor, sigma, snr, noise, measured)

        z, r = normals_of(noise, samples, elements)
        flat = eps.double().flatten(1)
        dims = z.square().sum(1) if measured else torch.full((samples,), float(elements), dtype=torch.float64)
        ratio = (2 * snr**2 * (dims + 64) / (flat.square().sum(1) + 64)).clamp(max=1)
        capped, free = capped + int((ratio == 1).sum()), free + int((ratio < 1).sum())
        slope, std = column(-ratio * sigma), column((2 * ratio).sqrt() * sigma)
        terms = [x.double().flatten(1), slope * flat, std * z]
        # the relative error of h: of both sums of squares, and of the normals in the second
        of_h = column(2 * sums(dtype, elements) + 2 * NORMAL * (z.abs() * r).sum(1) / (dims + 64) * measured)
        wrong = std * r * NORMAL + of_h * (terms[1].abs() + terms[2].abs())
        compare(out.check(), sum(terms), linear_tolerance(terms, wrong, dtype), (dtype, samples, event, case))
        assert torch.equal(score.check(), eps)
    assert capped and free
    first = "norms_and_noise" if measured else "norms"
    assert emulator.launches == [first, "finish_langevin", "lincomb_2"] * len(SHAPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rademacher(emulator: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: number e of a draw is bit e & 63 of word e >> 6."""
    for case, (samples, event, channels_last, shift) in enumerate(SHAPES):
        monkeypatch.setattr(arguments, "FULL", (2**19, 4)[case % 2])
        noise = some_noise(samples, 1 + case % 2)
        assert noise
        out = Batch(torch.full((samples, *event), torch.nan, dtype=dtype), channels_last, shift)
        cuda.rademacher(emulator.launch, out.tensor, noise)
        elements = out.tensor[0].numel()
        index, words = words_of(noise, samples, elements, 64, 1)
        bits = words[..., 0] >> (index % 64).astype(np.uint64) & np.uint64(1)
        expected = 2 * torch.from_numpy(bits.astype(np.float64)) - 1
        assert torch.equal(out.check().double().flatten(1), expected), (samples, event)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "expanded"])
def test_the_backend_is_the_reference_in_every_layout(
    emulator: Emulator, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions that are registered for CUDA, with the emulator for a GPU; the reference takes mixed dtypes."""
    monkeypatch.setattr(backend, "enabled", lambda device, dtype: True)
    monkeypatch.setattr(backend, "driver", lambda: emulator)
    change = {
        "contiguous": lambda x: x,
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "expanded": lambda x: x[:, :1].expand(x.shape),
    }[layout]
    x, y = (change(random(i, 3, 4, 5, 4, dtype=torch.float32)) for i in range(2))
    a, b, at = coefficient(2, 3, True).abs(), coefficient(4, 3, False).abs(), some_noise(3, 2)
    assert at
    none, single = (None, None, 0, 0), torch.float32
    for kernel, reference_op, args in (
        (backend._lincomb, ops.torch_lincomb, ([x, y], [a, b], a, *at)),
        (backend._lincomb, ops.torch_lincomb, ([x, y], [a, b], None, *none)),
        (backend._langevin, ops.torch_langevin, (x, y, a, 0.4, True, *at)),
        (backend._dsm_loss, ops.torch_dsm_loss, (x, a, None, *at)),
        (backend._dsm_loss, ops.torch_dsm_loss, (x, a, y, *none)),
        (backend._normal, draws.numpy_normal, (x.shape, single, *at)),
        (backend._rademacher, draws.numpy_rademacher, (x.shape, single, *at)),
    ):
        before = len(emulator.launches)
        torch.testing.assert_close(kernel(*args), reference_op(*args), rtol=1e-5, atol=1e-5)
        assert len(emulator.launches) > before
    launched = len(emulator.launches)
    wide = backend._lincomb([x, y.double()], [a, b], None, *none)
    assert wide.dtype == torch.float64 and len(emulator.launches) == launched


# ---- promises ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_the_reference(emulator: Emulator, dtype: torch.dtype) -> None:
    """`philox.py` on the same counters: signs alike, normals within what its float32 angle and ours allow.

    An angle of up to π has an error of two roundings, 2π 2^-24, and its cosine, √ and log have one each.
    """
    for kind in (1, 2):
        noise = some_noise(5, kind)
        assert noise
        noise = noise._replace(row=7)  # each row of 1001 numbers begins elsewhere in a block
        where = reference.streams(noise.seeds, noise.row, noise.draws + noise.draw, 5)
        z, signs = torch.empty(5, 1001, dtype=dtype), torch.empty(5, 1001, dtype=dtype)
        cuda.lincomb(emulator.launch, z, [], [], None, noise)
        cuda.rademacher(emulator.launch, signs, noise)
        assert torch.equal(signs.float(), reference.signs(where, 1001))
        _, r = normals_of(noise, 5, 1001)
        assert ((z.double() - reference.normals(where, 1001).double()).abs() <= r * (NORMAL + 10 * 2**-24)).all()


def draw_normals(emulator: Emulator, noise: Noise, *shape: int) -> Tensor:
    out = torch.empty(shape)
    cuda.lincomb(emulator.launch, out, [], [], None, noise)
    return out


def test_the_noise_of_a_sample_does_not_depend_on_its_batch(emulator: Emulator) -> None:
    """One seed: sample k of a batch is the first of a batch at row k. Seeds of its own: it is the same anywhere."""
    seed, draws = torch.tensor([2**50 + 3]), torch.tensor([2**40])
    whole = draw_normals(emulator, Noise(seed, draws, 1, 7), 17, 3, 5)
    for start, stop in ((0, 5), (5, 6), (6, 17)):
        assert torch.equal(
            draw_normals(emulator, Noise(seed, draws, 1, 7 + start), stop - start, 3, 5), whole[start:stop]
        )
    seeds = torch.randint(-(2**63), 2**63 - 1, (17,), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    own = draw_normals(emulator, Noise(seeds, draws, 0, 0), 17, 33)
    assert torch.equal(draw_normals(emulator, Noise(seeds[order], draws, 0, 0), 17, 33), own[order])
    alone = [draw_normals(emulator, Noise(s[None], draws, 0, 0), 1, 33) for s in seeds]
    assert torch.equal(torch.cat(alone), own)


def test_draws_are_numbered_by_their_state_and_an_offset(emulator: Emulator) -> None:
    """State d and offset k are draw d + k, in 64 bits; draws, seeds, rows and elements that differ give other noise."""
    seed = torch.tensor([5])
    one = draw_normals(emulator, Noise(seed, torch.tensor([2**32 - 1]), 3, 0), 4, 9)
    assert torch.equal(one, draw_normals(emulator, Noise(seed, torch.tensor([2]), 2**32, 0), 4, 9))
    others = [
        draw_normals(emulator, Noise(seed, torch.tensor([2]), 0, 0), 4, 9),
        draw_normals(emulator, Noise(seed + 2**32, torch.tensor([2**32 + 2]), 0, 0), 4, 9),
        draw_normals(emulator, Noise(seed, torch.tensor([2**32 + 2]), 0, 4), 4, 9),
    ]
    everything = torch.cat([one, *others])
    assert everything.unique().numel() == everything.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_do_not_depend_on_the_order_of_threads_and_blocks(
    emulator: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race would show: threads between two barriers, and blocks, run in one order and in the other."""
    monkeypatch.setattr(arguments, "FULL", 4)
    for samples, event in ((2, (40_000,)), (300, (5,)), (5, (600,))):
        a, noise, one = (
            random(1, samples, *event, dtype=dtype),
            some_noise(samples, 1),
            torch.ones((), dtype=torch.float64),
        )
        results = []
        for backwards in (False, True):
            emulator.backwards = backwards
            loss = torch.empty(samples, dtype=torch.promote_types(dtype, torch.float32))
            cuda.dsm_loss(emulator.launch, loss, a, one, noise)
            out = torch.empty_like(a)
            cuda.langevin(emulator.launch, out, a, a, one, 0.16, noise, True)
            results.append((loss, out))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so_and_stays_in_its_sample(
    emulator: Emulator, dtype: torch.dtype, bad: float
) -> None:
    one, noise = torch.ones((), dtype=torch.float64), some_noise(3, 1)
    for event in ((8,), (7,)):
        x, y = random(1, 3, *event, dtype=dtype), random(2, 3, *event, dtype=dtype)
        y[1, 2] = bad
        out, loss = torch.empty_like(x), torch.empty(3, dtype=torch.promote_types(dtype, torch.float32))
        cuda.lincomb(emulator.launch, out, [x, y], [one, one], one, noise)
        assert torch.equal(~out.isfinite(), ~y.isfinite()) and torch.equal(out[1, 2], y[1, 2]) == (bad == bad)
        cuda.dsm_loss(emulator.launch, loss, y, one, noise)
        assert loss.isfinite().tolist() == [True, False, True]
        cuda.langevin(emulator.launch, out, x, y, one, 0.16, noise, False)
        assert out[[0, 2]].isfinite().all() and not out[1, 2].isfinite()
        if bad != bad:
            assert out[1].isnan().all()  # no step length


def test_results_too_large_for_half_are_infinite(emulator: Emulator) -> None:
    x, c = (
        torch.tensor([[60_000.0, -60_000.0, 1.0, 32_752.0]], dtype=torch.float16),
        torch.tensor(2.0, dtype=torch.float64),
    )
    out = torch.empty_like(x)
    cuda.lincomb(emulator.launch, out, [x], [c], None, None)
    assert out.tolist() == [[torch.inf, -torch.inf, 2.0, 65_504.0]]


def test_nothing_is_launched_for_nothing(emulator: Emulator) -> None:
    one, noise = torch.ones((), dtype=torch.float64), some_noise(1, 1)
    for shape in ((0, 3), (2, 0), (0, 0)):
        x, loss = torch.empty(shape), torch.zeros(shape[0])
        cuda.lincomb(emulator.launch, x, [x], [one], one, noise)
        cuda.langevin(emulator.launch, x, x, x, one, 0.16, noise, False)
        cuda.rademacher(emulator.launch, x, noise)
        cuda.dsm_loss(emulator.launch, loss, x, one, noise)
        assert loss.isnan().all()
    assert emulator.launches == []


def test_batches_too_large_for_a_launch_are_refused(emulator: Emulator) -> None:
    for shape in ((2**20, 2**13), (1, 2**31), (2**31, 1)):
        x = torch.empty(shape, device="meta")
        with pytest.raises(ValueError, match=r"Split the batch\."):
            cuda.lincomb(emulator.launch, x, [x], [None], None, None)
    assert emulator.launches == []


# ---- the GPU's compiler ----


@pytest.mark.parametrize(
    ("arch", "scalars"), [("90", SCALARS), *((arch, ("float", "bfloat16")) for arch in ("80", "100", "120"))]
)
def test_nvcc_needs_neither_stack_nor_spills(tmp_path: Path, arch: str, scalars: Sequence[str]) -> None:
    """float is the type that fills its registers most, bfloat16 the one with most code of its own."""
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler: nvcc is not on the path")
    for scalar in scalars:
        defined = f"-DSCORESDE_SCALAR={SCALARS.index(scalar)}"
        flags = ["-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", defined, "-o", str(tmp_path / "cubin")]
        done = subprocess.run(["nvcc", *flags, str(CSRC / "kernels.cu")], capture_output=True, text=True)
        report = done.stdout + done.stderr
        assert done.returncode == 0 and "warning" not in report, report
        assert len(re.findall(r"Compiling entry function", report)) == 12
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert frames == [("0", "0", "0")] * 12, report
