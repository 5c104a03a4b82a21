"""Molecules: what is written in a file is what is read, centred, and what does not fit is named by frame and line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scoresde.codecs import Centred
from scoresde.data import Arrays, Molecules
from scoresde.data.excerpt import packed, unpacked
from scoresde.runs.load import build_denoiser
from scoresde.runs.run import Run

WATER = (8, 1, 1)
PLACES = np.random.default_rng(0).normal(size=(20, 3, 3))
PLAIN = "".join(
    f"3\nwater\n{''.join(f'{s} {x} {y} {z}' + chr(10) for s, (x, y, z) in zip('OHH', frame, strict=True))}"
    for frame in PLACES.tolist()
)


def written(folder: Path, text: str | bytes, name: str = "water.xyz") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_positions_are_read_less_their_mean_and_come_back(tmp_path: Path) -> None:
    data = Molecules(written(tmp_path, PLAIN))
    raw = torch.cat([data.train.raw, data.test.raw])
    centred = (PLACES - PLACES.mean(1, keepdims=True)).astype(np.float32)
    assert sorted(raw.flatten().tolist()) == sorted(centred.flatten().tolist())
    assert data.numbers == WATER and data.raw_shape == (3, 3) and data.event_shape == (2, 3)
    x = data.encode(data.train.raw)
    torch.testing.assert_close(x.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(data.decode(x), data.train.raw)


def test_columns_are_those_that_the_properties_name(tmp_path: Path) -> None:
    places = PLACES.tolist()
    header = 'Lattice="9 0 0 0 9 0 0 0 9" Properties=forces:R:3:pos:R:3:Z:I:1 energy=-1.5 pbc="F F F"'
    rows = [[f"1 2 3 {x} {y} {z} {n}" for n, (x, y, z) in zip(WATER, frame, strict=True)] for frame in places]
    text = "".join("\n".join(["3", header, *frame, "", ""]) for frame in rows)  # blank lines between frames
    one, other = Molecules(written(tmp_path, text)), Molecules(written(tmp_path, PLAIN, "plain.xyz"))
    assert one.numbers == WATER and torch.equal(one.train.raw, other.train.raw)


def test_numpy_files_and_files_of_a_test_split_hold_the_same(tmp_path: Path) -> None:
    path = tmp_path / "water.npz"
    np.savez(path, positions=PLACES, numbers=np.array(WATER), energy=np.zeros(20))
    text = written(tmp_path, PLAIN)
    both, one = Molecules(str(path), test_path=text), Molecules(text)
    assert torch.equal(both.train.raw, both.test.raw) and torch.equal(Molecules(str(path)).test.raw, one.test.raw)
    other = written(tmp_path, PLAIN.replace("O ", "S "), "other.xyz")
    with pytest.raises(ValueError, match=r"other.xyz: expected the atoms of .*water.npz, O H H, found S H H"):
        Molecules(str(path), test_path=other)


def test_the_atoms_are_kept_with_a_run_and_told_to_its_network(tmp_path: Path) -> None:
    data = Molecules(written(tmp_path, PLAIN))
    assert unpacked(*packed(data), data.codec).numbers == WATER
    network = {"_target_": "scoresde.nn.EGNN", "_partial_": True, "width": 8, "depth": 1}
    config = {
        "conditional": False,
        "network": network,
        "denoiser": {"_target_": "scoresde.Preconditioned", "sigma_data": 1.0},
        "sde": {"_target_": "scoresde.EDMSDE"},
        "parameterization": {"_target_": "scoresde.EDM"},
    }
    assert build_denoiser(config, data, ()).network.kinds.tolist() == [1, 0, 0]
    network["numbers"] = [0, 1, 2]  # hydrogens that are told apart
    assert build_denoiser(config, data, ()).network.kinds.tolist() == [0, 1, 2]


def test_other_frames_are_measured_under_the_codec_of_a_model(tmp_path: Path) -> None:
    data = Molecules(written(tmp_path, PLAIN), codec=Centred(2.0))
    assert len(data.test) == 20 and data.codec == Centred(2.0) and data.numbers == WATER
    ours: Any = SimpleNamespace(dataset=data, raw_shape=data.raw_shape, codec=data.codec, folder="runs/water")
    assert Run.adopt(ours, data).numbers == WATER
    other = Molecules(written(tmp_path, PLAIN.replace("O ", "S "), "other.xyz"))
    with pytest.raises(ValueError, match=r"holds the atoms \(16, 1, 1\), and runs/water was trained on \(8, 1, 1\)"):
        Run.adopt(ours, other)


FRAME = "3\nwater\nO 0 0 0\nH 1 0 0\nH 0 1 0\n"
TELLS = "frame 1, line "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FRAME + "x\nwater\n", TELLS + "6: expected the number of atoms, which begins a frame, found 'x'"),
        (FRAME + "3\nwater\nO 0 0 0\nH 1 0 0\n", TELLS + "10: expected 3 lines of atoms, found the end of the file"),
        (FRAME + "3\n", TELLS + "7: expected the line of properties, found the end of the file"),
        (FRAME + "2\nx\nO 0 0 0\nH 1 0 0\n", TELLS + "6: expected the atoms of frame 0, O H H.*found O H"),
        (FRAME + "3\nx\nO 0 0 0\nH 1 0 0\nC 1 0 0\n", TELLS + "6: expected the atoms of frame 0, O H H.*found O H C"),
        (FRAME + "3\nx\nO 0 0 0\nH 1 nan 0\nH 1 0 0\n", TELLS + "9: expected finite numbers, found 1 nan 0"),
        (FRAME + "3\nx\nO 0 0 0\nH 1 1e999 0\nH 1 0 0\n", TELLS + "9: expected finite numbers"),
        (FRAME + "3\nx\nO 0 0 0\nH 1 1_0 0\nH 1 0 0\n", TELLS + "9: expected three numbers, x y z, found 1 1_0 0"),
        (FRAME + "3\nx\nO 0 0 0\nH 1 0\nH 1 0 0\n", TELLS + "9: expected at least 4 columns, found 3"),
        (FRAME + "3\nx\nO 0 0 0\nHx 1 0 0\nH 1 0 0\n", TELLS + "9: expected the symbol of an element.*found 'Hx'"),
        (FRAME + "3\nx\nO 0 0 0\n119 1 0 0\nH 1 0 0\n", TELLS + "9: expected the symbol of an element.*found '119'"),
        (FRAME + '3\nLattice="9 0 0 0 9 0 0 0 9"\nO 0 0 0\n', TELLS + "7: expected a molecule in free space"),
        (FRAME + '3\npbc="F F T"\nO 0 0 0\n', TELLS + "7: expected a molecule in free space"),
        (FRAME + "3\nProperties=pos:R:3\nO 0 0 0\n", TELLS + "7: expected Properties with species:S:1 and pos:R:3"),
        (FRAME + "3\nProperties=pos:R:x\nO 0 0 0\n", TELLS + "7: expected Properties=name:type:columns"),
        (FRAME + "3\nProperties=species:S:1:pos:R:3\nO 0 0 0 0\n", TELLS + "8: expected 4 columns, found 5"),
        (FRAME + "3\n" + "x" * 99_999, TELLS + "7: expected the line of properties, found a longer one"),
        ("999999999\nwater\nO 0 0 0\n", "frame 0, line 4: expected 999999999 lines of atoms, found the end"),
        ("1\n\nO 0 0 0\n", "expected molecules of at least two atoms, found O"),
        ("\n\n", "expected frames of extended XYZ, found blank lines"),
        (b"3\nwater\n\xff\xfe\n", "expected text, found bytes that are no UTF-8"),
        (b"\0" * 9999, "frame 0, line 1: expected the number of atoms"),
    ],
)
def test_what_is_no_such_file_is_refused_by_frame_and_line(tmp_path: Path, text: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Molecules(written(tmp_path, text))
    assert "water.xyz" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"positions": PLACES}, "has no array 'numbers'; found positions"),
        ({"positions": PLACES[0], "numbers": [8, 1, 1]}, r"floats \(frames, N, 3\), found float64 \(3, 3\)"),
        ({"positions": PLACES, "numbers": [8, 1]}, r"atomic numbers \(3,\), one for each atom, found int64 \(2,\)"),
        ({"positions": PLACES, "numbers": [8, 1, 119]}, r"atomic numbers \(3,\)"),
        ({"positions": np.where(PLACES[4, 1, 1] == PLACES, np.nan, PLACES), "numbers": [8, 1, 1]}, "in frame 4"),
        ({"positions": PLACES, "numbers": np.array([8, 1, None])}, "found dtype object"),
    ],
)
def test_arrays_that_are_no_molecules_are_refused(tmp_path: Path, arrays: Any, said: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises((ValueError, TypeError), match=said):
        Molecules(str(tmp_path / "x.npz"))


def test_fields_without_channels_are_read_with_masks_beside_them(tmp_path: Path) -> None:
    fields, masks = np.random.default_rng(1).uniform(-1, 1, (10, 4, 4)), np.arange(160).reshape(10, 4, 4) % 3 == 0
    np.savez(tmp_path / "fields.npz", x=masks, y=fields)
    data = Arrays(str(tmp_path / "fields.npz"), "y", cond_keys={"image": "x"}, add_channel=True, raw_low=-1, raw_high=1)
    image = torch.cat([data.train.conditions["image"], data.test.conditions["image"]])
    assert data.raw_shape == (1, 4, 4) and image.shape == (10, 1, 4, 4) and image.dtype == torch.float32
    assert image.sum() == masks.sum()
