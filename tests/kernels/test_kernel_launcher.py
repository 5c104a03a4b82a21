"""The launcher against a driver and an NVRTC that check what they are given (tests/stub_cuda.c), and a real NVRTC."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import stub_cuda
import torch
from forked import forked
from stub_cuda import HEADERS, SOURCE, diary, needs_compiler

from scoresde.kernels import driver as driving
from scoresde.kernels import nvrtc
from scoresde.kernels.cubin import Cache
from scoresde.kernels.driver import SCALARS, Driver, machine_code

ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)
STREAM, CONTEXT = 0x7F0000000070, 0x7E0000001000  # of device 0; handles are pointers, longer than an int
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Mixed(ctypes.Structure):
    """Fields with gaps between them, as a compiler lays them out."""

    _fields_ = (("flag", ctypes.c_int8), ("large", ctypes.c_int64), ("small", ctypes.c_float))


ARGS = (ctypes.c_float(1.5), ctypes.c_double(-2.0), ctypes.c_uint64(2**63 + 5), Mixed(1, -(2**40), 0.25))


@pytest.fixture
def stub() -> Iterator[ctypes.CDLL]:
    found = stub_cuda.load()
    yield found
    assert found.stub_depth() == 0, "a context was left current"
    assert found.stub_mode() == 0, "the capture mode was not restored"


@pytest.fixture
def driver(stub: ctypes.CDLL, tmp_path: Path) -> Driver:
    return made(stub, tmp_path)


def made(stub: ctypes.CDLL, folder: Path, source: str = SOURCE) -> Driver:
    """A driver like that of `driving.driver`, of the stub's libraries; the stream of device d is STREAM + d."""
    compiler, cache = nvrtc.Compiler(str(stub_cuda.path())), Cache(folder / "cache")
    return Driver(
        stub,
        lambda scalar, capability: machine_code(compiler, cache, source, HEADERS, scalar, capability),
        lambda index: STREAM + index,
    )


@needs_compiler
def test_what_is_launched_is_what_was_asked(stub: ctypes.CDLL, driver: Driver) -> None:
    """Grid, block, no shared memory, stream, context, and every byte of every argument."""
    driver.launch("axpy", "half", 2**31 - 1, 256, ARGS, ZERO)
    (call,) = diary(stub, "cuLaunchKernel")
    *head, args = call.split()
    assert head == ["axpy", "2147483647x1x1", "256x1x1", "0", hex(STREAM), hex(CONTEXT), "-"]
    assert [bytes.fromhex(arg) for arg in args.split(",")] == [bytes(arg) for arg in ARGS]


@needs_compiler
def test_a_launch_after_the_first_is_one_call(stub: ctypes.CDLL, driver: Driver) -> None:
    """No look-up, allocation or wait: that is what a CUDA graph can capture."""
    context = ctypes.c_void_p(CONTEXT)
    stub.cuCtxPushCurrent_v2(context)
    driver.launch("axpy", "float", 1, 32, ARGS, ZERO)
    before = len(diary(stub))
    driver.launch("axpy", "float", 2, 32, ARGS, ZERO)
    assert [line.split()[:3] for line in diary(stub)[before:]] == [["cuLaunchKernel", "axpy", "2x1x1"]]
    stub.cuCtxPopCurrent_v2(ctypes.byref(context))


@needs_compiler
def test_modules_are_of_a_scalar_and_a_device(stub: ctypes.CDLL, driver: Driver) -> None:
    """Four scalars on 9.0 and on 8.6, each loaded once; code for 8.0 serves 8.6. The caller's context comes back."""
    foreign = ctypes.c_void_p(0x5555)
    stub.cuCtxPushCurrent_v2(foreign)
    for _ in range(2):
        for scalar in SCALARS.values():
            for device in (ZERO, ONE):
                driver.launch("axpy", scalar, 1, 1, ARGS, device)
                driver.launch("scale", scalar, 1, 1, ARGS[1:2], device)
    assert len(diary(stub, "cuModuleLoadData")) == len(diary(stub, "nvrtcCompileProgram")) == 8
    assert len(diary(stub, "cuModuleGetFunction")) == 16
    where = [call.split()[4:6] for call in diary(stub, "cuLaunchKernel")]
    assert where == 8 * (2 * [[hex(STREAM), hex(CONTEXT)]] + 2 * [[hex(STREAM + 1), hex(CONTEXT + 1)]])
    current = ctypes.c_void_p()
    stub.cuCtxGetCurrent(ctypes.byref(current))
    assert current.value == foreign.value
    stub.cuCtxPopCurrent_v2(ctypes.byref(current))


