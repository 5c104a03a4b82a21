"""Folders of diffusers (Apache 2.0): two JSON files and safetensors. Some networks need diffusers itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .diffusers_model import KINDS
from .imported import Arguments, Imported, Node, Tensors
from .pickles import ForeignFileError
from .schedules import process
from .unets import Layout, Names, Place, swapped_halves, unet_weights, with_none

WEIGHTS = "diffusion_pytorch_model.safetensors"
_LARGEST = 2**20  # bytes of a JSON file
_MOST = {"num_layers": 256, "layers_per_block": 64}
NAMES = Names(
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "film": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    attention={},
)
_EMBEDDING = {"conditioning.inner": "time_embedding.linear_1", "conditioning.outer": "time_embedding.linear_2"}
# Arguments with the one value that our U-Net has; others are left to diffusers' own class.
_ALIKE: dict[str, Any] = {
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "class_embed_type": None,
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
}


def read(path: Path, args: Mapping[str, Any] | None = None) -> Imported:
    """The network of a folder: of a pipeline, or of a model alone.

    Args:
        path: with `unet/` or `transformer/`, and `scheduler/`; or with `config.json`.
        args: the scheduler's configuration, where the folder has none; beside it overrules what is there.

    Raises:
        ForeignFileError: a file is missing or damaged, the network or the process is none of those that are known.
    """
    home = next((path / name for name in ("unet", "transformer") if (path / name).is_dir()), path)
    config = json_of(home / "config.json")
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ForeignFileError(f"{home}: _class_name is one of {', '.join(KINDS)}; found {kind!s:.80}.")
    scheduler = path / "scheduler" / "scheduler_config.json"
    told = {**(json_of(scheduler) if scheduler.is_file() else {}), **(args or {})}
    if not told:
        raise ForeignFileError(
            f"{path} has no scheduler/scheduler_config.json, and so does not say what its process is: give it, "
            "args=scheduler_config.json."
        )
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, most in _MOST.items():
        if not (type(given.get(name, 1)) is int and 0 < given.get(name, 1) <= most):
            raise ForeignFileError(f"{home}: {name} is 1 to {most}; found {given[name]!s:.80}.")
    facts = Arguments(given, home)
    side, channels = facts.size("sample_size"), facts.whole("in_channels", 4 if kind == KINDS[1] else 3)
    tensors = _tensors(home)
    twice = given.get("out_channels") not in (None, channels)
    # DiT's schedulers do not say so, but its networks have no other second output
    learned = twice and (kind == KINDS[1] or told.get("variance_type") == "learned_range")
    classes = facts.whole("num_embeds_ada_norm", 1000) if kind == KINDS[1] else (given.get("num_class_embeds") or 0)
    node, weights = _own(facts, tensors, side, twice, learned) if kind == KINDS[0] else (None, {})
    if node is None:
        dropout = 0.1 if kind == KINDS[1] else 0.0
        node = {"_target_": "scoresde.interop.DiffusersModel", "_partial_": True, "_convert_": "all"}
        node |= {"kind": kind, "config": given, "cond_dropout": dropout, **({"outputs": 2} if learned else {})}
        weights = {f"inner.{name}": value for name, value in tensors.items()}
    latents = (path / "vae").is_dir() or (path / "vqvae").is_dir()
    unknown = ["names of the classes"] if classes else []
    return Imported(
        path=path,
        format=f"diffusers folder, {kind}",
        licence="diffusers' code: Apache 2.0; that of the weights is in their own card",
        network=node,
        weights=weights,
        event_shape=(channels, side, side),
        classes=classes,
        span=None if latents else (-1.0, 1.0),
        outputs=1 + learned,
        unknown=(*unknown, "what its second output is, which is left out") if twice > learned else tuple(unknown),
        **process_nodes(told),
    )


def process_nodes(told: Mapping[str, Any]) -> dict[str, Any]:
    """Nodes of the SDE, the parameterisation and the time that the network hears."""
    own = process(told)
    offset = 0.0 if own.is_flow else -1.0
    names = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "trained_betas")
    table = {name: told[name] for name in (*names, "rescale_betas_zero_snr") if told.get(name) is not None}
    sde = {"_target_": "scoresde.RectifiedFlow", "t_max": 1 - 1e-5}  # theirs begins with noise alone, at 1
    return {
        "sde": sde if own.is_flow else {"_target_": "scoresde.interop.beta_table", **table},
        "parameterization": {"_target_": f"scoresde.{type(own.parameterization).__name__}"},
        "noise_input": {"_target_": "scoresde.TimeInput", "scale": float(own.steps), "offset": offset},
    }


def _own(
    facts: Arguments, tensors: dict[str, Tensor], side: int, twice: bool, learned: bool
) -> tuple[Node | None, dict[str, Any]]:
    """Our U-Net and its weights; None where no choice of its switches is this network."""
    given = facts.given
    widths, blocks = facts.wholes("block_out_channels", (224, 448, 672, 896)), facts.whole("layers_per_block", 2)
    down, up = given.get("down_block_types", ()), given.get("up_block_types", ())
    attended = [name == "AttnDownBlock2D" for name in down]
    mirrored = ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)]
    known = all(name in ("DownBlock2D", "AttnDownBlock2D") for name in down) and list(up) == mirrored
    alike = all(given.get(name, value) == value for name, value in _ALIKE.items()) and twice == learned
    whole = bool(widths) and all(width % widths[0] == 0 and width % 32 == 0 for width in widths)
    if not (known and alike and whole and len(attended) == len(widths)) or side % 2 ** (len(widths) - 1):
        return None, {}
    sides, each = [side >> level for level in range(len(widths))], given.get("attention_head_dim", 8)
    middle, classes = bool(given.get("add_attention", True)), given.get("num_class_embeds") or 0
    layout = Layout(sides, blocks, attended, attend_all=True, middle=middle, resample="conv")
    node = layout.node(widths[0], [width // widths[0] for width in widths]) | {
        **({"heads": 1} if each is None else {"head_width": each}),
        "embedding": "sinusoidal",
        "embedding_scale": 0.01,
        "embedding_width": 4 * widths[0],
        "waves": widths[0],
        "late": True,
        "residual_scaling": False,
        "resnet_resample": False,
        "strided": True,
        "scale_shift": False,
        "eps": facts.number("norm_eps", 1e-5),
        "group_channels": 1,
        "dropout": facts.number("dropout", 0.0),
        **({"cond_dropout": 0.0} if classes else {}),
        **({"outputs": 2} if learned else {}),
    }
    return node, _weights(facts, Tensors(tensors, facts.path), layout, classes)


def their_name(place: Place, last: int) -> str:
    """What the tensors of a layer of UNet2DModel begin with; `last` is the number of its lowest level."""
    kind = "attentions" if place.kind == "attention" else "resnets"
    return {
        "inlet": "conv_in",
        "down": f"down_blocks.{place.level - 1}.downsamplers.0.conv",
        "encoder": f"down_blocks.{place.level}.{kind}.{place.number}",
        "middle": f"mid_block.{kind}.{place.number}",
        "up": f"up_blocks.{last - place.level - 1}.upsamplers.0.conv",
        "decoder": f"up_blocks.{last - place.level}.{kind}.{place.number}",
        "norm": "conv_norm_out",
        "outlet": "conv_out",
    }[place.part]


def _weights(facts: Arguments, tensors: Tensors, layout: Layout, classes: int) -> dict[str, Tensor]:
    last = len(layout.sides) - 1

    def attention(place: Place, start: str) -> dict[str, Tensor]:
        found = tensors.layers({"norm": f"{start}.group_norm", "proj": f"{start}.to_out.0"})
        for end in ("weight", "bias"):
            found[f"qkv.{end}"] = torch.cat([tensors.take(f"{start}.to_{name}.{end}") for name in "qkv"])
        # theirs are dense layers, ours convolutions of one point
        return {name: value[..., None, None] if value.ndim == 2 else value for name, value in found.items()}

    found = unet_weights(layout, tensors, NAMES, lambda place: their_name(place, last), attention)
    found |= tensors.layers(_EMBEDDING)
    if not facts.only("flip_sin_to_cos", True, True, False):
        found["conditioning.inner.weight"] = swapped_halves(found["conditioning.inner.weight"])
    count = found["conditioning.inner.weight"].shape[1] // 2
    # in float32, as theirs: a last bit of a frequency is 1e-4 of an angle at step 999
    places = torch.arange(count, dtype=torch.float32, device="cpu")
    found["conditioning.waves.omega"] = (-math.log(10_000) * places / (count - facts.number("freq_shift", 0))).exp()
    if classes:
        rows = tensors.take("class_embedding.weight")
        found["conditioning.label.weight"] = with_none(rows)
    tensors.done()
    return found


def json_of(path: Path) -> dict[str, Any]:
    """A mapping from a small JSON file.

    Raises:
        ForeignFileError: it is none.
    """
    try:
        if not path.is_file():  # a pipe or a device has no end
            raise ValueError("it is no regular file")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ForeignFileError(f"{path} is expected to be a JSON file of diffusers: {error!s:.200}.") from error
    if not isinstance(found, dict):
        raise ForeignFileError(f"{path} holds a {type(found).__name__}; expected a mapping.")
    return found


def _tensors(home: Path) -> dict[str, Tensor]:
    """The weights by their names there, in float32.

    Raises:
        ForeignFileError: they are not in one safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = home / WEIGHTS
    if not path.is_file():
        found = ", ".join(sorted(each.name for each in home.iterdir())[:6])
        raise ForeignFileError(
            f"{home} has no {WEIGHTS}; it has {found!s:.200}. Pickles (.bin) are not opened, and weights in several "
            "files have to be joined: save_pretrained(…, safe_serialization=True, max_shard_size='100GB')."
        )
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ForeignFileError(f"{path} is no whole safetensors file: {error!s:.200}.") from error
