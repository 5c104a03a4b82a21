"""Sentences as numbers: tokenizers, and the rows of one length that a network reads."""

from __future__ import annotations

import abc
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import PADDING
from .readers.source import existing, misfit

_NEED = "This tokenizer needs the package tokenizers: pip install 'scoresde[text]'."
_FILE = "tokenizer.json"
_LARGEST = 1 << 26  # bytes of a saved tokenizer; those in use have some MB


class Tokenizer(abc.ABC):
    """Cuts a sentence into tokens, numbered from 0, and joins them again.

    Attributes:
        kind: its name in the record of a run.
        size: number of tokens.
    """

    kind: ClassVar[str]
    size: int

    @abc.abstractmethod
    def encode(self, sentence: str) -> list[int]:
        """The tokens of a sentence.

        Raises:
            ValueError: a word that it does not know; names it.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The sentence of some tokens, up to spaces and what else the tokenizer does not keep."""

    def state(self) -> Any:
        """What it is made of again, beside its kind: JSON."""
        return None


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """The bytes of UTF-8: knows every sentence, and makes long ones."""

    kind = "bytes"
    size = 256

    def encode(self, sentence: str) -> list[int]:
        return list(sentence.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass(frozen=True)
class Words(Tokenizer):
    """Words and signs in small letters, those of some captions.

    Args:
        words: all that it knows.
    """

    words: tuple[str, ...]
    kind = "words"

    @classmethod
    def of(cls, sentences: Iterable[str]) -> Words:
        """That of all words of these sentences."""
        return cls(tuple(sorted({word for sentence in sentences for word in cls.split(sentence)})))

    @staticmethod
    def split(sentence: str) -> list[str]:
        """The words and signs of a sentence."""
        return re.findall(r"\w+|[^\w\s]", sentence.lower())

    @property
    def size(self) -> int:  # type: ignore[override]
        return max(1, len(self.words))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, sentence: str) -> list[int]:
        words = self.split(sentence)
        if unknown := [word for word in words if word not in self._numbers]:
            some = ", ".join(self.words[:40]) + (", …" if len(self.words) > 40 else "")
            raise ValueError(f"the word {unknown[0]!r} is in no caption; known are {some}")
        return [self._numbers[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[number] for number in ids)

    def state(self) -> Any:
        return list(self.words)


@dataclass(frozen=True)
class Saved(Tokenizer):
    """A tokenizer of the package `tokenizers`, as its `to_str` wrote it.

    Args:
        content: JSON.
        size: number of tokens.
    """

    content: str
    size: int
    kind = "saved"

    @classmethod
    def read(cls, path: str) -> Saved:
        """That of tokenizer.json, or of a folder that holds it, as `transformers` saves it.

        Raises:
            ImportError, FileNotFoundError, ValueError: it cannot be read.
        """
        given = Path(path).expanduser()
        file = existing(given / _FILE if given.is_dir() else given)
        if file.stat().st_size > _LARGEST:
            raise misfit(file, f"a tokenizer of at most {_LARGEST:,} bytes", f"{file.stat().st_size:,}")
        try:
            return cls.of(_library().Tokenizer.from_file(str(file)))
        except ImportError:
            raise
        except Exception as error:  # the package raises nothing more special
            raise misfit(file, "a tokenizer of the package tokenizers", f"another file ({error!s:.200})") from error

    @classmethod
    def trained(cls, sentences: Sequence[str], vocabulary: int) -> Saved:
        """Byte-pair encoding with so many tokens at most, trained on sentences (Sennrich et al. 2016)."""
        library = _library()
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.Metaspace()
        made.decoder = library.decoders.Metaspace()
        made.train_from_iterator(sentences, library.trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
        return cls.of(made)

    @classmethod
    def of(cls, made: Any) -> Saved:
        """That of a tokenizer of the package."""
        made.no_padding(), made.no_truncation()  # what is too long is cropped here, by words
        return cls(made.to_str(), made.get_vocab_size())

    @functools.cached_property
    def _made(self) -> Any:
        return _library().Tokenizer.from_str(self.content)

    @functools.cached_property
    def _blank(self) -> str | None:
        return json.loads(self.content)["model"].get("unk_token")

    def encode(self, sentence: str) -> list[int]:
        if unknown := [word for word in sentence.split() if not self._knows(word)]:
            raise ValueError(f"the word {unknown[0]!r} is unknown to this tokenizer of {self.size:,} tokens")
        return list(self._made.encode(sentence).ids)

    def _knows(self, word: str) -> bool:
        """Whether all of a word is in its tokens: models without one for what they do not know leave that out."""
        found = self._made.encode(word, add_special_tokens=False)
        covered = {place for start, end in found.offsets for place in range(start, end)}
        return len(covered) == len(word) and self._blank not in found.tokens

    def decode(self, ids: Sequence[int]) -> str:
        return self._made.decode(list(ids))

    def state(self) -> Any:
        return {"content": self.content, "size": self.size}


@dataclass(frozen=True)
class Several(Tokenizer):
    """The tokens of one tokenizer behind those of another, whose numbers begin where the others' end: for networks that
    read a sentence in several ways.

    Args:
        texts: the tokenizers, each with its own length.
    """

    texts: tuple[Text, ...]
    kind = "several"

    @property
    def size(self) -> int:  # type: ignore[override]
        return sum(text.tokenizer.size for text in self.texts)

    def encode(self, sentence: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for text in self.texts:
            own = text.tokenizer.encode(sentence)
            if len(own) > text.length:
                raise ValueError(f"it has {len(own)} tokens, and {text.length} are read at most")
            ids += [start + token for token in own]
            start += text.tokenizer.size
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        first = self.texts[0].tokenizer
        return first.decode([token for token in ids if token < first.size])

    def state(self) -> Any:
        return [text.record() for text in self.texts]


def joined(texts: Sequence[Text]) -> Text:
    """What reads a sentence in each of these ways."""
    return texts[0] if len(texts) == 1 else Text(Several(tuple(texts)), sum(text.length for text in texts))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(_NEED) from error
    return tokenizers


@dataclass(frozen=True)
class Text:
    """How sentences become rows of numbers for a network, and rows sentences.

    Args:
        tokenizer: see `Tokenizer`.
        length: L ≥ 1, tokens of a row; shorter sentences are padded.
        crop: a longer sentence loses words at its end; False refuses it.
    """

    tokenizer: Tokenizer
    length: int
    crop: bool = False

    def __post_init__(self) -> None:
        whole(self.length, "length, the tokens of a sentence,")

    def rows(self, sentences: Sequence[str], where: str = "text") -> Tensor:
        """(n, length) int32, padded with −1; of an empty sentence all is padding, which is no condition.

        Raises:
            ValueError: a word that the tokenizer does not know, or a sentence that is too long; names it.
        """
        rows = torch.full((len(sentences), self.length), PADDING, dtype=torch.int32, device="cpu")
        known: dict[str, list[int]] = {}
        for k, sentence in enumerate(sentences):
            if sentence not in known:
                known[sentence] = self._tokens(sentence, where)
            rows[k, : len(known[sentence])] = torch.tensor(known[sentence], dtype=torch.int32, device="cpu")
        return rows

    def sentence(self, row: Tensor) -> str:
        """The sentence of a row (length,), as far as the tokenizer keeps it."""
        return self.tokenizer.decode([token for token in row.tolist() if token >= 0])

    def _tokens(self, sentence: str, where: str) -> list[int]:
        if not sentence.strip():
            return []
        try:
            ids = self.tokenizer.encode(sentence)
            words = sentence.split()
            while self.crop and len(ids) > self.length and len(words) > 1:
                words.pop()
                ids = self.tokenizer.encode(" ".join(words))
        except ValueError as error:
            raise ValueError(f"{where}: {_short(sentence)}: {error}.") from error
        if len(ids) > self.length:
            cure = "Shorten it" if not self.crop else "Its first word alone is longer"
            raise ValueError(
                f"{where}: {_short(sentence)} has {len(ids)} tokens, and {self.length} are read at most. {cure}, or "
                "train with a larger data.captions.length."
            )
        return ids

    def record(self) -> dict[str, Any]:
        """What `text_of` makes it of again: JSON."""
        own = self.tokenizer
        return {"tokenizer": own.kind, "state": own.state(), "length": self.length, "crop": self.crop}


def text_of(record: Mapping[str, Any]) -> Text:
    """The text of a record.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    state = record["state"]
    makers = {
        "bytes": Bytes,
        "words": lambda: Words(tuple(map(str, state))),
        "several": lambda: Several(tuple(map(text_of, state))),
        "saved": lambda: Saved(str(state["content"]), int(state["size"])),
    }
    return Text(makers[record["tokenizer"]](), int(record["length"]), bool(record["crop"]))


def tokenizer_for(name: str, vocabulary: int, sentences: Sequence[str]) -> Tokenizer:
    """bytes; words or bpe, made of these sentences; or that of a path."""
    if name == "bytes":
        return Bytes()
    if name == "words":
        return Words.of(sentences)
    return Saved.trained(sentences, vocabulary) if name == "bpe" else Saved.read(name)


def _short(sentence: str) -> str:
    return repr(sentence if len(sentence) <= 60 else f"{sentence[:59]}…")