@needs_compiler
def test_flags_and_headers_reach_the_compiler(stub: ctypes.CDLL) -> None:
    """The stub's machine code is what it was given."""
    compiler, seen = nvrtc.Compiler(str(stub_cuda.path())), {}
    for number, scalar in enumerate(SCALARS.values()):
        found = machine_code(compiler, Cache(Path("/nowhere/at/all")), SOURCE, HEADERS, scalar, (8, 6)).decode()
        options, header, *source = found.rstrip("\0").split("\n")
        assert options.split() == ["STUB", "--gpu-architecture=sm_80", *driving.FLAGS, f"-DSCORESDE_SCALAR={number}"]
        assert header == "[maths.h]// of the header" and "\n".join(source) == SOURCE
        seen[scalar] = found
    assert len(set(seen.values())) == 4


@needs_compiler
def test_threads_load_once_and_need_no_context(stub: ctypes.CDLL, driver: Driver) -> None:
    """Eight threads that torch has never used, at once, while compiling takes 50 ms."""
    stub.stub_compile_ms(50)
    barrier, failures, left = threading.Barrier(8), list[BaseException](), list[int]()

    def work() -> None:
        try:
            barrier.wait()
            for _ in range(5):
                driver.launch("axpy", "float", 3, 4, ARGS, ZERO)
            left.append(stub.stub_depth() + stub.stub_mode())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and left == [0] * 8
    assert len(diary(stub, "cuModuleLoadData")) == len(diary(stub, "nvrtcCompileProgram")) == 1
    assert len(diary(stub, "cuLaunchKernel")) == 40


@needs_compiler
def test_first_use_may_be_inside_a_capture(stub: ctypes.CDLL, driver: Driver) -> None:
    """Loading is refused there in every mode but the relaxed one; the control shows that the stub refuses."""
    stub.stub_capture(1)
    module = ctypes.c_void_p()
    assert stub.cuModuleLoadData(ctypes.byref(module), b"STUB") == 900
    driver.launch("axpy", "float", 1, 1, ARGS, ZERO)
    assert len(diary(stub, "cuLaunchKernel")) == 1


@needs_compiler
def test_prepare_loads(stub: ctypes.CDLL, driver: Driver) -> None:
    driver.prepare("double", ONE)
    driver.prepare("double", ONE)
    assert len(diary(stub, "cuModuleLoadData")) == 1
    driver.launch("axpy", "double", 1, 1, ARGS, ONE)
    assert len(diary(stub, "cuModuleLoadData")) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("cuInit", 2, "starting the CUDA driver (cuInit) failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        ("cuDevicePrimaryCtxRetain", 2, "taking the context of cuda:0 (cuDevicePrimaryCtxRetain)"),
        (
            "cuCtxPushCurrent",
            1,
            "entering the context of cuda:0 (cuCtxPushCurrent_v2) failed: CUDA_ERROR_INVALID_VALUE",
        ),
        (
            "cuModuleLoadData",
            200,
            "loading the kernels for float on cuda:0 (cuModuleLoadData) failed: CUDA_ERROR_INVALID",
        ),
        ("cuModuleGetFunction", 500, "looking for kernel axpy for float on cuda:0 (cuModuleGetFunction)"),
        (
            "cuLaunchKernel",
            2,
            "launching axpy for float on cuda:0 with 5 blocks of 6 threads failed: CUDA_ERROR_OUT",
        ),
        ("cuLaunchKernel", 999, "with 5 blocks of 6 threads failed: CUDA error 999"),
        ("nvrtcCreateProgram", 3, "nvrtcCreateProgram of "),
    ],
)
def test_failures_say_what_was_being_done(stub: ctypes.CDLL, driver: Driver, name: str, code: int, said: str) -> None:
    """A failure leaves nothing behind: no context, mode or lock (see the fixture), and no half-made module."""
    stub.stub_fail(name.encode(), code)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(said)):
            driver.launch("axpy", "float", 5, 6, ARGS, ZERO)
    stub.stub_fail(b"", 0)
    driver.launch("axpy", "float", 5, 6, ARGS, ZERO)
    assert diary(stub, "cuLaunchKernel")


