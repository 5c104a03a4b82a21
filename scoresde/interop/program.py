"""A denoiser, or a whole sampler of fixed size, as one program that runs without scoresde: torch.export and ONNX."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Cond, Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction
from ..noise.rng import Rng
from ..sampling.sampler import Sampler

Row = list[tuple[int, float]]
"""A linear combination: of which tensors, each with its factor."""


class DenoiserProgram(nn.Module):
    """(x_t (B, *event), t (B,), cond) -> (x̂_0, ε̂)."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        p = self.denoiser(x, t, cond)
        return p.x0, p.eps


class SamplerProgram(nn.Module):
    r"""(x_T (B, *event), cond) -> x_0, by a sampler that draws no noise and whose steps are linear in what they hear.

    Such a sampler asks the network at linear combinations of x_T and of all (x̂_0, ε̂) before; they depend on its times
    alone. So it is run once on unit vectors in place of samples, and what comes out are the factors.

    Args:
        denoiser: the model.
        sampler: of a fixed number of evaluations.

    Raises:
        ValueError: an adaptive sampler, or one that draws noise.
    """

    times: Tensor

    def __init__(self, denoiser: Denoiser, sampler: Sampler):
        super().__init__()
        if (calls := sampler.evaluations) is None:
            raise ValueError(
                f"{sampler.step!r} decides as it goes how many steps it takes, and a program takes always the same: "
                "choose a step of fixed size."
            )
        units = torch.eye(1 + 2 * calls, dtype=torch.float64, device="cpu")
        basis = _Basis(denoiser, units)
        end = sampler(basis, units[:1], rng=_Silent(0))
        self.denoiser = denoiser
        self.register_buffer("times", torch.stack(basis.times))
        self.rows = [_row(found) for found in [*basis.asked, end[0]]]

    def forward(self, x: Tensor, cond: Cond = None) -> Tensor:
        values = [x]
        for t, row in zip(self.times.unbind(), self.rows, strict=False):
            p = self.denoiser(_combined(row, values), t, cond)
            values += [p.x0, p.eps]
        return _combined(self.rows[-1], values)


class _Basis(DenoiserWrapper):
    """Answers call k with the unit vectors 1 + 2k and 2 + 2k, and keeps what it was asked."""

    def __init__(self, denoiser: Denoiser, units: Tensor):
        super().__init__(denoiser)
        self.units, self.times, self.asked = units, list[Tensor](), list[Tensor]()

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        k = 1 + 2 * len(self.asked)
        self.asked.append(x[0])
        self.times.append(t.to("cpu", torch.float64))
        return Prediction(self.units[k : k + 1], self.units[k + 1 : k + 2], self.sde.at(t, x))


class _Silent(Rng):
    def _draw(self, kind: str, *_: Any, **__: Any) -> Tensor:
        raise ValueError("This sampler draws noise, and a program has none to draw: choose one with eta=0.")


def _row(factors: Tensor) -> Row:
    return [(j, value) for j, value in enumerate(factors.tolist()) if value]


def _combined(row: Row, values: Sequence[Tensor]) -> Tensor:
    total = None
    for j, factor in row:
        term = values[j] if factor == 1 else values[j] * factor
        total = term if total is None else total + term
    return torch.zeros_like(values[0]) if total is None else total


def exported(program: nn.Module, example: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The program of these arguments, for every batch size.

    Args:
        example: arguments of at least two samples; each tensor is of the batch in its first axis.
    """
    batch = torch.export.Dim("batch")
    shapes = torch.utils._pytree.tree_map(lambda _: {0: batch}, example)
    return torch.export.export(program.eval(), example, dynamic_shapes=shapes, strict=False)


def to_torch(program: torch.export.ExportedProgram) -> bytes:
    """The file that `torch.export.load` reads."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def to_onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """An ONNX model, of inputs and outputs of these names.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    require_onnx()
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert made is not None  # as dynamo=True returns it
    content: bytes = made.model_proto.SerializeToString()
    return content


def require_onnx() -> None:
    """Raises ImportError, in words, where onnx or onnxscript is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"format=onnx needs onnx and onnxscript: pip install 'scoresde[onnx]' ({error}).") from error
