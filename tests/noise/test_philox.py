"""Philox, Box–Muller and signs against published answers and against a second writing of them, in Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scoresde.noise import philox
from scoresde.noise.philox import Streams, bits, normals, signs, streams

LOW = 2**32 - 1

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer
ONES, ZEROS = (LOW,) * 4, (0,) * 4
KNOWN = {
    "zeros": (ZEROS, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (ONES, (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "digits of pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

# |Δz|/(2^-24 r) of z = r cos πv in float32, where NumPy's logarithm is right to 4 ulps, its sine and cosine to 2 (what
# its own tests allow): πv is off by 1.47 |v| (π itself) + 2, the half ulp of a product in [2, π], half that in [1, 2);
# r by 4 (the logarithm, halved by the root) + 1 (the root) of itself; the cosine by 4 |cos|, but 2 at most; the product
# by |cos|. So |sin πv| (1.47 |v| + 2) + 6 |cos πv| + min(2, 4 |cos πv|), at most 8.83 (at π|v| = 2.7), and 8.3 with the
# smaller half ulps below 2; the sine is the same with the two exchanged. Seen in 40 million normals: 4.8.
BOUND = 9 * 2.0**-24


def block(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds of Philox4x32 on integers (Salmon et al. 2011, sec. 3.3)."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (second >> 32) ^ counter[1] ^ key[0],
            second & LOW,
            (first >> 32) ^ counter[3] ^ key[1],
            first & LOW,
        )
        key = (key[0] + 0x9E3779B9) & LOW, (key[1] + 0xBB67AE85) & LOW
    return counter


def words(seed: int, row: int, draw: int, quad: int) -> tuple[int, ...]:
    return block((quad, row, draw & LOW, draw >> 32), (seed & LOW, seed >> 32))


def box_muller(a: int, b: int) -> tuple[float, float, float]:
    """(r, r cos πv, r sin πv) in double precision; only u and v are rounded to single, as their definition says."""
    u = float(np.float32(float(np.float32(float(a))) * 2.0**-32 + 2.0**-33))
    v = float(np.float32(float(b - 2**32 if b >= 2**31 else b))) * 2.0**-31
    r = math.sqrt(-2 * math.log(u))
    return r, r * math.cos(math.pi * v), r * math.sin(math.pi * v)


def check_element(where: Streams, sample: int, element: int, got: dict[str, torch.Tensor]) -> None:
    """Entry `element` of a sample in all three kinds against the integers."""
    at = tuple(int(part[sample]) for part in where)
    pair = words(*at, element // 4)[2 * (element % 4 // 2) :][:2]
    r, *z = box_muller(*pair)
    assert abs(float(got["normals"][sample, element]) - z[element % 2]) <= BOUND * r
    of_bits = words(*at, element // 2)[2 * (element % 2) :][:2]
    assert int(got["bits"][sample, element]) % 2**64 == of_bits[0] << 32 | of_bits[1]
    of_signs = words(*at, element // 128)[element // 32 % 4]
    assert float(got["signs"][sample, element]) == (1.0 if of_signs >> element % 32 & 1 else -1.0)


def make(where: Streams, n: int) -> dict[str, torch.Tensor]:
    return {"normals": normals(where, n), "bits": bits(where, n), "signs": signs(where, n)}


def some(seeds: list[int], rows: list[int], draws: list[int]) -> Streams:
    return Streams(*(np.array(part, np.uint64) for part in (seeds, rows, draws)))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN.values(), ids=KNOWN.keys())
def test_known_answers(counter, key, answer) -> None:
    assert block(counter, key) == answer
    state = np.array([[[counter[0] << 32 | counter[1]]], [[counter[2] << 32 | counter[3]]]], np.uint64)
    philox._rounds(state, np.empty_like(state), np.array(key, np.uint64)[:, None, None])
    assert state.flatten().tolist() == [answer[0] << 32 | answer[1], answer[2] << 32 | answer[3]]


CORNERS = {
    "one": some([0], [0], [0]),
    "64-bit seeds": some([2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1], [0, 0, 0, 0], [1, 1, 1, 1]),
    "64-bit draws": some([5, 5, 5, 5], [2, 2, 2, 2], [2**32 - 1, 2**32, 2**62 + 3, 2**64 - 1]),
    "last rows": some([9, 9, 2**40], [2**32 - 1, 2**31, 2**32 - 2], [0, 7, 7]),
}


@pytest.mark.parametrize("where", CORNERS.values(), ids=CORNERS.keys())
def test_every_element_of_a_sample(where: Streams) -> None:
    n = 133  # one more than a block of signs and one block of normals
    got = make(where, n)
    for sample in range(len(where.seeds)):
        for element in range(n):
            check_element(where, sample, element, got)


@pytest.mark.parametrize("n", [4 * 8192 - 1, 4 * 8192, 4 * 8192 + 1, 8 * 8192 + 3])
def test_samples_longer_than_a_cacheful(n: int) -> None:
    where = some([3, 4], [0, 1], [6, 5])
    got = make(where, n)
    for edge in (0, 2 * 8192, 4 * 8192, 6 * 8192, n - 1):
        for element in range(max(edge - 5, 0), min(edge + 5, n)):
            check_element(where, 0, element, got)
            check_element(where, 1, element, got)


@pytest.mark.parametrize("seeds", ["one seed", "a seed each"])
@pytest.mark.parametrize("n", [1, 3, 8, 300])
def test_more_samples_than_a_cacheful(n: int, seeds: str) -> None:
    """A cacheful is 8192 blocks: that many samples of one block, fewer of more."""
    rows = np.arange(8200, dtype=np.uint64)
    where = Streams(rows // np.uint64(2) if seeds == "a seed each" else rows * np.uint64(0), rows, rows[::-1])
    got = make(where, n)
    blocks = {kind: -(-n // per) for kind, per in (("normals", 4), ("bits", 2), ("signs", 128))}
    edges = {8192 // wide * k for wide in blocks.values() for k in (1, 2)} | {8199}
    for edge in edges:
        for sample in range(max(edge - 2, 0), min(edge + 2, 8200)):
            check_element(where, sample, 0, got)
            check_element(where, sample, n - 1, got)


def test_numbers_are_the_same_however_many_are_made() -> None:
    """Bit by bit: NumPy's vectorised log, cosine and sine are the same for a number wherever it lies among others."""
    long = make(some([1], [5], [2]), 2000)
    batch = make(some([1] * 40, list(range(40)), [2] * 40), 77)
    for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 1001):
        for kind, values in make(some([1], [5], [2]), n).items():
            assert torch.equal(values, long[kind][:, :n]), (kind, n)
            assert torch.equal(values[0, :77], batch[kind][5, :n]), (kind, n)


