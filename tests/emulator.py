"""The CUDA kernels on a CPU: csrc/kernels.cu compiled by a C++ compiler and run thread by thread.

`Emulator.launch` takes the place of `Driver.launch` for tensors in host memory, so everything but the GPU itself runs:
the packing of arguments, grids, index arithmetic, tails, memory formats, reductions and the arithmetic.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parent / "scoresde" / "kernels" / "csrc"
SCALARS = ("float", "double", "half", "bfloat16")
# -O0, because compiling takes longer than running; no contraction: a multiply-add is rounded once where the source says
# so, and nowhere else
FLAGS = ("-std=c++17", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")


class Emulator:
    """Libraries of the kernels, one for each type of tensor.

    Attributes:
        launches: names of the kernels launched, in order.
        backwards: run the blocks, and the threads of a block between barriers, from last to first.
    """

    def __init__(self, folder: Path):
        self.libraries = {scalar: ctypes.CDLL(str(folder / f"{scalar}.so")) for scalar in SCALARS}
        self.launches: list[str] = []
        self.backwards = False

    def launch(
        self,
        name: str,
        scalar: str,
        grid: int,
        block: int,
        args: Sequence[ctypes._SimpleCData | ctypes.Structure],
        device: torch.device,
    ) -> None:
        (argument,) = args
        assert device.type == "cpu" and 0 < grid < 2**31 and 0 < block <= 256
        self.launches.append(name)
        size = ctypes.c_size_t(ctypes.sizeof(argument))
        function = getattr(self.libraries[scalar], f"emulate_{name}")
        status = function(grid, block, ctypes.c_bool(self.backwards), size, ctypes.byref(argument))
        assert status != 1, f"{name}: some threads of a block wait at a barrier that the others never reach"
        assert status == 0, f"{name}: Python packs {size.value} bytes of arguments, the kernel takes another number"


def build(folder: Path) -> Emulator:
    """Compiles the libraries into `folder`, two at a time; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: neither g++ nor c++ is on the path")
    command = [compiler, "-x", "c++", *FLAGS, f"-I{CSRC}", str(HERE / "emulator.cpp")]
    for pair in (SCALARS[:2], SCALARS[2:]):
        running = [
            subprocess.Popen(
                [*command, f"-DSCORESDE_SCALAR={SCALARS.index(scalar)}", "-o", str(folder / f"{scalar}.so")],
                stderr=subprocess.PIPE,
                text=True,
            )
            for scalar in pair
        ]
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    return Emulator(folder)
