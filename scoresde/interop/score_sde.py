"""score_sde's checkpoints (yang-song/score_sde_pytorch): NCSN++ and DDPM++, configured by a file of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .imported import Arguments, Imported, Node, Tensors, with_outlet_negated
from .pickles import ForeignFileError
from .unets import Layout, Names, Place, geometric, swapped_halves, unet_weights

LICENCE = "score_sde: Apache 2.0"
_NAMES = Names(
    block={
        "norm1": "GroupNorm_0",
        "conv1": "Conv_0",
        "film": "Dense_0",
        "norm2": "GroupNorm_1",
        "conv2": "Conv_1",
        "skip": "Conv_2",
    },
    attention={},
)
# Arguments that change no output of these networks, or none in evaluation.
_IDLE = (
    *("resamp_with_conv", "fir_kernel", "attention_type", "init_scale", "conv_size", "ema_rate", "fourier_scale"),
    *("progressive_combine", "sigma_begin", "sigma_end"),
)


def read(path: Path, content: Mapping[str, Any], args: Mapping[str, Any] | None) -> Imported:
    """The network of a checkpoint.

    Args:
        path: of the file.
        content: what `torch_files.load` made of it.
        args: its configuration: "data", "training" and "model", as its config file has them.

    Raises:
        ForeignFileError: the configuration is missing or of another network, or the tensors do not fit it.
    """
    parts = [dict((args or {}).get(name) or {}) for name in ("data", "training", "model")]
    if not all(parts):
        raise ForeignFileError(
            f"{path} does not say what its network is: give its configuration as JSON, with data, training and model "
            "as score_sde's config file has them: args=config.json."
        )
    data, training, model = (Arguments(part, path) for part in parts)
    side, channels = data.size("image_size"), data.whole("num_channels", 3)
    centred = bool(data.get("centered", False))
    kind = training.only("sde", "vpsde", "vesde", "vpsde", "subvpsde")
    node, layout = _network(model, side)
    changed, sign = _process(kind, bool(training.get("continuous", True)), model, path)
    model.done(*_IDLE)
    shape = (channels, side, side)
    last = {str(name).removeprefix("module."): value for name, value in content["model"].items()}
    if len(last) < len(content["model"]):
        raise ForeignFileError(f"{path}: two of its tensors have the same name, with and without 'module.'.")
    average = _average(path, content, last, node["embedding"] == "fourier")
    weights, raw = (_weights(path, named, node, layout, sign) for named in (average, last))
    if not centred:
        inside = {name: value for name, value in node.items() if name != "_partial_"} | {"event_shape": list(shape)}
        node = {"_target_": "scoresde.nn.Affine", "network": inside, "scale": 2.0, "shift": -1.0}
        weights, raw = ({f"network.{name}": value for name, value in each.items()} for each in (weights, raw))
    return Imported(
        path=path,
        format=f"score_sde checkpoint, {'NCSN++' if layout.pyramid else 'DDPM++'}, step {content.get('step')}",
        licence=LICENCE,
        network=node,
        weights=weights,
        raw_weights=raw,
        event_shape=shape,
        span=(-1.0, 1.0) if centred else (0.0, 1.0),
        unknown=("the data, and whether they were dequantised",),
        **changed,
    )


def _network(model: Arguments, side: int) -> tuple[Node, Layout]:
    model.only("name", "ncsnpp", "ncsnpp")
    model.only("nonlinearity", "swish", "swish"), model.only("normalization", "GroupNorm", "GroupNorm")
    model.only("resblock_type", "biggan", "biggan"), model.only("progressive", "none", "none")
    model.only("conditional", True, True)
    residual = model.only("progressive_input", "none", "none", "residual") == "residual"
    fourier = model.only("embedding_type", "fourier", "fourier", "positional") == "fourier"
    fir = model.only("fir", False, True, False)
    width, mults, blocks = (
        model.whole("nf", 128),
        model.wholes("ch_mult", (1, 2, 2, 2)),
        model.whole("num_res_blocks", 4),
    )
    sides = [side >> level for level in range(len(mults))]
    attended = [each in model.wholes("attn_resolutions", (16,)) for each in sides]
    layout = Layout(sides, blocks, attended, pyramid=residual)
    node = layout.node(width, mults) | {
        "embedding": "fourier" if fourier else "sinusoidal",
        "embedding_width": 4 * width,
        "waves": 2 * width if fourier else width,
        **({"fir": True, "fir_zeros": True} if fir else {}),
        **({"progressive_input": "residual", "pyramid_conv_first": True} if residual else {}),
        **({} if model.only("skip_rescale", True, True, False) else {"residual_scaling": False}),
        "scale_shift": False,
        "resample_skip": True,
        "dropout": model.number("dropout", 0.1),
    }
    return node, layout


def _process(kind: str, continuous: bool, model: Arguments, path: Path) -> tuple[dict[str, Any], int]:
    """(nodes of the process, of the output and of what the network is told, the sign of the network's output)."""
    fourier = model.get("embedding_type", "fourier") == "fourier"
    scaled = bool(model.get("scale_by_sigma", True))
    low, high = model.number("sigma_min", 0.01), model.number("sigma_max", 50.0)
    first, last = model.number("beta_min", 0.1), model.number("beta_max", 20.0)
    steps = model.whole("num_scales", 1000)
    if fourier != (kind == "vesde") or (scaled and kind != "vesde"):
        raise ForeignFileError(
            f"{path}: {kind} with embedding_type={'fourier' if fourier else 'positional'}, scale_by_sigma={scaled} is "
            "not known here: VE hears log(sigma), by a Fourier embedding, VP and sub-VP 999 t, by a positional one."
        )
    eps: Node = {"_target_": "scoresde.Eps"}
    if kind == "vesde":
        if not continuous:
            raise ForeignFileError(f"{path}: a VE network of discrete noise levels is not known here.")
        sde = {"_target_": "scoresde.VESDE", "sigma_min": low, "sigma_max": high}
        told = {"_target_": "scoresde.LogNoiseInput", "scale": 1.0, "offset": 0.0}
        if scaled:  # it says the score, but without the division by σ: −ε
            return {"sde": sde, "parameterization": eps, "noise_input": told}, -1
        return {"sde": sde, "parameterization": {"_target_": "scoresde.Score"}, "noise_input": told}, 1
    if continuous:
        name = "VPSDE" if kind == "vpsde" else "SubVPSDE"
        sde = {"_target_": f"scoresde.{name}", "beta_min": first, "beta_max": last}
        told = {"_target_": "scoresde.TimeInput", "scale": 999.0, "offset": 0.0}
    elif kind == "vpsde":
        ends = {"beta_start": first / steps, "beta_end": last / steps}
        sde = {"_target_": "scoresde.DDPM", "betas": "linear", "steps": steps, **ends}
        told = {"_target_": "scoresde.TimeInput", "scale": float(steps), "offset": -1.0}
    else:
        raise ForeignFileError(f"{path}: a sub-VP network of discrete steps is not known here.")
    return {"sde": sde, "parameterization": eps, "noise_input": told}, 1


def _average(path: Path, content: Mapping[str, Any], last: Mapping[str, Any], fourier: bool) -> dict[str, Any]:
    """The averaged tensors by name: the file has a list of them, in the order of the trained parameters."""
    fixed = {"sigmas", *(["all_modules.0.W"] if fourier else [])}
    names = [name for name in last if name not in fixed]
    shadow = (content.get("ema") or {}).get("shadow_params")
    if not isinstance(shadow, list) or len(shadow) != len(names):
        found = len(shadow) if isinstance(shadow, list) else "no"
        raise ForeignFileError(f"{path} has {found} averaged tensors for {len(names)} parameters.")
    for name, value in zip(names, shadow, strict=True):
        if not isinstance(value, Tensor) or not isinstance(last[name], Tensor) or value.shape != last[name].shape:
            raise ForeignFileError(f"{path}: the averaged {name} has another shape than the last one.")
    return {**last, **dict(zip(names, shadow, strict=True))}


def _weights(path: Path, named: Mapping[str, Any], node: Node, layout: Layout, sign: int) -> dict[str, Tensor]:
    tensors, fourier = Tensors(named, path), node["embedding"] == "fourier"
    module = 1 if fourier else 0  # the number of the first linear layer
    at = iter(range(module + 2, 10_000))

    def theirs(place: Place) -> str:
        start = f"all_modules.{next(at)}"
        return f"{start}.Conv2d_0" if place.part == "pyramid" else start

    def attention(place: Place, start: str) -> dict[str, Tensor]:
        maps = [tensors.take(f"{start}.NIN_{k}.W").T for k in range(4)]  # input × output there
        biases = [tensors.take(f"{start}.NIN_{k}.b") for k in range(4)]
        return {
            "norm.weight": tensors.take(f"{start}.GroupNorm_0.weight"),
            "norm.bias": tensors.take(f"{start}.GroupNorm_0.bias"),
            "qkv.weight": torch.cat(maps[:3])[..., None, None].contiguous(),
            "qkv.bias": torch.cat(biases[:3]),
            "proj.weight": maps[3][..., None, None].contiguous(),
            "proj.bias": biases[3],
        }

    weights = unet_weights(layout, tensors, _NAMES, theirs, attention)
    embedding = {
        "inner.weight": swapped_halves(tensors.take(f"all_modules.{module}.weight")),
        "inner.bias": tensors.take(f"all_modules.{module}.bias"),
        "outer.weight": tensors.take(f"all_modules.{module + 1}.weight"),
        "outer.bias": tensors.take(f"all_modules.{module + 1}.bias"),
    }
    if fourier:
        embedding["waves.omega"] = (2 * math.pi * tensors.take("all_modules.0.W").double()).float()
    else:
        embedding["waves.omega"] = geometric(node["waves"] // 2, last=True)
    weights |= {f"conditioning.{name}": value for name, value in embedding.items()}
    tensors.drop("sigmas")
    tensors.done()
    return with_outlet_negated(weights) if sign < 0 else weights