def test_words_at_the_ends_of_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """u is never 0, so every normal is finite: 6.76 at most, and 0 at u = 1."""
    ends = [0, 1, 2, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, LOW - 256, LOW - 127, LOW - 1, LOW]
    pairs = np.array([[a << 32 | b for a in ends for b in ends]], np.uint64)

    def rounds(state, *_) -> None:
        state[0], state[1] = pairs, pairs[:, ::-1]

    monkeypatch.setattr(philox, "_rounds", rounds)
    z = normals(some([0], [0], [0]), 4 * pairs.size)[0].reshape(-1, 2, 2)
    for index, pair in enumerate(pairs[0].tolist()):
        r, *expected = box_muller(pair >> 32, pair & LOW)
        for got in (z[index, 0], z[pairs.size - 1 - index, 1]):
            assert (got.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= BOUND * r
    assert abs(float(z.abs().max()) - math.sqrt(66 * math.log(2))) < 6.8 * BOUND
    assert not z[pairs[0] >> np.uint64(32) == LOW, 0].any()


def test_nothing_is_asked_for() -> None:
    for count, n in ((0, 5), (3, 0), (0, 0)):
        for values in make(some([1] * count, [0] * count, [0] * count), n).values():
            assert values.shape == (count, n)


@pytest.mark.parametrize("n", range(1, 10))
def test_what_is_made_is_contiguous(n: int) -> None:
    """Odd numbers are cut from whole blocks; a view of those would have strides that nobody expects."""
    assert all(values.is_contiguous() for values in make(some([1, 2], [0, 0], [0, 0]), n).values())


def test_streams_number_rows_or_seeds() -> None:
    one, draws = torch.tensor([7]), torch.tensor([[3], [4]])
    assert [part.tolist() for part in streams(one, 10, draws, 3)] == [
        [7] * 6,
        [10, 11, 12] * 2,
        [3, 3, 3, 4, 4, 4],
    ]
    assert [part.tolist() for part in streams(torch.tensor([7, 8, 2**63 - 1]), 0, draws, 3)] == [
        [7, 8, 2**63 - 1] * 2,
        [0] * 6,
        [3, 3, 3, 4, 4, 4],
    ]
    assert [part.tolist() for part in streams(torch.tensor([7, 8]), 0, torch.tensor([5, 2**62]), 2)] == [
        [7, 8],
        [0, 0],
        [5, 2**62],
    ]
    assert streams(one, 2**32 - 2, torch.tensor([0]), 2).rows.tolist() == [2**32 - 2, 2**32 - 1]
