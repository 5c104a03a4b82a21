"""Files of others are data: nothing in them is executed, and what they claim is not believed."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_files import as_torch_file, song_tensors, write_edm

from scoresde.interop import ForeignFileError, read
from scoresde.interop.torch_files import load


class Calls:
    def __init__(self, function: Any, *args: Any):
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_as_torch_reads_them(tmp_path: Path, zipped: bool) -> None:
    tied = torch.randn(3, 4)
    kinds = [torch.randn(2, 3).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    value = {
        "a": tied,
        "rows": tied[1:],
        "turned": tied.T,
        "kinds": kinds,
        "whole": torch.arange(5),
        "none": torch.empty(0),
        "state": OrderedDict(torch.nn.Linear(2, 1).state_dict()),
        "args": Namespace(model="x", layers=[1, 2], rate=0.5, seen={"a"}),
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
    }
    found = load(written(tmp_path, as_torch_file(value, zipped=zipped)))
    assert found["args"] == vars(value["args"])
    assert found["optimizer"] == value["optimizer"]
    for name in ("a", "rows", "turned", "whole", "none"):
        assert torch.equal(found[name], value[name]) and found[name].dtype == value[name].dtype
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found["kinds"], kinds, strict=True))
    assert list(found["state"]) == ["weight", "bias"]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    value = {"a": np.float64(0.25), "b": np.int64(-3), "c": np.float32(1.5), "d": np.bool_(True)}
    assert load(written(tmp_path, pickle.dumps(value, protocol=4))) == {"a": 0.25, "b": -3, "c": 1.5, "d": True}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "function", [os.system, builtins.eval, builtins.exec, builtins.getattr, os.mkdir, pickle.loads, torch.load]
)
def test_no_other_name_is_looked_up_or_called(tmp_path: Path, function: Any, protocol: int) -> None:
    canary = tmp_path / "canary"
    argument = str(canary) if function is os.mkdir else f"open({str(canary)!r}, 'w')"
    for value in ({"ema": Calls(function, argument)}, [Calls(function, argument)], {"ema": function}):
        with pytest.raises(ForeignFileError, match=r"file\.pkl cannot be read: it names '.*which no checkpoint"):
            load(written(tmp_path, pickle.dumps(value, protocol=protocol)))
    with pytest.raises(ForeignFileError, match="it names"):
        load(written(tmp_path, as_torch_file({"x": Calls(function, argument)})))
    assert not canary.exists()


def test_a_name_that_is_known_is_called_with_nothing_but_data(tmp_path: Path) -> None:
    for value in (
        Calls(OrderedDict, [("a", 1)]),
        Calls(set, "abc"),
        Calls(torch._utils._rebuild_parameter, 3, True, {}),
    ):
        with pytest.raises(ForeignFileError):
            load(written(tmp_path, pickle.dumps(value, protocol=4)))
    # a call of a plain text that is no name
    with pytest.raises(ForeignFileError, match=r"it calls a str os\.system, which is no function"):
        load(written(tmp_path, b"\x80\x04\x8c\x09os.system)R."))


def test_the_source_in_a_network_pickle_is_left_where_it_is(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = write_edm(tmp_path / "net.pkl", song_tensors(0), source=f"open({str(canary)!r}, 'w').write('x')")
    assert read(path).classes == 3
    assert not canary.exists()
    with pytest.raises(ForeignFileError, match=r"expected EDMPrecond, .* found Evil around SongUNet"):
        read(write_edm(tmp_path / "evil.pkl", song_tensors(0), "Evil"))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",  # bytes that are not there
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",  # an array of bytes
        b"\x80\x04N\x95" + struct.pack("<Q", 1 << 60) + b".",  # a frame
        b"\x80\x02Nr\xff\xff\xff\x7fj\xfe\xff\xff\x7f.",  # memory cells that are not there
        b"\x80\x02(lp0\nI1\na.",  # instructions of text
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02]]a.",
        b"\x80\x02)R.",
        b"\x80\x02N",
        b"\x80\x02.",
        b"\x80\x02(((.",
        b"\x80\x02u.",
        b"\x80\x04})N\x73.",  # a tuple as a key
        b"\x80\x04}(\x8c\x01aN\x8c\x01aNu.",  # one key twice
        b"",
        b"GIF89a",
    ],
)  # fmt: skip
def test_damaged_and_lying_pickles_are_refused_at_once(tmp_path: Path, content: bytes) -> None:
    start = time.monotonic()
    try:
        found = load(written(tmp_path, content))
    except ForeignFileError as error:
        assert "file.pkl" in str(error)
    else:
        assert found in (None, [[]])  # harmless, if odd
    assert time.monotonic() - start < 5


def test_a_program_that_copies_without_end_is_stopped(tmp_path: Path) -> None:
    items = b"".join(b"K" + bytes([i % 256]) + b"N" for i in range(0, 200))
    big = b"}\x94(" + items + b"u"
    with pytest.raises(ForeignFileError, match="it copies more than it holds"):
        # the same state is given to an empty namespace, over and over
        start = b"\x80\x04" + big + b"\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\x94"
        load(written(tmp_path, start + b"h\x03)\x81h\x00b" * 2000 + b"N."))
    with pytest.raises(ForeignFileError, match="more than 1,000,000 instructions"):
        load(written(tmp_path, b"\x80\x04" + b"]" * 1_000_002 + b"."))


def test_tensors_claim_no_more_than_their_storage_has(tmp_path: Path) -> None:
    honest = torch.arange(6.0)
    for size, stride, offset in (
        ((7,), (1,), 0),
        ((2, 3), (4, 1), 0),
        ((6,), (1,), 1),
        ((1 << 40,), (0,), 0),
        ((-1,), (1,), 0),
    ):
        value = Calls(torch._utils._rebuild_tensor_v2, honest.storage(), offset, size, stride, False, OrderedDict())
        with pytest.raises(ForeignFileError, match="a tensor"):
            load(written(tmp_path, pickle.dumps(value, protocol=4)))
    old = as_torch_file({"x": honest}, zipped=False)
    assert torch.equal(load(written(tmp_path, old))["x"], honest)
    lying = old.replace(b"K\x06N", b"J\xff\xff\xff\x7fN", 1)  # the length of the storage, 2^31 − 1
    assert lying != old
    with pytest.raises(ForeignFileError, match="claim more than the"):
        load(written(tmp_path, lying))


def test_archives_are_what_torch_writes(tmp_path: Path) -> None:
    honest = as_torch_file({"x": torch.zeros(1 << 16)})
    with zipfile.ZipFile(io.BytesIO(honest)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def packed(kind: int = zipfile.ZIP_STORED, twice: str = "", **extra: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", kind) as archive:
            for name, content in (members | extra).items():
                archive.writestr(name, content)
            if twice:
                with pytest.warns(UserWarning, match="Duplicate"):
                    archive.writestr(twice, b"")
        return file.getvalue()

    first = next(iter(members))
    assert torch.equal(load(written(tmp_path, packed()))["x"], torch.zeros(1 << 16))
    for content, message in (
        (packed(zipfile.ZIP_DEFLATED), "are compressed"),
        (packed(twice=first), "have the same name"),
        (packed(**{"other/data.pkl": b"\x80\x02N."}), "one member data.pkl"),
        (packed(**{first.replace("data.pkl", "byteorder"): b"big"}), "not little-endian"),
        (honest[: len(honest) // 2], ""),
    ):
        with pytest.raises(ForeignFileError, match=message):
            load(written(tmp_path, content))


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.999])
def test_files_that_were_cut_are_refused(tmp_path: Path, part: float) -> None:
    whole = write_edm(tmp_path / "net.pkl", song_tensors(0)).read_bytes()
    with pytest.raises(ForeignFileError):
        load(written(tmp_path, whole[: int(part * len(whole))]))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        with pytest.raises(ForeignFileError, match="no regular file"):
            load(tmp_path / name)
