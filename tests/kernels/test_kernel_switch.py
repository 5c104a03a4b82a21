"""The choice between kernel and reference, the warning when a kernel cannot run, and silence in all other cases."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stub_cuda
import torch
from forked import forked
from stub_cuda import diary, needs_compiler

from scoresde import ops
from scoresde.kernels import __main__ as command
from scoresde.kernels import driver as driving
from scoresde.kernels import nvrtc
from scoresde.kernels.driver import SCALARS
from scoresde.noise import draws, switch
from scoresde.noise.switch import KernelWarning, enabled, mode, use, using, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
F32 = torch.float32


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing decided and nothing said before; a warning that no test expects is a failure."""
    monkeypatch.delenv("SCORESDE_KERNELS", raising=False)
    monkeypatch.setattr(switch, "_warned", set())
    use(None)
    driving.driver.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        yield
    monkeypatch.undo()
    use(None)
    driving.driver.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Torch says that it is of CUDA 13 and sees one GPU of capability 9.0; no NVRTC and no driver are there."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(nvrtc, "places", lambda major: iter([f"libnvrtc-nowhere.so.{major}", "/nowhere/libnvrtc.so"]))
    monkeypatch.setattr(driving, "libcuda", missing_driver)
    monkeypatch.setenv("SCORESDE_CACHE", str(tmp_path / "cache"))
    return monkeypatch


def missing_driver() -> ctypes.CDLL:
    raise OSError("the CUDA driver's library was not found")


