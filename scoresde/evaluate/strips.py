"""Videos and volumes, (C, T, H, W): as pictures with frame beside frame, and as GIFs."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..runs.publish import replacing


def strips(x: Tensor) -> Tensor:
    """(…, C, T, H, W) as pictures (…, C, H, T·(W + 1)), a light line behind every frame."""
    lined = F.pad(x.float(), (0, 1), value=float(x.max()))
    return lined.movedim(-3, -2).flatten(-2)


def animation(x: Tensor, path: Path, limits: tuple[float, float], *, columns: int = 8, rate: float = 8.0) -> Path:
    """A GIF of videos side by side that run together, again and again; of many the first 64.

    Args:
        x: (n, C, T, H, W); the first three channels are colours, of two the first is shown.
        path: the GIF to write.
        limits: black and white.
        columns: videos in a row.
        rate: frames a second.
    """
    from PIL import Image

    low, high = limits
    x = ((x[:64].cpu().float() - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round()
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1, -1)
    n, scale = len(x), max(1, 64 // max(x.shape[-2:]))
    rows = -(-n // columns)
    x = F.pad(x, (0, 1, 0, 1, 0, 0, 0, 0, 0, rows * columns - n), value=255.0)
    sheet = x.unflatten(0, (rows, columns)).permute(3, 0, 4, 1, 5, 2).flatten(3, 4).flatten(1, 2)  # T, rows, columns, C
    sheet = sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    first, *others = (Image.fromarray(frame).quantize(256) for frame in sheet.byte().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 / rate), loop=0)
    return path
