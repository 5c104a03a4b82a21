"""NVRTC, NVIDIA's compiler as a library. Every CUDA wheel of torch brings it, so no toolkit has to be installed."""

from __future__ import annotations

import ctypes
import os
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

WINDOWS = sys.platform == "win32"


class Compiler:
    """A loaded NVRTC.

    Args:
        library: a path or name for the system's loader. If it cannot be loaded, OSError is raised.

    Attributes:
        path: the library that was loaded.
        version: such as "13.0".
        architectures: compute capabilities that it compiles for, rising, such as (75, 80, …, 120).
    """

    def __init__(self, library: str) -> None:
        self.path = library
        self._nvrtc = ctypes.CDLL(library)
        self._nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", found)
        self.architectures = tuple(sorted(found))

    def architecture(self, major: int, minor: int) -> str:
        """The architecture to compile for, such as "sm_90". Code for x.y runs on x.z if z ≥ y, and on no other x."""
        fitting = [arch for arch in self.architectures if arch // 10 == major and arch % 10 <= minor]
        if not fitting:
            raise RuntimeError(
                f"NVRTC {self.version} compiles for capabilities {', '.join(str(a / 10) for a in self.architectures)}, "
                f"and this GPU has {major}.{minor}; a torch that is built for this GPU brings an NVRTC that knows it"
            )
        return f"sm_{fitting[-1]}"

    def compile(
        self, source: str, headers: Mapping[str, str], flags: Sequence[str], architecture: str
    ) -> tuple[bytes, str]:
        """Machine code for one architecture (a "cubin"), and the compiler's log.

        Args:
            source: CUDA C++. It includes `headers` by their names; nothing is read from disk.
            headers: name to text.
            flags: such as "-DNAME=1".
            architecture: such as "sm_90".

        Raises:
            RuntimeError: the source does not compile; the message holds the compiler's log.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
        self._check(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", len(headers), texts, names
        )
        try:
            options = [f"--gpu-architecture={architecture}", *flags]
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._nvrtc.nvrtcCompileProgram(program, len(options), given)
            log = (
                self._read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
                .rstrip(b"\n\0")
                .decode(errors="replace")
            )
            if failed:
                raise RuntimeError(
                    f"NVRTC {self.version} could not compile the kernels for {architecture} with {' '.join(flags)}: "
                    f"{self._error(failed)}\n{log}"
                )
            return self._read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
        finally:
            self._nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, size: str, get: str) -> bytes:
        length = ctypes.c_size_t()
        self._check(size, program, ctypes.byref(length))
        text = ctypes.create_string_buffer(length.value)
        self._check(get, program, text)
        return text.raw

    def _error(self, code: int) -> str:
        return str(self._nvrtc.nvrtcGetErrorString(code).decode())

    def _check(self, name: str, *args: object) -> None:
        code = getattr(self._nvrtc, name)(*args)
        if code:
            raise RuntimeError(f"{name} of {self.path} failed: {self._error(code)}")


def places(major: int) -> Iterator[str]:
    """Where NVRTC of CUDA `major` may be, in the order of the search.

    The system's loader comes first, which finds what torch itself has loaded; then torch's own wheels, a conda
    environment, and a toolkit.
    """
    name = f"nvrtc64_{major}0_0.dll" if WINDOWS else f"libnvrtc.so.{major}"
    yield name
    yield str(Path(torch.__file__).parent / "lib" / name)
    for packages in dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *sys.path]):
        for folder in (f"cu{major}", "cuda_nvrtc"):
            yield str(Path(packages) / "nvidia" / folder / ("bin" if WINDOWS else "lib") / name)
    yield str(Path(sys.prefix) / "lib" / name)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield str(Path(os.environ[variable]) / ("bin" if WINDOWS else "lib64") / name)


def find(major: int) -> Compiler:
    """NVRTC of CUDA `major`, which is torch's, so that its code runs on the driver that torch runs on.

    Raises:
        OSError: there is none. The message names all places, and what is wrong with a library that is there.
    """
    tried = []
    for place in places(major):
        if not os.path.isabs(place) or os.path.exists(place):
            try:
                return Compiler(place)
            except (OSError, RuntimeError, AttributeError) as error:
                tried.append(f"{place} ({error})" if os.path.isabs(place) else place)
        else:
            tried.append(place)
    raise OSError(
        f"NVRTC of CUDA {major} was not found; looked for {', '.join(dict.fromkeys(tried))}. "
        f"`pip install nvidia-cuda-nvrtc{'' if major > 12 else f'-cu{major}'}` brings it"
    )
