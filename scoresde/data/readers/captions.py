"""Sentences beside samples: a line each, JSON lines, or a column of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checks import whole
from ..dataset import Split
from ..text import Text, tokenizer_for
from .columns import lines, read_table
from .source import existing, misfit

_COLUMNS = ("text", "caption")  # what a column of sentences is called, unless it is named
_NAMES = "file_name"
_TABLES = (".csv", ".tsv", ".parquet", ".pq")


def beside(
    captions: str | Captions | None, *splits: Split, names: Sequence[str] | None = None
) -> tuple[list[Split], Text | None]:
    """`Captions.beside` of captions, or of a file as they are by default; the splits as they are without any."""
    if captions is None:
        return list(splits), None
    return (Captions(captions) if isinstance(captions, str) else captions).beside(*splits, names=names)


@dataclass(frozen=True)
class Captions:
    """One sentence for each sample; an empty one for a sample without.

    Args:
        path: captions.txt, a line for each sample in order; a .jsonl with an object in each line, or a table (CSV or
            Parquet). Those two may name the file of a picture beside its sentence, as `file_name`; else they are in
            order, too.
        column: the field or column of the sentence; None for text or caption.
        test_path: the same for a `test_path` of samples; None where samples have none.
        tokenizer: bytes; words or bpe, made of the captions; or tokenizer.json or a folder that holds it.
        vocabulary: tokens of bpe at most.
        length: tokens of a sentence at most; None for the longest caption.
        crop: longer sentences lose words at their end; False refuses them.

    Raises:
        ValueError: arguments out of range; files when they are read.
    """

    path: str
    column: str | None = None
    test_path: str | None = None
    tokenizer: str = "bytes"
    vocabulary: int = 512
    length: int | None = None
    crop: bool = False

    def __post_init__(self) -> None:
        whole(self.vocabulary, "vocabulary")
        if self.length is None and self.crop:
            raise ValueError("crop=true shortens sentences to a length, so give it: data.captions.length=32.")

    def sentences(self, count: int, names: Sequence[str] | None = None, *, test: bool = False) -> list[str]:
        """Those of `count` samples, or of the files with these names, in their order.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged, or has other samples; names it.
        """
        path = self.test_path if test else self.path
        if path is None:
            raise ValueError("The held-out samples have a file of their own, so their captions do: captions.test_path.")
        file = existing(path)
        kind = file.suffix.lower()
        found, named = self._table(file) if kind in _TABLES else self._lines(file, kind == ".jsonl")
        if named is None or names is None:
            if len(found) != count:
                raise misfit(file, f"{count:,} captions, one for each sample", f"{len(found):,}")
            return found
        by_name = dict(zip(named, found, strict=True))
        if len(by_name) < len(named):
            twice = next(name for k, name in enumerate(named) if name in named[:k])
            raise misfit(file, "one caption for each file", f"two for {twice}")
        if missing := [name for name in names if name not in by_name]:
            raise misfit(file, f"a caption for each of {count:,} files", f"none for {missing[0]}")
        return [by_name[name] for name in names]

    def beside(self, *splits: Split, names: Sequence[str] | None = None) -> tuple[list[Split], Text]:
        """The splits with their sentences as the condition "text", and how these are read.

        Args:
            splits: samples that the file of captions is of, and those of the file of held-out ones, if there are any.
            names: of the files of the first.

        Raises:
            FileNotFoundError, ValueError: see `sentences`; or words or lengths that do not fit.
        """
        found = [self.sentences(len(split), names, test=k > 0) for k, split in enumerate(splits)]
        every = [sentence for sentences in found for sentence in sentences]
        tokenizer = tokenizer_for(self.tokenizer, self.vocabulary, every)
        longest = self.length
        if longest is None:
            longest = max(1, *(len(tokenizer.encode(sentence)) for sentence in {*every, ""} if sentence.strip()))
        text, told = Text(tokenizer, longest, self.crop), []
        for split, sentences, path in zip(splits, found, (self.path, self.test_path), strict=False):
            told.append(replace(split, conditions={**split.conditions, "text": text.rows(sentences, str(path))}))
        return told, text

    def _lines(self, file: Path, objects: bool) -> tuple[list[str], list[str] | None]:
        if not objects:
            return [line.strip() for line in lines(file)], None
        rows = [self._object(f"{file}, line {k + 1:,}", line) for k, line in enumerate(lines(file)) if line.strip()]
        named = [name for _, name in rows if name is not None]
        if named and len(named) < len(rows):
            raise misfit(file, f"{_NAMES} in every line or in none", f"it in {len(named):,} of {len(rows):,}")
        return [sentence for sentence, _ in rows], named or None

    def _object(self, where: str, line: str) -> tuple[str, str | None]:
        """The sentence of a line of JSON, and the name of its file."""
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise misfit(where, "an object of JSON", f"something else ({error!s:.100})") from error
        if not isinstance(row, dict):
            raise misfit(where, 'an object of JSON, as in {"text": …}', f"{row!r:.60}")
        sentence, name = row[self._column(list(row), where)], row.get(_NAMES)
        if not isinstance(sentence, str) or not isinstance(name, (str, type(None))):
            raise misfit(where, "a sentence and the name of a file as text", f"{row!r:.100}")
        return sentence.strip(), name

    def _table(self, file: Path) -> tuple[list[str], list[str] | None]:
        names: list[str] = []

        def choose(found: Sequence[str]) -> tuple[Sequence[str], str]:
            names.extend(found)
            return (), self._column(found, str(file))

        (sentences,) = read_table(file, None, choose).read
        if _NAMES not in names:
            return [str(one).strip() for one in sentences.values], None
        (files,) = read_table(file, None, lambda _: ((), _NAMES)).read
        return [str(one).strip() for one in sentences.values], [str(one) for one in files.values]

    def _column(self, found: Sequence[str], where: str) -> str:
        for name in (self.column,) if self.column else _COLUMNS:
            if name in found:
                return name
        wanted = repr(self.column) if self.column else " or ".join(map(repr, _COLUMNS))
        raise misfit(where, f"the sentence under {wanted}", ", ".join(found[:8]), "Name it: data.captions.column=….")
