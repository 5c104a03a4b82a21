"""Philox, Box–Muller and signs against published answers and against a second writing of them, in Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scoresde.noise import philox
from scoresde.noise.philox import Streams, bits, normals, signs, streams

LOW, WHOLE = 2**32 - 1, 2**64 - 1

# Random123's kat_vectors, philox4x64 with 10 rounds: counter, key, answer
KNOWN = {
    "zeros": ((0,) * 4, (0,) * 2, (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    "ones": (
        (WHOLE,) * 4,
        (WHOLE,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    "digits of pi": (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
}

# |Δz|/(2^-24 r) of z = r cos πv in float32, where NumPy's logarithm is right to 4 ulps, its sine and cosine to 2 (what
# its own tests allow): πv is off by 1.47 |v| (π itself) + 2, the half ulp of a product in [2, π], half that in [1, 2);
# r by 4 (the logarithm, halved by the root) + 1 (the root) of itself; the cosine by 4 |cos|, but 2 at most; the product
# by |cos|. So |sin πv| (1.47 |v| + 2) + 6 |cos πv| + min(2, 4 |cos πv|), at most 8.83 (at π|v| = 2.7), and 8.3 with the
# smaller half ulps below 2; the sine is the same with the two exchanged. Seen in 40 million normals: 4.8.
BOUND = 9 * 2.0**-24


def block(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds of Philox4x64 on integers (Salmon et al. 2011, sec. 3.3)."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = (
            (second >> 64) ^ counter[1] ^ key[0],
            second & WHOLE,
            (first >> 64) ^ counter[3] ^ key[1],
            first & WHOLE,
        )
        key = (key[0] + 0x9E3779B97F4A7C15) & WHOLE, (key[1] + 0xBB67AE8584CAA73B) & WHOLE
    return counter


def word(seed: int, draw: int, number: int) -> int:
    return block((number // 4 + 1, draw, 0, 0), (seed, 0))[number % 4]


def box_muller(a: int, b: int) -> tuple[float, float, float]:
    """(r, r cos πv, r sin πv) in double precision; only u and v are rounded to single, as their definition says."""
    u = float(np.float32(float(np.float32(float(a))) * 2.0**-32 + 2.0**-33))
    v = float(np.float32(float(b - 2**32 if b >= 2**31 else b))) * 2.0**-31
    r = math.sqrt(-2 * math.log(u))
    return r, r * math.cos(math.pi * v), r * math.sin(math.pi * v)


def check_element(where: Streams, sample: int, element: int, n: int, got: dict[str, torch.Tensor]) -> None:
    """Entry `element` of a sample of n in all three kinds against the integers."""
    run, row = divmod(sample, where.rows)
    number, at = (where.row + row) * n + element, (int(where.seeds[run]), int(where.draws[run]))
    pair = [word(*at, 2 * (number // 4) + k) >> 32 * (number % 2) & LOW for k in range(2)]
    r, *z = box_muller(*pair)
    assert abs(float(got["normals"][sample, element]) - z[number % 4 // 2]) <= BOUND * r
    assert int(got["bits"][sample, element]) % 2**64 == word(*at, number)
    assert float(got["signs"][sample, element]) == (1.0 if word(*at, number // 64) >> number % 64 & 1 else -1.0)


def make(where: Streams, n: int) -> dict[str, torch.Tensor]:
    return {"normals": normals(where, n), "bits": bits(where, n), "signs": signs(where, n)}


def some(seeds: list[int], draws: list[int], row: int = 0, rows: int = 1) -> Streams:
    return Streams(*(np.array(part, np.uint64) for part in (seeds, draws)), row, rows)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN.values(), ids=KNOWN.keys())
def test_known_answers(counter, key, answer) -> None:
    """Of the oracle, and of the generator of NumPy, which counts on before it makes a block."""
    assert block(counter, key) == answer
    source, number = np.random.Philox(), sum(part << 64 * k for k, part in enumerate(counter))
    before = [(number - 1) >> 64 * k & WHOLE for k in range(4)]
    inside = {"counter": np.array(before, np.uint64), "key": np.array(key, np.uint64)}
    source.state = source.state | {"state": inside, "buffer_pos": 4}
    assert source.random_raw(4).tolist() == list(answer)


CORNERS = {
    "one": some([0], [0]),
    "64-bit seeds": some([2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1], [1, 1, 1, 1]),
    "64-bit draws": some([5, 5, 5, 5], [2**32 - 1, 2**32, 2**62 + 3, 2**64 - 1], 2),
    "rows": some([9, 2**40], [0, 7], 3, 2),
    "last rows": some([9, 2**40], [0, 7], 2**32 - 2, 2),
    "side by side": some([2**64 - 1 - k for k in range(70)], [2**64 - 1 - 3 * k for k in range(70)], 1),
}


@pytest.mark.parametrize("where", CORNERS.values(), ids=CORNERS.keys())
@pytest.mark.parametrize("n", [1, 3, 6, 133])
def test_every_element_of_a_sample(where: Streams, n: int) -> None:
    """133: one more than two words of signs, and some blocks of normals; rows of odd lengths begin within a block."""
    got = make(where, n)
    for sample in range(len(where.seeds) * where.rows):
        for element in range(n) if sample < 4 else {0, n - 1}:
            check_element(where, sample, element, n, got)


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**16 + 1, 2**17 + 3])
def test_samples_longer_than_a_cacheful(n: int) -> None:
    """A cacheful is 2^15 words: 2^16 normals, 2^15 numbers of bits."""
    where = some([3, 4], [6, 5], 1)
    got = make(where, n)
    for edge in (0, 2**15, 2**16, 3 * 2**15, n - 1):
        for element in range(max(edge - 5, 0), min(edge + 5, n)):
            check_element(where, 0, element, n, got)
            check_element(where, 1, element, n, got)


@pytest.mark.parametrize("n", [1, 3, 8, 300])
def test_more_samples_than_a_cacheful(n: int) -> None:
    """That many runs of one word and more: short ones are made side by side, long ones one after another."""
    runs = 2**14 + 8 if n < 100 else 2**9
    where = some(list(range(runs)), list(range(runs))[::-1])
    got = make(where, n)
    heights = {2**15 // max(words, 4) for words in (2 * -(-n // 4), n, -(-n // 64))}
    for edge in {height * k for height in heights for k in (1, 2)} | {runs - 1}:
        for sample in range(max(edge - 2, 0), min(edge + 2, runs)):
            check_element(where, sample, 0, n, got)
            check_element(where, sample, n - 1, n, got)


def test_a_batch_is_its_rows() -> None:
    """Bit by bit: NumPy's vectorised log, cosine and sine are the same for a number wherever it lies among others."""
    for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 1001):
        batch, other = make(some([1, 6], [2, 3], 0, 40), n), make(some([6] * 70, [3] * 70, 5), n)
        for row, rows in ((0, 40), (0, 5), (5, 1), (6, 34)):
            for kind, values in make(some([6], [3], row, rows), n).items():
                assert torch.equal(values, batch[kind][40 + row : 40 + row + rows]), (kind, n, row)
                if rows == 1:
                    assert torch.equal(values.expand(70, n), other[kind])


