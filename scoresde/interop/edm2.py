"""EDM2's network pickles (NVlabs/edm2), whose weights are float16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import edm
from .imported import Arguments, Imported, Tensors
from .unets import Layout, rows_of_qkv

LICENCE = "EDM2's code and published weights: CC BY-NC-SA 4.0, not for commercial use"
_PIECES = {"res0": "conv_res0", "emb": "emb_linear", "res1": "conv_res1", "skip": "conv_skip", "proj": "attn_proj"}
_IDLE = ("use_fp16", "logvar_channels")


def read(path: Path, content: Mapping[str, Any]) -> Imported:
    """The network of a pickle.

    Args:
        path: of the file.
        content: what `torch_files.load` made of it.

    Raises:
        ForeignFileError: it has what is not known here.
    """
    wrapper = content["ema"]
    args = Arguments(edm.arguments_of(wrapper), path)
    named = edm.flattened(wrapper, path)
    tensors = Tensors({n.removeprefix("unet."): v for n, v in named.items() if n.startswith("unet.")}, path)
    side, channels, width = args.size("img_resolution"), args.whole("img_channels"), args.whole("model_channels", 192)
    mults, blocks = args.wholes("channel_mult", (1, 2, 3, 4)), args.whole("num_blocks", 3)
    sides = [side >> level for level in range(len(mults))]
    wanted, classes = args.wholes("attn_resolutions", (16, 8)), args.whole("label_dim", 0, 0)
    names = (("label", 0.5), ("concat", 0.5), ("res", 0.3), ("attn", 0.3))
    balances = [args.number(f"{name}_balance", usual) for name, usual in names] + [args.number("clip_act", 256.0)]
    args.only("resample_filter", [1, 1], [1, 1])
    emb, waves = args.get("channel_mult_emb", None), args.get("channel_mult_noise", None)
    sigma_data = args.number("sigma_data", 0.5)
    head_width = args.whole("channels_per_head", 64)
    node = {
        "_target_": "scoresde.nn.MagnitudeUNet",
        "_partial_": True,
        "width": width,
        "multipliers": mults,
        "blocks": blocks,
        "attention": [each for each in sides if each in wanted],
        "head_width": head_width,
        "embedding_width": None if emb is None else width * args.whole("channel_mult_emb"),
        "waves": None if waves is None else width * args.whole("channel_mult_noise"),
        "dropout": args.number("dropout", 0.0),
        "balances": balances,
        **({"cond_dropout": args.number("label_dropout", 0.0)} if classes else {}),
    }
    args.done(*_IDLE)
    weights = _weights(tensors, Layout(sides, blocks, [False] * len(sides), middle=False), head_width, classes > 0)
    return Imported(
        path=path,
        format="EDM2 network pickle, Precond",
        licence=LICENCE,
        network=node,
        sde={"_target_": "scoresde.EDMSDE", "sigma_min": 0.002, "sigma_max": 80.0},
        parameterization={"_target_": "scoresde.EDM", "sigma_data": sigma_data},
        weights=weights,
        event_shape=(channels, side, side),
        scale_input=True,
        sigma_data=sigma_data,
        span=(-1.0, 1.0) if channels in (1, 3) else None,
        classes=classes,
        uncertainty=_uncertainty(Tensors({n: v for n, v in named.items() if n.startswith("logvar")}, path)),
        unknown=("whether samples are pictures in [-1, 1] or latents, which is told by the number of channels",),
    )


def _uncertainty(tensors: Tensors) -> dict[str, Tensor] | None:
    """u(σ) = Σ ŵ_i √2 cos(f_i c + φ_i), ŵ = w/(rms(w) + 1e-4)/√n, written in cosines and sines of f_i c."""
    if "logvar_linear.weight" not in tensors:
        return None
    freqs, phases = (tensors.take(f"logvar_fourier.{name}") for name in ("freqs", "phases"))
    w = tensors.take("logvar_linear.weight").double()
    w = math.sqrt(2 / w.numel()) * w / (w.square().mean().sqrt() + 1e-4)
    return {
        "features.omega": freqs,
        "linear.weight": torch.cat([w * phases.cos(), -w * phases.sin()], 1).float(),
        "linear.bias": torch.zeros(1, dtype=torch.float32, device="cpu"),
    }


def _weights(tensors: Tensors, layout: Layout, head_width: int, labelled: bool) -> dict[str, Tensor]:
    found = {
        "freqs": tensors.take("emb_fourier.freqs"),
        "phases": tensors.take("emb_fourier.phases"),
        "noise.weight": tensors.take("emb_noise.weight"),
        "outlet.weight": tensors.take("out_conv.weight"),
        "gain": tensors.take("out_gain"),
    }
    if labelled:
        found["label.weight"] = tensors.take("emb_label.weight")
    for place in layout.places():
        if place.part in ("norm", "outlet"):
            continue
        start, ours = edm.name_of(place, layout.sides), place.ours
        if place.part in ("encoder", "decoder"):
            ours = ours.removesuffix(".0")  # attention is a part of its block
        if place.kind == "conv":
            found[f"{ours}.weight"] = tensors.take(f"{start}.weight")
            continue
        found[f"{ours}.gain"] = tensors.take(f"{start}.emb_gain")
        for name, theirs in _PIECES.items():
            if f"{start}.{theirs}.weight" in tensors or name.startswith(("res", "emb")):
                found[f"{ours}.{name}.weight"] = tensors.take(f"{start}.{theirs}.weight")
        if f"{start}.attn_qkv.weight" in tensors:
            rows = tensors.take(f"{start}.attn_qkv.weight")
            found[f"{ours}.qkv.weight"] = rows_of_qkv(rows, len(rows) // (3 * head_width), "hcw")
    tensors.drop(".resample_filter")
    tensors.done()
    return found
