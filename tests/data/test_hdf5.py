"""HDF5 and NetCDF: the numbers that were stored, and nothing of other files, of bombs, or of what is damaged."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy.io import netcdf_file

from scoresde.data import Arrays
from scoresde.data.readers.hdf5 import read_hdf5

FIELDS = np.random.default_rng(0).uniform(-1, 1, (20, 1, 4, 4))
LABELS = np.arange(20) % 2
RANGE = {"raw_low": -1, "raw_high": 1}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with whole and with hostile arrays."""
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as content:
        content.create_dataset("fields/u", data=FIELDS, chunks=(5, 1, 4, 4), compression="gzip", shuffle=True)
        content["fields/class"] = LABELS
        content["outside"] = h5py.ExternalLink("/dev/zero", "/x")
        content["elsewhere"] = h5py.SoftLink("/fields/u")
        content["compound"] = np.zeros(3, "f4,i4")
        content["text"] = ["a", "b"]
        content.create_dataset("ragged", (3,), dtype=h5py.vlen_dtype("f4"))
        content.create_dataset("nothing", data=h5py.Empty("f4"))
        content.create_dataset("passwords", (9,), dtype="u1", external=[("/etc/passwd", 0, 9)])
        content.create_dataset("bomb", (1 << 20, 1 << 20), dtype="f4", chunks=(1024, 1024), compression="gzip")
        content.create_dataset("wide", (2, 2), dtype="f4", chunks=(1 << 14, 1 << 14), maxshape=(None, None))
        twice = content.create_dataset("twice", (4,), dtype="u1", chunks=(4,), compression="gzip")
        twice.id.write_direct_chunk((0,), bytes(1 << 20))  # a chunk of 4 bytes that is a megabyte on disk
        layout = h5py.VirtualLayout((9,), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "d", (9,))
        content.create_virtual_dataset("virtual", layout)
    return path


def test_arrays_are_read_by_their_paths(file: Path) -> None:
    data = Arrays(str(file), "fields/u", "fields/class", **RANGE)
    raw = torch.cat([data.train.raw, data.test.raw])
    assert data.classes == 2 and raw.shape == (20, 1, 4, 4)
    assert sorted(raw.flatten().tolist()) == sorted(FIELDS.astype(np.float32).flatten().tolist())
    values, others = read_hdf5(file, "/fields/u", {"label": "fields/class"})
    assert np.array_equal(values, FIELDS) and np.array_equal(others["label"], LABELS)


def test_a_file_of_one_array_needs_no_key(tmp_path: Path) -> None:
    path = tmp_path / "one.hdf5"
    with h5py.File(path, "w") as content:
        content["deep/down"] = FIELDS
        content["x"] = np.arange(4)
        content["x"].make_scale("x")  # numbers an axis
    assert np.array_equal(read_hdf5(path, None, {})[0], FIELDS)


@pytest.mark.parametrize(
    ("key", "error", "said"),
    [
        (None, ValueError, "holds bomb, compound, .* choose one: data.key=bomb"),
        ("fields", ValueError, "has no array 'fields'; found .*fields/u"),
        ("fields/u/v", ValueError, "has no array 'fields/u/v'"),
        ("", ValueError, "has no array ''"),
        ("outside", ValueError, "an array in this file, found a link"),
        ("outside/x", ValueError, "an array in this file, found a link"),
        ("elsewhere", ValueError, "an array in this file, found a link"),
        ("passwords", ValueError, "whose values lie in other files"),
        ("virtual", ValueError, "whose values lie in other files"),
        ("compound", TypeError, "integers or real floats, found .*f0"),
        ("text", TypeError, "integers or real floats, found object"),
        ("ragged", TypeError, "integers or real floats, found object"),
        ("nothing", TypeError, "an array of .* found float32 None"),
        ("bomb", ValueError, "unpacks to 4,398,046,511,104 bytes from 0"),
        ("wide", ValueError, "unpacks to 1,073,741,824 bytes from 0"),
        ("twice", ValueError, "chunks that were compressed once"),
    ],
)
def test_what_is_no_array_of_this_file_is_refused_unread(file: Path, key: str | None, error: Any, said: str) -> None:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error, match=said) as caught:
        read_hdf5(file, key, {})
    assert str(file) in str(caught.value)
    assert time.process_time() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16


def test_a_filter_that_a_plug_in_would_bring_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.h5"
    with h5py.File(path, "w") as content:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((4,))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((4,))
        h5py.h5d.create(content.id, b"x", h5py.h5t.NATIVE_FLOAT, space, properties)
    with pytest.raises(ValueError, match=r"expected filters shuffle, .*gzip.*, found filter 32015"):
        read_hdf5(path, None, {})


def test_damaged_and_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for name, part in (("cut.h5", content[: len(content) // 2]), ("other.h5", b"hello"), ("other.nc", b"hello there")):
        path = tmp_path / name
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"{name}: expected a whole HDF5 or NetCDF file, found a damaged or other"):
            Arrays(str(path), "fields/u", **RANGE)


def netcdf3(path: Path, **attributes: Any) -> Path:
    with netcdf_file(str(path), "w") as content:
        content.createDimension("sample", 5)
        content.createDimension("x", 3)
        content.createVariable("x", "f4", ("x",))[:] = 0
        variable = content.createVariable("u", "h", ("sample", "x"))
        variable[:] = np.arange(15).reshape(5, 3)
        for name, value in attributes.items():
            setattr(variable, name, value)
    return path


def netcdf4(path: Path, **attributes: Any) -> Path:
    with h5py.File(path, "w") as content:
        content["u"] = np.arange(15).reshape(5, 3)
        content["u"].attrs.update(attributes)
    return path


@pytest.mark.parametrize("write", [netcdf3, netcdf4])
def test_variables_of_netcdf_are_what_they_stand_for(tmp_path: Path, write: Any) -> None:
    stored = np.arange(15).reshape(5, 3)
    plain, _ = read_hdf5(write(tmp_path / "plain.nc"), None, {})
    assert np.array_equal(plain, stored) and plain.dtype.kind == "i"
    packed = write(tmp_path / "packed.nc", scale_factor=0.5, add_offset=-1.0)
    assert np.array_equal(read_hdf5(packed, "u", {})[0], 0.5 * stored - 1)
    with pytest.raises(ValueError, match=r"gaps.nc\[u\]: .* found 1 of 15 missing \(_FillValue\)"):
        read_hdf5(write(tmp_path / "gaps.nc", _FillValue=np.int16(7)), "u", {})
    with pytest.raises(ValueError, match=r"has no array 'v'; found .*u"):
        read_hdf5(packed, "v", {})


def test_no_damage_to_a_netcdf_file_gets_past_the_reader(tmp_path: Path) -> None:
    """Every word of it in turn made huge, as a header that asks for memory would have it."""
    content, path = netcdf3(tmp_path / "whole.nc").read_bytes(), tmp_path / "damaged.nc"
    refused = 0
    for at in range(4, len(content) - 3, 4):
        path.write_bytes(content[:at] + b"\x7f\xff\xff\xff" + content[at + 4 :])
        try:
            read_hdf5(path, "u", {})
        except ValueError:
            refused += 1
    assert refused > 20
