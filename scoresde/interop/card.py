"""What is known of a trained run, as the README.md of what it is exported to."""

from __future__ import annotations

import json
from typing import Any

from ..checks import whole
from ..codecs import Codec
from ..ops.broadcast import host
from ..runs import samplers
from ..runs.run import Run

_FILL_IN = "(to be filled in)"
_USE = {
    "safetensors": """
```python
import scoresde

run = scoresde.load(".")  # this folder
raw = run.sample(16, budget=10)
```
""",
    "torch_export": """
```python
import torch  # nothing else

denoiser = torch.export.load("denoiser.pt2").module()  # (x_t, t (B,){told}) -> (x_0, eps) as predicted
sampler = torch.export.load("sampler-{budget}.pt2").module()  # (x_T{told}) -> x_0
x_0 = sampler({std:.6g} * torch.randn(16, {event}){told})
```
""",
    "onnx": """
```python
import numpy, onnxruntime

denoiser = onnxruntime.InferenceSession("denoiser.onnx")  # x_t, t (B,){told} -> x_0, eps as predicted
```
""",
    "diffusers": """
```python
import diffusers

pipe = diffusers.DDIMPipeline.from_pretrained(".")  # this folder; of a DiT, DiTTransformer2DModel in transformer/
```
""",
}


def card(run: Run, format: str, budgets: list[int]) -> str:
    """Data, process, bits/dim, samplers with their errors, how to use it, and fields of a licence to fill in."""
    summary = _summary(run)
    told = "".join(f", {name}" for name in run.kinds)
    std = float(run.denoiser.sde.marginal(host(run.denoiser.sde.t_max))[1])
    use = _USE[format].format(
        told=told,
        budget=budgets[0] if budgets else "N",
        std=std,
        event=", ".join(map(str, run.event_shape)),
    )
    count = sum(parameter.numel() for parameter in run.denoiser.parameters())
    network, node = run.config["network"], run.config["parameterization"]
    lines = [
        f"---\nlibrary_name: {'diffusers' if format == 'diffusers' else 'scoresde'}",
        "tags: [diffusion, score-based]\nlicense: other\n---\n",
        f"# A score-based model of {run.dataset.name}\n",
        f"Made by scoresde. {use}",
        "| | |\n|---|---|",
        f"| data | {run.dataset.name}, samples {run.raw_shape}, as the network sees them {run.event_shape} |",
        f"| coordinates | {_coordinates(run.codec)} |",
        f"| conditions | {_conditions(run)} |",
        f"| process | `{run.denoiser.sde!r}` |",
        f"| output | `{node['_target_'].rpartition('.')[2]}` |",
        f"| network | `{network['_target_'].rpartition('.')[2]}`, {count:,} parameters |",
        f"| weights | {run.weights}, step {run.step:,}{_images(summary)} |",
        f"| log-likelihood | {_bits(summary)} |",
        f"| checkpoint | SHA-256 {run.digest} |\n",
        _samplers(run, summary),
        "## Licence\n",
        *(
            f"- {what}: {_FILL_IN}"
            for what in ("Licence of the weights", "Author and how to cite", "Licence of the data")
        ),
        f"- Intended use, and what it must not be used for: {_FILL_IN}\n",
    ]
    return "\n".join(lines)


def _summary(run: Run) -> dict[str, Any]:
    """What training measured at its end; nothing where it did not, or the run is a file."""
    path = run.folder / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _coordinates(codec: Codec) -> str:
    return f"`{codec!r}`".replace("\n", " ")


def _conditions(run: Run) -> str:
    return " and ".join(map(str, run.kinds.values())) or "none"


def _images(summary: dict[str, Any]) -> str:
    images = summary.get("images")
    return f", {whole(images, 'images', 0):,} samples seen" if images is not None else ""


def _bits(summary: dict[str, Any]) -> str:
    bits = summary.get("bits_per_dim")
    if not isinstance(bits, dict) or "mean" not in bits:
        return "not measured: `scoresde-likelihood run=…`"
    estimator = bits.get("estimator", "bpd/ode")
    return f"{bits['mean']:.4f} ± {bits['stderr']:.2g} bits/dim ({estimator}, {bits['points']} held-out points)"


def _samplers(run: Run, summary: dict[str, Any]) -> str:
    rows = [
        f"| {found['budget']} | {'fitted' if found['log_snr'] else 'generic'} | {found['error']:.3g} ± "
        f"{found['error_stderr']:.1g} | {found['guidance'] or 'none'} |"
        for found in samplers.read(run.folder)
    ]
    parts = []
    if rows:
        head = "| network calls | sampler | RMS distance to the exact end | guidance |\n|---|---|---|---|"
        parts.append("\n".join(["## Samplers\n", head, *rows, ""]))
    measured = [
        f"- {found['sampler']}, {found['nfe']:.0f} calls: sliced W2 {found['sliced_w2']:.4g}"
        for found in summary.get("samplers") or []
        if found.get("sliced_w2") is not None
    ]
    return "\n".join([*parts, *measured, ""] if measured else parts)
