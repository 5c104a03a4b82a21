"""Inference checkpoints of k-diffusion (crowsonkb/k-diffusion): safetensors with the configuration as metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import positive
from .imported import Arguments, Imported, Node, Tensors
from .pickles import ForeignFileError

_LARGEST = 2**20  # bytes of the configuration
_MOST = 2**26  # logits of a head; the size of a picture is in no tensor, so that a file may claim any
_WAVES = 9  # numbers that tell of augmentation; zeros say that there was none
_IDLE = (
    "type",
    "cross_attn_depths",
    "augment_prob",
    "augment_wrapper",
    "dropout_rate",
    "mapping_dropout_rate",
    "sigma_sample_density",
    "loss_config",
    "loss_weighting",
    "loss_scales",
)
_PIECES = {
    "qkv": "qkv_proj.weight",
    "proj": "out_proj.weight",
    "modulation": "norm.linear.weight",
    "inner": "up_proj.weight",
    "outer": "down_proj.weight",
}


def holds(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON text, and the text."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def read(path: Path, args: Mapping[str, Any] | None = None) -> Imported:
    """The network of a file.

    Args:
        path: of the file.
        args: the configuration, with `model` and `dataset`, where the file has none.

    Raises:
        ForeignFileError: it is no whole safetensors file, has no configuration, or has what is not known here.
    """
    named, config = _content(path)
    config = dict(args) if args else config
    groups = {name: config.get(name, {}) for name in ("model", "dataset")}
    if not all(isinstance(group, dict) for group in groups.values()) or not groups["model"]:
        raise ForeignFileError(
            f"{path} has no configuration of k-diffusion in its metadata: give it, args=config.json."
        )
    model, data = (Arguments(group, path) for group in groups.values())
    kinds = {"image_v1": _unet, "image_transformer_v1": _first, "image_transformer_v2": _second}
    kind = model.only("type", None, *kinds)
    model.only("has_variance", False, False, *([True] if kind == "image_v1" else []))
    for name in ("mapping_cond_dim", "unet_cond_dim", "cross_cond_dim", "skip_stages"):
        model.only(name, 0, 0)
    channels, sides = model.whole("input_channels"), _pair(model, "input_size")
    classes, drops = data.whole("num_classes", 0, 0) if kind != "image_v1" else 0, data.number("cond_dropout_rate", 0.1)
    node, weights = kinds[kind](model, Tensors(named, path), (channels, *sides), classes)
    sigma_data, low, high = (
        positive(model.number(name, usual), name)
        for name, usual in (("sigma_data", 1.0), ("sigma_min", 0.01), ("sigma_max", 80.0))
    )
    model.done(*_IDLE)
    if classes:
        node["cond_dropout"] = drops
    return Imported(
        path=path,
        format=f"k-diffusion checkpoint, {kind}",
        licence="k-diffusion's code: MIT; that of the weights is their author's",
        network=node,
        sde={"_target_": "scoresde.EDMSDE", "sigma_min": low, "sigma_max": high},
        parameterization={"_target_": "scoresde.EDM", "sigma_data": sigma_data},
        weights=weights,
        event_shape=(channels, *sides),
        scale_input=True,
        sigma_data=sigma_data,
        span=(-1.0, 1.0) if channels in (1, 3) else None,
        classes=classes,
        unknown=(
            "whether samples are pictures in [-1, 1] or latents, which is told by the number of channels",
            *(["names of the classes"] if classes else []),
            *(["the learned variance is left out"] if model.given.get("has_variance") else []),
        ),
    )


def _content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration), {} where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("config", "{}")
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ForeignFileError(f"{path} is no whole safetensors file: {error!s:.200}.") from error
    if len(text) > _LARGEST:
        raise ForeignFileError(f"{path}: a configuration of {len(text):,} characters is none.")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"{path}: its configuration is no JSON: {error!s:.200}.") from error
    if not isinstance(config, dict):
        raise ForeignFileError(f"{path}: its configuration is a {type(config).__name__}; expected a mapping.")
    return named, config


def _pair(model: Arguments, name: str) -> list[int]:
    sides = model.wholes(name)
    if len(sides) != 2 or not all(0 < side <= 4096 for side in sides):
        raise ForeignFileError(f"{model.path}: {name} is two sides of 1 to 4096 pixels; got {sides!s:.80}.")
    return sides


def _unet(model: Arguments, tensors: Tensors, shape: tuple[int, ...], classes: int) -> tuple[Node, dict[str, Tensor]]:
    """The U-Net. What it is told of augmentation goes through no bias: zeros say nothing."""
    widths, depths, patch = model.wholes("channels"), model.wholes("depths"), model.whole("patch_size", 1)
    attended = model.get("self_attn_depths", None)
    if not 0 < len(widths) == len(depths) or min(*widths, *depths) < 1:
        raise ForeignFileError(
            f"{model.path}: channels and depths have one number, ≥ 1, per level; got {widths} and {depths}."
        )
    if not isinstance(attended, list) or len(attended) != len(widths):
        raise ForeignFileError(f"{model.path}: self_attn_depths has true or false per level; got {attended!s:.80}.")
    for level, attends in enumerate(attended):
        places = math.prod(side // patch >> level for side in shape[1:])
        _attention({"type": "global" if attends else "none"}, model.path, places)
    tensors.drop(".kernel", "mapping_cond.weight")
    start = "inner_model." if model.get("augment_wrapper", True) else ""
    found = {"waves.omega": 2 * math.pi * tensors.take(f"{start}timestep_embed.weight").flatten()}

    def layer(ours: str, theirs: str, *ends: str) -> None:
        for end in ends or ("weight", "bias"):
            found[f"{ours}.{end}"] = tensors.take(f"{start}{theirs}.{end}")

    def level_of(ours: str, theirs: str, level: int, first: int) -> None:
        step = 1 + bool(attended[level])
        for k in range(0, step * depths[level], step):
            for piece, number in {
                "norm1.film": "0.mapper",
                "conv1": "2",
                "norm2.film": "4.mapper",
                "conv2": "6",
            }.items():
                layer(f"{ours}.{k}.{piece}", f"{theirs}.{first + k}.main.{number}")
            if f"{start}{theirs}.{first + k}.skip.weight" in tensors:
                layer(f"{ours}.{k}.skip", f"{theirs}.{first + k}.skip", "weight")
            if attended[level]:
                for piece, name in {"norm.film": "norm_in.mapper", "qkv": "qkv_proj", "proj": "out_proj"}.items():
                    layer(f"{ours}.{k + 1}.{piece}", f"{theirs}.{first + k + 1}.{name}")

    for ours, theirs in {"inner": "mapping.0", "outer": "mapping.2", "inlet": "proj_in", "outlet": "proj_out"}.items():
        layer(ours, theirs)
    if model.given.get("has_variance"):  # one more channel, the last
        found |= {name: found[name][:-1] for name in ("outlet.weight", "outlet.bias")}
    for level in range(len(widths)):
        level_of(f"downs.{level}", f"u_net.d_blocks.{level}", level, 1)
        level_of(f"ups.{level}", f"u_net.u_blocks.{level}", len(widths) - 1 - level, 0)
    tensors.done()
    node: Node = {"widths": widths, "depths": depths, "attention": [k for k, attends in enumerate(attended) if attends]}
    node |= {"patch": patch, "embedding_width": model.whole("mapping_out")}
    return {"_target_": "scoresde.nn.ModulatedUNet", "_partial_": True, **node}, found


def _second(model: Arguments, tensors: Tensors, shape: tuple[int, ...], classes: int) -> tuple[Node, dict[str, Tensor]]:
    """HDiT."""
    patch, widths, depths = _pair(model, "patch_size"), model.wholes("widths"), model.wholes("depths")
    if not 0 < len(widths) == len(depths) or min(*widths, *depths) < 1:
        raise ForeignFileError(
            f"{model.path}: widths and depths have one number, ≥ 1, per level; got {widths} and {depths}."
        )
    neighbours = [{"type": "neighborhood"}] * (len(widths) - 1)
    specs = model.get("self_attns", None) or [*neighbours, {"type": "global"}]
    if not isinstance(specs, list) or len(specs) != len(widths):
        raise ForeignFileError(f"{model.path}: self_attns has one entry per level; got {specs!s:.80}.")
    attention, heads, attends = list[str | int](), list[int](), list[bool]()
    for level, spec in enumerate(specs):
        places = math.prod(side // p >> level for side, p in zip(shape[1:], patch, strict=True))
        kind, head = _attention(spec, model.path, places)
        attention.append(kind)
        heads.append(head)
        attends.append(kind != "none")
    found = _embedding(tensors, classes)
    last = len(widths) - 1
    for level, depth in enumerate(depths):
        ends = (
            {"mid_level": "middle"}
            if level == last
            else {f"{way}_levels.{level}": f"{way}s.{level}" for way in ("down", "up")}
        )
        for theirs, ours in ends.items():
            for k in range(depth):
                _block(found, tensors, f"{ours}.{k}", f"{theirs}.{k}", attends[level])
                if attends[level]:
                    found[f"{ours}.{k}.attention.scale"] = tensors.take(f"{theirs}.{k}.self_attn.scale")
                    freqs = tensors.take(f"{theirs}.{k}.self_attn.pos_emb.freqs")
                    found[f"{ours}.{k}.attention.freqs"] = torch.stack([freqs, freqs])
        if level < last:
            found[f"merges.{level}.weight"] = tensors.take(f"merges.{level}.proj.weight")
            found[f"splits.{level}.weight"] = tensors.take(f"splits.{level}.proj.weight")
    shares = [tensors.take(f"splits.{level}.fac").reshape(-1) for level in range(last)]
    found["shares"] = torch.cat([torch.empty(0, device="cpu", dtype=torch.float32), *shares])
    found["inlet.weight"] = tensors.take("patch_in.proj.weight")
    found["outlet.weight"] = tensors.take("patch_out.proj.weight")
    tensors.done()
    said = _said_of_mapping(model, found)
    hidden = model.wholes("d_ffs", ()) if model.given.get("d_ffs") else _hidden(found, last)
    node = {"widths": widths, "depths": depths, "attention": attention, "head_widths": heads, "hidden": hidden}
    return _node(patch, **node, **said), found


def _attention(spec: Any, path: Path, places: int) -> tuple[str | int, int]:
    """(what `HourglassDiT` calls it, numbers per head) of an entry of self_attns."""
    if not isinstance(spec, dict):
        raise ForeignFileError(f"{path}: an entry of self_attns is a mapping; got {spec!s:.80}.")
    given = Arguments(spec, path)
    if given.get("type", None) == "neighborhood":
        raise ForeignFileError(
            f"{path}: self_attns type='neighborhood' needs the compiled kernels of NATTEN and is not read here; "
            "'global', 'shifted-window' and 'none' are."
        )
    kind = given.only("type", None, "global", "shifted-window", "none")
    window = given.whole("window_size") if kind == "shifted-window" else 0
    reach = {"global": places, "none": 64}.get(kind, window**2)
    if places * reach > _MOST:
        raise ForeignFileError(
            f"{path}: {kind} attention of {places:,} tokens to {reach:,} is more than {_MOST:,} numbers a head, "
            "and no tensor bears the size of the picture out."
        )
    if kind == "none":
        return "none", 1
    head = given.whole("d_head", 64)
    given.done()
    return window or "global", head


def _first(model: Arguments, tensors: Tensors, shape: tuple[int, ...], classes: int) -> tuple[Node, dict[str, Tensor]]:
    """The first transformer: one level whose heads of 64 are turned as a whole, in neighbouring pairs."""
    patch, width, depth = _pair(model, "patch_size"), model.whole("width"), model.whole("depth")
    _attention({"type": "global"}, model.path, math.prod(n // p for n, p in zip(shape[1:], patch, strict=True)))
    found = _embedding(tensors, classes)
    for k in range(depth):
        _block(found, tensors, f"middle.{k}", f"blocks.{k}", attends=True)
        ours, theirs = f"middle.{k}.attention", f"blocks.{k}.self_attn"
        # their scale of a head is the logarithm of ours, up to 100; norms are root mean squares, ours lengths
        found[f"{ours}.scale"] = tensors.take(f"{theirs}.qk_norm.scale").clamp(max=math.log(100.0)).exp()
        freqs = [tensors.take(f"{theirs}.pos_emb.freqs_{axis}") for axis in "hw"]
        found[f"{ours}.freqs"] = torch.stack(freqs).exp()
        q, k_, v = found[f"{ours}.qkv.weight"].unflatten(0, (3, -1)).unbind()
        q, k_ = (part.unflatten(0, (-1, 32, 2)).transpose(1, 2).flatten(0, 2) / 8 for part in (q, k_))
        found[f"{ours}.qkv.weight"] = torch.cat([q, k_, v])
    cells = (shape[0], *patch)  # in and out of patches go channels first
    inlet, outlet = tensors.take("in_proj.weight"), tensors.take("out_proj.weight")
    found["inlet.weight"] = inlet.unflatten(1, cells).movedim(1, 3).flatten(1)
    found["outlet.weight"] = outlet.unflatten(0, cells).movedim(0, 2).flatten(0, 2)
    found["shares"] = torch.empty(0, device="cpu", dtype=torch.float32)
    tensors.done()
    mapping = _said_of_mapping(None, found)
    hidden = [model.whole("d_ff")] if model.given.get("d_ff") else _hidden(found, 0)
    node = {"widths": [width], "depths": [depth], "attention": ["global"], "head_widths": [64], "hidden": hidden}
    return _node(patch, **node, **mapping, rotary=1.0, aspect=patch[0] / patch[1]), found


def _node(patch: list[int], **args: Any) -> Node:
    return {"_target_": "scoresde.nn.HourglassDiT", "_partial_": True, "patch": patch, **args}


def _embedding(tensors: Tensors, classes: int) -> dict[str, Tensor]:
    """What both transformers share: the noise level, the label and the mapping. No augmentation is a constant."""
    told, about = tensors.take("aug_in_proj.weight"), tensors.take("aug_emb.weight")
    if about.shape != (told.shape[-1] // 2, _WAVES):
        raise ForeignFileError(
            f"{tensors.path}: aug_emb.weight is {tuple(about.shape)}; augmentation has {_WAVES} numbers."
        )
    found = {
        "waves.omega": 2 * math.pi * tensors.take("time_emb.weight").flatten(),
        "noise.weight": tensors.take("time_in_proj.weight"),
        "noise.bias": told[:, : told.shape[-1] // 2].sum(1),  # the cosines of zeros are ones
        "first.scale": tensors.take("mapping.in_norm.scale"),
        "last.scale": tensors.take("mapping.out_norm.scale"),
        "norm.scale": tensors.take("out_norm.scale"),
    }
    if classes:
        found["label.weight"] = tensors.take("class_emb.weight")
    k = 0
    while f"mapping.blocks.{k}.norm.scale" in tensors:
        found[f"mapping.{k}.norm.scale"] = tensors.take(f"mapping.blocks.{k}.norm.scale")
        for ours in ("inner", "outer"):
            found[f"mapping.{k}.{ours}.weight"] = tensors.take(f"mapping.blocks.{k}.{_PIECES[ours]}")
        k += 1
    return found


def _block(found: dict[str, Tensor], tensors: Tensors, ours: str, theirs: str, attends: bool) -> None:
    """Attention but for its places, and the perceptron."""
    parts = {"attention": ("self_attn", ("qkv", "proj"))} if attends else {}
    for part, (their_part, pieces) in (parts | {"perceptron": ("ff", ("inner", "outer"))}).items():
        for piece in pieces:
            found[f"{ours}.{part}.{piece}.weight"] = tensors.take(f"{theirs}.{their_part}.{_PIECES[piece]}")
        found[f"{ours}.{part}.norm.modulation.weight"] = tensors.take(f"{theirs}.{their_part}.{_PIECES['modulation']}")


def _hidden(found: Mapping[str, Tensor], last: int) -> list[int]:
    """The inner widths, which a configuration may leave to a rule."""
    names = [*(f"downs.{level}" for level in range(last)), "middle"]
    return [found[f"{name}.0.perceptron.outer.weight"].shape[-1] for name in names]


def _said_of_mapping(model: Arguments | None, found: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of the mapping, as the tensors have them and the configuration must."""
    depth = sum(name.startswith("mapping.") and name.endswith(".norm.scale") for name in found)
    said = {
        "mapping_width": len(found["first.scale"]),
        "mapping_depth": depth,
        "mapping_hidden": found["mapping.0.outer.weight"].shape[-1] if depth else 1,
    }
    if model is None:
        return said
    usual = {"mapping_width": 256, "mapping_depth": 2}
    for ours, theirs in (
        ("mapping_width", "mapping_width"),
        ("mapping_depth", "mapping_depth"),
        ("mapping_hidden", "mapping_d_ff"),
    ):
        given = model.get(theirs, None)
        if (usual.get(ours) if given is None else given) not in (None, said[ours]):
            raise ForeignFileError(
                f"{model.path}: {theirs} is {said[ours]} by its tensors; the configuration says {given!s:.40}."
            )
    return said
