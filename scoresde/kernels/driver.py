"""Loads and launches kernels by the C interface of the CUDA driver, in torch's context and on torch's stream."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import nvrtc
from .cubin import Cache, key

SCALARS = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}
FLAGS = ("--std=c++17", "--device-as-default-execution-space")  # the latter for the lambdas in kernels.cu
CSRC = Path(__file__).with_name("csrc")
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Function(NamedTuple):
    handle: int
    context: int


class Driver:
    """Launches kernels by name.

    A module holds all kernels for one scalar on one device. It is loaded at its first use, or by `prepare`, and kept.
    Loading allocates memory on the device, which is refused while a CUDA graph is captured, except in the thread's
    relaxed mode: loading switches to that. A launch allocates nothing and waits for nothing, so a graph can capture it.

    Args:
        cuda: the driver, `libcuda.so.1`.
        cubin: gives the machine code for a scalar and the capability (major, minor) of a device.
        stream: gives the handle of the stream to launch on for a device index. Default: torch's current one.
    """

    def __init__(
        self,
        cuda: ctypes.CDLL,
        cubin: Callable[[str, tuple[int, int]], bytes],
        stream: Callable[[int], int] | None = None,
    ) -> None:
        self._cuda = cuda
        self._cubin = cubin
        # Torch's own compiled code calls this too: 0.1 µs, where the stream as an object costs 2.
        self._stream: Any = stream or getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
        self._lock = threading.RLock()
        self._pid: int | None = None
        self._contexts: dict[int, int] = {}
        self._modules: dict[tuple[str, int], int] = {}
        self._functions: dict[tuple[str, str, int], Function] = {}
        self._launch: Any = cuda.cuLaunchKernel
        self._launch.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
        self._current: Any = cuda.cuCtxGetCurrent
        self._current.argtypes = [c_void_p]

    def launch(
        self,
        name: str,
        scalar: str,
        grid: int,
        block: int,
        args: Sequence[ctypes._SimpleCData | ctypes.Structure],
        device: torch.device,
    ) -> None:
        """Enqueues one kernel on the current stream of `device` and returns.

        Args:
            name: an `extern "C" __global__` function.
            scalar: the type the module is compiled for: "float", "double", "half" or "bfloat16".
            grid: number of blocks, in [1, 2^31).
            block: number of threads in a block, in [1, 1024].
            args: the arguments of the kernel, in order and of its types. They are copied before this returns.
            device: a CUDA device.

        Raises:
            RuntimeError: the compiler or the driver refused; the message has their error and what was being done.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        function = self._functions.get((name, scalar, index)) or self._function(name, scalar, index)
        pointers = (c_void_p * len(args))(*map(ctypes.addressof, args))
        call = (function.handle, grid, 1, 1, block, 1, 1, 0, self._stream(index), pointers, None)
        current = c_void_p()
        if self._current(byref(current)) == 0 and current.value == function.context:
            code = self._launch(*call)
        else:  # a thread that torch has not used yet has no context, one that works on another device has another
            with self._inside(function.context, index):
                code = self._launch(*call)
        if code:
            self._raise(f"launching {name} for {scalar} on cuda:{index} with {grid} blocks of {block} threads", code)

    def prepare(self, scalar: str, device: torch.device) -> None:
        """Compiles and loads the kernels for `scalar` on `device` now, so that the first launch is as fast as others.

        Raises:
            RuntimeError: as `launch`.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        if (scalar, index) not in self._modules or self._pid != os.getpid():
            with self._loading(index):
                self._module(scalar, index)

    @contextlib.contextmanager
    def _loading(self, index: int) -> Iterator[int]:
        """Enters the context of the device to load something: one thread at a time, even while a stream is captured."""
        if self._pid not in (None, os.getpid()):  # before the lock: another thread may have held it at the fork
            raise RuntimeError(
                f"this process was forked from {self._pid} after that had used the GPU, and CUDA does not survive a "
                "fork: start processes by multiprocessing's 'spawn' or 'forkserver'"
            )
        with self._lock:
            if self._pid is None:
                self._check("starting the CUDA driver", "cuInit", 0)
                self._pid = os.getpid()
                if sys.platform != "win32":
                    os.register_at_fork(after_in_child=self._functions.clear)
            mode = c_int(RELAXED)
            self._check("allowing loads during a capture", "cuThreadExchangeStreamCaptureMode", byref(mode))
            try:
                context = self._context(index)
                with self._inside(context, index):
                    yield context
            finally:
                self._check("restoring the capture mode", "cuThreadExchangeStreamCaptureMode", byref(mode))

    @contextlib.contextmanager
    def _inside(self, context: int, index: int) -> Iterator[None]:
        self._check(f"entering the context of cuda:{index}", "cuCtxPushCurrent_v2", c_void_p(context))
        try:
            yield
        finally:
            self._check(f"leaving the context of cuda:{index}", "cuCtxPopCurrent_v2", byref(c_void_p()))

    def _function(self, name: str, scalar: str, index: int) -> Function:
        with self._loading(index) as context:
            module, handle = self._module(scalar, index), c_void_p()
            self._check(
                f"looking for kernel {name} for {scalar} on cuda:{index}",
                "cuModuleGetFunction",
                *(byref(handle), c_void_p(module), name.encode()),
            )
            found = self._functions[name, scalar, index] = Function(handle.value or 0, context)
        return found

    def _module(self, scalar: str, index: int) -> int:
        if (scalar, index) not in self._modules:
            module, image = c_void_p(), self._cubin(scalar, self._capability(index))
            doing = f"loading the kernels for {scalar} on cuda:{index}"
            self._check(doing, "cuModuleLoadData", byref(module), c_char_p(image))
            self._modules[scalar, index] = module.value or 0
        return self._modules[scalar, index]

    def _context(self, index: int) -> int:
        """The device's primary context, in which torch works."""
        if index not in self._contexts:
            context = c_void_p()
            doing = f"taking the context of cuda:{index}"
            self._check(doing, "cuDevicePrimaryCtxRetain", byref(context), self._device(index))
            self._contexts[index] = context.value or 0
        return self._contexts[index]

    def _capability(self, index: int) -> tuple[int, int]:
        major, minor, device = c_int(), c_int(), self._device(index)
        doing = f"asking for the compute capability of cuda:{index}"
        self._check(doing, "cuDeviceGetAttribute", byref(major), MAJOR, device)
        self._check(doing, "cuDeviceGetAttribute", byref(minor), MINOR, device)
        return major.value, minor.value

    def _device(self, index: int) -> c_int:
        device = c_int()
        self._check(f"looking for cuda:{index}", "cuDeviceGet", byref(device), index)
        return device

    def _check(self, doing: str, name: str, *args: object) -> None:
        code = getattr(self._cuda, name)(*args)
        if code:
            self._raise(f"{doing} ({name})", code)

    def _raise(self, doing: str, code: int) -> None:
        name, text = c_char_p(), c_char_p()
        self._cuda.cuGetErrorName(code, byref(name))
        self._cuda.cuGetErrorString(code, byref(text))
        said = [part.value.decode() for part in (name, text) if part.value]
        raise RuntimeError(f"{doing} failed: {': '.join(said) or f'CUDA error {code}'}")


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def libcuda() -> ctypes.CDLL:
    """The driver's library. No package contains it: it is installed with the driver.

    Raises:
        OSError: the system's loader does not find it.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise OSError(f"the CUDA driver's library was not found ({error}): is NVIDIA's driver installed?") from None


@functools.cache
def driver() -> Driver:
    """The driver of this process, made at the first call.

    Raises:
        OSError: there is no CUDA driver, or no NVRTC; the message names the places searched.
    """
    compiler, cache = nvrtc.find(int(str(torch.version.cuda).split(".")[0])), Cache()
    source = (CSRC / "kernels.cu").read_text(encoding="utf-8")
    headers = {"scoresde_math.h": (CSRC / "scoresde_math.h").read_text(encoding="utf-8")}

    def cubin(scalar: str, capability: tuple[int, int]) -> bytes:
        return machine_code(compiler, cache, source, headers, scalar, capability)

    return Driver(libcuda(), cubin)


def machine_code(
    compiler: nvrtc.Compiler,
    cache: Cache,
    source: str,
    headers: Mapping[str, str],
    scalar: str,
    capability: tuple[int, int],
) -> bytes:
    """The kernels for one scalar, compiled for the newest architecture that `compiler` knows and the device can run.

    They come from the cache if they are in it.
    """
    flags = (*FLAGS, f"-DSCORESDE_SCALAR={list(SCALARS.values()).index(scalar)}")
    architecture = compiler.architecture(*capability)
    return cache.get(
        key(source, headers, flags, architecture, compiler.version),
        lambda: compiler.compile(source, headers, flags, architecture)[0],
    )
