"""Files as other projects write them, and what their networks compute, from the facts of the formats alone."""

from __future__ import annotations

import io
import math
import pickle
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ARGS = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}


class _Persistent:
    """Pickles as an object of EDM's classes does."""

    def __init__(self, name: str, state: dict[str, Any], source: str):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@contextmanager
def _peers() -> Any:
    """The modules that the names in a pickle are of, while it is written."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("what is read is never called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": module}
    try:
        yield
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


_OF_DIT = {
    "inlet": "x_embedder.proj",
    "conditioning.inner": "t_embedder.mlp.0",
    "conditioning.outer": "t_embedder.mlp.2",
    "conditioning.label": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "outlet": "final_layer.linear",
    "blocks.0.modulation": "blocks.0.adaLN_modulation.1",
    "blocks.0.qkv": "blocks.0.attn.qkv",
    "blocks.0.proj": "blocks.0.attn.proj",
    "blocks.0.inner": "blocks.0.mlp.fc1",
    "blocks.0.outer": "blocks.0.mlp.fc2",
}


def dit_tensors(ours: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Tensors of our DiT of one block, one channel and patches of 2, under the names and shapes of DiT's state dict."""
    parts = {name: name.rpartition(".") for name in ours if "omega" not in name}
    found = {f"{_OF_DIT[module]}.{leaf}": ours[name] for name, (module, _, leaf) in parts.items()}
    weight = found["x_embedder.proj.weight"].unflatten(1, (1, 2, 2))
    return found | {"x_embedder.proj.weight": weight, "pos_embed": positions[None]}


def _module(name: str, tensors: dict[str, Tensor], source: str, **attributes: Any) -> _Persistent:
    """A module of nested modules whose tensors have these dotted names."""
    own = {key: torch.nn.Parameter(value) for key, value in tensors.items() if "." not in key}
    inner: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(first, {})[rest] = value
    modules = OrderedDict((key, _module("Module", each, source)) for key, each in inner.items())
    state = {"training": False, "_parameters": OrderedDict(own), "_buffers": OrderedDict(), "_modules": modules}
    return _Persistent(name, state | attributes, source)


def write_edm(
    path: Path,
    tensors: dict[str, Tensor],
    wrapper: str = "EDMPrecond",
    args: Any = None,
    source: str = "# none",
    **state: Any,
) -> Path:
    """An EDM network pickle."""
    args = ARGS if args is None else args
    with _peers():
        network = _module(args["model_type"], tensors, source, _init_args=(), _init_kwargs=args)
        state |= {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict(model=network)}
        ema = _Persistent(wrapper, state | {"_init_args": (), "_init_kwargs": args}, source)
        path.write_bytes(
            pickle.dumps({"ema": ema, "loss_fn": None, "dataset_kwargs": {"use_labels": True}}, protocol=4)
        )
    return path