def with_stub(gpu: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Now both libraries are there."""
    stub = stub_cuda.load()
    gpu.setattr(nvrtc, "places", lambda major: iter([str(stub_cuda.path())]))
    gpu.setattr(driving, "libcuda", lambda: stub)
    return stub


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code wins over the environment, which wins over the default; `using` gives back what was."""
    assert mode() == "auto"
    monkeypatch.setenv("SCORESDE_KERNELS", "off")
    assert mode() == "off"
    use("require")
    assert mode() == "require"
    with using("auto"):
        assert mode() == "auto"
    assert mode() == "require"
    use(None)
    with using("auto"):
        assert mode() == "auto"
    assert mode() == "off"
    monkeypatch.setenv("SCORESDE_KERNELS", "")
    assert mode() == "auto"


def test_other_modes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("on", "1", "AUTO", "requiry"):
        with pytest.raises(ValueError, match=rf'kernels.use is {wrong!r}.*"auto".*"off" or "require"'):
            use(wrong)
        monkeypatch.setenv("SCORESDE_KERNELS", wrong)
        with pytest.raises(ValueError, match=rf'SCORESDE_KERNELS is {wrong!r}.*"auto".*"off" or "require"'):
            enabled(CPU, F32)
    use("off")
    assert not enabled(CPU, F32)


@pytest.mark.parametrize("asked", ["auto", "off"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_take_the_reference_in_silence(asked: str, device: str, gpu: pytest.MonkeyPatch) -> None:
    """A CPU is no fault. Once decided, neither the environment nor a library is asked again."""
    use(asked)
    assert not enabled(torch.device(device), F32)
    gpu.setattr(switch, "_decide", None)
    assert not enabled(torch.device(device), F32)
    assert why_not(torch.device(device)) == f"they run on CUDA devices, not on {device}"


def test_a_child_is_not_held_up_by_a_thread_that_compiles(gpu: pytest.MonkeyPatch) -> None:
    """A worker that loads data is forked while another thread of its parent waits for the compiler, and uses a CPU."""
    looking, done = threading.Event(), threading.Event()

    def look(*_: object) -> str:
        looking.set()
        done.wait(100)
        return "none"

    gpu.setattr(switch, "_look", look)
    thread = threading.Thread(target=why_not, args=(CUDA,))
    thread.start()
    looking.wait()
    assert forked(lambda: enabled(CPU, F32)) == 0
    done.set()
    thread.join()


def test_off_looks_for_nothing(gpu: pytest.MonkeyPatch) -> None:
    use("off")
    gpu.setattr(switch, "_look", None)
    assert not enabled(CUDA, F32)


def test_required_kernels_are_never_replaced() -> None:
    """An op that would run on the reference raises, on a CPU as well: else a benchmark could report the reference."""
    x = torch.ones(2, 3)
    with using("require"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r'torch\.float32 on cpu .*they run on CUDA devices.*"auto"'):
                enabled(CPU, F32)
        with pytest.raises(RuntimeError, match="are required"):
            ops.lincomb(((1.0, x),))
        with pytest.raises(RuntimeError, match="are required"):
            ops.langevin(x, x, x[:, 0], 0.1, x)
        with pytest.raises(RuntimeError, match="are required"):
            ops.dsm_loss(x, x, x[:, 0])
    assert torch.equal(ops.lincomb(((2.0, x),)), 2 * x)


def break_capability(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


def break_count(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "device_count", lambda: 0)
    gpu.setenv("CUDA_VISIBLE_DEVICES", "")


def break_compile(gpu: pytest.MonkeyPatch) -> None:
    with_stub(gpu).stub_fail(b"nvrtcCompileProgram", 6)


def break_load(gpu: pytest.MonkeyPatch) -> None:
    with_stub(gpu).stub_fail(b"cuModuleLoadData", 200)


def break_driver(gpu: pytest.MonkeyPatch) -> None:
    with_stub(gpu)
    gpu.setattr(driving, "libcuda", missing_driver)


REASONS = [
    (lambda gpu: gpu.setattr(torch.version, "cuda", None), "is built without CUDA"),
    (lambda gpu: gpu.setattr(torch.version, "hip", "6.4"), "is built for ROCm"),
    (break_count, "torch sees no GPU (CUDA_VISIBLE_DEVICES is '')"),
    (break_capability, "Some GPU has compute capability 7.5, and they need 8.0"),
    (
        lambda gpu: None,
        "NVRTC of CUDA 13 was not found; looked for libnvrtc-nowhere.so.13, /nowhere/libnvrtc.so. "
        "`pip install nvidia-cuda-nvrtc` brings it",
    ),
    pytest.param(break_driver, "the CUDA driver's library was not found", marks=needs_compiler),
    pytest.param(break_compile, "NVRTC_ERROR_COMPILATION\nkernels.cu(7): error: as you asked", marks=needs_compiler),
    pytest.param(break_load, "loading the kernels for float on cuda:0 (cuModuleLoadData)", marks=needs_compiler),
]


@pytest.mark.parametrize(("break_it", "reason"), REASONS)
def test_a_gpu_without_kernels_is_warned_of_once(
    break_it: Callable[[pytest.MonkeyPatch], None], reason: str, gpu: pytest.MonkeyPatch
) -> None:
    break_it(gpu)
    assert reason in str(why_not(CUDA))
    with pytest.warns(KernelWarning, match=re.escape(reason)) as warned:
        for _ in range(3):
            assert not enabled(CUDA, F32)
    assert len(warned) == 1 and issubclass(KernelWarning, UserWarning)
    use("auto")  # looks again, and has said it
    assert not enabled(CUDA, F32)
    use("require")
    with pytest.raises(RuntimeError, match=re.escape(reason)) as error:
        enabled(CUDA, F32)
    assert "torch.float32 on cuda:0" in str(error.value)


def test_one_reason_is_one_warning_for_all_dtypes(gpu: pytest.MonkeyPatch) -> None:
    """The reason is looked for once for each dtype, however often it is asked for."""
    looked, look = list[torch.dtype](), switch._look
    gpu.setattr(switch, "_look", lambda device, dtype: (looked.append(dtype), look(device, dtype))[1])
    with pytest.warns(KernelWarning, match="NVRTC of CUDA 13") as warned:
        assert not any(enabled(CUDA, dtype) for dtype in SCALARS)
    assert len(warned) == 1
    assert all(why_not(CUDA, dtype) == why_not(CUDA, dtype) for dtype in SCALARS)
    assert looked == list(SCALARS)
    assert "they take torch.float32, torch.float64" in str(why_not(CUDA, torch.complex64))


@needs_compiler
def test_kernels_that_can_be_had(gpu: pytest.MonkeyPatch) -> None:
    """Each dtype's are compiled and loaded at the first question, and never again; launches reach the driver."""
    stub = with_stub(gpu)
    gpu.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x99, raising=False)
    for _ in range(3):
        assert all(enabled(CUDA, dtype) for dtype in SCALARS)
    assert len(diary(stub, "cuModuleLoadData")) == len(diary(stub, "nvrtcCompileProgram")) == 4
    with using("require"):
        assert enabled(CUDA, torch.bfloat16) and why_not(CUDA, torch.bfloat16) is None
        with pytest.raises(RuntimeError, match=r"torch\.int32 on cuda:0 cannot have them: they take torch\.float32"):
            enabled(CUDA, torch.int32)
    with using("off"):
        assert not enabled(CUDA, F32)
    assert len(diary(stub, "cuModuleLoadData")) == 4
    with pytest.raises(RuntimeError, match=r"looking for kernel nonesuch for half on cuda:0 .*CUDA_ERROR_NOT_FOUND"):
        driving.driver().launch("nonesuch", "half", 1, 1, (), CUDA)


@needs_compiler
def test_what_failed_may_be_tried_again(gpu: pytest.MonkeyPatch) -> None:
    stub = with_stub(gpu)
    stub.stub_fail(b"cuModuleLoadData", 2)
    with pytest.warns(KernelWarning, match="out of memory"):
        assert not enabled(CUDA, F32)
    stub.stub_fail(b"", 0)
    assert not enabled(CUDA, F32)
    use("auto")
    assert enabled(CUDA, F32)


def test_compiled_code_keeps_the_answer_until_the_mode_changes() -> None:
    """No break of the graph, and no second compilation while nothing changes."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 3 if enabled(x.device, x.dtype) else x * 2

    x = torch.ones(3)
    for _ in range(3):
        assert torch.equal(double(x), 2 * x)
    assert len(graphs) == 1
    use("off")
    assert torch.equal(double(x), 2 * x) and len(graphs) == 2
    use("require")
    with pytest.raises(RuntimeError, match="are required"):
        double(x)


def test_the_command_says_what_there_is(capsys: pytest.CaptureFixture[str], gpu: pytest.MonkeyPatch) -> None:
    """With a GPU and no NVRTC: why, and where it was looked for. Consistent in "auto", not in "require"."""
    assert command.main() == 0
    said = capsys.readouterr().out
    assert re.search(r"^mode +auto$", said, re.MULTILINE)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}, CUDA 13\.0$", said, re.MULTILINE)
    assert re.search(r"^NVRTC +NVRTC of CUDA 13 was not found; looked for .*/nowhere/libnvrtc\.so", said, re.MULTILINE)
    assert re.search(r"^cuda:0 +Some GPU, 9\.0: not available: NVRTC of CUDA 13 was not", said, re.MULTILINE)
    assert re.search(r"^cache +.*/cache, 0 files, 0 kB$", said, re.MULTILINE)
    for op in ("lincomb", "langevin", "dsm_loss", "gradient"):
        assert re.search(rf"^{op}( +[\d.e+-]+ ok){{4}}$", said, re.MULTILINE), said
    gpu.setenv("SCORESDE_KERNELS", "require")
    assert command.main() == 1 and "not all devices have them" in capsys.readouterr().out
    break_count(gpu)
    assert command.main() == 1 and re.search(r"^GPU +none: torch sees no GPU", capsys.readouterr().out, re.MULTILINE)
    gpu.setenv("SCORESDE_CACHE", "/dev/null")
    command.main()
    assert re.search(r"^cache +/dev/null, not used: it is not a folder$", capsys.readouterr().out, re.MULTILINE)
    gpu.setenv("SCORESDE_KERNELS", "perhaps")
    assert command.main() == 1 and "SCORESDE_KERNELS is 'perhaps'" in capsys.readouterr().out


@needs_compiler
def test_the_command_with_kernels_that_are_not_right(
    capsys: pytest.CaptureFixture[str], gpu: pytest.MonkeyPatch
) -> None:
    """The stub loads them, but this torch has no CUDA to make a tensor with: the self-test says so, and fails."""
    with_stub(gpu)

    def broken(device: torch.device) -> Iterator[command.Check]:
        if device.type == "cuda":
            raise RuntimeError("an illegal memory access")
        yield from ()

    gpu.setattr(command, "self_test", broken)
    assert command.main() == 1
    said = capsys.readouterr().out
    assert re.search(r"^cuda:0 +Some GPU, 9\.0: available$", said, re.MULTILINE)
    assert re.search(r"^driver +up to CUDA 13\.0$", said, re.MULTILINE)
    assert re.search(r"^NVRTC +13\.7, .*libstub\.so$", said, re.MULTILINE)
    assert re.search(r"^cache +.*, 4 files, \d+ kB$", said, re.MULTILINE)
    assert "failed: an illegal memory access" in said


@pytest.mark.parametrize("change", [1.00001, 0.0, float("nan")])
def test_the_self_test_notices_a_wrong_op(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is 1e-5 too large is ten times what rounding explains in float32; the half types cannot show it."""
    real = draws.normal
    assert all(check.error <= check.tolerance for check in command.self_test(CPU))
    monkeypatch.setattr(draws, "normal", lambda *args: real(*args) * change)
    wrong = {check.op for check in command.self_test(CPU) if check.dtype == F32 and check.error > check.tolerance}
    assert wrong == {"lincomb + z", "langevin", "dsm_loss", "gradient"}


def test_without_any_library_the_reference_runs() -> None:
    """A process whose torch says CUDA, with no compiler on PATH and no library to be loaded: ops run, one warning."""
    code = """
import ctypes, os, subprocess, sys, warnings, torch
real = ctypes.CDLL
def refuse(name, *args, **options):
    if name is not None and ("cuda" in str(name) or "nvrtc" in str(name)):
        raise OSError(f"{name}: cannot open shared object file")
    return real(name, *args, **options)
ctypes.CDLL = refuse
subprocess.Popen = None
from scoresde import Rng, ops
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device: (9, 0)
x = torch.arange(6.0).view(2, 3)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.bfloat16):
        assert ops.enabled(torch.device("cuda", 0), dtype) is False
    assert torch.equal(ops.lincomb(((2.0, x), (1.0, x))), 3 * x)
assert len(warned) == 1 and "NVRTC of CUDA 13 was not found" in str(warned[0].message), warned
ops.use("require")
try:
    ops.enabled(torch.device("cuda", 0), torch.float32)
except RuntimeError as error:
    assert "NVRTC of CUDA 13 was not found" in str(error)
else:
    raise SystemExit("it did not raise")
assert not os.path.exists(os.environ["SCORESDE_CACHE"])
"""
    root = str(Path(switch.__file__).parents[2])
    environment = {**os.environ, "PATH": "", "LD_LIBRARY_PATH": "", "SCORESDE_CACHE": "/nowhere/cache"}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
