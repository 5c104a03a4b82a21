"""State dicts and training files of DiT (facebookresearch/DiT) and SiT (willisma/SiT), which is the same network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.transformer import positions
from .imported import Arguments, Imported, Tensors, with_outlet_negated
from .pickles import ForeignFileError
from .unets import geometric, with_none

LICENCES = {"dit": "DiT's code and published weights: CC BY-NC 4.0, not for commercial use", "sit": "SiT: MIT"}
_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}  # (width, depth) of S, B, L and XL
_IDLE = ("learn_sigma", "mlp_ratio")
_AROUND = {
    "conditioning.inner": "t_embedder.mlp.0",
    "conditioning.outer": "t_embedder.mlp.2",
    "inlet": "x_embedder.proj",
    "modulation": "final_layer.adaLN_modulation.1",
    "outlet": "final_layer.linear",
}
_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "inner": "mlp.fc1",
    "outer": "mlp.fc2",
}


def read(path: Path, content: Mapping[str, Any], args: Mapping[str, Any] | None, kind: str) -> Imported:
    """The network of a file; of a training file the average.

    Args:
        path: of the file.
        content: what `torch_files.load` made of it.
        args: `num_heads`, which the file does not say and only other sizes than the published ones need;
            `num_classes`, where it is not one less than the rows of the table of labels.
        kind: "dit" or "sit".

    Raises:
        ForeignFileError: arguments are missing, or the tensors do not fit them.
    """
    flags = Arguments(dict(args or {}), path)
    training = isinstance(content.get("ema"), dict)
    groups = [content["ema"]] if training else [content]
    last_ones = content.get("model") if training else None
    if last_ones and torch.equal(last_ones["pos_embed"], groups[0]["pos_embed"]):  # else they are of no such network
        groups.append(last_ones)
    for name in ("path_type", "prediction"):  # SiT's, of the training file
        flags.only(name, (content.get("args") or {}).get(name), None, *_USUAL[name])
    (weights, node, shape, classes), *last = [_weights(path, group, flags, kind) for group in groups]
    flags.done(*_IDLE, "input_size", "patch_size", "in_channels", "hidden_size", "depth", "class_dropout_prob")
    sit = kind == "sit"
    return Imported(
        path=path,
        format=f"{'SiT' if sit else 'DiT'} {'training file' if training else 'state dict'}",
        licence=LICENCES[kind],
        network=node,
        sde={"_target_": "scoresde.RectifiedFlow"} if sit else {"_target_": "scoresde.DDPM"},
        parameterization={"_target_": "scoresde.Velocity" if sit else "scoresde.Eps"},
        noise_input={
            "_target_": "scoresde.TimeInput",
            "scale": -1.0 if sit else 1000.0,
            "offset": 1.0 if sit else -1.0,
        },
        weights=weights,
        raw_weights=last[0][0] if last else None,
        event_shape=shape,
        span=None,
        classes=classes,
        outputs=node.get("outputs", 1),
        unknown=(
            "the scale of the data (latents of Stable Diffusion's autoencoder times 0.18215 in the published ones)",
            "names of the classes",
        ),
    )


_USUAL = {"path_type": ("Linear",), "prediction": ("velocity",)}


def _weights(
    path: Path, named: Mapping[str, Any], flags: Arguments, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, ...], int]:
    """(weights, node, event shape, classes) of one set of tensors."""
    tensors, depth = Tensors(named, path), 0
    found = tensors.layers(_AROUND)
    while f"blocks.{depth}.attn.qkv.weight" in tensors:
        found |= tensors.layers({f"blocks.{depth}.{ours}": f"blocks.{depth}.{t}" for ours, t in _BLOCK.items()})
        depth += 1
    width, channels, patch, _ = found["inlet.weight"].shape
    places, table = tensors.take("pos_embed"), tensors.take("y_embedder.embedding_table.weight")
    tensors.done()
    if not depth or width < 4:
        raise ForeignFileError(f"{path} has no blocks.")
    found["inlet.weight"] = found["inlet.weight"].flatten(1)
    grid = math.isqrt(places.shape[1])
    if places.shape != (1, grid * grid, width) or not torch.allclose(
        positions((grid, grid), width), places[0], atol=1e-4
    ):
        raise ForeignFileError(f"{path}: its pos_embed is not the fixed one of a square of {width} numbers a place.")
    rows = patch**2  # patches come out as row, column, output, channel, as ours do
    outputs = len(found["outlet.bias"]) // (rows * channels)
    if kind == "sit":  # whose velocity is data less noise; what it says beside that was never trained
        for name in ("outlet.weight", "outlet.bias"):
            found[name] = found[name].unflatten(0, (rows, outputs, channels))[:, 0].flatten(0, 1)
        found, outputs = with_outlet_negated(found), 1
    classes, table, drops = _labels(table, flags)
    found["conditioning.label.weight"] = table
    found["conditioning.waves.omega"] = geometric(128, last=False)
    heads = flags.get("num_heads", _HEADS.get((width, depth)))
    if heads is None:
        raise ForeignFileError(
            f"{path} does not say how many heads it has, and width {width} with {depth} blocks is none of the "
            "published sizes: args.num_heads=…."
        )
    node = {
        "_target_": "scoresde.nn.DiT",
        "_partial_": True,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": len(found["blocks.0.inner.bias"]) / width,
        "embedding": "sinusoidal",
        "embedding_scale": 0.01,
        **({"outputs": 2} if outputs == 2 else {}),
        "cond_dropout": drops,
    }
    return found, node, (channels, grid * patch, grid * patch), classes


def _labels(table: Tensor, flags: Arguments) -> tuple[int, Tensor, float]:
    """(classes, a table with a last row for none, probability of none in training; 0 for never)."""
    drops = flags.number("class_dropout_prob", 0.1 if "num_classes" not in flags.given else 0.0)
    classes = flags.whole("num_classes", len(table) - (drops > 0))
    if not 0 <= len(table) - classes <= 1:
        raise ForeignFileError(f"{flags.path} has {len(table)} rows of labels for num_classes={classes}.")
    if len(table) > classes:
        return classes, table, drops or 0.1
    return classes, with_none(table), 0.0