def song_tensors(seed: int, **changed: Any) -> dict[str, Tensor]:
    """Random weights of a SongUNet of two levels with one block each, by its names."""
    args = ARGS | changed
    random, width, channels = torch.Generator().manual_seed(seed), args["model_channels"], args["img_channels"]
    ncsn, emb, noise = args["encoder_type"] == "residual", 4 * width, width * args["channel_mult_noise"]
    found: dict[str, Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        fan = math.prod(shape[1:])
        found[f"{name}.weight"] = torch.randn(shape, generator=random) / math.sqrt(fan)
        found[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=random)

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=random)
        found[f"{name}.bias"] = 0.2 * torch.randn(size, generator=random)

    def block(name: str, inputs: int, outputs: int, *, attends: bool = False, skip: bool = False) -> None:
        norm(f"{name}.norm0", inputs), layer(f"{name}.conv0", outputs, inputs, 3, 3)
        layer(f"{name}.affine", outputs, emb)
        norm(f"{name}.norm1", outputs), layer(f"{name}.conv1", outputs, outputs, 3, 3)
        if skip or inputs != outputs:
            layer(f"{name}.skip", outputs, inputs, 1, 1)
        if attends:
            norm(f"{name}.norm2", outputs), layer(f"{name}.qkv", 3 * outputs, outputs, 1, 1)
            layer(f"{name}.proj", outputs, outputs, 1, 1)

    if ncsn:
        found["map_noise.freqs"] = 16 * torch.randn(noise // 2, generator=random)
    if args["label_dim"]:
        layer("map_label", noise, args["label_dim"])
    layer("map_layer0", emb, noise), layer("map_layer1", emb, emb)
    layer("enc.8x8_conv", width, channels, 3, 3), block("enc.8x8_block0", width, width)
    block("enc.4x4_down", width, width, skip=True)
    if ncsn:
        layer("enc.4x4_aux_residual", width, channels, 3, 3)
    block("enc.4x4_block0", width, 2 * width, attends=True)
    block("dec.4x4_in0", 2 * width, 2 * width, attends=True), block("dec.4x4_in1", 2 * width, 2 * width)
    block("dec.4x4_block0", 4 * width, 2 * width), block("dec.4x4_block1", 3 * width, 2 * width, attends=True)
    block("dec.8x8_up", 2 * width, 2 * width, skip=True)
    block("dec.8x8_block0", 3 * width, width), block("dec.8x8_block1", 2 * width, width)
    norm("dec.8x8_aux_norm", width), layer("dec.8x8_aux_conv", channels, width, 3, 3)
    return found


def song(tensors: dict[str, Tensor], x: Tensor, noise: Tensor, told: Tensor | None = None, **changed: Any) -> Tensor:
    """F of a SongUNet of two levels, in float64: written down from the facts, with none of our layers."""
    args, w = ARGS | changed, {name: value.double() for name, value in tensors.items()}
    ncsn, classes = args["encoder_type"] == "residual", args["label_dim"]
    count = args["model_channels"] * args["channel_mult_noise"] // 2
    if ncsn:
        angle = noise.double()[:, None] * 2 * math.pi * w["map_noise.freqs"]
    else:
        angle = noise.double()[:, None] * 1e4 ** (-torch.arange(count).double() / (count - 1))
    emb = torch.cat([angle.sin(), angle.cos()], 1)

    def apply(name: str, h: Tensor, pad: int = 0) -> Tensor:
        if h.ndim == 2:
            return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=pad)

    if classes:
        emb = emb + apply("map_label", told.double() * math.sqrt(classes))
    emb = F.silu(apply("map_layer1", F.silu(apply("map_layer0", emb))))
    taps = torch.tensor([1.0, 3, 3, 1] if ncsn else [0.0, 1, 1, 0]).double()
    taps = taps / taps.sum()

    def resampled(h: Tensor, up: bool) -> Tensor:
        kernel = (taps[:, None] * taps).expand(h.shape[1], 1, 4, 4)
        if up:
            return F.conv_transpose2d(h, 4 * kernel, stride=2, padding=1, groups=h.shape[1])
        return F.conv2d(h, kernel, stride=2, padding=1, groups=h.shape[1])

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, min(32, h.shape[1] // 4), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def block(name: str, h: Tensor, way: bool | None = None) -> Tensor:
        inner = F.silu(norm(f"{name}.norm0", h))
        if way is not None:
            inner, h = resampled(inner, way), resampled(h, way)
        inner = apply(f"{name}.conv0", inner, 1) + apply(f"{name}.affine", emb)[:, :, None, None]
        inner = apply(f"{name}.conv1", F.silu(norm(f"{name}.norm1", inner)), 1)
        h = (inner + (apply(f"{name}.skip", h) if f"{name}.skip.weight" in w else h)) / math.sqrt(2)
        if f"{name}.qkv.weight" in w:
            q, k, v = apply(f"{name}.qkv", norm(f"{name}.norm2", h)).flatten(2).unflatten(1, (-1, 3)).unbind(2)
            mixed = v @ (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1).mT
            h = (h + apply(f"{name}.proj", mixed.reshape(h.shape))) / math.sqrt(2)
        return h

    h = apply("enc.8x8_conv", x.double(), 1)
    skips = [h, block("enc.8x8_block0", h)]
    h = block("enc.4x4_down", skips[-1], False)
    if ncsn:  # convolved over the plane that goes on with zeros, then filtered and halved; the bias comes last
        wide = F.conv2d(x.double(), w["enc.4x4_aux_residual.weight"], padding=2)
        kernel = (taps[:, None] * taps).expand(wide.shape[1], 1, 4, 4)
        aux = F.conv2d(wide, kernel, stride=2, groups=wide.shape[1]) + w["enc.4x4_aux_residual.bias"][:, None, None]
        h = (h + aux) / math.sqrt(2)
    skips += [h, block("enc.4x4_block0", h)]
    h = block("dec.4x4_in1", block("dec.4x4_in0", skips[-1]))
    for name in ("4x4_block0", "4x4_block1"):
        h = block(f"dec.{name}", torch.cat([h, skips.pop()], 1))
    h = block("dec.8x8_up", h, True)
    for name in ("8x8_block0", "8x8_block1"):
        h = block(f"dec.{name}", torch.cat([h, skips.pop()], 1))
    return apply("dec.8x8_aux_conv", F.silu(norm("dec.8x8_aux_norm", h)), 1)


def as_torch_file(value: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