@needs_compiler
def test_bad_names_sizes_and_devices_are_refused(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match=r"kernel nonesuch for float on cuda:0 .*CUDA_ERROR_NOT_FOUND"):
        driver.launch("nonesuch", "float", 1, 1, ARGS, ZERO)
    with pytest.raises(RuntimeError, match="0 blocks of 1 threads failed: CUDA_ERROR_INVALID_VALUE"):
        driver.launch("axpy", "float", 0, 1, ARGS, ZERO)
    with pytest.raises(RuntimeError, match=r"looking for cuda:7 \(cuDeviceGet\) failed: CUDA error 101"):
        driver.launch("axpy", "float", 1, 1, ARGS, torch.device("cuda", 7))


@needs_compiler
def test_a_compile_error_carries_the_log(stub: ctypes.CDLL, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC 13\.7 could not compile .*sm_90.*\n.*\(7\): error: as you asked"):
        made(stub, tmp_path, "#error").launch("axpy", "float", 1, 1, ARGS, ZERO)
    assert len(diary(stub, "nvrtcDestroyProgram")) == 1 and not diary(stub, "cuModuleLoadData")


@needs_compiler
def test_a_forked_child_is_refused(stub: ctypes.CDLL, driver: Driver, tmp_path: Path) -> None:
    """CUDA does not survive a fork: a handle of the parent would be a wild pointer. Unused, a driver may be forked."""
    fresh = made(stub, tmp_path)
    driver.launch("axpy", "float", 1, 1, ARGS, ZERO)

    def child() -> None:
        for act in (
            lambda: driver.launch("axpy", "float", 1, 1, ARGS, ZERO),
            lambda: driver.launch("scale", "float", 1, 1, ARGS, ZERO),
            lambda: driver.prepare("float", ZERO),
        ):
            with pytest.raises(RuntimeError, match=f"forked from {parent} .*'spawn'"):
                act()
        before = len(diary(stub, "cuLaunchKernel"))
        assert before == 1
        fresh.launch("axpy", "float", 1, 1, ARGS, ZERO)
        assert len(diary(stub, "cuLaunchKernel")) == 2

    parent, held = os.getpid(), driver._lock  # a thread that holds it at the fork never lets go of it in the child
    release, holding = threading.Event(), threading.Event()

    def hold() -> None:
        with held:
            holding.set()
            release.wait(100)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    assert forked(child) == 0
    release.set()
    thread.join()
    driver.launch("axpy", "float", 1, 1, ARGS, ZERO)


@needs_compiler
def test_architectures_are_those_whose_code_runs(stub: ctypes.CDLL) -> None:
    """Code for x.y runs on x.z with z ≥ y; the stub knows 8.0, 8.9, 9.0, 10.0 and 12.0."""
    compiler = nvrtc.Compiler(str(stub_cuda.path()))
    assert compiler.version == "13.7"
    found = [compiler.architecture(*capability) for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1))]
    assert found == ["sm_80", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
    for major, minor in ((7, 5), (11, 0), (13, 0)):
        with pytest.raises(RuntimeError, match=rf"8\.0, 8\.9, 9\.0, 10\.0, 12\.0, .*GPU has {major}\.{minor}"):
            compiler.architecture(major, minor)


@needs_compiler
@pytest.mark.parametrize("folder", ["cu99", "cuda_nvrtc"])
def test_nvrtc_is_found_in_torchs_wheels(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No real NVRTC has the number 99. One that cannot be loaded is passed over, and named if there is no other."""
    place = tmp_path / "good" / "nvidia" / folder / "lib" / "libnvrtc.so.99"
    broken = tmp_path / "broken" / "lib64" / "libnvrtc.so.99"
    for path in (place, broken):
        path.parent.mkdir(parents=True)
    broken.write_bytes(b"no library")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "broken"))
    with pytest.raises(OSError, match=re.escape(str(broken)) + r" \(.*") as error:
        nvrtc.find(99)
    assert "pip install nvidia-cuda-nvrtc" in str(error.value) and "libnvrtc.so.99" in str(error.value)
    shutil.copy(stub_cuda.path(), place)
    monkeypatch.syspath_prepend(str(tmp_path / "good"))
    assert nvrtc.find(99).path == str(place)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path / "good")])
    shutil.copy(stub_cuda.path(), broken)
    assert nvrtc.find(99).path == str(broken)


@needs_compiler
def test_the_driver_of_the_process(stub: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real source by the stub's libraries: compiled once for all processes, made once in each."""
    monkeypatch.setenv("SCORESDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "find", lambda major: nvrtc.Compiler(str(stub_cuda.path())) if major == 13 else None)
    monkeypatch.setattr(driving, "libcuda", lambda: stub)
    try:
        for _ in range(3):
            driving.driver.cache_clear()
            assert driving.driver() is driving.driver()
            driving.driver().prepare("bfloat16", ZERO)
        assert len(diary(stub, "nvrtcCompileProgram")) == 1 and len(diary(stub, "cuModuleLoadData")) == 3
    finally:
        driving.driver.cache_clear()


def test_libcuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(OSError, match=r"libcuda\.so\.1: cannot open .*: is NVIDIA's driver installed"):
        driving.libcuda()


@functools.cache
def real() -> nvrtc.Compiler | None:
    for major in (13, 12):
        try:
            return nvrtc.find(major)
        except OSError:
            continue
    return None


needs_nvrtc = pytest.mark.skipif(
    real() is None, reason="no NVRTC: `pip install nvidia-cuda-nvrtc`, in this environment or on PYTHONPATH"
)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture: str) -> None:
    """For every scalar: all kernels are there, and each keeps its numbers in registers, none in (slow) local memory."""
    compiler = real()
    assert compiler is not None
    source = (driving.CSRC / "kernels.cu").read_text(encoding="utf-8")
    headers = {"scoresde_math.h": (driving.CSRC / "scoresde_math.h").read_text(encoding="utf-8")}
    for number in range(len(SCALARS)):
        flags = (*driving.FLAGS, f"-DSCORESDE_SCALAR={number}", "--ptxas-options=-v")
        cubin, log = compiler.compile(source, headers, flags, architecture)
        assert cubin.startswith(b"\x7fELF")
        kernels = re.findall(r"Compiling entry function '(\w+)'", log)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert kernels and len(frames) == len(kernels), log
        assert set(frames) == {("0", "0", "0")}, log


@needs_nvrtc
def test_a_real_compile_error_carries_the_log() -> None:
    compiler = real()
    assert compiler is not None
    with pytest.raises(
        RuntimeError, match=r'(?s)could not compile.*kernels\.cu\(2\): error: .*"nonesuch" is undefined'
    ):
        compiler.compile('extern "C" __global__ void f(float* x) {\n  *x = nonesuch;\n}', {}, (), "sm_90")


def test_import_opens_no_library() -> None:
    """Nothing is loaded, looked up, read from the environment, compiled or started before the first tensor on a GPU."""
    code = """
import sys, os, torch, numpy
seen = []
def watch(event, args):
    if event.startswith(("ctypes.dlopen", "subprocess.", "os.system", "os.fork", "os.exec", "socket.", "os.mkdir")):
        seen.append((event, args))
    if event == "open" and not str(args[0]).endswith((".py", ".pyc")) and "site-packages" not in str(args[0]):
        seen.append((event, args))
asked = []
class Environment(type(os.environ)):
    def __getitem__(self, key):
        asked.append(key)
        return super().__getitem__(key)
os.environ.__class__ = Environment
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import scoresde, scoresde.kernels
import scoresde.kernels.backend, scoresde.noise.switch
assert not seen, seen
assert not [key for key in asked if "SCORESDE" in key or "CUDA" in key or "XDG" in key], asked
assert "torch._dynamo" not in sys.modules
assert scoresde.noise.switch._mode is None and not scoresde.noise.switch._reasons
"""
    root = str(Path(driving.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
