"""A run as a folder of diffusers, where its network is one of theirs and its process a table of betas."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..runs.run import Run
from .diffusers_folder import NAMES, WEIGHTS, their_name
from .schedules import PREDICTIONS
from .unets import Layout

_SAME = {  # arguments of nn.UNet that UNet2DModel has no others of: (its value, our default)
    "scale_shift": (False, True),
    "strided": (True, False),
    "resnet_resample": (False, True),
    "attend_all": (True, False),
    "late": (True, False),
    "residual_scaling": (False, True),
    "group_channels": (1, 4),
    "resample_skip": (False, False),
    "progressive_input": ("none", "none"),
}
_TABLES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def files(run: Run) -> dict[str, bytes]:
    """The files of the folder: `unet/` or `transformer/`, `scheduler/`, and of a U-Net's pipeline `model_index.json`.

    Raises:
        ConfigError: the process, what the network is told, or the network is none of theirs; the message says what.
    """
    scheduler = _scheduler(run)
    kind, config, tensors = _network(run)
    learned = run.denoiser.heads == 2 and kind == "UNet2DModel"  # DiT's pipeline leaves its variance out by itself
    scheduler |= {"variance_type": "learned_range"} if learned else {"set_alpha_to_one": True}
    name = "DDPM" if learned else "DDIM"  # whose pipeline takes networks of one output alone
    part = "unet" if kind == "UNet2DModel" else "transformer"
    from safetensors.torch import save

    found = {
        f"{part}/config.json": _text({"_class_name": kind, "_diffusers_version": "0.42.1", **config}),
        f"{part}/{WEIGHTS}": save({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, {"format": "pt"}),
        "scheduler/scheduler_config.json": _text({"_class_name": f"{name}Scheduler", **scheduler}),
    }
    if part == "unet":
        parts = {"unet": ["diffusers", kind], "scheduler": ["diffusers", f"{name}Scheduler"]}
        found["model_index.json"] = _text({"_class_name": f"{name}Pipeline", "_diffusers_version": "0.42.1", **parts})
    return found


def _scheduler(run: Run) -> dict[str, Any]:
    """What DDIMScheduler and DDPMScheduler have in common."""
    sde, node, meaning = (run.config[name] for name in ("sde", "denoiser", "parameterization"))
    names = ("num_train_timesteps", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    if sde["_target_"] == "scoresde.interop.beta_table":
        table = {name: sde[name] for name in ("beta_schedule", *names) if name in sde}
    elif sde["_target_"] == "scoresde.DDPM":
        table = {"beta_schedule": _TABLES[sde.get("betas", "linear")], "num_train_timesteps": sde.get("steps", 1000)}
        table |= {name: sde[name] for name in ("beta_start", "beta_end") if name in sde}
    else:
        raise _refused(run, f"its process is {sde['_target_']}, and that of their schedulers DDPM: sde=ddpm")
    steps = table.get("num_train_timesteps", 1000)
    known = {f"scoresde.{each.__name__}": name for name, each in PREDICTIONS.items() if name != "flow_prediction"}
    if meaning["_target_"] not in known:
        raise _refused(run, f"its output is {meaning['_target_']}, and theirs one of {', '.join(known)}")
    told = node.get("noise_input") or {}
    exact = told.get("_target_") == "scoresde.TimeInput" and (told.get("scale"), told.get("offset")) == (steps, -1)
    if not exact or node.get("scale_input", True):
        raise _refused(
            run, f"its network sees scaled x and hears other times than theirs, x_t and TimeInput({steps}, -1)"
        )
    return {**table, "prediction_type": known[meaning["_target_"]], "clip_sample": False}


def _network(run: Run) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(class, configuration, weights) as diffusers has them."""
    node = run.config["network"]
    state = {n.removeprefix("network."): v for n, v in run.denoiser.state_dict().items() if n.startswith("network.")}
    if node["_target_"] == "scoresde.interop.DiffusersModel":
        return node["kind"], dict(node["config"]), {n.removeprefix("inner."): v for n, v in state.items()}
    if node["_target_"] != "scoresde.nn.UNet":
        other = "; diffusers' DiT has other waves, 10^(-4i/127), than ours, 10^(-4i/128)" if "DiT" in str(node) else ""
        raise _refused(run, f"{node['_target_']} is none of their networks{other}")
    wrong = [f"{name}={want}" for name, (want, usual) in _SAME.items() if node.get(name, usual) != want]
    widths = [node["width"] * each for each in node.get("multipliers", (1, 2, 2))]
    omega, count = state["conditioning.waves.omega"], len(state["conditioning.waves.omega"])
    shift = next((k for k in (0, 1) if count > 1 and torch.allclose(omega, _waves(count, k), rtol=1e-6, atol=0)), None)
    wrong += ["embedding=sinusoidal, embedding_scale=0.01 and waves as many as width"] if shift is None else []
    wrong += ["waves as many as width"] if shift is not None and 2 * count != node["width"] else []
    wrong += (
        ["embedding_width four times width"]
        if node.get("embedding_width", 4 * node["width"]) != 4 * node["width"]
        else []
    )
    wrong += ["widths that 32 divides"] if any(width % 32 for width in widths) else []
    wrong += ["no conditions but labels"] if set(run.kinds) - {"label"} else []
    wrong += ["pictures (C, H, W) with H = W"] if len(run.event_shape) != 3 or len({*run.event_shape[1:]}) > 1 else []
    sides = [run.event_shape[-1] >> level for level in range(len(widths))]
    attended = [side in node.get("attention", ()) for side in sides]
    head = node.get("head_width") or None
    if head is None and node.get("heads", 1) > 1:
        wrong += ["heads=1, or head_width"]
    if wrong:
        raise _refused(run, f"UNet2DModel is this network where it has {', '.join(wrong)}")
    central = node.get("middle_attention")
    central = any(attended) if central is None else central
    labels = state.get("conditioning.label.weight")
    if labels is not None and node.get("cond_dropout") == 0:
        labels = labels[:-1]  # nobody was told nothing
    config = {
        "sample_size": sides[0],
        "in_channels": run.event_shape[0],
        "out_channels": run.event_shape[0] * run.denoiser.heads,
        "block_out_channels": widths,
        "layers_per_block": node.get("blocks", 2),
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
        "attention_head_dim": head,
        "add_attention": central,
        "norm_eps": node.get("eps", 1e-6),
        "freq_shift": shift,
        "num_class_embeds": None if labels is None else len(labels),
    }
    layout = Layout(sides, config["layers_per_block"], attended, attend_all=True, middle=central, resample="conv")
    found = _weights(layout, state)
    return "UNet2DModel", config, found if labels is None else found | {"class_embedding.weight": labels}


