"""Captions: from a file to rows of numbers and back, in the right order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.codecs import Scaling
from scoresde.data import Arrays, Bytes, Captions, Dataset, ImageFolder, Saved, Split, Text, Words
from scoresde.data.excerpt import excerpt, packed, unpacked
from scoresde.data.kinds import kinds_of
from scoresde.data.text import text_of

SENTENCES = [f"{'a' if k % 2 else 'one'} {k} above a {k % 7}" for k in range(40)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """40 samples that hold their numbers, as an array and as pictures, beside their sentences in all formats."""
    raw = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2), np.uint8)
    raw[20:] += 150  # so that the values span more than half of what 8 bits hold
    np.savez(tmp_path / "x.npz", raw=raw)
    (tmp_path / "c.txt").write_text("".join(f"{s}\n" for s in SENTENCES), encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
    (tmp_path / "c.csv").write_text("n,caption\n" + "".join(f'{k},"{s}"\n' for k, s in enumerate(SENTENCES)))
    (tmp_path / "pictures").mkdir()
    for k in range(40):
        Image.fromarray(raw[k, 0]).save(tmp_path / "pictures" / f"{k}.png")
    order = np.random.default_rng(0).permutation(40)
    named = [{"file_name": f"{k}.png", "text": SENTENCES[k]} for k in order]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (tmp_path / "n.csv").write_text("file_name,text\n" + "".join(f"{k}.png,{SENTENCES[k]}\n" for k in order))
    return tmp_path


def number(raw: torch.Tensor) -> list[int]:
    """Which of the 40 each sample is."""
    values = raw[:, 0, 0, 0].int()
    return torch.where(values >= 170, values - 150, values).tolist()


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.csv"])
@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_every_sample_keeps_its_sentence(place: Path, name: str, tokenizer: str) -> None:
    """Through tokens and the split by chance: what a row says is the sentence of the sample that it stands beside."""
    data = Arrays(str(place / "x.npz"), captions=Captions(str(place / name), tokenizer=tokenizer))
    assert data.text is not None and len(data.test) == 4
    for split in (data.train, data.test):
        assert split.conditions["text"].dtype == torch.int32
        told = [data.text.sentence(row) for row in split.conditions["text"]]
        assert told == [SENTENCES[k] for k in number(split.raw[:])]


@pytest.mark.parametrize("name", ["n.jsonl", "n.csv"])
def test_pictures_are_found_by_name(place: Path, name: str) -> None:
    data = ImageFolder(str(place / "pictures"), captions=str(place / name))
    assert data.text is not None
    told = [data.text.sentence(row) for row in data.train.conditions["text"]]
    assert told == [SENTENCES[k] for k in number(data.train.raw[:])]


def test_an_excerpt_understands_sentences(place: Path) -> None:
    """What a run folder keeps, as JSON, reads words as the data did."""
    data = Arrays(str(place / "x.npz"), captions=Captions(str(place / "c.txt"), tokenizer="words", length=9))
    tensors, record = packed(excerpt(data))
    kept = unpacked(tensors, json.loads(json.dumps(record)), data.codec)
    assert kept.text is not None and data.text is not None and kept.text.record() == data.text.record()
    kind = kinds_of(kept, always=False)["text"]
    rows = kind.rows(["a 3 above one 7", "test:0"])
    assert torch.equal(rows[:1], data.text.rows(["a 3 above one 7"])) and rows.shape == (2, 9)
    assert torch.equal(rows[1], kept.test.conditions["text"][0])
    (place / "s.txt").write_text("a 3\na 5\n")
    assert torch.equal(kind.rows(str(place / "s.txt")), kind.rows(["a 3", "a 5"]))
    assert torch.equal(kind.rows(rows[:, :5].long()), torch.nn.functional.pad(rows[:, :5], (0, 4), value=-1))


def test_rows_by_hand() -> None:
    assert Text(Bytes(), 4).rows(["ab", ""]).tolist() == [[97, 98, -1, -1], [-1, -1, -1, -1]]
    words = Words.of(["A dog.", "a cat"])
    assert words.words == (".", "a", "cat", "dog") and words.encode("a DOG") == [1, 3]
    assert Text(words, 2, crop=True).rows(["a dog cat ."]).tolist() == [[1, 3]]
    assert text_of(Text(words, 2, crop=True).record()) == Text(words, 2, crop=True)


def test_what_cannot_be_read_is_named() -> None:
    text = Text(Words.of(["a dog", "a cat"]), 3)
    with pytest.raises(ValueError, match=r"'a bird': the word 'bird' is in no caption; known are a, cat, dog\."):
        text.rows(["a bird"])
    with pytest.raises(ValueError, match=r"has 4 tokens, and 3 are read at most\. Shorten it, or train with a larger"):
        text.rows(["a a a a"])
    with pytest.raises(ValueError, match="Its first word alone is longer"):
        Text(Bytes(), 3, crop=True).rows(["word"])
    split = Split(torch.zeros(4, 1, dtype=torch.uint8), conditions={"text": text.rows(["a dog"] * 4)})
    kind = kinds_of(Dataset("d", split, split, Scaling(levels=2), text=text), always=True)["text"]
    for given, found in ((7.5, "7"), ("", "an empty sentence"), ([["a"]], "got"), (torch.tensor([[5]]), "int64")):
        with pytest.raises(ValueError, match=found):
            kind.rows(given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "a\n" * 39, "expected 40 captions, one for each sample, found 39"),
        ("c.txt", b"\xff\xfe" + b"a\n" * 40, "expected text in UTF-8"),
        ("c.jsonl", '{"text": "a"}\n[1]\n' * 20, "line 2: expected an object of JSON"),
        ("c.jsonl", "[" * 100_000 + "\n", "line 1: expected an object of JSON"),
        ("c.jsonl", '{"words": "a"}\n' * 40, "expected the sentence under 'text' or 'caption', found words"),
        ("c.jsonl", '{"text": 3}\n' * 40, "expected a sentence and the name of a file as text"),
        ("c.csv", "n,words\n" + "1,a\n" * 40, "expected the sentence under 'text' or 'caption', found n, words"),
    ],
)  # fmt: skip
def test_files_that_are_not_captions(place: Path, name: str, content: str | bytes, message: str) -> None:
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Arrays(str(place / "x.npz"), captions=str(place / name))


def test_pictures_without_a_caption_are_named(place: Path) -> None:
    (place / "n.jsonl").write_text('{"file_name": "3.png", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"a caption for each of 40 files, found none for 0\.png"):
        ImageFolder(str(place / "pictures"), captions=str(place / "n.jsonl"))


def test_byte_pairs_of_the_captions(place: Path) -> None:
    """BPE of the captions: sentences come back, a letter that none has is named, and its JSON reads the same again."""
    pytest.importorskip("tokenizers")
    data = Arrays(str(place / "x.npz"), captions=Captions(str(place / "c.txt"), tokenizer="bpe", vocabulary=60))
    assert data.text is not None
    told = [data.text.sentence(row) for row in data.train.conditions["text"]]
    assert told == [SENTENCES[k] for k in number(data.train.raw[:])]
    again = text_of(json.loads(json.dumps(data.text.record())))
    assert torch.equal(again.rows(SENTENCES), data.text.rows(SENTENCES))
    with pytest.raises(ValueError, match="the word 'zebra' is unknown to this tokenizer"):
        again.rows(["a zebra"])
    assert isinstance(data.text.tokenizer, Saved)
    (place / "tokenizer.json").write_text(data.text.tokenizer.content)
    assert Saved.read(str(place)) == data.text.tokenizer
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a tokenizer of the package tokenizers"):
        Saved.read(str(place))