def test_words_at_the_ends_of_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """u is never 0, so every normal is finite: 6.76 at most, and 0 at u = 1."""
    ends = [0, 1, 2, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, LOW - 256, LOW - 127, LOW - 1, LOW]
    pairs = [(a, b) for a in ends for b in ends]
    # words 2j and 2j + 1 hold u and v of two pairs: one of the list, and the same from its end
    words = [[first[k] | second[k] << 32 for k in range(2)] for first, second in zip(pairs, pairs[::-1], strict=True)]
    monkeypatch.setattr(philox, "_in_turn", lambda *_: np.array(words, np.uint64).reshape(1, -1))
    z = normals(some([0], [0]), 4 * len(pairs)).reshape(-1, 2, 2)
    for index, pair in enumerate(pairs):
        r, *expected = box_muller(*pair)
        for got in (z[index, :, 0], z[len(pairs) - 1 - index, :, 1]):
            assert (got.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= BOUND * r
    assert abs(float(z.abs().max()) - math.sqrt(66 * math.log(2))) < 6.8 * BOUND
    assert not z[[index for index, pair in enumerate(pairs) if pair[0] == LOW], :, 0].any()


@pytest.mark.parametrize("n", range(1, 10))
def test_what_is_made_is_contiguous(n: int) -> None:
    """Odd numbers are cut from whole blocks; a view of those would have strides that nobody expects."""
    assert all(values.is_contiguous() for values in make(some([1, 2], [0, 0], 1, 3), n).values())


def test_streams_number_rows_or_seeds() -> None:
    one, draws = torch.tensor([7]), torch.tensor([[3], [4]])

    def parts(where: Streams) -> list:
        return [where.seeds.tolist(), where.draws.tolist(), where.row, where.rows]

    assert parts(streams(one, 10, draws, 3)) == [[7, 7], [3, 4], 10, 3]
    assert parts(streams(one, 10, 5, 3)) == [[7], [5], 10, 3]
    every = torch.tensor([7, 8, 2**63 - 1])
    assert parts(streams(every, 0, draws, 3)) == [[7, 8, 2**63 - 1] * 2, [3, 3, 3, 4, 4, 4], 0, 1]
    assert parts(streams(every, 0, 2**62, 3)) == [[7, 8, 2**63 - 1], [2**62] * 3, 0, 1]
    assert parts(streams(every[:2], 0, torch.tensor([5, 2**62]), 2)) == [[7, 8], [5, 2**62], 0, 1]
