"""Molecules: the positions of atoms, from extended XYZ or NumPy files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from ...codecs import Centred, Codec
from ..dataset import Dataset, Split, given, hold_out
from .arrays import member
from .source import existing, explained, misfit

_ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl "
    "Mc Lv Ts Og"
)
_SYMBOLS = _ELEMENTS.split()
_NUMBERS = {symbol: 1 + place for place, symbol in enumerate(_SYMBOLS)}
_LINE = 1 << 16  # characters of a line, which in a file of something else may be all of it


def Molecules(
    path: str,
    test_path: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
) -> Dataset:
    """Frames of one molecule: the positions of the same atoms, in the same order, in every frame.

    Positions are kept less their mean, the centre of the atoms (not of their masses), so that a model has 3N − 3
    coordinates, as `Centred` says, in units of the training frames' deviation.

    Args:
        path: .xyz or .extxyz, a file of extended XYZ (columns species and pos as its Properties say, else the symbol
            of an element and x, y, z); or .npz of "positions" (frames, N, 3) and "numbers" (N,), the atomic numbers.
        test_path: file of the test split; None holds out `test_fraction` instead.
        test_fraction, seed: of the split, in (0, 1), and ≥ 0.
        codec: of a model that is measured on these frames; all are held out.

    Returns:
        raw (frames, N, 3) float32 in the file's unit of length; `numbers` are the atomic numbers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, frames of other atoms, a periodic cell, or NaN; frame and line are named.
    """
    file = existing(path)
    raw, numbers = _read(file)
    if codec is not None:
        return given(file.name, Split(raw), codec, numbers=numbers)
    if test_path is None:
        train, test = hold_out(Split(raw), test_fraction, seed)
    else:
        other = existing(test_path)
        held, found = _read(other)
        if found != numbers:
            raise misfit(other, f"the atoms of {file}, {_formula(numbers)}", _formula(found))
        train, test = Split(raw), Split(held)
    files = (str(path), str(test_path or path))
    return Dataset(file.stem, train, test, Centred.of(train.raw), files=files, numbers=numbers)


def _read(path: Path) -> tuple[Tensor, tuple[int, ...]]:
    """Centred positions (frames, N, 3) float32 and atomic numbers."""
    positions, numbers = _from_npz(path) if path.suffix == ".npz" else _from_xyz(path)
    if len(numbers) < 2:
        raise misfit(path, "molecules of at least two atoms", _formula(numbers))
    centred = positions - positions.mean(1, keepdims=True)
    return torch.from_numpy(centred.astype(np.float32)), numbers


def _from_npz(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    with explained(path, "a .npz file"):
        content = np.load(path, allow_pickle=False)
    with content:
        if missing := {"positions", "numbers"} - set(content.files):
            raise ValueError(f"{path} has no array {min(missing)!r}; found {', '.join(content.files)}.")
        positions, numbers = member(content, "positions", path), member(content, "numbers", path)
    if positions.ndim != 3 or positions.shape[2] != 3 or positions.dtype.kind != "f" or not positions.size:
        raise misfit(f"{path}[positions]", "floats (frames, N, 3)", f"{positions.dtype} {positions.shape}")
    whole = numbers.shape == positions.shape[1:2] and numbers.dtype.kind in "iu"
    if not whole or not 0 < int(numbers.min()) <= int(numbers.max()) <= len(_SYMBOLS):
        expected = f"atomic numbers ({positions.shape[1]},), one for each atom"
        raise misfit(f"{path}[numbers]", expected, f"{numbers.dtype} {numbers.shape}")
    if bad := np.argwhere(~np.isfinite(positions).all((1, 2))).ravel().tolist():
        raise misfit(f"{path}[positions]", "finite positions", f"NaN or infinite ones in frame {bad[0]}")
    return positions.astype(np.float64), tuple(numbers.tolist())


def _from_xyz(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    frames: list[np.ndarray] = []
    numbers: tuple[int, ...] = ()
    try:
        with path.open(encoding="utf-8") as file:
            for where, atoms in _frames(file, path):
                found = tuple(number for number, _ in atoms)
                numbers = numbers or found
                if found != numbers:
                    advice = "One model is of one molecule: write a file for each."
                    raise misfit(
                        where, f"the atoms of frame 0, {_formula(numbers)}, in their order", _formula(found), advice
                    )
                frames.append(np.array([place for _, place in atoms]))
    except UnicodeDecodeError as error:
        raise misfit(path, "text", f"bytes that are no UTF-8 ({error.reason})") from error
    if not frames:
        raise misfit(path, "frames of extended XYZ", "blank lines")
    return np.stack(frames), numbers


def _frames(file: TextIO, path: Path) -> Iterator[tuple[str, list[tuple[int, list[float]]]]]:
    """(where it begins, its atoms with their positions) of each frame."""
    line, frame = 0, 0

    def following(what: str) -> str:
        nonlocal line
        line, text = line + 1, file.readline(_LINE)
        if not text.endswith("\n") and (not text or len(text) == _LINE):
            raise misfit(
                f"{path}, frame {frame}, line {line}", what, "the end of the file" if not text else "a longer one"
            )
        return text.strip()

    while head := file.readline(_LINE):
        line += 1
        if not head.strip():
            continue
        where = f"{path}, frame {frame}, line {line}"
        if not re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*", head, re.ASCII):
            raise misfit(where, "the number of atoms, which begins a frame", repr(head.strip()[:40]))
        species, place, width = _columns(following("the line of properties"), f"{path}, frame {frame}, line {line}")
        atoms = []
        for _ in range(int(head)):
            words = following(f"{int(head)} lines of atoms").split()
            atoms.append(_atom(words, species, place, width, f"{path}, frame {frame}, line {line}"))
        yield where, atoms
        frame += 1


def _columns(comment: str, where: str) -> tuple[int, int, int]:
    """(column of the species, first column of the position, number of columns; 0 for any) of a frame's second line."""
    lattice = re.search(r"\bLattice\s*=", comment, re.IGNORECASE)
    periodic = re.search(r"\bpbc\s*=\s*[\"\[{]?([^\"\]}]*)", comment, re.IGNORECASE)
    if re.search(r"\b(t|true|1)\b", periodic[1], re.IGNORECASE) if periodic else lattice:
        raise misfit(where, "a molecule in free space", "a periodic cell (Lattice, pbc)", 'If it is none: pbc="F F F".')
    found = re.search(r"\bProperties\s*=\s*\"?([^\s\"]+)", comment, re.IGNORECASE)
    if found is None:
        return 0, 1, 0
    parts, at, columns = found[1].split(":"), 0, {}
    if len(parts) % 3 or not all(re.fullmatch("[1-9][0-9]?", count, re.ASCII) for count in parts[2::3]):
        raise misfit(where, "Properties=name:type:columns:…", found[1][:80])
    for name, kind, count in zip(parts[::3], parts[1::3], map(int, parts[2::3]), strict=True):
        columns[name, kind, count] = at
        at += count
    species = columns.get(("species", "S", 1), columns.get(("Z", "I", 1)))
    place = columns.get(("pos", "R", 3))
    if species is None or place is None:
        raise misfit(where, "Properties with species:S:1 and pos:R:3", found[1][:80])
    return species, place, at


def _atom(words: list[str], species: int, place: int, width: int, where: str) -> tuple[int, list[float]]:
    if len(words) < 4 or (width and len(words) != width):
        raise misfit(where, f"{width or 'at least 4'} columns", len(words))
    symbol = words[species]
    number = _NUMBERS.get(symbol) or (int(symbol) if re.fullmatch("[1-9][0-9]{0,2}", symbol, re.ASCII) else 0)
    if not 0 < number <= len(_SYMBOLS):
        raise misfit(where, "the symbol of an element, as C or Cl", repr(symbol[:20]))
    try:
        position = [float(word.replace("_", "?")) for word in words[place : place + 3]]
    except ValueError:
        raise misfit(where, "three numbers, x y z", " ".join(words[place : place + 3])[:60]) from None
    if not all(map(math.isfinite, position)):
        raise misfit(where, "finite numbers", " ".join(words[place : place + 3])[:60])
    return number, position


def _formula(numbers: tuple[int, ...]) -> str:
    """C C O H H …"""
    return " ".join(_SYMBOLS[number - 1] for number in numbers[:20]) + (" …" if len(numbers) > 20 else "")
