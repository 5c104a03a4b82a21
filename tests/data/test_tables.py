"""Tables are read right from CSV and Parquet, or refused with path, line, column, what was expected and found."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoresde import Rng
from scoresde.data import Dataset, Table
from scoresde.data.excerpt import excerpt, packed

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

rng = np.random.default_rng(0)
N = 400
FRAME = pd.DataFrame(
    {
        "mass": rng.normal(3000, 200, N),
        "ratio": rng.lognormal(-3, 0.5, N),
        "rooms": rng.integers(1, 9, N),
        "people": rng.integers(0, 5000, N),
        "kind": rng.choice(["cat", "dog", "ant"], N),
        "year": rng.choice([9, 10, 2], N),
    }
)
NUMBERS = ("mass", "ratio", "rooms", "people", "year")


def stored(path: Path, **how: Any) -> str:
    if path.suffix == ".csv":
        FRAME.to_csv(path, index=False, **how)
    else:
        FRAME.to_parquet(path, index=False, **how)
    return str(path)


def rows(dataset: Dataset) -> torch.Tensor:
    assert dataset.validation is not None
    return torch.cat([dataset.train.raw, dataset.validation.raw, dataset.test.raw])


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "semi.csv", "tab.csv", "bom.csv"])
def test_every_row_is_in_one_split_with_the_names_and_values_of_the_file(name: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"semi.csv": {"sep": ";"}, "tab.csv": {"sep": "\t"}, "bom.csv": {"encoding": "utf-8-sig"}}
    dataset = Table(stored(tmp_path / name, **how.get(name, {})), columns=["ratio", "mass"])
    assert dataset.columns == ("ratio", "mass") and dataset.raw_shape == (2,)
    expected = torch.from_numpy(FRAME[["ratio", "mass"]].to_numpy(np.float32).copy())
    found, sought = (values[values[:, 1].argsort()] for values in (rows(dataset), expected))
    assert torch.equal(found, sought)
    # 40 rows of 400 are held out, and of the 360 others a quarter chooses, since that is fewer than 200
    assert [len(part) for part in (dataset.train, dataset.validation or (), dataset.test)] == [270, 90, 40]


def test_columns_are_standardised_and_few_integers_dequantised(tmp_path: Path) -> None:
    dataset = Table(stored(tmp_path / "t.csv"), columns=NUMBERS)
    x = dataset.encode(dataset.train.raw, Rng(0)).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(5).double(), atol=0.15, rtol=0)  # noise in a bin: ≤ 0.5 of a std
    torch.testing.assert_close(x.std(0), torch.ones(5).double(), atol=0.1, rtol=0)
    assert "rooms, year: whole numbers, dequantised" in dataset.notes and "people: continuous" in dataset.notes
    assert dataset.codec.integers == (2, 4)  # type: ignore[attr-defined]
    torch.testing.assert_close(dataset.decode(x.float()), dataset.train.raw, rtol=1e-5, atol=1e-4)
    both = Table(stored(tmp_path / "t.csv"), columns=NUMBERS, integers=["people"])
    assert both.codec.integers == (3,)  # type: ignore[attr-defined]


def test_a_fraction_in_any_row_makes_a_column_continuous(tmp_path: Path) -> None:
    """Also where chance, or the order of the file, puts it among the rows that are held out."""
    half = FRAME.assign(rooms=FRAME["rooms"] + 0.5)
    half.iloc[:3].to_csv(tmp_path / "test.csv", index=False)
    train, other = stored(tmp_path / "t.csv"), str(tmp_path / "test.csv")
    assert Table(train, columns=["mass", "rooms"], test_path=other).codec.integers == ()  # type: ignore[attr-defined]


def test_labels_keep_their_names_numbers_by_size(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet"):
        path = stored(tmp_path / name)
        dataset = Table(path, columns=["mass"], label="kind")
        assert dataset.class_names == ("ant", "cat", "dog") and dataset.classes == 3
        kinds = dict(zip(FRAME["mass"].astype(np.float32), FRAME["kind"], strict=True))
        for mass, label in zip(dataset.test.raw[:, 0].tolist(), dataset.test.labels.tolist(), strict=True):  # type: ignore[union-attr]
            assert dataset.class_names[label] == kinds[mass]
        assert Table(path, columns=["mass"], label="year").class_names == ("2", "9", "10")
    told = Table(path, columns=["mass"], condition=["ratio", "rooms"])
    assert told.train.conditions["vector"].shape == (270, 2)
    assert Table(path, label="kind").columns == NUMBERS


def test_a_file_of_its_own_is_held_out_with_the_same_columns_and_classes(tmp_path: Path) -> None:
    train, test = stored(tmp_path / "a.csv"), tmp_path / "b.csv"
    FRAME[["kind", "mass"]].iloc[:7].to_csv(test, index=False)
    dataset = Table(train, columns=["mass"], label="kind", test_path=str(test), validation_fraction=0)
    assert len(dataset.test) == 7 and len(dataset.train) == N and dataset.validation is None
    FRAME[["kind", "mass"]].iloc[:7].replace("dog", "cow").to_csv(test, index=False)
    with pytest.raises(ValueError, match=r"b.csv, column 'kind': expected the classes of the training.*found 'cow'"):
        Table(train, columns=["mass"], label="kind", test_path=str(test))


def test_a_run_keeps_names_and_no_validation_rows(tmp_path: Path) -> None:
    kept = excerpt(Table(stored(tmp_path / "t.csv"), columns=["mass"]))
    assert kept.validation is None and packed(kept)[1]["columns"] == ["mass"]


BAD = {
    "text": ("a,b\n1,2\n\n3,x\n", r"line 4, column 'b': expected a number, found 'x'"),
    "date": ("a,b\n1,2020-01-31\n", r"line 2, column 'b': expected a number, found '2020-01-31'"),
    "nan": ("a,b\n1,2\n3,nan\n", r"line 3, column 'b': expected a finite number, found 'nan'"),
    "infinite": ("a,b\n1,2\n-inf,4\n", r"line 3, column 'a': expected a finite number, found '-inf'"),
    "missing": ("a,b\n1,2\n3,\n", r"line 3, column 'b': expected a finite number, found nothing"),
    "comma": ("a;b\n1,5;2\n", r"line 2, column 'a': .* found '1,5'. Write decimals with a point"),
    "wide": ("a,b\n1,2\n3,4,5\n", r"line 3: expected 2 columns, as there are names, found 3 \(3,4,5\)"),
    "narrow": ("a,b\n1,2\n3\n", r"line 3: expected 2 columns, as there are names, found 1 \(3\)"),
    "both": ("a;b,c\n1;2,3\n", r"line 1: expected one delimiter, found ',' and ';'"),
    "Latin-1": ("a,b\n1,2\n3,é\n".encode("latin-1"), r"line 3: expected text in UTF-8, found the byte 0xe9"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), r"expected text in UTF-8, found UTF-16"),
    "binary": (b"a,b\n1,2\n\0\0\n", r"line 3: .* found bytes of 0"),
    "packed": (gzip.compress(b"a,b\n1,2\n"), r"found one packed by gzip. Unpack it first"),
    "headless": ("1,2\n3,4\n", r"line 1: expected the names of the columns, found numbers \(1, 2 …\)"),
    "twice": ("a,a\n1,2\n", r"line 1: .* found 'a' twice"),
    "nameless": ("a,,b\n1,2,3\n", r"line 1: expected a name for each column, found none for column 2 of 3"),
    "names alone": ("a,b\n", r"expected a line of names and rows of numbers, found one line"),
    "empty": ("", r"is empty"),
    "endless line": ("a,b\n1,2\n" + "1" * (1 << 21), r"line 3: .* found one that is longer"),
    "constant": ("a,b\n" + "".join(f"{k},7\n" for k in range(20)), r"column 'b': expected values that differ, found 7"),
    "far off": (
        "a\n" + "".join(f"{1700000000 + k}\n" for k in range(60)),
        r"'a': .* float32 tells apart, found values around 1.7e\+09",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_table_is_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = tmp_path / "bad.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        Table(str(path))
    assert str(path) in str(caught.value)


def test_damaged_and_hostile_parquet_files_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    good, bad = Path(stored(tmp_path / "t.parquet")).read_bytes(), tmp_path / "bad.parquet"
    for content in (good[: len(good) // 2], good[:-9] + b"12345" + good[-4:], b"a,b\n1,2\n"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.parquet: expected a Parquet file, found"):
            Table(str(bad), columns=["mass"])
    for place in range(4, len(good), 997):  # a flipped byte is refused, or was in a column that is not read
        bad.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        try:
            Table(str(bad), columns=["mass"])
        except ValueError as error:
            assert "bad.parquet" in str(error)
    zeros = pa.table({"a": np.zeros(60_000_000, np.int8)})
    parquet.write_table(zeros, bad, compression="zstd")
    with pytest.raises(ValueError, match=r"found 60,000,000 rows in \d+,?\d* bytes"):
        Table(str(bad))
    FRAME.assign(when=pd.Timestamp("2020-01-01"), gap=[None, *range(N - 1)]).to_parquet(bad)
    for column, found in (("when", "found timestamp"), ("gap", "row 1: .* found nothing"), ("kind", "found .*string")):
        with pytest.raises(ValueError, match=f"column '{column}'.*{found}"):
            Table(str(bad), columns=[column])


def test_a_pipe_and_columns_that_are_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ValueError, match="expected a file, found a pipe"):
        Table(str(tmp_path / "pipe.csv"))
    path = stored(tmp_path / "t.csv")
    for asked, message in (
        ({"columns": ["mas"]}, r"expected a column 'mas', found the columns 'mass', 'ratio'"),
        ({"columns": ["kind", "kind"]}, r"'kind' is named twice"),
        ({"columns": NUMBERS, "integers": ["mass"]}, r"column 'mass': expected whole numbers, as data.integers says"),
        ({"columns": ["mass"], "integers": ["rooms"]}, r"data.integers: expected some of 'mass', found 'rooms'"),
        ({"columns": ["mass"], "label": "people"}, r"'people': expected classes with several rows each"),
        ({"delimiter": "::"}, r"delimiter is one sign"),
        ({}, r"line 2, column 'kind': expected a number, found '\w+'. .*data.label=kind"),
    ):
        with pytest.raises(ValueError, match=message):
            Table(path, **asked)
