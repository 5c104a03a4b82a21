r"""A whole sampling run as one CUDA graph: captured once, replayed with new noise.

A GPU does the arithmetic of a small network in less time than Python takes to ask for it; a graph asks once for all the
kernels of a run. The steps are those of the eager loop. Times lie on the CPU, so what is computed from them is constant
in the graph. Noise is numbered from a position in device memory (`CapturedRng`), so a replay gives what the loop would
have given for the same `Rng`, and leaves that where the loop would have.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..diffusion.conditions import Cond, each, named
from ..diffusion.denoiser import Denoiser
from ..noise.rng import CapturedRng, Rng
from ..ops import enabled, why_not

_WAITED = "synchronizing CUDA operation"

Run = Callable[[Tensor, Cond, Rng], Tensor]
"""(x_T, cond, rng) -> samples."""


class CudaGraph:
    """A CUDA graph with memory of its own.

    Raises:
        ValueError: the batch is not on a CUDA device.
        RuntimeError: the kernels, which alone can draw noise inside a graph, are off or not available.
    """

    def __init__(self, like: Tensor):
        if like.device.type != "cuda":
            raise ValueError(
                f"cuda_graph=True samples on a CUDA device, and this batch is on {like.device}: move the denoiser "
                "there, or take cuda_graph=False."
            )
        if not enabled(like.device, like.dtype):
            reason = why_not(like.device, like.dtype) or "SCORESDE_KERNELS or kernels.use said so"
            raise RuntimeError(
                "cuda_graph=True needs the CUDA kernels, which draw the noise inside the graph; they are off for "
                f"{like.dtype} on {like.device}: {reason}. Mend that, or take cuda_graph=False."
            )
        self.device, self.graph = like.device, torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` returns, filled anew by every replay. It runs twice: to warm up, and to be captured.

        Raises:
            RuntimeError: it does what a graph cannot contain; the line is named.
        """
        with torch.cuda.device(self.device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            # Libraries make their work space and choose their algorithms in a first run, which a capture forbids. What
            # it forbids of us is found here, too: before torch 2.12 a failed capture leaves the allocator unsound.
            try:
                with torch.cuda.stream(stream), _no_waiting():
                    run()
            except RuntimeError as error:
                if _WAITED not in str(error):
                    raise
                raise RuntimeError(explained(error)) from error
            current.wait_stream(stream)
            try:
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    return run()
            except RuntimeError as error:
                raise RuntimeError(f"{explained(error)} Start a new process before you do.") from error

    def replay(self) -> None:
        self.graph.replay()


class Recorded:
    """One recorded run, with tensors of its own for its inputs."""

    def __init__(self, run: Run, x: Tensor, cond: Cond, rng: Rng):
        graph = CudaGraph(x)
        self.x, self.cond = x.clone(), each(Tensor.clone, cond)
        self.rng: CapturedRng = rng.captured(x.device)

        def once() -> Tensor:
            self.rng.rewind()
            return run(self.x, self.cond, self.rng)

        with _no_autocast_cache():
            self.out = graph.record(once)
        self.graph = graph

    def __call__(self, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
        self.x.copy_(x)
        for mine, given in zip(_tensors(self.cond), _tensors(cond), strict=True):
            mine.copy_(given)
        self.rng.load(rng)
        self.graph.replay()
        return self.out.clone()


class Graphs:
    """The last recorded run of each denoiser, for as long as the denoiser lives."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Denoiser, tuple[Any, Recorded]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # copies of a sampler record for themselves

    def __call__(self, run: Run, fixed: tuple[Any, ...], denoiser: Denoiser, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """`run(x, cond, rng)`, by a graph that is recorded if there is none, or if what it is bound to has changed.

        That is `fixed`; shape, dtype, strides and device of x and of the tensors in `cond`; number and row of the
        streams; place, shape and dtype of the denoiser's parameters and buffers (their values may change); which of its
        modules train; and autocast.
        """
        for tensor in _tensors(cond):
            if tensor.device != x.device:
                raise ValueError(
                    f"cuda_graph=True needs the condition where the samples are, on {x.device}; got {tensor.device}."
                )
        with torch.inference_mode(False), torch.no_grad():
            layouts = [(name, _layout(value)) for name, value in sorted(named(cond, "").items())]
            bound = (fixed, _layout(x), layouts, rng.layout, _state(denoiser, x))
            kept = self._kept.get(denoiser)
            if kept is None or kept[0] != bound:
                self._kept.pop(denoiser, None)  # its memory first
                kept = self._kept[denoiser] = bound, Recorded(run, x, cond, rng)
            return kept[1](x, cond, rng)


def explained(error: BaseException) -> str:
    """What a failed capture says: the line that caused it, and what to do."""
    while error.__context__ is not None:  # the end of the capture fails too, after what made it fail
        error = error.__context__
    torch_folder = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if torch_folder not in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, `{frames[-1].line}`," if frames else "A step"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"This run cannot be one CUDA graph. {where} does what a graph cannot contain ({reason}): it reads a value "
        "back (float(x), x.item(), `if x.any():`, x[mask]), or brings one from the CPU (torch.tensor(…, device=…), "
        "x.to(device)). Compute it of the times, which lie on the CPU, keep it in a buffer of the denoiser, or take "
        "cuda_graph=False."
    )


def _tensors(cond: Cond) -> list[Tensor]:
    return [value for _, value in sorted(named(cond, "").items())]


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.device, x.dtype, x.shape, x.stride()


def _state(denoiser: Denoiser, x: Tensor) -> tuple[Any, ...]:
    tensors = itertools.chain(denoiser.parameters(), denoiser.buffers())
    device = x.device.type
    return (
        [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors],
        [module.training for module in denoiser.modules()],
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )


@contextlib.contextmanager
def _set(value: Any, read: Callable[[], Any], write: Callable[[Any], object]) -> Iterator[None]:
    """A setting of torch, with `value` for a while."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _no_waiting() -> contextlib.AbstractContextManager[None]:
    """Within it torch raises an error, with `_WAITED` in it, where the CPU would wait for the GPU."""
    return _set("error", torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode)


def _no_autocast_cache() -> contextlib.AbstractContextManager[None]:
    """Casts of the weights that autocast keeps would outlive neither the capture nor a change of the weights."""
    return _set(False, torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)
