"""The stub of stub_cuda.c, compiled: a CUDA driver and an NVRTC for tests, on any machine with a C compiler."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

COMPILER = next(filter(None, map(shutil.which, ("g++", "gcc", "cc", "clang"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler (g++, gcc, cc or clang) is on PATH")

# Two kernels as the stub understands them, and the sizes of their arguments.
SOURCE = '#include "maths.h"\n// axpy 4 8 8 24\n// scale 8\n'
HEADERS = {"maths.h": "// of the header"}


@functools.cache
def path() -> Path:
    """The library, compiled once for a test run."""
    made = Path(tempfile.mkdtemp(prefix="scoresde-stub-")) / "libstub.so"
    source = Path(__file__).with_name("stub_cuda.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-x", "c", "-o", made, source, "-lpthread"], check=True)
    return made


def load() -> ctypes.CDLL:
    """A fresh stub, which has seen no call and fails none."""
    stub = ctypes.CDLL(str(path()))
    stub.stub_diary.restype = ctypes.c_char_p
    stub.stub_reset()
    return stub


def diary(stub: ctypes.CDLL, name: str = "") -> list[str]:
    """What was called so far, or the arguments of the calls of one name."""
    lines = stub.stub_diary().decode().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.split()[0] == name] if name else lines