def _weights(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a U-Net by their names, but for its labels."""
    last, found = len(layout.sides) - 1, dict[str, Tensor]()
    for place in layout.places():
        start = their_name(place, last)
        for end in ("weight", "bias"):
            if place.kind == "block":
                pairs = {f"{theirs}.{end}": f"{place.ours}.{ours}.{end}" for ours, theirs in NAMES.block.items()}
                found |= {f"{start}.{theirs}": state[ours] for theirs, ours in pairs.items() if ours in state}
            elif place.kind == "attention":
                flat = {name: state[f"{place.ours}.{name}.{end}"] for name in ("norm", "qkv", "proj")}
                qkv = flat["qkv"].flatten(1) if end == "weight" else flat["qkv"]
                found[f"{start}.group_norm.{end}"] = flat["norm"]
                found[f"{start}.to_out.0.{end}"] = flat["proj"].flatten(1) if end == "weight" else flat["proj"]
                found |= {f"{start}.to_{name}.{end}": part for name, part in zip("qkv", qkv.chunk(3), strict=True)}
            else:
                ours = f"{place.ours}.conv" if place.part in ("down", "up") else place.ours
                found[f"{start}.{end}"] = state[f"{ours}.{end}"]
    for ours, theirs in (("inner", "linear_1"), ("outer", "linear_2")):
        found |= {f"time_embedding.{theirs}.{end}": state[f"conditioning.{ours}.{end}"] for end in ("weight", "bias")}
    return {name: value.clone() for name, value in found.items()}


def _waves(count: int, shift: int) -> Tensor:
    places = torch.arange(count, dtype=torch.float32, device="cpu")
    return (-math.log(10_000) * places / (count - shift)).exp()


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _refused(run: Run, why: str) -> ConfigError:
    return ConfigError(
        f"{run.folder} cannot be given to diffusers: {why}. format=safetensors, torch_export or onnx takes any run."
    )
